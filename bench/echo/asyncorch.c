// The echo server on asyncorch.h: one task for each connection, which reads, writes and waits.
// `asyncorch port` listens there, and reports the loop's statistics on the port after it.
#define _GNU_SOURCE
#define ASYNCORCH_IMPLEMENTATION
#include "../../asyncorch.h"
#include "server.h"

static orch_result echo(void *arg) {
    int fd = (int)(intptr_t)arg;
    char buffer[ECHO_BUFFER];
    for (;;) {
        orch_result r = orch_await(orch_ready(fd, ORCH_READABLE));
        if (r.error != 0) break;
        ssize_t got = recv(fd, buffer, sizeof buffer, 0);
        if (got <= 0 || send(fd, buffer, (size_t)got, MSG_NOSIGNAL) != got) break;
    }
    close(fd);
    return orch_ok(NULL, NULL);
}

// A line for each byte that comes.
static orch_result report(void *arg) {
    int fd = (int)(intptr_t)arg;
    char text[128];
    for (;;) {
        orch_result r = orch_await(orch_ready(fd, ORCH_READABLE));
        if (r.error != 0 || recv(fd, text, 1, 0) <= 0) break;
        snprintf(text, sizeof text, "moves %d\n", 0);
        send(fd, text, strlen(text), MSG_NOSIGNAL);
    }
    close(fd);
    return orch_ok(NULL, NULL);
}

typedef struct service {
    int port;
    orch_task_fn serve;
} service;

static orch_result serve(void *arg) {
    const service *s = (const service *)arg;
    int listener = echo_listen(s->port);
    for (;;) {
        orch_result r = orch_await(orch_ready(listener, ORCH_READABLE));
        if (r.error != 0) return r;
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) orch_spawn(s->serve, (void *)(intptr_t)fd);
    }
}

static orch_result serve_both(void *arg) {
    int port = *(const int *)arg;
    service echoes = {port, echo}, reports = {port + 1, report};
    return orch_await(orch_all(orch_go(serve, &echoes), orch_go(serve, &reports)));
}

int main(int argc, char **argv) {
    int port = argc > 1 ? atoi(argv[1]) : 7000;
    echo_raise_limit();
    return orch_exit(orch_run(serve_both, &port));
}
