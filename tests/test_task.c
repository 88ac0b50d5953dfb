// test_task.c: starting, awaiting, naming and cancelling tasks; arguments, shields, fairness.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../asyncorch.h"
#include "test.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

// Awaits: the number the task returned, or its error.
static intptr_t join(orch_future *f) {
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

// Whether work is truly under way: not so when memory was refused.
static bool begun(const orch_future *f) { return !orch_is_settled(f); }

static int released;
static void *released_last;

static void count_release(void *value) {
    released++;
    released_last = value;
}

static char log_text[512];

static void log_char(char c) {
    size_t used = strlen(log_text);
    if (used + 1 < sizeof log_text) log_text[used] = c;
}

// ---- start

static orch_result log_three(void *arg) {
    const char *name = arg;
    for (int i = 0; i < 3; i++) {
        log_char(name[0]);
        int error = orch_yield();
        if (error) return orch_fail(error);
    }
    log_char((char)(name[0] - 'a' + 'A'));
    return orch_ok_int(name[0]);
}

TASK_TEST(a_task_starts_at_once) {
    orch_future *f = orch_go(log_three, (void *)(uintptr_t) "a");
    if (begun(f)) CHECK_STR(log_text, "a"); // inside the call, up to its first wait
    CHECK_INT(join(f), 'a');
    CHECK_STR(log_text, "aaaA");
}

TASK_TEST(tasks_are_resumed_in_order) {
    orch_future *f[3];
    static const char *names[] = {"a", "b", "c"};
    for (int i = 0; i < 3; i++) f[i] = orch_go(log_three, (void *)(uintptr_t)names[i]);
    for (int i = 0; i < 3; i++) CHECK_INT(join(f[i]), names[i][0]);
    CHECK_STR(log_text, "abcabcabcABC");
}

static orch_result at_once(void *arg) {
    log_char('x');
    return orch_ok_int(arg ? *(int *)arg : 0);
}

TASK_TEST(a_task_that_never_waits_is_settled_when_go_returns) {
    int five = 5;
    orch_future *f = orch_go(at_once, &five);
    CHECK_STR(log_text, "x");
    CHECK(orch_is_settled(f));
    const orch_result *r = orch_peek(f);
    CHECK(r && orch_int(r) == 5);
    CHECK_INT(join(f), 5);
}

TEST(a_task_can_start_outside_of_tasks) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_future *f = orch_go(log_three, (void *)(uintptr_t) "a");
    if (begun(f)) {
        CHECK_STR(log_text, "a");
        CHECK_INT(orch_loop_run(loop), 0);
        CHECK_STR(log_text, "aaaA");
        CHECK(orch_peek(f) && orch_int(orch_peek(f)) == 'a');
    }
    orch_drop(f);
    CHECK_INT(orch_loop_free(loop), 0);
}

static void start_from_callback(orch_result *in, void *context) {
    (void)in;
    CHECK(orch_self() == NULL);
    orch_future *f = orch_go(log_three, context);
    if (begun(f)) CHECK_STR(log_text, "b");
    orch_detach(f);
    CHECK(orch_self() == NULL);
}

TASK_TEST(a_task_can_start_in_a_callback) {
    orch_on(orch_settled(orch_ok_int(0)), start_from_callback, (void *)(uintptr_t) "b");
    for (int i = 0; i < 6; i++) orch_yield();
    CHECK_STR(log_text, "bbbB");
}

static orch_result start_nested(void *arg) {
    int left = *(int *)arg;
    if (left == 0) return orch_ok_int(0);
    left--;
    orch_task *self = orch_self();
    intptr_t below = join(orch_go(start_nested, &left));
    CHECK(orch_self() == self);
    return below < 0 ? orch_fail((int)below) : orch_ok_int(below + 1);
}

TASK_TEST(tasks_start_tasks_to_any_depth) {
    int depth = 2000;
    CHECK_INT(join(orch_go(start_nested, &depth)), 2000);
}

// ---- outcomes

static orch_result return_argument(void *arg) { return *(orch_result *)arg; }

static orch_result return_later(void *arg) {
    orch_yield();
    return *(orch_result *)arg;
}

TASK_TEST(a_task_returns_a_value) {
    int value = 5;
    for (int i = 0; i < 2; i++) {
        orch_result given = orch_ok(&value, count_release);
        orch_result r = orch_await(orch_go(i ? return_later : return_argument, &given));
        if (!CHECK_INT(r.error, 0)) continue;
        CHECK(r.value == &value);
        CHECK_INT(released, 0);
        CHECK(orch_take(&r) == &value); // mine alone
        orch_result_free(&r);
        CHECK_INT(released, 0);
    }
}

TASK_TEST(a_task_returns_an_error) {
    orch_result given = orch_fail(77);
    CHECK_INT(join(orch_go(return_argument, &given)), 77);
    CHECK_INT(join(orch_go(return_later, &given)), 77);
    given = orch_fail(ORCH_ETIMEDOUT);
    CHECK_INT(join(orch_go(return_later, &given)), ORCH_ETIMEDOUT);
}

static orch_result return_message(void *arg) {
    orch_yield();
    return orch_failf(4, "after %d tries", *(int *)arg);
}

TASK_TEST(a_task_returns_a_message) {
    int tries = 3;
    orch_result r = orch_await(orch_go(return_message, &tries));
    CHECK_INT(r.error, 4);
    CHECK_STR(orch_message(&r), "after 3 tries");
    orch_result_free(&r);
}

static orch_result return_chain(void *arg) { return orch_chain(orch_go(return_later, arg)); }

static orch_result return_chain_later(void *arg) {
    orch_yield();
    return orch_chain(orch_go(return_chain, arg));
}

TASK_TEST(a_task_returns_another_future) {
    int value = 5;
    orch_result given = orch_ok(&value, count_release);
    orch_result r = orch_await(orch_go(return_chain_later, &given));
    if (CHECK_INT(r.error, 0)) CHECK(r.value == &value);
    orch_result_free(&r);
    CHECK_INT(released, r.error ? 0 : 1);
}

static orch_result return_given(void *arg) { return orch_chain(*(orch_future **)arg); }

TASK_TEST(a_task_that_returned_a_future_has_ended) {
    orch_promise p;
    orch_future *gate = orch_future_new(&p);
    orch_future *f = orch_go(return_given, &gate);
    CHECK_INT(stats().tasks, 1); // only the future goes on
    CHECK(orch_settle(p, orch_ok_int(9)));
    CHECK_INT(join(f), 9);
}

TASK_TEST(an_outcome_nobody_took_is_released) {
    int value = 5;
    orch_result given = orch_ok(&value, count_release);
    orch_future *f = orch_go(return_argument, &given);
    bool ran = orch_peek(f) && orch_peek(f)->error == 0;
    orch_drop(f);
    if (!ran) return;
    CHECK_INT(released, 1);
    orch_detach(orch_go(return_argument, &given));
    CHECK_INT(released, 2);
    orch_detach(orch_go(return_later, &given));
    orch_yield();
    orch_yield();
    CHECK_INT(released, 3);
}

// ---- await and wait

TASK_TEST(await_of_what_is_settled_does_not_wait) {
    orch_future *other = orch_go(log_three, (void *)(uintptr_t) "a");
    for (int i = 0; i < 50; i++) CHECK_INT(join(orch_settled(orch_ok_int(i))), i);
    if (begun(other)) CHECK_STR(log_text, "a");
    CHECK_INT(join(other), 'a');
}

static orch_result wait_on(void *arg) {
    orch_result r = orch_wait(*(orch_future **)arg);
    intptr_t got = orch_int(&r);
    orch_result_free(&r); // of a lent result: does nothing
    return r.error ? orch_fail(r.error) : orch_ok_int(got);
}

TASK_TEST(many_may_wait_for_one_future) {
    orch_promise p;
    orch_future *gate = orch_future_new(&p), *f[5];
    for (int i = 0; i < 5; i++) f[i] = orch_go(wait_on, &gate);
    orch_yield();
    CHECK(orch_settle(p, orch_ok_int(12)));
    for (int i = 0; i < 5; i++) CHECK_INT(join(f[i]), 12);
    CHECK_INT(join(gate), 12); // still there to be taken
}

TASK_TEST(wait_lends_and_await_takes) {
    int value = 5;
    orch_future *f = orch_settled(orch_ok(&value, count_release));
    for (int i = 0; i < 3; i++) {
        orch_result lent = orch_wait(f);
        if (!lent.error) CHECK(lent.value == &value);
        CHECK(orch_take(&lent) == NULL);
        orch_result_free(&lent); // does nothing
    }
    if (orch_peek(f) && orch_peek(f)->error == 0) CHECK_INT(released, 0);
    orch_result r = orch_await(f);
    if (!r.error) CHECK(orch_take(&r) == &value);
    orch_result_free(&r);
    CHECK_INT(released, r.error ? 1 : 0);
}

TASK_TEST(a_shared_outcome_is_released_with_its_last_share) {
    int value = 5;
    orch_future *f = orch_settled(orch_ok(&value, count_release)), *g = orch_ref(f);
    bool real = orch_peek(f) && orch_peek(f)->error == 0;
    orch_result a = orch_await(f), b = orch_await(g);
    if (real) {
        CHECK(a.value == &value && b.value == &value);
        CHECK(orch_take(&a) == NULL || orch_take(&b) == NULL); // not both
        CHECK_INT(released, 0);
    }
    orch_result_free(&a);
    if (real) CHECK_INT(released, 0);
    orch_result_free(&b);
    CHECK_INT(released, 1);
}

TASK_TEST(tasks_can_be_awaited_in_any_order) {
    orch_future *f[3];
    static const char *names[] = {"a", "b", "c"};
    for (int i = 0; i < 3; i++) f[i] = orch_go(log_three, (void *)(uintptr_t)names[i]);
    CHECK_INT(join(f[2]), 'c');
    CHECK_INT(join(f[0]), 'a');
    CHECK_INT(join(f[1]), 'b');
}

static int depth_reached;

static intptr_t await_at_depth(int depth) {
    volatile char frame[64];
    frame[0] = (char)depth;
    if (depth == 0) return join(orch_after(1));
    intptr_t below = await_at_depth(depth - 1);
    if (frame[0] == (char)depth) depth_reached++;
    return below;
}

TASK_TEST(await_works_at_any_call_depth) {
    CHECK_INT(await_at_depth(60), 0);
    CHECK_INT(depth_reached, 60);
}

TASK_TEST(sleep_and_yield_return_0) {
    CHECK_INT(orch_yield(), 0); // with nothing else to run, too
    CHECK_INT(orch_sleep(0), 0);
    CHECK_INT(orch_sleep(1), 0);
    CHECK_INT(orch_yield(), 0);
}

TASK_TEST(yield_lets_everything_ready_run_first) {
    orch_future *f[20];
    for (int i = 0; i < 20; i++) f[i] = orch_go(log_three, (void *)(uintptr_t) "y");
    size_t started = strlen(log_text);
    orch_yield();
    CHECK_INT(strlen(log_text), 2 * started);
    for (int i = 0; i < 20; i++) CHECK_INT(join(f[i]), 'y');
}

// ---- arguments

typedef struct order {
    int number;
    char text[300];
} order;

static orch_result read_copy(void *arg) {
    const order *o = arg;
    int number = o->number;
    orch_yield(); // the original is overwritten meanwhile
    bool whole = !strcmp(o->text, "original") && o->text[sizeof o->text - 1] == '!';
    return orch_ok_int(number == o->number && whole ? number : -1);
}

TASK_TEST(a_copied_argument_is_the_tasks_own) {
    order o = {41, "original"};
    o.text[sizeof o.text - 1] = '!';
    orch_future *f =
        orch_go_with(&(orch_task_desc){.fn = read_copy, .arg = &o, .arg_size = sizeof o});
    memset(&o, 'z', sizeof o);
    CHECK_INT(join(f), 41);
}

TASK_TEST(a_copy_may_be_as_large_as_half_the_stack) {
    static char big[32 * 1024];
    static order *o = (order *)(void *)big;
    *o = (order){42, "original"};
    o->text[sizeof o->text - 1] = '!';
    orch_task_desc desc = {.fn = read_copy, .arg = big, .arg_size = sizeof big};
    orch_future *f = orch_go_with(&desc);
    CHECK_INT(join(f), 42);
    desc.stack_size = 128 * 1024;
    f = orch_go_with(&desc);
    CHECK_INT(join(f), 42);
}

static void *got_argument;

static orch_result keep_argument(void *arg) {
    got_argument = arg;
    orch_yield();
    return orch_ok_int(1);
}

TASK_TEST(an_argument_is_released_once_when_its_task_has_ended) {
    order o = {41, "original"};
    orch_task_desc desc = {.fn = keep_argument, .arg = &o, .release = count_release};
    orch_future *f = orch_go_with(&desc);
    if (begun(f)) {
        CHECK(got_argument == &o);
        CHECK_INT(released, 0);
        CHECK_INT(join(f), 1);
    } else {
        orch_drop(f);
    }
    CHECK_INT(released, 1);
    CHECK(released_last == &o);
}

typedef struct big_argument {
    unsigned char bytes[1000];
} big_argument;

static orch_result sum_bytes(void *arg) {
    const big_argument *big = arg;
    int sum = 0;
    for (size_t i = 0; i < sizeof big->bytes; i++) sum += big->bytes[i];
    return orch_ok_int(sum);
}

// Valgrind has to be told that the stack begins lower than the last time.
TASK_TEST(a_big_argument_is_copied_to_a_stack_that_was_used) {
    int five = 5;
    big_argument big;
    memset(&big, 1, sizeof big);
    orch_task_desc desc = {.fn = sum_bytes, .arg = &big, .arg_size = sizeof big};
    CHECK_INT(join(orch_go(at_once, &five)), 5);
    CHECK_INT(join(orch_go_with(&desc)), 1000);
}

static int released_number;

static void release_order(void *arg) {
    released++;
    released_number = ((order *)arg)->number; // readable until then
}

TASK_TEST(release_of_a_copied_argument_gets_the_copy) {
    order o = {43, "original"};
    orch_task_desc desc = {
        .fn = keep_argument, .arg = &o, .arg_size = sizeof o, .release = release_order};
    orch_future *f = orch_go_with(&desc);
    o.number = 0;
    if (begun(f)) {
        CHECK(got_argument != &o);
        CHECK_INT(join(f), 1);
        CHECK_INT(released_number, 43);
    } else {
        orch_drop(f);
    }
    CHECK_INT(released, 1);
}

TASK_TEST(an_argument_is_released_when_its_task_is_dropped) {
    int value = 5;
    orch_task_desc desc = {.fn = keep_argument, .arg = &value, .release = count_release};
    orch_drop(orch_go_with(&desc));
    CHECK_INT(released, 1);
    orch_detach(orch_go_with(&desc));
    orch_yield();
    orch_yield();
    CHECK_INT(released, 2);
}

static orch_result slow_end(void *arg) {
    orch_sleep(60000);
    orch_shield_begin();
    orch_sleep(1);
    ++*(int *)arg;
    orch_shield_end();
    return orch_ok_int(1);
}

static orch_future *to_drop;

static void drop_in_release(void *arg) {
    count_release(arg);
    orch_drop(to_drop); // the task has ended: nothing can wait here
}

TASK_TEST(a_release_may_give_up_work) {
    int ended = 0;
    to_drop = orch_go(slow_end, &ended);
    bool real = begun(to_drop);
    orch_task_desc desc = {.fn = keep_argument, .arg = &ended, .release = drop_in_release};
    intptr_t got = join(orch_go_with(&desc));
    CHECK_INT(released, 1);
    if (got == 1 && real) CHECK_INT(ended, 0); // it ends later
    for (int i = 0; i < 100 && real && ended == 0; i++) orch_sleep(1);
    CHECK_INT(ended, 1);
    CHECK_INT(stats().tasks, 1);
}

TEST(an_argument_is_released_when_its_task_ends_with_the_loop) {
    int value = 5;
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_task_desc desc = {.fn = keep_argument, .arg = &value, .release = count_release};
    orch_detach(orch_go_with(&desc));
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK_INT(released, 1);
}

// ---- names

static orch_result check_name(void *arg) {
    CHECK_STR(orch_task_name(orch_self()), (const char *)arg);
    orch_yield();
    CHECK_STR(orch_task_name(orch_self()), (const char *)arg);
    return orch_ok_int(1);
}

TASK_TEST(a_task_knows_its_name) {
    char name[] = "fetch 7", none[] = "";
    orch_future *a = orch_go_with(&(orch_task_desc){.name = name, .fn = check_name, .arg = name});
    orch_future *b = orch_go(check_name, none);
    CHECK_INT(join(a), 1);
    CHECK_INT(join(b), 1);
}

static orch_result return_self(void *arg) {
    orch_task *self = orch_self();
    (void)arg;
    orch_yield();
    CHECK(orch_self() == self && self != NULL);
    return orch_ok(self, NULL);
}

TASK_TEST(self_is_the_running_task) {
    orch_task *self = orch_self();
    CHECK(self != NULL);
    orch_future *a = orch_go(return_self, NULL), *b = orch_go(return_self, NULL);
    CHECK(orch_self() == self);
    orch_result ra = orch_await(a), rb = orch_await(b);
    CHECK(orch_self() == self);
    if (!ra.error && !rb.error) CHECK(ra.value != rb.value && ra.value != self && rb.value != self);
    orch_result_free(&ra);
    orch_result_free(&rb);
}

// ---- spawn

static orch_result spawned(void *arg) {
    orch_yield();
    ++*(int *)arg;
    return orch_ok_int(1);
}

TASK_TEST(spawn_starts_and_lets_go) {
    int count = 0;
    for (int i = 0; i < 5; i++) CHECK_INT(orch_spawn(spawned, &count), 0);
    CHECK_INT(count, 0);
    orch_yield();
    orch_yield();
    CHECK_INT(count, 5);
    CHECK_INT(stats().tasks, 1);
}

// ---- cancelling what waits

typedef struct victim {
    orch_promise ticket; // of what it waits for
    orch_future *gate;
    int rc, reason, ended;
    void *value;
} victim;

static orch_result sleeping_victim(void *arg) {
    victim *v = arg;
    v->rc = orch_sleep(60000);
    v->reason = orch_cancel_reason();
    v->ended++;
    return orch_ok_int(4);
}

TASK_TEST(a_sleeping_task_is_cancelled) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(sleeping_victim, &v);
    if (!begun(f)) {
        orch_drop(f);
        return;
    }
    orch_cancel(f, 0);
    CHECK_INT(v.ended, 0); // asked, no more: the task runs from the loop
    CHECK_INT(join(f), 4); // and may still return a value
    CHECK_INT(v.rc, ORCH_ECANCELED);
    CHECK_INT(v.reason, ORCH_ECANCELED);
    CHECK_INT(stats().timers, 0);
}

TASK_TEST(a_cancelled_task_can_read_the_reason) {
    static const int reasons[] = {42, -7, ORCH_ETIMEDOUT};
    for (int i = 0; i < 3; i++) {
        victim v = {.rc = 1};
        orch_future *f = orch_go(sleeping_victim, &v);
        if (begun(f)) {
            orch_cancel(f, reasons[i]);
            CHECK_INT(join(f), 4);
            CHECK_INT(v.reason, reasons[i]);
        } else {
            orch_drop(f);
        }
    }
    CHECK_INT(orch_cancel_reason(), 0); // nobody asked main
}

static orch_result parent_of_sleeping(void *arg) {
    return orch_await(orch_then(orch_go(sleeping_victim, arg), NULL, NULL, NULL));
}

TASK_TEST(the_reason_reaches_where_the_work_is_done) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(parent_of_sleeping, &v);
    if (begun(f)) {
        orch_cancel(f, 42);
        CHECK_INT(join(f), 4);
        CHECK_INT(v.rc, ORCH_ECANCELED);
        CHECK_INT(v.reason, 42);
    } else {
        orch_drop(f);
    }
}

static orch_result yielding_victim(void *arg) {
    victim *v = arg;
    for (int i = 0; i < 1000000 && !v->rc; i++) v->rc = orch_yield();
    v->ended++;
    return orch_ok_int(4);
}

TASK_TEST(a_yielding_task_is_cancelled) {
    victim v = {.rc = 0};
    orch_future *f = orch_go(yielding_victim, &v);
    orch_yield();
    orch_cancel(f, 0);
    CHECK_INT(join(f), 4);
    CHECK_INT(v.rc, ORCH_ECANCELED);
}

static orch_result awaiting_victim(void *arg) {
    victim *v = arg;
    orch_result r = orch_await(v->gate);
    v->rc = r.error ? r.error : (int)orch_int(&r);
    v->ended++;
    return r;
}

TASK_TEST(an_awaiting_task_passes_the_request_on) {
    victim v = {.rc = 1};
    v.gate = orch_future_new(&v.ticket);
    orch_future *f = orch_go(awaiting_victim, &v);
    if (begun(f)) {
        orch_cancel(f, 0);
        CHECK_INT(join(f), ORCH_ECANCELED);
        CHECK_INT(v.rc, ORCH_ECANCELED);
        CHECK(!orch_promise_pending(v.ticket));
        CHECK(!orch_settle(v.ticket, orch_ok_int(1)));
    } else {
        if (!v.ended) orch_drop(v.gate);
        orch_drop(f);
    }
}

static orch_result value_when_cancelled(void *arg) {
    victim *v = arg;
    orch_sleep(60000);
    v->ended++;
    return orch_ok(v, count_release);
}

static orch_result awaiting_parent(void *arg) {
    victim *v = arg;
    orch_result r = orch_await(orch_go(value_when_cancelled, v));
    v->rc = r.error;
    v->value = r.value;
    orch_result_free(&r);
    return orch_ok_int(v->ended); // the child's end came before
}

// An await interrupted while waiting delivers what its future ends with: a value is not lost.
TASK_TEST(a_value_that_comes_in_spite_of_the_request_is_delivered) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(awaiting_parent, &v);
    if (begun(f)) {
        orch_cancel(f, 0);
        CHECK_INT(join(f), 1);
        CHECK_INT(v.rc, 0);
        CHECK(v.value == &v);
        CHECK_INT(released, 1);
    } else {
        orch_drop(f);
    }
}

static orch_result await_when_cancelled(void *arg) {
    victim *v = arg;
    orch_sleep(60000); // returns cancelled
    v->reason = orch_cancel_reason();
    orch_result r = orch_await(orch_go(value_when_cancelled, v));
    v->rc = r.error;
    int ended = v->ended;
    orch_result_free(&r);
    return orch_ok_int(ended);
}

// An await refused at its entry: the work is given up, and has ended when the await returns.
TASK_TEST(an_await_begun_in_a_cancelled_task_is_refused) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(await_when_cancelled, &v);
    if (begun(f)) {
        orch_cancel(f, 9);
        CHECK_INT(join(f), 1);
        CHECK_INT(v.reason, 9);
        CHECK_INT(v.rc, ORCH_ECANCELED);
        CHECK_INT(released, 1); // the value it returned all the same
    } else {
        orch_drop(f);
    }
}

static orch_result waiting_victim(void *arg) {
    victim *v = arg;
    orch_result r = orch_wait(v->gate);
    v->rc = r.error;
    v->ended++;
    return orch_ok_int(4);
}

TASK_TEST(a_waiting_task_leaves_what_it_waits_for_alone) {
    victim v = {.rc = 1};
    v.gate = orch_future_new(&v.ticket);
    orch_future *f = orch_go(waiting_victim, &v);
    if (begun(f)) {
        orch_cancel(f, 0);
        CHECK_INT(join(f), 4);
        CHECK_INT(v.rc, ORCH_ECANCELED);
        CHECK(orch_promise_pending(v.ticket));
        CHECK(orch_settle(v.ticket, orch_ok_int(6)));
        CHECK_INT(join(v.gate), 6);
    } else {
        orch_drop(f);
        orch_drop(v.gate);
    }
}

TASK_TEST(a_shared_future_is_left_alone_by_a_cancelled_await) {
    victim v = {.rc = 1};
    orch_future *mine = orch_future_new(&v.ticket);
    v.gate = orch_ref(mine);
    orch_future *f = orch_go(awaiting_victim, &v);
    if (begun(f)) {
        orch_cancel(f, 0);
        CHECK_INT(join(f), ORCH_ECANCELED); // at once: nothing else could end it
        CHECK(orch_promise_pending(v.ticket));
        CHECK(orch_settle(v.ticket, orch_ok_int(6)));
        CHECK_INT(join(mine), 6);
    } else {
        if (!v.ended) orch_drop(v.gate);
        orch_drop(f);
        orch_drop(mine);
    }
}

TASK_TEST(one_of_two_awaiting_a_shared_future_can_be_cancelled) {
    victim a = {.rc = 1}, b = {.rc = 1};
    a.gate = orch_future_new(&a.ticket);
    b.gate = orch_ref(a.gate);
    orch_future *fa = orch_go(awaiting_victim, &a), *fb = orch_go(awaiting_victim, &b);
    if (begun(fa) && begun(fb)) {
        orch_cancel(fa, 0);
        CHECK_INT(join(fa), ORCH_ECANCELED);
        CHECK_INT(b.ended, 0);
        CHECK(orch_settle(a.ticket, orch_ok_int(6)));
        CHECK_INT(join(fb), 6);
    } else {
        orch_settle(a.ticket, orch_ok_int(1));
        orch_drop(fa);
        orch_drop(fb);
        if (!a.ended) orch_drop(a.gate);
        if (!b.ended) orch_drop(b.gate);
    }
}

// Its outcome has come, but it was not resumed yet.
static orch_result take_then_sleep(void *arg) {
    victim *v = arg;
    orch_result r = orch_await(v->gate);
    intptr_t got = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    v->rc = orch_sleep(60000);
    v->ended++;
    return orch_ok_int(got);
}

TASK_TEST(what_came_before_the_request_is_still_delivered) {
    victim v = {.rc = 1};
    v.gate = orch_future_new(&v.ticket);
    orch_future *f = orch_go(take_then_sleep, &v);
    CHECK(orch_settle(v.ticket, orch_ok_int(6)));
    orch_cancel(f, 0);
    CHECK_INT(join(f), 6);
    CHECK_INT(v.rc, ORCH_ECANCELED); // but from there on it may not wait
}

static orch_result ready_victim(void *arg) {
    victim *v = arg;
    v->rc = orch_yield();
    v->reason = orch_sleep(1);
    v->ended++;
    return orch_ok_int(4);
}

TASK_TEST(a_task_that_is_ready_can_be_cancelled) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(ready_victim, &v);
    orch_cancel(f, 0); // it stands in the ready queue
    CHECK_INT(join(f), 4);
    CHECK_INT(v.reason, ORCH_ECANCELED);
    CHECK_INT(v.rc, ORCH_ECANCELED); // of the yield it is in
}

// Who enters a task has to tell the yield that it stands in what to return, wherever it comes from.
// The first yield goes back to who started the task, the second to the next ready one.

static orch_result second_yield(void *arg) {
    victim *v = arg;
    orch_yield();
    if (v->gate != NULL) orch_settle(v->ticket, orch_ok_int(1));
    v->rc = orch_yield();
    return orch_ok_int(4);
}

static orch_result two_yields(void *arg) {
    (void)arg;
    orch_yield();
    orch_yield();
    return orch_ok_int(2);
}

static void count_one(orch_result *in, void *context) {
    (void)in;
    (*(int *)context)++;
}

TASK_TEST(a_yield_is_told_of_a_request_by_a_task_that_waits) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(second_yield, &v);
    orch_yield();
    orch_cancel(f, 0);
    CHECK_INT(join(f), 4);
    CHECK_INT(v.rc, ORCH_ECANCELED);
}

TASK_TEST(a_yield_is_told_of_a_request_by_a_task_that_yields) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(second_yield, &v);
    orch_yield();
    orch_cancel(f, 0);
    orch_yield();
    CHECK_INT(v.rc, ORCH_ECANCELED);
    CHECK_INT(join(f), 4);
}

TASK_TEST(a_yield_is_told_of_a_request_by_a_task_that_ends) {
    victim v = {.rc = 1};
    orch_future *ends = orch_go(two_yields, NULL);
    orch_future *f = orch_go(second_yield, &v);
    orch_yield();
    orch_cancel(f, 0);
    CHECK_INT(join(f), 4); // the one that ends comes first
    CHECK_INT(v.rc, ORCH_ECANCELED);
    CHECK_INT(join(ends), 2);
}

TASK_TEST(a_yield_is_told_of_a_request_by_the_loop) {
    int called = 0;
    victim v = {.rc = 1};
    v.gate = orch_future_new(&v.ticket);
    orch_on(v.gate, count_one, &called);
    orch_future *f = orch_go(second_yield, &v);
    orch_yield(); // now the callback is ready, and the task behind it
    orch_cancel(f, 0);
    CHECK_INT(called, 0);
    CHECK_INT(join(f), 4);
    CHECK_INT(called, 1);
    CHECK_INT(v.rc, ORCH_ECANCELED);
}

static int turns;

static orch_result take_turns(void *arg) {
    (void)arg;
    for (int i = 0; i < 20; i++, turns++) orch_yield();
    return orch_ok_int(20);
}

static orch_result yield_when_cancelled(void *arg) {
    victim *v = arg;
    orch_yield();
    orch_yield();
    int before = turns;
    v->rc = orch_yield();
    v->reason = turns - before;
    return orch_ok_int(4);
}

TASK_TEST(a_yield_that_is_refused_lets_nobody_run) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(yield_when_cancelled, &v), *others = orch_go(take_turns, NULL);
    orch_yield();
    orch_cancel(f, 0);
    CHECK_INT(join(f), 4);
    CHECK_INT(v.rc, ORCH_ECANCELED);
    CHECK_INT(v.reason, 0);
    CHECK_INT(join(others), 20);
}

static void yield_in_release(void *value) {
    (void)value;
    orch_yield();
}

static orch_result drop_one(void *arg) {
    orch_future *f = orch_settled(orch_ok(arg, count_release));
    orch_yield();
    orch_yield();
    int before = released;
    orch_drop(f);
    return orch_ok_int(released - before);
}

// What is freed while another task waits in a release is not left to that task.
TASK_TEST(a_release_that_yields_holds_up_no_other) {
    int value = 0;
    orch_future *one = orch_settled(orch_ok(&value, yield_in_release));
    orch_result list = orch_await(orch_all(one, orch_settled(orch_ok_int(1))));
    orch_future *f = orch_go(drop_one, &value);
    orch_yield();
    bool real = list.error == 0;
    orch_result_free(&list);
    intptr_t dropped = join(f);
    if (real) CHECK_INT(dropped, 1);
}

TASK_TEST(cancelling_what_has_ended_changes_nothing) {
    int five = 5;
    orch_future *f = orch_go(at_once, &five);
    orch_cancel(f, 0);
    CHECK_INT(join(f), 5);
}

TASK_TEST(cancelling_twice_is_cancelling_once) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(sleeping_victim, &v);
    if (begun(f)) {
        orch_cancel(f, 5);
        orch_cancel(f, 5);
        CHECK_INT(join(f), 4);
        CHECK_INT(v.reason, 5);
        CHECK_INT(v.ended, 1);
    } else {
        orch_drop(f);
    }
}

// ---- level-triggered

static orch_result stubborn_victim(void *arg) {
    victim *v = arg;
    orch_sleep(60000);
    for (int i = 0; i < 3; i++) {
        orch_promise p;
        CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
        CHECK_INT(orch_yield(), ORCH_ECANCELED);
        CHECK_INT(join(orch_future_new(&p)), ORCH_ECANCELED);
        CHECK_INT(join(orch_after(1)), ORCH_ECANCELED);
        orch_future *kept = orch_future_new(&p);
        bool real = orch_promise_pending(p);
        orch_result lent = orch_wait(kept);
        if (real) CHECK_INT(lent.error, ORCH_ECANCELED);
        CHECK_INT(orch_promise_pending(p), real);
        orch_drop(kept);
        CHECK_INT(join(orch_settled(orch_ok_int(8))), 8); // what is there is delivered
        CHECK_INT(orch_cancel_reason(), 3);
    }
    v->ended++;
    return orch_ok_int(4);
}

TASK_TEST(a_cancelled_task_may_not_wait_until_it_ends) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(stubborn_victim, &v);
    if (begun(f)) {
        orch_cancel(f, 3);
        CHECK_INT(join(f), 4);
        CHECK_INT(v.ended, 1);
    } else {
        orch_drop(f);
    }
}

// ---- shields

static orch_result shielding_victim(void *arg) {
    victim *v = arg;
    orch_sleep(60000);
    uint64_t from = orch_now();
    orch_shield_begin();
    CHECK_INT(orch_sleep(5), 0);
    CHECK(orch_now() - from >= 5);
    CHECK_INT(join(orch_after(1)), 0);
    CHECK_INT(orch_yield(), 0);
    CHECK_INT(orch_cancel_reason(), 3); // shielded or not
    orch_shield_end();
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    v->ended++;
    return orch_ok_int(4);
}

TASK_TEST(a_shielded_task_may_wait_for_its_clean_up) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(shielding_victim, &v);
    if (begun(f)) {
        orch_cancel(f, 3);
        CHECK_INT(join(f), 4);
        CHECK_INT(v.ended, 1);
    } else {
        orch_drop(f);
    }
}

static orch_result nested_shields(void *arg) {
    victim *v = arg;
    orch_sleep(60000);
    orch_shield_begin();
    orch_shield_begin();
    CHECK_INT(orch_sleep(1), 0);
    orch_shield_end();
    CHECK_INT(orch_sleep(1), 0); // still within the outer one
    CHECK_INT(orch_yield(), 0);
    orch_shield_end();
    CHECK_INT(orch_yield(), ORCH_ECANCELED);
    orch_shield_begin(); // and again
    CHECK_INT(orch_yield(), 0);
    orch_shield_end();
    CHECK_INT(orch_yield(), ORCH_ECANCELED);
    v->ended++;
    return orch_ok_int(4);
}

TASK_TEST(shields_nest) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(nested_shields, &v);
    if (begun(f)) {
        orch_cancel(f, 3);
        CHECK_INT(join(f), 4);
        CHECK_INT(v.ended, 1);
    } else {
        orch_drop(f);
    }
}

static orch_result shielded_from_the_start(void *arg) {
    victim *v = arg;
    uint64_t from = orch_now();
    orch_shield_begin();
    v->rc = orch_sleep(10); // the request comes during this
    v->value = orch_now() - from >= 10 ? v : NULL;
    orch_shield_end();
    v->reason = orch_sleep(60000);
    v->ended++;
    return orch_ok_int(4);
}

TASK_TEST(a_request_does_not_disturb_a_wait_under_a_shield) {
    victim v = {.rc = 1};
    orch_future *f = orch_go(shielded_from_the_start, &v);
    if (begun(f)) {
        orch_sleep(1);
        orch_cancel(f, 0);
        CHECK_INT(join(f), 4);
        CHECK_INT(v.rc, 0);
        CHECK(v.value == &v);
        CHECK_INT(v.reason, ORCH_ECANCELED);
    } else {
        orch_drop(f);
    }
}

static orch_result await_under_shield(void *arg) {
    victim *v = arg;
    orch_shield_begin();
    v->rc = (int)join(v->gate);
    orch_shield_end();
    v->ended++;
    return orch_ok_int(4);
}

TASK_TEST(what_is_awaited_under_a_shield_is_not_cancelled) {
    victim v = {.rc = 1};
    v.gate = orch_future_new(&v.ticket);
    orch_future *f = orch_go(await_under_shield, &v);
    if (begun(f)) {
        orch_cancel(f, 0);
        for (int i = 0; i < 3; i++) orch_yield();
        CHECK_INT(v.ended, 0);
        CHECK(orch_settle(v.ticket, orch_ok_int(15)));
        CHECK_INT(join(f), 4);
        CHECK_INT(v.rc, 15);
    } else {
        if (!v.ended) orch_drop(v.gate);
        orch_drop(f);
    }
}

// ---- the end of the work comes before the end of the call

typedef struct family {
    int started, ended;
    char *on_parents_stack;
    orch_future *child;
} family;

static orch_result writing_child(void *arg) {
    family *y = arg;
    y->started++;
    orch_sleep(60000);
    orch_shield_begin();
    orch_sleep(3); // the parent would be long gone
    memset(y->on_parents_stack, 'c', 100);
    orch_shield_end();
    y->ended++;
    return orch_ok_int(1);
}

static void drop_from_a_frame(family *y) {
    char buffer[100];
    memset(buffer, 'p', sizeof buffer);
    y->on_parents_stack = buffer;
    orch_future *f = orch_go(writing_child, y);
    int started = y->started;
    orch_drop(f);
    CHECK_INT(y->ended, started);
    if (started) CHECK(buffer[0] == 'c' && buffer[99] == 'c');
}

static orch_result end_late(void *arg) {
    orch_sleep(60000);
    orch_shield_begin();
    orch_sleep(5);
    orch_shield_end();
    *(bool *)arg = true;
    return orch_ok(NULL, NULL);
}

TASK_TEST(a_settle_that_decides_nothing_returns_when_its_chain_has_ended) {
    bool ended = false;
    orch_promise promise;
    orch_drop(orch_future_new(&promise));
    orch_future *f = orch_go(end_late, &ended);
    if (orch_is_settled(f)) ended = true; // no memory for it
    CHECK(!orch_settle(promise, orch_chain(f)));
    CHECK(ended);
}

TASK_TEST(a_drop_in_a_task_returns_when_the_work_has_ended) {
    family y = {.started = 0};
    drop_from_a_frame(&y);
    char overwritten[4096]; // where the frame was
    memset(overwritten, 'o', sizeof overwritten);
    CHECK_INT(orch_sleep(1), 0);
    for (size_t i = 0; i < sizeof overwritten; i++)
        if (overwritten[i] != 'o') {
            CHECK(false);
            break;
        }
}

static orch_result give_up_in_a_cancelled_task(void *arg) {
    orch_sleep(60000);
    family *y = arg;
    drop_from_a_frame(y); // the end is waited for in a cancelled task as well
    return orch_ok_int(y->started == y->ended);
}

TASK_TEST(a_drop_in_a_cancelled_task_waits_too) {
    family y = {.started = 0};
    orch_future *f = orch_go(give_up_in_a_cancelled_task, &y);
    bool real = begun(f);
    orch_cancel(f, 0);
    intptr_t got = join(f);
    if (real) CHECK_INT(got, 1);
}

TASK_TEST(a_drop_of_a_reference_others_hold_returns_at_once) {
    family y = {.started = 0};
    char buffer[100];
    y.on_parents_stack = buffer;
    orch_future *f = orch_go(writing_child, &y), *g = orch_ref(f);
    orch_drop(g);
    if (begun(f)) CHECK_INT(y.ended, 0);
    orch_yield();
    CHECK_INT(y.ended, 0);
    orch_drop(f);
    CHECK_INT(y.ended, y.started);
}

TASK_TEST(a_drop_of_a_chain_waits_for_what_is_at_its_end) {
    family y = {.started = 0};
    char buffer[100];
    y.on_parents_stack = buffer;
    orch_future *f = orch_then(orch_go(writing_child, &y), NULL, NULL, NULL);
    f = orch_timeout(orch_then(f, NULL, NULL, NULL), 60000);
    f = orch_all(f, orch_after(60000));
    orch_drop(f);
    CHECK_INT(y.ended, y.started);
    CHECK_INT(stats().timers, 0);
    CHECK_INT(stats().tasks, 1);
}

TEST(a_drop_outside_a_task_ends_the_work_later) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    family y = {.started = 0};
    static char buffer[100];
    y.on_parents_stack = buffer;
    orch_drop(orch_go(writing_child, &y));
    CHECK_INT(y.ended, 0);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(y.ended, y.started);
    CHECK_INT(orch_loop_free(loop), 0);
}

static void drop_in_callback(orch_result *in, void *context) {
    family *y = context;
    (void)in;
    int before = y->ended;
    orch_drop(y->child);
    y->child = NULL;
    CHECK_INT(y->ended, before);
}

TASK_TEST(a_drop_in_a_callback_ends_the_work_later) {
    static family y;
    static char buffer[100];
    y.on_parents_stack = buffer;
    y.child = orch_go(writing_child, &y);
    orch_on(orch_settled(orch_ok_int(1)), drop_in_callback, &y);
    for (int i = 0; i < 100 && y.ended < y.started; i++) orch_sleep(1);
    CHECK_INT(y.ended, 1);
}

static orch_result several_children(void *arg) {
    family *y = arg;
    char buffer[100];
    y->on_parents_stack = buffer;
    orch_future *f[5];
    for (int i = 0; i < 5; i++) f[i] = orch_go(writing_child, y);
    orch_result r = orch_await(orch_all_n(5, f));
    orch_result_free(&r);
    return orch_ok_int(y->ended); // all of them, when the await returns
}

TASK_TEST(a_cancelled_parent_outlives_its_children) {
    family y = {.started = 0};
    orch_future *f = orch_go(several_children, &y);
    bool real = begun(f);
    orch_cancel(f, 0);
    intptr_t got = join(f);
    if (real) CHECK_INT(got, y.started);
    CHECK_INT(y.ended, y.started);
}

static orch_result shielding_child(void *arg) {
    family *y = arg;
    y->started++;
    orch_shield_begin();
    int error = orch_sleep(10);
    orch_shield_end();
    y->ended++;
    return error ? orch_fail(error) : orch_ok_int(21);
}

static orch_result parent_of_shielding(void *arg) {
    return orch_ok_int(join(orch_go(shielding_child, arg)));
}

TASK_TEST(a_cancelled_parent_waits_for_a_shielding_child) {
    family y = {.started = 0};
    orch_future *f = orch_go(parent_of_shielding, &y);
    if (begun(f)) {
        orch_cancel(f, 0);
        orch_yield();
        CHECK(begun(f));
        CHECK_INT(join(f), 21);
        CHECK_INT(y.ended, 1);
    } else {
        orch_drop(f);
    }
}

TASK_TEST(the_last_reference_to_a_task_can_be_dropped_while_it_shields) {
    family y = {.started = 0};
    uint64_t from = orch_now();
    orch_drop(orch_go(shielding_child, &y));
    CHECK_INT(y.ended, y.started);
    if (y.started) CHECK(orch_now() - from >= 10);
}

// ---- the task itself

typedef struct own {
    orch_future *future;
    int before, after, reason;
} own;

static orch_result cancel_self(void *arg) {
    own *o = arg;
    o->before = orch_yield(); // so that go has returned
    orch_cancel(o->future, 17);
    o->reason = orch_cancel_reason();
    o->after = orch_sleep(60000);
    return orch_ok_int(30);
}

TASK_TEST(a_task_may_cancel_itself) {
    own o = {.before = 1};
    o.future = orch_go(cancel_self, &o);
    CHECK_INT(join(orch_ref(o.future)), 30);
    CHECK_INT(o.before, 0);
    CHECK_INT(o.reason, 17);
    CHECK_INT(o.after, ORCH_ECANCELED);
    orch_drop(o.future);
}

static orch_result drop_self(void *arg) {
    own *o = arg;
    o->before = orch_yield();
    orch_drop(o->future); // it cannot wait for its own end
    o->after = orch_sleep(60000);
    o->reason = 1;
    return orch_ok_int(30);
}

TASK_TEST(a_task_may_drop_its_own_last_reference) {
    static own o;
    o.future = orch_go(drop_self, &o);
    if (!begun(o.future)) {
        orch_drop(o.future);
        return;
    }
    for (int i = 0; i < 10 && !o.reason; i++) orch_yield();
    CHECK_INT(o.reason, 1);
    CHECK_INT(o.after, ORCH_ECANCELED);
    CHECK_INT(stats().tasks, 1);
}

static orch_result detach_self(void *arg) {
    own *o = arg;
    o->before = orch_yield();
    orch_detach(o->future);
    o->after = orch_sleep(1);
    o->reason = 1;
    return orch_ok_int(30);
}

TASK_TEST(a_task_may_detach_itself) {
    static own o;
    o.future = orch_go(detach_self, &o);
    if (!begun(o.future)) {
        orch_drop(o.future);
        return;
    }
    for (int i = 0; i < 100 && !o.reason; i++) orch_sleep(1);
    CHECK_INT(o.reason, 1);
    CHECK_INT(o.after, 0);
}

// ---- long chains

// ThreadSanitizer knows at most 8,128 threads and fibers, and is slow to make one.
#if defined(__SANITIZE_THREAD__)
#define FEW_TASKS 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FEW_TASKS 1
#endif
#endif
#ifdef FEW_TASKS
#define CHAIN 1000
#else
#define CHAIN 10000
#endif

static int chain_alive, chain_made;

// A sweep repeats this often.
static int chain_length(void) { return test_shared->fail_at ? CHAIN / 20 : CHAIN; }

static orch_result chain_task(void *arg) {
    chain_made++;
    int number = chain_made;
    if (number == chain_length()) {
        int error = orch_sleep(60000);
        return orch_fail(error);
    }
    chain_alive++;
    orch_result r = orch_await(orch_go(chain_task, arg));
    chain_alive--;
    return r;
}

TASK_TEST(a_long_chain_of_awaiting_tasks_is_cancelled_at_once) {
    orch_future *f = orch_go(chain_task, NULL);
    if (begun(f)) {
        CHECK_INT(chain_made, chain_length());
        CHECK_INT(chain_alive, chain_length() - 1);
        orch_cancel(f, 0);
        CHECK_INT(join(f), ORCH_ECANCELED);
    } else {
        orch_drop(f);
    }
    CHECK_INT(chain_alive, 0);
    CHECK_INT(stats().tasks, 1);
    CHECK_INT(stats().timers, 0);
}

TASK_TEST(a_long_chain_of_awaiting_tasks_is_dropped_at_once) {
    orch_drop(orch_go(chain_task, NULL));
    CHECK_INT(chain_alive, 0);
    CHECK_INT(stats().tasks, 1);
}

static orch_result leave_chain(void *arg) {
    orch_detach(orch_go(chain_task, arg));
    return orch_ok_int(1);
}

// In time that grows with the square of the length it would be seconds.
TEST(a_long_chain_of_awaiting_tasks_ends_with_its_loop) {
    const char *scale = getenv("TEST_TIME");
    uint64_t from = orch_now(), limit = 2000 * (scale ? (uint64_t)atol(scale) : 1);
    orch_result r = orch_run(leave_chain, NULL);
    CHECK(orch_now() - from < limit);
    CHECK_INT(orch_int(&r), 1);
    CHECK_INT(chain_made, chain_length());
    CHECK_INT(chain_alive, 0);
    orch_result_free(&r);
}

// ---- a task that ignores the request

typedef struct notes {
    int reports, named;
} notes;

static void note_report(const char *text, void *context) {
    notes *n = context;
    n->reports++;
    n->named += strstr(text, "deaf-task") != NULL;
}

static bool deaf_stop;

static void stop_deaf(orch_result *in, void *context) {
    (void)context;
    if (in->error == 0) deaf_stop = true;
}

static orch_result deaf_task(void *arg) {
    int mode = *(int *)arg, n = 0;
    uint64_t from = orch_now();
    orch_sleep(60000); // the request
    for (; !deaf_stop || n < 5000; n++) {
        if (n % 1000 == 0 && orch_now() - from > 2000) break;
        if (mode == 0) orch_sleep(1000);
        else if (mode == 1) orch_yield();
        else join(orch_after(1000));
    }
    return orch_ok_int(n);
}

static orch_result deaf_main(void *arg) {
    orch_future *f =
        orch_go_with(&(orch_task_desc){.name = "deaf-task", .fn = deaf_task, .arg = arg});
    orch_cancel(f, 0);
    orch_on(orch_after(3), stop_deaf, NULL); // must fire meanwhile
    intptr_t refused = join(f);
    if (refused >= 0) CHECK(refused >= 1000);
    CHECK(deaf_stop);
    return orch_ok_int(1);
}

static void check_deaf(int mode) {
    notes n = {0, 0};
    orch_loop_desc desc = {.context = &n, .on_report = note_report};
    orch_result r = orch_run_with(&desc, deaf_main, &mode);
    CHECK_INT(orch_int(&r), 1);
    CHECK_INT(n.reports, 1); // once
    CHECK_INT(n.named, 1);
    orch_result_free(&r);
}

TEST(a_task_that_goes_on_sleeping_is_reported_and_starves_nobody) { check_deaf(0); }

TEST(a_task_that_goes_on_yielding_is_reported_and_starves_nobody) { check_deaf(1); }

TEST(a_task_that_goes_on_awaiting_is_reported_and_starves_nobody) { check_deaf(2); }

static orch_result few_refusals(void *arg) {
    orch_sleep(60000);
    for (int i = 0; i < 900; i++) orch_sleep(1);
    return orch_ok_int(arg != NULL);
}

static orch_result few_refusals_main(void *arg) {
    orch_future *f =
        orch_go_with(&(orch_task_desc){.name = "deaf-task", .fn = few_refusals, .arg = arg});
    orch_cancel(f, 0);
    return orch_ok_int(join(f));
}

TEST(fewer_refusals_than_a_thousand_are_not_reported) {
    notes n = {0, 0};
    orch_loop_desc desc = {.context = &n, .on_report = note_report};
    orch_result r = orch_run_with(&desc, few_refusals_main, &n);
    CHECK_INT(orch_int(&r), 1);
    CHECK_INT(n.reports, 0);
    orch_result_free(&r);
}

// ---- the end of main

static orch_result outlive_main(void *arg) {
    victim *v = arg;
    v->rc = orch_sleep(60000);
    v->reason = orch_cancel_reason();
    orch_shield_begin();
    v->ended = orch_sleep(3) == 0;
    orch_shield_end();
    return orch_ok_int(1);
}

static orch_result main_with_rest(void *arg) {
    orch_detach(orch_go(outlive_main, arg));
    return orch_ok_int(2);
}

TEST(what_main_leaves_is_cancelled_and_awaited) {
    victim v = {.rc = 1};
    orch_result r = orch_run(main_with_rest, &v);
    CHECK_INT(orch_int(&r), 2);
    CHECK_INT(v.rc, ORCH_ECANCELED);
    CHECK(v.reason != 0);
    CHECK_INT(v.ended, 1);
    orch_result_free(&r);
}

static orch_result starts_more_at_its_end(void *arg) {
    int *left = arg;
    orch_sleep(60000);
    if (--*left > 0) orch_detach(orch_go(starts_more_at_its_end, left));
    return orch_ok_int(1);
}

static orch_result main_with_more(void *arg) {
    orch_detach(orch_go(starts_more_at_its_end, arg));
    return orch_ok_int(2);
}

// Started during the clean-up: those are cancelled as well.
TEST(tasks_started_while_the_loop_ends_end_too) {
    int left = 5;
    orch_result r = orch_run(main_with_more, &left);
    if (CHECK_INT(orch_int(&r), 2)) CHECK_INT(left, 0);
    orch_result_free(&r);
}

TEST(tasks_started_while_a_loop_is_freed_end_too) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    int left = 5;
    orch_future *f = orch_go(starts_more_at_its_end, &left);
    bool real = begun(f);
    orch_detach(f);
    CHECK_INT(orch_loop_free(loop), 0);
    if (real) CHECK_INT(left, 0);
}

// ---- random programs
//
// Tasks that make, await, share, drop, cancel and combine futures at random. Whatever they do,
// every value and argument is released once, no task outlives the frame of one that gave it up or
// awaited it, nothing is reported, and nothing is left.

// TEST_SEEDS=1000 runs as many of them; a sweep runs all of them once for each allocation.
static uint32_t random_seeds(void) {
    const char *asked = getenv("TEST_SEEDS");
    return asked ? (uint32_t)atol(asked) : 3;
}

typedef struct walker { // on its task's stack
    struct walker *parent;
    int depth;
    bool here;
    orch_future *held[6];
    int count;
} walker;

static uint32_t dice = 1;
static int allowance, values, arguments, entered, ended, orphaned;

static uint32_t roll(uint32_t sides) {
    dice ^= dice << 13;
    dice ^= dice >> 17;
    dice ^= dice << 5;
    return dice % sides;
}

// Of each value it is known whether it was released: no allocation, so that the sweep is short.
#define VALUES 20000
static bool value_lives[VALUES];
static int values_made;

static void release_value(void *value) {
    if (!CHECK(*(bool *)value)) return;
    *(bool *)value = false;
    values--;
}

static orch_result some_value(void) {
    if (values_made == VALUES) return orch_ok_int(1);
    bool *value = &value_lives[values_made++];
    *value = true;
    values++;
    return orch_ok(value, release_value);
}

static void release_walker(void *arg) {
    (void)arg;
    arguments--;
}

static orch_result walk(void *arg);
static orch_future *some_future(walker *w, int depth);

static orch_future *some_task(walker *parent, int depth) {
    walker start = {.parent = parent, .depth = depth + 1};
    orch_task_desc desc = {
        .fn = walk, .arg = &start, .arg_size = sizeof start, .release = release_walker};
    arguments++;
    return orch_go_with(&desc);
}

static orch_result some_step(orch_result *in, void *context) {
    (void)context;
    switch (roll(4)) {
    case 0: return *in;
    case 1: return orch_failf(5, "step %d", 5);
    case 2: return some_value();
    default: return orch_chain(some_task(NULL, 4));
    }
}

static void some_end(void *context) { (void)context; }

static void some_look(orch_result *in, void *context) {
    (void)context;
    if (in->release != release_value || roll(2)) return;
    void *mine = orch_take(in);
    if (mine) release_value(mine);
}

static bool some_hook(void *context, int reason) {
    (void)context;
    return reason != 0 && roll(2);
}

static orch_result settle_soon(void *arg) {
    orch_promise p = *(orch_promise *)arg;
    orch_sleep(roll(2)); // also when it is cancelled: it settles in any case
    if (roll(2)) orch_settle(p, some_value());
    else orch_settle(p, orch_chain(some_future(NULL, 4)));
    return orch_ok_int(1);
}

static orch_future *some_promise(void) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_task_desc desc = {.fn = settle_soon, .arg = &p, .arg_size = sizeof p};
    orch_future *settler = orch_go_with(&desc);
    if (begun(settler) && roll(2)) orch_promise_on_cancel(p, some_hook, NULL);
    orch_detach(settler);
    return f;
}

static orch_future *some_list(walker *w, int depth) {
    orch_future *f[4];
    size_t count = 1 + roll(4), needed = 1 + roll((uint32_t)count);
    for (size_t i = 0; i < count; i++) f[i] = some_future(w, depth + 1);
    switch (roll(6)) {
    case 0: return orch_all_n(count, f);
    case 1: return orch_any_n(count, f);
    case 2: return orch_race_n(count, f);
    case 3: return orch_all_settled_n(count, f);
    case 4: return orch_quorum_n(needed, count, f);
    default: return orch_gather_n(count, f, roll(3));
    }
}

static orch_future *some_future(walker *w, int depth) {
    if (allowance-- <= 0 || depth > 4)
        return roll(2) ? orch_settled(some_value()) : orch_after(roll(2));
    switch (roll(9)) {
    case 0: return orch_settled(some_value());
    case 1: return orch_after(roll(3));
    case 2: return some_list(w, depth);
    case 3: return orch_timeout(some_future(w, depth + 1), roll(4));
    case 4:
        return orch_then(some_future(w, depth + 1), roll(2) ? some_step : NULL,
                         roll(2) ? some_step : NULL, NULL);
    case 5: return orch_finally(some_future(w, depth + 1), some_end, NULL);
    case 6: return some_promise();
    default: return some_task(w, depth);
    }
}

static void free_result(orch_result r) { orch_result_free(&r); }

static void walk_cancel(walker *w) {
    orch_future *f = some_future(w, w->depth);
    orch_cancel(f, roll(2) ? 42 : 0);
    free_result(orch_await(f));
}

static void walk_share(walker *w) {
    orch_future *f = some_future(w, w->depth), *g = orch_ref(f);
    if (roll(2)) orch_cancel(f, 0);
    free_result(orch_await(f));
    orch_drop(g);
}

static void walk_look(walker *w) {
    orch_future *f = some_future(w, w->depth);
    free_result(orch_wait(f));
    if (roll(2)) orch_drop(f);
    else free_result(orch_await(f));
}

static void walk_held(walker *w) {
    if (w->count > 0 && roll(2))
        free_result(orch_await(orch_ref(w->held[roll((uint32_t)w->count)])));
    if (w->count > 0 && roll(2)) orch_drop(w->held[--w->count]);
    else if (w->count < 6) w->held[w->count] = some_future(w, w->depth), w->count++;
}

static void walk_iterate(walker *w) {
    orch_future *f[2] = {some_future(w, w->depth), some_future(w, w->depth)};
    orch_completion *c = orch_as_completed_n(2, f);
    for (uint32_t i = roll(4); i > 0; i--) free_result(orch_await(orch_completion_next(c)));
    orch_completion_free(c);
}

static void walk_once(walker *w) {
    switch (roll(11)) {
    case 0: orch_sleep(roll(2)); break;
    case 1: orch_yield(); break;
    case 2: free_result(orch_await(some_future(w, w->depth))); break;
    case 3: orch_drop(some_future(w, w->depth)); break;
    case 4: orch_detach(some_task(NULL, w->depth)); break; // nobody waits for it: no parent
    case 5: orch_on(some_future(NULL, w->depth), some_look, NULL); break;
    case 6: walk_cancel(w); break;
    case 7: walk_share(w); break;
    case 8: walk_look(w); break;
    case 9: walk_held(w); break;
    default: walk_iterate(w); break;
    }
}

static orch_result walk(void *arg) {
    walker *w = arg; // the copy, which lies on this stack
    w->here = true;
    entered++;
    for (uint32_t steps = 1 + roll(6); steps > 0; steps--) {
        bool shield = roll(8) == 0;
        if (shield) orch_shield_begin();
        walk_once(w);
        if (shield) orch_shield_end();
    }
    while (w->count > 0) orch_drop(w->held[--w->count]);
    if (w->parent && !w->parent->here) orphaned++;
    w->here = false;
    ended++;
    switch (roll(5)) {
    case 0: return orch_fail(7);
    case 1: return orch_failf(8, "walked %d", 8);
    case 2: return orch_chain(some_future(NULL, w->depth + 1));
    case 3: return orch_ok_int(3);
    default: return some_value();
    }
}

static orch_result walk_main(void *arg) {
    (void)arg;
    for (int i = 0; i < 10; i++) {
        allowance = 60;
        if (roll(3) > 0) free_result(orch_await(some_task(NULL, 0)));
        else orch_detach(some_task(NULL, 0));
    }
    return some_value(); // and leaves what still runs
}

static void ignore_rejection(const orch_result *r, void *context) {
    (void)r;
    (void)context;
}

static bool check_walk(uint32_t seed) {
    notes n = {0, 0};
    orch_loop_desc desc = {
        .context = &n, .on_report = note_report, .on_unhandled = ignore_rejection};
    dice = seed * 2654435761u | 1;
    values_made = 0;
    entered = ended = 0;
    orch_result r = orch_run_with(&desc, walk_main, NULL);
    bool good = CHECK_INT(r.error, 0) && CHECK_INT(n.reports, 0);
    orch_result_free(&r);
    good = CHECK_INT(values, 0) && CHECK_INT(arguments, 0) && good;
    return CHECK_INT(entered, ended) && CHECK_INT(orphaned, 0) && good;
}

TEST(random_programs_end_and_leave_nothing) {
    for (uint32_t seed = 1, last = random_seeds(); seed <= last; seed++)
        if (!check_walk(seed)) {
            fprintf(stderr, "seed %u\n", (unsigned)seed);
            break;
        }
}

// The same outside of tasks: turns one by one, and a free at the end.
static void step_once(orch_loop *loop, walker *w) {
    int at = w->count > 0 ? (int)roll((uint32_t)w->count) : 0;
    switch (roll(8)) {
    case 0: orch_loop_step(loop, roll(2)); break;
    case 1: orch_detach(some_task(NULL, 0)); break;
    case 2: orch_on(some_future(NULL, 0), some_look, NULL); break;
    case 3:
        if (w->count > 0) orch_cancel(w->held[at], 3);
        break;
    case 4:
        if (w->count > 0) w->held[at] = orch_then(w->held[at], some_step, some_step, NULL);
        break;
    case 5:
        if (w->count > 0) orch_drop(w->held[--w->count]);
        break;
    case 6:
        if (w->count > 0 && w->count < 6) w->held[w->count] = orch_ref(w->held[at]), w->count++;
        break;
    default:
        if (w->count < 6) w->held[w->count] = some_future(NULL, 0), w->count++;
    }
}

static bool check_steps(uint32_t seed) {
    notes n = {0, 0};
    orch_loop_desc desc = {
        .context = &n, .on_report = note_report, .on_unhandled = ignore_rejection};
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return false;
    walker w = {.count = 0};
    dice = seed * 2654435761u | 1;
    values_made = 0;
    entered = ended = 0;
    for (int i = 0; i < 60; i++) {
        allowance = 40;
        step_once(loop, &w);
    }
    if (roll(2)) orch_loop_run(loop);
    while (w.count > 0) orch_drop(w.held[--w.count]);
    int error = ORCH_EBUSY;
    for (int i = 0; i < 200 && error == ORCH_EBUSY; i++) { // until shields and producers are done
        error = orch_loop_free(loop);
        if (error) orch_loop_step(loop, 20);
    }
    bool good = CHECK_INT(error, 0) && CHECK_INT(n.reports, 0);
    good = CHECK_INT(values, 0) && CHECK_INT(arguments, 0) && good;
    return CHECK_INT(entered, ended) && good;
}

TEST(random_steps_end_and_leave_nothing) {
    for (uint32_t seed = 1, last = random_seeds(); seed <= last; seed++)
        if (!check_steps(seed)) {
            fprintf(stderr, "seed %u\n", (unsigned)seed);
            break;
        }
}

int main(int argc, char **argv) { return test_main(argc, argv); }
