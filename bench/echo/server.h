// What the servers in C share: where to listen, and as many descriptors as the system allows.
// A server is started as `server port` and runs until it is killed. None of them handles an answer
// that does not fit into the socket's buffer otherwise than by closing: with one message of 64
// bytes in flight that cannot happen, and the bare ones are not to pay for it.
#ifndef ECHO_SERVER_H
#define ECHO_SERVER_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE // accept4
#endif

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ECHO_BUFFER = 1024, ECHO_BACKLOG = 4096 };

static inline void echo_require(int held, const char *what) {
    if (held) return;
    perror(what);
    exit(1);
}

static inline void echo_raise_limit(void) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
}

static inline struct sockaddr_in echo_address(int port) {
    struct sockaddr_in a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((unsigned short)port);
    return a;
}

static inline int echo_listen(int port) {
    struct sockaddr_in a = echo_address(port);
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    echo_require(fd >= 0, "socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    echo_require(bind(fd, (struct sockaddr *)&a, sizeof a) == 0, "bind");
    echo_require(listen(fd, ECHO_BACKLOG) == 0, "listen");
    return fd;
}

// One recv, one send. Whether the connection goes on.
static inline int echo_once(int fd) {
    static char buffer[ECHO_BUFFER];
    ssize_t got = recv(fd, buffer, sizeof buffer, 0);
    if (got < 0) return errno == EAGAIN || errno == EINTR;
    return got > 0 && send(fd, buffer, (size_t)got, MSG_NOSIGNAL) == got;
}

#endif
