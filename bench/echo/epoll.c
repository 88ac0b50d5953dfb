// The bare echo server on epoll: level-triggered, or edge-triggered (`epoll port edge`), where what
// came short needs no second look, as more would be a new edge.
#include "server.h"

#include <sys/epoll.h>

enum { BATCH = 1024 };

static void add(int poller, int fd, uint32_t events) {
    struct epoll_event event = {events, {.fd = fd}};
    echo_require(epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
}

int main(int argc, char **argv) {
    static struct epoll_event events[BATCH];
    uint32_t mode = argc > 2 && strcmp(argv[2], "edge") == 0 ? EPOLLIN | EPOLLET : EPOLLIN;
    echo_raise_limit();
    int poller = epoll_create1(EPOLL_CLOEXEC);
    int listener = echo_listen(argc > 1 ? atoi(argv[1]) : 7000);
    add(poller, listener, EPOLLIN);
    for (;;) {
        int found = epoll_wait(poller, events, BATCH, -1);
        for (int i = 0; i < found; i++) {
            int fd = events[i].data.fd;
            if (fd != listener) {
                if (!echo_once(fd)) close(fd); // closing takes it out
            } else if ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
                add(poller, fd, mode);
            }
        }
    }
}
