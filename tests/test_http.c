// The HTTP server of the examples: its parsers on their own, a connection over a socket pair with
// the virtual clock, and the files of a folder. test_http.sh asks the program itself.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE // strptime
#endif
#include "../asyncorch.h"
#include "test.h"

#include "../examples/http_files.h"

// ---- a request's head

// What a head comes to: 0, the status that refuses it, or -1 when more has to come.
static int parsed(const char *text, http_request *q) {
    static char input[HTTP_HEAD_MAX];
    size_t used = strlen(text), seen = 0, size = 0;
    memcpy(input, text, used);
    int status = http_find_end(input, used, &seen, &size);
    if (status != 0 || size == 0) return status != 0 ? status : -1;
    return http_parse(input, size, q);
}

#define GET "GET / HTTP/1.1\r\nHost: a\r\n"

static const struct {
    int status;
    const char *text;
} heads[] = {
    {0, GET "\r\n"},
    {0, "HEAD /a?b HTTP/1.1\r\nHost: a:80\r\n\r\n"},
    {0, "GET / HTTP/1.0\r\n\r\n"},
    {0, "GET http://a/b HTTP/1.1\r\nHost: [::1]:80\r\n\r\n"},
    {0, GET "A:\r\nB: \t c \t\r\nC:d\r\n\r\n"},
    {0, GET "Content-Length: 0\r\n\r\n"},
    {0, GET "A: \xc3\xa4\r\n\r\n"},
    {-1, GET},
    {-1, GET "\r"},
    {-1, ""},
    // the request line
    {400, "\r\n\r\n"},
    {400, "GET\r\n\r\n"},
    {400, "GET /\r\n\r\n"},
    {400, "GET  / HTTP/1.1\r\nHost: a\r\n\r\n"},
    {400, "GET / HTTP/1.1 \r\nHost: a\r\n\r\n"},
    {400, " GET / HTTP/1.1\r\nHost: a\r\n\r\n"},
    {400, "GET /\t HTTP/1.1\r\nHost: a\r\n\r\n"},
    {400, "GET /\x7f HTTP/1.1\r\nHost: a\r\n\r\n"},
    {400, "GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n"},
    {400, "GET /?a#b HTTP/1.1\r\nHost: a\r\n\r\n"},
    {400, "GET a HTTP/1.1\r\nHost: a\r\n\r\n"},
    {400, "GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n"},
    {400, "G(T / HTTP/1.1\r\nHost: a\r\n\r\n"},
    {400, "GET / http/1.1\r\nHost: a\r\n\r\n"},
    {400, "GET / HTTP/1.10\r\nHost: a\r\n\r\n"},
    {400, "GET / HTTP/1,1\r\nHost: a\r\n\r\n"},
    {400, "GET / HTTP/x.1\r\nHost: a\r\n\r\n"},
    {505, "GET / HTTP/2.0\r\nHost: a\r\n\r\n"},
    {505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
    {405, "POST / HTTP/1.1\r\nHost: a\r\n\r\n"},
    {405, "get / HTTP/1.1\r\nHost: a\r\n\r\n"},
    {405, "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"},
    // the host
    {400, "GET / HTTP/1.1\r\n\r\n"},
    {400, GET "Host: a\r\n\r\n"},
    {400, "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n"},
    {400, "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"},
    {400, "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n"},
    // line ends, folding, blanks
    {400, "GET / HTTP/1.1\nHost: a\n\n"},
    {400, GET "A: b\n\r\n"},
    {400, GET "A: b\rC: d\r\n\r\n"},
    {400, GET "A: b\r\r\n\r\n"},
    {400, GET "A: b\r\n c\r\n\r\n"},
    {400, GET "A: b\r\n\tc\r\n\r\n"},
    {400, GET "A : b\r\n\r\n"},
    {400, GET "A\t: b\r\n\r\n"},
    {400, GET ": b\r\n\r\n"},
    {400, GET "A\r\n\r\n"},
    {400, GET "A: \x01\r\n\r\n"},
    // bodies: none is taken, and no doubt about their length is let through
    {413, GET "Content-Length: 5\r\n\r\n"},
    {413, GET "Transfer-Encoding: chunked\r\n\r\n"},
    {501, GET "Transfer-Encoding: gzip\r\n\r\n"},
    {501, GET "Transfer-Encoding: gzip, chunked\r\n\r\n"},
    {501, GET "Transfer-Encoding: xchunked\r\n\r\n"},
    {400, GET "Content-Length: 0\r\nContent-Length: 0\r\n\r\n"},
    {400, GET "Content-Length: 5\r\ncontent-length: 6\r\n\r\n"},
    {400, GET "Content-Length: 5, 5\r\n\r\n"},
    {400, GET "Content-Length: +5\r\n\r\n"},
    {400, GET "Content-Length: -0\r\n\r\n"},
    {400, GET "Content-Length: 0x5\r\n\r\n"},
    {400, GET "Content-Length:\r\n\r\n"},
    {400, GET "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"},
    {400, GET "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n"},
    {400, GET "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n"},
    {400, GET "Transfer-Encoding : chunked\r\n\r\n"},
    {400, GET "Transfer-Encoding:\x0b"
              "chunked\r\n\r\n"},
    {400, "GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"},
};

TEST(heads_are_taken_and_refused) {
    http_request q;
    for (size_t i = 0; i < sizeof heads / sizeof heads[0]; i++) {
        int status = parsed(heads[i].text, &q);
        if (!CHECK_INT(status, heads[i].status)) fprintf(stderr, "for %s\n", heads[i].text);
    }
}

TEST(nul_in_a_head_is_refused) {
    char text[] = GET "A: b_c\r\n\r\n";
    http_request q;
    *strchr(text, '_') = '\0';
    CHECK_INT(http_parse(text, sizeof text - 1, &q), 400);
}

TEST(heads_have_bounds) {
    static char text[HTTP_HEAD_MAX + 1];
    http_request q;
    memset(text, 'a', sizeof text - 1);
    memcpy(text, "GET /", 5);
    CHECK_INT(parsed(text, &q), 414);
    text[HTTP_LINE_MAX] = '\0';
    CHECK_INT(parsed(text, &q), -1);
    memset(text, 'a', sizeof text - 1);
    memcpy(text, GET "A: ", strlen(GET "A: "));
    CHECK_INT(parsed(text, &q), 431);
    size_t used = (size_t)sprintf(text, GET);
    for (int i = 1; i <= HTTP_FIELDS_MAX; i++) used += (size_t)sprintf(text + used, "A: b\r\n");
    sprintf(text + used, "\r\n");
    CHECK_INT(parsed(text, &q), 431);
    sprintf(text + used - 6, "\r\n"); // one less
    CHECK_INT(parsed(text, &q), 0);
    CHECK_INT(q.count, HTTP_FIELDS_MAX);
}

TEST(heads_are_found_however_they_come) {
    const char *text = GET "A: b\r\n\r\nGET";
    size_t seen = 0, size = 0, whole = strlen(text) - 3;
    for (size_t used = 0; used < whole; used++) {
        CHECK_INT(http_find_end(text, used, &seen, &size), 0);
        CHECK_INT(size, 0);
    }
    CHECK_INT(http_find_end(text, whole + 3, &seen, &size), 0);
    CHECK_INT(size, whole);
}

TEST(heads_are_cut_into_pieces) {
    http_request q;
    CHECK_INT(parsed("GET /a%20b?c=d HTTP/1.1\r\nHost: a\r\nX-Y: \t z z \t\r\n\r\n", &q), 0);
    CHECK_STR(q.path, "/a%20b");
    CHECK_STR(q.query, "c=d");
    CHECK_STR(http_get_field(&q, "x-y"), "z z");
    CHECK(http_get_field(&q, "x") == NULL);
    CHECK(!q.head && q.keep && q.is_1_1);
    CHECK_INT(parsed("HEAD http://a?b HTTP/1.1\r\nHost: a\r\n\r\n", &q), 0);
    CHECK_STR(q.path, "/");
    CHECK(q.head);
}

TEST(connections_are_kept_as_asked) {
    http_request q;
    CHECK(parsed(GET "Connection: close\r\n\r\n", &q) == 0 && !q.keep);
    CHECK(parsed(GET "Connection: x, Close\r\n\r\n", &q) == 0 && !q.keep);
    CHECK(parsed(GET "Connection: closed\r\n\r\n", &q) == 0 && q.keep);
    CHECK(parsed(GET "Connection: close\r\nConnection: keep-alive\r\n\r\n", &q) == 0 && !q.keep);
    CHECK(parsed("GET / HTTP/1.0\r\n\r\n", &q) == 0 && !q.keep);
    CHECK(parsed("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", &q) == 0 && q.keep);
}

// ---- names, ranges, conditions

static const struct {
    int status;
    const char *path, *name;
} paths[] = {{0, "/", ""},
             {0, "/a", "a"},
             {0, "/a/", "a/"},
             {0, "/a/b.c", "a/b.c"},
             {0, "/a%20b%C3%a4+", "a b\xc3\xa4+"},
             {0, "/a..b/c.", "a..b/c."},
             {0, "/%25%32%65", "%2e"}, // decoded once
             {0, "/\\..\\a", "\\..\\a"},
             {400, "/..", NULL},
             {400, "/../a", NULL},
             {400, "/a/../b", NULL},
             {400, "/a/..", NULL},
             {400, "/./a", NULL},
             {400, "/.", NULL},
             {400, "/%2e%2e/a", NULL},
             {400, "/.%2E/a", NULL},
             {404, "/a%2f..%2fb", NULL},
             {404, "/..%2fb", NULL},
             {404, "/.git/config", NULL},
             {404, "/...", NULL},
             {404, "/%2ehidden", NULL},
             {404, "//a", NULL},
             {404, "/a//b", NULL},
             {400, "/a%00", NULL},
             {400, "/a%", NULL},
             {400, "/a%2", NULL},
             {400, "/a%2x", NULL},
             {400, "/a%x2", NULL}};

TEST(paths_become_names) {
    char name[HTTP_LINE_MAX];
    for (size_t i = 0; i < sizeof paths / sizeof paths[0]; i++) {
        int status = http_decode_path(paths[i].path, name);
        if (!CHECK_INT(status, paths[i].status)) fprintf(stderr, "for %s\n", paths[i].path);
        if (status == 0) CHECK_STR(name, paths[i].name);
    }
}

static const struct {
    const char *field;
    uint64_t size;
    int status;
    uint64_t from, count;
} ranges[] = {{"bytes=0-0", 10, 206, 0, 1},   {"bytes=2-4", 10, 206, 2, 3},
              {"Bytes=2-", 10, 206, 2, 8},    {"bytes=0-99", 10, 206, 0, 10},
              {"bytes=9-9", 10, 206, 9, 1},   {"bytes=-3", 10, 206, 7, 3},
              {"bytes=-99", 10, 206, 0, 10},  {"bytes=0-99999999999999999999999", 10, 206, 0, 10},
              {"bytes=10-", 10, 416, 0, 0},   {"bytes=99999999999999999999999-", 10, 416, 0, 0},
              {"bytes=-0", 10, 416, 0, 0},    {"bytes=0-", 0, 416, 0, 0},
              {"bytes=-5", 0, 416, 0, 0},     {NULL, 10, 200, 0, 10},
              {"bytes=4-2", 10, 200, 0, 10},  {"bytes=0-1,3-4", 10, 200, 0, 10},
              {"bytes=-", 10, 200, 0, 10},    {"bytes=--1", 10, 200, 0, 10},
              {"bytes=", 10, 200, 0, 10},     {"bytes=a-b", 10, 200, 0, 10},
              {"bytes=1", 10, 200, 0, 10},    {"bytes=1-x", 10, 200, 0, 10},
              {"bytes= 1-2", 10, 200, 0, 10}, {"bytes=-3-4", 10, 200, 0, 10},
              {"lines=1-2", 10, 200, 0, 10}};

TEST(ranges_become_parts) {
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        uint64_t from = 0, count = 0;
        int status = http_find_range(ranges[i].field, ranges[i].size, &from, &count);
        if (!CHECK_INT(status, ranges[i].status)) fprintf(stderr, "for %s\n", ranges[i].field);
        if (status == 416) continue;
        CHECK_INT(from, ranges[i].from);
        CHECK_INT(count, ranges[i].count);
    }
}

static bool has_it(const char *fields) {
    char text[512];
    http_request q;
    snprintf(text, sizeof text, "%s%s\r\n", GET, fields);
    CHECK_INT(parsed(text, &q), 0);
    return http_has_it(&q, "\"5-a\"", 784111777);
}

TEST(conditions_are_understood) {
    CHECK(!has_it(""));
    CHECK(has_it("If-None-Match: \"5-a\"\r\n"));
    CHECK(has_it("If-None-Match: \"x\", W/\"5-a\"\r\n"));
    CHECK(has_it("If-None-Match: *\r\n"));
    CHECK(!has_it("If-None-Match: \"5-ab\"\r\n"));
    CHECK(has_it("If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n"));
    CHECK(has_it("If-Modified-Since: Sun, 06 Nov 1994 08:49:38 GMT\r\n"));
    CHECK(!has_it("If-Modified-Since: Sun, 06 Nov 1994 08:49:36 GMT\r\n"));
    CHECK(!has_it("If-Modified-Since: yesterday\r\n"));
    CHECK(!has_it("If-None-Match: \"x\"\r\nIf-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n"));
}

TEST(names_are_written_safely) {
    char text[256] = "";
    FILE *to = fmemopen(text, sizeof text, "w");
    if (!CHECK(to != NULL)) return;
    http_put_url(to, "a b/%\"<\xc3.js:");
    fputc(' ', to);
    http_put_html(to, "<a href=\"x\">&'");
    fclose(to);
    CHECK_STR(text, "a%20b/%25%22%3C%C3.js%3A &lt;a href=&quot;x&quot;&gt;&amp;'");
    CHECK_STR(http_type("a.b/c.HTML"), "text/html; charset=utf-8");
    CHECK_STR(http_type("a.b/html"), "application/octet-stream");
    CHECK_STR(http_type(""), "application/octet-stream");
    http_date(784111777, text);
    CHECK_STR(text, "Sun, 06 Nov 1994 08:49:37 GMT");
}

// ---- a connection: the server's side is a task, the test's side is this one

static http_service service;
static int root_folder;
static char reply[3 << 20]; // of the last exchange
static size_t reply_size;

static orch_result serve_side(void *fd) { return http_connected(*(int *)fd, &service); }
static void close_side(void *fd) { close(*(int *)fd); }

// Starts the server's side. Returns the other; -1 in a sweep, perhaps.
static int open_connection(orch_future **server) {
    int fds[2];
    if (!CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0))
        return -1;
    *server = orch_go_with(&(orch_task_desc){.name = "server",
                                             .fn = serve_side,
                                             .arg = &fds[1],
                                             .arg_size = sizeof fds[1],
                                             .release = close_side});
    return fds[0];
}

// Reads until the server closes.
static void read_reply(int fd) {
    ptrdiff_t n = 1;
    for (reply_size = 0; n > 0 && reply_size<sizeof reply - 1; reply_size += n> 0 ? (size_t)n : 0)
        n = orch_read(fd, reply + reply_size, sizeof reply - 1 - reply_size);
    reply[reply_size] = '\0';
}

static void end_connection(int fd, orch_future *server) {
    close(fd);
    orch_result r = orch_await(server);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
}

// Sends a text, `step` bytes at a time, and says that no more comes (or not); reads all answers.
static void exchange(const char *text, size_t step, bool ends) {
    orch_future *server = NULL;
    int fd = open_connection(&server);
    reply[0] = '\0';
    if (fd < 0) return;
    for (size_t left = strlen(text); left > 0; orch_yield()) {
        size_t n = left < step ? left : step;
        if (orch_write(fd, text, n) < 0) break; // it has refused before the end
        text += n;
        left -= n;
    }
    if (ends) shutdown(fd, SHUT_WR);
    read_reply(fd);
    end_connection(fd, server);
}

static int answers(void) { // in reply
    int count = 0;
    for (const char *p = reply; (p = strstr(p, "HTTP/1.1 ")) != NULL; p++) count++;
    return count;
}

static void expect(const char *text, int status) {
    exchange(text, 1000, true);
    if (!CHECK_INT(atoi(reply + strcspn(reply, " ")), status)) fprintf(stderr, "for %s\n", text);
}

static int say_path(http_connection *c, void *context) {
    (void)context;
    return http_reply(c, 200, "", c->request.path);
}

static void run_on(orch_task_fn fn, orch_clock clock) {
    orch_result r = orch_run_with(&(orch_loop_desc){.clock = clock}, fn, NULL);
    CHECK_STR(orch_message(&r), "ok");
    orch_result_free(&r);
}

#define CASE(id)                                                                                   \
    static orch_result task_##id(void *arg);                                                       \
    TEST(id) {                                                                                     \
        service = (http_service){say_path, NULL, 0};                                               \
        run_on(task_##id, ORCH_CLOCK_VIRTUAL);                                                     \
    }                                                                                              \
    static orch_result task_##id(void *arg)
#define DONE return (void)arg, orch_ok(NULL, NULL)

static const char two[] = "\r\nGET /first HTTP/1.1\r\nHost: a\r\n\r\n"
                          "\r\n\r\nHEAD /second HTTP/1.1\r\nHost: a\r\n\r\n"
                          "GET /third HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
                          "GET /fourth HTTP/1.1\r\nHost: a\r\n\r\n";

CASE(requests_are_answered_in_order) {
    for (size_t step = 1; step < sizeof two; step += 50) {
        exchange(two, step, false);
        CHECK_INT(answers(), 3);
        const char *first = strstr(reply, "\r\n\r\n/first"),
                   *third = strstr(reply, "\r\n\r\n/third");
        CHECK(first != NULL && third > first);
        CHECK(strstr(reply, "Content-Length: 7\r\n\r\nHTTP/1.1") != NULL); // the second: no body
    }
    DONE;
}

// Whoever smuggles a request behind one with an unclear length must not see it answered.
CASE(nothing_is_answered_after_a_refusal) {
    static const char *const shapes[] = {
        GET "Content-Length: 44\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        GET "Content-Length: 5\r\n\r\n01234",
        GET "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        GET "Content-Length: 0\r\nContent-Length: 40\r\n\r\n",
        GET "A: b\r\n folded: c\r\n\r\n",
        GET "A: b\n\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 30\r\n\r\n",
        "GET / HTTP/3.0\r\nHost: a\r\n\r\n"};
    char text[512];
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        snprintf(text, sizeof text, "%s%s\r\n", shapes[i], GET);
        exchange(text, sizeof text, true);
        CHECK_INT(answers(), 1);
        CHECK(strstr(reply, "\r\nConnection: close\r\n") != NULL);
        CHECK(strstr(reply, "405") == NULL || strstr(reply, "\r\nAllow: GET, HEAD\r\n") != NULL);
    }
    DONE;
}

CASE(long_lines_are_refused_while_they_come) {
    static char text[100000];
    memset(text, 'a', sizeof text - 1);
    memcpy(text, "GET /", 5);
    expect(text, 414);
    memcpy(text, GET "A: ", strlen(GET "A: "));
    expect(text, 431);
    DONE;
}

CASE(idle_connections_end) {
    uint64_t began = orch_now();
    exchange("", 1, false);
    CHECK_INT(reply_size, 0);
    CHECK_INT(orch_now() - began, HTTP_IDLE_MS);
    began = orch_now();
    exchange(GET "\r\n", 1000, false); // kept alive after an answer
    CHECK_INT(answers(), 1);
    CHECK_INT(orch_now() - began, HTTP_IDLE_MS);
    DONE;
}

CASE(slow_heads_are_refused) {
    orch_future *server;
    int fd = open_connection(&server);
    if (fd < 0) DONE;
    for (int i = 0; i < 100 && orch_sleep(1000) == 0; i++) { // it does not help to send on
        if (orch_write(fd, &"GET / HTTP/1.1\r\n"[i % 14], 1) < 0) break;
    }
    read_reply(fd);
    CHECK(strncmp(reply, "HTTP/1.1 408 ", 13) == 0);
    CHECK(orch_now() < 1000 + HTTP_HEAD_MS + 2000);
    end_connection(fd, server);
    DONE;
}

CASE(a_client_that_goes_away_is_no_failure) {
    orch_future *server;
    int fd = open_connection(&server);
    if (fd < 0) DONE;
    orch_write(fd, GET "\r\n" GET "\r\n" GET, strlen(GET "\r\n" GET "\r\n" GET));
    end_connection(fd, server);
    DONE;
}

CASE(asked_to_end_an_idle_connection_does) {
    orch_future *server;
    int fd = open_connection(&server);
    if (fd < 0) DONE;
    orch_write(fd, GET, strlen(GET));
    orch_yield();
    orch_cancel(server, 0);
    read_reply(fd);
    CHECK_INT(reply_size, 0);
    CHECK_INT(orch_now(), 0); // at once
    close(fd);
    orch_drop(server);
    DONE;
}

// ---- a folder

static char folder[] = "/tmp/test_http.XXXXXX";

static void put(const char *name, const char *text, size_t size) {
    FILE *to = fopen(name, "w");
    CHECK(to != NULL && fwrite(text, 1, size, to) == size && fclose(to) == 0);
}

static void big_text(char *text, size_t size) {
    for (size_t i = 0; i < size; i++) text[i] = (char)('a' + i * 7 % 25 + i / 65536 % 2);
}

static char big[1000000];

// A folder to serve, with another beside it that nobody must see.
static void make_site(void) {
    strcpy(folder, "/tmp/test_http.XXXXXX");
    if (!CHECK(mkdtemp(folder) != NULL) || !CHECK(chdir(folder) == 0)) abort();
    big_text(big, sizeof big);
    CHECK(mkdir("site", 0700) == 0 && mkdir("site/sub", 0700) == 0);
    CHECK(mkdir("site/index", 0700) == 0 && mkdir("outside", 0700) == 0);
    put("outside/secret", "secret", 6);
    put("secret", "secret", 6);
    put("site/a.txt", "hello world", 11);
    put("site/empty", "", 0);
    put("site/.hidden", "secret", 6);
    put("site/big", big, sizeof big);
    put("site/sub/<i>&\".txt", "x", 1);
    put("site/index/index.html", "<p>index", 8);
    CHECK(symlink("../secret", "site/link") == 0 && symlink("../outside", "site/folder") == 0);
    CHECK(symlink("sub", "site/inside") == 0 && mkfifo("site/fifo", 0600) == 0);
    root_folder = open("site", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    CHECK(root_folder >= 0);
    service = (http_service){http_serve_file, &root_folder, 0};
}

static void remove_site(void) {
    static const char *const files[] = {
        "site/a.txt", "site/empty",          "site/.hidden",
        "site/big",   "site/sub/<i>&\".txt", "site/index/index.html",
        "site/link",  "site/folder",         "site/inside",
        "site/fifo",  "outside/secret",      "secret"};
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) unlink(files[i]);
    CHECK(rmdir("site/sub") == 0 && rmdir("site/index") == 0 && rmdir("site") == 0);
    CHECK(rmdir("outside") == 0 && chdir("/") == 0 && rmdir(folder) == 0);
    close(root_folder);
}

#define SITE_CASE(id, clock)                                                                       \
    static orch_result task_##id(void *arg);                                                       \
    TEST(id) {                                                                                     \
        make_site();                                                                               \
        run_on(task_##id, clock);                                                                  \
        remove_site();                                                                             \
    }                                                                                              \
    static orch_result task_##id(void *arg)
#define BIG "GET /big HTTP/1.1\r\nHost: a\r\n\r\n"
#define LAST "Host: a\r\nConnection: close\r\n\r\n"

static const char *body(void) {
    const char *end = strstr(reply, "\r\n\r\n");
    return end != NULL ? end + 4 : "";
}

static bool says(const char *field) { return strstr(reply, field) != NULL; }

SITE_CASE(files_are_served, ORCH_CLOCK_MONOTONIC) {
    expect("GET /a.txt HTTP/1.1\r\n" LAST, 200);
    CHECK_STR(body(), "hello world");
    CHECK(says("\r\nContent-Length: 11\r\n") && says("\r\nContent-Type: text/plain; "));
    CHECK(says("\r\nAccept-Ranges: bytes\r\n") && says("\r\nETag: \"b-"));
    expect("HEAD /a.txt HTTP/1.1\r\nRange: bytes=1-2\r\n" LAST, 200);
    CHECK_STR(body(), "");
    CHECK(says("\r\nContent-Length: 11\r\n"));
    expect("GET /empty HTTP/1.1\r\n" LAST, 200);
    CHECK_STR(body(), "");
    expect("GET /big?query HTTP/1.1\r\n" LAST, 200);
    CHECK(strlen(body()) == sizeof big && memcmp(body(), big, sizeof big) == 0);
    DONE;
}

SITE_CASE(parts_are_served, ORCH_CLOCK_MONOTONIC) {
    expect("GET /a.txt HTTP/1.1\r\nRange: bytes=1-3\r\n" LAST, 206);
    CHECK_STR(body(), "ell");
    CHECK(says("\r\nContent-Range: bytes 1-3/11\r\n") && says("\r\nContent-Length: 3\r\n"));
    expect("GET /a.txt HTTP/1.1\r\nRange: bytes=-4\r\n" LAST, 206);
    CHECK_STR(body(), "orld");
    expect("GET /a.txt HTTP/1.1\r\nRange: bytes=11-\r\n" LAST, 416);
    CHECK(says("\r\nContent-Range: bytes */11\r\n"));
    expect("GET /a.txt HTTP/1.1\r\nRange: bytes=1-3\r\nIf-Range: \"x\"\r\n" LAST, 200);
    CHECK_STR(body(), "hello world");
    expect("GET /big HTTP/1.1\r\nRange: bytes=65530-65540\r\n" LAST, 206);
    CHECK(strlen(body()) == 11 && memcmp(body(), big + 65530, 11) == 0);
    expect("GET /big HTTP/1.1\r\nRange: bytes=999990-\r\n" LAST, 206);
    CHECK(strlen(body()) == 10 && memcmp(body(), big + 999990, 10) == 0);
    DONE;
}

SITE_CASE(what_the_client_has_is_not_sent_again, ORCH_CLOCK_MONOTONIC) {
    char text[256], etag[64] = "";
    expect("GET /a.txt HTTP/1.1\r\n" LAST, 200);
    const char *at = strstr(reply, "ETag: ");
    if (at != NULL) sscanf(at, "ETag: %63[^\r]", etag);
    snprintf(text, sizeof text, "GET /a.txt HTTP/1.1\r\nIf-None-Match: %s\r\n" LAST, etag);
    expect(text, 304);
    CHECK(says(etag) && !says("Content-Length") && body()[0] == '\0');
    snprintf(text, sizeof text, "GET /a.txt HTTP/1.1\r\nRange: bytes=0-1\r\nIf-Range: %s\r\n" LAST,
             etag);
    expect(text, 206);
    CHECK_STR(body(), "he");
    put("site/a.txt", "other", 5);
    snprintf(text, sizeof text, "GET /a.txt HTTP/1.1\r\nIf-None-Match: %s\r\n" LAST, etag);
    expect(text, 200);
    DONE;
}

SITE_CASE(folders_are_shown, ORCH_CLOCK_MONOTONIC) {
    expect("GET / HTTP/1.1\r\n" LAST, 200);
    CHECK(says("<a href=\"./a.txt\">a.txt</a>") && says("<a href=\"./sub/\">sub/</a>"));
    CHECK(!says("hidden") && !says("link") && !says("fifo") && !says("\"../\""));
    expect("GET /sub/ HTTP/1.1\r\n" LAST, 200);
    CHECK(says("<a href=\"./%3Ci%3E%26%22.txt\">&lt;i&gt;&amp;&quot;.txt</a>") && says("\"../\""));
    expect("GET /sub/%3Ci%3E%26%22.txt HTTP/1.1\r\n" LAST, 200);
    expect("GET /sub HTTP/1.1\r\n" LAST, 301);
    CHECK(says("\r\nLocation: ./sub/\r\n"));
    expect("GET /index/ HTTP/1.1\r\n" LAST, 200);
    CHECK_STR(body(), "<p>index");
    CHECK(says("\r\nContent-Type: text/html"));
    DONE;
}

SITE_CASE(there_is_no_way_out, ORCH_CLOCK_MONOTONIC) {
    expect("GET /../secret HTTP/1.1\r\n" LAST, 400);
    expect("GET /sub/../../secret HTTP/1.1\r\n" LAST, 400);
    expect("GET /%2e%2e/secret HTTP/1.1\r\n" LAST, 400);
    expect("GET /..%2fsecret HTTP/1.1\r\n" LAST, 404);
    expect("GET //etc/passwd HTTP/1.1\r\n" LAST, 404);
    expect("GET /link HTTP/1.1\r\n" LAST, 404);
    expect("GET /folder/ HTTP/1.1\r\n" LAST, 404);
    expect("GET /folder/secret HTTP/1.1\r\n" LAST, 404);
    expect("GET /inside/ HTTP/1.1\r\n" LAST, 404); // not even to where it would be allowed
    expect("GET /.hidden HTTP/1.1\r\n" LAST, 404);
    expect("GET /fifo HTTP/1.1\r\n" LAST, 404);
    expect("GET /nothing HTTP/1.1\r\n" LAST, 404);
    expect("GET /a.txt/ HTTP/1.1\r\n" LAST, 404);
    expect("GET /a.txt/b HTTP/1.1\r\n" LAST, 404);
    DONE;
}

// A client that takes nothing: the server has sent what the socket holds, and then gives it up.
SITE_CASE(a_client_that_does_not_read_is_given_up, ORCH_CLOCK_VIRTUAL) {
    orch_future *server;
    int fd = open_connection(&server);
    if (fd < 0) DONE;
    orch_write(fd, BIG, strlen(BIG));
    orch_result r = orch_await(server);
    orch_result_free(&r);
    CHECK_INT(orch_now(), HTTP_SEND_MS);
    read_reply(fd);
    CHECK(reply_size < sizeof big);
    close(fd);
    DONE;
}

// A piece now and then, each in time.
static void read_slowly(int fd) {
    ptrdiff_t n = 1;
    for (reply_size = 0; n > 0 && orch_sleep(HTTP_SEND_MS / 10) == 0;
         reply_size += n > 0 ? (size_t)n : 0)
        n = orch_read(fd, reply + reply_size, 65536);
    reply[reply_size] = '\0';
}

// Asked to end, it finishes a file that it has begun; but a slow client gets no more time.
static void end_while_sending(bool slowly, bool end) {
    orch_future *server;
    int fd = open_connection(&server);
    if (fd < 0) return;
    orch_write(fd, BIG, strlen(BIG));
    orch_sleep(HTTP_SEND_MS / 2);
    if (end) orch_cancel(server, 0);
    if (slowly) read_slowly(fd);
    else read_reply(fd);
    if (slowly && end) CHECK(reply_size < sizeof big);
    else CHECK(strlen(body()) == sizeof big && memcmp(body(), big, sizeof big) == 0);
    close(fd);
    orch_drop(server);
}

SITE_CASE(a_slow_client_gets_all_of_a_file, ORCH_CLOCK_VIRTUAL) {
    end_while_sending(true, false);
    DONE;
}

SITE_CASE(asked_to_end_it_finishes_a_file, ORCH_CLOCK_VIRTUAL) {
    end_while_sending(false, true);
    end_while_sending(true, true);
    DONE;
}

SITE_CASE(a_file_that_shrinks_ends_the_connection, ORCH_CLOCK_VIRTUAL) {
    orch_future *server;
    int fd = open_connection(&server);
    if (fd < 0) DONE;
    orch_write(fd, BIG, strlen(BIG));
    orch_sleep(HTTP_SEND_MS / 2);
    CHECK(truncate("site/big", 70000) == 0);
    read_reply(fd);
    CHECK(says("\r\nContent-Length: 1000000\r\n") && reply_size < sizeof big);
    CHECK_INT(answers(), 1);
    end_connection(fd, server);
    DONE;
}

int main(int argc, char **argv) { return test_main(argc, argv); }
