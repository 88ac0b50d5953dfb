// bench.h: what these programs share: a clock, medians, counted memory, the output line.
//
// A program prints one line, made of measures: `name: what 4.3 ns (figure <= 8) met; what 9.0 ns`.
// run.sh reads that form: it puts the median of several runs in place of each number with a decimal
// point and judges again. So: a value always has a decimal point, a figure stands in the brackets.
#ifndef BENCH_H
#define BENCH_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BENCH_REPEATS 7 // odd, so that the median is one of them

// Nanoseconds of the monotonic clock. Only ever called outside a measured loop.
static inline double bench_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static inline int bench_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static inline double bench_median(double *values, size_t count) {
    qsort(values, count, sizeof *values, bench_compare);
    return values[count / 2];
}

// once() measures one repetition and says what it cost. The first warms up and is not counted.
static inline double bench_measure(double (*once)(void)) {
    double values[BENCH_REPEATS];
    once();
    for (size_t i = 0; i < BENCH_REPEATS; i++) values[i] = once();
    return bench_median(values, BENCH_REPEATS);
}

// A benchmark of something that fails measures nothing: say so and stop.
static inline void bench_require(bool held, const char *what) {
    if (held) return;
    fprintf(stderr, "bench: %s\n", what);
    exit(1);
}

static inline void bench_await_ok(orch_future *f, const char *what) {
    orch_result r = orch_await(f);
    bench_require(r.error == 0, what);
    orch_result_free(&r);
}

// ---- the line

static inline void bench_begin(const char *name) { printf("%s:", name); }

// One measure. figure 0: there is none to reach. what may be "".
static inline void bench_figure(const char *what, double value, const char *unit, double figure) {
    printf(" %s%s%.1f %s", what, *what ? " " : "", value, unit);
    if (figure > 0) printf(" (figure <= %g) %s", figure, value <= figure ? "met" : "MISSED");
}

static inline void bench_and(void) { printf(";"); }
static inline void bench_end(void) { printf("\n"); }

// ---- memory, counted through the loop's allocator

typedef struct bench_bytes {
    size_t live;
    size_t peak;
} bench_bytes;

static inline void *bench_resize(void *user, void *old, size_t old_size, size_t size) {
    bench_bytes *bytes = (bench_bytes *)user;
    void *made = NULL;
    if (size == 0) free(old);
    else if ((made = realloc(old, size)) == NULL) return NULL;
    bytes->live = bytes->live - (old ? old_size : 0) + size;
    if (bytes->live > bytes->peak) bytes->peak = bytes->live;
    return made;
}

#endif
