// What does a semaphore cost that is free? One task acquires and releases, 10^7 times. And one that
// is not: two tasks in alternation at one permit, each of which waits for the other's release.
// Run: make bench, or .build/bench/bench_semaphore
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define TIMES 50000
#define HANDS 20000

static orch_semaphore *permits;

static double uncontended(void) {
    double start = bench_now();
    for (size_t i = 0; i < TIMES; i++) {
        bench_require(orch_acquire(permits) == 0, "no permit");
        bench_require(orch_release(permits) == 0, "no permit to give back");
    }
    return (bench_now() - start) / TIMES;
}

// Yields with the permit, so that the other one has to wait.
static orch_result contend(void *arg) {
    (void)arg;
    for (size_t i = 0; i < HANDS / 2; i++) {
        bench_require(orch_acquire(permits) == 0, "no permit");
        bench_require(orch_yield() == 0, "a yield failed");
        bench_require(orch_release(permits) == 0, "no permit to give back");
    }
    return orch_ok(NULL, NULL);
}

static double contended(void) {
    double start = bench_now();
    orch_future *first = orch_go(contend, NULL);
    orch_future *second = orch_go(contend, NULL);
    bench_await_ok(orch_all(first, second), "a task failed");
    return (bench_now() - start) / HANDS;
}

static orch_result measure(void *arg) {
    (void)arg;
    permits = orch_semaphore_new(1);
    bench_begin("semaphore");
    bench_figure("acquire and release", bench_measure(uncontended), "ns", 10);
    bench_and();
    bench_figure("that wait", bench_measure(contended), "ns", 0);
    bench_end();
    orch_semaphore_free(permits);
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
