// test_scope.c: scopes, their deadlines and failures, shields in them, task-local values.
//
// A case is a body that runs as the main task of a loop with a virtual clock: once without a seed,
// then with each of test_seeds() seeds (TEST_SEEDS=200, default 20), the first 20 twice: both runs
// of a seed must leave the same trace. What must hold on every path, with refused memory too,
// aborts: what a scope was given has ended when its close returns, every owned value is released
// exactly once, and no slot, timer or task is left.
//
// adopted behaviour                                   known from                   case
// close waits for every child                         Trio nursery, errgroup.Wait  close_waits
// a child may start siblings, also during close       Trio start_soon in __aexit__ a_member_starts
// the first failure cancels siblings and body         Trio, asyncio.TaskGroup      first_failure
// the close ends with the first error                 errgroup.Wait                first_failure
// all errors are kept, in order                       Python ExceptionGroup        sixteen_failures
// a failure leaves the others alone, when asked       errgroup without a context   keep_going
// being cancelled is no failure                       Trio Cancelled               cancelled_is
// cancelled from outside                              Trio CancelScope.cancel      cancel_with
// level-triggered: every later wait is refused        Trio                         every_wait
// ... but what is there already is delivered          (the design)                 what_is_settled
// the nearest deadline counts                         Trio fail_after, Go context  nearest
// a deadline ends its own scope only                  Trio move_on_after           *_counts_inner
// a deadline can be moved while it runs               Trio CancelScope.deadline    extend
// the time left can be asked                          Trio current_effective_dead. time_left
// an absolute deadline is handed down                 Go context.WithDeadline      go_copies
// a detached child has none                           Go context.WithoutCancel     spawn_inherits
// a shield keeps outer cancellation and deadlines out Trio CancelScope(shield)     shield_*
// a scope's own deadline counts in a shield           Trio                         shield_own
// cancellation reaches everything below               Trio, Kotlin, Go context     cancel_reaches
// a cancelled child may clean up; close waits         Trio, Kotlin NonCancellable  clean_up
// work that was started elsewhere can be adopted      Kotlin Job(parent)           add_*
// a reason goes along                                 Go context.WithCancelCause   cancel_with
// children inherit context values                     Go context.WithValue,        local_*
//                                                     Python contextvars
// a child cannot change its parent's values           Python contextvars           local_child
#include "../asyncorch.h"
#include "test.h"

// ---- kit

enum { TOKENS = 1 << 12, TRACE = 1 << 12, REPORT = 1 << 14, MEMBERS = 64 };
#ifdef __SANITIZE_THREAD__ // for which a stack costs a thousand times as much
enum { CHAIN = 500, RANDOM = 1 };
#else
enum { CHAIN = 10000, RANDOM = 2 };
#endif
#define HOUR 3600000
#define NEVER ORCH_NO_DEADLINE

typedef void body_fn(void);

static unsigned char tokens[TOKENS]; // how often each was released
static int issued, unhandled;
static char report[REPORT];
static size_t reported;
static struct trace {
    size_t count;
    int at[TRACE];
} trace, first_trace;
static uint64_t seed;       // of the run that is under way
static orch_future *parent; // of some members
static bool sweeping;

static uint64_t test_seeds(void) {
    const char *many = getenv("TEST_SEEDS");
    return sweeping ? 1 : many ? strtoull(many, NULL, 10) : 20;
}

static void note(int what) {
    if (trace.count < TRACE) trace.at[trace.count++] = what;
}

static void give_back(void *value) { ++*(unsigned char *)value; }

static void *token(void) { return &tokens[issued++ % TOKENS]; }

static orch_result token_result(void) { return orch_ok(token(), give_back); }

static const char looked_for; // a key of locals

static bool is_given_back(const void *value) { return *(const unsigned char *)value > 0; }

static void on_unhandled(const orch_result *r, void *context) {
    (void)r, (void)context;
    unhandled++;
}

static void on_report(const char *text, void *context) {
    (void)context;
    size_t size = strlen(text);
    if (reported + size >= REPORT) return;
    memcpy(report + reported, text, size + 1);
    reported += size;
}

// What must hold whatever happens: a sweep sees only what aborts.
static void must(bool held, const char *what) {
    if (held) return;
    fprintf(stderr, "seed %llu: %s\n%s", (unsigned long long)seed, what, report);
    abort();
}

static void check_value(const void *value) {
    must(value == NULL || !is_given_back(value), "a value is seen after its release");
}

static orch_loop_stats stats(void) { return orch_loop_statistics(orch_loop_current()); }

static orch_result run_body(void *arg) {
    test_start();
    (*(body_fn **)arg)();
    for (int i = 0; i < 100 && stats().futures > 1; i++) orch_yield(); // what ends later
    orch_loop_stats left = stats();
    must(left.futures == 1 && left.tasks == 1 && left.timers == 0, "something is left");
    return orch_ok_int(1);
}

static void balance(void) {
    for (int i = 0; i < issued && i < TOKENS; i++) must(tokens[i] == 1, "not released once");
}

static void reset(void) {
    memset(tokens, 0, sizeof tokens);
    issued = unhandled = 0, reported = 0, report[0] = '\0', parent = NULL;
    trace.count = 0;
}

// An allocator that refuses on demand: all, or one of so many by chance.
static bool refusing;
static unsigned refuse_one_of;
static uint64_t luck;

static void *resize_unless(void *user, void *old, size_t old_size, size_t size) {
    (void)user, (void)old_size;
    if (size == 0) return free(old), NULL;
    luck = luck * 6364136223846793005u + 1442695040888963407u; // source: Knuth, MMIX
    bool refuse = refusing || (refuse_one_of != 0 && (luck >> 33) % refuse_one_of == 0);
    return refuse ? NULL : realloc(old, size);
}

static orch_loop_desc settings(void) {
    return (orch_loop_desc){.clock = ORCH_CLOCK_VIRTUAL,
                            .seed = seed,
                            .on_unhandled = on_unhandled,
                            .on_report = on_report};
}

static orch_result run_once(body_fn *body) {
    reset();
    orch_loop_desc desc = settings();
    orch_result r = orch_run_with(&desc, run_body, &body);
    balance();
    return r;
}

static bool same_trace(void) {
    return trace.count == first_trace.count &&
           !memcmp(trace.at, first_trace.at, trace.count * sizeof trace.at[0]);
}

enum { TWICE = 20 }; // so many seeds are run twice: where order comes in by chance, it shows

// The body without a seed, and under every seed. Returns how many orders there were that
// differ from the one without a seed.
static int over_seeds(body_fn *body, uint64_t most) {
    static struct trace plain;
    int different = 0, failures = test_failures;
    if (most > test_seeds()) most = test_seeds();
    for (uint64_t i = sweeping; i <= most && failures == test_failures; i++) {
        const bool once = sweeping || i > TWICE;
        for (int again = once; again < 2 && failures == test_failures; again++) {
            seed = i;
            orch_result r = run_once(body);
            CHECK_INT(r.error, 0);
            CHECK_INT(orch_int(&r), 1);
            orch_result_free(&r);
            if (again && !once) CHECK(same_trace());
            first_trace = trace;
        }
        if (i == 0) plain = trace;
        different += trace.count != plain.count ||
                     memcmp(trace.at, plain.at, plain.count * sizeof plain.at[0]) != 0;
        if (failures != test_failures) fprintf(stderr, "seed %llu\n", (unsigned long long)i);
    }
    return different;
}

#define SCOPE_TEST_OF(name, most, check)                                                           \
    static void name##_body(void);                                                                 \
    TEST(name) {                                                                                   \
        int different = over_seeds(name##_body, most);                                             \
        check;                                                                                     \
    }                                                                                              \
    static void name##_body(void)
#define SCOPE_TEST(name) SCOPE_TEST_OF(name, UINT64_MAX, (void)different)
#define FEW_SEEDS(name) SCOPE_TEST_OF(name, 1, (void)different) // what takes long
#define ORDER_TEST(name) SCOPE_TEST_OF(name, UINT64_MAX, CHECK(different > 0))

// A member of a scope, and what it saw.
typedef struct member {
    uint64_t ms;        // it sleeps so long
    int fail;           // then it ends so, when it was not cancelled
    int fail_cancelled; // ... and so when it was
    uint64_t clean;     // cancelled: cleans up for so long, behind a shield
    bool deaf;          // cancelled: goes on sleeping, a few times
    orch_scope *scope;  // see the functions
    struct member *child;
    int number;
    int started, done, slept, reason, cleaned, went; // what came
    uint64_t end, left;
} member;

static int nap(const member *m) { // NEVER: later than everything else
    return m->ms == NEVER ? orch_sleep(1000 * (uint64_t)HOUR) : m->ms ? orch_sleep(m->ms) : 0;
}

static orch_result member_end(member *m) {
    m->reason = orch_cancel_reason();
    if (m->deaf)
        for (int i = 0; i < 5; i++) CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    if (m->clean && m->slept) {
        orch_shield_begin();
        m->cleaned = orch_sleep(m->clean);
        orch_shield_end();
    }
    m->end = orch_now(), m->done++;
    note(m->number);
    if (m->slept) return orch_fail(m->fail_cancelled ? m->fail_cancelled : m->slept);
    return m->fail ? orch_failf(m->fail, "failed with %d", m->fail) : token_result();
}

static orch_result work(void *arg) {
    member *m = arg;
    m->started++, m->left = orch_time_left();
    m->slept = nap(m);
    return member_end(m);
}

// Yields so many times instead of sleeping.
static orch_result busy_work(void *arg) {
    member *m = arg;
    m->started++;
    for (uint64_t i = 0; i < m->ms && !m->slept; i++) note(m->number), m->slept = orch_yield();
    return member_end(m);
}

// Time passes, without memory as well.
static void pass_time(uint64_t ms) {
    for (uint64_t end = orch_now() + ms; orch_now() < end;)
        if (orch_sleep(1)) orch_yield();
}

// What was started has ended: true whatever else happened.
static void all_ended(const member *m, size_t count) {
    for (size_t i = 0; i < count; i++)
        must(m[i].started == m[i].done && m[i].started <= 1, "a member outlived its scope");
}

// Closes and says how it ended.
static int close_of(orch_scope *s) {
    orch_result r = orch_scope_close(s);
    int error = r.error;
    must(orch_message(&r)[0] != '\0', "no message");
    orch_result_free(&r);
    return error;
}

static intptr_t join(orch_future *f) {
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

// ---- members end before the close

SCOPE_TEST(an_empty_scope) {
    orch_scope s;
    CHECK_INT(orch_scope_open(&s, NULL), 0);
    CHECK_INT(orch_scope_failures(&s), 0);
    CHECK_INT(orch_scope_error(&s, 0)->error, ORCH_ERANGE);
    orch_result r = orch_scope_close(&s);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_count(&r), 0);
    orch_result_free(&r);
    CHECK_INT(orch_scope_open(&s, &(orch_scope_desc){.name = NULL}), 0); // the same ticket again
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(orch_now(), 0);
}

SCOPE_TEST(close_waits_for_all) {
    member m[] = {{.ms = 30}, {.ms = 10, .number = 1}, {.ms = 20, .number = 2}, {.number = 3}};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.name = "all"});
    for (int i = 0; i < 4; i++) CHECK_INT(orch_scope_go(&s, work, &m[i]), 0);
    CHECK(m[3].done); // it never waited
    CHECK_INT(close_of(&s), 0);
    all_ended(m, 4);
    CHECK_INT(orch_now(), 30);
    CHECK_INT(m[0].end + m[1].end + m[2].end, 60);
    CHECK_INT(trace.at[1], 1);
    CHECK_INT(trace.at[3], 0);
}

ORDER_TEST(members_run_in_an_order_of_the_seed) {
    member m[5];
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 5; i++) {
        m[i] = (member){.ms = 5, .number = i};
        orch_scope_go(&s, busy_work, &m[i]);
    }
    CHECK_INT(close_of(&s), 0);
    all_ended(m, 5);
    for (int i = 0; seed == 0 && i < 30; i++) CHECK_INT(trace.at[i], i % 5);
}

ORDER_TEST(equal_sleeps_end_in_an_order_of_the_seed) {
    member m[6];
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 6; i++) {
        m[i] = (member){.ms = 7, .number = i};
        orch_scope_go(&s, work, &m[i]);
    }
    CHECK_INT(close_of(&s), 0);
    all_ended(m, 6);
    for (int i = 0; seed == 0 && i < 6; i++) CHECK_INT(trace.at[i], i);
    CHECK_INT(orch_now(), 7);
}

static orch_result with_value(void *arg) {
    if (arg) orch_sleep(10);
    return token_result();
}

static orch_result with_list(void *arg) {
    (void)arg;
    return orch_await(orch_all(orch_go(with_value, NULL), orch_go(with_value, "later")));
}

static orch_result with_chain(void *arg) { return orch_chain(orch_go(with_value, arg)); }

SCOPE_TEST(values_of_members_are_given_back) {
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, with_value, NULL);
    orch_scope_go(&s, with_value, "later");
    orch_scope_go(&s, with_list, NULL);
    orch_scope_go(&s, with_chain, "later");
    CHECK_INT(close_of(&s), 0);
    for (int i = 0; i < issued; i++) must(tokens[i] == 1, "a value outlived the scope");
}

static orch_result go_sibling(void *arg) {
    member *m = arg;
    m->started++;
    m->slept = nap(m);
    if (m->child) m->went = orch_scope_go(m->scope, go_sibling, m->child);
    return member_end(m);
}

SCOPE_TEST(a_member_starts_members_while_the_scope_closes) {
    member m[20];
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 20; i++)
        m[i] = (member){
            .ms = i % 3 ? 1 : 0, .number = i, .scope = &s, .child = i < 19 ? &m[i + 1] : NULL};
    CHECK_INT(orch_scope_go(&s, go_sibling, &m[0]), 0);
    CHECK_INT(close_of(&s), 0);
    all_ended(m, 20);
    for (int i = 0; i < 20; i++) CHECK_INT(m[i].done, 1), CHECK_INT(m[i].went, 0);
    CHECK_INT(orch_now(), 13);
}

// The address of a scope in hand, from tasks elsewhere and from callbacks.
typedef struct caller {
    orch_scope *scope;
    member *member;
    int went, calls;
    bool cancels;
} caller;

static void go_from_callback(orch_result *in, void *context) {
    caller *c = context;
    c->calls++;
    if (in->error || c->scope == NULL) return;
    CHECK(orch_self() == NULL);
    if (c->cancels) orch_scope_cancel(c->scope, 77);
    c->went = orch_scope_go(c->scope, work, c->member);
    CHECK(orch_self() == NULL);
}

SCOPE_TEST(a_callback_starts_members) {
    member m[] = {{.ms = 10, .number = 1}, {.ms = 10, .number = 2}, {.ms = 50, .number = 3}};
    orch_scope s;
    caller now = {.scope = &s, .member = &m[0], .went = 1},
           later = {.scope = &s, .member = &m[1], .went = 1};
    orch_scope_open(&s, NULL);
    orch_on(orch_settled(orch_ok_int(1)), go_from_callback, &now);
    orch_on(orch_after(20), go_from_callback, &later);
    orch_scope_go(&s, work, &m[2]);
    CHECK_INT(orch_sleep(5), 0);
    CHECK_INT(m[0].started, 1);
    CHECK_INT(close_of(&s), 0);
    now.scope = later.scope = NULL;
    all_ended(m, 3);
    CHECK_INT(now.went, 0);
    CHECK_INT(later.went, 0);
    CHECK_INT(m[1].end, 30);
    CHECK_INT(orch_now(), 50);
    for (; later.calls == 0 || now.calls == 0;) pass_time(1);
}

SCOPE_TEST(a_callback_cancels_the_scope_and_starts_in_vain) {
    member m[] = {{.number = 1}, {.ms = 50, .number = 3}};
    orch_scope s;
    caller c = {.scope = &s, .member = &m[0], .went = 1, .cancels = true};
    orch_scope_open(&s, NULL);
    orch_on(orch_after(20), go_from_callback, &c);
    orch_scope_go(&s, work, &m[1]);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    c.scope = NULL;
    all_ended(m, 2);
    CHECK_INT(c.went, ORCH_ECANCELED);
    CHECK_INT(m[0].started, 0);
    CHECK_INT(m[1].reason, 77);
    CHECK_INT(orch_now(), 20);
    for (; c.calls == 0;) pass_time(1);
}

static void *go_on_main_stack(void *context) {
    orch_result nothing = orch_ok_int(0);
    go_from_callback(&nothing, context);
    return NULL;
}

SCOPE_TEST(a_member_starts_from_the_main_stack) {
    member m = {.ms = 10};
    orch_scope s;
    caller c = {.scope = &s, .member = &m, .went = 1};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    orch_on_main_stack(go_on_main_stack, &c);
    CHECK_INT(c.went, 0);
    CHECK_INT(m.left, 100);
    CHECK_INT(close_of(&s), 0);
    all_ended(&m, 1);
    CHECK_INT(m.done, 1);
}

static orch_result go_elsewhere(void *arg) {
    caller *c = arg;
    orch_sleep(10);
    if (c->scope) c->went = orch_scope_go(c->scope, work, c->member);
    orch_sleep(100);
    return orch_ok_int(1);
}

SCOPE_TEST(another_task_starts_a_member) {
    member m = {.ms = 20};
    orch_scope s;
    caller c = {.scope = &s, .member = &m, .went = 1};
    orch_scope_open(&s, NULL);
    orch_future *f = orch_go(go_elsewhere, &c);
    CHECK_INT(orch_sleep(15), 0);
    CHECK_INT(c.went, 0);
    CHECK_INT(close_of(&s), 0);
    c.scope = NULL;
    all_ended(&m, 1);
    CHECK_INT(m.end, 30);
    CHECK_INT(orch_now(), 30);
    CHECK_INT(join(f), 1); // it is no member
}

SCOPE_TEST(a_body_may_wait_for_members) {
    member m[] = {{.ms = 10}, {.ms = 20}};
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 2; i++) orch_scope_go(&s, work, &m[i]);
    CHECK_INT(orch_sleep(15), 0);
    CHECK_INT(m[0].done, 1);
    CHECK_INT(m[1].done, 0);
    CHECK_INT(orch_sleep(15), 0);
    CHECK_INT(close_of(&s), 0); // nothing is left to wait for
    CHECK_INT(orch_now(), 30);
}

typedef struct copied {
    int number;
    void *token;
} copied;

static int copies;

static orch_result use_copy(void *arg) {
    copied *c = arg;
    copies += c->number;
    return orch_ok_int(orch_sleep(5));
}

static void release_copy(void *arg) { give_back(((copied *)arg)->token); }

SCOPE_TEST(go_with_copies_and_releases_its_argument) {
    orch_scope s;
    copies = 0;
    orch_scope_open(&s, NULL);
    for (int i = 1; i <= 3; i++) {
        copied c = {i, token()};
        orch_task_desc desc = {.name = "copy",
                               .fn = use_copy,
                               .arg = &c,
                               .arg_size = sizeof c,
                               .release = release_copy};
        CHECK_INT(orch_scope_go_with(&s, &desc), 0);
    }
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(copies, 6);
    balance();
}

SCOPE_TEST(go_with_releases_the_argument_of_what_does_not_start) {
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_cancel(&s, 0);
    orch_task_desc desc = {.fn = with_value, .arg = token(), .release = give_back};
    CHECK_INT(orch_scope_go_with(&s, &desc), ORCH_ECANCELED);
    balance();
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
}

// ---- failures

SCOPE_TEST(first_failure_cancels_siblings_and_body) {
    member m[] = {{.ms = NEVER}, {.ms = 10, .fail = 7}, {.ms = HOUR}};
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 3; i++) CHECK_INT(orch_scope_go(&s, work, &m[i]), 0);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 10);
    CHECK(orch_cancel_reason() != 0);
    CHECK_INT(orch_scope_failures(&s), 1);
    CHECK_INT(orch_scope_error(&s, 0)->error, 7);
    CHECK_STR(orch_message(orch_scope_error(&s, 0)), "failed with 7");
    CHECK_INT(orch_scope_error(&s, 1)->error, ORCH_ERANGE);
    orch_result r = orch_scope_close(&s);
    all_ended(m, 3);
    CHECK_INT(r.error, 7);
    CHECK_STR(orch_message(&r), "failed with 7");
    CHECK_INT(orch_count(&r), 1);
    CHECK_INT(orch_at(&r, 0)->error, 7);
    CHECK_STR(orch_message(orch_at(&r, 0)), "failed with 7");
    CHECK_INT(orch_at(&r, 1)->error, ORCH_ERANGE);
    orch_result_free(&r);
    CHECK_INT(m[0].slept, ORCH_ECANCELED);
    CHECK_INT(m[2].slept, ORCH_ECANCELED);
    CHECK(m[0].reason != 0);
    CHECK_INT(orch_now(), 10);
    CHECK_INT(orch_cancel_reason(), 0); // the task itself was not cancelled
    CHECK_INT(orch_sleep(1), 0);
}

SCOPE_TEST(a_failure_while_it_closes_cancels_the_rest) {
    member m[] = {{.ms = NEVER}, {.ms = 10, .fail = 7}, {.ms = HOUR}};
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 3; i++) orch_scope_go(&s, work, &m[i]);
    CHECK_INT(close_of(&s), 7);
    all_ended(m, 3);
    CHECK_INT(orch_now(), 10);
}

SCOPE_TEST(a_failure_before_the_first_wait) {
    member m[] = {{.ms = NEVER}, {.fail = 7}};
    orch_scope s;
    orch_scope_open(&s, NULL);
    CHECK_INT(orch_scope_go(&s, work, &m[0]), 0);
    CHECK_INT(orch_scope_go(&s, work, &m[1]), 0); // it was started
    CHECK_INT(orch_scope_failures(&s), 1);
    CHECK_INT(orch_sleep(5), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), 7);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 0);
}

SCOPE_TEST(a_failure_that_nobody_waited_for_is_seen_at_the_close) {
    member m = {.fail = 7};
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, work, &m);
    CHECK_INT(close_of(&s), 7);
}

SCOPE_TEST(keep_going_lets_the_others_finish) {
    member m[] = {{.ms = 30}, {.ms = 10, .fail = 7}, {.ms = 20, .fail = 8}, {.ms = 40}};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    for (int i = 0; i < 4; i++) orch_scope_go(&s, work, &m[i]);
    CHECK_INT(orch_sleep(25), 0);
    CHECK_INT(orch_scope_failures(&s), 2);
    member late = {.ms = 50};
    CHECK_INT(orch_scope_go(&s, work, &late), 0);
    orch_result r = orch_scope_close(&s);
    all_ended(m, 4), all_ended(&late, 1);
    CHECK_INT(r.error, 7);
    CHECK_INT(orch_count(&r), 2);
    CHECK_INT(orch_at(&r, 1)->error, 8);
    CHECK_STR(orch_message(orch_at(&r, 1)), "failed with 8");
    orch_result_free(&r);
    CHECK_INT(orch_now(), 75);
    CHECK_INT(m[0].slept + m[3].slept + late.slept, 0);
}

SCOPE_TEST(cancelled_is_no_failure_when_it_was_asked_for) {
    member m[] = {{.ms = NEVER}, {.ms = NEVER, .fail_cancelled = 9}, {.ms = NEVER}};
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 3; i++) orch_scope_go(&s, work, &m[i]);
    orch_sleep(1);
    orch_scope_cancel(&s, 0);
    orch_result r = orch_scope_close(&s);
    all_ended(m, 3);
    CHECK_INT(r.error, 9); // one went wrong while it was cleaning up
    CHECK_INT(orch_count(&r), 1);
    orch_result_free(&r);
}

SCOPE_TEST(cancelled_is_a_failure_when_nobody_asked) {
    member m[] = {{.ms = NEVER}, {.ms = 10, .fail = ORCH_ECANCELED}};
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 2; i++) orch_scope_go(&s, work, &m[i]);
    orch_result r = orch_scope_close(&s);
    all_ended(m, 2);
    CHECK_INT(r.error, ORCH_ECANCELED);
    CHECK_INT(orch_count(&r), 1);
    orch_result_free(&r);
    CHECK_INT(orch_now(), 10);
}

SCOPE_TEST(sixteen_failures_are_kept_in_order_and_all_counted) {
    member m[20];
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    for (int i = 0; i < 20; i++) {
        m[i] = (member){.ms = 100 - (uint64_t)i, .fail = 100 + i};
        orch_scope_go(&s, work, &m[i]);
    }
    CHECK_INT(orch_sleep(200), 0);
    CHECK_INT(orch_scope_failures(&s), 20);
    for (size_t i = 0; i < ORCH_SCOPE_ERRORS; i++)
        CHECK_INT(orch_scope_error(&s, i)->error, 119 - (int)i);
    CHECK_INT(orch_scope_error(&s, ORCH_SCOPE_ERRORS)->error, ORCH_ERANGE);
    orch_result r = orch_scope_close(&s);
    all_ended(m, 20);
    CHECK_INT(r.error, 119);
    CHECK_INT(orch_count(&r), ORCH_SCOPE_ERRORS);
    for (size_t i = 0; i < ORCH_SCOPE_ERRORS; i++) {
        char text[32];
        snprintf(text, sizeof text, "failed with %d", 119 - (int)i);
        CHECK_STR(orch_message(orch_at(&r, i)), text);
    }
    CHECK_INT(orch_at(&r, ORCH_SCOPE_ERRORS)->error, ORCH_ERANGE);
    CHECK_INT(orch_at(&r, SIZE_MAX)->error, ORCH_ERANGE);
    orch_result_free(&r);
}

SCOPE_TEST(failures_at_once_are_all_counted) {
    member m[20];
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    for (int i = 0; i < 20; i++) {
        m[i] = (member){.ms = 10, .fail = 100 + i, .number = i};
        orch_scope_go(&s, work, &m[i]);
    }
    orch_result r = orch_scope_close(&s);
    all_ended(m, 20);
    CHECK_INT(orch_count(&r), ORCH_SCOPE_ERRORS);
    CHECK_INT(r.error, 100 + trace.at[0]);
    for (size_t i = 0; i < ORCH_SCOPE_ERRORS; i++) // in the order of their ends
        CHECK_INT(orch_at(&r, i)->error, 100 + trace.at[i]);
    orch_result_free(&r);
}

static orch_result fail_owning(void *arg) {
    orch_sleep((uint64_t)(uintptr_t)arg);
    void *detail = token();
    return (orch_result){.error = 5, .value = detail, .owner = detail, .release = give_back};
}

SCOPE_TEST(details_of_failures_live_as_long_as_the_result) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    for (uintptr_t i = 0; i < 20; i++) orch_scope_go(&s, fail_owning, (void *)i);
    orch_result r = orch_scope_close(&s);
    CHECK_INT(r.error, 5);
    for (size_t i = 0; i < orch_count(&r); i++)
        if (orch_at(&r, i)->error == 5)
            must(!is_given_back(orch_at(&r, i)->value), "detail is gone");
    for (int i = ORCH_SCOPE_ERRORS; i < issued; i++) CHECK_INT(tokens[i], 1); // not kept
    orch_result_free(&r);
    balance();
}

SCOPE_TEST(a_member_may_fail_after_the_body_was_cancelled_by_another) {
    member m[] = {{.ms = 10, .fail = 7}, {.ms = NEVER, .clean = 20, .fail_cancelled = 8}};
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 2; i++) orch_scope_go(&s, work, &m[i]);
    orch_result r = orch_scope_close(&s);
    all_ended(m, 2);
    CHECK_INT(r.error, 7);
    CHECK_INT(orch_count(&r), 2);
    CHECK_INT(orch_at(&r, 1)->error, 8);
    orch_result_free(&r);
    CHECK_INT(orch_now(), 30);
}

SCOPE_TEST(what_starts_in_a_failed_scope_is_refused) {
    member m[] = {{.fail = 7}, {.ms = 1}};
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, work, &m[0]);
    orch_yield();
    CHECK_INT(orch_scope_go(&s, work, &m[1]), ORCH_ECANCELED);
    CHECK_INT(m[1].started, 0);
    CHECK_INT(close_of(&s), 7);
}

SCOPE_TEST(failures_are_in_the_order_of_their_ends) {
    orch_scope s;
    orch_promise p;
    member m = {.fail = 2};
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    orch_scope_add(&s, orch_future_new(&p));
    orch_settle(p, orch_fail(1));
    orch_scope_go(&s, work, &m); // starts, and fails, after that
    CHECK_INT(orch_scope_error(&s, 0)->error, 1);
    CHECK_INT(orch_scope_error(&s, 1)->error, 2);
    orch_result r = orch_scope_close(&s);
    CHECK_INT(r.error, 1);
    CHECK_INT(orch_at(&r, 1)->error, 2);
    orch_result_free(&r);
}

SCOPE_TEST(a_failure_can_be_read_at_once) {
    orch_scope s;
    orch_promise p;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    orch_scope_add(&s, orch_future_new(&p));
    orch_settle(p, orch_failf(1, "one"));
    CHECK_INT(orch_scope_error(&s, 0)->error, 1); // without a call of orch_scope_failures
    CHECK_STR(orch_message(orch_scope_error(&s, 0)), "one");
    CHECK_INT(close_of(&s), 1);
}

SCOPE_TEST(a_kept_failure_outlives_its_scope_and_loop) {
    orch_scope s;
    member m = {.ms = 1, .fail = 7};
    orch_future *shared = orch_settled(orch_failf(6, "six"));
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    orch_scope_go(&s, work, &m);
    orch_scope_add(&s, orch_ref(shared));
    orch_result r = orch_scope_close(&s);
    orch_drop(shared);
    orch_scope_open(&s, NULL); // in the same slots
    orch_scope_add(&s, orch_settled(orch_failf(9, "nine")));
    CHECK_INT(close_of(&s), 9);
    CHECK_STR(orch_message(orch_at(&r, 0)), "six");
    CHECK_STR(orch_message(orch_at(&r, 1)), "failed with 7");
    orch_result_free(&r);
}

static orch_result close_result(void *arg) {
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_add(&s, orch_settled(orch_failf(6, "six %s", arg != NULL ? "more" : "less")));
    return orch_scope_close(&s);
}

TEST(the_result_of_a_close_may_leave_the_loop) {
    seed = 0, reset();
    orch_loop_desc desc = settings();
    orch_result r = orch_run_with(&desc, close_result, NULL);
    CHECK_INT(r.error, 6);
    CHECK_STR(orch_message(&r), "six less");
    CHECK_STR(orch_message(orch_at(&r, 0)), "six less");
    orch_result_free(&r);
}

SCOPE_TEST(the_result_of_a_close_passes_through_tasks_and_scopes) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    orch_scope_go(&s, close_result, NULL);
    orch_result inner = orch_await(orch_go(close_result, s.future));
    orch_result r = orch_scope_close(&s);
    CHECK_INT(r.error, 6);
    CHECK_STR(orch_message(orch_at(orch_at(&r, 0), 0)), "six less");
    CHECK_STR(orch_message(orch_at(&inner, 0)), "six more");
    orch_result_free(&inner);
    orch_result_free(&r);
}

static orch_result fail_with_share(void *arg) { return orch_chain(orch_ref(arg)); }

SCOPE_TEST(a_shared_failure) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, fail_with_share, f);
    orch_scope_go(&s, fail_with_share, f);
    orch_settle(p, orch_failf(9, "nine %d", 9));
    orch_result r = orch_scope_close(&s);
    CHECK_INT(r.error, 9);
    CHECK_STR(orch_message(&r), "nine 9");
    orch_drop(f);
    CHECK_STR(orch_message(orch_at(&r, 0)), "nine 9");
    orch_result_free(&r);
}

// ---- cancellation

SCOPE_TEST(cancel_with_a_reason) {
    member m[] = {{.ms = NEVER}, {.ms = NEVER, .deaf = true}, {.ms = NEVER, .clean = 5}};
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 3; i++) orch_scope_go(&s, work, &m[i]);
    CHECK_INT(orch_cancel_reason(), 0);
    orch_scope_cancel(&s, 42);
    CHECK_INT(orch_cancel_reason(), 42);
    CHECK_INT(orch_yield(), ORCH_ECANCELED);
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    orch_scope_cancel(&s, 43); // the first one stays
    CHECK_INT(orch_cancel_reason(), 42);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(m, 3);
    for (int i = 0; i < 3; i++) CHECK_INT(m[i].reason, 42);
    CHECK_INT(orch_now(), 5);
    CHECK_INT(orch_cancel_reason(), 0);
    CHECK_INT(orch_yield(), 0);
}

SCOPE_TEST(cancel_without_a_reason) {
    member m = {.ms = NEVER};
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, work, &m);
    orch_scope_cancel(&s, 0);
    CHECK_INT(orch_cancel_reason(), ORCH_ECANCELED);
    orch_result r = orch_scope_close(&s);
    all_ended(&m, 1);
    CHECK_INT(r.error, ORCH_ECANCELED);
    CHECK_INT(orch_count(&r), 0);
    CHECK_INT(m.reason, ORCH_ECANCELED);
    orch_result_free(&r);
}

static orch_result cancel_scope(void *arg) {
    member *m = arg;
    m->started++;
    m->slept = nap(m);
    orch_scope_cancel(m->scope, 50 + m->number);
    m->went = orch_sleep(1);
    return member_end(m);
}

SCOPE_TEST(a_member_cancels_its_scope) {
    orch_scope s;
    member m[] = {{.ms = 10, .number = 1, .scope = &s}, {.ms = NEVER}};
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, cancel_scope, &m[0]);
    orch_scope_go(&s, work, &m[1]);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(orch_cancel_reason(), 51);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(m, 2);
    CHECK_INT(m[0].went, ORCH_ECANCELED);
    CHECK_INT(m[1].reason, 51);
    CHECK_INT(orch_now(), 10);
}

SCOPE_TEST(a_member_cancels_its_scope_before_its_first_wait) {
    orch_scope s;
    member m[] = {{.ms = 0, .number = 1, .scope = &s}, {.ms = NEVER}};
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, work, &m[1]);
    CHECK_INT(orch_scope_go(&s, cancel_scope, &m[0]), 0);
    CHECK_INT(orch_cancel_reason(), 51);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(m, 2);
    CHECK_INT(m[0].went, ORCH_ECANCELED);
    CHECK_INT(orch_now(), 0);
}

SCOPE_TEST(every_wait_is_refused_until_the_scope_ends) {
    orch_scope s;
    orch_promise p;
    orch_scope_open(&s, NULL);
    orch_scope_cancel(&s, 0);
    for (int i = 0; i < 3; i++) {
        CHECK_INT(orch_yield(), ORCH_ECANCELED);
        CHECK_INT(orch_sleep(10), ORCH_ECANCELED);
        CHECK_INT(join(orch_after(10)), ORCH_ECANCELED);
        CHECK_INT(join(orch_future_new(&p)), ORCH_ECANCELED);
        CHECK(!orch_promise_pending(p)); // given up
        orch_future *f = orch_future_new(&p);
        CHECK_INT(orch_wait(f).error, ORCH_ECANCELED);
        CHECK(orch_is_settled(f) || orch_promise_pending(p)); // not given up
        orch_drop(f);
    }
    CHECK_INT(orch_now(), 0);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    CHECK_INT(orch_sleep(10), 0);
}

SCOPE_TEST(what_is_settled_is_delivered_in_a_cancelled_scope) {
    orch_scope s;
    orch_future *done = orch_settled(token_result()), *seen = orch_settled(orch_ok_int(3));
    orch_scope_open(&s, NULL);
    orch_scope_cancel(&s, 0);
    orch_result r = orch_await(done);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    r = orch_wait(seen);
    CHECK_INT(orch_int(&r), 3);
    orch_drop(seen);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
}

SCOPE_TEST(the_work_of_a_refused_wait_has_ended) {
    member m = {.ms = NEVER, .clean = 10};
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_future *f = orch_go(work, &m); // no member
    orch_scope_cancel(&s, 0);
    CHECK_INT(join(f), ORCH_ECANCELED);
    all_ended(&m, 1);
    CHECK_INT(orch_now(), 10);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
}

static orch_result middle(void *arg) {
    member *m = arg, *below = m->child;
    m->started++;
    orch_scope s;
    orch_scope_open(&s, NULL);
    if (below) orch_scope_go(&s, below->child ? middle : work, below);
    m->slept = nap(m);
    m->went = close_of(&s);
    if (below) all_ended(below, 1);
    return member_end(m);
}

SCOPE_TEST(cancel_reaches_everything_below) {
    member m[8];
    orch_scope s;
    for (int i = 0; i < 8; i++)
        m[i] = (member){.ms = NEVER, .number = i, .child = i < 7 ? &m[i + 1] : NULL};
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, middle, &m[0]);
    CHECK_INT(orch_sleep(10), 0);
    orch_scope_cancel(&s, 66);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(m, 8);
    CHECK_INT(orch_now(), 10);
    for (int i = 0; i < 8; i++) CHECK_INT(m[i].reason, 66), CHECK_INT(m[i].slept, ORCH_ECANCELED);
    for (int i = 0; i < 7; i++) CHECK_INT(m[i].went, ORCH_ECANCELED);
}

SCOPE_TEST(cancelling_a_task_cancels_its_scopes) {
    member m[3];
    for (int i = 0; i < 3; i++)
        m[i] = (member){.ms = NEVER, .number = i, .child = i < 2 ? &m[i + 1] : NULL};
    orch_future *f = orch_go(middle, &m[0]);
    CHECK_INT(orch_sleep(10), 0);
    orch_cancel(f, 67);
    CHECK_INT(join(f), ORCH_ECANCELED);
    all_ended(m, 3);
    for (int i = 0; i < 3; i++) CHECK_INT(m[i].reason, 67);
    for (int i = 0; i < 2; i++) CHECK_INT(m[i].went, ORCH_ECANCELED);
    CHECK_INT(orch_now(), 10);
}

SCOPE_TEST(dropping_a_task_ends_its_scopes_first) {
    member m[3];
    for (int i = 0; i < 3; i++)
        m[i] = (member){.ms = NEVER, .number = i, .clean = 5, .child = i < 2 ? &m[i + 1] : NULL};
    orch_future *f = orch_go(middle, &m[0]);
    CHECK_INT(orch_sleep(10), 0);
    orch_drop(f);
    all_ended(m, 3);
    for (int i = 0; i < 3; i++) CHECK_INT(m[i].started, 1);
    CHECK_INT(m[2].end, 15);
    CHECK_INT(orch_now(), 25);
}

SCOPE_TEST(the_scopes_of_a_loser_end_before_the_race) {
    member m[3];
    for (int i = 0; i < 3; i++)
        m[i] = (member){.ms = NEVER, .number = i, .clean = 5, .child = i < 2 ? &m[i + 1] : NULL};
    orch_result r = orch_await(orch_race(orch_go(middle, &m[0]), orch_after(10)));
    all_ended(m, 3);
    CHECK_INT(r.index, 1);
    orch_result_free(&r);
    CHECK_INT(orch_now(), 25);
}

SCOPE_TEST(a_timeout_around_a_task_reaches_its_scopes) {
    member m[2] = {{.ms = NEVER, .child = &m[1]}, {.ms = NEVER}};
    CHECK_INT(join(orch_timeout(orch_go(middle, &m[0]), 30)), ORCH_ETIMEDOUT);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 30);
}

SCOPE_TEST(an_inner_scope_cancelled_leaves_the_outer_alone) {
    orch_scope outer, inner;
    member m[] = {{.ms = 50}, {.ms = NEVER}};
    orch_scope_open(&outer, NULL);
    orch_scope_go(&outer, work, &m[0]);
    orch_scope_open(&inner, NULL);
    orch_scope_go(&inner, work, &m[1]);
    orch_scope_cancel(&inner, 5);
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    CHECK_INT(close_of(&inner), ORCH_ECANCELED);
    all_ended(&m[1], 1);
    CHECK_INT(orch_cancel_reason(), 0);
    CHECK_INT(orch_sleep(10), 0);
    CHECK_INT(m[0].done, 0);
    CHECK_INT(close_of(&outer), 0);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 50);
}

SCOPE_TEST(an_inner_failure_leaves_the_outer_alone) {
    orch_scope outer, inner;
    member m[] = {{.ms = 50}, {.ms = 10, .fail = 3}};
    orch_scope_open(&outer, NULL);
    orch_scope_go(&outer, work, &m[0]);
    orch_scope_open(&inner, NULL);
    orch_scope_go(&inner, work, &m[1]);
    CHECK_INT(close_of(&inner), 3);
    CHECK_INT(orch_scope_failures(&outer), 0);
    CHECK_INT(orch_sleep(10), 0);
    CHECK_INT(close_of(&outer), 0);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 50);
}

SCOPE_TEST(the_outer_scope_cancelled_reaches_the_inner_one) {
    orch_scope outer, inner;
    member m[] = {{.ms = NEVER}, {.ms = NEVER}};
    orch_scope_open(&outer, NULL);
    orch_scope_open(&inner, NULL);
    orch_scope_go(&outer, work, &m[0]);
    orch_scope_go(&inner, work, &m[1]);
    orch_scope_cancel(&outer, 5);
    CHECK_INT(orch_cancel_reason(), 5);
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    CHECK_INT(close_of(&inner), ORCH_ECANCELED);
    all_ended(&m[1], 1);
    CHECK_INT(m[1].reason, 5);
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED); // still inside the outer one
    CHECK_INT(close_of(&outer), ORCH_ECANCELED);
    all_ended(m, 2);
    CHECK_INT(orch_sleep(1), 0);
}

SCOPE_TEST(a_cancelled_scope_may_open_others) {
    orch_scope outer, inner;
    member m = {.ms = NEVER};
    orch_scope_open(&outer, NULL);
    orch_scope_cancel(&outer, 5);
    CHECK_INT(orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 10}), 0);
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    CHECK_INT(orch_cancel_reason(), 5);
    CHECK_INT(orch_scope_go(&inner, work, &m), ORCH_ECANCELED);
    CHECK_INT(m.started, 0);
    CHECK_INT(close_of(&inner), ORCH_ECANCELED);
    CHECK_INT(close_of(&outer), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 0);
}

typedef struct victim {
    int slept, opened, went, inside, closed, after;
    member member;
} victim;

static orch_result open_when_cancelled(void *arg) {
    victim *v = arg;
    orch_scope s;
    v->slept = orch_sleep(HOUR);
    v->opened = orch_scope_open(&s, NULL);
    v->went = orch_scope_go(&s, work, &v->member);
    v->inside = orch_sleep(1);
    v->closed = close_of(&s);
    v->after = orch_sleep(1);
    all_ended(&v->member, 1);
    return orch_ok_int(2);
}

SCOPE_TEST(a_cancelled_task_may_open_scopes) {
    victim v = {.member = {.ms = NEVER}};
    orch_future *f = orch_go(open_when_cancelled, &v);
    orch_cancel(f, 9);
    CHECK_INT(join(f), 2);
    CHECK_INT(v.slept, ORCH_ECANCELED);
    CHECK_INT(v.opened, 0);
    CHECK_INT(v.went, ORCH_ECANCELED);
    CHECK_INT(v.member.started, 0);
    CHECK_INT(v.inside, ORCH_ECANCELED);
    CHECK_INT(v.closed, ORCH_ECANCELED);
    CHECK_INT(v.after, ORCH_ECANCELED);
    CHECK_INT(orch_now(), 0);
}

static orch_result close_twice_cancelled(void *arg) {
    member *m = arg;
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, work, m);
    int first = close_of(&s); // is cancelled while it closes
    all_ended(m, 1);
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    return orch_ok_int(first);
}

SCOPE_TEST(cancelled_while_it_closes) {
    member m = {.ms = NEVER, .clean = 5};
    orch_future *f = orch_go(close_twice_cancelled, &m);
    orch_sleep(10);
    orch_cancel(f, 0);
    orch_result r = orch_await(f);
    CHECK_INT(orch_int(&r), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 15);
    orch_result_free(&r);
}

SCOPE_TEST(a_scope_cancelled_while_it_closes) {
    orch_scope s;
    member m[] = {{.ms = NEVER, .clean = 5, .number = 1}, {.ms = 10, .number = 2, .scope = &s}};
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, work, &m[0]);
    orch_scope_go(&s, cancel_scope, &m[1]);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 15);
    CHECK_INT(orch_sleep(1), 0);
}

SCOPE_TEST(clean_up_of_members_is_waited_for) {
    member m[] = {{.ms = NEVER, .clean = 100}, {.ms = NEVER, .clean = 50, .deaf = true}};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 10});
    for (int i = 0; i < 2; i++) orch_scope_go(&s, work, &m[i]);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    all_ended(m, 2);
    CHECK_INT(m[0].cleaned + m[1].cleaned, 0);
    CHECK_INT(m[0].end, 110);
    CHECK_INT(orch_now(), 110);
}

static orch_result stubborn(void *arg) {
    member *m = arg;
    m->started++;
    for (int i = 0; i < 3000; i++) m->slept = orch_sleep(1); // a thousand refusals and more
    return member_end(m);
}

SCOPE_TEST_OF(a_member_that_ignores_cancellation, 3, (void)different) {
    member m = {.number = 1}, beside = {.ms = NEVER, .clean = 10, .number = 2};
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_task_desc desc = {.name = "mule", .fn = stubborn, .arg = &m};
    orch_scope_cancel(&s, 0);
    CHECK_INT(orch_scope_go_with(&s, &desc), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    orch_scope_open(&s, NULL);
    orch_scope_go_with(&s, &desc);
    orch_scope_go(&s, work, &beside);
    orch_scope_cancel(&s, 0);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(&m, 1), all_ended(&beside, 1);
    CHECK(strstr(report, "mule") != NULL); // once, by its name
    CHECK(strstr(report, "mule") == NULL || strstr(strstr(report, "mule") + 1, "mule") == NULL);
}

SCOPE_TEST(a_body_that_ignores_cancellation_can_close) {
    orch_scope s;
    member m = {.ms = NEVER, .clean = 10};
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, work, &m);
    orch_scope_cancel(&s, 0);
    for (int i = 0; i < 10; i++) CHECK_INT(orch_sleep(10), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(&m, 1);
    CHECK_INT(orch_now(), 10);
}

static orch_result drop_parent(void *arg) {
    member *m = arg;
    m->started++;
    m->slept = nap(m);
    if (parent) orch_cancel(parent, 31);
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED); // it is below its parent
    m->went = orch_cancel_reason();
    return member_end(m);
}

static orch_result parent_task(void *arg) {
    member *m = arg;
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, drop_parent, m);
    orch_sleep(HOUR);
    CHECK_INT(orch_cancel_reason(), 31);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(m, 1);
    return orch_ok_int(4);
}

SCOPE_TEST(a_member_cancels_the_parent_task) {
    member m = {.ms = 10};
    parent = orch_go(parent_task, &m);
    CHECK_INT(join(orch_ref(parent)), 4);
    CHECK_INT(m.went, 31);
    CHECK_INT(orch_now(), 10);
    orch_drop(parent);
}

static orch_result drop_handle(void *arg) {
    member *m = arg;
    m->started++;
    m->slept = nap(m);
    orch_future *last = parent; // its last handle: but it cannot end before this task does
    parent = NULL;
    orch_drop(last);
    m->went = 1;
    return member_end(m);
}

static orch_result dropped_parent(void *arg) {
    member *m = arg;
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, drop_handle, m);
    orch_sleep(HOUR);
    close_of(&s);
    note(99);
    all_ended(m, 1);
    return orch_ok_int(4);
}

// A circle: each waits for the end of the other. It must be reported and not run on, or be cut.
TEST(a_member_drops_the_last_handle_of_its_parent) {
    seed = 0;
    for (int i = 0; i < 2; i++) {
        reset();
        member m = {.ms = 10};
        orch_loop_desc desc = settings();
        orch_loop *loop = orch_loop_new(&desc);
        if (!CHECK(loop != NULL)) return;
        parent = orch_go(dropped_parent, &m);
        int error = orch_loop_run(loop);
        CHECK(error == 0 || error == ORCH_EDEADLK);
        if (error == 0) all_ended(&m, 1);
        else CHECK(report[0] != '\0');
        orch_drop(parent); // when memory was refused
        error = orch_loop_free(loop);
        CHECK(error == 0 || error == ORCH_EBUSY);
        if (error) return; // TODO: nothing can end it
    }
}

// ---- deadlines

SCOPE_TEST(a_deadline_cancels_members_and_body) {
    member m[] = {{.ms = NEVER}, {.ms = 50}};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.name = "slow", .timeout_ms = 100});
    for (int i = 0; i < 2; i++) orch_scope_go(&s, work, &m[i]);
    CHECK_INT(m[0].left, 100);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 100);
    CHECK(orch_cancel_reason() != 0);
    CHECK_INT(orch_time_left(), 0);
    orch_result r = orch_scope_close(&s);
    all_ended(m, 2);
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    orch_result_free(&r);
    CHECK_INT(m[0].slept, ORCH_ECANCELED);
    CHECK_INT(m[0].end, 100);
    CHECK_INT(m[1].slept, 0);
    CHECK_INT(orch_time_left(), NEVER);
    CHECK_INT(orch_sleep(1), 0);
}

SCOPE_TEST(a_deadline_of_a_body_alone) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), 100);
}

SCOPE_TEST(a_deadline_while_it_closes) {
    member m[] = {{.ms = NEVER}, {.ms = 10}};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    for (int i = 0; i < 2; i++) orch_scope_go(&s, work, &m[i]);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 100);
}

SCOPE_TEST(a_deadline_that_is_met) {
    member m[] = {{.ms = 99}, {.ms = 10}};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    for (int i = 0; i < 2; i++) orch_scope_go(&s, work, &m[i]);
    CHECK_INT(close_of(&s), 0);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 99);
    CHECK_INT(stats().timers, 0);
    CHECK_INT(orch_sleep(HOUR), 0); // nothing comes later
}

SCOPE_TEST(a_failure_before_the_deadline_is_what_counts) {
    member m[] = {{.ms = 10, .fail = 7}, {.ms = NEVER}};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    for (int i = 0; i < 2; i++) orch_scope_go(&s, work, &m[i]);
    CHECK_INT(close_of(&s), 7);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 10);
}

SCOPE_TEST(a_deadline_with_failures_lists_them) {
    member m[] = {{.ms = 10, .fail = 7}, {.ms = NEVER, .fail_cancelled = 8}, {.ms = NEVER}};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100, .keep_going = true});
    for (int i = 0; i < 3; i++) orch_scope_go(&s, work, &m[i]);
    orch_result r = orch_scope_close(&s);
    all_ended(m, 3);
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    CHECK_INT(orch_count(&r), 2);
    CHECK_INT(orch_at(&r, 0)->error, 7);
    CHECK_INT(orch_at(&r, 1)->error, 8);
    CHECK(strstr(orch_message(&r), "100") != NULL || !strcmp(orch_message(&r), "timed out"));
    orch_result_free(&r);
}

SCOPE_TEST(a_deadline_and_a_sleep_that_end_together) {
    member m[] = {{.ms = 100}, {.ms = 100}};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    for (int i = 0; i < 2; i++) orch_scope_go(&s, work, &m[i]);
    int slept = orch_sleep(100), error = close_of(&s);
    all_ended(m, 2);
    CHECK(error == 0 || error == ORCH_ETIMEDOUT);
    CHECK(slept == 0 || error != 0);
    CHECK((m[0].slept == 0 && m[1].slept == 0) || error != 0);
    CHECK_INT(orch_now(), 100);
}

static orch_result deadline_in_real_time(void *arg) {
    orch_scope s;
    uint64_t start = orch_now();
    if (orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 5}) != 0) return orch_ok_int(1);
    CHECK_INT(orch_scope_add(&s, orch_after(HOUR)), 0);
    CHECK(orch_time_left() <= 5);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    CHECK(orch_now() - start >= 5);
    return orch_ok_int(arg == NULL);
}

TEST(a_deadline_in_real_time) {
    orch_result r = orch_run(deadline_in_real_time, NULL);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
}

SCOPE_TEST(the_nearest_deadline_counts_inner) {
    orch_scope outer, inner;
    member m = {.ms = NEVER};
    orch_scope_open(&outer, &(orch_scope_desc){.timeout_ms = 100});
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 30});
    CHECK_INT(orch_time_left(), 30);
    orch_scope_go(&inner, work, &m);
    CHECK_INT(m.left, 30);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 30);
    CHECK_INT(close_of(&inner), ORCH_ETIMEDOUT);
    all_ended(&m, 1);
    CHECK_INT(orch_time_left(), 70);
    CHECK_INT(orch_sleep(50), 0);
    CHECK_INT(orch_sleep(50), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 100);
    CHECK_INT(close_of(&outer), ORCH_ETIMEDOUT);
}

SCOPE_TEST(the_nearest_deadline_counts_outer) {
    orch_scope outer, inner;
    member m[] = {{.ms = NEVER}, {.ms = NEVER}};
    orch_scope_open(&outer, &(orch_scope_desc){.timeout_ms = 30});
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 100});
    CHECK_INT(orch_time_left(), 30);
    orch_scope_go(&inner, work, &m[0]);
    orch_scope_go(&outer, work, &m[1]);
    CHECK_INT(m[0].left, 30);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 30);
    CHECK_INT(close_of(&inner), ORCH_ECANCELED); // its own deadline is yet to come
    all_ended(&m[0], 1);
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    CHECK_INT(close_of(&outer), ORCH_ETIMEDOUT);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 30);
}

SCOPE_TEST(equal_deadlines_of_nested_scopes) {
    orch_scope outer, inner;
    member m[] = {{.ms = NEVER}, {.ms = NEVER}};
    orch_scope_open(&outer, &(orch_scope_desc){.timeout_ms = 30});
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 30});
    orch_scope_go(&inner, work, &m[0]);
    orch_scope_go(&outer, work, &m[1]);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(close_of(&inner), ORCH_ETIMEDOUT); // which fires first does not matter
    all_ended(&m[0], 1);
    CHECK_INT(close_of(&outer), ORCH_ETIMEDOUT);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 30);
    CHECK_INT(orch_sleep(1), 0);
}

SCOPE_TEST(equal_deadlines_of_ten_scopes) {
    enum { DEPTH = 10 };
    orch_scope s[DEPTH];
    for (int i = 0; i < DEPTH; i++) orch_scope_open(&s[i], &(orch_scope_desc){.timeout_ms = 30});
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    for (int i = DEPTH; i-- > 0;) {
        int error = close_of(&s[i]);
        CHECK(error == ORCH_ETIMEDOUT || (i && error == ORCH_ECANCELED));
        CHECK_INT(orch_sleep(1), i ? ORCH_ECANCELED : 0);
    }
    CHECK_INT(orch_now(), 31);
}

SCOPE_TEST(an_outer_deadline_while_the_inner_one_closes) {
    orch_scope outer, inner;
    member m = {.ms = NEVER, .clean = 20};
    orch_scope_open(&outer, &(orch_scope_desc){.timeout_ms = 30});
    orch_scope_open(&inner, NULL);
    orch_scope_go(&inner, work, &m);
    CHECK_INT(close_of(&inner), ORCH_ECANCELED);
    all_ended(&m, 1);
    CHECK_INT(orch_now(), 50);
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    CHECK_INT(close_of(&outer), ORCH_ETIMEDOUT);
}

SCOPE_TEST(extend_later_and_sooner) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 10});
    CHECK_INT(orch_sleep(5), 0);
    CHECK_INT(orch_scope_extend(&s, 100), 0);
    CHECK_INT(orch_time_left(), 100);
    CHECK_INT(orch_sleep(50), 0);
    CHECK_INT(orch_time_left(), 50);
    CHECK_INT(orch_scope_extend(&s, 20), 0);
    CHECK_INT(orch_time_left(), 20);
    CHECK_INT(orch_sleep(50), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 75);
    CHECK_INT(orch_scope_extend(&s, 100), ORCH_ECANCELED); // too late
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
}

SCOPE_TEST(extend_gives_and_takes_a_deadline) {
    orch_scope s;
    orch_scope_open(&s, NULL);
    CHECK_INT(orch_time_left(), NEVER);
    CHECK_INT(orch_scope_extend(&s, 10), 0);
    CHECK_INT(orch_time_left(), 10);
    CHECK_INT(orch_scope_extend(&s, NEVER), 0);
    CHECK_INT(orch_time_left(), NEVER);
    CHECK_INT(orch_sleep(HOUR), 0);
    CHECK_INT(orch_scope_extend(&s, NEVER), 0);
    CHECK_INT(orch_scope_extend(&s, NEVER - 1), 0); // as good as never
    CHECK(orch_time_left() > HOUR);
    CHECK_INT(orch_sleep(HOUR), 0);
    CHECK_INT(orch_scope_extend(&s, 0), 0); // now
    CHECK_INT(orch_time_left(), 0);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 2 * HOUR);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
}

static orch_result extend_scope(void *arg) {
    member *m = arg;
    m->started++;
    m->slept = nap(m);
    m->went = orch_scope_extend(m->scope, m->clean);
    m->clean = 0;
    return member_end(m);
}

SCOPE_TEST(a_member_moves_the_deadline_while_it_closes) {
    static const uint64_t to[] = {200, 5, 0, NEVER};
    static const uint64_t ends[] = {210, 15, 10, 300};
    for (int i = 0; i < 4; i++) {
        orch_scope s;
        uint64_t start = orch_now();
        member m[] = {{.ms = 10, .clean = to[i], .scope = &s}, {.ms = 300}};
        orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 50});
        orch_scope_go(&s, extend_scope, &m[0]);
        orch_scope_go(&s, work, &m[1]);
        CHECK_INT(close_of(&s), i == 3 ? 0 : ORCH_ETIMEDOUT);
        all_ended(m, 2);
        CHECK_INT(m[0].went, 0);
        CHECK_INT(orch_now() - start, ends[i]);
    }
}

SCOPE_TEST(extend_in_a_cancelled_scope) {
    orch_scope outer, inner;
    orch_scope_open(&outer, &(orch_scope_desc){.timeout_ms = 10});
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 20});
    orch_scope_cancel(&outer, 0);
    CHECK_INT(orch_scope_extend(&outer, 100), ORCH_ECANCELED);
    CHECK_INT(orch_scope_extend(&inner, 100), ORCH_ECANCELED);
    CHECK_INT(orch_time_left(), 0);
    CHECK_INT(close_of(&inner), ORCH_ECANCELED);
    CHECK_INT(close_of(&outer), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 0);
}

SCOPE_TEST(extend_of_the_outer_scope_while_inside_the_inner_one) {
    orch_scope outer, inner;
    orch_scope_open(&outer, &(orch_scope_desc){.timeout_ms = 10});
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 100});
    CHECK_INT(orch_time_left(), 10);
    CHECK_INT(orch_scope_extend(&outer, 200), 0);
    CHECK_INT(orch_time_left(), 100);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 100);
    CHECK_INT(close_of(&inner), ORCH_ETIMEDOUT);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(close_of(&outer), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), 200);
}

SCOPE_TEST(time_left) {
    orch_scope s[4];
    member m = {.ms = 1};
    static const uint64_t ms[] = {100, 40, 0, 60};
    CHECK_INT(orch_time_left(), NEVER);
    for (int i = 0; i < 4; i++) orch_scope_open(&s[i], &(orch_scope_desc){.timeout_ms = ms[i]});
    CHECK_INT(orch_time_left(), 40);
    orch_scope_go(&s[0], work, &m); // one that is not inside the nearer ones
    CHECK_INT(m.left, 100);
    CHECK_INT(orch_sleep(30), 0);
    CHECK_INT(orch_time_left(), 10);
    CHECK_INT(close_of(&s[3]), 0);
    CHECK_INT(close_of(&s[2]), 0);
    CHECK_INT(orch_time_left(), 10);
    CHECK_INT(close_of(&s[1]), 0);
    CHECK_INT(orch_time_left(), 70);
    orch_scope_cancel(&s[0], 0);
    CHECK_INT(orch_time_left(), 0);
    CHECK_INT(close_of(&s[0]), ORCH_ECANCELED);
    CHECK_INT(orch_time_left(), NEVER);
}

static void time_left_in_callback(orch_result *in, void *context) {
    if (in->error == 0) *(uint64_t *)context = orch_time_left();
}

SCOPE_TEST(time_left_in_a_callback) {
    static uint64_t left;
    orch_scope s;
    left = 0;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    orch_on(orch_settled(orch_ok_int(1)), time_left_in_callback, &left);
    CHECK_INT(orch_sleep(1), 0);
    CHECK_INT(left, NEVER);
    CHECK_INT(close_of(&s), 0);
}

SCOPE_TEST(a_long_deadline_does_not_overflow) {
    static const uint64_t ms[] = {NEVER, NEVER - 1, NEVER / 2, NEVER / 1000000,
                                  NEVER / 1000000 + 1};
    for (int i = 0; i < 5; i++) {
        orch_scope s;
        CHECK_INT(orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = ms[i]}), 0);
        CHECK(orch_time_left() > (uint64_t)HOUR * 1000000);
        CHECK_INT(orch_sleep(1000), 0);
        CHECK_INT(close_of(&s), 0);
    }
}

// ---- orch_go copies the deadline, orch_spawn does not

SCOPE_TEST(go_copies_the_deadline_that_is_in_force) {
    orch_scope outer, inner;
    member m[] = {{.ms = NEVER}, {.ms = NEVER}, {.ms = NEVER}};
    CHECK_INT(orch_sleep(1000), 0);
    orch_scope_open(&outer, &(orch_scope_desc){.timeout_ms = 100});
    orch_future *a = orch_go(work, &m[0]); // the deadline was just made
    CHECK_INT(orch_sleep(10), 0);
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 50});
    CHECK_INT(orch_sleep(5), 0);
    orch_future *b = orch_go(work, &m[1]);
    CHECK_INT(close_of(&inner), 0);
    orch_future *c = orch_go(work, &m[2]);
    CHECK_INT(close_of(&outer), 0); // they are no members
    CHECK_INT(orch_now(), 1015);
    CHECK_INT(m[0].left, 100);
    CHECK_INT(m[1].left, 45);
    CHECK_INT(m[2].left, 85);
    CHECK_INT(join(b), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 1060);
    CHECK_INT(join(a), ORCH_ECANCELED);
    CHECK_INT(join(c), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 1100);
    for (int i = 0; i < 3; i++) CHECK(m[i].reason != 0);
    all_ended(m, 3);
}

SCOPE_TEST(go_keeps_the_copy_when_the_deadline_is_moved) {
    orch_scope s;
    member m[] = {{.ms = NEVER}, {.ms = NEVER}};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    orch_future *a = orch_go(work, &m[0]);
    CHECK_INT(orch_scope_extend(&s, 50), 0);
    orch_future *b = orch_go(work, &m[1]);
    CHECK_INT(orch_scope_extend(&s, NEVER), 0);
    CHECK_INT(m[0].left, 100);
    CHECK_INT(m[1].left, 50);
    CHECK_INT(join(a), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 100);
    CHECK(orch_is_settled(b));
    CHECK_INT(m[1].end, 50);
    orch_drop(b);
    CHECK_INT(close_of(&s), 0);
    all_ended(m, 2);
}

SCOPE_TEST(go_when_the_deadline_has_expired) {
    orch_scope s;
    member m[] = {{.ms = NEVER}, {.ms = NEVER}};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 10});
    CHECK_INT(orch_sleep(20), ORCH_ECANCELED);
    orch_future *a = orch_go(work, &m[0]);
    orch_drop(a);
    all_ended(m, 1);
    orch_future *b = orch_go(work, &m[1]);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), 10);
    CHECK_INT(join(b), ORCH_ECANCELED);
    all_ended(m, 2);
    CHECK_INT(orch_now(), 10);
}

static orch_result go_deeper(void *arg) {
    member *m = arg;
    m->started++, m->left = orch_time_left();
    orch_future *f = m->child ? orch_go(go_deeper, m->child) : NULL;
    m->slept = orch_sleep(HOUR);
    orch_drop(f);
    return member_end(m);
}

SCOPE_TEST(the_copy_is_copied_again) {
    member m[4];
    orch_scope s;
    for (int i = 0; i < 4; i++) m[i] = (member){.child = i < 3 ? &m[i + 1] : NULL};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    orch_future *f = orch_go(go_deeper, &m[0]);
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(join(f), ORCH_ECANCELED);
    all_ended(m, 4);
    for (int i = 0; i < 4; i++) CHECK_INT(m[i].left, 100), CHECK_INT(m[i].end, 100);
}

static orch_result go_from_member(void *arg) {
    member *m = arg;
    m->started++, m->left = orch_time_left();
    join(orch_go(work, m->child));
    m->slept = orch_sleep(0);
    return member_end(m);
}

SCOPE_TEST(go_copies_the_deadline_of_the_scope_that_a_member_is_in) {
    orch_scope outer, inner;
    member m[] = {{.child = &m[1]}, {.ms = NEVER}};
    orch_scope_open(&outer, &(orch_scope_desc){.timeout_ms = 50});
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 80});
    CHECK_INT(orch_sleep(10), 0);
    orch_scope_go(&inner, go_from_member, &m[0]);
    CHECK_INT(close_of(&inner), ORCH_ECANCELED);
    all_ended(m, 2);
    CHECK_INT(close_of(&outer), ORCH_ETIMEDOUT);
    CHECK_INT(m[0].left, 40);
    CHECK_INT(m[1].left, 40);
    CHECK_INT(m[1].end, 50);
}

static orch_result open_in_go(void *arg) {
    member *m = arg;
    orch_scope s;
    m->started++;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = m->ms});
    m->left = orch_time_left();
    m->slept = orch_sleep(HOUR);
    m->went = close_of(&s);
    m->cleaned = orch_sleep(1);
    return member_end(m);
}

SCOPE_TEST(the_copy_and_scopes_of_the_task) {
    member m[] = {{.ms = 20}, {.ms = 200}};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    orch_future *a = orch_go(open_in_go, &m[0]), *b = orch_go(open_in_go, &m[1]);
    CHECK_INT(close_of(&s), 0);
    join(a), join(b);
    all_ended(m, 2);
    CHECK_INT(m[0].left, 20);
    CHECK_INT(m[0].went, ORCH_ETIMEDOUT);
    CHECK_INT(m[0].cleaned, 0);
    CHECK_INT(m[1].left, 100);
    CHECK_INT(m[1].went, ORCH_ECANCELED);
    CHECK_INT(m[1].cleaned, ORCH_ECANCELED); // the task's own deadline
    CHECK_INT(m[1].end, 100);
}

SCOPE_TEST(go_without_a_deadline_has_none) {
    member m = {.ms = 10};
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_future *f = orch_go(work, &m);
    CHECK_INT(close_of(&s), 0);
    join(f);
    CHECK_INT(m.left, NEVER);
    CHECK_INT(m.slept, 0);
}

SCOPE_TEST(spawn_inherits_no_deadline) {
    member m = {.ms = 200};
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    CHECK_INT(orch_spawn(work, &m), 0);
    CHECK_INT(m.left, NEVER);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    CHECK_INT(m.done, 0); // nor is it a member
    CHECK_INT(orch_sleep(150), 0);
    CHECK_INT(m.slept, 0);
    CHECK_INT(m.end, 200);
}

SCOPE_TEST(a_member_has_the_deadline_of_its_scope_only) {
    member m = {.ms = 50};
    orch_scope outer, inner;
    orch_scope_open(&outer, NULL);
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 10});
    orch_scope_go(&outer, work, &m); // from inside the inner one
    CHECK_INT(m.left, NEVER);
    CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
    CHECK_INT(close_of(&inner), ORCH_ETIMEDOUT);
    CHECK_INT(close_of(&outer), 0);
    CHECK_INT(m.end, 50);
}

static orch_result deadline_follows(void *arg) {
    member *m = arg;
    m->started++;
    m->slept = orch_sleep(20);
    m->left = orch_time_left();
    return member_end(m);
}

SCOPE_TEST(a_member_sees_the_deadline_move) {
    orch_scope s;
    member m = {.ms = 0};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
    orch_scope_go(&s, deadline_follows, &m);
    CHECK_INT(orch_scope_extend(&s, 500), 0);
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(m.left, 480);
}

// ---- shields

typedef struct shielded {
    int sleeps[8];
    uint64_t lefts[8];
    member member[2];
    int closed, went;
    uint64_t timeout, nap;
} shielded;

static orch_result scope_in_shield(void *arg) {
    shielded *s = arg;
    orch_scope inner;
    s->sleeps[0] = orch_sleep(HOUR);
    orch_shield_begin();
    s->lefts[0] = orch_time_left();
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = s->timeout});
    s->lefts[1] = orch_time_left();
    s->went = orch_scope_go(&inner, work, &s->member[0]);
    s->sleeps[1] = orch_sleep(s->nap);
    s->closed = close_of(&inner);
    all_ended(s->member, 1);
    s->sleeps[2] = orch_sleep(1);
    orch_shield_end();
    s->sleeps[3] = orch_sleep(1);
    return orch_ok_int(1);
}

SCOPE_TEST(shield_opens_a_scope_in_a_cancelled_task) {
    shielded v = {.member = {{.ms = 20}}, .nap = 10};
    orch_future *f = orch_go(scope_in_shield, &v);
    orch_cancel(f, 3);
    CHECK_INT(join(f), 1);
    CHECK_INT(v.sleeps[0], ORCH_ECANCELED);
    CHECK_INT(v.went, 0);
    CHECK_INT(v.member[0].slept, 0);
    CHECK_INT(v.sleeps[1], 0);
    CHECK_INT(v.closed, 0);
    CHECK_INT(v.sleeps[2], 0);
    CHECK_INT(v.sleeps[3], ORCH_ECANCELED);
    CHECK_INT(v.lefts[0], NEVER);
    CHECK_INT(v.lefts[1], NEVER);
    CHECK_INT(v.member[0].left, NEVER);
    CHECK_INT(orch_now(), 21);
}

SCOPE_TEST(shield_own_deadline_of_a_scope_inside_counts) {
    shielded v = {.member = {{.ms = NEVER}}, .nap = HOUR, .timeout = 30};
    orch_future *f = orch_go(scope_in_shield, &v);
    orch_cancel(f, 3);
    CHECK_INT(join(f), 1);
    CHECK_INT(v.went, 0);
    CHECK_INT(v.member[0].slept, ORCH_ECANCELED);
    CHECK_INT(v.sleeps[1], ORCH_ECANCELED);
    CHECK_INT(v.closed, ORCH_ETIMEDOUT);
    CHECK_INT(v.sleeps[2], 0);
    CHECK_INT(v.sleeps[3], ORCH_ECANCELED);
    CHECK_INT(v.lefts[1], 30);
    CHECK_INT(orch_now(), 31);
}

SCOPE_TEST(shield_keeps_the_outer_deadline_out) {
    orch_scope outer, inner;
    member m = {.ms = 50};
    orch_scope_open(&outer, &(orch_scope_desc){.timeout_ms = 20});
    orch_shield_begin();
    CHECK_INT(orch_time_left(), NEVER);
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 100});
    CHECK_INT(orch_time_left(), 100);
    orch_scope_go(&inner, work, &m);
    CHECK_INT(m.left, 100);
    CHECK_INT(orch_sleep(30), 0); // past the outer deadline
    CHECK_INT(close_of(&inner), 0);
    all_ended(&m, 1);
    CHECK_INT(m.slept, 0);
    CHECK_INT(orch_now(), 50);
    orch_shield_end();
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    CHECK_INT(close_of(&outer), ORCH_ETIMEDOUT);
}

SCOPE_TEST(shield_keeps_the_outer_cancel_out) {
    orch_scope outer, inner;
    member m[] = {{.ms = 50, .number = 1},
                  {.ms = 10, .scope = &outer, .number = 2},
                  {.ms = NEVER, .number = 3}};
    orch_scope_open(&outer, NULL);
    orch_scope_go(&outer, cancel_scope, &m[1]);
    orch_scope_go(&outer, work, &m[2]);
    orch_shield_begin();
    orch_scope_open(&inner, NULL);
    orch_scope_go(&inner, work, &m[0]);
    CHECK_INT(orch_sleep(20), 0);
    CHECK(m[2].done);                    // it is not inside the shield
    CHECK_INT(orch_cancel_reason(), 52); // "shielded or not"
    CHECK_INT(close_of(&inner), 0);
    CHECK_INT(m[0].slept, 0);
    orch_shield_end();
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    CHECK_INT(close_of(&outer), ORCH_ECANCELED);
    all_ended(m, 3);
    CHECK_INT(orch_now(), 50);
}

SCOPE_TEST(shield_inside_of_a_scope_holds_its_own_deadline_out) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 20});
    orch_shield_begin();
    CHECK_INT(orch_time_left(), NEVER);
    CHECK_INT(orch_sleep(50), 0);
    CHECK_INT(orch_now(), 50);
    orch_shield_end();
    CHECK_INT(orch_time_left(), 0);
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
}

SCOPE_TEST(shield_of_the_body_does_not_shield_members) {
    orch_scope s;
    member m = {.ms = NEVER};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 20});
    orch_scope_go(&s, work, &m);
    orch_shield_begin();
    CHECK_INT(orch_sleep(50), 0);
    CHECK_INT(m.end, 20);
    orch_shield_end();
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    all_ended(&m, 1);
}

SCOPE_TEST(shield_around_the_close) {
    orch_scope s;
    member m = {.ms = NEVER};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 20});
    orch_scope_go(&s, work, &m);
    orch_shield_begin();
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    orch_shield_end();
    all_ended(&m, 1);
    CHECK_INT(orch_now(), 20);
}

SCOPE_TEST(shield_and_the_copy_of_the_deadline) {
    orch_scope s;
    member m[] = {{.ms = 50}, {.ms = 50}};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 20});
    orch_shield_begin();
    orch_future *a = orch_go(work, &m[0]); // nothing is in force here
    CHECK(join(a) >= 0);
    CHECK_INT(m[0].left, NEVER);
    CHECK_INT(m[0].slept, 0);
    orch_shield_end();
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
}

static orch_result many_shields(void *arg) {
    shielded *v = arg;
    orch_scope a, b;
    orch_scope_open(&a, NULL);
    orch_shield_begin();
    orch_scope_open(&b, NULL);
    orch_shield_begin();
    v->sleeps[0] = orch_sleep(20); // cancelled meanwhile
    orch_shield_end();
    v->sleeps[1] = orch_sleep(1);
    orch_scope_cancel(&b, 0);
    v->sleeps[2] = orch_sleep(1);
    orch_shield_begin();
    v->sleeps[3] = orch_sleep(1);
    orch_shield_end();
    v->sleeps[4] = orch_sleep(1);
    v->closed = close_of(&b);
    v->sleeps[5] = orch_sleep(1);
    orch_shield_end();
    v->sleeps[6] = orch_sleep(1);
    v->went = close_of(&a);
    v->sleeps[7] = orch_sleep(1);
    return orch_ok_int(1);
}

SCOPE_TEST(shields_and_scopes_nest) {
    shielded v = {.closed = 1};
    orch_future *f = orch_go(many_shields, &v);
    orch_sleep(10);
    orch_cancel(f, 0);
    CHECK_INT(join(f), 1);
    static const int want[8] = {
        0, 0, ORCH_ECANCELED, 0, ORCH_ECANCELED, 0, ORCH_ECANCELED, ORCH_ECANCELED};
    for (int i = 0; i < 8; i++) CHECK_INT(v.sleeps[i], want[i]);
    CHECK_INT(v.closed, ORCH_ECANCELED);
    CHECK_INT(v.went, ORCH_ECANCELED);
}

static orch_result close_across_shield(void *arg) {
    shielded *v = arg;
    orch_scope s;
    orch_scope_open(&s, NULL);
    orch_shield_begin();
    v->sleeps[0] = orch_sleep(20); // cancelled meanwhile
    v->closed = close_of(&s);      // opened outside of the shield that is still on
    v->sleeps[1] = orch_sleep(1);
    orch_shield_end();
    v->sleeps[2] = orch_sleep(1);
    return orch_ok_int(1);
}

SCOPE_TEST(a_scope_closes_inside_a_later_shield) {
    shielded v = {.closed = 1};
    orch_future *f = orch_go(close_across_shield, &v);
    orch_sleep(10);
    orch_cancel(f, 0);
    CHECK_INT(join(f), 1);
    CHECK_INT(v.sleeps[0], 0);
    CHECK_INT(v.closed, ORCH_ECANCELED);
    CHECK_INT(v.sleeps[1], 0);
    CHECK_INT(v.sleeps[2], ORCH_ECANCELED);
}

static orch_result shield_then_close(void *arg) {
    shielded *v = arg;
    orch_scope s;
    orch_shield_begin();
    orch_scope_open(&s, NULL);
    orch_shield_end(); // the scope outlives the shield that it was opened in
    v->sleeps[0] = orch_sleep(20);
    v->went = orch_scope_go(&s, work, &v->member[0]);
    v->closed = close_of(&s);
    all_ended(v->member, 1);
    v->sleeps[1] = orch_sleep(1);
    return orch_ok_int(1);
}

SCOPE_TEST(a_scope_outlives_its_shield) {
    shielded v = {.member = {{.ms = 30}}};
    orch_future *f = orch_go(shield_then_close, &v);
    orch_sleep(10);
    orch_cancel(f, 0);
    CHECK_INT(join(f), 1);
    CHECK_INT(v.sleeps[0], ORCH_ECANCELED);
    CHECK_INT(v.sleeps[1], ORCH_ECANCELED);
    CHECK(orch_now() <= 40);
}

static orch_result shield_ends_first(void *arg) {
    shielded *v = arg;
    orch_scope s;
    orch_shield_begin();
    orch_scope_open(&s, NULL);
    v->went = orch_scope_go(&s, work, &v->member[0]);
    orch_shield_end();
    v->sleeps[0] = orch_sleep(HOUR); // cancelled meanwhile
    v->closed = close_of(&s);
    all_ended(v->member, 1);
    return orch_ok_int(1);
}

SCOPE_TEST(shield_that_ends_before_a_scope_in_it_protects_it_no_more) {
    shielded v = {.member = {{.ms = NEVER}}};
    orch_future *f = orch_go(shield_ends_first, &v);
    orch_sleep(10);
    orch_cancel(f, 5);
    CHECK_INT(join(f), 1);
    CHECK_INT(v.sleeps[0], ORCH_ECANCELED);
    CHECK_INT(v.closed, ORCH_ECANCELED);
    CHECK_INT(v.member[0].slept, ORCH_ECANCELED);
    CHECK_INT(orch_now(), 10);
}

// The usual clean-up: inside what was cancelled, behind a shield.
SCOPE_TEST(shield_in_a_cancelled_scope_leaves_the_outer_one_alone) {
    for (int how = 0; how < 4; how++) {
        orch_scope outer, inner, third;
        member m = {.ms = 200};
        orch_scope_open(&outer, NULL);
        orch_scope_go(&outer, work, &m);
        orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = how % 2 ? 10 : 0});
        if (how % 2 == 0) orch_scope_cancel(&inner, 5);
        CHECK_INT(orch_sleep(20), ORCH_ECANCELED);
        orch_shield_begin();
        if (how / 2) orch_scope_open(&third, NULL);
        CHECK_INT(orch_sleep(20), 0);
        if (how / 2) CHECK_INT(close_of(&third), 0);
        orch_shield_end();
        CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
        CHECK_INT(close_of(&inner), how % 2 ? ORCH_ETIMEDOUT : ORCH_ECANCELED);
        CHECK_INT(orch_cancel_reason(), 0);
        CHECK_INT(orch_sleep(1), 0); // only the inner one was asked to end
        CHECK_INT(close_of(&outer), 0);
        CHECK_INT(m.slept, 0);
    }
}

SCOPE_TEST(shield_that_ends_inside_its_scope_cancels_no_more_than_it_must) {
    orch_scope outer, middle, inner;
    orch_scope_open(&outer, NULL);
    orch_scope_open(&middle, NULL);
    orch_scope_cancel(&middle, 5);
    orch_shield_begin();
    orch_scope_open(&inner, NULL);
    orch_shield_end(); // too early: inner loses its protection
    CHECK_INT(orch_sleep(1), ORCH_ECANCELED);
    CHECK_INT(close_of(&inner), ORCH_ECANCELED);
    CHECK_INT(close_of(&middle), ORCH_ECANCELED);
    CHECK_INT(orch_sleep(1), 0);
    CHECK_INT(close_of(&outer), 0);
}

// ---- adopting work

static int asked;

static bool on_cancel(void *context, int reason) {
    asked = reason;
    return context == NULL;
}

SCOPE_TEST(add_settled_work) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    CHECK_INT(orch_scope_add(&s, orch_settled(token_result())), 0);
    CHECK_INT(orch_scope_failures(&s), 0);
    CHECK_INT(orch_scope_add(&s, orch_settled(orch_failf(5, "five"))), 0);
    CHECK_INT(orch_scope_failures(&s), 1);
    orch_future *f = orch_settled(token_result());
    CHECK_INT(orch_scope_add(&s, orch_ref(f)), 0);
    orch_result r = orch_scope_close(&s);
    CHECK_INT(r.error, 5);
    CHECK_STR(orch_message(&r), "five");
    orch_result_free(&r);
    r = orch_await(f);
    CHECK(r.error || !is_given_back(r.value));
    orch_result_free(&r);
}

SCOPE_TEST(add_a_promise) {
    orch_scope s;
    orch_promise p, q;
    orch_scope_open(&s, NULL);
    CHECK_INT(orch_scope_add(&s, orch_future_new(&p)), 0);
    CHECK_INT(orch_scope_add(&s, orch_future_new(&q)), 0);
    CHECK(orch_settle(p, token_result()));
    CHECK_INT(orch_sleep(10), 0);
    CHECK(orch_promise_wanted(q));
    CHECK(orch_settle(q, orch_failf(6, "six")));
    CHECK_INT(orch_sleep(10), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), 6);
}

static void settle_late(orch_result *in, void *context) {
    (void)in;
    orch_settle(*(orch_promise *)context, token_result());
}

SCOPE_TEST(add_a_promise_with_a_hook) {
    for (int still = 0; still < 2; still++) {
        orch_scope s;
        orch_promise p;
        uint64_t start = orch_now();
        orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 10});
        orch_future *f = orch_future_new(&p);
        asked = 0;
        orch_promise_on_cancel(p, on_cancel, still ? &asked : NULL);
        if (still) orch_on(orch_after(30), settle_late, &p);
        CHECK_INT(orch_scope_add(&s, f), 0);
        CHECK_INT(orch_sleep(HOUR), ORCH_ECANCELED);
        CHECK(!orch_promise_wanted(p));
        CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
        CHECK(asked != 0);
        CHECK(!orch_promise_pending(p));
        CHECK_INT(orch_now() - start, still ? 30 : 10); // the producer said that it goes on
    }
    pass_time(100);
}

SCOPE_TEST(add_what_the_caller_keeps_a_handle_of) {
    orch_scope s;
    member m[] = {{.ms = 10}, {.ms = NEVER}};
    orch_scope_open(&s, NULL);
    orch_future *a = orch_go(work, &m[0]), *b = orch_go(work, &m[1]);
    CHECK_INT(orch_scope_add(&s, orch_ref(a)), 0);
    CHECK_INT(orch_scope_add(&s, orch_ref(b)), 0);
    orch_result r = orch_await(a);
    CHECK_INT(r.error, 0);
    CHECK(r.error || !is_given_back(r.value));
    orch_scope_cancel(&s, 4); // what others hold too is asked as well: it must end
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(m, test_shared->refused ? 0 : 2); // what was not put in may live on
    CHECK_INT(m[1].reason, 4);
    CHECK(orch_is_settled(b));
    CHECK_INT(join(b), ORCH_ECANCELED);
    CHECK(r.error || !is_given_back(r.value));
    orch_result_free(&r);
    CHECK_INT(orch_now(), 10);
}

SCOPE_TEST(add_the_same_work_to_two_scopes) {
    orch_scope outer, inner;
    member m = {.ms = NEVER};
    orch_scope_open(&outer, NULL);
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 10});
    orch_future *f = orch_go_with(&(orch_task_desc){.fn = work, .arg = &m});
    CHECK_INT(orch_scope_add(&inner, orch_ref(f)), 0);
    CHECK_INT(orch_scope_add(&inner, orch_ref(f)), 0); // and to one of them twice
    CHECK_INT(orch_scope_add(&outer, f), 0);
    CHECK_INT(close_of(&inner), ORCH_ETIMEDOUT);
    if (!test_shared->refused) all_ended(&m, 1);
    int error = close_of(&outer);
    all_ended(&m, 1);
    CHECK_INT(m.started, 1);
    CHECK(error == 0 || error == ORCH_ECANCELED); // whose request it was
    CHECK_INT(orch_now(), 10);
}

SCOPE_TEST(add_combinators) {
    orch_scope s;
    member m[] = {{.ms = 10}, {.ms = 20}, {.ms = 5}, {.ms = NEVER}, {.ms = NEVER}};
    orch_scope_open(&s, NULL);
    orch_scope_add(&s, orch_all(orch_go(work, &m[0]), orch_go(work, &m[1])));
    orch_scope_add(&s, orch_race(orch_go(work, &m[2]), orch_go(work, &m[3])));
    orch_scope_add(&s, orch_timeout(orch_go(work, &m[4]), 30));
    orch_result r = orch_scope_close(&s);
    all_ended(m, 5);
    CHECK_INT(r.error, ORCH_ETIMEDOUT); // the member's, not the scope's
    CHECK_INT(orch_count(&r), 1);
    CHECK_STR(orch_message(&r), "Timeout after 30 ms");
    orch_result_free(&r);
    CHECK_INT(orch_now(), 30);
}

SCOPE_TEST(add_combinators_and_cancel) {
    orch_scope s;
    member m[] = {{.ms = NEVER, .clean = 3},
                  {.ms = NEVER},
                  {.ms = NEVER},
                  {.ms = NEVER, .clean = 5},
                  {.ms = NEVER}};
    orch_scope_open(&s, NULL);
    orch_scope_add(&s, orch_all(orch_go(work, &m[0]), orch_go(work, &m[1])));
    orch_scope_add(&s, orch_race(orch_go(work, &m[2]), orch_go(work, &m[3])));
    orch_scope_add(&s, orch_timeout(orch_go(work, &m[4]), 30));
    CHECK_INT(orch_sleep(10), 0);
    orch_scope_cancel(&s, 0);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(m, 5);
    CHECK_INT(orch_now(), 15);
}

static orch_result pass_on(orch_result *in, void *context) {
    ++*(int *)context;
    return *in;
}

SCOPE_TEST(add_chains) {
    orch_scope s;
    int calls = 0;
    member m[] = {{.ms = 10}, {.ms = NEVER}};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 20});
    orch_scope_add(&s, orch_then(orch_go(work, &m[0]), pass_on, pass_on, &calls));
    orch_scope_add(&s, orch_then(orch_go(work, &m[1]), pass_on, pass_on, &calls));
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    all_ended(m, 2);
    CHECK_INT(calls, 2);
}

SCOPE_TEST(add_to_a_cancelled_scope_gives_up_the_work) {
    orch_scope s;
    orch_promise p;
    member m[] = {{.ms = NEVER, .clean = 10}, {.ms = NEVER}};
    orch_scope_open(&s, NULL);
    orch_future *mine = orch_go(work, &m[0]), *shared = orch_go(work, &m[1]);
    orch_future *waiting = orch_future_new(&p);
    orch_scope_cancel(&s, 0);
    CHECK_INT(orch_scope_add(&s, mine), ORCH_ECANCELED);
    all_ended(m, 1); // the drop has waited
    CHECK_INT(orch_now(), 10);
    CHECK_INT(orch_scope_add(&s, orch_ref(shared)), ORCH_ECANCELED);
    CHECK_INT(m[1].done, m[1].started - 1); // others hold it
    CHECK_INT(orch_scope_add(&s, waiting), ORCH_ECANCELED);
    CHECK(!orch_promise_pending(p));
    CHECK_INT(orch_scope_add(&s, orch_settled(token_result())), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    orch_drop(shared);
    all_ended(m, 2);
}

SCOPE_TEST(add_what_is_settled_later_by_an_await_of_the_body) {
    orch_scope s;
    member m = {.ms = 10, .fail = 5};
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    orch_future *f = orch_go(work, &m);
    orch_scope_add(&s, orch_ref(f));
    CHECK_INT(join(f), 5);
    CHECK_INT(orch_scope_failures(&s), 1);
    CHECK_INT(close_of(&s), 5);
}

SCOPE_TEST(add_what_was_never_to_be) { // static, rejected futures
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    for (int i = 0; i < 20; i++) orch_scope_add(&s, orch_race_n(0, NULL));
    for (int i = 0; i < 20; i++) orch_scope_add(&s, orch_ready(-1, ORCH_READABLE));
    for (int i = 0; i < 20; i++) orch_scope_add(&s, orch_any_n(0, NULL));
    CHECK_INT(orch_scope_failures(&s), 60);
    orch_result r = orch_scope_close(&s);
    CHECK_INT(r.error, ORCH_EINVAL);
    CHECK_INT(orch_count(&r), ORCH_SCOPE_ERRORS);
    for (size_t i = 0; i < ORCH_SCOPE_ERRORS; i++) CHECK_INT(orch_at(&r, i)->error, ORCH_EINVAL);
    orch_result_free(&r);
    CHECK_INT(join(orch_race_n(0, NULL)), ORCH_EINVAL); // as good as before
}

static orch_result chains_to_nothing(void *arg) {
    if (arg) orch_yield();
    return orch_chain(orch_race_n(0, NULL));
}

SCOPE_TEST(members_that_chain_to_what_was_never_to_be) {
    orch_scope s;
    orch_promise p[5];
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    for (int i = 0; i < 5; i++) orch_scope_add(&s, orch_future_new(&p[i]));
    for (int i = 0; i < 10; i++) orch_scope_go(&s, chains_to_nothing, i % 2 ? "later" : NULL);
    for (int i = 0; i < 5; i++) orch_follow(p[i], orch_race_n(0, NULL));
    CHECK_INT(orch_sleep(1), 0);
    CHECK_INT(orch_scope_failures(&s), 15);
    CHECK_INT(close_of(&s), ORCH_EINVAL);
    CHECK_INT(join(orch_race_n(0, NULL)), ORCH_EINVAL);
}

SCOPE_TEST(members_that_follow_others) {
    orch_scope s;
    orch_promise p[4], q;
    orch_future *shared = orch_future_new(&q);
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 4; i++) orch_scope_add(&s, orch_future_new(&p[i]));
    for (int i = 0; i < 3; i++) orch_follow(p[i], orch_ref(shared)); // one promise settles three
    orch_follow(p[3], orch_after(5));
    orch_settle(q, token_result());
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(orch_now(), 5);
    for (int i = 0; i < issued; i++) must(!tokens[i] || test_shared->refused, "it is shared");
    orch_drop(shared);
}

SCOPE_TEST(the_value_of_an_await_that_was_cancelled_is_not_lost) {
    orch_scope s;
    member m = {.ms = NEVER};
    orch_promise p;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 10});
    orch_future *f = orch_future_new(&p);
    orch_promise_on_cancel(p, on_cancel, &p); // goes on
    orch_on(orch_after(30), settle_late, &p);
    orch_result r = orch_await(f);
    CHECK_INT(r.error, 0);
    CHECK(r.error || !is_given_back(r.value));
    orch_result_free(&r);
    CHECK_INT(orch_now(), 30);
    CHECK_INT(orch_scope_go(&s, work, &m), ORCH_ECANCELED);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    pass_time(50);
}

SCOPE_TEST(an_iteration_in_a_cancelled_scope) {
    orch_scope s;
    member m[] = {{.ms = 5}, {.ms = NEVER, .clean = 10}, {.ms = NEVER}};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 20});
    orch_future *f[3];
    for (int i = 0; i < 3; i++) f[i] = orch_go(work, &m[i]);
    orch_completion *c = orch_as_completed_n(3, f);
    CHECK(join(orch_completion_next(c)) >= 0);
    CHECK_INT(join(orch_completion_next(c)), ORCH_ECANCELED);
    orch_completion_free(c);
    all_ended(m, 3); // freeing it has waited
    CHECK_INT(orch_now(), 30);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
}

SCOPE_TEST(add_timers) {
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (uint64_t i = 0; i < 10; i++) CHECK_INT(orch_scope_add(&s, orch_after(i)), 0);
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(orch_now(), 9);
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 5});
    for (uint64_t i = 0; i < 10; i++) orch_scope_add(&s, orch_after(HOUR + i));
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    CHECK_INT(orch_now(), 14);
}

// A member that holds the owner's future: the close can never end.
static orch_result closes_over_itself(void *arg) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.name = "snake"});
    orch_yield(); // parent is set
    orch_scope_add(&s, orch_ref(parent));
    orch_result r = orch_scope_close(&s);
    note(7);
    orch_result_free(&r);
    return orch_ok_int(arg != NULL);
}

TEST(a_scope_that_waits_for_its_own_task_is_a_deadlock) {
    seed = 5;
    reset();
    orch_loop_desc desc = settings();
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    parent = orch_go_with(&(orch_task_desc){.name = "snake charmer", .fn = closes_over_itself});
    CHECK_INT(orch_loop_run(loop), ORCH_EDEADLK);
    CHECK(strstr(report, "snake charmer") != NULL);
    CHECK(strstr(report, "'snake'") != NULL);
    CHECK(strstr(report, "5") != NULL); // the seed
    orch_drop(parent);
    must(orch_loop_free(loop) == 0, "the loop cannot end");
    must(trace.count <= 1, "closed twice");
}

// ---- deadlock

static member left_over[4];

static orch_result holds_scopes(void *arg) {
    member *m = arg;
    m->started++;
    orch_scope a, b;
    orch_scope_open(&a, &(orch_scope_desc){.timeout_ms = HOUR});
    orch_scope_open(&b, NULL);
    orch_scope_go(&a, work, m->child);
    orch_scope_go(&b, work, m->child + 1);
    m->slept = orch_sleep(HOUR / 2);
    close_of(&b);
    close_of(&a);
    all_ended(m->child, 2);
    return member_end(m);
}

static orch_result stuck(void *arg) {
    orch_promise p;
    member *m = arg;
    m->started++;
    orch_future *f = orch_future_new(&p);
    orch_promise_describe(p, "the parcel");
    m->slept = 0;
    orch_result r = orch_await(f);
    m->slept = r.error;
    orch_result_free(&r);
    return member_end(m);
}

static member stuck_members[2];

static void stuck_body(void) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.name = "delivery"});
    memset(stuck_members, 0, sizeof stuck_members);
    orch_scope_go_with(&s,
                       &(orch_task_desc){.name = "courier", .fn = stuck, .arg = &stuck_members[0]});
    orch_scope_go(&s, stuck, &stuck_members[1]);
    orch_result r = orch_scope_close(&s);
    all_ended(stuck_members, 2);
    orch_result_free(&r);
}

TEST(a_deadlock_in_a_close_is_reported_and_cleaned_up) {
    for (seed = 0; seed <= test_seeds(); seed++) {
        orch_result r = run_once(stuck_body);
        CHECK_INT(r.error, ORCH_EDEADLK);
        orch_result_free(&r);
        CHECK(strstr(report, "courier") != NULL);
        CHECK(strstr(report, "the parcel") != NULL);
        CHECK(strstr(report, "delivery") != NULL);
        all_ended(stuck_members, 2);
    }
}

// Two tasks, each with a member that awaits the other task.
static orch_future *pair[2];

static orch_result await_other(void *arg) {
    orch_result r = orch_await(orch_ref(pair[*(int *)arg]));
    return r;
}

static orch_result circle_half(void *arg) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.name = "half"});
    orch_yield();
    orch_scope_go(&s, await_other, arg);
    orch_result r = orch_scope_close(&s);
    note(r.error);
    return r;
}

static int others[2] = {1, 0};

static void make_circle(void) {
    for (int i = 0; i < 2; i++) pair[i] = orch_go(circle_half, &others[i]);
}

TEST(scopes_in_a_circle_are_a_deadlock_and_can_be_freed) {
    seed = 0, reset();
    orch_loop_desc desc = settings();
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    make_circle();
    CHECK_INT(orch_loop_run(loop), ORCH_EDEADLK);
    CHECK(strstr(report, "half") != NULL);
    for (int i = 0; i < 2; i++) orch_drop(pair[i]);
    must(orch_loop_free(loop) == 0, "the loop cannot end");
}

static orch_result circle_main(void *arg) {
    (void)arg;
    make_circle();
    orch_result r = orch_await(orch_ref(pair[0]));
    for (int i = 0; i < 2; i++) orch_drop(pair[i]);
    return r;
}

TEST(scopes_in_a_circle_end_with_orch_run) {
    for (seed = 0; seed <= test_seeds(); seed++) {
        reset();
        orch_loop_desc desc = settings();
        orch_result r = orch_run_with(&desc, circle_main, NULL);
        CHECK_INT(r.error, ORCH_EDEADLK);
        orch_result_free(&r);
    }
}

TEST(a_loop_with_a_shielding_member_is_busy) {
    seed = 0, reset();
    orch_loop_desc desc = settings();
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    left_over[0] = (member){.child = &left_over[1]};
    left_over[1] = (member){.ms = NEVER, .clean = 50}, left_over[2] = (member){.ms = NEVER};
    orch_spawn(holds_scopes, &left_over[0]);
    orch_loop_step(loop, 0);
    int error = orch_loop_free(loop);
    CHECK_INT(error, ORCH_EBUSY);
    if (error == 0) return;
    CHECK_INT(orch_loop_run(loop), 0);
    must(orch_loop_free(loop) == 0, "the loop cannot end");
    all_ended(left_over, 3);
    balance();
}

static void stuck_shield_body(void) {
    orch_scope s;
    orch_promise p;
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 10});
    CHECK_INT(orch_sleep(20), ORCH_ECANCELED);
    orch_shield_begin();
    int error = (int)join(orch_future_new(&p)); // for ever, but a shield holds until a deadlock
    note(error);
    orch_shield_end();
    orch_result r = orch_scope_close(&s);
    orch_result_free(&r);
}

TEST(a_deadlock_behind_a_shield) {
    seed = 0;
    orch_result r = run_once(stuck_shield_body);
    CHECK(r.error == 0 || r.error == ORCH_EDEADLK); // the shield is broken, so it can go on
    orch_result_free(&r);
    CHECK_INT(trace.at[0], ORCH_ECANCELED);
}

// What is left alone by the end of its loop may still look around.
static orch_result outlives_its_scope(void *arg) {
    orch_result r = orch_await(orch_ref(pair[*(int *)arg]));
    orch_result_free(&r);
    for (int i = 0; i < 5; i++) {
        note(orch_time_left() == 0);
        orch_drop(orch_go(with_value, NULL));
        orch_shield_begin();
        orch_yield();
        orch_shield_end();
    }
    return orch_ok_int(1);
}

static orch_result circle_with_deadline(void *arg) {
    orch_scope s, inner;
    orch_scope_open(&s, &(orch_scope_desc){.name = "half"});
    orch_scope_open(&inner, &(orch_scope_desc){.timeout_ms = 1000});
    orch_yield();
    orch_scope_go(&inner, outlives_its_scope, arg);
    orch_scope_go(&s, outlives_its_scope, arg);
    note(close_of(&inner));
    note(close_of(&s));
    return orch_ok_int(1);
}

static orch_result circle_with_deadline_main(void *arg) {
    (void)arg;
    for (int i = 0; i < 2; i++) pair[i] = orch_go(circle_with_deadline, &others[i]);
    orch_sleep(HOUR);
    orch_result r = orch_await(orch_ref(pair[0]));
    for (int i = 0; i < 2; i++) orch_drop(pair[i]);
    return r;
}

TEST(what_is_left_of_a_circle_looks_around) {
    for (seed = 0; seed <= test_seeds(); seed++) {
        reset();
        orch_loop_desc desc = settings();
        orch_result r = orch_run_with(&desc, circle_with_deadline_main, NULL);
        orch_result_free(&r);
        balance();
    }
}

TEST(what_is_left_of_a_circle_looks_around_while_its_loop_is_freed) {
    seed = 0, reset();
    orch_loop_desc desc = settings();
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    for (int i = 0; i < 2; i++) pair[i] = orch_go(circle_with_deadline, &others[i]);
    orch_loop_run(loop);
    for (int i = 0; i < 2; i++) orch_drop(pair[i]);
    must(orch_loop_free(loop) == 0, "the loop cannot end");
    balance();
}

// Producers that never settle: orch_run breaks off the waits for them, and only those. A close that
// waits for such a member ends when that has.
static bool never_ends(void *context, int reason) {
    (void)context, (void)reason;
    return false;
}

static orch_result waits_for_ever(void *arg) {
    member *m = arg;
    orch_promise p;
    m->started++;
    orch_future *f = orch_future_new(&p);
    orch_promise_on_cancel(p, never_ends, NULL);
    orch_result r = orch_await(f);
    orch_result_free(&r);
    orch_shield_begin();
    for (int i = 0; i < 3; i++) orch_yield();
    orch_shield_end();
    m->done++; // on the stack of the task that closes
    return orch_ok_int(1);
}

static int broken_members;

static orch_result closes_over_for_ever(void *arg) {
    orch_scope s, inner;
    member m[] = {{.ms = 0}, {.ms = 0}, {.ms = 0}};
    orch_scope_open(&s, &(orch_scope_desc){.name = "outer"});
    orch_scope_go(&s, waits_for_ever, &m[0]);
    orch_scope_open(&inner, NULL);
    orch_scope_go(&inner, waits_for_ever, &m[1]);
    orch_scope_go(&inner, waits_for_ever, &m[2]);
    close_of(&inner);
    broken_members += m[1].started + m[2].started - m[1].done - m[2].done;
    close_of(&s);
    broken_members += m[0].started - m[0].done;
    return orch_ok_int(arg != NULL);
}

static orch_result leaves_for_ever(void *arg) {
    (void)arg;
    orch_spawn(closes_over_for_ever, NULL);
    return closes_over_for_ever(NULL);
}

TEST(members_whose_producers_never_settle_end_before_the_close) {
    for (seed = 0; seed <= test_seeds(); seed++) {
        reset(), broken_members = 0;
        orch_loop_desc desc = settings();
        orch_result r = orch_run_with(&desc, leaves_for_ever, NULL);
        CHECK(r.error == ORCH_EDEADLK);
        orch_result_free(&r);
        must(broken_members == 0, "a member outlived its scope");
    }
}

static orch_result stuck_behind_shield(void *arg) {
    member *m = arg;
    orch_scope s;
    orch_sleep(HOUR);
    orch_shield_begin();
    orch_scope_open(&s, &(orch_scope_desc){.name = "inside"});
    orch_scope_go(&s, stuck, m);
    note(close_of(&s));
    all_ended(m, 1);
    orch_shield_end();
    return orch_ok_int(1);
}

static void shielded_close_body(void) {
    memset(stuck_members, 0, sizeof stuck_members);
    orch_future *f = orch_go(stuck_behind_shield, &stuck_members[0]);
    orch_cancel(f, 0);
    join(f);
}

TEST(a_deadlock_of_a_close_behind_a_shield) {
    for (seed = 0; seed <= test_seeds(); seed++) {
        orch_result r = run_once(shielded_close_body);
        CHECK(r.error == 0 || r.error == ORCH_EDEADLK);
        orch_result_free(&r);
        CHECK_INT(trace.at[1], ORCH_ECANCELED); // the shield held until the deadlock
        all_ended(stuck_members, 2);
    }
}

// ---- the end of a loop while scopes are open

static orch_result leaves_work(void *arg) {
    (void)arg;
    orch_spawn(holds_scopes, &left_over[0]);
    orch_sleep(10);
    return orch_ok_int(8);
}

TEST(run_ends_what_is_left_in_scopes) {
    for (seed = 0; seed <= test_seeds(); seed++) {
        reset();
        memset(left_over, 0, sizeof left_over);
        left_over[0] = (member){.child = &left_over[1]};
        left_over[1] = (member){.ms = NEVER};
        left_over[2] = (member){.ms = NEVER, .clean = 50};
        orch_loop_desc desc = settings();
        orch_result r = orch_run_with(&desc, leaves_work, NULL);
        CHECK_INT(orch_int(&r), 8);
        orch_result_free(&r);
        all_ended(left_over, 4);
        CHECK_INT(left_over[0].slept, ORCH_ECANCELED);
        CHECK_INT(left_over[2].slept, ORCH_ECANCELED);
        balance();
    }
}

TEST(freeing_a_loop_ends_its_scopes) {
    seed = 0;
    reset();
    memset(left_over, 0, sizeof left_over);
    left_over[0] = (member){.child = &left_over[1]};
    left_over[1] = (member){.ms = NEVER}, left_over[2] = (member){.ms = NEVER};
    orch_loop_desc desc = settings();
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    orch_spawn(holds_scopes, &left_over[0]);
    for (int i = 0; i < 5; i++) orch_loop_step(loop, 0);
    must(orch_loop_free(loop) == 0, "the loop cannot end");
    all_ended(left_over, 4);
    balance();
}

// ---- failures and hooks that use the scope

static orch_scope *current;

static void release_into_scope(void *value) {
    give_back(value);
    member *m = &left_over[0];
    if (m->started == 0) m->went = orch_scope_go(current, work, m);
    orch_scope_cancel(current, 88);
}

static orch_result returns_trap(void *arg) {
    orch_sleep(10);
    return orch_ok(arg, release_into_scope);
}

SCOPE_TEST(the_release_of_a_members_value_uses_the_scope) {
    orch_scope s;
    member m = {.ms = NEVER};
    current = &s;
    left_over[0] = (member){.ms = NEVER};
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, returns_trap, token());
    orch_scope_go(&s, work, &m);
    int error = close_of(&s);
    CHECK(error == ORCH_ECANCELED);
    all_ended(&m, 1), all_ended(left_over, 1);
    CHECK_INT(orch_now(), 10);
    for (int i = 0; test_shared->refused && i < issued; i++) tokens[i] = 1; // it did not start
}

static bool hook_into_scope(void *context, int reason) {
    (void)reason;
    member *m = context;
    m->went = orch_scope_go(current, work, m);
    orch_scope_cancel(current, 99);
    return true;
}

SCOPE_TEST(a_cancel_hook_uses_the_scope) {
    orch_scope s;
    orch_promise p;
    member m = {.ms = NEVER};
    current = &s;
    orch_scope_open(&s, NULL);
    orch_future *f = orch_future_new(&p);
    orch_promise_on_cancel(p, hook_into_scope, &m);
    orch_scope_add(&s, f);
    orch_scope_cancel(&s, 11);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    all_ended(&m, 1);
    CHECK_INT(m.started, 0);
    CHECK_INT(m.went, ORCH_ECANCELED);
}

static orch_result go_when_cancelled(void *arg) {
    member *m = arg;
    m->started++;
    m->slept = orch_sleep(HOUR);
    m->went = orch_scope_go(m->scope, work, m->child); // in vain
    orch_shield_begin();
    m->cleaned = orch_scope_go(m->scope, work, m->child); // a shield does not change that
    orch_sleep(1);
    orch_shield_end();
    return member_end(m);
}

SCOPE_TEST(a_cancelled_member_starts_no_sibling) {
    orch_scope s;
    member m[] = {{.scope = &s, .child = &m[1]}, {.ms = 1}};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 10});
    orch_scope_go(&s, go_when_cancelled, &m[0]);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    all_ended(m, 2);
    CHECK_INT(m[0].went, ORCH_ECANCELED);
    CHECK_INT(m[0].cleaned, ORCH_ECANCELED);
    CHECK_INT(m[1].started, 0);
    CHECK_INT(orch_now(), 11);
}

// A new member in the last moment of every member: no end is missed.
static orch_result relay(void *arg) {
    member *m = arg;
    m->started++;
    m->slept = m->number % 2 ? orch_yield() : 0;
    if (m->child) m->went = orch_scope_go(m->scope, relay, m->child);
    return member_end(m);
}

SCOPE_TEST(a_relay_of_members) {
    member m[MEMBERS];
    orch_scope s;
    for (int i = 0; i < MEMBERS; i++)
        m[i] = (member){.number = i, .scope = &s, .child = i + 1 < MEMBERS ? &m[i + 1] : NULL};
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, relay, &m[0]);
    CHECK_INT(close_of(&s), 0);
    all_ended(m, MEMBERS);
    for (int i = 0; i < MEMBERS; i++) CHECK_INT(m[i].done, 1);
}

// What a value's release gives up has ended when the release goes on, also inside a close.
static orch_future *slow_child;
static member slow_member;

static orch_result end_slowly(void *arg) {
    member *m = arg;
    m->started++;
    orch_sleep(HOUR);
    orch_shield_begin();
    for (int i = 0; i < 20; i++) orch_sleep(1);
    orch_shield_end();
    m->done++;
    return orch_ok_int(1);
}

static void drop_slow_child(void *value) {
    give_back(value);
    bool waits = orch_self() != NULL;
    orch_drop(slow_child);
    slow_child = NULL;
    must(!waits || slow_member.done == slow_member.started, "a drop did not wait");
}

static orch_promise last_member;

static void add_at_the_last_moment(orch_result *in, void *context) {
    (void)in;
    orch_promise p;
    orch_scope_add(context, orch_future_new(&p)); // the task is on its way out of the wait
    orch_settle(p, orch_ok(token(), drop_slow_child));
}

static void then_add(orch_result *in, void *context) {
    (void)in;
    orch_on(orch_settled(orch_ok_int(1)), add_at_the_last_moment, context);
}

static void end_the_last_member(orch_result *in, void *context) {
    (void)in;
    orch_on(orch_settled(orch_ok_int(1)), then_add, context);
    orch_settle(last_member, orch_ok_int(1));
}

SCOPE_TEST(a_release_may_wait_inside_a_close) {
    orch_scope s;
    slow_member = (member){.ms = 0};
    slow_child = orch_go(end_slowly, &slow_member);
    orch_scope_open(&s, NULL);
    orch_scope_add(&s, orch_future_new(&last_member));
    orch_on(orch_after(5), end_the_last_member, &s);
    close_of(&s);
    pass_time(100);
    must(slow_member.done == slow_member.started, "left behind");
    orch_drop(slow_child);
}

static orch_result returns_slow_trap(void *arg) {
    if (arg) orch_sleep(1);
    return orch_ok(token(), drop_slow_child);
}

SCOPE_TEST(a_release_may_wait_when_a_member_ends_at_once) {
    for (int later = 0; later < 2; later++) {
        orch_scope s;
        slow_member = (member){.ms = 0};
        slow_child = orch_go(end_slowly, &slow_member);
        orch_scope_open(&s, NULL);
        orch_scope_go(&s, returns_slow_trap, later ? "later" : NULL);
        close_of(&s);
        pass_time(100);
        must(slow_member.done == slow_member.started, "left behind");
        orch_drop(slow_child), slow_child = NULL;
    }
}

static orch_result reads_its_deadline(void *arg) {
    member *m = arg;
    m->started++;
    orch_sleep(1);
    orch_shield_begin();
    orch_sleep(m->number > 5 ? 80 : 20); // those that found no room shield for longer
    orch_shield_end();
    m->left = orch_time_left(); // of the scope it was started in
    m->done++;
    return orch_ok_int(1);
}

// Another task starts a member, and the release of its value waits. The scope closes meanwhile.
static orch_result starts_trap(void *arg) {
    caller *c = arg;
    orch_sleep(5);
    if (c->scope) c->went = orch_scope_go(c->scope, returns_slow_trap, NULL);
    return orch_ok_int(1);
}

static orch_result adds_trap(void *arg) {
    caller *c = arg;
    orch_sleep(5);
    orch_future *f = orch_settled(orch_ok(token(), drop_slow_child));
    if (c->scope) c->went = orch_scope_add(c->scope, f);
    else orch_drop(f);
    return orch_ok_int(1);
}

static orch_result counts_trap(void *arg) {
    caller *c = arg;
    orch_promise p;
    orch_sleep(5);
    if (c->scope == NULL) return orch_ok_int(1);
    orch_scope_add(c->scope, orch_future_new(&p));
    orch_settle(p, orch_ok(token(), drop_slow_child));
    c->went = (int)orch_scope_failures(c->scope);
    return orch_ok_int(1);
}

SCOPE_TEST(a_release_may_wait_in_another_task) {
    static const orch_task_fn traps[] = {starts_trap, adds_trap, counts_trap};
    for (int i = 0; i < 6; i++) {
        orch_scope s;
        member m = {.ms = 8};
        caller c = {.scope = &s};
        slow_member = (member){.ms = 0};
        slow_child = orch_go(end_slowly, &slow_member);
        orch_scope_open(&s, &(orch_scope_desc){.name = "shared"});
        if (i / 3) orch_scope_go(&s, work, &m);
        orch_future *f = orch_go(traps[i % 3], &c);
        CHECK_INT(orch_sleep(6), 0); // it is in the middle of it
        CHECK_INT(close_of(&s), 0);
        c.scope = NULL;
        for (int j = 0; j < 20; j++) { // the slots of the scope are used by others
            orch_scope other;
            orch_scope_open(&other, NULL);
            orch_scope_go(&other, work, &(member){.ms = 1});
            close_of(&other);
        }
        CHECK_INT(join(f), 1);
        CHECK_INT(c.went, 0);
        pass_time(50);
        must(slow_member.done == slow_member.started, "left behind");
        orch_drop(slow_child), slow_child = NULL;
    }
}

static member crowd[300];
static int crowd_refused;

static void crowd_in(orch_result *in, void *context) {
    if (in->error) return;
    for (int i = 0; i < 300; i++) {
        refusing = i >= 5;
        crowd_refused += orch_scope_go(context, reads_its_deadline, &crowd[i]) != 0;
        refusing = false;
    }
}

static orch_result crowded(void *arg) {
    for (int i = 0; i < 300; i++) crowd[i] = (member){.number = i};
    crowd_refused = 0;
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true, .timeout_ms = HOUR});
    if (arg) crowd_in(&(orch_result){.error = 0}, &s);
    else orch_on(orch_settled(orch_ok_int(1)), crowd_in, &s);
    orch_sleep(5);
    int error = close_of(&s);
    CHECK(error == ORCH_ENOMEM || error == 0 || test_shared->refused);
    all_ended(crowd, 300);
    orch_sleep(100);
    return orch_ok_int(1);
}

// Without memory for the new deadline the old one counts.
static orch_result extends_without_memory(void *arg) {
    static orch_future *all[1 << 16];
    size_t n = 0;
    orch_promise p;
    orch_scope s;
    (void)arg;
    bool opened = orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 10}) == 0;
    refusing = true;
    while (n < 65535 && !orch_is_settled(all[n] = orch_future_new(&p))) n++;
    int error = opened ? orch_scope_extend(&s, 100) : 0;
    refusing = false;
    for (size_t i = 0; i <= n; i++) orch_drop(all[i]);
    CHECK_INT(error, ORCH_ENOMEM);
    CHECK_INT(orch_time_left(), 10);
    CHECK_INT(orch_sleep(50), ORCH_ECANCELED);
    CHECK_INT(orch_now(), 10);
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    return orch_ok_int(1);
}

TEST(extend_without_memory) {
    seed = 0, reset();
    orch_loop_desc desc = settings();
    desc.allocator.resize = resize_unless;
    orch_result r = orch_run_with(&desc, extends_without_memory, NULL);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
}

// There is no room for one more member: what was started all the same ends before the scope does.
TEST(members_that_find_no_memory_end_before_the_close) {
    for (int in_task = 0; in_task < 2; in_task++) {
        seed = 0, reset();
        orch_loop_desc desc = settings();
        desc.allocator.resize = resize_unless;
        orch_result r = orch_run_with(&desc, crowded, in_task ? "yes" : NULL);
        CHECK_INT(orch_int(&r), 1);
        CHECK(crowd_refused > 0);
        orch_result_free(&r);
    }
}

static int turns_taken;

static orch_result takes_turns(void *arg) {
    orch_sleep(1);
    turns_taken++;
    return orch_ok_int(arg != NULL);
}

// Opening and closing without a wait is a loop like any other: others get their turns.
static orch_result opens_and_closes(void *arg) {
    turns_taken = 0;
    orch_spawn(takes_turns, NULL);
    uint64_t start = orch_now();
    while (turns_taken == 0 && orch_now() - start < 3000) {
        orch_scope s;
        member m = {.ms = 0};
        CHECK_INT(orch_scope_open(&s, NULL), 0);
        if (arg) CHECK_INT(orch_scope_go(&s, work, &m), 0);
        CHECK_INT(close_of(&s), 0);
        if (issued > 1000) issued = 0, memset(tokens, 0, sizeof tokens);
    }
    CHECK_INT(turns_taken, 1);
    return orch_ok_int(1);
}

TEST(closes_that_need_not_wait_take_turns) {
    if (sweeping) return;
    for (int members = 0; members < 2; members++) {
        reset();
        orch_result r = orch_run(opens_and_closes, members ? "yes" : NULL);
        CHECK_INT(orch_int(&r), 1);
        orch_result_free(&r);
    }
}

// ---- the last moments of a task

static void look_around(void *value) {
    give_back(value);
    orch_time_left();
    check_value(orch_local(&looked_for));
    orch_cancel_reason();
}

static orch_result ends_with_a_look(void *arg) {
    orch_local_set(&looked_for, token(), look_around);
    if (arg) orch_sleep(1);
    return orch_ok(token(), look_around); // detached: nobody takes it
}

// Releases that run while a task ends may ask what they like.
SCOPE_TEST(the_last_releases_of_a_task_look_around) {
    for (int i = 0; i < 4; i++) {
        orch_scope s;
        orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 100});
        orch_task_desc desc = {.fn = ends_with_a_look, .arg = token(), .release = look_around};
        if (i % 2) orch_scope_go_with(&s, &desc);
        else orch_detach(orch_go_with(&desc)); // with a deadline of its own
        if (i / 2) orch_yield();
        orch_sleep(10);
        CHECK_INT(close_of(&s), 0);
    }
}

SCOPE_TEST(a_deadline_of_its_own_and_a_shield) {
    orch_scope s;
    shielded v = {.nap = 50, .member = {{.ms = 20}}};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 30});
    orch_future *f = orch_go(scope_in_shield, &v);
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(join(f), 1);
    CHECK_INT(v.sleeps[0], ORCH_ECANCELED);
    CHECK_INT(v.member[0].slept, 0);
    CHECK_INT(v.sleeps[1], 0);
    CHECK_INT(v.sleeps[3], ORCH_ECANCELED);
    CHECK_INT(orch_now(), 81);
}

SCOPE_TEST(a_deadline_of_its_own_reaches_the_members_of_a_task) {
    orch_scope s;
    member m[] = {{.ms = NEVER, .child = &m[1]}, {.ms = NEVER, .child = &m[2]}, {.ms = NEVER}};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = 30});
    orch_future *f = orch_go(middle, &m[0]);
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(join(f), ORCH_ECANCELED);
    all_ended(m, 3);
    CHECK_INT(orch_now(), 30);
    CHECK_INT(m[0].went, ORCH_ECANCELED);
    for (int i = 0; i < 3; i++) CHECK_INT(m[i].left, i < 2 ? 0 : 30);
}

static orch_result starts_elsewhere(void *arg) {
    caller *c = arg;
    orch_sleep(HOUR); // is cancelled
    if (c->scope) c->went = orch_scope_go(c->scope, work, c->member);
    return orch_ok_int(1);
}

SCOPE_TEST(a_cancelled_task_starts_members_elsewhere) {
    member m = {.ms = 20};
    orch_scope s;
    caller c = {.scope = &s, .member = &m, .went = 1};
    orch_scope_open(&s, NULL);
    orch_future *f = orch_go(starts_elsewhere, &c);
    orch_cancel(f, 0);
    CHECK_INT(join(f), 1);
    CHECK_INT(c.went, 0);
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(m.slept, 0); // it belongs to the scope, which was not cancelled
}

// ---- many

static int many_done, many_started;

static orch_result one_of_many(void *arg) {
    many_started++;
    int error = orch_sleep((uint64_t)(uintptr_t)arg % 7);
    many_done++;
    return error ? orch_fail(error) : orch_ok_int(1);
}

static void hundred_thousand(bool cancelled) {
    enum { COUNT = 100000 };
    orch_scope s;
    many_started = many_done = 0;
    orch_scope_open(&s, NULL);
    // As futures: as many tasks would be as many stacks.
    for (uintptr_t i = 0; i < COUNT; i++)
        if (orch_scope_add(&s, orch_after(cancelled ? HOUR : i % 7))) break;
    for (uintptr_t i = 0; i < 100; i++) orch_scope_go(&s, one_of_many, (void *)i);
    if (cancelled) orch_scope_cancel(&s, 0);
    CHECK_INT(close_of(&s), cancelled ? ORCH_ECANCELED : 0);
    must(many_started == many_done, "a member outlived its scope");
    CHECK_INT(orch_now(), cancelled ? 0 : 6);
}

static void all_of_them(void) { hundred_thousand(false); }
static void all_cancelled(void) { hundred_thousand(true); }

static void check_many(body_fn *body) {
    if (sweeping) return; // what is refused in the small cases is refused here
    for (seed = 0; seed < 2; seed++) {
        orch_result r = run_once(body);
        CHECK_INT(orch_int(&r), 1);
        orch_result_free(&r);
    }
}

TEST(a_hundred_thousand_members) { check_many(all_of_them); }

TEST(a_hundred_thousand_members_cancelled) { check_many(all_cancelled); }

static void hundred_thousand_tasks(void) {
    enum { COUNT = 100000 };
    orch_scope s;
    many_started = many_done = 0;
    orch_scope_open(&s, NULL);
    for (uintptr_t i = 0; i < COUNT; i++)
        if (orch_scope_go(&s, one_of_many, (void *)(i % 100 ? 0 : i))) break;
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(many_done, COUNT);
    must(many_started == many_done, "a member outlived its scope");
}

TEST(a_hundred_thousand_tasks_one_after_the_other) { (void)hundred_thousand_tasks; }

static void failing_in_masses(void) {
    enum { COUNT = 20000 };
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.keep_going = true});
    for (int i = 1; i <= COUNT; i++)
        orch_scope_add(&s, orch_settled(orch_failf(i, "number %d", i)));
    CHECK_INT(orch_scope_failures(&s), COUNT);
    orch_result r = orch_scope_close(&s);
    CHECK_INT(r.error, 1);
    CHECK_INT(orch_count(&r), ORCH_SCOPE_ERRORS);
    CHECK_STR(orch_message(orch_at(&r, 15)), "number 16");
    orch_result_free(&r);
}

TEST(many_failures) { check_many(failing_in_masses); }

static void deep_scopes(void) {
    enum { DEPTH = 10000 };
    orch_scope *s = malloc(DEPTH * sizeof *s);
    if (s == NULL) return;
    for (int i = 0; i < DEPTH; i++) {
        uint64_t ms = i % 3 ? 0 : 100000 - (uint64_t)i;
        CHECK_INT(orch_scope_open(&s[i], &(orch_scope_desc){.timeout_ms = ms}), 0);
    }
    orch_scope_add(&s[DEPTH - 1], orch_after(5));
    orch_scope_add(&s[0], orch_after(7));
    CHECK_INT(orch_sleep(1), 0);
    for (int i = DEPTH; i-- > DEPTH / 2;) CHECK_INT(close_of(&s[i]), 0);
    CHECK_INT(orch_now(), 5);
    orch_scope_cancel(&s[1], 12);
    CHECK_INT(orch_cancel_reason(), 12);
    for (int i = DEPTH / 2; i-- > 1;) CHECK_INT(close_of(&s[i]), ORCH_ECANCELED);
    CHECK_INT(orch_cancel_reason(), 0);
    CHECK_INT(close_of(&s[0]), 0);
    CHECK(orch_now() >= 7);
    free(s);
}

TEST(ten_thousand_scopes_in_one_task) { check_many(deep_scopes); }

// Each task in the scope of the one before.
typedef struct chain {
    int depth, left, slept, reached, closed;
} chain;

static chain line;

static orch_result link_of_chain(void *arg) {
    (void)arg;
    orch_scope s;
    int me = line.depth++;
    orch_scope_open(&s, NULL);
    orch_yield(); // the stack of who started it is free again
    if (line.left-- > 0) orch_scope_go(&s, link_of_chain, NULL);
    if (line.slept && me % 2) orch_sleep(HOUR);
    line.closed += close_of(&s) == ORCH_ECANCELED;
    line.reached++;
    return orch_ok_int(1);
}

static void chain_ends(void) {
    orch_scope s;
    line = (chain){.left = CHAIN};
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, link_of_chain, NULL);
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(line.reached, CHAIN + 1);
    CHECK_INT(line.closed, 0);
}

static void chain_grows(void) {
    for (int i = 0; i < 100000 && line.depth <= CHAIN; i++) orch_yield();
    CHECK_INT(line.depth, CHAIN + 1);
}

static void chain_cancelled(void) {
    orch_scope s;
    line = (chain){.left = CHAIN, .slept = 1};
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, link_of_chain, NULL);
    chain_grows();
    orch_scope_cancel(&s, 3);
    CHECK_INT(close_of(&s), ORCH_ECANCELED);
    CHECK_INT(line.reached, CHAIN + 1);
    CHECK(line.closed >= CHAIN); // the last one may have ended before
}

static void chain_times_out(void) {
    orch_scope s;
    line = (chain){.left = CHAIN, .slept = 1};
    orch_scope_open(&s, &(orch_scope_desc){.timeout_ms = HOUR / 2});
    orch_scope_go(&s, link_of_chain, NULL);
    chain_grows();
    CHECK_INT(close_of(&s), ORCH_ETIMEDOUT);
    CHECK_INT(line.reached, CHAIN + 1);
    CHECK(line.closed >= CHAIN);
}

static void chain_dropped(void) {
    line = (chain){.left = CHAIN, .slept = 1};
    orch_future *f = orch_go(link_of_chain, NULL);
    chain_grows();
    orch_drop(f);
    CHECK_INT(line.reached, CHAIN + 1);
}

TEST(ten_thousand_tasks_each_in_the_scope_of_the_one_before) { check_many(chain_ends); }

TEST(ten_thousand_nested_tasks_cancelled) { check_many(chain_cancelled); }

TEST(ten_thousand_nested_tasks_time_out) { check_many(chain_times_out); }

TEST(ten_thousand_nested_tasks_dropped) { check_many(chain_dropped); }

// Deep scopes within shields within scopes, at a small main stack.
TEST(nesting_takes_no_main_stack) {
    if (sweeping) return;
    struct rlimit limit;
    getrlimit(RLIMIT_STACK, &limit);
    limit.rlim_cur = 1 << 18;
    setrlimit(RLIMIT_STACK, &limit);
    check_many(chain_cancelled);
    check_many(chain_dropped);
    check_many(deep_scopes);
}

// ---- task-local values

static const char key_a, key_b;

static orch_result run_local(void *arg) {
    (*(body_fn **)arg)();
    return orch_ok_int(1);
}

// The body in a task of its own: what it sets ends with it.
#define LOCAL_TEST(name, most)                                                                     \
    static void name##_locals(void);                                                               \
    SCOPE_TEST_OF(name, most, (void)different) {                                                   \
        body_fn *body = name##_locals;                                                             \
        CHECK_INT(join(orch_go(run_local, &body)), 1);                                             \
        orch_sleep(100); /* what was spawned has ended */                                          \
        balance();                                                                                 \
    }                                                                                              \
    static void name##_locals(void)

typedef struct reader {
    void *a, *b;
    uint64_t ms;
    int calls;
    bool sets;
} reader;

static orch_result read_locals(void *arg) {
    reader *r = arg;
    r->a = orch_local(&key_a), r->b = orch_local(&key_b), r->calls++;
    check_value(r->a), check_value(r->b);
    for (uint64_t i = 0; i < r->ms; i++) {
        orch_sleep(1);
        check_value(orch_local(&key_a)), check_value(orch_local(&key_b));
        CHECK(orch_local(&key_a) == r->a); // its own, whatever others do
    }
    if (r->sets) orch_local_set(&key_a, token(), give_back);
    return orch_ok_int(1);
}

LOCAL_TEST(local_values_of_a_task, UINT64_MAX) {
    CHECK(orch_local(&key_a) == NULL);
    void *a = token(), *b = token();
    CHECK_INT(orch_local_set(&key_a, a, give_back), 0);
    CHECK_INT(orch_local_set(&key_b, b, NULL), 0);
    CHECK(orch_local(&key_a) == a || is_given_back(a));
    CHECK(orch_local(&key_b) == b || test_shared->refused);
    void *c = token();
    CHECK_INT(orch_local_set(&key_a, c, give_back), 0); // in its place
    CHECK(orch_local(&key_a) == c || is_given_back(c));
    must(is_given_back(a) || test_shared->refused, "a replaced value is kept");
    CHECK(orch_local(&key_b) == b || test_shared->refused);
    CHECK_INT(orch_local_set(&key_a, NULL, NULL), 0);
    CHECK(orch_local(&key_a) == NULL || test_shared->refused);
    give_back(b);
}

LOCAL_TEST(local_values_are_inherited, UINT64_MAX) {
    void *a = token();
    orch_scope s;
    reader r[4] = {{.ms = 5}, {.ms = 5}, {.ms = 5}, {.ms = 5}};
    orch_local_set(&key_a, a, give_back);
    orch_scope_open(&s, NULL);
    orch_scope_go(&s, read_locals, &r[0]);
    orch_future *f = orch_go(read_locals, &r[1]);
    orch_spawn(read_locals, &r[2]);
    orch_future *g =
        orch_go_with(&(orch_task_desc){.fn = read_locals, .arg = &r[3], .name = "named"});
    CHECK_INT(close_of(&s), 0);
    CHECK_INT(join(f), 1);
    CHECK_INT(join(g), 1);
    CHECK_INT(orch_sleep(10), 0);
    for (int i = 0; i < 4; i++) CHECK(r[i].a == a || test_shared->refused);
    CHECK(r[0].b == NULL);
    must(!is_given_back(a) || test_shared->refused, "gone too early");
}

LOCAL_TEST(local_child_changes_are_its_own, UINT64_MAX) {
    void *a = token();
    reader r = {.ms = 1, .sets = true};
    orch_local_set(&key_a, a, give_back);
    CHECK_INT(join(orch_go(read_locals, &r)), 1);
    CHECK(r.a == a || test_shared->refused);
    CHECK(orch_local(&key_a) == a || test_shared->refused);
    must(!is_given_back(a) || test_shared->refused, "gone too early");
    if (issued > 1) must(tokens[1] == 1, "the child's value outlives it");
}

LOCAL_TEST(local_values_set_later_are_not_seen_by_children, UINT64_MAX) {
    reader r = {.ms = 10};
    orch_future *f = orch_go(read_locals, &r);
    orch_local_set(&key_a, token(), give_back);
    CHECK_INT(join(f), 1);
    CHECK(r.a == NULL);
}

LOCAL_TEST(local_value_replaced_while_children_live, UINT64_MAX) {
    void *a = token(), *b = token();
    reader r[] = {{.ms = 20}, {.ms = 10}, {.ms = 5}};
    orch_local_set(&key_a, a, give_back);
    orch_future *f = orch_go(read_locals, &r[0]);
    orch_sleep(1);
    orch_local_set(&key_a, b, give_back);
    orch_future *g = orch_go(read_locals, &r[1]);
    CHECK_INT(join(orch_go(read_locals, &r[2])), 1);
    CHECK_INT(join(g), 1);
    CHECK_INT(join(f), 1);
    CHECK(r[0].a == a || test_shared->refused);
    CHECK(r[1].a == b || test_shared->refused);
    CHECK(r[2].a == b || test_shared->refused);
    must(is_given_back(a) || test_shared->refused, "kept after its last reader");
    must(!is_given_back(b) || test_shared->refused, "gone too early");
}

static orch_result set_and_leave(void *arg) {
    orch_local_set(&key_a, token(), give_back);
    orch_local_set(&key_b, token(), give_back);
    orch_spawn(read_locals, arg); // outlives its starter
    return orch_ok_int(1);
}

LOCAL_TEST(local_values_outlive_their_setter_for_its_children, UINT64_MAX) {
    reader r = {.ms = 20};
    CHECK_INT(join(orch_go(set_and_leave, &r)), 1);
    CHECK_INT(orch_sleep(10), 0);
    for (int i = 0; i < issued; i++) must(!tokens[i] || test_shared->refused, "gone too early");
    CHECK_INT(orch_sleep(20), 0);
    CHECK_INT(r.calls, 1);
    CHECK(r.a != NULL);
    CHECK(r.b != NULL);
    balance();
}

static orch_result grandchildren(void *arg) {
    intptr_t depth = (intptr_t)arg;
    void *inherited = orch_local(&key_a);
    check_value(inherited);
    if (depth % 3 == 0) orch_local_set(&key_b, token(), give_back);
    orch_scope s;
    orch_scope_open(&s, NULL);
    for (int i = 0; i < 2 && depth > 0; i++) orch_scope_go(&s, grandchildren, (void *)(depth - 1));
    orch_sleep(1);
    if (depth % 2) orch_local_set(&key_a, token(), give_back);
    int error = close_of(&s);
    check_value(orch_local(&key_a)), check_value(orch_local(&key_b));
    return error ? orch_fail(error) : orch_ok_int(1);
}

LOCAL_TEST(local_values_in_a_tree_of_tasks, UINT64_MAX) {
    orch_local_set(&key_a, token(), give_back);
    CHECK_INT(join(orch_go(grandchildren, (void *)4)), 1);
    for (int i = 1; i < issued; i++) must(tokens[i] == 1, "a child's value outlives it");
}

static orch_result go_in_scope_of(void *arg) {
    caller *c = arg;
    orch_local_set(&key_a, token(), give_back);
    c->went = orch_scope_go(c->scope, read_locals, c->member);
    return orch_ok_int(1);
}

LOCAL_TEST(local_values_come_from_who_starts_a_member, UINT64_MAX) {
    orch_scope s;
    reader r = {.ms = 20};
    void *mine = token();
    caller c = {.scope = &s, .member = (member *)(void *)&r};
    orch_local_set(&key_b, mine, give_back);
    orch_scope_open(&s, NULL);
    CHECK_INT(join(orch_go(go_in_scope_of, &c)), 1);
    CHECK_INT(close_of(&s), 0);
    CHECK(r.a != NULL && r.a != mine);
    CHECK(r.b == mine || test_shared->refused);
}

static void local_in_callback(orch_result *in, void *context) {
    if (in->error == 0) *(void **)context = orch_local(&key_a);
}

LOCAL_TEST(local_values_outside_of_tasks, UINT64_MAX) {
    static void *seen;
    seen = &seen;
    orch_local_set(&key_a, token(), give_back);
    orch_on(orch_settled(orch_ok_int(1)), local_in_callback, &seen);
    CHECK_INT(orch_sleep(1), 0);
    CHECK(seen == NULL || seen == &seen);
}

LOCAL_TEST(local_values_many, 2) {
    static char keys[200];
    void *values[200];
    const int many = sweeping ? 20 : 200;
    for (int i = 0; i < many; i++) {
        values[i] = token();
        orch_local_set(&keys[i], values[i], give_back);
    }
    for (int i = 0; i < many; i++)
        CHECK(orch_local(&keys[i]) == values[i] || is_given_back(values[i]));
}

LOCAL_TEST(local_values_survive_cancellation, UINT64_MAX) {
    reader r = {.ms = 5};
    orch_local_set(&key_a, token(), give_back);
    orch_future *f = orch_go(read_locals, &r);
    orch_cancel(f, 0);
    join(f);
    CHECK(r.a != NULL || test_shared->refused);
}

static void release_reads_locals(void *value) {
    give_back(value);
    check_value(orch_local(&key_a)), check_value(orch_local(&key_b));
}

LOCAL_TEST(local_values_may_be_read_in_a_release, UINT64_MAX) {
    orch_local_set(&key_b, token(), release_reads_locals);
    orch_local_set(&key_a, token(), release_reads_locals);
    orch_local_set(&key_a, token(), release_reads_locals);
}

static void release_sets_locals(void *value) {
    give_back(value);
    orch_local_set(&key_b, token(), give_back);
    orch_local_set(&key_a, token(), give_back);
}

LOCAL_TEST(local_values_may_be_set_in_a_release, UINT64_MAX) {
    orch_local_set(&key_a, token(), release_sets_locals);
    orch_local_set(&key_a, token(), give_back); // its release sets it again
    CHECK(orch_local(&key_a) != NULL || test_shared->refused);
    check_value(orch_local(&key_a)), check_value(orch_local(&key_b));
}

static orch_result set_forever(void *arg) {
    (void)arg;
    for (int i = 0; i < 1000; i++) orch_local_set(&key_a, token(), give_back);
    return orch_ok_int(1);
}

LOCAL_TEST(local_value_replaced_often_stays_flat, 2) {
    size_t before = stats().futures;
    orch_future *f = orch_go(set_forever, NULL);
    CHECK_INT(join(f), 1);
    CHECK_INT(stats().futures, before);
}

static orch_result a_request(void *arg) {
    check_value(orch_local(&key_a));
    orch_sleep((uint64_t)(uintptr_t)arg);
    check_value(orch_local(&key_a));
    return orch_ok_int(1);
}

// A server: a trace id for each request, which its handler inherits.
LOCAL_TEST(local_value_replaced_often_beside_children_stays_flat, 2) {
    size_t before = 0;
    for (int i = 0; i < (sweeping ? 40 : 200); i++) {
        orch_local_set(&key_a, token(), give_back);
        orch_spawn(a_request, (void *)(uintptr_t)2);
        orch_sleep(1);
        if (i == 20) before = stats().futures;
    }
    orch_sleep(10);
    CHECK(stats().futures <= before || before == 0);
    int kept = 0;
    for (int i = 0; i < issued; i++) kept += !tokens[i];
    CHECK(kept <= 1); // the last one
}

// ---- reports

SCOPE_TEST(a_dump_names_scopes) {
    orch_scope s;
    member m = {.ms = 10};
    orch_scope_open(&s, &(orch_scope_desc){.name = "checkout"});
    orch_scope_go_with(&s, &(orch_task_desc){.name = "cashier", .fn = work, .arg = &m});
    orch_loop_dump(orch_loop_current());
    CHECK(strstr(report, "cashier") != NULL);
    CHECK_INT(close_of(&s), 0);
}

static orch_result dump_later(void *arg) {
    orch_sleep(5);
    orch_loop_dump(orch_loop_current());
    return orch_ok_int(arg != NULL);
}

SCOPE_TEST(a_dump_names_the_scope_that_is_closed) {
    orch_scope s;
    orch_scope_open(&s, &(orch_scope_desc){.name = "checkout"});
    orch_scope_go_with(&s, &(orch_task_desc){.name = "cashier", .fn = dump_later});
    CHECK_INT(close_of(&s), 0);
    CHECK(strstr(report, "cashier") != NULL);
    CHECK(strstr(report, "checkout") != NULL);
}

// ---- random programs

static uint64_t dice;

static unsigned chance(unsigned below) {
    dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
    return (unsigned)(dice >> 33) % below;
}

typedef struct node { // a task that does what the dice say
    struct node *up;
    orch_scope *scopes[4];
    int open, started, done;
} node;

enum { NODES = 120 };
static node nodes[NODES];
static unsigned node_count;

static orch_result wild(void *arg);

static node *wild_child(node *n) {
    if (node_count == NODES) return NULL;
    nodes[node_count] = (node){.up = n};
    return &nodes[node_count++];
}

static orch_scope *wild_scope(node *n) { // one of its own or of those above
    while (n->up && chance(3) == 0) n = n->up;
    return n->open ? n->scopes[chance((unsigned)n->open)] : NULL;
}

static orch_result wild_outcome(void) {
    return chance(6) ? token_result() : orch_failf(10 + (int)chance(5), "failed at random");
}

static void wild_settle(orch_result *in, void *context) {
    (void)in;
    orch_settle(orch_promise_unbox(context), wild_outcome());
}

// Pending work that ends some time.
static orch_future *wild_promise(void) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    if (chance(2)) orch_promise_on_cancel(p, on_cancel, chance(2) ? &asked : NULL);
    orch_on(orch_after(chance(40)), wild_settle, orch_promise_box(p));
    return f;
}

static void wild_callback(orch_result *in, void *context) {
    node *n = context;
    if (in->error || n->done) return;
    orch_scope *s = wild_scope(n);
    node *child = s != NULL ? wild_child(n) : NULL;
    if (child) orch_scope_go(s, wild, child);
    else if (s) orch_scope_cancel(s, 3);
}

// A task with a handle.
static void wild_handle(node *n, orch_scope *s) {
    node *child = wild_child(n);
    if (child == NULL) return;
    orch_future *f = orch_go(wild, child);
    switch (chance(6)) {
    case 0: orch_drop(f); break;
    case 1: join(f); break;
    case 2: join(orch_timeout(f, chance(20))); break;
    case 3: s ? (void)orch_scope_add(s, f) : orch_drop(f); break;
    case 4:
        orch_cancel(f, 5);
        orch_sleep(chance(5));
        orch_drop(f);
        break;
    default:
        orch_wait(f);
        orch_drop(f);
        break;
    }
}

static void wild_act(node *n) {
    orch_scope *s = wild_scope(n);
    node *child;
    switch (chance(17)) {
    case 0:
    case 1:
    case 2:
    case 14:
    case 15:
    case 16:
        child = s != NULL ? wild_child(n) : NULL;
        if (child) orch_scope_go(s, wild, child);
        break;
    case 3: orch_sleep(chance(20)); break;
    case 4: orch_yield(); break;
    case 5:
        if (s && chance(5) == 0) orch_scope_cancel(s, 1 + (int)chance(90));
        break;
    case 6:
        if (s) orch_scope_extend(s, chance(60));
        break;
    case 7:
        if (s) orch_scope_add(s, chance(2) ? orch_after(chance(50)) : wild_promise());
        break;
    case 8:
        if (s) orch_scope_add(s, orch_settled(wild_outcome()));
        break;
    case 9:
        orch_shield_begin();
        orch_sleep(chance(5));
        orch_shield_end();
        break;
    case 10: orch_local_set(chance(2) ? &key_a : &key_b, token(), give_back); break;
    case 11: wild_handle(n, s); break;
    case 12: orch_on(orch_settled(orch_ok_int(1)), wild_callback, n); break;
    default:
        check_value(orch_local(&key_a));
        if (orch_time_left() != NEVER) note((int)orch_time_left());
        break;
    }
}

static orch_result wild(void *arg) {
    node *n = arg;
    n->started++;
    note((int)(n - nodes));
    orch_scope own[4];
    bool shield = chance(6) == 0;
    if (shield) orch_shield_begin();
    for (unsigned steps = chance(n->up ? 12 : 30) + 4; steps > 0; steps--) {
        if (n->open < 4 && chance(n->open ? 5 : 2) == 0) {
            orch_scope_desc desc = {.timeout_ms = chance(3) == 0 ? chance(80) : 0,
                                    .keep_going = chance(2) == 0};
            orch_scope_open(&own[n->open], &desc);
            n->scopes[n->open] = &own[n->open], n->open++;
        } else if (n->open && chance(7) == 0) {
            note(close_of(&own[n->open - 1])); // others may start in it until then
            n->open--;
        } else wild_act(n);
    }
    for (; n->open > 0; n->open--) note(close_of(&own[n->open - 1]));
    if (shield) orch_shield_end();
    n->done++;
    return wild_outcome();
}

static void wild_body(void) {
    node_count = 1;
    nodes[0] = (node){.up = NULL};
    orch_future *f = orch_go(wild, &nodes[0]);
    orch_sleep(chance(100));
    if (chance(3) == 0) orch_cancel(f, 5);
    join(f);
    pass_time(100); // the timers that settle promises
    for (unsigned i = 0; i < node_count; i++)
        must(nodes[i].started == nodes[i].done, "left behind");
}

static void check_random(uint64_t i, bool again, orch_loop_desc desc) {
    reset();
    luck = dice = i * 0x9e3779b97f4a7c15u | 1;
    body_fn *body = wild_body;
    orch_result r = orch_run_with(&desc, run_body, &body);
    balance();
    if (!refuse_one_of && !CHECK_INT(r.error, 0)) fprintf(stderr, "case %d\n", (int)i);
    if (again && !sweeping && !CHECK(same_trace())) fprintf(stderr, "case %d\n", (int)i);
    orch_result_free(&r);
    first_trace = trace;
}

TEST(random_programs) {
    uint64_t count = sweeping ? 1 : RANDOM * test_seeds();
    for (uint64_t i = 1; i <= count && test_failures == 0; i++) {
        seed = i % 4 ? i : 0;
        for (int again = sweeping; again < 2; again++) check_random(i, again, settings());
    }
}

TEST(random_programs_short_of_memory) {
    uint64_t count = sweeping ? 0 : RANDOM * test_seeds();
    for (uint64_t i = 1; i <= count && test_failures == 0; i++) {
        seed = i % 4 ? i : 0;
        refuse_one_of = 2 + (unsigned)(i % 7);
        orch_loop_desc desc = settings();
        desc.allocator.resize = resize_unless;
        check_random(i, false, desc);
    }
}

int main(int argc, char **argv) {
    sweeping = argc > 1 && !strcmp(argv[1], "--sweep");
    return test_main(argc, argv);
}
