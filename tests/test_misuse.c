// test_misuse.c: every misuse that an object or a task can show. A debug build dies with a message
// that names the function and what to do; a release build returns the documented error, harms
// nothing else and leaks nothing.
// also built with -DNDEBUG (with the sanitizers as well, which find what a release build leaks)
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../asyncorch.h"
#include "test.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

// MISUSE: dies in a debug build with "asyncorch: <function>...", and passes its checks in a release
// build.
// IN_TASK: the body runs as the main task of a loop.
#ifdef NDEBUG
#define MISUSE(name, text) TEST(name)
#define CHECK_RUN(r)                                                                               \
    CHECK_INT((r).error, 0);                                                                       \
    CHECK_INT(orch_int(&(r)), 1)
#else
#define MISUSE(name, text) TEST_DIES(name, "asyncorch: " text)
#define CHECK_RUN(r) (void)0 // not reached
#endif
#define IN_TASK(name, text)                                                                        \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        name##_body();                                                                             \
        /* The main task is the only future left. */                                               \
        CHECK_INT(orch_loop_statistics(orch_loop_current()).futures, 1);                           \
        return orch_ok_int(1);                                                                     \
    }                                                                                              \
    MISUSE(name, text) {                                                                           \
        orch_result r = orch_run(name##_main, NULL);                                               \
        CHECK_RUN(r);                                                                              \
        orch_result_free(&r);                                                                      \
    }                                                                                              \
    static void name##_body(void)
#define IN_LOOP(name, text)                                                                        \
    static void name##_body(orch_loop *loop);                                                      \
    MISUSE(name, text) {                                                                           \
        orch_loop *loop = orch_loop_new(NULL);                                                     \
        if (!CHECK(loop != NULL)) return;                                                          \
        name##_body(loop);                                                                         \
        CHECK_INT(orch_loop_run(loop), 0);                                                         \
        CHECK_INT(orch_loop_statistics(loop).futures, 0);                                          \
        CHECK_INT(orch_loop_free(loop), 0);                                                        \
    }                                                                                              \
    static void name##_body(orch_loop *loop)

// What to do about it, as the header's list of errors has it.
#define DO_LOOP ": no loop on this thread (orch_run or orch_loop_new makes one)"
#define DO_TASK ": only a task can do this (start one with orch_go or orch_run)"
#define DO_REF ": the future was consumed before (orch_ref keeps one)"
#define DO_THREAD ": the future belongs to another thread's loop"
#define DO_NEST ": a loop is running on this thread already"

static int value = 5, released, called;

static void count_release(void *v) {
    if (v == &value) released++;
}

static orch_result pass(orch_result *in, void *context) {
    (void)context;
    return *in;
}

static void finish(void *context) { ++*(int *)context; }

static orch_result task(void *arg) {
    called++;
    return orch_ok_int(arg != NULL);
}

// Consumes f and says what it is rejected with; 0 when it is not.
static int error_of(orch_future *f) {
    const orch_result *r = orch_peek(f);
    int error = r ? r->error : 0;
    orch_drop(f);
    return error;
}

static int result_error(orch_result r) {
    int error = r.error;
    orch_result_free(&r);
    return error;
}

static orch_promise ticket;
static orch_future *nothing[1];

static orch_task_desc owning_desc(void) {
    return (orch_task_desc){.fn = task, .arg = &value, .release = count_release};
}

static orch_then_desc owning_then(void) {
    return (orch_then_desc){.on_ok = pass, .context = &value, .release = count_release};
}

// ---- on a thread without a loop

#define WITHOUT_LOOP(X)                                                                            \
    X(no_loop_future_new, "orch_future_new", error_of(orch_future_new(&ticket)))                   \
    X(no_loop_settled, "orch_settled", error_of(orch_settled(orch_ok_int(1))))                     \
    X(no_loop_after, "orch_after", error_of(orch_after(1)))                                        \
    X(no_loop_ready, "orch_ready", error_of(orch_ready(0, ORCH_READABLE)))                         \
    X(no_loop_go, "orch_go", error_of(orch_go(task, NULL)))                                        \
    X(no_loop_spawn, "orch_", orch_spawn(task, NULL))                                              \
    X(no_loop_all, "orch_all", error_of(orch_all_n(0, NULL)))                                      \
    X(no_loop_all_settled, "orch_all_settled", error_of(orch_all_settled_n(0, NULL)))              \
    X(no_loop_any, "orch_any", error_of(orch_any_n(0, NULL)))                                      \
    X(no_loop_race, "orch_race", error_of(orch_race_n(0, NULL)))                                   \
    X(no_loop_quorum, "orch_quorum", error_of(orch_quorum_n(0, 0, NULL)))                          \
    X(no_loop_gather, "orch_gather", error_of(orch_gather_n(0, NULL, 1)))

#define NO_LOOP_CASE(name, function, expression)                                                   \
    MISUSE(name, function) {                                                                       \
        CHECK_INT(expression, ORCH_ENOLOOP);                                                       \
        CHECK_INT(called, 0);                                                                      \
    }
WITHOUT_LOOP(NO_LOOP_CASE)

MISUSE(no_loop_says_what_to_do, "orch_after" DO_LOOP) {
    CHECK_INT(error_of(orch_after(1)), ORCH_ENOLOOP);
}

MISUSE(no_loop_settled_frees_its_result, "orch_settled" DO_LOOP) {
    CHECK_INT(error_of(orch_settled(orch_ok(&value, count_release))), ORCH_ENOLOOP);
    CHECK_INT(released, 1);
}

MISUSE(no_loop_go_with_releases_its_argument, "orch_go") {
    orch_task_desc desc = owning_desc();
    CHECK_INT(error_of(orch_go_with(&desc)), ORCH_ENOLOOP);
    CHECK_INT(released, 1);
    CHECK_INT(called, 0);
}

MISUSE(no_loop_ticket_is_dead, "orch_future_new") {
    orch_future *f = orch_future_new(&ticket);
    CHECK(!orch_promise_pending(ticket));
    CHECK(!orch_settle(ticket, orch_ok(&value, count_release)));
    CHECK_INT(released, 1);
    orch_drop(f);
}

MISUSE(no_loop_as_completed, "orch_as_completed") {
    orch_completion *c = orch_as_completed_n(0, NULL);
    CHECK(c != NULL);
    CHECK_INT(error_of(orch_completion_next(c)), ORCH_ENOLOOP);
    orch_completion_free(c);
}

// ---- outside a task: in no loop, in a loop, in a callback, on the main stack

#define TASK_ONLY(X)                                                                               \
    X(yield, "orch_yield", orch_yield())                                                           \
    X(sleep, "orch_sleep", orch_sleep(1))                                                          \
    X(await, "orch_await", result_error(orch_await(orch_after(1))))                                \
    X(await_settled, "orch_await",                                                                 \
      result_error(orch_await(orch_settled(orch_ok(&value, count_release)))))                      \
    X(wait, "orch_wait", wait_borrowed())                                                          \
    X(scope_open, "orch_scope_open", open_scope())                                                 \
    X(scope_close, "orch_scope_close", close_scope())                                              \
    X(local_set, "orch_local_set", set_local())

// What could not be opened says so again, which is no second misuse.
static int open_scope(void) {
    orch_scope s;
    orch_task_desc desc = owning_desc();
    int error = orch_scope_open(&s, NULL);
    CHECK_INT(orch_scope_go(&s, task, NULL), error);
    CHECK_INT(orch_scope_go_with(&s, &desc), error);
    CHECK_INT(orch_scope_add(&s, orch_settled(orch_ok_int(1))), error);
    CHECK_INT(orch_scope_extend(&s, 1), error);
    CHECK_INT(orch_scope_failures(&s), 0);
    CHECK_INT(orch_scope_error(&s, 0)->error, ORCH_ERANGE);
    orch_scope_cancel(&s, 0);
    CHECK_INT(called, 0);
    CHECK_INT(released, 1);
    called = released = 0;
    return error;
}

static int close_scope(void) {
    orch_scope s = {NULL, 0};
    return result_error(orch_scope_close(&s));
}

static int set_local(void) {
    static const char key;
    int error = orch_local_set(&key, &value, count_release);
    CHECK_INT(released, 1);
    released = 0;
    CHECK(orch_local(&key) == NULL);
    return error;
}

static int wait_borrowed(void) {
    orch_future *f = orch_settled(orch_ok_int(1));
    int error = result_error(orch_wait(f));
    orch_drop(f);
    return error;
}

#define OUTSIDE_CASE(name, function, expression)                                                   \
    static int try_##name(void) { return expression; }                                             \
    IN_LOOP(name##_outside_a_task, function DO_TASK) {                                             \
        (void)loop;                                                                                \
        CHECK_INT(try_##name(), ORCH_ENOTASK);                                                     \
    }                                                                                              \
    static void callback_##name(orch_result *in, void *context) {                                  \
        (void)in;                                                                                  \
        (void)context;                                                                             \
        CHECK_INT(try_##name(), ORCH_ENOTASK);                                                     \
        called++;                                                                                  \
    }                                                                                              \
    IN_LOOP(name##_in_a_callback, function DO_TASK) {                                              \
        orch_on(orch_settled(orch_ok_int(1)), callback_##name, NULL);                              \
        CHECK_INT(orch_loop_run(loop), 0);                                                         \
        CHECK_INT(called, 1);                                                                      \
    }                                                                                              \
    static void *main_stack_##name(void *arg) {                                                    \
        *(int *)arg = try_##name();                                                                \
        return arg;                                                                                \
    }                                                                                              \
    IN_TASK(name##_on_the_main_stack, function DO_TASK) {                                          \
        int error = 1;                                                                             \
        orch_on_main_stack(main_stack_##name, &error);                                             \
        CHECK_INT(error, ORCH_ENOTASK);                                                            \
        CHECK_INT(orch_sleep(1), 0); /* the task itself is none the worse for it */                \
    }
TASK_ONLY(OUTSIDE_CASE)

// Neither a loop nor a task: both errors would be right.
static bool is_outside(int error) { return error == ORCH_ENOTASK || error == ORCH_ENOLOOP; }

MISUSE(yield_without_a_loop, "orch_yield") { CHECK(is_outside(orch_yield())); }

MISUSE(sleep_without_a_loop, "orch_sleep") { CHECK(is_outside(orch_sleep(1))); }

MISUSE(await_without_a_loop, "orch_await") {
    CHECK(is_outside(result_error(orch_await(nothing[0]))));
}

MISUSE(wait_without_a_loop, "orch_wait") { CHECK(is_outside(result_error(orch_wait(nothing[0])))); }

MISUSE(shield_without_a_loop, "orch_shield_begin") {
    orch_shield_begin();
    orch_shield_end();
}

IN_LOOP(shield_begin_outside_a_task, "orch_shield_begin" DO_TASK) {
    (void)loop;
    orch_shield_begin();
}

IN_LOOP(shield_end_outside_a_task, "orch_shield_end" DO_TASK) {
    (void)loop;
    orch_shield_end();
}

static int shield_rc[3];

static orch_result unbalanced_victim(void *arg) {
    shield_rc[0] = orch_sleep(60000);
    orch_shield_end(); // one too many
    orch_shield_begin();
    shield_rc[1] = orch_sleep(1); // a real shield all the same
    orch_shield_end();
    shield_rc[2] = orch_sleep(1);
    return orch_ok_int(arg == NULL);
}

IN_TASK(shield_end_without_begin, "orch_shield_end") {
    orch_future *f = orch_go(unbalanced_victim, NULL);
    orch_cancel(f, 0);
    orch_result r = orch_await(f);
    CHECK_INT(orch_int(&r), 1);
    CHECK_INT(shield_rc[0], ORCH_ECANCELED);
    CHECK_INT(shield_rc[1], 0);
    CHECK_INT(shield_rc[2], ORCH_ECANCELED);
    orch_result_free(&r);
}

// ---- a future that was given away before, and is pending

static int on_error;

static void note_error(orch_result *in, void *context) {
    (void)context;
    on_error = in->error;
}

static int use_on(orch_future *f) {
    orch_on(f, note_error, NULL);
    for (int i = 0; i < 3 && on_error == 0; i++) orch_yield();
    return on_error;
}

static int use_follow(orch_future *f) {
    orch_promise p;
    orch_future *follower = orch_future_new(&p);
    CHECK(orch_follow(p, f)); // it decides: the follower is rejected
    orch_result r = orch_await(follower);
    return result_error(r);
}

static int use_chain(orch_future *f) {
    orch_promise p;
    orch_future *follower = orch_future_new(&p);
    orch_settle(p, orch_chain(f));
    return result_error(orch_await(follower));
}

static int use_then_with(orch_future *f) {
    orch_then_desc desc = owning_then();
    int error = result_error(orch_await(orch_then_with(f, &desc)));
    CHECK_INT(released, 1); // on every path
    return error;
}

static int use_completion(orch_future *f) {
    orch_completion *c = orch_as_completed(f);
    int error = result_error(orch_await(orch_completion_next(c)));
    orch_completion_free(c);
    return error;
}

static int use_all_settled(orch_future *f) { // fulfilled, with an element that says so
    orch_result r = orch_await(orch_all_settled(f, orch_settled(orch_ok_int(1))));
    int error = r.error ? r.error : orch_at(&r, 0)->error;
    orch_result_free(&r);
    return error;
}

static int use_gather(orch_future *f) {
    orch_result r = orch_await(orch_gather(1000, f));
    int error = r.error ? r.error : orch_at(&r, 0)->error;
    orch_result_free(&r);
    return error;
}

static int use_any(orch_future *f) {
    orch_result r = orch_await(orch_any(f));
    int error = r.error == ORCH_EALLFAILED ? orch_at(&r, 0)->error : r.error;
    orch_result_free(&r);
    return error;
}

static int use_quorum(orch_future *f) {
    orch_result r = orch_await(orch_quorum(1, f));
    int error = r.error == ORCH_EQUORUM ? orch_at(&r, 0)->error : r.error;
    orch_result_free(&r);
    return error;
}

#define await_error(future) result_error(orch_await(future))

#define CONSUMERS(X)                                                                               \
    X(then, "orch_then", await_error(orch_then(f, pass, pass, NULL)))                              \
    X(then_with, "orch_then", use_then_with(f))                                                    \
    X(finally, "orch_finally", await_error(orch_finally(f, finish, &called)))                      \
    X(on, "orch_on", use_on(f))                                                                    \
    X(follow, "orch_follow", use_follow(f))                                                        \
    X(chain, "orch_chain", use_chain(f))                                                           \
    X(await, "orch_await", await_error(f))                                                         \
    X(wait, "orch_wait", result_error(orch_wait(f)))                                               \
    X(ref, "orch_ref", await_error(orch_ref(f)))                                                   \
    X(timeout, "orch_timeout", await_error(orch_timeout(f, 1000)))                                 \
    X(all, "orch_all", await_error(orch_all(f)))                                                   \
    X(all_settled, "orch_all_settled", use_all_settled(f))                                         \
    X(any, "orch_any", use_any(f))                                                                 \
    X(race, "orch_race", await_error(orch_race(f)))                                                \
    X(quorum, "orch_quorum", use_quorum(f))                                                        \
    X(gather, "orch_gather", use_gather(f))                                                        \
    X(as_completed, "orch_as_completed", use_completion(f))                                        \
    X(peek, "orch_peek", orch_peek(f)->error)

#define VOID_CONSUMERS(X)                                                                          \
    X(drop, "orch_drop", (orch_drop(f), ORCH_ECONSUMED))                                           \
    X(detach, "orch_detach", (orch_detach(f), ORCH_ECONSUMED))                                     \
    X(cancel, "orch_cancel", (orch_cancel(f, 0), ORCH_ECONSUMED))                                  \
    X(is_settled, "orch_is_settled", orch_is_settled(f) ? 0 : ORCH_ECONSUMED)

// f was given to a then. The second use is refused, and the first goes on as if nothing had been.
#define CONSUMED_CASE(name, function, use)                                                         \
    static int consumed_use_##name(orch_future *f) { return use; }                                 \
    IN_TASK(consumed_##name, function) {                                                           \
        orch_promise p;                                                                            \
        orch_future *f = orch_future_new(&p), *first = orch_then(f, pass, NULL, NULL);             \
        int error = consumed_use_##name(f);                                                        \
        CHECK_INT(error, ORCH_ECONSUMED);                                                          \
        CHECK(orch_settle(p, orch_ok_int(9)));                                                     \
        orch_result r = orch_await(first);                                                         \
        CHECK_INT(r.error, 0);                                                                     \
        CHECK_INT(orch_int(&r), 9);                                                                \
        orch_result_free(&r);                                                                      \
        orch_yield();                                                                              \
    }
CONSUMERS(CONSUMED_CASE)
VOID_CONSUMERS(CONSUMED_CASE)

IN_TASK(consumed_says_what_to_do, "orch_then" DO_REF) {
    orch_promise p;
    orch_future *f = orch_future_new(&p), *first = orch_then(f, pass, NULL, NULL);
    CHECK_INT(await_error(orch_then(f, pass, NULL, NULL)), ORCH_ECONSUMED);
    orch_drop(first);
}

IN_TASK(the_same_future_twice_in_a_list, "orch_all") {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    CHECK_INT(await_error(orch_all(f, f)), ORCH_ECONSUMED);
    CHECK(!orch_promise_pending(p)); // the one that was consumed lost, and was cancelled
}

IN_TASK(the_same_future_twice_in_a_race, "orch_race") {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_result r = orch_await(orch_race(f, f));
    CHECK_INT(r.error, ORCH_ECONSUMED);
    CHECK_INT(r.index, 1);
    orch_result_free(&r);
}

static orch_result await_given(void *arg) { return orch_await(arg); }

IN_TASK(two_tasks_await_one_reference, "orch_await" DO_REF) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_future *a = orch_go(await_given, f), *b = orch_go(await_given, f);
    CHECK(orch_settle(p, orch_ok_int(4)));
    orch_result ra = orch_await(a), rb = orch_await(b);
    CHECK_INT(orch_int(&ra), 4);
    CHECK_INT(rb.error, ORCH_ECONSUMED);
    orch_result_free(&ra);
    orch_result_free(&rb);
}

// ---- a future that has been consumed and freed, and whose slot was not used again

#ifdef NDEBUG
#define SLOTS_BETWEEN 0 // a release build uses the slot again at once
#else
#define SLOTS_BETWEEN 10 // a debug build keeps it in quarantine
#endif

#define FREED_CASE(name, function, use)                                                            \
    static int freed_use_##name(orch_future *f) { return use; }                                    \
    IN_TASK(freed_##name, function DO_REF) {                                                       \
        orch_future *f = orch_settled(orch_ok_int(1));                                             \
        CHECK_INT(result_error(orch_await(f)), 0);                                                 \
        for (int i = 0; i < SLOTS_BETWEEN; i++) orch_drop(orch_settled(orch_ok_int(2)));           \
        CHECK_INT(freed_use_##name(f), ORCH_ECONSUMED);                                            \
    }
FREED_CASE(await, "orch_await", await_error(f))
FREED_CASE(then, "orch_then", await_error(orch_then(f, pass, pass, NULL)))
FREED_CASE(finally, "orch_finally", await_error(orch_finally(f, finish, &called)))
FREED_CASE(wait, "orch_wait", result_error(orch_wait(f)))
FREED_CASE(ref, "orch_ref", await_error(orch_ref(f)))
FREED_CASE(drop, "orch_drop", (orch_drop(f), ORCH_ECONSUMED))
FREED_CASE(detach, "orch_detach", (orch_detach(f), ORCH_ECONSUMED))
FREED_CASE(cancel, "orch_cancel", (orch_cancel(f, 0), ORCH_ECONSUMED))
FREED_CASE(peek, "orch_peek", orch_peek(f)->error)
FREED_CASE(is_settled, "orch_is_settled", orch_is_settled(f) ? 0 : ORCH_ECONSUMED)
FREED_CASE(timeout, "orch_timeout", await_error(orch_timeout(f, 1000)))
FREED_CASE(on, "orch_on", use_on(f))
FREED_CASE(all, "orch_all", await_error(orch_all(f)))
FREED_CASE(as_completed, "orch_as_completed", use_completion(f))

IN_TASK(dropped_twice, "orch_drop" DO_REF) {
    orch_future *f = orch_after(1);
    orch_drop(f);
    orch_drop(f);
}

static orch_result use_freed_argument(void *arg) {
    orch_yield();
    return orch_await(arg); // main dropped it meanwhile
}

IN_TASK(awaited_after_a_drop_elsewhere, "orch_await" DO_REF) {
    orch_future *f = orch_settled(orch_ok_int(1)), *t = orch_go(use_freed_argument, f);
    orch_drop(f);
    CHECK_INT(await_error(t), ORCH_ECONSUMED);
}

// ---- once at a time

IN_TASK(a_second_next_while_one_is_pending, "orch_completion_next") {
    orch_promise p;
    orch_completion *c = orch_as_completed(orch_future_new(&p));
    orch_future *first = orch_completion_next(c);
    CHECK_INT(await_error(orch_completion_next(c)), ORCH_EBUSY);
    CHECK(orch_settle(p, orch_ok_int(3)));
    orch_result r = orch_await(first);
    CHECK_INT(orch_int(&r), 3);
    orch_result_free(&r);
    orch_completion_free(c);
}

IN_TASK(a_promise_boxed_twice, "orch_promise_box") {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    void *a = orch_promise_box(p), *b = orch_promise_box(p);
    CHECK(a != NULL && b != NULL);
    CHECK(orch_settle(orch_promise_unbox(a), orch_ok_int(3))); // the first wins
    orch_result r = orch_await(f);
    CHECK_INT(orch_int(&r), 3);
    orch_result_free(&r);
}

// ---- NULL

static int null_then_with(void) {
    orch_then_desc desc = owning_then();
    int error = await_error(orch_then_with(NULL, &desc));
    CHECK_INT(released, 1);
    return error;
}

static int null_desc_then_with(void) {
    int error = await_error(orch_then_with(orch_settled(orch_ok(&value, count_release)), NULL));
    CHECK_INT(released, 1); // f is consumed whatever happens
    return error;
}

static int null_finally_fn(void) {
    orch_future *f = orch_finally(orch_settled(orch_ok(&value, count_release)), NULL, NULL);
    int error = await_error(f);
    CHECK_INT(released, 1);
    return error;
}

static int null_on(void) {
    orch_on(NULL, note_error, NULL);
    for (int i = 0; i < 3 && on_error == 0; i++) orch_yield();
    return on_error;
}

static int null_on_fn(void) {
    orch_on(orch_settled(orch_ok(&value, count_release)), NULL, NULL);
    orch_yield();
    orch_yield();
    CHECK_INT(released, 1);
    return ORCH_EINVAL;
}

static int null_on_cancel(void) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    bool taken = orch_promise_on_cancel(p, NULL, NULL);
    orch_drop(f); // cancelled as if there were no hook
    return taken ? 0 : ORCH_EINVAL;
}

static int null_in_list(void) {
    orch_future *f = orch_settled(orch_ok(&value, count_release));
    int error = await_error(orch_all(f, NULL));
    CHECK_INT(released, 1);
    return error;
}

static int null_completion(void) {
    orch_completion *c = orch_as_completed_n(1, NULL);
    CHECK(c != NULL);
    int error = await_error(orch_completion_next(c));
    orch_completion_free(c);
    return error;
}

static int null_go_fn(void) {
    orch_task_desc desc = owning_desc();
    desc.fn = NULL;
    int error = await_error(orch_go_with(&desc));
    CHECK_INT(released, 1); // though it never ran
    return error;
}

static int null_copy(void) {
    orch_task_desc desc = {.fn = task, .arg_size = 8};
    return await_error(orch_go_with(&desc));
}

#define NULLS(X)                                                                                   \
    X(await, "orch_await", await_error(NULL))                                                      \
    X(wait, "orch_wait", result_error(orch_wait(NULL)))                                            \
    X(ref, "orch_ref", await_error(orch_ref(NULL)))                                                \
    X(cancel, "orch_cancel", (orch_cancel(NULL, 0), ORCH_EINVAL))                                  \
    X(is_settled, "orch_is_settled", (orch_is_settled(NULL), ORCH_EINVAL))                         \
    X(peek, "orch_peek", orch_peek(NULL)->error)                                                   \
    X(then, "orch_then", await_error(orch_then(NULL, pass, pass, NULL)))                           \
    X(then_with, "orch_then", null_then_with())                                                    \
    X(then_with_desc, "orch_then_with", null_desc_then_with())                                     \
    X(finally, "orch_finally", await_error(orch_finally(NULL, finish, &called)))                   \
    X(finally_fn, "orch_finally", null_finally_fn())                                               \
    X(on, "orch_on", null_on())                                                                    \
    X(on_fn, "orch_on", null_on_fn())                                                              \
    X(follow, "orch_follow", use_follow(NULL))                                                     \
    X(chain, "orch_chain", use_chain(NULL))                                                        \
    X(future_new, "orch_future_new", await_error(orch_future_new(NULL)))                           \
    X(on_cancel, "orch_promise_on_cancel", null_on_cancel())                                       \
    X(unbox, "orch_promise_unbox",                                                                 \
      orch_promise_pending(orch_promise_unbox(NULL)) ? 0 : ORCH_EINVAL)                            \
    X(timeout, "orch_timeout", await_error(orch_timeout(NULL, 1000)))                              \
    X(in_a_list, "orch_all", null_in_list())                                                       \
    X(all, "orch_all", await_error(orch_all_n(1, NULL)))                                           \
    X(all_settled, "orch_all_settled", await_error(orch_all_settled_n(1, NULL)))                   \
    X(any, "orch_any", await_error(orch_any_n(1, NULL)))                                           \
    X(race, "orch_race", await_error(orch_race_n(1, NULL)))                                        \
    X(quorum, "orch_quorum", await_error(orch_quorum_n(1, 1, NULL)))                               \
    X(gather, "orch_gather", await_error(orch_gather_n(1, NULL, 10)))                              \
    X(as_completed, "orch_as_completed", null_completion())                                        \
    X(completion_next, "orch_completion_next", await_error(orch_completion_next(NULL)))            \
    X(go, "orch_go", await_error(orch_go(NULL, NULL)))                                             \
    X(go_with, "orch_go", await_error(orch_go_with(NULL)))                                         \
    X(go_with_fn, "orch_go", null_go_fn())                                                         \
    X(go_with_copy, "orch_go", null_copy())                                                        \
    X(spawn, "orch_", orch_spawn(NULL, NULL))                                                      \
    X(on_main_stack, "orch_on_main_stack", orch_on_main_stack(NULL, NULL) ? 0 : ORCH_EINVAL)

#define NULL_CASE(name, function, expression)                                                      \
    IN_TASK(null_##name, function) {                                                               \
        CHECK_INT(expression, ORCH_EINVAL);                                                        \
        orch_yield();                                                                              \
        orch_yield();                                                                              \
    }
NULLS(NULL_CASE)

MISUSE(null_run, "orch_run") {
    CHECK_INT(result_error(orch_run(NULL, NULL)), ORCH_EINVAL);
    CHECK(orch_loop_current() == NULL);
}

MISUSE(null_run_with, "orch_run") {
    orch_loop_desc desc = {.stack_size = 32768};
    CHECK_INT(result_error(orch_run_with(&desc, NULL, NULL)), ORCH_EINVAL);
    CHECK(orch_loop_current() == NULL);
}

MISUSE(null_loop_free, "orch_loop_free") { CHECK_INT(orch_loop_free(NULL), ORCH_EINVAL); }

MISUSE(null_loop_run, "orch_loop_run") { CHECK_INT(orch_loop_run(NULL), ORCH_EINVAL); }

MISUSE(null_loop_step, "orch_loop_step") { CHECK_INT(orch_loop_step(NULL, 1), ORCH_EINVAL); }

TEST(null_is_nothing_where_the_contract_says_so) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_drop(NULL);
    orch_detach(NULL);
    orch_completion_free(NULL);
    CHECK_INT(orch_loop_free(loop), 0);
}

// ---- values

static const size_t bad_sizes[] = {1,       4096, 16383, ((size_t)1 << 30) + 1, SIZE_MAX / 2 + 2,
                                   SIZE_MAX};
enum { BAD_SIZES = sizeof bad_sizes / sizeof bad_sizes[0] };

static int bad_stack(size_t size) {
    orch_task_desc desc = owning_desc();
    desc.stack_size = size;
    int error = await_error(orch_go_with(&desc));
    CHECK_INT(called, 0);
    return error;
}

IN_TASK(a_stack_too_small, "orch_go") {
    CHECK_INT(bad_stack(1), ORCH_EINVAL);
    CHECK_INT(released, 1);
}

IN_TASK(a_stack_of_16_kib_less_1, "orch_go") {
    CHECK_INT(bad_stack(16383), ORCH_EINVAL);
    CHECK_INT(released, 1);
}

IN_TASK(a_stack_too_large, "orch_go") {
    CHECK_INT(bad_stack(SIZE_MAX), ORCH_EINVAL);
    CHECK_INT(released, 1);
}

IN_TASK(a_stack_of_a_gib_and_1, "orch_go") {
    for (int i = 3; i < BAD_SIZES; i++) CHECK_INT(bad_stack(bad_sizes[i]), ORCH_EINVAL);
    CHECK_INT(released, BAD_SIZES - 3);
}

static char large_argument[40000];

IN_TASK(an_argument_larger_than_half_the_stack, "orch_go") {
    orch_task_desc desc = {.fn = task, .arg = large_argument, .arg_size = 32769};
    CHECK_INT(await_error(orch_go_with(&desc)), ORCH_EINVAL);
    desc.arg_size = SIZE_MAX;
    CHECK_INT(await_error(orch_go_with(&desc)), ORCH_EINVAL);
    CHECK_INT(called, 0);
}

MISUSE(a_loops_stack_too_small, "orch_loop_new") {
    for (int i = 0; i < BAD_SIZES; i++) {
        orch_loop_desc desc = {.stack_size = bad_sizes[i]};
        CHECK(orch_loop_new(&desc) == NULL);
        CHECK(orch_loop_current() == NULL);
    }
}

MISUSE(a_runs_stack_too_large, "orch_run") {
    orch_loop_desc desc = {.stack_size = SIZE_MAX};
    CHECK_INT(result_error(orch_run_with(&desc, task, NULL)), ORCH_EINVAL);
    CHECK_INT(called, 0);
    CHECK(orch_loop_current() == NULL);
}

MISUSE(an_unknown_poller, "orch_loop_new") {
    orch_loop_desc desc = {.poller = (orch_poller)77};
    CHECK(orch_loop_new(&desc) == NULL);
    CHECK(orch_loop_current() == NULL);
}

static int bad_events(int events) {
    int fd[2], error = 0;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fd)) return 0;
    error = await_error(orch_ready(fd[0], events));
    CHECK_INT(orch_loop_statistics(orch_loop_current()).watched, 0);
    close(fd[0]);
    close(fd[1]);
    return error;
}

IN_TASK(no_events, "orch_ready") { CHECK_INT(bad_events(0), ORCH_EINVAL); }

IN_TASK(unknown_events, "orch_ready") {
    CHECK_INT(bad_events(4), ORCH_EINVAL);
    CHECK_INT(bad_events(ORCH_READABLE | 8), ORCH_EINVAL);
    CHECK_INT(bad_events(-1), ORCH_EINVAL);
}

// An absurd count may not be believed: nothing of the array is read.
#define COUNTS(X)                                                                                  \
    X(all, "orch_all", await_error(orch_all_n(SIZE_MAX, nothing)))                                 \
    X(all_settled, "orch_all_settled", await_error(orch_all_settled_n(SIZE_MAX, nothing)))         \
    X(any, "orch_any", await_error(orch_any_n(SIZE_MAX / 8, nothing)))                             \
    X(race, "orch_race", await_error(orch_race_n(SIZE_MAX, nothing)))                              \
    X(quorum, "orch_quorum", await_error(orch_quorum_n(1, SIZE_MAX - 7, nothing)))                 \
    X(gather, "orch_gather", await_error(orch_gather_n(SIZE_MAX, nothing, 10)))                    \
    X(as_completed, "orch_as_completed", absurd_completion())

static int absurd_completion(void) {
    orch_completion *c = orch_as_completed_n(SIZE_MAX, nothing);
    CHECK(c != NULL);
    int error = await_error(orch_completion_next(c));
    orch_completion_free(c);
    return error;
}

#define COUNT_CASE(name, function, expression)                                                     \
    IN_TASK(absurd_count_##name, function) {                                                       \
        int error = expression;                                                                    \
        CHECK(error == ORCH_EINVAL || error == ORCH_ENOMEM);                                       \
    }
COUNTS(COUNT_CASE)

// ---- loops

MISUSE(a_second_loop_on_a_thread, "orch_loop_new" DO_NEST) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    CHECK(orch_loop_new(NULL) == NULL);
    CHECK(orch_loop_current() == loop);
    CHECK_INT(orch_loop_free(loop), 0);
}

IN_TASK(a_second_loop_in_a_task, "orch_loop_new" DO_NEST) {
    orch_loop *loop = orch_loop_current();
    CHECK(orch_loop_new(NULL) == NULL);
    CHECK(orch_loop_current() == loop);
}

IN_TASK(a_nested_run, "orch_run" DO_NEST) {
    CHECK_INT(result_error(orch_run(task, NULL)), ORCH_ENESTED);
    CHECK_INT(called, 0);
    CHECK_INT(orch_sleep(1), 0);
}

IN_LOOP(a_run_beside_a_loop, "orch_run" DO_NEST) {
    CHECK_INT(result_error(orch_run(task, NULL)), ORCH_ENESTED);
    CHECK_INT(called, 0);
    CHECK(orch_loop_current() == loop);
}

static void run_in_callback(orch_result *in, void *context) {
    if (in->error == 0) *(int *)context = result_error(orch_run(task, NULL));
}

IN_LOOP(a_run_in_a_callback, "orch_run" DO_NEST) {
    int error = 0;
    orch_on(orch_settled(orch_ok_int(1)), run_in_callback, &error);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(error, ORCH_ENESTED);
}

#define NESTED_CASE(name, call)                                                                    \
    IN_TASK(name##_in_a_task, "orch_" #name DO_NEST) {                                             \
        orch_loop *loop = orch_loop_current();                                                     \
        CHECK_INT(call, ORCH_ENESTED);                                                             \
        CHECK(orch_loop_current() == loop);                                                        \
        CHECK_INT(orch_sleep(1), 0);                                                               \
    }                                                                                              \
    static void name##_callback(orch_result *in, void *context) {                                  \
        orch_loop *loop = orch_loop_current();                                                     \
        if (in->error == 0) *(int *)context = call; /* not when memory is refused: a plain call */ \
    }                                                                                              \
    IN_LOOP(name##_in_a_callback, "orch_" #name DO_NEST) {                                         \
        int error = 0;                                                                             \
        orch_on(orch_settled(orch_ok_int(1)), name##_callback, &error);                            \
        CHECK_INT(orch_loop_run(loop), 0);                                                         \
        CHECK_INT(error, ORCH_ENESTED);                                                            \
    }                                                                                              \
    static void *name##_call_on_main(void *arg) {                                                  \
        orch_loop *loop = orch_loop_current();                                                     \
        *(int *)arg = call;                                                                        \
        return arg;                                                                                \
    }                                                                                              \
    IN_TASK(name##_on_the_main_stack, "orch_" #name DO_NEST) {                                     \
        int error = 0;                                                                             \
        orch_on_main_stack(name##_call_on_main, &error);                                           \
        CHECK_INT(error, ORCH_ENESTED);                                                            \
    }
NESTED_CASE(loop_run, orch_loop_run(loop))
NESTED_CASE(loop_step, orch_loop_step(loop, 1))
NESTED_CASE(loop_free, orch_loop_free(loop))

// ---- other threads

typedef struct foreign {
    orch_loop *loop;
    orch_future *future;
    orch_promise promise;
    bool decided;
    int error;
} foreign;

static void in_thread(void *(*fn)(void *), foreign *f) {
    pthread_t thread;
    if (CHECK(pthread_create(&thread, NULL, fn, f) == 0)) pthread_join(thread, NULL);
}

static void *settle_there(void *arg) {
    foreign *f = arg;
    f->decided = orch_settle(f->promise, orch_ok(&value, count_release));
    return NULL;
}

static void *settle_there_with_a_loop(void *arg) {
    orch_loop *loop = orch_loop_new(NULL);
    settle_there(arg);
    if (loop) orch_loop_free(loop);
    return NULL;
}

static void check_foreign_settle(void *(*fn)(void *)) {
    foreign f = {.decided = true};
    f.future = orch_future_new(&f.promise);
    in_thread(fn, &f);
    CHECK(!f.decided);
    CHECK_INT(released, 1); // freed as whatever decides nothing is
    CHECK(orch_promise_pending(f.promise));
    CHECK(orch_settle(f.promise, orch_ok_int(2)));
    orch_drop(f.future);
}

IN_TASK(settling_from_a_thread_without_a_loop, "orch_settle" DO_THREAD) {
    check_foreign_settle(settle_there);
}

IN_TASK(settling_from_a_thread_with_a_loop, "orch_settle" DO_THREAD) {
    check_foreign_settle(settle_there_with_a_loop);
}

static void *free_result_there(void *result) {
    orch_result_free(result);
    return NULL;
}

static void *unbox_there(void *box) {
    orch_promise promise = orch_promise_unbox(box);
    CHECK(!orch_promise_pending(promise));
    return NULL;
}

static void *stop_there(void *loop) {
    orch_loop_stop(loop);
    return NULL;
}

static void *dump_there(void *loop) {
    orch_loop_dump(loop);
    return NULL;
}

static void on_a_thread(void *(*fn)(void *), void *arg) {
    pthread_t thread;
    if (CHECK_INT(pthread_create(&thread, NULL, fn, arg), 0)) pthread_join(thread, NULL);
}

IN_TASK(a_box_opened_by_another_thread, "orch_promise_unbox" DO_THREAD) {
    orch_promise promise;
    orch_future *f = orch_future_new(&promise);
    void *box = orch_promise_box(promise);
    on_a_thread(unbox_there, box);
    CHECK(orch_settle(orch_promise_unbox(box), orch_ok_int(1)));
    orch_drop(f);
}

IN_TASK(a_loop_stopped_by_another_thread, "orch_loop_stop" DO_THREAD) {
    on_a_thread(stop_there, orch_loop_current());
    CHECK_INT(orch_sleep(1), 0);
}

IN_TASK(a_loop_dumped_by_another_thread, "orch_loop_dump" DO_THREAD) {
    on_a_thread(dump_there, orch_loop_current());
}

IN_TASK(a_list_freed_by_another_thread, "orch_result_free" DO_THREAD) {
    orch_result r =
        orch_await(orch_all(orch_settled(orch_ok_int(1)), orch_settled(orch_ok_int(2))));
    orch_result kept = r;
    on_a_thread(free_result_there, &r);
    orch_result_free(&kept); // in release builds it still holds all
}

IN_TASK(a_share_freed_by_another_thread, "orch_result_free" DO_THREAD) {
    orch_future *f = orch_settled(orch_ok(malloc(1), free)), *g = orch_ref(f);
    orch_result r = orch_await(f), kept = r;
    on_a_thread(free_result_there, &r);
    orch_result_free(&kept);
    orch_drop(g);
}

IN_TASK(no_list_of_futures, "orch_all: ") { CHECK_INT(error_of(orch_all_list(NULL)), ORCH_EINVAL); }

IN_TASK(settling_with_no_result, "orch_settle_with") {
    orch_promise promise;
    orch_future *f = orch_future_new(&promise);
    CHECK(!orch_settle_with(promise, NULL));
    orch_result r = orch_ok_int(3);
    CHECK(orch_settle_with(promise, &r));
    r = orch_await(f);
    CHECK_INT(orch_int(&r), 3);
}

static orch_result await_there_main(void *arg) {
    foreign *f = arg;
    f->error = result_error(orch_await(f->future));
    return orch_ok_int(1);
}

static void *await_there(void *arg) {
    orch_result r = orch_run(await_there_main, arg);
    orch_result_free(&r);
    return NULL;
}

static orch_result then_there_main(void *arg) {
    foreign *f = arg;
    f->error = await_error(orch_then(f->future, pass, pass, NULL));
    return orch_ok_int(1);
}

static void *then_there(void *arg) {
    orch_result r = orch_run(then_there_main, arg);
    orch_result_free(&r);
    return NULL;
}

static orch_result all_there_main(void *arg) {
    foreign *f = arg;
    f->error = await_error(orch_all(f->future, orch_settled(orch_ok_int(1))));
    return orch_ok_int(1);
}

static void *all_there(void *arg) {
    orch_result r = orch_run(all_there_main, arg);
    orch_result_free(&r);
    return NULL;
}

static void *drop_there(void *arg) {
    foreign *f = arg;
    orch_drop(f->future);
    f->error = ORCH_ETHREAD;
    return NULL;
}

static void *cancel_there(void *arg) {
    foreign *f = arg;
    orch_cancel(f->future, 0);
    f->error = ORCH_ETHREAD;
    return NULL;
}

// Used from another thread, the future is left as it was.
#define THREAD_CASE(name, function, fn)                                                            \
    IN_TASK(name, function DO_THREAD) {                                                            \
        foreign f = {.error = 0};                                                                  \
        f.future = orch_future_new(&f.promise);                                                    \
        in_thread(fn, &f);                                                                         \
        CHECK_INT(f.error, ORCH_ETHREAD);                                                          \
        CHECK(orch_settle(f.promise, orch_ok_int(6)));                                             \
        orch_result r = orch_await(f.future);                                                      \
        CHECK_INT(orch_int(&r), 6);                                                                \
        orch_result_free(&r);                                                                      \
    }
THREAD_CASE(awaiting_another_threads_future, "orch_await", await_there)
THREAD_CASE(chaining_another_threads_future, "orch_then", then_there)
THREAD_CASE(dropping_another_threads_future, "orch_drop", drop_there)
THREAD_CASE(cancelling_another_threads_future, "orch_cancel", cancel_there)

IN_TASK(combining_another_threads_future, "orch_all") {
    foreign f = {.error = 0};
    f.future = orch_future_new(&f.promise);
    in_thread(all_there, &f);
    CHECK_INT(f.error, ORCH_ETHREAD);
    orch_drop(f.future);
}

static orch_completion *far_completion;
static void *free_completion_there(void *arg) {
    orch_completion_free(far_completion);
    return arg;
}

IN_TASK(freeing_another_threads_iteration, "orch_completion_free") {
    foreign f = {.error = 0};
    f.future = orch_future_new(&f.promise);
    far_completion = orch_as_completed(f.future);
    in_thread(free_completion_there, &f);
    orch_future *next = orch_completion_next(far_completion);
    CHECK(orch_settle(f.promise, orch_ok_int(6))); // it was left alone
    CHECK_INT(await_error(next), 0);
    orch_completion_free(far_completion);
}

static void *run_there(void *arg) {
    foreign *f = arg;
    f->error = orch_loop_run(f->loop);
    return NULL;
}

static void *free_there(void *arg) {
    foreign *f = arg;
    f->error = orch_loop_free(f->loop);
    return NULL;
}

IN_LOOP(running_another_threads_loop, "orch_loop_run") {
    foreign f = {.loop = loop};
    in_thread(run_there, &f);
    CHECK_INT(f.error, ORCH_ETHREAD);
}

IN_LOOP(freeing_another_threads_loop, "orch_loop_free") {
    foreign f = {.loop = loop};
    in_thread(free_there, &f);
    CHECK_INT(f.error, ORCH_ETHREAD);
    CHECK(orch_loop_current() == loop);
}

// ---- scopes

static int member_ended, member_slept;

static orch_result long_member(void *arg) {
    member_slept = orch_sleep(3600000);
    orch_shield_begin();
    orch_yield(); // it takes a moment to end
    orch_shield_end();
    member_ended++;
    return orch_ok_int(arg != NULL);
}

static orch_result quick_member(void *arg) {
    orch_yield();
    member_ended++;
    return orch_ok_int(arg != NULL);
}

IN_TASK(a_scope_closed_twice, "orch_scope_close") {
    orch_scope s;
    CHECK_INT(orch_scope_open(&s, NULL), 0);
    orch_scope_go(&s, quick_member, NULL);
    CHECK_INT(result_error(orch_scope_close(&s)), 0);
    CHECK_INT(result_error(orch_scope_close(&s)), ORCH_ESCOPE);
    CHECK_INT(result_error(orch_scope_close(&s)), ORCH_ESCOPE);
    CHECK_INT(member_ended, 1);
}

IN_TASK(a_scope_closed_twice_says_what_to_do, "orch_scope_close: the scope is not open here") {
    orch_scope s;
    orch_scope_open(&s, NULL);
    CHECK_INT(result_error(orch_scope_close(&s)), 0);
    CHECK_INT(result_error(orch_scope_close(&s)), ORCH_ESCOPE);
}

IN_TASK(a_copy_of_a_scope_that_is_closed, "orch_scope_close") {
    orch_scope s, copy;
    orch_scope_open(&s, NULL);
    copy = s;
    CHECK_INT(result_error(orch_scope_close(&s)), 0);
    orch_scope_open(&s, NULL); // perhaps in the same slot
    CHECK_INT(result_error(orch_scope_close(&copy)), ORCH_ESCOPE);
    CHECK_INT(result_error(orch_scope_close(&s)), 0);
}

static orch_result close_given(void *arg) {
    return orch_ok_int(result_error(orch_scope_close((orch_scope *)arg)));
}

static void close_by(bool member) {
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, quick_member, NULL);
    if (member) CHECK_INT(orch_scope_go(&s, close_given, &s), 0);
    if (!member) {
        orch_result r = orch_await(orch_go(close_given, &s));
        CHECK_INT(orch_int(&r), ORCH_ESCOPE);
        orch_result_free(&r);
    }
    CHECK_INT(orch_sleep(1), 0); // it is still open, and none the worse for it
    CHECK_INT(orch_scope_go(&s, quick_member, NULL), 0);
    CHECK_INT(result_error(orch_scope_close(&s)), 0);
    CHECK_INT(member_ended, 2);
}

IN_TASK(a_scope_closed_by_another_task, "orch_scope_close") { close_by(false); }

IN_TASK(a_scope_closed_by_a_member, "orch_scope_close") { close_by(true); }

static void close_in_callback(orch_result *in, void *context) {
    if (in->error == 0) called = result_error(orch_scope_close((orch_scope *)context));
}

IN_TASK(a_scope_closed_by_a_callback, "orch_scope_close" DO_TASK) {
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_on(orch_settled(orch_ok_int(1)), close_in_callback, &s);
    orch_yield();
    CHECK_INT(called, ORCH_ENOTASK);
    CHECK_INT(result_error(orch_scope_close(&s)), 0);
}

static void yield_at_the_end(void *arg) { *(int *)arg = orch_yield(); }

static orch_result yield_twice(void *arg) {
    (void)arg;
    orch_yield();
    orch_yield();
    return orch_ok_int(2);
}

IN_TASK(a_yield_when_the_task_has_ended, "orch_yield" DO_TASK) {
    int said = 0;
    orch_task_desc desc = {.fn = yield_twice, .arg = &said, .release = yield_at_the_end};
    orch_future *f = orch_go_with(&desc), *next = orch_go(yield_twice, NULL);
    CHECK_INT(result_error(orch_await(f)), 0);
    CHECK_INT(said, ORCH_ENOTASK);
    CHECK_INT(result_error(orch_await(next)), 0);
}

IN_TASK(a_scope_closed_before_what_is_open_in_it, "orch_scope_close") {
    orch_scope outer, middle, inner;
    orch_scope_open(&outer, NULL);
    orch_scope_open(&middle, NULL);
    orch_scope_open(&inner, NULL);
    orch_scope_go(&inner, quick_member, NULL);
    orch_scope_go(&middle, quick_member, NULL);
    orch_scope_go(&outer, quick_member, NULL);
    int error = result_error(orch_scope_close(&outer));
    CHECK(error == 0 || error == ORCH_ESCOPE);
    CHECK_INT(member_ended, 3); // all of them are closed
    CHECK_INT(result_error(orch_scope_close(&inner)), ORCH_ESCOPE);
    CHECK_INT(result_error(orch_scope_close(&middle)), ORCH_ESCOPE);
    CHECK_INT(result_error(orch_scope_close(&outer)), ORCH_ESCOPE);
}

static orch_result leaves_scopes(void *arg) {
    orch_scope s[3];
    for (int i = 0; i < 3; i++) {
        CHECK_INT(orch_scope_open(&s[i], &(orch_scope_desc){.name = "left", .timeout_ms = 5000}),
                  0);
        CHECK_INT(orch_scope_go(&s[i], long_member, NULL), 0);
    }
    if (arg) orch_sleep(1);
    return orch_ok(&value, count_release);
}

static void leave_scopes(void *arg) {
    orch_result r = orch_await(orch_go(leaves_scopes, arg));
    CHECK_INT(r.error, 0);
    CHECK_INT(member_ended, 3); // cancelled, and ended before the task
    CHECK_INT(member_slept, ORCH_ECANCELED);
    CHECK_INT(released, 0);
    orch_result_free(&r);
    CHECK_INT(released, 1);
    CHECK_INT(orch_loop_statistics(orch_loop_current()).timers, 0);
}

IN_TASK(a_task_that_leaves_scopes_open, "orch_scope_close") { leave_scopes(NULL); }

IN_TASK(a_task_that_leaves_scopes_open_later, "orch_scope_close") { leave_scopes(&value); }

// The report names the task and the scope, in both builds.
static char leave_report[1024];

static void keep_report(const char *text, void *context) {
    (void)context;
    fputs(text, stderr);
    size_t used = strlen(leave_report);
    snprintf(leave_report + used, sizeof leave_report - used, "%s", text);
}

static orch_result leave_in_main(void *arg) {
    (void)arg;
    return leaves_scopes(NULL);
}

TEST_DIES(a_scope_left_open_is_named, "left") {
    orch_loop_desc desc = {.on_report = keep_report};
    orch_result r = orch_run_with(&desc, leave_in_main, NULL);
    orch_result_free(&r);
    if (strstr(leave_report, "'left'") != NULL) abort(); // as a release build goes on
}

MISUSE(a_main_task_that_leaves_scopes_open, "orch_scope_close") {
    orch_result r = orch_run(leave_in_main, NULL);
    CHECK_INT(r.error, 0);
    CHECK_INT(member_ended, 3);
    orch_result_free(&r);
    CHECK_INT(released, 1);
}

static orch_result forgets_one(void *arg) {
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, long_member, NULL);
    orch_scope_open(&s, NULL); // the ticket of the first one is lost
    orch_scope_go(&s, quick_member, NULL);
    CHECK_INT(result_error(orch_scope_close(&s)), 0);
    return orch_ok_int(arg != NULL);
}

IN_TASK(a_scope_whose_ticket_was_overwritten, "orch_scope_close") {
    CHECK_INT(await_error(orch_go(forgets_one, NULL)), 0);
    CHECK_INT(member_ended, 2);
}

// A scope that is closed, or never was one.
#define CLOSED_SCOPE(X)                                                                            \
    X(go, "orch_scope_go", orch_scope_go(s, task, NULL))                                           \
    X(go_with, "orch_scope_go_with", scope_go_owning(s))                                           \
    X(add, "orch_scope_add", scope_add_pending(s))                                                 \
    X(extend, "orch_scope_extend", orch_scope_extend(s, 100))                                      \
    X(close, "orch_scope_close", result_error(orch_scope_close(s)))                                \
    X(cancel, "orch_scope_cancel", (orch_scope_cancel(s, 7), ORCH_ESCOPE))                         \
    X(failures, "orch_scope_failures", orch_scope_failures(s) ? 0 : ORCH_ESCOPE)                   \
    X(error, "orch_scope_error", orch_scope_error(s, 0)->error == ORCH_ERANGE ? ORCH_ESCOPE : 0)

static int scope_go_owning(orch_scope *s) {
    orch_task_desc desc = owning_desc();
    int error = orch_scope_go_with(s, &desc);
    CHECK_INT(released, 1);
    return error;
}

static int scope_add_pending(orch_scope *s) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    int error = orch_scope_add(s, f);
    CHECK(!orch_promise_pending(p)); // given up
    CHECK_INT(orch_scope_add(s, orch_settled(orch_ok(&value, count_release))), error);
    CHECK_INT(released, 1);
    CHECK_INT(orch_scope_add(s, orch_go(long_member, NULL)), error);
    CHECK_INT(member_ended, 1); // and waited for
    return error;
}

#define CLOSED_CASE(name, function, use)                                                           \
    static int closed_use_##name(orch_scope *s) { return use; }                                    \
    IN_TASK(closed_scope_##name, function) {                                                       \
        orch_scope s;                                                                              \
        orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 1000});                               \
        CHECK_INT(result_error(orch_scope_close(&s)), 0);                                          \
        CHECK_INT(closed_use_##name(&s), ORCH_ESCOPE);                                             \
        CHECK_INT(called, 0);                                                                      \
    }                                                                                              \
    IN_TASK(zero_scope_##name, function) {                                                         \
        orch_scope s = {NULL, 0};                                                                  \
        CHECK_INT(closed_use_##name(&s), ORCH_ESCOPE);                                             \
        CHECK_INT(called, 0);                                                                      \
    }                                                                                              \
    IN_TASK(null_scope_##name, function) {                                                         \
        int error = closed_use_##name(NULL);                                                       \
        CHECK(error == ORCH_EINVAL || error == ORCH_ESCOPE);                                       \
        CHECK_INT(called, 0);                                                                      \
    }
CLOSED_SCOPE(CLOSED_CASE)

IN_TASK(null_scope_open, "orch_scope_open") { CHECK_INT(orch_scope_open(NULL, NULL), ORCH_EINVAL); }

// What cannot start counts as a failure of its scope.
#define BAD_MEMBER(X)                                                                              \
    X(go, "orch_scope_go", ORCH_EINVAL, orch_scope_go(&s, NULL, NULL))                             \
    X(go_with, "orch_scope_go_with", ORCH_EINVAL, orch_scope_go_with(&s, NULL))                    \
    X(stack, "orch_scope_go_with", ORCH_EINVAL, orch_scope_go_with(&s, &bad))                      \
    X(add, "orch_scope_add", ORCH_EINVAL, orch_scope_add(&s, NULL))                                \
    X(add_consumed, "orch_scope_add", ORCH_ECONSUMED, orch_scope_add(&s, consumed))

#define BAD_MEMBER_CASE(name, function, want, use)                                                 \
    IN_TASK(bad_member_##name, function) {                                                         \
        orch_scope s;                                                                              \
        orch_promise p;                                                                            \
        orch_task_desc bad = owning_desc();                                                        \
        bad.stack_size = 1;                                                                        \
        orch_future *consumed = orch_future_new(&p), *all = orch_all(consumed);                    \
        orch_scope_open(&s, NULL);                                                                 \
        CHECK_INT(use, want);                                                                      \
        CHECK_INT(called, 0);                                                                      \
        CHECK(released == 0 || bad.release != NULL);                                               \
        CHECK_INT(orch_scope_failures(&s), 1);                                                     \
        CHECK_INT(orch_scope_error(&s, 0)->error, want);                                           \
        CHECK_INT(orch_sleep(1), ORCH_ECANCELED);                                                  \
        CHECK_INT(result_error(orch_scope_close(&s)), want);                                       \
        CHECK(orch_promise_pending(p));                                                            \
        orch_drop(all);                                                                            \
    }
BAD_MEMBER(BAD_MEMBER_CASE)

IN_TASK(bad_member_releases_its_argument, "orch_scope_go_with") {
    orch_scope s;
    orch_task_desc bad = owning_desc();
    bad.stack_size = SIZE_MAX;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    CHECK_INT(orch_scope_go_with(&s, &bad), ORCH_EINVAL);
    CHECK_INT(released, 1);
    CHECK_INT(orch_scope_go(&s, quick_member, NULL), 0); // keeps going
    CHECK_INT(result_error(orch_scope_close(&s)), ORCH_EINVAL);
    CHECK_INT(member_ended, 1);
}

static orch_scope *scope_there;

static void *go_there(void *arg) {
    foreign *f = arg;
    orch_task_desc desc = owning_desc();
    f->error = orch_scope_go_with(scope_there, &desc);
    return NULL;
}

IN_TASK(using_another_threads_scope, "orch_scope_go_with") {
    orch_scope s;
    foreign f = {.error = 0};
    orch_scope_open(&s, NULL);
    scope_there = &s;
    in_thread(go_there, &f);
    CHECK(f.error == ORCH_ETHREAD || f.error == ORCH_ESCOPE || f.error == ORCH_ENOLOOP);
    CHECK_INT(called, 0);
    CHECK_INT(released, 1);
    CHECK_INT(result_error(orch_scope_close(&s)), 0);
}

IN_TASK(a_local_without_a_key, "orch_local_set") {
    CHECK_INT(orch_local_set(NULL, &value, count_release), ORCH_EINVAL);
    CHECK_INT(released, 1);
    CHECK(orch_local(NULL) == NULL);
}

// ---- clocks and chance

MISUSE(an_unknown_clock, "orch_loop_new") {
    orch_loop_desc desc = {.clock = (orch_clock)77};
    CHECK(orch_loop_new(&desc) == NULL);
    CHECK(orch_loop_current() == NULL);
}

static uint64_t no_time(void *context) {
    (void)context;
    return 0;
}

MISUSE(two_clocks, "orch_loop_new") {
    orch_loop_desc desc = {.clock = ORCH_CLOCK_VIRTUAL, .now = no_time};
    CHECK(orch_loop_new(&desc) == NULL);
    CHECK(orch_loop_current() == NULL);
}

MISUSE(a_run_with_an_unknown_clock, "orch_run") {
    orch_loop_desc desc = {.clock = (orch_clock)77};
    CHECK_INT(result_error(orch_run_with(&desc, task, NULL)), ORCH_EINVAL);
    CHECK_INT(called, 0);
}

MISUSE(random_without_a_loop, "orch_random") { CHECK_INT(orch_random(), 0); }

static void *describe_there(void *arg) {
    foreign *f = arg;
    f->decided = orch_promise_describe(f->promise, "elsewhere");
    return NULL;
}

IN_TASK(describing_another_threads_promise, "orch_promise_describe" DO_THREAD) {
    foreign f = {.decided = true};
    f.future = orch_future_new(&f.promise);
    in_thread(describe_there, &f);
    CHECK(!f.decided);
    orch_drop(f.future);
}

// A report of a misuse names the seed, so that it can be seen again.
static orch_result misuse_in_main(void *arg) {
    orch_drop(orch_go(NULL, arg));
    return orch_ok_int(1);
}

MISUSE(a_misuse_names_the_seed, "the loop's seed is 4711") {
    orch_loop_desc desc = {.seed = 4711};
    CHECK_INT(result_error(orch_run_with(&desc, misuse_in_main, NULL)), 0);
}

// ---- what is no misuse, though it may look like one

TEST(late_and_second_settles_are_harmless) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    bool real = orch_promise_pending(p);
    CHECK_INT(orch_settle(p, orch_ok_int(1)), real);
    CHECK(!orch_settle(p, orch_ok(&value, count_release)));
    CHECK(!orch_follow(p, orch_settled(orch_ok(&value, count_release))));
    CHECK(!orch_promise_on_cancel(p, NULL, NULL)); // not even looked at
    orch_drop(f);
    CHECK(!orch_settle(p, orch_ok(&value, count_release)));
    CHECK(!orch_settle((orch_promise){NULL, 0}, orch_ok(&value, count_release)));
    CHECK_INT(released, 4);
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK(!orch_promise_pending((orch_promise){NULL, 0}));
}

TEST(a_bad_descriptor_is_an_error_not_a_misuse) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    CHECK_INT(error_of(orch_ready(-1, ORCH_READABLE)), -EBADF);
    CHECK_INT(orch_loop_free(loop), 0);
}

static orch_result scope_in_order(void *arg) {
    orch_scope outer, inner, *late = &outer;
    orch_scope_open(late, NULL);
    orch_scope_open(&inner, NULL);
    orch_scope copy = inner; // tickets may be copied
    CHECK_INT(result_error(orch_scope_close(&copy)), 0);
    CHECK_INT(result_error(orch_scope_close(&outer)), 0);
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = ORCH_NO_DEADLINE});
    CHECK_INT(result_error(orch_scope_close(&inner)), 0);
    return orch_ok_int(arg != NULL);
}

TEST(tickets_of_scopes_may_be_copied) {
    CHECK_INT(result_error(orch_run(scope_in_order, NULL)), 0);
}

// ---- input and output

IN_TASK(a_read_into_nothing, "orch_read") {
    char data[1];
    CHECK_INT(orch_read(0, NULL, 1), ORCH_EINVAL);
    CHECK_INT(orch_read(0, data, SIZE_MAX), ORCH_EINVAL);
    CHECK_INT(orch_read_full(0, NULL, 1), ORCH_EINVAL);
    CHECK_INT(orch_socket_recv(0, NULL, 1, 0), ORCH_EINVAL);
    CHECK_INT(orch_socket_recvfrom(0, NULL, 1, NULL), ORCH_EINVAL);
}

IN_TASK(a_write_of_more_than_there_can_be, "orch_write") {
    CHECK_INT(orch_write(1, "x", SIZE_MAX), ORCH_EINVAL);
    CHECK_INT(orch_write(1, "x", (size_t)PTRDIFF_MAX + 1), ORCH_EINVAL);
    CHECK_INT(orch_write(1, NULL, 1), ORCH_EINVAL);
    CHECK_INT(orch_socket_send(1, NULL, 1, 0), ORCH_EINVAL);
    CHECK_INT(orch_socket_sendto(1, "x", 1, NULL), ORCH_EINVAL);
}

IN_TASK(parts_that_are_none, "orch_readv") {
    struct iovec part = {NULL, 1}, large[2] = {{(void *)(uintptr_t) "", PTRDIFF_MAX},
                                               {(void *)(uintptr_t) "", PTRDIFF_MAX}};
    CHECK_INT(orch_readv(0, &part, 1), ORCH_EINVAL);
    CHECK_INT(orch_readv(0, NULL, 1), ORCH_EINVAL);
    CHECK_INT(orch_readv(0, &part, -1), ORCH_EINVAL);
    CHECK_INT(orch_writev(0, large, 2), ORCH_EINVAL);
}

IN_LOOP(a_read_outside_a_task, "orch_read" DO_TASK) {
    char data[1];
    const char *line;
    (void)loop;
    CHECK_INT(orch_read(0, data, 1), ORCH_ENOTASK);
    CHECK_INT(orch_read(0, data, 0), ORCH_ENOTASK);
    CHECK_INT(orch_write(1, data, 1), ORCH_ENOTASK);
    CHECK_INT(orch_accept(0, NULL), ORCH_ENOTASK);
    CHECK_INT(orch_connect("localhost", "80"), ORCH_ENOTASK);
    orch_reader *r = orch_reader_new(0, 0);
    CHECK_INT(orch_reader_line(r, &line), ORCH_ENOTASK);
    orch_reader_free(r);
}

MISUSE(a_read_without_a_loop, "orch_read" DO_LOOP) {
    char data[1];
    const char *line;
    CHECK_INT(orch_read(0, data, 1), ORCH_ENOLOOP);
    orch_reader *r = orch_reader_new(0, 0);
    CHECK(r != NULL);
    CHECK_INT(orch_reader_line(r, &line), ORCH_ENOLOOP);
    orch_reader_free(r);
}

IN_TASK(a_line_for_nobody, "orch_reader_line") {
    const char *line;
    orch_reader *r = orch_reader_new(0, 0);
    CHECK_INT(orch_reader_line(r, NULL), ORCH_EINVAL);
    CHECK_INT(orch_reader_line(NULL, &line), ORCH_EINVAL);
    CHECK_INT(orch_reader_read(r, NULL, 1), ORCH_EINVAL);
    orch_reader_free(r);
}

IN_TASK(a_server_without_a_handler, "orch_serve") {
    int fd[2];
    if (!CHECK_INT(orch_pipe(fd), 0)) return;
    CHECK_INT(orch_serve(fd[0], NULL, NULL), ORCH_EINVAL);
    CHECK_INT(orch_close(fd[0]), -EBADF); // the listener was consumed
    CHECK_INT(orch_close(fd[1]), 0);
}

IN_TASK(a_connection_to_nowhere, "orch_connect_with") {
    orch_connect_desc none;
    memset(&none, 0, sizeof none);
    CHECK_INT(orch_connect_with(NULL), ORCH_EINVAL);
    CHECK_INT(orch_connect_with(&none), ORCH_EINVAL);
    CHECK_INT(orch_connect(NULL, NULL), ORCH_EINVAL);
}

MISUSE(a_listener_of_nothing, "orch_listen") { CHECK_INT(orch_listen(NULL), ORCH_EINVAL); }
MISUSE(a_pipe_for_nobody, "orch_pipe") { CHECK_INT(orch_pipe(NULL), ORCH_EINVAL); }
MISUSE(an_address_for_nobody, "orch_address_parse") {
    CHECK_INT(orch_address_parse(NULL, "::", 1), ORCH_EINVAL);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
