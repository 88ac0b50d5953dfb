// What does a switch cost when tasks yield from different places, as in a real program? Two tasks
// in alternation, 10^7 yields (201 times 50,000) from 18 call sites (8 and 10, so that every pair
// of them meets), while one descriptor is waited for. The processor predicts a return by the call
// last made; after a switch that call was another task's.
// Run: make bench, or .build/bench/bench_switch_sites
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#include <unistd.h>

#define YIELDS 50000

static orch_result eight_sites(void *arg) {
    int failed = 0;
    (void)arg;
    for (size_t i = 0; i < YIELDS / 2; i += 8) {
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
    }
    return failed != 0 ? orch_fail(ORCH_ECANCELED) : orch_ok(NULL, NULL);
}

static orch_result ten_sites(void *arg) {
    int failed = 0;
    (void)arg;
    for (size_t i = 0; i < YIELDS / 2; i += 10) {
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
        failed |= orch_yield();
    }
    return failed != 0 ? orch_fail(ORCH_ECANCELED) : orch_ok(NULL, NULL);
}

static double alternate(void) {
    double start = bench_now();
    orch_future *first = orch_go(eight_sites, NULL);
    orch_future *second = orch_go(ten_sites, NULL);
    bench_await_ok(orch_all(first, second), "a yield failed");
    return (bench_now() - start) / YIELDS;
}

static orch_result measure(void *arg) {
    int ends[2];
    (void)arg;
    bench_require(pipe(ends) == 0, "no pipe");
    orch_future *waiting = orch_ready(ends[0], ORCH_READABLE);
    double ns = bench_measure(alternate);
    bench_require(!orch_is_settled(waiting), "the descriptor was to stay silent");
    orch_drop(waiting);
    close(ends[0]);
    close(ends[1]);
    bench_begin("switch_sites");
    bench_figure("", ns, "ns", 14);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
