// two_units_b.c: the unit without the implementation; see two_units_a.c.
#include "../asyncorch.h"
#include "../asyncorch.h" // twice is as good as once

#ifdef __cplusplus
extern "C"
#endif
    orch_future *
    other_units_work(int *n);

static orch_result work(void *arg) {
    int error = orch_yield();
    return error != 0 ? orch_fail(error) : orch_ok_int(*(int *)arg);
}

static orch_result plus_one(orch_result *in, void *context) {
    (void)context;
    return orch_ok_int(orch_int(in) + 1);
}

orch_future *other_units_work(int *n) {
    orch_future *f = orch_then(orch_go(work, n), plus_one, NULL, NULL);
    return orch_race(f, orch_after(60000)); // C++ and C differ in this macro
}
