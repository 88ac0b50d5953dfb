// What does `all` over 1,000,000 pending futures cost? Create them, combine, settle all, read every
// result, free: nanoseconds and bytes each. The bytes are the peak of what the loop asked its
// allocator for, plus the program's own arrays of tickets and futures, which are there before.
// "again" is on a loop that has its memory, "fresh" on a new one, page faults included.
// Run: make bench, or .build/bench/bench_all
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define FUTURES 1000000

static bench_bytes bytes;
static orch_promise tickets[FUTURES];
static orch_future *futures[FUTURES];

static double combine(void) {
    intptr_t sum = 0;
    double start = bench_now();
    for (size_t i = 0; i < FUTURES; i++) futures[i] = orch_future_new(&tickets[i]);
    orch_future *all = orch_all_n(FUTURES, futures);
    for (size_t i = 0; i < FUTURES; i++) orch_settle(tickets[i], orch_ok_int((intptr_t)i));
    orch_result r = orch_await(all);
    bench_require(r.error == 0, "all failed");
    for (size_t i = 0; i < FUTURES; i++) sum += orch_int(orch_at(&r, i));
    orch_result_free(&r);
    double ns = (bench_now() - start) / FUTURES;
    bench_require(sum == (intptr_t)FUTURES * (FUTURES - 1) / 2, "a result is wrong");
    return ns;
}

static orch_result combine_once(void *arg) {
    *(double *)arg = combine();
    return orch_ok(NULL, NULL);
}

static orch_result measure(void *arg) {
    double *ns = (double *)arg;
    *ns = bench_measure(combine);
    return orch_ok(NULL, NULL);
}

static double on_fresh_loops(const orch_loop_desc *desc) {
    double values[BENCH_FEWEST];
    for (size_t i = 0; i < BENCH_FEWEST; i++) {
        orch_result r = orch_run_with(desc, combine_once, &values[i]);
        bench_require(r.error == 0, "the run failed");
    }
    return bench_median(values, BENCH_FEWEST);
}

int main(void) {
    orch_loop_desc desc = {.allocator = {bench_resize, &bytes}};
    double again = 0;
    double fresh = on_fresh_loops(&desc);
    orch_result r = orch_run_with(&desc, measure, &again);
    if (r.error != 0) return orch_exit(r);
    bench_begin("all");
    bench_figure("again", again, "ns each", 100);
    bench_and();
    bench_figure("fresh", fresh, "ns each", 100);
    bench_and();
    bench_figure("memory", (double)(bytes.peak + sizeof tickets + sizeof futures) / FUTURES,
                 "bytes each", 130);
    bench_end();
    return 0;
}
