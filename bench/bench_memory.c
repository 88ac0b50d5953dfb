// How much memory does what waits take? A pending future: its slot, and its share of all that the
// loop asks its allocator for when there are 1,000,000 of them (heads of pages, ready ring). A
// sleeping task: the pages resident, for 10,000 and for 100,000 of them.
// Run: make bench, or .build/bench/bench_memory
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define FUTURES 1000000
#define FEW 10000
#define MANY 100000
#define AN_HOUR 3600000

static bench_bytes bytes;

// Bytes of this process that are in memory; 0 where the system does not say.
static double resident(void) {
    char line[256];
    double kib = 0;
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    if (file == NULL) return 0;
    while (fgets(line, sizeof line, file) != NULL && sscanf(line, "Rss: %lf", &kib) != 1) {}
    fclose(file);
    return kib * 1024;
}

static double bytes_per_future(void) {
    orch_promise unused;
    orch_future **futures = (orch_future **)malloc(FUTURES * sizeof *futures);
    bench_require(futures != NULL, "no memory");
    size_t before = bytes.live;
    for (size_t i = 0; i < FUTURES; i++) futures[i] = orch_future_new(&unused);
    double each = (double)(bytes.live - before) / FUTURES;
    for (size_t i = 0; i < FUTURES; i++) orch_drop(futures[i]);
    free(futures);
    return each;
}

static orch_result sleeper(void *arg) {
    (void)arg;
    int error = orch_sleep(AN_HOUR); // cancelled when main has ended
    return error != 0 ? orch_fail(error) : orch_ok(NULL, NULL);
}

static void start_sleepers(size_t count) {
    for (size_t i = 0; i < count; i++) bench_require(orch_spawn(sleeper, NULL) == 0, "no task");
    orch_yield();
}

// The tasks that still sleep when this returns are ended by orch_run.
static orch_result measure_tasks(void *arg) {
    double *kib = (double *)arg;
    double before = resident();
    start_sleepers(FEW);
    kib[0] = (resident() - before) / FEW / 1024;
    start_sleepers(MANY - FEW);
    kib[1] = (resident() - before) / MANY / 1024;
    return orch_ok(NULL, NULL);
}

static orch_result measure_futures(void *arg) {
    *(double *)arg = bytes_per_future();
    return orch_ok(NULL, NULL);
}

int main(void) {
    orch_loop_desc desc = {.allocator = {bench_resize, &bytes}};
    double future = 0, tasks[2] = {0, 0};
    orch_result r = orch_run(measure_tasks, tasks); // first, while no memory is there to be reused
    if (r.error == 0) r = orch_run_with(&desc, measure_futures, &future);
    if (r.error != 0) return orch_exit(r);
    bench_begin("memory");
    bench_figure("pending future", (double)sizeof(orch_future), "bytes", 64);
    bench_and();
    bench_figure("with its share of the rest", future, "bytes", 0);
    bench_and();
    bench_figure("10,000 sleeping tasks", tasks[0], "KiB each", 4.4);
    bench_and();
    bench_figure("100,000 sleeping tasks", tasks[1], "KiB each", 4.4);
    bench_end();
    return 0;
}
