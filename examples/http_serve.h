// http_serve.h - the server side of HTTP/1.1 for server.c and 20_http_files.c: one task per
// connection, started by orch_serve, and in it an ordinary loop: read a request, answer it.
//
// What it does: GET and HEAD, keep-alive, pipelining, and refusals: 400 malformed, 405 other
// methods, 408 too slow, 413 a body, 414 request line too long, 431 head too large, 501 and 505.
// What it leaves out: request bodies, TLS, compression.

#ifndef HTTP_SERVE_H
#define HTTP_SERVE_H

#include <stdio.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "http_request.h"

enum {
    HTTP_IDLE_MS = 60000,        // a connection kept alive between two requests
    HTTP_HEAD_MS = 10000,        // a whole head from its first byte; later: 408
    HTTP_SEND_MS = 10000,        // until a client has taken what is sent at a time
    HTTP_LINGER_MS = 500,        // reading on after a refusal, so that the answer is not lost
    HTTP_CONNECTIONS_MAX = 10000 // at once; more wait to be accepted
};

typedef struct http_connection {
    int fd;
    size_t used, seen;         // bytes of input in hand, and of these looked at
    http_request request;      // points into the input
    char input[HTTP_HEAD_MAX]; // the request starts at 0
} http_connection;

// Answers c->request by http_reply; runs in the connection's task, so it may wait. Returns 0, or an
// error to end the connection.
typedef int (*http_handler)(http_connection *c, void *context);

typedef struct http_service {
    http_handler handler;
    void *context;
    size_t requests; // answered so far
} http_service;

// Opens a scope with a deadline. Where that fails nothing must be waited for, but it is closed too.
static int http_open_scope(orch_scope *scope, const char *name, uint64_t ms) {
    return orch_scope_open(scope, &(orch_scope_desc){.name = name, .timeout_ms = ms});
}

// Closes a scope around I/O that came to n. Returns n, or ORCH_ETIMEDOUT when time was up.
static ptrdiff_t http_close_scope(orch_scope *scope, ptrdiff_t n) {
    orch_result r = orch_scope_close(scope);
    bool late = n < 0 && r.error == ORCH_ETIMEDOUT;
    orch_result_free(&r);
    return late ? ORCH_ETIMEDOUT : n;
}

// ---- answers

// Sends all of the parts. What has begun is sent even when the server is asked to end meanwhile.
static int http_send(int fd, const struct iovec *parts, int count) {
    orch_scope scope;
    orch_shield_begin();
    ptrdiff_t n = http_open_scope(&scope, "send", HTTP_SEND_MS);
    if (n == 0) n = orch_writev(fd, parts, count);
    n = http_close_scope(&scope, n);
    orch_shield_end();
    return n < 0 ? (int)n : 0;
}

static const char *http_now(void) { // formatted once a second
    static char text[32];
    static time_t last;
    time_t now = time(NULL);
    if (now != last) http_date(now, text);
    last = now;
    return text;
}

// Sends an answer whose body has `length` bytes: its head and the first `size` bytes; the rest is
// the caller's to send. fields: more lines of the head, each with its CRLF. Returns 0 or an error.
static int http_begin(http_connection *c, int status, const char *fields, uint64_t length,
                      const void *body, size_t size) {
    char head[4096], size_text[48] = "";
    if (status != 304) {
        snprintf(size_text, sizeof size_text, "Content-Length: %llu\r\n",
                 (unsigned long long)length);
    }
    int n = snprintf(head, sizeof head, "HTTP/1.1 %d %s\r\nDate: %s\r\nConnection: %s\r\n%s%s\r\n",
                     status, http_reason(status), http_now(),
                     c->request.keep ? "keep-alive" : "close", size_text, fields);
    if (n < 0 || (size_t)n >= sizeof head) return -EMSGSIZE;
    struct iovec parts[2] = {{head, (size_t)n}, {(void *)(uintptr_t)body, size}};
    return http_send(c->fd, parts, c->request.head || size == 0 ? 1 : 2);
}

static int http_reply(http_connection *c, int status, const char *fields, const char *body) {
    size_t size = strlen(body);
    return http_begin(c, status, fields, size, body, size);
}

// The body says what the status line says.
static int http_reply_status(http_connection *c, int status, const char *more) {
    char body[64], fields[2200];
    snprintf(body, sizeof body, "%d %s\n", status, http_reason(status));
    snprintf(fields, sizeof fields, "Content-Type: text/plain\r\n%s", more);
    return http_reply(c, status, fields, body);
}

// Closing with unread input would send a reset, which can overtake the answer: so read on a little.
static void http_linger(http_connection *c) {
    orch_scope scope;
    shutdown(c->fd, SHUT_WR);
    int more = http_open_scope(&scope, "linger", HTTP_LINGER_MS) == 0 ? 64 : 0;
    while (more-- > 0 && orch_read(c->fd, c->input, sizeof c->input) > 0) continue;
    http_close_scope(&scope, 0);
}

// ---- requests

static void http_consume(http_connection *c, size_t size) {
    c->used -= size;
    c->seen = 0;
    memmove(c->input, c->input + size, c->used); // what is left begins the next request
}

// Reads until a whole head is in hand. Returns 0, the status to refuse with, or an error.
static int http_fill(http_connection *c, orch_scope *scope, size_t *size) {
    for (;;) {
        while (c->used >= 2 && memcmp(c->input, "\r\n", 2) == 0) http_consume(c, 2);
        int status = http_find_end(c->input, c->used, &c->seen, size);
        if (status != 0 || *size != 0) return status;
        ptrdiff_t n = orch_read(c->fd, c->input + c->used, sizeof c->input - c->used);
        if (n <= 0) return n < 0 ? (int)n : -ECONNRESET;
        if (c->used == 0) orch_scope_extend(scope, HTTP_HEAD_MS); // it has begun
        c->used += (size_t)n;
    }
}

static int http_read_head(http_connection *c, size_t *size) {
    orch_scope scope;
    uint64_t ms = c->used > 0 ? HTTP_HEAD_MS : HTTP_IDLE_MS;
    int error = http_open_scope(&scope, "request", ms);
    if (error == 0) error = http_fill(c, &scope, size);
    error = (int)http_close_scope(&scope, error);
    return error == ORCH_ETIMEDOUT && c->used > 0 ? 408 : error;
}

// Answers one request. Returns 0, or an error when the connection is over.
static int http_serve_one(http_connection *c, http_service *s) {
    size_t size = 0;
    c->request.head = c->request.keep = false;
    int status = http_read_head(c, &size);
    if (status == 0) status = http_parse(c->input, size, &c->request);
    if (status < 0) return status;
    if (status > 0) { // what follows on this connection cannot be trusted
        c->request.keep = false;
        int error = http_reply_status(c, status, status == 405 ? "Allow: GET, HEAD\r\n" : "");
        if (error == 0) http_linger(c);
        return error;
    }
    if (orch_cancel_reason() != 0) c->request.keep = false;
    status = s->handler(c, s->context);
    s->requests += status == 0;
    http_consume(c, size);
    return status;
}

// A connection's task, for orch_serve, whose context is a http_service. With no_drain the server's
// end cancels connections at once; what they are sending they finish.
static orch_result http_connected(int fd, void *context) {
    http_connection c;
    c.fd = fd;
    c.used = c.seen = 0;
    while (http_serve_one(&c, context) == 0 && c.request.keep) continue;
    return orch_ok(NULL, NULL); // a client that goes away is not this server's failure
}

// Thousands of connections need more descriptors than the usual 1024.
static inline void http_raise_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= 65536) return;
    limit.rlim_cur = limit.rlim_max < 65536 ? limit.rlim_max : 65536;
    setrlimit(RLIMIT_NOFILE, &limit);
}

#endif
