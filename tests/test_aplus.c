// Promises/A+ 1.1, one case per numbered rule, ported from the rules to C and named by them.
//
// In C terms: a promise is an orch_future with one reference per `then`, throwing is returning a
// rejected result, a handler that is "not a function" is NULL, and returning a promise is returning
// orch_chain of it. Outcomes are tried settled before `then`, right after it, and later on.
//
// Vacuous in C, wholly or in part:
//
//     rule        what it asks                      why C has nothing of it, and what stands in
//     2.1.*       state, value and reason           nothing is vacuous
//     2.2.1.*     handlers that are no functions    only NULL is one; the compiler refuses a 5
//     2.2.2 2.2.3 what handlers see, how often      nothing is vacuous
//     2.2.4       a clean stack                     nothing is vacuous; tasks are tried as well
//     2.2.5       handlers get no `this`            there is none; they get their context
//     2.2.6 2.2.7 order, and promise2               nothing; exceptions are rejected results
//     2.3.1       a promise resolved with itself    nothing; the TypeError is ORCH_ECYCLE
//     2.3.2.*     adopting a promise's state        nothing is vacuous
//     2.3.3.1     let then be x.then (once)         values have no properties: no thenables
//     2.3.3.2     a getter that throws              no getters
//     2.3.3.3     calling then with x as `this`     no thenables, no `this`
//     2.3.3.3.1   resolvePromise(y) resolves        not vacuous: orch_settle(p, orch_chain(y))
//     2.3.3.3.2   rejectPromise(r) rejects          not vacuous: orch_settle(p, orch_fail(r))
//     2.3.3.3.3   only the first of them counts     not vacuous: a ticket that is locked in
//     2.3.3.3.4.* `then` throws, before or after    no thenables: nothing called that can throw
//     2.3.3.4     then is no function: x it is      not vacuous: a value is never adopted, even
//                                                   when it points to a future
//     2.3.4       x is no object: fulfil with x     not vacuous: numbers and pointers
#include "../asyncorch.h"
#include "test.h"

enum moment { BEFORE, NOW, LATER, MOMENTS };
enum { REASON = 71 };
#define WHY "the reason"

// What the handlers of one `then` saw, and what they return.
struct seen {
    int good, bad;    // calls of on_ok and of on_error
    int order;        // when it was called, counted over all
    void *value;      // what on_ok got
    int error;        // what on_error got
    char message[32]; // the detail of the same
    orch_result reply;
};

static orch_loop *loop;
static int sentinel, other, calls, unhandled, reports;
static struct seen a, b, c;
static orch_future *held; // for a handler that reaches beyond its arguments

static void count_unhandled(const orch_result *r, void *context) {
    (void)r, (void)context;
    unhandled++;
}

static void count_report(const char *text, void *context) {
    (void)text, (void)context;
    reports++; // a pending promise with a handler is a deadlock to the loop, and here on purpose
}

static bool start(void) {
    memset(&a, 0, sizeof a);
    b = c = a;
    calls = unhandled = reports = 0;
    held = NULL;
    orch_loop_desc desc = {.on_unhandled = count_unhandled, .on_report = count_report};
    loop = orch_loop_new(&desc);
    return CHECK(loop != NULL);
}

static void run(void) { CHECK_INT(orch_loop_run(loop), 0); }

// What is ready, without waiting for anything.
static void turns(void) {
    for (int i = 0; i < 1000 && orch_loop_step(loop, 0) == 1; i++) continue;
}

static void finish(void) {
    struct seen *const all[] = {&a, &b, &c};
    for (int i = 0; i < 3; i++) orch_result_free(&all[i]->reply); // never asked for: in a sweep
    turns();
    size_t left = orch_loop_statistics(loop).futures;
    int error = orch_loop_free(loop);
    if (left == 0 && error == 0) return;
    fprintf(stderr, "%zu futures left, loop freed: %s\n", left, orch_error_text(error));
    abort(); // a leak is fatal in an allocation sweep too
}

// ---- sources and handlers

static orch_result outcome(bool ok) {
    return ok ? orch_ok(&sentinel, NULL) : orch_failf(REASON, WHY);
}

static struct deferred {
    enum moment when;
    bool ok;
    orch_future *future;
    orch_promise promise;
} d;

static void defer(int when, bool ok) {
    memset(&d, 0, sizeof d);
    d.when = (enum moment)when, d.ok = ok;
    d.future = when == BEFORE ? orch_settled(outcome(ok)) : orch_future_new(&d.promise);
}

// Settles, and tries the other outcome at once.
static void settle(void) {
    int before = calls;
    CHECK(orch_settle(d.promise, outcome(d.ok)));
    CHECK(!orch_settle(d.promise, outcome(!d.ok)));
    CHECK_INT(calls, before); // 2.2.4: nothing is called from within
}

static void settle_later(orch_result *in, void *context) {
    (void)in, (void)context;
    settle();
}

// To be called once the handlers are registered: brings the outcome about and runs the loop.
static void conclude(void) {
    if (d.when == NOW) settle();
    if (d.when == LATER) orch_on(orch_after(1), settle_later, NULL);
    run();
}

static orch_result reply(struct seen *s) {
    s->order = ++calls;
    orch_result r = s->reply;
    memset(&s->reply, 0, sizeof s->reply); // given away once
    return r;
}

static orch_result on_ok(orch_result *in, void *context) {
    struct seen *s = context;
    CHECK_INT(in->error, 0);
    s->good++;
    s->value = in->value;
    return reply(s);
}

static orch_result on_error(orch_result *in, void *context) {
    struct seen *s = context;
    CHECK(in->error != 0);
    s->bad++;
    s->error = in->error;
    snprintf(s->message, sizeof s->message, "%s", orch_message(in));
    return reply(s);
}

// `f.then(on_ok, on_error)` with promise2 left alone, as JavaScript programs do.
static void watch(orch_future *f, struct seen *s) { orch_detach(orch_then(f, on_ok, on_error, s)); }

static void check_seen(const struct seen *s, bool ok) {
    CHECK_INT(s->good, ok ? 1 : 0);
    CHECK_INT(s->bad, ok ? 0 : 1);
    if (ok) CHECK(s->value == &sentinel);
    if (!ok) CHECK_INT(s->error, REASON), CHECK_STR(s->message, WHY);
}

static void check_peek(orch_future *f, bool ok) {
    const orch_result *r = orch_peek(f);
    if (!CHECK(r != NULL)) return;
    CHECK_INT(r->error, ok ? 0 : REASON);
    if (ok) CHECK(r->value == &sentinel);
    if (!ok) CHECK_STR(orch_message(r), WHY);
}

// ---- 2.1 states

TEST(aplus_2_1_1_1_pending_may_become_either) {
    for (int ok = 0; ok < 2; ok++) {
        if (!start()) return;
        defer(NOW, ok);
        CHECK(!orch_is_settled(d.future));
        CHECK(orch_peek(d.future) == NULL);
        turns();
        CHECK(!orch_is_settled(d.future)); // not by itself
        settle();
        CHECK(orch_is_settled(d.future));
        check_peek(d.future, ok);
        orch_drop(d.future);
        finish();
    }
}

static void settled_stays(bool ok) {
    for (int when = BEFORE; when < MOMENTS; when++) {
        if (!start()) return;
        defer(when, ok);
        watch(orch_ref(d.future), &a);
        conclude();
        CHECK(!orch_settle(d.promise, outcome(!ok)));
        CHECK(!orch_follow(d.promise, orch_settled(outcome(!ok))));
        orch_cancel(d.future, 0);
        watch(orch_ref(d.future), &b);
        run();
        check_seen(&a, ok);
        check_seen(&b, ok);
        check_peek(d.future, ok);
        orch_drop(d.future);
        finish();
    }
}

TEST(aplus_2_1_2_1_fulfilled_stays_fulfilled) { settled_stays(true); }

static orch_result grab(orch_result *in, void *context) {
    (void)context;
    CHECK(orch_take(in) == NULL); // shared: it stays where it is
    return orch_ok(&other, NULL);
}

static void count_release(void *value) { ++*(int *)value; }

// No handler can take it away from the others.
TEST(aplus_2_1_2_2_the_value_does_not_change) {
    if (!start()) return;
    static int released;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_detach(orch_then(orch_ref(f), grab, grab, NULL));
    watch(orch_ref(f), &a);
    released = 0;
    CHECK(orch_settle(p, orch_ok(&released, count_release)));
    run();
    watch(orch_ref(f), &b);
    run();
    CHECK(a.value == &released);
    CHECK(b.value == &released);
    const orch_result *r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK(r->value == &released);
    CHECK_INT(released, 0);
    orch_drop(f);
    CHECK_INT(released, 1);
    finish();
}

TEST(aplus_2_1_3_1_rejected_stays_rejected) { settled_stays(false); }

TEST(aplus_2_1_3_2_the_reason_does_not_change) {
    if (!start()) return;
    defer(NOW, false);
    orch_detach(orch_then(orch_ref(d.future), NULL, grab, NULL));
    watch(orch_ref(d.future), &a);
    conclude();
    watch(orch_ref(d.future), &b);
    run();
    check_seen(&a, false);
    check_seen(&b, false);
    check_peek(d.future, false);
    orch_drop(d.future);
    finish();
}

// ---- 2.2 then

// A missing handler of the one kind must not keep the other kind from being called.
static void missing(bool ok) {
    for (int when = BEFORE; when < MOMENTS; when++) {
        if (!start()) return;
        defer(when, ok);
        orch_future *f = orch_ref(d.future);
        orch_detach(orch_then(f, ok ? on_ok : NULL, ok ? NULL : on_error, &a));
        // and after a link that has only the handler that does not apply
        f = orch_then(d.future, ok ? NULL : on_ok, ok ? on_error : NULL, &c);
        orch_detach(orch_then(f, ok ? on_ok : NULL, ok ? NULL : on_error, &b));
        conclude();
        check_seen(&a, ok);
        check_seen(&b, ok);
        CHECK_INT(c.good + c.bad, 0);
        finish();
    }
}

TEST(aplus_2_2_1_1_on_ok_is_optional) { missing(false); }

TEST(aplus_2_2_1_2_on_error_is_optional) { missing(true); }

static void called_with(bool ok) {
    for (int when = BEFORE; when < MOMENTS; when++) {
        if (!start()) return;
        defer(when, ok);
        watch(d.future, &a);
        conclude();
        check_seen(&a, ok);
        finish();
    }
}

static void not_before(bool ok) {
    if (!start()) return;
    defer(NOW, ok);
    watch(d.future, &a);
    turns();
    CHECK_INT(calls, 0); // never settled: never called
    settle();
    CHECK_INT(calls, 0);
    run();
    check_seen(&a, ok);
    finish();
}

static void watch_more(orch_result *in, void *context) {
    (void)in;
    watch(orch_ref(held), context);
}

// Already settled; settled twice at once; with `then` spaced apart in time; between two `then`s.
static void at_most_once(bool ok) {
    for (int when = BEFORE; when < MOMENTS; when++) {
        if (!start()) return;
        defer(when, ok);
        held = d.future;
        watch(orch_ref(held), &a);
        orch_on(orch_after(1), watch_more, &b);
        conclude();
        CHECK(!orch_settle(d.promise, outcome(ok)));
        watch(orch_ref(held), &c);
        run();
        check_seen(&a, ok);
        check_seen(&b, ok);
        check_seen(&c, ok);
        orch_drop(held);
        finish();
    }
}

TEST(aplus_2_2_2_1_on_ok_gets_the_value) { called_with(true); }

TEST(aplus_2_2_2_2_on_ok_not_before_fulfilment) { not_before(true); }

TEST(aplus_2_2_2_3_on_ok_at_most_once) { at_most_once(true); }

TEST(aplus_2_2_3_1_on_error_gets_the_reason) { called_with(false); }

TEST(aplus_2_2_3_2_on_error_not_before_rejection) { not_before(false); }

TEST(aplus_2_2_3_3_on_error_at_most_once) { at_most_once(false); }

// ---- 2.2.4 a clean stack

static bool busy; // some of our own code is running that a handler must not interrupt

static orch_result not_busy(orch_result *in, void *context) {
    CHECK(!busy);
    return in->error ? on_error(in, context) : on_ok(in, context);
}

TEST(aplus_2_2_4_then_returns_first) {
    for (int ok = 0; ok < 2; ok++) {
        for (int when = BEFORE; when < MOMENTS; when++) {
            if (!start()) return;
            defer(when, ok);
            busy = true;
            orch_detach(orch_then(d.future, not_busy, not_busy, &a));
            CHECK_INT(calls, 0);
            busy = false;
            conclude();
            check_seen(&a, ok);
            finish();
        }
    }
}

TEST(aplus_2_2_4_settle_returns_first) {
    for (int ok = 0; ok < 2; ok++) {
        if (!start()) return;
        defer(NOW, ok);
        busy = true;
        orch_detach(orch_then(orch_ref(d.future), not_busy, not_busy, &a)); // just before
        settle();
        orch_detach(orch_then(d.future, not_busy, not_busy, &b)); // just after
        CHECK_INT(calls, 0);
        busy = false;
        run();
        check_seen(&a, ok);
        check_seen(&b, ok);
        finish();
    }
}

static orch_result add_inside(orch_result *in, void *context) {
    (void)in;
    busy = true;
    orch_detach(orch_then(orch_ref(held), not_busy, not_busy, context));
    busy = false;
    return orch_ok_int(0);
}

// A handler added inside another one, of the same or the other kind, to the same or another future.
TEST(aplus_2_2_4_added_inside_a_handler) {
    for (int outer = 0; outer < 2; outer++) {
        for (int inner = 0; inner < 2; inner++) {
            if (!start()) return;
            defer(BEFORE, outer);
            held = inner == outer ? orch_ref(d.future) : orch_settled(outcome(inner));
            orch_detach(orch_then(d.future, add_inside, add_inside, &a));
            run();
            check_seen(&a, inner);
            orch_drop(held);
            finish();
        }
    }
}

static orch_result settle_inside(orch_result *in, void *context) {
    (void)in, (void)context;
    busy = true;
    settle();
    busy = false;
    return orch_ok_int(0);
}

TEST(aplus_2_2_4_settled_inside_a_handler) {
    for (int ok = 0; ok < 2; ok++) {
        if (!start()) return;
        defer(NOW, ok);
        orch_detach(orch_then(d.future, not_busy, not_busy, &a));
        orch_future *tick = orch_after(0);
        orch_detach(orch_then(tick, settle_inside, settle_inside, NULL));
        run();
        check_seen(&a, ok);
        finish();
    }
}

static orch_result settle_in_task(void *arg) {
    (void)arg;
    busy = true;
    orch_detach(orch_then(orch_ref(d.future), not_busy, not_busy, &a));
    settle();
    orch_detach(orch_then(orch_ref(d.future), not_busy, not_busy, &b));
    busy = false;
    CHECK_INT(calls, 0);
    CHECK_INT(orch_yield(), 0);
    return orch_ok_int(0);
}

TEST(aplus_2_2_4_not_inside_a_running_task) {
    for (int ok = 0; ok < 2; ok++) {
        if (!start()) return;
        defer(NOW, ok);
        orch_detach(orch_go(settle_in_task, NULL));
        run();
        check_seen(&a, ok);
        check_seen(&b, ok);
        orch_drop(d.future);
        finish();
    }
}

// C's counterpart of 2.2.5: besides the outcome a handler gets exactly what was registered with it.
static orch_result same_context(orch_result *in, void *context) {
    (void)in;
    CHECK(context == &other || context == NULL);
    calls += context ? 10 : 1;
    return orch_ok_int(0);
}

TEST(aplus_2_2_5_handlers_get_their_context) {
    if (!start()) return;
    defer(NOW, true);
    orch_detach(orch_then(orch_ref(d.future), same_context, NULL, &other));
    orch_detach(orch_then(d.future, same_context, NULL, NULL));
    orch_detach(orch_then(orch_settled(orch_fail(REASON)), NULL, same_context, &other));
    settle();
    run();
    CHECK_INT(calls, 21);
    finish();
}

// ---- 2.2.6 order

static orch_result added_third(orch_result *in, void *context) {
    watch(orch_ref(held), &c);
    return in->error ? on_error(in, context) : on_ok(in, context);
}

static void order(bool ok) {
    for (int when = BEFORE; when < MOMENTS; when++) {
        if (!start()) return; // plainly three, the second of which fails
        defer(when, ok);
        b.reply = orch_fail(REASON + 1);
        watch(orch_ref(d.future), &a);
        watch(orch_ref(d.future), &b);
        watch(d.future, &c);
        conclude();
        check_seen(&a, ok), check_seen(&b, ok), check_seen(&c, ok);
        CHECK_INT(a.order, 1);
        CHECK_INT(b.order, 2);
        CHECK_INT(c.order, 3);
        CHECK_INT(unhandled, 1); // what b returned, which nobody looked at
        finish();

        if (!start()) return; // the third is added inside the first
        defer(when, ok);
        held = d.future;
        orch_detach(orch_then(orch_ref(held), added_third, added_third, &a));
        watch(orch_ref(held), &b);
        conclude();
        check_seen(&a, ok), check_seen(&b, ok), check_seen(&c, ok);
        CHECK_INT(a.order, 1);
        CHECK_INT(b.order, 2);
        CHECK_INT(c.order, 3);
        orch_drop(held);
        finish();
    }
}

// Each `then` of the same future has a promise2 of its own.
static void branches(bool ok) {
    for (int when = BEFORE; when < MOMENTS; when++) {
        if (!start()) return;
        defer(when, ok);
        struct seen *const branch[] = {&a, &b, &c};
        static struct seen end[3];
        memset(end, 0, sizeof end);
        a.reply = orch_ok(&sentinel, NULL);
        b.reply = orch_failf(REASON, WHY);
        c.reply = orch_ok(&other, NULL);
        for (int i = 0; i < 3; i++) {
            orch_future *f = orch_ref(d.future);
            watch(orch_then(f, on_ok, on_error, branch[i]), &end[i]);
        }
        orch_drop(d.future);
        conclude();
        check_seen(&end[0], true);
        check_seen(&end[1], false);
        CHECK_INT(end[2].good, 1);
        CHECK(end[2].value == &other);
        finish();
    }
}

TEST(aplus_2_2_6_1_on_ok_in_the_order_of_then) {
    order(true);
    branches(true);
}

TEST(aplus_2_2_6_2_on_error_in_the_order_of_then) {
    order(false);
    branches(false);
}

// ---- 2.2.7 promise2

TEST(aplus_2_2_7_then_returns_a_future) {
    for (int ok = 0; ok < 2; ok++) {
        for (int when = BEFORE; when < MOMENTS; when++) {
            if (!start()) return;
            defer(when, ok);
            orch_future *source = orch_ref(d.future);
            orch_future *f = orch_then(d.future, NULL, NULL, NULL);
            CHECK(f != NULL);
            CHECK(f != source); // as A+ allows, but promise2 has a life of its own
            conclude();
            check_peek(f, ok);
            orch_drop(f);
            orch_drop(source);
            finish();
        }
    }
}

// Either handler's value becomes promise2's, whichever of the two it was.
TEST(aplus_2_2_7_1_a_returned_value_fulfils) {
    for (int ok = 0; ok < 2; ok++) {
        for (int when = BEFORE; when < MOMENTS; when++) {
            if (!start()) return;
            defer(when, ok);
            a.reply = orch_ok(&sentinel, NULL);
            orch_future *f = orch_then(d.future, on_ok, on_error, &a);
            conclude();
            check_seen(&a, ok);
            check_peek(f, true);
            orch_drop(f);
            finish();
        }
    }
}

TEST(aplus_2_2_7_2_a_returned_error_rejects) {
    static const int reasons[] = {1, -1, ORCH_ECANCELED, ORCH_ETIMEDOUT, INT32_MAX, INT32_MIN};
    const size_t count = test_shared->fail_at ? 1 : sizeof reasons / sizeof *reasons;
    for (size_t i = 0; i < count; i++) { // a sweep repeats each often
        for (int ok = 0; ok < 2; ok++) {
            for (int when = BEFORE; when < MOMENTS; when++) {
                if (!start()) return;
                defer(when, ok);
                a.reply = orch_failf(reasons[i], WHY);
                watch(orch_then(d.future, on_ok, on_error, &a), &b);
                conclude();
                CHECK_INT(b.bad, 1);
                CHECK_INT(b.good, 0);
                CHECK_INT(b.error, reasons[i]);
                CHECK_STR(b.message, WHY);
                finish();
            }
        }
    }
}

static void passes_on(bool ok) {
    for (int when = BEFORE; when < MOMENTS; when++) {
        if (!start()) return;
        defer(when, ok);
        orch_future *f = orch_then(orch_ref(d.future), NULL, NULL, NULL);
        watch(orch_then(f, ok ? NULL : on_ok, ok ? on_error : NULL, &b), &a);
        conclude();
        check_seen(&a, ok);
        CHECK_INT(b.good + b.bad, 0);
        orch_drop(d.future);
        finish();
    }
}

TEST(aplus_2_2_7_3_without_on_ok_the_value_passes) { passes_on(true); }

TEST(aplus_2_2_7_4_without_on_error_the_reason_passes) { passes_on(false); }

// ---- 2.3.1 a promise resolved with itself

static orch_result return_held(orch_result *in, void *context) {
    (void)in, (void)context;
    return orch_chain(orch_ref(held));
}

TEST(aplus_2_3_1_itself_from_a_handler) {
    for (int ok = 0; ok < 2; ok++) {
        for (int when = BEFORE; when < MOMENTS; when++) {
            if (!start()) return;
            defer(when, ok);
            held = orch_then(d.future, return_held, return_held, NULL);
            watch(orch_ref(held), &a);
            conclude();
            CHECK_INT(a.bad, 1);
            CHECK_INT(a.error, ORCH_ECYCLE);
            const orch_result *r = orch_peek(held);
            if (CHECK(r != NULL)) CHECK_INT(r->error, ORCH_ECYCLE);
            orch_drop(held);
            finish();
        }
    }
}

TEST(aplus_2_3_1_itself_by_its_ticket) {
    for (int chain = 0; chain < 2; chain++) {
        if (!start()) return;
        defer(NOW, true);
        orch_future *same = orch_ref(d.future);
        if (chain) CHECK(orch_settle(d.promise, orch_chain(same)));
        else CHECK(orch_follow(d.promise, same));
        CHECK(!orch_settle(d.promise, outcome(true)));
        watch(d.future, &a);
        run();
        CHECK_INT(a.bad, 1);
        CHECK_INT(a.error, ORCH_ECYCLE);
        finish();
    }
}

enum { RING = 1000 };
static orch_future *ring[RING];

static orch_result return_next(orch_result *in, void *context) {
    size_t next = (size_t)((orch_future **)context - ring);
    (void)in;
    return orch_chain(orch_ref(ring[next]));
}

// A cycle that closes only when the last of many handlers has returned the first promise.
TEST(aplus_2_3_1_long_cycles_from_handlers) {
    static const size_t sizes[] = {2, 3, RING};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        size_t n = sizes[k];
        if (!start()) return;
        for (size_t i = 0; i < n; i++) {
            orch_future *now = orch_settled(orch_ok_int(0));
            ring[i] = orch_then(now, return_next, NULL, &ring[(i + 1) % n]);
        }
        run();
        for (size_t i = 0; i < n; i++) {
            const orch_result *r = orch_peek(ring[i]);
            if (CHECK(r != NULL)) CHECK_INT(r->error, ORCH_ECYCLE);
        }
        for (size_t i = 0; i < n; i++) orch_drop(ring[i]);
        finish();
    }
}

// ---- 2.3.2 a promise resolved with another

// From a handler of a fulfilled, then of a rejected promise, and by a ticket: three ways to adopt.
enum way { FULFILLED_HANDLER, REJECTED_HANDLER, TICKET, WAYS };

static orch_future *adopt(int way, orch_future *x) {
    orch_promise p;
    if (way != TICKET) {
        a.reply = orch_chain(x);
        return orch_then(orch_settled(outcome(way == FULFILLED_HANDLER)), on_ok, on_error, &a);
    }
    orch_future *f = orch_future_new(&p);
    CHECK(orch_follow(p, x));
    return f;
}

TEST(aplus_2_3_2_1_pending_until_the_other_settles) {
    for (int way = 0; way < WAYS; way++) {
        if (!start()) return;
        defer(NOW, true);
        orch_future *f = adopt(way, d.future);
        watch(orch_ref(f), &b);
        turns();
        CHECK(!orch_is_settled(f));
        CHECK_INT(b.good + b.bad, 0);
        settle();
        run();
        check_seen(&b, true);
        check_peek(f, true);
        orch_drop(f);
        finish();
    }
}

static void adopts(bool ok) {
    for (int way = 0; way < WAYS; way++) {
        for (int when = BEFORE; when < MOMENTS; when++) {
            for (int shared = 0; shared < 2; shared++) {
                if (!start()) return;
                defer(when, ok);
                if (shared) held = orch_ref(d.future);
                orch_future *f = adopt(way, d.future);
                watch(orch_ref(f), &b);
                conclude();
                check_seen(&b, ok);
                check_peek(f, ok);
                if (shared) check_peek(held, ok);
                orch_drop(f);
                orch_drop(held);
                finish();
            }
        }
    }
}

TEST(aplus_2_3_2_2_fulfilled_with_the_same_value) { adopts(true); }

TEST(aplus_2_3_2_3_rejected_with_the_same_reason) { adopts(false); }

static orch_result nest(orch_result *in, void *context) {
    (void)context;
    intptr_t left = orch_int(in);
    if (left == 0) return outcome(true);
    return orch_chain(orch_then(orch_settled(orch_ok_int(left - 1)), nest, NULL, NULL));
}

// Adopting a promise that adopts a promise...: to the depth at which recursion would show.
TEST(aplus_2_3_2_adopting_nests) {
    if (!start()) return;
    watch(orch_then(orch_settled(orch_ok_int(100000)), nest, NULL, NULL), &a);
    run();
    check_seen(&a, true);
    finish();
}

// ---- 2.3.3 what thenables leave to C

TEST(aplus_2_3_3_3_1_settling_with_a_future_adopts_it) {
    for (int ok = 0; ok < 2; ok++) {
        for (int when = BEFORE; when < MOMENTS; when++) {
            if (!start()) return;
            orch_promise p;
            orch_future *f = orch_future_new(&p);
            defer(when, ok);
            CHECK(orch_settle(p, orch_chain(d.future)));
            watch(f, &a);
            conclude();
            check_seen(&a, ok);
            finish();
        }
    }
}

TEST(aplus_2_3_3_3_2_settling_with_an_error_rejects) {
    if (!start()) return;
    defer(LATER, false);
    watch(d.future, &a);
    conclude();
    check_seen(&a, false);
    finish();
}

// Once a ticket is locked in to a future, pending or not, it decides nothing more.
TEST(aplus_2_3_3_3_3_only_the_first_counts) {
    for (int ok = 0; ok < 2; ok++) {
        for (int when = BEFORE; when < MOMENTS; when++) {
            if (!start()) return;
            orch_promise p;
            orch_future *f = orch_future_new(&p);
            defer(when, ok);
            CHECK(orch_promise_pending(p));
            CHECK(orch_follow(p, d.future));
            CHECK(!orch_promise_pending(p));
            CHECK(!orch_settle(p, outcome(!ok)));
            CHECK(!orch_follow(p, orch_settled(outcome(!ok))));
            CHECK(!orch_settle(p, orch_chain(orch_settled(outcome(!ok)))));
            watch(f, &a);
            conclude();
            CHECK(!orch_settle(p, outcome(!ok)));
            check_seen(&a, ok);
            finish();
        }
    }
}

static orch_result return_pointer(orch_result *in, void *context) {
    (void)in;
    return orch_ok(context, NULL);
}

// A value is what it is: a pointer to a future is not looked into.
TEST(aplus_2_3_3_4_a_value_that_is_a_future_is_not_adopted) {
    if (!start()) return;
    defer(NOW, false);
    watch(orch_then(orch_settled(orch_ok_int(0)), return_pointer, NULL, d.future), &a);
    run();
    CHECK_INT(a.good, 1);
    CHECK(a.value == d.future);
    CHECK(!orch_is_settled(d.future));
    orch_drop(d.future);
    finish();
}

// ---- 2.3.4 plain values

static orch_result return_number(orch_result *in, void *context) {
    (void)in;
    return orch_ok_int(*(const intptr_t *)context);
}

TEST(aplus_2_3_4_plain_values_fulfil) {
    static const intptr_t numbers[] = {0, 1, -1, INTPTR_MAX, INTPTR_MIN};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        for (int ok = 0; ok < 2; ok++) {
            if (!start()) return;
            intptr_t number = numbers[i];
            orch_future *now = orch_settled(outcome(ok));
            orch_future *f = orch_then(now, return_number, return_number, &number);
            run();
            const orch_result *r = orch_peek(f);
            if (CHECK(r != NULL)) CHECK_INT(r->error, 0), CHECK(orch_int(r) == number);
            orch_drop(f);
            finish();
        }
    }
    if (!start()) return;
    watch(orch_then(orch_settled(orch_ok_int(0)), return_pointer, NULL, NULL), &a); // and no value
    run();
    CHECK_INT(a.good, 1);
    CHECK(a.value == NULL);
    finish();
}

int main(int argc, char **argv) { return test_main(argc, argv); }
