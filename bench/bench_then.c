// What does a future with a callback cost? Create, then, settle, callback, free: in batches that
// stay in cache, and one at a time (each callback makes the next).
// Run: make bench, or .build/bench/bench_then
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define OPERATIONS 20000
#define BATCH 100

static size_t calls; // of a callback, so that a missing one is noticed

static orch_result count_call(orch_result *in, void *context) {
    (void)context;
    calls++;
    return *in;
}

static void run_batch(void) {
    orch_promise tickets[BATCH];
    orch_future *futures[BATCH];
    for (size_t i = 0; i < BATCH; i++) {
        futures[i] = orch_then(orch_future_new(&tickets[i]), count_call, NULL, NULL);
    }
    for (size_t i = 0; i < BATCH; i++) orch_settle(tickets[i], orch_ok_int((intptr_t)i));
    orch_yield(); // comes back when all callbacks have run
    for (size_t i = 0; i < BATCH; i++) orch_drop(futures[i]);
}

static double in_batches(void) {
    calls = 0;
    double start = bench_now();
    for (size_t i = 0; i < OPERATIONS / BATCH; i++) run_batch();
    double ns = (bench_now() - start) / OPERATIONS;
    bench_require(calls == OPERATIONS, "a callback is missing");
    return ns;
}

static orch_result make_next(orch_result *in, void *context) {
    orch_promise ticket;
    if (--calls == 0) orch_settle(*(orch_promise *)context, orch_ok(NULL, NULL));
    if (calls == 0) return *in;
    orch_detach(orch_then(orch_future_new(&ticket), make_next, NULL, context));
    orch_settle(ticket, orch_ok_int(1));
    return *in;
}

static double one_at_a_time(void) {
    orch_promise end;
    orch_future *ended = orch_future_new(&end);
    orch_result start_with = orch_ok_int(1);
    calls = OPERATIONS + 1;
    double start = bench_now();
    make_next(&start_with, &end);
    bench_await_ok(ended, "a callback is missing");
    return (bench_now() - start) / OPERATIONS;
}

static orch_result measure(void *arg) {
    (void)arg;
    bench_begin("then");
    bench_figure("in batches", bench_measure(in_batches), "ns", 20);
    bench_and();
    bench_figure("one at a time", bench_measure(one_at_a_time), "ns", 20);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
