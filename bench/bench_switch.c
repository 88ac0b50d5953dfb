// What does a switch between tasks cost? Two tasks in alternation, 10^7 yields (201
// times 50,000) from one call site, while one descriptor is waited for: the looks at it are part of
// the price.
// Run: make bench, or .build/bench/bench_switch
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#include <unistd.h>

#define YIELDS 50000

static orch_result yielder(void *arg) {
    (void)arg;
    for (size_t i = 0; i < YIELDS / 2; i++) {
        if (orch_yield() != 0) return orch_fail(ORCH_ECANCELED);
    }
    return orch_ok(NULL, NULL);
}

static double alternate(void) {
    double start = bench_now();
    orch_future *first = orch_go(yielder, NULL);
    orch_future *second = orch_go(yielder, NULL);
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
    bench_begin("switch");
    bench_figure("", ns, "ns", 8);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
