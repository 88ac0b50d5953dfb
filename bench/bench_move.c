// Does the loop move to the better poller, and stay there? An echo server of 64 bytes on TCP, under
// load from another process: 100, 1,000 and 10,000 connections that are all busy, and 10,000
// idle with 10 busy; pinned to poll, pinned to epoll, and self-moving; requests a second over the
// second half of each run. Runs take turns, the figure is the median of the ratios of five rounds.
// Run: make bench, or .build/bench/bench_move [seconds of a run, default 1] [row, 1 to 4]   (Linux)
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ROWS = 4, ROUNDS = 5, SIZE = 64, MOST = 10010 };

static const struct {
    const char *name;
    int count, busy;
} rows[ROWS] = {
    {"100", 100, 100}, {"1000", 1000, 1000}, {"10000", 10000, 10000}, {"10 of 10010", 10010, 10}};

static int server[MOST], client[MOST];
static double seconds = 1;
static uint64_t requests, half, moves_half;

// ---- the load: one request in flight on each busy connection

static void load(int busy) {
    static struct epoll_event events[1024];
    char block[SIZE] = "a request of 64 bytes";
    int queue = epoll_create1(0);
    for (int i = 0; i < busy; i++) {
        struct epoll_event event = {EPOLLIN, {.fd = client[i]}};
        bench_require(epoll_ctl(queue, EPOLL_CTL_ADD, client[i], &event) == 0, "epoll_ctl");
        bench_require(send(client[i], block, SIZE, 0) == SIZE, "send");
    }
    for (;;) {
        int found = epoll_wait(queue, events, 1024, -1);
        for (int i = 0; i < found; i++) {
            if (recv(events[i].data.fd, block, SIZE, 0) != SIZE) return; // the server has ended
            if (send(events[i].data.fd, block, SIZE, MSG_NOSIGNAL) != SIZE) return;
        }
    }
}

// ---- the server

static orch_result echo(void *arg) {
    int fd = *(int *)arg;
    char block[SIZE];
    orch_adopt(fd);
    for (;;) {
        orch_result r = orch_await(orch_ready(fd, ORCH_READABLE));
        if (r.error != 0) return r;
        ssize_t got = recv(fd, block, SIZE, MSG_DONTWAIT);
        if (got <= 0) return orch_fail(got < 0 ? -errno : -EPIPE);
        if (send(fd, block, (size_t)got, MSG_DONTWAIT | MSG_NOSIGNAL) != got)
            return orch_fail(-EPIPE);
        requests++;
    }
}

static orch_result serve(void *arg) {
    int count = *(int *)arg;
    for (int i = 0; i < count; i++) orch_detach(orch_go(echo, &server[i]));
    orch_sleep((uint64_t)(seconds * 500));
    uint64_t before = requests;
    moves_half = orch_loop_statistics(orch_loop_current()).moves;
    double start = bench_now();
    orch_sleep((uint64_t)(seconds * 500));
    half = (uint64_t)((double)(requests - before) * 1e9 / (bench_now() - start));
    moves_half = orch_loop_statistics(orch_loop_current()).moves - moves_half;
    return orch_ok_int((intptr_t)orch_loop_statistics(orch_loop_current()).poller);
}

static double run(int count, orch_poller poller) {
    orch_loop_desc desc = {.poller = poller};
    orch_result r = orch_run_with(&desc, serve, &count);
    bench_require(r.error == 0, "the server failed");
    if (getenv("BENCH_VERBOSE")) {
        fprintf(stderr, "  %d: asked %d, ends with %d: %llu/s, %llu moves in the second half\n",
                count, (int)poller, (int)orch_int(&r), (unsigned long long)half,
                (unsigned long long)moves_half);
    }
    return (double)half;
}

// ---- the rows

static int at_loopback(struct sockaddr_in *address) {
    socklen_t size = sizeof *address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(address, 0, sizeof *address);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    bench_require(bind(fd, (struct sockaddr *)address, size) == 0 && listen(fd, 1024) == 0 &&
                      getsockname(fd, (struct sockaddr *)address, &size) == 0,
                  "listen");
    return fd;
}

static void connect_all(const struct sockaddr_in *address, int count) {
    for (int i = 0, on = 1; i < count; i++) {
        client[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(client[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        bench_require(connect(client[i], (const struct sockaddr *)address, sizeof *address) == 0,
                      "connect");
    }
}

/* The first that connect are the busy ones. */
static pid_t open_all(int count, int busy) {
    struct sockaddr_in address;
    int listener = at_loopback(&address), on = 1;
    pid_t child = fork();
    bench_require(child >= 0, "fork");
    if (child == 0) {
        close(listener);
        connect_all(&address, count);
        load(busy);
        _exit(0);
    }
    for (int i = 0; i < count; i++) {
        server[i] = accept(listener, NULL, NULL);
        bench_require(server[i] >= 0, "accept");
        setsockopt(server[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    close(listener);
    return child;
}

static double middle(const double *rates) {
    double sorted[ROUNDS];
    memcpy(sorted, rates, sizeof sorted);
    return bench_median(sorted, ROUNDS);
}

// Against the one pinned poller that is the better: the better of each round would be a ratio to
// whichever of the two had the luckier moment.
static void row(int at) {
    double against[ROUNDS], rates[3][ROUNDS];
    uint64_t most_moves = 0;
    pid_t child = open_all(rows[at].count, rows[at].busy);
    for (int round = 0; round < ROUNDS; round++) {
        double poll = run(rows[at].count, ORCH_POLLER_POLL);
        double queue = run(rows[at].count, ORCH_POLLER_EPOLL);
        double self = run(rows[at].count, ORCH_POLLER_DEFAULT);
        if (moves_half > most_moves) most_moves = moves_half;
        rates[0][round] = poll, rates[1][round] = queue, rates[2][round] = self;
    }
    for (int i = 0; i < rows[at].count; i++) close(server[i]);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    const double *better = middle(rates[0]) > middle(rates[1]) ? rates[0] : rates[1];
    for (int round = 0; round < ROUNDS; round++) against[round] = rates[2][round] / better[round];
    double ratio = middle(against);
    printf(" %s: poll %.1f, epoll %.1f, self %.1f thousand/s, ratio %.2f (figure >= 0.95) %s, "
           "%llu moves in the second half%s",
           rows[at].name, middle(rates[0]) / 1e3, middle(rates[1]) / 1e3, middle(rates[2]) / 1e3,
           ratio, ratio >= 0.95 ? "met" : "MISSED", (unsigned long long)most_moves,
           at + 1 < ROWS ? ";" : "");
    fflush(stdout);
}

int main(int argc, char **argv) {
    struct rlimit files = {MOST + 100, MOST + 100};
    bench_require(setrlimit(RLIMIT_NOFILE, &files) == 0, "needs 10,110 descriptors");
    if (argc > 1) seconds = atof(argv[1]);
    bench_begin("move");
    for (int at = 0; at < ROWS; at++) {
        if (argc < 3 || atoi(argv[2]) == at + 1) row(at);
    }
    bench_end();
    return 0;
}
