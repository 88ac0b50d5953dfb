// 12_offload: sums on threads of the pool, while a task goes on ticking; then a thread of one's own
// that reports to the loop.
//
// shows   orch_offload for work that would block the loop; a copied argument; orch_timeout around
//         it; orch_post and orch_remote_settle from a thread that the program started
// run     cc -O2 -pthread -o offload examples/12_offload.c && ./offload
// prints
//         6 sums on threads: 2668 primes below 24000
//         the ticker ticked meanwhile: yes
//         too slow for 5 ms: Timeout after 5 ms
//         the thread says: step 1
//         the thread says: step 2
//         the thread says: step 3
//         the thread is done after 3 steps

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <pthread.h>
#include <stdio.h>

// ---- on threads of the pool: no loop is there, and nothing that the loop's tasks use

struct range {
    int from, to;
};

static orch_result count_primes(void *arg) {
    const struct range *r = (const struct range *)arg; // a copy of its own
    int count = 0;
    for (int n = r->from; n < r->to; n++) {
        int prime = n > 1;
        for (int d = 2; d < n && prime; d++) prime = n % d != 0; // slow, to have something to do
        count += prime;
    }
    return orch_ok_int(count);
}

static orch_future *primes_between(int from, int to) {
    struct range r = {from, to};
    orch_offload_desc desc = {"primes", count_primes, &r, sizeof r, NULL, ORCH_LANE_DEFAULT};
    return orch_offload_with(&desc);
}

// ---- on the loop

static orch_result tick(void *arg) {
    while (orch_sleep(1) == 0) ++*(int *)arg;
    return orch_ok(NULL, NULL);
}

static int sum(const orch_result *all) {
    int total = 0;
    for (size_t i = 0; i < orch_count(all); i++) total += (int)orch_int(orch_at(all, i));
    return total;
}

static void say(void *text) { printf("the thread says: %s\n", (const char *)text); }

// ---- a thread of one's own

struct worker {
    orch_loop *loop;
    orch_remote *done;
};

static void *work(void *arg) {
    const struct worker *w = (const struct worker *)arg;
    static char steps[3][8] = {"step 1", "step 2", "step 3"};
    for (int i = 0; i < 3; i++) {
        if (orch_post(w->loop, say, steps[i]) != 0) break; // the loop is gone
    }
    orch_remote_settle(w->done, orch_ok_int(3));
    return NULL;
}

static orch_result run_worker(void) {
    orch_promise promise;
    orch_future *f = orch_future_new(&promise);
    struct worker w = {orch_loop_current(), orch_promise_remote(promise)};
    pthread_t thread;
    if (w.done == NULL) return orch_fail(ORCH_ENOMEM);
    if (pthread_create(&thread, NULL, work, &w) != 0) return orch_failf(-EAGAIN, "no thread");
    orch_result r = orch_await(f);
    pthread_join(thread, NULL); // it has settled: this does not block
    return r;
}

static orch_result start(void *arg) {
    (void)arg;
    int ticks = 0;
    orch_future *ticker = orch_go(tick, &ticks), *parts[6];
    for (int i = 0; i < 6; i++) parts[i] = primes_between(i * 4000, (i + 1) * 4000);
    orch_result r = orch_await(orch_all_n(6, parts));
    if (r.error != 0) return r;
    printf("6 sums on threads: %d primes below 24000\n", sum(&r));
    printf("the ticker ticked meanwhile: %s\n", ticks > 0 ? "yes" : "no");
    orch_result_free(&r);

    r = orch_await(orch_timeout(primes_between(0, 60000), 5)); // it runs on, and nobody waits
    printf("too slow for 5 ms: %s\n", orch_message(&r));
    orch_result_free(&r);

    r = run_worker();
    if (r.error == 0) printf("the thread is done after %d steps\n", (int)orch_int(&r));
    orch_drop(ticker);
    return r;
}

int main(void) { return orch_exit(orch_run(start, NULL)); }
