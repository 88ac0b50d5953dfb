// What does a future with an end-of-chain callback cost? Create, on, settle, callback, free: in
// batches that stay in cache, and one at a time (each callback makes the next).
// Run: make bench, or .build/bench/bench_on
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define OPERATIONS 20000
#define BATCH 100

static size_t calls; // of a callback, so that a missing one is noticed

static void count_call(orch_result *in, void *context) {
    (void)in;
    (void)context;
    calls++;
}

static void run_batch(void) {
    orch_promise tickets[BATCH];
    for (size_t i = 0; i < BATCH; i++) orch_on(orch_future_new(&tickets[i]), count_call, NULL);
    for (size_t i = 0; i < BATCH; i++) orch_settle(tickets[i], orch_ok_int((intptr_t)i));
    orch_yield(); // comes back when all callbacks have run
}

static double in_batches(void) {
    calls = 0;
    double start = bench_now();
    for (size_t i = 0; i < OPERATIONS / BATCH; i++) run_batch();
    double ns = (bench_now() - start) / OPERATIONS;
    bench_require(calls == OPERATIONS, "a callback is missing");
    return ns;
}

static void make_next(orch_result *in, void *context) {
    orch_promise ticket;
    (void)in;
    if (--calls == 0) {
        orch_settle(*(orch_promise *)context, orch_ok(NULL, NULL));
        return;
    }
    orch_on(orch_future_new(&ticket), make_next, context);
    orch_settle(ticket, orch_ok_int(1));
}

static double one_at_a_time(void) {
    orch_promise end;
    orch_future *ended = orch_future_new(&end);
    calls = OPERATIONS + 1;
    double start = bench_now();
    make_next(NULL, &end);
    bench_await_ok(ended, "a callback is missing");
    return (bench_now() - start) / OPERATIONS;
}

static orch_result measure(void *arg) {
    (void)arg;
    bench_begin("on");
    bench_figure("in batches", bench_measure(in_batches), "ns", 15);
    bench_and();
    bench_figure("one at a time", bench_measure(one_at_a_time), "ns", 15);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
