// test_poller.c: readiness of descriptors and their life, under the poller that TEST_POLLER names.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
// System calls that change what epoll looks for are counted.
#ifdef __linux__
#include <sys/epoll.h>
static int epoll_changes;
static int counted_epoll_ctl(int queue, int operation, int fd, struct epoll_event *event) {
    epoll_changes++;
    return epoll_ctl(queue, operation, fd, event);
}
#define epoll_ctl counted_epoll_ctl
#else
static const int epoll_changes = 0;
#endif
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "pollers.h"
#include "test.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

// The body runs as the main task of a loop of its own.
#define TASK_TEST_IF(name, unless)                                                                 \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        name##_body();                                                                             \
        return orch_ok_int(1);                                                                     \
    }                                                                                              \
    TEST_SKIP(name, unless) {                                                                      \
        orch_loop_desc desc = {.poller = test_poller()};                                           \
        orch_result r = orch_run_with(&desc, name##_main, NULL);                                   \
        CHECK_INT(r.error, 0);                                                                     \
        CHECK_INT(orch_int(&r), 1);                                                                \
        orch_result_free(&r);                                                                      \
    }                                                                                              \
    static void name##_body(void)
#define TASK_TEST(name) TASK_TEST_IF(name, false)

// For a property of one poller: under another one there is nothing to show, and nothing is skipped.
#define TASK_TEST_OF(name, applies)                                                                \
    static void name##_shown(void);                                                                \
    TASK_TEST(name) {                                                                              \
        if (applies) name##_shown();                                                               \
    }                                                                                              \
    static void name##_shown(void)

#define BOTH (ORCH_READABLE | ORCH_WRITABLE)

static orch_loop_stats stats(void) { return orch_loop_statistics(orch_loop_current()); }

static orch_result run_on_poller(orch_task_fn fn, void *arg) {
    orch_loop_desc desc = {.poller = test_poller()};
    return orch_run_with(&desc, fn, arg);
}

// Awaits: the number the future ended with, or its error.
static intptr_t join(orch_future *f) {
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

// Milliseconds to wait for what is to come; after a refusal it may never do.
static int patience(void) { return test_shared->refused ? 100 : 2000; }

// As join, but not for ever.
static intptr_t soon(orch_future *f) { return join(orch_timeout(f, (uint64_t)patience())); }

static bool make_pair(int fd[2]) { return CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fd) == 0); }

static void close_pair(const int fd[2]) {
    close(fd[0]);
    close(fd[1]);
}

static bool put(int fd) { return CHECK_INT(write(fd, "x", 1), 1); }

static void fill(int fd) {
    static const char block[4096];
    fcntl(fd, F_SETFL, O_NONBLOCK);
    while (write(fd, block, sizeof block) > 0) continue;
    while (write(fd, block, 1) > 0) continue;
}

static void ignore_report(const char *text, void *context) {
    (void)text;
    (void)context;
}

static int wakes_fd[2];

static void drain(int fd) {
    char block[4096];
    fcntl(fd, F_SETFL, O_NONBLOCK);
    while (read(fd, block, sizeof block) > 0) continue;
}

// ---- events

TASK_TEST(readable_when_something_came) {
    int fd[2];
    if (!make_pair(fd)) return;
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    CHECK_INT(orch_sleep(2), 0);
    CHECK(!orch_is_settled(f));
    put(fd[1]);
    CHECK_INT(soon(f), ORCH_READABLE);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE); // still is
    drain(fd[0]);
    f = orch_ready(fd[0], ORCH_READABLE);
    CHECK_INT(orch_sleep(2), 0);
    CHECK(!orch_is_settled(f)); // no longer is
    orch_drop(f);
    close_pair(fd);
}

TASK_TEST(writable_when_there_is_room) {
    int fd[2];
    if (!make_pair(fd)) return;
    CHECK_INT(soon(orch_ready(fd[0], ORCH_WRITABLE)), ORCH_WRITABLE);
    fill(fd[0]);
    orch_future *f = orch_ready(fd[0], ORCH_WRITABLE);
    CHECK_INT(orch_sleep(2), 0);
    CHECK(!orch_is_settled(f));
    drain(fd[1]);
    CHECK_INT(soon(f), ORCH_WRITABLE);
    close_pair(fd);
}

TASK_TEST(the_events_that_came_are_reported) {
    int fd[2];
    if (!make_pair(fd)) return;
    CHECK_INT(soon(orch_ready(fd[0], BOTH)), ORCH_WRITABLE);
    put(fd[1]);
    CHECK_INT(soon(orch_ready(fd[0], BOTH)), BOTH);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE); // only of those asked for
    CHECK_INT(soon(orch_ready(fd[0], ORCH_WRITABLE)), ORCH_WRITABLE);
    fill(fd[0]);
    CHECK_INT(soon(orch_ready(fd[0], BOTH)), ORCH_READABLE);
    close_pair(fd);
}

TASK_TEST(a_waiter_in_each_direction_gets_its_own) {
    int fd[2];
    if (!make_pair(fd)) return;
    fill(fd[0]);
    orch_future *reader = orch_ready(fd[0], ORCH_READABLE);
    orch_future *writer = orch_ready(fd[0], ORCH_WRITABLE);
    put(fd[1]);
    CHECK_INT(soon(reader), ORCH_READABLE);
    CHECK(!orch_is_settled(writer));
    drain(fd[1]);
    CHECK_INT(soon(writer), ORCH_WRITABLE);
    close_pair(fd);
}

TASK_TEST(a_pipe_is_readable_at_its_end) {
    int fd[2];
    if (!CHECK(pipe(fd) == 0)) return;
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    close(fd[1]);
    CHECK_INT(soon(f), ORCH_READABLE); // the end of the stream
    close(fd[0]);
}

TASK_TEST(a_hang_up_wakes_the_reader) {
    int fd[2];
    if (!make_pair(fd)) return;
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    CHECK_INT(orch_sleep(1), 0);
    close(fd[1]);
    CHECK_INT(soon(f), ORCH_READABLE);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_WRITABLE)), ORCH_WRITABLE); // errors too
    close(fd[0]);
}

TASK_TEST(a_broken_pipe_wakes_the_writer) {
    int fd[2];
    if (!CHECK(pipe(fd) == 0)) return;
    fill(fd[1]);
    orch_future *f = orch_ready(fd[1], ORCH_WRITABLE);
    CHECK_INT(orch_sleep(1), 0);
    CHECK(!orch_is_settled(f));
    close(fd[0]);
    CHECK_INT(soon(f), ORCH_WRITABLE);
    close(fd[1]);
}

TASK_TEST(a_regular_file_is_ready_at_once) {
    FILE *file = tmpfile();
    if (!CHECK(file != NULL)) return;
    CHECK_INT(soon(orch_ready(fileno(file), ORCH_READABLE)), ORCH_READABLE);
    CHECK_INT(soon(orch_ready(fileno(file), ORCH_WRITABLE)), ORCH_WRITABLE);
    CHECK_INT(soon(orch_ready(fileno(file), BOTH)), BOTH);
    fclose(file);
    int null = open("/dev/null", O_RDWR);
    CHECK_INT(soon(orch_ready(null, BOTH)), BOTH);
    close(null);
}

static int listen_here(struct sockaddr_in *address) {
    socklen_t size = sizeof *address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(address, 0, sizeof *address);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || bind(fd, (struct sockaddr *)address, size) || listen(fd, 5) ||
        getsockname(fd, (struct sockaddr *)address, &size)) {
        close(fd);
        return -1;
    }
    return fd;
}

TASK_TEST(sockets_connect_and_accept) {
    struct sockaddr_in address;
    int listener = listen_here(&address), client = socket(AF_INET, SOCK_STREAM, 0);
    if (!CHECK(listener >= 0 && client >= 0)) return;
    orch_future *f = orch_ready(listener, ORCH_READABLE);
    fcntl(client, F_SETFL, O_NONBLOCK);
    int rc = connect(client, (struct sockaddr *)&address, sizeof address);
    CHECK(rc == 0 || errno == EINPROGRESS);
    CHECK_INT(soon(f), ORCH_READABLE);
    CHECK_INT(soon(orch_ready(client, ORCH_WRITABLE)), ORCH_WRITABLE);
    int server = accept(listener, NULL, NULL);
    CHECK(server >= 0);
    put(client);
    CHECK_INT(soon(orch_ready(server, ORCH_READABLE)), ORCH_READABLE);
    close(server);
    close(client);
    close(listener);
}

TASK_TEST(a_refused_connection_wakes_the_writer) {
    struct sockaddr_in address;
    int listener = listen_here(&address), client = socket(AF_INET, SOCK_STREAM, 0);
    if (!CHECK(listener >= 0 && client >= 0)) return;
    close(listener); // nobody listens there now
    fcntl(client, F_SETFL, O_NONBLOCK);
    if (connect(client, (struct sockaddr *)&address, sizeof address) && errno == EINPROGRESS)
        CHECK_INT(soon(orch_ready(client, ORCH_WRITABLE)), ORCH_WRITABLE);
    close(client);
}

// ---- refused

TASK_TEST(bad_descriptors_are_refused) {
    int fd[2];
    if (!make_pair(fd)) return;
    close_pair(fd);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), -EBADF);
    CHECK_INT(soon(orch_ready(fd[1], ORCH_WRITABLE)), -EBADF);
    CHECK_INT(soon(orch_ready(-1, ORCH_READABLE)), -EBADF);
    CHECK_INT(soon(orch_ready(INT32_MIN, BOTH)), -EBADF);
    CHECK_INT(soon(orch_ready(INT32_MAX, BOTH)), -EBADF); // nor a table of that size
    CHECK_INT(stats().watched, 0);
}

TASK_TEST(a_second_waiter_in_one_direction_is_refused) {
    int fd[2];
    if (!make_pair(fd)) return;
    orch_future *first = orch_ready(fd[0], ORCH_READABLE);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_EBUSY);
    CHECK_INT(soon(orch_ready(fd[0], BOTH)), ORCH_EBUSY);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_WRITABLE)), ORCH_WRITABLE); // the other one is free
    CHECK(!orch_is_settled(first));
    put(fd[1]);
    CHECK_INT(soon(first), ORCH_READABLE);
    first = orch_ready(fd[1], BOTH);
    CHECK_INT(soon(orch_ready(fd[1], ORCH_READABLE)), ORCH_EBUSY);
    CHECK_INT(soon(first), ORCH_WRITABLE);
    CHECK_INT(soon(orch_ready(fd[1], BOTH)), ORCH_WRITABLE); // free again
    close_pair(fd);
}

// The contract asks for orch_close or a drop before the close. Who forgets both gets an error from
// poll; epoll and kqueue forget the descriptor without a word.
static bool forgets(void) {
    return test_poller() != ORCH_POLLER_DEFAULT && test_poller() != ORCH_POLLER_POLL;
}

// kqueue on Linux is libkqueue on top of epoll, which differs from the real one in places.
static bool emulated(void) {
#ifdef __linux__
    return test_poller() == ORCH_POLLER_KQUEUE;
#else
    return false;
#endif
}

TASK_TEST_OF(closing_a_watched_descriptor_is_an_error_not_a_spin, !forgets()) {
    int fd[2];
    if (!make_pair(fd)) return;
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    CHECK_INT(orch_sleep(1), 0);
    close_pair(fd);
    CHECK_INT(soon(f), -EBADF);
    CHECK_INT(stats().watched, 0);
    uint64_t before = stats().polls;
    CHECK_INT(orch_sleep(5), 0);
    CHECK(stats().polls - before <= 3);
}

static orch_result wait_for_byte(void *arg) {
    return orch_await(orch_ready(*(int *)arg, ORCH_READABLE));
}

// ---- closed

static void note_error(orch_result *in, void *context) { *(int *)context = in->error; }

TASK_TEST(closing_wakes_who_waits) {
    int fd[2], seen = 0;
    CHECK_INT(orch_sleep(1), 0); // the loop has the descriptor that wakes it: no number is reused
    if (!make_pair(fd)) return;
    orch_future *reader = orch_ready(fd[0], ORCH_READABLE);
    fill(fd[0]);
    orch_future *writer = orch_ready(fd[0], ORCH_WRITABLE);
    orch_on(orch_ready(fd[1], ORCH_WRITABLE), note_error, &seen);
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(orch_close(fd[1]), 0);
    CHECK_INT(stats().watched, 0);
    CHECK_INT(soon(reader), ORCH_ECANCELED);
    CHECK_INT(soon(writer), ORCH_ECANCELED);
    CHECK_INT(orch_sleep(1), 0);
    CHECK_INT(seen, ORCH_ECANCELED);
    CHECK_INT(fcntl(fd[0], F_GETFD), -1);
    CHECK_INT(orch_close(fd[0]), -EBADF);
    CHECK_INT(orch_close(-1), -EBADF);
    CHECK_INT(orch_close(INT32_MAX), -EBADF);
}

TASK_TEST(closing_wakes_who_waits_for_both) {
    int fd[2];
    if (!make_pair(fd)) return;
    fill(fd[0]);
    orch_future *f = orch_ready(fd[0], BOTH);
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(soon(f), ORCH_ECANCELED);
    CHECK_INT(orch_close(fd[1]), 0);
}

TEST(closing_needs_no_loop) {
    int fd[2];
    if (!make_pair(fd)) return;
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(orch_close(fd[1]), 0);
    CHECK_INT(orch_close(fd[1]), -EBADF);
}

// ---- the next owner of a number

// Not told to anybody, as a client library does it.
TASK_TEST(a_number_that_others_close_and_use_again_works) {
    for (int i = 0; i < 5; i++) {
        int fd[2];
        if (!make_pair(fd)) return;
        put(fd[1]);
        CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
        close_pair(fd); // after an event, and with nobody waiting
    }
    CHECK_INT(stats().watched, 0);
}

TASK_TEST(who_waits_for_a_number_that_the_library_uses_again_is_told) {
    int fd[2], next[2];
    if (!make_pair(fd)) return;
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    close_pair(fd);
    if (!make_pair(next)) return;
    CHECK_INT(next[0], fd[0]);
    CHECK_INT(orchi_watch_own(orch_loop_current(), next[0]), 0);
    CHECK_INT(soon(f), -EBADF);
    put(next[1]);
    CHECK_INT(soon(orch_ready(next[0], ORCH_READABLE)), ORCH_READABLE);
    CHECK_INT(orch_close(next[0]), 0);
    CHECK_INT(orch_close(next[1]), 0);
}

static int reused[2], second_fd;
static orch_future *of_the_next;

static void close_the_other(orch_result *in, void *context) {
    int *other = context;
    CHECK_INT(in->error, 0);
    if (of_the_next != NULL) return; // the second of the two
    CHECK_INT(orch_close(other[0]), 0);
    if (!CHECK(pipe(reused) == 0)) return;
    CHECK(reused[0] == other[0] || reused[1] == other[0]);
    CHECK_INT(dup2(reused[0], 100), 100);
    close(reused[0]);
    close(reused[1]);
    if (!CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, reused) == 0)) return;
    CHECK_INT(reused[0], other[0]);
    of_the_next = orch_ready(reused[0], ORCH_READABLE);
}

// Both are ready in the same look; the first callback closes the other's descriptor.
TASK_TEST(an_event_of_the_same_look_does_not_reach_the_next_owner) {
    int a[2], b[2];
    if (!make_pair(a) || !make_pair(b)) return;
    orch_on(orch_ready(a[0], ORCH_READABLE), close_the_other, b);
    orch_on(orch_ready(b[0], ORCH_READABLE), close_the_other, a);
    put(a[1]);
    put(b[1]);
    second_fd = b[0];
    CHECK_INT(orch_sleep(3), 0);
    if (!CHECK(of_the_next != NULL)) return;
    CHECK(!orch_is_settled(of_the_next));
    put(reused[1]);
    CHECK_INT(soon(of_the_next), ORCH_READABLE);
}

static int victim[2];
static orch_future *reader_of_the_next;

static orch_result read_one(void *arg) {
    char byte;
    return orch_ok_int(orch_read(*(int *)arg, &byte, 1));
}

static void reuse_the_victim(const orch_result *r, void *context) {
    (void)context;
    int number = victim[0];
    CHECK_INT(r->error, -EBADF);
    CHECK_INT(orch_close(victim[0]), 0);
    close(victim[1]);
    if (!make_pair(victim)) return;
    CHECK_INT(victim[0], number);
    reader_of_the_next = orch_go(read_one, &victim[0]);
}

static orch_result find_both(void *arg) {
    int bad[2];
    (void)arg;
    if (!make_pair(victim) || !make_pair(bad)) return orch_ok(NULL, NULL);
    orch_detach(orch_ready(bad[0], ORCH_READABLE)); // comes first in the array
    orch_future *f = orch_ready(victim[0], ORCH_READABLE);
    put(victim[1]);
    close_pair(bad);
    orchi_poll(orch_loop_current(), 0);
    if (test_shared->refused == 0) {
        CHECK_INT(join(f), ORCH_ECANCELED);
        CHECK(reader_of_the_next != NULL && orchi_on_descriptor(reader_of_the_next));
        put(victim[1]);
        CHECK_INT(soon(reader_of_the_next), 1);
    }
    return orch_ok(NULL, NULL);
}

// Telling one waiter may run a hook, and that may start a task that waits for a number of which the
// look has found what was there before.
TEST(nor_a_task_that_a_hook_has_started) {
    orch_loop_desc desc = {.poller = ORCH_POLLER_POLL, .on_unhandled = reuse_the_victim};
    orch_result r = orch_run_with(&desc, find_both, NULL);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    close_pair(victim);
}

// The entry in epoll belongs to the open file, which a duplicate keeps alive.
TASK_TEST(a_duplicate_does_not_keep_a_closed_descriptor_awake) {
    int fd[2];
    if (!make_pair(fd)) return;
    CHECK_INT(orch_adopt(fd[0]), 0);
    put(fd[1]);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    int copy = dup(fd[0]);
    CHECK_INT(orch_close(fd[0]), 0); // readable, armed, and the file stays open
    uint64_t before = stats().polls;
    CHECK_INT(orch_sleep(5), 0);
    CHECK(stats().polls - before <= 3);
    int next[2];
    if (!make_pair(next)) return;
    CHECK_INT(next[0], fd[0]);
    orch_future *f = orch_ready(next[0], ORCH_READABLE);
    CHECK_INT(orch_sleep(2), 0);
    CHECK(!orch_is_settled(f));
    orch_drop(f);
    close(copy);
    close(fd[1]);
    close_pair(next);
}

TASK_TEST_IF(nor_one_that_was_closed_without_orch_close, emulated()) {
    int fd[2], next[2];
    if (!make_pair(fd)) return;
    CHECK_INT(orch_adopt(fd[0]), 0);
    put(fd[1]);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    int copy = dup(fd[0]);
    close(fd[0]); // the promise is broken
    if (!make_pair(next)) return;
    CHECK_INT(next[0], fd[0]);
    CHECK_INT(orchi_watch_own(orch_loop_current(), next[0]), 0);
    uint64_t before = stats().polls;
    orch_future *f = orch_ready(next[0], ORCH_READABLE);
    CHECK_INT(orch_sleep(10), 0);
    CHECK(!orch_is_settled(f));
    CHECK(stats().polls - before <= 5);
    put(next[1]);
    CHECK_INT(soon(f), ORCH_READABLE);
    close(copy);
    close(fd[1]);
    orch_close(next[0]);
    orch_close(next[1]);
}

// ---- system calls

TASK_TEST(a_wait_for_an_adopted_descriptor_changes_nothing) {
    int fd[2];
    if (!make_pair(fd)) return;
    CHECK_INT(orch_adopt(fd[0]), 0);
    for (int i = 0, before = 0; i < 20; i++) {
        if (i == 1) before = epoll_changes;
        orch_future *f = orch_ready(fd[0], ORCH_READABLE);
        put(fd[1]);
        CHECK_INT(soon(f), ORCH_READABLE);
        drain(fd[0]);
        if (i > 0) CHECK_INT(epoll_changes, before);
    }
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(orch_close(fd[1]), 0);
}

TASK_TEST(an_event_that_nobody_waits_for_comes_once) {
    int fd[2];
    if (!make_pair(fd)) return;
    CHECK_INT(orch_adopt(fd[0]), 0);
    put(fd[1]);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    uint64_t before = stats().polls;
    CHECK_INT(orch_sleep(10), 0); // it stays readable
    CHECK(stats().polls - before <= 4);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    CHECK_INT(soon(orch_ready(fd[0], BOTH)), BOTH);
    CHECK_INT(orch_close(fd[1]), 0);
    before = stats().polls;
    CHECK_INT(orch_sleep(10), 0); // hung up
    CHECK(stats().polls - before <= 4);
    CHECK_INT(orch_close(fd[0]), 0);
}

TASK_TEST_IF(adopting_a_descriptor_that_is_waited_for_keeps_the_wait, emulated()) {
    int fd[2];
    if (!make_pair(fd)) return;
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    CHECK_INT(orch_adopt(fd[0]), 0);
    for (int i = 0; i < 3; i++) {
        put(fd[1]);
        CHECK_INT(soon(f), ORCH_READABLE);
        drain(fd[0]);
        f = orch_ready(fd[0], ORCH_READABLE);
    }
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(soon(f), ORCH_ECANCELED);
    CHECK_INT(orch_close(fd[1]), 0);
    CHECK_INT(orch_adopt(fd[1]), 0); // its number is known, which is all that is looked at
    CHECK_INT(orch_adopt(-1), -EBADF);
    CHECK_INT(orch_adopt(INT32_MAX), -EBADF);
}

// ---- ends

// Waits for reading until the end: what it came to, and how many waits it took.
static int read_to_end(int fd, int *waits) {
    char byte;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    for (*waits = 0; *waits < 10;) {
        if (soon(orch_ready(fd, ORCH_READABLE)) != ORCH_READABLE) return -1;
        ++*waits;
        ssize_t got = read(fd, &byte, 1);
        if (got <= 0) return got < 0 ? errno : 0;
    }
    return -2;
}

static bool connected(int fd[2]) {
    struct sockaddr_in address;
    int listener = listen_here(&address);
    fd[0] = socket(AF_INET, SOCK_STREAM, 0);
    bool held = CHECK(connect(fd[0], (struct sockaddr *)&address, sizeof address) == 0);
    fd[1] = accept(listener, NULL, NULL);
    close(listener);
    return held;
}

TASK_TEST(a_half_close_is_told_once) {
    int fd[2], waits = 0;
    if (!connected(fd)) return;
    put(fd[1]);
    CHECK_INT(shutdown(fd[1], SHUT_WR), 0);
    CHECK_INT(read_to_end(fd[0], &waits), 0);
    CHECK_INT(waits, 2);                                              // the byte, the end
    CHECK_INT(soon(orch_ready(fd[0], ORCH_WRITABLE)), ORCH_WRITABLE); // the other half is open
    close_pair(fd);
}

TASK_TEST_IF(a_reset_is_told_once, emulated()) {
    int fd[2], waits = 0;
    if (!connected(fd)) return;
    orch_future *f = orch_go(wait_for_byte, &fd[0]);
    setsockopt(fd[1], SOL_SOCKET, SO_LINGER, &(struct linger){1, 0}, sizeof(struct linger));
    close(fd[1]);
    CHECK_INT(soon(f), ORCH_READABLE);
    CHECK_INT(read_to_end(fd[0], &waits), ECONNRESET);
    CHECK_INT(waits, 1);
    close(fd[0]);
}

TASK_TEST(out_of_band_data_wakes_nobody_and_hides_nothing) {
    int fd[2];
    if (!connected(fd)) return;
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    CHECK_INT(send(fd[1], "!", 1, MSG_OOB), 1);
    uint64_t before = stats().polls;
    CHECK_INT(orch_sleep(5), 0);
    CHECK(stats().polls - before <= 3); // pending, and no spin
    put(fd[1]);
    CHECK_INT(soon(f), ORCH_READABLE);
    close_pair(fd);
}

// ---- processes

static orch_result fork_inside(void *arg) {
    int *fd = arg, status = 0;
    orch_adopt(fd[0]);
    put(fd[1]);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    drain(fd[0]);
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    pid_t child = fork();
    if (child == 0) {
        bool closed = orch_close(fd[0]) == 0 && orch_close(fd[1]) == 0;
        _exit(closed ? 7 : 8);
    }
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7);
    CHECK_INT(orch_sleep(1), 0);
    CHECK(!orch_is_settled(f));
    put(fd[1]);
    CHECK_INT(soon(f), ORCH_READABLE); // the child took nothing away
    return orch_ok_int(1);
}

TEST(a_child_that_closes_takes_nothing_from_its_parent) {
    int fd[2];
    if (!make_pair(fd)) return;
    orch_result r = run_on_poller(fork_inside, fd);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    close_pair(fd);
}

static void set_true(orch_result *in, void *context) { *(bool *)context = in->error == 0; }

TEST(a_child_may_free_the_loop) {
    int fd[2], status = 0;
    bool came = false;
    orch_loop_desc desc = {.poller = test_poller()};
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL) || !make_pair(fd)) return;
    orch_on(orch_ready(fd[0], ORCH_READABLE), set_true, &came);
    pid_t child = fork();
    if (child == 0) _exit(orch_loop_free(loop) == 0 && orch_close(fd[0]) == 0 ? 7 : 8);
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7);
    put(fd[1]);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK(came);
    CHECK_INT(orch_loop_free(loop), 0);
    close_pair(fd);
}

TASK_TEST(the_set_is_closed_on_exec) {
    int queue = orch_loop_current()->poller.queue;
    if (queue >= 0) CHECK(fcntl(queue, F_GETFD) & FD_CLOEXEC);
    CHECK_INT(queue >= 0, stats().poller != ORCH_POLLER_POLL);
}

// ---- given up

TASK_TEST(a_drop_deregisters) {
    int fd[2];
    if (!make_pair(fd)) return;
    for (int i = 0; i < 10; i++) {
        orch_future *f = orch_ready(fd[0], ORCH_READABLE);
        CHECK_INT(stats().watched, 1);
        orch_drop(f);
        CHECK_INT(stats().watched, 0);
    }
    put(fd[1]); // an event for nobody
    uint64_t before = stats().polls;
    CHECK_INT(orch_sleep(5), 0);
    CHECK(stats().polls - before <= 3);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    close_pair(fd);
}

TASK_TEST(a_number_used_again_has_nothing_of_its_predecessor) {
    for (int i = 0; i < 10; i++) {
        int old[2], new[2];
        if (!make_pair(old)) return;
        orch_future *f = orch_ready(old[0], ORCH_READABLE);
        put(old[1]);
        CHECK_INT(orch_yield(), 0);
        orch_drop(f);
        close_pair(old);
        if (!make_pair(new)) return;
        CHECK_INT(new[0], old[0]);
        f = orch_ready(new[0], ORCH_READABLE);
        CHECK_INT(orch_sleep(1), 0);
        CHECK(!orch_is_settled(f));
        put(new[1]);
        CHECK_INT(soon(f), ORCH_READABLE);
        close_pair(new);
    }
}

TASK_TEST(a_cancelled_wait_ends_at_once) {
    int fd[2];
    if (!make_pair(fd)) return;
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    orch_cancel(f, 0);
    CHECK_INT(soon(f), ORCH_ECANCELED);
    CHECK_INT(stats().watched, 0);
    close_pair(fd);
}

TASK_TEST(a_cancelled_task_gives_up_its_wait) {
    int fd[2];
    if (!make_pair(fd)) return;
    orch_future *f = orch_go(wait_for_byte, &fd[0]);
    CHECK_INT(stats().watched, 1);
    orch_drop(f);
    CHECK_INT(stats().watched, 0);
    CHECK_INT(soon(orch_ready(fd[0], BOTH)), ORCH_WRITABLE); // not busy
    close_pair(fd);
}

TASK_TEST(a_race_of_a_wait_and_a_timer_ends_both) {
    int fd[2];
    if (!make_pair(fd)) return;
    for (int i = 0; i < 20; i++) {
        orch_result r = orch_await(orch_race(orch_ready(fd[0], ORCH_READABLE), orch_after(1)));
        CHECK_INT(r.error, 0);
        CHECK_INT(r.index, 1);
        orch_result_free(&r);
        CHECK_INT(stats().watched, 0);
        CHECK_INT(stats().timers, 0);
    }
    put(fd[1]);
    orch_result r = orch_await(orch_race(orch_ready(fd[0], ORCH_READABLE), orch_after(5000)));
    CHECK_INT(r.index, 0);
    CHECK_INT(orch_int(&r), ORCH_READABLE);
    orch_result_free(&r);
    CHECK_INT(stats().watched, 0);
    CHECK_INT(stats().timers, 0);
    close_pair(fd);
}

TASK_TEST(a_timeout_of_a_wait_says_so) {
    int fd[2];
    if (!make_pair(fd)) return;
    CHECK_INT(join(orch_timeout(orch_ready(fd[0], ORCH_READABLE), 2)), ORCH_ETIMEDOUT);
    CHECK_INT(stats().watched, 0);
    close_pair(fd);
}

// ---- seeds

enum { DRAWN = 8 };

static int drawn[DRAWN], drawn_count;

static void note_number(orch_result *in, void *context) {
    if (in->error == 0) drawn[drawn_count++] = *(int *)context;
}

static orch_result draw(void *arg) {
    static int number[DRAWN];
    int(*fd)[2] = arg;
    for (int i = 0; i < DRAWN; i++) {
        number[i] = i;
        orch_on(orch_ready(fd[i][0], ORCH_READABLE), note_number, &number[i]);
    }
    return orch_ok_int(orch_sleep(1));
}

// The order of eight callbacks, as a number.
static int draw_order(uint64_t seed, orch_poller poller, void *fd) {
    orch_loop_desc desc = {.seed = seed, .poller = poller};
    drawn_count = 0;
    orch_result r = orch_run_with(&desc, draw, fd);
    CHECK_INT(r.error, 0);
    CHECK_INT(drawn_count, DRAWN);
    int order = 0;
    for (int i = 0; i < drawn_count; i++) order = order * DRAWN + drawn[i];
    return order;
}

TEST(a_seed_draws_the_order_of_ready_descriptors) {
    static int fd[DRAWN][2];
    const uint64_t seeds = test_shared->fail_at ? 1 : 20; // a sweep repeats this often
    int differ = 0, first = 0, made = 0;
    while (made < DRAWN && make_pair(fd[made])) put(fd[made++][1]);
    for (uint64_t seed = 1; seed <= seeds && made == DRAWN; seed++) {
        int order = draw_order(seed, test_poller(), fd);
        CHECK_INT(draw_order(seed, test_poller(), fd), order);
        CHECK_INT(draw_order(seed, ORCH_POLLER_POLL, fd), order); // whatever the poller is
        differ += seed > 1 && order != first;
        first = order;
    }
    CHECK(differ > 15 || seeds == 1);
    for (int i = 0; i < made; i++) close_pair(fd[i]);
}

// ---- many

static bool may_open(rlim_t count) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return false;
    if (limit.rlim_cur >= count) return true;
    limit.rlim_cur = limit.rlim_max < count ? limit.rlim_max : count;
    return setrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur >= count;
}

TASK_TEST_IF(descriptors_above_1024_work, !may_open(3000)) {
    int fd[2];
    if (!may_open(3000) || !make_pair(fd)) return;
    static const int numbers[] = {1023, 1024, 1025, 2047, 2999};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        int high = dup2(fd[0], numbers[i]);
        if (!CHECK_INT(high, numbers[i])) break;
        CHECK_INT(soon(orch_ready(high, ORCH_WRITABLE)), ORCH_WRITABLE);
        orch_future *f = orch_ready(high, ORCH_READABLE);
        put(fd[1]);
        CHECK_INT(soon(f), ORCH_READABLE);
        drain(fd[0]);
        close(high);
    }
    close_pair(fd);
}

#define PAIRS 1000

static int pairs[PAIRS][2];

static orch_result echo_once(void *arg) {
    const int *fd = arg;
    char byte = 0;
    if (soon(orch_ready(fd[0], ORCH_READABLE)) != ORCH_READABLE) return orch_fail(-1001);
    if (read(fd[0], &byte, 1) != 1) return orch_fail(-1002);
    if (soon(orch_ready(fd[0], ORCH_WRITABLE)) != ORCH_WRITABLE) return orch_fail(-1003);
    if (write(fd[0], &byte, 1) != 1) return orch_fail(-1004);
    return orch_ok_int(byte);
}

TASK_TEST_IF(a_thousand_pairs_are_served, !may_open(2 * PAIRS + 100)) {
    static orch_future *echo[PAIRS];
    const int most = test_shared->fail_at ? 50 : PAIRS; // a sweep repeats this often
    int made = 0;
    if (!may_open(2 * PAIRS + 100)) return;
    while (made < most && make_pair(pairs[made])) made++;
    for (int i = 0; i < made; i++) echo[i] = orch_go(echo_once, pairs[i]);
    CHECK_INT(stats().watched, made);
    CHECK_INT(orch_sleep(1), 0);
    for (int i = 0; i < made; i++) { // scattered, each with a byte of its own
        int at = i * 617 % made;
        char byte = (char)(at % 100 + 1);
        CHECK_INT(write(pairs[at][1], &byte, 1), 1);
        if (i % 100 == 0) orch_yield();
    }
    for (int i = 0; i < made; i++) {
        char byte = 0;
        if (!CHECK_INT(join(echo[i]), i % 100 + 1)) continue;
        CHECK_INT(read(pairs[i][1], &byte, 1), 1);
        CHECK_INT(byte, i % 100 + 1);
    }
    CHECK_INT(stats().watched, 0);
    for (int i = 0; i < made; i++) close_pair(pairs[i]);
}

// Registered and given up in scattered order, so that the poller's table has to close its gaps.
TASK_TEST(registrations_come_and_go_in_any_order) {
    enum { COUNT = 60 };
    static orch_future *f[COUNT];
    uint32_t state = 7;
    int made = 0;
    while (made < COUNT && make_pair(pairs[made])) made++;
    for (int round = 0; round < 3000 && made == COUNT; round++) {
        state = state * 1664525u + 1013904223u;
        int at = (int)((state >> 16) % COUNT);
        if (f[at] && orch_is_settled(f[at])) { // it has a byte
            CHECK_INT(join(f[at]), ORCH_READABLE);
            drain(pairs[at][0]);
            f[at] = NULL;
        } else if (!f[at]) {
            f[at] = orch_ready(pairs[at][0], ORCH_READABLE);
        } else if (state & 256) {
            orch_drop(f[at]);
            f[at] = NULL;
        } else {
            put(pairs[at][1]);
            if (!CHECK_INT(soon(f[at]), ORCH_READABLE)) made = 0;
            f[at] = NULL;
            drain(pairs[at][0]);
        }
    }
    for (int i = 0; i < COUNT; i++) {
        orch_drop(f[i]);
        close_pair(pairs[i]);
    }
    CHECK_INT(stats().watched, 0);
}

// ---- a poller that fails

static int wait_fails(orch_loop *loop, uint64_t ns) {
    (void)loop, (void)ns;
    return -EIO;
}

static void give_back(void *value) { ++*(int *)value; }

static orch_result sleeps(void *arg) {
    (void)arg;
    orch_shield_begin(); // it is not even woken to end
    return orch_fail(orch_sleep(1000));
}

static orch_result loses_the_poller(void *arg) {
    static orchi_poller_ops broken;
    int *released = arg;
    broken = *orch_loop_current()->poller.ops;
    broken.wait = wait_fails;
    if (orch_local_set(&broken, &released[0], give_back) != 0) released[0] = 1;
    orch_task_desc desc = {.fn = sleeps, .arg = &released[1], .release = give_back};
    orch_detach(orch_go_with(&desc));
    orch_loop_current()->poller.ops = &broken;
    return sleeps(NULL);
}

// Its tasks never end; what they were given is given back all the same.
TEST(without_a_poller_nothing_leaks) {
    int released[2] = {0, 0};
    orch_loop_desc desc = {.poller = test_poller()};
    orch_result r = orch_run_with(&desc, loses_the_poller, released);
    CHECK_INT(r.error, -EIO);
    orch_result_free(&r);
    if (test_shared->refused == 0) CHECK(released[0] == 1 && released[1] == 1);
}

// ---- the loop moves itself

// The system's own poller, to which the loop moves.
static const orchi_poller_ops *other(void) {
    const orchi_poller_ops *epoll = orchi_poller_find(ORCH_POLLER_EPOLL);
    return epoll != NULL ? epoll : orchi_poller_find(ORCH_POLLER_KQUEUE);
}

static bool no_other(void) { return other() == NULL; }

enum { CROWD = 200 };

static int crowd[CROWD][2];
static long crowd_seen[CROWD];

// Each byte is counted where it comes.
static orch_result count_bytes(void *arg) {
    int at = (int)(intptr_t)arg;
    char block[64];
    fcntl(crowd[at][0], F_SETFL, O_NONBLOCK);
    for (;;) {
        if (join(orch_ready(crowd[at][0], ORCH_READABLE)) != ORCH_READABLE) return orch_fail(1);
        ssize_t got = read(crowd[at][0], block, sizeof block);
        if (got <= 0) return orch_fail(2); // ready means that there is something
        crowd_seen[at] += got;
    }
}

static orch_poller now_by(void) { return stats().poller; }

// Looks until the loop uses that poller, with so many of all that have something at each look.
static long crowd_until(orch_poller wanted, int ready, long sent[CROWD]) {
    for (long i = 0; i < 60000; i++) {
        if (now_by() == wanted) return i;
        if (sent[0] - crowd_seen[0] > 100) break;       // nobody reads: no memory for that
        if (test_shared->refused > 0 && i > 200) break; // nor perhaps for the move
        for (int k = 0; k < ready; k++) {
            put(crowd[k][1]);
            sent[k]++;
        }
        orch_yield();
        orch_yield();
        orch_sleep(0);
    }
    return -1;
}

static void crowd_check(const long sent[CROWD]) {
    orch_sleep(2);
    for (int i = 0; i < CROWD; i++) CHECK_INT(crowd_seen[i], sent[i]);
}

static orch_result move_there_and_back(void *arg) {
    static orch_future *f[CROWD];
    static long sent[CROWD];
    (void)arg;
    for (int i = 0; i < CROWD; i++) {
        f[i] = orch_go(count_bytes, (void *)(intptr_t)i);
        if (!CHECK(!orch_is_settled(f[i]))) return orch_fail(3); // nobody would read
    }
    CHECK_INT(now_by(), ORCH_POLLER_POLL);
    orch_loop_current()->poller.threshold /= 8;
    CHECK(crowd_until(other()->id, 1, sent) > 100); // not at once
    crowd_check(sent);
    CHECK_INT(stats().moves, 1);
    CHECK(crowd_until(ORCH_POLLER_POLL, CROWD / 2, sent) > 100); // many are ready
    crowd_check(sent);
    CHECK(crowd_until(other()->id, 1, sent) > 100);
    crowd_check(sent);
    for (int i = 10; i < CROWD; i++) orch_drop(f[i]);
    CHECK(crowd_until(ORCH_POLLER_POLL, 1, sent) > 100); // few are left
    crowd_check(sent);
    CHECK_INT(stats().moves, 4);
    CHECK_INT(stats().watched, 10);
    for (int i = 0; i < 10; i++) orch_drop(f[i]);
    return orch_ok_int(1);
}

TEST_SKIP(the_loop_moves_to_what_fits_and_loses_nothing, no_other() || !may_open(2 * CROWD + 50)) {
    int made = 0;
    if (!may_open(2 * CROWD + 50)) return;
    while (made < CROWD && make_pair(crowd[made])) made++;
    if (made < CROWD) return;
    orch_result r = orch_run(move_there_and_back, NULL);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    for (int i = 0; i < CROWD; i++) close_pair(crowd[i]);
}

// All of the crowd have an event that nobody has fetched; the loop is never without work, and each
// look finds one more.
static orch_result backlog(void *arg) {
    static orch_future *f[CROWD];
    (void)arg;
    for (int i = 1; i < CROWD; i++) {
        f[i] = orch_ready(crowd[i][0], ORCH_READABLE);
        put(crowd[i][1]);
    }
    for (int i = 0; i < 600; i++) {
        f[0] = orch_ready(crowd[0][0], ORCH_READABLE);
        put(crowd[0][1]);
        while (!orch_is_settled(f[0])) orch_yield();
        orch_drop(f[0]);
        drain(crowd[0][0]);
    }
    CHECK_INT(stats().moves, 0);
    CHECK_INT(now_by(), ORCH_POLLER_POLL);
    for (int i = 1; i < CROWD; i++) orch_drop(f[i]);
    return orch_ok_int(1);
}

TEST_SKIP(a_backlog_is_not_taken_for_idle_descriptors, !may_open(2 * CROWD + 50)) {
    int made = 0;
    if (!may_open(2 * CROWD + 50)) return;
    while (made < CROWD && make_pair(crowd[made])) made++;
    if (made < CROWD) return;
    orch_result r = orch_run(backlog, NULL);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    for (int i = 0; i < CROWD; i++) close_pair(crowd[i]);
}

static orch_result stay(void *arg) {
    static long sent[CROWD];
    (void)arg;
    for (int i = 0; i < CROWD; i++) orch_detach(orch_go(count_bytes, (void *)(intptr_t)i));
    for (int i = 0; i < 1000; i++) {
        if (sent[0] - crowd_seen[0] > 100) break;
        put(crowd[0][1]);
        sent[0]++;
        orch_sleep(0);
    }
    crowd_check(sent);
    CHECK_INT(stats().moves, 0);
    return orch_ok_int((intptr_t)now_by());
}

TEST_SKIP(a_pinned_poller_stays, !may_open(2 * CROWD + 50)) {
    int made = 0;
    orch_loop_desc desc = {.poller = ORCH_POLLER_POLL};
    if (!may_open(2 * CROWD + 50)) return;
    while (made < CROWD && make_pair(crowd[made])) made++;
    if (made < CROWD) return;
    orch_result r = orch_run_with(&desc, stay, NULL);
    CHECK_INT(orch_int(&r), ORCH_POLLER_POLL);
    orch_result_free(&r);
    for (int i = 0; i < CROWD; i++) close_pair(crowd[i]);
}

#ifndef NDEBUG
TEST_DIES(a_poller_that_the_system_lacks_is_refused, "orch_loop_new") {
    orch_loop_desc desc = {.poller = no_other() ? ORCH_POLLER_EPOLL : ORCH_POLLER_KQUEUE};
    CHECK(orch_loop_new(&desc) == NULL);
}
#endif

// ---- guest mode

typedef struct guest {
    orch_loop *loop;
    int fd[2];
    bool came;
} guest;

static bool guest_open(guest *g, orch_poller poller) {
    orch_loop_desc desc = {.poller = poller};
    g->loop = orch_loop_new(&desc);
    g->came = false;
    return CHECK(g->loop != NULL) && make_pair(g->fd);
}

static void guest_close(guest *g) {
    CHECK_INT(orch_loop_free(g->loop), 0);
    close_pair(g->fd);
}

// What a host does each time round.
static int guest_turn(orch_loop *loop, uint64_t most_ms) {
    struct pollfd fds[8];
    int count = orch_loop_pollfds(loop, fds, 8);
    uint64_t ms = orch_loop_timeout(loop);
    if (!CHECK(count >= 0 && count <= 8)) return -1;
    poll(fds, (nfds_t)count, (int)(ms < most_ms ? ms : most_ms));
    return orch_loop_dispatch(loop, fds, (size_t)count);
}

TEST(a_host_polls_for_the_loop) {
    guest g;
    struct pollfd fds[2] = {{-1, 0, 0}, {-1, 0, 0}};
    if (!guest_open(&g, test_poller())) return;
    orch_on(orch_ready(g.fd[0], ORCH_READABLE), set_true, &g.came);
    int count = orch_loop_pollfds(g.loop, fds, 2);
    // Another poller's own; or each descriptor, and what other threads wake the loop by.
    CHECK_INT(count, orch_loop_fd(g.loop) >= 0 ? 1 : 2);
    CHECK_INT(orch_loop_pollfds(g.loop, NULL, 0), count);
    CHECK(fds[0].events == POLLIN && fds[count - 1].events == POLLIN);
    CHECK(orch_loop_timeout(g.loop) == UINT64_MAX);
    CHECK_INT(orch_loop_dispatch(g.loop, fds, (size_t)count), 1);
    CHECK(!g.came);
    put(g.fd[1]);
    CHECK_INT(poll(fds, (nfds_t)count, patience()), 1);
    CHECK_INT(orch_loop_dispatch(g.loop, fds, (size_t)count), 0);
    CHECK(g.came);
    guest_close(&g);
}

TEST(a_hosts_timeout_is_the_next_timer) {
    guest g;
    if (!guest_open(&g, test_poller())) return;
    orch_on(orch_after(20), set_true, &g.came);
    uint64_t from = orch_now(), ms = orch_loop_timeout(g.loop);
    CHECK(ms > 10 && ms <= 20);
    CHECK_INT(orch_loop_dispatch(g.loop, NULL, 0), 1);
    CHECK(!g.came);
    while (!g.came && guest_turn(g.loop, 1000) == 1) continue;
    CHECK(g.came);
    CHECK(orch_now() - from >= 20);
    CHECK(orch_loop_timeout(g.loop) == UINT64_MAX);
    guest_close(&g);
}

static orch_result yield_often(void *arg) {
    for (int i = 0; i < 1000; i++) orch_yield();
    *(bool *)arg = true;
    return orch_ok(NULL, NULL);
}

TEST(a_dispatch_is_one_round) {
    guest g;
    int rounds = 0;
    if (!guest_open(&g, test_poller())) return;
    CHECK_INT(orch_spawn(yield_often, &g.came), 0);
    for (; rounds < 2000 && !g.came; rounds++) {
        CHECK(orch_loop_timeout(g.loop) == 0);
        CHECK(orch_loop_dispatch(g.loop, NULL, 0) >= 0);
    }
    CHECK(g.came && rounds >= 1000 / 128);
    guest_close(&g);
}

static void set_it(void *arg) { *(bool *)arg = true; }

static void *post_it(void *arg) {
    guest *g = arg;
    if (orch_post(g->loop, set_it, &g->came) != 0) put(g->fd[1]); // refused: another end
    return NULL;
}

// The host sleeps without a limit: only the post can end that. Without memory for what wakes it, it
// sleeps in short pieces.
TEST(a_post_wakes_the_host) {
    guest g;
    pthread_t thread;
    struct pollfd fds[8];
    if (!guest_open(&g, test_poller())) return;
    orch_on(orch_ready(g.fd[0], ORCH_READABLE), set_true, &(bool){false});
    int count = orch_loop_pollfds(g.loop, fds, 8);
    uint64_t ms = orch_loop_timeout(g.loop);
    CHECK(ms == UINT64_MAX);
    if (!CHECK(count > 0 && pthread_create(&thread, NULL, post_it, &g) == 0)) return;
    CHECK_INT(poll(fds, (nfds_t)count, ms == UINT64_MAX ? -1 : (int)ms), 1);
    while (!g.came && orch_loop_dispatch(g.loop, fds, (size_t)count) == 1) {
        count = orch_loop_pollfds(g.loop, fds, 8);
    }
    pthread_join(thread, NULL);
    CHECK(g.came);
    guest_close(&g);
}

// One that came before the host asked: it must not sleep.
TEST(a_post_before_the_host_asks) {
    guest g;
    if (!guest_open(&g, test_poller())) return;
    orch_on(orch_ready(g.fd[0], ORCH_READABLE), set_true, &(bool){false});
    post_it(&g);
    CHECK_INT(orch_loop_pollfds(g.loop, NULL, 0) > 0, 1);
    CHECK_INT(orch_loop_timeout(g.loop), 0);
    CHECK_INT(guest_turn(g.loop, 0), 1);
    CHECK(g.came);
    guest_close(&g);
}

TEST(a_host_hears_of_no_deadlock) {
    guest g;
    orch_promise p;
    if (!guest_open(&g, test_poller())) return;
    orch_on(orch_future_new(&p), set_true, &g.came);
    CHECK_INT(guest_turn(g.loop, 0), 0);
    CHECK(orch_settle(p, orch_ok(NULL, NULL))); // as the host may
    CHECK(orch_loop_timeout(g.loop) == 0);
    CHECK_INT(guest_turn(g.loop, 0), 0);
    CHECK(g.came);
    guest_close(&g);
}

// What was offered to the host is closed, and its number waited for anew, before the dispatch.
TEST(a_hosts_event_does_not_reach_the_next_owner) {
    guest g;
    int next[2];
    struct pollfd fds[2];
    bool old = false, young = false;
    if (!guest_open(&g, ORCH_POLLER_POLL)) return;
    orch_on(orch_ready(g.fd[0], ORCH_READABLE), set_true, &old);
    CHECK_INT(orch_loop_pollfds(g.loop, fds, 2), 2);
    put(g.fd[1]);
    CHECK_INT(poll(fds, 2, patience()), 1);
    CHECK_INT(orch_close(g.fd[0]), 0);
    if (!make_pair(next)) return;
    CHECK_INT(next[0], g.fd[0]);
    orch_on(orch_ready(next[0], ORCH_READABLE), set_true, &young);
    CHECK_INT(orch_loop_dispatch(g.loop, fds, 2), 1);
    CHECK(!old && !young);
    put(next[1]);
    while (!young && guest_turn(g.loop, 1000) == 1) continue;
    CHECK(young);
    CHECK_INT(orch_loop_free(g.loop), 0);
    close(g.fd[1]);
    close_pair(next);
}

TEST(a_hosts_nonsense_does_no_harm) {
    guest g;
    struct pollfd fds[3] = {{-1, POLLIN, POLLIN}, {INT32_MAX, 0, POLLIN}, {0, 0, -1}};
    if (!guest_open(&g, ORCH_POLLER_POLL)) return;
    orch_on(orch_ready(g.fd[0], ORCH_READABLE), set_true, &g.came);
    CHECK_INT(orch_loop_dispatch(g.loop, fds, 3), 1);
    CHECK(!g.came);
    CHECK_INT(orch_loop_fd(g.loop), -ENOTSUP);
    guest_close(&g);
}

TEST_SKIP(one_descriptor_stands_for_a_pinned_loop, no_other()) {
    guest g;
    if (!guest_open(&g, other()->id)) return;
    struct pollfd one = {orch_loop_fd(g.loop), POLLIN, 0};
    CHECK(one.fd >= 0);
    orch_on(orch_ready(g.fd[0], ORCH_READABLE), set_true, &g.came);
    CHECK_INT(orch_loop_dispatch(g.loop, NULL, 0), 1);
    CHECK_INT(poll(&one, 1, 0), 0);
    put(g.fd[1]);
    CHECK_INT(poll(&one, 1, patience()), 1);
    CHECK_INT(orch_loop_dispatch(g.loop, NULL, 0), 0);
    CHECK(g.came);
    guest_close(&g);
}

#ifndef NDEBUG
TEST_DIES(a_dispatch_of_nothing_counted_is_refused, "orch_loop_dispatch: invalid argument") {
    guest g;
    if (guest_open(&g, test_poller())) orch_loop_dispatch(g.loop, NULL, 3);
}

TEST_DIES(pollfds_into_nothing_are_refused, "orch_loop_pollfds: invalid argument") {
    guest g;
    if (guest_open(&g, test_poller())) orch_loop_pollfds(g.loop, NULL, 3);
}

TEST_DIES(a_virtual_clock_is_no_guest, "orch_loop_dispatch: invalid argument") {
    orch_loop_desc desc = {.clock = ORCH_CLOCK_VIRTUAL};
    orch_loop_dispatch(orch_loop_new(&desc), NULL, 0);
}

TEST_DIES(no_loop_has_no_descriptor, "orch_loop_fd: invalid argument") { orch_loop_fd(NULL); }
#endif

// ---- who comes first

static int reads;

static orch_result read_many(void *arg) {
    int fd = *(int *)arg;
    for (; reads < 1000; reads++)
        if (join(orch_ready(fd, ORCH_WRITABLE)) != ORCH_WRITABLE) break;
    return orch_ok_int(reads);
}

static bool read_stop;

static orch_result yield_on(void *arg) {
    (void)arg;
    uint64_t from = orch_now();
    while (!read_stop && orch_now() - from < 2000)
        if (orch_yield()) break;
    return orch_ok_int(1);
}

TASK_TEST(descriptors_are_served_while_others_only_yield) {
    int fd[2];
    if (!make_pair(fd)) return;
    orch_future *a = orch_go(yield_on, NULL), *b = orch_go(yield_on, NULL);
    for (int i = 0; i < 20; i++) {
        orch_future *f = orch_ready(fd[0], ORCH_READABLE);
        put(fd[1]);
        CHECK_INT(soon(f), ORCH_READABLE);
        drain(fd[0]);
    }
    read_stop = true;
    CHECK_INT(join(a), 1);
    CHECK_INT(join(b), 1);
    close_pair(fd);
}

TASK_TEST(busy_descriptors_hold_up_neither_timers_nor_tasks) {
    int fd[2], yields = 0;
    if (!make_pair(fd)) return;
    orch_future *f = orch_go(read_many, &fd[0]); // always writable
    CHECK_INT(orch_yield(), 0);
    while (yields < 1000000 && !orch_is_settled(f) && reads < 5) {
        yields++;
        if (orch_yield()) break;
    }
    CHECK(reads >= 5);
    CHECK(!orch_is_settled(f));
    int before = reads;
    CHECK_INT(orch_sleep(1), 0);
    CHECK(reads > before); // it went on meanwhile, and the timer fired before its 1,000 were done
    CHECK_INT(join(f), 1000);
    close_pair(fd);
}

// ---- muted entries of poll's array

static bool by_poll(void) {
    return test_poller() == ORCH_POLLER_DEFAULT || test_poller() == ORCH_POLLER_POLL;
}

static orchi_poller *array(void) { return &orch_loop_current()->poller; }

// Where a descriptor's entry is, plus one; 0: it has none.
static uint32_t place_of(int fd) {
    return (size_t)fd < array()->watch_count ? array()->watches[fd].position : 0;
}

static bool is_muted(int fd) { return place_of(fd) != 0 && place_of(fd) <= array()->muted; }

// Every entry has its watch, and the other way round; what nobody waits for is muted, and has no
// events then. How many are muted.
static uint32_t check_array(void) {
    const orchi_poller *p = array();
    uint32_t placed = 0;
    CHECK(p->muted <= p->seen && p->seen <= p->pass && p->pass <= p->count);
    for (uint32_t i = 0; i < p->count; i++) {
        bool wanted = orchi_wanted(&p->watches[p->fds[i].fd]) != 0;
        CHECK_INT(p->watches[p->fds[i].fd].position, i + 1);
        CHECK(wanted || i < p->muted);
        CHECK_INT(wanted, p->fds[i].events != 0);
    }
    for (size_t fd = 0; fd < p->watch_count; fd++) placed += p->watches[fd].position != 0;
    CHECK_INT(placed, p->count);
    return p->muted;
}

TASK_TEST_OF(an_event_mutes_an_entry_until_all_that_were_told_have_run, by_poll()) {
    int fd[2];
    if (!make_pair(fd)) return;
    put(fd[1]);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    uint32_t count = array()->count;
    if (place_of(fd[0]) == 0) return; // refused
    CHECK(is_muted(fd[0]));
    CHECK_INT(check_array(), 1);
    drain(fd[0]);
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    CHECK(is_muted(fd[0]));
    CHECK_INT(check_array(), 1);
    CHECK_INT(orch_sleep(1), 0); // nothing is ready: the loop looks at all
    CHECK(!is_muted(fd[0]));
    CHECK_INT(array()->count, count);
    CHECK_INT(check_array(), 0);
    orch_future *other = orch_ready(fd[0], ORCH_WRITABLE); // another direction, too
    CHECK_INT(array()->fds[place_of(fd[0]) - 1].events, POLLIN | POLLOUT);
    CHECK_INT(soon(other), ORCH_WRITABLE);
    orch_drop(f); // no event: nothing is left of it
    CHECK_INT(place_of(fd[0]), 0);
    CHECK_INT(check_array(), 0);
    close_pair(fd);
}

// The ring's positions go around after 2^32 resumptions, with the end of an old backlog left ahead.
TASK_TEST_OF(an_old_backlog_mutes_nothing, by_poll()) {
    int fd[2];
    if (!make_pair(fd)) return;
    put(fd[1]);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    drain(fd[0]);
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    orch_loop_current()->told = orch_loop_current()->ready.head + 100000;
    put(fd[1]);
    CHECK_INT(soon(f), ORCH_READABLE);
    close_pair(fd);
}

enum { BACKLOG = 200, LAPS = 50, COMING = 40 };

static int served[BACKLOG], least;
static int come[COMING][2];

// Serves its descriptor, which is always ready, and sees that nobody is a lap ahead.
static orch_result serve_laps(void *arg) {
    int i = (int)(intptr_t)arg;
    while (served[i] < LAPS) {
        orch_result r = orch_await(orch_ready(crowd[i][0], ORCH_READABLE));
        if (!CHECK_INT(orch_int(&r), ORCH_READABLE)) break;
        served[i]++;
        least = served[0];
        for (int k = 1; k < BACKLOG; k++) least = served[k] < least ? served[k] : least;
        CHECK(served[i] <= least + 1);
    }
    return orch_ok(NULL, NULL);
}

// Waits for a descriptor that is ready, closes it, and goes on with a new one.
static orch_result come_and_go(void *arg) {
    int *fd = come[(intptr_t)arg];
    while (least < LAPS && test_shared->refused == 0) {
        put(fd[1]);
        CHECK_INT(join(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
        orch_close(fd[0]), close(fd[1]);
        if (!make_pair(fd)) break;
    }
    return orch_ok(NULL, NULL);
}

// Who is told comes after all that were told before: so each is looked at once in a lap, in
// portions from the second lap on. Others that come and go meanwhile do not change that.
static orch_result serve_crowd(void *arg) {
    int coming = *(int *)arg;
    uint64_t before = array()->looked_at, looks = stats().polls;
    for (int i = 0; i < BACKLOG; i++) {
        put(crowd[i][1]);
        orch_detach(orch_go(serve_laps, (void *)(intptr_t)i));
    }
    for (int i = 0; i < coming; i++) orch_detach(orch_go(come_and_go, (void *)(intptr_t)i));
    while (least < LAPS && test_shared->refused == 0) orch_sleep(1);
    if (test_shared->refused > 0) return orch_ok_int(1);
    looks = stats().polls - looks;
    CHECK(array()->looked_at - before < (uint64_t)(LAPS * (BACKLOG + 2 * coming + BACKLOG / 2)));
    CHECK(array()->looked_at - before < looks * (ORCHI_PORTION + BACKLOG / 8));
    return orch_ok_int(1);
}

static void try_crowd(int coming) {
    int made = 0;
    orch_loop_desc desc = {.poller = ORCH_POLLER_POLL};
    while (made < BACKLOG && make_pair(crowd[made])) made++;
    for (int i = 0; i < coming; i++) made += make_pair(come[i]);
    if (made < BACKLOG + coming) return;
    orch_result r = orch_run_with(&desc, serve_crowd, &coming);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    for (int i = 0; i < BACKLOG; i++) close_pair(crowd[i]);
    for (int i = 0; i < coming; i++) close_pair(come[i]);
}

TEST_SKIP(a_backlog_is_served_before_its_descriptors_are_looked_at_again,
          !may_open(2 * BACKLOG + 50)) {
    try_crowd(0);
}

TEST_SKIP(nobody_gets_ahead_where_descriptors_come_and_go, !may_open(2 * (BACKLOG + COMING) + 50)) {
    try_crowd(COMING);
}

// In the middle of a pass nothing is ready any more, but one that this pass has seen already.
TASK_TEST_OF(a_loop_that_sleeps_looks_at_what_it_has_seen_as_well,
             may_open(2 * BACKLOG + 50) && by_poll()) {
    static orch_future *f[BACKLOG];
    int made = 0, seen = 0;
    while (made < BACKLOG && make_pair(crowd[made])) made++;
    for (int i = 0; i < 2 * made && test_shared->refused == 0; i++) {
        int *fd = crowd[i % made]; // seen at once, and again in portions
        if (i < made) put(fd[1]);
        else CHECK_INT(join(f[i % made]), ORCH_READABLE);
        f[i % made] = orch_ready(fd[0], ORCH_READABLE);
    }
    orch_sleep(0);
    while (seen < made && !orch_is_settled(f[seen])) seen++;
    for (int i = 0; i < made; i++) drain(crowd[i][0]);
    if (test_shared->refused == 0 && CHECK(seen < made) && CHECK(orchi_poll_passing(array()))) {
        CHECK_INT(join(f[seen]), ORCH_READABLE);
        f[seen] = orch_ready(crowd[seen][0], ORCH_READABLE);
        put(crowd[seen][1]);
        CHECK(is_muted(crowd[seen][0]));
        CHECK_INT(soon(orch_ref(f[seen])), ORCH_READABLE);
    }
    for (int i = 0; i < made; i++) orch_drop(f[i]);
    for (int i = 0; i < made; i++) close_pair(crowd[i]);
}

TASK_TEST_OF(closing_takes_a_muted_entry_out, by_poll()) {
    int fd[2], next[2];
    if (!make_pair(fd)) return;
    put(fd[1]);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(place_of(fd[0]), 0);
    CHECK_INT(check_array(), 0);
    if (!make_pair(next)) return;
    CHECK_INT(next[0], fd[0]);
    put(next[1]);
    CHECK_INT(soon(orch_ready(next[0], ORCH_READABLE)), ORCH_READABLE);
    close(next[0]), close(next[1]); // behind its back: what is muted belongs to nobody
    CHECK_INT(orch_sleep(1), 0);
    if (!CHECK_INT(orch_socketpair(next), 0)) return;
    CHECK_INT(place_of(next[0]), 0);
    CHECK_INT(check_array(), 0);
    CHECK_INT(orch_close(next[0]) | orch_close(next[1]), 0);
    close(fd[1]);
}

TASK_TEST_OF(what_stays_muted_is_swept_out_by_an_idle_loop, by_poll()) {
    enum { COUNT = 20, WAITING = 4 };
    static orch_future *f[COUNT];
    int made = 0;
    while (made < COUNT && make_pair(pairs[made])) made++;
    if (made < COUNT) return;
    for (int i = 0; i < COUNT; i++) f[i] = orch_ready(pairs[i][0], ORCH_READABLE);
    for (int i = 0; i < COUNT; i++) put(pairs[(i * 7) % COUNT][1]);
    for (int i = 0; i < COUNT; i++) CHECK_INT(soon(f[i]), ORCH_READABLE);
    CHECK_INT(check_array(), COUNT); // all in one look
    for (int i = 0; i < WAITING; i++) {
        drain(pairs[i * 3][0]);
        f[i] = orch_ready(pairs[i * 3][0], ORCH_READABLE);
    }
    CHECK_INT(check_array(), COUNT);
    orch_future *busy = orch_go(yield_on, NULL);
    for (int i = 0; i < 300; i++) orch_yield();
    CHECK_INT(check_array(), COUNT - WAITING); // they may be waited for any moment
    read_stop = true;
    CHECK_INT(join(busy), 1);
    CHECK_INT(orch_sleep(1), 0);
    CHECK_INT(check_array(), 0);
    CHECK(array()->count <= WAITING + 1);
    for (int i = 0; i < WAITING; i++) {
        put(pairs[i * 3][1]);
        CHECK_INT(soon(f[i]), ORCH_READABLE); // the entries that moved are found
    }
    for (int i = 0; i < COUNT; i++) close_pair(pairs[i]);
}

// Waits that begin, end, are given up, several events in a look, descriptors that are closed and
// made again: in any order the array is whole, and nobody misses an event.
TASK_TEST_OF(the_array_stays_whole_whatever_comes, by_poll()) {
    enum { COUNT = 24 };
    static orch_future *f[COUNT];
    uint32_t state = 11;
    int made = 0;
    while (made < COUNT && make_pair(pairs[made])) made++;
    for (int step = 0; step < 4000 && made == COUNT; step++) {
        state = state * 1664525u + 1013904223u;
        int at = (int)((state >> 20) % COUNT), *fd = pairs[at];
        switch (state >> 16 & 7) {
        case 0:
        case 1:
        case 2:
            if (f[at] == NULL) f[at] = orch_ready(fd[0], state >> 8 & 1 ? BOTH : ORCH_READABLE);
            break;
        case 3:
        case 4: put(fd[1]); break;
        case 5:
            orch_drop(f[at]);
            f[at] = NULL;
            break;
        case 6:
            drain(fd[0]);
            orch_close(fd[0]), close(fd[1]);
            orch_drop(f[at]);
            f[at] = NULL;
            made = make_pair(fd) ? COUNT : at;
            break;
        default:
            orch_sleep(0); // a look
            for (uint32_t i = 0; i < array()->muted; i++) CHECK_INT(array()->fds[i].events, 0);
        }
        check_array();
        if (f[at] == NULL || !orch_is_settled(f[at])) continue;
        if (test_shared->refused == 0) CHECK(join(f[at]) > 0);
        else orch_drop(f[at]);
        f[at] = NULL;
    }
    for (int i = 0; i < COUNT; i++) {
        if (f[i] != NULL && made == COUNT && put(pairs[i][1])) CHECK(soon(f[i]) != 0);
        else orch_drop(f[i]);
        f[i] = NULL;
    }
    CHECK_INT(stats().watched, 0);
    for (int i = 0; i < made; i++) close_pair(pairs[i]);
}

// The same where many are ready, so that they are looked at in portions.
TASK_TEST_OF(nor_do_portions_break_it, may_open(2 * BACKLOG + 50) && by_poll()) {
    static orch_future *f[BACKLOG];
    uint32_t state = 5, passing = 0;
    int made = 0;
    while (made < BACKLOG && make_pair(crowd[made])) made++;
    for (int step = 0; step < 1000 && made == BACKLOG; step++) {
        state = state * 1664525u + 1013904223u;
        int at = (int)((state >> 8) % BACKLOG), *fd = crowd[at];
        for (int i = 0; i < BACKLOG; i++) {
            if (f[i] != NULL && orch_is_settled(f[i])) orch_drop(f[i]), f[i] = NULL;
            if (f[i] == NULL) f[i] = orch_ready(crowd[i][0], ORCH_READABLE);
            if (step % 50 == 0 && i % 5 != 0) put(crowd[i][1]);
            if (step % 50 == 45) drain(crowd[i][0]);
        }
        if (state >> 24 & 1) orch_sleep(0);
        check_array();
        passing += orchi_poll_passing(array());
        orch_drop(f[at]);
        f[at] = NULL;
        if (state >> 25 & 1) continue;
        orch_close(fd[0]), close(fd[1]);
        made = make_pair(fd) ? BACKLOG : at;
    }
    if (test_shared->refused == 0) CHECK(passing > 100);
    for (int i = 0; i < BACKLOG; i++) {
        if (f[i] != NULL && made == BACKLOG && put(crowd[i][1])) CHECK(soon(f[i]) != 0);
        else orch_drop(f[i]);
        f[i] = NULL;
    }
    for (int i = 0; i < made; i++) close_pair(crowd[i]);
}

TASK_TEST_OF(muted_entries_do_not_come_along_to_another_poller, !no_other() && by_poll()) {
    int fd[2], quiet[2];
    if (!make_pair(fd) || !make_pair(quiet)) return;
    orch_future *f = orch_ready(quiet[0], ORCH_READABLE);
    put(fd[1]);
    CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
    if (place_of(fd[0]) && orchi_poller_move(orch_loop_current(), other()) == 0) {
        CHECK_INT(array()->muted, 0);
        CHECK(array()->watches[fd[0]].armed == 0);
        CHECK_INT(soon(orch_ready(fd[0], ORCH_READABLE)), ORCH_READABLE);
        if (CHECK_INT(orchi_poller_move(orch_loop_current(), &orchi_poll_ops), 0)) check_array();
    }
    put(quiet[1]);
    CHECK_INT(soon(f), ORCH_READABLE);
    close_pair(fd);
    close_pair(quiet);
}

TEST(a_host_is_not_given_muted_entries) {
    struct pollfd fds[8];
    int fd[2];
    orch_loop_desc desc = {.poller = ORCH_POLLER_POLL};
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL) || !make_pair(fd)) return;
    put(fd[1]);
    orch_on(orch_ready(fd[0], ORCH_READABLE), set_true, &(bool){false});
    orch_loop_step(loop, 100);
    CHECK_INT(check_array(), 1);
    int count = orch_loop_pollfds(loop, fds, 8);
    for (int i = 0; i < count; i++) CHECK(fds[i].fd >= 0 && fds[i].fd != fd[0]);
    CHECK_INT(check_array(), 0);
    CHECK_INT(orch_loop_free(loop), 0);
    close_pair(fd);
}

// ---- signals

static pthread_t sleeper_thread;
static volatile sig_atomic_t signals_seen;
static int signals_stop;

static void count_signal(int number) {
    (void)number;
    signals_seen++;
}

static void *send_signals(void *arg) {
    (void)arg;
    for (int i = 0; i < 10000 && !__atomic_load_n(&signals_stop, __ATOMIC_ACQUIRE); i++) {
        pthread_kill(sleeper_thread, SIGUSR1);
        nanosleep(&(struct timespec){0, 300000}, NULL);
    }
    return NULL;
}

static orch_result sleep_through_signals(void *arg) {
    const int *fd = arg;
    uint64_t from = orch_now();
    CHECK_INT(orch_sleep(30), 0);
    CHECK(orch_now() - from >= 30);
    CHECK(orch_now() - from < 1000); // a time-out started anew at every signal would last 3 s
    CHECK_INT(join(orch_timeout(orch_ready(fd[0], ORCH_READABLE), 20)), ORCH_ETIMEDOUT);
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    CHECK_INT(orch_sleep(5), 0);
    CHECK(!orch_is_settled(f)); // EINTR is nobody's result
    put(fd[1]);
    CHECK_INT(soon(f), ORCH_READABLE);
    return orch_ok_int(1);
}

TEST(signals_are_invisible) {
    pthread_t sender;
    struct sigaction action;
    int fd[2];
    memset(&action, 0, sizeof action);
    action.sa_handler = count_signal; // without SA_RESTART
    sigaction(SIGUSR1, &action, NULL);
    sleeper_thread = pthread_self();
    if (!make_pair(fd) || !CHECK(pthread_create(&sender, NULL, send_signals, NULL) == 0)) return;
    orch_result r = run_on_poller(sleep_through_signals, fd);
    __atomic_store_n(&signals_stop, 1, __ATOMIC_RELEASE);
    pthread_join(sender, NULL);
    CHECK_INT(orch_int(&r), 1);
    CHECK(signals_seen > 10);
    orch_result_free(&r);
    close_pair(fd);
}

static orch_result wait_without_timer(void *arg) {
    return orch_ok_int(join(orch_ready(*(int *)arg, ORCH_READABLE)));
}

static void *write_later(void *arg) {
    for (int i = 0; i < 20; i++) {
        pthread_kill(sleeper_thread, SIGUSR1);
        nanosleep(&(struct timespec){0, 300000}, NULL);
    }
    return write(*(int *)arg, "x", 1) == 1 ? NULL : arg; // no CHECK in another thread
}

TEST(a_wait_without_any_timer_outlasts_signals) {
    pthread_t sender;
    struct sigaction action;
    int fd[2];
    memset(&action, 0, sizeof action);
    action.sa_handler = count_signal;
    sigaction(SIGUSR1, &action, NULL);
    sleeper_thread = pthread_self();
    if (!make_pair(fd) || !CHECK(pthread_create(&sender, NULL, write_later, &fd[1]) == 0)) return;
    orch_result r = run_on_poller(wait_without_timer, fd);
    pthread_join(sender, NULL);
    CHECK_INT(orch_int(&r), ORCH_READABLE);
    orch_result_free(&r);
    close_pair(fd);
}

// ---- the loop's own descriptor

static int wakes;

static void on_wake(orch_loop *loop) {
    (void)loop;
    wakes++;
    drain(wakes_fd[0]);
}

static orch_result sleep_and_wake(void *arg) {
    (void)arg;
    orch_loop_current()->on_wake = on_wake;
    CHECK_INT(orchi_wake_watch(orch_loop_current(), wakes_fd[0]), 0);
    CHECK_INT(stats().watched, 0);
    put(wakes_fd[1]);
    CHECK_INT(orch_sleep(5), 0);
    CHECK_INT(wakes, 1);
    put(wakes_fd[1]); // it stays armed
    CHECK_INT(orch_sleep(5), 0);
    CHECK_INT(wakes, 2);
    return orch_await(orch_future_new(&(orch_promise){0})); // and is nobody's wait
}

TEST(a_wake_descriptor_is_always_watched_and_nobodys_wait) {
    if (!make_pair(wakes_fd)) return;
    orch_loop_desc desc = {.poller = test_poller(), .on_report = ignore_report};
    orch_result r = orch_run_with(&desc, sleep_and_wake, NULL);
    CHECK_INT(r.error, ORCH_EDEADLK);
    CHECK_INT(wakes, 2);
    orch_result_free(&r);
    close_pair(wakes_fd);
}

// ---- what is left registered

static orch_result leave_registered(void *arg) {
    const int *fd = arg;
    orch_detach(orch_ready(fd[0], ORCH_READABLE));
    CHECK_INT(orch_spawn(wait_for_byte, (void *)(uintptr_t)&fd[1]), 0);
    CHECK_INT(stats().watched, 2);
    return orch_ok_int(1);
}

TEST(the_end_of_the_loop_ends_all_waits) {
    int fd[2];
    if (!make_pair(fd)) return;
    orch_result r = run_on_poller(leave_registered, fd);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    close_pair(fd);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
