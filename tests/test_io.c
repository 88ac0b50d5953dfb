// test_io.c: the calls of tasks on descriptors, each under the poller of TEST_POLLER; and the
// reader of lines. System calls go through counters that can also interrupt and shorten them.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

static struct io_calls {
    long reads, writes; // system calls
    int interrupt;      // so many of the next ones are interrupted
    size_t most;        // bytes that a write takes; 0: any
} io;

static int io_interrupted(void) {
    if (io.interrupt <= 0) return 0;
    io.interrupt--;
    errno = EINTR;
    return 1;
}

static size_t io_size(size_t size) { return io.most > 0 && size > io.most ? io.most : size; }

static ssize_t io_recv(int fd, void *data, size_t size, int flags) {
    io.reads++;
    return io_interrupted() ? -1 : recv(fd, data, size, flags);
}

static ssize_t io_read(int fd, void *data, size_t size) {
    io.reads++;
    return io_interrupted() ? -1 : read(fd, data, size);
}

static ssize_t io_send(int fd, const void *data, size_t size, int flags) {
    io.writes++;
    return io_interrupted() ? -1 : send(fd, data, io_size(size), flags);
}

static ssize_t io_writev(int fd, const struct iovec *parts, int count) {
    io.writes++;
    return io_interrupted() ? -1 : writev(fd, parts, count);
}

#define recv io_recv
#define read io_read
#define send io_send
#define writev io_writev
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#undef recv
#undef read
#undef send
#undef writev
#include "pollers.h"
#include "test.h"

// How many descriptors are open: each case leaves as many as there were.
static int open_count(void) {
    int count = 0;
    for (int fd = 0; fd < 256; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

// The body runs as the main task of a loop of its own, of the poller asked for. Where memory is
// refused, what it waits for may never come: a deadline ends that.
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

static void run_body(orch_task_fn main, orch_clock clock) {
    int before = open_count();
    orch_loop_desc desc = {.poller = test_poller(), .clock = clock};
    orch_result r = orch_run_with(&desc, main, NULL);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    CHECK_INT(open_count(), before);
}

#define TASK_TEST_ON(name, clock)                                                                  \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        return run_within(name##_body);                                                            \
    }                                                                                              \
    TEST(name) { run_body(name##_main, clock); }                                                   \
    static void name##_body(void)
#define TASK_TEST(name) TASK_TEST_ON(name, ORCH_CLOCK_MONOTONIC)

// Awaits: the number the future ended with, or its error.
static intptr_t join(orch_future *f) {
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

static intptr_t soon(orch_future *f) { return join(orch_timeout(f, 3000)); }

static bool two(int fd[2]) { return CHECK_INT(orch_socketpair(fd), 0); }

static void close_two(const int fd[2]) {
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(orch_close(fd[1]), 0);
}

// A call in a task of its own.
typedef struct job {
    int fd;
    char *data;
    size_t size;
    uint64_t pause; // ms before it
    bool closes;    // the descriptor after it
} job;

static orch_result do_read(void *arg) {
    job *j = arg;
    if (j->pause > 0) orch_sleep(j->pause);
    ptrdiff_t n = orch_read(j->fd, j->data, j->size);
    return n < 0 ? orch_fail((int)n) : orch_ok_int(n);
}

static orch_result do_read_full(void *arg) {
    job *j = arg;
    ptrdiff_t n = orch_read_full(j->fd, j->data, j->size);
    return n < 0 ? orch_fail((int)n) : orch_ok_int(n);
}

static orch_result do_write(void *arg) {
    job *j = arg;
    if (j->pause > 0) orch_sleep(j->pause);
    ptrdiff_t n = orch_write(j->fd, j->data, j->size);
    if (j->closes) orch_close(j->fd);
    return n < 0 ? orch_fail((int)n) : orch_ok_int(n);
}

static char *pattern(size_t size, unsigned seed) {
    char *data = malloc(size);
    if (data == NULL) return NULL;
    for (size_t i = 0; i < size; i++) data[i] = (char)((seed = seed * 1103515245u + 12345u) >> 16);
    return data;
}

// ---- reading

TASK_TEST(read_gives_what_is_there) {
    int fd[2];
    char data[16] = "";
    if (!two(fd)) return;
    CHECK_INT(orch_write(fd[1], "hello", 5), 5);
    CHECK_INT(orch_read(fd[0], data, 2), 2);
    CHECK_INT(orch_read(fd[0], data + 2, sizeof data - 2), 3);
    CHECK_STR(data, "hello");
    CHECK_INT(orch_read(fd[0], data, 0), 0);
    CHECK_INT(orch_read(fd[0], NULL, 0), 0);
    CHECK_INT(shutdown(fd[1], SHUT_WR), 0);
    CHECK_INT(orch_read(fd[0], data, 1), 0);
    CHECK_INT(orch_read(fd[0], data, 1), 0); // the end stays
    close_two(fd);
}

static void check_waits(const int fd[2]) {
    char data[8] = "";
    job j = {fd[0], data, sizeof data, 0, false};
    orch_future *f = orch_go(do_read, &j);
    CHECK_INT(orch_sleep(1), 0);
    CHECK(!orch_is_settled(f));
    CHECK_INT(orch_write(fd[1], "late", 4), 4);
    CHECK_INT(soon(f), 4);
    CHECK_STR(data, "late");
}

TASK_TEST(read_waits_until_something_comes) {
    int fd[2];
    if (two(fd)) check_waits(fd), close_two(fd);
    if (CHECK_INT(orch_pipe(fd), 0)) check_waits(fd), close_two(fd);
}

TASK_TEST(read_full_takes_several_pieces) {
    int fd[2];
    char data[8] = "";
    if (!two(fd)) return;
    job j = {fd[0], data, 7, 0, false};
    orch_future *f = orch_go(do_read_full, &j);
    for (const char *p = "abcdefghi"; *p != '\0'; p++) {
        CHECK_INT(orch_write(fd[1], p, 1), 1);
        orch_yield();
    }
    CHECK_INT(soon(f), 7);
    CHECK_STR(data, "abcdefg");
    CHECK_INT(shutdown(fd[1], SHUT_WR), 0);
    CHECK_INT(orch_read_full(fd[0], data, 7), 2); // the end came first
    CHECK_INT(memcmp(data, "hicdefg", 7), 0);
    CHECK_INT(orch_read_full(fd[0], data, 7), 0);
    close_two(fd);
}

TASK_TEST(a_request_costs_one_recv_and_one_send) {
    int fd[2];
    char data[64], back[64];
    memset(data, 'x', sizeof data);
    if (!two(fd)) return;
    job j = {fd[0], back, sizeof back, 0, false};
    orch_future *f = orch_go(do_read, &j); // is told EAGAIN once
    orch_yield();
    CHECK_INT(orch_write(fd[1], data, 10), 10);
    CHECK_INT(soon(f), 10);
    io.reads = io.writes = 0;
    for (int i = 0; i < 20; i++) {
        f = orch_go(do_read, &j);
        orch_yield();
        CHECK_INT(orch_write(fd[1], data, 10), 10);
        CHECK_INT(soon(f), 10);
    }
    CHECK_INT(io.reads, 20);
    CHECK_INT(io.writes, 20);
    close_two(fd);
}

static volatile int turns;

static orch_result take_turns(void *arg) {
    (void)arg;
    while (orch_yield() == 0) turns++;
    return orch_fail(ORCH_ECANCELED);
}

TASK_TEST(who_never_waits_lets_others_run) {
    int fd[2];
    char data[2000] = "";
    if (!two(fd)) return;
    CHECK_INT(orch_write(fd[1], data, sizeof data), sizeof data);
    turns = 0;
    orch_future *f = orch_go(take_turns, NULL);
    for (size_t i = 0; i < sizeof data; i++) CHECK_INT(orch_read(fd[0], data, 1), 1);
    CHECK(turns >= 10);
    orch_drop(f);
    close_two(fd);
}

// ---- writing

// Writes much while somebody reads it in small pieces: it comes as it was sent.
static void check_order(const int fd[2], size_t size) {
    char *data = pattern(size, 7), *back = malloc(size);
    job w = {fd[1], data, size, 0, false}, r = {fd[0], back, size, 0, false};
    if (CHECK(data != NULL && back != NULL)) {
        orch_future *writer = orch_go(do_write, &w), *reader = orch_go(do_read_full, &r);
        CHECK_INT(soon(writer), size);
        CHECK_INT(soon(reader), size);
        CHECK_INT(memcmp(data, back, size), 0);
    }
    free(data), free(back);
}

TASK_TEST(partial_writes_keep_order) {
    int fd[2];
    if (two(fd)) check_order(fd, 1 << 20), close_two(fd);
    if (CHECK_INT(orch_pipe(fd), 0)) check_order(fd, 1 << 20), close_two(fd);
    io.most = 1000;
    if (two(fd)) check_order(fd, 100000), close_two(fd);
    io.most = 0;
}

TASK_TEST(interruptions_are_invisible) {
    int fd[2];
    char data[4] = "";
    if (!two(fd)) return;
    io.interrupt = 3;
    CHECK_INT(orch_write(fd[1], "abc", 3), 3);
    io.interrupt = 3;
    CHECK_INT(orch_read(fd[0], data, 3), 3);
    CHECK_STR(data, "abc");
    close_two(fd);
    if (!CHECK_INT(orch_pipe(fd), 0)) return;
    io.interrupt = 3;
    CHECK_INT(orch_write(fd[1], "def", 3), 3);
    io.interrupt = 3;
    CHECK_INT(orch_read_full(fd[0], data, 3), 3);
    CHECK_STR(data, "def");
    close_two(fd);
}

static void check_parts(const int fd[2]) {
    enum { PARTS = 100 };
    struct iovec parts[PARTS], back[3];
    size_t size = 0;
    char *data = pattern(PARTS * PARTS * 30, 3), *copy = malloc(PARTS * PARTS * 30);
    for (size_t i = 0; data && i < PARTS; i++) { // the first is empty
        parts[i].iov_base = data + size;
        parts[i].iov_len = i * 50;
        size += i * 50;
    }
    job r = {fd[0], copy, size, 0, false};
    if (CHECK(data && copy)) {
        orch_future *reader = orch_go(do_read_full, &r);
        CHECK_INT(orch_writev(fd[1], parts, PARTS), size);
        CHECK_INT(soon(reader), size);
        CHECK_INT(memcmp(data, copy, size), 0);
        CHECK_INT(orch_write(fd[1], "abcdefgh", 8), 8);
        memset(copy, 0, 10);
        back[0] = (struct iovec){copy, 3};
        back[1] = (struct iovec){copy + 3, 0};
        back[2] = (struct iovec){copy + 3, 100};
        CHECK_INT(orch_readv(fd[0], back, 3), 8);
        CHECK_INT(memcmp(copy, "abcdefgh", 9), 0);
        CHECK_INT(orch_writev(fd[1], NULL, 0), 0);
    }
    free(data), free(copy);
}

TASK_TEST(parts_are_gathered_and_scattered) {
    int fd[2];
    if (two(fd)) check_parts(fd), close_two(fd);
    if (CHECK_INT(orch_pipe(fd), 0)) check_parts(fd), close_two(fd);
}

TASK_TEST(a_readv_waits_like_a_read) {
    int fd[2];
    char data[4] = "";
    struct iovec part = {data, 3};
    if (!two(fd)) return;
    job w = {fd[1], (char[]){"xyz"}, 3, 1, false};
    orch_future *f = orch_go(do_write, &w);
    CHECK_INT(orch_readv(fd[0], &part, 1), 3);
    CHECK_STR(data, "xyz");
    CHECK_INT(soon(f), 3);
    close_two(fd);
}

// ---- nobody reads

static bool is_blocked(int number) {
    sigset_t set;
    sigprocmask(SIG_BLOCK, NULL, &set);
    return sigismember(&set, number) == 1;
}

static bool is_pending(int number) {
    sigset_t set;
    sigpending(&set);
    return sigismember(&set, number) == 1;
}

TASK_TEST(a_broken_pipe_is_an_error_and_no_signal) {
    int fd[2];
    struct iovec part = {"x", 1};
    if (!CHECK_INT(orch_pipe(fd), 0)) return;
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(orch_write(fd[1], "x", 1), -EPIPE);
    CHECK_INT(orch_writev(fd[1], &part, 1), -EPIPE);
    CHECK(!is_blocked(SIGPIPE));
    CHECK_INT(orch_close(fd[1]), 0);
    if (!two(fd)) return;
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(orch_write(fd[1], "x", 1), -EPIPE);
    CHECK_INT(orch_writev(fd[1], &part, 1), -EPIPE);
    CHECK_INT(orch_close(fd[1]), 0);
}

// A number that was a file's, and now is a pipe's.
TASK_TEST(a_pipe_behind_the_librarys_back_raises_no_signal) {
    int fd[2], file = open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (file < 0) file = open("/dev/null", O_WRONLY | O_CLOEXEC);
    CHECK_INT(orch_write(file, "x", 1), 1);
    close(file);
    if (!CHECK_INT(pipe(fd), 0)) return;
    CHECK_INT(orch_nonblock(fd[0]) | orch_nonblock(fd[1]), 0);
    int kept = dup(fd[0] == file ? fd[1] : fd[0]);
    CHECK_INT(dup2(fd[1], file), file);
    CHECK_INT(orch_close(fd[1]) | (fd[0] == file ? 0 : orch_close(fd[0])) | orch_close(kept), 0);
    CHECK_INT(orch_write(file, "x", 1), -EPIPE);
    CHECK_INT(orch_close(file), 0);
}

TASK_TEST(a_sigpipe_of_the_programs_own_is_left_pending) {
    int fd[2];
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    sigprocmask(SIG_BLOCK, &set, NULL);
    if (!CHECK_INT(orch_pipe(fd), 0)) return;
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(orch_write(fd[1], "x", 1), -EPIPE);
    CHECK(!is_pending(SIGPIPE));
    CHECK(is_blocked(SIGPIPE));
    raise(SIGPIPE);
    CHECK_INT(orch_write(fd[1], "x", 1), -EPIPE);
    CHECK(is_pending(SIGPIPE));
    CHECK_INT(orch_close(fd[1]), 0);
}

TASK_TEST(a_writer_that_waits_hears_that_the_reader_went) {
    int fd[2];
    char *data = pattern(1 << 20, 1);
    if (!CHECK(data != NULL) || !CHECK_INT(orch_pipe(fd), 0)) {
        free(data);
        return;
    }
    job w = {fd[1], data, 1 << 20, 0, false};
    orch_future *f = orch_go(do_write, &w);
    CHECK_INT(orch_sleep(1), 0);
    CHECK_INT(orch_close(fd[0]), 0);
    CHECK_INT(soon(f), -EPIPE);
    CHECK_INT(orch_close(fd[1]), 0);
    free(data);
}

// ---- two in one direction, closing, cancelling

TASK_TEST(a_second_reader_is_told) {
    int fd[2];
    char data[4], other[4];
    if (!two(fd)) return;
    job a = {fd[0], data, 4, 0, false};
    orch_future *f = orch_go(do_read, &a);
    CHECK_INT(orch_read(fd[0], other, 1), ORCH_EBUSY);
    CHECK_INT(orch_write(fd[0], "!", 1), 1); // the other direction is free
    CHECK_INT(orch_write(fd[1], "ab", 2), 2);
    CHECK_INT(soon(f), 2);
    CHECK_INT(orch_write(fd[1], "c", 1), 1);
    CHECK_INT(orch_read(fd[0], other, 1), 1);
    close_two(fd);
}

TASK_TEST(a_second_writer_cannot_come_between) {
    int fd[2];
    size_t size = 1 << 20;
    char *data = pattern(size, 5), *back = malloc(size + 1);
    if (!CHECK(data && back) || !two(fd)) {
        free(data), free(back);
        return;
    }
    job w = {fd[1], data, size, 0, false}, r = {fd[0], back, size, 0, false};
    orch_future *writer = orch_go(do_write, &w);
    CHECK_INT(orch_write(fd[1], "between", 7), ORCH_EBUSY);
    orch_future *reader = orch_go(do_read_full, &r);
    while (!orch_is_settled(writer)) { // also where its turn has not come yet
        ptrdiff_t n = orch_write(fd[1], "between", 7);
        if (n >= 0) break;
        CHECK_INT(n, ORCH_EBUSY);
        if (orch_yield() != 0) break;
    }
    CHECK_INT(soon(writer), size);
    CHECK_INT(soon(reader), size);
    CHECK_INT(memcmp(data, back, size), 0);
    close_two(fd);
    free(data), free(back);
}

TASK_TEST(closing_wakes_a_reader_and_a_writer) {
    int fd[2];
    char data[4], *much = pattern(1 << 20, 1);
    if (!CHECK(much != NULL) || !two(fd)) {
        free(much);
        return;
    }
    job r = {fd[0], data, 4, 0, false}, w = {fd[0], much, 1 << 20, 0, false};
    orch_future *reader = orch_go(do_read, &r), *writer = orch_go(do_write, &w);
    CHECK_INT(orch_sleep(1), 0);
    close_two(fd);
    CHECK_INT(soon(reader), ORCH_ECANCELED);
    CHECK_INT(soon(writer), ORCH_ECANCELED);
    free(much);
}

// The reader has been queued by an event, when its number gets another owner.
TASK_TEST(a_number_that_changes_hands_is_left_alone) {
    int fd[2], next[2];
    char data[8] = "", other[8] = "";
    if (!two(fd)) return;
    job r = {fd[0], data, sizeof data, 0, false};
    orch_future *first = orch_go(do_read, &r);
    orch_yield();
    orch_future *event = orch_ready(fd[1], ORCH_WRITABLE); // comes in the same look
    CHECK_INT(orch_write(fd[1], "old", 3), 3);
    CHECK_INT(soon(event), ORCH_WRITABLE);
    bool was_first = orch_is_settled(first);
    CHECK_INT(orch_close(fd[0]), 0);
    if (!two(next)) {
        orch_drop(first);
        return;
    }
    CHECK_INT(next[0], fd[0]);
    CHECK_INT(orch_write(next[1], "new", 3), 3);
    intptr_t n = soon(first);
    CHECK(was_first ? n == 3 : n == ORCH_ECANCELED);
    CHECK_STR(data, was_first ? "old" : "");
    CHECK_INT(orch_read(next[0], other, sizeof other), 3);
    CHECK_STR(other, "new");
    close_two(next);
    CHECK_INT(orch_close(fd[1]), 0);
}

static orch_result close_and_reopen(void *arg) {
    int *fd = arg;
    orch_close(fd[0]);
    CHECK_INT(orch_socketpair(fd + 2), 0);
    CHECK_INT(orch_write(fd[3], "new", 3), 3);
    return orch_ok_int(fd[2]);
}

// As above, and certainly: the closing task stands before the reader in the queue.
TASK_TEST(a_wait_that_was_over_does_not_read_from_the_next_owner) {
    int fd[4], other[2];
    char data[8] = "", rest[8] = "";
    if (!two(fd) || !two(other)) return;
    job r = {fd[0], data, sizeof data, 0, false};
    orch_future *reader = orch_go(do_read, &r);
    CHECK_INT(orch_write(fd[1], "old", 3), 3);
    orch_loop *loop = orch_loop_current();
    orchi_poll(loop, 0); // queues the reader
    CHECK_INT(join(orch_go(close_and_reopen, fd)), fd[0]);
    CHECK_INT(soon(reader), ORCH_ECANCELED);
    CHECK_STR(data, "");
    CHECK_INT(orch_read(fd[2], rest, sizeof rest), 3);
    CHECK_STR(rest, "new");
    close_two(fd + 2);
    close_two(other);
    CHECK_INT(orch_close(fd[1]), 0);
}

static size_t live_before;

static orch_result count_and_read(void *arg) {
    live_before = orch_loop_statistics(orch_loop_current()).futures;
    return do_read(arg);
}

TASK_TEST(a_task_that_reads_needs_no_future_for_it) {
    int fd[2];
    char data[8] = "";
    if (!two(fd)) return;
    job r = {fd[0], data, sizeof data, 0, false};
    orch_future *reader = orch_go(count_and_read, &r);
    size_t live = orch_loop_statistics(orch_loop_current()).futures;
    if (test_shared->refused == 0) CHECK_INT(live, live_before);
    CHECK_INT(orch_write(fd[1], "new", 3), 3);
    CHECK_INT(soon(reader), 3);
    close_two(fd);
}

// ---- calls that are made ahead

// Four readers that one look has found. The first that comes back may do something to the others.
static struct {
    int fd[4][2], other[2];
    orch_future *reader[4];
    char data[4][8];
    long reads[4]; // system calls when it came back
    void (*first)(int me);
} ahead;

static orch_result read_ahead(void *arg) {
    int me = (int)(intptr_t)arg;
    ptrdiff_t n = orch_read(ahead.fd[me][0], ahead.data[me], sizeof ahead.data[me]);
    void (*first)(int me) = ahead.first;
    ahead.reads[me] = io.reads;
    ahead.first = NULL;
    if (first != NULL) first(me);
    return n < 0 ? orch_fail((int)n) : orch_ok_int(n);
}

static bool ahead_begin(void (*first)(int me)) {
    memset(&ahead, 0, sizeof ahead);
    for (int i = 0; i < 4; i++) {
        if (!two(ahead.fd[i])) return false;
    }
    for (int i = 0; i < 4; i++) ahead.reader[i] = orch_go(read_ahead, (void *)(intptr_t)i);
    for (int i = 0; i < 4; i++) CHECK_INT(orch_write(ahead.fd[i][1], "new", 3), 3);
    orchi_poll(orch_loop_current(), 0); // queues the readers
    ahead.first = first;
    io.reads = 0;
    return true;
}

static void ahead_end(void) {
    for (int i = 0; i < 4; i++) close_two(ahead.fd[i]);
}

TASK_TEST(calls_of_all_who_were_told_are_made_in_a_row) {
    if (!ahead_begin(NULL)) return;
    for (int i = 0; i < 4; i++) {
        CHECK_INT(soon(ahead.reader[i]), 3);
        CHECK_STR(ahead.data[i], "new");
        CHECK(ahead.reads[i] == 4 || test_shared->refused);
    }
    ahead_end();
}

// The number gets another owner, who has something to read.
static void change_hands(int fd) {
    CHECK_INT(orch_close(fd), 0);
    if (!two(ahead.other)) return;
    CHECK_INT(ahead.other[0], fd);
    CHECK_INT(orch_write(ahead.other[1], "other", 5), 5);
}

static void check_other(void) {
    char data[8] = "";
    CHECK_INT(orch_read(ahead.other[0], data, sizeof data), 5);
    CHECK_STR(data, "other");
}

static void change_and_cancel(int me) {
    change_hands(ahead.fd[(me + 1) % 4][0]);
    orch_cancel(ahead.reader[(me + 2) % 4], ORCH_ECANCELED);
}

TASK_TEST(what_was_read_ahead_is_not_lost) {
    if (!ahead_begin(change_and_cancel)) return;
    for (int i = 0; i < 4; i++) {
        CHECK_INT(soon(ahead.reader[i]), 3);
        CHECK_STR(ahead.data[i], "new");
    }
    check_other();
    CHECK_INT(orch_close(ahead.other[1]), 0);
    ahead_end();
}

TASK_TEST(what_is_read_ahead_is_not_the_next_owners) {
    if (!ahead_begin(NULL)) return;
    change_hands(ahead.fd[1][0]);
    for (int i = 0; i < 4; i++) CHECK_INT(soon(ahead.reader[i]), i == 1 ? ORCH_ECANCELED : 3);
    CHECK_STR(ahead.data[1], "");
    check_other();
    CHECK_INT(orch_close(ahead.other[1]), 0);
    ahead_end();
}

TASK_TEST(a_wait_that_was_broken_off_reads_nothing_ahead) {
    char data[8] = "";
    if (!ahead_begin(NULL) || !two(ahead.other)) return;
    job r = {ahead.other[0], data, sizeof data, 0, false};
    orch_future *reader = orch_go(do_read, &r);
    orch_cancel(reader, ORCH_ECANCELED); // queues it behind the four
    CHECK_INT(orch_write(ahead.other[1], "other", 5), 5);
    for (int i = 0; i < 4; i++) CHECK_INT(soon(ahead.reader[i]), 3);
    CHECK_INT(soon(reader), ORCH_ECANCELED);
    check_other();
    close_two(ahead.other);
    ahead_end();
}

static void change_the_second(int me) {
    CHECK_INT(me, 0);
    change_hands(ahead.fd[1][0]);
}

// What the others were told of is taken by somebody else before their turn.
TASK_TEST(a_call_that_came_too_early_waits_on) {
    char data[8];
    if (!ahead_begin(change_the_second)) return;
    for (int i = 1; i < 4; i++) CHECK_INT(recv(ahead.fd[i][0], data, sizeof data, 0), 3);
    CHECK_INT(soon(ahead.reader[0]), 3);
    CHECK_INT(soon(ahead.reader[1]), ORCH_ECANCELED);
    CHECK_STR(ahead.data[1], "");
    check_other();
    for (int i = 2; i < 4; i++) {
        CHECK_INT(orch_write(ahead.fd[i][1], "late", 4), 4);
        CHECK_INT(soon(ahead.reader[i]), 4);
        CHECK_STR(ahead.data[i], "late");
    }
    CHECK_INT(orch_close(ahead.other[1]), 0);
    ahead_end();
}

static orch_result read_when_cancelled(void *arg) {
    int fd = *(int *)arg;
    char data[8];
    CHECK_INT(orch_read(fd, data, sizeof data), ORCH_ECANCELED);
    CHECK_INT(orch_read(fd, data, sizeof data), ORCH_ECANCELED); // has nothing yet
    orch_shield_begin();
    CHECK_INT(orch_read(fd, data, sizeof data), 3); // a shield may wait
    orch_shield_end();
    ptrdiff_t n = orch_write(fd, "bye", 3); // need not wait
    return n < 0 ? orch_fail((int)n) : orch_ok_int(n);
}

TASK_TEST(a_cancelled_task_is_refused_what_has_to_wait) {
    int fd[2];
    char data[8] = "";
    if (!two(fd)) return;
    orch_future *f = orch_go(read_when_cancelled, fd);
    orch_cancel(f, ORCH_ECANCELED);
    CHECK_INT(orch_sleep(1), 0);
    CHECK_INT(orch_write(fd[1], "now", 3), 3);
    CHECK_INT(soon(f), 3);
    CHECK_INT(orch_read(fd[1], data, sizeof data), 3);
    CHECK_STR(data, "bye");
    close_two(fd);
}

static orch_result read_what_is_there(void *arg) {
    char data[8];
    CHECK_INT(orch_sleep(1000), ORCH_ECANCELED);
    ptrdiff_t n = orch_read(*(int *)arg, data, sizeof data);
    return n < 0 ? orch_fail((int)n) : orch_ok_int(n);
}

TASK_TEST(a_cancelled_task_still_gets_what_is_there) {
    int fd[2];
    char data[100] = "";
    if (!two(fd)) return;
    CHECK_INT(orch_write(fd[1], data, 3), 3);
    CHECK_INT(orch_read(fd[0], data, sizeof data), 3); // short: the next one would wait first
    CHECK_INT(orch_write(fd[1], data, 5), 5);
    orch_future *f = orch_go(read_what_is_there, fd);
    orch_cancel(f, ORCH_ECANCELED);
    CHECK_INT(soon(f), 5);
    close_two(fd);
}

TASK_TEST_ON(a_deadline_ends_a_read, ORCH_CLOCK_VIRTUAL) {
    int fd[2];
    char data[4];
    orch_scope s;
    orch_scope_desc desc = {"reading", 1000, false};
    if (!two(fd)) return;
    uint64_t start = orch_now();
    if (orch_scope_open(&s, &desc) == 0) {
        CHECK_INT(orch_read(fd[0], data, sizeof data), ORCH_ECANCELED);
        orch_result r = orch_scope_close(&s);
        CHECK_INT(r.error, ORCH_ETIMEDOUT);
        orch_result_free(&r);
        CHECK_INT(orch_now() - start, 1000);
    }
    CHECK_INT(orch_write(fd[1], "x", 1), 1);
    CHECK_INT(orch_read(fd[0], data, sizeof data), 1); // and nothing of it is left
    close_two(fd);
}

// ---- descriptors of other kinds

TASK_TEST(a_blocking_pipe_does_not_block_the_loop) {
    int fd[2];
    char data[8] = "", *much = pattern(300000, 9), *back = malloc(300000);
    if (!CHECK(much && back) || !CHECK_INT(pipe(fd), 0)) {
        free(much), free(back);
        return;
    }
    job r = {fd[0], data, 4, 0, false};
    turns = 0;
    orch_future *busy = orch_go(take_turns, NULL), *f = orch_go(do_read, &r);
    CHECK_INT(orch_sleep(1), 0);
    CHECK(turns > 0);
    CHECK_INT(orch_write(fd[1], "blocks?", 7), 7);
    CHECK_INT(soon(f), 4);
    CHECK_INT(orch_read(fd[0], data, sizeof data), 3);
    job w = {fd[1], much, 300000, 0, false}, all = {fd[0], back, 300000, 0, false};
    orch_future *writer = orch_go(do_write, &w);
    CHECK_INT(orch_sleep(1), 0); // it is full, and we are here
    orch_future *reader = orch_go(do_read_full, &all);
    CHECK_INT(soon(writer), 300000);
    CHECK_INT(soon(reader), 300000);
    CHECK_INT(memcmp(much, back, 300000), 0);
    CHECK_INT(fcntl(fd[1], F_GETFL) & O_NONBLOCK, 0); // was left as it was
    orch_drop(busy);
    close_two(fd);
    free(much), free(back);
}

TASK_TEST(a_blocking_socket_does_not_block_the_loop) {
    int fd[2];
    if (!CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM, 0, fd), 0)) return;
    check_waits(fd);
    check_order(fd, 1 << 20);
    close_two(fd);
}

TASK_TEST(a_file_is_read_to_its_end) {
    char path[] = "/tmp/test_io.XXXXXX", data[16] = "";
    int fd = mkstemp(path);
    if (!CHECK(fd >= 0)) return;
    unlink(path);
    CHECK_INT(orch_write(fd, "in a file", 9), 9);
    CHECK_INT(lseek(fd, 0, SEEK_SET), 0);
    CHECK_INT(orch_read(fd, data, 4), 4);
    CHECK_INT(orch_read_full(fd, data + 4, 12), 5);
    CHECK_STR(data, "in a file");
    CHECK_INT(orch_read(fd, data, 4), 0);
    CHECK_INT(orch_close(fd), 0);
}

TASK_TEST(large_numbers_are_numbers) {
    int fd[2], high[2];
    char data[4] = "";
    struct rlimit limit = {4096, 4096};
    setrlimit(RLIMIT_NOFILE, &limit);
    if (!two(fd)) return;
    high[0] = fcntl(fd[0], F_DUPFD_CLOEXEC, 1500);
    high[1] = fcntl(fd[1], F_DUPFD_CLOEXEC, 2500);
    if (!CHECK(high[0] >= 1500 && high[1] >= 2500)) return;
    close_two(fd);
    check_waits(high);
    CHECK_INT(orch_write(high[0], "ok", 2), 2);
    CHECK_INT(orch_read(high[1], data, 4), 2);
    close_two(high);
}

TASK_TEST(pairs_are_private_and_do_not_block) {
    int fd[2];
    for (int i = 0; i < 2; i++) {
        if (!CHECK_INT(i == 0 ? orch_pipe(fd) : orch_socketpair(fd), 0)) return;
        for (int k = 0; k < 2; k++) {
            CHECK(fcntl(fd[k], F_GETFL) & O_NONBLOCK);
            CHECK(fcntl(fd[k], F_GETFD) & FD_CLOEXEC);
        }
        close_two(fd);
    }
    if (!CHECK_INT(pipe(fd), 0)) return;
    CHECK_INT(orch_nonblock(fd[0]), 0);
    CHECK_INT(orch_nonblock(fd[0]), 0);
    CHECK(fcntl(fd[0], F_GETFL) & O_NONBLOCK);
    CHECK(!(fcntl(fd[1], F_GETFL) & O_NONBLOCK));
    close_two(fd);
    CHECK_INT(orch_nonblock(fd[0]), -EBADF);
}

TASK_TEST(without_descriptors_there_is_no_pair) {
    int fd[2] = {-7, -7};
    struct rlimit all, none;
    getrlimit(RLIMIT_NOFILE, &all);
    none = all;
    none.rlim_cur = (rlim_t)dup(0); // the first number that is free
    close((int)none.rlim_cur);
    setrlimit(RLIMIT_NOFILE, &none);
    CHECK_INT(orch_pipe(fd), -EMFILE);
    CHECK_INT(orch_socketpair(fd), -EMFILE);
    CHECK_INT(fd[0], -7);
    CHECK_INT(fd[1], -7);
    setrlimit(RLIMIT_NOFILE, &all); // the leak check needs some
}

TASK_TEST(bad_descriptors_are_errors) {
    int fd[2];
    char data[4];
    struct iovec part = {data, 4};
    if (!two(fd)) return;
    close_two(fd);
    int bad[] = {fd[0], -1, INT_MIN, INT_MAX};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_INT(orch_read(bad[i], data, 4), -EBADF);
        CHECK_INT(orch_read_full(bad[i], data, 4), -EBADF);
        CHECK_INT(orch_write(bad[i], data, 4), -EBADF);
        CHECK_INT(orch_readv(bad[i], &part, 1), -EBADF);
        CHECK_INT(orch_writev(bad[i], &part, 1), -EBADF);
    }
    if (!CHECK_INT(orch_pipe(fd), 0)) return;
    CHECK_INT(orch_read(fd[1], data, 4), -EBADF); // the wrong end
    CHECK_INT(orch_write(fd[0], data, 4), -EBADF);
    close_two(fd);
}

// A number closed behind the library's back: what is known of it is old, and harmless.
TASK_TEST(what_is_known_of_a_number_may_be_old) {
    int fd[2];
    char data[4];
    if (!CHECK_INT(pipe(fd), 0)) return;
    CHECK_INT(orch_nonblock(fd[0]) | orch_nonblock(fd[1]), 0);
    CHECK_INT(orch_write(fd[1], "abc", 3), 3);
    CHECK_INT(orch_read(fd[0], data, 4), 3);
    close(fd[0]), close(fd[1]);
    if (!CHECK_INT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, fd), 0)) return;
    check_waits(fd);
    close(fd[0]), close(fd[1]);
    if (!CHECK_INT(pipe(fd), 0)) return;
    CHECK_INT(orch_nonblock(fd[0]) | orch_nonblock(fd[1]), 0);
    check_waits(fd);
    close_two(fd);
}

// ---- lines

// What a reader makes of a text that comes in pieces of `piece` bytes, as one string.
static char lines_seen[4096];

static const char *lines_of(const char *text, size_t size, size_t piece, size_t limit) {
    int fd[2];
    size_t used = 0;
    const char *line;
    ptrdiff_t n = 0;
    lines_seen[0] = '\0';
    if (!two(fd)) return "";
    orch_reader *r = orch_reader_new(fd[0], limit);
    job w = {fd[1], NULL, 0, 0, false};
    for (size_t at = 0; n != ORCH_EEND && used < sizeof lines_seen - 200;) {
        if (at < size) {
            w.size = size - at < piece ? size - at : piece;
            CHECK_INT(orch_write(fd[1], text + at, w.size), w.size);
            at += w.size;
            if (at == size) shutdown(fd[1], SHUT_WR);
            orch_scope s; // reads what is there, and no further
            if (orch_scope_open(&s, NULL) != 0) break;
            orch_scope_cancel(&s, ORCH_ECANCELED);
            while ((n = orch_reader_line(r, &line)) >= 0 || n == -EMSGSIZE) {
                used += (size_t)snprintf(lines_seen + used, sizeof lines_seen - used, "%d:%s|",
                                         (int)n, line);
            }
            orch_result closed = orch_scope_close(&s);
            orch_result_free(&closed);
            if (n != ORCH_EEND && !CHECK_INT(n, ORCH_ECANCELED)) break;
        } else if (!CHECK_INT(n, ORCH_EEND)) {
            break;
        }
    }
    CHECK_INT(orch_reader_line(r, &line), ORCH_EEND);
    orch_reader_free(r);
    close_two(fd);
    return lines_seen;
}

#define CHECK_LINES(text, limit, want)                                                             \
    for (size_t piece = 1; piece <= sizeof(text); piece = piece < 4 ? piece + 1 : piece * 3) {     \
        CHECK_STR(lines_of(text, sizeof(text) - 1, piece, limit), want);                           \
    }

TASK_TEST(lines_end_with_one_or_two_bytes) {
    CHECK_LINES("one\ntwo\r\n\nlast", 0, "3:one|3:two|0:|4:last|");
    CHECK_LINES("one\n", 0, "3:one|");
    CHECK_LINES("\r\n\r\n", 0, "0:|0:|");
    CHECK_LINES("a\rb\n\r", 0, "3:a\rb|1:\r|");
}

TASK_TEST(long_lines_are_told_and_skipped) {
    CHECK_LINES("12345\n123456\n12345\r\n1234567890\r\nx\n", 5,
                "5:12345|-90:12345|5:12345|-90:12345|1:x|");
    CHECK_LINES("1234567890123", 5, "-90:12345|");
    CHECK_LINES("123456", 5, "-90:12345|");
    CHECK_LINES("12345", 5, "5:12345|");
    CHECK_LINES("ab\nc\n", 1, "-90:a|1:c|");
}

TASK_TEST(a_line_without_an_end_can_be_given_up) {
    const char *line;
    orch_scope s;
    int fd = open("/dev/zero", O_RDONLY | O_NONBLOCK); // never has to be waited for
    if (!CHECK(fd >= 0)) return;
    orch_reader *r = orch_reader_new(fd, 100);
    if (orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 5}) == 0) {
        CHECK_INT(orch_reader_line(r, &line), -EMSGSIZE);
        CHECK_INT(orch_reader_line(r, &line), ORCH_ECANCELED);
        orch_result closed = orch_scope_close(&s);
        CHECK_INT(closed.error, ORCH_ETIMEDOUT);
        orch_result_free(&closed);
    }
    orch_reader_free(r);
    CHECK_INT(orch_close(fd), 0);
}

TASK_TEST(lines_of_nothing) {
    int fd[2];
    const char *line = NULL;
    if (!two(fd)) return;
    orch_reader *r = orch_reader_new(fd[0], SIZE_MAX);
    CHECK_INT(shutdown(fd[1], SHUT_WR), 0);
    CHECK_INT(orch_reader_line(r, &line), ORCH_EEND);
    CHECK_STR(line, "");
    orch_reader_free(r);
    orch_reader_free(NULL);
    close_two(fd);
}

TASK_TEST(lines_may_hold_zeros) {
    int fd[2];
    const char *line = NULL;
    if (!two(fd)) return;
    orch_reader *r = orch_reader_new(fd[0], 0);
    CHECK_INT(orch_write(fd[1], "a\0b\0\nc", 6), 6);
    if (CHECK_INT(orch_reader_line(r, &line), 4)) CHECK_INT(memcmp(line, "a\0b\0", 5), 0);
    orch_reader_free(r);
    close_two(fd);
}

TASK_TEST(a_long_line_makes_the_buffer_grow) {
    int fd[2];
    const char *line = NULL;
    char *data = malloc(50001);
    if (!CHECK(data != NULL) || !two(fd)) {
        free(data);
        return;
    }
    memset(data, 'y', 50000);
    data[50000] = '\n';
    job w = {fd[1], data, 50001, 0, true};
    orch_future *f = orch_go(do_write, &w);
    orch_reader *r = orch_reader_new(fd[0], 50000);
    CHECK_INT(orch_reader_line(r, &line), 50000);
    CHECK_INT(strlen(line), 50000);
    CHECK_INT(orch_reader_line(r, &line), ORCH_EEND);
    CHECK_INT(soon(f), 50001);
    orch_reader_free(r);
    CHECK_INT(orch_close(fd[0]), 0);
    free(data);
}

TASK_TEST(a_body_follows_the_lines) {
    int fd[2];
    char data[8] = "";
    const char *line = NULL;
    if (!two(fd)) return;
    orch_reader *r = orch_reader_new(fd[0], 100);
    CHECK_INT(orch_write(fd[1], "head\r\n\r\nbody", 12), 12);
    CHECK_INT(orch_reader_line(r, &line), 4);
    CHECK_INT(orch_reader_line(r, &line), 0);
    CHECK_INT(orch_reader_read(r, data, 2), 2);
    CHECK_INT(orch_reader_read(r, data + 2, 5), 2);
    CHECK_STR(data, "body");
    CHECK_INT(orch_reader_read(r, data, 0), 0);
    CHECK_INT(orch_write(fd[1], "+", 1), 1);
    CHECK_INT(orch_reader_read(r, data, 5), 1);
    CHECK_INT(shutdown(fd[1], SHUT_WR), 0);
    CHECK_INT(orch_reader_read(r, data, 5), 0);
    orch_reader_free(r);
    close_two(fd);
}

static orch_result read_a_line(void *arg) {
    const char *line;
    ptrdiff_t n = orch_reader_line(arg, &line);
    return n < 0 ? orch_fail((int)n) : orch_ok_int(n);
}

TASK_TEST(a_reader_serves_one_at_a_time) {
    int fd[2];
    const char *line;
    if (!two(fd)) return;
    orch_reader *r = orch_reader_new(fd[0], 0);
    orch_future *f = orch_go(read_a_line, r);
    CHECK_INT(orch_reader_line(r, &line), ORCH_EBUSY);
    CHECK_INT(orch_reader_read(r, fd, 1), ORCH_EBUSY);
    CHECK_INT(orch_write(fd[1], "abc\n", 4), 4);
    CHECK_INT(soon(f), 3);
    f = orch_go(read_a_line, r);
    orch_reader_free(r); // while the other is in it
    CHECK_INT(orch_write(fd[1], "abc\n", 4), 4);
    CHECK_INT(soon(f), ORCH_ECLOSED);
    close_two(fd);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
