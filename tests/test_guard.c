// Limiter, circuit breaker, single flight, adaptive concurrency: what users of their models expect,
// on the virtual clock and over seeds; who owns what on every path; out of memory; misuse.
//
// adopted behaviour                                 known from                  case
// a burst at first, then an even rate               x/time/rate, bottleneck     bucket_burst_*
// no token is lost in fractions                     x/time/rate                 bucket_loses_no_*
// any window: at most burst + rate * time           x/time/rate                 bucket_any_window
// limit + 1 starts span the interval (strict)       p-throttle, strict-throttle strict_*
// a call can weigh more than one                    p-throttle, bottleneck      strict_weighted,
//                                                                               ...
// more than the limit can ever allow is refused     x/time/rate WaitN, p-limit  limiter_refuses
// in order; a heavy one is not starved              bottleneck, x/time/rate     limiter_in_order
// try: now or not at all, no overtaking             x/time/rate Allow           limiter_try
// a cancelled wait gives its turn back              x/time/rate, p-throttle     limiter_cancelled_*
// how many wait can be bounded, and read            bottleneck highWater        limiter_bounded
// pause for a Retry-After; how long until a turn    bottleneck, Reserve().Delay limiter_pause
// limit and burst can change while running          SetLimit, updateSettings    limiter_change_*
// opens after n bad calls in a row                  gobreaker                   breaker_opens_in_*
// opens at a rate over the last n calls             resilience4j, Hystrix       breaker_rate
// not before a minimum of calls                     resilience4j                breaker_rate
// half-open after a time, with so many probes       all                         breaker_half_open
// n good probes close, one bad one opens            gobreaker                   breaker_probes
// an ignored or cancelled probe gives its slot back resilience4j #544           breaker_probe_*
// a probe that never ends does not hang it          resilience4j #903           breaker_probe_hangs
// outcomes of an earlier state do not count         gobreaker's generation      breaker_late_*
// what counts is up to the user, three-valued       IsSuccessful, IsExcluded    breaker_judge
// slow calls are bad calls                          resilience4j                breaker_slow
// state changes are told                            OnStateChange               breaker_on_change
// allow and record for what is no function          TwoStepCircuitBreaker       breaker_pass
// forced open, reset                                resilience4j, Polly         breaker_forced
// concurrent calls for a key share one run          singleflight                flight_shares
// errors are shared as well                         singleflight                flight_shares_*
// a call after the end runs anew; forget            singleflight                flight_again,
//                                                                               flight_forget
// one caller that gives up ends nobody else's call  Tailscale DoChanContext     flight_leave
// the last one that gives up cancels the run        Tailscale DoChanContext     flight_last_leaves
// no two runs for a key, cancelled ones included    janos/singleflight #4       flight_winding_down
// nobody joins a cancelled run                      Tailscale #18919            flight_winding_down
// one caller's deadline is not the run's            Tailscale #18919            flight_deadline
// up by one a good call, down by a factor           Netflix AIMDLimit           adaptive_rises,
//                                                                               _falls
// it rises only while it is used                    Netflix, RFC 7661           adaptive_rises
// one decrease for a round of calls                 RFC 5681                    adaptive_falls_once
// a timeout is overload, other errors are nothing   Netflix onDropped, onIgnore adaptive_judge
// latency against the usual one, in the mean        Netflix Windowed, Gradient  adaptive_tolerance
// over the limit: waits in order, or is refused     BlockingLimiter, Simple     adaptive_waits,
//                                                                               _refuses
//
// Also built with -DNDEBUG: misuse returns errors there.
#include "../asyncorch.h"
#include "test.h"

#include <math.h>
#include <stdint.h>

// ---- kit

enum { TOKENS = 4096, STARTS = 100000 };

static unsigned char tokens[TOKENS]; // how often each was released
static int issued, unhandled, reports, calls, order[64];
static unsigned long long seed;
static bool refusing; // the allocator
static uint64_t at[STARTS + 8];
static size_t starts;

static void give_back(void *value) { ++*(unsigned char *)value; }

static orch_result token(void) { return orch_ok(&tokens[issued++ % TOKENS], give_back); }

static void *lent(void) { return &tokens[issued++ % TOKENS]; } // an arg for a desc with a release

static void on_unhandled(const orch_result *r, void *context) {
    (void)r, (void)context;
    unhandled++;
}

static char reported[2048];
static void on_report(const char *text, void *context) {
    (void)context;
    size_t used = strlen(reported);
    snprintf(reported + used, sizeof reported - used, "%s", text);
    reports++;
}

static void *resize(void *user, void *old, size_t old_size, size_t size) {
    (void)user, (void)old_size;
    if (size == 0) return free(old), NULL;
    return refusing ? NULL : realloc(old, size);
}

static int test_seeds(void) {
    if (test_shared->fail_at != 0) return 1; // a sweep repeats the case for each allocation
    return getenv("TEST_SEEDS") != NULL ? atoi(getenv("TEST_SEEDS")) : 20;
}

/* What is ready, without letting time pass. */
static void turns(int n) {
    for (int i = 0; i < n; i++) orch_yield();
}

static orch_result run_main(void *arg) {
    test_start();
    void (*body)(void) = *(void (**)(void))arg;
    size_t before = orch_loop_statistics(orch_loop_current()).futures;
    body();
    turns(20); // what was called off comes by once more
    orch_loop_stats stats = orch_loop_statistics(orch_loop_current());
    CHECK_INT(stats.timers, 0);
    if (stats.futures != before) { // a place, a pass, an alarm: the sweep is to see it too
        fprintf(stderr, "%zu slots are left\n", stats.futures - before);
        abort();
    }
    return orch_ok(NULL, NULL);
}

static void reset(void) {
    memset(tokens, 0, sizeof tokens);
    issued = unhandled = reports = calls = 0;
    reported[0] = '\0';
    starts = 0;
    refusing = false;
}

static void balance(void) {
    for (int i = 0; i < issued && i < TOKENS; i++) {
        if (tokens[i] == 1) continue;
        fprintf(stderr, "token %d of %d was released %d times\n", i, issued, tokens[i]);
        abort();
    }
}

/* Runs a body as the main task, on the virtual clock; every value and slot must be given back. */
static void run_desc(void (*body)(void), orch_loop_desc desc) {
    reset();
    desc.on_unhandled = on_unhandled;
    desc.on_report = on_report;
    desc.allocator.resize = resize;
    orch_result r = orch_run_with(&desc, run_main, &body);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    CHECK_INT(unhandled, 0);
    CHECK_INT(reports, 0);
    balance();
}

static void run(void (*body)(void)) {
    run_desc(body, (orch_loop_desc){.clock = ORCH_CLOCK_VIRTUAL});
}

static void run_seeds(void (*body)(void)) {
    int failures = test_failures;
    for (seed = 1; seed <= (unsigned long long)test_seeds() && failures == test_failures; seed++) {
        run_desc(body, (orch_loop_desc){.clock = ORCH_CLOCK_VIRTUAL, .seed = seed});
        if (failures != test_failures) fprintf(stderr, "the seed is %llu\n", seed);
    }
}

#define BODY(name)                                                                                 \
    static void body_##name(void);                                                                 \
    TEST(name) { run(body_##name); }                                                               \
    static void body_##name(void)
#define BODY_SEEDS(name)                                                                           \
    static void body_##name(void);                                                                 \
    TEST(name) { run_seeds(body_##name); }                                                         \
    static void body_##name(void)

/* The error of a future, which is consumed. */
static int error_of(orch_future *f) {
    orch_result r = orch_await(f);
    orch_result_free(&r);
    return r.error;
}

/* The same outside of a task; 1: it waits. */
static int error_of_settled(orch_future *f) {
    const orch_result *r = orch_peek(f);
    int error = r != NULL ? r->error : 1;
    orch_drop(f);
    return error;
}

/* The same with its message, for the last one. */
static char message[160];
static int message_of(orch_future *f) {
    orch_result r = orch_await(f);
    snprintf(message, sizeof message, "%s", orch_message(&r));
    orch_result_free(&r);
    return r.error;
}

static void note(int who) {
    if (calls < 64) order[calls] = who;
    calls++;
}

// ---- limiter: token bucket

static void start_now(void) {
    if (starts < sizeof at / sizeof at[0]) at[starts++] = orch_now();
}

BODY(bucket_burst_then_rate) {
    orch_limiter *l =
        orch_limiter_new(&(orch_limiter_desc){.limit = 10, .interval_ms = 1000, .burst = 3});
    for (int i = 0; i < 8; i++)
        if (orch_limit(l, 1) == 0) start_now();
    static const uint64_t want[] = {0, 0, 0, 100, 200, 300, 400, 500};
    for (size_t i = 0; i < 8 && i < starts; i++) CHECK_INT(at[i], want[i]);
    orch_sleep(10000); // a full bucket, and no more
    uint64_t then = orch_now();
    starts = 0;
    for (int i = 0; i < 5; i++)
        if (orch_limit(l, 1) == 0) start_now();
    static const uint64_t again[] = {0, 0, 0, 100, 200};
    for (size_t i = 0; i < 5 && i < starts; i++) CHECK_INT(at[i], then + again[i]);
    orch_limiter_free(l);
}

BODY(bucket_default_burst_is_the_limit) {
    orch_limiter *l = orch_limiter_new(&(orch_limiter_desc){.limit = 4, .interval_ms = 1000});
    int passed = 0;
    while (orch_limiter_try(l, 1)) passed++;
    const orch_limiter_desc *settings = orch_limiter_settings(l);
    if (CHECK(settings != NULL)) {
        CHECK_INT(passed, 4);
        CHECK_INT(settings->burst, 4);
        CHECK_STR(settings->name, "");
    }
    orch_limiter_free(l);
}

// Polled in every millisecond, a bucket has given exactly floor(burst + t * limit / interval).
static void bucket_exact(uint32_t limit, uint64_t interval, uint32_t burst, uint64_t ms) {
    orch_limiter *l = orch_limiter_new(
        &(orch_limiter_desc){.limit = limit, .interval_ms = interval, .burst = burst});
    uint64_t passed = 0, start = orch_now(), wrong = 0;
    while (orch_limiter_try(l, 1)) passed++;
    if (orch_limiter_settings(l) == NULL) return;
    CHECK_INT(passed, burst);
    for (uint64_t t = 1; t <= ms; t++) {
        if (orch_sleep(1) != 0) break;
        while (orch_limiter_try(l, 1)) passed++;
        uint64_t now = orch_now() - start;
        wrong += passed != burst + now * limit / interval;
    }
    CHECK_INT(wrong, 0);
    orch_limiter_free(l);
}

BODY(bucket_loses_no_fraction) {
    bucket_exact(3, 1000, 3, 7000); // a token in 333 1/3 ms
    bucket_exact(7, 1009, 2, 9000); // primes
    bucket_exact(999, 1000, 1000, 3000);
    bucket_exact(1, 7, 1, 2000);
    bucket_exact(2500, 999, 50, 2000);        // more than one a millisecond
    bucket_exact(4000037, 86400000, 2, 9000); // in a day, with a remainder below a nanosecond
}

// What was taken by anybody in any stretch of time is at most burst + rate * time.
enum { RATE = 50, PER = 700, BURST = 9, VISITORS = 12, VISITS = 60 };
static uint32_t weights[VISITORS * VISITS];
static uint64_t draws;

static unsigned draw(unsigned below) {
    draws = draws * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(draws >> 33) % below;
}

static orch_result visitor(void *arg) {
    orch_limiter *l = arg;
    for (int i = 0; i < VISITS; i++) {
        uint32_t weight = 1 + draw(BURST);
        orch_sleep(draw(300));
        if (orch_limit(l, weight) != 0) return orch_ok(NULL, NULL);
        weights[starts] = weight;
        start_now();
    }
    return orch_ok(NULL, NULL);
}

BODY_SEEDS(bucket_any_window) {
    orch_limiter *l =
        orch_limiter_new(&(orch_limiter_desc){.limit = RATE, .interval_ms = PER, .burst = BURST});
    orch_future *all[VISITORS];
    draws = seed;
    for (int i = 0; i < VISITORS; i++) all[i] = orch_go(visitor, l);
    CHECK_INT(error_of(orch_all_n(VISITORS, all)), 0);
    unsigned wrong = 0;
    for (size_t i = 0; i < starts; i++) {
        uint64_t sum = 0;
        for (size_t j = i; j < starts; j++) {
            sum += weights[j];
            wrong += sum > BURST + (at[j] - at[i]) * RATE / PER;
        }
    }
    CHECK_INT(starts, VISITORS * VISITS);
    CHECK_INT(wrong, 0);
    orch_limiter_free(l);
}

// ---- limiter: strict

static uint32_t strict_limit, strict_left;
static uint64_t strict_interval;

static orch_result strict_starter(void *arg) {
    while (strict_left > 0) {
        strict_left--;
        if (orch_limit(arg, 1) != 0) break;
        start_now();
    }
    return orch_ok(NULL, NULL);
}

// Every window of limit + 1 starts, and that no start came later than it had to.
static void strict_windows(uint32_t limit, uint64_t interval, bool pressed) {
    unsigned wrong = 0, late = 0;
    for (size_t i = 0; i + limit < starts; i++) {
        uint64_t span = at[i + limit] - at[i];
        wrong += span < interval;
        late += span > interval;
    }
    CHECK_INT(wrong, 0);
    if (pressed) CHECK_INT(late, 0);
}

static void strict_100000(void) {
    orch_limiter *l = orch_limiter_new(&(orch_limiter_desc){
        .limit = strict_limit, .interval_ms = strict_interval, .strict = true});
    orch_future *all[7];
    strict_left = STARTS;
    for (int i = 0; i < 7; i++) all[i] = orch_go(strict_starter, l);
    CHECK_INT(error_of(orch_all_n(7, all)), 0);
    CHECK_INT(starts, STARTS);
    strict_windows(strict_limit, strict_interval, true);
    orch_limiter_free(l);
}

TEST(strict_100000_starts) {
    strict_limit = 100, strict_interval = 1000;
    run(strict_100000);
}

TEST(strict_100000_starts_one_by_one) {
    strict_limit = 1, strict_interval = 3;
    run(strict_100000);
}

TEST(strict_100000_starts_of_a_seed) {
    strict_limit = 37, strict_interval = 1013;
    run_desc(strict_100000, (orch_loop_desc){.clock = ORCH_CLOCK_VIRTUAL, .seed = 99});
}

// Arrivals at random times, in bursts and with pauses.
BODY_SEEDS(strict_any_arrival) {
    strict_limit = 8, strict_interval = 100;
    orch_limiter *l =
        orch_limiter_new(&(orch_limiter_desc){.limit = 8, .interval_ms = 100, .strict = true});
    draws = seed;
    for (int i = 0; i < 3000; i++) {
        if (draw(6) == 0) orch_sleep(draw(60));
        if (draw(3) == 0 ? orch_limiter_try(l, 1) : orch_limit(l, 1) == 0) start_now();
    }
    strict_windows(8, 100, false);
    CHECK(starts > 2000);
    orch_limiter_free(l);
}

static orch_result heavy_visitor(void *arg) {
    for (int i = 0; i < VISITS; i++) {
        uint32_t weight = 1 + draw(10);
        if (draw(4) == 0) orch_sleep(draw(200));
        if (orch_limit(arg, weight) != 0) break;
        weights[starts] = weight;
        start_now();
    }
    return orch_ok(NULL, NULL);
}

BODY_SEEDS(strict_weighted) {
    orch_limiter *l =
        orch_limiter_new(&(orch_limiter_desc){.limit = 20, .interval_ms = 100, .strict = true});
    orch_future *all[VISITORS];
    draws = seed;
    for (int i = 0; i < VISITORS; i++) all[i] = orch_go(heavy_visitor, l);
    CHECK_INT(error_of(orch_all_n(VISITORS, all)), 0);
    CHECK_INT(starts, VISITORS * VISITS);
    unsigned wrong = 0;
    for (size_t i = 0; i < starts; i++) { // what starts in [t, t + interval) weighs at most limit
        uint32_t sum = 0;
        for (size_t j = i; j < starts && at[j] < at[i] + 100; j++) sum += weights[j];
        wrong += sum > 20;
    }
    CHECK_INT(wrong, 0);
    orch_limiter_free(l);
}

// A clock of nanoseconds: a limiter that counted in whole milliseconds would let the third start
// come 0.9 ms too early.
static uint64_t own_ns;
static unsigned reads;

static uint64_t own_clock(void *context) {
    (void)context;
    reads++;
    return own_ns;
}

static void fine_strict(void) {
    own_ns = 900000;
    orch_limiter *l =
        orch_limiter_new(&(orch_limiter_desc){.limit = 1, .interval_ms = 10, .strict = true});
    if (orch_limiter_settings(l) == NULL) return;
    CHECK(orch_limiter_try(l, 1));
    own_ns = 10000000; // 9.1 ms later
    CHECK(!orch_limiter_try(l, 1));
    CHECK_INT(orch_limiter_delay(l, 1), 1);
    own_ns = 10899999;
    CHECK(!orch_limiter_try(l, 1));
    own_ns = 10900000;
    CHECK(orch_limiter_try(l, 1));
    orch_limiter_free(l);
}

static void fine_bucket(void) {
    own_ns = 500000;
    orch_limiter *l = orch_limiter_new(
        &(orch_limiter_desc){.limit = 3, .interval_ms = 1, .burst = 2}); // in 333,333 1/3 ns
    if (orch_limiter_settings(l) == NULL) return;
    CHECK(orch_limiter_try(l, 2));
    own_ns = 500000 + 333333;
    CHECK(!orch_limiter_try(l, 1));
    own_ns += 1;
    CHECK(orch_limiter_try(l, 1));
    own_ns = 500000 + 666666;
    CHECK(!orch_limiter_try(l, 1));
    own_ns += 1; // 666,666 2/3: the two thirds of a nanosecond were not lost
    CHECK(orch_limiter_try(l, 1));
    own_ns = 500000 + 999999;
    CHECK(!orch_limiter_try(l, 1));
    own_ns += 1;
    CHECK(orch_limiter_try(l, 1));
    orch_limiter_free(l);
}

TEST(limiter_counts_nanoseconds) {
    run_desc(fine_strict, (orch_loop_desc){.now = own_clock});
    run_desc(fine_bucket, (orch_loop_desc){.now = own_clock});
}

// ---- limiter: waiting

static orch_limiter *limiter;

static orch_result limit_one(void *arg) {
    int error = orch_limit(limiter, 1);
    note(error == 0 ? *(int *)arg : error);
    return error == 0 ? orch_ok(NULL, NULL) : orch_fail(error);
}

static orch_result limit_heavy(void *arg) {
    int error = orch_limit(limiter, 5);
    note(error == 0 ? *(int *)arg : error);
    return error == 0 ? orch_ok(NULL, NULL) : orch_fail(error);
}

static void limiter_begin(orch_limiter_desc desc) {
    limiter = orch_limiter_new(&desc);
    calls = 0;
}

static int who[64];

static void number(void) {
    for (int i = 0; i < 64; i++) who[i] = i;
}

// A heavy start is not overtaken, though light ones would fit at once; nobody overtakes.
BODY(limiter_in_order) {
    number();
    for (int strict = 0; strict < 2; strict++) {
        limiter_begin((orch_limiter_desc){.limit = 5, .interval_ms = 100, .strict = strict});
        orch_future *all[6];
        if (orch_limiter_settings(limiter) == NULL) return;
        CHECK(orch_limiter_try(limiter, 1)); // four are left
        all[0] = orch_go(limit_heavy, &who[0]);
        for (int i = 1; i < 6; i++) all[i] = orch_go(limit_one, &who[i]);
        CHECK_INT(orch_limiter_waiting(limiter), 6);
        CHECK(!orch_limiter_try(limiter, 1));
        error_of(orch_all_n(6, all));
        for (int i = 0; i < 6 && i < calls; i++) CHECK_INT(order[i], i);
        CHECK_INT(calls, 6);
        orch_limiter_free(limiter);
    }
}

BODY(limiter_try) {
    limiter_begin((orch_limiter_desc){.limit = 5, .interval_ms = 100});
    if (orch_limiter_settings(limiter) == NULL) return;
    CHECK(orch_limiter_try(limiter, 3));
    CHECK(!orch_limiter_try(limiter, 3)); // and takes nothing
    CHECK(orch_limiter_try(limiter, 2));
    CHECK(!orch_limiter_try(limiter, 1));
    CHECK(!orch_limiter_try(limiter, 6));
    CHECK_INT(orch_limiter_delay(limiter, 1), 20);
    CHECK_INT(orch_limiter_delay(limiter, 5), 100);
    CHECK(orch_limiter_delay(limiter, 6) == UINT64_MAX);
    orch_sleep(20);
    CHECK(orch_limiter_try(limiter, 1));
    orch_limiter_free(limiter);
}

BODY(limiter_refuses) {
    limiter_begin((orch_limiter_desc){.limit = 5, .interval_ms = 100, .burst = 7});
    int wanted = orch_limiter_settings(limiter) != NULL ? ORCH_ELIMIT : ORCH_ENOMEM;
    CHECK_INT(orch_limit(limiter, 8), wanted);
    CHECK_INT(error_of(orch_limiter_acquire(limiter, 8)), wanted);
    orch_limiter_free(limiter);
    limiter_begin((orch_limiter_desc){.limit = 5, .interval_ms = 100, .strict = true});
    wanted = orch_limiter_settings(limiter) != NULL ? ORCH_ELIMIT : ORCH_ENOMEM;
    CHECK_INT(orch_limit(limiter, 6), wanted);
    CHECK_INT(orch_limit(limiter, UINT32_MAX), wanted);
    orch_limiter_free(limiter);
}

// A future takes nothing at the time of the call.
BODY(limiter_future_takes_nothing_yet) {
    limiter_begin((orch_limiter_desc){.limit = 1, .interval_ms = 100});
    orch_future *f = orch_limiter_acquire(limiter, 1);
    CHECK(!orch_is_settled(f));
    orch_drop(f);
    turns(3);
    CHECK(orch_limiter_try(limiter, 1)); // it is still there
    orch_limiter_free(limiter);
}

static orch_result give_up_after(void *arg) {
    int error = error_of(orch_timeout(orch_limiter_acquire(limiter, 1), *(uint64_t *)arg));
    note(error == 0 ? 1 : error);
    return orch_ok(NULL, NULL);
}

// Of ten that wait, those that give up cost nobody anything: the others come at 100, 200, ...
BODY_SEEDS(limiter_cancelled_gives_nothing_away) {
    static uint64_t patience = 50;
    number();
    limiter_begin((orch_limiter_desc){.limit = 1, .interval_ms = 100, .strict = seed % 2 == 0});
    orch_future *all[12];
    if (orch_limiter_settings(limiter) == NULL) return;
    CHECK_INT(orch_limit(limiter, 1), 0);
    for (int i = 0; i < 12; i++)
        all[i] = i % 3 != 2 ? orch_go(give_up_after, &patience) : orch_go(strict_starter, limiter);
    strict_left = 0;
    CHECK_INT(error_of(orch_all_n(12, all)), 0);
    CHECK_INT(calls, 8);
    for (int i = 0; i < 8 && i < calls; i++) CHECK_INT(order[i], ORCH_ETIMEDOUT);
    CHECK_INT(orch_limiter_waiting(limiter), 0);
    orch_limiter_free(limiter);
}

static orch_result patient(void *arg) {
    (void)arg;
    if (orch_limit(limiter, 1) == 0) start_now();
    return orch_ok(NULL, NULL);
}

BODY_SEEDS(limiter_cancelled_frees_its_turn) {
    static uint64_t patience = 50;
    limiter_begin((orch_limiter_desc){.limit = 1, .interval_ms = 100, .strict = seed % 2 == 0});
    orch_future *all[12];
    if (orch_limiter_settings(limiter) == NULL) return;
    CHECK_INT(orch_limit(limiter, 1), 0);
    for (int i = 0; i < 12; i++)
        all[i] = i % 3 != 2 ? orch_go(give_up_after, &patience) : orch_go(patient, NULL);
    CHECK_INT(error_of(orch_all_n(12, all)), 0);
    CHECK_INT(starts, 4);
    for (size_t i = 0; i < starts; i++) CHECK_INT(at[i], 100 * (i + 1));
    orch_limiter_free(limiter);
}

// When the heavy first of the line gives up, the light one behind it starts at once.
BODY(limiter_cancelled_first_lets_the_next_in) {
    number();
    limiter_begin((orch_limiter_desc){.limit = 10, .interval_ms = 1000});
    if (orch_limiter_settings(limiter) == NULL) return;
    CHECK(orch_limiter_try(limiter, 8));
    orch_future *heavy = orch_go(limit_heavy, &who[0]);
    orch_future *light = orch_go(limit_one, &who[1]);
    turns(5);
    CHECK_INT(calls, 0);
    orch_drop(heavy);
    CHECK_INT(error_of(light), 0);
    CHECK_INT(orch_now(), 0);
    CHECK_INT(calls, 2);
    CHECK_INT(order[0], ORCH_ECANCELED);
    CHECK_INT(order[1], 1);
    orch_limiter_free(limiter);
}

// The last one that gives up takes the alarm along: no timer keeps a loop from ending.
BODY(limiter_cancelled_takes_the_timer_along) {
    limiter_begin((orch_limiter_desc){.limit = 1, .interval_ms = 3600000});
    if (orch_limiter_settings(limiter) == NULL) return;
    CHECK(orch_limiter_try(limiter, 1));
    orch_future *a = orch_limiter_acquire(limiter, 1), *b = orch_limiter_acquire(limiter, 1);
    turns(5);
    orch_drop(a);
    turns(5);
    if (!orch_is_settled(b)) CHECK_INT(orch_loop_statistics(orch_loop_current()).timers, 1);
    orch_drop(b);
    turns(5);
    CHECK_INT(orch_loop_statistics(orch_loop_current()).timers, 0);
    CHECK_INT(orch_now(), 0);
    orch_limiter_free(limiter);
}

// A race that is lost takes nothing, also when both turns come in the same round.
BODY_SEEDS(limiter_lost_race_takes_nothing) {
    orch_limiter *a = orch_limiter_new(&(orch_limiter_desc){.limit = 1, .interval_ms = 1000});
    orch_limiter *b = orch_limiter_new(&(orch_limiter_desc){.limit = 1, .interval_ms = 1000});
    bool usable = orch_limiter_settings(a) != NULL && orch_limiter_settings(b) != NULL;
    for (int i = 0; i < 20 && usable; i++) {
        orch_result r =
            orch_await(orch_race(orch_limiter_acquire(a, 1), orch_limiter_acquire(b, 1)));
        if (!CHECK_INT(r.error, 0)) break;
        CHECK(orch_limiter_try(r.index == 0 ? b : a, 1)); // the loser's is still there
        CHECK(!orch_limiter_try(r.index == 0 ? a : b, 1));
        orch_result_free(&r);
        orch_sleep(1000);
    }
    orch_limiter_free(a);
    orch_limiter_free(b);
}

// The alarm rings in the round in which the race is decided by its timer.
BODY_SEEDS(limiter_race_with_a_timer) {
    limiter_begin((orch_limiter_desc){.limit = 1, .interval_ms = 100});
    if (orch_limiter_settings(limiter) == NULL) return;
    for (int i = 0; i < 20; i++) {
        while (orch_limiter_try(limiter, 1)) continue;
        int error = error_of(orch_timeout(orch_limiter_acquire(limiter, 1), 100));
        turns(3);
        bool left = orch_limiter_try(limiter, 1);
        if (error == 0) CHECK(!left); // it got the token, or the token is there
        else CHECK(left);
    }
    orch_limiter_free(limiter);
}

// One timer and few looks at the clock, however many wait.
static void one_timer(void) {
    limiter_begin((orch_limiter_desc){.limit = 500, .interval_ms = 1});
    static orch_future *all[2000];
    own_ns = 0;
    if (orch_limiter_settings(limiter) == NULL) return;
    CHECK(orch_limiter_try(limiter, 500));
    size_t futures = orch_loop_statistics(orch_loop_current()).futures;
    for (int i = 0; i < 2000; i++) all[i] = orch_limiter_acquire(limiter, 1);
    turns(3);
    error_of(orch_after(0)); // the next look at the clock: the timer counts from there
    orch_loop_stats stats = orch_loop_statistics(orch_loop_current());
    CHECK_INT(stats.timers, 1);
    CHECK_INT(orch_limiter_waiting(limiter), 2000);
    CHECK(stats.futures - futures <= 2 * 2000 + 4);
    unsigned quiet = reads;
    orch_drop(orch_limiter_acquire(limiter, 1)); // the end of the line costs no look
    turns(3);
    CHECK_INT(reads, quiet);
    own_ns = 4000000; // all at once now: but the bucket holds no more than 500
    unsigned before = reads;
    error_of(orch_after(0)); // the next look at the clock
    turns(3);
    CHECK_INT(orch_limiter_waiting(limiter), 1500);
    CHECK(reads - before < 20);
    for (int i = 1999; i >= 0; i--) orch_drop(all[i]);
    CHECK_INT(orch_limiter_waiting(limiter), 0);
    orch_limiter_free(limiter);
}

TEST(limiter_one_timer_for_all) {
    run_desc(one_timer, (orch_loop_desc){.now = own_clock});
    run_desc(one_timer, (orch_loop_desc){.now = own_clock});
}

static void few_reads(void) {
    reads = 0;
    limiter_begin((orch_limiter_desc){.limit = 500, .interval_ms = 1});
    if (orch_limiter_settings(limiter) == NULL) return;
    CHECK_INT(reads, 0);
    for (int i = 0; i < 100; i++) CHECK_INT(orch_limit(limiter, 1), 0);
    CHECK_INT(reads, 100);
    orch_limiter_free(limiter);
}

TEST(limiter_reads_the_clock_once_a_start) {
    run_desc(few_reads, (orch_loop_desc){.now = own_clock});
}

BODY_SEEDS(limiter_free_tells_who_waits) {
    number();
    limiter_begin((orch_limiter_desc){.limit = 1, .interval_ms = 100000});
    orch_future *all[5];
    bool usable = orch_limiter_settings(limiter) != NULL;
    if (usable) CHECK_INT(orch_limit(limiter, 1), 0);
    for (int i = 0; i < 4; i++) all[i] = orch_go(limit_one, &who[i]);
    all[4] = orch_limiter_acquire(limiter, 1);
    turns((int)(seed % 3));
    orch_limiter_free(limiter);
    orch_result r = orch_await(orch_all_settled_n(5, all));
    for (size_t i = 0; i < 5 && usable; i++) CHECK_INT(orch_at(&r, i)->error, ORCH_ECLOSED);
    orch_result_free(&r);
    CHECK_INT(orch_now(), 0);
}

BODY(limiter_bounded) {
    limiter_begin((orch_limiter_desc){.limit = 1, .interval_ms = 100, .waiting = 2});
    orch_future *all[3];
    if (orch_limiter_settings(limiter) == NULL) return;
    CHECK_INT(orch_limit(limiter, 1), 0);
    for (int i = 0; i < 3; i++) all[i] = orch_limiter_acquire(limiter, 1);
    CHECK_INT(orch_limiter_waiting(limiter), 2);
    CHECK_INT(error_of(all[2]), ORCH_ELIMIT);
    CHECK_INT(error_of(all[0]), 0);
    CHECK_INT(error_of(all[1]), 0);
    CHECK_INT(orch_now(), 200);
    orch_limiter_free(limiter);
}

BODY(limiter_pause) {
    limiter_begin((orch_limiter_desc){.limit = 10, .interval_ms = 100});
    if (orch_limiter_settings(limiter) == NULL) return;
    CHECK_INT(orch_limiter_pause(limiter, 5000), 0);
    CHECK_INT(orch_limiter_pause(limiter, 10), 0); // the longer one stands
    CHECK(!orch_limiter_try(limiter, 1));
    CHECK_INT(orch_limiter_delay(limiter, 1), 5000);
    CHECK_INT(orch_limit(limiter, 1), 0);
    CHECK_INT(orch_now(), 5000);
    orch_future *f = orch_limiter_acquire(limiter, 10); // one of ten is missing: in 10 ms
    turns(3);
    CHECK_INT(orch_limiter_pause(limiter, 30), 0); // while somebody waits
    CHECK_INT(error_of(f), 0);
    CHECK_INT(orch_now(), 5030);
    CHECK_INT(orch_limiter_pause(limiter, UINT64_MAX), 0);
    CHECK(!orch_limiter_try(limiter, 1));
    CHECK(orch_limiter_delay(limiter, 1) > 2000000000u);
    orch_limiter_free(limiter);
}

BODY(limiter_change_bucket) {
    limiter_begin((orch_limiter_desc){.limit = 10, .interval_ms = 1000, .name = "api"});
    if (orch_limiter_settings(limiter) == NULL) return;
    CHECK(orch_limiter_try(limiter, 6)); // four are left
    orch_limiter_desc desc = {.limit = 100, .interval_ms = 1000};
    CHECK_INT(orch_limiter_change(limiter, &desc), 0);
    CHECK_STR(orch_limiter_settings(limiter)->name, "api");
    CHECK_INT(orch_limiter_delay(limiter, 4), 0);
    CHECK_INT(orch_limiter_delay(limiter, 5), 10);
    CHECK_INT(orch_limiter_delay(limiter, 100), 960);
    desc.burst = 3; // less than there is
    CHECK_INT(orch_limiter_change(limiter, &desc), 0);
    CHECK(orch_limiter_try(limiter, 3));
    CHECK(!orch_limiter_try(limiter, 1));
    orch_future *heavy = orch_limiter_acquire(limiter, 3);
    orch_future *light = orch_limiter_acquire(limiter, 1);
    turns(3);
    desc = (orch_limiter_desc){.limit = 1, .interval_ms = 50, .burst = 2};
    CHECK_INT(orch_limiter_change(limiter, &desc), 0);
    CHECK_INT(error_of(heavy), ORCH_ELIMIT); // can never come any more
    CHECK_INT(orch_now(), 0);                // and is told at once
    CHECK_INT(error_of(light), 0);
    CHECK_INT(orch_now(), 50);
    desc = (orch_limiter_desc){.limit = 7, .interval_ms = 1000};
    CHECK_INT(orch_limiter_change(limiter, &desc), 0);
    CHECK_INT(orch_limiter_delay(limiter, 1), 143); // 142 6/7
    desc = (orch_limiter_desc){.limit = 4000000000u, .interval_ms = 1};
    CHECK_INT(orch_limiter_change(limiter, &desc), 0);
    orch_sleep(10);
    desc = (orch_limiter_desc){.limit = 1, .interval_ms = 86400000, .burst = 2}; // from very many
    CHECK_INT(orch_limiter_change(limiter, &desc), 0);
    CHECK(orch_limiter_try(limiter, 2));
    CHECK(!orch_limiter_try(limiter, 1));
    orch_limiter_free(limiter);
}

BODY(limiter_change_strict) {
    orch_limiter_desc desc = {.limit = 4, .interval_ms = 100, .strict = true};
    limiter_begin(desc);
    if (orch_limiter_settings(limiter) == NULL) return;
    for (int i = 0; i < 4; i++) { // at 0, 10, 20, 30
        CHECK(orch_limiter_try(limiter, 1));
        orch_sleep(10);
    }
    desc.limit = 6;
    int error = orch_limiter_change(limiter, &desc);
    if (error == ORCH_ENOMEM) {
        orch_limiter_free(limiter);
        return;
    }
    CHECK_INT(orch_limiter_delay(limiter, 2), 0); // two places more
    CHECK_INT(orch_limiter_delay(limiter, 3), 60);
    CHECK_INT(orch_limiter_delay(limiter, 6), 90);
    desc.limit = 2, desc.interval_ms = 200; // the youngest two count: at 20 and 30
    error = orch_limiter_change(limiter, &desc);
    if (error == ORCH_ENOMEM) {
        orch_limiter_free(limiter);
        return;
    }
    CHECK_INT(orch_limiter_delay(limiter, 1), 180);
    CHECK_INT(orch_limiter_delay(limiter, 2), 190);
    CHECK_INT(orch_limit(limiter, 2), 0);
    CHECK_INT(orch_now(), 230);
    orch_limiter_free(limiter);
}

// A task whose turn it always is lets others run.
static bool other_ran;
static orch_result other(void *arg) {
    (void)arg;
    orch_yield();
    other_ran = true;
    return orch_ok(NULL, NULL);
}

BODY(limiter_starves_nobody) {
    limiter_begin((orch_limiter_desc){.limit = 1000000, .interval_ms = 1});
    other_ran = false;
    orch_future *f = orch_go(other, NULL);
    int i = 0;
    for (; i < 100000 && !other_ran; i++)
        if (orch_limit(limiter, 1) != 0) break;
    CHECK(i <= 200);
    orch_drop(f);
    orch_limiter_free(limiter);
}

// The loop ends while somebody waits, also in a shield: neither hangs nor leaks.
static int shielded_error;
static bool limiter_made;
static orch_result shielded(void *arg) {
    (void)arg;
    orch_shield_begin();
    shielded_error = orch_limit(limiter, 1);
    orch_shield_end();
    return orch_ok(NULL, NULL);
}

static orch_result leaves_waiters(void *arg) {
    (void)arg;
    number();
    limiter_begin((orch_limiter_desc){.limit = 1, .interval_ms = 3600000});
    limiter_made = orch_limiter_settings(limiter) != NULL;
    orch_limit(limiter, 1);
    orch_spawn(shielded, NULL);
    orch_spawn(limit_one, &who[0]);
    orch_detach(orch_limiter_acquire(limiter, 1));
    turns(3);
    return orch_ok(NULL, NULL);
}

static void free_late(void *context) { orch_limiter_free(*(orch_limiter **)context); }

static orch_result frees_late(void *arg) {
    (void)arg;
    orch_result r = orch_await(orch_future_new(&(orch_promise){NULL, 0}));
    free_late(&limiter);
    return r;
}

static orch_result starts_frees_late(void *arg) {
    orch_spawn(frees_late, NULL); // ends with the loop, before the others
    return leaves_waiters(arg);
}

TEST(limiter_loop_ends) {
    for (int i = 0; i < 2; i++) {
        reset();
        shielded_error = 0;
        limiter_made = false;
        limiter = NULL;
        orch_result r = orch_run_with(&(orch_loop_desc){.clock = ORCH_CLOCK_VIRTUAL,
                                                        .on_unhandled = on_unhandled,
                                                        .on_report = on_report},
                                      i == 0 ? starts_frees_late : leaves_waiters, NULL);
        CHECK_INT(r.error, 0);
        CHECK(shielded_error == ORCH_ECANCELED || shielded_error == ORCH_ECLOSED);
        if (i == 1 && limiter_made) free(limiter); // nobody freed it while there was a loop
    }
}

// ---- circuit breaker

static orch_breaker *breaker;
static int changes[16], changed;

static void on_change(orch_breaker_state from, orch_breaker_state to, void *context) {
    (void)context;
    if (changed < 16) changes[changed] = (int)from * 10 + (int)to;
    changed++;
}

static void breaker_begin(orch_breaker_desc desc) {
    changed = calls = 0;
    desc.on_change = on_change;
    breaker = orch_breaker_new(&desc);
}

static bool breaker_usable(void) { return orch_breaker_settings(breaker) != NULL; }

struct job { // what a call does
    uint64_t ms;
    int error, runs;
    bool shields, cancelled;
};

static orch_result work(void *arg) {
    struct job *job = arg;
    job->runs++;
    if (job->ms > 0) job->cancelled = orch_sleep(job->ms) != 0;
    if (job->shields && job->cancelled) {
        orch_shield_begin();
        orch_sleep(50);
        orch_shield_end();
    }
    if (job->cancelled) return orch_fail(ORCH_ECANCELED);
    return job->error != 0 ? orch_fail(job->error) : token();
}

static struct job good = {0}, bad = {.error = 7};

static int breaker_call(struct job *job) {
    return message_of(orch_breaker_run(breaker, work, job));
}

static orch_breaker_state state(void) { return orch_breaker_state_of(breaker); }

BODY(breaker_opens_in_row) {
    breaker_begin((orch_breaker_desc){.name = "db", .failures = 3, .open_ms = 1000});
    if (!breaker_usable()) return;
    good.runs = bad.runs = 0;
    CHECK_INT(breaker_call(&bad), 7);
    CHECK_INT(breaker_call(&bad), 7);
    CHECK_INT(breaker_call(&good), 0); // a good one starts the count again
    CHECK_INT(breaker_call(&bad), 7);
    CHECK_INT(breaker_call(&bad), 7);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    CHECK_INT(orch_breaker_statistics(breaker).in_row, 2);
    CHECK_INT(breaker_call(&bad), 7);
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    orch_sleep(200);
    CHECK_INT(breaker_call(&good), ORCH_EOPEN);
    CHECK_STR(message, "the circuit breaker 'db' is open for another 800 ms");
    CHECK_INT(good.runs, 1); // refused calls do not run
    CHECK_INT(bad.runs, 5);
    orch_breaker_stats stats = orch_breaker_statistics(breaker);
    CHECK_INT(stats.passed, 6);
    CHECK_INT(stats.refused, 1);
    CHECK_INT(stats.bad, 5);
    CHECK_INT(stats.opened, 1);
    CHECK_INT(changed, 1);
    CHECK_INT(changes[0], 2);
    orch_breaker_free(breaker);
}

BODY(breaker_defaults) {
    breaker = orch_breaker_new(NULL);
    const orch_breaker_desc *d = orch_breaker_settings(breaker);
    if (d == NULL) return;
    CHECK_INT(d->failures, 5);
    CHECK_INT(d->open_ms, 30000);
    CHECK_INT(d->probe_ms, 30000);
    CHECK_INT(d->probes, 1);
    CHECK_STR(d->name, "");
    for (int i = 0; i < 4; i++) breaker_call(&bad);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    breaker_call(&bad);
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    CHECK_INT(breaker_call(&good), ORCH_EOPEN);
    CHECK_STR(message, "the circuit breaker is open for another 30000 ms");
    orch_breaker_free(breaker);
}

BODY(breaker_half_open) {
    breaker_begin((orch_breaker_desc){.failures = 1, .open_ms = 1000});
    if (!breaker_usable()) return;
    CHECK_INT(breaker_call(&bad), 7);
    orch_sleep(999);
    CHECK_INT(breaker_call(&good), ORCH_EOPEN);
    orch_sleep(1);
    CHECK_INT(state(), ORCH_BREAKER_HALF_OPEN);
    CHECK_INT(breaker_call(&bad), 7); // the probe: open again, for the whole time
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    orch_sleep(999);
    CHECK_INT(breaker_call(&good), ORCH_EOPEN);
    orch_sleep(1);
    CHECK_INT(breaker_call(&good), 0);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    static const int want[] = {2, 21, 12, 21, 10};
    for (int i = 0; i < 5; i++) CHECK_INT(changes[i], want[i]);
    CHECK_INT(changed, 5);
    CHECK_INT(orch_breaker_statistics(breaker).opened, 2);
    orch_breaker_free(breaker);
}

static void breaker_open_and_wait(void) {
    for (int i = 0; i < 5; i++) breaker_call(&bad);
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    orch_sleep(orch_breaker_settings(breaker)->open_ms);
    CHECK_INT(state(), ORCH_BREAKER_HALF_OPEN);
}

BODY_SEEDS(breaker_probes) {
    breaker_begin((orch_breaker_desc){.failures = 5, .open_ms = 1000, .probes = 3});
    if (!breaker_usable()) return;
    breaker_open_and_wait();
    struct job slow[4] = {{.ms = 10}, {.ms = 20}, {.ms = 30}, {.ms = 40}};
    orch_future *all[4];
    for (int i = 0; i < 4; i++) all[i] = orch_breaker_run(breaker, work, &slow[i]);
    CHECK_INT(message_of(all[3]), ORCH_EOPEN); // three at a time
    CHECK_STR(message, "the circuit breaker is half-open, and is being tried");
    CHECK_INT(error_of(all[0]), 0);
    CHECK_INT(state(), ORCH_BREAKER_HALF_OPEN); // all three have to be good
    CHECK_INT(error_of(all[1]), 0);
    CHECK_INT(error_of(all[2]), 0);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    breaker_open_and_wait();
    CHECK_INT(breaker_call(&good), 0);
    CHECK_INT(breaker_call(&good), 0);
    CHECK_INT(orch_breaker_statistics(breaker).in_row, 2);
    struct job last = {.ms = 10, .error = 7};
    orch_future *f = orch_breaker_run(breaker, work, &last);
    CHECK_INT(breaker_call(&good), ORCH_EOPEN); // the third is under way: no fourth
    CHECK_INT(error_of(f), 7);                  // one bad one is enough
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    orch_breaker_free(breaker);
}

static orch_outcome ignore_7(const orch_result *r, void *context) {
    (void)context;
    return r->error == 7   ? ORCH_OUTCOME_IGNORED
           : r->error != 0 ? ORCH_OUTCOME_BAD
                           : ORCH_OUTCOME_GOOD;
}

BODY(breaker_probe_given_back) {
    breaker_begin((orch_breaker_desc){.failures = 5, .open_ms = 1000, .judge = ignore_7});
    if (!breaker_usable()) return;
    struct job failing = {.error = 8}, endless = {.ms = 100000000};
    for (int i = 0; i < 5; i++) CHECK_INT(breaker_call(&failing), 8);
    orch_sleep(1000);
    for (int i = 0; i < 3; i++) {
        orch_future *f = orch_breaker_run(breaker, work, &endless);
        CHECK_INT(breaker_call(&good), ORCH_EOPEN); // its slot is taken
        orch_drop(f);                               // cancelled: given back
        CHECK_INT(breaker_call(&bad), 7);           // ignored: given back
        orch_result pass = orch_breaker_allow(breaker);
        if (pass.error == ORCH_ENOMEM) break;
        CHECK_INT(pass.error, 0);
        CHECK_INT(breaker_call(&good), ORCH_EOPEN);
        orch_result_free(&pass); // not used: given back
        CHECK_INT(state(), ORCH_BREAKER_HALF_OPEN);
    }
    CHECK_INT(breaker_call(&good), 0);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    orch_breaker_free(breaker);
}

BODY(breaker_probe_hangs) {
    breaker_begin((orch_breaker_desc){.failures = 1, .open_ms = 1000, .probe_ms = 300});
    if (!breaker_usable()) return;
    breaker_call(&bad);
    orch_sleep(1000);
    struct job endless = {.ms = 100000000};
    orch_future *f = orch_breaker_run(breaker, work, &endless);
    orch_sleep(299);
    CHECK_INT(state(), ORCH_BREAKER_HALF_OPEN);
    CHECK_INT(breaker_call(&good), ORCH_EOPEN);
    orch_sleep(1);
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    CHECK_INT(breaker_call(&good), ORCH_EOPEN); // from now on for open_ms
    CHECK_STR(message, "the circuit breaker is open for another 1000 ms");
    orch_sleep(1000);
    CHECK_INT(breaker_call(&good), 0);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    orch_drop(f);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    orch_breaker_free(breaker);
}

BODY(breaker_cancelled_calls) {
    breaker_begin((orch_breaker_desc){.failures = 1});
    if (!breaker_usable()) return;
    struct job endless = {.ms = 100000000};
    for (int i = 0; i < 3; i++) {
        CHECK_INT(error_of(orch_timeout(orch_breaker_run(breaker, work, &endless), 50)),
                  ORCH_ETIMEDOUT);
    }
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    CHECK_INT(orch_breaker_statistics(breaker).bad, 0);
    orch_breaker_free(breaker);
    breaker_begin((orch_breaker_desc){.failures = 1, .slow_ms = 50});
    if (!breaker_usable()) return;
    CHECK_INT(error_of(orch_timeout(orch_breaker_run(breaker, work, &endless), 49)),
              ORCH_ETIMEDOUT);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    CHECK_INT(error_of(orch_timeout(orch_breaker_run(breaker, work, &endless), 50)),
              ORCH_ETIMEDOUT);
    CHECK_INT(state(), ORCH_BREAKER_OPEN); // slow by then, whoever gave up
    orch_breaker_free(breaker);
}

// An error of the task's own, after it was cancelled, is no failure of the service.
static orch_result fails_when_cancelled(void *arg) {
    (void)arg;
    return orch_sleep(1000000) != 0 ? orch_fail(5) : orch_ok(NULL, NULL);
}

BODY(breaker_cancelled_with_another_error) {
    breaker_begin((orch_breaker_desc){.failures = 1});
    if (!breaker_usable()) return;
    orch_drop(orch_breaker_run(breaker, fails_when_cancelled, NULL));
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    orch_breaker_free(breaker);
}

BODY(breaker_slow) {
    breaker_begin((orch_breaker_desc){.failures = 2, .slow_ms = 100});
    if (!breaker_usable()) return;
    struct job quick = {.ms = 99}, slow = {.ms = 100};
    for (int i = 0; i < 4; i++) CHECK_INT(breaker_call(&quick), 0);
    CHECK_INT(breaker_call(&slow), 0);
    CHECK_INT(breaker_call(&quick), 0);
    CHECK_INT(breaker_call(&slow), 0);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    CHECK_INT(breaker_call(&slow), 0); // its value comes all the same
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    orch_breaker_free(breaker);
}

BODY(breaker_judge) {
    breaker_begin((orch_breaker_desc){.failures = 2, .judge = ignore_7});
    if (!breaker_usable()) return;
    struct job failing = {.error = 8};
    CHECK_INT(breaker_call(&failing), 8);
    for (int i = 0; i < 5; i++) CHECK_INT(breaker_call(&bad), 7);
    CHECK_INT(orch_breaker_statistics(breaker).in_row, 1); // ignored: not even the row ends
    CHECK_INT(breaker_call(&failing), 8);
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    orch_breaker_free(breaker);
}

BODY(breaker_rate) {
    breaker_begin((orch_breaker_desc){.failure_rate = 0.5, .window = 70, .minimum = 20});
    if (!breaker_usable()) return;
    for (int i = 0; i < 19; i++) breaker_call(&bad); // below the minimum, and no row counts
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    for (int i = 0; i < 51; i++) breaker_call(&good);
    for (int i = 0; i < 34; i++) breaker_call(i % 2 ? &good : &bad);
    orch_breaker_stats stats = orch_breaker_statistics(breaker);
    CHECK_INT(stats.seen, 70);
    CHECK_INT(stats.seen_bad, 17); // the first 19 have left
    for (int i = 0; i < 70; i++) breaker_call(i % 2 ? &good : &good);
    CHECK_INT(orch_breaker_statistics(breaker).seen_bad, 0);
    for (int i = 0; i < 34; i++) breaker_call(&bad);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED); // 34 of 70
    breaker_call(&bad);
    CHECK_INT(state(), ORCH_BREAKER_OPEN); // 35 of 70
    orch_breaker_free(breaker);
}

BODY(breaker_rate_and_row) {
    breaker_begin((orch_breaker_desc){.failure_rate = 1.0, .window = 4, .failures = 6});
    if (!breaker_usable()) return;
    CHECK_INT(orch_breaker_settings(breaker)->minimum, 4);
    for (int i = 0; i < 3; i++) breaker_call(&bad);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    breaker_call(&bad);
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    orch_breaker_free(breaker);
}

// Calls that began before it opened say nothing about it afterwards.
BODY_SEEDS(breaker_late_outcomes) {
    breaker_begin((orch_breaker_desc){.failures = 1, .open_ms = 100});
    if (!breaker_usable()) return;
    struct job late_bad = {.ms = 150, .error = 9}, late_good = {.ms = 50};
    orch_future *all[2] = {orch_breaker_run(breaker, work, &late_bad),
                           orch_breaker_run(breaker, work, &late_good)};
    breaker_call(&bad);
    orch_sleep(60); // a good one ends while it is open
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    orch_sleep(40);
    CHECK_INT(breaker_call(&good), 0);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    error_of(orch_all_settled_n(2, all)); // a bad one ends when it is closed again
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    CHECK_INT(orch_breaker_statistics(breaker).bad, 1);
    orch_breaker_free(breaker);
}

BODY(breaker_forced) {
    breaker_begin((orch_breaker_desc){.name = "x", .open_ms = 100, .failures = 2});
    if (!breaker_usable()) return;
    CHECK_INT(orch_breaker_trip(breaker, 0), 0);
    CHECK_INT(breaker_call(&good), ORCH_EOPEN);
    CHECK_STR(message, "the circuit breaker 'x' is open for another 100 ms");
    CHECK_INT(orch_breaker_trip(breaker, 5000), 0);
    orch_sleep(4999);
    CHECK_INT(breaker_call(&good), ORCH_EOPEN);
    CHECK_INT(orch_breaker_trip(breaker, UINT64_MAX), 0);
    orch_sleep(1000000000);
    CHECK_INT(breaker_call(&good), ORCH_EOPEN);
    CHECK_STR(message, "the circuit breaker 'x' is open until it is reset");
    CHECK_INT(orch_breaker_reset(breaker), 0);
    CHECK_INT(breaker_call(&good), 0);
    CHECK_INT(breaker_call(&bad), 7);
    CHECK_INT(orch_breaker_reset(breaker), 0); // forgets the bad one
    CHECK_INT(breaker_call(&bad), 7);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    CHECK_INT(changed, 2); // told only when the state has changed
    orch_breaker_free(breaker);
}

static int depth;
static void reenters(orch_breaker_state from, orch_breaker_state to, void *context) {
    (void)from, (void)context;
    depth++;
    if (to == ORCH_BREAKER_OPEN) orch_breaker_reset(breaker);
    if (to == ORCH_BREAKER_HALF_OPEN) orch_breaker_trip(breaker, 0);
}

BODY(breaker_on_change) {
    depth = 0;
    breaker = orch_breaker_new(&(orch_breaker_desc){.failures = 1, .on_change = reenters});
    if (!breaker_usable()) return;
    CHECK_INT(breaker_call(&bad), 7); // opened, and closed again by the hook
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    CHECK_INT(depth, 2);
    CHECK_INT(breaker_call(&good), 0);
    orch_breaker_free(breaker);
}

static void frees_it(orch_breaker_state from, orch_breaker_state to, void *context) {
    (void)from, (void)to, (void)context;
    depth++;
    orch_breaker_free(breaker);
}

// A hook may free the breaker, from wherever it is called.
BODY(breaker_on_change_frees) {
    depth = 0;
    orch_breaker_desc desc = {.failures = 1, .open_ms = 10, .on_change = frees_it};
    breaker = orch_breaker_new(&desc);
    if (breaker_usable()) CHECK_INT(breaker_call(&bad), 7);
    breaker = orch_breaker_new(&desc);
    if (breaker_usable()) CHECK_INT(orch_breaker_trip(breaker, 0), 0);
    breaker = orch_breaker_new(&desc);
    if (!breaker_usable()) return;
    orch_result pass = orch_breaker_allow(breaker);
    orch_breaker_record(&pass, &(orch_result){.error = 3});
    if (pass.error == 0) CHECK_INT(depth, 3);
}

static orch_outcome judge_frees(const orch_result *r, void *context) {
    (void)r, (void)context;
    orch_breaker_free(breaker);
    return ORCH_OUTCOME_BAD;
}

static orch_outcome judge_counts(const orch_result *r, void *context) {
    (void)r;
    ++*(int *)context;
    return ORCH_OUTCOME_BAD;
}

// Once it is freed nothing of the desc is called any more.
BODY(breaker_freed_calls_nothing) {
    breaker_begin((orch_breaker_desc){.failures = 1, .judge = judge_frees});
    if (breaker_usable()) CHECK_INT(breaker_call(&bad), 7);
    CHECK_INT(changed, 0);
    int judged = 0;
    breaker_begin((orch_breaker_desc){.failures = 1, .judge = judge_counts, .context = &judged});
    if (!breaker_usable()) return;
    struct job slow = {.ms = 10};
    orch_future *f = orch_breaker_run(breaker, work, &slow);
    orch_breaker_free(breaker);
    CHECK_INT(error_of(f), 0);
    CHECK_INT(judged + changed, 0);
}

static void frees_half_open(orch_breaker_state from, orch_breaker_state to, void *context) {
    if (to == ORCH_BREAKER_HALF_OPEN) frees_it(from, to, context);
}

BODY(breaker_on_change_frees_before_a_call) {
    orch_breaker_desc desc = {.failures = 1, .open_ms = 10, .on_change = frees_half_open};
    breaker = orch_breaker_new(&desc);
    if (!breaker_usable()) return;
    CHECK_INT(breaker_call(&bad), 7);
    orch_sleep(10);
    CHECK_INT(breaker_call(&good), ORCH_ECLOSED);
}

BODY(breaker_pass) {
    breaker_begin((orch_breaker_desc){.failures = 2, .open_ms = 100, .slow_ms = 500});
    if (!breaker_usable()) return;
    orch_result failed = orch_fail(5), fine = orch_ok(NULL, NULL),
                cancelled = orch_fail(ORCH_ECANCELED);
    for (int i = 0; i < 2; i++) {
        orch_result pass = orch_breaker_allow(breaker);
        if (pass.error == ORCH_ENOMEM) break;
        orch_breaker_record(&pass, &failed);
        orch_breaker_record(&pass, &failed); // a second time: nothing
        CHECK_INT(state(), i == 0 ? ORCH_BREAKER_CLOSED : ORCH_BREAKER_OPEN);
    }
    orch_result pass = orch_breaker_allow(breaker);
    CHECK_INT(pass.error, ORCH_EOPEN);
    orch_breaker_record(&pass, &fine); // refused: nothing but its message
    orch_sleep(100);
    pass = orch_breaker_allow(breaker);
    orch_breaker_record(&pass, &cancelled);
    pass = orch_breaker_allow(breaker);
    orch_breaker_record(&pass, NULL);
    CHECK_INT(state(), ORCH_BREAKER_HALF_OPEN);
    pass = orch_breaker_allow(breaker);
    orch_breaker_record(&pass, &fine);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    pass = orch_breaker_allow(breaker);
    orch_sleep(500);
    orch_breaker_record(&pass, &fine); // slow
    CHECK_INT(orch_breaker_statistics(breaker).in_row, 1);
    pass = orch_breaker_allow(breaker);
    orch_breaker_free(breaker); // with a pass out
    orch_breaker_record(&pass, &failed);
}

BODY_SEEDS(breaker_free_with_calls) {
    breaker_begin((orch_breaker_desc){.failures = 1});
    struct job slow = {.ms = 20, .error = 3}, fine = {.ms = 30};
    orch_future *all[3];
    bool usable = breaker_usable();
    all[0] = orch_breaker_run(breaker, work, &slow);
    all[1] = orch_breaker_run(breaker, work, &fine);
    all[2] = orch_breaker_run(breaker, work, &fine);
    orch_breaker_free(breaker);
    orch_drop(all[2]);
    orch_result r = orch_await(orch_all_settled_n(2, all));
    if (usable) CHECK_INT(orch_at(&r, 0)->error, 3);
    if (usable) CHECK_INT(orch_at(&r, 1)->error, 0);
    orch_result_free(&r);
    CHECK_INT(changed, 0);
}

// What a call returns counts when it has settled.
static orch_promise later;
static orch_result chains(void *arg) {
    (void)arg;
    return orch_chain(orch_future_new(&later));
}

BODY(breaker_chain) {
    breaker_begin((orch_breaker_desc){.failures = 1});
    if (!breaker_usable()) return;
    orch_future *f = orch_breaker_run(breaker, chains, NULL);
    turns(3);
    CHECK_INT(state(), ORCH_BREAKER_CLOSED);
    orch_settle(later, orch_failf(6, "late"));
    CHECK_INT(message_of(f), 6);
    CHECK_STR(message, "late");
    CHECK_INT(state(), ORCH_BREAKER_OPEN);
    orch_breaker_free(breaker);
}

// ---- arguments: copied, released once, on every path; for all that run a task

struct big {
    long double aligned;
    char text[700];
    uint64_t sum;
};

static int copies_seen;

static orch_result look_at_copy(void *arg) {
    struct big *big = arg;
    orch_yield(); // the original is gone by now
    CHECK_INT((uintptr_t)arg % 16, 0);
    copies_seen += big->sum == 42 && !strcmp(big->text, "copied");
    return orch_ok(NULL, NULL);
}

typedef orch_future *(*run_fn)(const orch_task_desc *desc);
static orch_flight *flight;
static orch_adaptive *adaptive;

static orch_future *by_breaker(const orch_task_desc *d) {
    return orch_breaker_run_with(breaker, d);
}
static orch_future *by_flight(const orch_task_desc *d) {
    return orch_flight_run_with(flight, "key", 3, d);
}
static orch_future *by_adaptive(const orch_task_desc *d) {
    return orch_adaptive_run_with(adaptive, d);
}
static const run_fn runs[] = {by_breaker, by_flight, by_adaptive};
enum { RUNS = 3 };

static void guards_begin(void) {
    breaker = orch_breaker_new(&(orch_breaker_desc){.failures = 1000});
    flight = orch_flight_new();
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.max = 1});
}

static void guards_end(void) {
    orch_breaker_free(breaker);
    orch_flight_free(flight);
    orch_adaptive_free(adaptive);
}

static orch_future *start_copied(run_fn go) {
    struct big big = {.sum = 42};
    snprintf(big.text, sizeof big.text, "copied");
    orch_future *f = go(&(orch_task_desc){.fn = look_at_copy, .arg = &big, .arg_size = sizeof big});
    memset(&big, 0xff, sizeof big);
    return f;
}

BODY_SEEDS(arguments_copied) {
    guards_begin();
    copies_seen = 0;
    for (int i = 0; i < RUNS; i++) {
        int error = error_of(start_copied(runs[i]));
        CHECK_INT(error, 0);
    }
    CHECK_INT(copies_seen, RUNS);
    guards_end();
}

static const char *seen_name;
static size_t seen_stack;
static orch_result look_at_task(void *arg) {
    (void)arg;
    seen_name = orch_task_name(orch_self());
    seen_stack = orch_task_stack_size(orch_self());
    return orch_ok(NULL, NULL);
}

BODY(name_and_stack_size_kept) {
    guards_begin();
    for (int i = 0; i < RUNS; i++) {
        seen_name = "", seen_stack = 0;
        error_of(
            runs[i](&(orch_task_desc){.name = "fetch", .fn = look_at_task, .stack_size = 1 << 17}));
        CHECK_STR(seen_name, "fetch");
        CHECK_INT(seen_stack, 1 << 17);
    }
    guards_end();
}

static orch_result naps(void *arg) {
    (void)arg;
    return orch_sleep(10) != 0 ? orch_fail(ORCH_ECANCELED) : token();
}

static orch_task_desc owning(void) {
    return (orch_task_desc){.fn = naps, .arg = lent(), .release = give_back};
}

// Each token is released exactly once: balance() looks at the end.
BODY_SEEDS(arguments_released) {
    guards_begin();
    for (int i = 0; i < RUNS; i++) {
        orch_task_desc d = owning();
        error_of(runs[i](&d)); // ran
        d = owning();
        orch_drop(runs[i](&d)); // cancelled
        d = owning();
        orch_future *first = runs[i](&d);
        d = owning();
        orch_future *second = runs[i](&d); // side by side, joined, waiting
        d = owning();
        orch_drop(runs[i](&d)); // gave up meanwhile
        orch_drop(first);
        error_of(second);
    }
    if (breaker_usable()) orch_breaker_trip(breaker, 0);
    orch_task_desc d = owning();
    CHECK(error_of(by_breaker(&d)) != 0); // refused
    guards_end();
}

BODY(arguments_released_by_broken_ones) {
    refusing = true;
    guards_begin();
    refusing = false;
    for (int i = 0; i < RUNS; i++) {
        orch_task_desc d = owning();
        CHECK_INT(error_of(runs[i](&d)), ORCH_ENOMEM);
    }
    guards_end();
}

// ---- single flight

static int flying, most_flying, flights;

static orch_result fly(void *arg) {
    struct job *job = arg;
    flights++;
    if (++flying > most_flying) most_flying = flying;
    orch_result r = work(job);
    flying--;
    return r;
}

static void flight_begin(void) {
    flight = orch_flight_new();
    flying = most_flying = flights = 0;
}

static bool flight_usable(void) { // count is 0 for a broken one too
    orch_future *f = orch_flight_run(flight, "?", 1, look_at_task, NULL);
    bool usable = !orch_is_settled(f) || orch_peek(f)->error == 0;
    orch_drop(f);
    return usable;
}

static bool flight_ready(void) {
    if (flight_usable()) return true;
    orch_flight_free(flight);
    return false;
}

static orch_future *call_key(const char *key, struct job *job) {
    return orch_flight_run_with(
        flight, key, strlen(key),
        &(orch_task_desc){.fn = fly, .arg = job, .release = (void (*)(void *))NULL});
}

// An arg that the flight owns (nothing to give back): its caller may leave whenever it likes.
static void nothing(void *arg) { (void)arg; }
static orch_future *call_owned(const char *key, struct job *job) {
    return orch_flight_run_with(flight, key, strlen(key),
                                &(orch_task_desc){.fn = fly, .arg = job, .release = nothing});
}

BODY_SEEDS(flight_shares) {
    flight_begin();
    struct job job = {.ms = 20};
    orch_future *all[5];
    if (!flight_ready()) return;
    for (int i = 0; i < 5; i++) all[i] = call_key("a", &job);
    CHECK_INT(orch_flight_callers(flight, "a", 1), 5);
    CHECK_INT(orch_flight_count(flight), 1);
    orch_result r = orch_await(orch_all_n(5, all));
    if (CHECK_INT(r.error, 0)) {
        for (size_t i = 1; i < 5; i++) CHECK(orch_at(&r, i)->value == orch_at(&r, 0)->value);
    }
    orch_result_free(&r);
    CHECK_INT(flights, 1);
    CHECK_INT(orch_now(), 20);
    CHECK_INT(orch_flight_callers(flight, "a", 1), 0);
    CHECK_INT(orch_flight_count(flight), 0);
    orch_flight_free(flight);
}

BODY(flight_shares_errors) {
    flight_begin();
    struct job job = {.ms = 20, .error = 4};
    orch_future *all[3];
    if (!flight_ready()) return;
    for (int i = 0; i < 3; i++) all[i] = call_key("a", &job);
    orch_result r = orch_await(orch_all_settled_n(3, all));
    for (size_t i = 0; i < 3; i++) CHECK_INT(orch_at(&r, i)->error, 4);
    orch_result_free(&r);
    orch_flight_free(flight);
}

// Who calls alone owns the value.
BODY(flight_of_one) {
    flight_begin();
    struct job quick = {.ms = 0}, slow = {.ms = 5};
    for (int i = 0; i < 2; i++) {
        orch_result r = orch_await(call_key("a", i ? &slow : &quick));
        if (!CHECK_INT(r.error, 0)) continue;
        void *value = orch_take(&r);
        CHECK(value != NULL);
        give_back(value);
    }
    orch_flight_free(flight);
}

BODY(flight_again) {
    flight_begin();
    struct job job = {.ms = 20}, quick = {.ms = 0};
    for (int i = 0; i < 3; i++) error_of(call_key("a", &job));
    for (int i = 0; i < 3; i++) error_of(call_key("a", &quick));
    if (flight_usable()) CHECK_INT(flights, 6);
    orch_flight_free(flight);
}

BODY(flight_keys_are_bytes) {
    flight_begin();
    struct job job = {.ms = 20};
    static const char bytes[] = "a\0b\0c";
    orch_future *all[6];
    for (int i = 0; i < 3; i++) {
        all[2 * i] = orch_flight_run(flight, bytes, (size_t)(2 * i + 1), fly, &job);
        all[2 * i + 1] = orch_flight_run(flight, bytes, (size_t)(2 * i + 1), fly, &job);
    }
    error_of(orch_all_n(6, all));
    if (flight_usable()) CHECK_INT(flights, 3);
    orch_flight_free(flight);
}

// The key is copied, a long one too.
BODY(flight_key_is_copied) {
    flight_begin();
    struct job job = {.ms = 20};
    static char key[5000];
    memset(key, 'k', sizeof key);
    orch_future *a = orch_flight_run(flight, key, sizeof key, fly, &job);
    memset(key, 'x', sizeof key);
    orch_future *b = orch_flight_run(flight, key, sizeof key, fly, &job);
    memset(key, 'k', sizeof key);
    orch_future *c = orch_flight_run(flight, key, sizeof key, fly, &job);
    if (orch_flight_count(flight) > 0) CHECK_INT(orch_flight_count(flight), 2);
    error_of(orch_all(a, b, c));
    orch_flight_free(flight);
}

BODY(flight_many_keys) {
    enum { KEYS = 300 };
    static orch_future *all[2 * KEYS];
    flight_begin();
    struct job job = {.ms = 20};
    int keys = test_shared->fail_at ? 60 : KEYS;
    for (int i = 0; i < 2 * keys; i++) {
        int key = i % keys;
        all[i] = orch_flight_run(flight, &key, sizeof key, fly, &job);
    }
    if (flights > 0) CHECK_INT(orch_flight_count(flight), keys);
    int middle = keys / 2;
    if (flights > 0) CHECK_INT(orch_flight_callers(flight, &middle, sizeof middle), 2);
    error_of(orch_all_settled_n((size_t)(2 * keys), all));
    if (flights > 0) CHECK_INT(flights, keys);
    orch_flight_free(flight);
}

BODY_SEEDS(flight_leave) {
    flight_begin();
    struct job job = {.ms = 100};
    if (!flight_ready()) return;
    orch_future *a = call_owned("a", &job), *b = call_owned("a", &job), *c = call_owned("a", &job);
    orch_sleep(10);
    orch_drop(a); // the one that started it
    orch_drop(b);
    CHECK_INT(orch_now(), 10); // at once
    CHECK_INT(orch_flight_callers(flight, "a", 1), 1);
    orch_future *d = call_owned("a", &job); // joins
    CHECK_INT(error_of(orch_all(c, d)), 0);
    CHECK_INT(orch_now(), 100);
    CHECK_INT(flights, 1);
    orch_flight_free(flight);
}

BODY_SEEDS(flight_last_leaves) {
    flight_begin();
    struct job job = {.ms = 100, .shields = true};
    if (!flight_ready()) return;
    orch_future *a = call_owned("a", &job), *b = call_owned("a", &job);
    orch_sleep(10);
    orch_drop(b);
    CHECK(!job.cancelled);
    orch_drop(a);
    CHECK(job.cancelled);
    CHECK_INT(orch_now(), 60); // the drop comes back when the run has ended
    CHECK_INT(orch_flight_count(flight), 0);
    orch_flight_free(flight);
}

// Who lent the argument stays while the run uses it.
BODY_SEEDS(flight_lender_stays) {
    flight_begin();
    struct job job = {.ms = 100};
    if (!flight_ready()) return;
    orch_future *a = call_key("a", &job), *b = call_key("a", &job);
    orch_sleep(10);
    orch_drop(b); // lent an argument as well, but nobody uses it
    CHECK_INT(orch_now(), 10);
    b = call_key("a", &job);
    orch_drop(a);
    CHECK_INT(orch_now(), 100);
    CHECK(!job.cancelled);
    CHECK_INT(error_of(b), 0);
    a = call_key("a", &job), b = call_key("a", &job);
    orch_sleep(10);
    orch_cancel(a, 0);
    turns(3);
    orch_drop(b); // now nobody is left
    CHECK_INT(orch_now(), 110);
    CHECK(job.cancelled);
    CHECK_INT(error_of(a), ORCH_ECANCELED);
    orch_flight_free(flight);
}

static orch_result long_nap(void *arg) {
    (void)arg;
    orch_sleep(1000);
    return orch_ok(NULL, NULL);
}

static void crowd(int n) {
    for (int i = 0; i < n; i++) {
        orch_future *f = orch_flight_run(flight, &i, sizeof i, long_nap, NULL);
        if (orch_is_settled(f)) orch_drop(f); // out of memory
        else orch_detach(f);
    }
}

// A run that was given up winds down: nobody joins it, and nobody starts beside it.
BODY_SEEDS(flight_winding_down) {
    flight_begin();
    struct job dying = {.ms = 1000, .shields = true}, next = {.ms = 10};
    if (!flight_ready()) return;
    orch_future *a = call_owned("a", &dying);
    orch_sleep(10);
    orch_cancel(a, 0);
    turns(3);
    orch_future *b = call_owned("a", &next); // waits for its end
    orch_future *c = call_owned("a", &next); // joins b
    CHECK_INT(orch_flight_callers(flight, "a", 1), 2);
    CHECK_INT(next.runs, 0);
    if (seed % 3 == 0) crowd(50); // the table grows
    orch_drop(b);
    CHECK_INT(orch_now(), 10);
    if (seed % 2 == 0) { // all leave before it begins
        orch_drop(c);
        CHECK_INT(orch_now(), 10);
        CHECK_INT(orch_flight_callers(flight, "a", 1), 0);
        turns(3);
        c = call_owned("a", &next); // waits as well
        CHECK_INT(next.runs, 0);
    }
    CHECK_INT(error_of(c), 0);
    CHECK_INT(orch_now(), 70); // 10, then 50 in the shield, then its own 10
    CHECK_INT(error_of(a), ORCH_ECANCELED);
    CHECK_INT(next.runs, 1);
    CHECK_INT(most_flying, 1);
    orch_flight_free(flight);
    turns(5); // the crowd ends
}

BODY_SEEDS(flight_forget) {
    flight_begin();
    struct job job = {.ms = 100};
    if (!flight_ready()) return;
    orch_future *a = call_key("a", &job);
    CHECK(orch_flight_forget(flight, "a", 1));
    CHECK(!orch_flight_forget(flight, "a", 1));
    orch_sleep(10);
    orch_future *b = call_key("a", &job);
    CHECK_INT(orch_flight_count(flight), 2);
    CHECK_INT(flights, 2);
    CHECK_INT(error_of(a), 0);
    CHECK_INT(orch_now(), 100);
    CHECK_INT(orch_flight_callers(flight, "a", 1), 1); // the end of a did not take b's entry
    CHECK_INT(error_of(b), 0);
    CHECK_INT(orch_now(), 110);
    orch_flight_free(flight);
}

BODY_SEEDS(flight_free_ends_runs) {
    flight_begin();
    struct job job = {.ms = 100, .shields = true}, other_job = {.ms = 100};
    if (!flight_ready()) return;
    orch_future *all[4] = {call_key("a", &job), call_key("a", &job), call_key("b", &other_job),
                           NULL};
    orch_future *forgotten = call_key("c", &other_job);
    orch_flight_forget(flight, "c", 1);
    all[3] = call_key("b", &other_job);
    orch_flight_free(flight);
    orch_result r = orch_await(orch_all_settled_n(4, all));
    for (size_t i = 0; i < 4; i++) CHECK_INT(orch_at(&r, i)->error, ORCH_ECLOSED);
    orch_result_free(&r);
    CHECK_INT(orch_now(), 50);
    CHECK_INT(error_of(forgotten), 0);
    CHECK_INT(orch_now(), 100);
}

static orch_result calls_itself(void *arg) {
    (void)arg;
    int error = error_of(orch_flight_run(flight, "a", 1, calls_itself, NULL));
    return error != 0 ? orch_fail(error) : orch_ok(NULL, NULL);
}

BODY(flight_inside_itself) {
    flight_begin();
    if (!flight_ready()) return;
    CHECK_INT(error_of(orch_flight_run(flight, "a", 1, calls_itself, NULL)), ORCH_ECYCLE);
    orch_flight_free(flight);
}

static orch_result frees_flight(void *arg) {
    (void)arg;
    orch_flight_free(flight);
    return orch_sleep(5) != 0 ? orch_fail(ORCH_ECANCELED) : orch_ok(NULL, NULL);
}

// Freed by the run itself, before it has waited for the first time.
BODY(flight_freed_inside) {
    flight_begin();
    if (!flight_ready()) return;
    orch_future *f = orch_flight_run(flight, "a", 1, frees_flight, NULL);
    int error = error_of(f);
    CHECK_INT(error, ORCH_ECLOSED);
}

struct caller {
    struct job *job;
    uint64_t timeout_ms;
    int error;
};

static orch_result scoped_caller(void *arg) {
    struct caller *c = arg;
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = c->timeout_ms});
    c->error = error_of(call_owned("a", c->job));
    orch_result r = orch_scope_close(&s);
    orch_result_free(&r);
    return orch_ok(NULL, NULL);
}

// The first caller's deadline is its own; the locals are the first caller's.
BODY_SEEDS(flight_deadline) {
    flight_begin();
    struct job job = {.ms = 100};
    struct caller hasty = {&job, 30, 1}, calm = {&job, 500, 1};
    if (!flight_ready()) return;
    orch_future *a = orch_go(scoped_caller, &hasty);
    orch_future *b = orch_go(scoped_caller, &calm);
    error_of(a);
    CHECK_INT(orch_now(), 30);
    CHECK_INT(hasty.error, ORCH_ECANCELED);
    error_of(b);
    CHECK_INT(orch_now(), 100);
    CHECK_INT(calm.error, 0);
    CHECK_INT(flights, 1);
    orch_flight_free(flight);
}

BODY(flight_chain) {
    flight_begin();
    if (!flight_ready()) return;
    orch_future *a = orch_flight_run(flight, "a", 1, chains, NULL);
    turns(3);
    orch_future *b = orch_flight_run(flight, "a", 1, chains, NULL); // still the same run
    CHECK_INT(orch_flight_callers(flight, "a", 1), 2);
    orch_settle(later, token());
    CHECK_INT(error_of(orch_all(a, b)), 0);
    orch_flight_free(flight);
}

// Callers of a few keys that come, give up and forget as they like: never two runs for a key.
enum { KEYS = 3 };
static int running[KEYS];
static unsigned overlaps;

struct trip {
    int key;
    uint64_t ms;
    bool shields;
};

static orch_result travel(void *arg) {
    struct trip t = *(struct trip *)arg;
    overlaps += ++running[t.key] > 1;
    bool cancelled = orch_sleep(t.ms) != 0;
    if (cancelled && t.shields) {
        orch_shield_begin();
        orch_sleep(t.ms / 2 + 1);
        orch_shield_end();
    }
    running[t.key]--;
    return cancelled ? orch_fail(ORCH_ECANCELED) : token();
}

static orch_result traveller(void *arg) {
    (void)arg;
    for (int i = 0; i < 20; i++) {
        struct trip t = {(int)draw(KEYS), 1 + draw(20), draw(2) == 0};
        orch_task_desc d = {.fn = travel, .arg = &t, .arg_size = sizeof t};
        orch_future *f = orch_flight_run_with(flight, &t.key, sizeof t.key, &d);
        unsigned way = draw(4);
        if (way == 0) orch_drop(f);
        else if (way == 1) error_of(orch_timeout(f, draw(25)));
        else error_of(f);
        orch_sleep(draw(10));
    }
    return orch_ok(NULL, NULL);
}

BODY_SEEDS(flight_traffic) {
    flight_begin();
    memset(running, 0, sizeof running);
    overlaps = 0;
    draws = seed;
    orch_future *all[8];
    for (int i = 0; i < 8; i++) all[i] = orch_go(traveller, NULL);
    CHECK_INT(error_of(orch_all_n(8, all)), 0);
    CHECK_INT(overlaps, 0);
    CHECK_INT(orch_flight_count(flight), 0);
    orch_flight_free(flight);
}

// ---- adaptive concurrency

static int adaptive_call(struct job *job) {
    return error_of(orch_adaptive_run(adaptive, work, job));
}

static bool adaptive_usable(void) { return orch_adaptive_settings(adaptive) != NULL; }

/* So many calls at once, all good, each of ms. */
static void adaptive_round(int n, struct job *job) {
    orch_future *all[64];
    for (int i = 0; i < n; i++) all[i] = orch_adaptive_run(adaptive, work, job);
    error_of(orch_all_settled_n((size_t)n, all));
}

BODY(adaptive_defaults) {
    adaptive = orch_adaptive_new(NULL);
    const orch_adaptive_desc *d = orch_adaptive_settings(adaptive);
    if (d == NULL) return;
    CHECK_INT(d->min, 1);
    CHECK_INT(d->max, 200);
    CHECK_INT(d->initial, 20);
    CHECK(d->tolerance == 2.0 && d->backoff == 0.9);
    CHECK_INT(orch_adaptive_limit(adaptive), 20);
    orch_adaptive_free(adaptive);
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.min = 300, .latency_ms = 5});
    d = orch_adaptive_settings(adaptive);
    if (d == NULL) return;
    CHECK_INT(d->max, 300);
    CHECK_INT(d->initial, 300);
    CHECK(d->tolerance == 0.0);
    orch_adaptive_free(adaptive);
}

BODY(adaptive_rises) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.initial = 10, .max = 25, .latency_ms = 50});
    if (!adaptive_usable()) return;
    struct job job = {.ms = 10}, timeout = {.ms = 1, .error = ORCH_ETIMEDOUT};
    for (int i = 0; i < 10; i++) CHECK_INT(adaptive_call(&job), 0); // one at a time: it is not used
    CHECK_INT(orch_adaptive_limit(adaptive), 10);
    adaptive_round(10, &job); // each of them adds one, while half of it is used
    size_t limit = orch_adaptive_limit(adaptive);
    CHECK_INT(limit, 18);
    for (int i = 0; i < 6; i++) adaptive_round(25, &job);
    CHECK_INT(orch_adaptive_limit(adaptive), 25); // max
    CHECK_INT(adaptive_call(&timeout), ORCH_ETIMEDOUT);
    CHECK_INT(orch_adaptive_limit(adaptive), 22); // 22.5
    adaptive_round(22, &job);                     // from now on one for a round
    limit = orch_adaptive_limit(adaptive);
    CHECK_INT(limit, 23);
    orch_adaptive_free(adaptive);
}

BODY(adaptive_falls_once) {
    adaptive = orch_adaptive_new(
        &(orch_adaptive_desc){.initial = 40, .min = 30, .latency_ms = 50, .backoff = 0.8});
    if (!adaptive_usable()) return;
    struct job slow = {.ms = 51};
    adaptive_round(40, &slow);
    CHECK_INT(orch_adaptive_limit(adaptive), 32); // forty slow ones of a round: once
    adaptive_round(10, &slow);
    CHECK_INT(orch_adaptive_limit(adaptive), 30); // min
    struct job edge = {.ms = 50};
    adaptive_round(10, &edge); // not slower than it may be; and not used
    CHECK_INT(orch_adaptive_limit(adaptive), 30);
    orch_adaptive_free(adaptive);
}

/* So many rounds of twenty calls, one after the other. */
static void adaptive_rounds(int n, struct job *job) {
    for (int i = 0; i < 20 * n; i++) adaptive_call(job);
}

BODY(adaptive_tolerance) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.initial = 20, .min = 15, .tolerance = 3});
    if (!adaptive_usable()) return;
    struct job usual = {.ms = 100}, longer = {.ms = 301}, slow = {.ms = 302};
    adaptive_round(15, &slow); // blind: what is usual is not known yet
    CHECK_INT(orch_adaptive_limit(adaptive), 20);
    for (int i = 0; i < 5; i++) adaptive_call(&slow); // the first ones are usual as they are
    adaptive_rounds(1, &usual);
    adaptive_rounds(3, &longer);
    CHECK_INT(orch_adaptive_limit(adaptive), 20);
    for (int i = 0; i < 19; i++) adaptive_call(i % 2 ? &usual : &slow); // single ones are no round
    adaptive_call(&usual);
    CHECK_INT(orch_adaptive_limit(adaptive), 20);
    adaptive_rounds(1, &slow);
    CHECK_INT(orch_adaptive_limit(adaptive), 18);
    adaptive_rounds(4, &slow);
    CHECK_INT(orch_adaptive_limit(adaptive), 15);
    adaptive_rounds(5, &slow); // what does not get better with the least limit is usual now
    CHECK_INT(orch_adaptive_limit(adaptive), 15);
    for (int i = 0; i < 6; i++) adaptive_round(20, &slow);
    CHECK(orch_adaptive_limit(adaptive) > 30); // and it rises again, quickly
    orch_adaptive_free(adaptive);
}

// The calls that were under way when it fell say nothing more, as a round or as part of the next.
BODY(adaptive_old_calls_say_nothing) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.initial = 40, .tolerance = 2});
    if (!adaptive_usable()) return;
    struct job usual = {.ms = 100}, slow = {.ms = 1000};
    adaptive_rounds(1, &usual);
    adaptive_round(30, &slow); // the last ten come after the fall
    CHECK_INT(orch_adaptive_limit(adaptive), 36);
    for (int i = 0; i < 10; i++) adaptive_call(&usual);
    CHECK_INT(orch_adaptive_limit(adaptive), 36);
    orch_adaptive_free(adaptive);
}

static orch_outcome bad_is_8(const orch_result *r, void *context) {
    ++*(int *)context;
    return r->error == 8 ? ORCH_OUTCOME_BAD : r->error ? ORCH_OUTCOME_IGNORED : ORCH_OUTCOME_GOOD;
}

BODY(adaptive_judge) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.initial = 20});
    if (!adaptive_usable()) return;
    struct job timeout = {.error = ORCH_ETIMEDOUT}, eight = {.error = 8};
    CHECK_INT(adaptive_call(&eight), 8);
    CHECK_INT(orch_adaptive_limit(adaptive), 20); // an error says nothing
    CHECK_INT(adaptive_call(&timeout), ORCH_ETIMEDOUT);
    CHECK_INT(orch_adaptive_limit(adaptive), 18); // a timeout does
    orch_adaptive_free(adaptive);
    int judged = 0;
    adaptive = orch_adaptive_new(
        &(orch_adaptive_desc){.initial = 20, .judge = bad_is_8, .context = &judged});
    if (!adaptive_usable()) return;
    CHECK_INT(adaptive_call(&timeout), ORCH_ETIMEDOUT);
    CHECK_INT(orch_adaptive_limit(adaptive), 20);
    CHECK_INT(adaptive_call(&eight), 8);
    CHECK_INT(orch_adaptive_limit(adaptive), 18);
    CHECK_INT(judged, 2);
    orch_adaptive_free(adaptive);
}

static int at_once, most_at_once;
static orch_result counted(void *arg) {
    if (++at_once > most_at_once) most_at_once = at_once;
    note(*(int *)arg);
    orch_sleep(10);
    at_once--;
    return orch_ok(NULL, NULL);
}

BODY_SEEDS(adaptive_waits) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.min = 3, .max = 3});
    if (!adaptive_usable()) return;
    number();
    orch_future *all[12];
    at_once = most_at_once = 0;
    for (int i = 0; i < 12; i++) all[i] = orch_adaptive_run(adaptive, counted, &who[i]);
    CHECK_INT(orch_adaptive_running(adaptive), 3);
    CHECK_INT(orch_adaptive_waiting(adaptive), 9);
    CHECK_INT(error_of(orch_all_n(12, all)), 0);
    CHECK_INT(most_at_once, 3);
    CHECK_INT(orch_now(), 40);
    CHECK_INT(calls, 12);
    CHECK_INT(orch_adaptive_running(adaptive), 0);
    orch_adaptive_free(adaptive);
}

// In order: with one slot, the order of the calls is the order of the starts.
BODY_SEEDS(adaptive_in_order) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.max = 1});
    if (!adaptive_usable()) return;
    number();
    orch_future *all[12];
    for (int i = 0; i < 12; i++) all[i] = orch_adaptive_run(adaptive, counted, &who[i]);
    CHECK_INT(error_of(orch_all_n(12, all)), 0);
    for (int i = 0; i < 12 && i < calls; i++) CHECK_INT(order[i], i);
    orch_adaptive_free(adaptive);
}

BODY(adaptive_refuses) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.max = 1, .no_wait = true});
    struct job job = {.ms = 10};
    if (!adaptive_usable()) return;
    orch_future *f = orch_adaptive_run(adaptive, work, &job);
    CHECK_INT(adaptive_call(&job), ORCH_ELIMIT);
    CHECK_INT(error_of(orch_adaptive_acquire(adaptive)), ORCH_ELIMIT);
    CHECK_INT(job.runs, 1);
    CHECK_INT(error_of(f), 0);
    CHECK_INT(adaptive_call(&job), 0);
    orch_adaptive_free(adaptive);
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.max = 1, .waiting = 1});
    if (!adaptive_usable()) return;
    f = orch_adaptive_run(adaptive, work, &job);
    orch_future *waits = orch_adaptive_run(adaptive, work, &job);
    CHECK_INT(adaptive_call(&job), ORCH_ELIMIT);
    CHECK_INT(error_of(orch_all(f, waits)), 0);
    orch_adaptive_free(adaptive);
}

BODY_SEEDS(adaptive_cancelled) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.max = 1});
    if (!adaptive_usable()) return;
    struct job job = {.ms = 10}, endless = {.ms = 1000000}, never = {.ms = 1};
    orch_future *a = orch_adaptive_run(adaptive, work, &endless);
    orch_future *b = orch_adaptive_run(adaptive, work, &never);
    orch_future *c = orch_adaptive_run(adaptive, work, &job);
    orch_future *d = orch_adaptive_acquire(adaptive);
    orch_sleep(5);
    orch_drop(b); // one that waits
    orch_drop(d);
    orch_drop(a); // one that runs: the next begins
    CHECK_INT(error_of(c), 0);
    CHECK_INT(orch_now(), 15);
    CHECK_INT(never.runs, 0);
    CHECK_INT(orch_adaptive_running(adaptive), 0);
    CHECK_INT(orch_adaptive_limit(adaptive), 1);
    orch_adaptive_free(adaptive);
}

// What was given up because it took too long took too long.
BODY(adaptive_cancelled_slow) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.initial = 20, .latency_ms = 50});
    if (!adaptive_usable()) return;
    struct job endless = {.ms = 1000000};
    error_of(orch_timeout(orch_adaptive_run(adaptive, work, &endless), 50));
    CHECK_INT(orch_adaptive_limit(adaptive), 20);
    error_of(orch_timeout(orch_adaptive_run(adaptive, work, &endless), 51));
    CHECK_INT(orch_adaptive_limit(adaptive), 18);
    orch_adaptive_free(adaptive);
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.initial = 20, .tolerance = 2});
    if (!adaptive_usable()) return;
    struct job usual = {.ms = 100};
    adaptive_rounds(1, &usual);
    error_of(orch_timeout(orch_adaptive_run(adaptive, work, &endless), 201));
    CHECK_INT(orch_adaptive_limit(adaptive), 20);
    error_of(orch_timeout(orch_adaptive_run(adaptive, work, &endless), 202));
    CHECK_INT(orch_adaptive_limit(adaptive), 18);
    orch_adaptive_free(adaptive);
}

BODY_SEEDS(adaptive_pass) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.initial = 2, .latency_ms = 50});
    if (!adaptive_usable()) return;
    orch_result a = orch_adaptive_try(adaptive), b = orch_await(orch_adaptive_acquire(adaptive));
    if (a.error == 0 && b.error == 0) {
        CHECK_INT(orch_adaptive_try(adaptive).error, ORCH_ELIMIT);
        orch_future *waits = orch_adaptive_acquire(adaptive);
        orch_future *second = orch_adaptive_acquire(adaptive);
        orch_result fine = orch_ok(NULL, NULL);
        orch_result_free(&a); // unused: the next has it
        orch_result c = orch_await(waits);
        CHECK_INT(c.error, 0);
        CHECK_INT(orch_adaptive_limit(adaptive), 2);
        orch_adaptive_record(&b, &fine); // good: one more
        CHECK_INT(orch_adaptive_limit(adaptive), 3);
        orch_adaptive_record(&b, &fine); // a second time: nothing
        orch_result d = orch_await(second);
        CHECK_INT(orch_adaptive_running(adaptive), 2);
        orch_sleep(51);
        orch_adaptive_record(&c, &fine); // slow, and there were two when it began
        CHECK_INT(orch_adaptive_limit(adaptive), 1);
        orch_adaptive_record(&d, NULL);
        CHECK_INT(orch_adaptive_running(adaptive), 0);
    }
    orch_result_free(&a);
    orch_result_free(&b);
    orch_adaptive_free(adaptive);
}

// Both are free, one is wanted: the other's pass goes back.
BODY_SEEDS(adaptive_lost_race_goes_back) {
    orch_adaptive *a = orch_adaptive_new(&(orch_adaptive_desc){.max = 1});
    orch_adaptive *b = orch_adaptive_new(&(orch_adaptive_desc){.max = 1});
    for (int i = 0; i < 10; i++) {
        orch_result r = orch_await(orch_race(orch_adaptive_acquire(a), orch_adaptive_acquire(b)));
        if (r.error == 0) CHECK_INT(orch_adaptive_running(a) + orch_adaptive_running(b), 1);
        orch_result_free(&r);
        CHECK_INT(orch_adaptive_running(a) + orch_adaptive_running(b), 0);
    }
    orch_adaptive_free(a);
    orch_adaptive_free(b);
}

// A hundred thousand that nobody looks at: their passes come back one by one, on a flat stack.
BODY(adaptive_detached) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.max = 1});
    orch_result pass = orch_adaptive_try(adaptive);
    int n = test_shared->fail_at ? 100 : 100000;
    for (int i = 0; i < n; i++) {
        orch_future *f = orch_adaptive_acquire(adaptive);
        if (orch_is_settled(f)) orch_drop(f); // out of memory
        else orch_detach(f);
    }
    if (pass.error == 0) CHECK_INT(orch_adaptive_waiting(adaptive), n);
    orch_result_free(&pass);
    CHECK_INT(orch_adaptive_waiting(adaptive), 0);
    CHECK_INT(orch_adaptive_running(adaptive), 0);
    orch_adaptive_free(adaptive);
}

BODY_SEEDS(adaptive_free_with_calls) {
    int judged = 0;
    adaptive = orch_adaptive_new(
        &(orch_adaptive_desc){.max = 2, .judge = judge_counts, .context = &judged});
    if (!adaptive_usable()) return;
    struct job job = {.ms = 10};
    orch_future *all[5];
    for (int i = 0; i < 4; i++) all[i] = orch_adaptive_run(adaptive, work, &job);
    all[4] = orch_adaptive_acquire(adaptive);
    turns((int)(seed % 3));
    orch_adaptive_free(adaptive);
    orch_result r = orch_await(orch_all_settled_n(5, all));
    for (size_t i = 0; i < 5; i++) CHECK_INT(orch_at(&r, i)->error, i < 2 ? 0 : ORCH_ECLOSED);
    CHECK_INT(judged, 0);
    orch_result_free(&r);
    CHECK_INT(job.runs, 2);
}

// A server that does 10 at once in 20 ms, and more of them as slowly as there are more: the limit
// finds it and stays near.
static int inside;
static orch_result simulated(void *arg) {
    (void)arg;
    inside++;
    orch_sleep(inside <= 10 ? 20 : (uint64_t)(2 * inside));
    inside--;
    return orch_ok(NULL, NULL);
}

static orch_result client(void *arg) {
    for (int i = 0; i < 24; i++) {
        int error = error_of(orch_adaptive_run(adaptive, simulated, NULL));
        if (error != 0) return orch_fail(error);
        if (orch_adaptive_limit(adaptive) > *(size_t *)arg) // the most that was seen
            *(size_t *)arg = orch_adaptive_limit(adaptive);
    }
    return orch_ok(NULL, NULL);
}

BODY_SEEDS(adaptive_finds_the_height) {
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.initial = 2, .tolerance = 1.5});
    if (!adaptive_usable()) return;
    orch_future *all[50];
    size_t most = 0;
    inside = 0;
    for (int i = 0; i < 50; i++) all[i] = orch_go(client, &most);
    CHECK_INT(error_of(orch_all_n(50, all)), 0);
    CHECK(most > 10 && most <= 80); // once, until the first round trip under overload is over
    size_t limit = orch_adaptive_limit(adaptive);
    CHECK(limit >= 12 && limit <= 20);
    orch_adaptive_free(adaptive);
}

// Reports name what is waited for.
BODY(reports_name_guards) {
    limiter_begin((orch_limiter_desc){.limit = 1, .interval_ms = 100, .name = "api"});
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.max = 1});
    flight_begin();
    struct job job = {.ms = 50};
    bool usable = orch_limiter_settings(limiter) != NULL && adaptive_usable() && flight_usable();
    orch_future *all[5] = {orch_limiter_acquire(limiter, 1), orch_limiter_acquire(limiter, 1),
                           orch_adaptive_run(adaptive, work, &job),
                           orch_adaptive_run(adaptive, work, &job), call_key("a", &job)};
    orch_future *f = orch_all_settled_n(5, all);
    turns(3);
    orch_loop_dump(orch_loop_current());
    reports = 0;
    if (error_of(f) == 0 && usable) {
        CHECK(strstr(reported, "limiter 'api'") != NULL);
        CHECK(strstr(reported, "adaptive limit") != NULL);
    }
    orch_limiter_free(limiter);
    orch_adaptive_free(adaptive);
    orch_flight_free(flight);
}

// ---- objects that could not be made

BODY(broken_objects) {
    struct job job = {.ms = 0};
    refusing = true;
    orch_limiter *l = orch_limiter_new(&(orch_limiter_desc){.limit = 1, .interval_ms = 1});
    orch_breaker *b = orch_breaker_new(NULL);
    orch_flight *f = orch_flight_new();
    orch_adaptive *a = orch_adaptive_new(NULL);
    refusing = false;
    if (!CHECK(l != NULL && b != NULL && f != NULL && a != NULL)) return;
    CHECK_INT(orch_limit(l, 1), ORCH_ENOMEM);
    CHECK_INT(error_of(orch_limiter_acquire(l, 1)), ORCH_ENOMEM);
    CHECK(!orch_limiter_try(l, 1));
    CHECK(orch_limiter_delay(l, 1) == UINT64_MAX);
    CHECK_INT(orch_limiter_pause(l, 1), ORCH_ENOMEM);
    CHECK_INT(orch_limiter_change(l, &(orch_limiter_desc){.limit = 1, .interval_ms = 1}),
              ORCH_ENOMEM);
    CHECK_INT(orch_limiter_waiting(l), 0);
    CHECK(orch_limiter_settings(l) == NULL);
    CHECK_INT(error_of(orch_breaker_run(b, work, &job)), ORCH_ENOMEM);
    CHECK_INT(orch_breaker_allow(b).error, ORCH_ENOMEM);
    CHECK_INT(orch_breaker_trip(b, 1), ORCH_ENOMEM);
    CHECK_INT(orch_breaker_reset(b), ORCH_ENOMEM);
    CHECK_INT(orch_breaker_state_of(b), ORCH_BREAKER_OPEN);
    CHECK_INT(orch_breaker_statistics(b).passed, 0);
    CHECK(orch_breaker_settings(b) == NULL);
    CHECK_INT(error_of(orch_flight_run(f, "a", 1, work, &job)), ORCH_ENOMEM);
    CHECK(!orch_flight_forget(f, "a", 1));
    CHECK_INT(orch_flight_callers(f, "a", 1), 0);
    CHECK_INT(orch_flight_count(f), 0);
    CHECK_INT(error_of(orch_adaptive_run(a, work, &job)), ORCH_ENOMEM);
    CHECK_INT(error_of(orch_adaptive_acquire(a)), ORCH_ENOMEM);
    CHECK_INT(orch_adaptive_try(a).error, ORCH_ENOMEM);
    CHECK_INT(orch_adaptive_limit(a), 0);
    CHECK_INT(orch_adaptive_running(a), 0);
    CHECK_INT(orch_adaptive_waiting(a), 0);
    CHECK(orch_adaptive_settings(a) == NULL);
    CHECK_INT(job.runs, 0);
    orch_limiter_free(l);
    orch_breaker_free(b);
    orch_flight_free(f);
    orch_adaptive_free(a);
}

// The struct was there, the sliding window was not.
static void *no_window(void *user, void *old, size_t old_size, size_t size) {
    return size == 8 * 1000 ? NULL : resize(user, old, old_size, size);
}

static orch_result without_window(void *arg) {
    (void)arg;
    orch_limiter_desc desc = {.limit = 1000, .interval_ms = 1, .strict = true};
    orch_limiter *l = orch_limiter_new(&desc);
    CHECK_INT(orch_limit(l, 1), ORCH_ENOMEM);
    orch_limiter_free(l);
    desc.limit = 2;
    l = orch_limiter_new(&desc);
    desc.limit = 1000;
    CHECK_INT(orch_limiter_change(l, &desc), ORCH_ENOMEM);
    const orch_limiter_desc *settings = orch_limiter_settings(l);
    if (settings != NULL) CHECK_INT(settings->limit, 2); // nothing has changed
    orch_limiter_free(l);
    return orch_ok(NULL, NULL);
}

TEST(broken_window) {
    orch_loop_desc desc = {.allocator.resize = no_window};
    reset();
    orch_result r = orch_run_with(&desc, without_window, NULL);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
}

// Who hears that a limit is being freed, and asks again, is refused.
static int asked_again;
static void ask_again(const orch_result *r, void *context) {
    (void)r, (void)context;
    if (limiter != NULL) asked_again = error_of_settled(orch_limiter_acquire(limiter, 1));
    else asked_again = error_of_settled(orch_adaptive_acquire(adaptive));
}

static orch_result frees_limits(void *arg) {
    (void)arg;
    asked_again = ORCH_ECLOSED; // also where there was no memory
    limiter = orch_limiter_new(&(orch_limiter_desc){.limit = 1, .interval_ms = 1000});
    orch_limiter_try(limiter, 1);
    orch_detach(orch_limiter_acquire(limiter, 1));
    turns(3);
    if (orch_limiter_settings(limiter) != NULL) orch_limiter_free(limiter);
    CHECK(asked_again == ORCH_ECLOSED || test_shared->refused);
    limiter = NULL;
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.max = 1});
    orch_result pass = orch_adaptive_try(adaptive);
    orch_detach(orch_adaptive_acquire(adaptive));
    turns(3);
    if (orch_adaptive_settings(adaptive) != NULL) orch_adaptive_free(adaptive);
    CHECK(asked_again == ORCH_ECLOSED || test_shared->refused);
    orch_result_free(&pass);
    return orch_ok(NULL, NULL);
}

TEST(a_freed_limit_takes_nobody) {
    orch_loop_desc desc = {.clock = ORCH_CLOCK_VIRTUAL, .on_unhandled = ask_again};
    orch_result r = orch_run_with(&desc, frees_limits, NULL);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
}

BODY(free_of_nothing) {
    orch_limiter_free(NULL);
    orch_breaker_free(NULL);
    orch_flight_free(NULL);
    orch_adaptive_free(NULL);
}

// ---- misuse: dies in a debug build and says where, returns the error in a release build

#ifdef NDEBUG
#define MISUSE(name, text)                                                                         \
    static void body_##name(void);                                                                 \
    TEST(name) { run(body_##name); }                                                               \
    static void body_##name(void)
#else
#define MISUSE(name, text)                                                                         \
    static void body_##name(void);                                                                 \
    TEST_DIES(name, "asyncorch: " text) { run(body_##name); }                                      \
    static void body_##name(void)
#endif

#define MISUSE_LIMITER(name, ...)                                                                  \
    MISUSE(misuse_limiter_##name, "orch_limiter_new") {                                            \
        orch_limiter *l = orch_limiter_new(&(orch_limiter_desc){__VA_ARGS__});                     \
        CHECK_INT(orch_limit(l, 1), ORCH_EINVAL);                                                  \
        orch_limiter_free(l);                                                                      \
    }
MISUSE_LIMITER(no_limit, .interval_ms = 5)
MISUSE_LIMITER(no_interval, .limit = 5)
MISUSE_LIMITER(long_interval, .limit = 5, .interval_ms = UINT64_MAX)
MISUSE_LIMITER(long_interval_by_one, .limit = 5, .interval_ms = 2305843009214)
MISUSE_LIMITER(long_to_fill, .limit = 1, .interval_ms = 86400000, .burst = 30000)
MISUSE_LIMITER(strict_burst, .limit = 5, .interval_ms = 5, .burst = 5, .strict = true)
MISUSE_LIMITER(strict_huge, .limit = UINT32_MAX, .interval_ms = 5, .strict = true)

MISUSE(misuse_limiter_null_desc, "orch_limiter_new") {
    CHECK_INT(orch_limit(orch_limiter_new(NULL), 1), ORCH_EINVAL);
}
MISUSE(misuse_limit_null, "orch_limit:") { CHECK_INT(orch_limit(NULL, 1), ORCH_EINVAL); }
MISUSE(misuse_acquire_null, "orch_limiter_acquire:") {
    CHECK_INT(error_of(orch_limiter_acquire(NULL, 1)), ORCH_EINVAL);
}
MISUSE(misuse_limit_no_weight, "orch_limit:") {
    limiter_begin((orch_limiter_desc){.limit = 5, .interval_ms = 5});
    CHECK_INT(orch_limit(limiter, 0), ORCH_EINVAL);
    CHECK_INT(error_of(orch_limiter_acquire(limiter, 0)), ORCH_EINVAL);
    CHECK(!orch_limiter_try(limiter, 0));
    CHECK(orch_limiter_delay(limiter, 0) == UINT64_MAX);
    orch_limiter_free(limiter);
}
MISUSE(misuse_change_mode, "orch_limiter_change") {
    limiter_begin((orch_limiter_desc){.limit = 5, .interval_ms = 5});
    orch_limiter_desc desc = {.limit = 5, .interval_ms = 5, .strict = true};
    CHECK_INT(orch_limiter_change(limiter, &desc), ORCH_EINVAL);
    CHECK_INT(orch_limiter_change(limiter, NULL), ORCH_EINVAL);
    orch_limiter_free(limiter);
}

static void limit_in_callback(orch_result *in, void *context) {
    (void)in;
    *(int *)context = orch_limit(limiter, 1);
}
MISUSE(misuse_limit_outside_a_task, "orch_limit:") {
    limiter_begin((orch_limiter_desc){.limit = 5, .interval_ms = 5});
    int error = 0;
    orch_on(orch_settled(orch_ok(NULL, NULL)), limit_in_callback, &error);
    turns(2);
    CHECK_INT(error, ORCH_ENOTASK);
    orch_limiter_free(limiter);
}

#define MISUSE_BREAKER(name, ...)                                                                  \
    MISUSE(misuse_breaker_##name, "orch_breaker_new") {                                            \
        orch_breaker *b = orch_breaker_new(&(orch_breaker_desc){__VA_ARGS__});                     \
        CHECK_INT(error_of(orch_breaker_run(b, work, &good)), ORCH_EINVAL);                        \
        orch_breaker_free(b);                                                                      \
    }
MISUSE_BREAKER(nan, .failure_rate = (double)NAN)
MISUSE_BREAKER(negative, .failure_rate = -0.5)
MISUSE_BREAKER(above_one, .failure_rate = 1.01)
MISUSE_BREAKER(infinite, .failure_rate = (double)INFINITY)
MISUSE_BREAKER(window, .failure_rate = 0.5, .window = 65537)
MISUSE_BREAKER(minimum, .failure_rate = 0.5, .window = 10, .minimum = 11)
MISUSE_BREAKER(open_ms, .open_ms = UINT64_MAX)
MISUSE_BREAKER(probe_ms, .probe_ms = UINT64_MAX)
MISUSE_BREAKER(slow_ms, .slow_ms = UINT64_MAX)

MISUSE(misuse_breaker_null, "orch_breaker_run") {
    orch_task_desc d = owning();
    CHECK_INT(error_of(orch_breaker_run_with(NULL, &d)), ORCH_EINVAL);
}
MISUSE(misuse_breaker_no_fn, "orch_breaker_run") {
    guards_begin();
    orch_task_desc d = owning();
    d.fn = NULL;
    for (int i = 0; i < RUNS; i++) {
        if (i > 0) d.arg = lent();
        CHECK_INT(error_of(runs[i](&d)), ORCH_EINVAL);
        CHECK_INT(error_of(runs[i](NULL)), ORCH_EINVAL);
    }
    guards_end();
}
MISUSE(misuse_stack_size, "orch_breaker_run") { // found before anybody is let in
    breaker = orch_breaker_new(&(orch_breaker_desc){.failures = 1, .open_ms = 1});
    flight = orch_flight_new();
    adaptive = orch_adaptive_new(&(orch_adaptive_desc){.max = 1});
    breaker_call(&bad);
    orch_sleep(1);
    for (int i = 0; i < 2 * RUNS; i++) {
        orch_task_desc d = owning();
        d.stack_size = 1;
        CHECK_INT(error_of(runs[i % RUNS](&d)), ORCH_EINVAL);
    }
    CHECK_INT(breaker_call(&good), 0);
    CHECK_INT(orch_adaptive_running(adaptive), 0);
    CHECK_INT(orch_flight_count(flight), 0);
    guards_end();
}
MISUSE(misuse_arg_size, "orch_flight_run") {
    guards_begin();
    static char arg[4];
    orch_task_desc d = {.fn = naps, .arg = arg, .arg_size = SIZE_MAX - 16};
    for (int i = RUNS - 1; i >= 0; i--) {
        if (i == 0 && !ORCH_VERSION[0]) continue;
        CHECK_INT(error_of(runs[(i + 2) % RUNS](&d)), ORCH_EINVAL);
    }
    d = (orch_task_desc){.fn = naps, .arg_size = 4};
    for (int i = 0; i < RUNS; i++) CHECK_INT(error_of(runs[i](&d)), ORCH_EINVAL);
    guards_end();
}
static orch_result idle(void *arg) { return (void)arg, orch_ok(NULL, NULL); }

// What orch_go_with would take on its own, but not with what the guard puts beside it.
MISUSE(misuse_half_a_stack, "orch_breaker_run") {
    guards_begin();
    static char arg[16 << 10];
    orch_task_desc d = {.fn = idle, .arg = arg, .arg_size = sizeof arg, .stack_size = 32 << 10};
    CHECK_INT(error_of(orch_go_with(&d)), 0);
    for (int i = 0; i < RUNS; i++) CHECK_INT(error_of(runs[i](&d)), ORCH_EINVAL);
    guards_end();
}
MISUSE(misuse_record_null, "orch_breaker_record") {
    orch_breaker_record(NULL, NULL);
    orch_adaptive_record(NULL, NULL);
}
MISUSE(misuse_record_other, "orch_breaker_record") {
    orch_result other_value = token();
    orch_breaker_record(&other_value, NULL); // is freed all the same
    adaptive = orch_adaptive_new(NULL);
    orch_result pass = orch_adaptive_try(adaptive);
    orch_breaker_record(&pass, NULL);
    CHECK_INT(orch_adaptive_running(adaptive), 0);
    orch_adaptive_free(adaptive);
}
MISUSE(misuse_flight_null, "orch_flight_run") {
    orch_task_desc d = owning();
    CHECK_INT(error_of(orch_flight_run_with(NULL, "a", 1, &d)), ORCH_EINVAL);
}
MISUSE(misuse_flight_no_key, "orch_flight_run") {
    flight = orch_flight_new();
    CHECK_INT(error_of(orch_flight_run(flight, NULL, 1, work, &good)), ORCH_EINVAL);
    CHECK_INT(error_of(orch_flight_run(flight, "a", 0, work, &good)), ORCH_EINVAL);
    CHECK_INT(error_of(orch_flight_run(flight, "a", SIZE_MAX, work, &good)), ORCH_EINVAL);
    CHECK(!orch_flight_forget(flight, NULL, 1));
    orch_flight_free(flight);
}
MISUSE(misuse_flight_long_key, "orch_flight_run") {
    static char key[70000];
    flight = orch_flight_new();
    CHECK_INT(error_of(orch_flight_run(flight, key, sizeof key, work, &good)), ORCH_EINVAL);
    CHECK_INT(orch_flight_count(flight), 0);
    orch_flight_free(flight);
}

#define MISUSE_ADAPTIVE(name, ...)                                                                 \
    MISUSE(misuse_adaptive_##name, "orch_adaptive_new") {                                          \
        orch_adaptive *a = orch_adaptive_new(&(orch_adaptive_desc){__VA_ARGS__});                  \
        CHECK_INT(error_of(orch_adaptive_run(a, work, &good)), ORCH_EINVAL);                       \
        orch_adaptive_free(a);                                                                     \
    }
MISUSE_ADAPTIVE(min_above_max, .min = 5, .max = 4)
MISUSE_ADAPTIVE(initial_above_max, .initial = 5, .max = 4)
MISUSE_ADAPTIVE(initial_below_min, .initial = 5, .min = 6)
MISUSE_ADAPTIVE(tolerance_nan, .tolerance = (double)NAN)
MISUSE_ADAPTIVE(tolerance_one, .tolerance = 1.0)
MISUSE_ADAPTIVE(tolerance_negative, .tolerance = -2)
MISUSE_ADAPTIVE(backoff_nan, .backoff = (double)NAN)
MISUSE_ADAPTIVE(backoff_one, .backoff = 1.0)
MISUSE_ADAPTIVE(backoff_negative, .backoff = -0.1)
MISUSE_ADAPTIVE(latency, .latency_ms = UINT64_MAX)

MISUSE(misuse_adaptive_null, "orch_adaptive_run") {
    orch_task_desc d = owning();
    CHECK_INT(error_of(orch_adaptive_run_with(NULL, &d)), ORCH_EINVAL);
}

// Without a loop there is nothing to make them on.
#ifdef NDEBUG
TEST(misuse_no_loop) {
    CHECK_INT(orch_limit(orch_limiter_new(&(orch_limiter_desc){.limit = 1, .interval_ms = 1}), 1),
              ORCH_ENOLOOP);
    CHECK_INT(orch_breaker_trip(orch_breaker_new(NULL), 0), ORCH_ENOLOOP);
    CHECK_INT(orch_adaptive_try(orch_adaptive_new(NULL)).error, ORCH_ENOLOOP);
    CHECK_INT(orch_flight_count(orch_flight_new()), 0);
}
#else
TEST_DIES(misuse_no_loop, "asyncorch: orch_flight_new") { orch_flight_free(orch_flight_new()); }
#endif

int main(int argc, char **argv) { return test_main(argc, argv); }
