// http_files.h - answers with the files of a folder: the handler of 20_http_files.c.
//
// Opening, reading and listing can take long (a disk that wakes up, a network file system), so all
// of it is done on the thread pool. A small file costs one trip: it is opened, looked at and read
// in one go. A large one goes out HTTP_CHUNK bytes at a time, so that memory stays bounded whatever
// the size; a trip for 64 KiB costs a few microseconds, which sendfile would save, but sendfile
// blocks the loop when the file is not in memory.
//
// Every component of a name is opened on its own, relative to the folder before it, and never
// through a symbolic link (such names are 404). So there is no way out of the root, also not for
// somebody who exchanges folders and links while a request is under way.

#ifndef HTTP_FILES_H
#define HTTP_FILES_H

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "http_names.h"
#include "http_serve.h"

enum {
    HTTP_CHUNK = 65536,   // bytes of a file in memory, per connection
    HTTP_NAMES_MAX = 5000 // names in a listing
};

// What the pool is asked for; it gets a copy, since the task may be cancelled meanwhile.
typedef struct http_wanted {
    int root;
    bool no_body; // HEAD
    char name[HTTP_LINE_MAX];
} http_wanted;

// And what it finds.
typedef struct http_found {
    int status; // 200, or what to answer instead
    int fd;     // the file, or -1
    uint64_t size;
    time_t modified;
    char etag[48];
    const char *type;
    size_t read; // bytes of the body that are here: the file's first ones, or a whole listing
    char *body;
} http_found;

static void http_found_free(void *arg) {
    http_found *f = arg;
    if (f->fd >= 0) close(f->fd);
    free(f->body);
    free(f);
}

// ---- on the pool

static int http_open_at(int folder, const char *name) { // not to be kept by a FIFO or terminal
    return openat(folder, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
}

// Opens a name below root. Returns the descriptor, or -1 with errno.
static int http_open_below(int root, const char *name) {
    int at = http_open_at(root, ".");
    while (at >= 0 && *name != '\0') {
        char part[256];
        size_t size = strcspn(name, "/");
        int folder = at, long_one = size >= sizeof part;
        snprintf(part, sizeof part, "%.*s", long_one ? 0 : (int)size, name); // "": ENOENT
        at = http_open_at(folder, part);
        int error = long_one ? ENAMETOOLONG : errno;
        close(folder);
        errno = error;
        name += size + (name[size] == '/');
    }
    return at;
}

static int http_status_of(int error) {
    switch (error) {
    case ENOENT:
    case ENOTDIR:
    case ELOOP:
    case EMLINK:
    case ENXIO: // a socket
    case ENAMETOOLONG: return 404;
    case EACCES:
    case EPERM: return 403;
    case EMFILE:
    case ENFILE:
    case ENOMEM: return 503;
    default: return 500;
    }
}

static int http_compare(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

// The names in a folder that are not hidden, those of folders with a slash, sorted. Returns how
// many, or -1.
static int http_read_names(DIR *folder, char **names, bool *more) {
    int count = 0;
    for (const struct dirent *d; (d = readdir(folder)) != NULL;) {
        char name[sizeof d->d_name + 1];
        bool other = d->d_type != DT_REG && d->d_type != DT_DIR && d->d_type != DT_UNKNOWN;
        if (d->d_name[0] == '.' || other) continue; // as it would be 404
        *more = count == HTTP_NAMES_MAX;
        if (*more) break;
        snprintf(name, sizeof name, "%s%s", d->d_name, d->d_type == DT_DIR ? "/" : "");
        names[count] = strdup(name);
        count += names[count] != NULL;
    }
    qsort(names, (size_t)count, sizeof *names, http_compare);
    return count;
}

static void http_write_page(FILE *to, const char *title, char *const *names, int count, bool more) {
    fputs("<!DOCTYPE html>\n<meta charset=\"utf-8\">\n<title>/", to);
    http_put_html(to, title);
    fputs("</title>\n<h1>/", to);
    http_put_html(to, title);
    fprintf(to, "</h1>\n<ul>\n%s", *title != '\0' ? "<li><a href=\"../\">..</a>\n" : "");
    for (int i = 0; i < count; i++) {
        fputs("<li><a href=\"./", to);
        http_put_url(to, names[i]);
        fputs("\">", to);
        http_put_html(to, names[i]);
        fputs("</a>\n", to);
    }
    fputs(more ? "<li>and more\n</ul>\n" : "</ul>\n", to);
}

// The page that lists a folder, which it closes. Returns 200 or the status of the failure.
static int http_list(http_found *f, int fd, const char *title) {
    char **names = malloc(HTTP_NAMES_MAX * sizeof *names);
    FILE *to = open_memstream(&f->body, &f->read);
    DIR *folder = fdopendir(fd);
    bool whole = names != NULL && to != NULL && folder != NULL, more = false;
    if (whole) {
        int count = http_read_names(folder, names, &more);
        http_write_page(to, title, names, count, more);
        for (int i = 0; i < count; i++) free(names[i]);
        whole = !ferror(to);
    }
    if (to != NULL) whole = fclose(to) == 0 && whole;
    if (folder != NULL) closedir(folder);
    else close(fd);
    free(names);
    return whole ? 200 : 503;
}

// Describes the open file f->fd, and reads its beginning. Returns the status.
static int http_look_at(http_found *f, const struct stat *st, bool no_body) {
    uint64_t ns = (uint64_t)st->st_mtim.tv_sec * 1000000000 + (uint64_t)st->st_mtim.tv_nsec;
    f->size = (uint64_t)st->st_size;
    f->modified = st->st_mtime;
    snprintf(f->etag, sizeof f->etag, "\"%llx-%llx\"", (unsigned long long)f->size,
             (unsigned long long)ns);
    size_t wanted = no_body ? 0 : f->size < HTTP_CHUNK ? (size_t)f->size : HTTP_CHUNK;
    if (wanted == 0) return 200;
    f->body = malloc(wanted);
    ssize_t n = f->body != NULL ? pread(f->fd, f->body, wanted, 0) : -1;
    f->read = n > 0 ? (size_t)n : 0;
    return n >= 0 ? 200 : http_status_of(f->body != NULL ? errno : ENOMEM);
}

// A folder shows its index.html, or else its list. Returns the status.
static int http_find(http_found *f, const http_wanted *w) {
    struct stat st;
    size_t size = strlen(w->name);
    bool as_folder = size == 0 || w->name[size - 1] == '/';
    f->type = http_type(w->name);
    f->fd = http_open_below(w->root, w->name);
    if (f->fd < 0 || fstat(f->fd, &st) != 0) return http_status_of(errno);
    if (S_ISDIR(st.st_mode)) {
        if (!as_folder) return 301; // else the page's relative links would lead astray
        int folder = f->fd;
        f->fd = http_open_at(folder, "index.html");
        if (f->fd < 0) return http_list(f, folder, w->name);
        close(folder);
        f->type = http_type("index.html");
        as_folder = false;
        if (fstat(f->fd, &st) != 0) return http_status_of(errno);
    }
    if (as_folder || !S_ISREG(st.st_mode)) return 404;
    return http_look_at(f, &st, w->no_body);
}

static orch_result http_find_offloaded(void *arg) {
    http_found *f = calloc(1, sizeof *f);
    if (f == NULL) return orch_fail(ORCH_ENOMEM);
    f->fd = -1;
    f->status = http_find(f, arg);
    return orch_ok(f, http_found_free);
}

// ---- in the connection's task

// Redirects to the same name with a slash behind it. The name is encoded anew, and relative: what
// was sent could lead a browser to another server.
static int http_redirect(http_connection *c, const char *name) {
    const char *slash = strrchr(name, '/');
    char fields[3 * 256 + 32] = "";
    FILE *to = fmemopen(fields, sizeof fields, "w");
    if (to == NULL) return ORCH_ENOMEM;
    fputs("Location: ./", to);
    http_put_url(to, slash != NULL ? slash + 1 : name);
    fputs("/\r\n", to);
    return fclose(to) != 0 ? ORCH_ENOMEM : http_reply_status(c, 301, fields);
}

// Sends bytes from..end of an open file. Each piece has its time; but when the server is asked to
// end, what is left has no more than that of the last one.
static int http_send_file(int to, int fd, uint64_t from, uint64_t end, orch_scope *scope) {
    char *piece = malloc(HTTP_CHUNK);
    ptrdiff_t n = piece != NULL ? 1 : ORCH_ENOMEM;
    while (from < end && n > 0) {
        if (orch_cancel_reason() == 0) orch_scope_extend(scope, HTTP_SEND_MS);
        size_t size = end - from < HTTP_CHUNK ? (size_t)(end - from) : HTTP_CHUNK;
        n = orch_file_read(fd, piece, size, from);
        if (n > 0) n = orch_write(to, piece, (size_t)n);
        from += n > 0 ? (uint64_t)n : 0;
    }
    free(piece);
    return n < 0 ? (int)n : from < end ? -EIO : 0; // too short now: only the end can say so
}

static int http_answer_list(http_connection *c, const http_found *f) {
    const char *fields = "Content-Type: text/html; charset=utf-8\r\nCache-Control: no-cache\r\n";
    return http_begin(c, 200, fields, f->read, f->body, f->read);
}

static int http_answer_file(http_connection *c, const http_found *f, orch_scope *scope) {
    const http_request *q = &c->request;
    char fields[512], date[32], range[96] = "";
    http_date(f->modified, date);
    snprintf(fields, sizeof fields, "ETag: %s\r\nLast-Modified: %s\r\n", f->etag, date);
    if (http_has_it(q, f->etag, f->modified)) return http_reply(c, 304, fields, "");

    const char *wanted = q->head ? NULL : http_get_field(q, "Range"); // it is for GET only
    const char *only_if = http_get_field(q, "If-Range");
    if (only_if != NULL && strcmp(only_if, f->etag) != 0) wanted = NULL;
    uint64_t from, count;
    int status = http_find_range(wanted, f->size, &from, &count);
    if (status == 416) {
        snprintf(range, sizeof range, "Content-Range: bytes */%llu\r\n",
                 (unsigned long long)f->size);
        return http_reply_status(c, status, range);
    }
    if (status == 206) {
        snprintf(range, sizeof range, "Content-Range: bytes %llu-%llu/%llu\r\n",
                 (unsigned long long)from, (unsigned long long)(from + count - 1),
                 (unsigned long long)f->size);
    }
    snprintf(fields, sizeof fields,
             "ETag: %s\r\nLast-Modified: %s\r\nContent-Type: %s\r\nAccept-Ranges: bytes\r\n%s"
             "X-Content-Type-Options: nosniff\r\n",
             f->etag, date, f->type, range);
    uint64_t here = from < f->read ? f->read - from : 0; // bytes that are here already
    if (here > count) here = count;
    const char *body = here > 0 ? f->body + from : NULL;
    int error = http_begin(c, status, fields, count, body, (size_t)here);
    if (error != 0 || q->head || here == count) return error;
    return http_send_file(c->fd, f->fd, from + here, from + count, scope);
}

static int http_find_and_answer(http_connection *c, const http_wanted *w, orch_scope *scope) {
    orch_result r = orch_await(orch_offload_with(&(orch_offload_desc){.name = "find",
                                                                      .fn = http_find_offloaded,
                                                                      .arg = (void *)(uintptr_t)w,
                                                                      .arg_size = sizeof *w,
                                                                      .lane = ORCH_LANE_FILE}));
    const http_found *f = r.value;
    int error = r.error;
    if (error != 0) error = error == ORCH_ENOMEM ? http_reply_status(c, 503, "") : error;
    else if (f->status == 301) error = http_redirect(c, w->name);
    else if (f->status != 200) error = http_reply_status(c, f->status, "");
    else if (f->fd < 0) error = http_answer_list(c, f);
    else error = http_answer_file(c, f, scope);
    orch_result_free(&r);
    return error;
}

// The handler. Its context is the root folder's descriptor, an int. A request that has come is
// answered, in bounded time, also when the server is asked to end meanwhile: hence the shield.
static int http_serve_file(http_connection *c, void *context) {
    http_wanted w = {*(const int *)context, c->request.head, ""};
    int status = http_decode_path(c->request.path, w.name);
    if (status != 0) return http_reply_status(c, status, "");
    orch_scope scope;
    orch_shield_begin();
    int error = http_open_scope(&scope, "answer", HTTP_SEND_MS);
    if (error == 0) error = http_find_and_answer(c, &w, &scope);
    error = (int)http_close_scope(&scope, error);
    orch_shield_end();
    return error;
}

#endif
