// test_net.c: addresses, listening, accepting, serving, connecting, datagrams, all on the loopback
// or on Unix sockets, each under the poller of TEST_POLLER.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../asyncorch.h"
#include "pollers.h"
#include "test.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#ifdef __linux__
#define LINUX true
#else
#define LINUX false
#endif

// How many descriptors are open: each case leaves as many as there were.
static int open_count(void) {
    int count = 0;
    for (int fd = 0; fd < 256; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

// What the hooks were told.
static struct told {
    int errors, last; // of servers
    int unhandled;
} told;

static void note_error(const orch_result *r, void *context) {
    (void)context;
    told.errors++;
    told.last = r->error;
}

static void note_unhandled(const orch_result *r, void *context) {
    (void)r, (void)context;
    told.unhandled++;
}

// Where memory is refused, what it waits for may never come: a deadline ends that.
static orch_result run_within(void (*body)(void)) {
    orch_scope s;
    orch_scope_desc desc = {"test", test_shared->fail_at ? 200 : 4000, false};
    bool jumps = orch_loop_settings(orch_loop_current())->clock == ORCH_CLOCK_VIRTUAL;
    if (jumps) desc.timeout_ms = 3600000;
    if (orch_scope_open(&s, &desc) != 0) return orch_ok_int(1);
    test_start();
    body();
    orch_result r = orch_scope_close(&s);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    return orch_ok_int(1);
}

// The body runs as the main task of a loop of its own, of the poller asked for.
static void run_body(orch_task_fn main, orch_clock clock) {
    int before = open_count();
    told = (struct told){0, 0, 0};
    orch_loop_desc desc = {.poller = test_poller(), .clock = clock, .on_unhandled = note_unhandled};
    orch_result r = orch_run_with(&desc, main, NULL);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    CHECK_INT(open_count(), before);
}

#define TASK_TEST_ON(name, clock, unless)                                                          \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        return run_within(name##_body);                                                            \
    }                                                                                              \
    TEST_SKIP(name, unless) { run_body(name##_main, clock); }                                      \
    static void name##_body(void)
#define TASK_TEST(name) TASK_TEST_ON(name, ORCH_CLOCK_MONOTONIC, false)
#define VIRTUAL_TEST(name) TASK_TEST_ON(name, ORCH_CLOCK_VIRTUAL, false)

static bool no_ipv6(void) {
    static int answer = -1;
    orch_address address;
    if (answer >= 0) return answer != 0;
    int fd = socket(AF_INET6, SOCK_DGRAM, 0);
    answer = fd < 0 || orch_address_parse(&address, "::1", 0) != 0 ||
             bind(fd, (struct sockaddr *)address.storage, address.size) < 0;
    if (fd >= 0) close(fd);
    return answer != 0;
}

// Awaits: the number the future ended with, or its error.
static intptr_t join(orch_future *f) {
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

static void end(int fd) {
    if (fd >= 0) CHECK_INT(orch_close(fd), 0);
}

// ---- addresses

static const char *reprinted(const char *text) {
    static char buffer[ORCH_ADDRESS_TEXT];
    orch_address address;
    int error = orch_address_parse(&address, text, 80);
    if (error != 0) return orch_error_name(error) ? orch_error_name(error) : strerror(-error);
    return orch_address_text(&address, buffer, sizeof buffer);
}

TEST(addresses_are_numbers_or_paths) {
    CHECK_STR(reprinted("127.0.0.1"), "127.0.0.1:80");
    CHECK_STR(reprinted("10.0.0.255:65535"), "10.0.0.255:65535");
    CHECK_STR(reprinted("::1"), "[::1]:80");
    CHECK_STR(reprinted("[::1]"), "[::1]:80");
    CHECK_STR(reprinted("[2001:db8::2]:0"), "[2001:db8::2]:0");
    CHECK_STR(reprinted("fe80::1%lo"), "[fe80::1%lo]:80");
    CHECK_STR(reprinted("[fe80::1%1]:8"), "[fe80::1%lo]:8");
    CHECK_STR(reprinted("fe80::1%999"), "[fe80::1%999]:80");
    CHECK_STR(reprinted(NULL), "[::]:80");
    CHECK_STR(reprinted(""), "[::]:80");
    CHECK_STR(reprinted("*"), "[::]:80");
    CHECK_STR(reprinted("/tmp/x y"), "/tmp/x y");
    CHECK_STR(reprinted("@hidden"), "@hidden");
}

TEST(other_texts_are_no_addresses) {
    static const char *const bad[] = {"localhost",   "256.0.0.1",
                                      "1.2.3",       "1.2.3.4:",
                                      "1.2.3.4:x",   "1.2.3.4:65536",
                                      "1.2.3.4:1x",  "[::1",
                                      "[::1]x",      "[::1]:",
                                      "::g",         ":80",
                                      "[1.2.3.4]:1", "1.2.3.4:99999999999999999999",
                                      "x",           " "};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        if (!CHECK_STR(reprinted(bad[i]), "ORCH_EINVAL")) fprintf(stderr, "'%s'\n", bad[i]);
    }
    char text[400];
    memset(text, 'x', sizeof text - 1), text[sizeof text - 1] = '\0';
    CHECK_STR(reprinted(text), "ORCH_EINVAL");
    text[0] = '/';
    CHECK_STR(reprinted(text), strerror(ENAMETOOLONG));
    CHECK_STR(reprinted("fe80::1%nowhere"), strerror(ENODEV));
}

// The system counts a zero behind a path that fills its place.
TEST(the_longest_path_is_an_address) {
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    orch_address at;
    char text[ORCH_ADDRESS_TEXT];
    int length = snprintf(un.sun_path, sizeof un.sun_path, "/tmp/asyncorch.%d.", (int)getpid());
    memset(un.sun_path + length, 'x', sizeof un.sun_path - (size_t)length);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (CHECK_INT(bind(fd, (struct sockaddr *)&un, sizeof un), 0)) {
        CHECK_INT(orch_socket_address(fd, &at), 0);
        CHECK_INT(strlen(orch_address_text(&at, text, sizeof text)), sizeof un.sun_path);
        CHECK_INT(memcmp(text, un.sun_path, sizeof un.sun_path), 0);
        CHECK_INT(unlink(text), 0);
    }
    close(fd);
}

// Whatever the text is: an error, or an address whose own text means the same.
TEST(any_text_is_an_address_or_none) {
    static const char some[] = "0123456789abcdef::::....[]%%@/lox *\xff\x01";
    char text[200], once[ORCH_ADDRESS_TEXT], again[ORCH_ADDRESS_TEXT];
    orch_address at, same;
    uint32_t state = 1;
    int found = 0;
    for (int i = 0; i < 30000; i++) {
        state = state * 1664525u + 1013904223u;
        size_t size = (state >> 8) % (i % 8 == 0 ? sizeof text : 12);
        for (size_t k = 0; k < size; k++) {
            state = state * 1664525u + 1013904223u;
            text[k] = some[(state >> 16) % (sizeof some - 1)];
        }
        text[size] = '\0';
        if (orch_address_parse(&at, text, 80) != 0) continue;
        found++;
        orch_address_text(&at, once, sizeof once);
        if (!CHECK_INT(orch_address_parse(&same, once, 0), 0)) fprintf(stderr, "'%s'\n", text);
        CHECK_STR(orch_address_text(&same, again, sizeof again), once);
        CHECK(same.size == at.size && memcmp(same.storage, at.storage, at.size) == 0);
    }
    CHECK(found > 100);
}

TEST(an_address_is_cut_to_the_buffer) {
    orch_address address;
    char buffer[4];
    CHECK_INT(orch_address_parse(&address, "127.0.0.1", 7), 0);
    CHECK_INT(orch_address_port(&address), 7);
    CHECK_STR(orch_address_text(&address, buffer, sizeof buffer), "127");
    CHECK_STR(orch_address_text(&address, NULL, 9), "");
    CHECK_STR(orch_address_text(&address, buffer, 0), "");
    CHECK_STR(orch_address_text(NULL, buffer, sizeof buffer), "");
    CHECK_INT(orch_address_port(NULL), 0);
    CHECK_INT(orch_address_parse(&address, "/x", 7), 0);
    CHECK_INT(orch_address_port(&address), 0);
    memset(&address, 0, sizeof address);
    CHECK_STR(orch_address_text(&address, buffer, sizeof buffer), "");
    CHECK_INT(orch_socket_address(-1, &address), -EBADF);
    CHECK_INT(orch_socket_peer(0x7fffffff, &address), -EBADF);
}

// ---- listening, accepting, connecting

static int listener_at(const char *host, orch_address *at) {
    orch_listen_desc desc = {.host = host};
    int fd = orch_listen(&desc);
    if (!CHECK(fd >= 0)) return fd;
    CHECK_INT(orch_socket_address(fd, at), 0);
    if (host == NULL) orch_address_parse(at, "127.0.0.1", orch_address_port(at));
    return fd;
}

static int connect_to(const orch_address *address) {
    orch_connect_desc desc = {.addresses = address, .count = 1};
    return orch_connect_with(&desc);
}

// Two connected sockets, of which pair[0] was accepted.
static bool connected(const char *host, int pair[2]) {
    orch_address at;
    pair[0] = pair[1] = -1;
    int listener = listener_at(host, &at);
    if (listener < 0) return false;
    pair[1] = connect_to(&at);
    if (CHECK(pair[1] >= 0)) pair[0] = orch_accept(listener, NULL);
    end(listener);
    if (CHECK(pair[0] >= 0)) return true;
    end(pair[1]);
    return false;
}

static void check_exchange(int a, int b) {
    char data[8] = "";
    CHECK_INT(orch_write(a, "ping", 4), 4);
    CHECK_INT(orch_read_full(b, data, 4), 4);
    CHECK_STR(data, "ping");
    CHECK_INT(orch_socket_send(b, "pong", 4, 0), 4);
    CHECK_INT(orch_socket_recv(a, data, sizeof data, 0), 4);
    CHECK_STR(data, "pong");
}

static void check_host(const char *host) {
    orch_address at, from, peer;
    char one[ORCH_ADDRESS_TEXT], other[ORCH_ADDRESS_TEXT];
    int listener = listener_at(host, &at);
    int client = listener >= 0 ? connect_to(&at) : -1;
    if (CHECK(client >= 0)) {
        int fd = orch_accept(listener, &from);
        CHECK(fcntl(fd, F_GETFL) & O_NONBLOCK);
        CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
        CHECK(fcntl(client, F_GETFD) & FD_CLOEXEC);
        CHECK_INT(orch_socket_peer(fd, &peer), 0);
        CHECK_STR(orch_address_text(&from, one, sizeof one),
                  orch_address_text(&peer, other, sizeof other));
        int on = 0;
        socklen_t size = sizeof on;
        getsockopt(fd, IPPROTO_TCP, 1 /* TCP_NODELAY */, &on, &size);
        CHECK(on);
        on = 0;
        getsockopt(client, IPPROTO_TCP, 1, &on, &size);
        CHECK(on);
        check_exchange(fd, client);
        end(fd);
    }
    end(client);
    end(listener);
}

TASK_TEST(tcp_over_ipv4) {
    check_host("127.0.0.1");
    check_host("localhost");
}

TASK_TEST_ON(tcp_over_ipv6, ORCH_CLOCK_MONOTONIC, no_ipv6()) { check_host("::1"); }

TASK_TEST(all_addresses_are_both_families) {
    check_host(NULL);
    check_host("*");
}

static orch_result accept_one(void *arg) {
    int fd = orch_accept(*(int *)arg, NULL);
    return fd < 0 ? orch_fail(fd) : orch_ok_int(fd);
}

TASK_TEST(accept_waits_and_can_be_cancelled) {
    orch_address at;
    int listener = listener_at("127.0.0.1", &at);
    orch_future *f = orch_go(accept_one, &listener);
    CHECK_INT(orch_sleep(1), 0);
    int client = connect_to(&at);
    intptr_t fd = join(f);
    if (CHECK(client >= 0 && fd >= 0)) check_exchange((int)fd, client);
    end(client);
    end((int)fd);
    f = orch_go(accept_one, &listener);
    orch_cancel(f, ORCH_ECANCELED);
    CHECK_INT(join(f), ORCH_ECANCELED);
    f = orch_go(accept_one, &listener);
    CHECK_INT(orch_accept(listener, NULL), ORCH_EBUSY);
    end(listener);
    CHECK_INT(join(f), ORCH_ECANCELED);
}

// Two acceptors that one look has told. The first that comes back may do something to the other.
static struct {
    int listener[2];
    orch_future *acceptor[2];
    void (*first)(int other);
} rivals;

static orch_result accept_told(void *arg) {
    int me = (int)(intptr_t)arg, fd = orch_accept(rivals.listener[me], NULL);
    void (*first)(int other) = rivals.first;
    rivals.first = NULL;
    if (first != NULL) first(1 - me);
    return fd < 0 ? orch_fail(fd) : orch_ok_int(fd);
}

static void stop_the_other(int other) {
    if (rivals.acceptor[other] != NULL) orch_cancel(rivals.acceptor[other], ORCH_ECANCELED);
    end(rivals.listener[other]);
    rivals.listener[other] = -1;
}

TASK_TEST(what_was_accepted_ahead_is_not_lost) {
    orch_address at[2];
    int client[2];
    for (int i = 0; i < 2; i++) {
        rivals.listener[i] = listener_at("127.0.0.1", &at[i]);
        if (rivals.listener[i] < 0) return;
        rivals.acceptor[i] = orch_go(accept_told, (void *)(intptr_t)i);
    }
    for (int i = 0; i < 2; i++) {
        client[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        CHECK_INT(connect(client[i], (struct sockaddr *)at[i].storage, at[i].size), 0);
    }
    rivals.first = stop_the_other;
    for (int i = 0; i < 2; i++) {
        orch_future *acceptor = rivals.acceptor[i];
        rivals.acceptor[i] = NULL;
        intptr_t fd = join(acceptor);
        if (CHECK(fd >= 0)) check_exchange((int)fd, client[i]);
        end((int)fd);
        end(client[i]);
        if (rivals.listener[i] >= 0) end(rivals.listener[i]);
    }
}

TASK_TEST(what_is_no_listener_cannot_accept) {
    int fd[2];
    if (!CHECK_INT(orch_socketpair(fd), 0)) return;
    CHECK_INT(orch_accept(fd[0], NULL), -EINVAL);
    CHECK_INT(orch_accept(-1, NULL), -EBADF);
    end(fd[0]);
    end(fd[1]);
    CHECK_INT(orch_accept(fd[1], NULL), -EBADF);
    if (!CHECK_INT(orch_pipe(fd), 0)) return;
    CHECK_INT(orch_accept(fd[0], NULL), -ENOTSOCK);
    CHECK_INT(orch_socket_recv(fd[0], fd, 4, 0), -ENOTSOCK);
    CHECK_INT(orch_socket_send(fd[1], fd, 4, 0), -ENOTSOCK);
    end(fd[0]);
    end(fd[1]);
}

TASK_TEST(listening_can_fail) {
    orch_address at;
    int listener = listener_at("127.0.0.1", &at);
    orch_listen_desc same = {.host = "127.0.0.1", .port = orch_address_port(&at)};
    CHECK_INT(orch_listen(&same), -EADDRINUSE);
    same.host = "example.org";
    CHECK_INT(orch_listen(&same), ORCH_EINVAL);
    same.host = "/tmp/x";
    CHECK_INT(orch_listen(&same), ORCH_EINVAL);
    same.host = "192.0.2.1"; // not of this machine
    CHECK_INT(orch_listen(&same), -EADDRNOTAVAIL);
    end(listener);
}

TASK_TEST(two_can_share_a_port) {
    orch_address at;
    orch_listen_desc desc = {.host = "127.0.0.1", .reuse_port = true, .backlog = 1};
    int a = orch_listen(&desc);
    if (!CHECK(a >= 0)) return;
    CHECK_INT(orch_socket_address(a, &at), 0);
    desc.port = orch_address_port(&at);
    int b = orch_listen(&desc);
    CHECK(b >= 0);
    end(a);
    end(b);
}

TASK_TEST(a_port_can_be_used_again_at_once) {
    orch_address at;
    int listener = listener_at("127.0.0.1", &at), client = connect_to(&at);
    int fd = client >= 0 ? orch_accept(listener, NULL) : -1;
    end(fd); // closes first, and is in TIME_WAIT
    end(client);
    end(listener);
    orch_listen_desc desc = {.host = "127.0.0.1", .port = orch_address_port(&at)};
    listener = orch_listen(&desc);
    CHECK(listener >= 0);
    end(listener);
}

TASK_TEST(nobody_listens) {
    orch_address at;
    char message[200], want[200];
    int listener = listener_at("127.0.0.1", &at);
    end(listener);
    orch_connect_desc desc = {
        .addresses = &at, .count = 1, .message = message, .message_size = sizeof message};
    CHECK_INT(orch_connect_with(&desc), -ECONNREFUSED);
    snprintf(want, sizeof want, "127.0.0.1:%u: Connection refused", orch_address_port(&at));
    CHECK_STR(message, want);
    desc.message_size = 5;
    CHECK_INT(orch_connect_with(&desc), -ECONNREFUSED);
    CHECK_STR(message, "127.");
}

TASK_TEST(connecting_by_name) {
    orch_address at;
    char port[8];
    int listener = listener_at("127.0.0.1", &at);
    snprintf(port, sizeof port, "%u", orch_address_port(&at));
    int client = orch_connect("127.0.0.1", port);
    CHECK(client >= 0);
    end(client);
    client = orch_connect("localhost", port); // may be ::1 first, which refuses
    CHECK(client >= 0);
    end(client);
    orch_connect_desc desc = {.host = "127.0.0.1", .service = port};
    client = orch_connect_with(&desc);
    CHECK(client >= 0);
    end(client);
    end(listener);
}

TASK_TEST(a_name_that_is_none) {
    char message[200] = "";
    orch_connect_desc desc = {.host = "256.256.256.256.invalid",
                              .service = "no such service",
                              .message = message,
                              .message_size = sizeof message};
    CHECK(orch_connect_with(&desc) < 0);
    CHECK(message[0] != '\0');
}

// ---- Unix sockets

static char unix_path[100];

static const char *new_path(void) {
    snprintf(unix_path, sizeof unix_path, "/tmp/test_net.%d", (int)getpid());
    unlink(unix_path);
    return unix_path;
}

static void check_unix(const char *path) {
    orch_listen_desc desc = {.path = path};
    orch_connect_desc to = {.path = path};
    char text[ORCH_ADDRESS_TEXT];
    orch_address at;
    int listener = orch_listen(&desc), client = -1, fd = -1;
    if (CHECK(listener >= 0)) client = orch_connect_with(&to);
    if (CHECK(client >= 0)) fd = orch_accept(listener, &at);
    if (CHECK(fd >= 0)) {
        check_exchange(fd, client);
        CHECK_STR(orch_address_text(&at, text, sizeof text), ""); // the client has no name
        CHECK_INT(orch_socket_address(listener, &at), 0);
        CHECK_STR(orch_address_text(&at, text, sizeof text), path);
    }
    CHECK_INT(orch_listen(&desc), -EADDRINUSE);
    end(client);
    end(fd);
    end(listener);
}

TASK_TEST(unix_sockets) {
    check_unix(new_path());
    check_unix(unix_path); // the file that was left is replaced
    struct stat about;
    CHECK_INT(lstat(unix_path, &about), 0);
    CHECK_INT(unlink(unix_path), 0);
    orch_connect_desc to = {.path = unix_path};
    CHECK_INT(orch_connect_with(&to), -ENOENT);
}

TASK_TEST_ON(unix_sockets_without_a_file, ORCH_CLOCK_MONOTONIC, !LINUX) {
    char name[40];
    snprintf(name, sizeof name, "@test_net.%d", (int)getpid());
    check_unix(name);
}

TASK_TEST(another_file_is_not_replaced) {
    int fd = open(new_path(), O_CREAT | O_WRONLY | O_EXCL, 0600);
    orch_listen_desc desc = {.path = unix_path};
    if (!CHECK(fd >= 0)) return;
    CHECK_INT(orch_listen(&desc), -EADDRINUSE);
    CHECK_INT(access(unix_path, F_OK), 0);
    unlink(unix_path);
    end(fd);
    desc.path = "";
    CHECK_INT(orch_listen(&desc), ORCH_EINVAL);
    desc.path = "/nowhere/at/all";
    CHECK_INT(orch_listen(&desc), -ENOENT);
    orch_connect_desc to = {.path = ""};
    CHECK_INT(orch_connect_with(&to), ORCH_EINVAL);
}

static orch_result accept_late(void *arg) {
    orch_sleep(3);
    for (int i = 0; i < 3; i++) {
        int fd = orch_accept(*(int *)arg, NULL);
        if (fd < 0) return orch_fail(fd);
        end(fd);
    }
    return orch_ok_int(0);
}

TASK_TEST(a_full_backlog_is_waited_for) {
    orch_listen_desc desc = {.path = new_path(), .backlog = 1};
    orch_connect_desc to = {.path = unix_path};
    int listener = orch_listen(&desc), clients[3];
    orch_future *f = orch_go(accept_late, &listener);
    for (int i = 0; i < 3; i++) CHECK((clients[i] = orch_connect_with(&to)) >= 0);
    CHECK_INT(join(f), 0);
    for (int i = 0; i < 3; i++) end(clients[i]);
    end(listener);
    unlink(unix_path);
}

// ---- how connections end

static void reset(int fd) {
    struct linger now = {1, 0};
    CHECK_INT(setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now), 0);
    end(fd);
}

// What an address before it ended with does not hide that the call was cancelled.
TASK_TEST(waiting_for_a_backlog_is_cancelled) {
    orch_address at[3];
    int fd[8];
    orch_scope s;
    if (!LINUX) return;
    int listener = orch_listen(&(orch_listen_desc){.path = "@asyncorch_full", .backlog = 1});
    if (!CHECK(listener >= 0)) return;
    CHECK_INT(orch_address_parse(&at[0], "@asyncorch_nobody", 0), 0);
    CHECK_INT(orch_address_parse(&at[1], "@asyncorch_full", 0), 0);
    at[2] = at[1];
    for (int i = 0; i < 8; i++) {
        fd[i] = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
        connect(fd[i], (struct sockaddr *)at[1].storage, at[1].size);
    }
    if (orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 10}) == 0) {
        CHECK_INT(orch_connect_with(&(orch_connect_desc){.addresses = at, .count = 3}),
                  ORCH_ECANCELED);
        orch_result r = orch_scope_close(&s);
        CHECK_INT(r.error, ORCH_ETIMEDOUT);
        orch_result_free(&r);
    }
    for (int i = 0; i < 8; i++) close(fd[i]);
    end(listener);
}

TASK_TEST(half_a_close_leaves_the_other_half) {
    int fd[2];
    char data[8];
    if (!connected("127.0.0.1", fd)) return;
    CHECK_INT(orch_write(fd[0], "last", 4), 4);
    CHECK_INT(shutdown(fd[0], SHUT_WR), 0);
    CHECK_INT(orch_read(fd[1], data, sizeof data), 4);
    CHECK_INT(orch_read(fd[1], data, sizeof data), 0);
    CHECK_INT(orch_write(fd[1], "answer", 6), 6);
    CHECK_INT(orch_read(fd[0], data, sizeof data), 6);
    CHECK_INT(orch_write(fd[0], "x", 1), -EPIPE);
    end(fd[1]);
    CHECK_INT(orch_read(fd[0], data, sizeof data), 0);
    end(fd[0]);
}

static orch_result receive(void *arg) {
    char data[8];
    ptrdiff_t n = orch_read(*(int *)arg, data, sizeof data);
    return n < 0 ? orch_fail((int)n) : orch_ok_int(n);
}

TASK_TEST(a_reset_ends_both_directions_once) {
    int fd[2];
    char *much = calloc(1, 1 << 23);
    if (!CHECK(much != NULL)) return;
    if (connected("127.0.0.1", fd)) {
        orch_future *reader = orch_go(receive, &fd[0]);
        CHECK_INT(orch_sleep(1), 0);
        reset(fd[1]);
        intptr_t n = join(reader);
        CHECK_INT(n, -ECONNRESET);
        CHECK_INT(orch_write(fd[0], much, 1), -EPIPE); // the error was taken
        CHECK_INT(orch_read(fd[0], much, 1), 0);
        end(fd[0]);
    }
    if (connected("127.0.0.1", fd)) {
        orch_future *f = orch_go(accept_late, &fd[0]); // something that waits elsewhere
        orch_drop(f);
        reset(fd[1]);
        ptrdiff_t n = orch_write(fd[0], much, 1 << 23);
        CHECK(n == -ECONNRESET || n == -EPIPE);
        end(fd[0]);
    }
    free(much);
}

TASK_TEST(urgent_data_comes_once) {
    int fd[2];
    char data[16] = "";
    if (!connected("127.0.0.1", fd)) return;
    CHECK_INT(orch_write(fd[0], "ab", 2), 2);
    CHECK_INT(orch_socket_send(fd[0], "!", 1, MSG_OOB), 1);
    CHECK_INT(orch_write(fd[0], "cd", 2), 2);
    CHECK_INT(orch_read(fd[1], data, sizeof data), 2); // up to the mark
    CHECK_INT(orch_socket_recv(fd[1], data + 4, 8, MSG_OOB), 1);
    CHECK_INT(data[4], '!');
    CHECK_INT(orch_read(fd[1], data + 2, 2), 2);
    CHECK_INT(memcmp(data, "abcd!", 5), 0);
    CHECK_INT(orch_socket_recv(fd[1], data, 8, MSG_OOB), -EINVAL);
    orch_future *f = orch_go(receive, &fd[1]); // and nobody is woken by it again
    CHECK_INT(orch_sleep(1), 0);
    CHECK(!orch_is_settled(f));
    CHECK_INT(orch_write(fd[0], "e", 1), 1);
    CHECK_INT(join(f), 1);
    end(fd[0]);
    end(fd[1]);
}

// It makes nothing readable, so that a read that took all there was must not make it wait.
TASK_TEST(urgent_data_alone_is_received) {
    int fd[2];
    char data[16];
    if (!connected("127.0.0.1", fd)) return;
    CHECK_INT(orch_write(fd[0], "ab", 2), 2);
    CHECK_INT(orch_read(fd[1], data, sizeof data), 2);
    CHECK_INT(orch_socket_send(fd[0], "!", 1, MSG_OOB), 1);
    CHECK_INT(orch_sleep(2), 0);
    CHECK_INT(orch_socket_recv(fd[1], data, 1, MSG_OOB), 1);
    CHECK_INT(data[0], '!');
    CHECK_INT(orch_socket_recv(-1, data, 1, MSG_OOB), -EBADF);
    end(fd[0]);
    end(fd[1]);
}

TASK_TEST(a_peek_takes_nothing) {
    int fd[2];
    char data[8] = "";
    if (!connected("127.0.0.1", fd)) return;
    CHECK_INT(orch_write(fd[0], "abc", 3), 3);
    CHECK_INT(orch_socket_recv(fd[1], data, 8, MSG_PEEK), 3);
    CHECK_INT(orch_socket_recv(fd[1], data, 8, 0), 3);
    CHECK_STR(data, "abc");
    end(fd[0]);
    end(fd[1]);
}

// ---- out of descriptors

// Leaves `free_ones` descriptors. Returns the limit that was.
static struct rlimit leave(int free_ones) {
    struct rlimit all, few;
    int taken[64], count = 0;
    getrlimit(RLIMIT_NOFILE, &all);
    few = all;
    for (; count < free_ones; count++) taken[count] = dup(0);
    int next = dup(0);
    few.rlim_cur = (rlim_t)next;
    close(next);
    while (count > 0) close(taken[--count]);
    setrlimit(RLIMIT_NOFILE, &few);
    return all;
}

TASK_TEST(without_descriptors_accept_fails_and_the_client_waits) {
    orch_address at;
    char data[4];
    int listener = listener_at("127.0.0.1", &at), client = connect_to(&at);
    if (client < 0) {
        end(listener);
        return;
    }
    struct rlimit all = leave(0);
    CHECK_INT(orch_accept(listener, NULL), -EMFILE);
    CHECK_INT(orch_accept(listener, NULL), -EMFILE);
    setrlimit(RLIMIT_NOFILE, &all);
    int fd = orch_accept(listener, NULL);
    if (CHECK(fd >= 0)) {
        CHECK_INT(orch_write(fd, "hi", 2), 2);
        CHECK_INT(orch_read(client, data, sizeof data), 2);
    }
    end(fd);
    end(client);
    end(listener);
}

TASK_TEST(without_descriptors_nothing_is_made) {
    orch_address at;
    int listener = listener_at("127.0.0.1", &at);
    orch_listen_desc desc = {.host = "127.0.0.1"};
    struct rlimit all = leave(0);
    CHECK_INT(connect_to(&at), -EMFILE);
    CHECK_INT(orch_listen(&desc), -EMFILE);
    CHECK_INT(orch_udp(NULL), -EMFILE);
    setrlimit(RLIMIT_NOFILE, &all);
    end(listener);
}

// ---- serving

static orch_result echo(int fd, void *context) {
    char data[256];
    ptrdiff_t n;
    if (context != NULL) ++*(int *)context;
    while ((n = orch_read(fd, data, sizeof data)) > 0) {
        if ((n = orch_write(fd, data, (size_t)n)) < 0) break;
    }
    if (context != NULL) --*(int *)context;
    return n < 0 ? orch_fail((int)n) : orch_ok(NULL, NULL);
}

typedef struct served {
    int listener;
    orch_result (*handler)(int fd, void *context);
    const orch_serve_desc *desc;
} served;

static orch_result do_serve(void *arg) {
    const served *s = arg;
    return orch_fail(orch_serve(s->listener, s->handler, s->desc));
}

static orch_result ask_echo(void *arg) {
    char data[16] = "";
    int fd = connect_to(arg);
    if (fd < 0) return orch_fail(fd);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(orch_write(fd, "question", 8), 8);
        CHECK_INT(orch_read_full(fd, data, 8), 8);
        CHECK_STR(data, "question");
    }
    end(fd);
    return orch_ok_int(1);
}

static int ask_many(orch_address *at, int count) {
    orch_future *asking[64];
    int sum = 0;
    for (int i = 0; i < count; i++) asking[i] = orch_go(ask_echo, at);
    for (int i = 0; i < count; i++) sum += (int)join(asking[i]);
    return sum;
}

static intptr_t stop(orch_future *server) {
    orch_cancel(server, ORCH_ECANCELED);
    return join(server);
}

TASK_TEST(a_server_serves_many_at_once) {
    orch_address at;
    int live = 0;
    orch_serve_desc desc = {.context = &live, .on_error = note_error};
    served s = {listener_at("127.0.0.1", &at), echo, &desc};
    orch_future *server = orch_go(do_serve, &s);
    CHECK_INT(ask_many(&at, 50), 50);
    CHECK_INT(stop(server), ORCH_ECANCELED);
    CHECK_INT(live, 0);
    CHECK_INT(told.errors + told.unhandled, 0);
    CHECK_INT(connect_to(&at), -ECONNREFUSED); // listens no more
}

static int most_live;

static orch_result count_live(int fd, void *context) {
    int *live = context;
    ++*live;
    if (*live > most_live) most_live = *live;
    orch_result r = echo(fd, NULL);
    --*live;
    return r;
}

TASK_TEST(a_server_is_bounded) {
    orch_address at;
    int live = most_live = 0;
    orch_serve_desc desc = {.context = &live, .max_connections = 3, .on_error = note_error};
    served s = {listener_at("127.0.0.1", &at), count_live, &desc};
    orch_future *server = orch_go(do_serve, &s);
    CHECK_INT(ask_many(&at, 20), 20); // more wait, and nobody is lost
    CHECK_INT(most_live, 3);
    CHECK_INT(stop(server), ORCH_ECANCELED);
}

static orch_result fail_one(int fd, void *context) {
    int *count = context;
    if (++*count % 2 == 0) return echo(fd, NULL);
    return orch_failf(42, "number %d", *count);
}

TASK_TEST(a_failure_ends_one_connection) {
    orch_address at;
    int count = 0;
    orch_serve_desc desc = {.context = &count, .on_error = note_error};
    served s = {listener_at("127.0.0.1", &at), fail_one, &desc};
    orch_future *server = orch_go(do_serve, &s);
    for (int i = 0; i < 6; i++) {
        int fd = connect_to(&at);
        char data[4];
        if (!CHECK(fd >= 0)) break;
        CHECK_INT(shutdown(fd, SHUT_WR), 0);
        CHECK_INT(orch_read(fd, data, sizeof data), 0);
        end(fd);
    }
    CHECK_INT(told.errors, 3);
    CHECK_INT(told.last, 42);
    CHECK_INT(stop(server), ORCH_ECANCELED);
}

static orch_result fail_later(void *arg) {
    int error = orch_sleep(1);
    return error != 0 ? orch_fail(error) : orch_fail(*(int *)arg);
}

static orch_result chain_one(int fd, void *context) {
    (void)fd;
    return orch_chain(orch_go(fail_later, context));
}

TASK_TEST(what_a_handler_chains_is_its_outcome) {
    orch_address at;
    int error = 43;
    char data[4];
    orch_serve_desc desc = {.context = &error, .on_error = note_error};
    served s = {listener_at("127.0.0.1", &at), chain_one, &desc};
    orch_future *server = orch_go(do_serve, &s);
    int fd = connect_to(&at);
    if (CHECK(fd >= 0)) CHECK_INT(orch_read(fd, data, sizeof data), 0);
    end(fd);
    CHECK_INT(told.errors, 1);
    CHECK_INT(told.last, 43);
    CHECK_INT(stop(server), ORCH_ECANCELED);
}

TASK_TEST(failures_that_nobody_asked_for_are_unhandled) {
    orch_address at;
    int count = 0;
    orch_serve_desc desc = {.context = &count};
    served s = {listener_at("127.0.0.1", &at), fail_one, &desc};
    orch_future *server = orch_go(do_serve, &s);
    int fd = connect_to(&at);
    char data[4];
    if (CHECK(fd >= 0)) CHECK_INT(orch_read(fd, data, sizeof data), 0);
    end(fd);
    CHECK_INT(told.unhandled, 1);
    CHECK_INT(stop(server), ORCH_ECANCELED);
}

static orch_result answer_late(int fd, void *context) {
    char data[4];
    ptrdiff_t n = orch_read(fd, data, sizeof data);
    int error = n < 0 ? (int)n : orch_sleep(*(uint64_t *)context);
    if (error == 0) error = orch_write(fd, "late", 4) == 4 ? 0 : 7;
    return error != 0 ? orch_fail(error) : orch_ok(NULL, NULL);
}

// Serves one slow connection, cancels the server, and says how long that took and what it wrote.
static uint64_t stop_slow(const orch_serve_desc *desc, ptrdiff_t *got) {
    char data[8];
    orch_address at;
    served s = {listener_at("127.0.0.1", &at), answer_late, desc};
    orch_future *server = orch_go(do_serve, &s);
    int fd = connect_to(&at);
    *got = -1;
    if (!CHECK(fd >= 0)) return 0;
    CHECK_INT(orch_write(fd, "now", 3), 3);
    CHECK_INT(orch_sleep(1), 0); // it has begun
    uint64_t start = orch_now();
    CHECK_INT(stop(server), ORCH_ECANCELED);
    uint64_t took = orch_now() - start;
    *got = orch_read(fd, data, sizeof data);
    end(fd);
    return took;
}

VIRTUAL_TEST(connections_have_time_to_end) {
    uint64_t late = 1000;
    ptrdiff_t got;
    orch_serve_desc desc = {.context = &late, .on_error = note_error};
    uint64_t took = stop_slow(&desc, &got);
    CHECK(took >= 999 && took <= 1001);
    CHECK_INT(got, 4);
    late = 100000;
    took = stop_slow(&desc, &got);
    CHECK(took >= 5000 && took <= 5001);
    CHECK_INT(got, 0);
    desc.drain_ms = 20;
    took = stop_slow(&desc, &got);
    CHECK(took >= 20 && took <= 21);
    CHECK_INT(got, 0);
    desc.no_drain = true;
    CHECK_INT(stop_slow(&desc, &got), 0);
    CHECK_INT(got, 0);
    CHECK_INT(told.errors, 0); // what was cancelled has not failed
}

TASK_TEST(a_server_out_of_descriptors_waits_for_its_own) {
    orch_address at;
    char data[8];
    int live = 0, fd[5];
    orch_serve_desc desc = {.context = &live, .on_error = note_error};
    served s = {listener_at("127.0.0.1", &at), echo, &desc};
    for (int i = 0; i < 5; i++) CHECK((fd[i] = connect_to(&at)) >= 0);
    struct rlimit all = leave(3);
    orch_future *server = orch_go(do_serve, &s);
    CHECK_INT(orch_sleep(5), 0);
    CHECK_INT(live, 3);
    CHECK_INT(told.errors, 1); // told once
    CHECK_INT(told.last, -EMFILE);
    uint64_t polls = orch_loop_statistics(orch_loop_current()).polls;
    CHECK_INT(orch_sleep(20), 0);
    CHECK(orch_loop_statistics(orch_loop_current()).polls - polls < 10); // does not spin
    for (int i = 0; i < 5; i++) { // each that ends makes room for one that waits
        CHECK_INT(orch_write(fd[i], "hello", 5), 5);
        CHECK_INT(orch_read_full(fd[i], data, 5), 5);
        end(fd[i]);
    }
    setrlimit(RLIMIT_NOFILE, &all);
    CHECK_INT(stop(server), ORCH_ECANCELED);
    CHECK_INT(live, 0);
}

TASK_TEST(a_server_out_of_descriptors_tries_again) {
    orch_address at;
    served s = {listener_at("127.0.0.1", &at), echo, NULL};
    int fd = connect_to(&at);
    struct rlimit all = leave(0); // others have them, and no connection will end
    orch_future *server = orch_go(do_serve, &s);
    CHECK_INT(orch_sleep(2), 0);
    CHECK_INT(told.unhandled, 1);
    setrlimit(RLIMIT_NOFILE, &all);
    if (CHECK(fd >= 0)) {
        CHECK_INT(orch_write(fd, "x", 1), 1);
        char data[2];
        CHECK_INT(orch_read(fd, data, 2), 1);
    }
    end(fd);
    CHECK_INT(stop(server), ORCH_ECANCELED);
}

TASK_TEST(a_server_whose_listener_is_gone) {
    orch_address at;
    served s = {listener_at("127.0.0.1", &at), echo, NULL};
    orch_future *server = orch_go(do_serve, &s);
    int fd = connect_to(&at), listener = s.listener;
    CHECK_INT(orch_sleep(1), 0);
    end(listener);
    int other[2];
    if (CHECK_INT(orch_socketpair(other), 0)) CHECK_INT(other[0], listener);
    end(fd);
    CHECK_INT(join(server), ORCH_ECANCELED);
    check_exchange(other[0], other[1]); // the number's next owner was left alone
    end(other[0]);
    end(other[1]);
    CHECK_INT(orch_serve(-1, echo, NULL), -EBADF);
    CHECK_INT(orch_serve(listener, echo, NULL), -EBADF);
    served shut = {listener_at("127.0.0.1", &at), echo, NULL};
    server = orch_go(do_serve, &shut);
    CHECK_INT(shutdown(shut.listener, SHUT_RD), 0);
    CHECK_INT(join(server), -EINVAL);
}

// At its bound nobody waits for the listener: its number may change hands unseen.
TASK_TEST(a_server_does_not_accept_from_the_next_owner_of_its_number) {
    int next;
    orch_address at;
    orch_serve_desc one = {.max_connections = 1, .on_error = note_error};
    served s = {listener_at("127.0.0.1", &at), echo, &one};
    int listener = s.listener;
    orch_future *server = orch_go(do_serve, &s);
    int fd = connect_to(&at);
    if (fd >= 0) check_exchange(fd, fd);
    end(listener);
    next = listener_at("127.0.0.1", &at);
    CHECK_INT(next, listener);
    int other = connect_to(&at);
    end(fd);
    CHECK_INT(join(server), ORCH_ECANCELED);
    int mine = orch_accept(next, NULL);
    if (other >= 0 && CHECK(mine >= 0)) check_exchange(other, mine);
    end(mine);
    end(other);
    end(next);
}

// Each client brings the next one, so that accepting never has to wait.
static struct flood {
    orch_address at;
    int count, last;
} flood;

static orch_result bring_another(int fd, void *context) {
    (void)fd, (void)context;
    if (flood.count >= 5000) return orch_ok(NULL, NULL);
    int next = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
    CHECK_INT(connect(next, (struct sockaddr *)flood.at.storage, flood.at.size), 0);
    if (flood.last >= 0) close(flood.last);
    flood.last = next;
    flood.count++;
    return orch_ok(NULL, NULL);
}

TASK_TEST_ON(a_server_that_is_flooded_can_be_cancelled, ORCH_CLOCK_MONOTONIC, !LINUX) {
    served s = {orch_listen(&(orch_listen_desc){.path = "@asyncorch_flood"}), bring_another, NULL};
    if (!CHECK(s.listener >= 0)) return;
    CHECK_INT(orch_socket_address(s.listener, &flood.at), 0);
    flood.last = -1;
    orch_future *server = orch_go(do_serve, &s);
    int first = orch_connect_with(&(orch_connect_desc){.path = "@asyncorch_flood"});
    for (int i = 0; i < 3; i++) CHECK_INT(orch_yield(), 0);
    int count = flood.count;
    CHECK_INT(stop(server), ORCH_ECANCELED);
    CHECK(count > 0 && flood.count < count + 500);
    end(first);
    if (flood.last >= 0) close(flood.last);
}

TASK_TEST(the_end_of_the_loop_ends_servers) {
    static orch_address at;
    static served s;
    s = (served){listener_at("127.0.0.1", &at), echo, NULL};
    orch_detach(orch_go(do_serve, &s));
    int fd = connect_to(&at);
    CHECK(fd >= 0);
    end(fd);
}

// ---- happy eyeballs, on attempts that end as they are told

typedef struct attempt {
    uint64_t at; // ms since the start, when it begins
    int own, other;
    bool begun;
} attempt;

static struct race {
    attempt attempts[8];
    int error[8]; // not 0: fails at once
    int count;
    uint64_t start;
} dialed;

// A full socket is one that is being connected; emptied it is connected.
static int begin_attempt(const orch_address *to, void *context) {
    (void)context;
    char block[4096] = "";
    int fd[2], i = orch_address_port(to);
    attempt *a = &dialed.attempts[i];
    a->at = orch_now() - dialed.start;
    a->begun = true;
    dialed.count++;
    if (dialed.error[i] != 0) return dialed.error[i];
    int error = orch_socketpair(fd);
    if (error != 0) return error;
    while (send(fd[0], block, sizeof block, MSG_DONTWAIT) > 0) continue;
    while (send(fd[0], block, 1, MSG_DONTWAIT) > 0) continue;
    a->own = fd[0];
    a->other = fd[1];
    return fd[0];
}

// Lets attempt i win.
static void connect_attempt(int i) {
    static char block[65536];
    while (recv(dialed.attempts[i].other, block, sizeof block, MSG_DONTWAIT) > 0) continue;
}

// The port of each says which one it is.
static orch_address list[8];

static orch_connect_desc dial(const char *const *texts, uint16_t count) {
    memset(&dialed, 0, sizeof dialed);
    dialed.start = orch_now();
    for (uint16_t i = 0; i < count; i++) CHECK_INT(orch_address_parse(&list[i], texts[i], i), 0);
    return (orch_connect_desc){.addresses = list, .count = count, .begin = begin_attempt};
}

static void end_attempts(void) {
    for (int i = 0; i < 8; i++) {
        if (dialed.attempts[i].other > 0) end(dialed.attempts[i].other);
    }
}

static orch_result do_connect(void *arg) {
    int fd = orch_connect_with(arg);
    return fd < 0 ? orch_fail(fd) : orch_ok_int(fd);
}

VIRTUAL_TEST(the_next_address_starts_after_a_delay) {
    static const char *const texts[] = {"2001:db8::1", "2001:db8::2", "2001:db8::3", "192.0.2.4",
                                        "192.0.2.5"};
    orch_connect_desc desc = dial(texts, 5);
    orch_future *f = orch_go(do_connect, &desc);
    CHECK_INT(orch_sleep(1100), 0);
    CHECK_INT(dialed.count, 5);
    CHECK_INT(dialed.attempts[0].at, 0); // families take turns
    CHECK_INT(dialed.attempts[3].at, 250);
    CHECK_INT(dialed.attempts[1].at, 500);
    CHECK_INT(dialed.attempts[4].at, 750);
    CHECK_INT(dialed.attempts[2].at, 1000);
    connect_attempt(1);
    int fd = (int)join(f);
    CHECK_INT(fd, dialed.attempts[1].own);
    for (int i = 0; i < 5; i++) { // the others were closed
        if (i != 1) CHECK_INT(fcntl(dialed.attempts[i].own, F_GETFD), -1);
    }
    end(fd);
    end_attempts();
}

VIRTUAL_TEST(the_next_address_starts_when_one_fails) {
    static const char *const texts[] = {"192.0.2.1", "192.0.2.2", "2001:db8::1"};
    char message[200];
    orch_connect_desc desc = dial(texts, 3);
    desc.message = message;
    desc.message_size = sizeof message;
    dialed.error[0] = -ENETUNREACH;
    dialed.error[2] = -ECONNREFUSED;
    orch_future *f = orch_go(do_connect, &desc);
    CHECK_INT(dialed.count, 3);
    CHECK_INT(dialed.attempts[1].at, 0);
    CHECK(dialed.attempts[1].begun);
    connect_attempt(1);
    int fd = (int)join(f);
    CHECK_INT(fd, dialed.attempts[1].own);
    end(fd);
    end_attempts();
    desc = dial(texts, 3);
    desc.message = message;
    desc.message_size = sizeof message;
    dialed.error[0] = -ENETUNREACH;
    dialed.error[1] = -EHOSTUNREACH;
    dialed.error[2] = -ECONNREFUSED;
    CHECK_INT(orch_connect_with(&desc), -ENETUNREACH); // the first
    CHECK_STR(message, "192.0.2.1:0: Network is unreachable; [2001:db8::1]:2: Connection refused; "
                       "192.0.2.2:1: No route to host");
    end_attempts();
}

// Also while an earlier one is under way, which nothing waits for then.
VIRTUAL_TEST(the_next_address_starts_when_one_fails_beside_another) {
    static const char *const texts[] = {"192.0.2.1", "192.0.2.2", "192.0.2.3"};
    orch_connect_desc desc = dial(texts, 3);
    dialed.error[1] = -ENETUNREACH;
    orch_future *f = orch_go(do_connect, &desc);
    CHECK_INT(orch_sleep(300), 0);
    CHECK_INT(dialed.count, 3);
    CHECK_INT(dialed.attempts[2].at, 250);
    connect_attempt(2);
    end((int)join(f));
    end_attempts();
}

VIRTUAL_TEST(an_attempt_that_fails_late_starts_the_next) {
    static const char *const texts[] = {"192.0.2.1", "192.0.2.2", "192.0.2.3"};
    orch_address refused;
    end(listener_at("127.0.0.1", &refused));
    orch_connect_desc desc = dial(texts, 3);
    list[0] = refused; // a real one, among those that hang
    desc.begin = NULL;
    desc.count = 1;
    CHECK_INT(orch_connect_with(&desc), -ECONNREFUSED);
    desc.begin = begin_attempt;
    desc.count = 3;
    desc.delay_ms = 10;
    orch_address_parse(&list[0], "192.0.2.1", 0);
    orch_future *f = orch_go(do_connect, &desc);
    CHECK_INT(orch_sleep(5), 0);
    CHECK_INT(dialed.count, 1);
    CHECK_INT(orch_sleep(10), 0);
    CHECK_INT(dialed.count, 2);
    CHECK_INT(dialed.attempts[1].at, 10);
    CHECK_INT(orch_close(dialed.attempts[0].own), 0); // its wait is rejected
    CHECK_INT(join(f), ORCH_ECANCELED);
    end_attempts();
}

VIRTUAL_TEST(connecting_can_be_cancelled_at_any_moment) {
    static const char *const texts[] = {"192.0.2.1", "2001:db8::1", "192.0.2.2"};
    for (uint64_t ms = 0; ms <= 600; ms += 50) {
        int before = open_count();
        orch_connect_desc desc = dial(texts, 3);
        orch_future *f = orch_go(do_connect, &desc);
        CHECK_INT(orch_sleep(ms), 0);
        orch_cancel(f, ORCH_ECANCELED);
        CHECK_INT(join(f), ORCH_ECANCELED);
        end_attempts();
        CHECK_INT(open_count(), before);
    }
}

VIRTUAL_TEST(a_deadline_ends_connecting) {
    static const char *const texts[] = {"192.0.2.1", "2001:db8::1"};
    orch_connect_desc desc = dial(texts, 2);
    CHECK_INT(join(orch_timeout(orch_go(do_connect, &desc), 400)), ORCH_ETIMEDOUT);
    CHECK_INT(dialed.count, 2);
    end_attempts();
}

VIRTUAL_TEST(of_two_that_win_one_is_kept) {
    static const char *const texts[] = {"192.0.2.1", "2001:db8::1"};
    orch_connect_desc desc = dial(texts, 2);
    orch_future *f = orch_go(do_connect, &desc);
    CHECK_INT(orch_sleep(300), 0);
    connect_attempt(0);
    connect_attempt(1);
    int fd = (int)join(f);
    bool first = fd == dialed.attempts[0].own;
    CHECK(first || fd == dialed.attempts[1].own);
    CHECK_INT(fcntl(dialed.attempts[first ? 1 : 0].own, F_GETFD), -1);
    end(fd);
    end_attempts();
}

// ---- datagrams

TASK_TEST(datagrams_keep_their_borders) {
    orch_address at, from, own;
    char data[8] = "", one[ORCH_ADDRESS_TEXT], other[ORCH_ADDRESS_TEXT];
    orch_udp_desc desc = {.host = "127.0.0.1"};
    int a = orch_udp(&desc), b = orch_udp(&desc);
    if (!CHECK(a >= 0 && b >= 0)) {
        end(a), end(b);
        return;
    }
    CHECK_INT(orch_socket_address(a, &at) | orch_socket_address(b, &own), 0);
    CHECK_INT(orch_socket_sendto(b, "one", 3, &at), 3);
    CHECK_INT(orch_socket_sendto(b, "", 0, &at), 0);
    CHECK_INT(orch_socket_sendto(b, "too long for it", 15, &at), 15);
    CHECK_INT(orch_socket_sendto(b, "four", 4, &at), 4);
    CHECK_INT(orch_socket_recvfrom(a, data, sizeof data, &from), 3);
    CHECK_STR(data, "one");
    CHECK_STR(orch_address_text(&from, one, sizeof one),
              orch_address_text(&own, other, sizeof other));
    CHECK_INT(orch_socket_recvfrom(a, data, sizeof data, &from), 0);
    CHECK_INT(orch_socket_recvfrom(a, data, sizeof data, &from), -EMSGSIZE);
    CHECK_INT(memcmp(data, "too long", 8), 0);
    CHECK_INT(orch_socket_recvfrom(a, data, sizeof data, NULL), 4);
    CHECK_INT(memcmp(data, "four", 4), 0);
    static char large[70000];
    CHECK_INT(orch_socket_sendto(b, large, sizeof large, &at), -EMSGSIZE);
    end(a);
    end(b);
}

static orch_result receive_from(void *arg) {
    char data[8];
    ptrdiff_t n = orch_socket_recvfrom(*(int *)arg, data, sizeof data, NULL);
    return n < 0 ? orch_fail((int)n) : orch_ok_int(n);
}

TASK_TEST(a_datagram_socket_with_a_peer) {
    orch_address at;
    char data[8];
    orch_udp_desc desc = {.host = "127.0.0.1"};
    int a = orch_udp(&desc);
    CHECK_INT(orch_socket_address(a, &at), 0);
    orch_udp_desc to = {.peer = &at};
    int b = orch_udp(&to);
    if (!CHECK(a >= 0 && b >= 0)) {
        end(a), end(b);
        return;
    }
    orch_future *f = orch_go(receive_from, &a);
    CHECK_INT(orch_sleep(1), 0);
    CHECK_INT(orch_socket_send(b, "hi", 2, 0), 2);
    CHECK_INT(join(f), 2);
    for (int i = 0; i < 3; i++) CHECK_INT(orch_socket_send(b, "abc", 3, 0), 3);
    for (int i = 0; i < 3; i++) CHECK_INT(orch_socket_recv(a, data, sizeof data, 0), 3);
    end(a);
    CHECK_INT(orch_socket_send(b, "x", 1, 0), 1);
    CHECK_INT(orch_socket_recv(b, data, 1, 0), -ECONNREFUSED); // nobody is there
    end(b);
}

TASK_TEST_ON(datagrams_over_ipv6, ORCH_CLOCK_MONOTONIC, no_ipv6()) {
    orch_address at, from;
    char data[8] = "";
    orch_udp_desc desc = {.host = "::1"};
    int a = orch_udp(&desc), b = orch_udp(&desc);
    if (!CHECK(a >= 0 && b >= 0)) {
        end(a), end(b);
        return;
    }
    CHECK_INT(orch_socket_address(a, &at), 0);
    CHECK_INT(orch_socket_sendto(b, "six", 3, &at), 3);
    CHECK_INT(orch_socket_recvfrom(a, data, sizeof data, &from), 3);
    CHECK_STR(data, "six");
    end(a);
    end(b);
}

TASK_TEST(the_parts_of_a_datagram_stay_together) {
    enum { PARTS = 100 };
    orch_address at;
    struct iovec parts[PARTS];
    char data[PARTS + 1];
    int a = orch_udp(&(orch_udp_desc){.host = "127.0.0.1"});
    CHECK_INT(orch_socket_address(a, &at), 0);
    int b = orch_udp(&(orch_udp_desc){.peer = &at});
    for (int i = 0; i < PARTS; i++) parts[i] = (struct iovec){(void *)(uintptr_t) "x", 1};
    CHECK_INT(orch_writev(b, parts, PARTS), PARTS);
    CHECK_INT(orch_socket_recvfrom(a, data, sizeof data, NULL), PARTS);
    end(a);
    end(b);
}

TASK_TEST(a_datagram_socket_anywhere) {
    int fd = orch_udp(NULL);
    CHECK(fd >= 0);
    end(fd);
    orch_udp_desc bad = {.host = "nobody"};
    CHECK_INT(orch_udp(&bad), ORCH_EINVAL);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
