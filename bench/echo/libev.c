// The echo server on libev: one watcher for each connection.
#include "server.h"

#include <ev.h>

static void on_readable(struct ev_loop *loop, ev_io *watcher, int events) {
    (void)events;
    if (echo_once(watcher->fd)) return;
    ev_io_stop(loop, watcher);
    close(watcher->fd);
    free(watcher);
}

static void on_connection(struct ev_loop *loop, ev_io *listener, int events) {
    (void)events;
    int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    ev_io *watcher = fd >= 0 ? malloc(sizeof *watcher) : NULL;
    if (watcher == NULL) return;
    ev_io_init(watcher, on_readable, fd, EV_READ);
    ev_io_start(loop, watcher);
}

int main(int argc, char **argv) {
    ev_io listener;
    echo_raise_limit();
    ev_io_init(&listener, on_connection, echo_listen(argc > 1 ? atoi(argv[1]) : 7000), EV_READ);
    ev_io_start(ev_default_loop(0), &listener);
    return ev_run(ev_default_loop(0), 0);
}
