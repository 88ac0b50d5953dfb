// test_thread.c: posts, remotes, offloaded work, tasks on other loops, names. Threads meet at
// gates; nothing waits for a time to pass. Thread sanitizer: make .build/thread/test_thread; then
// helgrind: valgrind --tool=helgrind .build/plain/test_thread.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>

#ifdef __SANITIZE_THREAD__
#define TSAN true // does not like threads in a child
#else
#define TSAN false
#endif

// Threads can be refused, as memory can.
static int refuse_threads;
static int test_create(pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg) {
    return refuse_threads ? 11 /* EAGAIN */ : pthread_create(t, a, fn, arg);
}
#define pthread_create test_create
#define ASYNCORCH_IMPLEMENTATION // its own, for that
#include "../asyncorch.h"
#undef pthread_create
#include "pollers.h"
#include "test.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// ---- gates

typedef struct gate { // opened once
    pthread_mutex_t mutex;
    pthread_cond_t opened;
    bool open;
} gate;

#define GATE                                                                                       \
    { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false }

static void gate_open(gate *g) {
    pthread_mutex_lock(&g->mutex);
    g->open = true;
    pthread_cond_broadcast(&g->opened);
    pthread_mutex_unlock(&g->mutex);
}

static void gate_wait(gate *g) {
    pthread_mutex_lock(&g->mutex);
    while (!g->open) pthread_cond_wait(&g->opened, &g->mutex);
    pthread_mutex_unlock(&g->mutex);
}

static bool gate_is_open(gate *g) {
    pthread_mutex_lock(&g->mutex);
    bool open = g->open;
    pthread_mutex_unlock(&g->mutex);
    return open;
}

typedef struct count { // of what happens on several threads
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int n;
} count;

#define COUNT                                                                                      \
    { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0 }

static int count_add(count *c, int n) {
    pthread_mutex_lock(&c->mutex);
    n = c->n += n;
    pthread_cond_broadcast(&c->changed);
    pthread_mutex_unlock(&c->mutex);
    return n;
}

static int count_get(count *c) { return count_add(c, 0); }

static void count_wait(count *c, int n) {
    pthread_mutex_lock(&c->mutex);
    while (c->n < n) pthread_cond_wait(&c->changed, &c->mutex);
    pthread_mutex_unlock(&c->mutex);
}

// ---- tasks

#define RUN_WITH(name, unless, ...)                                                                \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        test_start();                                                                              \
        name##_body();                                                                             \
        return orch_ok_int(1);                                                                     \
    }                                                                                              \
    TEST_SKIP(name, unless) {                                                                      \
        orch_loop_desc desc = {.poller = test_poller(), __VA_ARGS__};                              \
        orch_result r = orch_run_with(&desc, name##_main, NULL);                                   \
        CHECK_INT(r.error, 0);                                                                     \
        CHECK_INT(orch_int(&r), 1);                                                                \
        orch_result_free(&r);                                                                      \
    }                                                                                              \
    static void name##_body(void)
#define TASK_TEST_IF(name, unless) RUN_WITH(name, unless, .stack_size = 65536)
#define TASK_TEST(name) TASK_TEST_IF(name, false)
#define VIRTUAL_TEST(name) RUN_WITH(name, false, .clock = ORCH_CLOCK_VIRTUAL)

#ifdef NDEBUG
#define MISUSE(name, text) TEST(name)
#else
#define MISUSE(name, text) TEST_DIES(name, "asyncorch: " text)
#endif

static orch_loop_stats stats(void) { return orch_loop_statistics(orch_loop_current()); }

static intptr_t join(orch_future *f) {
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

static void start_thread(pthread_t *thread, void *(*fn)(void *), void *arg) {
    if (pthread_create(thread, NULL, fn, arg) != 0) abort();
}

// A promise whose remote a thread gets. Without memory: the future is settled.
static orch_future *remote_new(orch_remote **remote) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    *remote = orch_promise_remote(p);
    if (*remote == NULL) orch_settle(p, orch_fail(ORCH_ENOMEM));
    return f;
}

static void settle(orch_remote *remote, orch_result r) {
    if (remote != NULL) orch_remote_settle(remote, r);
    else orch_result_free(&r);
}

static count freed = COUNT;
static void note_freed(void *value) {
    (void)value;
    count_add(&freed, 1);
}

static orch_result number(void *arg) { return orch_ok_int((intptr_t)arg); }

// ---- post

typedef struct poster {
    orch_loop *loop;
    orch_remote *done;
    int base, count, refused;
    gate *between; // opened after the posts
} poster;

// The sweep repeats a case for each of its allocations.
static int few(int n) { return test_shared->fail_at ? n / 50 : n; }

static int posted[4096], posted_count;
static void note_post(void *arg) {
    if (orch_loop_current() == NULL || orch_self() != NULL) abort();
    posted[posted_count++] = (int)(intptr_t)arg;
}

static void *post_some(void *arg) {
    poster *p = arg;
    for (int i = 0; i < p->count; i++) {
        int error = orch_post(p->loop, note_post, (void *)(intptr_t)(p->base + i));
        if (error != 0) p->refused++;
    }
    if (p->between != NULL) gate_open(p->between);
    settle(p->done, orch_ok_int(p->count));
    return NULL;
}

TASK_TEST(posts_run_on_the_loop_in_order) {
    poster p = {orch_loop_current(), NULL, 0, 100, 0, NULL};
    orch_future *done = remote_new(&p.done);
    pthread_t thread;
    start_thread(&thread, post_some, &p);
    CHECK_INT(join(done), 100); // it was sent after them
    pthread_join(thread, NULL);
    CHECK_INT(posted_count, 100);
    for (int i = 0; i < posted_count; i++) CHECK_INT(posted[i], i);
}

TASK_TEST(posts_of_four_threads_all_come) {
    const int each = few(1000);
    poster p[4];
    pthread_t threads[4];
    orch_future *done[4];
    for (int i = 0; i < 4; i++) {
        p[i] = (poster){orch_loop_current(), NULL, i * 1000, each, 0, NULL};
        done[i] = remote_new(&p[i].done);
    }
    for (int i = 0; i < 4; i++) start_thread(&threads[i], post_some, &p[i]);
    for (int i = 0; i < 4; i++) CHECK_INT(join(done[i]), each);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    CHECK_INT(posted_count, 4 * each);
    int next[4] = {0};
    for (int i = 0; i < posted_count; i++) CHECK_INT(posted[i] % 1000, next[posted[i] / 1000]++);
}

// A loop that does not sleep is not woken, whatever is posted.
TASK_TEST(a_busy_loop_is_not_woken) {
    gate between = GATE;
    poster p = {orch_loop_current(), NULL, 0, few(1000), 0, &between};
    pthread_t thread;
    CHECK_INT(orch_sleep(1), 0);
    uint64_t before = stats().wakes;
    start_thread(&thread, post_some, &p);
    gate_wait(&between); // on the loop's thread
    CHECK_INT(stats().wakes - before, 0);
    while (posted_count < p.count - p.refused) CHECK_INT(orch_yield(), 0);
    pthread_join(thread, NULL);
    CHECK_INT(stats().wakes - before, 0);
}

static gate first_runs = GATE, rest_posted = GATE;
static void hold_the_loop(void *arg) {
    (void)arg;
    gate_open(&first_runs);
    gate_wait(&rest_posted);
}

static void *post_behind(void *arg) {
    poster *p = arg;
    int error = orch_post(p->loop, hold_the_loop, NULL);
    if (error == 0) gate_wait(&first_runs);
    for (int i = 0; i < p->count; i++) {
        if (orch_post(p->loop, note_post, (void *)(intptr_t)i) != 0) p->refused++;
    }
    settle(p->done, orch_ok_int(0));
    gate_open(&rest_posted);
    return NULL;
}

TASK_TEST(posts_in_flight_wake_at_most_once) {
    poster p = {orch_loop_current(), NULL, 0, few(1000), 0, NULL};
    orch_future *done = remote_new(&p.done);
    pthread_t thread;
    uint64_t before = stats().wakes;
    if (p.done == NULL) { // nothing would run the posts
        join(done);
        return;
    }
    start_thread(&thread, post_behind, &p);
    CHECK_INT(join(done), 0);
    pthread_join(thread, NULL);
    CHECK_INT(posted_count, p.count - p.refused);
    CHECK(stats().wakes - before <= 1);
}

static void post_again(void *arg) {
    int *left = arg;
    if (*left == 0) return;
    if (test_shared->fail_at) --*left; // a sweep repeats this often
    if (orch_post(orch_loop_current(), post_again, left) != 0) *left = 0;
}

TASK_TEST(a_post_that_posts_itself_starves_nobody) {
    static int left = 100; // it goes on until the loop takes no more
    CHECK_INT(orch_post(orch_loop_current(), post_again, &left), 0);
    for (int i = 0; i < few(1000); i++) CHECK_INT(orch_yield(), 0);
    CHECK_INT(orch_sleep(2), 0);
    CHECK(left == 100 || test_shared->fail_at);
}

TEST(a_post_to_a_loop_that_is_gone_is_an_error) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    CHECK_INT(orch_post(loop, note_post, NULL), 0);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(posted_count, 1);
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK_INT(orch_post(loop, note_post, NULL), ORCH_ECLOSED);
    CHECK_INT(posted_count, 1);
}

TEST(what_was_posted_runs_even_as_the_loop_is_freed) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    poster p = {loop, NULL, 0, few(300), 0, NULL};
    pthread_t thread;
    start_thread(&thread, post_some, &p);
    pthread_join(thread, NULL);
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK_INT(posted_count, p.count - p.refused);
}

static void *post_until_closed(void *arg) {
    poster *p = arg;
    int error;
    do {
        error = orch_post(p->loop, note_post, NULL);
        if (error == 0 && ++p->count == 1) gate_open(p->between);
        if (error == ORCH_ENOMEM) gate_open(p->between);
    } while (error == 0 && p->count < few(4000));
    return NULL;
}

// Each that was accepted runs, whenever main ends.
TEST(a_loop_ends_under_posts) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    gate begun = GATE;
    poster p = {loop, NULL, 0, 0, 0, &begun};
    pthread_t thread;
    start_thread(&thread, post_until_closed, &p);
    gate_wait(&begun);
    CHECK_INT(orch_loop_free(loop), 0);
    pthread_join(thread, NULL);
    CHECK_INT(posted_count, p.count);
}

// A loop that stays is open again.
TEST(a_loop_that_could_not_be_freed_takes_posts) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_promise ticket;
    orch_future *held = orch_future_new(&ticket);
    orch_future *shared = orch_ref(held);
    int busy = orch_loop_free(loop);
    if (busy == 0) return; // without memory nothing is held
    CHECK_INT(busy, ORCH_EBUSY);
    CHECK_INT(orch_post(loop, note_post, NULL), 0);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(posted_count, 1);
    orch_drop(held);
    orch_drop(shared);
    CHECK_INT(orch_loop_free(loop), 0);
}

MISUSE(post_without_a_function, "orch_post") {
    orch_loop *loop = orch_loop_new(NULL);
    CHECK_INT(orch_post(loop, NULL, NULL), ORCH_EINVAL);
    CHECK_INT(orch_post(NULL, note_post, NULL), ORCH_EINVAL);
    CHECK_INT(orch_loop_free(loop), 0);
}

static void stop_it(void *arg) { orch_loop_stop(arg); }
static void *stop_from_outside(void *arg) {
    orch_post(arg, stop_it, arg);
    return NULL;
}

TEST(a_sleeping_loop_is_stopped_by_a_post) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    pthread_t thread;
    orch_future *hour = orch_after(test_shared->fail_at ? 10 : 3600000);
    bool timed = !orch_is_settled(hour);
    start_thread(&thread, stop_from_outside, loop);
    if (timed) CHECK_INT(orch_loop_run(loop), 0);
    pthread_join(thread, NULL);
    orch_drop(hour);
    CHECK_INT(orch_loop_free(loop), 0);
}

// Without a descriptor to be woken through, a loop looks now and then.
TASK_TEST(a_loop_without_descriptors_is_woken_too) {
    poster p = {orch_loop_current(), NULL, 0, 10, 0, NULL};
    orch_future *done = remote_new(&p.done);
    pthread_t thread;
    struct rlimit limit, none = {0, 0};
    CHECK_INT(getrlimit(RLIMIT_NOFILE, &limit), 0);
    none.rlim_max = limit.rlim_max;
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &none), 0);
    start_thread(&thread, post_some, &p);
    CHECK_INT(join(done), 10);
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &limit), 0);
    pthread_join(thread, NULL);
    CHECK_INT(posted_count, 10);
}

// ---- remote

static void *settle_value(void *arg) {
    settle(arg, orch_ok_int(42));
    return NULL;
}

static void *settle_error(void *arg) {
    settle(arg, orch_failf(7, "the thread says %d", 8));
    return NULL;
}

static void *settle_owned(void *arg) {
    settle(arg, orch_ok(arg, note_freed));
    return NULL;
}

TASK_TEST(a_thread_settles) {
    orch_remote *remote;
    pthread_t thread;
    orch_future *f = remote_new(&remote);
    start_thread(&thread, settle_value, remote);
    CHECK_INT(join(f), 42);
    pthread_join(thread, NULL);
    f = remote_new(&remote);
    start_thread(&thread, settle_error, remote);
    orch_result r = orch_await(f);
    CHECK_INT(r.error, 7);
    CHECK_STR(orch_message(&r), "the thread says 8");
    orch_result_free(&r);
    pthread_join(thread, NULL);
}

TASK_TEST(a_remote_may_be_settled_here_too) {
    orch_remote *remote;
    orch_future *f = remote_new(&remote);
    settle(remote, orch_ok_int(3));
    CHECK(!orch_is_settled(f)); // from the loop, like from everywhere
    CHECK_INT(join(f), 3);
}

static orch_remote *left_over;
static orch_result leave_remote(void *arg) {
    (void)arg;
    orch_drop(remote_new(&left_over));
    return orch_ok_int(1);
}

static void *settle_late(void *arg) {
    (void)arg;
    if (left_over == NULL) return NULL;
    CHECK(!orch_remote_settle(left_over, orch_ok(&freed, note_freed)));
    CHECK_INT(count_get(&freed), 1); // by this thread
    return NULL;
}

TEST(a_remote_outlives_its_loop) {
    orch_result r = orch_run(leave_remote, NULL);
    CHECK_INT(orch_int(&r), 1);
    pthread_t thread;
    start_thread(&thread, settle_late, NULL);
    pthread_join(thread, NULL);
    r = orch_run(leave_remote, NULL);
    if (r.error == 0) orch_remote_drop(left_over);
    orch_remote_drop(NULL);
}

static orch_result wait_for_dropped(void *arg) {
    (void)arg;
    orch_remote *remote;
    orch_future *f = remote_new(&remote);
    orch_remote_drop(remote);
    return orch_await(f);
}

static char reported[4096];
static void note_report(const char *text, void *context) {
    (void)context;
    strncat(reported, text, sizeof reported - strlen(reported) - 1);
}

TEST(a_dropped_remote_leaves_a_deadlock) {
    orch_loop_desc desc = {.on_report = note_report};
    orch_result r = orch_run_with(&desc, wait_for_dropped, NULL);
    CHECK_INT(r.error, ORCH_EDEADLK);
    CHECK(strstr(reported, "deadlock") != NULL);
    orch_result_free(&r);
}

// The one that is out cannot help what waits for something else.
static orch_result wait_beside_remote(void *arg) {
    orch_promise ticket;
    orch_drop(remote_new(arg)); // its promise has settled
    return orch_await(orch_future_new(&ticket));
}

TEST(a_remote_of_a_settled_promise_does_not_hide_a_deadlock) {
    orch_remote *remote = NULL;
    orch_loop_desc desc = {.on_report = note_report};
    orch_result r = orch_run_with(&desc, wait_beside_remote, &remote);
    CHECK_INT(r.error, ORCH_EDEADLK);
    orch_result_free(&r);
    orch_remote_drop(remote);
}

TASK_TEST(a_dropped_future_ends_at_once_and_what_comes_is_freed) {
    orch_remote *remote;
    pthread_t thread;
    orch_future *f = remote_new(&remote);
    orch_drop(f);
    start_thread(&thread, settle_owned, remote);
    pthread_join(thread, NULL);
    while (count_get(&freed) == 0) orch_sleep(1);
    CHECK_INT(count_get(&freed), 1);
}

TASK_TEST(the_first_to_settle_decides) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_remote *remote = orch_promise_remote(p);
    if (!CHECK(remote != NULL)) {
        orch_drop(f);
        return;
    }
    CHECK(orch_settle(p, orch_ok_int(1)));
    CHECK(orch_remote_settle(remote, orch_ok(&p, note_freed)));
    CHECK_INT(join(f), 1);
    CHECK_INT(count_get(&freed), 0); // it comes from the loop
    CHECK_INT(join(orch_go_on(orch_loop_current(), number, (void *)1)), 1);
    CHECK_INT(count_get(&freed), 1);
    remote = orch_promise_remote(p); // a dead ticket is no mistake
    if (CHECK(remote != NULL)) CHECK(orch_remote_settle(remote, orch_ok_int(2)));
}

static gate time_stands = GATE;
static void *settle_after_gate(void *arg) {
    gate_wait(&time_stands);
    settle(arg, orch_ok_int(1));
    return NULL;
}

// An hour would pass at once otherwise.
VIRTUAL_TEST(virtual_time_stands_still_while_a_thread_works) {
    orch_remote *remote;
    pthread_t thread;
    uint64_t start = orch_now();
    orch_future *hour = orch_after(3600000), *f = remote_new(&remote);
    start_thread(&thread, settle_after_gate, remote);
    CHECK_INT(orch_yield(), 0);
    CHECK_INT(orch_yield(), 0);
    gate_open(&time_stands);
    CHECK_INT(join(f), 1);
    CHECK_INT(orch_now() - start, 0);
    CHECK(!orch_is_settled(hour));
    CHECK_INT(join(hour), 0);
    CHECK_INT(orch_now() - start, 3600000);
    pthread_join(thread, NULL);
}

TEST(a_step_without_time_does_not_wait_for_a_thread) {
    for (int virtual = 0; virtual < 2; virtual ++) {
        orch_loop_desc desc = {.clock = virtual ? ORCH_CLOCK_VIRTUAL : ORCH_CLOCK_MONOTONIC};
        orch_loop *loop = orch_loop_new(&desc);
        if (!CHECK(loop != NULL)) return;
        orch_remote *remote;
        orch_future *f = remote_new(&remote);
        if (remote != NULL) {
            CHECK_INT(orch_loop_step(loop, 0), 1);
            CHECK_INT(orch_loop_step(loop, 1), 1);
            settle(remote, orch_ok_int(1));
            CHECK_INT(orch_loop_run(loop), 0);
            CHECK(orch_is_settled(f));
        }
        orch_drop(f);
        CHECK_INT(orch_loop_free(loop), 0);
    }
}

MISUSE(a_remote_without_a_loop, "orch_promise_remote") {
    orch_promise none = {NULL, 0};
    CHECK(orch_promise_remote(none) == NULL);
}

// ---- what crosses

typedef enum crossing { LIST, FAILED_LIST, SHARE, FAILED_SHARE, LENT, CHAIN, KEPT } crossing;

static orch_result failure(void *arg) {
    (void)arg;
    return orch_failf(-5, "it went wrong");
}
static orch_result owner(void *arg) { return orch_ok(arg, note_freed); }

static orch_future *two(void) {
    orch_future *f[2];
    f[0] = orch_go(number, (void *)1);
    f[1] = orch_go(number, (void *)2);
    return orch_all_n(2, f);
}

static orch_future *two_fail(void) {
    orch_future *f[2];
    f[0] = orch_go(failure, NULL);
    f[1] = orch_go(failure, NULL);
    return orch_any_n(2, f);
}

// A share: somebody else holds the future.
static orch_result shared(orch_task_fn fn) {
    orch_future *f = orch_go(fn, &freed), *again = orch_ref(f);
    orch_result r = orch_await(f);
    orch_detach(again);
    return r;
}

static orch_future *lender;
static orch_result lend(void) {
    lender = orch_go(number, (void *)9);
    return orch_wait(lender);
}

static orch_result drop_lender(void *arg) {
    orch_drop(lender);
    return orch_ok(arg, NULL);
}

// Makes a result of a kind, on a loop of the thread that calls it.
static orch_result make_crossing(void *arg) {
    switch ((crossing)(intptr_t)arg) {
    case LIST: return orch_await(two());
    case FAILED_LIST: return orch_await(two_fail());
    case SHARE: return shared(owner);
    case FAILED_SHARE: return shared(failure);
    case LENT: return lend();
    case CHAIN: return orch_chain(orch_go(number, (void *)4));
    default: return orch_await(two());
    }
}

static orch_result kept_crossing(void *arg) { return orch_run(make_crossing, arg); }

static orch_result chain_without_loop(void *arg) { return orch_chain(arg); }

TASK_TEST(what_orch_run_returned_crosses_whole) {
    orch_result r = orch_await(orch_offload(kept_crossing, (void *)KEPT));
    if (CHECK_INT(r.error, 0)) {
        CHECK_INT(orch_count(&r), 2);
        CHECK_INT(orch_int(orch_at(&r, 1)), 2);
    }
    orch_result_free(&r);
    CHECK_INT(join(orch_offload(kept_crossing, (void *)CHAIN)), 4);
}

#ifdef NDEBUG
TASK_TEST(a_chain_without_a_loop_is_that_mistake) {
    CHECK_INT(join(orch_offload(chain_without_loop, orch_future_new(NULL))), ORCH_EINVAL);
}
#else
static orch_future *chained;
TEST_DIES(a_chain_without_a_loop_is_that_mistake, "orch_chain") {
    orch_result r = chain_without_loop(chained);
    orch_result_free(&r);
}
#endif

// ---- offload

static pthread_t loop_thread;
static orch_result elsewhere(void *arg) {
    bool other = !pthread_equal(pthread_self(), loop_thread) && orch_loop_current() == NULL;
    return orch_ok_int(other ? (intptr_t)arg : -1);
}

TASK_TEST(offloaded_work_runs_on_another_thread) {
    loop_thread = pthread_self();
    CHECK_INT(join(orch_offload(elsewhere, (void *)5)), 5);
    orch_future *f[20];
    for (int i = 0; i < 20; i++) f[i] = orch_offload(elsewhere, (void *)(intptr_t)i);
    for (int i = 0; i < 20; i++) CHECK_INT(join(f[i]), i);
    CHECK(orch_pool_statistics(ORCH_LANE_DEFAULT).begun <= 21);
    CHECK(orch_pool_statistics(ORCH_LANE_DEFAULT).limit >= 4);
}

// An idle thread watches for more before it sleeps, but not for long.
TASK_TEST(idle_threads_sleep) {
    loop_thread = pthread_self();
    for (int i = 0; i < 20; i++) CHECK_INT(join(orch_offload(elsewhere, (void *)1)), 1);
    clock_t used = clock(); // of all threads
    CHECK_INT(orch_sleep(test_shared->fail_at ? 1 : 200), 0);
    used = clock() - used;
    CHECK(used < CLOCKS_PER_SEC / 10 || test_shared->refused);
}

TASK_TEST(errors_and_messages_come_back) {
    orch_result r = orch_await(orch_offload(failure, NULL));
    CHECK_INT(r.error, -5);
    CHECK_STR(orch_message(&r), "it went wrong");
    orch_result_free(&r);
    r = orch_await(orch_offload(owner, &freed));
    if (CHECK_INT(r.error, 0)) {
        CHECK(r.value == &freed);
        CHECK_INT(count_get(&freed), 0);
        orch_result_free(&r);
        CHECK_INT(count_get(&freed), 1);
    }
}

static count arg_released = COUNT;
static void release_arg(void *arg) {
    if (*(int *)arg != 17) abort();
    count_add(&arg_released, 1);
}

static orch_result read_arg(void *arg) { return orch_ok_int(*(int *)arg); }

TASK_TEST(arguments_are_copied_and_released_once) {
    int value = 17;
    orch_offload_desc desc = {"read", read_arg, &value, sizeof value, release_arg, ORCH_LANE_OWN};
    orch_future *f = orch_offload_with(&desc);
    value = 0;
    CHECK_INT(join(f), 17);
    if (count_get(&arg_released) != 1) abort(); // in a sweep too
    value = 17;
    desc.arg_size = 0;
    CHECK_INT(join(orch_offload_with(&desc)), 17);
    if (count_get(&arg_released) != 2) abort();
}

static gate blocked_begun = GATE, blocked_end = GATE;
static orch_result block(void *arg) {
    gate_open(&blocked_begun);
    gate_wait(&blocked_end);
    return orch_ok(arg, arg != NULL ? note_freed : NULL);
}

static orch_offload_desc in_lane(orch_task_fn fn, void *arg) {
    orch_offload_desc desc = {"lane", fn, arg, 0, NULL, ORCH_LANE_OWN};
    return desc;
}

// Work that occupies the lane's one thread. False when it could not begin.
static bool occupy(orch_future **f, void *arg) {
    orch_offload_desc desc = in_lane(block, arg);
    *f = orch_offload_with(&desc);
    if (orch_is_settled(*f)) return false;
    gate_wait(&blocked_begun);
    return true;
}

static int never;
static orch_result run_never(void *arg) {
    never++;
    return orch_ok(arg, NULL);
}

TASK_TEST(cancelled_before_it_begins_it_never_runs) {
    orch_future *first;
    int value = 17;
    if (occupy(&first, NULL)) {
        orch_offload_desc desc = in_lane(run_never, &value);
        desc.release = release_arg;
        orch_future *second = orch_offload_with(&desc), *third = orch_offload_with(&desc);
        orch_drop(second);
        CHECK_INT(count_get(&arg_released), orch_is_settled(third) ? 2 : 1);
        CHECK_INT(join(orch_timeout(third, 0)), ORCH_ETIMEDOUT);
        if (count_get(&arg_released) != 2) abort();
        CHECK_INT(orch_pool_statistics(ORCH_LANE_OWN).queued, 0);
    }
    gate_open(&blocked_end);
    orch_drop(first);
    orch_offload_desc desc = in_lane(number, (void *)3);
    CHECK_INT(join(orch_offload_with(&desc)), 3); // the lane's thread is through with the others
    CHECK_INT(never, 0);
}

TASK_TEST(abandoned_work_runs_on_and_its_result_is_freed) {
    orch_future *first;
    if (occupy(&first, &freed)) {
        orch_drop(first); // does not wait
        CHECK_INT(count_get(&freed), 0);
        gate_open(&blocked_end);
        orch_offload_desc desc = in_lane(number, (void *)3);
        CHECK_INT(join(orch_offload_with(&desc)), 3); // came home after it
        CHECK_INT(count_get(&freed), 1);
        return;
    }
    orch_drop(first);
}

TASK_TEST(a_timeout_ends_the_wait_for_a_thread) {
    orch_future *first;
    bool begun = occupy(&first, NULL);
    CHECK_INT(join(orch_timeout(first, 1)), begun ? ORCH_ETIMEDOUT : ORCH_ENOMEM);
    gate_open(&blocked_end);
}

static orch_result leave_work(void *arg) {
    orch_future *first;
    *(bool *)arg = occupy(&first, &freed);
    orch_detach(first);
    return orch_ok_int(1);
}

TEST(a_loop_ends_while_a_thread_works_for_it) {
    bool begun = false;
    orch_result r = orch_run(leave_work, &begun);
    CHECK_INT(orch_int(&r), 1);
    CHECK_INT(count_get(&freed), 0);
    if (!begun) return;
    CHECK_INT(orch_pool_statistics(ORCH_LANE_OWN).threads, 1);
    gate_open(&blocked_end);
    count_wait(&freed, 1); // by the thread
}

TEST(a_loop_is_freed_while_a_thread_works_for_it) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_future *first;
    bool begun = occupy(&first, &freed);
    orch_detach(first);
    CHECK_INT(orch_loop_free(loop), 0);
    gate_open(&blocked_end);
    if (begun) count_wait(&freed, 1);
}

TEST(idle_threads_end_with_the_last_loop) {
    bool begun = false;
    gate_open(&blocked_end);
    orch_result r = orch_run(leave_work, &begun);
    CHECK_INT(orch_int(&r), 1);
    if (begun) count_wait(&freed, 1);
    r = orch_run(what_orch_run_returned_crosses_whole_main, NULL);
    CHECK_INT(orch_int(&r), 1);
    CHECK_INT(orch_pool_statistics(ORCH_LANE_DEFAULT).threads, 0);
    CHECK_INT(orch_pool_statistics(ORCH_LANE_DEFAULT).idle, 0);
}

static int order[10], ordered; // by the one thread of the lane
static orch_result note_order(void *arg) {
    order[ordered++] = (int)(intptr_t)arg;
    return orch_ok(NULL, NULL);
}

TASK_TEST(a_lane_is_first_come_first_served) {
    orch_future *first, *f[10];
    occupy(&first, NULL);
    for (int i = 0; i < 10; i++) {
        orch_offload_desc desc = in_lane(note_order, (void *)(intptr_t)i);
        f[i] = orch_offload_with(&desc);
    }
    gate_open(&blocked_end);
    join(first);
    for (int i = 0; i < 10; i++) CHECK_INT(join(f[i]), 0);
    CHECK_INT(ordered, 10);
    for (int i = 0; i < ordered; i++) CHECK_INT(order[i], i);
}

static count running = COUNT;
static int most_running;
static orch_result run_beside(void *arg) {
    (void)arg;
    pthread_mutex_lock(&running.mutex);
    if (++running.n > most_running) most_running = running.n;
    pthread_cond_broadcast(&running.changed);
    while (most_running < 2) pthread_cond_wait(&running.changed, &running.mutex); // both came
    running.n--;
    pthread_mutex_unlock(&running.mutex);
    return orch_ok_int(0);
}

TASK_TEST(a_lane_has_as_many_threads_as_it_may) {
    orch_future *f[8];
    CHECK_INT(orch_pool_limit(ORCH_LANE_OWN, 2), 0);
    int made = 0;
    for (int i = 0; i < 8; i++) {
        orch_offload_desc desc = in_lane(run_beside, NULL);
        f[i] = orch_offload_with(&desc);
        made += !orch_is_settled(f[i]);
    }
    if (made == 1) { // nobody to meet
        pthread_mutex_lock(&running.mutex);
        most_running = 2;
        pthread_cond_broadcast(&running.changed);
        pthread_mutex_unlock(&running.mutex);
    }
    for (int i = 0; i < 8; i++) CHECK_INT(join(f[i]), 0);
    CHECK_INT(most_running, 2);
    CHECK_INT(orch_pool_statistics(ORCH_LANE_OWN).threads, 2);
    CHECK_INT(orch_pool_limit(ORCH_LANE_OWN, 1), 0);
    orch_offload_desc desc = in_lane(number, (void *)3);
    CHECK_INT(join(orch_offload_with(&desc)), 3);
}

// A higher limit starts threads for what waits already.
TASK_TEST(a_limit_is_raised_under_load) {
    orch_future *first, *second;
    if (!occupy(&first, NULL)) {
        orch_drop(first);
        return;
    }
    orch_offload_desc desc = in_lane(number, (void *)3);
    second = orch_offload_with(&desc);
    CHECK_INT(orch_pool_limit(ORCH_LANE_OWN, 2), 0);
    CHECK_INT(join(second), 3);
    gate_open(&blocked_end);
    CHECK_INT(join(first), 0);
}

static orch_result masked(void *arg) {
    sigset_t set;
    (void)arg;
    pthread_sigmask(SIG_BLOCK, NULL, &set);
    return orch_ok_int(sigismember(&set, SIGINT) + 2 * sigismember(&set, SIGCHLD) +
                       4 * sigismember(&set, SIGSEGV));
}

TASK_TEST(signals_are_blocked_on_its_threads) {
    CHECK_INT(join(orch_offload(masked, NULL)), 3);
    sigset_t set;
    pthread_sigmask(SIG_BLOCK, NULL, &set);
    CHECK(!sigismember(&set, SIGINT));
}

TASK_TEST(without_any_thread_it_is_an_error) {
    int value = 17;
    orch_offload_desc desc = {"none", read_arg, &value, sizeof value, release_arg, ORCH_LANE_OWN};
    refuse_threads = 1;
    orch_result r = orch_await(orch_offload_with(&desc));
    CHECK_INT(r.error, -EAGAIN);
    CHECK(strstr(orch_message(&r), "no thread") != NULL);
    orch_result_free(&r);
    if (count_get(&arg_released) != 1) abort();
    refuse_threads = 0;
    CHECK_INT(join(orch_offload_with(&desc)), 17);
}

TASK_TEST(with_one_thread_the_work_waits_for_it) {
    orch_future *first, *second;
    CHECK_INT(orch_pool_limit(ORCH_LANE_OWN, 2), 0);
    bool begun = occupy(&first, NULL);
    refuse_threads = 1;
    orch_offload_desc desc = in_lane(number, (void *)3);
    second = orch_offload_with(&desc);
    gate_open(&blocked_end);
    if (begun) CHECK_INT(join(second), 3);
    else orch_drop(second);
    join(first);
}

MISUSE(offload_without_a_function, "orch_offload") {
    orch_loop *loop = orch_loop_new(NULL);
    CHECK(orch_peek(orch_offload(NULL, NULL))->error == ORCH_EINVAL);
    CHECK_INT(orch_loop_free(loop), 0);
}

MISUSE(offload_in_an_unknown_lane, "orch_offload_with") {
    orch_loop *loop = orch_loop_new(NULL);
    int value = 17;
    orch_offload_desc desc = {NULL, read_arg, &value, 0, release_arg, ORCH_LANES};
    CHECK(orch_peek(orch_offload_with(&desc))->error == ORCH_EINVAL);
    CHECK_INT(count_get(&arg_released), 1);
    CHECK_INT(orch_loop_free(loop), 0);
}

MISUSE(offload_without_a_loop, "orch_offload") {
    orch_future *f = orch_offload(number, NULL);
    CHECK(f != NULL);
}

MISUSE(a_limit_of_no_threads, "orch_pool_limit") {
    CHECK_INT(orch_pool_limit(ORCH_LANE_OWN, 0), ORCH_EINVAL);
    CHECK_INT(orch_pool_limit(ORCH_LANES, 1), ORCH_EINVAL);
    CHECK_INT(orch_pool_statistics(ORCH_LANES).limit, 0);
}

static orch_result end_at_once(void *arg) { return orch_ok(arg, NULL); }

// Refused while it is cancelled already: it may have begun, but nobody waits.
static orch_result offload_when_cancelled(void *arg) {
    (void)arg;
    CHECK_INT(orch_sleep(3600000), ORCH_ECANCELED);
    CHECK_INT(join(orch_offload(end_at_once, NULL)), ORCH_ECANCELED);
    orch_shield_begin();
    CHECK_INT(join(orch_offload(elsewhere, (void *)6)), 6); // clean-up may
    orch_shield_end();
    return orch_ok_int(2);
}

TASK_TEST(a_cancelled_task_offloads_only_under_a_shield) {
    orch_future *f = orch_go(offload_when_cancelled, NULL);
    if (!orch_is_settled(f)) orch_cancel(f, 0);
    CHECK_INT(join(f), 2);
}

// A shield holds while a thread works, also when main has ended.
static int cleaned;
static orch_result clean_up_slowly(void *arg) {
    (void)arg;
    orch_sleep(3600000);
    orch_shield_begin();
    cleaned = (int)join(orch_offload(elsewhere, (void *)6));
    orch_shield_end();
    return orch_ok(NULL, NULL);
}

static orch_result leave_cleaner(void *arg) {
    (void)arg;
    orch_detach(orch_go(clean_up_slowly, NULL));
    return orch_ok_int(1);
}

TEST(a_clean_up_waits_for_a_thread_after_main) {
    orch_result r = orch_run(leave_cleaner, NULL);
    CHECK_INT(r.error, 0);
    CHECK_INT(cleaned, 6);
}

// ---- fork

static int child_status(pid_t pid) {
    int status = -1;
    CHECK(waitpid(pid, &status, 0) == pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static orch_result offload_in_child(void *arg) {
    (void)arg;
    return orch_ok_int(join(orch_offload(elsewhere, (void *)7)));
}

static void *fork_beside(void *arg) {
    (void)arg;
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        loop_thread = pthread_self();
        bool empty = orch_pool_statistics(ORCH_LANE_OWN).threads == 0 &&
                     orch_pool_statistics(ORCH_LANE_OWN).queued == 0;
        orch_result r = orch_run(offload_in_child, NULL);
        _exit(empty && (r.error == ORCH_ENOMEM || orch_int(&r) == 7) ? 3 : 4);
    }
    return (void *)(intptr_t)child_status(pid);
}

// Its pool is empty, whatever the parent's threads do.
TASK_TEST_IF(a_child_begins_with_an_empty_pool, TSAN) {
    orch_future *first, *second;
    pthread_t thread;
    void *status = NULL;
    bool begun = occupy(&first, NULL);
    orch_offload_desc desc = in_lane(number, (void *)3);
    second = orch_offload_with(&desc);
    CHECK_INT(join(orch_offload(number, (void *)8)), 8);
    start_thread(&thread, fork_beside, NULL);
    pthread_join(thread, &status);
    CHECK_INT((intptr_t)status, 3);
    gate_open(&blocked_end);
    if (begun) CHECK_INT(join(second), 3);
    else orch_drop(second);
    join(first);
}

// What the parent's threads would have brought has been cancelled there; here it comes.
TASK_TEST(work_from_before_a_fork_is_cancelled_in_the_child) {
    orch_future *first, *second;
    bool begun = occupy(&first, NULL);
    orch_offload_desc desc = in_lane(number, (void *)3);
    second = orch_offload_with(&desc);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        intptr_t a = join(first), b = join(second);
        intptr_t c = join(orch_timeout(orch_after(3600000), 2)); // it sleeps
        bool held = !begun || (a == ORCH_ECANCELED && b == ORCH_ECANCELED && c == ORCH_ETIMEDOUT);
        _exit(held || test_shared->refused ? 3 : 4);
    }
    CHECK_INT(child_status(pid), 3);
    gate_open(&blocked_end);
    if (begun) CHECK_INT(join(second), 3);
    else orch_drop(second);
    CHECK_INT(join(first), 0);
}

// ---- a task on another loop

// A thread whose loop runs until it is told to stop.
typedef struct host {
    pthread_t thread;
    orch_loop *loop;
    orch_remote *stop;
    gate ready;
    int error;
} host;

static orch_result host_main(void *arg) {
    host *h = arg;
    orch_future *f = remote_new(&h->stop);
    h->loop = orch_loop_current();
    gate_open(&h->ready);
    return orch_await(f);
}

static void *host_thread(void *arg) {
    host *h = arg;
    orch_loop_desc desc = {.poller = test_poller()};
    orch_result r = orch_run_with(&desc, host_main, h);
    h->error = r.error;
    orch_result_free(&r);
    gate_open(&h->ready); // if it did not come to that
    return NULL;
}

// False when it could not start; then it has ended.
static bool host_start(host *h) {
    static const gate closed = GATE;
    h->loop = NULL;
    h->stop = NULL;
    h->error = 0;
    h->ready = closed;
    start_thread(&h->thread, host_thread, h);
    gate_wait(&h->ready);
    if (h->stop != NULL) return true;
    pthread_join(h->thread, NULL);
    return false;
}

static void host_stop(host *h) {
    orch_remote_settle(h->stop, orch_ok(NULL, NULL));
    pthread_join(h->thread, NULL);
}

#define HOST_TEST(name)                                                                            \
    static void name##_on(host *h);                                                                \
    TASK_TEST(name) {                                                                              \
        host h;                                                                                    \
        if (!host_start(&h)) return;                                                               \
        name##_on(&h);                                                                             \
        host_stop(&h);                                                                             \
        CHECK_INT(h.error, 0);                                                                     \
    }                                                                                              \
    static void name##_on(host *h)

static orch_result on_the_host(void *arg) {
    host *h = arg;
    bool there = orch_loop_current() == h->loop && pthread_equal(pthread_self(), h->thread);
    if (orch_self() == NULL || orch_yield() != 0) return orch_fail(ORCH_ENOTASK);
    return orch_ok_int(there ? 5 : 6);
}

HOST_TEST(a_task_runs_on_another_loop) {
    CHECK_INT(join(orch_go_on(h->loop, on_the_host, h)), 5);
    CHECK_INT(join(orch_go_on(h->loop, end_at_once, NULL)), 0); // one that never waits
    orch_result r = orch_await(orch_go_on(h->loop, failure, NULL));
    CHECK_INT(r.error, -5);
    CHECK_STR(orch_message(&r), "it went wrong");
    orch_result_free(&r);
    orch_future *f[10];
    for (int i = 0; i < 10; i++) f[i] = orch_go_on(h->loop, on_the_host, h);
    CHECK_INT(join(orch_all_n(10, f)) <= 0, false);
}

TASK_TEST(a_task_goes_on_its_own_loop_later) {
    posted_count = 0;
    orch_future *f = orch_go_on(orch_loop_current(), number, (void *)4);
    CHECK(!orch_is_settled(f));
    CHECK_INT(join(f), 4);
}

typedef struct guest { // on the caller's stack
    gate begun;
    bool shielded, ended;
    int reason;
} guest;

static orch_result stay(void *arg) {
    guest *g = arg;
    gate_open(&g->begun);
    int error = orch_sleep(3600000);
    g->reason = orch_cancel_reason();
    if (g->shielded) {
        orch_shield_begin();
        orch_sleep(1);
        orch_shield_end();
    }
    g->ended = true;
    return orch_fail(error != 0 ? error : -1);
}

static bool begun_there(orch_future *f, guest *g) {
    while (!orch_is_settled(f) && !gate_is_open(&g->begun)) orch_sleep(1);
    return !orch_is_settled(f);
}

HOST_TEST(a_drop_waits_until_the_task_there_has_ended) {
    for (int shielded = 0; shielded < 2; shielded++) {
        guest g = {GATE, shielded, false, 0};
        orch_future *f = orch_go_on(h->loop, stay, &g);
        bool begun = begun_there(f, &g);
        orch_drop(f);
        CHECK_INT(g.ended, begun);
    }
}

HOST_TEST(cancelling_reaches_the_task_there) {
    guest g = {GATE, false, false, 0};
    orch_future *f = orch_go_on(h->loop, stay, &g);
    if (begun_there(f, &g)) orch_cancel(f, 77);
    CHECK_INT(join(f), ORCH_ECANCELED);
    CHECK_INT(g.reason, 77);
    CHECK_INT(join(orch_timeout(orch_go_on(h->loop, stay, &g), 0)), ORCH_ETIMEDOUT);
}

TASK_TEST(a_loop_that_is_gone_takes_no_task) {
    host h;
    if (!host_start(&h)) return;
    host_stop(&h);
    CHECK_INT(join(orch_go_on(h.loop, number, NULL)), ORCH_ECLOSED);
}

TASK_TEST(a_loop_that_goes_takes_its_guests_along) {
    host h;
    if (!host_start(&h)) return;
    guest g = {GATE, false, false, 0};
    orch_future *f = orch_go_on(h.loop, stay, &g);
    bool begun = begun_there(f, &g);
    host_stop(&h);
    CHECK_INT(join(f), begun ? ORCH_ECANCELED : ORCH_ENOMEM);
    CHECK_INT(g.ended, begun);
}

static bool never_ends(void *context, int reason) {
    (void)context;
    (void)reason;
    return false;
}

// Its producer says that it will still settle, and does not.
static orch_result stuck(void *arg) {
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    orch_promise_on_cancel(p, never_ends, NULL);
    gate_open(arg);
    return orch_await(f);
}

TASK_TEST(a_guest_that_cannot_end_is_let_go_with_its_loop) {
    host h;
    gate begun = GATE;
    if (!host_start(&h)) return;
    orch_future *f = orch_go_on(h.loop, stuck, &begun);
    while (!orch_is_settled(f) && !gate_is_open(&begun)) orch_sleep(1);
    host_stop(&h);
    intptr_t error = join(f);
    CHECK(error == ORCH_ECANCELED || error == ORCH_ECLOSED);
}

HOST_TEST(what_a_task_there_returns_is_plain) {
    orch_result r = orch_await(orch_go_on(h->loop, make_crossing, (void *)LIST));
    CHECK_INT(r.error, ORCH_ETHREAD);
    CHECK_STR(orch_message(&r), "a list or a shared result cannot leave its thread");
    orch_result_free(&r);
    r = orch_await(orch_go_on(h->loop, make_crossing, (void *)FAILED_LIST));
    CHECK_INT(r.error, ORCH_EALLFAILED);
    CHECK_INT(orch_count(&r), 0);
    orch_result_free(&r);
    CHECK_INT(join(orch_go_on(h->loop, make_crossing, (void *)SHARE)), ORCH_ETHREAD);
    r = orch_await(orch_go_on(h->loop, make_crossing, (void *)FAILED_SHARE));
    CHECK_INT(r.error, -5);
    CHECK_STR(orch_message(&r), "it went wrong");
    orch_result_free(&r);
    CHECK_INT(join(orch_go_on(h->loop, make_crossing, (void *)LENT)), 9);
    CHECK_INT(join(orch_go_on(h->loop, drop_lender, NULL)), 0);
    CHECK_INT(join(orch_go_on(h->loop, make_crossing, (void *)CHAIN)), 4);
}

static orch_result leave_guest(void *arg) {
    host *h = arg;
    static guest g = {GATE, false, false, 0};
    orch_future *f = orch_go_on(h->loop, stay, &g);
    orch_result r = orch_ok_int(begun_there(f, &g));
    orch_detach(f);
    if (!gate_is_open(&g.begun)) g.ended = true;
    h->error = (int)offsetof(guest, ended);
    return orch_ok(&g, r.release);
}

// The caller's loop ends: it asks the guest to end, and waits for that.
TEST(a_callers_loop_waits_for_its_guests) {
    host h;
    if (!host_start(&h)) return;
    orch_result r = orch_run(leave_guest, &h);
    if (r.error == 0) CHECK(((guest *)r.value)->ended);
    host_stop(&h);
}

// Two loops send each other tasks.
static orch_result there_and_back(void *arg) {
    return orch_ok_int(join(orch_go_on(arg, number, (void *)2)));
}

HOST_TEST(tasks_go_there_and_back) {
    orch_future *f[50];
    const int tasks = test_shared->fail_at ? 3 : 50;
    for (int i = 0; i < tasks; i++) f[i] = orch_go_on(h->loop, there_and_back, orch_loop_current());
    for (int i = 0; i < tasks; i++) CHECK_INT(join(f[i]), 2);
}

MISUSE(go_on_without_a_loop, "orch_go_on") {
    CHECK(orch_go_on(NULL, number, NULL) != NULL);
    orch_loop *loop = orch_loop_new(NULL);
    CHECK(orch_peek(orch_go_on(loop, NULL, NULL))->error == ORCH_EINVAL);
    CHECK_INT(orch_loop_free(loop), 0);
}

// ---- names

TASK_TEST(numbers_resolve_without_a_thread) {
    orch_result r = orch_await(orch_resolve("127.0.0.1", "8080"));
    if (CHECK_INT(r.error, 0)) {
        const orch_addresses *all = r.value;
        struct sockaddr_in in;
        CHECK_INT(all->count, 1);
        CHECK_INT(all->items[0].size, sizeof in);
        memcpy(&in, all->items[0].storage, sizeof in);
        CHECK_INT(in.sin_family, AF_INET);
        CHECK_INT(ntohs(in.sin_port), 8080);
        CHECK_INT(ntohl(in.sin_addr.s_addr), INADDR_LOOPBACK);
    }
    orch_result_free(&r);
    r = orch_await(orch_resolve("::1", NULL));
    if (CHECK_INT(r.error, 0)) {
        struct sockaddr_in6 in6;
        memcpy(&in6, ((const orch_addresses *)r.value)->items[0].storage, sizeof in6);
        CHECK_INT(in6.sin6_family, AF_INET6);
        CHECK_INT(in6.sin6_port, 0);
    }
    orch_addresses *mine = orch_take(&r);
    CHECK(mine != NULL || r.error != 0);
    if (r.error == 0) free(mine);
    else orch_result_free(&r);
    r = orch_await(orch_resolve(NULL, "80"));
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    CHECK_INT(orch_pool_statistics(ORCH_LANE_RESOLVE).begun, 0);
}

TASK_TEST(names_resolve_on_a_thread) {
    orch_result r = orch_await(orch_resolve("localhost", "80"));
    if (CHECK_INT(r.error, 0)) CHECK(((const orch_addresses *)r.value)->count >= 1);
    orch_result_free(&r);
    CHECK(orch_pool_statistics(ORCH_LANE_RESOLVE).begun <= 1);
}

TASK_TEST(an_unknown_host_is_an_error_with_a_message) {
    orch_result r = orch_await(orch_resolve("no host has a blank", "80"));
    CHECK(r.error == ORCH_EHOST || r.error == ORCH_ERESOLVE);
    CHECK(strlen(orch_message(&r)) > 0);
    orch_result_free(&r);
    CHECK_STR(orch_error_text(ORCH_EHOST), "host or service not found");
}

// Every thread that may resolve is busy: other work goes on, and a name can be given up.
TASK_TEST(slow_names_starve_nothing) {
    orch_future *f[5];
    for (int i = 0; i < 5; i++) {
        orch_offload_desc desc = {"slow", block, NULL, 0, NULL, ORCH_LANE_RESOLVE};
        f[i] = orch_offload_with(&desc);
    }
    CHECK_INT(join(orch_offload(number, (void *)5)), 5);
    orch_result r = orch_await(orch_resolve("127.0.0.1", "1"));
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    CHECK_INT(join(orch_timeout(orch_resolve("localhost", "1"), 1)), ORCH_ETIMEDOUT);
    gate_open(&blocked_end);
    for (int i = 0; i < 5; i++) join(f[i]);
}

MISUSE(resolving_nothing, "orch_resolve") {
    orch_loop *loop = orch_loop_new(NULL);
    CHECK(orch_peek(orch_resolve(NULL, NULL))->error == ORCH_EINVAL);
    CHECK_INT(orch_loop_free(loop), 0);
}

// ---- found in review

// What is posted reaches a loop whose host waits for one descriptor, too.
TEST(a_host_of_a_pinned_loop_gets_posts) {
    const orch_poller pollers[] = {ORCH_POLLER_POLL, ORCH_POLLER_EPOLL};
    for (int i = 0; i < 2; i++) {
        orch_loop_desc desc = {.poller = pollers[i]};
        orch_loop *loop = orch_loop_new(&desc);
        if (loop == NULL) continue; // not here, or no memory
        posted_count = 0;
        bool sent = orch_post(loop, note_post, NULL) == 0;
        for (int turn = 0; turn < 10; turn++) {
            struct pollfd fds[4];
            int offered = orch_loop_pollfds(loop, fds, 4);
            if (offered >= 0) poll(fds, (nfds_t)offered, orch_loop_timeout(loop) > 0 ? 1 : 0);
            orch_loop_dispatch(loop, fds, offered < 0 ? 0 : (size_t)offered);
        }
        CHECK_INT(posted_count, sent);
        CHECK_INT(orch_loop_free(loop), 0);
    }
}

// What is due now is no matter of time.
VIRTUAL_TEST(what_is_due_does_not_wait_for_a_thread) {
    orch_remote *remote;
    orch_future *f = remote_new(&remote);
    CHECK_INT(join(orch_after(0)), 0);
    settle(remote, orch_ok_int(1));
    CHECK_INT(join(f), 1);
}

static orch_result fork_with_work(void *arg) {
    orch_future *first, *second;
    occupy(&first, NULL);
    orch_offload_desc desc = {NULL, number, (void *)1, 0, note_freed, ORCH_LANE_OWN};
    second = orch_offload_with(&desc);
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        alarm(2);
        if (*(bool *)arg) orch_cancel(second, 0); // before it could know
        int a = (int)join(first), b = (int)join(second);
        bool ended = (a == ORCH_ECANCELED || a == ORCH_ENOMEM || a == -EAGAIN) && (b == a || b < 0);
        ended = ended && orch_pool_statistics(ORCH_LANE_OWN).queued == 0;
        _exit(ended ? 3 : 4);
    }
    CHECK_INT(child_status(pid), 3);
    gate_open(&blocked_end);
    join(first);
    join(second);
    return orch_ok_int(1);
}

// Limits are set before there is any loop: the child gets its work back all the same.
TEST_SKIP(a_pool_that_is_older_than_loops_survives_fork, TSAN) {
    bool cancels = false;
    CHECK_INT(orch_pool_limit(ORCH_LANE_OWN, 1), 0);
    orch_result r = orch_run(fork_with_work, &cancels);
    CHECK_INT(orch_int(&r), 1);
}

TEST_SKIP(a_child_cancels_what_was_queued, TSAN) {
    bool cancels = true;
    orch_result r = orch_run(fork_with_work, &cancels);
    CHECK_INT(orch_int(&r), 1);
}

// A producer that answers when its loop is already ending, just after the look for answers, and
// somebody who begins work then.
static bool asked;
static bool answers_later(void *context, int reason) {
    (void)context, (void)reason;
    asked = true;
    return false;
}

static orch_remote *answer;
static uint64_t look_at_the_clock(void *context) {
    (void)context;
    orch_remote *remote = asked ? answer : NULL;
    if (remote != NULL) answer = NULL;
    if (remote != NULL) orch_remote_settle(remote, orch_ok_int(1));
    return 1;
}

static bool began_late;
static void begin_late(orch_result *in, void *context) {
    (void)in, (void)context;
    orch_future *f = orch_offload(number, (void *)1);
    began_late = true;
    while (orch_pool_statistics(ORCH_LANE_DEFAULT).idle == 0 && !orch_is_settled(f)) continue;
    orch_detach(f);
}

TEST(work_begun_as_the_loop_ends) {
    orch_loop_desc desc = {.now = look_at_the_clock};
    orch_loop *loop = orch_loop_new(&desc);
    if (!CHECK(loop != NULL)) return;
    orch_promise p;
    orch_future *f = orch_future_new(&p);
    answer = orch_promise_remote(p);
    if (answer == NULL) orch_settle(p, orch_ok_int(1));
    orch_promise_on_cancel(p, answers_later, NULL);
    orch_on(f, begin_late, NULL);
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK(began_late);
}

static void *settle_in_a_while(void *arg) {
    for (volatile int i = 0; i < 2000; i++) continue;
    settle(arg, orch_ok_int(42));
    return NULL;
}

// Somebody holds a future, and tries to free the loop until its answer has come.
TEST(a_loop_that_could_not_be_freed_gets_answers) {
    for (int i = 0; i < few(200); i++) {
        orch_loop *loop = orch_loop_new(NULL);
        if (!CHECK(loop != NULL)) return;
        orch_promise p;
        orch_future *f = orch_future_new(&p);
        orch_remote *remote = orch_promise_remote(p);
        if (remote == NULL) orch_settle(p, orch_ok_int(1));
        orch_promise_on_cancel(p, answers_later, NULL);
        pthread_t thread;
        start_thread(&thread, settle_in_a_while, remote);
        int tries = 0;
        while (!orch_is_settled(f) && tries++ < 10000000 && orch_loop_free(loop) == ORCH_EBUSY)
            continue;
        CHECK(orch_is_settled(f));
        pthread_join(thread, NULL);
        orch_drop(f);
        CHECK_INT(orch_loop_free(loop), 0);
    }
}

// A run that cannot begin leaves nothing that would keep threads.
static orch_result offload_one(void *arg) { return orch_ok_int(join(orch_offload(number, arg))); }

TEST(a_run_that_could_not_begin_is_gone) {
    struct rlimit limit, none = {0, 0};
    CHECK_INT(getrlimit(RLIMIT_NOFILE, &limit), 0);
    none.rlim_max = limit.rlim_max;
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &none), 0);
    orch_loop_desc desc = {.handle_signals = true};
    orch_result r = orch_run_with(&desc, offload_one, NULL);
    CHECK(r.error != 0);
    orch_result_free(&r);
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &limit), 0);
    r = orch_run(offload_one, (void *)3);
    CHECK(r.error != 0 || orch_int(&r) == 3);
    orch_result_free(&r);
    CHECK_INT(orch_pool_statistics(ORCH_LANE_DEFAULT).threads, 0);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
