// http_serve.h - a small HTTP/1.1 server side for server.c, written on asyncorch.h: one task per
// connection, non-blocking sockets, orch_ready where a call would block, orch_timeout on every
// wait.
//
// What it does: GET and HEAD, keep-alive, pipelining, and refusals: 400 malformed, 405 other
// methods, 408 too slow, 414 request line too long, 431 head too large, 505 other versions. What it
// leaves out: request bodies (refused), TLS, compression.

#ifndef HTTP_SERVE_H
#define HTTP_SERVE_H

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    HTTP_LINE_MAX = 2048,   // bytes of a request line; longer: 414
    HTTP_HEAD_MAX = 8192,   // bytes of a request's line and headers; longer: 431
    HTTP_HEADERS_MAX = 100, // more: 431
    HTTP_BODY_MAX = 8192,   // bytes of an answer's body
    HTTP_IDLE_MS = 60000,   // a connection kept alive between two requests
    HTTP_HEAD_MS = 10000,   // a whole head from its first byte; later: 408
    HTTP_WRITE_MS = 10000,  // a whole answer
    HTTP_LINGER_MS = 500,   // reading on after a refusal, so that the answer is not lost to a reset
    HTTP_CONNECTIONS_MAX = 10000 // at once; more wait to be accepted
};

typedef struct http_answer {
    int status;
    size_t length;
    char body[HTTP_BODY_MAX];
} http_answer;

// Fills the answer to GET path; runs in the connection's task, so it may wait. Returns an orch
// error to end the connection without an answer, else 0. fd is for waiting only.
typedef int (*http_handler)(const char *path, int fd, http_answer *answer, void *context);

typedef struct http_server {
    int listener;
    http_handler handler;
    void *context;
    size_t connections; // open now
} http_server;

typedef struct http_connection {
    http_server *server;
    int fd;
    size_t used;               // bytes of input in hand
    char input[HTTP_HEAD_MAX]; // of which the first request starts at 0
    http_answer answer;
    char output[HTTP_BODY_MAX + 512];
} http_connection;

typedef struct http_head {
    char *path;
    bool head, keep; // HEAD: no body in the answer; keep-alive
} http_head;

static inline bool http_nonblocking(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 &&
           fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

#define HTTP_NO_DEADLINE UINT64_MAX

// Waits until fd can be read or written, at most until the deadline. Returns 0 or the error.
static int http_wait(int fd, int events, uint64_t deadline) {
    uint64_t now = orch_now();
    if (now >= deadline) return ORCH_ETIMEDOUT;
    orch_future *f = orch_ready(fd, events);
    if (deadline != HTTP_NO_DEADLINE) f = orch_timeout(f, deadline - now);
    orch_result r = orch_await(f);
    int error = r.error;
    orch_result_free(&r);
    return error;
}

static bool http_again(void) { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

// Returns the count, 0 at the end of the stream, or a negative error.
static ptrdiff_t http_read(int fd, char *to, size_t size, uint64_t deadline) {
    for (;;) {
        ssize_t n = read(fd, to, size);
        if (n >= 0) return n;
        if (!http_again()) return -errno;
        int error = http_wait(fd, ORCH_READABLE, deadline);
        if (error != 0) return error;
    }
}

static int http_write_all(int fd, const char *from, size_t size, uint64_t deadline) {
    while (size > 0) {
        ssize_t n = write(fd, from, size);
        if (n >= 0) {
            from += n;
            size -= (size_t)n;
        } else if (!http_again()) {
            return -errno;
        } else {
            int error = http_wait(fd, ORCH_WRITABLE, deadline);
            if (error != 0) return error;
        }
    }
    return 0;
}

static const char *http_reason(int status) {
    switch (status) {
    case 200: return "OK";
    case 400: return "Bad Request";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 413: return "Content Too Large";
    case 414: return "URI Too Long";
    case 431: return "Request Header Fields Too Large";
    case 505: return "HTTP Version Not Supported";
    default: return "Internal Server Error";
    }
}

// A refusal's body says what the status line says.
static void http_refuse(http_answer *answer, int status) {
    answer->status = status;
    answer->length = (size_t)snprintf(answer->body, sizeof answer->body, "{\"error\":\"%s\"}",
                                      http_reason(status));
}

static int http_send(http_connection *c, const http_head *h) {
    const http_answer *a = &c->answer;
    int n =
        snprintf(c->output, sizeof c->output,
                 "HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n"
                 "%sConnection: %s\r\n\r\n",
                 a->status, http_reason(a->status), a->length,
                 a->status == 405 ? "Allow: GET, HEAD\r\n" : "", h->keep ? "keep-alive" : "close");
    size_t size = (size_t)n;
    if (!h->head) {
        memcpy(c->output + size, a->body, a->length);
        size += a->length;
    }
    return http_write_all(c->fd, c->output, size, orch_now() + HTTP_WRITE_MS);
}

// ---- reading a request

static const char *http_find(const char *from, size_t size, const char *what, size_t length) {
    for (size_t i = 0; i + length <= size; i++)
        if (memcmp(from + i, what, length) == 0) return from + i;
    return NULL;
}

// Reads until a whole head is in hand. *size gets its length. Returns 0, a status to refuse with,
// or a negative error (the connection is over).
static int http_read_head(http_connection *c, size_t *size) {
    uint64_t deadline = orch_now() + (c->used > 0 ? HTTP_HEAD_MS : HTTP_IDLE_MS);
    for (;;) {
        const char *end = http_find(c->input, c->used, "\r\n\r\n", 4);
        const char *line = http_find(c->input, c->used, "\r\n", 2);
        if ((line != NULL ? (size_t)(line - c->input) : c->used) > HTTP_LINE_MAX) return 414;
        if (end != NULL) {
            *size = (size_t)(end - c->input) + 4;
            return 0;
        }
        if (c->used == sizeof c->input) return 431;
        bool idle = c->used == 0;
        ptrdiff_t n = http_read(c->fd, c->input + c->used, sizeof c->input - c->used, deadline);
        if (n == ORCH_ETIMEDOUT && !idle) return 408;
        if (n <= 0) return n == 0 ? -ECONNRESET : (int)n;
        c->used += (size_t)n;
        if (idle) deadline = orch_now() + HTTP_HEAD_MS;
    }
}

static bool http_is_token(const char *s) {
    if (*s == '\0') return false;
    for (; *s != '\0'; s++)
        if (!isalnum((unsigned char)*s) && strchr("!#$%&'*+-.^_`|~", *s) == NULL) return false;
    return true;
}

// "GET /path HTTP/1.1", cut into pieces in place. Returns 0 or the status to refuse with.
static int http_parse_line(char *line, http_head *h, bool *is_1_1) {
    char *path = strchr(line, ' '), *version = path != NULL ? strchr(path + 1, ' ') : NULL;
    if (version == NULL) return 400;
    *path++ = *version++ = '\0';
    for (const char *p = path; *p != '\0'; p++)
        if ((unsigned char)*p <= ' ' || *p == 127) return 400;
    if (!http_is_token(line) || strncmp(version, "HTTP/", 5) != 0) return 400;
    if (strncmp(path, "http://", 7) == 0) path = strchr(path + 7, '/'); // as sent to a proxy
    if (path == NULL || *path != '/') return 400;
    if (strlen(version) != 8 || !isdigit((unsigned char)version[5]) || version[6] != '.' ||
        !isdigit((unsigned char)version[7]))
        return 400;
    if (version[5] != '1') return 505;
    path[strcspn(path, "?#")] = '\0';
    *is_1_1 = version[7] != '0';
    h->path = path;
    h->keep = *is_1_1;
    h->head = strcmp(line, "HEAD") == 0;
    return h->head || strcmp(line, "GET") == 0 ? 0 : 405;
}

// "Name: value". Returns 0 or the status to refuse with.
static int http_parse_header(char *line, http_head *h, int *hosts) {
    char *value = strchr(line, ':');
    if (value == NULL) return 400;
    *value++ = '\0';
    if (!http_is_token(line)) return 400; // also a folded line, and a space before the colon
    value += strspn(value, " \t");
    for (size_t n = strlen(value); n > 0 && strchr(" \t", value[n - 1]) != NULL; n--)
        value[n - 1] = '\0';
    for (const char *p = value; *p != '\0'; p++)
        if (((unsigned char)*p < ' ' && *p != '\t') || *p == 127) return 400;
    if (strcasecmp(line, "Host") == 0) ++*hosts;
    if (strcasecmp(line, "Transfer-Encoding") == 0) return 413;
    if (strcasecmp(line, "Content-Length") == 0 && strcmp(value, "0") != 0)
        return *value != '\0' && value[strspn(value, "0123456789")] == '\0' ? 413 : 400;
    if (strcasecmp(line, "Connection") == 0) {
        if (strcasecmp(value, "close") == 0) h->keep = false;
        if (strcasecmp(value, "keep-alive") == 0) h->keep = true;
    }
    return 0;
}

// Reads the head of `size` bytes at the start of the input, which it cuts into pieces. Returns 0 or
// the status to refuse with.
static int http_parse(char *input, size_t size, http_head *h) {
    if (memchr(input, '\0', size) != NULL) return 400;
    bool is_1_1 = false;
    int status = 0, hosts = 0, lines = 0;
    char *end = input + size - 2; // of the last, empty line
    for (char *line = input, *stop; line < end && status == 0; line = stop + 2) {
        stop = strstr(line, "\r\n"); // there is one: the head ends with two
        *stop = '\0';
        if (strchr(line, '\n') != NULL) status = 400;
        else if (lines > HTTP_HEADERS_MAX) status = 431;
        else if (lines++ == 0) status = http_parse_line(line, h, &is_1_1);
        else status = http_parse_header(line, h, &hosts);
    }
    if (status == 0 && (hosts > 1 || (is_1_1 && hosts == 0))) status = 400;
    return status;
}

// ---- a connection

// Sends a refusal and ends the connection: what follows on it cannot be trusted.
static int http_end_with(http_connection *c, int status) {
    http_refuse(&c->answer, status);
    int error = http_send(c, &(http_head){NULL, false, false});
    if (error != 0) return error;
    // Closing with unread input would send a reset, which can overtake the refusal: so read on a
    // little.
    shutdown(c->fd, SHUT_WR);
    uint64_t deadline = orch_now() + HTTP_LINGER_MS;
    for (int i = 0; i < 64; i++)
        if (http_read(c->fd, c->input, sizeof c->input, deadline) <= 0) break;
    return 0;
}

// Answers one request. Returns 1 to go on, 0 when the connection is over, or a negative error.
static int http_serve_one(http_connection *c) {
    http_head h = {NULL, false, false};
    size_t size = 0;
    int status = http_read_head(c, &size);
    if (status == 0) status = http_parse(c->input, size, &h);
    if (status != 0) return status < 0 ? status : http_end_with(c, status);
    int error = c->server->handler(h.path, c->fd, &c->answer, c->server->context);
    if (error == 0) error = http_send(c, &h);
    if (error != 0) return error;
    memmove(c->input, c->input + size, c->used - size); // a pipelined request may follow
    c->used -= size;
    return h.keep ? 1 : 0;
}

static orch_result http_connection_task(void *arg) {
    http_connection *c = arg;
    int more = 1;
    while (more > 0) {
        more = http_serve_one(c);
        if (orch_yield() != 0)
            more = 0; // a client that pipelines without end must not starve others
    }
    return orch_ok(NULL, NULL); // a client that goes away is not this server's failure
}

// Called exactly once for every connection, whether its task ran or not.
static void http_connection_release(void *arg) {
    http_connection *c = arg;
    close(c->fd);
    c->server->connections--;
    free(c);
}

static void http_start(http_server *s, int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    http_connection *c = http_nonblocking(fd) ? malloc(sizeof *c) : NULL;
    if (c == NULL) {
        close(fd);
        return;
    }
    c->server = s;
    c->fd = fd;
    c->used = 0;
    s->connections++;
    orch_detach(orch_go_with(&(orch_task_desc){.name = "connection",
                                               .fn = http_connection_task,
                                               .arg = c,
                                               .release = http_connection_release}));
}

static bool http_no_room(void) {
    return errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
}

// The accept loop, a task: arg is a http_server. Ends only when it is cancelled or the listener
// fails.
static orch_result http_serve(void *arg) {
    http_server *s = arg;
    for (;;) {
        int fd = s->connections < HTTP_CONNECTIONS_MAX ? accept(s->listener, NULL, NULL) : -1;
        int error = 0;
        if (fd >= 0) {
            http_start(s, fd);
            error = orch_yield(); // a flood of connections must not starve those that are open
        } else if (s->connections >= HTTP_CONNECTIONS_MAX || http_no_room()) {
            error = orch_sleep(20); // a connection has to end first
        } else if (http_again()) {
            error = http_wait(s->listener, ORCH_READABLE, HTTP_NO_DEADLINE);
        } else if (errno != ECONNABORTED) {
            error = -errno;
        }
        if (error != 0) return orch_fail(error);
    }
}

// A listening socket on an IPv4 address; port 0 takes a free one. Returns it, or a negative errno.
static int http_listen(const char *address, uint16_t *port) {
    struct sockaddr_in at;
    memset(&at, 0, sizeof at);
    at.sin_family = AF_INET;
    at.sin_port = htons(*port);
    if (inet_pton(AF_INET, address, &at.sin_addr) != 1) return -EINVAL;
    socklen_t size = sizeof at;
    int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0) return -errno;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (!http_nonblocking(fd) || bind(fd, (struct sockaddr *)&at, size) != 0 ||
        listen(fd, 4096) != 0 || getsockname(fd, (struct sockaddr *)&at, &size) != 0) {
        int error = -errno;
        close(fd);
        return error;
    }
    *port = ntohs(at.sin_port);
    return fd;
}

#endif
