// What does a task cost that does not wait? Start, run, await its result, free.
// Run: make bench, or .build/bench/bench_spawn
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define TASKS 20000

static orch_result add_one(void *arg) { return orch_ok_int(*(intptr_t *)arg + 1); }

static double spawn_and_join(void) {
    intptr_t n = 0;
    double start = bench_now();
    for (size_t i = 0; i < TASKS; i++) {
        orch_result r = orch_await(orch_go(add_one, &n));
        n = orch_int(&r);
        orch_result_free(&r);
    }
    double ns = (bench_now() - start) / TASKS;
    bench_require(n == TASKS, "a task is missing");
    return ns;
}

static orch_result measure(void *arg) {
    (void)arg;
    bench_begin("spawn");
    bench_figure("run and join", bench_measure(spawn_and_join), "ns", 25);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
