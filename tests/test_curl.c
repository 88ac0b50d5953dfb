// The adapter examples/orch_curl.h, the client examples/http_get.h and the server they talk to,
// over real sockets. The server is .build/examples/server, or the program that ORCH_SERVER names.
// Without libcurl (HAVE_CURL not defined) the cases of the adapter are counted as skipped.
#include "../asyncorch.h"
#include "test.h"

#include <sys/resource.h>
#include <time.h>

#include "../examples/http_get.h"

// ---- a server of our own

static struct {
    pid_t pid;
    int input; // the server ends when this is closed, by us or by our death
    int port;
    char url[64];
} server;

static void server_exec(int input, int output, const char *const *options) {
    const char *program = getenv("ORCH_SERVER"), *args[20] = {"server", "--until-eof"};
    for (int i = 0; i < 17 && options[i] != NULL; i++) args[i + 2] = options[i];
    dup2(input, STDIN_FILENO);
    dup2(output, STDOUT_FILENO);
    for (int fd = 3; fd < 64; fd++) close(fd);
    execv(program != NULL ? program : ".build/examples/server", (char *const *)(uintptr_t)args);
    _exit(127);
}

// Whether it listens, with server.port and server.url set. Allocates nothing: a sweep may be on.
static bool server_start(const char *const *options) {
    int to[2], from[2];
    char line[128];
    size_t used = 0;
    setenv("no_proxy", "127.0.0.1", 1); // else libcurl asks the proxy of the environment
    fflush(NULL);
    if (!CHECK(pipe(to) == 0) || !CHECK(pipe(from) == 0)) return false;
    server.pid = fork();
    if (server.pid == 0) server_exec(to[0], from[1], options);
    close(to[0]);
    close(from[1]);
    server.input = to[1];
    while (used < sizeof line - 1 && read(from[0], line + used, 1) == 1 && line[used] != '\n')
        used++;
    line[used] = '\0';
    close(from[0]);
    const char *port = strrchr(line, ':');
    server.port = port != NULL ? atoi(port + 1) : 0;
    snprintf(server.url, sizeof server.url, "http://127.0.0.1:%d", server.port);
    return CHECK(server.port > 0); // else: is the server built?
}

static void server_stop(void) {
    int status = -1;
    close(server.input);
    CHECK(waitpid(server.pid, &status, 0) == server.pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0); // also: its sanitizers found nothing
}

static const char *const usual[] = {"--delay", "comments=20", "--fail", "comments=3",
                                    "--hang",  "likes=2",     NULL};

// Runs the task with a server and checks that it ended well.
static void with_server(orch_task_fn fn) {
    if (!server_start(usual)) return;
    orch_result r = orch_run(fn, NULL);
    CHECK_STR(orch_message(&r), "ok");
    orch_result_free(&r);
    server_stop();
}

static const char *at(const char *path) {
    static char url[128];
    snprintf(url, sizeof url, "%s%s", server.url, path);
    return url;
}

// A listening socket nobody serves, or (listening false) one that refuses.
static int bare_socket(bool listening, int *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, size) == 0);
    CHECK(!listening || listen(fd, 8) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)&address, &size) == 0);
    *port = ntohs(address.sin_port);
    return fd;
}

// Takes the connection that f (NULL: somebody) makes to a bare socket, and its request; -1: none
// came, which in a sweep is normal.
static int bare_accept(int fd, const orch_future *f) {
    char request[1024];
    uint64_t limit = f != NULL && orch_is_settled(f) ? 1 : test_shared->fail_at > 0 ? 200 : 2000;
    orch_result r = orch_await(orch_timeout(orch_ready(fd, ORCH_READABLE), limit));
    int peer = r.error == 0 ? accept(fd, NULL, NULL) : -1;
    orch_result_free(&r);
    if (peer < 0) return -1;
    r = orch_await(orch_timeout(orch_ready(peer, ORCH_READABLE), 2000));
    CHECK(r.error == 0 && read(peer, request, sizeof request) > 0);
    orch_result_free(&r);
    return peer;
}

// Whether the other side closes the connection, and soon.
static bool bare_is_closed(int peer) {
    char more;
    orch_result r = orch_await(orch_timeout(orch_ready(peer, ORCH_READABLE), 2000));
    bool closed = r.error == 0 && read(peer, &more, 1) <= 0;
    orch_result_free(&r);
    return closed;
}

// ---- the server

// Sends text on a new connection; reads until the server closes it, or until so many answers came.
static void raw(const char *text, size_t size, int answers, char *reply, size_t capacity) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    to.sin_port = htons((uint16_t)server.port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    size_t used = 0;
    signal(SIGPIPE, SIG_IGN);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to) == 0);
    while (size > 0) {
        ssize_t n = write(fd, text, size < 1000 ? size : 1000);
        if (n <= 0) break; // it may have refused before the end
        text += n;
        size -= (size_t)n;
    }
    for (int seen = 0; used + 1 < capacity && (answers == 0 || seen < answers);) {
        ssize_t n = read(fd, reply + used, 1);
        if (n <= 0) break;
        used += (size_t)n;
        seen += reply[used - 1] == '}'; // the last byte of a flat body
    }
    reply[used] = '\0';
    close(fd);
}

static void expect(const char *text, const char *status) {
    char reply[1024];
    raw(text, strlen(text), 0, reply, sizeof reply);
    if (!CHECK(strncmp(reply, "HTTP/1.1 ", 9) == 0) || !CHECK(strncmp(reply + 9, status, 3) == 0))
        fprintf(stderr, "for %s: %s, not %s\n", text, reply, status);
}

#define HOST "Host: a\r\nConnection: close\r\n\r\n"

TEST(server_serves_and_refuses) {
    if (!server_start(usual)) return;
    expect("GET /user/1 HTTP/1.1\r\n" HOST, "200");
    expect("HEAD /user/1 HTTP/1.1\r\n" HOST, "200");
    expect("GET /users/1/posts?x=1 HTTP/1.0\r\n\r\n", "200");
    expect("GET /posts/3/likes HTTP/1.1\r\n" HOST, "200");
    expect("GET /posts/4/comments HTTP/1.1\r\n" HOST, "200");
    expect("GET /posts/3/comments HTTP/1.1\r\n" HOST, "500");
    expect("GET / HTTP/1.1\r\n" HOST, "404");
    expect("GET /user/0 HTTP/1.1\r\n" HOST, "404");
    expect("GET /user/99999999999999999999 HTTP/1.1\r\n" HOST, "404");
    expect("GET /user/1x HTTP/1.1\r\n" HOST, "404");
    expect("POST /user/1 HTTP/1.1\r\n" HOST, "405");
    expect("GET /user/1\r\n\r\n", "400");
    expect("GET /user/1 HTTP/1.1\r\n\r\n", "400");
    expect("GET /user/1 HTTP/1.1\r\nBad : header\r\n" HOST, "400");
    expect("nonsense\r\n\r\n", "400");
    expect("GET /user/1 HTTP/1.1\r\nContent-Length: 3\r\n" HOST "abc", "413");
    expect("GET /user/1 HTTP/3.0\r\n" HOST, "505");
    server_stop();
}

TEST(server_refuses_what_is_too_long) {
    static char text[100000], reply[1024];
    if (!server_start(usual)) return;
    memset(text, 'a', sizeof text);
    memcpy(text, "GET /", 5);
    raw(text, sizeof text, 0, reply, sizeof reply);
    CHECK(strstr(reply, " 414 ") != NULL);
    memcpy(text, "GET / HTTP/1.1\r\nA: ", 19);
    raw(text, sizeof text, 0, reply, sizeof reply);
    CHECK(strstr(reply, " 431 ") != NULL);
    size_t used = 16;
    for (int i = 0; i < 200; i++) used += (size_t)sprintf(text + used, "A: b\r\n");
    used += (size_t)sprintf(text + used, "\r\n");
    raw(text, used, 0, reply, sizeof reply);
    CHECK(strstr(reply, " 431 ") != NULL);
    server_stop();
}

TEST(server_keeps_connections_and_pipelines) {
    static const char two[] =
        "GET /user/1 HTTP/1.1\r\nHost: a\r\n\r\nGET /posts/3/likes HTTP/1.1\r\nHost: a\r\n\r\n";
    char reply[1024];
    if (!server_start(usual)) return;
    raw(two, sizeof two - 1, 2, reply, sizeof reply);
    const char *first = strstr(reply, "\"Ada\""), *second = strstr(reply, "\"count\":21");
    CHECK(first != NULL && second > first);
    CHECK(strstr(reply, "keep-alive") != NULL);
    server_stop();
}

TEST(server_understands_its_options) {
    static const char *const options[] = {"--error-rate", "100", "--posts", "1", NULL};
    static const char *const bad[] = {"--fail", "nothing=1", NULL};
    if (!server_start(options)) return;
    expect("GET /user/1 HTTP/1.1\r\n" HOST, "500");
    server_stop();
    pid_t pid = fork();
    if (pid == 0) server_exec(0, 1, bad);
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 2);
}

// ---- the minimal client

static orch_result minimal_task(void *arg) {
    (void)arg;
    int port = 0, refuses = bare_socket(false, &port);
    char url[64];
    orch_result r = orch_await(http_get(at("/user/1")));
    const http_response *response = r.value;
    if (CHECK_INT(r.error, 0)) {
        CHECK_INT(response->status, 200);
        CHECK_STR(response->body, "{\"id\":1,\"name\":\"Ada\"}");
        CHECK_INT(response->length, strlen(response->body));
    }
    orch_result_free(&r);

    r = orch_await(http_get(at("/nothing#here")));
    response = r.value;
    if (CHECK_INT(r.error, 0)) CHECK_INT(response->status, 404);
    orch_result_free(&r);

    snprintf(url, sizeof url, "http://localhost:%d/", port);
    r = orch_await(http_get(url));
    CHECK_INT(r.error, -ECONNREFUSED);
    orch_result_free(&r);
    close(refuses);

    r = orch_await(orch_timeout(http_get(at("/posts/2/likes")), 20));
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    orch_result_free(&r);

    static const char *const bad[] = {"",
                                      "http://",
                                      "https://127.0.0.1/",
                                      "http://127.0.0.1:0/",
                                      "http://127.0.0.1:1x/",
                                      "http://a b/",
                                      "http://example.org/"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        r = orch_await(http_get(bad[i]));
        CHECK(r.error == ORCH_EINVAL || r.error == -EPROTONOSUPPORT);
        orch_result_free(&r);
    }
    return orch_ok(NULL, NULL);
}
TEST(minimal_client_gets_and_fails) { with_server(minimal_task); }

static orch_result minimal_answer(const char *answer) {
    int port = 0, fd = bare_socket(true, &port);
    char url[64];
    snprintf(url, sizeof url, "http://127.0.0.1:%d", port);
    orch_future *f = http_get(url);
    int peer = bare_accept(fd, f);
    if (peer >= 0) CHECK(write(peer, answer, strlen(answer)) == (ssize_t)strlen(answer));
    close(peer);
    close(fd); // and with it a connection that could not be accepted
    return orch_await(f);
}

static orch_result minimal_answers_task(void *arg) {
    (void)arg;
    orch_result r = minimal_answer("HTTP/1.1 200 OK\r\n\r\nuntil the end");
    if (CHECK_INT(r.error, 0)) CHECK_STR(((const http_response *)r.value)->body, "until the end");
    orch_result_free(&r);
    r = minimal_answer("HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\nextra");
    if (CHECK_INT(r.error, 0)) CHECK_INT(((const http_response *)r.value)->length, 0);
    orch_result_free(&r);
    static const char *const bad[] = {
        "", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc", "ICY 200\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Le"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        r = minimal_answer(bad[i]);
        CHECK_INT(r.error, -EPROTO);
        orch_result_free(&r);
    }
    return orch_ok(NULL, NULL);
}
TEST(minimal_client_reads_answers_to_the_end_and_no_further) {
    orch_result r = orch_run(minimal_answers_task, NULL);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
}

static orch_result minimal_drop_task(void *arg) {
    (void)arg;
    int port = 0, fd = bare_socket(true, &port);
    char url[64];
    snprintf(url, sizeof url, "http://127.0.0.1:%d/", port);
    orch_future *f = http_get(url);
    int peer = bare_accept(fd, f);
    orch_drop(f);
    if (peer >= 0) CHECK(bare_is_closed(peer));
    close(peer);
    close(fd);
    return orch_ok(NULL, NULL);
}
TEST(minimal_client_drop_closes_the_connection) {
    orch_result r = orch_run(minimal_drop_task, NULL);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
}

// ---- the adapter

// clang-format off
#define CURL_CASES(X) \
    X(get_succeeds) X(status_404_fulfils) X(refused_connection_rejects) X(bad_arguments_reject) \
    X(drop_cancels) X(drop_at_once_cancels) X(timeout_cancels) X(a_thousand_at_once) \
    X(connections_can_be_bounded) X(zero_timeout_is_not_rounded) X(body_can_be_bounded) \
    X(body_can_be_discarded) X(an_easy_handle_of_any_kind) X(interest_is_given_up) \
    X(free_rejects_what_runs) X(two_clients) X(large_bodies_arrive_whole) \
    X(main_may_end_before_its_transfers)
// clang-format on

#ifndef HAVE_CURL
#define CURL_SKIP(id)                                                                              \
    TEST_SKIP(curl_##id, true) {}
CURL_CASES(CURL_SKIP)
TEST_SKIP(curl_without_tasks, true) {}
#else
#define ORCH_CURL_IMPLEMENTATION
#include "../examples/orch_curl.h"

static orch_curl *client; // of the case

static const char *body_of(const orch_result *r) {
    return r->error == 0 ? ((const orch_curl_response *)r->value)->body : orch_message(r);
}
static long status_of(const orch_result *r) {
    return r->error == 0 ? ((const orch_curl_response *)r->value)->status : r->error;
}
static void expect_status(orch_future *f, long status) {
    orch_result r = orch_await(f);
    CHECK_INT(status_of(&r), status);
    orch_result_free(&r);
}
static void expect_body(orch_future *f, const char *body) {
    orch_result r = orch_await(f);
    CHECK_STR(body_of(&r), body);
    orch_result_free(&r);
}

static void get_succeeds(void) {
    orch_result r = orch_await(orch_curl_get(client, at("/user/1")));
    CHECK_STR(body_of(&r), "{\"id\":1,\"name\":\"Ada\"}");
    CHECK_INT(status_of(&r), 200);
    if (r.error == 0) CHECK_INT(((const orch_curl_response *)r.value)->length, strlen(body_of(&r)));
    orch_result_free(&r);
    expect_body(orch_curl_get(client, at("/posts/5/likes")),
                "{\"count\":35}"); // the same connection
}

static void status_404_fulfils(void) {
    expect_status(orch_curl_get(client, at("/nothing")), 404);
    expect_status(orch_curl_get(client, at("/posts/3/comments")), 500);
}

static void refused_connection_rejects(void) {
    int port = 0, fd = bare_socket(false, &port);
    char url[64];
    snprintf(url, sizeof url, "http://127.0.0.1:%d/", port);
    orch_result r = orch_await(orch_curl_get(client, url));
    CHECK_INT(r.error, CURLE_COULDNT_CONNECT);
    CHECK(strstr(orch_message(&r), "onnect") != NULL);
    orch_result_free(&r);
    close(fd);
}

static void bad_arguments_reject(void) {
    expect_status(orch_curl_get(NULL, at("/user/1")), ORCH_EINVAL);
    expect_status(orch_curl_get(client, NULL), ORCH_EINVAL);
    expect_status(orch_curl_send(client, NULL), ORCH_EINVAL);
    expect_status(orch_curl_get(client, "file:///etc/passwd"), CURLE_UNSUPPORTED_PROTOCOL);
    orch_result r = orch_await(orch_curl_get(client, "http://"));
    CHECK(r.error > 0);
    orch_result_free(&r);
    orch_curl_free(NULL);
    CHECK_INT(orch_curl_running(NULL), 0);
}

static void drop_cancels(void) {
    int port = 0, fd = bare_socket(true, &port);
    char url[64];
    snprintf(url, sizeof url, "http://127.0.0.1:%d/", port);
    orch_future *f = orch_curl_get(client, url);
    int peer = bare_accept(fd, f);
    if (peer >= 0) CHECK_INT(orch_curl_running(client), 1);
    orch_drop(f);
    CHECK_INT(orch_curl_running(client), 0); // in a task a drop returns when the work has ended
    if (peer >= 0) CHECK(bare_is_closed(peer));
    close(peer);
    close(fd);
}

static void drop_at_once_cancels(void) {
    for (int i = 0; i < 20; i++) {
        orch_future *f = orch_curl_get(client, at("/user/1"));
        for (int k = 0; k < i; k++) orch_yield(); // dropped at every stage of its life
        orch_drop(f);
        CHECK_INT(orch_curl_running(client), 0);
    }
    expect_status(orch_curl_get(client, at("/user/1")), 200);
}

static void timeout_cancels(void) {
    orch_result r = orch_await(orch_timeout(orch_curl_get(client, at("/posts/2/likes")), 20));
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    orch_result_free(&r);
    CHECK_INT(orch_curl_running(client), 0);
}

static void a_thousand_at_once(void) {
    enum { MANY = 1000 };
    static orch_future *all[MANY];
    size_t many = test_shared->fail_at > 0 ? 5 : MANY; // a sweep repeats this often
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = limit.rlim_max < 4096 ? limit.rlim_max : 4096;
    setrlimit(RLIMIT_NOFILE, &limit);
    for (size_t i = 0; i < many; i++) all[i] = orch_curl_get(client, at("/posts/4/comments"));
    CHECK_INT(orch_curl_running(client), many);
    orch_result r = orch_await(orch_all_n(many, all));
    CHECK_STR(orch_message(&r), "ok");
    size_t good = 0;
    for (size_t i = 0; i < orch_count(&r); i++) good += status_of(orch_at(&r, i)) == 200;
    CHECK_INT(good, many);
    orch_result_free(&r);
    CHECK_INT(orch_curl_running(client), 0);
}

static void connections_can_be_bounded(void) {
    orch_curl *two = orch_curl_new(&(orch_curl_desc){.max_connections = 2});
    orch_future *all[10];
    if (!CHECK(two != NULL)) return;
    for (size_t i = 0; i < 10; i++) all[i] = orch_curl_get(two, at("/user/1"));
    orch_future *f = orch_all_n(10, all);
    while (!orch_is_settled(f) && orch_yield() == 0)
        CHECK(orch_loop_statistics(orch_loop_current()).watched <= 2);
    orch_result r = orch_await(f);
    CHECK_STR(orch_message(&r), "ok");
    orch_result_free(&r);
    orch_curl_free(two);
}

static CURL *easy_of(const char *url) {
    CURL *easy = curl_easy_init();
    curl_easy_setopt(easy, CURLOPT_URL, url);
    return easy;
}

static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
}

// A file is read in a few turns that libcurl asks for by a timeout of 0. As a timer is never early,
// one millisecond in place of 0 would make every single transfer take that long.
static void zero_timeout_is_not_rounded(void) {
    double best = 1e9;
    for (int i = 0; i < (test_shared->fail_at ? 3 : 50); i++) {
        double start = milliseconds();
        orch_future *f = orch_curl_send(client, easy_of("file:///dev/null"));
        CHECK_INT(orch_is_settled(f) && test_shared->refused == 0, 0); // not from inside the call
        orch_result r = orch_await(f);
        CHECK_INT(r.error, 0);
        CHECK_STR(body_of(&r), "");
        orch_result_free(&r);
        double took = milliseconds() - start;
        if (took < best) best = took;
    }
    CHECK(best < 1.0);
}

static void body_can_be_bounded(void) {
    orch_curl *small = orch_curl_new(&(orch_curl_desc){.max_body = 5});
    if (!CHECK(small != NULL)) return;
    expect_status(orch_curl_get(small, at("/user/1")), -EMSGSIZE);
    orch_curl_free(small);
    orch_curl *exact = orch_curl_new(&(orch_curl_desc){.max_body = 21});
    if (!CHECK(exact != NULL)) return;
    expect_body(orch_curl_get(exact, at("/user/1")), "{\"id\":1,\"name\":\"Ada\"}");
    orch_curl_free(exact);
}

static void body_can_be_discarded(void) {
    orch_curl *c = orch_curl_new(&(orch_curl_desc){.discard_body = true});
    if (!CHECK(c != NULL)) return;
    orch_result r = orch_await(orch_curl_get(c, at("/user/1")));
    CHECK_STR(body_of(&r), "");
    if (r.error == 0) CHECK_INT(((const orch_curl_response *)r.value)->length, 21);
    orch_result_free(&r);
    orch_curl_free(c);
}

static void an_easy_handle_of_any_kind(void) {
    CURL *easy = easy_of(at("/user/1"));
    curl_easy_setopt(easy, CURLOPT_NOBODY, 1L);
    expect_status(orch_curl_send(client, easy), 200);
    easy = easy_of(at("/posts/2/likes"));
    curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, 20L);
    expect_status(orch_curl_send(client, easy), ORCH_ETIMEDOUT);
    easy = easy_of(at("/user/1"));
    curl_easy_setopt(easy, CURLOPT_POSTFIELDS, "a=b");
    expect_status(orch_curl_send(client, easy), 405);
}

static void interest_is_given_up(void) {
    expect_status(orch_curl_get(client, at("/user/1")),
                  200); // its connection stays open, unwatched
    orch_yield();
    orch_loop_stats now = orch_loop_statistics(orch_loop_current());
    CHECK_INT(now.watched, 0);
    CHECK_INT(now.timers, 0);
}

static void free_rejects_what_runs(void) {
    orch_curl *c = orch_curl_new(NULL);
    if (!CHECK(c != NULL)) return;
    orch_future *hangs = orch_curl_get(c, at("/posts/2/likes")), *starts;
    orch_sleep(5);
    starts = orch_curl_get(c, at("/user/1"));
    orch_curl_free(c);
    expect_status(hangs, ORCH_ECANCELED);
    expect_status(starts, ORCH_ECANCELED);
}

static void two_clients(void) {
    orch_curl *other = orch_curl_new(NULL);
    if (!CHECK(other != NULL)) return;
    orch_future *a = orch_curl_get(client, at("/posts/4/comments"));
    orch_future *b = orch_curl_get(other, at("/posts/4/comments"));
    expect_status(a, 200);
    expect_status(b, 200);
    orch_curl_free(other);
}

// Answers with 3 MB, in steps that fill the sockets.
static orch_result send_much(void *arg) {
    int *fd = arg, peer = bare_accept(*fd, NULL), size = 3000000, sent = 0;
    close(*fd); // and with it a connection that could not be accepted
    static char block[10000];
    int head = sprintf(block, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size);
    if (peer < 0) return orch_fail(ORCH_ENOMEM);
    CHECK(write(peer, block, (size_t)head) == head);
    fcntl(peer, F_SETFL, O_NONBLOCK);
    memset(block, 'x', sizeof block);
    while (sent < size) {
        size_t rest = (size_t)(size - sent);
        ssize_t n = write(peer, block, rest < sizeof block ? rest : sizeof block);
        orch_result r = orch_ok(NULL, NULL);
        if (n > 0) sent += (int)n;
        else r = orch_await(orch_timeout(orch_ready(peer, ORCH_WRITABLE), 1000));
        int error = r.error;
        orch_result_free(&r);
        if (error != 0) break;
    }
    close(peer);
    return orch_ok_int(sent);
}

static void large_bodies_arrive_whole(void) {
    int port = 0, fd = bare_socket(true, &port);
    char url[64];
    signal(SIGPIPE, SIG_IGN);
    snprintf(url, sizeof url, "http://127.0.0.1:%d/", port);
    orch_future *sender = orch_go(send_much, &fd);
    orch_result r = orch_await(orch_curl_get(client, url));
    CHECK_INT(strspn(body_of(&r), "x"), 3000000);
    orch_result_free(&r);
    orch_drop(sender);
}

static orch_result get_and_ignore(void *arg) { return orch_await(orch_curl_get(client, arg)); }

static void main_may_end_before_its_transfers(void) {
    static char hangs[128];
    snprintf(hangs, sizeof hangs, "%s", at("/posts/2/likes"));
    CHECK_INT(orch_spawn(get_and_ignore, hangs), 0);
    orch_sleep(5);
    orch_detach(orch_curl_get(client, hangs));
    // The client goes first, then orch_run ends the task: neither may touch what the other freed.
}

static orch_result case_task(void *arg) {
    client = orch_curl_new(NULL);
    if (!CHECK(client != NULL)) return orch_ok(NULL, NULL);
    (*(void (**)(void))arg)();
    orch_curl_free(client);
    return orch_ok(NULL, NULL);
}

static void run_case(void (*fn)(void)) {
    if (!server_start(usual)) return;
    orch_result r = orch_run(case_task, &fn);
    CHECK_STR(orch_message(&r), "ok");
    orch_result_free(&r);
    server_stop();
}

#define CURL_TEST(id)                                                                              \
    TEST(curl_##id) { run_case(id); }
CURL_CASES(CURL_TEST)

static void count_status(orch_result *in, void *context) {
    if (status_of(in) == 200) ++*(int *)context;
}

TEST(curl_without_tasks) {
    if (!server_start(usual)) return;
    orch_loop *loop = orch_loop_new(NULL);
    orch_curl *c = loop != NULL ? orch_curl_new(NULL) : NULL;
    int good = 0;
    if (CHECK(c != NULL)) {
        for (int i = 0; i < 5; i++) orch_on(orch_curl_get(c, at("/user/1")), count_status, &good);
        CHECK_INT(orch_loop_run(loop), 0); // returns: nothing stays watched, no timer stays armed
        CHECK_INT(good, 5);
    }
    orch_curl_free(c);
    if (loop != NULL) CHECK_INT(orch_loop_free(loop), 0);
    server_stop();
    CHECK(orch_curl_new(NULL) == NULL); // without a loop
}
#endif

int main(int argc, char **argv) { return test_main(argc, argv); }
