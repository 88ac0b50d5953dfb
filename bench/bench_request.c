// What a request costs over the bare system calls: 64 bytes echoed on TCP connections that are all
// ready, by a task for each, and by a bare loop over poll(2) with one buffer. Both in one process,
// in turns, and only the server's part is measured: a poll before and after, and for each request
// one recv and one send. So it shows a tenth of what a load from outside drowns in noise
// (make bench-echo).
// Run: make bench, or .build/bench/bench_request [connections]
#define _GNU_SOURCE
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST = 2000, SIZE = 64, ROUNDS = 101 };

typedef struct side {
    int client[MOST], server[MOST];
} side;

static side bare, ours;
static struct pollfd fds[MOST];
static int count;
static int answered; // by tasks

// ---- connections, both ends here

static void pair(int listener, const struct sockaddr_in *to, int *client, int *server) {
    *client = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bench_require(connect(*client, (const struct sockaddr *)to, sizeof *to) == 0, "connect");
    *server = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    bench_require(*server >= 0, "accept4");
}

static void connect_all(void) {
    struct sockaddr_in where;
    socklen_t size = sizeof where;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&where, 0, sizeof where);
    where.sin_family = AF_INET;
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    bench_require(bind(listener, (struct sockaddr *)&where, size) == 0, "bind");
    bench_require(listen(listener, 16) == 0, "listen");
    getsockname(listener, (struct sockaddr *)&where, &size);
    for (int i = 0; i < count; i++) { // by turns, so that no side has the better memory
        pair(listener, &where, &bare.client[i], &bare.server[i]);
        pair(listener, &where, &ours.client[i], &ours.server[i]);
        fds[i].fd = bare.server[i];
        fds[i].events = POLLIN;
    }
    close(listener);
}

static void ask(const side *s) {
    char block[SIZE] = "a request of 64 bytes";
    for (int i = 0; i < count; i++) {
        bench_require(send(s->client[i], block, SIZE, MSG_NOSIGNAL) == SIZE, "send");
    }
}

static void take(const side *s) {
    char block[SIZE];
    for (int i = 0; i < count; i++) {
        bench_require(recv(s->client[i], block, SIZE, 0) == SIZE, "recv");
    }
}

// ---- the two servers

static void serve_bare(void) {
    static char block[1024];
    int found = poll(fds, (nfds_t)count, -1);
    for (int i = count; found > 0 && i-- > 0;) { // from the end, as that was looked at last
        if (fds[i].revents == 0) continue;
        found--;
        ssize_t got = recv(fds[i].fd, block, sizeof block, 0);
        bench_require(got == SIZE && send(fds[i].fd, block, SIZE, MSG_NOSIGNAL) == got, "echo");
    }
    poll(fds, (nfds_t)count, 0); // as the loop does, before it would sleep
}

static orch_result echo(void *arg) {
    int fd = *(int *)arg;
    char block[1024];
    ptrdiff_t got;
    orch_adopt(fd);
    while ((got = orch_read(fd, block, sizeof block)) > 0) {
        if (orch_write(fd, block, (size_t)got) < 0) break;
        answered++;
    }
    return orch_ok(NULL, NULL);
}

static void serve_ours(orch_loop *loop) {
    answered = 0;
    while (answered < count) orch_loop_step(loop, 0);
}

// Per request, in ns.
static double bare_once(void) {
    ask(&bare);
    double start = bench_now();
    serve_bare();
    double took = bench_now() - start;
    take(&bare);
    return took / count;
}

static double ours_once(orch_loop *loop) {
    ask(&ours);
    double start = bench_now();
    serve_ours(loop);
    double took = bench_now() - start;
    take(&ours);
    return took / count;
}

static void measure(int connections) {
    static double reached[ROUNDS], over[ROUNDS];
    bench_require(connections > 0 && connections <= MOST, "1 to 2000 connections");
    count = connections;
    connect_all();
    orch_loop *loop = orch_loop_new(&(orch_loop_desc){.poller = ORCH_POLLER_POLL});
    bench_require(loop != NULL, "no loop");
    for (int i = 0; i < count; i++) orch_spawn(echo, &ours.server[i]);
    for (int i = 0; i < ROUNDS; i++) {
        reached[i] = bare_once();
        over[i] = ours_once(loop) - reached[i];
    }
    printf(" %d connections", count);
    bench_figure("", bench_median(reached, ROUNDS), "ns bare", 0);
    bench_figure(", over it", bench_median(over, ROUNDS), "ns", 0);
    for (int i = 0; i < count; i++) {
        close(bare.client[i]);
        close(ours.client[i]);
        close(bare.server[i]);
    }
    while (orch_loop_step(loop, 0) == 1) {}
    for (int i = 0; i < count; i++) close(ours.server[i]);
    bench_require(orch_loop_free(loop) == 0, "not freed");
}

int main(int argc, char **argv) {
    bench_begin("request");
    if (argc > 1) {
        measure(atoi(argv[1]));
    } else {
        measure(100);
        bench_and();
        measure(1000);
    }
    bench_end();
    return 0;
}
