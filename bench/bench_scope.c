// What does structure cost? An empty scope, one with a deadline, and a task in a scope, started and
// waited for.
// Run: make bench, or .build/bench/bench_scope
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define SCOPES 20000
#define TASKS 100 // in one scope

static size_t ran;

static orch_result count_run(void *arg) {
    (void)arg;
    ran++;
    return orch_ok(NULL, NULL);
}

static void close_ok(orch_scope *scope) {
    orch_result r = orch_scope_close(scope);
    bench_require(r.error == 0, "a scope failed");
    orch_result_free(&r);
}

static double open_and_close(const orch_scope_desc *desc) {
    orch_scope scope;
    double start = bench_now();
    for (size_t i = 0; i < SCOPES; i++) {
        orch_scope_open(&scope, desc);
        close_ok(&scope);
    }
    return (bench_now() - start) / SCOPES;
}

static double empty(void) { return open_and_close(NULL); }

static double with_deadline(void) {
    orch_scope_desc desc = {.timeout_ms = 60000};
    return open_and_close(&desc);
}

static double with_tasks(void) {
    orch_scope scope;
    double start = bench_now();
    ran = 0;
    for (size_t i = 0; i < SCOPES / TASKS; i++) {
        orch_scope_open(&scope, NULL);
        for (size_t k = 0; k < TASKS; k++) orch_scope_go(&scope, count_run, NULL);
        close_ok(&scope);
    }
    double ns = (bench_now() - start) / SCOPES;
    bench_require(ran == SCOPES, "a task is missing");
    return ns;
}

static orch_result measure(void *arg) {
    (void)arg;
    bench_begin("scope");
    bench_figure("empty, open and close", bench_measure(empty), "ns", 40);
    bench_and();
    bench_figure("with a deadline", bench_measure(with_deadline), "ns", 0);
    bench_and();
    bench_figure("a task in a scope", bench_measure(with_tasks), "ns", 0);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
