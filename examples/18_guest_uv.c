// 18_guest_uv.c: libuv's loop hosts tasks, through one descriptor.
//
// shows   a loop pinned to epoll or kqueue: orch_loop_fd in a uv_poll_t, orch_loop_timeout in a timer
// run     cc -O2 -DHAVE_UV -o guest_uv examples/18_guest_uv.c $(pkg-config --cflags --libs libuv) &&
//             ./guest_uv
// prints
//         task: waits for libuv
//         uv: a timer, writes
//         task: read x, sleeps
//         task: slept 10 ms
//         uv: the guest is done

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>
#include <unistd.h>

#ifdef HAVE_UV
#include <uv.h>

#ifdef __linux__
#define POLLER ORCH_POLLER_EPOLL
#else
#define POLLER ORCH_POLLER_KQUEUE
#endif

static orch_loop *loop;
static uv_poll_t ready;     // the loop's descriptor
static uv_timer_t due;      // its next timer
static uv_prepare_t before; // sets that before libuv sleeps
static uv_timer_t later;    // something of the host's own
static int ends[2];         // a pipe

static void dispatch(void) {
    if (orch_loop_dispatch(loop, NULL, 0) == 1) return;
    puts("uv: the guest is done");
    uv_close((uv_handle_t *)&ready, NULL);
    uv_close((uv_handle_t *)&due, NULL);
    uv_close((uv_handle_t *)&before, NULL);
}

static void on_ready(uv_poll_t *handle, int status, int events) {
    (void)handle;
    (void)status;
    (void)events;
    dispatch();
}

static void on_due(uv_timer_t *handle) {
    (void)handle;
    dispatch();
}

static void on_prepare(uv_prepare_t *handle) {
    (void)handle;
    uint64_t ms = orch_loop_timeout(loop);
    if (ms == UINT64_MAX) uv_timer_stop(&due);
    else uv_timer_start(&due, on_due, ms, 0);
}

static void on_later(uv_timer_t *handle) {
    puts("uv: a timer, writes");
    if (write(ends[1], "x", 1) != 1) perror("write");
    uv_close((uv_handle_t *)handle, NULL);
}

static orch_result task(void *arg) {
    char byte = 0;
    (void)arg;
    puts("task: waits for libuv");
    orch_result r = orch_await(orch_ready(ends[0], ORCH_READABLE));
    if (r.error != 0) return r;
    if (read(ends[0], &byte, 1) != 1) return orch_fail(-errno);
    printf("task: read %c, sleeps\n", byte);
    orch_sleep(10);
    puts("task: slept 10 ms");
    return orch_ok(NULL, NULL);
}

int main(void) {
    uv_loop_t *host = uv_default_loop();
    orch_loop_desc desc = {.poller = POLLER};
    loop = orch_loop_new(&desc);
    if (loop == NULL || pipe(ends) != 0) return 1;
    uv_poll_init(host, &ready, orch_loop_fd(loop));
    uv_poll_start(&ready, UV_READABLE, on_ready);
    uv_timer_init(host, &due);
    uv_prepare_init(host, &before);
    uv_prepare_start(&before, on_prepare);
    uv_timer_init(host, &later);
    uv_timer_start(&later, on_later, 5, 0);
    orch_detach(orch_go(task, NULL));
    uv_run(host, UV_RUN_DEFAULT);
    uv_loop_close(host);
    return orch_loop_free(loop) != 0;
}
#else
int main(void) {
    puts("built without libuv");
    return 0;
}
#endif
