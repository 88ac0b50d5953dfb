// test_poller.c: readiness of descriptors and their life, under the poller that TEST_POLLER names.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
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

#define BOTH (ORCH_READABLE | ORCH_WRITABLE)

static orch_loop_stats stats(void) { return orch_loop_statistics(orch_loop_current()); }

// Awaits: the number the future ended with, or its error.
static intptr_t join(orch_future *f) {
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

// The same within two seconds.
static intptr_t soon(orch_future *f) { return join(orch_timeout(f, 2000)); }

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

// The contract asks for a drop before the close; what is promised to who forgets is an error.
TASK_TEST(closing_a_watched_descriptor_is_an_error_not_a_spin) {
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

static orch_result wait_for_byte(void *arg) {
    return orch_await(orch_ready(*(int *)arg, ORCH_READABLE));
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
    int differ = 0, first = 0, made = 0;
    while (made < DRAWN && make_pair(fd[made])) put(fd[made++][1]);
    for (uint64_t seed = 1; seed <= 20 && made == DRAWN; seed++) {
        int order = draw_order(seed, test_poller(), fd);
        CHECK_INT(draw_order(seed, test_poller(), fd), order);
        CHECK_INT(draw_order(seed, ORCH_POLLER_POLL, fd), order); // whatever the poller is
        differ += seed > 1 && order != first;
        first = order;
    }
    CHECK(differ > 15);
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
    int made = 0;
    if (!may_open(2 * PAIRS + 100)) return;
    while (made < PAIRS && make_pair(pairs[made])) made++;
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
    orch_result r = orch_run(sleep_through_signals, fd);
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
    orch_result r = orch_run(wait_without_timer, fd);
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
    orch_loop_desc desc = {.on_report = ignore_report};
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
    orch_result r = orch_run(leave_registered, fd);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    close_pair(fd);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
