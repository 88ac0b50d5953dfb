// Two of the four measures of bench/peers with State Threads, which has no futures. Prints one
// `measure nanoseconds` a line.
#include <st.h>
#include <stdio.h>
#include <time.h>

#define YIELDS 1000000
#define TASKS 500000

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void *yielder(void *arg) {
    for (int i = 0; i < YIELDS / 2; i++) st_usleep(0);
    return arg;
}

static void *one(void *arg) { return arg; }

static void measure_switch(void) {
    st_thread_t first = st_thread_create(yielder, NULL, 1, 0);
    st_thread_t second = st_thread_create(yielder, NULL, 1, 0);
    st_thread_join(first, NULL);
    st_thread_join(second, NULL);
}

static void measure_spawn(void) {
    for (int i = 0; i < TASKS; i++) st_thread_join(st_thread_create(one, NULL, 1, 0), NULL);
}

static void report(const char *what, void (*measure)(void), double count) {
    measure();
    double start = now();
    measure();
    printf("%s %.1f\n", what, (now() - start) / count);
}

int main(void) {
    if (st_init() != 0) return 1;
    report("switch", measure_switch, YIELDS);
    report("spawn", measure_spawn, TASKS);
    return 0;
}
