// The echo server on asyncorch.h: one task for each connection, which reads and writes.
// `asyncorch port [poll|epoll]` listens there; without a poller named the loop chooses and moves by
// itself. On the port after it, it reports how often that was.
#define _GNU_SOURCE
#define ASYNCORCH_IMPLEMENTATION
#include "../../asyncorch.h"
#include "server.h"

typedef struct service {
    int port;
    orch_result (*handler)(int fd, void *context);
} service;

static orch_result echo(int fd, void *context) {
    char buffer[ECHO_BUFFER];
    ptrdiff_t got;
    (void)context;
    while ((got = orch_read(fd, buffer, sizeof buffer)) > 0) {
        if (orch_write(fd, buffer, (size_t)got) < 0) break;
    }
    return orch_ok(NULL, NULL);
}

// A line for each byte that comes.
static orch_result report(int fd, void *context) {
    char text[64];
    (void)context;
    while (orch_read(fd, text, 1) > 0) {
        orch_loop_stats stats = orch_loop_statistics(orch_loop_current());
        int size = snprintf(text, sizeof text, "moves %llu\n", (unsigned long long)stats.moves);
        if (orch_write(fd, text, (size_t)size) < 0) break;
    }
    return orch_ok(NULL, NULL);
}

static orch_result serve(void *arg) {
    const service *s = (const service *)arg;
    orch_listen_desc where = {.host = "127.0.0.1", .port = (uint16_t)s->port};
    int listener = orch_listen(&where);
    if (listener < 0) return orch_fail(listener);
    return orch_fail(orch_serve(listener, s->handler, NULL));
}

static orch_result serve_both(void *arg) {
    int port = *(const int *)arg;
    service echoes = {port, echo}, reports = {port + 1, report};
    orch_future *both[] = {orch_go(serve, &echoes), orch_go(serve, &reports)};
    return orch_await(orch_all_n(2, both));
}

static orch_poller poller_named(const char *name) {
    if (strcmp(name, "poll") == 0) return ORCH_POLLER_POLL;
    return strcmp(name, "epoll") == 0 ? ORCH_POLLER_EPOLL : ORCH_POLLER_DEFAULT;
}

int main(int argc, char **argv) {
    int port = argc > 1 ? atoi(argv[1]) : 7000;
    orch_loop_desc desc = {.poller = poller_named(argc > 2 ? argv[2] : "")};
    echo_raise_limit();
    return orch_exit(orch_run_with(&desc, serve_both, &port));
}
