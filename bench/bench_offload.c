// What does a round trip to a thread of the pool cost? A task offloads nothing, awaits it, and does
// so again: there, one thread is woken, and here, the loop. The median of the trips counts.
// Run: make bench, or .build/bench/bench_offload
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define TRIPS 5000
#define AT_ONCE 100

static orch_result nothing(void *arg) { return orch_ok(arg, NULL); }

static double trips[TRIPS];

static double round_trip(void) {
    for (size_t i = 0; i < TRIPS; i++) {
        double start = bench_now();
        bench_await_ok(orch_offload(nothing, NULL), "an offload failed");
        trips[i] = bench_now() - start;
    }
    return bench_median(trips, TRIPS);
}

// Many are under way: nobody sleeps for long.
static double in_bulk(void) {
    orch_future *futures[AT_ONCE];
    double start = bench_now();
    for (size_t n = 0; n < TRIPS / AT_ONCE; n++) {
        for (size_t i = 0; i < AT_ONCE; i++) futures[i] = orch_offload(nothing, NULL);
        bench_await_ok(orch_all_n(AT_ONCE, futures), "an offload failed");
    }
    return (bench_now() - start) / TRIPS;
}

static orch_result measure(void *arg) {
    (void)arg;
    bench_begin("offload");
    bench_figure("round trip", bench_measure(round_trip) / 1000, "us", 12);
    bench_and();
    bench_figure("one of 100 at once", bench_measure(in_bulk) / 1000, "us", 0);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
