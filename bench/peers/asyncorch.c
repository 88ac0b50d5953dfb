// The four measures of bench/peers, with asyncorch.h. Prints one `measure nanoseconds` a line.
// Run: make bench-peers
#define ASYNCORCH_IMPLEMENTATION
#include "../../asyncorch.h"
#include "../bench.h"

#define YIELDS 1000000
#define TASKS 500000
#define INPUTS 300000
#define CALLBACKS 500000

static orch_result yielder(void *arg) {
    (void)arg;
    for (size_t i = 0; i < YIELDS / 2; i++) {
        if (orch_yield() != 0) return orch_fail(ORCH_ECANCELED);
    }
    return orch_ok(NULL, NULL);
}

static void measure_switch(void) {
    orch_future *first = orch_go(yielder, NULL);
    orch_future *second = orch_go(yielder, NULL);
    bench_await_ok(orch_all(first, second), "a yield failed");
}

static orch_result add_one(void *arg) { return orch_ok_int(*(intptr_t *)arg + 1); }

static void measure_spawn(void) {
    intptr_t n = 0;
    for (size_t i = 0; i < TASKS; i++) {
        orch_result r = orch_await(orch_go(add_one, &n));
        n = orch_int(&r);
        orch_result_free(&r);
    }
    bench_require(n == TASKS, "a task is missing");
}

static void measure_all(void) {
    orch_promise *tickets = (orch_promise *)malloc(INPUTS * sizeof *tickets);
    orch_future **futures = (orch_future **)malloc(INPUTS * sizeof *futures);
    intptr_t sum = 0;
    bench_require(tickets != NULL && futures != NULL, "no memory");
    for (size_t i = 0; i < INPUTS; i++) futures[i] = orch_future_new(&tickets[i]);
    orch_future *all = orch_all_n(INPUTS, futures);
    for (size_t i = 0; i < INPUTS; i++) orch_settle(tickets[i], orch_ok_int((intptr_t)i));
    orch_result r = orch_await(all);
    for (size_t i = 0; i < INPUTS; i++) sum += orch_int(orch_at(&r, i));
    bench_require(sum == (intptr_t)INPUTS * (INPUTS - 1) / 2, "a result is wrong");
    orch_result_free(&r);
    free(futures);
    free(tickets);
}

static size_t calls;

static void count_call(orch_result *in, void *context) {
    (void)in;
    (void)context;
    calls++;
}

static void measure_oneshot(void) {
    orch_promise ticket;
    calls = 0;
    for (size_t i = 0; i < CALLBACKS; i++) {
        orch_on(orch_future_new(&ticket), count_call, NULL);
        orch_settle(ticket, orch_ok_int(1));
        if (i % 100 == 99) orch_yield(); // runs the callbacks
    }
    orch_yield();
    bench_require(calls == CALLBACKS, "a callback is missing");
}

static void report(const char *what, void (*measure)(void), size_t count) {
    measure(); // warms up
    double start = bench_now();
    measure();
    printf("%s %.1f\n", what, (bench_now() - start) / (double)count);
}

static orch_result start(void *arg) {
    (void)arg;
    report("switch", measure_switch, YIELDS);
    report("spawn", measure_spawn, TASKS);
    report("all", measure_all, INPUTS);
    report("oneshot", measure_oneshot, CALLBACKS);
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(start, NULL)); }
