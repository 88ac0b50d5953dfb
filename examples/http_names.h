// http_names.h - what a file server has to work out about a request, as functions that do no I/O:
// the name of the file, the part of it, whether the client has it already, its type, and names in
// HTML and in URLs. Source: RFC 9110, RFC 3986.

#ifndef HTTP_NAMES_H
#define HTTP_NAMES_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "http_request.h"

static int http_hex(char c) {
    const char *digits = "0123456789abcdef", *at = strchr(digits, tolower((unsigned char)c));
    return c != '\0' && at != NULL ? (int)(at - digits) : -1;
}

// One segment of a path, decoded in front of *to. Returns 0 or the status to refuse with.
static int http_decode_segment(const char **from, char **to) {
    const char *begin = *to;
    for (; **from != '\0' && **from != '/'; ++*from) {
        int c = (unsigned char)**from;
        if (c == '%') {
            int high = http_hex((*from)[1]), low = high < 0 ? -1 : http_hex((*from)[2]);
            if (low < 0) return 400;
            c = high * 16 + low;
            *from += 2;
        }
        if (c == '\0') return 400;
        if (c == '/') return 404; // no name has a slash
        *(*to)++ = (char)c;
    }
    size_t size = (size_t)(*to - begin);
    if (size == 0) return **from == '\0' ? 0 : 404; // "//"; nothing after the last slash is fine
    if (*begin != '.') return 0;
    return size == 1 || (size == 2 && begin[1] == '.') ? 400 : 404;
}

// The name, relative to the root, that the path of a request stands for: "/a%20b/" is "a b/", and
// "/" is "". Names that begin with a dot are hidden (404), and those that lead elsewhere, "." and
// "..", are refused however they are written (400). name has room for the path. Returns 0 or the
// status.
static inline int http_decode_path(const char *path, char *name) {
    char *to = name;
    for (;;) {
        path++; // a slash
        int status = http_decode_segment(&path, &to);
        if (status != 0) return status;
        if (*path == '\0') break;
        *to++ = '/';
    }
    *to = '\0';
    return 0;
}

// A number in *text, which moves behind it; UINT64_MAX also for what is larger.
static bool http_read_number(const char **text, uint64_t *n) {
    if (!isdigit((unsigned char)**text)) return false;
    for (*n = 0; isdigit((unsigned char)**text); ++*text) {
        uint64_t digit = (uint64_t)(**text - '0');
        *n = *n > (UINT64_MAX - digit) / 10 ? UINT64_MAX : *n * 10 + digit;
    }
    return true;
}

// Which part of `size` bytes a Range field asks for. Returns 206 and the part, 416, or 200 when the
// field is to be ignored: none, several ranges, another unit, nonsense.
static inline int http_find_range(const char *field, uint64_t size, uint64_t *from,
                                  uint64_t *count) {
    uint64_t first, last = UINT64_MAX;
    *from = 0;
    *count = size;
    if (field == NULL || strncasecmp(field, "bytes=", 6) != 0) return 200;
    const char *p = field + 6;
    bool suffix = *p == '-'; // "-500": the last 500 bytes
    if (suffix) p++;
    if (!http_read_number(&p, &first)) return 200;
    if (!suffix && *p++ != '-') return 200;
    if (!suffix && *p != '\0' && (!http_read_number(&p, &last) || last < first)) return 200;
    if (*p != '\0') return 200;
    if (size == 0 || (suffix ? first == 0 : first >= size)) return 416;
    *from = suffix ? size - (first < size ? first : size) : first;
    *count = (last < size - 1 && !suffix ? last : size - 1) - *from + 1;
    return 206;
}

// Whether what the client has is what it would get: If-None-Match decides where there is one, else
// If-Modified-Since.
static inline bool http_has_it(const http_request *q, const char *etag, time_t modified) {
    const char *tags = http_get_field(q, "If-None-Match");
    const char *since = http_get_field(q, "If-Modified-Since");
    struct tm tm;
    if (tags != NULL) return strcmp(tags, "*") == 0 || strstr(tags, etag) != NULL;
    if (since == NULL) return false;
    memset(&tm, 0, sizeof tm);
    const char *end = strptime(since, "%a, %d %b %Y %H:%M:%S GMT", &tm);
    return end != NULL && *end == '\0' && modified <= timegm(&tm);
}

static inline const char *http_type(const char *name) {
    static const char *const types[][2] = {{"html", "text/html; charset=utf-8"},
                                           {"htm", "text/html; charset=utf-8"},
                                           {"css", "text/css; charset=utf-8"},
                                           {"js", "text/javascript; charset=utf-8"},
                                           {"mjs", "text/javascript"},
                                           {"json", "application/json"},
                                           {"txt", "text/plain; charset=utf-8"},
                                           {"md", "text/plain; charset=utf-8"},
                                           {"c", "text/plain; charset=utf-8"},
                                           {"h", "text/plain; charset=utf-8"},
                                           {"xml", "application/xml"},
                                           {"svg", "image/svg+xml"},
                                           {"png", "image/png"},
                                           {"jpg", "image/jpeg"},
                                           {"jpeg", "image/jpeg"},
                                           {"gif", "image/gif"},
                                           {"webp", "image/webp"},
                                           {"ico", "image/vnd.microsoft.icon"},
                                           {"pdf", "application/pdf"},
                                           {"wasm", "application/wasm"},
                                           {"mp4", "video/mp4"},
                                           {"mp3", "audio/mpeg"},
                                           {"woff2", "font/woff2"},
                                           {"zip", "application/zip"}};
    const char *dot = strrchr(name, '.');
    for (size_t i = 0; dot != NULL && i < sizeof types / sizeof types[0]; i++)
        if (strcasecmp(dot + 1, types[i][0]) == 0) return types[i][1];
    return "application/octet-stream";
}

// A name as a path in a URL: all but what is always safe, and slashes, as %XX.
static inline void http_put_url(FILE *to, const char *name) {
    for (; *name != '\0'; name++) {
        if (isalnum((unsigned char)*name) || strchr("-._~/", *name) != NULL) fputc(*name, to);
        else fprintf(to, "%%%02X", (unsigned)(unsigned char)*name);
    }
}

static inline void http_put_html(FILE *to, const char *text) {
    for (; *text != '\0'; text++) {
        switch (*text) {
        case '&': fputs("&amp;", to); break;
        case '<': fputs("&lt;", to); break;
        case '>': fputs("&gt;", to); break;
        case '"': fputs("&quot;", to); break;
        default: fputc(*text, to);
        }
    }
}

#endif
