// 06_wrap_callback: a library that calls back, wrapped in ten lines.
//
// shows   orch_promise_box: the ticket of a future as the one `void *user` a C callback gets; a
//         callback that comes after the future was given up is harmless
// run     cc -O2 -o wrap examples/06_wrap_callback.c && ./wrap
// prints
//         tea: 600 cents
//         gold: no such item
//         gave up on silk: Timeout after 200 ms
//         the late answer for silk was dropped

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- somebody else's library: answers later, by calling back from old_dispatch

typedef void old_callback(void *user, int error,
                          void *data); // data: malloced, the callee's to free

static struct old_request {
    const char *key;
    old_callback *callback;
    void *user;
} old_waiting; // one at a time will do here

static void old_lookup(const char *key, old_callback *callback, void *user) {
    old_waiting = (struct old_request){key, callback, user};
}

static void old_dispatch(void) {
    struct old_request r = old_waiting;
    old_waiting = (struct old_request){NULL, NULL, NULL};
    int *cents = strcmp(r.key, "gold") != 0 ? malloc(sizeof *cents) : NULL;
    if (cents != NULL) *cents = 600;
    r.callback(r.user, cents != NULL ? 0 : 1, cents);
}

// ---- the ten lines: its callback settles the future that lookup returns

static void lookup_done(void *user, int error, void *data) {
    orch_promise promise = orch_promise_unbox(user);
    orch_settle(promise, error == 0 ? orch_ok(data, free) : orch_failf(error, "no such item"));
}
static orch_future *lookup(const char *key) {
    orch_promise promise;
    orch_future *f = orch_future_new(&promise);
    old_lookup(key, lookup_done, orch_promise_box(promise));
    return f;
}

// ---- the use

static void dispatch(orch_result *in, void *context) {
    (void)in;
    (void)context;
    old_dispatch();
}

static void ask(const char *key, uint64_t answer_after) {
    orch_future *f = lookup(key);
    orch_on(orch_after(answer_after), dispatch,
            NULL); // stands for the library's own thread or loop
    orch_result r = orch_await(orch_timeout(f, 200));
    if (r.error == ORCH_ETIMEDOUT) printf("gave up on %s: %s\n", key, orch_message(&r));
    else if (r.error != 0) printf("%s: %s\n", key, orch_message(&r));
    else printf("%s: %d cents\n", key, *(int *)r.value);
    orch_result_free(&r);
}

static orch_result start(void *arg) {
    (void)arg;
    ask("tea", 5);
    ask("gold", 5);
    ask("silk", 300);
    while (old_waiting.key != NULL)
        orch_sleep(5); // its callback comes, finds nobody, frees the data
    printf("the late answer for silk was dropped\n");
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(start, NULL)); }
