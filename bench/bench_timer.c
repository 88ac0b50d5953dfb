// What do timers cost? What a timeout that does not fire adds to a future (create, settle, free);
// arming a timer and cancelling it, in batches; firing one, with 100,000 due, their futures freed.
// Run: make bench, or .build/bench/bench_timer
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define OPERATIONS 20000
#define BATCH 100
#define DUE 100000
#define A_MINUTE 60000

// A spread of delays that is the same in every run and in no order.
static uint64_t spread(size_t i, uint64_t range) { return (uint64_t)i * 2654435761u % range; }

static void future_batch(bool with_timeout) {
    orch_promise tickets[BATCH];
    orch_future *futures[BATCH];
    for (size_t i = 0; i < BATCH; i++) {
        futures[i] = orch_future_new(&tickets[i]);
        if (with_timeout) futures[i] = orch_timeout(futures[i], A_MINUTE + spread(i, A_MINUTE));
    }
    for (size_t i = 0; i < BATCH; i++) orch_settle(tickets[i], orch_ok_int(1));
    orch_yield();
    for (size_t i = 0; i < BATCH; i++) {
        bench_require(orch_is_settled(futures[i]), "a future is not settled");
        orch_drop(futures[i]);
    }
}

static double plain(void) {
    double start = bench_now();
    for (size_t i = 0; i < OPERATIONS / BATCH; i++) future_batch(false);
    return (bench_now() - start) / OPERATIONS;
}

static double with_timeout(void) {
    double start = bench_now();
    for (size_t i = 0; i < OPERATIONS / BATCH; i++) future_batch(true);
    return (bench_now() - start) / OPERATIONS;
}

static double arm_and_cancel(void) {
    orch_future *futures[BATCH];
    double start = bench_now();
    for (size_t i = 0; i < OPERATIONS / BATCH; i++) {
        for (size_t k = 0; k < BATCH; k++) futures[k] = orch_after(A_MINUTE + spread(k, A_MINUTE));
        for (size_t k = 0; k < BATCH; k++) orch_drop(futures[k]);
    }
    return (bench_now() - start) / OPERATIONS;
}

static double fire(void) {
    static orch_future *futures[DUE];
    for (size_t i = 0; i < DUE - 1; i++) futures[i] = orch_after(1 + spread(i, 20));
    futures[DUE - 1] = orch_after(21); // the last to come
    orch_yield();                      // the round ends, the timers have their deadlines
    nanosleep(&(struct timespec){.tv_nsec = 30000000}, NULL);
    double start = bench_now();
    while (!orch_is_settled(futures[DUE - 1])) bench_require(orch_yield() == 0, "cancelled");
    for (size_t i = 0; i < DUE; i++) orch_drop(futures[i]);
    return (bench_now() - start) / DUE;
}

static orch_result measure(void *arg) {
    (void)arg;
    double base = bench_measure(plain);
    double timeout = bench_measure(with_timeout);
    bench_begin("timer");
    bench_figure("a timeout adds", timeout - base, "ns", 60);
    bench_figure("to", base, "ns", 0);
    bench_and();
    bench_figure("arm and cancel", bench_measure(arm_and_cancel), "ns", 0);
    bench_and();
    bench_figure("fire", bench_measure(fire), "ns", 0);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
