// Combinators: outcomes, order, ownership, and the two moments of decision and delivery.
//
// Every value that the library owns is a token that counts its releases: finish() aborts when one
// was not released exactly once or a slot is left, which an allocation sweep notices as well.
#include "../asyncorch.h"
#include "test.h"

#include <sys/resource.h>

// ---- kit

enum { TOKENS = 1 << 17, WORKS = 8, SEENS = 4, SHOWN = 8, WIDE = 100000, DEEP = 100000 };
enum { SPARE = 1 << 18 };
#define HOUR 3600000

// What a callback saw of an outcome and of its list.
struct seen {
    int calls, error, order;
    unsigned index;
    intptr_t number;
    void *value;
    size_t count;
    char message[64];
    struct {
        int error;
        intptr_t number;
        void *value;
        char message[32];
    } at[SHOWN];
};

// Work in progress, and how it takes being cancelled.
struct work {
    orch_promise promise;
    int asked, reason, order;
    bool ends; // what the hook returns
};

static orch_loop *loop;
static unsigned char tokens[TOKENS]; // how often each was released
static int issued, calls, unhandled, reports;
static struct seen seen[SEENS];
static struct work work[WORKS];

static void give_back(void *value) { ++*(unsigned char *)value; }

static orch_result token(void) { return orch_ok(&tokens[issued++ % TOKENS], give_back); }

static void on_unhandled(const orch_result *r, void *context) {
    (void)r, (void)context;
    unhandled++;
}

static void on_report(const char *text, void *context) {
    (void)text, (void)context;
    reports++;
}

static bool start_with(orch_loop_desc desc) {
    memset(seen, 0, sizeof seen);
    memset(work, 0, sizeof work);
    memset(tokens, 0, sizeof tokens);
    issued = calls = unhandled = reports = 0;
    desc.on_unhandled = on_unhandled, desc.on_report = on_report;
    loop = orch_loop_new(&desc);
    return CHECK(loop != NULL);
}

// Timers need not be waited for: what is tested here is their order with other things.
static bool start(void) { return start_with((orch_loop_desc){.clock = ORCH_CLOCK_VIRTUAL}); }

static void run(void) { CHECK_INT(orch_loop_run(loop), 0); }

// What is ready, without waiting for anything.
static void turns(void) {
    for (int i = 0; i < 1000 && orch_loop_step(loop, 0) == 1; i++) continue;
}

static size_t timers(void) { return orch_loop_statistics(loop).timers; }

static void balance(void) {
    for (int i = 0; i < issued && i < TOKENS; i++) {
        if (tokens[i] == 1) continue;
        fprintf(stderr, "token %d of %d was released %d times\n", i, issued, tokens[i]);
        abort();
    }
}

static void finish(void) {
    for (int i = 0; i < WORKS && test_shared->fail_at; i++) // which a case in a sweep did not reach
        orch_settle(work[i].promise, orch_fail(ORCH_ECANCELED));
    turns();
    orch_loop_stats stats = orch_loop_statistics(loop);
    int error = orch_loop_free(loop);
    if (stats.futures || stats.timers || error) {
        fprintf(stderr, "%zu futures and %zu timers left, loop freed: %s\n", stats.futures,
                stats.timers, orch_error_text(error));
        abort();
    }
    balance();
    CHECK_INT(unhandled, 0); // no input's rejection is ever nobody's
}

static void record(orch_result *in, struct seen *s) {
    s->calls++;
    s->order = ++calls;
    s->error = in->error;
    s->index = in->index;
    s->number = orch_int(in);
    s->value = in->value;
    s->count = orch_count(in);
    snprintf(s->message, sizeof s->message, "%s", orch_message(in));
    for (size_t i = 0; i < SHOWN && i < s->count; i++) {
        const orch_result *e = orch_at(in, i);
        if (!CHECK(e != NULL)) return;
        s->at[i].error = e->error;
        s->at[i].number = orch_int(e);
        s->at[i].value = e->value;
        snprintf(s->at[i].message, sizeof s->at[i].message, "%s", orch_message(e));
    }
    const orch_result *past = orch_at(in, s->count);
    CHECK(past != NULL && (s->error && !s->count ? past == in : past->error == ORCH_ERANGE));
}

static void end(orch_result *in, void *context) { record(in, context); }

static orch_result pass(orch_result *in, void *context) {
    record(in, context);
    return *in;
}

static bool on_cancel(void *context, int reason) {
    struct work *w = context;
    w->asked++;
    w->reason = reason;
    w->order = ++calls;
    return w->ends;
}

static orch_future *begin(int i, bool ends) {
    struct work *w = &work[i];
    orch_future *f = orch_future_new(&w->promise);
    w->ends = ends;
    CHECK(orch_promise_on_cancel(w->promise, on_cancel, w));
    return f;
}

static bool settle(int i, orch_result r) { return orch_settle(work[i].promise, r); }

static void settle_work(orch_result *in, void *context) {
    struct work *w = context;
    (void)in;
    CHECK(orch_settle(w->promise, token()));
}

// Has the work end after so many milliseconds, with a value that is nobody's.
static void settle_after(int i, uint64_t ms) { orch_on(orch_after(ms), settle_work, &work[i]); }

static void check_error(orch_future *f, int error) {
    const orch_result *r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK_INT(r->error, error);
}

static orch_future *fulfilled(void) { return orch_settled(token()); }

static orch_future *failed(int error) {
    return orch_settled(orch_failf(error, "failed with %d", error));
}

// A size that shows recursion; less in a sweep, which runs the case hundreds of times.
static size_t many(size_t n) { return test_shared->fail_at ? n / 1000 + 1 : n; }

// From here on the stack can not grow beyond 256 KiB: recursion over many links dies.
static void small_stack(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_STACK, &limit)) return;
    limit.rlim_cur = 256 * 1024;
    CHECK_INT(setrlimit(RLIMIT_STACK, &limit), 0);
}

// What all of them have in common is tried with each.
enum kind { ALL, ALL_SETTLED, ANY, RACE, QUORUM, GATHER, KINDS };

static orch_future *combine(int kind, size_t n, orch_future *const *f) {
    switch (kind) {
    case ALL: return orch_all_n(n, f);
    case ALL_SETTLED: return orch_all_settled_n(n, f);
    case ANY: return orch_any_n(n, f);
    case RACE: return orch_race_n(n, f);
    case QUORUM: return orch_quorum_n(n ? 1 : 0, n, f);
    default: return orch_gather_n(n, f, HOUR);
    }
}

// ---- all

TEST(all_keeps_the_order_of_its_inputs) {
    if (!start()) return;
    orch_on(orch_all(begin(0, true), begin(1, true), begin(2, true)), end, &seen[0]);
    CHECK(settle(2, token()));
    CHECK(settle(0, token()));
    turns();
    CHECK_INT(seen[0].calls, 0);
    CHECK(settle(1, token()));
    CHECK_INT(seen[0].calls, 0); // from the loop
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].count, 3);
    CHECK(seen[0].at[0].value == &tokens[1]);
    CHECK(seen[0].at[1].value == &tokens[2]);
    CHECK(seen[0].at[2].value == &tokens[0]);
    for (int i = 0; i < 3; i++) CHECK_INT(work[i].asked, 0);
    finish();
}

TEST(all_rejects_with_the_first_error) {
    if (!start()) return;
    orch_future *f[4] = {begin(0, true), begin(1, true), begin(2, true), begin(3, true)};
    orch_on(orch_all_n(4, f), end, &seen[0]);
    CHECK(settle(3, token()));
    CHECK(settle(1, orch_failf(7, "seven")));
    CHECK(settle(2, orch_failf(8, "too late to matter")));
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 7);
    CHECK_INT(seen[0].index, 1);
    CHECK_STR(seen[0].message, "seven");
    CHECK_INT(seen[0].count, 0);
    CHECK_INT(work[0].asked, 1);
    CHECK(work[0].order < seen[0].order); // the loser ends first
    CHECK_INT(work[2].asked, 0);
    CHECK_INT(work[3].asked, 0);
    finish();
}

TEST(all_of_settled_inputs) {
    if (!start()) return;
    orch_on(orch_all(fulfilled(), fulfilled()), end, &seen[0]);
    orch_on(orch_all(fulfilled(), failed(5), failed(6)), end, &seen[1]);
    CHECK_INT(calls, 0);
    run();
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].count, 2);
    CHECK(seen[0].at[0].value == &tokens[0] || seen[0].at[0].value == &tokens[1]);
    CHECK_INT(seen[1].error, 5);
    CHECK_INT(seen[1].index, 1);
    CHECK_STR(seen[1].message, "failed with 5");
    finish();
}

// The list reads as what went in, whatever its kind.
TEST(all_of_numbers_and_nothing) {
    if (!start()) return;
    orch_future *f[3] = {orch_settled(orch_ok_int(-4)), orch_settled(orch_ok(NULL, NULL)),
                         orch_settled(orch_ok_int(INTPTR_MAX))};
    orch_on(orch_all_n(3, f), end, &seen[0]);
    run();
    CHECK_INT(seen[0].count, 3);
    CHECK_INT(seen[0].at[0].number, -4);
    CHECK(seen[0].at[1].value == NULL);
    CHECK_INT(seen[0].at[2].number, INTPTR_MAX);
    finish();
}

static orch_promise wide_promise[WIDE];
static orch_future *wide[WIDE];

static void check_wide(orch_result *in, void *context) {
    size_t n = *(size_t *)context, right = 0;
    CHECK_INT(in->error, 0);
    CHECK_INT(orch_count(in), n);
    for (size_t i = 0; i < n; i++) right += orch_at(in, i)->value == &tokens[n - 1 - i];
    CHECK_INT(right, n);
    calls++;
}

TEST(all_over_100000_pending) {
    small_stack();
    if (!start()) return;
    size_t n = many(WIDE);
    for (size_t i = 0; i < n; i++) wide[i] = orch_future_new(&wide_promise[i]);
    orch_on(orch_all_n(n, wide), check_wide, &n);
    for (size_t i = n; i > 0; i--) CHECK(orch_settle(wide_promise[i - 1], token()));
    run();
    CHECK_INT(calls, 1);
    finish();
}

TEST(all_over_100000_fails_and_cancels) {
    small_stack();
    if (!start()) return;
    size_t n = many(WIDE);
    for (size_t i = 0; i < n; i++) {
        wide[i] = orch_future_new(&wide_promise[i]);
        orch_promise_on_cancel(wide_promise[i], on_cancel, &work[0]);
    }
    work[0].ends = true;
    orch_on(orch_all_n(n, wide), end, &seen[0]);
    CHECK(orch_settle(wide_promise[n / 2], orch_fail(9)));
    run();
    CHECK_INT(seen[0].error, 9);
    CHECK_INT(seen[0].index, n / 2);
    CHECK_INT(work[0].asked, n - 1);
    finish();
}

// ---- all_settled

TEST(all_settled_keeps_every_outcome) {
    if (!start()) return;
    orch_on(orch_all_settled(begin(0, true), failed(4), begin(2, true), fulfilled()), end,
            &seen[0]);
    CHECK(settle(2, orch_failf(6, "six")));
    turns();
    CHECK_INT(seen[0].calls, 0);
    CHECK(settle(0, orch_ok_int(11)));
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].count, 4);
    CHECK_INT(seen[0].at[0].number, 11);
    CHECK_INT(seen[0].at[1].error, 4);
    CHECK_STR(seen[0].at[1].message, "failed with 4");
    CHECK_INT(seen[0].at[2].error, 6);
    CHECK_STR(seen[0].at[2].message, "six");
    CHECK_INT(seen[0].at[3].error, 0);
    CHECK(seen[0].at[3].value == &tokens[0]);
    CHECK_INT(work[0].asked + work[2].asked, 0);
    finish();
}

TEST(all_settled_of_failures_fulfils) {
    if (!start()) return;
    orch_on(orch_all_settled(failed(1), failed(2)), end, &seen[0]);
    run();
    CHECK_INT(seen[0].error, 0);
    CHECK_STR(seen[0].message, "ok");
    CHECK_INT(seen[0].at[0].error, 1);
    CHECK_INT(seen[0].at[1].error, 2);
    finish();
}

// ---- any

TEST(any_takes_the_first_value) {
    if (!start()) return;
    orch_on(orch_any(begin(0, true), begin(1, true), begin(2, true)), end, &seen[0]);
    CHECK(settle(2, orch_failf(3, "no matter")));
    turns();
    CHECK_INT(seen[0].calls, 0);
    CHECK(settle(1, token()));
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].index, 1);
    CHECK(seen[0].value == &tokens[0]);
    CHECK_INT(work[0].asked, 1);
    CHECK(work[0].order < seen[0].order);
    CHECK_INT(work[2].asked, 0);
    finish();
}

TEST(any_lists_every_error) {
    if (!start()) return;
    orch_on(orch_any(begin(0, true), failed(2), begin(2, true)), end, &seen[0]);
    CHECK(settle(2, orch_failf(3, "three")));
    CHECK(settle(0, orch_failf(1, "one")));
    run();
    CHECK_INT(seen[0].error, ORCH_EALLFAILED);
    CHECK_STR(seen[0].message, orch_error_text(ORCH_EALLFAILED)); // the list is no message
    CHECK_INT(seen[0].count, 3);
    for (int i = 0; i < 3; i++) CHECK_INT(seen[0].at[i].error, i + 1);
    CHECK_STR(seen[0].at[0].message, "one");
    CHECK_STR(seen[0].at[1].message, "failed with 2");
    CHECK_STR(seen[0].at[2].message, "three");
    finish();
}

TEST(any_of_settled_inputs) {
    if (!start()) return;
    orch_on(orch_any(failed(1), fulfilled(), fulfilled()), end, &seen[0]);
    orch_on(orch_any(failed(1), failed(2)), end, &seen[1]);
    run();
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].index, 1);
    CHECK(seen[0].value != NULL);
    CHECK_INT(seen[1].error, ORCH_EALLFAILED);
    finish();
}

// ---- race

TEST(race_settles_as_the_first) {
    for (int ok = 0; ok < 2; ok++) {
        if (!start()) return;
        orch_on(orch_race(begin(0, true), begin(1, true), begin(2, true)), end, &seen[0]);
        CHECK(settle(2, ok ? token() : orch_failf(6, "six")));
        CHECK(settle(1, token())); // a moment too late
        run();
        CHECK_INT(seen[0].calls, 1);
        CHECK_INT(seen[0].error, ok ? 0 : 6);
        CHECK_INT(seen[0].index, 2);
        CHECK_STR(seen[0].message, ok ? "ok" : "six");
        if (ok) CHECK(seen[0].value == &tokens[0]);
        CHECK_INT(work[0].asked, 1);
        CHECK_INT(work[0].reason, ORCH_ECANCELED);
        CHECK(work[0].order < seen[0].order);
        CHECK_INT(work[1].asked, 0);
        finish();
    }
}

TEST(race_of_settled_inputs_takes_the_first_given) {
    if (!start()) return;
    orch_on(orch_race(fulfilled(), failed(1)), end, &seen[0]);
    orch_on(orch_race(failed(1), fulfilled()), end, &seen[1]);
    orch_on(orch_race(begin(0, true), fulfilled()), end, &seen[2]);
    run();
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].index, 0);
    CHECK_INT(seen[1].error, 1);
    CHECK_INT(seen[1].index, 0);
    CHECK_INT(seen[2].error, 0);
    CHECK_INT(seen[2].index, 1);
    CHECK_INT(work[0].asked, 1);
    finish();
}

// A loser's own callbacks see that it was cancelled, before the race is delivered.
TEST(race_ends_the_chain_of_a_loser) {
    if (!start()) return;
    orch_future *loser = orch_then(begin(0, true), pass, pass, &seen[0]);
    orch_on(orch_race(loser, begin(1, true)), end, &seen[1]);
    CHECK(settle(1, token()));
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, ORCH_ECANCELED);
    CHECK(seen[0].order < seen[1].order);
    CHECK_INT(seen[1].error, 0);
    finish();
}

// ---- quorum

TEST(quorum_fulfils_with_enough) {
    if (!start()) return;
    orch_future *f[5];
    for (int i = 0; i < 5; i++) f[i] = begin(i, true);
    orch_on(orch_quorum_n(2, 5, f), end, &seen[0]);
    CHECK(settle(3, orch_failf(9, "nine")));
    CHECK(settle(2, token()));
    turns();
    CHECK_INT(seen[0].calls, 0);
    CHECK(settle(0, token()));
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].count, 5);
    CHECK(seen[0].at[0].value == &tokens[1]);
    CHECK_INT(seen[0].at[1].error, ORCH_ECANCELED);
    CHECK(seen[0].at[2].value == &tokens[0]);
    CHECK_INT(seen[0].at[3].error, 9);
    CHECK_STR(seen[0].at[3].message, "nine");
    CHECK_INT(seen[0].at[4].error, ORCH_ECANCELED);
    CHECK_INT(work[1].asked, 1);
    CHECK_INT(work[4].asked, 1);
    CHECK_INT(work[0].asked + work[2].asked + work[3].asked, 0);
    finish();
}

TEST(quorum_fails_when_it_has_become_impossible) {
    if (!start()) return;
    orch_future *f[4];
    for (int i = 0; i < 4; i++) f[i] = begin(i, true);
    orch_on(orch_quorum_n(3, 4, f), end, &seen[0]);
    CHECK(settle(1, token()));
    CHECK(settle(0, orch_fail(1)));
    turns();
    CHECK_INT(seen[0].calls, 0);
    CHECK(settle(3, orch_failf(4, "four")));
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, ORCH_EQUORUM);
    CHECK_STR(seen[0].message, orch_error_text(ORCH_EQUORUM));
    CHECK_INT(seen[0].count, 4);
    CHECK_INT(seen[0].at[0].error, 1);
    CHECK(seen[0].at[1].value == &tokens[0]);
    CHECK_INT(seen[0].at[2].error, ORCH_ECANCELED);
    CHECK_INT(seen[0].at[3].error, 4);
    CHECK_STR(seen[0].at[3].message, "four");
    CHECK_INT(work[2].asked, 1);
    finish();
}

TEST(a_quorum_of_more_than_there_are_is_rejected) {
    if (!start()) return;
    orch_future *f = orch_quorum(3, begin(0, true), fulfilled());
    check_error(f, ORCH_EINVAL);
    turns();
    CHECK_INT(work[0].asked, 1); // consumed all the same
    orch_drop(f);
    f = orch_quorum(SIZE_MAX, fulfilled());
    check_error(f, ORCH_EINVAL);
    orch_drop(f);
    f = orch_quorum_n(1, 0, NULL);
    check_error(f, ORCH_EINVAL);
    orch_drop(f);
    finish();
}

TEST(quorum_of_all_of_one_and_of_none) {
    if (!start()) return;
    orch_on(orch_quorum(3, fulfilled(), fulfilled(), fulfilled()), end, &seen[0]);
    orch_on(orch_quorum(1, failed(1), fulfilled()), end, &seen[1]);
    orch_on(orch_quorum(0, begin(0, true), begin(1, true)), end, &seen[2]); // enough already
    run();
    CHECK_INT(seen[0].error, 0);
    for (int i = 0; i < 3; i++) CHECK(seen[0].at[i].value != NULL);
    CHECK_INT(seen[1].error, 0);
    CHECK_INT(seen[1].at[0].error, 1);
    CHECK(seen[1].at[1].value != NULL);
    CHECK_INT(seen[2].error, 0);
    CHECK_INT(seen[2].at[0].error, ORCH_ECANCELED);
    CHECK_INT(work[0].asked + work[1].asked, 2);
    finish();
}

// ---- gather

TEST(gather_returns_early_when_all_are_done) {
    if (!start()) return;
    orch_on(orch_gather(HOUR, begin(0, true), failed(2)), end, &seen[0]);
    CHECK_INT(timers(), 1);
    CHECK(settle(0, token()));
    turns();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].count, 2);
    CHECK(seen[0].at[0].value == &tokens[0]);
    CHECK_INT(seen[0].at[1].error, 2);
    CHECK_INT(timers(), 0); // disarmed
    finish();
}

TEST(gather_shows_what_was_done_in_time) {
    if (!start()) return;
    uint64_t begun = orch_now();
    orch_on(orch_gather(10, begin(0, true), fulfilled(), failed(3), begin(3, true)), end, &seen[0]);
    turns();
    CHECK_INT(seen[0].calls, 0);
    CHECK(settle(3, token()));
    run();
    CHECK(orch_now() - begun >= 10);
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].count, 4);
    CHECK_INT(seen[0].at[0].error, ORCH_ETIMEDOUT);
    CHECK(seen[0].at[1].value == &tokens[0]);
    CHECK_INT(seen[0].at[2].error, 3);
    CHECK(seen[0].at[3].value == &tokens[1]);
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(work[0].reason, ORCH_ETIMEDOUT);
    CHECK(work[0].order < seen[0].order);
    CHECK_INT(work[3].asked, 0);
    finish();
}

// A deadline of 0 still sees what is settled; one that is never, never comes.
TEST(gather_at_once_and_never) {
    if (!start()) return;
    orch_on(orch_gather(0, fulfilled(), begin(0, true)), end, &seen[0]);
    run();
    CHECK_INT(seen[0].at[0].error, 0);
    CHECK_INT(seen[0].at[1].error, ORCH_ETIMEDOUT);
    orch_on(orch_gather(UINT64_MAX, begin(1, true)), end, &seen[1]);
    turns();
    CHECK_INT(seen[1].calls, 0);
    CHECK(settle(1, token()));
    run();
    CHECK_INT(seen[1].at[0].error, 0);
    finish();
}

// What comes after the deadline is released, and the list says what was at the deadline.
TEST(gather_waits_for_what_it_cancelled) {
    if (!start()) return;
    orch_on(orch_gather(1, begin(0, false)), end, &seen[0]);
    settle_after(0, 8);
    run();
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].count, 1);
    CHECK_INT(seen[0].at[0].error, ORCH_ETIMEDOUT);
    finish();
}

// ---- timeout

TEST(timeout_passes_what_comes_in_time) {
    if (!start()) return;
    orch_on(orch_timeout(begin(0, true), HOUR), end, &seen[0]);
    orch_on(orch_timeout(begin(1, true), UINT64_MAX), end, &seen[1]);
    orch_on(orch_timeout(fulfilled(), 0), end, &seen[2]);
    CHECK_INT(calls, 0);
    turns();
    CHECK_INT(seen[0].calls + seen[1].calls, 0);
    CHECK(settle(0, token()));
    CHECK(settle(1, orch_failf(6, "six")));
    turns();
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].index, 0);
    CHECK(seen[0].value == &tokens[1]);
    CHECK_INT(seen[1].error, 6);
    CHECK_INT(seen[1].index, 0);
    CHECK_STR(seen[1].message, "six");
    CHECK_INT(seen[2].error, 0); // settled when it was called: in time
    CHECK(seen[2].value == &tokens[0]);
    CHECK_INT(timers(), 0);
    finish();
}

TEST(timeout_says_how_long) {
    if (!start()) return;
    uint64_t begun = orch_now();
    orch_on(orch_timeout(begin(0, true), 30), end, &seen[0]);
    orch_on(orch_timeout(begin(1, true), 0), end, &seen[1]);
    run();
    CHECK(orch_now() - begun >= 30);
    CHECK_INT(seen[0].error, ORCH_ETIMEDOUT);
    CHECK_INT(seen[0].index, 1);
    CHECK_STR(seen[0].message, "Timeout after 30 ms");
    CHECK_STR(seen[1].message, "Timeout after 0 ms");
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(work[0].reason, ORCH_ETIMEDOUT);
    CHECK(work[0].order < seen[0].order);
    CHECK(orch_promise_pending(work[0].promise) == false);
    finish();
}

// What comes after the timer has decided is too late, in whatever stands around it as well.
TEST(timeout_is_final) {
    if (!start()) return;
    orch_on(orch_timeout(begin(0, false), 1), end, &seen[0]);
    orch_on(orch_any(orch_timeout(begin(1, false), 1), failed(2)), end, &seen[1]);
    orch_on(orch_after(5), settle_work, &work[0]);
    orch_on(orch_after(5), settle_work, &work[1]);
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, ORCH_ETIMEDOUT);
    CHECK_STR(seen[0].message, "Timeout after 1 ms");
    CHECK_INT(seen[1].error, ORCH_EALLFAILED);
    CHECK_INT(seen[1].at[0].error, ORCH_ETIMEDOUT);
    CHECK_INT(work[0].asked + work[1].asked, 2);
    finish();
}

// The message goes with the error, through links and combinators.
TEST(timeout_message_is_passed_on) {
    if (!start()) return;
    orch_future *f = orch_then(orch_timeout(begin(0, true), 1), pass, NULL, &seen[1]);
    f = orch_then(orch_all(fulfilled(), f), NULL, pass, &seen[2]);
    orch_on(orch_all_settled(f), end, &seen[0]);
    run();
    CHECK_INT(seen[2].error, ORCH_ETIMEDOUT);
    CHECK_INT(seen[2].index, 1);
    CHECK_STR(seen[2].message, "Timeout after 1 ms");
    CHECK_INT(seen[0].at[0].error, ORCH_ETIMEDOUT);
    CHECK_STR(seen[0].at[0].message, "Timeout after 1 ms");
    finish();
}

TEST(timeout_of_timeout_takes_the_shorter) {
    if (!start()) return;
    orch_on(orch_timeout(orch_timeout(begin(0, true), HOUR), 2), end, &seen[0]);
    orch_on(orch_timeout(orch_timeout(begin(1, true), 2), HOUR), end, &seen[1]);
    run();
    CHECK_STR(seen[0].message, "Timeout after 2 ms");
    CHECK_STR(seen[1].message, "Timeout after 2 ms");
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(work[1].asked, 1);
    finish();
}

TEST(timeout_cancelled_or_dropped_disarms) {
    for (int drop = 0; drop < 2; drop++) {
        if (!start()) return;
        orch_future *f = orch_timeout(begin(0, true), HOUR);
        CHECK_INT(timers(), 1);
        if (drop) orch_drop(f);
        else orch_cancel(f, 42);
        turns();
        CHECK_INT(work[0].asked, 1);
        if (!drop) CHECK_INT(work[0].reason, 42), check_error(f, ORCH_ECANCELED), orch_drop(f);
        CHECK_INT(timers(), 0);
        finish();
    }
}

// ---- empty and single

TEST(empty_inputs) {
    if (!start()) return;
    static const int errors[KINDS] = {0, 0, ORCH_EALLFAILED, ORCH_EINVAL, 0, 0};
    orch_future *none[] = {ORCH_END};
    for (int kind = 0; kind < KINDS; kind++) {
        orch_future *f = combine(kind, 0, NULL), *g;
        check_error(f, errors[kind]); // at once
        switch (kind) {
        case ALL: g = orch_all_list(none); break;
        case ALL_SETTLED: g = orch_all_settled_list(none); break;
        case ANY: g = orch_any_list(none); break;
        case RACE: g = orch_race_list(none); break;
        case QUORUM: g = orch_quorum_list(0, none); break;
        default: g = orch_gather_list(HOUR, none); break;
        }
        check_error(g, errors[kind]);
        const orch_result *r = orch_peek(g);
        if (r) CHECK_INT(orch_count(r), 0);
        if (r && r->error == 0) CHECK_INT(orch_at(r, 0)->error, ORCH_ERANGE);
        orch_drop(f);
        orch_drop(g);
    }
    CHECK_INT(timers(), 0);
    finish();
}

TEST(single_inputs) {
    for (int kind = 0; kind < KINDS; kind++) {
        for (int ok = 0; ok < 2; ok++) {
            if (!start()) return;
            orch_future *f = begin(0, true);
            orch_on(combine(kind, 1, &f), end, &seen[0]);
            turns();
            CHECK_INT(seen[0].calls, 0);
            CHECK(settle(0, ok ? token() : orch_fail(5)));
            turns();
            CHECK_INT(seen[0].calls, 1);
            if (ok) CHECK_INT(seen[0].error, 0);
            if (ok && seen[0].count) CHECK(seen[0].at[0].value == &tokens[0]);
            if (ok && !seen[0].count) CHECK(seen[0].value == &tokens[0]);
            if (!ok && seen[0].count) CHECK_INT(seen[0].at[0].error, 5);
            if (!ok && !seen[0].count) CHECK_INT(seen[0].error, 5);
            finish();
        }
    }
}

TEST(variadic_forms) {
    if (!start()) return;
    orch_on(orch_all(fulfilled()), end, &seen[0]);
    orch_on(orch_all_settled(fulfilled(), failed(2), fulfilled()), end, &seen[1]);
    orch_on(orch_any(failed(1), fulfilled()), end, &seen[2]);
    orch_on(orch_race(fulfilled(), failed(1)), end, &seen[3]);
    run();
    CHECK_INT(seen[0].count, 1);
    CHECK_INT(seen[1].count, 3);
    CHECK_INT(seen[2].index, 1);
    CHECK_INT(seen[3].index, 0);
    memset(seen, 0, sizeof seen);
    orch_on(orch_quorum(1, failed(1), fulfilled(), fulfilled()), end, &seen[0]);
    orch_on(orch_gather(HOUR, fulfilled(), failed(1)), end, &seen[1]);
    orch_completion *c = orch_as_completed(failed(1), fulfilled());
    orch_on(orch_completion_next(c), end, &seen[2]);
    run();
    orch_on(orch_completion_next(c), end, &seen[3]);
    run();
    CHECK_INT(seen[0].count, 3);
    CHECK_INT(seen[1].count, 2);
    CHECK_INT(seen[2].error, 1);
    CHECK_INT(seen[3].index, 1);
    orch_completion_free(c);
    finish();
}

// ---- cancelling and dropping

TEST(cancel_reaches_every_input) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *in[4] = {begin(0, true), begin(1, true), failed(3), begin(2, true)};
        if (kind == ALL || kind == RACE) orch_drop(in[2]), in[2] = begin(3, true);
        orch_future *f = combine(kind, 4, in);
        turns();
        orch_cancel(f, 42);
        CHECK_INT(work[0].asked, 0); // from the loop
        turns();
        for (int i = 0; i < 3; i++) {
            CHECK_INT(work[i].asked, 1);
            CHECK_INT(work[i].reason, 42);
        }
        const orch_result *r = orch_peek(f);
        if (CHECK(r != NULL)) CHECK_INT(r->error, ORCH_ECANCELED);
        CHECK_INT(timers(), 0);
        orch_drop(f);
        finish();
    }
}

TEST(cancel_waits_for_the_inputs) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *in[2] = {begin(0, false), begin(1, true)};
        orch_future *f = combine(kind, 2, in);
        orch_on(orch_ref(f), end, &seen[0]);
        orch_cancel(f, 0);
        turns();
        CHECK_INT(work[0].asked, 1);
        CHECK_INT(work[1].asked, 1);
        CHECK_INT(seen[0].calls, 0);
        CHECK(settle(0, orch_fail(ORCH_ECANCELED)));
        turns();
        CHECK_INT(seen[0].calls, 1);
        orch_drop(f);
        finish();
    }
}

TEST(drop_cancels_every_input) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *in[5] = {begin(0, true), begin(1, false), begin(2, true), begin(3, true),
                              orch_settled(orch_ok_int(0))};
        bool some_done = kind != ANY && kind != RACE && kind != QUORUM;
        orch_future *f = combine(kind, some_done ? 5 : 4, in);
        if (!some_done) orch_drop(in[4]);
        if (some_done) settle(3, token()); // its value is in the list already
        turns();
        orch_drop(f);
        turns();
        CHECK_INT(work[0].asked, 1);
        CHECK_INT(work[1].asked, 1);
        CHECK_INT(work[2].asked, 1);
        CHECK_INT(work[3].asked, some_done ? 0 : 1);
        settle(1, token()); // and the last one when it can
        finish();
    }
}

TEST(drop_of_a_settled_one_releases_its_values) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *in[3] = {fulfilled(), fulfilled(), fulfilled()};
        orch_future *f = combine(kind, 3, in);
        turns();
        check_error(f, 0);
        orch_drop(f);
        finish();
    }
}

// The moment between its creation and the loop's first look at inputs that are settled.
TEST(drop_before_the_first_turn) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *in[3] = {fulfilled(), begin(0, true), failed(1)};
        orch_drop(combine(kind, 3, in));
        turns();
        finish();
    }
}

static orch_result drop_in_task(void *arg) {
    orch_drop(arg); // returns once every input has ended
    CHECK(!orch_promise_pending(work[0].promise));
    CHECK(!orch_promise_pending(work[1].promise));
    return orch_ok_int(0);
}

TEST(drop_inside_a_task_waits_for_every_input) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *in[2] = {begin(0, true), begin(1, false)};
        orch_future *f = combine(kind, 2, in);
        settle_after(1, 2);
        orch_on(orch_go(drop_in_task, f), end, &seen[0]);
        turns();
        if (seen[0].error) orch_drop(f); // the task did not start
        run();
        CHECK_INT(seen[0].calls, 1);
        finish();
    }
}

// ---- shared inputs

TEST(shared_inputs_are_left_alone) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *held = begin(0, false), *in[2] = {orch_ref(held), begin(1, true)};
        orch_future *f = combine(kind, 2, in);
        orch_cancel(f, 0);
        turns();
        CHECK_INT(work[0].asked, 0);
        CHECK_INT(work[1].asked, 1);
        CHECK(orch_is_settled(f)); // nor waited for
        orch_drop(f);
        turns();
        CHECK(!orch_is_settled(held));
        CHECK(settle(0, token()));
        check_error(held, 0);
        orch_drop(held);
        finish();
    }
}

TEST(shared_losers_are_neither_cancelled_nor_waited_for) {
    if (!start()) return;
    orch_future *held = begin(0, false);
    orch_on(orch_race(orch_ref(held), begin(1, true)), end, &seen[0]);
    orch_on(orch_any(orch_ref(held), begin(2, true)), end, &seen[1]);
    orch_on(orch_all(orch_ref(held), begin(3, true)), end, &seen[2]);
    orch_on(orch_timeout(orch_ref(held), 1), end, &seen[3]);
    CHECK(settle(1, token()));
    CHECK(settle(2, token()));
    CHECK(settle(3, orch_fail(8)));
    run();
    CHECK_INT(seen[0].index, 1);
    CHECK_INT(seen[1].index, 1);
    CHECK_INT(seen[2].error, 8);
    CHECK_INT(seen[3].error, ORCH_ETIMEDOUT);
    CHECK_INT(work[0].asked, 0);
    CHECK(!orch_is_settled(held));
    CHECK(settle(0, token()));
    turns();
    check_error(held, 0);
    for (int i = 0; i < 4; i++) CHECK_INT(seen[i].calls, 1);
    orch_drop(held);
    finish();
}

TEST(shared_winner_shares_its_value) {
    if (!start()) return;
    orch_future *held = begin(0, true);
    orch_on(orch_race(orch_ref(held), begin(1, true)), end, &seen[0]);
    orch_on(orch_all(orch_ref(held), fulfilled()), end, &seen[1]);
    orch_on(orch_timeout(orch_ref(held), HOUR), end, &seen[2]);
    orch_on(orch_gather(HOUR, orch_ref(held)), end, &seen[3]);
    CHECK(settle(0, token()));
    turns();
    CHECK(seen[0].value == &tokens[1]);
    CHECK(seen[1].at[0].value == &tokens[1]);
    CHECK(seen[2].value == &tokens[1]);
    CHECK(seen[3].at[0].value == &tokens[1]);
    CHECK_INT(tokens[1], 0);
    orch_drop(held);
    turns();
    CHECK_INT(tokens[1], 1);
    finish();
}

// Whether a loser is shared is asked at the decision, not when it was given.
TEST(shared_loser_that_the_others_let_go) {
    if (!start()) return;
    orch_future *held = begin(0, true);
    orch_on(orch_race(orch_ref(held), begin(1, true)), end, &seen[0]);
    orch_drop(held);
    turns();
    CHECK_INT(work[0].asked, 0);
    CHECK(settle(1, token()));
    run();
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(seen[0].calls, 1);
    held = begin(2, true); // and a reference of the race's ends with the decision
    orch_on(orch_race(orch_ref(held), begin(3, true)), end, &seen[1]);
    CHECK(settle(3, token()));
    turns();
    CHECK_INT(work[2].asked, 0);
    orch_drop(held);
    turns();
    CHECK_INT(work[2].asked, 1);
    finish();
}

TEST(shared_with_itself) {
    if (!start()) return;
    orch_future *f = begin(0, true);
    orch_on(orch_all(f, orch_ref(f)), end, &seen[0]);
    f = begin(1, true);
    orch_on(orch_race(f, orch_ref(f)), end, &seen[1]);
    f = begin(2, true);
    orch_future *both = orch_all_settled(f, orch_ref(f));
    CHECK(settle(0, token()));
    CHECK(settle(1, token()));
    turns();
    CHECK(seen[0].at[0].value == &tokens[0]);
    CHECK(seen[0].at[1].value == &tokens[0]);
    CHECK_INT(seen[1].index, 0);
    CHECK(seen[1].value == &tokens[1]);
    orch_drop(both); // the last of both references
    turns();
    CHECK_INT(work[2].asked, 1);
    finish();
}

TEST(shared_outcome_goes_to_every_holder) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *in[2] = {begin(0, true), begin(1, true)};
        orch_future *f = combine(kind, 2, in);
        for (int i = 0; i < 3; i++) orch_on(orch_ref(f), end, &seen[i]);
        CHECK(settle(0, token()));
        CHECK(settle(1, token()));
        turns();
        for (int i = 0; i < 3; i++) {
            CHECK_INT(seen[i].calls, 1);
            CHECK_INT(seen[i].error, 0);
            CHECK(seen[i].value == seen[0].value);
            CHECK_INT(seen[i].count, seen[0].count);
            if (seen[i].count) CHECK(seen[i].at[0].value == &tokens[0]);
        }
        check_error(f, 0);
        orch_drop(f);
        finish();
    }
}

// ---- decision and delivery

TEST(delivery_waits_for_the_losers) {
    if (!start()) return;
    orch_on(orch_race(begin(0, true), begin(1, false), begin(2, true)), end, &seen[0]);
    CHECK(settle(0, token()));
    turns();
    CHECK_INT(work[1].asked, 1);
    CHECK_INT(work[2].asked, 1);
    CHECK_INT(seen[0].calls, 0);                 // decided, but one loser has not ended
    CHECK(settle(1, orch_failf(3, "nobody's"))); // which is no unhandled rejection either
    turns();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].index, 0);
    CHECK(seen[0].value == &tokens[0]);
    finish();
}

TEST(delivery_waits_in_every_combinator) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (kind == ALL_SETTLED || kind == GATHER) continue; // they have no losers
        if (!start()) return;
        orch_future *in[3] = {begin(0, true), begin(1, false), begin(2, true)};
        orch_on(combine(kind, 3, in), end, &seen[0]);
        CHECK(settle(2, kind == ALL ? orch_fail(5) : token()));
        turns();
        CHECK_INT(work[0].asked, 1);
        CHECK_INT(work[1].asked, 1);
        CHECK_INT(seen[0].calls, 0);
        CHECK(settle(1, token()));
        turns();
        CHECK_INT(seen[0].calls, 1);
        CHECK_INT(seen[0].error, kind == ALL ? 5 : 0);
        if (kind != QUORUM) CHECK_INT(seen[0].index, 2);
        if (kind == QUORUM) CHECK_INT(seen[0].at[1].error, ORCH_ECANCELED);
        finish();
    }
}

// A loser may be a combinator whose inputs take their time.
TEST(delivery_waits_for_nested_losers) {
    if (!start()) return;
    orch_future *loser = orch_timeout(orch_all(begin(1, false), begin(2, true)), HOUR);
    orch_on(orch_race(begin(0, true), loser), end, &seen[0]);
    CHECK(settle(0, token()));
    turns();
    CHECK_INT(work[1].asked, 1);
    CHECK_INT(work[2].asked, 1);
    CHECK_INT(seen[0].calls, 0);
    CHECK(settle(1, token()));
    turns();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(timers(), 0);
    finish();
}

// Ways in which an outer timer can hold a race that is decided while its loser winds down.
enum wrap {
    PLAIN,
    NESTED,
    FOLLOWED,
    FOLLOWED_LATER,
    SHARED,
    SHARED_FOLLOWED,
    WRAPPED_LATER,
    WRAPS
};

static void outlast(int wrap, bool gather) {
    if (!start()) return;
    orch_promise p = {NULL, 0};
    orch_future *winner = begin(0, true), *inner = orch_race(winner, begin(1, false)), *held = NULL;
    orch_future *f = inner;
    if (wrap == NESTED) f = orch_race(orch_any(failed(1), orch_race(f)));
    if (wrap == SHARED || wrap == SHARED_FOLLOWED) held = orch_ref(f);
    if (wrap == FOLLOWED || wrap == SHARED_FOLLOWED) {
        f = orch_future_new(&p);
        CHECK(orch_follow(p, inner));
    }
    if (wrap == FOLLOWED_LATER) f = orch_future_new(&p);
    if (wrap == WRAPPED_LATER) CHECK(settle(0, token())), turns();
    f = gather ? orch_gather(4, f) : orch_timeout(f, 4);
    orch_on(f, end, &seen[0]);
    if (wrap != WRAPPED_LATER) CHECK(settle(0, token()));
    turns();
    if (wrap == FOLLOWED_LATER) CHECK(orch_follow(p, inner));
    CHECK_INT(seen[0].calls, 0);
    CHECK_INT(work[1].asked, 1);
    settle_after(1, 12); // long after the outer timer
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK((gather ? seen[0].at[0].value : seen[0].value) == &tokens[0]);
    CHECK_INT(gather ? seen[0].at[0].error : 0, 0);
    if (held) check_error(held, 0);
    orch_drop(held);
    finish();
}

TEST(decision_is_not_lost_to_an_outer_timeout) {
    for (int wrap = 0; wrap < WRAPS; wrap++) outlast(wrap, false);
}

TEST(decision_is_not_lost_to_an_outer_gather) {
    for (int wrap = 0; wrap < WRAPS; wrap++) outlast(wrap, true);
}

// An all that is complete but for the delivery of one of its inputs is decided as well.
TEST(decision_passes_through_all) {
    if (!start()) return;
    orch_future *inner = orch_race(begin(0, true), begin(1, false));
    orch_on(orch_timeout(orch_all(fulfilled(), inner, begin(2, true)), 4), end, &seen[0]);
    CHECK(settle(0, token()));
    CHECK(settle(2, token()));
    turns();
    settle_after(1, 12);
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[0].count, 3);
    CHECK(seen[0].at[1].value == &tokens[1]);
    finish();
}

// A failure is seen at once too: the outer losers are asked while the inner ones wind down.
TEST(decision_cancels_the_outer_losers_at_once) {
    if (!start()) return;
    orch_future *inner = orch_race(begin(0, true), begin(1, false));
    orch_on(orch_all(begin(2, true), inner), end, &seen[0]);
    inner = orch_race(begin(3, true), begin(4, false));
    orch_on(orch_race(begin(5, true), inner), end, &seen[1]);
    CHECK(settle(0, orch_failf(7, "seven")));
    CHECK(settle(3, token()));
    turns();
    CHECK_INT(work[2].asked, 1);
    CHECK_INT(work[5].asked, 1);
    CHECK_INT(seen[0].calls + seen[1].calls, 0);
    CHECK(settle(1, token()));
    CHECK(settle(4, token()));
    turns();
    CHECK_INT(seen[0].error, 7);
    CHECK_INT(seen[0].index, 1);
    CHECK_STR(seen[0].message, "seven");
    CHECK_INT(seen[1].error, 0);
    CHECK_INT(seen[1].index, 1);
    finish();
}

// A rival that settles after the decision but before the delivery has lost.
TEST(decision_is_final) {
    if (!start()) return;
    orch_future *inner = orch_race(begin(0, true), begin(1, false));
    orch_on(orch_race(inner, begin(2, false)), end, &seen[0]);
    CHECK(settle(0, token()));
    turns();
    CHECK_INT(work[2].asked, 1);
    CHECK(settle(2, token())); // the outer loser, while the inner one winds down
    turns();
    CHECK_INT(seen[0].calls, 0);
    CHECK(settle(1, token()));
    turns();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].index, 0);
    CHECK(seen[0].value == &tokens[0]);
    finish();
}

TEST(decision_stands_when_cancelled_afterwards) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (kind == ALL_SETTLED || kind == GATHER) continue; // they have no losers
        if (!start()) return;
        orch_future *in[2] = {begin(0, true), begin(1, false)};
        orch_future *f = combine(kind, 2, in);
        orch_on(orch_ref(f), end, &seen[0]);
        CHECK(settle(0, kind == ALL ? orch_fail(5) : token()));
        turns();
        orch_cancel(f, 42);
        turns();
        CHECK_INT(work[1].asked, 1);
        CHECK_INT(seen[0].calls, 0);
        CHECK(settle(1, token()));
        turns();
        CHECK_INT(seen[0].calls, 1);
        CHECK_INT(seen[0].error, kind == ALL ? 5 : 0);
        orch_drop(f);
        finish();
    }
}

TEST(decision_dropped_before_its_delivery) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *in[2] = {begin(0, true), begin(1, false)};
        orch_future *f = combine(kind, 2, in);
        CHECK(settle(0, kind == ALL ? orch_failf(5, "five") : token()));
        turns();
        orch_drop(f);
        turns();
        CHECK_INT(work[1].asked, 1);
        CHECK(settle(1, token()));
        finish();
    }
}

static orch_result await_in_task(void *arg) {
    orch_result r = orch_await(arg);
    record(&r, &seen[0]);
    orch_result_free(&r);
    return orch_ok_int(0);
}

TEST(delivery_to_a_task_waits_for_the_losers) {
    if (!start()) return;
    orch_future *f = orch_race(begin(0, true), begin(1, false));
    orch_on(orch_go(await_in_task, f), end, &seen[1]);
    CHECK(settle(0, token()));
    turns();
    CHECK_INT(seen[0].calls, 0);
    CHECK(settle(1, token()));
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK(seen[0].value == &tokens[0]);
    if (seen[0].calls == 0) orch_drop(f); // the task did not start
    finish();
}

// ---- nesting

TEST(nested_all_any_race_timeout) {
    if (!start()) return;
    orch_future *f = orch_timeout(begin(0, true), HOUR);
    f = orch_race(f, begin(1, true));
    f = orch_any(failed(1), f, begin(2, true));
    f = orch_all(fulfilled(), f);
    f = orch_quorum(1, f, begin(3, true));
    orch_on(orch_gather(HOUR, f), end, &seen[0]);
    CHECK_INT(timers(), 2);
    CHECK(settle(0, token()));
    turns();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    for (int i = 1; i < 4; i++) CHECK_INT(work[i].asked, 1);
    CHECK_INT(work[0].asked, 0);
    CHECK_INT(timers(), 0);
    finish();
}

static orch_result read_lists(void *arg) {
    orch_result r = orch_await(arg);
    CHECK_INT(r.error, 0);
    orch_yield(); // the futures are gone by now
    const orch_result *inner = orch_at(&r, 1);
    CHECK_INT(orch_count(&r), 2);
    CHECK_INT(orch_count(inner), 3);
    CHECK(orch_at(&r, 0)->value == &tokens[0]);
    CHECK(orch_at(inner, 0)->value == &tokens[1]);
    CHECK_INT(orch_at(inner, 1)->error, 9);
    CHECK_STR(orch_message(orch_at(inner, 1)), "failed with 9");
    CHECK_INT(orch_at(inner, 2)->error, ORCH_ETIMEDOUT);
    CHECK_STR(orch_message(orch_at(inner, 2)), "Timeout after 1 ms");
    for (int i = 0; i < 2; i++) CHECK_INT(tokens[i], 0);
    CHECK_INT(orch_loop_statistics(loop).timers, 0);
    orch_result_free(&r);
    for (int i = 0; i < 2; i++) CHECK_INT(tokens[i], 1);
    orch_result_free(&r);
    return orch_ok_int(0);
}

TEST(nested_results_outlive_the_futures) {
    if (!start()) return;
    orch_future *a = fulfilled(), *b = fulfilled();
    orch_future *inner = orch_all_settled(b, failed(9), orch_timeout(begin(0, true), 1));
    orch_future *f = orch_all(a, inner);
    orch_on(orch_go(read_lists, f), end, &seen[0]);
    run();
    CHECK_INT(seen[0].calls, 1);
    if (seen[0].error) orch_drop(f); // the task did not start
    finish();
}

static orch_future *deep(int kind, orch_future *f, size_t n) {
    for (size_t i = 0; i < n; i++) f = kind == KINDS ? orch_timeout(f, HOUR) : combine(kind, 1, &f);
    return f;
}

// How far orch_at leads down, and what is there.
static void dig(orch_result *in, void *context) {
    const orch_result *r = in;
    size_t *depth = context;
    for (*depth = 0; orch_count(r) == 1; ++*depth) r = orch_at(r, 0);
    seen[0].calls++;
    seen[0].error = r->error;
    seen[0].value = r->value;
}

TEST(deep_nesting_settles_without_recursion) {
    small_stack();
    for (int kind = 0; kind <= KINDS; kind++) {
        for (int ok = 0; ok < 2; ok++) {
            if (!start()) return;
            size_t n = many(DEEP), depth = 0;
            bool list =
                kind == ALL_SETTLED || kind == GATHER || kind == QUORUM || (kind == ALL && ok);
            orch_on(deep(kind, begin(0, true), n), dig, &depth);
            CHECK(settle(0, ok ? token() : orch_fail(5)));
            turns();
            run();
            CHECK_INT(seen[0].calls, 1);
            if (list || (kind == ANY && !ok)) CHECK(depth > 0);
            else CHECK_INT(depth, 0);
            if (list && (ok || kind != QUORUM)) CHECK_INT(depth, n);
            if (ok) CHECK(seen[0].value == &tokens[0]);
            else CHECK(seen[0].error != 0);
            finish();
        }
    }
}

TEST(deep_nesting_is_dropped_without_recursion) {
    small_stack();
    for (int kind = 0; kind <= KINDS; kind++) {
        for (int moment = 0; moment < 3; moment++) {
            if (!start()) return;
            orch_future *f = deep(kind, begin(0, true), many(DEEP));
            if (moment == 1) settle(0, token());         // on its way up
            if (moment == 2) orch_cancel(f, 0), turns(); // on its way down, or through
            orch_drop(f);
            run();
            if (moment != 1) CHECK_INT(work[0].asked, 1);
            finish();
        }
    }
}

// Each race is decided at once, and no loser is delivered before those below it.
TEST(deep_nesting_of_losers_that_take_their_time) {
    small_stack();
    if (!start()) return;
    size_t n = many(10000);
    orch_future *f = orch_race(begin(0, true), begin(1, false));
    for (size_t i = 0; i < n; i++) f = orch_race(f, begin(2, true));
    orch_on(orch_timeout(f, 4), end, &seen[0]);
    CHECK(settle(0, token()));
    turns();
    CHECK_INT(work[2].asked, n);
    settle_after(1, 12);
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK(seen[0].value == &tokens[0]);
    finish();
}

// ---- as completed

TEST(completion_in_order_of_settling) {
    if (!start()) return;
    orch_completion *c = orch_as_completed(begin(0, true), begin(1, true), begin(2, true));
    orch_on(orch_completion_next(c), end, &seen[0]);
    turns();
    CHECK_INT(seen[0].calls, 0);
    CHECK(settle(2, token()));
    CHECK(settle(0, orch_failf(4, "four")));
    turns();
    CHECK_INT(seen[0].index, 2);
    CHECK(seen[0].value == &tokens[0]);
    orch_on(orch_completion_next(c), end, &seen[1]); // that is there already
    turns();
    CHECK_INT(seen[1].index, 0);
    CHECK_INT(seen[1].error, 4);
    CHECK_STR(seen[1].message, "four");
    orch_on(orch_completion_next(c), end, &seen[2]); // that is not
    turns();
    CHECK_INT(seen[2].calls, 0);
    CHECK(settle(1, token()));
    run();
    CHECK_INT(seen[2].index, 1);
    CHECK(seen[2].value == &tokens[1]);
    for (int i = 1; i <= 2; i++) { // that will never be, however often it is asked for
        orch_on(orch_completion_next(c), end, &seen[3]);
        run();
        CHECK_INT(seen[3].calls, i);
        CHECK_INT(seen[3].error, ORCH_EEND);
    }
    orch_completion_free(c);
    for (int i = 0; i < 3; i++) CHECK_INT(work[i].asked, 0);
    finish();
}

TEST(completion_of_settled_inputs) {
    if (!start()) return;
    orch_future *in[3] = {fulfilled(), failed(2), fulfilled()};
    orch_completion *c = orch_as_completed_n(3, in);
    for (int i = 0; i < 4; i++) orch_on(orch_completion_next(c), end, &seen[i]), run();
    for (unsigned i = 0; i < 3; i++) CHECK_INT(seen[i].index, i);
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[1].error, 2);
    CHECK_INT(seen[2].error, 0);
    CHECK_INT(seen[3].error, ORCH_EEND);
    orch_completion_free(c);
    finish();
}

TEST(completion_of_nothing) {
    if (!start()) return;
    orch_completion_free(NULL);
    orch_completion *c = orch_as_completed_n(0, NULL);
    CHECK(c != NULL);
    orch_on(orch_completion_next(c), end, &seen[0]);
    run();
    CHECK_INT(seen[0].error, ORCH_EEND);
    orch_completion_free(c);
    finish();
}

TEST(completion_freed_early_cancels_the_rest) {
    if (!start()) return;
    orch_completion *c = orch_as_completed(begin(0, true), begin(1, false), begin(2, true));
    CHECK(settle(0, token())); // not fetched
    turns();
    orch_completion_free(c);
    turns();
    CHECK_INT(work[0].asked, 0);
    CHECK_INT(work[1].asked, 1);
    CHECK_INT(work[2].asked, 1);
    settle(1, token());
    finish();
}

TEST(completion_freed_while_the_next_is_awaited) {
    if (!start()) return;
    orch_completion *c = orch_as_completed(begin(0, true), begin(1, true));
    orch_on(orch_completion_next(c), end, &seen[0]);
    turns();
    orch_completion_free(c);
    turns();
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(work[1].asked, 1);
    CHECK_INT(seen[0].calls, 1);
    CHECK(seen[0].error != 0);
    finish();
}

// A next that was given up, as a timeout does with it, takes no element along.
TEST(completion_next_given_up) {
    if (!start()) return;
    orch_completion *c = orch_as_completed(begin(0, true), begin(1, true));
    orch_on(orch_timeout(orch_completion_next(c), 1), end, &seen[0]);
    run();
    CHECK_INT(seen[0].error, ORCH_ETIMEDOUT);
    CHECK_INT(work[0].asked, 0);
    CHECK_INT(work[1].asked, 0);
    orch_on(orch_completion_next(c), end, &seen[1]);
    CHECK(settle(1, token()));
    turns();
    CHECK_INT(seen[1].calls, 1);
    CHECK_INT(seen[1].index, 1);
    CHECK(seen[1].value == &tokens[0]);
    orch_completion_free(c);
    finish();
}

TEST(completion_leaves_shared_inputs_alone) {
    if (!start()) return;
    orch_future *held = begin(0, true);
    orch_completion *c = orch_as_completed(orch_ref(held), fulfilled());
    orch_on(orch_completion_next(c), end, &seen[0]);
    turns();
    CHECK_INT(seen[0].index, 1);
    orch_completion_free(c);
    turns();
    CHECK_INT(work[0].asked, 0);
    CHECK(!orch_is_settled(held));
    CHECK(settle(0, token()));
    orch_drop(held);
    finish();
}

static orch_result iterate(void *arg) {
    orch_completion *c = arg;
    orch_result r;
    unsigned n = 0;
    for (;;) {
        r = orch_await(orch_completion_next(c));
        if (r.error) break;
        seen[0].at[n++ % SHOWN].number = (intptr_t)r.index;
        orch_result_free(&r);
    }
    CHECK_INT(r.error, ORCH_EEND);
    CHECK_INT(n, 4);
    orch_result_free(&r);
    orch_completion_free(c);
    return orch_ok_int(7);
}

TEST(completion_in_a_task) {
    if (!start()) return;
    orch_future *in[4] = {orch_after(6), fulfilled(), orch_after(2), orch_after(4)};
    orch_completion *c = orch_as_completed_n(4, in);
    orch_on(orch_go(iterate, c), end, &seen[1]);
    run();
    CHECK_INT(seen[1].number, 7);
    if (seen[1].number != 7) orch_completion_free(c); // the task did not start
    static const int order[] = {1, 2, 3, 0};
    for (int i = 0; i < 4; i++) CHECK_INT(seen[0].at[i].number, order[i]);
    finish();
}

TEST(completion_over_100000) {
    small_stack();
    if (!start()) return;
    size_t n = many(WIDE);
    for (size_t i = 0; i < n; i++) wide[i] = orch_future_new(&wide_promise[i]);
    orch_completion *c = orch_as_completed_n(n, wide);
    for (size_t i = n; i > 0; i--) CHECK(orch_settle(wide_promise[i - 1], token()));
    size_t right = 0;
    for (size_t i = n; i > 0; i--) {
        memset(&seen[0], 0, sizeof seen[0]);
        orch_on(orch_completion_next(c), end, &seen[0]);
        turns();
        right += seen[0].calls == 1 && seen[0].error == 0 && seen[0].index == i - 1;
    }
    CHECK_INT(right, n);
    orch_on(orch_completion_next(c), end, &seen[1]);
    run();
    CHECK_INT(seen[1].error, ORCH_EEND);
    orch_completion_free(c);
    finish();
}

// ---- out of memory

static bool deny;

static void *resize(void *user, void *old, size_t old_size, size_t size) {
    (void)user;
    if (size == 0) {
        free(old);
        return NULL;
    }
    if (deny && size > old_size) return NULL;
    return realloc(old, size);
}

static orch_future *spare[SPARE];
static size_t spares;

// Takes every slot that can be had without new memory. The memory comes back by replenish().
static void exhaust(void) {
    orch_promise p;
    deny = true;
    for (spares = 0; spares < SPARE; spares++) {
        spare[spares] = orch_future_new(&p);
        if (orch_is_settled(spare[spares])) break;
    }
    CHECK(spares < SPARE);
}

static void replenish(void) {
    deny = false;
    for (size_t i = 0; i <= spares && i < SPARE; i++) orch_drop(spare[i]);
    turns();
}

static bool start_denying(void) {
    deny = false;
    return start_with((orch_loop_desc){.allocator = {resize, NULL}});
}

// Each race leaves the future that never settles as it was: no memory, nobody in its list.
static size_t live_bytes;

static void *weigh(void *user, void *old, size_t old_size, size_t size) {
    live_bytes += size - old_size;
    return resize(user, old, old_size, size);
}

static size_t bytes_after(long races, orch_future *never) {
    for (long i = 0; i < races; i++) {
        orch_future *won = orch_settled(orch_ok(NULL, NULL));
        orch_on(orch_race(orch_ref(never), won), end, &seen[0]);
        if (i % 32 == 31) turns();
    }
    turns();
    CHECK_INT(orch_loop_statistics(loop).futures, 1); // itself
    return live_bytes;
}

TEST(a_million_races_against_one_that_never_settles) {
    orch_promise p;
    long races =
        test_shared->fail_at == 0 ? 1000000 : 2000; // when memory is refused, fewer will do
    live_bytes = 0;
    deny = false;
    if (!start_with((orch_loop_desc){.allocator = {weigh, NULL}})) return;
    orch_future *never = orch_future_new(&p);
    if (!CHECK(!orch_is_settled(never))) return;
    size_t few = bytes_after(1000, never);
    CHECK_INT(bytes_after(races - 1000, never), few);
    CHECK_INT(seen[0].calls, races);
    orch_drop(never);
    turns();
    finish();
}

// The inputs are consumed all the same: asked to end, and their values released.
TEST(no_memory_consumes_the_inputs) {
    for (int kind = 0; kind <= KINDS; kind++) {
        if (!start_denying()) return;
        orch_future *in[3] = {begin(0, true), fulfilled(), failed(3)};
        if (kind == KINDS) orch_drop(in[1]), orch_drop(in[2]); // timeout has only one
        exhaust();
        orch_future *f = kind == KINDS ? orch_timeout(in[0], HOUR) : combine(kind, 3, in);
        check_error(f, ORCH_ENOMEM);
        orch_drop(f);
        turns();
        CHECK_INT(work[0].asked, 1);
        CHECK_INT(timers(), 0);
        replenish();
        finish();
    }
}

TEST(no_memory_for_a_completion) {
    if (!start_denying()) return;
    orch_future *in[3] = {begin(0, true), fulfilled(), failed(3)};
    exhaust();
    orch_completion *c = orch_as_completed_n(3, in);
    CHECK(c != NULL);
    turns();
    CHECK_INT(work[0].asked, 1);
    orch_future *f = orch_completion_next(c);
    check_error(f, ORCH_ENOMEM);
    orch_drop(f);
    f = orch_completion_next(c); // that was its only element
    check_error(f, ORCH_EEND);
    orch_drop(f);
    orch_completion_free(c);
    replenish();
    finish();
}

// Memory for the slot, but none for the list of a thousand.
TEST(no_memory_for_a_long_list) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start_denying()) return;
        for (size_t i = 0; i < 1000; i++) wide[i] = orch_future_new(&wide_promise[i]);
        for (size_t i = 0; i < 64; i++) orch_drop(orch_settled(token())); // slots to spare
        orch_drop(orch_after(HOUR));                                      // and room for a timer
        deny = true;
        orch_future *f = combine(kind, 1000, wide);
        bool refused = orch_is_settled(f);
        if (refused) check_error(f, ORCH_ENOMEM);
        size_t gone = 0;
        turns();
        for (size_t i = 0; i < 1000; i++) gone += !orch_promise_pending(wide_promise[i]);
        CHECK_INT(gone, refused ? 1000 : 0);
        for (size_t i = 0; i < 1000; i++) orch_settle(wide_promise[i], token());
        turns();
        CHECK(orch_is_settled(f)); // one way or the other
        orch_drop(f);
        deny = false;
        finish();
    }
}

// ---- misuse
//
// A debug build dies with the name of the function; a release build gives the documented error, and
// every input is consumed all the same.

#ifndef NDEBUG

#define MISUSE_DIES(name, ...)                                                                     \
    TEST_DIES(misuse_null_input_orch_##name, "asyncorch: orch_" #name) {                           \
        if (!start()) return;                                                                      \
        orch_future *in[3] = {begin(0, true), NULL, begin(1, true)};                               \
        orch_drop(orch_##name##_n(__VA_ARGS__));                                                   \
    }                                                                                              \
    TEST_DIES(misuse_twice_orch_##name, "asyncorch: orch_" #name) {                                \
        if (!start()) return;                                                                      \
        orch_future *in[3] = {begin(0, true), begin(1, true), NULL};                               \
        in[2] = in[0];                                                                             \
        orch_drop(orch_##name##_n(__VA_ARGS__));                                                   \
    }                                                                                              \
    TEST_DIES(misuse_no_array_orch_##name, "asyncorch: orch_" #name) {                             \
        if (!start()) return;                                                                      \
        orch_future **in = NULL;                                                                   \
        orch_drop(orch_##name##_n(__VA_ARGS__));                                                   \
    }

MISUSE_DIES(all, 3, in)
MISUSE_DIES(all_settled, 3, in)
MISUSE_DIES(any, 3, in)
MISUSE_DIES(race, 3, in)
MISUSE_DIES(quorum, 1, 3, in)
MISUSE_DIES(gather, 3, in, HOUR)

// A count that no array can have, so that none is read.
#define COUNT_DIES(name, ...)                                                                      \
    TEST_DIES(misuse_count_orch_##name, "asyncorch: orch_" #name) {                                \
        if (!start()) return;                                                                      \
        orch_future *one = begin(0, true), *const *in = &one;                                      \
        orch_drop(orch_##name##_n(__VA_ARGS__));                                                   \
        orch_drop(one);                                                                            \
    }

COUNT_DIES(all, SIZE_MAX, in)
COUNT_DIES(all_settled, SIZE_MAX / 2, in)
COUNT_DIES(any, SIZE_MAX, in)
COUNT_DIES(race, SIZE_MAX / 2, in)
COUNT_DIES(quorum, 1, SIZE_MAX, in)
COUNT_DIES(gather, SIZE_MAX, in, HOUR)

TEST_DIES(misuse_without_a_loop_orch_all, "asyncorch: orch_all") {
    orch_future *none = NULL;
    orch_drop(orch_all_n(1, &none));
}

TEST_DIES(misuse_without_a_loop_orch_timeout, "asyncorch: orch_timeout") {
    orch_drop(orch_timeout(NULL, 1));
}

TEST_DIES(misuse_null_orch_timeout, "asyncorch: orch_timeout") {
    if (!start()) return;
    orch_drop(orch_timeout(NULL, 1));
}

TEST_DIES(misuse_consumed_orch_timeout, "asyncorch: orch_timeout") {
    if (!start()) return;
    orch_future *f = begin(0, true), *g = orch_timeout(f, HOUR);
    orch_drop(orch_timeout(f, HOUR));
    orch_drop(g);
}

TEST_DIES(misuse_null_orch_as_completed, "asyncorch: orch_as_completed") {
    if (!start()) return;
    orch_completion_free(orch_as_completed(begin(0, true), (orch_future *)NULL));
}

TEST_DIES(misuse_two_at_once_orch_completion_next, "asyncorch: orch_completion_next") {
    if (!start()) return;
    orch_completion *c = orch_as_completed(begin(0, true), begin(1, true));
    orch_future *f = orch_completion_next(c), *g = orch_completion_next(c);
    orch_drop(f);
    orch_drop(g);
    orch_completion_free(c);
}

TEST_DIES(misuse_null_orch_completion_next, "asyncorch: orch_completion_next") {
    if (!start()) return;
    orch_drop(orch_completion_next(NULL));
}

#else

TEST(misuse_counts_beyond_all_memory) {
    static const size_t counts[] = {SIZE_MAX, SIZE_MAX / 2 + 1, SIZE_MAX / sizeof(void *) + 2};
    if (!start()) return;
    orch_future *one = begin(0, true);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        for (int kind = 0; kind < KINDS; kind++) {
            orch_future *f = combine(kind, counts[i], &one);
            const orch_result *r = orch_peek(f);
            if (CHECK(r != NULL)) CHECK(r->error == ORCH_ENOMEM || r->error == ORCH_EINVAL);
            orch_drop(f);
        }
        orch_completion *c = orch_as_completed_n(counts[i], &one);
        if (CHECK(c != NULL)) orch_on(orch_completion_next(c), end, &seen[0]);
        turns();
        CHECK(seen[0].error == ORCH_ENOMEM || seen[0].error == ORCH_EINVAL);
        orch_completion_free(c);
    }
    turns();
    CHECK_INT(work[0].asked, 0); // the array was not read
    CHECK_INT(timers(), 0);
    orch_drop(one);
    finish();
}

// The mistaken input reads as one that was rejected; the others do what they always do.
static void mistaken_input(int kind, orch_future **in, unsigned which, int error) {
    orch_on(combine(kind, 3, in), end, &seen[0]);
    turns();
    if (kind == ALL || kind == RACE) {
        CHECK_INT(seen[0].error, error);
        CHECK_INT(seen[0].index, which);
    }
    settle(0, token());
    settle(1, token());
    turns();
    CHECK_INT(seen[0].calls, 1);
    if (kind != ALL && kind != RACE) CHECK_INT(seen[0].error, 0);
    if (seen[0].count > which) CHECK_INT(seen[0].at[which].error, error);
    CHECK_INT(timers(), 0);
}

TEST(misuse_null_input) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *in[3] = {begin(0, true), NULL, begin(1, true)};
        mistaken_input(kind, in, 1, ORCH_EINVAL);
        orch_future *f = combine(kind, 3, NULL);
        check_error(f, ORCH_EINVAL);
        orch_drop(f);
        CHECK_INT(timers(), 0);
        finish();
    }
}

TEST(misuse_twice) {
    for (int kind = 0; kind < KINDS; kind++) {
        if (!start()) return;
        orch_future *in[3] = {begin(0, true), begin(1, true), NULL};
        in[2] = in[0];
        mistaken_input(kind, in, 2, ORCH_ECONSUMED);
        finish();
    }
}

TEST(misuse_without_a_loop) {
    orch_future *none = orch_settled(orch_ok_int(0)); // a rejected one
    for (int kind = 0; kind <= KINDS; kind++) {
        orch_future *f = kind == KINDS ? orch_timeout(none, 1) : combine(kind, 1, &none);
        check_error(f, ORCH_ENOLOOP);
        orch_drop(f);
    }
    orch_completion *c = orch_as_completed_n(1, &none);
    CHECK(c != NULL);
    orch_future *f = orch_completion_next(c);
    CHECK(orch_is_settled(f));
    orch_drop(f);
    orch_completion_free(c);
}

TEST(misuse_of_two_completions) { // each tells its own error
    deny = false;
    if (!start_with((orch_loop_desc){.allocator.resize = resize})) return;
    orch_completion *c = orch_as_completed_n(1, NULL);
    deny = true;
    orch_completion *d = orch_as_completed_n(0, NULL);
    deny = false;
    orch_on(orch_completion_next(c), end, &seen[0]);
    orch_on(orch_completion_next(d), end, &seen[1]);
    orch_on(orch_completion_next(d), end, &seen[2]);
    turns();
    CHECK_INT(seen[0].error, ORCH_EINVAL);
    CHECK_INT(seen[1].error, ORCH_ENOMEM);
    CHECK_INT(seen[2].error, ORCH_EEND);
    orch_completion_free(d);
    orch_completion_free(c);
    finish();
}

TEST(misuse_of_timeout) {
    if (!start()) return;
    orch_on(orch_timeout(NULL, HOUR), end, &seen[0]);
    orch_future *f = begin(0, true), *g = orch_timeout(f, HOUR);
    orch_on(orch_timeout(f, HOUR), end, &seen[1]);
    turns();
    CHECK_INT(seen[0].error, ORCH_EINVAL);
    CHECK_INT(seen[1].error, ORCH_ECONSUMED);
    CHECK(!orch_is_settled(g));
    CHECK_INT(timers(), 1);
    orch_drop(g);
    finish();
}

TEST(misuse_of_completion) {
    if (!start()) return;
    orch_completion *c = orch_as_completed(begin(1, true), (orch_future *)NULL);
    CHECK(c != NULL);
    orch_on(orch_completion_next(c), end, &seen[0]);
    turns();
    CHECK_INT(seen[0].error, ORCH_EINVAL);
    CHECK_INT(seen[0].index, 1);
    orch_on(orch_completion_next(c), end, &seen[1]);
    orch_on(orch_completion_next(c), end, &seen[2]); // while one is awaited
    turns();
    CHECK_INT(seen[1].calls, 0);
    CHECK_INT(seen[2].error, ORCH_EBUSY);
    CHECK(settle(1, token()));
    turns();
    CHECK_INT(seen[1].index, 0);
    CHECK_INT(seen[1].error, 0);
    orch_completion_free(c);
    orch_on(orch_completion_next(NULL), end, &seen[3]);
    turns();
    CHECK_INT(seen[3].error, ORCH_EINVAL);
    finish();
}

#endif

int main(int argc, char **argv) { return test_main(argc, argv); }
