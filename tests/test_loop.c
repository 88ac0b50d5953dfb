// test_loop.c: making, running, stepping, stopping and freeing loops; rounds and fairness;
// deadlocks; threads; what outlives a loop.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../asyncorch.h"
#include "test.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

// The body runs as the main task of a loop of its own.
#define TASK_TEST(name)                                                                            \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        name##_body();                                                                             \
        return orch_ok_int(1);                                                                     \
    }                                                                                              \
    TEST(name) {                                                                                   \
        orch_result r = orch_run(name##_main, NULL);                                               \
        CHECK_INT(r.error, 0);                                                                     \
        CHECK_INT(orch_int(&r), 1);                                                                \
        orch_result_free(&r);                                                                      \
    }                                                                                              \
    static void name##_body(void)

static orch_loop_stats stats(void) { return orch_loop_statistics(orch_loop_current()); }

static intptr_t join(orch_future *f) { // consumes f
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

// What the hooks were told.
typedef struct notes {
    int reports, unhandled, error;
    char text[16384];
} notes;

static void note_report(const char *text, void *context) {
    notes *n = context;
    size_t used = strlen(n->text);
    n->reports++;
    snprintf(n->text + used, sizeof n->text - used, "%s\n", text);
}

static void note_unhandled(const orch_result *r, void *context) {
    notes *n = context;
    n->unhandled++;
    n->error = r->error;
}

static orch_loop_desc noting(notes *n) {
    return (orch_loop_desc){.context = n, .on_report = note_report, .on_unhandled = note_unhandled};
}

static orch_result run_noting(notes *n, orch_task_fn fn, void *arg) {
    orch_loop_desc desc = noting(n);
    return orch_run_with(&desc, fn, arg);
}

static int released;

static void count_release(void *value) {
    (void)value;
    released++;
}

static int called, called_error;

static void count_call(orch_result *in, void *context) {
    (void)context;
    called++;
    called_error = in->error;
}

// ---- new and free

TEST(a_thread_has_no_loop_until_one_is_made) {
    CHECK(orch_loop_current() == NULL);
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    CHECK(orch_loop_current() == loop);
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK(orch_loop_current() == NULL);
}

TEST(a_thread_may_have_another_loop_after_the_first) {
    for (int i = 0; i < 3; i++) {
        orch_loop *loop = orch_loop_new(NULL);
        if (CHECK(loop != NULL)) CHECK_INT(orch_loop_free(loop), 0);
    }
}

static void *resize(void *user, void *old, size_t old_size, size_t size) {
    (void)old_size;
    ++*(int *)user;
    if (size != 0) return realloc(old, size);
    free(old);
    return NULL;
}

TEST(defaults_are_filled_in_and_can_be_read) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    const orch_loop_desc *set = orch_loop_settings(loop);
    CHECK_INT(set->stack_size, 65536);
    CHECK_INT(set->poller, ORCH_POLLER_DEFAULT);
    CHECK(set->allocator.resize != NULL);
    CHECK(set->on_unhandled != NULL);
    CHECK(set->on_report != NULL);
    CHECK(!set->no_overflow_report);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(settings_are_kept) {
    int calls = 0;
    notes n = {0, 0, 0, ""};
    orch_loop_desc desc = noting(&n);
    desc.allocator = (orch_allocator){resize, &calls};
    desc.poller = ORCH_POLLER_POLL;
    desc.stack_size = 128 * 1024;
    desc.no_overflow_report = true;
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    memset(&desc, 0xff, sizeof desc); // it is read during the call only
    const orch_loop_desc *set = orch_loop_settings(loop);
    CHECK_INT(set->stack_size, 128 * 1024);
    CHECK_INT(set->poller, ORCH_POLLER_POLL);
    CHECK(set->allocator.resize == resize && set->allocator.user == &calls);
    CHECK(set->on_unhandled == note_unhandled && set->on_report == note_report);
    CHECK(set->context == &n);
    CHECK(set->no_overflow_report);
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK(calls > 0);
}

TEST(a_fresh_loop_counts_nothing) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_loop_stats s = orch_loop_statistics(loop);
    CHECK_INT(s.futures, 0);
    CHECK_INT(s.tasks, 0);
    CHECK_INT(s.stacks, 0);
    CHECK_INT(s.timers, 0);
    CHECK_INT(s.watched, 0);
    CHECK_INT(s.turns, 0);
    CHECK_INT(s.polls, 0);
    CHECK_INT(s.resumes, 0);
    CHECK_INT(orch_loop_free(loop), 0);
}

static orch_result nap(void *arg) {
    int error = orch_sleep(arg ? *(uint64_t *)arg : 1);
    called++;
    called_error = error;
    return error ? orch_fail(error) : orch_ok_int(1);
}

TEST(free_cancels_what_is_left_and_waits_for_it) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    uint64_t long_time = 60000;
    orch_future *f = orch_go(nap, &long_time);
    bool started = !orch_is_settled(f);
    orch_detach(f);
    orch_on(orch_after(60000), count_call, NULL);
    CHECK_INT(orch_loop_free(loop), 0);
    if (started) CHECK_INT(called, 2);
    CHECK_INT(called_error, ORCH_ECANCELED);
}

static orch_result shield_nap(void *arg) {
    orch_shield_begin();
    int error = orch_sleep(20);
    orch_shield_end();
    *(int *)arg = error ? error : 1;
    return orch_ok_int(1);
}

TEST(free_is_refused_while_a_task_shields) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    int done = 0;
    orch_detach(orch_go(shield_nap, &done));
    if (done == 0) {
        if (!CHECK_INT(orch_loop_free(loop), ORCH_EBUSY)) return;
        CHECK(orch_loop_current() == loop); // it lives on
        CHECK_INT(orch_loop_run(loop), 0);
        CHECK_INT(done, 1); // and was not disturbed
    }
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(free_is_refused_while_a_future_is_held) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    bool real = orch_promise_pending(p); // not the one that stands for "out of memory"
    if (real) {
        CHECK_INT(orch_loop_free(loop), ORCH_EBUSY);
        CHECK(orch_loop_current() == loop);
        CHECK_INT(orch_loop_free(loop), ORCH_EBUSY);
        CHECK(!orch_settle(p, orch_ok_int(1)) || orch_is_settled(f)); // whatever it is, it is valid
    }
    orch_drop(f);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(free_is_refused_while_a_settled_future_is_held) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    int value = 5;
    orch_future *f = orch_settled(orch_ok(&value, count_release));
    if (orch_peek(f) && orch_peek(f)->error == 0) {
        CHECK_INT(orch_loop_free(loop), ORCH_EBUSY);
        CHECK(orch_peek(f) && orch_peek(f)->value == &value);
        CHECK_INT(released, 0);
    }
    orch_drop(f);
    CHECK_INT(released, 1);
    CHECK_INT(orch_loop_free(loop), 0);
}

static bool keeps_going(void *context, int reason) {
    ++*(int *)context;
    (void)reason;
    return false; // the producer settles it when it can
}

TEST(free_is_refused_while_a_producer_still_settles) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_promise p;
    int asked = 0, value = 5;
    orch_future *f = orch_future_new(&p);
    if (orch_promise_on_cancel(p, keeps_going, &asked)) {
        orch_drop(f);
        CHECK_INT(orch_loop_free(loop), ORCH_EBUSY);
        CHECK_INT(asked, 1);
        CHECK_INT(orch_loop_free(loop), ORCH_EBUSY);
        CHECK_INT(asked, 1); // at most once
        orch_settle(p, orch_ok(&value, count_release));
        CHECK_INT(orch_loop_free(loop), 0);
        CHECK_INT(released, 1);
    } else {
        orch_drop(f);
        CHECK_INT(orch_loop_free(loop), 0);
    }
}

static orch_result hold_for_ever(void *arg) {
    orch_result r = orch_await(arg);
    called++;
    called_error = r.error;
    return r;
}

TEST(a_shielding_task_ends_a_refused_free_by_being_given_what_it_waits_for) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    int done = 0, tries = 0;
    orch_detach(orch_go(shield_nap, &done));
    while (orch_loop_free(loop) == ORCH_EBUSY && tries++ < 1000) orch_loop_step(loop, 50);
    CHECK(done == 1);
    CHECK(orch_loop_current() == NULL);
    CHECK(tries > 0 && tries < 50); // each step sleeps until there is something to do
}

// ---- run

TEST(run_without_work_returns_at_once) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(orch_loop_step(loop, 60000), 0);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(run_returns_when_all_is_done) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    uint64_t ms = 3;
    orch_on(orch_after(5), count_call, NULL);
    orch_detach(orch_go(nap, &ms));
    CHECK_INT(called, 0); // nothing of it before the loop runs
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(called, 2);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(called, 2);
    orch_on(orch_settled(orch_ok_int(1)), count_call, NULL); // and can be run again
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(called, 3);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(run_does_not_wait_for_a_future_that_is_only_held) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    CHECK_INT(orch_loop_run(loop), 0);
    orch_drop(f);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(the_task_outside_tasks_is_none) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    CHECK(orch_self() == NULL);
    CHECK_INT(orch_cancel_reason(), 0);
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK(orch_self() == NULL);
    CHECK_INT(orch_cancel_reason(), 0);
}

// ---- step

TEST(step_says_whether_there_is_more) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_on(orch_after(10), count_call, NULL);
    if (called == 0) {
        CHECK_INT(orch_loop_step(loop, 0), 1); // does not sleep
        CHECK_INT(called, 0);
        int steps = 0;
        while (orch_loop_step(loop, 1000) == 1 && steps < 100) steps++;
        CHECK_INT(called, 1);
        CHECK(steps < 20); // asleep until it is due, not spinning
    }
    CHECK_INT(orch_loop_step(loop, 1000), 0);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(step_sleeps_no_longer_than_asked) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_future *f = orch_after(60000);
    uint64_t from = orch_now();
    for (int i = 0; i < 3; i++) orch_loop_step(loop, 5);
    CHECK(orch_now() - from < 3000);
    CHECK(orch_is_settled(f) || orch_now() - from >= 4);
    orch_drop(f);
    while (orch_loop_step(loop, 0) == 1) continue;
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(step_runs_what_is_ready) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_on(orch_settled(orch_ok_int(1)), count_call, NULL);
    CHECK(orch_loop_step(loop, 0) >= 0);
    CHECK_INT(called, 1);
    uint64_t turns = orch_loop_statistics(loop).turns;
    CHECK(turns >= 1);
    orch_loop_step(loop, 0);
    CHECK(orch_loop_statistics(loop).turns <= turns + 1);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(step_wakes_for_a_descriptor) {
    int fd[2];
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    if (CHECK(pipe(fd) == 0)) {
        orch_on(orch_ready(fd[0], ORCH_READABLE), count_call, NULL);
        orch_loop_step(loop, 0);
        if (called == 0) {
            CHECK_INT(write(fd[1], "x", 1), 1);
            for (int i = 0; i < 5 && called == 0; i++) orch_loop_step(loop, 1000);
            CHECK_INT(called, 1);
            CHECK_INT(called_error, 0);
        }
    }
    CHECK_INT(orch_loop_free(loop), 0);
    close(fd[0]);
    close(fd[1]);
}

// ---- stop

static void stop_now(orch_result *in, void *context) {
    (void)in;
    (void)context;
    orch_loop_stop(orch_loop_current());
}

TEST(stop_ends_a_run_which_can_go_on_later) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_on(orch_settled(orch_ok_int(1)), stop_now, NULL);
    for (uint64_t i = 1; i <= 3; i++) orch_on(orch_after(5 * i), count_call, NULL);
    bool real = called == 0;
    CHECK_INT(orch_loop_run(loop), 0);
    if (real) CHECK_INT(called, 0);
    CHECK_INT(orch_loop_run(loop), 0); // the stop was for one run
    CHECK_INT(called, 3);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(stop_does_not_wait_for_what_is_far_off) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_on(orch_after(1), stop_now, NULL);
    orch_on(orch_after(60000), count_call, NULL);
    bool real = called == 0;
    CHECK_INT(orch_loop_run(loop), 0); // returns after this turn
    if (real) CHECK_INT(called, 0);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(a_stop_is_over_when_the_next_step_begins) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_future *f = orch_after(60000);
    bool real = !orch_is_settled(f);
    orch_loop_stop(loop);
    uint64_t from = orch_now();
    CHECK_INT(orch_loop_step(loop, 5), real);
    if (real) CHECK(orch_now() - from >= 4);
    orch_drop(f);
    CHECK_INT(orch_loop_free(loop), 0);
}

static orch_result stopping_task(void *arg) {
    (void)arg;
    orch_yield(); // so that it is within the run
    orch_loop_stop(orch_loop_current());
    int error = orch_sleep(20);
    called++;
    return error ? orch_fail(error) : orch_ok_int(1);
}

TEST(a_task_may_stop_the_loop) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_future *f = orch_go(stopping_task, NULL);
    if (!orch_is_settled(f)) {
        CHECK_INT(orch_loop_run(loop), 0);
        CHECK_INT(called, 0);
        CHECK_INT(orch_loop_run(loop), 0);
        CHECK_INT(called, 1);
    }
    orch_drop(f);
    CHECK_INT(orch_loop_free(loop), 0);
}

// ---- rounds and order

static char log_text[512];

static void log_char(char c) {
    size_t used = strlen(log_text);
    if (used + 1 < sizeof log_text) log_text[used] = c;
}

static orch_result log_after_gate(void *arg) {
    orch_result r = orch_wait(*(orch_future **)arg);
    log_char(r.error ? '!' : (char)orch_int(&r));
    return orch_ok_int(1);
}

static void log_call(orch_result *in, void *context) {
    (void)context;
    log_char(in->error ? '!' : (char)orch_int(in));
}

TASK_TEST(tasks_and_callbacks_run_in_the_order_they_became_ready) {
    orch_promise p[6];
    orch_future *gate[6], *task[3];
    for (int i = 0; i < 6; i++) gate[i] = orch_future_new(&p[i]);
    for (int i = 0; i < 3; i++) {
        task[i] = orch_go(log_after_gate, &gate[2 * i]);
        orch_on(gate[2 * i + 1], log_call, NULL);
    }
    static const int settle[] = {3, 0, 5, 4, 1, 2};
    for (int i = 0; i < 6; i++) orch_settle(p[settle[i]], orch_ok_int('a' + settle[i]));
    CHECK_STR(log_text, "");
    orch_yield();
    CHECK_STR(log_text, "dafebc");
    for (int i = 0; i < 3; i++) {
        CHECK_INT(join(task[i]), 1);
        orch_drop(gate[2 * i]);
    }
}

static int yields;
static bool yields_stop;

static orch_result yield_on(void *arg) {
    uint64_t from = orch_now();
    while (!yields_stop && orch_now() - from < 2000) {
        yields++;
        if (orch_yield()) break;
    }
    return orch_ok_int((intptr_t)(arg == NULL));
}

static orch_result yield_times(void *arg) {
    for (int i = 0; i < *(int *)arg; i++)
        if (orch_yield()) break;
    return orch_ok_int(1);
}

TASK_TEST(switching_costs_no_system_call) {
    int fd[2], times = 100000;
    if (!CHECK(pipe(fd) == 0)) return;
    orch_future *idle = orch_ready(fd[0], ORCH_READABLE), *long_timer = orch_after(60000);
    orch_loop_stats before = stats();
    orch_future *a = orch_go(yield_times, &times), *b = orch_go(yield_times, &times);
    CHECK_INT(join(a), 1);
    CHECK_INT(join(b), 1);
    orch_loop_stats after = stats();
    CHECK(after.resumes - before.resumes >= 200000);
    CHECK(after.polls - before.polls <= 200000 / 64);   // at most one look in 128 resumptions
    CHECK(after.polls - before.polls >= 200000 / 5000); // but a look now and then
    orch_drop(idle);
    orch_drop(long_timer);
    close(fd[0]);
    close(fd[1]);
}

TASK_TEST(a_look_is_not_far_off_while_others_yield) {
    int fd[2];
    if (!CHECK(pipe(fd) == 0)) return;
    orch_future *a = orch_go(yield_on, NULL), *b = orch_go(yield_on, NULL);
    orch_future *f = orch_ready(fd[0], ORCH_READABLE);
    CHECK_INT(write(fd[1], "x", 1), 1);
    int before = yields;
    CHECK_INT(join(f), ORCH_READABLE);
    CHECK(yields - before <= 5000); // 128 by the contract, more where a look is dear
    yields_stop = true;
    CHECK_INT(join(a), 1);
    CHECK_INT(join(b), 1);
    close(fd[0]);
    close(fd[1]);
}

// A call that need not wait goes on at once, but the 128th in a row takes its turn.
TASK_TEST(the_128th_call_that_need_not_wait_takes_its_turn) {
    orch_future *other = orch_go(yield_on, NULL);
    for (int round = 0; round < 3; round++) {
        if (orch_is_settled(other) || orch_yield()) break; // a true wait: counted from here
        int before = yields, calls = 0;
        while (yields == before && calls < 1000) {
            calls++;
            orch_result r = orch_await(orch_settled(orch_ok_int(calls)));
            if (!CHECK_INT(orch_int(&r), calls)) round = 3;
            orch_result_free(&r);
        }
        CHECK_INT(calls, 128);
    }
    yields_stop = true;
    CHECK_INT(join(other), 1);
}

TASK_TEST(looking_at_a_settled_future_takes_its_turn_too) {
    orch_future *other = orch_go(yield_on, NULL), *done = orch_settled(orch_ok_int(5));
    orch_yield();
    int before = yields, calls = 0;
    while (yields == before && calls < 1000) {
        calls++;
        orch_result r = orch_wait(done);
        if (!CHECK_INT(orch_int(&r), 5)) break;
    }
    CHECK_INT(calls, 128);
    orch_drop(done);
    yields_stop = true;
    CHECK_INT(join(other), 1);
}

static orch_result never_waits(void *arg) { return orch_ok_int(*(int *)arg); }

// 128 calls to a resumption, 128 of those to a look, and the timer counts from the first look.
TASK_TEST(a_task_that_never_waits_starves_nobody) {
    int seven = 7, loops = 0;
    orch_on(orch_after(2), count_call, NULL);
    uint64_t from = orch_now();
    while (called == 0 && (loops < 40000 || orch_now() - from < 2000)) {
        loops++;
        if (!CHECK_INT(join(orch_go(never_waits, &seven)), 7)) break;
    }
    CHECK_INT(called, 1);
    CHECK(loops > 0);
}

TEST(callbacks_that_make_callbacks_let_a_turn_end) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    int many = 100000;
    orch_detach(orch_go(yield_times, &many)); // always ready
    for (int i = 0; i < 10; i++) CHECK(orch_loop_step(loop, 0) >= 0);
    CHECK(orch_loop_statistics(loop).tasks <= 1); // ten turns: far fewer than 100,000 rounds
    CHECK(orch_loop_statistics(loop).resumes < 50000);
    CHECK_INT(orch_loop_free(loop), 0);
}

// ---- statistics

static orch_result sleep_long(void *arg) {
    (void)arg;
    return orch_ok_int(orch_sleep(60000));
}

TASK_TEST(statistics_count_what_there_is) {
    int fd[2];
    if (!CHECK(pipe(fd) == 0)) return;
    orch_loop_stats before = stats();
    CHECK_INT(before.tasks, 1);
    CHECK(before.stacks >= 1);
    orch_future *task[3], *timer = orch_after(60000), *ready = orch_ready(fd[0], ORCH_READABLE);
    CHECK_INT(stats().timers, 1);
    CHECK_INT(stats().watched, 1);
    for (int i = 0; i < 3; i++) task[i] = orch_go(sleep_long, NULL);
    orch_loop_stats more = stats();
    CHECK_INT(more.tasks, 4);
    CHECK_INT(more.timers, 4);
    CHECK(more.futures >= before.futures + 5);
    CHECK(more.stacks >= 4);
    for (int i = 0; i < 3; i++) orch_drop(task[i]);
    orch_drop(timer);
    orch_drop(ready);
    orch_loop_stats after = stats();
    CHECK_INT(after.tasks, 1);
    CHECK_INT(after.timers, 0);
    CHECK_INT(after.watched, 0);
    CHECK_INT(after.futures, before.futures);
    for (int i = 0; i < 10; i++) orch_yield();
    CHECK(stats().resumes >= after.resumes + 10);
    CHECK(stats().turns >= after.turns);
    CHECK(stats().guard != ORCH_GUARD_UNKNOWN);
    close(fd[0]);
    close(fd[1]);
}

// ---- deadlock

static orch_result wait_for_promise(void *arg) {
    (void)arg;
    orch_promise never;
    return orch_await(orch_future_new(&never));
}

static orch_result outer_task(void *arg) {
    orch_task_desc inner = {.name = "inner-task", .fn = wait_for_promise};
    (void)arg;
    return orch_await(orch_go_with(&inner));
}

static orch_result deadlock_main(void *arg) {
    orch_task_desc outer = {.name = "outer-task", .fn = outer_task};
    orch_result r = orch_await(orch_go_with(&outer));
    called++;
    called_error = r.error;
    (void)arg;
    return r;
}

TEST(a_deadlock_is_reported_and_ends_the_run) {
    static notes n;
    orch_result r = run_noting(&n, deadlock_main, NULL);
    CHECK_INT(r.error, ORCH_EDEADLK);
    CHECK(n.reports >= 1);
    CHECK(strstr(n.text, "deadlock") != NULL);
    CHECK(strstr(n.text, "outer-task") != NULL);
    CHECK(strstr(n.text, "inner-task") != NULL);
    CHECK_INT(n.unhandled, 0);
    orch_result_free(&r);
}

// One line says of a task what it awaits: the outer one's line names the inner one.
TEST(a_deadlock_report_says_who_awaits_what) {
    static notes n;
    orch_result r = run_noting(&n, deadlock_main, NULL);
    bool together = false;
    for (const char *line = n.text; line && *line; line = strchr(line, '\n')) {
        line += *line == '\n';
        const char *end = strchr(line, '\n'), *outer = strstr(line, "outer-task");
        const char *inner = strstr(line, "inner-task");
        if (end && outer && inner && outer < inner && inner < end) together = true;
    }
    CHECK(together);
    orch_result_free(&r);
}

// The line of a report that starts with `who` (as in "task 'x'"), after its number: "awaits ...".
static const char *line_of(const notes *n, const char *who) {
    static char line[600];
    const char *at = strstr(n->text, who);
    while (at && (at == n->text || strncmp(at - 3, "   ", 3))) at = strstr(at + 1, who);
    const char *awaits = at ? strstr(at, " awaits ") : NULL;
    if (!CHECK(awaits != NULL)) return "";
    snprintf(line, sizeof line, "%.*s", (int)strcspn(awaits + 1, "\n"), awaits + 1);
    return line;
}

static orch_future *named_task(const char *name) {
    orch_task_desc desc = {.name = name, .fn = wait_for_promise};
    return orch_go_with(&desc);
}

static const char *dump(notes *n) {
    n->text[0] = '\0';
    n->reports = 0;
    orch_loop_dump(orch_loop_current());
    return n->text;
}

static orch_result dump_combinator(void *arg) {
    notes *n = arg;
    orch_future *settled = orch_settled(orch_ok_int(1));
    orch_future *all = orch_all(named_task("one"), settled, named_task("two"), named_task("three"));
    dump(n);
    const char *line = line_of(n, "combinator");
    CHECK(strstr(line, "task 'one'#") && strstr(line, "task 'two'#"));
    CHECK(strstr(line, "task 'three'#") != NULL);
    CHECK(strstr(line, "settled") == NULL && strstr(line, "more") == NULL);
    CHECK(strstr(line_of(n, "task 'main'"), "nothing: it runs") != NULL);
    CHECK(strstr(line_of(n, "task 'two'"), "awaits promise") != NULL);
    orch_drop(all);
    CHECK(strstr(dump(n), "combinator") == NULL); // what has ended waits for nothing
    CHECK_INT(n->reports, 1);                     // only main is left
    return orch_ok_int(1);
}

static orch_result dump_many(void *arg) {
    notes *n = arg;
    orch_future *inputs[1000];
    orch_promise p;
    for (int i = 0; i < 1000; i++) inputs[i] = orch_future_new(&p);
    orch_future *all = orch_all_n(1000, inputs);
    dump(n);
    const char *line = line_of(n, "combinator");
    int named = 0;
    for (const char *at = line; (at = strstr(at, "promise #")); at++) named++;
    CHECK_INT(named, 8);
    CHECK(strstr(line, " and 992 more") != NULL);
    orch_drop(all);
    return orch_ok_int(1);
}

static char long_name[400];

static orch_result dump_long_names(void *arg) {
    notes *n = arg;
    memset(long_name, 'x', sizeof long_name - 1);
    orch_future *all = orch_all(named_task(long_name), named_task("short"), named_task(long_name));
    dump(n);
    const char *line = line_of(n, "combinator");
    CHECK(strlen(line) < 512 && strstr(line, "more") != NULL);
    orch_drop(all);
    return orch_ok_int(1);
}

static orch_result dump_scope(void *arg) {
    notes *n = arg;
    orch_scope s;
    orch_scope_desc desc = {.name = "page"};
    orch_task_desc posts = {.name = "posts", .fn = wait_for_promise};
    orch_task_desc likes = {.name = "likes", .fn = wait_for_promise};
    orch_scope_open(&s, &desc);
    orch_scope_go_with(&s, &posts);
    orch_scope_go_with(&s, &likes);
    dump(n);
    const char *line = line_of(n, "scope 'page'");
    CHECK(strstr(line, "task 'posts'#") && strstr(line, "task 'likes'#"));
    orch_scope_cancel(&s, 0);
    orch_result r = orch_scope_close(&s);
    CHECK(strstr(dump(n), "page") == NULL);
    orch_result_free(&r);
    return orch_ok_int(1);
}

static orch_result dump_iteration(void *arg) {
    notes *n = arg;
    orch_future *tasks[2] = {named_task("one"), named_task("two")};
    orch_completion *c = orch_as_completed_n(2, tasks);
    CHECK(strstr(dump(n), "iteration") == NULL); // nobody has asked it for anything
    orch_future *next = orch_completion_next(c);
    dump(n);
    const char *line = line_of(n, "iteration");
    CHECK(strstr(line, "task 'one'#") && strstr(line, "task 'two'#"));
    orch_drop(next);
    orch_completion_free(c);
    return orch_ok_int(1);
}

static orch_result dump_shared(void *arg) {
    notes *n = arg;
    orch_future *task = named_task("popular");
    orch_future *a = orch_then(orch_ref(task), NULL, NULL, NULL);
    orch_future *b = orch_timeout(orch_ref(task), 100);
    dump(n);
    CHECK(strstr(line_of(n, "then"), "awaits task 'popular'#") != NULL);
    CHECK(strstr(line_of(n, "timeout"), "awaits task 'popular'#") != NULL);
    CHECK(strstr(n->text, "holder") == NULL);
    orch_drop(a);
    orch_drop(b);
    orch_drop(task);
    return orch_ok_int(1);
}

static orch_result dump_descriptor(void *arg) {
    notes *n = arg;
    int fd[2];
    char text[64];
    if (!CHECK(pipe(fd) == 0)) return orch_ok_int(0);
    orch_future *all = orch_all(orch_ready(fd[0], ORCH_READABLE));
    snprintf(text, sizeof text, "readiness of descriptor %d#", fd[0]);
    dump(n);
    CHECK(strstr(line_of(n, "combinator"), text) != NULL);
    orch_drop(all);
    close(fd[0]);
    close(fd[1]);
    return orch_ok_int(1);
}

static orch_result read_one(void *arg) {
    char byte;
    return orch_ok_int(orch_read(*(int *)arg, &byte, 1));
}

static orch_result dump_reader(void *arg) {
    notes *n = arg;
    int fd[2];
    char text[64];
    if (!CHECK_INT(orch_pipe(fd), 0)) return orch_ok_int(1);
    orch_task_desc desc = {.name = "reader", .fn = read_one, .arg = fd};
    orch_future *reader = orch_go_with(&desc);
    snprintf(text, sizeof text, "awaits readiness of descriptor %d", fd[0]);
    dump(n);
    if (test_shared->refused == 0) CHECK_STR(line_of(n, "task 'reader'"), text);
    CHECK_INT(orch_write(fd[1], "x", 1), 1);
    orch_drop(reader);
    CHECK_INT(orch_close(fd[0]) | orch_close(fd[1]), 0);
    return orch_ok_int(1);
}

#define DUMP_TEST(name, body)                                                                      \
    TEST(name) {                                                                                   \
        static notes n;                                                                            \
        orch_result r = run_noting(&n, body, &n);                                                  \
        CHECK_INT(orch_int(&r), 1);                                                                \
        orch_result_free(&r);                                                                      \
    }
DUMP_TEST(a_dump_names_all_open_inputs_of_a_combinator, dump_combinator)
DUMP_TEST(a_dump_names_eight_of_a_thousand_and_counts_the_rest, dump_many)
DUMP_TEST(a_dump_keeps_its_lines_short_whatever_the_names, dump_long_names)
DUMP_TEST(a_dump_names_the_members_of_a_scope, dump_scope)
DUMP_TEST(a_dump_names_what_an_iteration_was_asked_for, dump_iteration)
DUMP_TEST(a_dump_shows_what_is_shared_and_no_holders, dump_shared)
DUMP_TEST(a_dump_names_the_descriptor, dump_descriptor)
DUMP_TEST(a_dump_names_the_descriptor_that_a_task_reads, dump_reader)

static orch_result deadlock_by_mutual_wait(void *arg) {
    static orch_future *first;
    if (arg) {
        orch_result r = orch_wait(first);
        return orch_fail(r.error);
    }
    orch_promise p;
    first = orch_future_new(&p);
    orch_future *task = orch_go(deadlock_by_mutual_wait, &first);
    if (!orch_follow(p, task)) CHECK(false); // it waits for what follows it
    orch_result r = orch_wait(first);
    int error = r.error;
    orch_drop(first);
    return orch_fail(error);
}

TEST(a_wait_in_a_circle_is_a_deadlock) {
    static notes n;
    orch_result r = run_noting(&n, deadlock_by_mutual_wait, NULL);
    CHECK(r.error != 0); // EDEADLK, and no hang
    CHECK(n.reports >= 1 || r.error != ORCH_EDEADLK);
    orch_result_free(&r);
}

static orch_future *circle[3];

static orch_result await_in_circle(void *arg) {
    int error = orch_yield(); // until all of the circle are there
    if (error) return orch_fail(error);
    orch_result r = orch_await(*(orch_future **)arg);
    called++;
    return r;
}

static void make_circle(int count) {
    for (int i = 0; i < count; i++) circle[i] = orch_go(await_in_circle, &circle[(i + 1) % count]);
}

static orch_result await_self_main(void *arg) {
    make_circle(1);
    (void)arg;
    return orch_await(orch_ref(circle[0]));
}

TEST(a_task_that_awaits_itself_is_a_deadlock) {
    static notes n;
    orch_result r = run_noting(&n, await_self_main, NULL);
    CHECK(r.error == ORCH_EDEADLK || r.error == ORCH_ECYCLE);
    CHECK(n.reports >= 1 || r.error != ORCH_EDEADLK);
    CHECK_INT(called, 1); // it was ended, not forgotten
    orch_result_free(&r);
}

static orch_result leave_circle(void *arg) {
    make_circle(*(int *)arg);
    orch_yield();
    orch_yield();
    return orch_ok_int(1);
}

TEST(tasks_that_await_each_other_end_with_the_loop) {
    for (int count = 1; count <= 3; count++) {
        called = 0;
        orch_result r = orch_run(leave_circle, &count);
        CHECK_INT(orch_int(&r), 1);
        CHECK_INT(called, count);
        orch_result_free(&r);
    }
}

TEST(a_loop_with_a_circle_can_be_freed) {
    static notes n;
    orch_loop_desc desc = noting(&n);
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    make_circle(3);
    bool real = orch_loop_statistics(loop).tasks == 3;
    if (real) {
        CHECK_INT(orch_loop_run(loop), ORCH_EDEADLK);
        CHECK(n.reports >= 1);
        CHECK_INT(called, 0);
    } else {
        for (int i = 0; i < 3; i++) orch_drop(circle[i]); // not all of them began
    }
    CHECK_INT(orch_loop_free(loop), 0); // nobody shields, settles or holds
    if (real) CHECK_INT(called, 3);
}

static orch_result cancel_circle(void *arg) {
    make_circle(3);
    orch_future *f = orch_ref(circle[*(int *)arg]);
    orch_yield();
    orch_yield();
    orch_cancel(f, 0); // goes round, and ends
    orch_drop(f);
    orch_yield();
    return orch_ok_int(1);
}

TEST(a_task_in_a_circle_can_be_cancelled) {
    for (int i = 0; i < 3; i++) {
        called = 0;
        orch_result r = orch_run(cancel_circle, &i);
        CHECK_INT(orch_int(&r), 1);
        CHECK_INT(called, 3);
        orch_result_free(&r);
    }
}

TEST(run_reports_a_deadlock_and_can_go_on) {
    static notes n;
    orch_loop_desc desc = noting(&n);
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    orch_promise p;
    orch_future *gate = orch_future_new(&p);
    if (!orch_promise_pending(p)) {
        orch_drop(gate);
        CHECK_INT(orch_loop_free(loop), 0);
        return;
    }
    orch_future *f =
        orch_go_with(&(orch_task_desc){.name = "stuck-task", .fn = hold_for_ever, .arg = gate});
    if (called == 0 && !orch_is_settled(f)) {
        CHECK_INT(orch_loop_run(loop), ORCH_EDEADLK);
        CHECK(strstr(n.text, "stuck-task") != NULL);
        CHECK_INT(called, 0); // nothing was cancelled by the report
        CHECK(orch_settle(p, orch_ok_int(3)));
        CHECK_INT(orch_loop_run(loop), 0);
        CHECK_INT(called, 1);
        CHECK_INT(called_error, 0);
        CHECK(orch_peek(f) && orch_int(orch_peek(f)) == 3);
    } else if (called == 0) {
        orch_drop(gate); // the task did not start
    }
    orch_drop(f);
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(a_callback_that_nothing_can_wake_is_a_deadlock) {
    static notes n;
    orch_loop_desc desc = noting(&n);
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    orch_promise p;
    orch_on(orch_future_new(&p), count_call, NULL);
    if (called == 0 && orch_promise_pending(p)) {
        CHECK_INT(orch_loop_run(loop), ORCH_EDEADLK);
        CHECK(n.reports >= 1);
        CHECK_INT(called, 0);
    }
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK_INT(called, 1); // its turn came, with ORCH_ECANCELED
}

// What a timer or a descriptor can still wake is none.
static orch_result not_stuck(void *arg) {
    orch_result r = orch_await(orch_ready(*(int *)arg, ORCH_READABLE));
    return r;
}

static void *write_soon(void *arg) {
    nanosleep(&(struct timespec){0, 5000000}, NULL);
    if (write(*(int *)arg, "x", 1) != 1) called = -1;
    return NULL;
}

TEST(a_wait_for_a_descriptor_is_no_deadlock) {
    static notes n;
    int fd[2];
    pthread_t thread;
    if (!CHECK(pipe(fd) == 0)) return;
    if (!CHECK(pthread_create(&thread, NULL, write_soon, &fd[1]) == 0)) return;
    orch_result r = run_noting(&n, not_stuck, &fd[0]);
    CHECK_INT(orch_int(&r), ORCH_READABLE);
    CHECK_INT(n.reports, 0);
    pthread_join(thread, NULL);
    orch_result_free(&r);
    close(fd[0]);
    close(fd[1]);
}

static orch_result shield_for_ever(void *arg) {
    orch_promise never;
    orch_sleep(60000); // refused or cancelled
    orch_shield_begin();
    orch_result r = orch_await(orch_future_new(&never));
    *(int *)arg = r.error;
    for (int i = 0; i < 3; i++) { // once it is lifted, it holds no more
        orch_result again = orch_await(orch_future_new(&never));
        if (again.error != r.error) *(int *)arg = 1;
        orch_result_free(&again);
    }
    orch_shield_end();
    return r;
}

static orch_result leave_shielding(void *arg) {
    orch_detach(orch_go(shield_for_ever, arg));
    return orch_ok_int(8);
}

// Main is done, so that its value counts; the shield is lifted because nothing else could end it.
TEST(a_shield_holds_until_the_loop_is_deadlocked) {
    static notes n;
    static int ended;
    orch_result r = run_noting(&n, leave_shielding, &ended);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_int(&r), 8);
    CHECK(ended < 0);
    CHECK_INT(ended, ORCH_ECANCELED);
    orch_result_free(&r);
}

static orch_result leave_shield_nap(void *arg) {
    orch_detach(orch_go(shield_nap, arg)); // asleep under its shield when main returns
    return orch_ok_int(8);
}

TEST(the_end_of_main_does_not_disturb_a_wait_under_a_shield) {
    static int done;
    orch_result r = orch_run(leave_shield_nap, &done);
    if (CHECK_INT(orch_int(&r), 8)) CHECK_INT(done, 1);
    orch_result_free(&r);
}

static orch_result await_shielding(void *arg) {
    orch_future *f = orch_go(shield_for_ever, arg);
    orch_cancel(f, 0);
    orch_result r = orch_await(f);
    called++;
    return r;
}

// Main itself waits for the shielding task: once the shield is lifted, all of it ends.
TEST(lifting_a_shield_can_end_a_deadlock) {
    static notes n;
    static int ended;
    orch_result r = run_noting(&n, await_shielding, &ended);
    CHECK_INT(r.error, ORCH_ECANCELED); // what main returned: it could end after all
    CHECK_INT(n.reports, 0);
    CHECK_INT(called, 1);
    CHECK_INT(ended, ORCH_ECANCELED);
    orch_result_free(&r);
}

static orch_result await_stubborn(void *arg) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_promise_on_cancel(p, keeps_going, arg);
    orch_result r = orch_await(f);
    called++;
    called_error = r.error;
    orch_result_free(&r);
    return orch_ok_int(1);
}

static orch_result leave_stubborn(void *arg) {
    orch_detach(orch_go(await_stubborn, arg));
    return orch_ok_int(8);
}

// Asked to end, the producer says that it will still settle, and never does.
TEST(a_producer_that_never_settles_does_not_keep_the_loop) {
    static notes n;
    static int asked;
    orch_result r = run_noting(&n, leave_stubborn, &asked);
    if (CHECK_INT(orch_int(&r), 8)) {
        CHECK_INT(asked, 1);
        CHECK_INT(called, 1);
        CHECK_INT(called_error, ORCH_ECANCELED);
    }
    orch_result_free(&r);
}

static orch_result main_done_first(void *arg) {
    orch_detach(orch_go(wait_for_promise, NULL));
    orch_detach(orch_go(sleep_long, NULL));
    (void)arg;
    return orch_ok_int(6);
}

TEST(main_done_comes_before_deadlock) {
    static notes n;
    orch_result r = run_noting(&n, main_done_first, NULL);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_int(&r), 6);
    CHECK_INT(n.reports, 0);
    CHECK_INT(n.unhandled, 0); // they were cancelled
    orch_result_free(&r);
}

static orch_result main_settles_last(void *arg) {
    orch_promise p;
    (void)arg;
    orch_on(orch_future_new(&p), count_call, NULL); // pending when main returns
    return orch_ok_int(6);
}

TEST(a_callback_left_by_main_runs_once) {
    static notes n;
    orch_result r = run_noting(&n, main_settles_last, NULL);
    CHECK_INT(orch_int(&r), 6);
    CHECK_INT(called, 1);
    CHECK_INT(called_error, ORCH_ECANCELED);
    orch_result_free(&r);
}

// ---- reports

static orch_result dump_main(void *arg) {
    static orch_promise never;
    orch_task_desc sleeper = {.name = "a-sleeper", .fn = sleep_long};
    orch_task_desc waiter = {.name = "a-waiter", .fn = hold_for_ever};
    waiter.arg = orch_future_new(&never);
    orch_future *a = orch_go_with(&sleeper), *b = orch_go_with(&waiter);
    orch_loop_dump(orch_loop_current());
    orch_drop(a);
    orch_drop(b);
    (void)arg;
    return orch_ok_int(1);
}

TEST(a_dump_names_every_task) {
    static notes n;
    orch_result r = run_noting(&n, dump_main, NULL);
    CHECK_INT(orch_int(&r), 1);
    CHECK(strstr(n.text, "a-sleeper") != NULL);
    CHECK(strstr(n.text, "a-waiter") != NULL);
    orch_result_free(&r);
}

static orch_result failing(void *arg) { return orch_failf(*(int *)arg, "no luck with %d", 3); }

static orch_result spawn_failing(void *arg) {
    CHECK_INT(orch_spawn(failing, arg), 0);
    orch_yield();
    return orch_ok_int(1);
}

TEST(an_unhandled_rejection_reaches_the_hook) {
    static notes n;
    int code = 55;
    orch_result r = run_noting(&n, spawn_failing, &code);
    CHECK_INT(orch_int(&r), 1);
    CHECK_INT(n.unhandled, 1);
    CHECK_INT(n.error, 55);
    orch_result_free(&r);
}

// What was printed on stderr meanwhile.
static int saved_stderr = -1, stderr_pipe[2];

static void capture_begin(void) {
    fflush(stderr);
    saved_stderr = dup(2);
    if (pipe(stderr_pipe) || dup2(stderr_pipe[1], 2) < 0) abort();
    fcntl(stderr_pipe[0], F_SETFL, O_NONBLOCK);
}

static const char *capture_end(void) {
    static char text[8192];
    fflush(stderr);
    ssize_t got = read(stderr_pipe[0], text, sizeof text - 1);
    text[got > 0 ? got : 0] = '\0';
    if (dup2(saved_stderr, 2) < 0) abort();
    close(saved_stderr);
    close(stderr_pipe[0]);
    close(stderr_pipe[1]);
    return text;
}

static orch_result spawn_failing_quietly(void *arg) {
    int rc = orch_spawn(failing, arg);
    orch_yield();
    return rc ? orch_fail(rc) : orch_ok_int(1);
}

TEST(an_unhandled_rejection_is_one_line_on_stderr) {
    int code = 55;
    orch_result warm_up = orch_run(nap, NULL); // a sanitizer may have a word to say at the first
    orch_result_free(&warm_up);
    capture_begin();
    orch_result r = orch_run(spawn_failing_quietly, &code);
    const char *text = capture_end();
    CHECK_INT(orch_int(&r), 1);
    CHECK(strstr(text, "no luck with 3") != NULL);
    CHECK(strchr(text, '\n') == text + strlen(text) - 1);
    orch_result_free(&r);
}

static orch_result deadlock_quietly(void *arg) {
    (void)arg;
    return wait_for_promise(NULL);
}

TEST(a_deadlock_is_reported_on_stderr) {
    capture_begin();
    orch_result r = orch_run(deadlock_quietly, NULL);
    const char *text = capture_end();
    CHECK_INT(r.error, ORCH_EDEADLK);
    CHECK(strstr(text, "deadlock") != NULL);
    orch_result_free(&r);
}

// ---- orch_exit

TEST(exit_of_a_value_is_0_and_silent) {
    int value = 5;
    capture_begin();
    int code = orch_exit(orch_ok(&value, count_release));
    const char *text = capture_end();
    CHECK_INT(code, 0);
    CHECK_STR(text, "");
    CHECK_INT(released, 1);
}

TEST(exit_of_an_error_is_1_and_prints_its_message) {
    capture_begin();
    int code = orch_exit(orch_failf(7, "the %s is closed", "shop"));
    const char *text = capture_end();
    CHECK_INT(code, 1);
    CHECK(strstr(text, "the shop is closed") != NULL);
    CHECK(text[0] != '\0' && text[strlen(text) - 1] == '\n');
    capture_begin();
    code = orch_exit(orch_fail(ORCH_ETIMEDOUT));
    text = capture_end();
    CHECK_INT(code, 1);
    CHECK(strstr(text, "timed out") != NULL);
}

// ---- what outlives orch_run

static orch_result return_value(void *arg) { return orch_ok(arg, count_release); }

TEST(a_value_outlives_its_loop) {
    int value = 5;
    orch_result r = orch_run(return_value, &value);
    CHECK(r.value == &value);
    CHECK_INT(released, 0);
    CHECK(orch_take(&r) == &value); // and is the caller's alone
    CHECK_INT(released, 0);
    r = orch_run(return_value, &value);
    bool real = r.error == 0;
    orch_result_free(&r);
    if (real) CHECK_INT(released, 1);
}

static orch_result return_message(void *arg) { return orch_failf(9, "message %d", *(int *)arg); }

TEST(a_message_outlives_its_loop) {
    int number = 31;
    orch_result r = orch_run(return_message, &number);
    CHECK_INT(r.error, 9);
    CHECK_STR(orch_message(&r), "message 31");
    orch_result_free(&r);
}

static orch_result timeout_main(void *arg) {
    (void)arg;
    return orch_await(orch_timeout(orch_after(60000), 3));
}

TEST(a_timeouts_message_outlives_its_loop) {
    orch_result r = orch_run(timeout_main, NULL);
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    CHECK_STR(orch_message(&r), "Timeout after 3 ms");
    orch_result_free(&r);
}

static orch_result value_task(void *arg) {
    orch_sleep(1);
    return orch_ok(arg, count_release);
}

static orch_result list_main(void *arg) {
    orch_future *a = orch_go(value_task, arg), *b = orch_go(return_message, arg);
    orch_future *inner = orch_all(orch_go(value_task, arg), orch_settled(orch_ok_int(4)));
    return orch_await(orch_all_settled(a, b, inner));
}

TEST(a_list_outlives_its_loop) {
    int number = 12;
    orch_result r = orch_run(list_main, &number);
    if (CHECK_INT(r.error, 0) && CHECK_INT(orch_count(&r), 3)) {
        CHECK(orch_at(&r, 0)->value == &number);
        CHECK_STR(orch_message(orch_at(&r, 1)), "message 12");
        CHECK_INT(orch_count(orch_at(&r, 2)), 2);
        CHECK(orch_at(orch_at(&r, 2), 0)->value == &number);
        CHECK_INT(orch_int(orch_at(orch_at(&r, 2), 1)), 4);
        CHECK_INT(released, 0);
        orch_result_free(&r);
        CHECK_INT(released, 2);
    }
    orch_result_free(&r);
}

// Their loops' memory lives until then; freed in any order, also inside another loop.
static orch_result free_older(void *arg) {
    orch_result_free(arg);
    orch_sleep(1);
    return orch_ok_int(1);
}

TEST(lists_of_several_loops_live_side_by_side) {
    int number = 12;
    orch_result r[3];
    for (int i = 0; i < 3; i++) r[i] = orch_run(list_main, &number);
    bool real = !r[0].error && !r[1].error && !r[2].error;
    orch_result_free(&r[1]);
    orch_result inside = orch_run(free_older, &r[0]);
    orch_result_free(&inside);
    orch_result_free(&r[0]); // if it did not begin
    if (real) CHECK(orch_at(&r[2], 0)->value == &number);
    orch_result_free(&r[2]);
    if (real) CHECK_INT(released, 6);
}

static orch_result chain_main(void *arg) { return orch_chain(orch_go(value_task, arg)); }

TEST(main_may_return_a_future) {
    int value = 5;
    orch_result r = orch_run(chain_main, &value);
    CHECK_INT(r.error, 0);
    CHECK(r.value == &value);
    orch_result_free(&r);
    CHECK_INT(released, r.error ? 0 : 1);
}

static orch_result share_main(void *arg) {
    orch_future *f = orch_go(value_task, arg);
    orch_future *kept = orch_ref(f); // never given back: what is left is freed with the loop
    orch_result r = orch_await(f);
    (void)kept;
    return r;
}

TEST(a_shared_value_outlives_its_loop) {
    int value = 5;
    orch_result r = orch_run(share_main, &value);
    if (CHECK_INT(r.error, 0)) {
        CHECK(r.value == &value);
        CHECK_INT(released, 0);
        orch_result_free(&r);
        CHECK_INT(released, 1);
    }
    orch_result_free(&r);
}

static orch_future *left_behind[4];
static orch_promise left_ticket;

static orch_result leave_futures(void *arg) {
    left_behind[0] = orch_future_new(&left_ticket);
    left_behind[1] = orch_settled(orch_ok(arg, count_release));
    left_behind[2] = orch_after(60000);
    left_behind[3] = orch_go(sleep_long, NULL);
    return orch_ok_int(1);
}

TEST(futures_still_held_are_freed_with_the_loop) {
    int value = 5;
    orch_result r = orch_run(leave_futures, &value);
    if (CHECK_INT(orch_int(&r), 1)) CHECK_INT(released, 1);
    orch_result_free(&r);
}

static orch_result many_kinds(void *arg) {
    orch_future *f[4] = {orch_go(value_task, arg), orch_after(1), orch_go(nap, NULL),
                         orch_settled(orch_fail(3))};
    orch_result r = orch_await(orch_all_settled_n(4, f));
    return r;
}

TEST(runs_follow_on_each_other) {
    int value = 5;
    for (int i = 0; i < 10; i++) {
        orch_result r = orch_run(many_kinds, &value);
        if (!CHECK_INT(orch_count(&r), 4)) i = 10;
        orch_result_free(&r);
    }
    CHECK_INT(released, 10);
}

// ---- threads

typedef struct worker {
    pthread_t thread;
    bool started;
    intptr_t sum;
    orch_loop *loop;
} worker;

static orch_result worker_part(void *arg) {
    for (int i = 0; i < 50; i++) {
        int error = i % 10 ? orch_yield() : orch_sleep(1);
        if (error) return orch_fail(error);
    }
    return orch_ok_int(*(int *)arg);
}

static orch_result worker_main(void *arg) {
    worker *w = arg;
    static int parts[20];
    orch_future *f[20];
    w->loop = orch_loop_current();
    for (int i = 0; i < 20; i++) f[i] = orch_go(worker_part, &parts[i]);
    orch_result r = orch_await(orch_all_n(20, f));
    for (size_t i = 0; i < orch_count(&r); i++) w->sum += orch_int(orch_at(&r, i)) + 1;
    int error = r.error;
    orch_result_free(&r);
    return error ? orch_fail(error) : orch_ok_int(1);
}

static void *worker_thread(void *arg) {
    orch_result r = orch_run(worker_main, arg);
    orch_result_free(&r);
    return orch_loop_current();
}

TEST(each_thread_runs_a_loop_of_its_own) {
    static worker workers[6];
    const int many = test_shared->fail_at ? 2 : 6; // a sweep repeats this often
    for (int i = 0; i < many; i++)
        workers[i].started =
            pthread_create(&workers[i].thread, NULL, worker_thread, &workers[i]) == 0;
    worker here = {.sum = 0};
    CHECK(worker_thread(&here) == NULL);
    CHECK_INT(here.sum, 20);
    for (int i = 0; i < many; i++) {
        void *left = NULL;
        if (!CHECK(workers[i].started)) continue;
        pthread_join(workers[i].thread, &left);
        CHECK(left == NULL); // no loop is left behind
        CHECK_INT(workers[i].sum, 20);
    }
}

static void *ask_for_loop(void *arg) {
    *(orch_loop **)arg = orch_loop_current();
    return NULL;
}

TEST(a_loop_is_seen_by_its_own_thread_only) {
    orch_loop *loop = orch_loop_new(NULL), *seen = loop;
    pthread_t thread;
    if (!CHECK(loop != NULL)) return;
    if (CHECK(pthread_create(&thread, NULL, ask_for_loop, &seen) == 0)) {
        pthread_join(thread, NULL);
        CHECK(seen == NULL);
    }
    CHECK_INT(orch_loop_free(loop), 0);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
