// What do posts from another thread cost, and how often do they wake the loop? A thread posts, and
// the loop counts. Once the loop is asleep when each burst begins; then it is held by the first post
// until the whole burst is in flight: that is one wake-up at most, whatever the number.
// Run: make bench, or .build/bench/bench_post
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#include <pthread.h>

#define POSTS 100000
#define BURSTS 20

typedef struct burst {
    orch_loop *loop;
    orch_remote *done;
    pthread_mutex_t held; // by the thread, until the burst is in flight
    double ns;            // a post
} burst;

static size_t came;
static void count(void *arg) {
    (void)arg;
    came++;
}

static void hold(void *arg) {
    pthread_mutex_lock(&((burst *)arg)->held);
    pthread_mutex_unlock(&((burst *)arg)->held);
}

static void *post_all(void *arg) {
    burst *b = (burst *)arg;
    pthread_mutex_lock(&b->held);
    bench_require(orch_post(b->loop, hold, b) == 0, "a post failed");
    double start = bench_now();
    for (size_t i = 0; i < POSTS; i++) {
        bench_require(orch_post(b->loop, count, NULL) == 0, "a post failed");
    }
    b->ns = (bench_now() - start) / POSTS;
    orch_remote_settle(b->done, orch_ok(NULL, NULL));
    pthread_mutex_unlock(&b->held);
    return NULL;
}

static uint64_t wakes(void) { return orch_loop_statistics(orch_loop_current()).wakes; }

static orch_result measure(void *arg) {
    double ns[BURSTS];
    uint64_t most = 0;
    (void)arg;
    for (size_t i = 0; i < BURSTS; i++) {
        burst b = {orch_loop_current(), NULL, PTHREAD_MUTEX_INITIALIZER, 0};
        orch_promise ticket;
        orch_future *done = orch_future_new(&ticket);
        b.done = orch_promise_remote(ticket);
        bench_require(b.done != NULL, "out of memory");
        uint64_t before = wakes();
        pthread_t thread;
        bench_require(pthread_create(&thread, NULL, post_all, &b) == 0, "no thread");
        bench_await_ok(done, "the thread failed");
        pthread_join(thread, NULL);
        ns[i] = b.ns;
        if (wakes() - before > most) most = wakes() - before;
    }
    bench_require(came == (size_t)POSTS * BURSTS, "posts were lost");
    bench_begin("post");
    bench_figure("a post to a loop that is awake", bench_median(ns, BURSTS), "ns", 0);
    bench_and();
    bench_figure("wake-ups for 100,000 in flight", (double)most, "at most", 1);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
