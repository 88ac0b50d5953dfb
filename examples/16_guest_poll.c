// 16_guest_poll.c: a program with a poll loop of its own hosts tasks.
//
// shows   orch_loop_pollfds, orch_loop_timeout, orch_loop_dispatch: three calls each time round
// run     cc -O2 -o guest_poll examples/16_guest_poll.c && ./guest_poll
// prints
//         task: asks the host
//         host: was asked, answers
//         task: has the answer, sleeps
//         task: slept 10 ms
//         host: nothing is left to do

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int question[2], answer[2]; // pipes

static orch_result guest(void *arg) {
    (void)arg;
    puts("task: asks the host");
    if (write(question[1], "?", 1) != 1) return orch_fail(-errno);
    orch_result r = orch_await(orch_ready(answer[0], ORCH_READABLE));
    if (r.error != 0) return r;
    puts("task: has the answer, sleeps");
    orch_sleep(10);
    puts("task: slept 10 ms");
    return orch_ok(NULL, NULL);
}

// The descriptors of the loop, behind the host's own one.
static struct pollfd *fds;
static size_t capacity;

static int ask_loop(orch_loop *loop) {
    for (;;) {
        int count = orch_loop_pollfds(loop, fds + 1, capacity - 1);
        if (count < 0) exit(orch_exit(orch_fail(count)));
        if ((size_t)count < capacity) return count;
        capacity = (size_t)count + 1;
        fds = realloc(fds, capacity * sizeof *fds);
        if (fds == NULL) exit(1);
    }
}

static void host(void) {
    char byte;
    if (!(fds[0].revents & POLLIN) || read(question[0], &byte, 1) != 1) return;
    puts("host: was asked, answers");
    if (write(answer[1], "!", 1) != 1) exit(1);
}

int main(void) {
    orch_loop *loop = orch_loop_new(NULL);
    capacity = 16;
    fds = malloc(capacity * sizeof *fds);
    if (loop == NULL || fds == NULL || pipe(question) != 0 || pipe(answer) != 0) return 1;
    orch_detach(orch_go(guest, NULL)); // runs until it first waits
    int more = 1;
    while (more == 1) {
        int count = ask_loop(loop);
        uint64_t ms = orch_loop_timeout(loop);
        fds[0].fd = question[0];
        fds[0].events = POLLIN;
        if (poll(fds, (nfds_t)count + 1, ms < 1000 ? (int)ms : 1000) < 0) return 1;
        host();
        more = orch_loop_dispatch(loop, fds + 1, (size_t)count);
    }
    puts("host: nothing is left to do");
    free(fds);
    return orch_loop_free(loop) != 0 || more < 0;
}
