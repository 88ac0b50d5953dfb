// What does an await cost that has to wait? One task makes a future and awaits it, another settles
// it and yields: create, suspend, settle, resume, free, with the two switches this takes.
// Run: make bench, or .build/bench/bench_await
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define AWAITS 10000

static orch_promise wanted; // what the consumer waits for

static orch_result produce(void *arg) {
    (void)arg;
    for (intptr_t i = 0; i < AWAITS; i++) {
        bench_require(orch_settle(wanted, orch_ok_int(i)), "nobody was waiting");
        if (orch_yield() != 0) return orch_fail(ORCH_ECANCELED);
    }
    return orch_ok(NULL, NULL);
}

static orch_result consume(void *arg) {
    (void)arg;
    for (intptr_t i = 0; i < AWAITS; i++) {
        orch_result r = orch_await(orch_future_new(&wanted));
        bench_require(r.error == 0 && orch_int(&r) == i, "a wrong value came");
        orch_result_free(&r);
    }
    return orch_ok(NULL, NULL);
}

static double hand_over(void) {
    double start = bench_now();
    orch_future *consumer = orch_go(consume, NULL);
    orch_future *producer = orch_go(produce, NULL);
    bench_await_ok(orch_all(consumer, producer), "a task failed");
    return (bench_now() - start) / AWAITS;
}

static orch_result measure(void *arg) {
    (void)arg;
    bench_begin("await");
    bench_figure("that waits", bench_measure(hand_over), "ns", 0);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
