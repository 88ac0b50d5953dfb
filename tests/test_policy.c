// Policy: retry, map and hedge. All on the virtual clock; what several tasks decide runs over seeds
// (TEST_SEEDS, default 20).
//
// adopted behaviour                                  known from                 case
// ----- retry
// the task function is called again until it         p-retry                    retry_success
//   succeeds; the last rejection is the result       p-retry                    retry_last_error
// back-off grows by the factor, 10 times and from    p-retry, retry             retry_defaults
//   1000 ms by default (here 10 counts attempts)
// the cap holds, also below the first delay          p-retry maxTimeout         retry_cap
// retries without end                                p-retry retries: Infinity  retry_for_ever
// one attempt only: the hook is called all the same  p-retry retries: 0         retry_one_attempt
// the hook comes after each failure, the last too,   p-retry onFailedAttempt    retry_hook
//   with number and attempts left; it can stop it
// the hook may wait                                  p-retry                    retry_hook_waits
// asks whether to retry only while attempts and      p-retry shouldRetry        retry_if_asked
//   time are left; the hook comes for the others too
// cancellation is no failure to retry                Polly, p-retry AbortError  retry_if_default
// the time of the hooks counts                       p-retry maxRetryTime       retry_hook_spends
// out of time: the last error is kept                p-retry maxRetryTime       retry_budget
// the end of the time cancels a running attempt      gRPC deadline              retry_budget_cuts
// an attempt that hangs is cut, and retried          p-retry + p-timeout        retry_timeout
// attempts never overlap                             (structured concurrency)   retry_no_overlap
// an abort in the back-off is prompt, no hook runs   p-retry signal             retry_cancel_wait
// full and decorrelated jitter                       AWS architecture blog      retry_full_jitter
// what the server asks for replaces back-off and cap got, ky, gRPC pushback     retry_after
// the attempt knows its number                       p-retry                    attempt_number
// numbers that make no sense are refused by name     p-retry, p-map, p-timeout  retry_refused ...
// ----- map
// results in the order of the input                  p-map, p-limit map         map_order
// at most so many at once, as many as there may be   p-map, p-limit             map_concurrency
// starts in order, the next one as soon as one ends  p-map, p-queue             map_starts
// no item: an empty list                             p-map                      map_empty
// the first error ends it (here: what runs is        p-map, errgroup            map_stops
//   cancelled and awaited, and no other item starts) errgroup.WithContext
// goes on after errors and collects                  p-map stopOnError: false   map_keeps_going
// abort, also before anything has started            p-map signal               map_cancel
// the bound is changed while it runs, both ways      p-limit, p-queue           map_limit_resized
// pause and resume                                   p-queue                    map_limit_pause
// one bound for several callers, fair                p-limit, p-queue           map_limit_shared
// a timeout for each item                            p-queue timeout            map_timeout
// each item sees its caller's context only           p-limit (async context)    map_locals
// an item that never waits lets others run           p-limit (asynchronous)     map_turns
// ----- hedge
// the next attempt after a delay, first one wins     gRPC hedging, Polly        hedge_delay
// at once after a failure, the delay starts anew     gRPC hedging               hedge_failure
// no delay: all at once                              Polly Delay zero           hedge_at_once
// losers are cancelled                               gRPC hedging               hedge_losers
// an error that is fatal starts no further attempt   gRPC nonFatalStatusCodes   hedge_fatal
#include "../asyncorch.h"
#include "test.h"

#include <float.h>
#include <limits.h>
#include <math.h>

// ---- kit

enum { TOKENS = 1 << 14, MARKS = 256 };

static unsigned char tokens[TOKENS]; // how often each was released
static volatile int issued, unhandled, released;
static volatile struct mark { // what happened, in order
    int what;
    uint64_t at;
} marks[MARKS];
static volatile size_t marked;
static volatile int running, most, begun, ended; // tasks of a case

static void give_back(void *value) { ++*(unsigned char *)value; }

static orch_result token(void) { return orch_ok(&tokens[issued++ % TOKENS], give_back); }

static void count_release(void *arg) {
    CHECK(arg != NULL);
    released++;
}

static void on_unhandled(const orch_result *r, void *context) {
    (void)r, (void)context;
    unhandled++;
}

static void on_report(const char *text, void *context) {
    if (!strstr(text, "seed is")) fprintf(stderr, "%s", text);
    (void)context;
}

static void mark(int what) {
    if (marked < MARKS) {
        marks[marked].what = what;
        marks[marked].at = orch_now();
    }
    marked++;
}

static bool check_marks(int line, size_t count, const int *what, const uint64_t *at) {
    bool same = marked == count;
    for (size_t i = 0; i < count && i < marked; i++) {
        same = same && (!what || marks[i].what == what[i]) && (!at || marks[i].at == at[i]);
    }
    for (size_t i = 0; !same && i < marked && i < MARKS; i++) {
        fprintf(stderr, "  %zu: %d at %llu\n", i, marks[i].what, (unsigned long long)marks[i].at);
    }
    return test_say(same, __FILE__, line, "the %zu marks are others\n", count);
}

#define CHECK_TIMES(...)                                                                           \
    check_marks(__LINE__, sizeof((uint64_t[]){__VA_ARGS__}) / sizeof(uint64_t), NULL,              \
                (uint64_t[]){__VA_ARGS__})
#define CHECK_ORDER(...)                                                                           \
    check_marks(__LINE__, sizeof((int[]){__VA_ARGS__}) / sizeof(int), (int[]){__VA_ARGS__}, NULL)

static void reset(void) {
    memset(tokens, 0, sizeof tokens);
    issued = unhandled = released = 0;
    marked = 0;
    running = most = begun = ended = 0;
}

// A main task on the virtual clock. It leaves nothing behind: no future but its own, no timer,
// no token; that is checked by abort, so that a sweep notices too.
static orch_task_fn body_of_main;

static orch_result main_task(void *arg) {
    test_start();
    orch_result r = body_of_main(arg);
    orch_loop_stats stats = orch_loop_statistics(orch_loop_current());
    if (stats.futures != 1 || stats.timers != 0 || stats.tasks != 1) {
        fprintf(stderr, "left: %zu futures, %zu timers, %zu tasks\n", stats.futures - 1,
                stats.timers, stats.tasks - 1);
        abort();
    }
    return r;
}

static void run_seed(uint64_t seed, orch_task_fn body, void *arg) {
    orch_loop_desc desc = {.clock = ORCH_CLOCK_VIRTUAL, .seed = seed};
    desc.on_unhandled = on_unhandled, desc.on_report = on_report;
    int before = test_failures;
    reset();
    body_of_main = body;
    orch_result r = orch_run_with(&desc, main_task, arg);
    CHECK_INT(r.error, 0);
    CHECK_INT(unhandled, 0);
    orch_result_free(&r);
    for (int i = 0; i < issued && i < TOKENS; i++) {
        if (tokens[i] == 1) continue;
        fprintf(stderr, "token %d of %d was released %d times\n", i, issued, tokens[i]);
        abort();
    }
    if (test_failures != before) fprintf(stderr, "  with seed %llu\n", (unsigned long long)seed);
}

static uint64_t test_seeds(void) {
    const char *seeds = getenv("TEST_SEEDS");
    if (test_shared->fail_at != 0) return 0; // a sweep repeats each case often enough
    return seeds != NULL ? (uint64_t)atol(seeds) : 20;
}

#define OK orch_ok(NULL, NULL)
#define CASE(name, the_seeds)                                                                      \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        name##_body();                                                                             \
        return OK;                                                                                 \
    }                                                                                              \
    TEST(name) {                                                                                   \
        for (uint64_t seed = 0; seed <= (the_seeds); seed++) run_seed(seed, name##_main, NULL);    \
    }                                                                                              \
    static void name##_body(void)
#define ONCE(name) CASE(name, 0)             // in the order of the ready queue
#define SEEDS(name) CASE(name, test_seeds()) // and over seeds
// A misuse: debug builds die, release builds go on with the body.
#ifdef NDEBUG
#define MISUSE(name, text) ONCE(name)
#else
#define MISUSE(name, text)                                                                         \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        name##_body();                                                                             \
        return OK;                                                                                 \
    }                                                                                              \
    TEST_DIES(name, "asyncorch: " text) { run_seed(0, name##_main, NULL); }                        \
    static void name##_body(void)
#endif

static void check_end(orch_future *f, int error) {
    orch_result r = orch_await(f);
    CHECK_INT(r.error, error);
    orch_result_free(&r);
}

static void check_message(orch_future *f, int error, const char *message) {
    orch_result r = orch_await(f);
    CHECK_INT(r.error, error);
    CHECK_STR(orch_message(&r), message);
    orch_result_free(&r);
}

static void enter(void) {
    begun++;
    if (++running > most) most = running;
}

static void leave(void) {
    running--;
    ended++;
}

// ---- retry: a script of attempts

// What each attempt does: takes `ms`, ends with `error`. The last line is for all that follow.
typedef struct step {
    uint64_t ms;
    int error;
} step;

typedef struct script {
    const step *steps;
    size_t count, next;
    orch_future *cancel; // hooks and attempts cancel this; borrowed
} script;

static orch_result attempt(void *arg) {
    script *s = arg;
    step now = s->steps[s->next < s->count ? s->next : s->count - 1];
    s->next++;
    mark((int)orch_attempt_number());
    enter();
    int error = now.ms > 0 ? orch_sleep(now.ms) : 0;
    leave();
    if (error != 0) return orch_fail(error);
    return now.error == 0 ? token() : orch_failf(now.error, "attempt %zu", s->next);
}

static const step fails[] = {{0, 7}};
static script failing(void) { return (script){.steps = fails, .count = 1}; }

ONCE(retry_sequence) {
    script s = failing();
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = 6, .delay_ms = 100};
    check_message(orch_retry(&d), 7, "attempt 6");
    CHECK_TIMES(0, 100, 300, 700, 1500, 3100);
}

ONCE(retry_cap) {
    script s = failing();
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = 7, .delay_ms = 100};
    d.max_delay_ms = 500;
    check_end(orch_retry(&d), 7);
    CHECK_TIMES(0, 100, 300, 700, 1200, 1700, 2200);
    marked = 0;
    uint64_t start = orch_now();
    d.delay_ms = 1000, d.attempts = 3;
    check_end(orch_retry(&d), 7);
    CHECK_TIMES(start, start + 500, start + 1000);
}

ONCE(retry_defaults) {
    script s = failing();
    check_message(orch_retry(&(orch_retry_desc){.fn = attempt, .arg = &s}), 7, "attempt 10");
    CHECK_TIMES(0, 1000, 3000, 7000, 15000, 31000, 63000, 127000, 255000, 511000);
}

ONCE(retry_factors) {
    script s = failing();
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = 5, .delay_ms = 10, .factor = 1};
    check_end(orch_retry(&d), 7);
    CHECK_TIMES(0, 10, 20, 30, 40);
    marked = 0;
    uint64_t at = orch_now();
    d.delay_ms = 1, d.factor = 1.5; // 1, 1.5, 2.25, 3.375: never early
    check_end(orch_retry(&d), 7);
    CHECK_TIMES(at, at + 1, at + 3, at + 6, at + 10);
}

// However often it is multiplied, a back-off stays a number.
ONCE(retry_no_overflow) {
    script s = failing();
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = 200, .delay_ms = 1, .factor = 1000};
    if (test_shared->fail_at) d.attempts = 20; // a sweep repeats this often
    d.max_delay_ms = 10;
    check_end(orch_retry(&d), 7);
    CHECK_INT(orch_now(), 1 + ((int)d.attempts - 2) * 10);
    d.attempts = 6, d.max_delay_ms = 0;
    uint64_t year = 31557600000, before = orch_now();
    check_end(orch_retry(&d), 7);
    CHECK(orch_now() - before > 31 * year && orch_now() - before < 100 * year);
}

ONCE(retry_success) {
    const step steps[] = {{5, 1}, {5, 2}, {5, 0}};
    script s = {.steps = steps, .count = 3};
    orch_retry_desc d = {.fn = attempt, .arg = &s, .delay_ms = 100};
    orch_result r = orch_await(orch_retry(&d));
    CHECK_INT(r.error, 0);
    CHECK(r.value == &tokens[0]);
    orch_result_free(&r);
    CHECK_TIMES(0, 105, 310);
    CHECK_ORDER(1, 2, 3);
}

// The result of the last attempt, with its message; those of the others are freed.
ONCE(retry_last_error) {
    const step steps[] = {{0, 1}, {0, 2}, {0, 3}};
    script s = {.steps = steps, .count = 3};
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = 3, .no_delay = true};
    check_message(orch_retry(&d), 3, "attempt 3");
}

static orch_result tick(void *arg) {
    for (int i = 0; i < 4; i++) {
        ++*(volatile int *)arg;
        if (orch_yield() != 0) break;
    }
    return OK;
}

// Without a delay others still run in between.
ONCE(retry_no_delay) {
    volatile int ticks = 0;
    script s = failing();
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = 5, .no_delay = true};
    d.jitter = ORCH_JITTER_FULL;
    orch_future *retry = orch_retry(&d);
    orch_future *other = orch_go(tick, (void *)(uintptr_t)&ticks);
    check_end(retry, 7);
    CHECK(ticks > 2);
    check_end(other, 0);
    CHECK_TIMES(0, 0, 0, 0, 0);
}

ONCE(retry_for_ever) {
    script s = failing();
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = INT_MAX, .delay_ms = 60000};
    d.factor = 1;
    uint64_t minutes = test_shared->fail_at ? 20 : 24 * 60; // a day
    check_end(orch_timeout(orch_retry(&d), minutes * 60000), ORCH_ETIMEDOUT);
    CHECK_INT(s.next, minutes);
}

// ---- retry: hooks

typedef struct hooks {
    orch_retry_desc retry;
    script script;
    struct seen {
        unsigned number, left;
        int error;
        uint64_t elapsed, delay;
    } seen[16];
    size_t count;
    int asked;           // retry_if
    int no_at;           // says no for this error
    int stop_at, stop;   // on_attempt stops there with that
    uint64_t takes;      // on_attempt, ms
    int after_at;        // the server asks for a time with this error
    uint64_t after;      // that
    orch_future *cancel; // by on_attempt; borrowed
} hooks;

static bool retry_if(const orch_result *r, void *context) {
    hooks *h = context;
    h->asked++;
    mark(-1);
    return r->error != h->no_at;
}

static bool retry_after(const orch_result *r, uint64_t *ms, void *context) {
    hooks *h = context;
    if (r->error != h->after_at) return false;
    *ms = h->after;
    return true;
}

static int on_attempt(const orch_attempt *a, void *context) {
    hooks *h = context;
    CHECK(a->result != NULL && a->result->error != 0);
    if (h->count < 16) {
        h->seen[h->count].number = a->number;
        h->seen[h->count].left = a->left;
        h->seen[h->count].error = a->result->error;
        h->seen[h->count].elapsed = a->elapsed_ms;
        h->seen[h->count].delay = a->delay_ms;
    }
    h->count++;
    mark(-2);
    if (h->cancel != NULL) orch_cancel(h->cancel, 0);
    if (h->takes > 0) orch_sleep(h->takes);
    return a->number == (unsigned)h->stop_at ? h->stop : 0;
}

static void hook(hooks *h, const step *steps, size_t count) {
    h->script = (script){.steps = steps, .count = count};
    h->retry = (orch_retry_desc){.fn = attempt, .arg = &h->script, .attempts = 4, .delay_ms = 100};
    h->retry.on_attempt = on_attempt;
    h->retry.context = h;
}

static void check_seen(const hooks *h, size_t i, unsigned number, unsigned left, uint64_t elapsed,
                       uint64_t delay) {
    CHECK_INT(h->seen[i].number, number);
    CHECK_INT(h->seen[i].left, left);
    CHECK_INT(h->seen[i].elapsed, elapsed);
    CHECK_INT(h->seen[i].delay, delay);
}

// After each failed attempt, the last one too, and not after the success.
ONCE(retry_hook) {
    hooks h = {.count = 0};
    const step steps[] = {{10, 1}, {10, 2}, {10, 3}, {10, 4}};
    hook(&h, steps, 4);
    h.retry.retry_if = retry_if;
    check_end(orch_retry(&h.retry), 4);
    CHECK_INT(h.count, 4);
    check_seen(&h, 0, 1, 3, 10, 100);
    check_seen(&h, 1, 2, 2, 120, 200);
    check_seen(&h, 2, 3, 1, 330, 400);
    check_seen(&h, 3, 4, 0, 740, 0);
    CHECK_INT(h.seen[3].error, 4);
    CHECK_ORDER(1, -1, -2, 2, -1, -2, 3, -1, -2, 4, -2); // retry_if is not asked about the last
    hooks good = {.count = 0};
    const step then[] = {{0, 1}, {0, 0}};
    hook(&good, then, 2);
    check_end(orch_retry(&good.retry), 0);
    CHECK_INT(good.count, 1);
}

ONCE(retry_hook_stops) {
    hooks h = {.stop_at = 2, .stop = 99};
    hook(&h, fails, 1);
    check_message(orch_retry(&h.retry), 99, "application error");
    CHECK_INT(orch_now(), 100);
    CHECK_INT(h.script.next, 2);
    hooks same = {.stop_at = 2, .stop = 7}; // the attempt's own error: the message stays
    hook(&same, fails, 1);
    check_message(orch_retry(&same.retry), 7, "attempt 2");
    hooks last = {.stop_at = 4, .stop = 99}; // after the last attempt too
    hook(&last, fails, 1);
    check_end(orch_retry(&last.retry), 99);
}

ONCE(retry_one_attempt) {
    hooks h = {.count = 0};
    hook(&h, fails, 1);
    h.retry.attempts = 1;
    h.retry.retry_if = retry_if;
    check_message(orch_retry(&h.retry), 7, "attempt 1");
    CHECK_INT(h.count, 1);
    CHECK_INT(h.asked, 0);
    check_seen(&h, 0, 1, 0, 0, 0);
    CHECK_INT(orch_now(), 0);
}

ONCE(retry_hook_waits) {
    hooks h = {.takes = 1000};
    hook(&h, fails, 1);
    h.retry.attempts = 3;
    check_end(orch_retry(&h.retry), 7);
    CHECK_INT(orch_now(), 3 * 1000 + 100 + 200);
    check_seen(&h, 1, 2, 1, 1100, 200);
}

ONCE(retry_if_asked) {
    hooks h = {.no_at = 2};
    const step steps[] = {{0, 1}, {0, 2}};
    hook(&h, steps, 2);
    h.retry.retry_if = retry_if;
    check_message(orch_retry(&h.retry), 2, "attempt 2");
    CHECK_INT(h.asked, 2);
    CHECK_INT(h.count, 2); // the hook sees what is not retried
    check_seen(&h, 1, 2, 0, 100, 0);
    CHECK_INT(orch_now(), 100);
}

ONCE(retry_if_default) {
    const step steps[] = {{0, ORCH_ETIMEDOUT}, {0, ORCH_EINVAL}, {0, ORCH_ECANCELED}};
    hooks h = {.count = 0};
    hook(&h, steps, 3);
    check_end(orch_retry(&h.retry), ORCH_ECANCELED);
    CHECK_INT(h.script.next, 3);
    hooks asked = {.no_at = 0}; // who asks decides
    hook(&asked, steps, 3);
    asked.retry.retry_if = retry_if;
    check_end(orch_retry(&asked.retry), ORCH_ECANCELED);
    CHECK_INT(asked.script.next, 4);
}

// ---- retry: time

ONCE(retry_budget) {
    hooks h = {.count = 0};
    hook(&h, fails, 1);
    h.retry.attempts = 100, h.retry.budget_ms = 1000;
    check_message(orch_retry(&h.retry), 7, "attempt 4");
    CHECK_TIMES(0, 0, 100, 100, 300, 300, 700, 700); // 700 + 800 is too late: it ends at once
    CHECK_INT(orch_now(), 700);
    check_seen(&h, 3, 4, 0, 700, 0);
    h.retry.budget_ms = 700; // an attempt that would begin at its very end has no time
    h.count = 0;
    check_end(orch_retry(&h.retry), 7);
    CHECK_INT(h.count, 3);
    h.retry.budget_ms = 701;
    h.count = 0;
    check_end(orch_retry(&h.retry), 7);
    CHECK_INT(h.count, 4);
}

ONCE(retry_budget_cuts) {
    hooks h = {.count = 0};
    const step steps[] = {{10, 1}, {100000, 0}};
    hook(&h, steps, 2);
    h.retry.budget_ms = 500;
    h.retry.retry_if = retry_if;
    check_message(orch_retry(&h.retry), ORCH_ETIMEDOUT,
                  "Timeout after 500 ms, the budget of the retry");
    CHECK_INT(orch_now(), 500);
    CHECK_INT(h.count, 2);
    check_seen(&h, 1, 2, 0, 500, 0);
    CHECK_INT(h.asked, 1); // there was nothing to ask after the second
    CHECK_INT(running, 0);
}

ONCE(retry_hook_spends) {
    hooks h = {.takes = 600};
    hook(&h, fails, 1);
    h.retry.budget_ms = 1000;
    check_end(orch_retry(&h.retry), 7); // 600, 100, 600: the second hook has spent it
    CHECK_INT(h.count, 2);
    CHECK_INT(orch_now(), 1300);
    check_seen(&h, 1, 2, 2, 700, 200);
    hooks once = {.takes = 5000}; // as has the first
    hook(&once, fails, 1);
    once.retry.budget_ms = 1000;
    check_end(orch_retry(&once.retry), 7);
    CHECK_INT(once.script.next, 1);
}

ONCE(retry_timeout) {
    const step steps[] = {{100000, 0}, {49, 1}, {100000, 0}};
    script s = {.steps = steps, .count = 3};
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = 3, .delay_ms = 10};
    d.timeout_ms = 50;
    check_message(orch_retry(&d), ORCH_ETIMEDOUT, "Timeout after 50 ms");
    CHECK_TIMES(0, 60, 129);
    CHECK_INT(orch_now(), 179);
    CHECK_INT(running, 0);
    const step good[] = {{100000, 0}, {49, 0}};
    s = (script){.steps = good, .count = 2};
    check_end(orch_retry(&d), 0);
    d.budget_ms = 80; // the nearer limit counts: 50, 10, 20
    s = (script){.steps = steps, .count = 1};
    uint64_t start = orch_now();
    check_end(orch_retry(&d), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now() - start, 80);
    CHECK_INT(s.next, 2);
}

static orch_result stubborn(void *arg) { // does not end when it is asked to
    (void)arg;
    mark((int)orch_attempt_number());
    enter();
    orch_shield_begin();
    orch_sleep(100);
    orch_shield_end();
    leave();
    return orch_fail(5);
}

SEEDS(retry_no_overlap) {
    orch_retry_desc d = {.fn = stubborn, .attempts = 3, .delay_ms = 10, .timeout_ms = 50};
    check_end(orch_retry(&d), ORCH_ETIMEDOUT);
    CHECK_TIMES(0, 110, 230);
    CHECK_INT(most, 1);
}

// ---- retry: jitter, and what the server asks for

static void jittered(hooks *h, orch_jitter jitter, unsigned attempts) {
    hook(h, fails, 1);
    h->retry.attempts = attempts;
    h->retry.jitter = jitter;
    check_end(orch_retry(&h->retry), 7);
}

SEEDS(retry_full_jitter) {
    static const uint64_t most_of[] = {100, 200, 400, 800, 1600};
    hooks a = {.count = 0};
    uint64_t sum = 0;
    jittered(&a, ORCH_JITTER_FULL, 6);
    for (size_t i = 0; i < 5; i++) {
        CHECK(a.seen[i].delay <= most_of[i]);
        sum += a.seen[i].delay;
    }
    CHECK_INT(orch_now(), sum);
}

// The whole range comes, its ends included.
ONCE(retry_full_jitter_range) {
    unsigned seen[4] = {0};
    for (int i = 0; i < (test_shared->fail_at ? 5 : 100); i++) {
        hooks h = {.count = 0};
        hook(&h, fails, 1);
        h.retry.attempts = 2, h.retry.delay_ms = 3, h.retry.jitter = ORCH_JITTER_FULL;
        check_end(orch_retry(&h.retry), 7);
        if (CHECK(h.seen[0].delay < 4)) seen[h.seen[0].delay]++;
    }
    for (int i = 0; i < 4; i++) CHECK(seen[i] > 5 || test_shared->fail_at);
}

SEEDS(retry_decorrelated_jitter) {
    hooks h = {.count = 0};
    uint64_t before = 100;
    hook(&h, fails, 1);
    h.retry.attempts = 12, h.retry.max_delay_ms = 2000;
    h.retry.jitter = ORCH_JITTER_DECORRELATED;
    h.retry.factor = 1000; // has no part in it
    check_end(orch_retry(&h.retry), 7);
    for (size_t i = 0; i < 11; i++) {
        CHECK(h.seen[i].delay >= 100 && h.seen[i].delay <= before * 3 && h.seen[i].delay <= 2000);
        before = h.seen[i].delay;
    }
    h.retry.max_delay_ms = 50; // the cap holds below delay_ms too
    h.count = 0;
    check_end(orch_retry(&h.retry), 7);
    for (size_t i = 0; i < 11; i++) CHECK_INT(h.seen[i].delay, 50);
}

static uint64_t delays[2][16];

static void remember_delays(int which) {
    hooks h = {.count = 0};
    jittered(&h, ORCH_JITTER_DECORRELATED, 16);
    for (size_t i = 0; i < 15; i++) delays[which][i] = h.seen[i].delay;
}

static orch_result remember_main(void *arg) {
    remember_delays(*(int *)arg);
    return OK;
}

TEST(retry_jitter_of_a_seed) {
    int first = 0, second = 1;
    run_seed(42, remember_main, &first);
    run_seed(42, remember_main, &second);
    CHECK(memcmp(delays[0], delays[1], sizeof delays[0]) == 0);
    run_seed(43, remember_main, &second);
    CHECK(test_shared->fail_at || memcmp(delays[0], delays[1], sizeof delays[0]) != 0);
}

ONCE(retry_after_server) {
    const step steps[] = {{0, 1}, {0, 429}, {0, 1}, {0, 429}, {0, 1}};
    hooks h = {.after_at = 429, .after = 5000};
    hook(&h, steps, 5);
    h.retry.attempts = 6, h.retry.max_delay_ms = 500;
    h.retry.retry_after = retry_after;
    check_end(orch_retry(&h.retry), 1);
    static const uint64_t want[] = {100, 5000, 400, 5000, 500}; // the back-off goes on growing
    for (size_t i = 0; i < 5; i++) CHECK_INT(h.seen[i].delay, want[i]);
    CHECK_INT(orch_now(), 11000);
    h = (hooks){.after_at = 7, .after = 0}; // at once, and not jittered
    hook(&h, fails, 1);
    h.retry.retry_after = retry_after, h.retry.jitter = ORCH_JITTER_DECORRELATED;
    check_end(orch_retry(&h.retry), 7);
    CHECK_INT(orch_now(), 11000);
}

ONCE(retry_after_too_long) {
    hooks h = {.after_at = 7, .after = 5000};
    hook(&h, fails, 1);
    h.retry.retry_after = retry_after, h.retry.budget_ms = 5000;
    check_end(orch_retry(&h.retry), 7); // it would come too late: the error comes at once
    CHECK_INT(orch_now(), 0);
    check_seen(&h, 0, 1, 0, 0, 0);
    h = (hooks){.after_at = 7, .after = UINT64_MAX}; // a server may say anything
    hook(&h, fails, 1);
    h.retry.retry_after = retry_after;
    check_end(orch_timeout(orch_retry(&h.retry), 1000), ORCH_ETIMEDOUT);
    CHECK_INT(h.seen[0].delay, 3155760000000);
}

// A wait that ends late, on a clock that jumps: there is no time left for an attempt.
static uint64_t clock_ns;

static uint64_t read_clock(void *context) {
    (void)context;
    return clock_ns;
}

static orch_result turn_clock(void *arg) {
    (void)arg;
    for (int i = 0; i < 300; i++) orch_yield(); // not in the round in which the wait began
    clock_ns += 3600000000000;
    return OK;
}

static orch_result late_main(void *arg) {
    (void)arg;
    script s = failing();
    orch_retry_desc d = {.fn = attempt, .arg = &s, .delay_ms = 10, .budget_ms = 1000};
    orch_future *f = orch_retry(&d), *jump = orch_go(turn_clock, NULL);
    if (orch_is_settled(jump)) orch_cancel(f, 0); // out of memory: time stands still
    check_message(f, 7, "attempt 1");
    check_end(jump, 0);
    return OK;
}

TEST(retry_late) {
    reset();
    clock_ns = 0;
    orch_result r = orch_run_with(&(orch_loop_desc){.now = read_clock}, late_main, NULL);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
}

// ---- retry: cancelling

static orch_result cancel_at(void *arg) {
    orch_future **f = arg;
    if (orch_sleep(150) == 0) orch_cancel(*f, 0);
    return OK;
}

SEEDS(retry_cancel_wait) {
    hooks h = {.count = 0};
    hook(&h, fails, 1);
    orch_future *f = orch_retry(&h.retry);
    orch_future *kept = orch_ref(f), *canceller = orch_go(cancel_at, &kept);
    check_message(f, ORCH_ECANCELED, "cancelled");
    CHECK_INT(orch_now(), 150);
    CHECK_INT(h.count, 2); // nobody was told of the end
    CHECK_INT(h.script.next, 2);
    check_end(canceller, 0);
    orch_drop(kept);
}

static bool slow_end(void *context, int reason) { // a producer that ends 30 ms after it was asked
    (void)reason;
    return *(bool *)context;
}

static orch_result hanging(void *arg) {
    (void)arg;
    bool ends = true;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_promise_on_cancel(p, slow_end, &ends);
    mark(1);
    orch_result r = orch_await(f);
    mark(2);
    return r.error != 0 ? orch_failf(r.error, "was cut") : r;
}

SEEDS(retry_cancel_attempt) {
    hooks h = {.count = 0};
    hook(&h, fails, 1);
    h.retry.fn = hanging;
    for (int limited = 0; limited < 2; limited++) {
        h.retry.timeout_ms = limited ? 100000 : 0;
        orch_future *f = orch_retry(&h.retry);
        orch_future *kept = orch_ref(f), *canceller = orch_go(cancel_at, &kept);
        check_end(f, ORCH_ECANCELED);
        CHECK_INT(orch_now(), 150 * (limited + 1));
        CHECK_INT(h.count, 0);
        check_end(canceller, 0);
        orch_drop(kept);
    }
    CHECK_ORDER(1, 2, 1, 2);
}

// A success that comes although it was cancelled is not lost.
static orch_result late_success(void *arg) {
    (void)arg;
    orch_sleep(100000);
    return token();
}

ONCE(retry_cancel_success) {
    orch_retry_desc d = {.fn = late_success};
    orch_future *f = orch_retry(&d);
    orch_cancel(f, 0);
    check_end(f, 0);
}

ONCE(retry_cancel_in_hook) {
    hooks h = {.takes = 10};
    const step steps[] = {{1, 7}};
    hook(&h, steps, 1);
    orch_future *f = orch_retry(&h.retry);
    h.cancel = f;
    orch_future *kept = orch_ref(f);
    check_end(f, ORCH_ECANCELED);
    CHECK_INT(h.count, 1);
    CHECK_INT(orch_now(), 1);
    orch_drop(kept);
}

// A drop returns when the attempt has ended.
ONCE(retry_drop) {
    script s = {.steps = (const step[]){{1000, 0}}, .count = 1};
    orch_retry_desc d = {.fn = attempt, .arg = &s};
    orch_future *f = orch_retry(&d);
    CHECK_INT(running, 1);
    orch_drop(f);
    CHECK_INT(running, 0);
    orch_drop(orch_retry(&(orch_retry_desc){.fn = stubborn, .timeout_ms = 50}));
    CHECK_INT(running, 0);
}

SEEDS(retry_in_timeout) {
    script s = failing();
    orch_retry_desc d = {.fn = attempt, .arg = &s, .delay_ms = 100};
    check_message(orch_timeout(orch_retry(&d), 250), ORCH_ETIMEDOUT, "Timeout after 250 ms");
    CHECK_TIMES(0, 100);
    CHECK_INT(orch_now(), 250);
}

// ---- retry: what attempts return, and what is owned

static orch_result chained(void *arg) {
    int *left = arg;
    mark(*left);
    if (--*left > 0) return orch_chain(orch_settled(orch_failf(7, "%d left", *left)));
    return orch_chain(orch_then(orch_after(20), NULL, NULL, NULL));
}

ONCE(retry_chain) {
    int left = 3;
    orch_retry_desc d = {.fn = chained, .arg = &left, .delay_ms = 10};
    check_end(orch_retry(&d), 0);
    CHECK_TIMES(0, 10, 30);
    CHECK_INT(orch_now(), 50);
    left = 9, d.attempts = 2, d.timeout_ms = 100;
    check_message(orch_retry(&d), 7, "7 left");
}

static orch_result shared_failure(void *arg) {
    orch_future *f = *(orch_future **)arg;
    orch_result r = orch_wait(f); // lent
    return r;
}

ONCE(retry_lent) {
    orch_future *f = orch_settled(orch_failf(8, "of a shared future"));
    orch_retry_desc d = {.fn = shared_failure, .arg = &f, .attempts = 2, .delay_ms = 10};
    check_message(orch_retry(&d), 8, "of a shared future");
    orch_drop(f);
}

static orch_result read_copy(void *arg) {
    int *copy = arg;
    ++*copy;
    mark(*copy);
    return *copy < 13 ? orch_fail(1) : orch_ok_int(*copy);
}

static orch_future *with_copy(void) {
    int number = 10;
    return orch_retry(&(orch_retry_desc){
        .fn = read_copy, .arg = &number, .arg_size = sizeof number, .release = count_release});
}

// One copy for all attempts.
ONCE(retry_copy) {
    orch_future *f = with_copy();
    CHECK_INT(released, 0);
    orch_result r = orch_await(f);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_int(&r), 13);
    CHECK_ORDER(11, 12, 13);
    if (released != 1) abort();
}

ONCE(retry_release) {
    int thing = 0;
    script s = failing();
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = 2, .release = count_release};
    orch_drop(orch_retry(&d)); // in its back-off
    if (released != 1) abort();
    d.factor = -1; // refused
    check_end(orch_retry(&d), ORCH_EINVAL);
    if (released != 2) abort();
    d.factor = 0, d.arg = &thing, d.fn = late_success;
    orch_future *f = orch_retry(&d);
    CHECK_INT(released, 2 + (f != NULL && orch_is_settled(f)));
    orch_drop(f);
    if (released != 3) abort();
}

static orch_result ask_number(void *arg) {
    (void)arg;
    return orch_ok_int((intptr_t)orch_attempt_number());
}

static orch_result numbered(void *arg) {
    (void)arg;
    CHECK_INT(orch_attempt_number(), marked + 1);
    orch_result r = orch_await(orch_go(ask_number, NULL)); // inherited
    CHECK_INT(r.error != 0 ? (intptr_t)marked + 1 : orch_int(&r), marked + 1);
    mark(0);
    return orch_fail(1);
}

ONCE(attempt_number) {
    CHECK_INT(orch_attempt_number(), 0);
    orch_retry_desc d = {.fn = numbered, .attempts = 3, .delay_ms = 10};
    check_end(orch_retry(&d), 1);
    d.timeout_ms = 100, marked = 0;
    check_end(orch_retry(&d), 1);
    CHECK_INT(orch_attempt_number(), 0);
}

// ---- retry: outside a task

static void note_end(orch_result *in, void *context) { *(int *)context = in->error; }

TEST(retry_without_task) {
    reset();
    script s = failing();
    int error = 0;
    orch_loop *loop = orch_loop_new(&(orch_loop_desc){.clock = ORCH_CLOCK_VIRTUAL});
    if (!CHECK(loop != NULL)) return;
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = 3, .delay_ms = 10};
    orch_on(orch_retry(&d), note_end, &error);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(error, 7);
    CHECK_INT(orch_loop_statistics(loop).futures, 0);
    CHECK_INT(orch_loop_free(loop), 0);
}

// ---- refused numbers

static void check_refused(orch_future *f, const char *message) {
    const orch_result *r = orch_peek(f); // at once, nothing has run
    if (CHECK(r != NULL)) {
        CHECK_INT(r->error, ORCH_EINVAL);
        CHECK_STR(orch_message(r), message);
    }
    orch_drop(f);
}

static void refuse(orch_retry_desc d, const char *message) {
    script s = failing();
    d.fn = attempt, d.arg = &s;
    check_refused(orch_retry(&d), message);
    CHECK_INT(s.next, 0);
}

#define REFUSE(message, ...) refuse((orch_retry_desc){__VA_ARGS__}, "orch_retry: " message)
#define AGES " ms, more than a hundred years"

ONCE(retry_refused) {
    REFUSE("factor is nan, not from 1 to 1000", .factor = fabs((double)NAN));
    REFUSE("factor is inf, not from 1 to 1000", .factor = (double)INFINITY);
    REFUSE("factor is -inf, not from 1 to 1000", .factor = -(double)INFINITY);
    REFUSE("factor is -2, not from 1 to 1000", .factor = -2);
    REFUSE("factor is 0.5, not from 1 to 1000", .factor = 0.5);
    REFUSE("factor is 1001, not from 1 to 1000", .factor = 1001);
    REFUSE("factor is 1.79769e+308, not from 1 to 1000", .factor = DBL_MAX);
    REFUSE("attempts is 4294967295, more than 2147483647", .attempts = (unsigned)-1);
    REFUSE("delay_ms is 18446744073709551615" AGES, .delay_ms = (uint64_t)-1);
    REFUSE("delay_ms is 9223372036854775808" AGES, .delay_ms = 1ull << 63); // what infinity becomes
    REFUSE("max_delay_ms is 18446744073709551516" AGES, .max_delay_ms = (uint64_t)-100);
    REFUSE("timeout_ms is 3155760000001" AGES, .timeout_ms = 3155760000001);
    REFUSE("budget_ms is 18446744073709551615" AGES, .budget_ms = UINT64_MAX);
    REFUSE("jitter is 3, none of ORCH_JITTER_...", .jitter = (orch_jitter)3);
    CHECK_INT(marked, 0);
}

// The ends of the ranges are good.
ONCE(retry_not_refused) {
    const step steps[] = {{0, 0}};
    script s = {.steps = steps, .count = 1};
    orch_retry_desc d = {.fn = attempt, .arg = &s, .attempts = INT_MAX, .factor = 1};
    d.delay_ms = d.max_delay_ms = d.timeout_ms = d.budget_ms = 3155760000000;
    d.jitter = ORCH_JITTER_DECORRELATED;
    check_end(orch_retry(&d), 0);
    d.factor = 1000;
    check_end(orch_retry(&d), 0);
}

// ---- map: items

typedef struct items {
    orch_map_desc map;
    const uint64_t *ms; // what each takes; NULL: 10 (index + 1)
    uint64_t each;      // or all
    int fail_at, error; // one that fails, after its time
    int stubborn_at;    // one that shields
    unsigned char state[1000];
    bool random;
} items;

static orch_result item(size_t index, void *context) {
    items *t = context;
    mark((int)index);
    enter();
    if (t->map.concurrency > 0) CHECK(running <= (int)t->map.concurrency);
    if (index < sizeof t->state) CHECK_INT(t->state[index]++, 0);
    CHECK_INT(orch_cancel_reason(), 0); // nothing is left of another item's cancellation
    uint64_t ms = t->random ? orch_random() % 20 : t->ms != NULL ? t->ms[index] : t->each;
    if (t->stubborn_at == (int)index) orch_shield_begin();
    int error = ms > 0 ? orch_sleep(ms) : 0;
    if (t->stubborn_at == (int)index) orch_shield_end();
    leave();
    if (error != 0) return orch_fail(error);
    if (t->fail_at == (int)index) return orch_failf(t->error, "item %zu", index);
    orch_result r = token();
    if (index < sizeof t->state) t->state[index] = 2;
    return r;
}

static items of(size_t count) { // for one map
    items t = {.map = {.count = count, .fn = item}, .fail_at = -1, .stubborn_at = -1, .each = 10};
    return t;
}

static orch_future *map(items *t) {
    t->map.context = t;
    return orch_map(&t->map);
}

static orch_result square(size_t index, void *context) {
    const uint64_t *ms = context;
    if (ms != NULL) orch_sleep(ms[index]);
    return orch_ok_int((intptr_t)(index * index));
}

SEEDS(map_order) {
    static const uint64_t ms[] = {50, 10, 40, 0, 20, 30};
    for (size_t concurrency = 0; concurrency < 8; concurrency++) {
        orch_map_desc d = {.count = 6, .fn = square, .context = (void *)(uintptr_t)ms};
        d.concurrency = concurrency;
        orch_result r = orch_await(orch_map(&d));
        CHECK_INT(r.error, 0);
        CHECK_INT(orch_count(&r), 6);
        for (size_t i = 0; i < 6; i++) CHECK_INT(orch_int(orch_at(&r, i)), i * i);
        orch_result_free(&r);
    }
}

SEEDS(map_concurrency) {
    for (size_t k = 1; k <= 5; k += 2) {
        items t = of(30);
        most = 0;
        t.random = true, t.map.concurrency = k;
        check_end(map(&t), 0);
        CHECK(most <= (int)k);
        for (size_t i = 0; i < 30; i++) CHECK_INT(t.state[i], 2);
        CHECK(test_shared->fail_at || most == (int)k);
    }
}

// In order, and each as soon as there is a place.
SEEDS(map_starts) {
    static const uint64_t ms[] = {30, 10, 10, 10, 10};
    items t = of(5);
    t.ms = ms, t.map.concurrency = 2;
    check_end(map(&t), 0);
    CHECK_ORDER(0, 1, 2, 3, 4);
    marked = 0;
    uint64_t start = orch_now();
    items again = of(5);
    again.ms = ms, again.map.concurrency = 2;
    orch_future *f = map(&again);
    CHECK_INT(marked, 2); // the first ones have begun already
    check_end(f, 0);
    CHECK_TIMES(start, start, start + 10, start + 20, start + 30);
}

ONCE(map_all_at_once) {
    items t = of(20);
    orch_future *f = map(&t);
    CHECK_INT(running, 20);
    check_end(f, 0);
    CHECK_INT(orch_now(), 10);
    items more = of(3); // fewer than may run
    more.map.concurrency = 1000;
    check_end(map(&more), 0);
}

ONCE(map_one_at_a_time) {
    items t = of(4);
    t.map.concurrency = 1;
    check_end(map(&t), 0);
    CHECK_TIMES(0, 10, 20, 30);
    CHECK_INT(most, 1);
}

ONCE(map_empty) {
    int thing = 0;
    for (int keep_going = 0; keep_going < 2; keep_going++) {
        orch_map_desc d = {.fn = square, .context = &thing, .release = count_release};
        d.keep_going = keep_going;
        orch_result r = orch_await(orch_map(&d));
        CHECK_INT(r.error, 0);
        CHECK_INT(orch_count(&r), 0);
        orch_result_free(&r);
        if (released != keep_going + 1) abort();
    }
}

// ---- map: errors

SEEDS(map_stops) {
    items t = of(10);
    t.map.concurrency = 3, t.fail_at = 4, t.error = 77;
    t.ms = (const uint64_t[]){5, 50, 50, 50, 1, 50, 50, 50, 50, 50};
    orch_result r = orch_await(map(&t));
    CHECK_INT(r.error, 77);
    CHECK_INT(r.index, 4);
    CHECK_STR(orch_message(&r), "item 4");
    orch_result_free(&r);
    // 0 ends at 5 and 3 begins; 1, 2 and 3 end at 50, 50 and 55
    CHECK_INT(orch_now(), 51);
    CHECK_INT(running, 0);
}

// Those that run are cancelled, and nothing is delivered before they have ended.
SEEDS(map_stops_and_waits) {
    static const uint64_t ms[] = {10, 1000, 40, 1000};
    items t = of(4);
    t.ms = ms, t.fail_at = 0, t.error = 5, t.stubborn_at = 2, t.map.concurrency = 3;
    check_end(map(&t), 5);
    CHECK_INT(orch_now(), 40);
    CHECK_INT(running, 0);
    CHECK_INT(begun, 3);
}

// One that fails at once: not even those start that could.
ONCE(map_stops_at_once) {
    items t = of(10);
    t.fail_at = 1, t.error = 5, t.each = 0;
    check_end(map(&t), 5);
    CHECK_ORDER(0, 1);
}

SEEDS(map_keeps_going) {
    items t = of(6);
    t.map.keep_going = true, t.map.concurrency = 2, t.fail_at = 2, t.error = 9;
    orch_result r = orch_await(map(&t));
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_count(&r), r.error == 0 ? 6 : 0);
    for (size_t i = 0; i < 6; i++) CHECK_INT(orch_at(&r, i)->error, i == 2 ? 9 : 0);
    CHECK_STR(orch_message(orch_at(&r, 2)), "item 2");
    orch_result_free(&r);
    CHECK_INT(begun, 6);
    items at_once = of(6);
    at_once.map.keep_going = true, at_once.fail_at = 0, at_once.error = 9, at_once.each = 0;
    check_end(map(&at_once), 0);
    CHECK_INT(begun, 12);
}

// The first error in time counts, also where items fail while others have not begun.
static orch_result fails_in_turn(size_t index, void *context) {
    int *first = context;
    orch_yield();
    if (index % 40 != 39) return OK;
    if (*first < 0) *first = (int)index;
    return orch_fail(1);
}

SEEDS(map_first_error) {
    int first = -1;
    orch_map_desc d = {.count = 200, .fn = fails_in_turn, .context = &first};
    orch_result r = orch_await(orch_map(&d));
    CHECK_INT(r.error, 1);
    CHECK_INT(r.index, first);
    orch_result_free(&r);
}

// ---- map: cancelling

SEEDS(map_cancel) {
    for (size_t concurrency = 0; concurrency < 3; concurrency++) {
        items t = of(6);
        begun = ended = 0;
        t.each = 1000, t.map.concurrency = concurrency, t.map.keep_going = concurrency == 1;
        orch_future *f = map(&t);
        orch_future *kept = orch_ref(f), *canceller = orch_go(cancel_at, &kept);
        check_end(f, ORCH_ECANCELED);
        CHECK_INT(orch_now(), 150 * (concurrency + 1));
        CHECK_INT(running, 0);
        CHECK_INT(begun, concurrency == 0 ? 6 : (int)concurrency);
        CHECK_INT(ended, begun);
        check_end(canceller, 0);
        orch_drop(kept);
    }
}

SEEDS(map_cancel_waits) {
    items t = of(4);
    t.map.concurrency = 2, t.each = 400, t.stubborn_at = 1;
    orch_future *f = map(&t);
    orch_future *kept = orch_ref(f), *canceller = orch_go(cancel_at, &kept);
    check_end(f, ORCH_ECANCELED);
    CHECK_INT(orch_now(), 400);
    CHECK_INT(begun, 2);
    check_end(canceller, 0);
    orch_drop(kept);
}

ONCE(map_drop) {
    items t = of(6);
    t.map.concurrency = 2, t.each = 400, t.stubborn_at = 1;
    orch_future *f = map(&t);
    CHECK_INT(running, 2);
    orch_drop(f); // returns when they have ended
    CHECK_INT(running, 0);
    CHECK_INT(begun, 2);
    CHECK_INT(orch_now(), 400);
}

static orch_future *cancelled_by_item;

static orch_result cancels_its_map(size_t index, void *context) {
    (void)context;
    mark((int)index);
    orch_sleep(10);
    if (index == 1 && cancelled_by_item != NULL) orch_cancel(cancelled_by_item, 0);
    return orch_yield() == 0 ? OK : orch_fail(ORCH_ECANCELED);
}

SEEDS(map_cancelled_by_an_item) {
    orch_map_desc d = {.count = 5, .fn = cancels_its_map, .concurrency = 2};
    cancelled_by_item = NULL;
    orch_future *f = orch_map(&d);
    orch_future *kept = cancelled_by_item = orch_ref(f);
    check_end(f, ORCH_ECANCELED);
    CHECK(marked == 2 || marked == 3);
    orch_drop(kept);
}

// One that never waited so far.
static orch_result quick_cancel(size_t index, void *context) {
    (void)context;
    begun++;
    if (index == 300 && cancelled_by_item != NULL) orch_cancel(cancelled_by_item, 0);
    return OK;
}

ONCE(map_cancelled_by_a_quick_item) {
    orch_map_desc d = {.count = 1000, .fn = quick_cancel};
    cancelled_by_item = NULL;
    orch_future *f = orch_map(&d);
    orch_future *kept = cancelled_by_item = orch_ref(f);
    check_end(f, ORCH_ECANCELED);
    CHECK_INT(begun, 301);
    orch_drop(kept);
}

// The caller is cancelled: the await gives the map up, and returns when all has ended.
static orch_result awaits_map(void *arg) {
    orch_result r = orch_await(map(arg));
    CHECK_INT(running, 0);
    int error = r.error;
    orch_result_free(&r);
    return orch_fail(error != 0 ? error : 1);
}

SEEDS(map_of_cancelled_caller) {
    items t = of(6);
    t.map.concurrency = 2, t.each = 400;
    check_end(orch_timeout(orch_go(awaits_map, &t), 500), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), 500);
    CHECK_INT(begun, 4);
}

SEEDS(map_in_race) {
    items a = of(6), b = of(2);
    orch_future *maps[2];
    a.map.concurrency = 2, a.each = 100;
    maps[0] = map(&a);
    maps[1] = map(&b);
    orch_result r = orch_await(orch_race_n(2, maps));
    CHECK_INT(r.error, 0);
    CHECK_INT(r.index, 1);
    CHECK_INT(orch_count(&r), r.error == 0 ? 2 : 0);
    orch_result_free(&r);
    CHECK_INT(orch_now(), 10);
    CHECK_INT(running, 0);
}

// ---- map: the time of an item

SEEDS(map_timeout) {
    items t = of(5);
    t.ms = (const uint64_t[]){10, 500, 40, 500, 10};
    t.map.concurrency = 2, t.map.timeout_ms = 50, t.map.keep_going = true;
    orch_result r = orch_await(map(&t));
    CHECK_INT(r.error, 0);
    for (size_t i = 0; i < 5; i++)
        CHECK_INT(orch_at(&r, i)->error, i == 1 || i == 3 ? ORCH_ETIMEDOUT : 0);
    CHECK_STR(orch_message(orch_at(&r, 1)), "Timeout after 50 ms");
    orch_result_free(&r);
    CHECK_INT(begun, 5); // and each saw that it was not cancelled
    items stops = of(3);
    stops.each = 100, stops.map.timeout_ms = 50, stops.map.concurrency = 1;
    orch_result end = orch_await(map(&stops));
    CHECK_INT(end.error, ORCH_ETIMEDOUT);
    CHECK_INT(end.index, 0);
    orch_result_free(&end);
}

// The place is free when the item has ended, not when its time is over.
SEEDS(map_timeout_holds_place) {
    items t = of(2);
    t.each = 100, t.stubborn_at = 0, t.map.concurrency = 1, t.map.timeout_ms = 50;
    t.map.keep_going = true;
    check_end(map(&t), 0);
    CHECK_TIMES(0, 100);
    CHECK_INT(orch_now(), 150);
}

// ---- map: retry

static orch_result flaky(size_t index, void *context) {
    unsigned char *tries = context;
    CHECK_INT(orch_attempt_number(), ++tries[index]);
    mark((int)index);
    orch_sleep(10);
    if (tries[index] <= index) return orch_failf(50, "item %zu", index);
    return token();
}

static int count_attempts(const orch_attempt *a, void *context) {
    (void)a;
    ++*(int *)context;
    return 0;
}

SEEDS(map_retry) {
    unsigned char tries[6] = {0};
    int told = 0;
    orch_retry_desc retry = {.attempts = 3, .delay_ms = 100, .on_attempt = count_attempts};
    retry.context = &told;
    orch_map_desc d = {.count = 5, .fn = flaky, .context = tries, .keep_going = true};
    d.retry = &retry;
    orch_future *f = orch_map(&d);
    retry.attempts = 100; // it was read
    orch_result r = orch_await(f);
    CHECK_INT(r.error, 0);
    for (size_t i = 0; i < 5; i++) CHECK_INT(orch_at(&r, i)->error, i < 3 ? 0 : 50);
    orch_result_free(&r);
    CHECK_INT(told, 0 + 1 + 2 + 3 + 3);
    CHECK_INT(orch_now(), 330);
}

// An item holds its place through its back-off; its time is that of all attempts.
SEEDS(map_retry_place_and_time) {
    unsigned char tries[6] = {0};
    orch_retry_desc retry = {.attempts = 9, .delay_ms = 100, .factor = 1};
    orch_map_desc d = {.count = 4, .fn = flaky, .context = tries, .keep_going = true};
    d.concurrency = 1, d.retry = &retry, d.timeout_ms = 300;
    orch_result r = orch_await(orch_map(&d));
    CHECK_INT(r.error, 0);
    for (size_t i = 0; i < 4; i++) CHECK_INT(orch_at(&r, i)->error, i < 3 ? 0 : ORCH_ETIMEDOUT);
    orch_result_free(&r);
    CHECK_INT(orch_now(), 10 + 120 + 230 + 300);
    CHECK_INT(tries[3], 3);
}

SEEDS(map_retry_cancel) {
    unsigned char tries[6] = {0};
    orch_retry_desc retry = {.attempts = 9, .delay_ms = 10000, .timeout_ms = 50};
    orch_map_desc d = {.count = 4, .fn = flaky, .context = tries, .retry = &retry};
    check_end(orch_timeout(orch_map(&d), 500), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), 500);
    CHECK_INT(marked, 4);
}

ONCE(map_refused) {
    int thing = 0;
    orch_retry_desc retry = {.factor = fabs((double)NAN)};
    orch_map_desc d = {.count = 4, .fn = square, .context = &thing, .retry = &retry};
    d.release = count_release;
    check_refused(orch_map(&d), "orch_map: retry: factor is nan, not from 1 to 1000");
    retry.factor = 0, retry.fn = attempt;
    check_refused(orch_map(&d), "orch_map: retry.fn is set: what is retried is fn");
    retry.fn = NULL, d.timeout_ms = (uint64_t)-1;
    check_refused(orch_map(&d), "orch_map: timeout_ms is 18446744073709551615" AGES);
    if (released != 3) abort();
}

// ---- map: the limit

static int give_up_limit(orch_semaphore *s, size_t permits) {
    CHECK(test_shared->fail_at || orch_semaphore_available(s) == permits);
    CHECK(orch_semaphore_waiting(s) == 0);
    orch_semaphore_free(s);
    return 0;
}

SEEDS(map_limit) {
    orch_semaphore *s = orch_semaphore_new(3);
    items t = of(20);
    t.map.limit = s, t.random = true;
    check_end(map(&t), 0);
    CHECK_INT(begun, 20);
    CHECK(most <= 3 && (test_shared->fail_at || most == 3));
    items both = of(20);
    most = 0;
    both.map.limit = s, both.map.concurrency = 2, both.random = true;
    check_end(map(&both), 0);
    CHECK_INT(most, 2);
    give_up_limit(s, 3);
}

// Two maps share it, and take turns.
SEEDS(map_limit_shared) {
    orch_semaphore *s = orch_semaphore_new(2);
    items a = of(6), b = of(6);
    orch_future *maps[2];
    a.map.limit = b.map.limit = s;
    maps[0] = map(&a);
    maps[1] = map(&b);
    orch_sleep(35);
    int first = 0, second = 0;
    for (size_t i = 0; i < 6; i++) first += a.state[i] != 0, second += b.state[i] != 0;
    CHECK_INT(first + second, 8);
    CHECK(first >= 4 && second >= 3);
    check_end(orch_all_n(2, maps), 0);
    CHECK_INT(most, 2);
    CHECK_INT(orch_now(), 60);
    give_up_limit(s, 2);
}

SEEDS(map_limit_resized) {
    orch_semaphore *s = orch_semaphore_new(1);
    items t = of(12);
    t.map.limit = s;
    orch_future *f = map(&t);
    orch_sleep(15); // 0 and 1
    CHECK_INT(begun, 2);
    orch_semaphore_resize(s, 4);
    orch_sleep(1); // three more at once
    CHECK_INT(running, 4);
    orch_semaphore_resize(s, 2); // what runs ends; no other begins before there are fewer
    orch_sleep(5);
    CHECK_INT(begun, 5);
    CHECK_INT(running, 3);
    orch_sleep(6);
    CHECK_INT(running, 2);
    check_end(f, 0);
    give_up_limit(s, 2);
}

SEEDS(map_limit_pause) {
    orch_semaphore *s = orch_semaphore_new(2);
    items t = of(6);
    t.map.limit = s;
    orch_future *f = map(&t);
    orch_semaphore_resize(s, 0);
    orch_sleep(1000);
    CHECK_INT(begun, 2);
    CHECK_INT(running, 0);
    orch_semaphore_resize(s, 2);
    check_end(f, 0);
    CHECK_INT(orch_now(), 1020);
    give_up_limit(s, 2);
}

// Somebody else has the permits: a map that ends does not wait for one, and takes none.
SEEDS(map_limit_cancel) {
    orch_semaphore *s = orch_semaphore_new(2);
    CHECK_INT(orch_acquire(s), 0);
    items t = of(6);
    t.map.limit = s, t.each = 400;
    check_end(orch_timeout(map(&t), 100), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), 100);
    CHECK_INT(begun, 1);
    CHECK(test_shared->fail_at || orch_semaphore_available(s) == 1);
    items fails_soon = of(6);
    fails_soon.map.limit = s, fails_soon.fail_at = 0, fails_soon.error = 3;
    check_end(map(&fails_soon), 3); // not only when there is a permit for the next
    CHECK_INT(orch_now(), 110);
    items times_out = of(6); // an item that does not end, as far as its task can tell
    times_out.map.limit = s, times_out.map.timeout_ms = 20, times_out.each = 30;
    check_end(map(&times_out), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), 130);
    if (orch_semaphore_available(s) == 1) orch_release(s);
    give_up_limit(s, 2);
}

SEEDS(map_limit_closed) {
    for (int keep_going = 0; keep_going < 2; keep_going++) {
        orch_semaphore *s = orch_semaphore_new(1);
        items t = of(4);
        begun = 0;
        t.map.limit = s, t.map.keep_going = keep_going;
        orch_future *f = map(&t);
        orch_sleep(5);
        orch_semaphore_free(s);
        orch_result r = orch_await(f);
        CHECK_INT(r.error, keep_going ? 0 : ORCH_ECLOSED);
        if (keep_going) {
            CHECK_INT(orch_at(&r, 0)->error, 0);
            CHECK_INT(orch_at(&r, 3)->error, ORCH_ECLOSED);
        }
        CHECK_INT(begun, 1);
        orch_result_free(&r);
    }
}

// It may be gone once it has said so.
SEEDS(map_limit_gone) {
    for (int keep_going = 0; keep_going < 2; keep_going++) {
        orch_semaphore *s = orch_semaphore_new(1);
        bool held = orch_try_acquire(s);
        items t = of(4);
        t.map.limit = s, t.map.keep_going = keep_going;
        orch_future *f = map(&t);
        orch_semaphore_free(s);
        if (held) orch_release(s);
        check_end(f, keep_going ? 0 : ORCH_ECLOSED);
        CHECK_INT(begun, 0);
    }
}

// ---- map: what an item is

static const char local_key = 0;

static orch_result item_with_local(size_t index, void *context) {
    (void)context;
    CHECK_STR((const char *)orch_local(&local_key), "caller");
    orch_local_set(&local_key, (void *)(uintptr_t) "item", NULL);
    orch_sleep(index);
    return OK;
}

static orch_result caller_with_local(void *arg) {
    (void)arg;
    if (orch_local_set(&local_key, (void *)(uintptr_t) "caller", NULL) != 0) return OK;
    orch_map_desc d = {.count = 6, .fn = item_with_local, .concurrency = 2};
    check_end(orch_map(&d), 0);
    orch_retry_desc retry = {.attempts = 2};
    d.retry = &retry;
    check_end(orch_map(&d), 0);
    return OK;
}

SEEDS(map_locals) { check_end(orch_go(caller_with_local, NULL), 0); }

static orch_result until_deadline(size_t index, void *context) {
    (void)index, (void)context;
    enter();
    int error = orch_sleep(100);
    leave();
    return error != 0 ? orch_fail(error) : OK;
}

SEEDS(map_deadline) {
    orch_scope scope;
    orch_map_desc d = {.count = 9, .fn = until_deadline, .concurrency = 2, .keep_going = true};
    if (orch_scope_open(&scope, &(orch_scope_desc){.timeout_ms = 250}) != 0) return;
    orch_result r = orch_await(orch_map(&d));
    CHECK_INT(orch_now(), 250);
    CHECK_INT(begun, 6);
    CHECK_INT(running, 0);
    orch_result_free(&r);
    r = orch_scope_close(&scope);
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    orch_result_free(&r);
}

static orch_result item_chains(size_t index, void *context) {
    (void)context;
    mark((int)index);
    return orch_chain(orch_after(10)); // the place is taken until then
}

SEEDS(map_chain) {
    orch_map_desc d = {.count = 4, .fn = item_chains, .concurrency = 2};
    check_end(orch_map(&d), 0);
    CHECK_TIMES(0, 0, 10, 10);
    CHECK_INT(orch_now(), 20);
}

static orch_result row(size_t index, void *context) {
    (void)context, (void)index;
    orch_map_desc d = {.count = 3, .fn = square, .concurrency = 2};
    return orch_chain(orch_map(&d));
}

ONCE(map_nested) {
    orch_map_desc d = {.count = 4, .fn = row, .concurrency = 2};
    orch_result r = orch_await(orch_map(&d));
    CHECK_INT(r.error, 0);
    for (size_t i = 0; i < 4; i++) CHECK_INT(orch_int(orch_at(orch_at(&r, i), 2)), 4);
    orch_result_free(&r);
}

static orch_result named(size_t index, void *context) {
    (void)index, (void)context;
    CHECK_STR(orch_task_name(orch_self()), "crawl");
    CHECK_INT(orch_task_stack_size(orch_self()), 1 << 18);
    return OK;
}

ONCE(map_name_and_stack) {
    orch_map_desc d = {.count = 2, .fn = named, .name = "crawl", .stack_size = 200000};
    check_end(orch_map(&d), 0);
    d.retry = &(orch_retry_desc){.timeout_ms = 10, .name = "none", .stack_size = 1 << 15};
    check_end(orch_map(&d), 0);
}

// Items that never wait let others run, and the loop is not held for ever.
static orch_result quick(size_t index, void *context) {
    (void)index, (void)context;
    begun++;
    return OK;
}

ONCE(map_turns) {
    volatile int ticks = 0;
    orch_future *other = orch_go(tick, (void *)(uintptr_t)&ticks);
    orch_map_desc d = {.count = 1000, .fn = quick};
    orch_future *f = orch_map(&d);
    CHECK(begun < 200 && ticks == 1);
    check_end(f, 0);
    CHECK(ticks > 3);
    check_end(other, 0);
    CHECK_INT(begun, 1000);
}

TEST(map_without_task) {
    reset();
    items t = of(5);
    int error = -1;
    orch_loop *loop = orch_loop_new(&(orch_loop_desc){.clock = ORCH_CLOCK_VIRTUAL});
    if (!CHECK(loop != NULL)) return;
    t.map.concurrency = 2, t.map.release = count_release;
    orch_on(map(&t), note_end, &error);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(error, 0);
    CHECK_INT(begun, 5);
    items dropped = t, detached = t;
    memset(dropped.state, 0, sizeof t.state);
    memset(detached.state, 0, sizeof t.state);
    orch_drop(map(&dropped)); // ends later, as no task waits for it
    CHECK_INT(orch_loop_run(loop), 0);
    orch_detach(map(&detached));
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(running, 0);
    if (released != 3) abort();
    CHECK_INT(orch_loop_statistics(loop).futures, 0);
    CHECK_INT(orch_loop_free(loop), 0);
}

// A loop that is freed cancels its maps.
TEST(map_freed_with_loop) {
    reset();
    items t = of(5);
    orch_loop *loop = orch_loop_new(&(orch_loop_desc){.clock = ORCH_CLOCK_VIRTUAL});
    if (!CHECK(loop != NULL)) return;
    t.map.concurrency = 2, t.map.release = count_release;
    orch_detach(map(&t));
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK_INT(running, 0);
    if (released != 1) abort();
}

ONCE(map_release) {
    items t = of(4);
    t.map.release = count_release, t.map.concurrency = 2;
    orch_future *f = map(&t);
    CHECK_INT(released, f != NULL && orch_is_settled(f));
    check_end(f, 0);
    if (released != 1) abort();
    memset(t.state, 0, sizeof t.state);
    orch_drop(map(&t));
    if (released != 2) abort();
    memset(t.state, 0, sizeof t.state);
    t.fail_at = 0, t.error = 1, t.each = 0;
    check_end(map(&t), 1);
    if (released != 3) abort();
}

// The results of items that had ended when another one failed are given back.
ONCE(map_gives_back_results) {
    items t = of(4);
    t.fail_at = 3, t.error = 1, t.ms = (const uint64_t[]){1, 2, 3, 4};
    check_end(map(&t), 1);
    CHECK_INT(issued, 3);
}

// Anything may happen: what was begun ends, bounds hold, and nothing is left.
static orch_result chaos_item(size_t index, void *context) {
    items *t = context;
    orch_result r = item(index, t);
    if (r.error == 0 && orch_random() % 64 == 0) {
        orch_result_free(&r);
        return orch_failf(99, "by chance");
    }
    return r;
}

SEEDS(map_chaos) {
    for (int round = 0; round < 5; round++) {
        orch_semaphore *s = orch_random() % 2 ? orch_semaphore_new(1 + orch_random() % 4) : NULL;
        items t = of((size_t)(orch_random() % 40));
        orch_retry_desc retry = {.attempts = 1, .delay_ms = 1, .timeout_ms = 15};
        t.random = true, t.map.fn = chaos_item, t.map.limit = s;
        t.map.concurrency = orch_random() % 8, t.map.keep_going = orch_random() % 2;
        t.map.timeout_ms = orch_random() % 2 ? 1 + orch_random() % 25 : 0;
        t.stubborn_at = (int)(orch_random() % 40);
        if (orch_random() % 2) t.map.retry = &retry;
        orch_result r = orch_await(orch_timeout(map(&t), 1 + orch_random() % 200));
        CHECK_INT(running, 0);
        CHECK_INT(begun, ended);
        CHECK(r.error == 0 || r.error == 99 || r.error == ORCH_ETIMEDOUT);
        orch_result_free(&r);
        if (s != NULL) give_up_limit(s, orch_semaphore_permits(s));
    }
}

// ---- hedge

// As attempt, but each attempt has its own line: by its number.
static orch_result racer(void *arg) {
    const step *steps = arg;
    unsigned number = orch_attempt_number();
    mark((int)number);
    enter();
    int error = orch_sleep(steps[number - 1].ms);
    leave();
    if (error != 0) return orch_fail(error);
    if (steps[number - 1].error != 0)
        return orch_failf(steps[number - 1].error, "racer %u", number);
    return token();
}

static orch_hedge_desc hedge_of(const step *steps, unsigned attempts, uint64_t delay) {
    return (orch_hedge_desc){
        .fn = racer, .arg = (void *)(uintptr_t)steps, .attempts = attempts, .delay_ms = delay};
}

static void check_winner(orch_future *f, unsigned index) {
    orch_result r = orch_await(f);
    CHECK_INT(r.error, 0);
    CHECK_INT(r.index, index);
    orch_result_free(&r);
    CHECK_INT(running, 0);
}

SEEDS(hedge_first) {
    const step steps[] = {{50, 0}, {10, 0}};
    orch_hedge_desc d = hedge_of(steps, 2, 100);
    check_winner(orch_hedge(&d), 0);
    CHECK_INT(orch_now(), 50);
    CHECK_INT(begun, 1);
}

SEEDS(hedge_delay) {
    const step steps[] = {{500, 0}, {500, 0}, {50, 0}, {10, 0}};
    orch_hedge_desc d = hedge_of(steps, 4, 100);
    check_winner(orch_hedge(&d), 2);
    CHECK_TIMES(0, 100, 200);
    CHECK_INT(orch_now(), 250);
    marked = 0;
    d.attempts = 0, d.delay_ms = 0; // 2, after 100 ms
    const step two[] = {{500, 0}, {500, 0}};
    d.arg = (void *)(uintptr_t)two;
    check_winner(orch_hedge(&d), 0);
    CHECK_TIMES(250, 350);
    CHECK_INT(orch_now(), 750);
}

// The next one at once, and the delay counts from there.
SEEDS(hedge_failure) {
    const step steps[] = {{30, 5}, {500, 0}, {60, 0}};
    orch_hedge_desc d = hedge_of(steps, 3, 100);
    check_winner(orch_hedge(&d), 2);
    CHECK_TIMES(0, 30, 130);
    CHECK_INT(orch_now(), 190);
    const step both[] = {{110, 5}, {10, 6}, {10, 0}, {20, 0}}; // two failures, two attempts
    reset();
    d = hedge_of(both, 4, 100);
    uint64_t start = orch_now();
    check_winner(orch_hedge(&d), 2);
    CHECK_TIMES(start, start + 100, start + 110, start + 110);
}

SEEDS(hedge_fails) {
    const step steps[] = {{30, 5}, {20, 6}, {10, 7}};
    orch_hedge_desc d = hedge_of(steps, 3, 100);
    orch_result r = orch_await(orch_hedge(&d));
    CHECK_INT(r.error, ORCH_EALLFAILED);
    for (size_t i = 0; i < 3; i++) CHECK_INT(orch_at(&r, i)->error, 5 + i);
    CHECK_STR(orch_message(orch_at(&r, 1)), "racer 2");
    orch_result_free(&r);
    CHECK_TIMES(0, 30, 50);
    CHECK_INT(orch_now(), 60);
    d.attempts = 1;
    check_end(orch_hedge(&d), ORCH_EALLFAILED);
}

ONCE(hedge_at_once) {
    const step steps[] = {{30, 0}, {20, 0}, {10, 5}};
    orch_hedge_desc d = hedge_of(steps, 3, 100);
    d.no_delay = true;
    orch_future *f = orch_hedge(&d);
    CHECK_INT(running, 3);
    check_winner(f, 1);
    CHECK_INT(orch_now(), 20);
}

// An attempt that does not wait: no other one starts.
ONCE(hedge_without_wait) {
    orch_hedge_desc d = {.fn = ask_number, .attempts = 5, .no_delay = true};
    orch_result r = orch_await(orch_hedge(&d));
    CHECK_INT(orch_int(&r), 1);
    CHECK_INT(r.index, 0);
    orch_result_free(&r);
}

// Losers are cancelled, and have ended when the winner is delivered.
static orch_result loser(void *arg) {
    unsigned number = orch_attempt_number();
    (void)arg;
    enter();
    if (number == 1) orch_shield_begin();
    int error = orch_sleep(number == 3 ? 10 : 300);
    if (number == 1) orch_shield_end();
    leave();
    mark((int)number * (error != 0 ? -1 : 1));
    return error != 0 ? orch_fail(error) : orch_ok_int((intptr_t)number);
}

SEEDS(hedge_losers) {
    orch_hedge_desc d = {.fn = loser, .attempts = 5, .delay_ms = 50};
    check_winner(orch_hedge(&d), 2);
    CHECK_ORDER(3, -2, 1);
    CHECK_INT(orch_now(), 300);
}

// The success is final at once: no timeout around it can take it away while a loser winds down.
SEEDS(hedge_decided) {
    orch_hedge_desc d = {.fn = loser, .attempts = 5, .delay_ms = 50};
    check_winner(orch_timeout(orch_hedge(&d), 150), 2);
    CHECK_INT(orch_now(), 300);
    d.attempts = 3;
    check_winner(orch_timeout(orch_hedge(&d), 150), 2);
    CHECK_INT(orch_now(), 600);
}

static bool not_6(const orch_result *r, void *context) {
    ++*(int *)context;
    return r->error != 6;
}

SEEDS(hedge_fatal) {
    const step steps[] = {{150, 0}, {20, 6}, {10, 0}, {10, 0}};
    int asked = 0;
    orch_hedge_desc d = hedge_of(steps, 4, 100);
    d.retry_if = not_6, d.context = &asked;
    check_winner(orch_hedge(&d), 0); // what runs goes on, nothing else starts
    CHECK_INT(begun, 2);
    CHECK_INT(asked, 1);
    CHECK_INT(orch_now(), 150);
    const step alone[] = {{20, 6}, {10, 0}, {10, 0}};
    d.arg = (void *)(uintptr_t)alone, d.attempts = 3;
    orch_result r = orch_await(orch_hedge(&d));
    CHECK_INT(r.error, ORCH_EALLFAILED);
    CHECK_INT(orch_at(&r, 0)->error, 6);
    CHECK_INT(orch_at(&r, 2)->error, ORCH_ECANCELED);
    orch_result_free(&r);
    CHECK_INT(orch_now(), 170);
}

SEEDS(hedge_cancel) {
    const step steps[] = {{1000, 0}, {1000, 0}, {1000, 0}};
    orch_hedge_desc d = hedge_of(steps, 3, 100);
    orch_future *f = orch_hedge(&d);
    orch_future *kept = orch_ref(f), *canceller = orch_go(cancel_at, &kept);
    check_end(f, ORCH_ECANCELED);
    CHECK_INT(orch_now(), 150);
    CHECK_INT(begun, 2);
    CHECK_INT(running, 0);
    check_end(canceller, 0);
    orch_drop(kept);
    orch_drop(orch_hedge(&d));
    CHECK_INT(running, 0);
    check_end(orch_timeout(orch_hedge(&d), 500), ORCH_ETIMEDOUT); // all have begun
    CHECK_INT(running, 0);
}

static orch_result hedged(void *arg) {
    (void)arg;
    const step steps[] = {{10, 5}, {10, 5}};
    orch_hedge_desc d = hedge_of(steps, 2, 100);
    return orch_await(orch_hedge(&d));
}

SEEDS(hedge_in_retry) {
    orch_retry_desc d = {.fn = hedged, .attempts = 3, .delay_ms = 100};
    orch_result r = orch_await(orch_retry(&d));
    CHECK_INT(r.error, ORCH_EALLFAILED);
    CHECK_INT(orch_at(&r, 1)->error, 5);
    orch_result_free(&r);
    CHECK_ORDER(1, 2, 1, 2, 1, 2); // the innermost attempt's number
    CHECK_INT(orch_now(), 360);
}

ONCE(hedge_copy_and_release) {
    const step steps[] = {{30, 5}, {20, 0}};
    orch_hedge_desc d = hedge_of(steps, 2, 100);
    d.arg_size = sizeof steps, d.release = count_release;
    orch_future *f = orch_hedge(&d);
    CHECK_INT(released, f != NULL && orch_is_settled(f));
    check_winner(f, 1);
    if (released != 1) abort();
    orch_drop(orch_hedge(&d));
    if (released != 2) abort();
    d.attempts = 101;
    check_refused(orch_hedge(&d), "orch_hedge: attempts is 101, more than 100");
    d.attempts = 2, d.delay_ms = (uint64_t)-1;
    check_refused(orch_hedge(&d), "orch_hedge: delay_ms is 18446744073709551615" AGES);
    if (released != 4) abort();
}

// ---- misuse

static void check_misuse(orch_future *f, int error) {
    const orch_result *r = orch_peek(f);
    if (CHECK(r != NULL)) CHECK_INT(r->error, error);
    orch_drop(f);
    CHECK_INT(released, error == ORCH_EINVAL);
}

static int thing;
MISUSE(misuse_retry_no_desc, "orch_retry: ") {
    released++;
    check_misuse(orch_retry(NULL), ORCH_EINVAL);
}
MISUSE(misuse_retry_no_fn, "orch_retry: ") {
    orch_retry_desc d = {.arg = &thing, .release = count_release};
    check_misuse(orch_retry(&d), ORCH_EINVAL);
}
MISUSE(misuse_retry_no_arg, "orch_retry: ") {
    orch_retry_desc d = {.fn = attempt, .arg_size = 4};
    released++;
    check_misuse(orch_retry(&d), ORCH_EINVAL);
}
MISUSE(misuse_retry_arg_size, "orch_retry: ") {
    orch_retry_desc d = {
        .fn = attempt, .arg = &thing, .arg_size = SIZE_MAX, .release = count_release};
    check_misuse(orch_retry(&d), ORCH_EINVAL);
}
MISUSE(misuse_retry_stack, "orch_retry: ") {
    orch_retry_desc d = {.fn = attempt, .arg = &thing, .stack_size = 100, .release = count_release};
    check_misuse(orch_retry(&d), ORCH_EINVAL);
}
MISUSE(misuse_map_no_desc, "orch_map: ") {
    released++;
    check_misuse(orch_map(NULL), ORCH_EINVAL);
}
MISUSE(misuse_map_no_fn, "orch_map: ") {
    orch_map_desc d = {.count = 3, .context = &thing, .release = count_release};
    check_misuse(orch_map(&d), ORCH_EINVAL);
}
MISUSE(misuse_map_count, "orch_map: ") {
    orch_map_desc d = {.count = SIZE_MAX, .fn = square, .context = &thing};
    d.release = count_release;
    check_misuse(orch_map(&d), ORCH_EINVAL);
}
MISUSE(misuse_map_stack, "orch_map: ") {
    orch_map_desc d = {.count = 3, .fn = square, .context = &thing, .release = count_release};
    d.stack_size = (size_t)1 << 31;
    check_misuse(orch_map(&d), ORCH_EINVAL);
}
MISUSE(misuse_hedge_no_desc, "orch_hedge: ") {
    released++;
    check_misuse(orch_hedge(NULL), ORCH_EINVAL);
}
MISUSE(misuse_hedge_no_fn, "orch_hedge: ") {
    orch_hedge_desc d = {.arg = &thing, .release = count_release};
    check_misuse(orch_hedge(&d), ORCH_EINVAL);
}

#ifdef NDEBUG
#define MISUSE_NO_LOOP(name, text) TEST(name)
#else
#define MISUSE_NO_LOOP(name, text) TEST_DIES(name, "asyncorch: " text)
#endif

MISUSE_NO_LOOP(misuse_no_loop, "orch_retry: no loop") {
    reset();
    orch_retry_desc r = {.fn = attempt, .arg = &thing, .release = count_release};
    orch_map_desc m = {.count = 3, .fn = square, .context = &thing, .release = count_release};
    orch_hedge_desc h = {.fn = attempt, .arg = &thing, .release = count_release};
    CHECK_INT(orch_peek(orch_retry(&r))->error, ORCH_ENOLOOP);
    CHECK_INT(orch_peek(orch_map(&m))->error, ORCH_ENOLOOP);
    CHECK_INT(orch_peek(orch_hedge(&h))->error, ORCH_ENOLOOP);
    CHECK_INT(released, 3);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
