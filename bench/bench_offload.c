// What does a round trip to a thread of the pool cost? A task offloads nothing, awaits it, and does
// so again: the thread watches for it. After a pause it has fallen asleep: there, it is woken, and
// here, the loop, which is nearly all of the time. Beside it stands a bare round trip, where a
// condition variable wakes a thread and that an eventfd, which is polled. The median of the trips
// counts.
// Run: make bench, or .build/bench/bench_offload   (Linux)
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define TRIPS 5000
#define RESTED 100
#define AT_ONCE 100

static orch_result nothing(void *arg) { return orch_ok(arg, NULL); }

static double trips[TRIPS];

static double round_trip(void) {
    double start = bench_now();
    bench_await_ok(orch_offload(nothing, NULL), "an offload failed");
    return bench_now() - start;
}

static double in_a_row(void) {
    for (size_t i = 0; i < TRIPS; i++) trips[i] = round_trip();
    return bench_median(trips, TRIPS);
}

static double after_a_pause(void) {
    for (size_t i = 0; i < RESTED; i++) {
        bench_require(orch_sleep(1) == 0, "no sleep");
        trips[i] = round_trip();
    }
    return bench_median(trips, RESTED);
}

// ---- the bare one

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t asked = PTHREAD_COND_INITIALIZER;
static bool work, over;
static int bell;

static void *worker(void *arg) {
    const uint64_t one = 1;
    pthread_mutex_lock(&lock);
    while (!over) {
        while (!work && !over) pthread_cond_wait(&asked, &lock);
        work = false;
        pthread_mutex_unlock(&lock);
        bench_require(write(bell, &one, sizeof one) == sizeof one, "write");
        pthread_mutex_lock(&lock);
    }
    pthread_mutex_unlock(&lock);
    return arg;
}

static void ask(bool *what) {
    pthread_mutex_lock(&lock);
    *what = true;
    pthread_cond_signal(&asked);
    pthread_mutex_unlock(&lock);
}

static double bare_trip(void) {
    uint64_t count;
    for (size_t i = 0; i < TRIPS; i++) {
        double start = bench_now();
        struct pollfd fd = {bell, POLLIN, 0};
        ask(&work);
        bench_require(poll(&fd, 1, -1) == 1, "poll");
        bench_require(read(bell, &count, sizeof count) == sizeof count, "read");
        trips[i] = bench_now() - start;
    }
    return bench_median(trips, TRIPS);
}

static double bare(void) {
    pthread_t thread;
    bell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    bench_require(bell >= 0, "eventfd");
    bench_require(pthread_create(&thread, NULL, worker, NULL) == 0, "no thread");
    double us = bench_measure(bare_trip) / 1000;
    ask(&over);
    pthread_join(thread, NULL);
    close(bell);
    return us;
}

// ---- in bulk

// Many are under way: nobody sleeps for long.
static double in_bulk(void) {
    orch_future *futures[AT_ONCE];
    double start = bench_now();
    for (size_t n = 0; n < TRIPS / AT_ONCE; n++) {
        for (size_t i = 0; i < AT_ONCE; i++) futures[i] = orch_offload(nothing, NULL);
        bench_await_ok(orch_all_n(AT_ONCE, futures), "an offload failed");
    }
    return (bench_now() - start) / TRIPS;
}

static orch_result measure(void *arg) {
    (void)arg;
    bench_begin("offload");
    bench_figure("round trip", bench_measure(in_a_row) / 1000, "us", 12);
    bench_and();
    bench_figure("after a pause", bench_measure(after_a_pause) / 1000, "us", 0);
    bench_and();
    bench_figure("a bare one", bare(), "us", 0);
    bench_and();
    bench_figure("one of 100 at once", bench_measure(in_bulk) / 1000, "us", 0);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
