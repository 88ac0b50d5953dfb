// Results, futures and tickets: settling, sharing, cancelling, chains of any length, and misuse.
//
// Every value and context that the library owns is a token that counts its releases: finish()
// aborts when one was not released exactly once or a slot is left, which a sweep notices as well.
#include "../asyncorch.h"
#include "test.h"

#include <pthread.h>
#include <sys/resource.h>

// ---- kit

enum { TOKENS = 4096, WORKS = 8, SEENS = 4, DEEP = 20000, SPARE = 1 << 18 };

// What a callback saw, and what it is to return.
struct seen {
    int calls, error, order;
    unsigned index;
    intptr_t number;
    void *value, *taken;
    char message[64];
    bool take;
    orch_result reply;
};

// Work in progress, and how it takes being cancelled.
struct work {
    orch_promise promise;
    int asked, reason, order;
    bool ends;           // what the hook returns
    bool settles;        // whether the hook settles
    orch_future *next;   // what the hook follows
    orch_future *victim; // what the hook drops
};

static orch_loop *loop;
static int tokens[TOKENS], issued; // how often each was released
static int calls, unhandled, unhandled_error, reports;
static char unhandled_message[64];
static struct seen seen[SEENS];
static struct work work[WORKS];

static void give_back(void *value) { ++*(int *)value; }

static void *lend(void) { return &tokens[issued++ % TOKENS]; }

static orch_result token(void) { return orch_ok(lend(), give_back); }

static void on_unhandled(const orch_result *r, void *context) {
    (void)context;
    unhandled++;
    unhandled_error = r->error;
    snprintf(unhandled_message, sizeof unhandled_message, "%s", orch_message(r));
}

static void on_report(const char *text, void *context) {
    (void)text, (void)context;
    reports++;
}

static bool start_with(orch_loop_desc desc) {
    memset(seen, 0, sizeof seen);
    memset(work, 0, sizeof work);
    memset(tokens, 0, sizeof tokens);
    issued = calls = unhandled = unhandled_error = reports = 0;
    desc.on_unhandled = on_unhandled, desc.on_report = on_report;
    loop = orch_loop_new(&desc);
    return CHECK(loop != NULL);
}

static bool start(void) { return start_with((orch_loop_desc){.context = NULL}); }

static void run(void) { CHECK_INT(orch_loop_run(loop), 0); }

// What is ready, without waiting for anything.
static void turns(void) {
    for (int i = 0; i < 1000 && orch_loop_step(loop, 0) == 1; i++) continue;
}

static size_t in_use(void) { return orch_loop_statistics(loop).futures; }

static void balance(void) {
    for (int i = 0; i < issued && i < TOKENS; i++) {
        if (tokens[i] == 1) continue;
        fprintf(stderr, "token %d of %d was released %d times\n", i, issued, tokens[i]);
        abort();
    }
}

static void finish(void) {
    if (test_shared->fail_at) { // a case in a sweep may not have come to settling and replying
        for (int i = 0; i < WORKS; i++) orch_settle(work[i].promise, orch_fail(ORCH_ECANCELED));
        for (int i = 0; i < SEENS; i++) orch_result_free(&seen[i].reply);
    }
    turns();
    size_t left = in_use();
    int error = orch_loop_free(loop);
    if (left != 0 || error != 0) {
        fprintf(stderr, "%zu futures left, loop freed: %s\n", left, orch_error_text(error));
        abort();
    }
    balance();
}

static void record(orch_result *in, struct seen *s) {
    s->calls++;
    s->order = ++calls;
    s->error = in->error;
    s->index = in->index;
    s->number = orch_int(in);
    s->value = in->value;
    snprintf(s->message, sizeof s->message, "%s", orch_message(in));
    if (s->take) s->taken = orch_take(in);
}

static orch_result reply(orch_result *in, void *context) {
    struct seen *s = context;
    record(in, s);
    orch_result r = s->reply;
    memset(&s->reply, 0, sizeof s->reply); // given away once
    return r;
}

static orch_result pass(orch_result *in, void *context) {
    record(in, context);
    return *in;
}

static void end(orch_result *in, void *context) { record(in, context); }

static bool on_cancel(void *context, int reason) {
    struct work *w = context;
    w->asked++;
    w->reason = reason;
    w->order = ++calls;
    if (w->settles) CHECK(orch_settle(w->promise, orch_ok_int(5)));
    if (w->next) CHECK(orch_follow(w->promise, w->next));
    orch_drop(w->victim);
    return w->ends;
}

static orch_future *begin(struct work *w, bool ends) {
    orch_future *f = orch_future_new(&w->promise);
    w->ends = ends;
    CHECK(orch_promise_on_cancel(w->promise, on_cancel, w));
    return f;
}

static void check_error(orch_future *f, int error) {
    const orch_result *r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK_INT(r->error, error);
}

// A size that shows recursion; less in a sweep, which runs the case hundreds of times.
static size_t many(size_t n) { return test_shared->fail_at ? n / 100 + 1 : n; }

// From here on the stack can not grow beyond 256 KiB: recursion over many links dies.
static void small_stack(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_STACK, &limit)) return;
    limit.rlim_cur = 256 * 1024;
    CHECK_INT(setrlimit(RLIMIT_STACK, &limit), 0);
}

// ---- results

TEST(result_ok_owns_its_value) {
    orch_result r = token();
    CHECK_INT(r.error, 0);
    CHECK(r.value == &tokens[0]);
    CHECK(r.owner == &tokens[0]);
    CHECK(r.release == give_back);
    CHECK_STR(orch_message(&r), "ok");
    CHECK_INT(tokens[0], 0);
    orch_result_free(&r);
    CHECK_INT(tokens[0], 1);
    CHECK(r.value == NULL);
    orch_result_free(&r); // twice is harmless
    balance();
}

TEST(result_take_moves_the_value_out) {
    orch_result r = token();
    CHECK(orch_take(&r) == &tokens[0]);
    CHECK(orch_take(&r) == NULL); // only once
    orch_result_free(&r);
    CHECK_INT(tokens[0], 0);
    give_back(&tokens[0]);
    balance();
}

TEST(result_without_release_owns_nothing) {
    int here = 0;
    orch_result r = orch_ok(&here, NULL);
    CHECK(r.value == &here);
    CHECK(r.release == NULL);
    orch_result_free(&r);
    CHECK_INT(here, 0);
    r = orch_ok(NULL, NULL);
    CHECK_INT(r.error, 0);
    CHECK(r.value == NULL);
    orch_result_free(&r);
}

TEST(result_ok_int) {
    static const intptr_t numbers[] = {0, 1, -1, 4096, INTPTR_MAX, INTPTR_MIN};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        orch_result r = orch_ok_int(numbers[i]);
        CHECK_INT(r.error, 0);
        CHECK_INT(orch_int(&r), numbers[i]);
        CHECK_INT(orch_count(&r), 0);
        orch_result_free(&r);
    }
}

TEST(result_fail) {
    orch_result r = orch_fail(-ENOENT);
    CHECK_INT(r.error, -ENOENT);
    CHECK_INT(orch_int(&r), 0);
    CHECK_STR(orch_message(&r), orch_error_text(-ENOENT));
    CHECK(orch_take(&r) == NULL);
    orch_result_free(&r);
    r = orch_fail(7); // the application's own
    CHECK_INT(r.error, 7);
    CHECK(orch_message(&r)[0] != '\0');
    r = orch_fail(0);
    CHECK_INT(r.error, ORCH_EINVAL);
    orch_result_free(&r);
}

TEST(result_failf_formats) {
    orch_result r = orch_failf(12, "%s %d%%", "at", 90);
    CHECK_INT(r.error, 12);
    CHECK_STR(orch_message(&r), "at 90%");
    CHECK_INT(orch_int(&r), 0);
    CHECK_INT(orch_count(&r), 0);
    orch_result_free(&r);
    orch_result_free(&r);
    r = orch_failf(0, "%s", "no error is a mistake");
    CHECK_INT(r.error, ORCH_EINVAL);
    orch_result_free(&r);
    r = orch_failf(3, "%s", "");
    CHECK_INT(r.error, 3);
    orch_result_free(&r);
}

TEST(result_failf_long) {
    static char text[10001];
    memset(text, 'x', sizeof text - 1);
    orch_result r = orch_failf(1, "%s", text);
    CHECK_INT(r.error, 1);
    CHECK(strcmp(orch_message(&r), text) == 0);
    orch_result_free(&r);
}

TEST(result_at_without_a_list) {
    orch_result r = token();
    const orch_result *e = orch_at(&r, 0);
    if (CHECK(e != NULL)) CHECK_INT(e->error, ORCH_ERANGE);
    e = orch_at(&r, SIZE_MAX);
    if (CHECK(e != NULL)) CHECK_INT(e->error, ORCH_ERANGE);
    orch_result_free(&r);
    r = orch_failf(9, "outer");
    CHECK(orch_at(&r, 0) == &r); // the outer error
    CHECK(orch_at(&r, 1000) == &r);
    CHECK_INT(orch_count(&r), 0);
    orch_result_free(&r);
    balance();
}

TEST(result_error_texts) {
#define CHECK_ERROR(name, value, text)                                                             \
    CHECK_INT(name, value);                                                                        \
    CHECK_STR(orch_error_name(name), #name);                                                       \
    CHECK_STR(orch_error_text(name), text);
    ORCH_ERRORS(CHECK_ERROR)
#undef CHECK_ERROR
    CHECK(orch_error_name(12345) == NULL);
    CHECK(orch_error_name(-ENOENT) == NULL);
    static const int odd[] = {0, 1, -1, -ENOENT, INT32_MAX, INT32_MIN, -9999, -10010, -11000};
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) CHECK(orch_error_text(odd[i]) != NULL);
    orch_result r = orch_fail(INT32_MIN); // whose negation does not exist
    CHECK(orch_message(&r) != NULL);
}

// ---- settling

TEST(settled_from_the_start) {
    if (!start()) return;
    orch_future *f = orch_settled(token());
    CHECK(orch_is_settled(f));
    check_error(f, 0);
    const orch_result *r = orch_peek(f);
    if (r) CHECK(r->value == &tokens[0]);
    CHECK_INT(tokens[0], 0);
    orch_drop(f);
    CHECK_INT(tokens[0], 1);
    f = orch_settled(orch_failf(3, "three"));
    check_error(f, 3);
    r = orch_peek(f);
    if (r) CHECK_STR(orch_message(r), "three");
    orch_drop(f);
    CHECK_INT(unhandled, 0);
    finish();
}

TEST(settle_decides_once) {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    CHECK(!orch_is_settled(f));
    CHECK(orch_peek(f) == NULL);
    CHECK(orch_promise_pending(p));
    CHECK(orch_settle(p, token()));
    CHECK(!orch_promise_pending(p));
    CHECK(orch_is_settled(f));
    CHECK(!orch_settle(p, token())); // and frees it
    CHECK_INT(tokens[1], 1);
    CHECK(!orch_settle(p, orch_failf(1, "late")));
    const orch_result *r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[0]);
    CHECK_INT(tokens[0], 0);
    orch_drop(f);
    finish();
}

TEST(settle_when_the_future_is_gone) {
    if (!start()) return;
    orch_promise p;
    orch_drop(orch_future_new(&p)); // pending
    turns();
    CHECK(!orch_promise_pending(p));
    CHECK(!orch_settle(p, token()));
    CHECK_INT(tokens[0], 1);
    CHECK(!orch_follow(p, orch_settled(token())));
    CHECK_INT(tokens[1], 1);
    orch_future *f = orch_future_new(&p);
    CHECK(orch_settle(p, token()));
    orch_drop(f); // settled
    turns();
    CHECK(!orch_promise_pending(p));
    CHECK(!orch_settle(p, token()));
    CHECK(!orch_settle(p, orch_chain(orch_settled(token()))));
    finish();
}

// A ticket whose slot serves another future now must not reach that one.
TEST(settle_by_a_ticket_of_an_earlier_life) {
    if (!start()) return;
    orch_promise first, later;
    orch_future *f = orch_future_new(&first);
    orch_drop(f);
    turns();
    bool again = false;
    for (int i = 0; i < 2000000; i++) {
        f = orch_future_new(&later);
        again = later.future == first.future;
        if (again) break;
        orch_drop(f);
        if (i % 64 == 0) turns();
    }
    if (!again) f = NULL;
    if (CHECK(again)) { // else nothing was tried
        CHECK(!orch_promise_pending(first));
        CHECK(!orch_settle(first, token()));
        CHECK(!orch_follow(first, orch_settled(token())));
        CHECK(!orch_promise_on_cancel(first, on_cancel, &work[0]));
        CHECK(!orch_settle(orch_promise_unbox(orch_promise_box(first)), token()));
        CHECK(!orch_is_settled(f));
        CHECK(orch_settle(later, token()));
    }
    orch_drop(f);
    CHECK_INT(work[0].asked, 0);
    finish();
}

TEST(settle_by_no_ticket) {
    if (!start()) return;
    orch_promise none = {NULL, 0};
    CHECK(!orch_promise_pending(none));
    CHECK(!orch_settle(none, token()));
    CHECK(!orch_follow(none, orch_settled(token())));
    CHECK(!orch_promise_on_cancel(none, on_cancel, &work[0]));
    void *box = orch_promise_box(none);
    CHECK(box != NULL);
    CHECK(!orch_settle(orch_promise_unbox(box), token()));
    finish();
}

// ---- boxes

TEST(box_carries_a_ticket) {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    void *box = orch_promise_box(p);
    CHECK(box != NULL);
    orch_promise back = orch_promise_unbox(box);
    CHECK(orch_promise_pending(back));
    CHECK(orch_settle(back, token()));
    CHECK(!orch_settle(p, token())); // the same ticket
    check_error(f, 0);
    orch_drop(f);
    finish();
}

TEST(box_outlives_its_future) {
    if (!start()) return;
    orch_promise p, q;
    orch_future *f = orch_future_new(&p);
    void *box = orch_promise_box(p);
    orch_drop(f);
    turns();
    orch_future *others[64]; // none of which may be mistaken for it
    for (int i = 0; i < 64; i++) others[i] = orch_future_new(&q);
    orch_promise back = orch_promise_unbox(box);
    CHECK(!orch_promise_pending(back));
    CHECK(!orch_settle(back, token()));
    for (int i = 0; i < 64; i++) CHECK(!orch_is_settled(others[i]));
    for (int i = 0; i < 64; i++) orch_drop(others[i]);
    f = orch_future_new(&p); // made while settled and gone
    CHECK(orch_settle(p, token()));
    box = orch_promise_box(p);
    orch_drop(f);
    CHECK(!orch_settle(orch_promise_unbox(box), token()));
    box = orch_promise_box(p); // and made of a dead ticket
    CHECK(box != NULL);
    CHECK(!orch_settle(orch_promise_unbox(box), token()));
    finish();
}

// ---- following

TEST(follow_locks_in) {
    if (!start()) return;
    orch_promise p, q;
    orch_future *f = orch_future_new(&p), *g = orch_future_new(&q);
    CHECK(orch_follow(p, g));
    CHECK(!orch_promise_pending(p));
    CHECK(!orch_settle(p, token()));
    CHECK(!orch_follow(p, orch_settled(token())));
    CHECK(!orch_promise_on_cancel(p, on_cancel, &work[0]));
    turns();
    CHECK(!orch_is_settled(f));
    CHECK(orch_settle(q, token()));
    run();
    const orch_result *r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[issued - 1]);
    orch_drop(f);
    finish();
}

TEST(follow_is_consumed_when_late) {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    CHECK(orch_settle(p, orch_ok_int(1)));
    CHECK(!orch_follow(p, begin(&work[0], true))); // dropped, so cancelled
    turns();
    CHECK_INT(work[0].asked, 1);
    orch_drop(f);
    finish();
}

// Cancelling what follows passes to what it follows, as deep as it goes, unless others hold it.
TEST(follow_passes_cancelling_on) {
    if (!start()) return;
    orch_promise p, q;
    orch_future *f = orch_future_new(&p), *g = orch_future_new(&q);
    orch_future *h = begin(&work[0], true);
    CHECK(orch_follow(q, h));
    CHECK(orch_follow(p, g));
    orch_cancel(f, 42);
    turns();
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(work[0].reason, 42);
    check_error(f, ORCH_ECANCELED);
    orch_drop(f);

    f = orch_future_new(&p);
    h = begin(&work[1], true);
    CHECK(orch_follow(p, orch_ref(h)));
    orch_cancel(f, 42);
    turns();
    CHECK_INT(work[1].asked, 0);
    check_error(f, ORCH_ECANCELED);
    CHECK(!orch_is_settled(h));
    orch_drop(f);
    orch_drop(h);
    turns();
    CHECK_INT(work[1].asked, 1);
    finish();
}

static orch_future *ring[1000], *kept[1000];
static orch_promise ticket[1000];

// Every future follows the next and the last the first; registered upwards or downwards.
static void cycle(size_t n, bool hold, bool down) {
    if (!start()) return;
    for (size_t i = 0; i < n; i++) {
        ring[i] = orch_future_new(&ticket[i]);
        kept[i] = hold ? orch_ref(ring[i]) : NULL;
    }
    for (size_t k = 0; k < n; k++) {
        size_t i = down ? n - 1 - k : k;
        CHECK(orch_follow(ticket[i], ring[(i + 1) % n]));
    }
    turns();
    for (size_t i = 0; i < n; i++) {
        CHECK(!orch_settle(ticket[i], token()));
        if (hold) check_error(kept[i], ORCH_ECYCLE);
        orch_drop(kept[i]);
    }
    CHECK_INT(unhandled, 0);
    finish();
}

TEST(follow_cycles_reject) {
    static const size_t sizes[] = {1, 2, 3, 1000};
    small_stack();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int way = 0; way < 4; way++) cycle(sizes[i], way & 1, way & 2);
    }
}

// One that is not in the cycle but leads into it ends with it, and so does its callback.
TEST(follow_into_a_cycle_rejects) {
    if (!start()) return;
    for (size_t i = 0; i < 3; i++) ring[i] = orch_future_new(&ticket[i]);
    orch_on(orch_ref(ring[0]), end, &seen[0]);
    CHECK(orch_follow(ticket[0], orch_ref(ring[1])));
    CHECK(orch_follow(ticket[1], orch_ref(ring[2])));
    CHECK(orch_follow(ticket[2], orch_ref(ring[1])));
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, ORCH_ECYCLE);
    for (size_t i = 0; i < 3; i++) {
        check_error(ring[i], ORCH_ECYCLE);
        orch_drop(ring[i]);
    }
    finish();
}

// ---- callbacks

TEST(then_maps_value_and_error) {
    if (!start()) return;
    seen[0].reply = orch_ok_int(2);
    orch_future *f = orch_then(orch_settled(orch_ok_int(1)), reply, NULL, &seen[0]);
    CHECK(!orch_is_settled(f)); // from the loop, never inside
    CHECK_INT(calls, 0);
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].number, 1);
    const orch_result *r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK_INT(orch_int(r), 2);
    orch_drop(f);
    seen[1].reply = orch_failf(8, "eight");
    f = orch_then(orch_settled(orch_failf(7, "seven")), NULL, reply, &seen[1]);
    run();
    CHECK_INT(seen[1].error, 7);
    CHECK_STR(seen[1].message, "seven");
    r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK_INT(r->error, 8), CHECK_STR(orch_message(r), "eight");
    orch_drop(f);
    finish();
}

TEST(then_without_handlers_moves_the_value_on) {
    if (!start()) return;
    orch_future *f = orch_settled(token());
    for (int i = 0; i < 10; i++) f = orch_then(f, NULL, NULL, NULL);
    run();
    const orch_result *r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[0]);
    CHECK_INT(tokens[0], 0);
    orch_drop(f);
    CHECK_INT(tokens[0], 1);
    finish();
}

// A value that the callback leaves alone is given back after it; one that it took is its own.
TEST(then_lends_its_input) {
    if (!start()) return;
    orch_drop(orch_settled(token()));
    orch_future *f = orch_then(orch_settled(token()), reply, NULL, &seen[0]);
    run();
    CHECK_INT(tokens[1], 1);
    orch_drop(f);
    seen[1].take = true;
    f = orch_then(orch_settled(token()), reply, NULL, &seen[1]);
    run();
    CHECK(seen[1].taken == &tokens[2]);
    CHECK_INT(tokens[2], 0);
    if (seen[1].taken) give_back(seen[1].taken);
    orch_drop(f);
    finish();
}

static orch_result take_and_return(orch_result *in, void *context) {
    record(in, context);
    void *value = orch_take(in);
    CHECK(value == &tokens[0]);
    return orch_ok(value, value ? give_back : NULL);
}

TEST(then_takes_and_returns) {
    if (!start()) return;
    orch_future *f = orch_settled(token());
    for (int i = 0; i < 3; i++) f = orch_then(f, take_and_return, NULL, &seen[0]);
    run();
    CHECK_INT(tokens[0], 0);
    orch_drop(f);
    finish();
}

// Returning *in hands the input on, whoever owns it.
TEST(then_returns_its_input) {
    if (!start()) return;
    orch_future *source = orch_settled(token());
    orch_future *share = orch_then(orch_ref(source), pass, pass, &seen[0]);
    orch_future *f = orch_then(orch_settled(token()), pass, pass, &seen[1]);
    orch_future *bad = orch_then(orch_settled(orch_failf(4, "four")), pass, pass, &seen[2]);
    run();
    orch_drop(source);
    const orch_result *r = orch_peek(share);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[0]);
    CHECK_INT(tokens[0], 0); // the share keeps it
    r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[1]);
    CHECK_INT(tokens[1], 0);
    r = orch_peek(bad);
    if (CHECK(r != NULL)) CHECK_INT(r->error, 4), CHECK_STR(orch_message(r), "four");
    orch_drop(share);
    CHECK_INT(tokens[0], 1);
    orch_drop(f);
    orch_drop(bad);
    finish();
}

TEST(then_chains_to_a_future) {
    if (!start()) return;
    orch_promise p;
    orch_future *f[4];
    seen[0].reply = orch_chain(orch_settled(token())); // settled
    f[0] = orch_then(orch_settled(orch_ok_int(0)), reply, NULL, &seen[0]);
    seen[1].reply = orch_chain(orch_future_new(&p)); // pending
    f[1] = orch_then(orch_settled(orch_ok_int(0)), reply, NULL, &seen[1]);
    seen[2].reply = orch_chain(orch_settled(orch_fail(6))); // rejected
    f[2] = orch_then(orch_settled(orch_ok_int(0)), reply, NULL, &seen[2]);
    orch_future *held = orch_settled(token()); // shared
    seen[3].reply = orch_chain(orch_ref(held));
    f[3] = orch_then(orch_settled(orch_fail(1)), NULL, reply, &seen[3]);
    turns();
    check_error(f[0], 0);
    CHECK(!orch_is_settled(f[1]));
    check_error(f[2], 6);
    check_error(f[3], 0);
    CHECK(orch_settle(p, token()));
    run();
    check_error(f[1], 0);
    orch_drop(held);
    for (int i = 0; i < 4; i++) orch_drop(f[i]);
    CHECK_INT(unhandled, 0);
    finish();
}

TEST(chain_that_nobody_used_is_dropped) {
    if (!start()) return;
    orch_result r = orch_chain(orch_settled(token()));
    orch_result_free(&r);
    CHECK_INT(tokens[0], 1);
    r = orch_chain(begin(&work[0], true));
    orch_result_free(&r);
    turns();
    CHECK_INT(work[0].asked, 1);
    finish();
}

TEST(on_ends_a_chain) {
    if (!start()) return;
    orch_promise p;
    orch_on(orch_future_new(&p), end, &seen[0]);
    orch_on(orch_settled(token()), end, &seen[1]);
    orch_on(orch_settled(orch_failf(5, "five")), end, &seen[2]);
    seen[3].take = true;
    orch_on(orch_settled(token()), end, &seen[3]);
    CHECK_INT(calls, 0); // never inside the call
    turns();
    CHECK_INT(seen[0].calls, 0);
    CHECK_INT(seen[1].calls, 1);
    CHECK(seen[1].value == &tokens[0]);
    CHECK_INT(tokens[0], 1); // given back after the call
    CHECK_INT(seen[2].error, 5);
    CHECK_STR(seen[2].message, "five");
    CHECK(seen[3].taken == &tokens[1]);
    CHECK_INT(tokens[1], 0);
    if (seen[3].taken) give_back(seen[3].taken);
    CHECK(orch_settle(p, orch_ok_int(-9)));
    CHECK_INT(seen[0].calls, 0);
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].number, -9);
    CHECK_INT(unhandled, 0);
    finish();
}

static void count_call(void *context) {
    ++*(int *)context;
    calls++;
}

TEST(finally_runs_either_way) {
    if (!start()) return;
    int ran[4] = {0};
    orch_future *good = orch_finally(orch_settled(token()), count_call, &ran[0]);
    orch_future *bad = orch_finally(orch_settled(orch_failf(2, "two")), count_call, &ran[1]);
    orch_future *source = orch_settled(token());
    orch_future *share = orch_finally(orch_ref(source), count_call, &ran[2]);
    orch_future *gone = orch_finally(begin(&work[0], true), count_call, &ran[3]);
    orch_cancel(gone, 0);
    CHECK_INT(calls, 0);
    run();
    CHECK_INT(ran[0], 1);
    CHECK_INT(ran[1], 1);
    CHECK_INT(ran[2], 1);
    CHECK_INT(ran[3], 1);
    const orch_result *r = orch_peek(good);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[0]);
    r = orch_peek(bad);
    if (CHECK(r != NULL)) CHECK_INT(r->error, 2), CHECK_STR(orch_message(r), "two");
    r = orch_peek(share);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[1]);
    check_error(gone, ORCH_ECANCELED);
    orch_drop(good), orch_drop(bad), orch_drop(share), orch_drop(source), orch_drop(gone);
    finish();
}

static orch_future *own;

static orch_result drop_own(orch_result *in, void *context) {
    orch_future *f = own;
    own = NULL;
    orch_drop(f); // the future that this callback is to settle
    record(in, context);
    return token();
}

TEST(then_drops_its_own_future) {
    if (!start()) return;
    own = orch_then(orch_settled(token()), drop_own, drop_own, &seen[0]);
    run();
    CHECK_INT(seen[0].calls, 1);
    if (own) orch_drop(own);
    finish();
}

static orch_result cancel_own(orch_result *in, void *context) {
    orch_cancel(own, 0);
    record(in, context);
    return token();
}

TEST(then_cancels_its_own_future) {
    if (!start()) return;
    own = orch_then(orch_settled(token()), cancel_own, cancel_own, &seen[0]);
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK(orch_is_settled(own));
    orch_drop(own);
    finish();
}

TEST(callbacks_run_in_the_order_they_became_runnable) {
    if (!start()) return;
    orch_promise p, q;
    orch_future *f = orch_future_new(&p), *g = orch_future_new(&q);
    orch_on(f, end, &seen[0]);
    orch_on(g, end, &seen[1]);
    orch_on(orch_settled(orch_ok_int(0)), end, &seen[2]);
    CHECK(orch_settle(q, orch_ok_int(0)));
    CHECK(orch_settle(p, orch_ok_int(0)));
    orch_on(orch_settled(orch_ok_int(0)), end, &seen[3]);
    run();
    CHECK_INT(seen[2].order, 1);
    CHECK_INT(seen[1].order, 2);
    CHECK_INT(seen[0].order, 3);
    CHECK_INT(seen[3].order, 4);
    finish();
}

TEST(after_fulfils_in_order) {
    if (!start()) return;
    uint64_t begun = orch_now();
    orch_on(orch_after(8), end, &seen[0]);
    orch_on(orch_after(2), end, &seen[1]);
    orch_on(orch_after(2), end, &seen[2]);
    orch_on(orch_after(0), end, &seen[3]);
    CHECK_INT(calls, 0);
    run();
    CHECK(orch_now() - begun >= 8);
    CHECK_INT(seen[3].order, 1);
    CHECK_INT(seen[1].order, 2);
    CHECK_INT(seen[2].order, 3);
    CHECK_INT(seen[0].order, 4);
    CHECK_INT(seen[0].error, 0);
    finish();
}

TEST(after_dropped_is_disarmed) {
    if (!start()) return;
    orch_future *f = orch_after(UINT64_MAX), *g = orch_after(3600000);
    CHECK_INT(orch_loop_statistics(loop).timers, 2);
    orch_drop(f);
    orch_cancel(g, 0);
    turns();
    CHECK_INT(orch_loop_statistics(loop).timers, 0);
    check_error(g, ORCH_ECANCELED);
    orch_drop(g);
    finish();
}

// ---- then_with: the context is released exactly once, on every path

static orch_result context_in_use(orch_result *in, void *context) {
    CHECK_INT(*(int *)context, 0); // not released yet
    calls++;
    return in->error ? orch_fail(in->error) : orch_ok_int(1);
}

static orch_future *then_owning(orch_future *f, orch_then_fn on_ok, orch_then_fn on_error) {
    orch_then_desc desc = {on_ok, on_error, lend(), give_back};
    return orch_then_with(f, &desc);
}

TEST(then_with_releases_after_the_callback) {
    if (!start()) return;
    orch_future *f = orch_settled(orch_ok_int(0));
    f = then_owning(f, context_in_use, NULL); // ran
    f = then_owning(f, NULL, context_in_use); // passed over
    f = then_owning(f, NULL, NULL);           // nothing to run
    orch_future *bad = then_owning(orch_settled(orch_fail(3)), NULL, context_in_use); // on_error
    bad = then_owning(bad, context_in_use, NULL);
    CHECK_INT(tokens[0], 0);
    run();
    CHECK_INT(calls, 2);
    for (int i = 0; i < 5; i++) CHECK_INT(tokens[i], 1); // while the futures are still held
    orch_drop(f);
    orch_drop(bad);
    finish();
}

TEST(then_with_releases_when_cancelled_or_dropped) {
    if (!start()) return;
    orch_future *asked = then_owning(begin(&work[0], true), context_in_use, context_in_use);
    orch_cancel(asked, 0);
    orch_drop(then_owning(begin(&work[1], true), context_in_use, context_in_use));
    orch_drop(then_owning(orch_settled(orch_ok_int(0)), context_in_use, context_in_use));
    orch_future *held = begin(&work[2], true);
    orch_drop(then_owning(orch_ref(held), context_in_use, NULL)); // a source that others hold
    turns();
    for (int i = 0; i < 4; i++) CHECK_INT(tokens[i], 1);
    CHECK_INT(work[2].asked, 0);
    orch_drop(asked);
    orch_drop(held);
    finish();
}

// The borrowed context may be used until the source has ended, however late that is.
TEST(then_with_keeps_the_context_while_the_source_lasts) {
    if (!start()) return;
    orch_drop(then_owning(begin(&work[0], false), context_in_use, context_in_use));
    turns();
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(calls, 1); // the hook
    CHECK_INT(tokens[0], 0);
    orch_settle(work[0].promise, orch_fail(ORCH_ECANCELED));
    turns();
    CHECK_INT(calls, 2);
    CHECK_INT(tokens[0], 1);
    finish();
}

TEST(then_with_releases_after_a_chain) {
    if (!start()) return;
    orch_promise p;
    orch_future *inner = orch_future_new(&p);
    seen[0].reply = orch_chain(inner);
    orch_then_desc desc = {.on_ok = reply, .context = &seen[0]}; // no release: borrowed
    orch_future *f = orch_then_with(orch_settled(orch_ok_int(0)), &desc);
    f = then_owning(f, context_in_use, NULL);
    turns();
    CHECK_INT(tokens[0], 0); // its callback waits for the inner one
    orch_settle(p, orch_ok_int(0));
    run();
    CHECK_INT(tokens[0], 1);
    orch_drop(f);
    finish();
}

TEST(then_with_releases_when_the_loop_is_freed) {
    if (!start()) return;
    orch_promise p;
    orch_detach(then_owning(orch_future_new(&p), context_in_use, context_in_use));
    orch_detach(then_owning(orch_after(3600000), context_in_use, context_in_use));
    if (orch_loop_free(loop) != 0) abort();
    CHECK_INT(tokens[0], 1);
    CHECK_INT(tokens[1], 1);
    balance();
}

// ---- cancelling

TEST(cancel_asks_the_hook) {
    if (!start()) return;
    orch_future *f = begin(&work[0], true);
    orch_cancel(f, 77);
    CHECK_INT(work[0].asked, 0); // from the loop, never inside the call
    turns();
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(work[0].reason, 77);
    check_error(f, ORCH_ECANCELED);
    CHECK(!orch_promise_pending(work[0].promise));
    CHECK(!orch_settle(work[0].promise, token()));
    orch_cancel(f, 78);
    orch_drop(f);
    turns();
    CHECK_INT(work[0].asked, 1);
    finish();
}

TEST(cancel_waits_for_a_producer_that_still_settles) {
    if (!start()) return;
    orch_future *f = begin(&work[0], false);
    orch_cancel(f, 0);
    turns();
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(work[0].reason, ORCH_ECANCELED); // what 0 means
    CHECK(!orch_is_settled(f));
    CHECK(orch_promise_pending(work[0].promise));
    orch_cancel(f, 3);
    turns();
    CHECK_INT(work[0].asked, 1);
    CHECK(orch_settle(work[0].promise, token())); // it may still succeed
    check_error(f, 0);
    orch_drop(f);
    finish();
}

TEST(cancel_without_a_hook_settles_at_once) {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_cancel(f, 5);
    check_error(f, ORCH_ECANCELED);
    CHECK(!orch_promise_pending(p));
    CHECK(!orch_settle(p, token()));
    CHECK(!orch_promise_on_cancel(p, on_cancel, &work[0]));
    orch_drop(f);
    finish();
}

TEST(cancel_of_settled_work_does_nothing) {
    if (!start()) return;
    orch_future *f = begin(&work[0], true);
    CHECK(orch_settle(work[0].promise, token()));
    orch_cancel(f, 0);
    turns();
    check_error(f, 0);
    orch_drop(f);
    turns();
    CHECK_INT(work[0].asked, 0);
    finish();
}

// Between the request and the hook the producer is faster.
TEST(cancel_overtaken_by_the_producer) {
    if (!start()) return;
    orch_future *f = begin(&work[0], true);
    orch_cancel(f, 0);
    CHECK(orch_settle(work[0].promise, token()));
    turns();
    check_error(f, 0);
    CHECK_INT(work[0].asked, 0); // its context may be gone
    orch_drop(f);
    finish();
}

TEST(cancel_hook_may_settle) {
    for (int ends = 0; ends < 2; ends++) {
        if (!start()) return;
        orch_future *f = begin(&work[0], ends);
        work[0].settles = true;
        orch_cancel(f, 0);
        turns();
        const orch_result *r = orch_peek(f);
        if (CHECK(r != NULL)) CHECK_INT(r->error, 0), CHECK_INT(orch_int(r), 5);
        orch_drop(f);
        finish();
    }
}

TEST(cancel_hook_may_settle_what_nobody_holds) {
    for (int ends = 0; ends < 2; ends++) {
        if (!start()) return;
        orch_future *f = begin(&work[0], ends);
        work[0].settles = true;
        orch_drop(f);
        turns();
        CHECK_INT(work[0].asked, 1);
        finish(); // where no slot is left
    }
}

// A hook that hands the end of the work to other work: what it returns no longer matters.
TEST(cancel_hook_may_follow) {
    for (int way = 0; way < 4; way++) {
        if (!start()) return;
        orch_future *f = begin(&work[0], way & 1);
        work[0].next = begin(&work[1], false);
        // without memory there is no hook that follows it
        if (!orch_promise_pending(work[0].promise)) orch_drop(work[0].next);
        orch_cancel(f, 0);
        if (way & 2) orch_drop(f);
        turns();
        CHECK_INT(work[0].asked, 1);
        CHECK(orch_settle(work[1].promise, token()));
        turns();
        if (!(way & 2)) check_error(f, 0), orch_drop(f);
        finish();
    }
}

TEST(cancel_reaches_every_holder) {
    if (!start()) return;
    orch_future *f = begin(&work[0], true), *g = orch_ref(f);
    orch_on(orch_ref(f), end, &seen[0]);
    orch_cancel(f, 0); // the caller decides for all
    turns();
    CHECK_INT(work[0].asked, 1);
    check_error(g, ORCH_ECANCELED);
    CHECK_INT(seen[0].error, ORCH_ECANCELED);
    orch_drop(f);
    orch_drop(g);
    finish();
}

TEST(cancel_passes_up_a_chain) {
    if (!start()) return;
    orch_future *f = begin(&work[0], true);
    f = orch_then(f, pass, pass, &seen[0]);
    f = orch_then(f, pass, NULL, &seen[1]);
    f = orch_then(f, pass, pass, &seen[2]);
    orch_cancel(f, 42);
    CHECK_INT(calls, 0);
    turns();
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(work[0].reason, 42);
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, ORCH_ECANCELED);
    CHECK_INT(seen[1].calls, 0);
    CHECK_INT(seen[2].error, ORCH_ECANCELED);
    check_error(f, ORCH_ECANCELED);
    orch_drop(f);
    finish();
}

// on_error runs as with any rejection, and what it returns counts.
TEST(cancel_can_be_recovered_from) {
    if (!start()) return;
    seen[0].reply = token();
    orch_future *f = orch_then(begin(&work[0], true), NULL, reply, &seen[0]);
    orch_cancel(f, 0);
    turns();
    CHECK_INT(seen[0].error, ORCH_ECANCELED);
    check_error(f, 0);
    orch_drop(f);
    finish();
}

TEST(cancel_leaves_a_source_that_others_hold) {
    if (!start()) return;
    orch_future *source = begin(&work[0], true);
    orch_future *f = orch_then(orch_ref(source), pass, pass, &seen[0]);
    orch_cancel(f, 0);
    turns();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, ORCH_ECANCELED);
    check_error(f, ORCH_ECANCELED);
    CHECK_INT(work[0].asked, 0);
    CHECK(!orch_is_settled(source));
    CHECK(orch_settle(work[0].promise, token()));
    turns();
    CHECK_INT(seen[0].calls, 1);
    orch_drop(f);
    orch_drop(source);
    finish();
}

// The source has settled, the callback has not run yet.
TEST(cancel_between_settling_and_the_callback) {
    for (int drop = 0; drop < 2; drop++) {
        if (!start()) return;
        orch_promise p;
        orch_future *f = orch_then(orch_future_new(&p), pass, pass, &seen[0]);
        CHECK(orch_settle(p, token()));
        if (drop) orch_drop(f);
        else orch_cancel(f, 0);
        turns();
        CHECK(seen[0].calls <= 1);
        if (!drop) CHECK(orch_is_settled(f)), orch_drop(f);
        finish();
    }
}

// The callback has run and returned a future: that one is asked.
TEST(cancel_reaches_what_a_callback_returned) {
    for (int drop = 0; drop < 2; drop++) {
        if (!start()) return;
        orch_future *inner = begin(&work[0], true);
        seen[0].reply = orch_chain(inner);
        orch_future *f = orch_then(orch_settled(orch_ok_int(0)), reply, NULL, &seen[0]);
        turns();
        CHECK_INT(seen[0].calls, 1);
        if (drop) orch_drop(f);
        else orch_cancel(f, 9);
        turns();
        CHECK_INT(work[0].asked, 1);
        if (!drop) CHECK_INT(work[0].reason, 9), check_error(f, ORCH_ECANCELED), orch_drop(f);
        finish();
    }
}

static orch_result recover(orch_result *in, void *context) {
    record(in, &seen[0]);
    return orch_chain(begin(context, false));
}

// A callback that answers to being cancelled with new work: that is asked as well, and how it ends
// is nobody's unhandled rejection.
TEST(cancel_is_passed_on_to_new_work) {
    for (int shared = 0; shared < 2; shared++) {
        if (!start()) return;
        orch_future *f = orch_then(begin(&work[0], true), recover, recover, &work[1]);
        orch_future *held = shared ? orch_ref(f) : NULL;
        orch_cancel(f, 7);
        turns();
        CHECK_INT(work[0].asked, 1);
        CHECK_INT(seen[0].error, ORCH_ECANCELED);
        CHECK_INT(work[1].asked, 1);
        CHECK(!orch_is_settled(f));
        orch_detach(f);
        CHECK(orch_settle(work[1].promise, orch_fail(9)));
        turns();
        if (held) check_error(held, 9);
        orch_drop(held);
        CHECK_INT(unhandled, 0);
        finish();
    }
}

// The same when the producer itself follows new work after it was asked.
TEST(cancel_is_passed_on_to_what_is_followed) {
    for (int shared = 0; shared < 2; shared++) {
        if (!start()) return;
        orch_future *f = begin(&work[0], false), *held = shared ? orch_ref(f) : NULL;
        orch_cancel(f, 7);
        turns();
        CHECK_INT(work[0].asked, 1);
        CHECK(orch_follow(work[0].promise, begin(&work[1], true)));
        turns();
        CHECK_INT(work[1].asked, 1);
        check_error(f, ORCH_ECANCELED);
        orch_drop(f);
        orch_drop(held);
        finish();
    }
}

TEST(drop_cancels) {
    if (!start()) return;
    orch_drop(NULL);
    orch_detach(NULL);
    orch_drop(begin(&work[0], true));
    CHECK_INT(work[0].asked, 0);
    turns();
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(work[0].reason, ORCH_ECANCELED);
    CHECK(!orch_settle(work[0].promise, token()));
    orch_drop(begin(&work[1], false));
    turns();
    CHECK_INT(work[1].asked, 1);
    CHECK_INT(in_use(), 1); // until the producer has settled
    orch_settle(work[1].promise, token());
    turns();
    CHECK_INT(in_use(), 0);
    finish();
}

TEST(drop_of_one_of_two_does_not_cancel) {
    if (!start()) return;
    orch_future *f = begin(&work[0], true);
    orch_drop(orch_ref(f));
    turns();
    CHECK_INT(work[0].asked, 0);
    CHECK(orch_promise_pending(work[0].promise));
    orch_drop(f);
    turns();
    CHECK_INT(work[0].asked, 1);
    finish();
}

// Work that one holder let run goes on, whatever the others do.
TEST(drop_after_detach_does_not_cancel) {
    if (!start()) return;
    orch_future *f = begin(&work[0], true);
    orch_detach(orch_ref(f));
    orch_drop(f);
    f = begin(&work[1], true);
    orch_drop(orch_ref(f));
    orch_detach(f);
    turns();
    for (int i = 0; i < 2; i++) {
        CHECK_INT(work[i].asked, 0);
        CHECK(orch_settle(work[i].promise, token()));
    }
    finish();
}

TEST(drop_passes_up_a_chain) {
    if (!start()) return;
    orch_future *f = begin(&work[0], true);
    for (int i = 0; i < 3; i++) f = orch_then(f, pass, pass, &seen[i]);
    orch_drop(f);
    turns();
    CHECK_INT(work[0].asked, 1);
    for (int i = 0; i < 3; i++) CHECK_INT(seen[i].error, ORCH_ECANCELED);
    CHECK_INT(unhandled, 0);
    finish();
}

static orch_result drop_in_task(void *arg) {
    orch_drop(arg); // returns once the work has ended
    CHECK_INT(work[0].asked, 1);
    CHECK(!orch_promise_pending(work[0].promise));
    return orch_ok_int(0);
}

static void settle_work(orch_result *in, void *context) {
    struct work *w = context;
    (void)in;
    CHECK(orch_settle(w->promise, token()));
}

TEST(drop_inside_a_task_waits_for_the_end) {
    for (int ends = 0; ends < 2; ends++) {
        if (!start()) return;
        orch_future *f = begin(&work[0], ends);
        if (!ends) orch_on(orch_after(2), settle_work, &work[0]);
        orch_on(orch_go(drop_in_task, f), end, &seen[0]);
        run();
        CHECK_INT(seen[0].calls, 1);
        CHECK_INT(seen[0].error, 0);
        if (seen[0].error) orch_drop(f); // the task did not start: it borrowed its argument
        finish();
    }
}

TEST(detach_lets_work_run) {
    if (!start()) return;
    orch_detach(begin(&work[0], true));
    turns();
    CHECK_INT(work[0].asked, 0);
    CHECK(orch_settle(work[0].promise, token()));
    turns();
    CHECK_INT(tokens[0], 1);
    orch_detach(orch_then(begin(&work[1], true), pass, pass, &seen[0]));
    turns();
    CHECK(orch_settle(work[1].promise, token()));
    turns();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    orch_detach(orch_settled(token()));
    CHECK_INT(work[1].asked, 0);
    CHECK_INT(unhandled, 0);
    finish();
}

// Hooks run from the loop: one that drops the next is no recursion.
enum { HOOKS = 100000 };
static struct work *hooked;

TEST(drop_from_hooks_uses_no_stack) {
    small_stack();
    size_t n = many(HOOKS);
    hooked = calloc(n, sizeof *hooked);
    if (!CHECK(hooked != NULL)) return;
    if (!start()) {
        free(hooked);
        return;
    }
    orch_future *next = NULL;
    for (size_t i = 0; i < n; i++) {
        hooked[i].victim = next;
        next = begin(&hooked[i], true);
        // without memory there is no hook to drop it
        if (!orch_promise_pending(hooked[i].promise)) orch_drop(hooked[i].victim);
    }
    orch_drop(next);
    run();
    CHECK_INT(hooked[0].asked, 1);
    CHECK_INT(calls, n);
    finish();
    free(hooked);
}

// ---- unhandled rejections

TEST(unhandled_is_reported_once) {
    if (!start()) return;
    orch_promise p;
    orch_detach(orch_future_new(&p));
    CHECK(orch_settle(p, orch_failf(31, "nobody looked"))); // detached first
    turns();
    CHECK_INT(unhandled, 1);
    CHECK_INT(unhandled_error, 31);
    CHECK_STR(unhandled_message, "nobody looked");
    orch_detach(orch_settled(orch_failf(32, "nor here"))); // settled first
    turns();
    CHECK_INT(unhandled, 2);
    CHECK_INT(unhandled_error, 32);
    orch_detach(orch_then(orch_settled(orch_fail(33)), pass, NULL, &seen[0])); // passed on
    turns();
    CHECK_INT(unhandled, 3);
    CHECK_INT(unhandled_error, 33);
    orch_detach(orch_then(orch_settled(orch_fail(34)), pass, pass, &seen[0])); // returned again
    turns();
    CHECK_INT(unhandled, 4);
    finish();
}

static orch_result fail_in_task(void *arg) {
    (void)arg;
    return orch_fail(41);
}

TEST(unhandled_from_a_spawned_task) {
    if (!start()) return;
    CHECK_INT(orch_spawn(fail_in_task, NULL), 0);
    turns();
    CHECK_INT(unhandled, 1);
    CHECK_INT(unhandled_error, 41);
    finish();
}

TEST(unhandled_is_not_for_what_was_seen_or_given_up) {
    if (!start()) return;
    orch_promise p, q;
    orch_drop(orch_settled(orch_fail(1)));                                     // dropped
    orch_detach(orch_then(orch_settled(orch_fail(2)), NULL, reply, &seen[0])); // handled
    orch_on(orch_settled(orch_fail(3)), end, &seen[1]);                        // seen
    orch_detach(orch_settled(token()));                                        // fulfilled
    orch_future *f = begin(&work[0], true); // cancelled, then let go
    orch_cancel(f, 0);
    orch_detach(f);
    f = begin(&work[1], false); // cancelled, and it ends with an error of its own
    orch_cancel(f, 0);
    orch_detach(f);
    turns();
    orch_settle(work[1].promise, orch_fail(4));
    f = orch_future_new(&p); // let go by one of two holders
    orch_detach(orch_ref(f));
    CHECK(orch_settle(p, orch_fail(5)));
    turns();
    check_error(f, 5);
    orch_drop(f);
    f = orch_future_new(&q); // followed: whoever follows answers for it
    orch_promise r;
    orch_future *g = orch_future_new(&r);
    CHECK(orch_follow(r, f));
    CHECK(orch_settle(q, orch_fail(6)));
    turns();
    orch_drop(g);
    turns();
    CHECK_INT(unhandled, 0);
    finish();
}

TEST(unhandled_goes_to_stderr_by_default) {
    loop = orch_loop_new(NULL);
    FILE *file = tmpfile();
    int before = dup(2);
    if (!CHECK(loop != NULL && file != NULL && before >= 0)) {
        if (file) fclose(file);
        if (before >= 0) close(before);
        if (loop) orch_loop_free(loop);
        return;
    }
    dup2(fileno(file), 2);
    orch_detach(orch_settled(orch_failf(35, "on a line of its own")));
    turns();
    dup2(before, 2);
    close(before);
    char text[512] = "";
    rewind(file);
    size_t size = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[size] = '\0';
    CHECK(strstr(text, "on a line of its own") != NULL);
    CHECK(size > 0 && strchr(text, '\n') == text + size - 1); // one line
    if (orch_loop_free(loop) != 0) abort();
}

// ---- sharing

TEST(ref_shares_one_value) {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    CHECK(orch_ref(f) == f);
    orch_future *extra = f;
    seen[0].take = true;
    orch_on(orch_ref(f), end, &seen[0]);
    orch_future *t = orch_then(orch_ref(f), pass, pass, &seen[1]);
    orch_on(orch_ref(f), end, &seen[2]);
    CHECK(orch_settle(p, token()));
    run();
    for (int i = 0; i < 3; i++) CHECK(seen[i].value == &tokens[0]);
    CHECK(seen[0].taken == NULL); // shared: it stays where it is
    const orch_result *r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[0]);
    orch_drop(f);
    CHECK_INT(tokens[0], 0);
    orch_drop(extra);
    CHECK_INT(tokens[0], 0); // t has it still
    orch_drop(t);
    CHECK_INT(tokens[0], 1);
    finish();
}

TEST(ref_of_a_rejection_shares_its_message) {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    for (int i = 0; i < 3; i++) orch_on(orch_ref(f), end, &seen[i]);
    CHECK(orch_settle(p, orch_failf(19, "for all")));
    run();
    for (int i = 0; i < 3; i++) {
        CHECK_INT(seen[i].error, 19);
        CHECK_STR(seen[i].message, "for all");
    }
    orch_drop(f);
    finish();
}

// A consumer that comes after the value was settled and shared sees it as well.
TEST(ref_after_settling) {
    if (!start()) return;
    orch_future *f = orch_settled(token());
    for (int i = 0; i < 4; i++) orch_on(orch_ref(f), end, &seen[i]);
    run();
    for (int i = 0; i < 4; i++) CHECK(seen[i].value == &tokens[0]);
    CHECK_INT(tokens[0], 0);
    orch_drop(f);
    CHECK_INT(tokens[0], 1);
    finish();
}

static orch_result share_in_task(void *arg) {
    orch_result r = orch_await(arg);
    CHECK_INT(r.error, 0);
    CHECK(r.value == &tokens[0]);
    CHECK(orch_take(&r) == NULL);
    orch_yield(); // the other holders end meanwhile: the share keeps the value
    orch_yield();
    CHECK_INT(tokens[0], 0);
    orch_result_free(&r);
    orch_result_free(&r);
    return orch_ok_int(0);
}

TEST(ref_awaited_outlives_the_other_holders) {
    if (!start()) return;
    orch_future *f = orch_settled(token());
    orch_future *t = orch_go(share_in_task, orch_ref(f));
    orch_drop(f);
    run();
    CHECK(orch_is_settled(t));
    const orch_result *r = orch_peek(t);
    if (r && r->error) orch_drop(f); // the task did not start
    orch_drop(t);
    CHECK_INT(tokens[0], 1);
    finish();
}

static orch_result give_lent_away(void *arg) {
    orch_result r = orch_wait(arg);
    CHECK(r.value == &tokens[0]);
    CHECK(orch_take(&r) == NULL); // lent
    orch_result_free(&r);
    orch_result_free(&r); // which does nothing
    CHECK_INT(tokens[0], 0);
    r = orch_wait(arg);
    CHECK(orch_settle(work[0].promise, r)); // a share from now on
    return orch_wait(arg);                  // and another
}

TEST(ref_lent_and_given_away) {
    if (!start()) return;
    orch_future *f = orch_settled(token()), *g = begin(&work[0], true);
    orch_future *t = orch_go(give_lent_away, f);
    run();
    orch_drop(f);
    CHECK_INT(tokens[0], 0);
    const orch_result *r = orch_peek(g);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[0]);
    orch_drop(g);
    CHECK_INT(tokens[0], 0);
    r = orch_peek(t);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[0]);
    orch_drop(t);
    CHECK_INT(tokens[0], 1);
    finish();
}

TEST(ref_10000_holders) {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    size_t n = many(10000);
    for (size_t i = 0; i < n; i++) orch_on(orch_ref(f), end, &seen[0]);
    for (size_t i = 0; i < n; i++) orch_drop(orch_then(orch_ref(f), pass, NULL, &seen[1]));
    CHECK(orch_settle(p, token()));
    run();
    CHECK_INT(seen[0].calls, n);
    CHECK_INT(tokens[0], 0);
    orch_drop(f);
    CHECK_INT(tokens[0], 1);
    finish();
}

// ---- the loop's end

TEST(loop_free_refuses_while_futures_are_held) {
    if (!start()) return;
    orch_future *f = begin(&work[0], true);
    bool pending = orch_promise_pending(work[0].promise);
    orch_detach(orch_then(begin(&work[1], true), pass, pass, &seen[0]));
    int error = orch_loop_free(loop);
    CHECK_INT(error, ORCH_EBUSY);
    if (error == 0) { // in a sweep, when there was no memory for it
        if (pending) abort();
        return;
    }
    CHECK_INT(work[0].asked, 1); // it cancelled everything all the same
    CHECK_INT(work[1].asked, 1);
    CHECK_INT(seen[0].error, ORCH_ECANCELED);
    check_error(f, ORCH_ECANCELED);
    orch_drop(f);
    finish();
}

TEST(loop_free_refuses_while_a_producer_has_to_settle) {
    if (!start()) return;
    orch_detach(begin(&work[0], false));
    bool pending = orch_promise_pending(work[0].promise);
    int error = orch_loop_free(loop);
    CHECK_INT(error, ORCH_EBUSY);
    if (error == 0) {
        if (pending) abort();
        return;
    }
    CHECK_INT(work[0].asked, 1);
    CHECK(orch_settle(work[0].promise, token()));
    finish();
}

// ---- depth

static orch_result add_one(orch_result *in, void *context) {
    (void)context;
    return orch_ok_int(orch_int(in) + 1);
}

TEST(deep_1000000_thens) {
    small_stack();
    if (!start()) return;
    size_t n = many(1000000);
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    for (size_t i = 0; i < n; i++) f = orch_then(f, add_one, NULL, NULL);
    orch_on(f, end, &seen[0]);
    CHECK(orch_settle(p, orch_ok_int(0)));
    run();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].number, n);
    finish();
}

TEST(deep_1000000_thens_pass_an_error) {
    small_stack();
    if (!start()) return;
    size_t n = many(1000000);
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    for (size_t i = 0; i < n; i++) f = orch_then(f, i % 2 ? add_one : NULL, NULL, NULL);
    orch_on(f, end, &seen[0]);
    CHECK(orch_settle(p, orch_failf(55, "from the depth")));
    run();
    CHECK_INT(seen[0].error, 55);
    CHECK_STR(seen[0].message, "from the depth");
    finish();
}

TEST(deep_1000000_thens_dropped) {
    small_stack();
    if (!start()) return;
    size_t n = many(1000000);
    orch_future *f = begin(&work[0], true);
    f = orch_then(f, NULL, pass, &seen[0]);
    for (size_t i = 0; i < n; i++) f = orch_then(f, add_one, NULL, NULL);
    orch_drop(f);
    run();
    CHECK_INT(work[0].asked, 1);
    CHECK_INT(seen[0].error, ORCH_ECANCELED);
    finish();
}

static orch_future *node[DEEP + 1], *holder[DEEP + 1];
static orch_promise adopts[DEEP + 1];

enum { DOWN = 1, SHARED = 2, EARLY = 4, CANCEL = 8, ADOPTION_WAYS = 16 };

// node[0] follows node[1] follows node[2]...: built from either end, with or without other holders,
// and with its end settled first or last, or cancelled from the front.
static void adoption(int way, size_t n) {
    if (!start()) return;
    for (size_t i = 0; i <= n; i++) {
        node[i] = i < n ? orch_future_new(&adopts[i]) : begin(&work[0], true);
        holder[i] = way & SHARED ? orch_ref(node[i]) : NULL;
    }
    if (way & EARLY) CHECK(orch_settle(work[0].promise, token()));
    for (size_t k = 0; k < n; k++) {
        size_t i = way & DOWN ? n - 1 - k : k;
        CHECK(orch_follow(adopts[i], node[i + 1]));
    }
    if (way & CANCEL) orch_cancel(node[0], 0);
    turns();
    if (!(way & (EARLY | CANCEL))) CHECK(orch_settle(work[0].promise, token()));
    orch_on(node[0], end, &seen[0]);
    turns();
    CHECK_INT(seen[0].calls, 1);
    // settled and cancelled at the same time: either may win
    if ((way & (EARLY | CANCEL)) != (EARLY | CANCEL))
        CHECK_INT(seen[0].error, way & CANCEL ? ORCH_ECANCELED : 0);
    if (!(way & CANCEL)) CHECK(seen[0].value == &tokens[0]);
    if (way & CANCEL && !(way & EARLY)) CHECK_INT(work[0].asked, way & SHARED ? 0 : 1);
    for (size_t i = 1; i <= n && way & SHARED && !(way & CANCEL); i++) {
        const orch_result *r = orch_peek(holder[i]);
        if (!CHECK(r != NULL && r->value == &tokens[0])) break;
    }
    for (size_t i = 0; i <= n; i++) orch_drop(holder[i]);
    finish();
}

TEST(deep_adoption_of_exclusive_futures) {
    small_stack();
    for (int way = 0; way < ADOPTION_WAYS; way++)
        if (!(way & SHARED)) adoption(way, many(DEEP));
}

TEST(deep_adoption_of_shared_futures) {
    small_stack();
    for (int way = 0; way < ADOPTION_WAYS; way++)
        if (way & SHARED) adoption(way, many(way & DOWN ? DEEP / 10 : DEEP));
}

TEST(deep_adoption_of_shared_futures_from_the_end) {
    small_stack();
    adoption(SHARED | DOWN, many(DEEP));
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__OPTIMIZE__)
enum { STEPS = 1000000 };
#else
enum { STEPS = 10000000 };
#endif

static size_t step, steps, most;

static void watch_memory(void) {
    if (++step % 10000 == 0 && in_use() > most) most = in_use();
}

static orch_result again(orch_result *in, void *context) {
    (void)in;
    watch_memory();
    if (step >= steps) return orch_ok_int(77);
    return orch_chain(orch_then(orch_settled(orch_ok_int(0)), again, NULL, context));
}

// An endless loop of callbacks, each of which returns the next: promises adopt promises adopt...
TEST(deep_endless_loop_of_callbacks_in_flat_memory) {
    small_stack();
    step = most = 0, steps = many(STEPS);
    for (int shared = 0; shared < 2; shared++) {
        if (!start()) return;
        step = 0;
        orch_future *f = orch_then(orch_settled(orch_ok_int(0)), again, NULL, NULL);
        orch_future *held = shared ? orch_ref(f) : NULL;
        orch_on(f, end, &seen[0]);
        run();
        CHECK_INT(seen[0].number, 77);
        CHECK(most < 100);
        orch_drop(held);
        finish();
    }
}

// The same by tickets: each future follows the next while none is settled.
TEST(deep_endless_loop_of_follows_in_flat_memory) {
    small_stack();
    step = most = 0, steps = many(STEPS);
    if (!start()) return;
    orch_promise p, next;
    orch_future *f = orch_future_new(&p);
    while (step < steps) {
        if (!orch_follow(p, orch_future_new(&next))) break; // no memory
        p = next;
        if (step % 100 == 0) turns();
        watch_memory();
    }
    CHECK(most < 1000);
    CHECK(orch_settle(p, orch_ok_int(78)));
    orch_on(f, end, &seen[0]);
    run();
    CHECK_INT(seen[0].number, 78);
    finish();
}

static orch_result yield_once(void *arg) {
    (void)arg;
    orch_yield();
    return orch_ok_int(0);
}

static orch_result again_after_task(orch_result *in, void *context) {
    (void)in;
    watch_memory();
    if (step >= steps) return orch_ok_int(80);
    return orch_chain(orch_then(orch_go(yield_once, NULL), again_after_task, NULL, context));
}

// Tasks and callbacks in turn, as a server's main loop might.
TEST(deep_endless_loop_of_tasks_and_callbacks) {
    small_stack();
    step = most = 0, steps = many(100000);
    if (!start()) return;
    orch_future *f = orch_then(orch_settled(orch_ok_int(0)), again_after_task, NULL, NULL);
    orch_on(f, end, &seen[0]);
    run();
    CHECK_INT(seen[0].number, 80);
    CHECK(most < 100);
    finish();
}

static void release_future(void *value) { orch_drop(value); }

static orch_future *nested(size_t n) {
    orch_future *f = orch_settled(token());
    for (size_t i = 0; i < n; i++) f = orch_settled(orch_ok(f, release_future));
    return f;
}

static orch_result free_in_task(void *arg) {
    orch_result r = orch_await(arg);
    orch_result_free(&r);
    CHECK_INT(tokens[0], 1);
    return orch_ok_int(0);
}

// A value that owns a value that owns a value...
TEST(deep_values_are_freed_without_recursion) {
    small_stack();
    if (!start()) return;
    orch_drop(nested(many(100000)));
    turns();
    CHECK_INT(tokens[0], 1);
    finish();
    if (!start()) return;
    orch_promise p;
    orch_drop(orch_future_new(&p));
    CHECK(!orch_settle(p, orch_ok(nested(many(100000)), release_future))); // freed by settle
    turns();
    CHECK_INT(tokens[0], 1);
    finish();
    if (!start()) return;
    orch_future *f = nested(many(100000));
    orch_on(orch_go(free_in_task, f), end, &seen[0]); // on the stack of a task
    run();
    if (seen[0].error) orch_drop(f); // the task did not start
    finish();
}

// Shares that own shares: each result of a then is a share of a future that others hold.
TEST(deep_shares_are_freed_without_recursion) {
    small_stack();
    if (!start()) return;
    orch_future *f = orch_settled(token());
    size_t n = many(100000);
    for (size_t i = 0; i < n; i++) {
        orch_future *g = orch_then(orch_ref(f), pass, pass, &seen[0]);
        if (i % 100 == 0) run();
        orch_drop(f);
        f = g;
    }
    run();
    CHECK_INT(tokens[0], 0);
    const orch_result *r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK(r->value == &tokens[0]);
    orch_drop(f);
    turns();
    CHECK_INT(tokens[0], 1);
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
static bool exhaust(void) {
    orch_promise p;
    deny = true;
    for (spares = 0; spares < SPARE; spares++) {
        spare[spares] = orch_future_new(&p);
        if (orch_is_settled(spare[spares])) break;
    }
    return CHECK(spares < SPARE);
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

TEST(no_memory_for_a_future) {
    if (!start_denying()) return;
    exhaust();
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    check_error(f, ORCH_ENOMEM);
    CHECK(!orch_promise_pending(p));
    CHECK(!orch_settle(p, token()));
    CHECK(!orch_follow(p, orch_settled(token())));
    CHECK(!orch_promise_on_cancel(p, on_cancel, &work[0]));
    CHECK(!orch_settle(orch_promise_unbox(orch_promise_box(p)), token()));
    orch_future *g = orch_settled(token()); // consumes what it got
    check_error(g, ORCH_ENOMEM);
    CHECK_INT(tokens[issued - 1], 1);
    orch_future *h = orch_after(1);
    check_error(h, ORCH_ENOMEM);
    for (int i = 0; i < 100; i++) { // a rejected future without end
        orch_future *one = orch_ref(f);
        CHECK(one == f);
        orch_cancel(one, 0);
        orch_drop(one);
    }
    check_error(f, ORCH_ENOMEM);
    orch_drop(f), orch_drop(g), orch_drop(h);
    CHECK_INT(unhandled, 0);
    replenish();
    f = orch_settled(token()); // and all is well again
    check_error(f, 0);
    orch_drop(f);
    finish();
}

// There is a slot for it, but no room among the timers.
TEST(no_memory_for_a_timer) {
    if (!start_denying()) return;
    orch_future *f = orch_settled(token());
    deny = true;
    orch_future *g = orch_after(3600000);
    check_error(g, ORCH_ENOMEM);
    CHECK_INT(in_use(), 1);
    orch_drop(g);
    orch_drop(f);
    deny = false;
    finish();
}

TEST(no_memory_for_then) {
    if (!start_denying()) return;
    orch_future *exclusive = begin(&work[0], true), *shared = begin(&work[1], true);
    exhaust();
    orch_future *f = then_owning(exclusive, context_in_use, context_in_use);
    orch_future *g = then_owning(orch_ref(shared), context_in_use, context_in_use);
    check_error(g, ORCH_ENOMEM);
    CHECK_INT(tokens[1], 1);
    orch_future *h = orch_then(orch_ref(shared), pass, pass, &seen[0]);
    check_error(h, ORCH_ENOMEM);
    orch_drop(h);
    h = orch_finally(orch_ref(shared), count_call, &calls);
    check_error(h, ORCH_ENOMEM);
    orch_drop(h);
    const orch_result *r = orch_peek(f);
    if (r) CHECK_INT(r->error, ORCH_ENOMEM), CHECK_INT(tokens[0], 1);
    orch_drop(f);
    orch_drop(g);
    turns();
    CHECK_INT(work[0].asked, 1); // it was consumed and so cancelled
    CHECK_INT(work[1].asked, 0);
    CHECK_INT(tokens[0], 1);
    orch_drop(shared);
    replenish();
    CHECK_INT(work[1].asked, 1);
    finish();
}

TEST(no_memory_for_on) {
    if (!start_denying()) return;
    orch_promise p, q;
    orch_future *exclusive = orch_future_new(&p), *shared = orch_future_new(&q);
    exhaust();
    orch_on(exclusive, end, &seen[0]); // needs none
    CHECK_INT(seen[0].calls, 0);
    orch_on(orch_ref(shared), end, &seen[1]);
    CHECK_INT(seen[1].calls, 1); // from this call
    CHECK_INT(seen[1].error, ORCH_ENOMEM);
    CHECK(orch_settle(p, token()));
    CHECK(orch_settle(q, token()));
    turns();
    CHECK_INT(seen[0].calls, 1);
    CHECK_INT(seen[0].error, 0);
    CHECK_INT(seen[1].calls, 1);
    orch_drop(shared);
    replenish();
    finish();
}

// What was promised when there was memory is kept without: settling, calling back, following.
TEST(no_memory_is_needed_to_settle) {
    if (!start_denying()) return;
    enum { N = 1000 };
    static orch_promise p[N], q[N];
    orch_future *inner[N];
    for (int i = 0; i < N; i++) {
        orch_on(orch_then(orch_future_new(&p[i]), pass, pass, &seen[0]), end, &seen[1]);
        inner[i] = orch_future_new(&q[i]);
    }
    exhaust();
    for (int i = 0; i < N; i++) CHECK(orch_follow(p[i], inner[i]));
    for (int i = 0; i < N; i++) CHECK(orch_settle(q[i], token()));
    turns();
    CHECK_INT(seen[0].calls, N);
    CHECK_INT(seen[1].calls, N);
    CHECK_INT(seen[1].error, 0);
    replenish();
    finish();
}

TEST(no_memory_is_passed_on) {
    if (!start_denying()) return;
    orch_promise p, q;
    orch_future *f = orch_future_new(&p), *g = orch_future_new(&q);
    exhaust();
    CHECK(orch_follow(p, orch_settled(token())));
    CHECK(orch_settle(q, orch_chain(orch_settled(token()))));
    turns();
    check_error(f, ORCH_ENOMEM);
    check_error(g, ORCH_ENOMEM);
    orch_drop(f);
    orch_drop(g);
    replenish();
    finish();
}

// ---- misuse
//
// A debug build dies with the name of the function; a release build gives the documented error, and
// what was handed over is released.

static void *settle_in_thread(void *arg) {
    orch_promise *p = arg;
    CHECK(!orch_settle(*p, token()));
    return NULL;
}

static void *settle_in_loop_thread(void *arg) {
    orch_loop *mine = orch_loop_new(NULL);
    settle_in_thread(arg);
    if (mine) orch_loop_free(mine);
    return NULL;
}

static void in_thread(void *(*fn)(void *), void *arg) {
    pthread_t thread;
    if (CHECK_INT(pthread_create(&thread, NULL, fn, arg), 0)) pthread_join(thread, NULL);
}

#ifndef NDEBUG

#define NULL_DIES(name, call)                                                                      \
    TEST_DIES(misuse_null_##name, "asyncorch: " #name) {                                           \
        if (!start()) return;                                                                      \
        call;                                                                                      \
    }

NULL_DIES(orch_then, orch_drop(orch_then(NULL, NULL, NULL, NULL)))
NULL_DIES(orch_then_with, orch_drop(then_owning(NULL, NULL, NULL)))
NULL_DIES(orch_on, orch_on(NULL, end, &seen[0]))
NULL_DIES(orch_finally, orch_drop(orch_finally(NULL, count_call, &calls)))
NULL_DIES(orch_ref, orch_drop(orch_ref(NULL)))
NULL_DIES(orch_cancel, orch_cancel(NULL, 0))
NULL_DIES(orch_is_settled, (void)orch_is_settled(NULL))
NULL_DIES(orch_peek, (void)orch_peek(NULL))

TEST_DIES(misuse_no_callback_orch_on, "asyncorch: orch_on") {
    if (!start()) return;
    orch_on(orch_settled(token()), NULL, NULL);
}

TEST_DIES(misuse_no_callback_orch_finally, "asyncorch: orch_finally") {
    if (!start()) return;
    orch_drop(orch_finally(orch_settled(token()), NULL, NULL));
}

TEST_DIES(misuse_no_callback_orch_promise_on_cancel, "asyncorch: orch_promise_on_cancel") {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_promise_on_cancel(p, NULL, NULL);
    orch_drop(f);
}

TEST_DIES(misuse_no_desc_orch_then_with, "asyncorch: orch_then_with") {
    if (!start()) return;
    orch_drop(orch_then_with(orch_settled(token()), NULL));
}

TEST_DIES(misuse_null_orch_follow, "asyncorch: orch_follow") {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_follow(p, NULL);
    orch_drop(f);
}

#define CONSUMED_DIES(name, call)                                                                  \
    TEST_DIES(misuse_consumed_##name, "asyncorch: " #name) {                                       \
        if (!start()) return;                                                                      \
        orch_promise p, q;                                                                         \
        orch_future *f = orch_future_new(&p), *g = orch_future_new(&q);                            \
        orch_on(f, end, &seen[0]); /* pending, and given away */                                   \
        call;                                                                                      \
        orch_drop(g);                                                                              \
    }                                                                                              \
    TEST_DIES(misuse_freed_##name, "asyncorch: " #name) {                                          \
        if (!start()) return;                                                                      \
        orch_promise q;                                                                            \
        orch_future *f = orch_settled(token()), *g = orch_future_new(&q);                          \
        orch_drop(f); /* in quarantine */                                                          \
        call;                                                                                      \
        orch_drop(g);                                                                              \
    }

CONSUMED_DIES(orch_then, orch_drop(orch_then(f, NULL, NULL, NULL)))
CONSUMED_DIES(orch_then_with, orch_drop(then_owning(f, NULL, NULL)))
CONSUMED_DIES(orch_on, orch_on(f, end, &seen[1]))
CONSUMED_DIES(orch_finally, orch_drop(orch_finally(f, count_call, &calls)))
CONSUMED_DIES(orch_ref, orch_drop(orch_ref(f)))
CONSUMED_DIES(orch_drop, orch_drop(f))
CONSUMED_DIES(orch_detach, orch_detach(f))
CONSUMED_DIES(orch_cancel, orch_cancel(f, 0))
CONSUMED_DIES(orch_is_settled, (void)orch_is_settled(f))
CONSUMED_DIES(orch_peek, (void)orch_peek(f))
CONSUMED_DIES(orch_follow, orch_follow(q, f))

TEST_DIES(misuse_box_twice, "asyncorch: orch_promise_box") {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    void *one = orch_promise_box(p), *two = orch_promise_box(p);
    orch_promise_unbox(one);
    orch_promise_unbox(two);
    orch_drop(f);
}

TEST_DIES(misuse_null_orch_future_new, "asyncorch: orch_future_new") {
    if (!start()) return;
    orch_drop(orch_future_new(NULL));
}

TEST_DIES(misuse_future_without_a_loop, "asyncorch: orch_future_new") {
    orch_promise p;
    orch_drop(orch_future_new(&p));
}

TEST_DIES(misuse_settled_without_a_loop, "asyncorch: orch_settled") {
    orch_drop(orch_settled(token()));
}

TEST_DIES(misuse_await_outside_a_task, "asyncorch: orch_await") {
    if (!start()) return;
    orch_result r = orch_await(orch_settled(token()));
    orch_result_free(&r);
}

static void await_in_callback(orch_result *in, void *context) {
    (void)in;
    orch_result r = orch_await(context);
    orch_result_free(&r);
}

TEST_DIES(misuse_await_in_a_callback, "asyncorch: orch_await") {
    if (!start()) return;
    orch_future *f = orch_settled(token());
    orch_on(orch_settled(orch_ok_int(0)), await_in_callback, f);
    run();
}

TEST_DIES(misuse_settle_from_another_thread, "asyncorch: orch_settle") {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    in_thread(settle_in_thread, &p);
    orch_drop(f);
}

TEST_DIES(misuse_settle_from_another_loop, "asyncorch: orch_settle") {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    in_thread(settle_in_loop_thread, &p);
    orch_drop(f);
}

#else

// The mistaken input reads as one that was rejected.
static void check_misused(orch_future *f, int error) {
    turns();
    if (CHECK(f != NULL)) check_error(f, error);
    orch_drop(f);
}

TEST(misuse_null) {
    if (!start()) return;
    check_misused(orch_then(NULL, pass, pass, &seen[0]), ORCH_EINVAL);
    check_misused(then_owning(NULL, context_in_use, context_in_use), ORCH_EINVAL);
    CHECK_INT(tokens[0], 1);
    check_misused(orch_finally(NULL, count_call, &calls), ORCH_EINVAL);
    check_misused(orch_ref(NULL), ORCH_EINVAL);
    check_misused(orch_future_new(NULL), ORCH_EINVAL);
    orch_on(NULL, end, &seen[1]);
    turns();
    CHECK_INT(seen[1].calls, 1);
    CHECK_INT(seen[1].error, ORCH_EINVAL);
    orch_cancel(NULL, 0);
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_follow(p, NULL);
    orch_drop(f);
    finish();
}

// Nothing to call: what was handed over is released all the same.
TEST(misuse_no_callback) {
    if (!start()) return;
    orch_on(orch_settled(token()), NULL, NULL);
    orch_on(begin(&work[0], true), NULL, NULL);
    settle_work(NULL, &work[0]);
    orch_drop(orch_finally(orch_settled(token()), NULL, NULL));
    orch_drop(orch_then_with(orch_settled(token()), NULL));
    orch_future *f = orch_finally(orch_settled(token()), NULL, NULL);
    turns();
    CHECK(orch_is_settled(f));
    orch_drop(f);
    orch_promise p;
    f = orch_future_new(&p);
    CHECK(!orch_promise_on_cancel(p, NULL, NULL));
    orch_drop(f);
    finish();
}

TEST(misuse_consumed_while_pending) {
    if (!start()) return;
    orch_promise p, q;
    orch_future *f = orch_future_new(&p), *g = orch_future_new(&q);
    orch_on(f, end, &seen[0]);
    check_misused(orch_then(f, pass, pass, &seen[1]), ORCH_ECONSUMED);
    check_misused(then_owning(f, context_in_use, context_in_use), ORCH_ECONSUMED);
    CHECK_INT(tokens[0], 1);
    check_misused(orch_finally(f, count_call, &calls), ORCH_ECONSUMED);
    orch_on(f, end, &seen[2]);
    orch_drop(f);
    orch_detach(f);
    orch_follow(q, f);
    turns();
    CHECK_INT(seen[2].calls, 1);
    CHECK_INT(seen[2].error, ORCH_ECONSUMED);
    CHECK_INT(seen[0].calls, 0);
    CHECK(orch_settle(p, orch_ok_int(3)));
    turns();
    CHECK_INT(seen[0].calls, 1); // the rightful one
    CHECK_INT(seen[0].number, 3);
    orch_drop(g);
    finish();
}

TEST(misuse_box_twice) {
    if (!start()) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    void *one = orch_promise_box(p), *two = orch_promise_box(p);
    CHECK(orch_settle(orch_promise_unbox(one), token()));
    CHECK(!orch_settle(orch_promise_unbox(two), token()));
    orch_drop(f);
    finish();
}

TEST(misuse_await_outside_a_task) {
    if (!start()) return;
    orch_result r = orch_await(orch_settled(token()));
    CHECK_INT(r.error, ORCH_ENOTASK);
    CHECK_INT(tokens[0], 1); // dropped
    orch_result_free(&r);
    orch_future *f = orch_settled(token());
    r = orch_wait(f);
    CHECK_INT(r.error, ORCH_ENOTASK);
    orch_drop(f);
    CHECK_INT(orch_yield(), ORCH_ENOTASK);
    CHECK_INT(orch_sleep(0), ORCH_ENOTASK);
    finish();
}

TEST(misuse_settle_from_another_thread) {
    for (int with_loop = 0; with_loop < 2; with_loop++) {
        if (!start()) return;
        orch_promise p;
        orch_future *f = orch_future_new(&p);
        in_thread(with_loop ? settle_in_loop_thread : settle_in_thread, &p);
        CHECK_INT(tokens[0], 1);
        CHECK(!orch_is_settled(f));
        CHECK(orch_settle(p, token()));
        orch_drop(f);
        finish();
    }
}

TEST(misuse_without_a_loop) {
    orch_promise p;
    memset(tokens, 0, sizeof tokens), issued = 0;
    orch_future *f = orch_future_new(&p);
    check_error(f, ORCH_ENOLOOP);
    orch_drop(f);
    CHECK(!orch_settle(p, token()));
    f = orch_settled(token());
    check_error(f, ORCH_ENOLOOP);
    CHECK_INT(tokens[1], 1);
    orch_drop(f);
    f = orch_after(1);
    check_error(f, ORCH_ENOLOOP);
    f = then_owning(f, context_in_use, context_in_use);
    CHECK(f != NULL && orch_is_settled(f));
    CHECK_INT(tokens[2], 1);
    orch_drop(f);
    balance();
}

#endif

int main(int argc, char **argv) { return test_main(argc, argv); }
