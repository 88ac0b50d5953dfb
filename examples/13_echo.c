// 13_echo: an echo server, and a client that loads it.
//
// shows   orch_listen, orch_serve (a task for each connection), orch_read and orch_write, a scope
//         whose deadline ends many clients at once; without arguments both in one program
// run     ./13_echo serve 7000 &   ./13_echo load 7000 100 10   (port, connections, seconds)
//         ./13_echo
// prints
//         10 connections: 123456 requests of 64 bytes in 500 ms, 246912 a second, 0 failures

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

enum { REQUEST = 64 };

// ---- the server

static orch_result echo(int fd, void *context) {
    char data[4096];
    ptrdiff_t n;
    (void)context;
    while ((n = orch_read(fd, data, sizeof data)) > 0) {
        if ((n = orch_write(fd, data, (size_t)n)) < 0) break;
    }
    return n < 0 && n != -ECONNRESET ? orch_fail((int)n) : orch_ok(NULL, NULL);
}

static orch_result serve(void *listener) {
    return orch_fail(orch_serve(*(int *)listener, echo, NULL)); // until it is cancelled
}

static int listen_at(int port) {
    orch_listen_desc desc = {.host = "127.0.0.1", .port = (uint16_t)port};
    return orch_listen(&desc);
}

// ---- the client

static struct load {
    orch_address server;
    int connections;
    uint64_t ms;
    unsigned long requests, failures;
} load;

static int request(int fd) {
    char data[REQUEST] = "hello";
    ptrdiff_t n = orch_write(fd, data, sizeof data);
    if (n >= 0) n = orch_read_full(fd, data, sizeof data);
    return n < 0 ? (int)n : n == REQUEST ? 0 : -ECONNRESET;
}

// One connection: requests until the scope's deadline makes a wait return ORCH_ECANCELED.
static orch_result client(void *arg) {
    (void)arg;
    orch_connect_desc to = {.addresses = &load.server, .count = 1};
    int fd = orch_connect_with(&to);
    int error = fd < 0 ? fd : 0;
    while (error == 0 && (error = request(fd)) == 0) load.requests++;
    load.failures += error != ORCH_ECANCELED;
    if (fd >= 0) orch_close(fd);
    return orch_ok(NULL, NULL);
}

static orch_result run_load(void *arg) {
    (void)arg;
    orch_scope all;
    orch_scope_desc desc = {.name = "load", .timeout_ms = load.ms};
    uint64_t start = orch_now();
    int error = orch_scope_open(&all, &desc);
    if (error != 0) return orch_fail(error);
    for (int i = 0; i < load.connections; i++) orch_scope_go(&all, client, NULL);
    orch_result r = orch_scope_close(&all);
    if (r.error != ORCH_ETIMEDOUT) return r.error != 0 ? r : orch_fail(-ECONNREFUSED);
    orch_result_free(&r);
    uint64_t ms = orch_now() - start;
    printf("%d connections: %lu requests of %d bytes in %d ms, %lu a second, %lu failures\n",
           load.connections, load.requests, REQUEST, (int)ms,
           load.requests * 1000 / (unsigned long)(ms > 0 ? ms : 1), load.failures);
    return orch_ok(NULL, NULL);
}

// ---- main

static orch_result both(void *arg) {
    int listener = listen_at(0);
    (void)arg;
    if (listener < 0) return orch_fail(listener);
    orch_socket_address(listener, &load.server);
    orch_future *server = orch_go(serve, &listener);
    orch_result r = run_load(NULL);
    orch_drop(server); // cancels it, and returns when its connections have ended
    return r;
}

int main(int argc, char **argv) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max; // a descriptor for each connection
    setrlimit(RLIMIT_NOFILE, &limit);
    const char *mode = argc > 1 ? argv[1] : "";
    int port = argc > 2 ? atoi(argv[2]) : 0, listener = -1;
    load.connections = argc > 3 ? atoi(argv[3]) : 10;
    load.ms = argc > 4 ? (uint64_t)(atof(argv[4]) * 1000) : 500;
    bool usable = port > 0 && port < 65536 && load.connections > 0 && load.ms > 0;
    if (argc == 1) return orch_exit(orch_run(both, NULL));
    if (!strcmp(mode, "serve") && argc == 3 && usable) listener = listen_at(port);
    if (!strcmp(mode, "serve") && listener >= 0) return orch_exit(orch_run(serve, &listener));
    if (!strcmp(mode, "load") && usable) {
        orch_address_parse(&load.server, "127.0.0.1", (uint16_t)port);
        return orch_exit(orch_run(run_load, NULL));
    }
    fprintf(stderr, "usage: 13_echo [serve PORT | load PORT [connections [seconds]]]\n");
    return 2;
}
