// 14_proxy: passes TCP connections on to another server, with half-close.
//
// shows   orch_serve around orch_connect by name, two tasks in a scope for the two directions: the
//         end of one is passed on (shutdown) while the other goes on; the first error ends both
// run     ./14_proxy 8080 example.org 80   (port here, host and port there)
//         ./14_proxy                       (asks itself, as a test)
// prints
//         sent 100000 bytes, then closed that half; 100000 came back
//         passed on 100000 bytes there, 100000 back

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static struct proxy {
    const char *host, *service;
    unsigned long there, back; // bytes
} proxy;

typedef struct way {
    int from, to;
    unsigned long *bytes;
} way;

// One direction, until its end, which it passes on.
static orch_result pump(void *arg) {
    const way *w = arg;
    char data[16384];
    ptrdiff_t n;
    while ((n = orch_read(w->from, data, sizeof data)) > 0) {
        if ((n = orch_write(w->to, data, (size_t)n)) < 0) break;
        *w->bytes += (unsigned long)n;
    }
    shutdown(w->to, SHUT_WR);
    return n < 0 ? orch_fail((int)n) : orch_ok(NULL, NULL);
}

// A connection: orch_serve closes its descriptor, and on_error hears what it returns.
static orch_result pass_on(int client, void *context) {
    (void)context;
    int server = orch_connect(proxy.host, proxy.service);
    if (server < 0) return orch_failf(server, "%s: %s", proxy.host, orch_error_text(server));
    way there = {client, server, &proxy.there}, back = {server, client, &proxy.back};
    orch_scope both;
    int error = orch_scope_open(&both, NULL);
    orch_result r = orch_fail(error);
    if (error == 0) {
        orch_scope_go(&both, pump, &there);
        orch_scope_go(&both, pump, &back);
        r = orch_scope_close(&both); // the first error, and the other one was cancelled
    }
    orch_close(server);
    return r;
}

static orch_result serve(void *listener) {
    return orch_fail(orch_serve(*(int *)listener, pass_on, NULL));
}

// ---- without arguments: a client, the proxy, and a server that answers what it got, at the end

static orch_result answer_at_the_end(int fd, void *context) {
    static char data[200000];
    (void)context;
    ptrdiff_t n = orch_read_full(fd, data, sizeof data); // the client's half-close ends it
    if (n > 0) n = orch_write(fd, data, (size_t)n);
    return n < 0 ? orch_fail((int)n) : orch_ok(NULL, NULL);
}

static orch_result answer(void *listener) {
    return orch_fail(orch_serve(*(int *)listener, answer_at_the_end, NULL));
}

static orch_result ask(const orch_address *at) {
    static char data[100000], back[200000];
    orch_connect_desc to = {.addresses = at, .count = 1};
    int fd = orch_connect_with(&to);
    if (fd < 0) return orch_fail(fd);
    ptrdiff_t sent = orch_write(fd, data, sizeof data);
    shutdown(fd, SHUT_WR);
    ptrdiff_t got = orch_read_full(fd, back, sizeof back);
    orch_close(fd);
    if (got < 0) return orch_fail((int)got);
    printf("sent %d bytes, then closed that half; %d came back\n", (int)sent, (int)got);
    return orch_ok(NULL, NULL);
}

static orch_result try_it(void *arg) {
    static char port[8];
    orch_address here, there;
    orch_listen_desc desc = {.host = "127.0.0.1"};
    int listener = orch_listen(&desc), target = orch_listen(&desc);
    (void)arg;
    if (listener < 0 || target < 0) return orch_fail(listener < 0 ? listener : target);
    orch_socket_address(listener, &here), orch_socket_address(target, &there);
    snprintf(port, sizeof port, "%u", orch_address_port(&there));
    proxy.host = "127.0.0.1", proxy.service = port;
    orch_future *servers[2] = {orch_go(serve, &listener), orch_go(answer, &target)};
    orch_result r = ask(&here);
    orch_drop(servers[0]), orch_drop(servers[1]);
    printf("passed on %lu bytes there, %lu back\n", proxy.there, proxy.back);
    return r;
}

int main(int argc, char **argv) {
    if (argc == 1) return orch_exit(orch_run(try_it, NULL));
    orch_listen_desc desc = {.port = argc > 1 ? (uint16_t)atoi(argv[1]) : 0};
    int listener = argc == 4 && desc.port > 0 ? orch_listen(&desc) : ORCH_EINVAL;
    if (listener < 0) {
        fprintf(stderr, "14_proxy: %s\nusage: 14_proxy [PORT host port]\n",
                orch_error_text(listener));
        return 2;
    }
    proxy.host = argv[2], proxy.service = argv[3];
    return orch_exit(orch_run(serve, &listener));
}
