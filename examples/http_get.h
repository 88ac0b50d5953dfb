// http_get.h - a minimal HTTP GET on asyncorch.h, for machines without libcurl's headers: one task
// per request, a non-blocking socket, orch_ready where a call would block.
//
// What it does: http:// URLs with an IPv4 address or "localhost", answers that end by
// Content-Length or with the connection. What it leaves out: TLS, names (looking one up would block
// the loop), redirects, chunked answers, keep-alive. libcurl has all that: see orch_curl.h.

#ifndef HTTP_GET_H
#define HTTP_GET_H

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#define HTTP_GET_MAX ((size_t)64 << 20) // bytes of an answer; more: -EMSGSIZE

typedef struct http_response {
    long status;
    size_t length; // bytes of the body
    char *body;    // never NULL, with a 0 behind its last byte
} http_response;

typedef struct http_get_work {
    int fd;
    struct sockaddr_in to;
    char host[128];
    const char *path; // in url
    char *data;       // what came so far, with a 0 behind it
    size_t used, capacity;
    char url[]; // the caller's copy
} http_get_work;

// Called exactly once, whether the task ran or not.
static void http_get_release(void *arg) {
    http_get_work *w = arg;
    if (w->fd >= 0) close(w->fd);
    free(w->data);
    free(w);
}

// Cuts "http://host:port/path" into pieces.
static orch_result http_get_parse(http_get_work *w) {
    if (strncasecmp(w->url, "http://", 7) != 0)
        return orch_failf(-EPROTONOSUPPORT, "only http:// URLs without libcurl");
    const char *host = w->url + 7;
    size_t length = strcspn(host, "/?#"), name = strcspn(host, ":/?#");
    w->path = host + length;
    w->url[strcspn(w->url, "#")] = '\0'; // a fragment is not sent
    if (length == 0 || length >= sizeof w->host || strpbrk(w->url, " \t\r\n@") != NULL)
        return orch_failf(ORCH_EINVAL, "not a URL");
    memcpy(w->host, host, length);

    char address[INET_ADDRSTRLEN];
    if (name == 9 && strncasecmp(host, "localhost", 9) == 0) host = "127.0.0.1";
    snprintf(address, sizeof address, "%.*s", (int)(name < 16 ? name : 15), host);
    w->to.sin_family = AF_INET;
    if (name >= sizeof address || inet_pton(AF_INET, address, &w->to.sin_addr) != 1)
        return orch_failf(ORCH_EINVAL, "only IPv4 addresses and localhost without libcurl");
    char *end = w->host + length;
    long port = w->host[name] == ':' ? strtol(w->host + name + 1, &end, 10) : 80;
    if (*end != '\0' || port < 1 || port > 65535) return orch_failf(ORCH_EINVAL, "bad port in URL");
    w->to.sin_port = htons((uint16_t)port);
    return orch_ok(NULL, NULL);
}

static int http_get_wait(http_get_work *w, int events) {
    orch_result r = orch_await(orch_ready(w->fd, events));
    int error = r.error;
    orch_result_free(&r);
    return error;
}

static int http_get_connect(http_get_work *w) {
    w->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (w->fd < 0 || fcntl(w->fd, F_SETFD, FD_CLOEXEC) != 0 ||
        fcntl(w->fd, F_SETFL, O_NONBLOCK) != 0)
        return -errno;
    if (connect(w->fd, (struct sockaddr *)&w->to, sizeof w->to) == 0) return 0;
    if (errno != EINPROGRESS) return -errno;
    int error = http_get_wait(w, ORCH_WRITABLE), late = 0;
    socklen_t size = sizeof late;
    if (error == 0 && getsockopt(w->fd, SOL_SOCKET, SO_ERROR, &late, &size) != 0) error = -errno;
    return error != 0 ? error : -late;
}

static bool http_get_again(void) {
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

static int http_get_write(http_get_work *w, const char *from, size_t size) {
    while (size > 0) {
        ssize_t n = write(w->fd, from, size);
        int error = n >= 0 ? 0 : http_get_again() ? http_get_wait(w, ORCH_WRITABLE) : -errno;
        if (error != 0) return error;
        if (n < 0) continue;
        from += n;
        size -= (size_t)n;
    }
    return 0;
}

static int http_get_request(http_get_work *w) {
    // HTTP/1.0: the answer is not chunked, and the connection ends with it.
    static const char format[] = "GET %s%s HTTP/1.0\r\nHost: %s\r\nUser-Agent: asyncorch\r\n\r\n";
    size_t size = strlen(w->url) + sizeof w->host + sizeof format;
    char *text = malloc(size);
    if (text == NULL) return ORCH_ENOMEM;
    int n = snprintf(text, size, format, *w->path == '/' ? "" : "/", w->path, w->host);
    int error = http_get_write(w, text, (size_t)n);
    free(text);
    return error;
}

// Reads some more. Returns 1, 0 at the end of the stream, or a negative error.
static int http_get_read(http_get_work *w) {
    if (w->used + 1 >= w->capacity) {
        size_t capacity = w->capacity > 0 ? 2 * w->capacity : 4096;
        char *data = capacity <= HTTP_GET_MAX ? realloc(w->data, capacity) : NULL;
        if (data == NULL) return capacity <= HTTP_GET_MAX ? ORCH_ENOMEM : -EMSGSIZE;
        w->data = data;
        w->capacity = capacity;
    }
    for (;;) {
        ssize_t n = read(w->fd, w->data + w->used, w->capacity - w->used - 1);
        if (n >= 0) {
            w->used += (size_t)n;
            w->data[w->used] = '\0';
            return n > 0;
        }
        int error = http_get_again() ? http_get_wait(w, ORCH_READABLE) : -errno;
        if (error != 0) return error;
    }
}

// Reads the whole answer. *body gets the place where its body starts, *status the status.
static int http_get_answer(http_get_work *w, size_t *body, long *status) {
    size_t length = SIZE_MAX; // not known: until the connection ends
    int more = 1;
    while (*body == 0 || w->used - *body < length) {
        more = http_get_read(w);
        if (more <= 0) break;
        char *end = *body == 0 ? strstr(w->data, "\r\n\r\n") : NULL;
        if (end == NULL) continue;
        *body = (size_t)(end - w->data) + 4;
        if (sscanf(w->data, "HTTP/1.%*1d %3ld", status) != 1) return -EPROTO;
        for (char *line = strstr(w->data, "\r\n"); line < end; line = strstr(line + 2, "\r\n")) {
            if (strncasecmp(line + 2, "Transfer-Encoding:", 18) == 0) return -EPROTO;
            if (strncasecmp(line + 2, "Content-Length:", 15) == 0)
                length = (size_t)strtoull(line + 17, NULL, 10);
        }
    }
    if (more < 0) return more;
    if (*body == 0 || (length != SIZE_MAX && w->used - *body < length)) return -EPROTO;
    if (w->used - *body > length) w->used = *body + length;
    return 0;
}

static void http_response_free(void *value) {
    http_response *response = value;
    free(response->body);
    free(response);
}

static orch_result http_get_task(void *arg) {
    http_get_work *w = arg;
    orch_result bad = http_get_parse(w);
    if (bad.error != 0) return bad;
    size_t body = 0;
    long status = 0;
    int error = http_get_connect(w);
    if (error == 0) error = http_get_request(w);
    if (error == 0) error = http_get_answer(w, &body, &status);
    if (error == -EPROTO) return orch_failf(error, "not an answer this client understands");
    if (error != 0) return orch_fail(error);

    http_response *response = malloc(sizeof *response);
    if (response == NULL) return orch_fail(ORCH_ENOMEM);
    response->status = status;
    response->length = w->used - body;
    response->body = w->data;
    memmove(w->data, w->data + body, response->length);
    w->data[response->length] = '\0';
    w->data = NULL;
    return orch_ok(response, http_response_free);
}

// Starts a GET. Returns a future of a http_response of any status; dropping it closes the
// connection.
static orch_future *http_get(const char *url) {
    size_t size = strlen(url) + 1;
    http_get_work *w = calloc(1, sizeof *w + size);
    if (w == NULL) return orch_settled(orch_fail(ORCH_ENOMEM));
    w->fd = -1;
    memcpy(w->url, url, size);
    return orch_go_with(&(orch_task_desc){
        .name = "GET", .fn = http_get_task, .arg = w, .release = http_get_release});
}

#endif
