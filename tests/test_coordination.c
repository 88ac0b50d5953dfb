// test_coordination.c: semaphore, event, channel, topic. Who waits, who gets what, and that nothing
// is lost or kept: on the virtual clock and over seeds (TEST_SEEDS of them, 20 by default).
// also built with -DNDEBUG (for the misuses)
//
// Every value is a token that counts its releases, and the loop's allocator counts its bytes: a
// case aborts when a token was not released exactly once, or memory is left.
//
// adopted behaviour                            known from                      cases
// at most n run at once, in order of asking    p-limit, p-queue (concurrency)  semaphore_bounds_*,
//                                                                              semaphore_fifo
// the bound can be changed while in use        p-limit (limit.concurrency),    semaphore_resize_*
//                                              p-queue (pause: 0)
// how many are active and pending              p-limit activeCount,            semaphore_counts
//                                              pendingCount
// weighted requests, strictly in order         Go x/sync/semaphore             semaphore_small_*
// more than there is: an error, not a hang     tokio acquire_many, Go (hangs)  semaphore_limit
// a cancelled wait takes and gives nothing     Trio, Go (ctx in Acquire)       semaphore_cancel*
// a permit that cleans up after itself         tokio SemaphorePermit (drop),   semaphore_result_*
//                                              Trio (async with)
// releasing what was not taken is an error     Python BoundedSemaphore         misuse_over_release
// manual reset event, waiters all go           Trio Event, asyncio.Event       event_*
// bounded buffer, 0 is a rendezvous            Go channels, Trio memory        channel_keeps_order,
//                                              channels                        channel_rendezvous
// close: drain what is there, then an error    Go close + range, Trio aclose   channel_close*
// send to a closed channel is an error         Trio ClosedResourceError        channel_closed_send
// try forms                                    Go select default, Trio _nowait channel_try*
// select takes exactly one                     Go select                       channel_select*
// publish/subscribe, one queue each            EventEmitter, RxJS, tokio       topic_*
// a slow subscriber lags and loses the oldest  tokio broadcast (Lagged)        topic_overflow_*
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../asyncorch.h"
#include "test.h"

#include <pthread.h>

// ---- kit

enum { TOKENS = 4096, ORDER = 256 };

static unsigned char tokens[TOKENS]; // how often each was released
static int issued, unhandled, unhandled_error;
static size_t bytes;
static int order[ORDER], ordered; // what happened, in order
static uint64_t seed_now;

static void give_back(void *value) { ++*(unsigned char *)value; }

static orch_result token(void) { return orch_ok(&tokens[issued++ % TOKENS], give_back); }

static int token_of(const orch_result *r) {
    if (r->error != 0 || r->value == NULL) return -1;
    return (int)((unsigned char *)r->value - tokens);
}

static void note(int what) {
    if (ordered < ORDER) order[ordered] = what;
    ordered++;
}

static void on_unhandled(const orch_result *r, void *context) {
    (void)context;
    unhandled++;
    unhandled_error = r->error;
}

static void on_report(const char *text, void *context) {
    (void)context;
    if (!test_shared->fail_at) fputs(text, stderr);
}

static void *count_bytes(void *user, void *old, size_t old_size, size_t size) {
    void *made = NULL;
    (void)user;
    if (size == 0) free(old);
    else if ((made = realloc(old, size)) == NULL) return NULL;
    bytes = bytes - (old ? old_size : 0) + size;
    return made;
}

static int first_seed(void) { return test_shared->fail_at != 0; } // a sweep takes the seed 1 only

static int test_seeds(void) {
    const char *given = getenv("TEST_SEEDS");
    return test_shared->fail_at ? 1 : given ? atoi(given) : 20;
}

static void balance(void) {
    for (int i = 0; i < issued && i < TOKENS; i++) {
        if (tokens[i] == 1) continue;
        fprintf(stderr, "seed %llu: token %d of %d was released %d times\n",
                (unsigned long long)seed_now, i, issued, tokens[i]);
        abort();
    }
    if (bytes == 0) return;
    fprintf(stderr, "seed %llu: %zu bytes are left\n", (unsigned long long)seed_now, bytes);
    abort();
}

static void run_seed(orch_task_fn fn, uint64_t seed) {
    int failures = test_failures;
    memset(tokens, 0, sizeof tokens);
    issued = ordered = unhandled = unhandled_error = 0;
    seed_now = seed;
    orch_result r = orch_run_with(&(orch_loop_desc){.clock = ORCH_CLOCK_VIRTUAL,
                                                    .seed = seed,
                                                    .allocator = {count_bytes, NULL},
                                                    .on_unhandled = on_unhandled,
                                                    .on_report = on_report},
                                  fn, NULL);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    balance();
    if (test_failures > failures) fprintf(stderr, "with seed %llu\n", (unsigned long long)seed);
}

// A case is the main task of a loop; the first run is without a seed.
#define CASE(id)                                                                                   \
    static void id##_body(void);                                                                   \
    static orch_result id##_main(void *arg) {                                                      \
        (void)arg;                                                                                 \
        test_start();                                                                              \
        id##_body();                                                                               \
        return orch_ok(NULL, NULL);                                                                \
    }                                                                                              \
    TEST(id) {                                                                                     \
        for (int i = first_seed(); i <= test_seeds(); i++) run_seed(id##_main, (uint64_t)i);       \
    }                                                                                              \
    static void id##_body(void)

static int error_of(orch_result r) {
    orch_result_free(&r);
    return r.error;
}

static int await_error(orch_future *f) { return error_of(orch_await(f)); }

// Lets everything that is ready run; the virtual clock does not move.
static void settle_down(void) {
    orch_shield_begin();
    for (int i = 0; i < 50; i++) (void)orch_yield();
    orch_shield_end();
}

static size_t slots(void) { return orch_loop_statistics(orch_loop_current()).futures; }

// A task that is one of several, and what became of it.
struct worker {
    int id, error, done;
    size_t count;
    uint64_t ms;
    orch_future *future;
};

static orch_semaphore *sem;
static orch_channel *chan, *other;
static orch_event *event;
static orch_topic *topic;
static int running, most;

static orch_future *go(orch_task_fn fn, struct worker *w) { return w->future = orch_go(fn, w); }

static struct worker new_worker(int id) {
    return (struct worker){.id = id, .error = 99, .count = 1};
}

// Takes its permits, holds them for ms, gives them back.
static orch_result hold(void *arg) {
    struct worker *w = arg;
    w->error = orch_acquire_n(sem, w->count);
    w->done = 1;
    if (w->error != 0) return orch_ok(NULL, NULL);
    note(w->id);
    if (++running > most) most = running;
    if (w->ms > 0) (void)orch_sleep(w->ms);
    running--;
    CHECK_INT(orch_release_n(sem, w->count), 0);
    return orch_ok(NULL, NULL);
}

// Takes its permits and keeps them.
static orch_result keep(void *arg) {
    struct worker *w = arg;
    w->error = orch_acquire_n(sem, w->count);
    w->done = 1;
    if (w->error == 0) note(w->id);
    return orch_ok(NULL, NULL);
}

static void join(struct worker *w) {
    orch_result r = orch_await(w->future);
    orch_result_free(&r);
}

// ---- semaphore

CASE(semaphore_counts) {
    orch_semaphore *s = orch_semaphore_new(2);
    CHECK_INT(orch_semaphore_permits(s), 2);
    CHECK_INT(orch_semaphore_available(s), 2);
    CHECK_INT(orch_acquire(s), 0);
    CHECK(orch_try_acquire(s));
    CHECK(!orch_try_acquire(s));
    CHECK_INT(orch_semaphore_available(s), 0);
    CHECK_INT(orch_release(s), 0);
    CHECK_INT(orch_semaphore_available(s), 1);
    CHECK(orch_try_acquire_n(s, 1));
    CHECK_INT(orch_release_n(s, 2), 0);
    CHECK_INT(orch_semaphore_available(s), 2);
    CHECK(!orch_try_acquire_n(s, 3));
    CHECK(orch_try_acquire_n(s, 2));
    orch_future *f = orch_semaphore_acquire(s);
    CHECK_INT(orch_semaphore_waiting(s), 1);
    orch_drop(f);
    CHECK_INT(orch_semaphore_waiting(s), 0);
    CHECK_INT(orch_release_n(s, 2), 0);
    CHECK_INT(orch_semaphore_available(s), 2);
    orch_semaphore_free(s);
    orch_semaphore_free(NULL);
}

CASE(semaphore_bounds_what_runs) {
    struct worker w[12];
    sem = orch_semaphore_new(3);
    running = most = 0;
    for (int i = 0; i < 12; i++) {
        w[i] = new_worker(i);
        w[i].ms = (uint64_t)(1 + i % 4);
        (void)go(hold, &w[i]);
    }
    for (int i = 0; i < 12; i++) join(&w[i]), CHECK_INT(w[i].error, 0);
    CHECK_INT(most, 3);
    CHECK_INT(ordered, 12);
    CHECK_INT(orch_semaphore_available(sem), 3);
    orch_semaphore_free(sem);
}

CASE(semaphore_fifo) {
    struct worker w[16];
    sem = orch_semaphore_new(1);
    CHECK_INT(orch_acquire(sem), 0);
    for (int i = 0; i < 16; i++) w[i] = new_worker(i), w[i].ms = i % 3 == 0, (void)go(hold, &w[i]);
    CHECK_INT(orch_semaphore_waiting(sem), 16);
    CHECK_INT(orch_release(sem), 0);
    for (int i = 0; i < 16; i++) join(&w[i]);
    for (int i = 0; i < 16; i++) CHECK_INT(order[i], i);
    orch_semaphore_free(sem);
}

static void noted(orch_result *in, void *context) {
    if (in->error == 0) note(*(int *)context);
}

// Tasks and futures stand in one queue. What a callback is lent is freed after it, and the permit
// with it.
CASE(semaphore_tasks_and_futures_in_one_queue) {
    struct worker w[8];
    sem = orch_semaphore_new(1);
    CHECK_INT(orch_acquire(sem), 0);
    for (int i = 0; i < 8; i++) {
        w[i] = new_worker(i);
        if (i % 3 == 1) orch_on(orch_semaphore_acquire(sem), noted, &w[i].id);
        else (void)go(hold, &w[i]);
    }
    CHECK_INT(orch_release(sem), 0);
    for (int i = 0; i < 8; i++)
        if (i % 3 != 1) join(&w[i]);
    settle_down();
    CHECK_INT(ordered, 8);
    for (int i = 0; i < 8; i++) CHECK_INT(order[i], i);
    CHECK_INT(orch_semaphore_available(sem), 1);
    orch_semaphore_free(sem);
}

CASE(semaphore_small_does_not_overtake_large) {
    struct worker large = new_worker(1), small = new_worker(2);
    large.count = 3;
    sem = orch_semaphore_new(3);
    CHECK_INT(orch_acquire_n(sem, 2), 0);
    (void)go(hold, &large);
    (void)go(hold, &small);
    settle_down();
    CHECK_INT(ordered, 0); // though one is free
    CHECK_INT(orch_semaphore_available(sem), 1);
    CHECK(!orch_try_acquire(sem));
    orch_future *f = orch_semaphore_acquire(sem);
    settle_down();
    CHECK(!orch_is_settled(f));
    CHECK_INT(orch_release(sem), 0);
    settle_down();
    CHECK_INT(ordered, 0);
    CHECK_INT(orch_release(sem), 0);
    join(&large), join(&small);
    CHECK_INT(order[0], 1);
    CHECK_INT(order[1], 2);
    CHECK_INT(await_error(f), 0);
    CHECK_INT(orch_semaphore_available(sem), 3);
    orch_semaphore_free(sem);
}

CASE(semaphore_large_that_is_cancelled_makes_way) {
    struct worker large = new_worker(1), small = new_worker(2);
    large.count = 3;
    sem = orch_semaphore_new(3);
    CHECK_INT(orch_acquire(sem), 0);
    (void)go(hold, &large);
    (void)go(hold, &small);
    orch_drop(large.future);
    CHECK_INT(large.error, ORCH_ECANCELED);
    join(&small);
    CHECK_INT(small.error, 0);

    orch_future *f = orch_semaphore_acquire_n(sem, 3), *g = orch_semaphore_acquire(sem);
    settle_down();
    CHECK(!orch_is_settled(g));
    orch_drop(f);
    settle_down();
    CHECK(orch_is_settled(g));
    orch_drop(g);
    CHECK_INT(orch_release(sem), 0);
    CHECK_INT(orch_semaphore_available(sem), 3);
    orch_semaphore_free(sem);
}

CASE(semaphore_limit) {
    sem = orch_semaphore_new(3);
    CHECK_INT(orch_acquire_n(sem, 4), ORCH_ELIMIT);
    CHECK_INT(await_error(orch_semaphore_acquire_n(sem, SIZE_MAX)), ORCH_ELIMIT);
    CHECK(!orch_try_acquire_n(sem, 4));
    CHECK_INT(orch_semaphore_available(sem), 3);
    orch_semaphore_free(sem);
}

CASE(semaphore_cancelled_wait_takes_nothing) {
    struct worker w[3] = {new_worker(0), new_worker(1), new_worker(2)};
    sem = orch_semaphore_new(1);
    CHECK_INT(orch_acquire(sem), 0);
    for (int i = 0; i < 3; i++) (void)go(hold, &w[i]);
    orch_drop(w[1].future);
    CHECK_INT(w[1].error, ORCH_ECANCELED);
    CHECK_INT(orch_semaphore_waiting(sem), 2);
    CHECK_INT(orch_semaphore_available(sem), 0); // and gives nothing away
    CHECK_INT(orch_release(sem), 0);
    join(&w[0]), join(&w[2]);
    CHECK_INT(ordered, 2);
    CHECK_INT(order[1], 2);
    CHECK_INT(orch_semaphore_available(sem), 1);
    orch_semaphore_free(sem);
}

// Release and cancel in one breath, in both orders: whoever was granted has it, else the next.
CASE(semaphore_cancelled_in_the_moment_of_the_grant) {
    for (int cancel_first = 0; cancel_first < 2; cancel_first++) {
        struct worker w[2] = {new_worker(0), new_worker(1)};
        sem = orch_semaphore_new(1);
        CHECK_INT(orch_acquire(sem), 0);
        (void)go(keep, &w[0]), (void)go(keep, &w[1]);
        if (cancel_first) orch_cancel(w[0].future, 0);
        CHECK_INT(orch_release(sem), 0);
        if (!cancel_first) orch_cancel(w[0].future, 0);
        settle_down();
        CHECK_INT(w[0].error, cancel_first ? ORCH_ECANCELED : 0);
        CHECK_INT(w[1].done, cancel_first);
        CHECK_INT(orch_semaphore_available(sem), 0);
        CHECK_INT(orch_semaphore_waiting(sem), (size_t)!cancel_first);
        orch_drop(w[1].future), orch_drop(w[0].future);
        CHECK_INT(orch_release(sem), 0);
        orch_semaphore_free(sem);
    }
}

// A future that was cancelled before its hook ran does not get what comes meanwhile.
CASE(semaphore_cancelled_future_is_passed_over) {
    sem = orch_semaphore_new(1);
    CHECK_INT(orch_acquire(sem), 0);
    orch_future *f = orch_semaphore_acquire(sem), *g = orch_semaphore_acquire(sem);
    orch_cancel(f, 0);
    CHECK_INT(orch_release(sem), 0);
    CHECK_INT(await_error(f), ORCH_ECANCELED);
    settle_down();
    CHECK(orch_is_settled(g));
    orch_drop(g);
    CHECK_INT(orch_semaphore_available(sem), 1);
    orch_semaphore_free(sem);
}

// Many that are cancelled at once cost no more each than one: this would take minutes.
static orch_result wait_together(void *arg) {
    struct worker *w = arg;
    size_t count = test_shared->fail_at ? 10 : 20000;
    orch_future **f = malloc(count * sizeof *f);
    for (size_t i = 0; f != NULL && i < count; i++) {
        f[i] = i % 2 ? orch_semaphore_acquire(sem) : orch_channel_receive(chan);
    }
    if (f != NULL) w->error = await_error(orch_all_n(count, f));
    free(f);
    return orch_ok(NULL, NULL);
}

static orch_result wait_alone(void *arg) {
    return orch_ok_int(arg == sem ? orch_acquire(sem) : error_of(orch_recv(chan)));
}

CASE(semaphore_many_cancelled_at_once) {
    if (seed_now > 0) return;
    struct worker w = new_worker(1);
    size_t count = test_shared->fail_at ? 10 : 20000;
    orch_future **f = malloc(count * sizeof *f);
    sem = orch_semaphore_new(1);
    chan = orch_channel_new(1);
    CHECK_INT(orch_acquire(sem), 0);
    (void)go(wait_together, &w);
    for (size_t i = 0; f != NULL && i < count; i++) {
        f[i] = orch_go(wait_alone, i % 2 ? (void *)sem : chan);
    }
    orch_drop(w.future);
    CHECK_INT(w.error, ORCH_ECANCELED);
    if (f != NULL) CHECK_INT(await_error(orch_timeout(orch_all_n(count, f), 1)), ORCH_ETIMEDOUT);
    CHECK_INT(orch_semaphore_waiting(sem), 0);
    CHECK_INT(orch_release(sem), 0);
    CHECK_INT(orch_semaphore_available(sem), 1);
    orch_semaphore_free(sem);
    orch_channel_free(chan);
    free(f);
}

// What is passed over is out, and does not look at what was freed meanwhile.
CASE(semaphore_passed_over_and_freed) {
    sem = orch_semaphore_new(1);
    chan = orch_channel_new(1);
    CHECK_INT(orch_acquire(sem), 0);
    CHECK_INT(orch_send(chan, token()), 0);
    orch_future *f[3] = {orch_semaphore_acquire(sem), orch_channel_receive(chan),
                         orch_channel_send(chan, token())};
    for (int i = 0; i < 3; i++) orch_cancel(f[i], 0);
    CHECK_INT(orch_release(sem), 0);
    orch_result item = {0};
    CHECK_INT(orch_try_recv(chan, &item), 0);
    orch_result_free(&item);
    orch_semaphore_free(sem);
    orch_channel_free(chan);
    for (int i = 0; i < 3; i++) {
        int error = await_error(f[i]);
        CHECK(error == ORCH_ECANCELED || error == ORCH_ECLOSED);
    }
}

// In a cancelled task a permit that is free is given, and a wait is refused. A shield lets it wait.
static orch_result cancelled_holder(void *arg) {
    struct worker *w = arg;
    CHECK_INT(orch_sleep(1000), ORCH_ECANCELED);
    CHECK_INT(orch_acquire(sem), 0);
    CHECK_INT(orch_acquire(sem), ORCH_ECANCELED);
    CHECK_INT(await_error(orch_semaphore_acquire(sem)), ORCH_ECANCELED);
    CHECK_INT(orch_semaphore_waiting(sem), 0);
    CHECK_INT(orch_release(sem), 0);
    orch_shield_begin();
    w->count = 1;
    orch_future *taken = orch_semaphore_acquire(sem);
    orch_result r = orch_await(taken);
    CHECK_INT(r.error, 0);
    orch_future *f = orch_after(10);
    int error = orch_try_acquire(sem);
    CHECK_INT(error, 0);
    orch_result slept = orch_await(f);
    CHECK_INT(slept.error, 0);
    orch_result_free(&r);
    CHECK_INT(orch_acquire(sem), 0);
    orch_shield_end();
    CHECK_INT(orch_release(sem), 0);
    w->done = 1;
    return orch_ok(NULL, NULL);
}

CASE(semaphore_in_a_cancelled_task) {
    struct worker w = new_worker(1);
    sem = orch_semaphore_new(1);
    (void)go(cancelled_holder, &w);
    orch_drop(w.future);
    CHECK_INT(w.done, 1);
    CHECK_INT(orch_semaphore_available(sem), 1);
    orch_semaphore_free(sem);
}

CASE(semaphore_timeout_takes_nothing) {
    sem = orch_semaphore_new(1);
    CHECK_INT(orch_acquire(sem), 0);
    uint64_t start = orch_now();
    CHECK_INT(await_error(orch_timeout(orch_semaphore_acquire(sem), 50)), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now() - start, 50);
    CHECK_INT(orch_semaphore_waiting(sem), 0);
    CHECK_INT(orch_release(sem), 0);
    CHECK_INT(orch_semaphore_available(sem), 1);
    CHECK_INT(await_error(orch_timeout(orch_semaphore_acquire(sem), 50)), 0);
    CHECK_INT(orch_semaphore_available(sem), 1);
    orch_semaphore_free(sem);
}

CASE(semaphore_lost_race_takes_nothing) {
    orch_semaphore *a = orch_semaphore_new(1), *b = orch_semaphore_new(1);
    orch_result r = orch_await(orch_race(orch_semaphore_acquire(a), orch_semaphore_acquire(b)));
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_semaphore_available(a) + orch_semaphore_available(b), 1);
    CHECK_INT(orch_semaphore_available(r.index == 0 ? b : a), 1);
    orch_result_free(&r);
    CHECK_INT(orch_semaphore_available(a) + orch_semaphore_available(b), 2);

    // However deep it is nested, and whichever way round it becomes free.
    CHECK_INT(orch_acquire(a), 0);
    CHECK_INT(orch_acquire(b), 0);
    orch_future *f = orch_race(
        orch_timeout(orch_any(orch_semaphore_acquire(a), orch_settled(orch_fail(7))), 100),
        orch_timeout(
            orch_then(orch_race(orch_semaphore_acquire(b), orch_after(200)), NULL, NULL, NULL),
            100));
    settle_down();
    CHECK(!orch_is_settled(f));
    CHECK_INT(orch_release(b), 0);
    CHECK_INT(orch_release(a), 0);
    r = orch_await(f);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_semaphore_available(a) + orch_semaphore_available(b), 1);
    orch_result_free(&r);
    CHECK_INT(orch_semaphore_available(a) + orch_semaphore_available(b), 2);
    orch_semaphore_free(a), orch_semaphore_free(b);
}

// A task that starts inside the expression gives both back before the race is complete.
static orch_result release_both(void *arg) {
    orch_semaphore **both = arg;
    CHECK_INT(orch_release(both[0]), 0);
    CHECK_INT(orch_release(both[1]), 0);
    return orch_chain(orch_after(1000));
}

CASE(semaphore_lost_race_with_its_release_inside) {
    orch_semaphore *both[2] = {orch_semaphore_new(1), orch_semaphore_new(1)};
    CHECK_INT(orch_acquire(both[0]), 0);
    CHECK_INT(orch_acquire(both[1]), 0);
    orch_future *a = orch_semaphore_acquire(both[0]), *b = orch_semaphore_acquire(both[1]);
    orch_future *f = orch_go(release_both, both);
    CHECK(!orch_is_settled(a) && !orch_is_settled(b));
    orch_result r = orch_await(orch_race(a, b, f));
    CHECK_INT(r.error, 0);
    CHECK(r.index < 2);
    CHECK_INT(orch_semaphore_available(both[0]) + orch_semaphore_available(both[1]), 1);
    orch_result_free(&r);
    orch_semaphore_free(both[0]), orch_semaphore_free(both[1]);
}

// all gives back what it has got when it fails.
CASE(semaphore_result_of_all_gives_back) {
    orch_semaphore *a = orch_semaphore_new(1), *b = orch_semaphore_new(1);
    orch_result r = orch_await(orch_all(orch_semaphore_acquire(a), orch_semaphore_acquire(b)));
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_semaphore_available(a) + orch_semaphore_available(b), 0);
    CHECK_INT(await_error(orch_timeout(orch_semaphore_acquire(a), 10)), ORCH_ETIMEDOUT);
    orch_result_free(&r);
    CHECK_INT(orch_acquire(b), 0);
    orch_future *both = orch_all(orch_semaphore_acquire(a), orch_semaphore_acquire(b));
    CHECK_INT(await_error(orch_timeout(both, 10)), ORCH_ETIMEDOUT);
    CHECK_INT(orch_semaphore_available(a), 1);
    CHECK_INT(orch_semaphore_available(b), 0);
    CHECK_INT(orch_release(b), 0);
    orch_semaphore_free(a), orch_semaphore_free(b);
}

CASE(semaphore_result_holds_until_freed) {
    sem = orch_semaphore_new(3);
    orch_result r = orch_await(orch_semaphore_acquire_n(sem, 2));
    CHECK_INT(r.error, 0);
    if (r.error == 0) CHECK(r.value == sem);
    CHECK(orch_take(&r) == NULL); // the permits can not be left behind
    CHECK_INT(orch_semaphore_available(sem), 1);
    orch_result_free(&r);
    CHECK_INT(orch_semaphore_available(sem), 3);
    orch_future *f = orch_semaphore_acquire(sem);
    CHECK(!orch_is_settled(f)); // not at the time of the call
    settle_down();
    CHECK(orch_is_settled(f));
    CHECK_INT(orch_semaphore_available(sem), 2);
    orch_drop(f); // unread
    CHECK_INT(orch_semaphore_available(sem), 3);
    orch_detach(orch_semaphore_acquire_n(sem, 3)); // nobody will ever see it
    settle_down();
    CHECK_INT(orch_semaphore_available(sem), 3);
    orch_future *shared = orch_semaphore_acquire(sem), *again = orch_ref(shared);
    orch_result a = orch_await(shared), b = orch_await(again);
    CHECK_INT(orch_semaphore_available(sem), 2);
    orch_result_free(&a);
    CHECK_INT(orch_semaphore_available(sem), 2);
    orch_result_free(&b);
    CHECK_INT(orch_semaphore_available(sem), 3);
    orch_semaphore_free(sem);
}

CASE(semaphore_resize_larger) {
    struct worker w[4];
    sem = orch_semaphore_new(1);
    running = most = 0;
    for (int i = 0; i < 4; i++) w[i] = new_worker(i), w[i].ms = 10, (void)go(hold, &w[i]);
    CHECK_INT(running, 1);
    CHECK_INT(orch_semaphore_resize(sem, 3), 0);
    CHECK_INT(orch_semaphore_waiting(sem), 1);
    for (int i = 0; i < 4; i++) join(&w[i]);
    CHECK_INT(most, 3);
    CHECK_INT(orch_semaphore_available(sem), 3);
    orch_semaphore_free(sem);
}

CASE(semaphore_resize_smaller_waits_for_releases) {
    struct worker w = new_worker(1);
    sem = orch_semaphore_new(3);
    CHECK_INT(orch_acquire_n(sem, 3), 0);
    CHECK_INT(orch_semaphore_resize(sem, 1), 0);
    CHECK_INT(orch_semaphore_permits(sem), 1);
    CHECK_INT(orch_semaphore_available(sem), 0);
    (void)go(hold, &w);
    CHECK_INT(orch_release_n(sem, 2), 0);
    settle_down();
    CHECK_INT(w.done, 0);
    CHECK_INT(orch_release(sem), 0);
    join(&w);
    CHECK_INT(w.error, 0);
    CHECK_INT(orch_semaphore_available(sem), 1);
    orch_semaphore_free(sem);
}

CASE(semaphore_resize_to_nothing_is_a_pause) {
    struct worker w = new_worker(1);
    sem = orch_semaphore_new(0);
    w.count = 2;
    (void)go(hold, &w);
    settle_down();
    CHECK_INT(w.done, 0);
    CHECK(!orch_try_acquire(sem));
    CHECK_INT(orch_semaphore_resize(sem, 2), 0);
    join(&w);
    CHECK_INT(w.error, 0);
    CHECK_INT(orch_semaphore_resize(sem, 0), 0);
    orch_future *f = orch_semaphore_acquire(sem);
    settle_down();
    CHECK(!orch_is_settled(f));
    CHECK_INT(orch_semaphore_resize(sem, 0), 0); // who waits for a pause to end, goes on waiting
    CHECK_INT(orch_semaphore_waiting(sem), 1);
    CHECK_INT(orch_semaphore_resize(sem, SIZE_MAX), 0);
    CHECK_INT(await_error(f), 0);
    orch_semaphore_free(sem);
}

CASE(semaphore_resize_refuses_what_can_not_be_any_more) {
    struct worker large = new_worker(1), small = new_worker(2);
    sem = orch_semaphore_new(4);
    CHECK_INT(orch_acquire_n(sem, 2), 0);
    large.count = 4;
    (void)go(hold, &large);
    (void)go(hold, &small);
    orch_future *f = orch_semaphore_acquire_n(sem, 4), *g = orch_semaphore_acquire(sem);
    CHECK_INT(orch_semaphore_resize(sem, 3), 0);
    join(&large), join(&small);
    CHECK_INT(large.error, ORCH_ELIMIT);
    CHECK_INT(small.error, 0);
    CHECK_INT(await_error(f), ORCH_ELIMIT);
    CHECK_INT(await_error(g), 0);
    CHECK_INT(orch_release_n(sem, 2), 0);
    CHECK_INT(orch_semaphore_available(sem), 3);
    orch_semaphore_free(sem);
}

CASE(semaphore_free_while_somebody_waits) {
    struct worker w = new_worker(1), kept = new_worker(2);
    sem = orch_semaphore_new(2);
    (void)go(keep, &kept);
    orch_result r = orch_await(orch_semaphore_acquire(sem));
    (void)go(keep, &w);
    orch_future *f = orch_semaphore_acquire(sem), *g = orch_semaphore_acquire(sem);
    orch_cancel(g, 0); // its hook is on the way
    orch_semaphore *freed = sem;
    orch_semaphore_free(sem);
    CHECK_INT(await_error(f), ORCH_ECLOSED);
    CHECK_INT(await_error(g), ORCH_ECLOSED);
    join(&w), join(&kept);
    CHECK_INT(w.error, ORCH_ECLOSED);
    if (r.error == 0 && kept.error == 0) { // who still holds one may give it back
        CHECK_INT(orch_acquire(freed), ORCH_ECLOSED);
        CHECK(!orch_try_acquire(freed));
        CHECK_INT(await_error(orch_semaphore_acquire(freed)), ORCH_ECLOSED);
        CHECK_INT(orch_release(freed), 0);
    } else if (kept.error == 0) {
        (void)orch_release(freed);
    }
    orch_result_free(&r);
}

// A pump that is on its way when the semaphore is freed.
CASE(semaphore_free_before_the_pump) {
    sem = orch_semaphore_new(1);
    orch_future *f = orch_semaphore_acquire(sem);
    orch_semaphore_free(sem);
    CHECK_INT(await_error(f), ORCH_ECLOSED);
}

static void free_semaphore(void *value) {
    ++*(unsigned char *)value;
    orch_semaphore_free(sem);
    sem = NULL;
}

// The permits' release may run anywhere, also in the middle of a pump, and so may what it frees.
CASE(semaphore_freed_by_a_release) {
    sem = orch_semaphore_new(1);
    orch_result t = token();
    t.release = free_semaphore;
    orch_future *f = orch_all(orch_semaphore_acquire(sem), orch_settled(t));
    orch_detach(orch_semaphore_acquire(sem));
    orch_detach(orch_semaphore_acquire(sem));
    CHECK_INT(await_error(f), 0);
    settle_down();
    if (sem != NULL) orch_semaphore_free(sem);
}

// What never waits lets others run now and then.
static orch_result hog(void *arg) {
    struct worker *w = arg;
    while (!w->done) {
        if (orch_acquire(sem) != 0 || orch_release(sem) != 0) break;
        w->count++;
    }
    return orch_ok(NULL, NULL);
}

static orch_result end_hog(void *arg) {
    struct worker *w = arg;
    w->done = 1;
    return orch_ok(NULL, NULL);
}

CASE(semaphore_does_not_starve_others) {
    struct worker w = new_worker(1);
    sem = orch_semaphore_new(1);
    orch_future *f = orch_go(hog, &w), *g = orch_go(end_hog, &w);
    CHECK_INT(await_error(f), 0);
    CHECK_INT(await_error(g), 0);
    CHECK(w.count < 1000);
    orch_semaphore_free(sem);
}

// A race that never ends for one side leaves nothing behind there.
CASE(semaphore_lost_races_leave_nothing) {
    sem = orch_semaphore_new(0);
    size_t before = slots();
    int rounds = test_shared->fail_at ? 3 : 200;
    for (int i = 0; i < rounds; i++) {
        orch_future *f = orch_race(orch_semaphore_acquire(sem), orch_settled(orch_ok_int(i)));
        CHECK_INT(await_error(f), 0);
    }
    CHECK_INT(orch_semaphore_waiting(sem), 0);
    CHECK_INT(slots(), before);
    orch_semaphore_free(sem);
}

static orch_result wait_for_ever(void *arg) {
    struct worker *w = arg;
    w->error = orch_acquire(sem);
    return orch_ok(NULL, NULL);
}

// The end of the main task ends who waits; a deadlock names what it waits for.
CASE(semaphore_waiters_end_with_the_loop) {
    static struct worker w;
    w = new_worker(1);
    sem = orch_semaphore_new(0);
    orch_detach(go(wait_for_ever, &w));
    orch_semaphore_free(sem);
    sem = NULL;
}

// ---- event

static orch_result wait_event(void *arg) {
    struct worker *w = arg;
    w->error = await_error(orch_event_wait(event));
    w->done = 1;
    note(w->id);
    return orch_ok(NULL, NULL);
}

CASE(event_wakes_everybody) {
    struct worker w[5];
    event = orch_event_new();
    for (int i = 0; i < 5; i++) w[i] = new_worker(i), (void)go(wait_event, &w[i]);
    settle_down();
    CHECK_INT(ordered, 0);
    CHECK(!orch_event_is_set(event));
    orch_event_set(event);
    CHECK(orch_event_is_set(event));
    CHECK_INT(ordered, 0); // not inside set
    orch_event_clear(event);
    CHECK(!orch_event_is_set(event));
    for (int i = 0; i < 5; i++) join(&w[i]), CHECK_INT(w[i].error, 0);
    orch_event_free(event);
    orch_event_free(NULL);
}

CASE(event_stays_set_until_cleared) {
    event = orch_event_new();
    orch_event_set(event);
    orch_event_set(event);
    CHECK_INT(await_error(orch_event_wait(event)), 0);
    CHECK_INT(await_error(orch_event_wait(event)), 0);
    orch_event_clear(event);
    CHECK_INT(await_error(orch_timeout(orch_event_wait(event), 10)), ORCH_ETIMEDOUT);
    orch_future *f = orch_event_wait(event);
    orch_event_set(event);
    CHECK_INT(await_error(f), 0);
    orch_event_free(event);
}

// Whoever leaves does not take the others along.
CASE(event_cancelled_waits) {
    struct worker w[3];
    event = orch_event_new();
    size_t before = slots();
    for (int i = 0; i < 3; i++) w[i] = new_worker(i), (void)go(wait_event, &w[i]);
    orch_drop(w[1].future);
    CHECK_INT(w[1].error, ORCH_ECANCELED);
    orch_future *f = orch_event_wait(event);
    orch_cancel(f, 0);
    CHECK_INT(await_error(f), ORCH_ECANCELED);
    settle_down();
    CHECK_INT(w[0].done + w[2].done, 0);
    orch_event_set(event);
    join(&w[0]), join(&w[2]);
    CHECK_INT(w[0].error, 0);
    CHECK_INT(w[2].error, 0);
    CHECK_INT(slots(), before);
    orch_event_free(event);
}

CASE(event_free_while_somebody_waits) {
    struct worker w = new_worker(1);
    event = orch_event_new();
    (void)go(wait_event, &w);
    orch_future *f = orch_event_wait(event);
    orch_cancel(f, 0);
    orch_event_free(event);
    CHECK_INT(await_error(f), ORCH_ECLOSED);
    join(&w);
    CHECK_INT(w.error, ORCH_ECLOSED);
}

CASE(event_lost_races_leave_nothing) {
    event = orch_event_new();
    size_t before = slots();
    int rounds = test_shared->fail_at ? 3 : 200;
    for (int i = 0; i < rounds; i++) {
        CHECK_INT(await_error(orch_race(orch_event_wait(event), orch_settled(orch_ok_int(i)))), 0);
    }
    CHECK_INT(slots(), before);
    orch_event_free(event);
}

// ---- channel

CASE(channel_keeps_order) {
    chan = orch_channel_new(100);
    for (int round = 0; round < 3; round++) { // the ring goes round, and grows
        for (intptr_t i = 0; i < 5 + 20 * round; i++) CHECK_INT(orch_send(chan, orch_ok_int(i)), 0);
        CHECK_INT(orch_channel_count(chan), (size_t)(5 + 20 * round));
        for (intptr_t i = 0; i < 5 + 20 * round; i++) {
            orch_result r = orch_recv(chan);
            CHECK_INT(r.error, 0);
            CHECK_INT(orch_int(&r), i);
        }
    }
    CHECK_INT(orch_channel_count(chan), 0);
    orch_channel_free(chan);
    orch_channel_free(NULL);
}

// Sends count items, noting each that went through.
static orch_result send_some(void *arg) {
    struct worker *w = arg;
    for (size_t i = 0; i < w->count; i++) {
        w->error = orch_send(chan, token());
        if (w->error != 0) break;
        w->done++;
    }
    return orch_ok(NULL, NULL);
}

// Receives until an error, noting the items.
static orch_result receive_all(void *arg) {
    struct worker *w = arg;
    for (;;) {
        orch_result r = orch_recv(chan);
        w->error = r.error;
        if (r.error != 0) break;
        note(token_of(&r));
        w->done++;
        orch_result_free(&r);
    }
    return orch_ok(NULL, NULL);
}

static orch_result receive_one(void *arg) {
    struct worker *w = arg;
    orch_result r = orch_recv(chan);
    w->error = r.error;
    w->done = 1;
    if (r.error == 0) note(w->id);
    orch_result_free(&r);
    return orch_ok(NULL, NULL);
}

CASE(channel_back_pressure) {
    struct worker s = new_worker(1);
    chan = orch_channel_new(3);
    s.count = 10;
    (void)go(send_some, &s);
    settle_down();
    CHECK_INT(s.done, 3); // and waits with the fourth
    CHECK_INT(orch_channel_count(chan), 3);
    orch_result r = orch_recv(chan);
    CHECK_INT(token_of(&r), 0);
    orch_result_free(&r);
    CHECK_INT(orch_channel_count(chan), 3); // it has moved up
    settle_down();
    CHECK_INT(s.done, 4);
    orch_drop(s.future);
    CHECK_INT(s.error, ORCH_ECANCELED);
    CHECK_INT(orch_channel_count(chan), 3);
    orch_channel_free(chan);
}

CASE(channel_rendezvous) {
    struct worker s = new_worker(1), r = new_worker(2);
    chan = orch_channel_new(0);
    s.count = 3;
    (void)go(send_some, &s);
    settle_down();
    CHECK_INT(s.done, 0);
    CHECK_INT(orch_channel_count(chan), 0);
    (void)go(receive_all, &r);
    join(&s);
    CHECK_INT(s.done, 3);
    orch_channel_close(chan);
    join(&r);
    CHECK_INT(r.done, 3);
    CHECK_INT(r.error, ORCH_ECLOSED);
    for (int i = 0; i < 3; i++) CHECK_INT(order[i], i);

    struct worker first = new_worker(3); // the receiver waits first
    orch_channel_free(chan);
    chan = orch_channel_new(0);
    (void)go(receive_one, &first);
    CHECK_INT(orch_send(chan, token()), 0);
    join(&first);
    CHECK_INT(first.error, 0);
    orch_channel_free(chan);
}

CASE(channel_many_senders_and_receivers) {
    struct worker s[4], r[3];
    int got[40] = {0}, received = 0;
    chan = orch_channel_new((size_t)(seed_now % 3));
    for (int i = 0; i < 4; i++) s[i] = new_worker(i), s[i].count = 10;
    for (int i = 0; i < 3; i++) r[i] = new_worker(i), (void)go(receive_all, &r[i]);
    for (int i = 0; i < 4; i++) (void)go(send_some, &s[i]);
    for (int i = 0; i < 4; i++) join(&s[i]), CHECK_INT(s[i].done, 10);
    orch_channel_close(chan);
    for (int i = 0; i < 3; i++) join(&r[i]), received += r[i].done;
    CHECK_INT(received, 40);
    for (int i = 0; i < ordered && i < 40; i++)
        if (order[i] >= 0 && order[i] < 40) got[order[i]]++;
    for (int i = 0; i < 40; i++) CHECK_INT(got[i], 1); // each exactly once
    orch_channel_free(chan);
}

CASE(channel_receivers_are_served_in_order) {
    struct worker r[6];
    chan = orch_channel_new(2);
    for (int i = 0; i < 6; i++) {
        r[i] = new_worker(i);
        if (i == 2) orch_on(orch_channel_receive(chan), noted, &r[i].id);
        else (void)go(receive_one, &r[i]);
    }
    for (int i = 0; i < 6; i++) {
        CHECK_INT(orch_send(chan, token()), 0);
        settle_down();
    }
    CHECK_INT(ordered, 6);
    for (int i = 0; i < 6; i++) CHECK_INT(order[i], i);
    for (int i = 0; i < 6; i++)
        if (i != 2) join(&r[i]);
    orch_channel_free(chan);
}

// Behind a future that waits for its pump nobody gets ahead, not even with a try.
CASE(channel_nobody_overtakes_a_future) {
    struct worker r = new_worker(1);
    orch_result item = {0};
    chan = orch_channel_new(2);
    orch_result first = token(), second = token();
    CHECK_INT(orch_try_send(chan, &first), 0);
    CHECK_INT(orch_try_send(chan, &second), 0);
    orch_result_free(&first), orch_result_free(&second);
    orch_future *f = orch_channel_receive(chan);
    CHECK_INT(orch_try_recv(chan, &item), -EAGAIN);
    (void)go(receive_one, &r);
    CHECK_INT(r.done, 0);
    orch_result got = orch_await(f);
    CHECK_INT(token_of(&got), 0);
    orch_result_free(&got);
    join(&r);
    CHECK_INT(r.error, 0);
    orch_channel_free(chan);
}

CASE(channel_no_send_overtakes_a_future) {
    struct worker s = new_worker(1);
    orch_result mine = token();
    chan = orch_channel_new(3);
    orch_future *f = orch_channel_send(chan, token());
    CHECK_INT(orch_try_send(chan, &mine), -EAGAIN);
    orch_result_free(&mine);
    s.count = 1;
    (void)go(send_some, &s);
    CHECK_INT(s.done, 0);
    for (int i = 1; i < 3; i++) {
        orch_result got = orch_recv(chan);
        CHECK_INT(token_of(&got), i);
        orch_result_free(&got);
    }
    CHECK_INT(await_error(f), 0);
    join(&s);
    orch_channel_free(chan);
}

CASE(channel_close_drains) {
    chan = orch_channel_new(3);
    CHECK(!orch_channel_is_closed(chan));
    CHECK_INT(orch_send(chan, token()), 0);
    CHECK_INT(orch_send(chan, token()), 0);
    orch_channel_close(chan);
    orch_channel_close(chan);
    CHECK(orch_channel_is_closed(chan));
    for (int i = 0; i < 2; i++) {
        orch_result r = i == 0 ? orch_recv(chan) : orch_await(orch_channel_receive(chan));
        CHECK_INT(token_of(&r), i);
        orch_result_free(&r);
    }
    CHECK_INT(error_of(orch_recv(chan)), ORCH_ECLOSED);
    CHECK_INT(await_error(orch_channel_receive(chan)), ORCH_ECLOSED);
    orch_result item = {0};
    CHECK_INT(orch_try_recv(chan, &item), ORCH_ECLOSED);
    orch_channel_free(chan);
}

CASE(channel_closed_send_frees_the_item) {
    struct worker s = new_worker(1);
    chan = orch_channel_new(1);
    s.count = 2;
    (void)go(send_some, &s);
    orch_future *f = orch_channel_send(chan, token());
    settle_down();
    orch_channel_close(chan);
    join(&s);
    CHECK_INT(s.done, 1);
    CHECK_INT(s.error, ORCH_ECLOSED);
    CHECK_INT(await_error(f), ORCH_ECLOSED);
    CHECK_INT(orch_send(chan, token()), ORCH_ECLOSED);
    CHECK_INT(await_error(orch_channel_send(chan, token())), ORCH_ECLOSED);
    orch_result mine = token();
    CHECK_INT(orch_try_send(chan, &mine), ORCH_ECLOSED);
    orch_result_free(&mine); // was left with the caller
    CHECK_INT(orch_channel_count(chan), 1);
    orch_channel_free(chan);
}

CASE(channel_close_wakes_receivers) {
    struct worker r = new_worker(1);
    chan = orch_channel_new(1);
    (void)go(receive_one, &r);
    orch_future *f = orch_channel_receive(chan);
    orch_channel_close(chan);
    join(&r);
    CHECK_INT(r.error, ORCH_ECLOSED);
    CHECK_INT(await_error(f), ORCH_ECLOSED);
    orch_channel_free(chan);
}

// The pump serves what came before the close.
CASE(channel_close_before_the_pump) {
    chan = orch_channel_new(1);
    CHECK_INT(orch_send(chan, token()), 0);
    orch_future *f = orch_channel_receive(chan), *g = orch_channel_receive(chan);
    orch_channel_close(chan);
    CHECK_INT(await_error(f), 0);
    CHECK_INT(await_error(g), ORCH_ECLOSED);
    orch_channel_free(chan);
}

CASE(channel_free_with_items_and_waiters) {
    struct worker s = new_worker(1), r = new_worker(2);
    chan = orch_channel_new(1);
    s.count = 2;
    (void)go(send_some, &s);
    orch_future *f = orch_channel_send(chan, token()), *g = orch_channel_send(chan, token());
    orch_cancel(g, 0);
    orch_channel_free(chan); // frees one item of its own, and those of the senders
    CHECK_INT(await_error(f), ORCH_ECLOSED);
    CHECK_INT(await_error(g), ORCH_ECLOSED);
    join(&s);
    CHECK_INT(s.error, ORCH_ECLOSED);

    chan = orch_channel_new(1);
    (void)go(receive_one, &r);
    f = orch_channel_receive(chan), g = orch_channel_receive(chan);
    orch_cancel(f, 0);
    orch_channel_free(chan);
    CHECK_INT(await_error(f), ORCH_ECLOSED);
    CHECK_INT(await_error(g), ORCH_ECLOSED);
    join(&r);
    CHECK_INT(r.error, ORCH_ECLOSED);

    chan = orch_channel_new(2); // with the pump on its way, for one and for the other
    CHECK_INT(orch_send(chan, token()), 0);
    f = orch_channel_receive(chan), g = orch_channel_send(chan, token());
    orch_channel_free(chan);
    CHECK_INT(await_error(f), ORCH_ECLOSED);
    CHECK_INT(await_error(g), ORCH_ECLOSED);
}

CASE(channel_cancelled_waits_take_nothing) {
    struct worker r[2] = {new_worker(0), new_worker(1)}, s[2] = {new_worker(2), new_worker(3)};
    chan = orch_channel_new(1);
    (void)go(receive_one, &r[0]), (void)go(receive_one, &r[1]);
    orch_drop(r[0].future);
    CHECK_INT(r[0].error, ORCH_ECANCELED);
    CHECK_INT(orch_send(chan, token()), 0);
    join(&r[1]);
    CHECK_INT(r[1].error, 0);

    CHECK_INT(orch_send(chan, token()), 0);
    s[0].count = s[1].count = 1;
    (void)go(send_some, &s[0]), (void)go(send_some, &s[1]);
    orch_drop(s[0].future);
    CHECK_INT(s[0].error, ORCH_ECANCELED); // and its item is free
    if (issued > 2) CHECK_INT(tokens[2], 1);
    for (int i = 0; i < 2; i++) {
        orch_result got = orch_recv(chan);
        CHECK_INT(token_of(&got), i == 0 ? 1 : 3);
        orch_result_free(&got);
    }
    join(&s[1]);
    CHECK_INT(s[1].error, 0);
    orch_channel_free(chan);
}

// An item that was handed over is the task's, though it is cancelled before it runs; and one that
// was cancelled before gets none.
CASE(channel_cancelled_in_the_moment_of_the_item) {
    struct worker r = new_worker(1);
    chan = orch_channel_new(1);
    (void)go(receive_one, &r);
    CHECK_INT(orch_send(chan, token()), 0);
    orch_drop(r.future);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_channel_count(chan), 0);

    r = new_worker(2);
    (void)go(receive_one, &r);
    orch_cancel(r.future, 0);
    CHECK_INT(orch_send(chan, token()), 0);
    orch_drop(r.future);
    CHECK_INT(r.error, ORCH_ECANCELED);
    CHECK_INT(orch_channel_count(chan), 1);
    orch_channel_free(chan);
}

// In a cancelled task: what is there is received, what has room is sent, a wait is refused.
static orch_result cancelled_user(void *arg) {
    struct worker *w = arg;
    CHECK_INT(orch_sleep(1000), ORCH_ECANCELED);
    CHECK_INT(orch_send(chan, token()), 0);
    CHECK_INT(orch_send(chan, token()), ORCH_ECANCELED);
    CHECK_INT(await_error(orch_channel_send(chan, token())), ORCH_ECANCELED);
    CHECK_INT(error_of(orch_recv(chan)), 0);
    CHECK_INT(error_of(orch_recv(chan)), ORCH_ECANCELED);
    CHECK_INT(await_error(orch_channel_receive(chan)), ORCH_ECANCELED);
    w->done = 1;
    return orch_ok(NULL, NULL);
}

CASE(channel_in_a_cancelled_task) {
    struct worker w = new_worker(1);
    chan = orch_channel_new(1);
    (void)go(cancelled_user, &w);
    orch_drop(w.future);
    CHECK_INT(w.done, 1);
    CHECK_INT(orch_channel_count(chan), 0);
    orch_channel_free(chan);
}

// ---- select

static void two_channels(size_t capacity) {
    chan = orch_channel_new(capacity);
    other = orch_channel_new(capacity);
}

static void free_two(void) { orch_channel_free(chan), orch_channel_free(other); }

static size_t items(void) { return orch_channel_count(chan) + orch_channel_count(other); }

CASE(channel_select_takes_one_of_two) {
    two_channels(2);
    CHECK_INT(orch_send(chan, token()), 0);
    CHECK_INT(orch_send(other, token()), 0);
    orch_result r = orch_await(orch_race(orch_channel_receive(chan), orch_channel_receive(other)));
    CHECK_INT(r.error, 0);
    CHECK_INT(token_of(&r), r.index == 0 ? 0 : 1);
    orch_result_free(&r);
    CHECK_INT(items(), 1); // the other one is still there
    r = orch_await(orch_race(orch_channel_receive(chan), orch_channel_receive(other)));
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    CHECK_INT(items(), 0);
    free_two();
}

// The items come later, both in one breath.
CASE(channel_select_waits) {
    two_channels(seed_now % 2);
    orch_future *f = orch_race(orch_channel_receive(chan), orch_channel_receive(other));
    settle_down();
    struct worker s = new_worker(1);
    s.count = 1;
    (void)go(send_some, &s);
    orch_future *g = orch_channel_send(other, token());
    orch_result r = orch_await(f);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    settle_down();
    orch_result item;
    int left = 0; // with no place to wait in the item stays with its sender
    while (orch_try_recv(chan, &item) == 0) left++, orch_result_free(&item);
    while (orch_try_recv(other, &item) == 0) left++, orch_result_free(&item);
    CHECK_INT(left, 1);
    join(&s);
    CHECK_INT(await_error(g), 0);
    free_two();
}

// A task that starts inside the expression sends before the race is complete: nothing is lost.
static orch_result feed_both(void *arg) {
    (void)arg;
    CHECK_INT(orch_send(chan, token()), 0);
    CHECK_INT(orch_send(other, token()), 0);
    return orch_chain(orch_after(1000));
}

CASE(channel_select_with_its_sender_inside) {
    two_channels(1);
    orch_future *a = orch_channel_receive(chan), *b = orch_channel_receive(other);
    orch_result r = orch_await(orch_race(a, b, orch_go(feed_both, NULL)));
    CHECK_INT(r.error, 0);
    CHECK(r.index < 2);
    orch_result_free(&r);
    CHECK_INT(items(), 1);
    free_two();
}

CASE(channel_select_nested) {
    two_channels(2);
    CHECK_INT(orch_send(chan, token()), 0);
    CHECK_INT(orch_send(other, token()), 0);
    orch_future *deep = orch_timeout(orch_any(orch_channel_receive(chan), orch_after(500)), 100);
    orch_future *chained = orch_then(orch_channel_receive(other), NULL, NULL, NULL);
    orch_result r = orch_await(orch_timeout(orch_race(deep, orch_race(chained)), 50));
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    CHECK_INT(items(), 1);
    free_two();
}

// quorum and gather take what they need, no more.
CASE(channel_select_in_quorum_and_gather) {
    two_channels(3);
    for (int i = 0; i < 3; i++) CHECK_INT(orch_send(chan, token()), 0);
    orch_future *f[3];
    for (int i = 0; i < 3; i++) f[i] = orch_channel_receive(chan);
    CHECK_INT(await_error(orch_quorum_n(2, 3, f)), 0);
    CHECK_INT(items(), 1);
    f[0] = orch_channel_receive(chan), f[1] = orch_channel_receive(other);
    orch_result r = orch_await(orch_gather_n(2, f, 20));
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_at(&r, 0)->error, 0);
    CHECK_INT(orch_at(&r, 1)->error, ORCH_ETIMEDOUT);
    orch_result_free(&r);
    orch_result late = token();
    CHECK_INT(orch_try_send(other, &late), 0);
    orch_result_free(&late);
    settle_down();
    CHECK_INT(items(), 1);
    free_two();
}

CASE(channel_timeout_takes_nothing) {
    chan = orch_channel_new(1);
    CHECK_INT(await_error(orch_timeout(orch_channel_receive(chan), 30)), ORCH_ETIMEDOUT);
    CHECK_INT(orch_send(chan, token()), 0);
    settle_down();
    CHECK_INT(orch_channel_count(chan), 1);
    CHECK_INT(await_error(orch_timeout(orch_channel_send(chan, token()), 30)), ORCH_ETIMEDOUT);
    if (issued == 2) CHECK_INT(tokens[1], 1); // not sent: free
    CHECK_INT(orch_channel_count(chan), 1);
    CHECK_INT(await_error(orch_timeout(orch_channel_receive(chan), 30)), 0);
    orch_channel_free(chan);
}

// A race that is decided, and whose loser has not been told yet, gets nothing.
CASE(channel_decided_race_gets_nothing) {
    orch_promise p;
    chan = orch_channel_new(1);
    orch_future *f = orch_race(orch_channel_receive(chan), orch_future_new(&p));
    settle_down();
    orch_settle(p, orch_ok_int(1));
    CHECK_INT(orch_send(chan, token()), 0);
    CHECK_INT(await_error(f), 0);
    CHECK_INT(orch_channel_count(chan), 1);

    f = orch_channel_receive(chan); // asked to end, and not told yet
    orch_future *g = orch_channel_receive(chan);
    orch_cancel(f, 0);
    CHECK_INT(await_error(g), 0);
    CHECK_INT(await_error(f), ORCH_ECANCELED);
    orch_channel_free(chan);
}

// A select of sends sends one.
CASE(channel_select_of_sends) {
    two_channels(seed_now % 2);
    orch_future *f = orch_race(orch_channel_send(chan, token()), orch_channel_send(other, token()));
    settle_down();
    orch_result item, got = orch_ok(NULL, NULL);
    for (int i = 0; i < 2; i++) {
        if (orch_try_recv(i == 0 ? chan : other, &item) != 0) continue;
        CHECK(got.release == NULL); // exactly one
        got = item;
    }
    orch_result r = orch_await(f);
    CHECK_INT(r.error, 0);
    CHECK_INT(token_of(&got), (int)r.index);
    orch_result_free(&got);
    settle_down();
    CHECK_INT(orch_try_recv(chan, &item), -EAGAIN);
    CHECK_INT(orch_try_recv(other, &item), -EAGAIN);
    free_two();
}

CASE(channel_futures_hand_to_hand) {
    chan = orch_channel_new(0);
    orch_future *s = orch_channel_send(chan, token()), *r = orch_channel_receive(chan);
    CHECK(!orch_is_settled(s) && !orch_is_settled(r));
    orch_result got = orch_await(r);
    CHECK_INT(token_of(&got), 0);
    orch_result_free(&got);
    CHECK_INT(await_error(s), 0);

    s = orch_channel_send(chan, token()); // to a task
    got = orch_recv(chan);
    CHECK_INT(token_of(&got), 1);
    orch_result_free(&got);
    CHECK_INT(await_error(s), 0);

    r = orch_channel_receive(chan); // from a task
    CHECK_INT(orch_send(chan, token()), 0);
    CHECK_INT(await_error(r), 0);
    orch_channel_free(chan);
}

CASE(channel_lost_races_leave_nothing) {
    two_channels(1);
    size_t before = slots();
    int rounds = test_shared->fail_at ? 3 : 100;
    for (int i = 0; i < rounds; i++) {
        orch_future *f = orch_race(orch_channel_receive(chan), orch_settled(orch_ok_int(i)),
                                   orch_channel_receive(other));
        CHECK_INT(await_error(f), 0);
    }
    CHECK_INT(slots(), before);
    CHECK_INT(orch_send(chan, token()), 0);
    CHECK_INT(items(), 1);
    free_two();
}

// ---- the rest of a channel

CASE(channel_try) {
    orch_result item = {0}, mine = token();
    chan = orch_channel_new(1);
    CHECK_INT(orch_try_recv(chan, &item), -EAGAIN);
    CHECK_INT(orch_try_send(chan, &mine), 0);
    CHECK(mine.release == NULL); // was moved
    orch_result_free(&mine);
    mine = token();
    CHECK_INT(orch_try_send(chan, &mine), -EAGAIN);
    CHECK(mine.release != NULL); // was not
    orch_result_free(&mine);
    CHECK_INT(orch_try_recv(chan, &item), 0);
    CHECK_INT(token_of(&item), 0);
    orch_result_free(&item);
    orch_channel_free(chan);
}

CASE(channel_try_hand_to_hand) {
    struct worker r = new_worker(1), s = new_worker(2);
    orch_result item = {0}, mine = token();
    chan = orch_channel_new(0);
    CHECK_INT(orch_try_send(chan, &mine), -EAGAIN);
    (void)go(receive_one, &r);
    CHECK_INT(orch_try_send(chan, &mine), 0); // to a task that waits
    join(&r);
    CHECK_INT(r.error, 0);
    orch_result_free(&mine), mine = token();
    orch_future *f = orch_channel_receive(chan);
    CHECK_INT(orch_try_send(chan, &mine), 0); // to a future that waits
    orch_result_free(&mine), mine = token();
    CHECK_INT(orch_try_send(chan, &mine), -EAGAIN);
    CHECK_INT(await_error(f), 0);
    f = orch_channel_receive(chan); // which is cancelled after that: the item stays for the next
    CHECK_INT(orch_try_send(chan, &mine), 0);
    orch_drop(f);
    orch_result_free(&mine);
    CHECK_INT(error_of(orch_recv(chan)), 0);

    s.count = 1;
    (void)go(send_some, &s);
    CHECK_INT(orch_try_recv(chan, &item), 0); // from a task that waits
    orch_result_free(&item);
    join(&s);
    CHECK_INT(s.done, 1);
    f = orch_channel_send(chan, token());
    CHECK_INT(orch_try_recv(chan, &item), 0); // from a future
    orch_result_free(&item);
    CHECK_INT(await_error(f), 0);
    orch_channel_free(chan);
}

CASE(channel_without_bound) {
    chan = orch_channel_new(SIZE_MAX);
    int count = test_shared->fail_at ? 20 : 300;
    for (int i = 0; i < count; i++) CHECK_INT(orch_send(chan, orch_ok_int(i)), 0);
    CHECK_INT(orch_channel_count(chan), (size_t)count);
    for (int i = 0; i < count; i++) {
        orch_result r = orch_recv(chan);
        CHECK_INT(orch_int(&r), i);
    }
    orch_channel_free(chan);
}

// Errors, messages and lists travel as they are.
CASE(channel_any_result_is_an_item) {
    chan = orch_channel_new(4);
    CHECK_INT(orch_send(chan, orch_failf(7, "seven")), 0);
    CHECK_INT(orch_send(chan, orch_failf(8, "eight")), 0);
    orch_result list = orch_await(orch_all(orch_settled(token()), orch_settled(orch_ok_int(3))));
    bool sent = list.error == 0;
    CHECK_INT(orch_send(chan, list), 0);
    orch_result r = orch_recv(chan);
    CHECK_INT(r.error, 7);
    CHECK_STR(orch_message(&r), "seven");
    orch_result_free(&r);
    r = orch_await(orch_channel_receive(chan));
    CHECK_INT(r.error, 8);
    CHECK_STR(orch_message(&r), "eight");
    orch_result_free(&r);
    r = orch_recv(chan);
    if (sent) CHECK_INT(orch_int(orch_at(&r, 1)), 3);
    orch_result_free(&r);
    orch_channel_free(chan);
    CHECK_INT(unhandled, 0);
}

// A release may do anything with the channel that it is in.
static void reenter(void *value) {
    orch_result item = token();
    ++*(unsigned char *)value;
    if (chan == NULL || orch_try_send(chan, &item) != 0) orch_result_free(&item);
    if (chan == NULL) return;
    if (orch_try_recv(chan, &item) == 0) orch_result_free(&item);
    orch_channel *freed = chan;
    chan = NULL;
    orch_channel_free(freed);
}

CASE(channel_freed_by_a_release) {
    for (int way = 0; way < 4; way++) {
        orch_result t = token();
        t.release = reenter;
        chan = orch_channel_new(way == 3 ? 0 : 2);
        other = orch_channel_new(1); // in a sweep chan may be gone early
        if (way == 0) {              // of an item that nobody sees
            orch_detach(orch_channel_receive(chan));
            orch_detach(orch_channel_receive(chan));
            CHECK_INT(orch_send(chan, t), 0);
        } else if (way == 1) { // of an item that is cancelled
            orch_future *f = orch_channel_send(chan, t);
            orch_drop(f);
        } else if (way == 2) { // of what is in it when it is closed
            CHECK_INT(orch_send(chan, t), 0);
            orch_future *f = orch_channel_send(chan != NULL ? chan : other, token());
            orch_channel *freed = chan;
            chan = NULL;
            orch_channel_free(freed);
            CHECK_INT(await_error(f), ORCH_ECLOSED);
        } else { // of a sender that it closes
            orch_detach(orch_channel_send(chan, t));
            if (chan != NULL) orch_channel_close(chan);
        }
        settle_down();
        orch_channel_free(chan);
        orch_channel_free(other);
        chan = NULL;
    }
}

// Senders and receivers that never wait let others run.
static orch_result echo(void *arg) {
    struct worker *w = arg;
    while (!w->done) {
        if (orch_send(chan, orch_ok_int(1)) != 0 || error_of(orch_recv(chan)) != 0) break;
        w->count++;
    }
    return orch_ok(NULL, NULL);
}

CASE(channel_does_not_starve_others) {
    struct worker w = new_worker(1);
    chan = orch_channel_new(1);
    orch_future *f = orch_go(echo, &w), *g = orch_go(end_hog, &w);
    CHECK_INT(await_error(f), 0);
    CHECK_INT(await_error(g), 0);
    CHECK(w.count < 1000);
    orch_channel_free(chan);
}

static orch_result pass_on(orch_result *in, void *context) {
    orch_result mine = *in;
    (void)context;
    in->release = NULL;
    if (orch_try_send(chan, &mine) != 0) orch_result_free(&mine);
    return orch_ok(NULL, NULL);
}

// From callbacks the try forms and the futures.
CASE(channel_from_a_callback) {
    chan = orch_channel_new(1);
    orch_future *f = orch_then(orch_settled(token()), pass_on, NULL, NULL);
    orch_result r = orch_recv(chan);
    CHECK_INT(token_of(&r), 0);
    orch_result_free(&r);
    CHECK_INT(await_error(f), 0);
    orch_channel_free(chan);
}

// A pipeline: every stage with its own bound, closed from the front.
static orch_result stage(void *arg) {
    (void)arg;
    for (;;) {
        orch_result r = orch_recv(chan);
        if (r.error != 0) break;
        (void)orch_sleep(3);
        if (orch_send(other, r) != 0) break;
    }
    return orch_ok(NULL, NULL);
}

CASE(channel_pipeline) {
    struct worker s = new_worker(1);
    two_channels(1);
    s.count = 9;
    uint64_t start = orch_now();
    orch_future *f = orch_go(send_some, &s);
    orch_future *g = orch_all(orch_go(stage, NULL), orch_go(stage, NULL), orch_go(stage, NULL));
    for (int i = 0; i < 9; i++) CHECK_INT(error_of(orch_recv(other)), 0);
    CHECK_INT(orch_now() - start, 9); // three at a time, 3 ms each
    orch_channel_close(chan);
    CHECK_INT(await_error(g), 0);
    CHECK_INT(await_error(f), 0);
    free_two();
}

// ---- everything at once, drawn from the seed

static int sent, received, holding;

static size_t draw(size_t below) { return (size_t)(orch_random() % below); }

static void draw_receive(orch_channel *c) {
    orch_result r;
    switch (draw(4)) {
    case 0: r = orch_recv(c); break;
    case 1: r = orch_await(orch_timeout(orch_channel_receive(c), draw(4))); break;
    case 2:
        r = orch_await(orch_race(orch_channel_receive(chan), orch_channel_receive(other)));
        break;
    default:
        if (orch_try_recv(c, &r) != 0) return;
    }
    if (token_of(&r) >= 0) received++;
    orch_result_free(&r);
}

static void draw_send(orch_channel *c) {
    orch_result mine = token();
    int error;
    switch (draw(4)) {
    case 0: error = orch_send(c, mine); break;
    case 1: error = await_error(orch_timeout(orch_channel_send(c, mine), draw(4))); break;
    case 2:
        error = await_error(
            orch_race(orch_channel_send(chan, mine), orch_channel_send(other, token())));
        break;
    default:
        error = orch_try_send(c, &mine);
        if (error != 0) orch_result_free(&mine);
    }
    if (error == 0) sent++;
}

static void draw_permits(void) {
    size_t count = 1 + draw(3);
    if (draw(2)) {
        if (orch_acquire_n(sem, count) != 0) return;
        holding += (int)count;
        CHECK(holding <= 4);
        (void)orch_sleep(draw(3));
        holding -= (int)count;
        CHECK_INT(orch_release_n(sem, count), 0);
    } else {
        orch_result r = orch_await(orch_timeout(orch_semaphore_acquire_n(sem, count), draw(4)));
        if (r.error == 0) {
            holding += (int)count;
            CHECK(holding <= 4);
            (void)orch_yield();
            holding -= (int)count;
        }
        orch_result_free(&r);
    }
}

static orch_result do_anything(void *arg) {
    (void)arg;
    for (int i = 0; i < 12 && orch_cancel_reason() == 0; i++) {
        orch_channel *c = draw(2) ? chan : other;
        size_t what = draw(5);
        if (what < 2) draw_send(c);
        else if (what < 4) draw_receive(c);
        else draw_permits();
    }
    return orch_ok(NULL, NULL);
}

// Whatever was sent was received or is still there, permits are all back, nobody is left waiting.
CASE(channel_and_semaphore_at_random) {
    orch_future *f[10];
    sem = orch_semaphore_new(4);
    chan = orch_channel_new(draw(3));
    other = orch_channel_new(draw(3));
    sent = received = holding = 0;
    for (int i = 0; i < 10; i++) f[i] = orch_go(do_anything, NULL);
    for (int i = 0; i < 10; i++) {
        (void)orch_sleep(draw(3));
        if (draw(2)) orch_cancel(f[i], 0);
    }
    (void)orch_sleep(20);
    orch_drop(orch_gather_n(10, f, 0)); // the rest is cancelled
    CHECK_INT(orch_semaphore_available(sem), 4);
    CHECK_INT(orch_semaphore_waiting(sem), 0);
    CHECK_INT(received + (int)items(), sent);
    CHECK_INT(slots(), 1); // the main task
    orch_semaphore_free(sem);
    free_two();
}

// ---- topic

static int seen[4][64], seen_count[4];
static int failures, failure_error, released, started, ended;
static orch_subscription *subscriptions[4];

static void topic_start(void) {
    memset(seen_count, 0, sizeof seen_count);
    memset(subscriptions, 0, sizeof subscriptions);
    failures = failure_error = released = started = ended = 0;
    topic = orch_topic_new();
}

// Each event is a token or a number; the context says whose queue it was in.
static void see(const orch_result *e, void *context) {
    int who = *(int *)context;
    if (seen_count[who] < 64) {
        seen[who][seen_count[who]] = e->release != NULL ? token_of(e) : (int)orch_int(e);
    }
    seen_count[who]++;
}

static orch_result react(const orch_result *e, void *context) {
    see(e, context);
    return orch_ok(NULL, NULL);
}

static orch_result react_slowly(const orch_result *e, void *context) {
    started++;
    int error = orch_sleep(100);
    ended++;
    if (error != 0) return orch_fail(error);
    see(e, context);
    return orch_ok(NULL, NULL);
}

static orch_result react_and_fail(const orch_result *e, void *context) {
    see(e, context);
    return orch_failf(40 + seen_count[*(int *)context], "can not");
}

static orch_result fail_later(void *arg) {
    (void)arg;
    (void)orch_sleep(5);
    return orch_fail(77);
}

static orch_result react_with_a_chain(const orch_result *e, void *context) {
    see(e, context);
    return orch_chain(orch_go(fail_later, NULL));
}

static orch_result react_by_passing(const orch_result *e, void *context) {
    see(e, context);
    return *e;
}

static void on_failure(const orch_result *r, void *context) {
    (void)context;
    failures++;
    failure_error = r->error;
}

static void count_release(void *context) {
    (void)context;
    released++;
}

static int names[4] = {0, 1, 2, 3};

static orch_subscription *subscribe(int who, orch_subscriber_fn fn, size_t capacity) {
    return subscriptions[who] = orch_subscribe(topic, &(orch_subscribe_desc){
                                                          .capacity = capacity,
                                                          .on_event = fn,
                                                          .on_error = on_failure,
                                                          .context = &names[who],
                                                          .release = count_release,
                                                      });
}

static void topic_end(void) {
    orch_topic_free(topic);
    for (int i = 0; i < 4; i++) orch_unsubscribe(subscriptions[i]);
}

static orch_subscription_stats stats_of(int who) {
    return orch_subscription_statistics(subscriptions[who]);
}

CASE(topic_everybody_gets_everything_in_order) {
    topic_start();
    for (int who = 0; who < 3; who++) (void)subscribe(who, react, 0);
    for (int i = 0; i < 10; i++) {
        CHECK_INT(orch_publish(topic, token()), 0);
        if (i % 4 == 3) settle_down();
    }
    CHECK_INT(seen_count[0], 8); // not inside publish
    settle_down();
    for (int who = 0; who < 3; who++) {
        CHECK_INT(seen_count[who], 10);
        for (int i = 0; i < 10; i++) CHECK_INT(seen[who][i], i);
        CHECK_INT(stats_of(who).delivered, 10);
        CHECK_INT(stats_of(who).dropped, 0);
        CHECK_INT(stats_of(who).waiting, 0);
    }
    for (int i = 0; i < 10; i++) CHECK_INT(tokens[i], 1); // nobody keeps them
    topic_end();
    CHECK_INT(released, 3);
    CHECK_INT(failures, 0);
    orch_topic_free(NULL);
    orch_unsubscribe(NULL);
}

CASE(topic_slow_subscriber_holds_up_nobody) {
    topic_start();
    (void)subscribe(0, react_slowly, 0);
    (void)subscribe(1, react, 0);
    uint64_t start = orch_now();
    for (int i = 0; i < 5; i++) CHECK_INT(orch_publish(topic, orch_ok_int(i)), 0);
    settle_down();
    CHECK_INT(orch_now(), start);
    CHECK_INT(seen_count[1], 5);
    CHECK_INT(seen_count[0], 0);
    CHECK_INT(stats_of(0).waiting, 4);
    (void)orch_sleep(250);
    CHECK_INT(seen_count[0], 2); // one at a time
    (void)orch_sleep(300);
    CHECK_INT(seen_count[0], 5);
    for (int i = 0; i < 5; i++) CHECK_INT(seen[0][i], i);
    topic_end();
}

CASE(topic_failing_subscriber_is_told) {
    topic_start();
    (void)subscribe(0, react_and_fail, 0);
    (void)subscribe(1, react, 0);
    (void)subscribe(2, react_with_a_chain, 0);
    (void)subscribe(3, react_by_passing, 0);
    CHECK_INT(orch_publish(topic, token()), 0);
    CHECK_INT(orch_publish(topic, token()), 0);
    settle_down();
    CHECK_INT(seen_count[0], 2);
    CHECK_INT(seen_count[1], 2);
    CHECK_INT(seen_count[3], 2);
    CHECK_INT(failures, 2);
    CHECK_INT(failure_error, 42);
    CHECK_INT(stats_of(0).failed, 2);
    CHECK_INT(stats_of(1).failed, 0);
    (void)orch_sleep(20);
    CHECK_INT(failures, 4);
    CHECK_INT(failure_error, 77);
    CHECK_INT(stats_of(2).delivered, 2);
    CHECK_INT(stats_of(2).failed, 2);
    topic_end();
    CHECK_INT(unhandled, 0);
}

CASE(topic_failure_without_a_hook_is_unhandled) {
    topic_start();
    subscriptions[0] = orch_subscribe(
        topic, &(orch_subscribe_desc){.on_event = react_and_fail, .context = &names[0]});
    CHECK_INT(orch_publish(topic, token()), 0);
    settle_down();
    CHECK_INT(unhandled, 1);
    CHECK_INT(unhandled_error, 41);
    topic_end();
}

CASE(topic_overflow_drops_the_oldest) {
    topic_start();
    (void)subscribe(0, NULL, 3);
    for (int i = 0; i < 8; i++) CHECK_INT(orch_publish(topic, token()), 0);
    settle_down();
    for (int i = 0; i < 5; i++) CHECK_INT(tokens[i], 1);
    CHECK_INT(stats_of(0).dropped, 5);
    CHECK_INT(stats_of(0).waiting, 3);
    for (int i = 5; i < 8; i++) {
        orch_result r = orch_await(orch_subscription_next(subscriptions[0]));
        CHECK_INT(token_of(&r), i);
        orch_result_free(&r);
    }
    CHECK_INT(stats_of(0).delivered, 3);
    topic_end();
}

CASE(topic_overflow_drops_the_newest) {
    topic_start();
    subscriptions[0] = orch_subscribe(
        topic, &(orch_subscribe_desc){.capacity = 3, .overflow = ORCH_OVERFLOW_DROP_NEWEST});
    (void)subscribe(1, react, 0);
    for (int i = 0; i < 8; i++) CHECK_INT(orch_publish(topic, token()), 0);
    settle_down();
    CHECK_INT(seen_count[1], 8);
    for (int i = 3; i < 8; i++) CHECK_INT(tokens[i], 1);
    CHECK_INT(stats_of(0).dropped, 5);
    for (int i = 0; i < 3; i++) {
        orch_result r = orch_await(orch_subscription_next(subscriptions[0]));
        CHECK_INT(token_of(&r), i);
        orch_result_free(&r);
    }
    topic_end();
}

CASE(topic_overflow_closes) {
    topic_start();
    subscriptions[0] = orch_subscribe(
        topic, &(orch_subscribe_desc){.capacity = 2, .overflow = ORCH_OVERFLOW_CLOSE});
    subscriptions[1] = orch_subscribe(topic, &(orch_subscribe_desc){
                                                 .capacity = 2,
                                                 .overflow = ORCH_OVERFLOW_CLOSE,
                                                 .on_event = react_slowly,
                                                 .on_error = on_failure,
                                                 .context = &names[1],
                                             });
    (void)subscribe(2, react, 0);
    for (int i = 0; i < 6; i++) CHECK_INT(orch_publish(topic, token()), 0);
    for (int i = 0; i < 2; i++) {
        orch_result r = orch_await(orch_subscription_next(subscriptions[0]));
        CHECK_INT(token_of(&r), i);
        orch_result_free(&r);
    }
    CHECK_INT(await_error(orch_subscription_next(subscriptions[0])), ORCH_ECLOSED);
    CHECK_INT(stats_of(0).dropped, 1);
    CHECK_INT(failures, 0); // what waits comes first
    (void)orch_sleep(1000);
    CHECK_INT(seen_count[1], 2);
    CHECK_INT(failures, 1);
    CHECK_INT(failure_error, ORCH_ECLOSED);
    CHECK_INT(orch_publish(topic, token()), 0);
    settle_down();
    CHECK_INT(seen_count[2], 7);
    CHECK_INT(seen_count[1], 2);
    topic_end();
}

CASE(topic_next_in_a_race) {
    topic_start();
    (void)subscribe(0, NULL, 0);
    (void)subscribe(1, NULL, 0);
    orch_future *f = orch_race(orch_subscription_next(subscriptions[0]),
                               orch_subscription_next(subscriptions[1]));
    settle_down();
    CHECK(!orch_is_settled(f));
    CHECK_INT(orch_publish(topic, token()), 0);
    orch_result r = orch_await(f);
    CHECK_INT(token_of(&r), 0);
    orch_result_free(&r);
    CHECK_INT(stats_of(0).waiting + stats_of(1).waiting, 1); // the loser has it still
    CHECK_INT(await_error(orch_timeout(orch_race(orch_subscription_next(subscriptions[0]),
                                                 orch_subscription_next(subscriptions[1])),
                                       10)),
              0);
    CHECK_INT(stats_of(0).waiting + stats_of(1).waiting, 0);
    CHECK_INT(await_error(orch_timeout(orch_subscription_next(subscriptions[0]), 10)),
              ORCH_ETIMEDOUT);
    CHECK_INT(orch_publish(topic, token()), 0);
    settle_down();
    CHECK_INT(stats_of(0).waiting, 1);
    topic_end();
}

// Shares: messages and lists can be read in each; the last one owns the value.
CASE(topic_events_are_shares) {
    topic_start();
    (void)subscribe(0, NULL, 0);
    (void)subscribe(1, NULL, 0);
    CHECK_INT(orch_publish(topic, orch_failf(9, "nine")), 0);
    CHECK_INT(orch_publish(topic, orch_await(orch_all(orch_settled(token())))), 0);
    for (int who = 0; who < 2; who++) {
        orch_result r = orch_await(orch_subscription_next(subscriptions[who]));
        CHECK_INT(r.error, 9);
        CHECK_STR(orch_message(&r), "nine");
        orch_result_free(&r);
        r = orch_await(orch_subscription_next(subscriptions[who]));
        CHECK_INT(orch_count(&r), 1);
        orch_result_free(&r);
    }
    CHECK_INT(orch_publish(topic, token()), 0);
    orch_result a = orch_await(orch_subscription_next(subscriptions[0]));
    orch_result b = orch_await(orch_subscription_next(subscriptions[1]));
    CHECK(a.error != 0 || b.error != 0 || a.value == b.value);
    orch_result_free(&a);
    if (b.error == 0) CHECK_INT(tokens[1], 0);
    orch_result_free(&b);
    CHECK_INT(unhandled, 0);
    topic_end();
}

CASE(topic_without_subscribers) {
    topic_start();
    CHECK_INT(orch_publish(topic, token()), 0);
    CHECK_INT(tokens[0], 1);
    (void)subscribe(0, NULL, 0);
    orch_unsubscribe(subscriptions[0]);
    subscriptions[0] = NULL;
    CHECK_INT(released, 1);
    CHECK_INT(orch_publish(topic, token()), 0);
    CHECK_INT(tokens[1], 1);
    topic_end();
}

CASE(topic_late_subscriber_sees_what_comes) {
    topic_start();
    (void)subscribe(0, react, 0);
    CHECK_INT(orch_publish(topic, orch_ok_int(1)), 0);
    (void)subscribe(1, react, 0);
    CHECK_INT(orch_publish(topic, orch_ok_int(2)), 0);
    settle_down();
    CHECK_INT(seen_count[0], 2);
    CHECK_INT(seen_count[1], 1);
    CHECK_INT(seen[1][0], 2);
    topic_end();
}

// In a task, what on_event was doing has ended when orch_unsubscribe returns.
CASE(topic_unsubscribe_cancels_what_is_under_way) {
    topic_start();
    (void)subscribe(0, react_slowly, 0);
    CHECK_INT(orch_publish(topic, token()), 0);
    CHECK_INT(orch_publish(topic, token()), 0);
    settle_down();
    CHECK_INT(started, 1);
    orch_unsubscribe(subscriptions[0]);
    subscriptions[0] = NULL;
    CHECK_INT(ended, 1);
    CHECK_INT(started, 1);
    CHECK_INT(released, 1);
    CHECK_INT(failures, 0); // a cancellation is no failure
    CHECK_INT(tokens[0] + tokens[1], 2);
    topic_end();
}

static void unsubscribe_callback(orch_result *in, void *context) {
    (void)in;
    orch_unsubscribe(context);
}

// Outside of one it ends later.
CASE(topic_unsubscribe_from_a_callback) {
    topic_start();
    (void)subscribe(0, react_slowly, 0);
    CHECK_INT(orch_publish(topic, token()), 0);
    settle_down();
    orch_on(orch_settled(orch_ok(NULL, NULL)), unsubscribe_callback, subscriptions[0]);
    subscriptions[0] = NULL;
    settle_down();
    CHECK_INT(ended, started);
    CHECK_INT(released, 1);
    topic_end();
}

static orch_result react_and_leave(const orch_result *e, void *context) {
    int who = *(int *)context;
    orch_subscription *own = subscriptions[who];
    subscriptions[who] = NULL;
    orch_unsubscribe(own);
    see(e, context);
    CHECK_INT(released, 0);                     // the context is still in use
    if (who == 1) CHECK_INT(orch_sleep(10), 0); // it is not cancelled
    if (who == 1) ended++;
    return orch_ok(NULL, NULL);
}

static orch_result react_after_a_wait_and_leave(const orch_result *e, void *context) {
    CHECK_INT(orch_sleep(5), 0);
    return react_and_leave(e, context);
}

CASE(topic_unsubscribe_from_on_event) {
    for (int way = 0; way < 3; way++) { // without a wait, with one after it, with one before
        topic_start();
        (void)subscribe(way == 1, way == 2 ? react_after_a_wait_and_leave : react_and_leave, 0);
        CHECK_INT(orch_publish(topic, token()), 0);
        CHECK_INT(orch_publish(topic, token()), 0);
        (void)orch_sleep(100);
        CHECK_INT(seen_count[way == 1], 1);
        CHECK_INT(ended, way == 1);
        CHECK_INT(released, 1);
        topic_end();
    }
}

static orch_result unsubscribe_task(void *arg) {
    orch_subscription *s = *(orch_subscription **)arg;
    *(orch_subscription **)arg = NULL;
    orch_unsubscribe(s);
    return orch_ok(NULL, NULL);
}

static orch_result react_and_have_it_ended(const orch_result *e, void *context) {
    int who = *(int *)context;
    see(e, context);
    started++;
    orch_future *f = orch_go(unsubscribe_task, &subscriptions[who]);
    int error = orch_sleep(10);
    CHECK_INT(error, ORCH_ECANCELED); // by somebody else: it is cancelled
    ended++;
    orch_drop(f);
    return orch_ok(NULL, NULL);
}

// on_event starts a task that ends its subscription, before and after on_event has waited.
CASE(topic_unsubscribe_from_a_child_of_on_event) {
    topic_start();
    (void)subscribe(0, react_and_have_it_ended, 0);
    CHECK_INT(orch_publish(topic, token()), 0);
    (void)orch_sleep(100);
    CHECK_INT(seen_count[0], 1);
    CHECK_INT(ended, started);
    CHECK_INT(released, 1);
    topic_end();
}

// The topic ends first: what waits is delivered, then it is closed.
CASE(topic_freed_before_its_subscriptions) {
    topic_start();
    (void)subscribe(0, react_slowly, 0);
    (void)subscribe(1, NULL, 0);
    (void)subscribe(2, NULL, 0);
    orch_future *f = orch_subscription_next(subscriptions[2]), *g;
    for (int i = 0; i < 2; i++) CHECK_INT(orch_publish(topic, token()), 0);
    g = orch_subscription_next(subscriptions[2]);
    orch_future *h = orch_subscription_next(subscriptions[2]);
    orch_topic_free(topic);
    topic = NULL;
    for (int i = 0; i < 3; i++) {
        int error = await_error(orch_subscription_next(subscriptions[1]));
        CHECK_INT(error, i < 2 ? 0 : ORCH_ECLOSED);
    }
    CHECK_INT(await_error(f), 0);
    CHECK_INT(await_error(g), 0);
    CHECK_INT(await_error(h), ORCH_ECLOSED);
    (void)orch_sleep(1000);
    CHECK_INT(seen_count[0], 2);
    CHECK_INT(failures, 0);
    topic_end();
    CHECK_INT(released, 3);
}

CASE(topic_unsubscribe_with_a_next_pending) {
    topic_start();
    (void)subscribe(0, NULL, 0);
    orch_future *f = orch_subscription_next(subscriptions[0]);
    CHECK_INT(orch_publish(topic, token()), 0); // the pump is on its way
    orch_future *g = orch_subscription_next(subscriptions[0]);
    orch_unsubscribe(subscriptions[0]);
    subscriptions[0] = NULL;
    CHECK_INT(await_error(f), ORCH_ECLOSED);
    CHECK_INT(await_error(g), ORCH_ECLOSED);
    CHECK_INT(tokens[0], 1);

    (void)subscribe(0, NULL, 0); // received, and not delivered yet
    f = orch_subscription_next(subscriptions[0]);
    CHECK_INT(orch_publish(topic, token()), 0);
    (void)orch_yield();
    orch_unsubscribe(subscriptions[0]);
    subscriptions[0] = NULL;
    int error = await_error(f);
    CHECK(error == 0 || error == ORCH_ECLOSED);
    topic_end();
}

static orch_result react_by_publishing(const orch_result *e, void *context) {
    see(e, context);
    if (orch_int(e) < 5) CHECK_INT(orch_publish(topic, orch_ok_int(orch_int(e) + 1)), 0);
    return orch_ok(NULL, NULL);
}

CASE(topic_publish_from_on_event) {
    topic_start();
    (void)subscribe(0, react_by_publishing, 0);
    (void)subscribe(1, react, 0);
    CHECK_INT(orch_publish(topic, orch_ok_int(1)), 0);
    settle_down();
    CHECK_INT(seen_count[0], 5);
    CHECK_INT(seen_count[1], 5);
    topic_end();
}

static void end_everything(void *value) {
    ++*(unsigned char *)value;
    orch_unsubscribe(subscriptions[0]);
    orch_unsubscribe(subscriptions[1]);
    subscriptions[0] = subscriptions[1] = NULL;
}

// The release of an event that was dropped runs from the loop, and may end any subscription.
CASE(topic_ended_by_a_release) {
    topic_start();
    (void)subscribe(0, NULL, 1);
    (void)subscribe(1, NULL, 1);
    orch_result t = token();
    t.release = end_everything;
    CHECK_INT(orch_publish(topic, t), 0);
    CHECK_INT(orch_publish(topic, token()), 0);
    CHECK(test_shared->fail_at || subscriptions[0] != NULL); // not inside publish
    settle_down();
    CHECK(test_shared->fail_at || subscriptions[0] == NULL);
    topic_end();
}

// The end of the loop cancels on_event; subscriptions can be ended after that in the main task's
// clean-up only, so this one ends them there.
CASE(topic_under_way_at_the_end) {
    topic_start();
    (void)subscribe(0, react_slowly, 0);
    CHECK_INT(orch_publish(topic, token()), 0);
    topic_end();
    CHECK_INT(released, 1);
}

static orch_result clean_up(void *arg) {
    (void)arg;
    if (orch_sleep(1000) != ORCH_ECANCELED) return orch_ok(NULL, NULL); // no timer in a sweep
    orch_shield_begin();
    (void)orch_sleep(50);
    CHECK_INT(started, 1); // of two
    CHECK_INT(ended, 1);
    CHECK_INT(failures, 0);
    topic_end();
    orch_shield_end();
    return orch_ok(NULL, NULL);
}

// The end of the loop cancels on_event, and no other event follows.
CASE(topic_cancelled_by_the_end_of_the_loop) {
    orch_future *f = orch_go(clean_up, NULL);
    topic_start();
    (void)subscribe(0, react_slowly, 0);
    CHECK_INT(orch_publish(topic, token()), 0);
    CHECK_INT(orch_publish(topic, token()), 0);
    settle_down();
    if (orch_is_settled(f)) topic_end();
    orch_detach(f);
}

CASE(topic_settings) {
    topic_start();
    subscriptions[0] = orch_subscribe(topic, NULL);
    const orch_subscribe_desc *desc = orch_subscription_settings(subscriptions[0]);
    if (CHECK(desc != NULL)) {
        CHECK_INT(desc->capacity, 64);
        CHECK_INT(desc->overflow, ORCH_OVERFLOW_DROP_OLDEST);
        CHECK(desc->on_event == NULL);
    }
    CHECK(orch_subscription_settings(NULL) == NULL);
    for (int i = 0; i < 70; i++) CHECK_INT(orch_publish(topic, orch_ok_int(i)), 0);
    CHECK_INT(stats_of(0).waiting, 64);
    CHECK_INT(stats_of(0).dropped, 6);
    topic_end();
}

// ---- out of memory

static bool refuse;

static void *refuse_bytes(void *user, void *old, size_t old_size, size_t size) {
    return refuse && size > 0 ? NULL : count_bytes(user, old, old_size, size);
}

static orch_result broken_main(void *arg) {
    orch_result item = token();
    (void)arg;
    refuse = true;
    orch_semaphore *s = orch_semaphore_new(1);
    orch_event *e = orch_event_new();
    orch_channel *c = orch_channel_new(1);
    orch_topic *t = orch_topic_new();
    orch_subscription *u = orch_subscribe(t, &(orch_subscribe_desc){.release = count_release});
    released = 0;
    orch_subscription *v = orch_subscribe(t, &(orch_subscribe_desc){.release = count_release});
    CHECK_INT(released, 1);
    CHECK(s && e && c && t && u && v);
    CHECK_INT(orch_acquire(s), ORCH_ENOMEM);
    CHECK(!orch_try_acquire(s));
    CHECK_INT(orch_release(s), ORCH_ENOMEM);
    CHECK_INT(await_error(orch_semaphore_acquire(s)), ORCH_ENOMEM);
    CHECK_INT(orch_semaphore_resize(s, 2), ORCH_ENOMEM);
    CHECK_INT(orch_semaphore_permits(s), 0);
    CHECK_INT(orch_semaphore_available(s), 0);
    CHECK_INT(orch_semaphore_waiting(s), 0);
    orch_event_set(e), orch_event_clear(e);
    CHECK(!orch_event_is_set(e));
    CHECK_INT(await_error(orch_event_wait(e)), ORCH_ENOMEM);
    CHECK_INT(orch_send(c, token()), ORCH_ENOMEM);
    CHECK_INT(error_of(orch_recv(c)), ORCH_ENOMEM);
    CHECK_INT(orch_try_send(c, &item), ORCH_ENOMEM);
    orch_result_free(&item);
    CHECK_INT(orch_try_recv(c, &item), ORCH_ENOMEM);
    CHECK_INT(await_error(orch_channel_send(c, token())), ORCH_ENOMEM);
    CHECK_INT(await_error(orch_channel_receive(c)), ORCH_ENOMEM);
    orch_channel_close(c);
    CHECK(orch_channel_is_closed(c));
    CHECK_INT(orch_channel_count(c), 0);
    CHECK_INT(orch_publish(t, token()), ORCH_ENOMEM);
    CHECK_INT(await_error(orch_subscription_next(u)), ORCH_ENOMEM);
    CHECK_INT(orch_subscription_statistics(u).delivered, 0);
    CHECK(orch_subscription_settings(u) == NULL);
    orch_semaphore_free(s), orch_event_free(e), orch_channel_free(c);
    orch_unsubscribe(u), orch_topic_free(t), orch_unsubscribe(v);
    refuse = false;
    return orch_ok(NULL, NULL);
}

TEST(broken_objects_say_why) {
    issued = 0;
    memset(tokens, 0, sizeof tokens);
    orch_result r =
        orch_run_with(&(orch_loop_desc){.allocator = {refuse_bytes, NULL}}, broken_main, NULL);
    refuse = false;
    CHECK_INT(r.error, 0);
    balance();
}

// No slot left but `spare`: what needs more fails, and keeps nothing. hoard_end frees the others.
enum { HOARD = 1 << 14 };
static orch_future *hoard[HOARD];
static size_t hoarded;

static bool hoard_one(void) {
    orch_promise p;
    orch_future *f = hoarded < HOARD ? orch_future_new(&p) : NULL;
    if (f == NULL || orch_is_settled(f)) return false;
    hoard[hoarded++] = f;
    return true;
}

static void hoard_begin(size_t spare) {
    refuse = true;
    hoarded = 0;
    while (hoard_one()) continue;
    do orch_drop(hoard[--hoarded]); // a debug build keeps the first ones back
    while (hoarded > 0 && !hoard_one());
    for (size_t i = 0; i < spare && hoarded > 0; i++) orch_drop(hoard[--hoarded]);
}

static void hoard_end(void) {
    refuse = false;
    while (hoarded > 0) orch_drop(hoard[--hoarded]);
}

static int starved; // how many of them failed, and how many went through
static int served;

static void expect_future(orch_future *f, int *error) {
    const orch_result *r = orch_peek(f);
    *error = r != NULL ? r->error : 0;
    CHECK(r == NULL || r->error == ORCH_ENOMEM); // nothing is served at the time of the call
    if (r == NULL) served++;
    else starved++;
}

static orch_future *starve(int what) {
    switch (what) {
    case 0: return orch_semaphore_acquire(sem);
    case 1: return orch_channel_receive(chan);
    case 2: return orch_channel_send(other, token());
    default: return orch_event_wait(event);
    }
}

static void starve_tasks(orch_semaphore *none, orch_channel *empty) {
    int error = orch_acquire(none); // they can not wait: the task could not be woken
    CHECK_INT(error, ORCH_ENOMEM);
    CHECK_INT(error_of(orch_recv(empty)), ORCH_ENOMEM);
    CHECK_INT(orch_send(chan, token()), ORCH_ENOMEM);
    CHECK_INT(orch_semaphore_waiting(none), 0);
}

static orch_result starve_main(void *arg) {
    (void)arg;
    orch_semaphore *none = orch_semaphore_new(0);
    orch_channel *empty = orch_channel_new(1);
    for (size_t spare = 0; spare < 5; spare++) {
        sem = orch_semaphore_new(1), event = orch_event_new();
        two_channels(1);
        CHECK_INT(orch_send(chan, token()), 0);
        for (int what = 0; what < 4; what++) {
            int error;
            size_t before = slots();
            hoard_begin(spare);
            orch_future *f = starve(what);
            expect_future(f, &error);
            if (what == 0 && spare == 0) starve_tasks(none, empty);
            hoard_end();
            CHECK_INT(error, spare >= (size_t)(what == 2   ? 4
                                               : what == 3 ? 2
                                                           : 3)
                                 ? 0
                                 : ORCH_ENOMEM);
            orch_drop(f);
            settle_down();
            CHECK_INT(slots(), before);
        }
        CHECK_INT(orch_semaphore_available(sem), 1);
        CHECK_INT(orch_channel_count(chan), 1);
        CHECK_INT(orch_channel_count(other), 0);
        orch_semaphore_free(sem), orch_event_free(event);
        free_two();
    }
    orch_semaphore_free(none), orch_channel_free(empty);
    return orch_ok(NULL, NULL);
}

static void run_starving(orch_task_fn fn) {
    issued = 0;
    memset(tokens, 0, sizeof tokens);
    orch_result r = orch_run_with(
        &(orch_loop_desc){.allocator = {refuse_bytes, NULL}, .clock = ORCH_CLOCK_VIRTUAL}, fn,
        NULL);
    refuse = false;
    CHECK_INT(r.error, 0);
    balance();
}

TEST(out_of_slots_nothing_is_taken) {
    starved = served = 0;
    run_starving(starve_main);
    CHECK_INT(starved, 3 + 3 + 4 + 2);
    CHECK_INT(served, 8);
}

// Without a slot for the pump, who waits is served at once; and what is in it may be freed then.
static orch_result pumpless_main(void *arg) {
    (void)arg;
    for (int way = 0; way < 4; way++) {
        orch_result t = token();
        sem = orch_semaphore_new(1);
        chan = orch_channel_new(2);
        other = orch_channel_new(0);
        CHECK_INT(orch_acquire(sem), 0);
        orch_future *a = orch_semaphore_acquire(sem), *r = orch_channel_receive(chan), *s = NULL;
        if (way == 1) s = orch_channel_send(other, token());
        settle_down();
        CHECK_INT(orch_send(chan, orch_ok_int(1)), 0); // the ring of the channel is there
        CHECK_INT(await_error(r), 0);
        r = orch_channel_receive(chan);
        if (way == 2) t.release = reenter;
        if (way == 2) orch_detach(r), r = NULL;
        topic_start();
        (void)subscribe(0, react, 0);
        hoard_begin(0);
        CHECK_INT(orch_publish(topic, orch_ok_int(3)), ORCH_ENOMEM);
        CHECK_INT(orch_release(sem), 0);
        CHECK(orch_is_settled(a));
        CHECK_INT(orch_send(chan, t), 0);
        CHECK(way == 2 ? chan == NULL : orch_is_settled(r));
        orch_result got = orch_ok(NULL, NULL);
        CHECK_INT(orch_try_recv(other, &got), way == 1 ? 0 : -EAGAIN);
        orch_result_free(&got);
        hoard_end();
        settle_down();
        orch_drop(a), orch_drop(r), orch_drop(s);
        CHECK_INT(orch_semaphore_available(sem), 1);
        orch_semaphore_free(sem), orch_channel_free(chan), orch_channel_free(other);
        topic_end();
    }
    return orch_ok(NULL, NULL);
}

TEST(out_of_slots_who_waits_is_served) { run_starving(pumpless_main); }

// One slot, for the event: on_event is started with the next one.
static orch_result late_start_main(void *arg) {
    (void)arg;
    topic_start();
    (void)subscribe(0, react, 0);
    CHECK_INT(orch_publish(topic, orch_ok_int(0)), 0); // the ring of the channel is there
    settle_down();
    hoard_begin(1);
    CHECK_INT(orch_publish(topic, orch_ok_int(1)), 0);
    settle_down();
    CHECK_INT(seen_count[0], 1);
    hoard_end();
    settle_down();
    CHECK_INT(seen_count[0], 1);
    CHECK_INT(orch_publish(topic, orch_ok_int(2)), 0);
    settle_down();
    CHECK_INT(seen_count[0], 3);
    hoard_begin(2); // the pump runs, and has no task to start
    CHECK_INT(orch_publish(topic, orch_ok_int(3)), 0);
    CHECK_INT(failures, 0);
    while (hoard_one()) continue;
    settle_down();
    CHECK_INT(failures, 1);
    CHECK_INT(failure_error, ORCH_ENOMEM);
    hoard_end();
    CHECK_INT(orch_publish(topic, orch_ok_int(4)), 0);
    settle_down();
    CHECK_INT(seen_count[0], 5);
    for (int i = 0; i < 5; i++) CHECK_INT(seen[0][i], i);
    topic_end();
    return orch_ok(NULL, NULL);
}

TEST(out_of_slots_events_wait) { run_starving(late_start_main); }

// ---- other loops, and the loop's end

static orch_semaphore *foreign;

static orch_result foreign_main(void *arg) {
    (void)arg;
    return orch_ok_int(orch_acquire(foreign));
}

static void *foreign_thread(void *arg) {
    orch_result r = orch_run(foreign_main, NULL);
    *(intptr_t *)arg = orch_int(&r);
    return NULL;
}

static orch_result lend_main(void *arg) {
    pthread_t thread;
    (void)arg;
    foreign = orch_semaphore_new(1);
    intptr_t error = 0;
    if (pthread_create(&thread, NULL, foreign_thread, &error) == 0) pthread_join(thread, NULL);
    orch_semaphore_free(foreign);
    return orch_ok_int(error);
}

// ---- misuse

// Dies in a debug build with "asyncorch: <function>...", and returns the error in a release build.
#ifdef NDEBUG
#define MISUSE(id, text) CASE(id)
#else
#define MISUSE(id, text)                                                                           \
    static void id##_body(void);                                                                   \
    static orch_result id##_main(void *arg) {                                                      \
        (void)arg;                                                                                 \
        test_start();                                                                              \
        id##_body();                                                                               \
        return orch_ok(NULL, NULL);                                                                \
    }                                                                                              \
    TEST_DIES(id, "asyncorch: " text) { run_seed(id##_main, 0); }                                  \
    static void id##_body(void)
#endif

static orch_result no_item;

#define NULL_OBJECTS(X)                                                                            \
    X(null_acquire, "orch_acquire", orch_acquire(NULL), ORCH_EINVAL)                               \
    X(null_acquire_n, "orch_acquire_n", orch_acquire_n(NULL, 1), ORCH_EINVAL)                      \
    X(null_try_acquire, "orch_try_acquire", orch_try_acquire(NULL), false)                         \
    X(null_release, "orch_release", orch_release(NULL), ORCH_EINVAL)                               \
    X(null_semaphore_acquire, "orch_semaphore_acquire", await_error(orch_semaphore_acquire(NULL)), \
      ORCH_EINVAL)                                                                                 \
    X(null_resize, "orch_semaphore_resize", orch_semaphore_resize(NULL, 1), ORCH_EINVAL)           \
    X(null_permits, "orch_semaphore_permits", orch_semaphore_permits(NULL), 0)                     \
    X(null_available, "orch_semaphore_available", orch_semaphore_available(NULL), 0)               \
    X(null_waiting, "orch_semaphore_waiting", orch_semaphore_waiting(NULL), 0)                     \
    X(null_event_set, "orch_event_set", (orch_event_set(NULL), 0), 0)                              \
    X(null_event_clear, "orch_event_clear", (orch_event_clear(NULL), 0), 0)                        \
    X(null_event_is_set, "orch_event_is_set", orch_event_is_set(NULL), false)                      \
    X(null_event_wait, "orch_event_wait", await_error(orch_event_wait(NULL)), ORCH_EINVAL)         \
    X(null_send, "orch_send", orch_send(NULL, token()), ORCH_EINVAL)                               \
    X(null_recv, "orch_recv", error_of(orch_recv(NULL)), ORCH_EINVAL)                              \
    X(null_try_send, "orch_try_send", orch_try_send(NULL, &no_item), ORCH_EINVAL)                  \
    X(null_try_recv, "orch_try_recv", orch_try_recv(NULL, &no_item), ORCH_EINVAL)                  \
    X(null_channel_send, "orch_channel_send", await_error(orch_channel_send(NULL, token())),       \
      ORCH_EINVAL)                                                                                 \
    X(null_channel_receive, "orch_channel_receive", await_error(orch_channel_receive(NULL)),       \
      ORCH_EINVAL)                                                                                 \
    X(null_channel_close, "orch_channel_close", (orch_channel_close(NULL), 0), 0)                  \
    X(null_channel_count, "orch_channel_count", orch_channel_count(NULL), 0)                       \
    X(null_channel_is_closed, "orch_channel_is_closed", orch_channel_is_closed(NULL), true)        \
    X(null_publish, "orch_publish", orch_publish(NULL, token()), ORCH_EINVAL)                      \
    X(null_next, "orch_subscription_next", await_error(orch_subscription_next(NULL)), ORCH_EINVAL) \
    X(null_statistics, "orch_subscription_statistics",                                             \
      orch_subscription_statistics(NULL).delivered, 0)
#define X_NULL(id, text, call, want)                                                               \
    MISUSE(misuse_##id, text) { CHECK_INT(call, want); }
NULL_OBJECTS(X_NULL)

MISUSE(misuse_subscribe_to_nothing, "orch_subscribe") {
    released = 0;
    orch_subscription *s = orch_subscribe(NULL, &(orch_subscribe_desc){.release = count_release});
    CHECK_INT(released, 1);
    CHECK_INT(await_error(orch_subscription_next(s)), ORCH_EINVAL);
    orch_unsubscribe(s);
}

MISUSE(misuse_overflow, "orch_subscribe") {
    topic_start();
    subscriptions[0] = orch_subscribe(
        topic, &(orch_subscribe_desc){.overflow = (orch_overflow)7, .release = count_release});
    CHECK_INT(released, 1);
    CHECK_INT(await_error(orch_subscription_next(subscriptions[0])), ORCH_EINVAL);
    topic_end();
}

MISUSE(misuse_next_with_on_event, "orch_subscription_next") {
    topic_start();
    (void)subscribe(0, react, 0);
    CHECK_INT(await_error(orch_subscription_next(subscriptions[0])), ORCH_EINVAL);
    topic_end();
}

MISUSE(misuse_over_release, "orch_release") {
    sem = orch_semaphore_new(2);
    CHECK_INT(orch_acquire(sem), 0);
    CHECK_INT(orch_release_n(sem, 2), ORCH_EINVAL);
    CHECK_INT(orch_release(sem), 0);
    CHECK_INT(orch_release(sem), ORCH_EINVAL);
    CHECK_INT(orch_semaphore_available(sem), 2);
    orch_semaphore_free(sem);
}

MISUSE(misuse_no_permits, "orch_") {
    sem = orch_semaphore_new(2);
    CHECK_INT(orch_acquire_n(sem, 0), ORCH_EINVAL);
    CHECK(!orch_try_acquire_n(sem, 0));
    CHECK_INT(await_error(orch_semaphore_acquire_n(sem, 0)), ORCH_EINVAL);
    CHECK_INT(orch_release_n(sem, 0), ORCH_EINVAL);
    orch_semaphore_free(sem);
}

MISUSE(misuse_try_without_an_item, "orch_try_") {
    chan = orch_channel_new(1);
    CHECK_INT(orch_try_send(chan, NULL), ORCH_EINVAL);
    CHECK_INT(orch_try_recv(chan, NULL), ORCH_EINVAL);
    orch_channel_free(chan);
}

static void outside(orch_result *in, void *context) {
    int *errors = context;
    (void)in;
    errors[0] = orch_acquire(sem);
    errors[1] = orch_send(chan, token());
    errors[2] = error_of(orch_recv(chan));
}

// Callbacks must not wait: not even where there would be nothing to wait for.
MISUSE(misuse_outside_of_a_task, "orch_acquire: only a task can do this") {
    int errors[3] = {0, 0, 0};
    sem = orch_semaphore_new(1);
    chan = orch_channel_new(1);
    orch_on(orch_settled(orch_ok(NULL, NULL)), outside, errors);
    settle_down();
    for (int i = 0; i < 3; i++) CHECK_INT(errors[i], ORCH_ENOTASK);
    orch_semaphore_free(sem);
    orch_channel_free(chan);
}

#ifdef NDEBUG
TEST(misuse_without_a_loop) {
#else
TEST_DIES(misuse_without_a_loop, "asyncorch: orch_semaphore_new: no loop") {
#endif
    orch_semaphore *s = orch_semaphore_new(1);
    orch_channel *c = orch_channel_new(1);
    CHECK_INT(orch_acquire(s), ORCH_ENOLOOP);
    CHECK_INT(orch_send(c, orch_ok_int(1)), ORCH_ENOLOOP);
    orch_semaphore_free(s);
    orch_channel_free(c);
}

#ifdef NDEBUG
TEST(misuse_another_thread) {
#else
TEST_DIES(misuse_another_thread, "asyncorch: orch_acquire: ") {
#endif
    orch_result r = orch_run(lend_main, NULL);
    CHECK_INT(orch_int(&r), ORCH_ETHREAD);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
