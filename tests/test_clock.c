// test_clock.c: virtual time, a clock of one's own, seeds, random numbers; what a report of a
// deadlock says; promises that know whether they are wanted.
//
// The cases of tasks run without a seed and then with each of test_seeds() seeds (TEST_SEEDS=200,
// default 20), the first 20 twice: both runs of a seed must leave the same trace.
//
//     adopted behaviour                                 known from                    case
//     time jumps to the next timer when all is blocked  Trio MockClock, Tokio pause   a_sleep_takes
//     ... and starts at 0                               Tokio, synctest (2000-01-01)  time_starts
//     real input is looked at before time jumps         Tokio (never), Trio           input_comes
//     a clock can be plugged in                         Trio Clock, libuv (asked)     own_clock_*
//     order of ready work from a seed, replayed by it   FoundationDB, Loom, Shuttle   seeds_*
//     a deadlock is an error that names who waits       Go runtime, synctest          deadlock_*
//     a waiter that is gone gets nothing                Go select, Trio checkpoints   wanted_*
#include "../asyncorch.h"
#include "test.h"

#include <pthread.h>
#include <time.h>

// ---- kit

enum { TRACE = 1 << 12, REPORT = 1 << 14 };
#define HOUR ((uint64_t)3600000)
#define DAY (24 * HOUR)

typedef void body_fn(void);

static char report[REPORT];
static size_t reported;
static struct trace {
    size_t count;
    int at[TRACE];
} trace, first_trace;
static uint64_t seed; // of the run that is under way
static bool sweeping;

static uint64_t test_seeds(void) {
    const char *many = getenv("TEST_SEEDS");
    return sweeping ? 1 : many ? strtoull(many, NULL, 10) : 20;
}

static void note(int what) {
    if (trace.count < TRACE) trace.at[trace.count++] = what;
}

static void on_report(const char *text, void *context) {
    (void)context;
    size_t size = strlen(text);
    if (reported + size >= REPORT) return;
    memcpy(report + reported, text, size + 1);
    reported += size;
}

static void ignore(const orch_result *r, void *context) { (void)r, (void)context; }

static void must(bool held, const char *what) {
    if (held) return;
    fprintf(stderr, "seed %llu: %s\n%s", (unsigned long long)seed, what, report);
    abort();
}

static orch_loop_desc settings(void) {
    return (orch_loop_desc){
        .clock = ORCH_CLOCK_VIRTUAL, .seed = seed, .on_report = on_report, .on_unhandled = ignore};
}

static orch_loop_stats stats(void) { return orch_loop_statistics(orch_loop_current()); }

// Time passes, without memory as well.
static void pass_time(uint64_t ms) {
    for (uint64_t end = orch_now() + ms; orch_now() < end;)
        if (orch_sleep(1)) orch_yield();
}

static orch_result run_body(void *arg) {
    test_start();
    (*(body_fn **)arg)();
    for (int i = 0; i < 100 && stats().futures > 1; i++) pass_time(1); // what ends later
    orch_loop_stats left = stats();
    must(left.futures == 1 && left.tasks == 1 && left.timers == 0, "something is left");
    return orch_ok_int(1);
}

static orch_result run_once(body_fn *body) {
    reported = 0, report[0] = '\0', trace.count = 0;
    orch_loop_desc desc = settings();
    return orch_run_with(&desc, run_body, &body);
}

static bool same_trace(const struct trace *a, const struct trace *b) {
    return a->count == b->count && !memcmp(a->at, b->at, a->count * sizeof a->at[0]);
}

static void check_once(body_fn *body) {
    int failures = test_failures;
    orch_result r = run_once(body);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    if (failures != test_failures) fprintf(stderr, "seed %llu\n", (unsigned long long)seed);
}

enum { TWICE = 20 }; // so many seeds are run twice

// Returns how many seeds gave another order than no seed gives.
static int over_seeds(body_fn *body) {
    static struct trace plain;
    int different = 0, failures = test_failures;
    for (seed = sweeping; seed <= test_seeds() && failures == test_failures; seed++) {
        check_once(body);
        first_trace = trace;
        if (seed == 0) plain = trace;
        different += !same_trace(&plain, &trace);
        if (sweeping || seed > TWICE) continue;
        check_once(body);
        CHECK(same_trace(&first_trace, &trace));
    }
    return different;
}

#define RUN_TEST(name)                                                                             \
    static void name##_body(void);                                                                 \
    TEST(name) { (void)over_seeds(name##_body); }                                                  \
    static void name##_body(void)
#define ORDER_TEST(name)                                                                           \
    static void name##_body(void);                                                                 \
    TEST(name) { CHECK(over_seeds(name##_body) > 0); }                                             \
    static void name##_body(void)

static double real_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static intptr_t join(orch_future *f) {
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

typedef struct sleeper {
    uint64_t ms, woke;
    int number;
} sleeper;

static orch_result sleep_once(void *arg) {
    sleeper *s = arg;
    int error = orch_sleep(s->ms);
    s->woke = orch_now();
    note(s->number);
    return error ? orch_fail(error) : orch_ok_int(s->number);
}

// ---- virtual time

RUN_TEST(time_starts_at_0_and_stands_still) {
    CHECK_INT(orch_now(), 0);
    for (int i = 0; i < 10; i++) orch_yield();
    CHECK_INT(join(orch_settled(orch_ok_int(3))), 3);
    double start = real_ms();
    while (real_ms() - start < 2) continue;
    CHECK_INT(orch_now(), 0); // whatever time it takes
}

RUN_TEST(a_sleep_takes_no_time_and_is_exact) {
    double start = real_ms();
    static const uint64_t ms[] = {1, 7, 100, HOUR, DAY, 365 * DAY, 100 * 365 * DAY};
    uint64_t now = 0;
    for (int i = 0; i < 7; i++) {
        CHECK_INT(orch_sleep(ms[i]), 0);
        CHECK_INT(orch_now(), now += ms[i]);
    }
    CHECK(real_ms() - start < 500);
}

RUN_TEST(sleepers_wake_in_the_order_of_their_deadlines) {
    sleeper s[6];
    orch_future *f[6];
    for (int i = 0; i < 6; i++) {
        s[i] = (sleeper){.ms = 10 + (uint64_t)(i * 7 % 6) * HOUR, .number = i * 7 % 6};
        f[i] = orch_go(sleep_once, &s[i]);
    }
    for (int i = 0; i < 6; i++) CHECK_INT(join(f[i]), s[i].number);
    for (int i = 0; i < 6; i++) CHECK_INT(trace.at[i], i);
    for (int i = 0; i < 6; i++) CHECK_INT(s[i].woke, s[i].ms);
}

RUN_TEST(sleeps_of_0) {
    for (int i = 0; i < 10; i++) CHECK_INT(orch_sleep(0), 0);
    CHECK_INT(join(orch_after(0)), 0);
    CHECK_INT(orch_now(), 0);
}

RUN_TEST(a_timeout_fires_before_what_is_later) {
    sleeper s = {.ms = 2000};
    double start = real_ms();
    CHECK_INT(join(orch_timeout(orch_go(sleep_once, &s), 1999)), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), 1999);
    CHECK_INT(join(orch_timeout(orch_go(sleep_once, &s), 2001)), 0);
    CHECK_INT(orch_now(), 3999);
    CHECK(real_ms() - start < 500);
}

static orch_result back_off(void *arg) {
    uint64_t delay = 100, *slept = arg;
    for (; orch_now() < DAY; ++*slept) {
        if (orch_sleep(delay)) return orch_fail(1);
        delay = delay < 30000 ? 2 * delay : 30000;
    }
    return orch_ok_int(1);
}

// The promise is 50 ms; a sanitizer on a busy machine takes its time.
TEST(a_day_of_back_off_takes_milliseconds) {
    uint64_t slept = 0;
    seed = 0;
    orch_loop_desc desc = settings();
    double start = real_ms();
    orch_result r = orch_run_with(&desc, back_off, &slept);
    double took = real_ms() - start;
    CHECK_INT(orch_int(&r), 1);
    CHECK(slept > 2800);
    if (!CHECK(took < 500)) fprintf(stderr, "%.1f ms for %d sleeps\n", took, (int)slept);
    orch_result_free(&r);
}

RUN_TEST(tasks_that_only_yield_see_time_pass_in_the_end) {
    for (int i = 0; orch_now() < 5; i++) {
        if (i > 1000000) break;
        orch_yield();
    }
    CHECK(orch_now() >= 5);
}

static orch_result yield_often(void *arg) {
    for (int i = 0; i < 1000; i++) orch_yield();
    return orch_ok_int(arg != NULL);
}

// Work is not time: what runs for long meets no deadline that real time would not have brought, and
// the seed has no say in it.
RUN_TEST(work_takes_next_to_no_time) {
    orch_future *f[20];
    for (int i = 0; i < 20; i++) f[i] = orch_go(yield_often, NULL);
    orch_result r = orch_await(orch_timeout(orch_all_n(20, f), 1000));
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    CHECK(orch_now() <= 100);
}

static orch_result sleep_for_ever(void *arg) {
    orch_sleep(UINT64_MAX);
    return orch_ok_int(arg != NULL);
}

// Nothing comes before the end of time; but something else may end it.
RUN_TEST(a_sleep_for_ever_is_cancelled) {
    orch_future *f = orch_go(sleep_for_ever, NULL);
    CHECK_INT(orch_sleep(DAY), 0);
    CHECK(!orch_is_settled(f) || test_shared->refused);
    orch_drop(f);
    CHECK_INT(orch_now(), DAY);
}

TEST(a_sleep_for_ever_ends_or_is_a_deadlock) {
    seed = 0;
    orch_loop_desc desc = settings();
    orch_result r = orch_run_with(&desc, sleep_for_ever, NULL); // does not spin
    CHECK(r.error == 0 || r.error == ORCH_EDEADLK);
    orch_result_free(&r);
}

TEST(a_step_moves_time_by_no_more_than_it_may) {
    seed = 0;
    orch_loop_desc desc = settings();
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    orch_future *f = orch_after(25);
    if (test_shared->refused == 0) {
        CHECK_INT(orch_loop_step(loop, 0), 1);
        CHECK_INT(orch_now(), 0);
        CHECK_INT(orch_loop_step(loop, 10), 1);
        CHECK_INT(orch_now(), 10);
        CHECK_INT(orch_loop_step(loop, 10), 1);
        CHECK_INT(orch_now(), 20);
        CHECK(!orch_is_settled(f));
        orch_loop_step(loop, 10);
        CHECK(orch_is_settled(f));
        CHECK_INT(orch_now(), 25); // no later than the timer
    }
    orch_drop(f);
    CHECK_INT(orch_loop_step(loop, 10), 0);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(time_of_a_new_loop_starts_again) {
    seed = 0;
    for (int i = 0; i < 3; i++) {
        orch_loop_desc desc = settings();
        orch_loop *loop = orch_loop_new(&desc);
        if (!CHECK(loop != NULL)) return;
        CHECK_INT(orch_now(), 0);
        orch_detach(orch_after(1000));
        CHECK_INT(orch_loop_run(loop), 0);
        CHECK_INT(orch_now(), test_shared->refused ? orch_now() : 1000);
        CHECK_INT(orch_loop_free(loop), 0);
    }
    uint64_t now = orch_now(); // without a loop: the monotonic clock
    CHECK(now + 1000 >= (uint64_t)real_ms() && now <= (uint64_t)real_ms() + 1000);
}

TEST(settings_can_be_read_back) {
    orch_loop_desc desc = {.clock = ORCH_CLOCK_VIRTUAL, .seed = 77};
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    CHECK_INT(orch_loop_settings(loop)->clock, ORCH_CLOCK_VIRTUAL);
    CHECK_INT(orch_loop_settings(loop)->seed, 77);
    CHECK_INT(orch_loop_free(loop), 0);
}

static orch_result real_sleep(void *arg) {
    double start = real_ms();
    uint64_t now = orch_now();
    CHECK_INT(orch_sleep(5), 0);
    CHECK(real_ms() - start >= 5);
    CHECK(orch_now() - now >= 4);
    return orch_ok_int(arg != NULL);
}

TEST(real_time_is_still_real_with_a_seed) {
    for (uint64_t i = 0; i < 3; i++) {
        orch_loop_desc desc = {.seed = i};
        orch_result r = orch_run_with(&desc, real_sleep, NULL);
        CHECK_INT(r.error, 0);
        orch_result_free(&r);
    }
}

// ---- virtual time and descriptors

static int pipe_fd[2];

static bool pipe_open(void) { return CHECK(pipe(pipe_fd) == 0); }

static void pipe_close(void) { close(pipe_fd[0]), close(pipe_fd[1]); }

RUN_TEST(input_that_is_there_comes_before_time_jumps) {
    if (!pipe_open()) return;
    CHECK_INT(write(pipe_fd[1], "x", 1), 1);
    CHECK_INT(join(orch_timeout(orch_ready(pipe_fd[0], ORCH_READABLE), 1)), ORCH_READABLE);
    CHECK_INT(orch_now(), 0);
    pipe_close();
}

RUN_TEST(input_that_is_not_there_keeps_no_timer_waiting) {
    if (!pipe_open()) return;
    double start = real_ms();
    CHECK_INT(join(orch_timeout(orch_ready(pipe_fd[0], ORCH_READABLE), DAY)), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), DAY);
    CHECK(real_ms() - start < 500);
    pipe_close();
}

static orch_result write_later(void *arg) {
    int error = orch_sleep(HOUR);
    if (write(*(int *)arg, "x", 1) != 1) return orch_fail(1);
    return error ? orch_fail(error) : orch_ok_int(1);
}

RUN_TEST(input_comes_when_virtual_time_has_brought_it) {
    if (!pipe_open()) return;
    orch_future *f = orch_go(write_later, &pipe_fd[1]);
    CHECK_INT(join(orch_ready(pipe_fd[0], ORCH_READABLE)), ORCH_READABLE);
    CHECK_INT(orch_now(), HOUR);
    join(f);
    pipe_close();
}

static void *write_in_thread(void *arg) {
    nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    if (write(*(int *)arg, "x", 1) != 1) abort();
    return NULL;
}

static orch_result await_pipe(void *arg) {
    return orch_ok_int(join(orch_ready(*(int *)arg, ORCH_READABLE)));
}

TEST(input_alone_is_waited_for_in_real_time) {
    if (sweeping || !pipe_open()) return;
    pthread_t thread;
    seed = 0;
    if (CHECK(pthread_create(&thread, NULL, write_in_thread, &pipe_fd[1]) == 0)) {
        orch_loop_desc desc = settings();
        orch_result r = orch_run_with(&desc, await_pipe, &pipe_fd[0]);
        CHECK_INT(orch_int(&r), ORCH_READABLE);
        orch_result_free(&r);
        pthread_join(thread, NULL);
    }
    pipe_close();
}

// ---- a clock of one's own

static uint64_t hand, asked_clock; // ns

static uint64_t read_hand(void *context) {
    asked_clock++;
    return hand + (context == &hand ? 0 : 1);
}

static orch_loop *hand_loop(void) {
    orch_loop_desc desc = {.now = read_hand, .context = &hand, .on_report = on_report};
    asked_clock = 0;
    orch_loop *loop = orch_loop_new(&desc);
    CHECK(loop != NULL);
    return loop;
}

static void steps(orch_loop *loop) {
    for (int i = 0; i < 5; i++) orch_loop_step(loop, 0);
}

TEST(own_clock_is_what_everything_goes_by) {
    hand = 5000 * (uint64_t)1000000;
    orch_loop *loop = hand_loop();
    if (loop == NULL) return;
    CHECK_INT(orch_now(), 5000);
    orch_future *f = orch_after(100), *g = orch_timeout(orch_after(DAY), 50);
    steps(loop);
    CHECK(!orch_is_settled(f) || test_shared->refused);
    hand += 49999999, steps(loop);
    CHECK(!orch_is_settled(g) || test_shared->refused); // never early: not by a nanosecond
    hand += 1, steps(loop);
    CHECK(orch_is_settled(g));
    CHECK(!orch_is_settled(f) || test_shared->refused);
    CHECK_INT(orch_now(), 5050);
    hand += HOUR * 1000000, steps(loop);
    CHECK(orch_is_settled(f));
    CHECK(asked_clock > 0);
    orch_drop(f), orch_drop(g);
    CHECK_INT(orch_loop_free(loop), 0);
}

static orch_result deadline_by_hand(void *arg) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 30});
    orch_sleep(DAY);
    orch_result r = orch_scope_close(&s);
    note(r.error);
    orch_result_free(&r);
    return orch_ok_int(arg != NULL);
}

TEST(own_clock_drives_deadlines) {
    hand = 0, trace.count = 0;
    orch_loop *loop = hand_loop();
    if (loop == NULL) return;
    orch_detach(orch_go(deadline_by_hand, NULL));
    steps(loop);
    CHECK_INT(trace.count, test_shared->refused ? trace.count : 0);
    hand = 29999999, steps(loop);
    CHECK_INT(trace.count, test_shared->refused ? trace.count : 0);
    hand = 30000000, steps(loop);
    CHECK_INT(trace.at[0], ORCH_ETIMEDOUT);
    must(orch_loop_free(loop) == 0, "the loop cannot end");
}

TEST(own_clock_fires_what_was_jumped_over_in_order) {
    hand = 0, trace.count = 0;
    orch_loop *loop = hand_loop();
    if (loop == NULL) return;
    static sleeper s[5];
    for (int i = 0; i < 5; i++) {
        s[i] = (sleeper){.ms = (uint64_t)(50 - 10 * i), .number = i};
        orch_detach(orch_go(sleep_once, &s[i]));
    }
    steps(loop);
    hand = 1000 * (uint64_t)1000000;
    steps(loop);
    CHECK_INT(trace.count, 5);
    for (int i = 0; i < 5; i++) CHECK_INT(trace.at[i], 4 - i);
    must(orch_loop_free(loop) == 0, "the loop cannot end");
}

TEST(own_clock_near_the_end_of_time) {
    hand = UINT64_MAX - 20 * (uint64_t)1000000;
    orch_loop *loop = hand_loop();
    if (loop == NULL) return;
    orch_future *f = orch_after(10), *g = orch_after(HOUR); // g: past the end
    steps(loop);
    CHECK(!orch_is_settled(f) || test_shared->refused);
    hand += 10 * (uint64_t)1000000, steps(loop);
    CHECK(orch_is_settled(f));
    CHECK(!orch_is_settled(g) || test_shared->refused); // an overflow would make it early
    orch_drop(f), orch_drop(g);
    must(orch_loop_free(loop) == 0, "the loop cannot end");
}

TEST(own_clock_that_goes_back_breaks_nothing) {
    hand = 1000 * (uint64_t)1000000;
    orch_loop *loop = hand_loop();
    if (loop == NULL) return;
    orch_future *f = orch_after(10);
    steps(loop);
    hand = 0, steps(loop);
    CHECK(!orch_is_settled(f) || test_shared->refused);
    hand = 1010 * (uint64_t)1000000, steps(loop);
    CHECK(orch_is_settled(f));
    orch_drop(f);
    must(orch_loop_free(loop) == 0, "the loop cannot end");
}

// It runs along with the poller's sleep, faster than real time.
static uint64_t fast_clock(void *context) {
    (void)context;
    return (uint64_t)(real_ms() * 1e6) * 10;
}

static orch_result sleep_fast(void *arg) {
    uint64_t now = orch_now();
    CHECK_INT(orch_sleep(50), 0);
    CHECK(orch_now() >= now + 50);
    return orch_ok_int(arg != NULL);
}

TEST(own_clock_and_a_running_loop) {
    orch_loop_desc desc = {.now = fast_clock};
    orch_result r = orch_run_with(&desc, sleep_fast, NULL);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
}

// ---- looks that are dear

// Once a look has cost 1 ms by this clock, the next is due 10 ms later: rounds go on meanwhile.
static uint64_t dear_hand, dear_tick; // ns

static uint64_t dear_clock(void *context) {
    (void)context;
    return dear_hand += dear_tick;
}

enum { BUDGET = 128, ROUND = 32 * BUDGET };

typedef void yield_fn(void);

static int dear_yields, dear_fd[2];
static yield_fn *dear_midway; // called in the 50th yield of a step
static orch_future *dear_watched;

static orch_result yield_dearly(void *arg) {
    while (orch_yield() == 0)
        if (++dear_yields == 50 && dear_midway) dear_midway();
    return orch_ok_int(arg != NULL);
}

static int dear_step(orch_loop *loop) {
    dear_yields = 0;
    CHECK_INT(orch_loop_step(loop, 0), 1);
    return dear_yields;
}

static orch_loop *dear_loop(uint64_t seed_) {
    orch_loop_desc desc = {.now = dear_clock, .seed = seed_};
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL) || !CHECK(pipe(dear_fd) == 0)) return NULL;
    dear_midway = NULL;
    dear_watched = orch_ready(dear_fd[0], ORCH_READABLE);
    for (int i = 0; i < 2; i++) orch_detach(orch_go(yield_dearly, NULL));
    dear_tick = 1000000;
    for (int i = 0; i < 20; i++) dear_step(loop);
    dear_tick = 0;
    return loop;
}

static void dear_end(orch_loop *loop) {
    orch_drop(dear_watched);
    must(orch_loop_free(loop) == 0, "the loop cannot end");
    close(dear_fd[0]), close(dear_fd[1]);
}

TEST(a_round_goes_on_while_it_is_too_early_for_a_look) {
    orch_loop *loop = dear_loop(0);
    if (loop == NULL) return;
    uint64_t polls = stats().polls;
    CHECK_INT(dear_step(loop), ROUND); // ends all the same, as the clock may stand still
    CHECK_INT(dear_step(loop), ROUND);
    CHECK_INT(stats().polls, polls);
    uint64_t resumes = stats().resumes;
    dear_hand += 10000000;
    CHECK_INT(dear_step(loop), BUDGET);
    CHECK_INT(stats().polls, polls + 1);
    CHECK_INT(stats().resumes, resumes + BUDGET);
    dear_end(loop);
}

TEST(a_round_ends_for_a_timer_that_is_due) {
    orch_loop *loop = dear_loop(0);
    if (loop == NULL) return;
    orch_future *f = orch_after(1);
    CHECK_INT(dear_step(loop), ROUND); // it counts from the first look at the clock
    CHECK(!orch_is_settled(f));
    dear_hand += 1000000;
    CHECK_INT(dear_step(loop), BUDGET);
    CHECK(orch_is_settled(f));
    orch_drop(f);
    dear_end(loop);
}

static void stop_midway(void) { orch_loop_stop(orch_loop_current()); }
static void letter(void *arg) { (void)arg; }
static void post_midway(void) { CHECK_INT(orch_post(orch_loop_current(), letter, NULL), 0); }
static void drop_midway(void) { orch_drop(dear_watched), dear_watched = NULL; }

TEST(a_round_ends_for_what_only_a_turn_does) {
    static yield_fn *const midway[] = {stop_midway, post_midway, drop_midway};
    for (int i = 0; i < 3; i++) {
        orch_loop *loop = dear_loop(0);
        if (loop == NULL) return;
        dear_midway = midway[i];
        CHECK_INT(dear_step(loop), BUDGET);
        dear_end(loop);
    }
    orch_loop *loop = dear_loop(7);
    if (loop == NULL) return;
    CHECK(dear_step(loop) <= 8); // a seed draws the order anew
    dear_end(loop);
}

static orch_result end_among_others(void *arg) {
    for (int i = 0; i < 2; i++) orch_detach(orch_go(yield_dearly, NULL));
    dear_watched = orch_ready(dear_fd[0], ORCH_READABLE);
    dear_tick = 1000000;
    for (int i = 0; i < 20 * BUDGET; i++) orch_yield();
    dear_tick = 0, dear_yields = 0;
    return orch_ok_int(arg != NULL);
}

TEST(a_round_ends_when_the_main_task_has) {
    orch_loop_desc desc = {.now = dear_clock};
    if (!CHECK(pipe(dear_fd) == 0)) return;
    dear_midway = NULL;
    orch_result r = orch_run_with(&desc, end_among_others, NULL);
    CHECK_INT(r.error, 0);
    CHECK(dear_yields <= ROUND); // one of those that are let end by themselves
    orch_result_free(&r);
    close(dear_fd[0]), close(dear_fd[1]);
}

// ---- seeds

static orch_result yield_and_note(void *arg) {
    for (int i = 0; i < 3; i++) note(*(int *)arg), orch_yield();
    return orch_ok_int(1);
}

static int numbers[64];

static void start_all(orch_future **f, int count, orch_task_fn fn) {
    for (int i = 0; i < count; i++) numbers[i] = i, f[i] = orch_go(fn, &numbers[i]);
}

static void end_all(orch_future **f, int count) {
    for (int i = 0; i < count; i++) join(f[i]);
}

ORDER_TEST(seeds_order_ready_tasks) {
    orch_future *f[5];
    start_all(f, 5, yield_and_note);
    end_all(f, 5);
    for (int i = 0; seed == 0 && i < 15; i++) CHECK_INT(trace.at[i], i % 5);
    CHECK_INT(trace.count, 15);
}

static orch_result sleep_and_note(void *arg) {
    orch_sleep(10);
    note(*(int *)arg);
    return orch_ok_int(1);
}

ORDER_TEST(seeds_order_equal_deadlines) {
    orch_future *f[5];
    start_all(f, 5, sleep_and_note);
    end_all(f, 5);
    for (int i = 0; seed == 0 && i < 5; i++) CHECK_INT(trace.at[i], i);
}

static void note_timer(orch_result *in, void *context) {
    note(in->error ? in->error : *(int *)context);
}

ORDER_TEST(seeds_order_equal_timers_of_callbacks) {
    for (int i = 0; i < 5; i++) numbers[i] = i, orch_on(orch_after(10), note_timer, &numbers[i]);
    orch_sleep(20);
    for (int i = 0; seed == 0 && i < 5; i++) CHECK_INT(trace.at[i], i);
    pass_time(20);
}

RUN_TEST(seeds_leave_the_callbacks_of_one_future_in_order) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    for (int i = 0; i < 10; i++) numbers[i] = i, orch_on(orch_ref(f), note_timer, &numbers[i]);
    orch_settle(p, orch_ok_int(1));
    for (int i = 0; i < 100 && trace.count < 10; i++) orch_yield();
    for (int i = 0; i < 10; i++) CHECK_INT(trace.at[i], test_shared->refused ? trace.at[i] : i);
    orch_drop(f);
}

RUN_TEST(seeds_leave_deadlines_that_differ_in_order) {
    for (int i = 0; i < 20; i++) {
        numbers[i] = i;
        orch_on(orch_after((uint64_t)(1 + i)), note_timer, &numbers[i]);
    }
    orch_sleep(30);
    for (int i = 0; i < 20; i++) CHECK_INT(trace.at[i], i);
    pass_time(30);
}

// All orders of three, in 200 seeds.
static int orders_of_three(body_fn *body) {
    bool seen[27] = {false};
    int orders = 0;
    for (seed = 1; seed <= 200; seed++) {
        check_once(body);
        if (trace.count < 3) return 0;
        int *at = &trace.at[trace.count - 3];
        int order = at[0] * 9 + at[1] * 3 + at[2];
        if (order < 0 || order >= 27) return 0;
        orders += !seen[order], seen[order] = true;
    }
    return orders;
}

static orch_result yield_once_and_note(void *arg) {
    orch_yield();
    note(*(int *)arg);
    return orch_ok_int(1);
}

static void three_ready(void) {
    orch_future *f[3];
    start_all(f, 3, yield_once_and_note);
    end_all(f, 3);
}

static void three_timers(void) {
    orch_future *f[3];
    start_all(f, 3, sleep_and_note);
    end_all(f, 3);
}

TEST(seeds_reach_every_order) {
    if (sweeping) return;
    CHECK_INT(orders_of_three(three_ready), 6);
    CHECK_INT(orders_of_three(three_timers), 6);
}

// The classic: a value is read, others run, and it is written back.
static int counter;

static orch_result lose_updates(void *arg) {
    for (int i = 0; i < 3; i++) {
        int read = counter;
        if (*(int *)arg % 2 == 0 || i == 1) orch_yield();
        counter = read + 1;
        orch_yield();
    }
    return orch_ok_int(1);
}

static void race_for_counter(void) {
    orch_future *f[3];
    counter = 0;
    start_all(f, 3, lose_updates);
    end_all(f, 3);
}

TEST(seeds_find_a_race) {
    if (sweeping) return;
    unsigned results = 0;
    for (seed = 0; seed <= 50; seed++) check_once(race_for_counter), results |= 1u << counter;
    CHECK((results & (results - 1)) != 0); // more than one outcome
}

static int taken[30];

static orch_result take_turns(void *arg) {
    for (int i = 0; i < 50; i++) taken[*(int *)arg]++, orch_yield();
    return orch_ok_int(1);
}

RUN_TEST(seeds_starve_nobody) {
    orch_future *f[30];
    memset(taken, 0, sizeof taken);
    start_all(f, 30, take_turns);
    for (int i = 0; i < 2000 && taken[0] < 25; i++) orch_yield();
    for (int i = 0; i < 30; i++) CHECK(taken[i] > 0);
    end_all(f, 30);
}

static orch_result mixed(void *arg) {
    int me = *(int *)arg;
    for (int i = 0; i < 10; i++) {
        uint64_t drawn_here = seed ? orch_random() : (uint64_t)(i + me);
        switch (drawn_here % 4) {
        case 0: orch_yield(); break;
        case 1: orch_sleep(drawn_here / 4 % 5); break;
        case 2: join(orch_timeout(orch_after(5), 5)); break;
        default: join(orch_race(orch_after(2), orch_after(2))); break;
        }
        note(me);
    }
    return orch_ok_int(1);
}

ORDER_TEST(seeds_repeat_whatever_the_addresses) {
    static int runs;
    void *elsewhere = malloc((size_t)++runs * 1000 % 77777); // moves what is allocated later
    orch_future *f[8];
    start_all(f, 8, mixed);
    end_all(f, 8);
    note((int)orch_now());
    free(elsewhere);
}

RUN_TEST(seeds_do_not_change_what_a_task_sees_of_itself) {
    int a = 0;
    for (int i = 0; i < 100; i++) {
        a++;
        if (i % 3 == 0) orch_yield();
        CHECK_INT(join(orch_settled(orch_ok_int(i))), i);
    }
    CHECK_INT(a, 100);
}

TEST(seeds_of_all_sizes) {
    static const uint64_t seeds[] = {1, UINT32_MAX, (uint64_t)1 << 32, UINT64_MAX, UINT64_MAX / 2};
    for (int i = 0; i < 5; i++) {
        seed = seeds[i];
        check_once(seeds_order_ready_tasks_body);
    }
}

// ---- random numbers

static uint64_t drawn[100];

static void draw(void) {
    for (int i = 0; i < 100; i++) drawn[i] = orch_random();
}

RUN_TEST(random_numbers_fill_64_bits) {
    uint64_t ones = 0, zeros = 0;
    draw();
    for (int i = 0; i < 100; i++) {
        ones |= drawn[i], zeros |= ~drawn[i];
        for (int j = 0; j < i; j++) CHECK(drawn[i] != drawn[j]);
    }
    CHECK(~ones == 0 && ~zeros == 0);
}

TEST(random_numbers_come_from_the_seed) {
    uint64_t of[3][100];
    static const uint64_t seeds[] = {7, 7, 8};
    for (int i = 0; i < 3; i++) {
        seed = seeds[i];
        check_once(draw);
        memcpy(of[i], drawn, sizeof drawn);
    }
    if (test_shared->refused) return;
    CHECK(!memcmp(of[0], of[1], sizeof drawn));
    CHECK(memcmp(of[0], of[2], sizeof drawn) != 0);
    int same = 0;
    for (int i = 0; i < 100; i++)
        for (int j = 0; j < 100; j++) same += of[0][i] == of[2][j];
    CHECK_INT(same, 0); // not one sequence at another place
}

TEST(random_numbers_without_a_seed_differ_from_run_to_run) {
    uint64_t first[2];
    for (int i = 0; i < 2; i++) {
        orch_loop *loop = orch_loop_new(NULL);
        if (!CHECK(loop != NULL)) return;
        first[i] = orch_random();
        CHECK_INT(orch_loop_free(loop), 0);
    }
    CHECK(first[0] != first[1]);
}

RUN_TEST(random_numbers_are_even) {
    int buckets[16] = {0};
    for (int i = 0; i < 16000; i++) buckets[orch_random() % 16]++;
    for (int i = 0; i < 16; i++) CHECK(buckets[i] > 800 && buckets[i] < 1200);
}

static int in_callback;

static void draw_in_callback(orch_result *in, void *context) {
    (void)in, (void)context;
    int number = (int)(orch_random() % 1000);
    if (seed) note(number);
    in_callback++;
}

RUN_TEST(random_numbers_in_callbacks) {
    in_callback = 0;
    orch_on(orch_settled(orch_ok_int(1)), draw_in_callback, NULL);
    for (int i = 0; i < 100 && !in_callback; i++) orch_yield();
    CHECK_INT(in_callback, 1);
}

// ---- what the report of a deadlock says

static orch_result wait_for_parcel(void *arg) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    CHECK(orch_promise_describe(p, "parcel of Ann") || test_shared->refused);
    if (arg) return orch_await(orch_timeout(f, DAY)); // no deadlock
    return orch_await(f);
}

static orch_result wait_for_courier(void *arg) {
    (void)arg;
    orch_task_desc desc = {.name = "courier", .fn = wait_for_parcel};
    return orch_await(orch_go_with(&desc));
}

TEST(deadlock_report_names_tasks_labels_and_the_seed) {
    static const uint64_t seeds[] = {0, 1, 4711, UINT64_MAX};
    for (int i = 0; i < 4; i++) {
        char text[40];
        seed = seeds[i], reported = 0, report[0] = '\0';
        orch_loop_desc desc = settings();
        orch_result r = orch_run_with(&desc, wait_for_courier, NULL);
        CHECK_INT(r.error, ORCH_EDEADLK);
        orch_result_free(&r);
        CHECK(strstr(report, "deadlock") != NULL);
        CHECK(strstr(report, "'courier'") != NULL);
        CHECK(strstr(report, "'parcel of Ann'") != NULL);
        snprintf(text, sizeof text, "seed is %llu", (unsigned long long)seed);
        CHECK((strstr(report, text) != NULL) == (seed != 0));
        CHECK(seed != 0 || strstr(report, "seed") == NULL);
    }
}

TEST(deadlock_report_on_real_time) {
    reported = 0, report[0] = '\0';
    orch_loop_desc desc = {.seed = 99, .on_report = on_report};
    orch_result r = orch_run_with(&desc, wait_for_courier, NULL);
    CHECK_INT(r.error, ORCH_EDEADLK);
    orch_result_free(&r);
    CHECK(strstr(report, "parcel of Ann") != NULL);
    CHECK(strstr(report, "99") != NULL);
}

RUN_TEST(deadlock_or_not_a_dump_shows_the_graph) {
    orch_task_desc desc = {.name = "courier", .fn = wait_for_parcel, .arg = &counter};
    orch_future *f = orch_go_with(&desc);
    orch_sleep(10);
    orch_loop_dump(orch_loop_current());
    CHECK(strstr(report, "courier") != NULL);
    CHECK(strstr(report, "parcel of Ann") != NULL);
    orch_drop(f);
}

RUN_TEST(no_deadlock_while_a_timer_runs) {
    CHECK_INT(join(orch_go(wait_for_parcel, &counter)), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), DAY);
    CHECK_STR(report, "");
}

RUN_TEST(labels) {
    orch_promise p;
    orch_future *f = orch_future_new(&p), *g = orch_then(orch_ref(f), NULL, NULL, NULL);
    CHECK(orch_promise_describe(p, "first"));
    CHECK(orch_promise_describe(p, "second")); // in its place
    orch_loop_dump(orch_loop_current());
    CHECK(strstr(report, "first") == NULL);
    CHECK(strstr(report, "second") != NULL);
    orch_promise_describe(p, NULL); // changes nothing
    CHECK(orch_settle(p, orch_ok_int(1)));
    CHECK(!orch_promise_describe(p, "third"));
    orch_drop(f);
    CHECK_INT(join(g), 1);
    CHECK(!orch_promise_describe(p, "fourth"));
    CHECK(!orch_promise_describe((orch_promise){NULL, 0}, "none"));
}

static int hooked;

static void settle_it(orch_result *in, void *context) {
    (void)in;
    orch_settle(*(orch_promise *)context, orch_ok_int(1));
}

// With a context the producer goes on, and settles a little later.
static bool hook(void *context, int reason) {
    (void)reason;
    hooked++;
    if (context != NULL) orch_on(orch_after(3), settle_it, context);
    return context == NULL;
}

static void goes_on(orch_promise p) {
    static orch_promise kept[8];
    static int next;
    kept[++next % 8] = p;
    orch_promise_on_cancel(p, hook, &kept[next % 8]);
}

RUN_TEST(labels_beside_hooks_and_boxes) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    hooked = 0;
    orch_promise_describe(p, "labelled");
    orch_promise_on_cancel(p, hook, NULL);
    void *box = orch_promise_box(p);
    orch_drop(f);
    CHECK_INT(hooked, 1);
    CHECK(!orch_promise_pending(orch_promise_unbox(box)));
    f = orch_future_new(&p);
    orch_promise_on_cancel(p, hook, NULL);
    orch_promise_describe(p, "the other way round");
    orch_drop(f);
    CHECK_INT(hooked, 2);
}

static orch_result drop_labelled(void *arg) {
    orch_promise p;
    char label[16] = "on the stack";
    orch_future *f = orch_future_new(&p);
    orch_promise_describe(p, label);
    CHECK(orch_settle(p, orch_ok_int(5)) || test_shared->refused);
    memset(label, 'x', sizeof label); // borrowed until it was settled, and no longer
    orch_loop_dump(orch_loop_current());
    orch_drop(f);
    return orch_ok_int(arg != NULL);
}

RUN_TEST(labels_are_borrowed_until_settled) {
    CHECK_INT(join(orch_go(drop_labelled, NULL)), 0);
    CHECK(strstr(report, "xxx") == NULL);
}

// ---- whether anybody wants a promise's outcome

static orch_promise one(orch_future **f) {
    orch_promise p;
    *f = orch_future_new(&p);
    return p;
}

static orch_future *good(void) { return orch_settled(orch_ok_int(1)); }

static void run_nothing(void *context) { (void)context; }

static orch_future *bad(void) { return orch_settled(orch_fail(5)); }

// Checks, and ends the promise and what was made of it.
static void check_wanted(orch_promise p, orch_future *f, bool wanted, int line) {
    if (!test_shared->refused && orch_promise_wanted(p) != wanted)
        test_say(false, __FILE__, line, "wanted is %d\n", !wanted);
    orch_settle(p, orch_ok_int(1));
    CHECK(!orch_promise_wanted(p));
    orch_drop(f);
    CHECK(!orch_promise_wanted(p));
}

#define WANTED(p, f, wanted) check_wanted(p, f, wanted, __LINE__)

RUN_TEST(wanted_until_settled_cancelled_or_dropped) {
    orch_future *f;
    orch_promise p = one(&f);
    for (int i = 0; i < 3; i++) CHECK(orch_promise_wanted(p)); // asking changes nothing
    orch_settle(p, orch_ok_int(1));
    CHECK(!orch_promise_wanted(p));
    orch_drop(f);
    p = one(&f);
    goes_on(p); // goes on
    orch_cancel(f, 0);
    CHECK(!orch_promise_wanted(p));
    CHECK(orch_promise_pending(p));
    WANTED(p, f, false);
    p = one(&f);
    orch_drop(f);
    CHECK(!orch_promise_wanted(p));
    p = one(&f);
    orch_detach(f); // it runs on
    WANTED(p, NULL, true);
    CHECK(!orch_promise_wanted((orch_promise){NULL, 0}));
}

RUN_TEST(wanted_in_combinators_that_are_decided_or_not) {
    orch_future *f;
    orch_promise p;
    p = one(&f), WANTED(p, orch_race(f, good()), false);
    p = one(&f), WANTED(p, orch_race(f, bad()), false);
    p = one(&f), WANTED(p, orch_all(f, good()), true);
    p = one(&f), WANTED(p, orch_all(f, bad()), false);
    p = one(&f), WANTED(p, orch_all_settled(f, bad()), true);
    p = one(&f), WANTED(p, orch_any(f, bad()), true);
    p = one(&f), WANTED(p, orch_any(f, good()), false);
    p = one(&f), WANTED(p, orch_quorum(2, f, good(), bad()), true);
    p = one(&f), WANTED(p, orch_quorum(1, f, good()), false);
    p = one(&f), WANTED(p, orch_quorum(2, f, bad()), false);
    p = one(&f), WANTED(p, orch_gather(10, f, good()), true);
    p = one(&f), WANTED(p, orch_timeout(f, 10), true);
    p = one(&f), WANTED(p, orch_then(f, NULL, NULL, NULL), true);
    p = one(&f), WANTED(p, orch_all(f), true);
    p = one(&f), WANTED(p, orch_race(f), true);
}

RUN_TEST(wanted_before_and_after_a_race_is_lost) {
    orch_future *f, *g;
    orch_promise p = one(&f), q = one(&g);
    orch_future *race = orch_race(f, g);
    CHECK(orch_promise_wanted(p));
    CHECK(orch_promise_wanted(q));
    CHECK(orch_settle(q, orch_ok_int(7)));
    CHECK(!orch_promise_wanted(p)); // at once: nothing has run since
    CHECK_INT(join(race), 7);
    CHECK(!orch_promise_pending(p));
}

RUN_TEST(wanted_looks_through_all_that_encloses_it) {
    orch_future *f, *g;
    orch_promise p = one(&f), q = one(&g);
    orch_future *inner =
        orch_then(orch_all(orch_timeout(f, DAY), orch_after(DAY)), NULL, NULL, NULL);
    orch_future *outer = orch_all_settled(orch_race(orch_any(inner, bad()), g), good());
    CHECK(orch_promise_wanted(p));
    CHECK(orch_settle(q, orch_ok_int(7)));
    CHECK(!orch_promise_wanted(p));
    orch_result r = orch_await(outer);
    CHECK_INT(orch_int(orch_at(&r, 0)), 7);
    orch_result_free(&r);
    CHECK(!orch_promise_pending(p));
}

RUN_TEST(wanted_as_long_as_one_of_several_holders_wants) {
    orch_future *f, *g, *h;
    orch_promise p = one(&f), q = one(&g), s = one(&h);
    orch_future *a = orch_race(orch_ref(f), g), *b = orch_race(orch_ref(f), h);
    orch_drop(f);
    CHECK(orch_promise_wanted(p));
    CHECK(orch_settle(q, orch_ok_int(1)));
    CHECK_INT(join(a), 1);
    CHECK(orch_promise_wanted(p)); // b may still win with it
    CHECK(orch_settle(s, orch_ok_int(2)));
    CHECK(!orch_promise_wanted(p));
    CHECK_INT(join(b), 2);
    CHECK(!orch_promise_pending(p));
}

RUN_TEST(wanted_no_more_when_what_encloses_it_is_asked_to_end) {
    orch_future *f, *g;
    orch_promise p = one(&f), q = one(&g);
    goes_on(p), goes_on(q); // go on
    orch_future *all = orch_all(orch_then(orch_timeout(f, DAY), NULL, NULL, NULL), g);
    CHECK(orch_promise_wanted(p));
    orch_cancel(all, 0);
    CHECK(!orch_promise_wanted(p));
    CHECK(!orch_promise_wanted(q));
    CHECK(orch_promise_pending(p) && orch_promise_pending(q));
    orch_settle(p, orch_ok_int(1)), orch_settle(q, orch_ok_int(1));
    orch_drop(all);
    p = one(&f);
    goes_on(p);
    orch_future *then = orch_finally(orch_race(f), run_nothing, NULL);
    orch_detach(orch_ref(then));
    CHECK(orch_promise_wanted(p));
    orch_cancel(then, 0);
    WANTED(p, then, false);
}

RUN_TEST(wanted_by_a_bare_handle) {
    orch_future *f;
    orch_promise p = one(&f);
    orch_future *race = orch_race(orch_ref(f), good());
    CHECK_INT(join(race), 1);
    CHECK(orch_promise_wanted(p)); // somebody may look at it yet
    CHECK(orch_settle(p, orch_ok_int(4)));
    CHECK_INT(join(f), 4);
}

RUN_TEST(wanted_through_follow) {
    orch_future *f, *g, *h;
    orch_promise p = one(&f), q = one(&g), s = one(&h);
    CHECK(orch_follow(q, f));
    CHECK(orch_promise_wanted(p));
    orch_future *race = orch_race(g, h);
    CHECK(orch_promise_wanted(p));
    CHECK(!orch_promise_wanted(q)); // locked in: it settles nothing any more
    CHECK(orch_settle(s, orch_ok_int(2)));
    CHECK(!orch_promise_wanted(p));
    CHECK_INT(join(race), 2);
}

RUN_TEST(wanted_until_a_deadline) {
    orch_future *f;
    orch_promise p = one(&f);
    goes_on(p); // goes on
    orch_future *late = orch_timeout(f, 10);
    CHECK_INT(orch_sleep(5), 0);
    CHECK(orch_promise_wanted(p));
    CHECK_INT(orch_sleep(6), 0);
    CHECK(orch_promise_pending(p));
    WANTED(p, late, false);
    p = one(&f);
    goes_on(p);
    late = orch_gather(10, f, good());
    CHECK_INT(orch_sleep(11), 0);
    CHECK(orch_promise_pending(p));
    WANTED(p, late, false);
}

static orch_result await_it(void *arg) {
    orch_result r = orch_await(arg);
    return r;
}

static orch_result await_shielded(void *arg) {
    orch_shield_begin();
    orch_result r = orch_await(arg);
    orch_shield_end();
    return r;
}

static orch_result wait_for_it(void *arg) {
    orch_result r = orch_wait(arg);
    return orch_ok_int(r.error ? r.error : orch_int(&r));
}

RUN_TEST(wanted_by_tasks) {
    orch_future *f;
    orch_promise p = one(&f);
    goes_on(p); // goes on
    orch_future *task = orch_go(await_it, f);
    CHECK(orch_promise_wanted(p));
    orch_cancel(task, 0);
    CHECK(!orch_promise_wanted(p)); // it was asked to end
    WANTED(p, task, false);
    p = one(&f);
    task = orch_go(await_shielded, f);
    orch_cancel(task, 0);
    CHECK(orch_promise_wanted(p)); // the shield holds
    CHECK(orch_settle(p, orch_ok_int(6)));
    CHECK_INT(join(task), 6);
    p = one(&f);
    task = orch_go(wait_for_it, f);
    orch_cancel(task, 0);
    CHECK_INT(join(task), ORCH_ECANCELED);
    CHECK(orch_promise_wanted(p)); // it was looked at only
    WANTED(p, f, true);
}

static void note_end(orch_result *in, void *context) {
    note(in->error ? in->error : (int)orch_int(in));
    (void)context;
}

RUN_TEST(wanted_by_callbacks) {
    orch_future *f;
    orch_promise p = one(&f);
    orch_on(f, note_end, NULL);
    CHECK(orch_promise_wanted(p));
    CHECK(orch_settle(p, orch_ok_int(3)));
    for (int i = 0; i < 100 && trace.count == 0; i++) orch_yield();
    CHECK_INT(trace.at[0], 3);
}

RUN_TEST(wanted_by_an_iteration) {
    orch_future *f;
    orch_promise p = one(&f);
    orch_completion *c = orch_as_completed(f, orch_after(DAY));
    CHECK(orch_promise_wanted(p));
    orch_future *next = orch_completion_next(c);
    CHECK(orch_promise_wanted(p));
    orch_drop(next); // loses no element
    CHECK(orch_promise_wanted(p));
    orch_completion_free(c);
    CHECK(!orch_promise_wanted(p));
    CHECK(!orch_promise_pending(p));
}

RUN_TEST(wanted_in_a_scope) {
    orch_scope s;
    orch_future *f;
    orch_promise p = one(&f);
    orch_promise_on_cancel(p, hook, NULL);
    orch_scope_open(&s, NULL);
    CHECK_INT(orch_scope_add(&s, f), 0);
    CHECK(orch_promise_wanted(p));
    orch_scope_cancel(&s, 0);
    CHECK(!orch_promise_wanted(p)); // at once
    orch_result r = orch_scope_close(&s);
    orch_result_free(&r);
    CHECK(!orch_promise_wanted(p));
    CHECK(!orch_promise_pending(p));
}

RUN_TEST(wanted_at_any_depth) {
    enum { DEPTH = 3000 };
    orch_future *f, *g;
    orch_promise p = one(&f), q = one(&g);
    for (int i = 0; i < DEPTH; i++) f = orch_race(f);
    f = orch_race(f, g);
    CHECK(orch_promise_wanted(p));
    CHECK(orch_settle(q, orch_ok_int(7)));
    CHECK(!orch_promise_wanted(p));
    CHECK_INT(join(f), 7);
}

// What it is for: a queue that gives an item only to who can still take it.
enum { WAITERS = 16 };

typedef struct store {
    orch_promise waiting[WAITERS];
    int head, tail, items, given;
} store;

static orch_future *store_take(store *s) {
    orch_future *f = orch_future_new(&s->waiting[s->tail % WAITERS]);
    s->tail++;
    return f;
}

static void store_pump(store *s) {
    while (s->items > 0 && s->head < s->tail) {
        orch_promise p = s->waiting[s->head++ % WAITERS];
        if (!orch_promise_wanted(p)) continue;
        s->items--, s->given++;
        CHECK(orch_settle(p, orch_ok_int(s->given)));
    }
}

static store left_store, right_store;

static orch_result customer(void *arg) {
    for (int i = 0; i < 4; i++) {
        orch_result r = orch_await(orch_race(store_take(&left_store), store_take(&right_store)));
        if (r.error == 0) ++*(int *)arg;
        note((int)r.index);
        orch_result_free(&r);
    }
    return orch_ok_int(1);
}

ORDER_TEST(wanted_keeps_what_a_race_would_lose) {
    memset(&left_store, 0, sizeof left_store), memset(&right_store, 0, sizeof right_store);
    int bought[3] = {0};
    orch_future *f[3];
    for (int i = 0; i < 3; i++) f[i] = orch_go(customer, &bought[i]);
    for (int i = 0;
         i < 100 && !(orch_is_settled(f[0]) && orch_is_settled(f[1]) && orch_is_settled(f[2]));
         i++) {
        left_store.items++, right_store.items++;
        store_pump(&left_store), store_pump(&right_store); // both at once: one is to be kept
        orch_yield();
    }
    for (int i = 0; i < 3; i++) orch_drop(f[i]);
    CHECK_INT(bought[0] + bought[1] + bought[2], left_store.given + right_store.given);
    CHECK_INT(bought[0] + bought[1] + bought[2], 12);
}

int main(int argc, char **argv) {
    sweeping = argc > 1 && !strcmp(argv[1], "--sweep");
    return test_main(argc, argv);
}
