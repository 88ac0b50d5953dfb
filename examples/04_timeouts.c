// 04_timeouts: work that takes too long is cancelled, and has ended when the timeout is delivered.
//
// shows   orch_timeout around anything; a cancelled task cleans up; one limit around several calls;
//         orch_gather_n keeps what was done in time
// run     cc -O2 -o timeouts examples/04_timeouts.c && ./timeouts
// prints
//         quick: done
//         slow: was cancelled, cleaned up
//         slow: Timeout after 20 ms
//         left: was cancelled, cleaned up
//         right: was cancelled, cleaned up
//         both: Timeout after 20 ms
//         last: was cancelled, cleaned up
//         gathered: done, timed out

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>

struct job {
    const char *name;
    uint64_t ms;
};

static orch_result work(void *arg) {
    const struct job *job = arg;
    int error = orch_sleep(job->ms);
    if (error == 0) return orch_ok("done", NULL);
    // From here on every wait is refused; between orch_shield_begin and _end clean-up may wait.
    orch_shield_begin();
    orch_sleep(1);
    orch_shield_end();
    printf("%s: was cancelled, cleaned up\n", job->name);
    return orch_fail(error);
}

static void show(const char *what, orch_result r) {
    printf("%s: %s\n", what, r.error == 0 ? (const char *)r.value : orch_message(&r));
    orch_result_free(&r);
}

static orch_result start(void *arg) {
    (void)arg;
    struct job quick = {"quick", 5}, slow = {"slow", 5000}, left = {"left", 5000};
    struct job right = {"right", 6000}, last = {"last", 5000};

    show("quick", orch_await(orch_timeout(orch_go(work, &quick), 2000)));
    show("slow", orch_await(orch_timeout(orch_go(work, &slow), 20)));

    // Built in statements, not inside the call: C leaves the order of arguments open.
    orch_future *both[2];
    both[0] = orch_go(work, &left);
    both[1] = orch_go(work, &right);
    show("both", orch_await(orch_timeout(orch_all_n(2, both), 20)));

    orch_future *some[2];
    some[0] = orch_go(work, &quick);
    some[1] = orch_go(work, &last);
    orch_result r = orch_await(orch_gather_n(2, some, 200));
    const orch_result *first = orch_at(&r, 0), *second = orch_at(&r, 1);
    printf("gathered: %s, %s\n", first->error == 0 ? (const char *)first->value : "failed",
           second->error == ORCH_ETIMEDOUT ? "timed out" : "in time");
    orch_result_free(&r);
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(start, NULL)); }
