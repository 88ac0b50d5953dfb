// The bare echo server on poll(2): one array, kept as connections come and go, scanned no further
// than the last one that is ready.
#include "server.h"

#include <poll.h>

enum { MOST = 32768 };

static struct pollfd fds[MOST];
static unsigned count;

static void add(int fd) {
    fds[count].fd = fd;
    fds[count].events = POLLIN;
    count++;
}

static void take(int listener) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    if (count < MOST) add(fd);
    else close(fd);
}

int main(int argc, char **argv) {
    echo_raise_limit();
    add(echo_listen(argc > 1 ? atoi(argv[1]) : 7000));
    for (;;) {
        int found = poll(fds, count, -1);
        for (unsigned i = count; found > 0 && i-- > 1;) { // from the end: the last fills a gap
            if (fds[i].revents == 0) continue;
            found--;
            if (echo_once(fds[i].fd)) continue;
            close(fds[i].fd);
            fds[i] = fds[--count];
        }
        if (found > 0) take(fds[0].fd);
    }
}
