// bench.h: what these programs share: a clock, medians, counted memory, the output line.
//
// A program prints one line, made of measures: `name: what 4.3 ns (figure <= 8) met; what 9.0 ns`.
// run.sh reads that form: it puts the median of several runs in place of each number with a decimal
// point and judges again. So: a value always has a decimal point, a figure stands in the brackets.
#ifndef BENCH_H
#define BENCH_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BENCH_ENOUGH 201 // repetitions that count
#define BENCH_FEWEST 7   // odd, so that the median is one of them
#define BENCH_MOST 4000  // repetitions
#define BENCH_SECONDS 2  // for all of them
#define BENCH_STEPS 20000

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

// The other thread of the core may be somebody else's. While it is busy, everything here takes up
// to twice as long, and nothing shows it as well as taken branches: two cycles each instead of one.
// A chain of products takes three each all the same. So a repetition counts when, right before and
// after it, a taken branch took a third of a product. Repetitions should be short, about a
// millisecond: of long ones none may count, and then all do.

typedef struct bench_sample {
    double value;
    bool alone;
} bench_sample;

static size_t bench_made, bench_counted; // repetitions, and those alone, of all measures

static inline double bench_branches(void) {
    double start = bench_now();
    for (size_t i = BENCH_STEPS; i > 0; i--) __asm__ volatile("" : "+r"(i));
    return bench_now() - start;
}

static inline double bench_products(void) {
    size_t product = 1;
    double start = bench_now();
    for (size_t i = BENCH_STEPS; i > 0; i--) {
        product *= i;
        __asm__ volatile("" : "+r"(product));
    }
    return bench_now() - start;
}

static inline bool bench_alone(void) { return bench_branches() <= 1.15 / 3 * bench_products(); }

static inline bench_sample bench_sample_of(double (*once)(void)) {
    bench_sample sample;
    bool before = bench_alone();
    sample.value = once();
    sample.alone = bench_alone() && before;
    return sample;
}

// Copies the values of those that count; of all, if these are too few.
static inline size_t bench_count(const bench_sample *samples, size_t count, double *values) {
    size_t counted = 0;
    for (size_t i = 0; i < count; i++) {
        if (samples[i].alone) values[counted++] = samples[i].value;
    }
    if (counted >= BENCH_FEWEST) return counted;
    for (size_t i = 0; i < count; i++) values[i] = samples[i].value;
    return count;
}

// once() measures one repetition and says what it cost. The first warms up and is not counted.
static inline double bench_measure(double (*once)(void)) {
    static bench_sample samples[BENCH_MOST];
    static double values[BENCH_MOST];
    double end = bench_now() + BENCH_SECONDS * 1e9;
    size_t count = 0, alone = 0;
    once();
    while (count < BENCH_MOST && alone < BENCH_ENOUGH) {
        if (count >= BENCH_FEWEST && bench_now() > end) break;
        samples[count] = bench_sample_of(once);
        alone += samples[count++].alone;
    }
    bench_made += count;
    bench_counted += alone;
    return bench_median(values, bench_count(samples, count, values));
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

// Says last which part of the repetitions counted.
static inline void bench_end(void) {
    double share = bench_made > 0 ? 100.0 * (double)bench_counted / (double)bench_made : 0;
    if (bench_made > 0) printf("; counted %.1f %%", share);
    printf("\n");
}

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
