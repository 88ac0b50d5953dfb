// test_stress.c - random graphs of everything at once, checked against what must hold for all.
//
// Each seed makes a loop and lets actors work on it at random: a driver outside of tasks, tasks,
// and what the library calls back (callbacks, cancel hooks, releases). They make futures, combine,
// share, follow, consume, cancel, give up and settle them. What must hold then:
//   - every value, context and argument is released once, and seen only before that;
//   - every orch_on and orch_finally runs once, every cancel hook and orch_then at most once;
//   - a list says what its combinator promises;
//   - a child that is given up inside a task has ended when that call returns;
//   - nothing hangs, and when everybody has let go no slot is in use.
// Nobody waits in a circle or owns in one, as nobody could end that. A task gets futures when it
// starts or makes them itself; a promise follows what was made for it, or one of the commons:
// shared promises, which end with a value or follow each other (circles of follows are rejected).
// What a value owns ends with a value that was made for it.
//
//     TEST_SEEDS=5000 test_stress       more seeds than the 80 of each case
//     TEST_SEED=17 test_stress tasks    one seed; odd ones use no timers and repeat exactly

#include "../asyncorch.h"
#include "test.h"

enum { MANY = 4096, HOLDS = 12, FILLERS = 1000, ROUNDS = 20000 };

typedef struct thing { // a value or a context: something that is released once
    int released, calls;
    orch_future *owned; // given up by the release
} thing;

typedef struct ticket {
    orch_promise promise;
    void *box;
    unsigned hook;
    int asked;
    enum { FREE, COMMON, OWNED } kind; // what it may end with
} ticket;

typedef struct actor { // who holds references; jobs of tasks are actors
    orch_future *held[HOLDS];
    unsigned count, shields;
    bool started, ended;
    bool owned; // by a value
    int released;
} actor;

static struct { // the world of one seed
    uint64_t random;
    int budget, depth; // what may still be started; how deep callbacks are nested
    bool tasks, timers, orderly, refusing;
    thing things[MANY];
    ticket tickets[MANY];
    actor jobs[MANY], outside, commons; // commons: shared promises, which anybody may cancel
    orch_future *fillers[FILLERS];
    unsigned thing_count, ticket_count, job_count, filler_count, oldest;
    int due, made; // calls of orch_on and orch_finally
    orch_completion *iteration;
    bool asked, ignored; // iteration: next is pending
    int pipe[2];
} w;

static unsigned seeds_per_case = 80;

static unsigned chance(unsigned below) { // source: George Marsaglia, xorshift64
    w.random ^= w.random << 13, w.random ^= w.random >> 7, w.random ^= w.random << 17;
    return (unsigned)(w.random >> 33) % below;
}

static bool spend(void) { return w.budget > 0 && w.budget-- > 0; }

// The recursion of this program: releases, hooks and callbacks do what everybody does.
static orch_future *leaf(void);
static orch_future *owned(void);
static orch_future *start(actor *from, bool owned, actor **started);
static void mischief(void);

// ---- values

static thing *thing_new(void) {
    if (w.thing_count == MANY) return NULL;
    return &w.things[w.thing_count++];
}

static void thing_release(void *p) {
    thing *t = (thing *)p;
    CHECK(t->released++ == 0);
    orch_drop(t->owned);
    mischief();
}

static orch_result value(void) {
    thing *t = thing_new();
    if (t == NULL) return orch_ok_int(1);
    if (chance(6) == 0 && spend()) t->owned = owned();
    return orch_ok(t, thing_release);
}

static orch_result outcome(void) {
    switch (chance(8)) {
    case 0: return orch_fail(7);
    case 1: return orch_failf(8, "failed with %d", 8);
    case 2: return orch_ok_int(9);
    case 3: return spend() ? orch_chain(leaf()) : orch_fail(10);
    default: return value();
    }
}

static thing *thing_of(const orch_result *r) {
    thing *t = (thing *)r->value;
    return r->error == 0 && t >= w.things && t < w.things + MANY ? t : NULL;
}

/* Whoever sees a result can read all of it. */
static void look(const orch_result *r) {
    CHECK(thing_of(r) == NULL || thing_of(r)->released == 0);
    CHECK(orch_message(r)[0] != '\0');
    for (size_t i = 0; i < orch_count(r); i++) look(orch_at(r, i));
}

// ---- promises and other leaves

static orch_promise ticket_open(ticket *t) {
    orch_promise p = t->box != NULL ? orch_promise_unbox(t->box) : t->promise;
    t->box = NULL;
    return p;
}

static orch_future *common(void) { // with 0 of them just a settled one
    if (w.commons.count == 0) return orch_settled(value());
    return orch_ref(w.commons.held[chance(w.commons.count)]);
}

static orch_result end_of(const ticket *t) { return t->kind == FREE ? outcome() : value(); }

static orch_future *next_of(const ticket *t) {
    if (t->kind == OWNED) return orch_settled(value());
    return t->kind == COMMON || chance(2) == 0 ? common() : leaf();
}

static void settle_one(bool oldest) {
    if (w.oldest == w.ticket_count) return;
    ticket *t = &w.tickets[oldest ? w.oldest++ : chance(w.ticket_count)];
    orch_promise p = ticket_open(t);
    if (chance(3) > 0) orch_settle(p, end_of(t));
    else orch_follow(p, next_of(t));
}

static bool cancel_hook(void *context, int reason) {
    ticket *t = (ticket *)context;
    CHECK(t->asked++ == 0 && reason != 0);
    switch (t->hook) {
    case 1: return true;
    case 2: return false; // somebody will settle it
    case 3: return orch_settle(t->promise, end_of(t)) && chance(2) > 0;
    case 4: return orch_follow(t->promise, next_of(t)) && chance(2) > 0;
    default: mischief(); return chance(2) > 0;
    }
}

static orch_future *promise(bool owned) {
    if (w.ticket_count == MANY) return orch_settled(orch_fail(11));
    ticket *t = &w.tickets[w.ticket_count++];
    orch_future *f = orch_future_new(&t->promise);
    bool shared = !owned && w.commons.count < HOLDS && chance(6) == 0;
    t->kind = owned ? OWNED : shared ? COMMON : FREE;
    t->hook = chance(12);
    if (t->hook >= 1 && t->hook <= 5) orch_promise_on_cancel(t->promise, cancel_hook, t);
    if (chance(6) == 0) t->box = orch_promise_box(t->promise);
    if (shared) w.commons.held[w.commons.count++] = orch_ref(f);
    return f;
}

/* Without timers far away; but orch_run's main may wait for it with nobody to settle the rest. */
static uint64_t deadline(void) { return w.timers || !w.orderly ? chance(3) : 60000; }

static orch_future *leaf(void) {
    switch (chance(10)) {
    case 0: return orch_settled(outcome());
    case 1: return w.timers ? orch_after(chance(3)) : promise(false);
    case 2: return orch_ready(w.pipe[0], ORCH_READABLE); // a second one is busy, and rejected
    case 3: return w.tasks && spend() ? start(NULL, false, NULL) : promise(false);
    default: return promise(false);
    }
}

static orch_future *owned(void) {
    return w.tasks && chance(2) == 0 ? start(NULL, true, NULL) : promise(true);
}

// ---- callbacks

static orch_result then_any(orch_result *in, void *context) {
    thing *t = (thing *)context, *taken = thing_of(in);
    CHECK(t == NULL || (t->released == 0 && t->calls++ == 0));
    look(in);
    mischief();
    unsigned how = chance(6);
    if (how == 0) return outcome();
    if (how == 1 && taken != NULL && orch_take(in) != NULL) thing_release(taken);
    return *in;
}

static void on_any(orch_result *in, void *context) {
    look(in);
    w.made++;
    *(bool *)context = false;
    mischief();
}

static void finally_any(void *context) {
    (void)context;
    w.made++;
    mischief();
}

// ---- holding

static void let_go(orch_future *f) {
    unsigned how = chance(8);
    if (how < 2) orch_cancel(f, 5);
    if (how == 2 || how == 3) w.due++, orch_on(f, on_any, &w.ignored);
    else if (how % 2 == 0) orch_detach(f);
    else orch_drop(f);
}

static void hold(actor *a, orch_future *f) {
    if (a->count < HOLDS) a->held[a->count++] = f;
    else let_go(f);
}

static orch_future *take(actor *a) {
    if (chance(6) == 0) return common();
    if (a->count == 0) return leaf();
    unsigned i = chance(a->count);
    orch_future *f = a->held[i];
    a->held[i] = a->held[--a->count];
    return f;
}

// ---- combinators

enum { ALL, SETTLED, ANY, RACE, QUORUM, GATHER, MODES };

/* What the combinators promise of lists. context: mode, count and needed. */
static orch_result audit(orch_result *in, void *context) {
    unsigned what = (unsigned)(uintptr_t)context, count = what / 16 % 16, needed = what / 256;
    size_t shown = orch_count(in), ok = 0;
    for (size_t i = 0; i < shown; i++) ok += orch_at(in, i)->error == 0;
    bool given_up = in->error == ORCH_ECANCELED || in->error == ORCH_ENOMEM;
    look(in);
    switch (what % 16) {
    case ALL: CHECK(in->error != 0 || (shown == count && ok == count)); break;
    case SETTLED:
    case GATHER: CHECK(given_up || (in->error == 0 && shown == count)); break;
    case ANY:
        CHECK(given_up || in->error == 0 || (in->error == ORCH_EALLFAILED && shown == count));
        CHECK(in->error == 0 || ok == 0);
        break;
    case QUORUM:
        CHECK(given_up || in->error == 0 || in->error == ORCH_EQUORUM);
        CHECK(given_up || (shown == count && (ok >= needed) == (in->error == 0)));
        break;
    default: CHECK(count == 0 || given_up || in->index < count); break;
    }
    return *in;
}

static orch_future *combine(actor *a, orch_future *first) {
    orch_future *list[8] = {first};
    unsigned count = 1 + chance(7), mode = chance(MODES), needed = chance(count + 1);
    for (unsigned i = 1; i < count; i++) list[i] = take(a);
    orch_future *f = mode == ALL       ? orch_all_n(count, list)
                     : mode == SETTLED ? orch_all_settled_n(count, list)
                     : mode == ANY     ? orch_any_n(count, list)
                     : mode == RACE    ? orch_race_n(count, list)
                     : mode == QUORUM  ? orch_quorum_n(needed, count, list)
                                       : orch_gather_n(count, list, deadline());
    if (chance(2) == 0) return f;
    return orch_then(f, audit, audit, (void *)(uintptr_t)(mode + 16 * count + 256 * needed));
}

/* A future made of what an actor holds. */
static orch_future *grow(actor *a) {
    orch_future *f = take(a), *g;
    orch_promise p;
    thing *t;
    switch (chance(12)) {
    case 0: return orch_then(f, then_any, NULL, NULL);
    case 1: return orch_then(f, then_any, then_any, NULL);
    case 2:
        if ((t = thing_new()) == NULL) return f;
        return orch_then_with(f, &(orch_then_desc){then_any, then_any, t, thing_release});
    case 3: w.due++; return orch_finally(f, finally_any, NULL);
    case 4: return orch_timeout(f, deadline());
    case 5: hold(a, orch_ref(f)); return f;
    case 6: return orch_settled(orch_chain(f));
    case 7: g = orch_future_new(&p), orch_follow(p, f); return g;
    default: return combine(a, f);
    }
}

// ---- iterations

static void iterate_in_task(actor *a) {
    orch_future *list[4];
    unsigned count = chance(5);
    for (unsigned i = 0; i < count; i++) list[i] = take(a);
    orch_completion *c = orch_as_completed_n(count, list);
    for (unsigned i = chance(count + 2); i > 0; i--) {
        orch_result r = orch_await(orch_completion_next(c));
        look(&r);
        orch_result_free(&r);
    }
    orch_completion_free(c);
}

static void iterate_outside(void) {
    orch_future *list[4];
    if (w.asked) return;
    if (w.iteration == NULL) {
        for (unsigned i = 0; i < 4; i++) list[i] = take(&w.outside);
        orch_completion *c = orch_as_completed_n(4, list);
        if (w.iteration == NULL) w.iteration = c; // else somebody made one meanwhile
        else orch_completion_free(c);
    } else {
        w.due++;
        w.asked = true;
        orch_on(orch_completion_next(w.iteration), on_any, &w.asked);
    }
}

static void iterate_no_more(void) {
    orch_completion *c = w.iteration;
    w.iteration = NULL;
    orch_completion_free(c);
}

// ---- what callbacks do besides

static void mischief(void) {
    if (w.depth > 2 || chance(3) > 0 || !spend()) return;
    bool outside = orch_self() == NULL; // in a task it would wait for what may need its end
    w.depth++;
    switch (chance(outside ? 9 : 5)) {
    case 0: orch_loop_dump(orch_loop_current()); break;
    case 1:
        if (w.commons.count > 0) orch_cancel(w.commons.held[chance(w.commons.count)], 6);
        break;
    case 2:
        if (w.tasks) orch_detach(start(NULL, false, NULL));
        break;
    case 5: hold(&w.outside, grow(&w.outside)); break;
    case 6: let_go(take(&w.outside)); break;
    case 7:
        if (w.tasks) hold(&w.outside, start(&w.outside, false, NULL));
        break;
    case 8: iterate_outside(); break;
    default: settle_one(false); break;
    }
    w.depth--;
}

static void *mischief_on_main_stack(void *arg) {
    mischief();
    return arg;
}

// ---- tasks

static void wait_for_something(actor *a) {
    orch_result r = orch_ok(NULL, NULL);
    switch (chance(8)) {
    case 0: orch_yield(); break;
    case 1: orch_sleep(w.timers ? chance(3) : 0); break;
    case 2:
        if (a->count > 0) r = orch_wait(a->held[chance(a->count)]);
        break;
    case 3: iterate_in_task(a); break;
    default: r = orch_await(take(a)); break;
    }
    look(&r);
    if (r.release != NULL && chance(3) == 0) hold(a, orch_settled(r));
    else orch_result_free(&r);
}

static void shield(actor *a) {
    if (a->shields == 0 || chance(4) == 0) a->shields++, orch_shield_begin();
    else a->shields--, orch_shield_end();
}

/* Giving up pending work in a task returns when that has ended. */
static void give_up_child(actor *a) {
    actor *child;
    orch_future *f = start(a, false, &child);
    orch_drop(f);
    CHECK(child == NULL || !child->started || child->ended ||
          (!w.orderly && orch_cancel_reason() != 0)); // a wait without end was broken off
}

/* One thing that an actor does. */
static void act(actor *a) {
    bool task = orch_self() != NULL;
    switch (chance(task ? 16 : 11)) {
    case 0:
        if (w.commons.count > 0) orch_cancel(w.commons.held[chance(w.commons.count)], 6);
        break;
    case 1:
        if (a->count > 0) orch_cancel(a->held[chance(a->count)], 0);
        break;
    case 2: let_go(take(a)); break;
    case 3: settle_one(false); break;
    case 4:
        if (w.tasks) hold(a, start(a, false, NULL));
        break;
    case 5:
        if (!task) iterate_outside();
        break;
    case 6:
        if (chance(8) == 0) w.refusing = !w.refusing && w.filler_count > 0;
        break;
    case 11: shield(a); break;
    case 12: give_up_child(a); break;
    case 13: orch_on_main_stack(mischief_on_main_stack, NULL); break;
    case 14:
    case 15: wait_for_something(a); break;
    default: hold(a, grow(a)); break;
    }
}

static orch_result work_of(actor *a) {
    a->started = true;
    for (unsigned n = chance(10); n > 0 && spend(); n--) act(a);
    while (a->shields > 0) shield(a);
    orch_result r = a->owned ? value() : chance(3) == 0 ? orch_chain(take(a)) : outcome();
    while (a->count > 0) let_go(a->held[--a->count]);
    a->ended = true;
    return r;
}

static orch_result work(void *arg) { return work_of((actor *)arg); }
static orch_result work_on_copy(void *arg) { return work_of(*(actor **)arg); }

static void job_release(void *arg) {
    actor *a = (actor *)arg;
    CHECK(a->released++ == 0);
    if (!a->started)
        while (a->count > 0) orch_drop(a->held[--a->count]);
    mischief();
}
static void job_release_copy(void *arg) { job_release(*(actor **)arg); }

/* Starts a task with some of what `from` holds; NULL: one that depends on nothing that exists. */
static orch_future *start(actor *from, bool owned, actor **started) {
    if (started != NULL) *started = NULL;
    if (w.job_count == MANY) return orch_settled(orch_fail(12));
    actor *a = &w.jobs[w.job_count++];
    if (started != NULL) *started = a;
    a->owned = owned;
    for (unsigned n = from != NULL ? chance(4) : 0; n > 0; n--) hold(a, take(from));
    orch_task_desc desc = {.name = "worker", .fn = work, .arg = a, .release = job_release};
    if (chance(3) == 0) {
        desc.fn = work_on_copy;
        desc.release = job_release_copy;
        desc.arg = &a;
        desc.arg_size = sizeof a;
    }
    return orch_go_with(&desc);
}

// ---- one seed

static void *refuse_some(void *user, void *old, size_t old_size, size_t size) {
    (void)user;
    if (w.refusing && size > old_size) return NULL;
    if (size > 0) return realloc(old, size);
    free(old);
    return NULL;
}

static void quiet_report(const char *text, void *context) {
    (void)text;
    (void)context;
}

static void quiet_unhandled(const orch_result *r, void *context) {
    (void)context;
    CHECK(r->error != 0);
    look(r);
    mischief();
}

static orch_loop_desc describe(void) {
    return (orch_loop_desc){.allocator = {refuse_some, NULL},
                            .stack_size = 262144, // sanitizers' frames are big
                            .on_unhandled = quiet_unhandled,
                            .on_report = quiet_report};
}

/* Few slots are left before one more allocation is needed. */
static void fill(void) {
    w.filler_count = 600 + chance(150);
    for (unsigned i = 0; i < w.filler_count; i++) w.fillers[i] = orch_settled(orch_ok_int(1));
}

static bool world_new(unsigned seed, bool tasks) {
    memset(&w, 0, sizeof w);
    w.random = 0x9e3779b97f4a7c15u * (seed + 1);
    w.budget = 40 + (int)chance(160);
    w.tasks = tasks;
    w.timers = seed % 2 == 0;
    return pipe(w.pipe) == 0;
}

static void let_go_of_all(actor *a) {
    while (a->count > 0) orch_drop(a->held[--a->count]);
}

static void close_pipe(void) {
    close(w.pipe[0]);
    close(w.pipe[1]);
}

/* Settles and gives up one thing after the other, until nothing is in use. */
static bool wind_down(orch_loop *loop) {
    w.budget = 0;
    w.refusing = false;
    CHECK(write(w.pipe[1], "", 1) == 1);
    for (int round = 0; round < ROUNDS; round++) {
        orch_loop_stats stats = orch_loop_statistics(loop);
        int more = orch_loop_step(loop, w.oldest == w.ticket_count);
        if (more != 0 && chance(4) > 0) continue;
        if (w.oldest < w.ticket_count) settle_one(true);
        else if (w.outside.count > 0) let_go(w.outside.held[--w.outside.count]);
        else if (w.iteration != NULL) iterate_no_more();
        else if (w.filler_count > 0) orch_drop(w.fillers[--w.filler_count]);
        else if (stats.tasks == 0 && w.commons.count > 0) let_go_of_all(&w.commons);
        else if (stats.futures == 0) return true;
    }
    return false;
}

static void check_released(void) {
    for (unsigned i = 0; i < w.thing_count; i++) CHECK_INT(w.things[i].released, 1);
    for (unsigned i = 0; i < w.job_count; i++) {
        CHECK_INT(w.jobs[i].released, 1);
        CHECK_INT(w.jobs[i].ended, w.jobs[i].started);
    }
}

static void run_outside(unsigned seed, bool tasks, bool short_of_memory) {
    if (!CHECK(world_new(seed, tasks))) return;
    orch_loop_desc desc = describe();
    orch_loop *loop = orch_loop_new(&desc);
    w.orderly = true;
    if (loop != NULL) {
        if (short_of_memory) fill();
        while (spend()) {
            act(&w.outside);
            if (chance(4) == 0) orch_loop_step(loop, 0);
        }
        int freed = chance(3) == 0 ? orch_loop_free(loop) : ORCH_EBUSY;
        if (freed != 0) {
            if (!CHECK(wind_down(loop))) orch_loop_dump(loop);
            CHECK_INT(orch_loop_statistics(loop).futures, 0);
            CHECK_INT(orch_loop_free(loop), 0);
        }
        check_released();
        if (!short_of_memory) CHECK_INT(w.made, w.due);
    }
    close_pipe();
}

static orch_result run_main(void *arg) {
    actor *a = (actor *)arg;
    while (spend()) act(a);
    while (a->shields > 0) shield(a);
    w.budget = 0;
    orch_result r = a->count > 0 && chance(2) == 0 ? orch_await(take(a)) : outcome();
    thing *t = thing_of(&r);
    if (t == NULL || t->owned == NULL) return r;
    orch_result_free(&r); // it owns a future, which could not be given up after the loop
    return orch_fail(13);
}

/* Everything is left behind when main returns. Its result may outlive the loop. */
static void run_inside(unsigned seed) {
    if (!CHECK(world_new(seed, true))) return;
    orch_loop_desc desc = describe();
    actor a = {.count = 0};
    CHECK(write(w.pipe[1], "", 1) == 1);
    orch_result r = orch_run_with(&desc, run_main, &a);
    look(&r);
    orch_result_free(&r);
    check_released();
    CHECK(w.made <= w.due);
    close_pipe();
}

/* Each seed has the time of a case. The last number that is printed is the one that failed. */
static void run_seeds(void (*run)(unsigned seed)) {
    const char *one = getenv("TEST_SEED"), *many = getenv("TEST_SEEDS");
    const char *time = getenv("TEST_TIME");
    unsigned first = one != NULL ? (unsigned)atoi(one) : 1;
    unsigned count = many != NULL ? (unsigned)atoi(many) : one != NULL ? 1 : seeds_per_case;
    fprintf(stderr, "seeds");
    for (unsigned seed = first; seed < first + count && test_failures == 0; seed++) {
        fprintf(stderr, " %u", seed);
        alarm(5 * (time != NULL ? (unsigned)atoi(time) : 1));
        run(seed);
    }
    fprintf(stderr, "\n");
}

static void run_futures(unsigned seed) { run_outside(seed, false, false); }
static void run_tasks(unsigned seed) { run_outside(seed, true, false); }
static void run_short_of_memory(unsigned seed) { run_outside(seed, true, true); }

TEST(futures) { run_seeds(run_futures); }
TEST(tasks) { run_seeds(run_tasks); }
TEST(short_of_memory) { run_seeds(run_short_of_memory); }
TEST(inside_orch_run) { run_seeds(run_inside); }

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--sweep") == 0) seeds_per_case = 1;
    return test_main(argc, argv);
}
