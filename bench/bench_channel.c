// What does an item cost from one task to another? A send and a receive, through a channel of 64
// places, and hand to hand (a rendezvous, in which one of the two waits for each item).
// Run: make bench, or .build/bench/bench_channel
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#define ITEMS 20000

static orch_channel *channel;
static size_t capacity;

static orch_result send_all(void *arg) {
    (void)arg;
    for (intptr_t i = 0; i < ITEMS; i++) {
        bench_require(orch_send(channel, orch_ok_int(i)) == 0, "a send failed");
    }
    orch_channel_close(channel);
    return orch_ok(NULL, NULL);
}

static orch_result receive_all(void *arg) {
    (void)arg;
    for (intptr_t i = 0; i < ITEMS; i++) {
        orch_result r = orch_recv(channel);
        bench_require(r.error == 0 && orch_int(&r) == i, "a wrong item came");
        orch_result_free(&r);
    }
    bench_require(orch_recv(channel).error == ORCH_ECLOSED, "there was one more");
    return orch_ok(NULL, NULL);
}

static double once(void) {
    channel = orch_channel_new(capacity);
    double start = bench_now();
    orch_future *sender = orch_go(send_all, NULL);
    orch_future *receiver = orch_go(receive_all, NULL);
    bench_await_ok(orch_all(sender, receiver), "a task failed");
    double ns = (bench_now() - start) / ITEMS;
    orch_channel_free(channel);
    return ns;
}

static orch_result measure(void *arg) {
    (void)arg;
    bench_begin("channel");
    capacity = 64;
    bench_figure("send and receive", bench_measure(once), "ns", 40);
    bench_and();
    capacity = 0;
    bench_figure("hand to hand", bench_measure(once), "ns", 0);
    bench_end();
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(measure, NULL)); }
