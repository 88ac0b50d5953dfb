// 02_then_callbacks: futures without tasks, for programs that think in callbacks.
//
// shows   orch_then, orch_on, orch_finally and orch_chain on a loop of our own; errors skip ahead
//         to the next callback that handles them
// run     cc -O2 -o callbacks examples/02_then_callbacks.c && ./callbacks
// prints
//         nothing has run yet
//         looking up tea
//         tea: closed the connection
//         tea: 714 cents with tax
//         looking up gold
//         gold: closed the connection
//         gold: not for sale, so 0 cents

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>
#include <string.h>

static orch_result look_up(orch_result *in, void *context) {
    (void)in;
    const char *item = context;
    printf("looking up %s\n", item);
    if (strcmp(item, "tea") == 0) return orch_ok_int(600);
    return orch_failf(1, "not for sale"); // positive errors are the application's own
}

static orch_result slowly_add_tax(orch_result *in, void *context) {
    int *cents = context;
    *cents = (int)(orch_int(in) * 119 / 100);
    return orch_chain(orch_after(10)); // goes on when this future does
}

static orch_result after_tax(orch_result *in, void *context) {
    (void)in;
    const int *cents = context;
    return orch_ok_int(*cents);
}

static void hang_up(void *context) { printf("%s: closed the connection\n", (const char *)context); }

static void show(orch_result *in, void *context) {
    const char *item = context;
    if (in->error == 0) printf("%s: %d cents with tax\n", item, (int)orch_int(in));
    else printf("%s: %s, so 0 cents\n", item, orch_message(in));
}

static void price(char *item, uint64_t ms, int *cents) {
    orch_future *f = orch_then(orch_after(ms), look_up, NULL, item);
    f = orch_then(f, slowly_add_tax, NULL, cents); // no error handler: an error passes through
    f = orch_then(f, after_tax, NULL, cents);
    f = orch_finally(f, hang_up, item); // runs either way
    orch_on(f, show, item);             // the end of the chain
}

int main(void) {
    orch_loop *loop = orch_loop_new(NULL);
    if (loop == NULL) return orch_exit(orch_fail(ORCH_ENOMEM));
    int tea = 0, gold = 0;
    price("tea", 10, &tea);
    price("gold", 150, &gold);
    printf("nothing has run yet\n"); // callbacks run from the loop, never inside orch_then
    int error = orch_loop_run(loop);
    orch_loop_free(loop);
    return error == 0 ? 0 : orch_exit(orch_fail(error));
}
