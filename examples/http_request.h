// http_request.h - the head of an HTTP/1.1 request: found in the input, checked, and cut into
// pieces in place. It does no I/O and knows nothing of the loop. Source: RFC 9110 and RFC 9112.
//
// A server behind a proxy must never see another number of requests in a stream than the proxy
// does. So whatever could be read in two ways is refused, not repaired: a bare CR or LF, a folded
// line, a blank before the colon, NUL, two lengths, a length beside Transfer-Encoding.

#ifndef HTTP_REQUEST_H
#define HTTP_REQUEST_H

#include <ctype.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum {
    HTTP_LINE_MAX = 2048, // bytes of a request line; longer: 414
    HTTP_HEAD_MAX = 8192, // bytes of a request's line and fields; longer: 431
    HTTP_FIELDS_MAX = 64  // more: 431
};

typedef struct http_field {
    const char *name, *value;
} http_field;

typedef struct http_request {
    const char *path;  // as it was sent, without query
    const char *query; // from the '?' on, or ""
    bool head, keep;   // HEAD: the answer has no body; the connection goes on after it
    bool is_1_1;       // not 1.0
    int count;
    http_field fields[HTTP_FIELDS_MAX];
} http_request;

static inline const char *http_reason(int status) {
    switch (status) {
    case 200: return "OK";
    case 206: return "Partial Content";
    case 301: return "Moved Permanently";
    case 304: return "Not Modified";
    case 400: return "Bad Request";
    case 403: return "Forbidden";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 413: return "Content Too Large";
    case 414: return "URI Too Long";
    case 416: return "Range Not Satisfiable";
    case 431: return "Request Header Fields Too Large";
    case 501: return "Not Implemented";
    case 503: return "Service Unavailable";
    case 505: return "HTTP Version Not Supported";
    default: return "Internal Server Error";
    }
}

// A time as HTTP writes it: "Fri, 27 Nov 2026 23:07:44 GMT".
static inline void http_date(time_t at, char text[32]) {
    struct tm tm;
    gmtime_r(&at, &tm);
    strftime(text, 32, "%a, %d %b %Y %H:%M:%S GMT", &tm);
}

// The value of a field, the first if there are several; NULL when there is none.
static const char *http_get_field(const http_request *q, const char *name) {
    for (int i = 0; i < q->count; i++)
        if (strcasecmp(q->fields[i].name, name) == 0) return q->fields[i].value;
    return NULL;
}

// Whether a list like "close, Upgrade" has the item.
static bool http_lists(const char *list, const char *item) {
    size_t size = strlen(item);
    while (*(list += strspn(list, ", \t")) != '\0') {
        size_t n = strcspn(list, ", \t");
        if (n == size && strncasecmp(list, item, n) == 0) return true;
        list += n;
    }
    return false;
}

// Looks for the end of the head in input[0..used); *seen says how much of it earlier calls have
// looked at. *size gets the head's size with its empty line, 0 while more has to come. Returns 0 or
// the status to refuse with.
static inline int http_find_end(const char *input, size_t used, size_t *seen, size_t *size) {
    const char *line = memchr(input, '\n', used);
    if ((line != NULL ? (size_t)(line - input) : used) > HTTP_LINE_MAX) return 414;
    for (*size = 0; *seen < used; ++*seen) {
        size_t i = *seen;
        if (input[i] != '\n') continue;
        if (i == 0 || input[i - 1] != '\r') return 400; // a bare LF
        if (i < 3 || input[i - 2] != '\n') continue;
        *size = i + 1;
        return 0;
    }
    return used < HTTP_HEAD_MAX ? 0 : 431;
}

static bool http_is_token(const char *s) {
    if (*s == '\0') return false;
    for (; *s != '\0'; s++)
        if (!isalnum((unsigned char)*s) && strchr("!#$%&'*+-.^_`|~", *s) == NULL) return false;
    return true;
}

// No control characters (a bare CR is one); in a target no blanks either.
static bool http_is_clean(const char *s, bool blanks) {
    for (; *s != '\0'; s++) {
        if (*s == '\t' || *s == ' ' ? !blanks : iscntrl((unsigned char)*s)) return false;
    }
    return true;
}

// "/path?query", also "http://host/path", as it is sent to a proxy. Returns whether it is one.
static bool http_parse_target(char *target, http_request *q) {
    if (strncasecmp(target, "http://", 7) == 0) target += 7 + strcspn(target + 7, "/?#");
    char *query = strchr(target, '?');
    if (query != NULL) *query++ = '\0';
    q->path = *target != '\0' ? target : "/";
    q->query = query != NULL ? query : "";
    return *q->path == '/' && strchr(q->path, '#') == NULL && strchr(q->query, '#') == NULL;
}

// "GET /path HTTP/1.1". Returns 0 or the status to refuse with.
static int http_parse_line(char *line, http_request *q) {
    char *target = strchr(line, ' '), *version = target != NULL ? strchr(target + 1, ' ') : NULL;
    if (version == NULL) return 400;
    *target++ = *version++ = '\0';
    if (!http_is_token(line) || !http_is_clean(target, false)) return 400;
    if (strncmp(version, "HTTP/", 5) != 0 || strlen(version) != 8 || version[6] != '.') return 400;
    if (!isdigit((unsigned char)version[5]) || !isdigit((unsigned char)version[7])) return 400;
    if (version[5] != '1') return 505;
    q->is_1_1 = version[7] != '0';
    q->head = strcmp(line, "HEAD") == 0;
    if (!q->head && strcmp(line, "GET") != 0) return 405;
    return http_parse_target(target, q) ? 0 : 400;
}

// "Name: value". Returns 0 or the status to refuse with.
static int http_parse_field(char *line, http_request *q) {
    char *value = strchr(line, ':');
    if (value == NULL) return 400;
    *value++ = '\0';
    value += strspn(value, " \t");
    for (size_t n = strlen(value); n > 0 && strchr(" \t", value[n - 1]) != NULL; n--)
        value[n - 1] = '\0';
    // A folded line begins, and "Name :" ends, with what is in no token.
    if (!http_is_token(line) || !http_is_clean(value, true)) return 400;
    if (q->count == HTTP_FIELDS_MAX) return 431;
    q->fields[q->count++] = (http_field){line, value};
    return 0;
}

// Whether a body follows, which this server takes none of. Returns 0 or the status to refuse with.
static int http_check_body(const http_request *q) {
    const char *length = http_get_field(q, "Content-Length");
    const char *coding = http_get_field(q, "Transfer-Encoding");
    if (coding != NULL && (length != NULL || !q->is_1_1)) return 400;
    if (coding != NULL) return strcasecmp(coding, "chunked") == 0 ? 413 : 501;
    if (length == NULL) return 0;
    if (*length == '\0' || length[strspn(length, "0123456789")] != '\0') return 400;
    return length[strspn(length, "0")] == '\0' ? 0 : 413;
}

// What all fields together say. Returns 0 or the status to refuse with.
static int http_check_fields(http_request *q) {
    int hosts = 0, lengths = 0, codings = 0;
    bool keep = q->is_1_1, close = false;
    for (int i = 0; i < q->count; i++) {
        const http_field *f = &q->fields[i];
        hosts += strcasecmp(f->name, "Host") == 0;
        lengths += strcasecmp(f->name, "Content-Length") == 0;
        codings += strcasecmp(f->name, "Transfer-Encoding") == 0;
        if (strcasecmp(f->name, "Connection") != 0) continue;
        keep = keep || http_lists(f->value, "keep-alive");
        close = close || http_lists(f->value, "close");
    }
    q->keep = keep && !close;
    const char *host = http_get_field(q, "Host");
    if (hosts > 1 || (q->is_1_1 && hosts == 0) || lengths > 1 || codings > 1) return 400;
    if (host != NULL && host[strcspn(host, " \t,/?#@\\")] != '\0') return 400;
    return http_check_body(q);
}

// Reads a head of `size` bytes, which it cuts into pieces. Returns 0 or the status to refuse with.
static inline int http_parse(char *input, size_t size, http_request *q) {
    q->count = 0;
    q->head = q->keep = q->is_1_1 = false;
    if (memchr(input, '\0', size) != NULL) return 400;
    char *end = input + size - 2; // of the last, empty line
    int status = 0;
    for (char *line = input, *stop; line < end && status == 0; line = stop + 2) {
        stop = strstr(line, "\r\n"); // there is one: the head ends with two
        *stop = '\0';
        status = line == input ? http_parse_line(line, q) : http_parse_field(line, q);
    }
    return status != 0 ? status : http_check_fields(q);
}

#endif
