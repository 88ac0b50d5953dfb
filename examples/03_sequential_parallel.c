// 03_sequential_parallel: the same four calls one after the other, then side by side.
//
// shows   a sequence of orch_await against one orch_await(orch_all(...)); values in input order
// run     cc -O2 -o parallel examples/03_sequential_parallel.c && ./parallel
// prints
//         one after the other: 10 20 30 40 in 200 ms
//         side by side:        10 20 30 40 in 80 ms
//         2.5 times as fast

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>

enum { CALLS = 4 };

struct call {
    uint64_t ms;
    int value;
};

static struct call calls[CALLS] = {{50, 10}, {40, 20}, {80, 30}, {30, 40}};

// Stands for any call that waits: a request, a query, a child process.
static orch_result run_call(void *arg) {
    const struct call *call = arg;
    int error = orch_sleep(call->ms);
    return error != 0 ? orch_fail(error) : orch_ok_int(call->value);
}

static uint64_t sequential(void) {
    uint64_t begin = orch_now();
    printf("one after the other:");
    for (int i = 0; i < CALLS; i++) {
        orch_result r = orch_await(orch_go(run_call, &calls[i]));
        printf(" %d", (int)orch_int(&r));
        orch_result_free(&r);
    }
    uint64_t took = orch_now() - begin;
    printf(" in %d ms\n", (int)took);
    return took;
}

static uint64_t parallel(void) {
    uint64_t begin = orch_now();
    printf("side by side:       ");
    orch_future *running[CALLS];
    for (int i = 0; i < CALLS; i++) running[i] = orch_go(run_call, &calls[i]);
    orch_result r = orch_await(orch_all_n(CALLS, running));
    for (size_t i = 0; i < orch_count(&r); i++) printf(" %d", (int)orch_int(orch_at(&r, i)));
    orch_result_free(&r);
    uint64_t took = orch_now() - begin;
    printf(" in %d ms\n", (int)took);
    return took;
}

static orch_result start(void *arg) {
    (void)arg;
    uint64_t slow = sequential(), fast = parallel();
    printf("%.1f times as fast\n", (double)slow / (double)(fast > 0 ? fast : 1));
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(start, NULL)); }
