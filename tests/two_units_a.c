// two_units_a.c and two_units_b.c: one implements the library, the other only includes it, both use
// it on one loop. run_matrix.sh builds them as C and C, C and C++, C++ and C.
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>

#ifdef __cplusplus
extern "C"
#endif
    orch_future *
    other_units_work(int *n);

static orch_result work(void *arg) {
    int error = orch_sleep(1);
    return error != 0 ? orch_fail(error) : orch_ok_int(*(int *)arg);
}

static orch_result both(void *arg) {
    int mine = 40, its = 1;
    (void)arg;
    orch_future *f = orch_go(work, &mine), *g = other_units_work(&its);
    orch_result r = orch_await(orch_timeout(orch_all(f, g), 20000));
    intptr_t sum = orch_int(orch_at(&r, 0)) + orch_int(orch_at(&r, 1));
    orch_result_free(&r);
    return orch_ok_int(sum);
}

int main(void) {
    orch_result r = orch_run(both, NULL);
    bool good = r.error == 0 && orch_int(&r) == 42;
    puts(good ? "all as expected" : orch_message(&r));
    orch_result_free(&r);
    return !good;
}
