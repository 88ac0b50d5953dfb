// The echo server on libevent: one event for each connection, without its buffers.
#include "server.h"

#include <event2/event.h>

static struct event_base *base;

static void on_readable(evutil_socket_t fd, short events, void *arg) {
    (void)events;
    if (echo_once(fd)) return;
    event_free(*(struct event **)arg);
    free(arg);
    close(fd);
}

static void watch(int fd, event_callback_fn fn) {
    struct event **self = malloc(sizeof *self);
    if (self == NULL) return;
    *self = event_new(base, fd, EV_READ | EV_PERSIST, fn, self);
    event_add(*self, NULL);
}

static void on_connection(evutil_socket_t listener, short events, void *arg) {
    (void)events;
    (void)arg;
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) watch(fd, on_readable);
}

int main(int argc, char **argv) {
    echo_raise_limit();
    base = event_base_new();
    watch(echo_listen(argc > 1 ? atoi(argv[1]) : 7000), on_connection);
    return event_base_dispatch(base);
}
