// What does orch_map add to an item, over starting a task and awaiting it? A map over 100,000 items
// that do not wait, against orch_go and orch_await of the same in turn: all at once, and at most
// 16. The map's time includes its list of results and reading it. What it adds is the median of the
// differences of runs directly one after the other, as the machine may change its pace.
// Run: make bench, or .build/bench/bench_map
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define ITEMS 100000
#define FIGURE 60

static intptr_t numbers[ITEMS];
static size_t concurrency;

static orch_result twice(void *arg) { return orch_ok_int(*(intptr_t *)arg * 2); }

static orch_result twice_at(size_t index, void *context) {
    return twice((intptr_t *)context + index);
}

static void check(intptr_t sum) {
    bench_require(sum == (intptr_t)ITEMS * (ITEMS - 1), "a result is wrong");
}

static double one_by_one(void) {
    intptr_t sum = 0;
    double start = bench_now();
    for (size_t i = 0; i < ITEMS; i++) {
        orch_result r = orch_await(orch_go(twice, &numbers[i]));
        sum += orch_int(&r);
        orch_result_free(&r);
    }
    double ns = (bench_now() - start) / ITEMS;
    check(sum);
    return ns;
}

static double mapped(void) {
    intptr_t sum = 0;
    orch_map_desc desc = {.count = ITEMS, .fn = twice_at, .context = numbers};
    desc.concurrency = concurrency;
    double start = bench_now();
    orch_result r = orch_await(orch_map(&desc));
    bench_require(r.error == 0, "the map failed");
    for (size_t i = 0; i < ITEMS; i++) sum += orch_int(orch_at(&r, i));
    orch_result_free(&r);
    double ns = (bench_now() - start) / ITEMS;
    check(sum);
    return ns;
}

static double added(void) {
    double bare = one_by_one();
    return mapped() - bare;
}

static double measure_with(size_t at_once, double (*once)(void)) {
    concurrency = at_once;
    return bench_measure(once);
}

static orch_result measure(void *arg) {
    (void)arg;
    for (intptr_t i = 0; i < ITEMS; i++) numbers[i] = i;
    bench_begin("map");
    bench_figure("go and await", bench_measure(one_by_one), "ns an item", 0);
    bench_and();
    bench_figure("all", measure_with(0, mapped), "ns", 0);
    bench_and();
    bench_figure("16 at once", measure_with(16, mapped), "ns", 0);
    bench_and();
    bench_figure("all adds", measure_with(0, added), "ns", FIGURE);
    bench_and();
    bench_figure("16 add", measure_with(16, added), "ns", FIGURE);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
