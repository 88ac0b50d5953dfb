// 05_all_settled: one of three calls fails; all gives up, all_settled keeps what there is.
//
// shows   orch_all rejects with the first error and cancels the rest; orch_all_settled waits for
//         each outcome; a failed part can degrade to a default
// run     cc -O2 -o settled examples/05_all_settled.c && ./settled
// prints
//         all: input 1 failed: the comments are down
//         all_settled: likes 7
//         all_settled: the comments are down
//         all_settled: views 99
//         the page: 7 likes, 0 comments (degraded), 99 views

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>

struct service {
    const char *name;
    uint64_t ms;
    int count; // below 0: the service is down
};

static struct service services[3] = {{"likes", 30, 7}, {"comments", 10, -1}, {"views", 20, 99}};

static orch_result ask(void *arg) {
    const struct service *s = arg;
    int error = orch_sleep(s->ms);
    if (error != 0) return orch_fail(error);
    if (s->count < 0) return orch_failf(503, "the %s are down", s->name);
    return orch_ok_int(s->count);
}

static void ask_all(orch_future *futures[3]) {
    for (int i = 0; i < 3; i++) futures[i] = orch_go(ask, &services[i]);
}

static orch_result start(void *arg) {
    (void)arg;
    orch_future *f[3];

    ask_all(f);
    orch_result r = orch_await(orch_all_n(3, f));
    printf("all: input %u failed: %s\n", r.index, orch_message(&r));
    orch_result_free(&r);

    ask_all(f);
    r = orch_await(orch_all_settled_n(3, f)); // fulfilled, whatever the three ended with
    int count[3] = {0};
    for (size_t i = 0; i < 3; i++) {
        const orch_result *one = orch_at(&r, i);
        if (one->error != 0) {
            printf("all_settled: %s\n", orch_message(one));
            continue; // stays 0
        }
        count[i] = (int)orch_int(one);
        printf("all_settled: %s %d\n", services[i].name, count[i]);
    }
    printf("the page: %d likes, %d comments%s, %d views\n", count[0], count[1],
           orch_at(&r, 1)->error != 0 ? " (degraded)" : "", count[2]);
    orch_result_free(&r);
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(start, NULL)); }
