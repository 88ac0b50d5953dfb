// 10_pipeline: a producer, three workers and a collector, with channels between them.
//
// shows   orch_channel_new, orch_send and orch_recv; back-pressure: a full channel makes who sends
//         to it wait, so a slow end slows the front down, and nothing piles up; closing a channel
//         ends the tasks behind it when they have received what was in it; the item that a task
//         receives is its own
// run     cc -O2 -o pipeline examples/10_pipeline.c && ./pipeline
// prints
//         room for 2: job 1 of 12 is done, 9 were made
//         room for 2: job 6 of 12 is done, 12 were made
//         room for 2: all 12 are done, their squares add up to 650
//         room for 100: job 1 of 12 is done, 12 were made
//         room for 100: job 6 of 12 is done, 12 were made
//         room for 100: all 12 are done, their squares add up to 650

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>
#include <stdlib.h>

enum { JOBS = 12, WORKERS = 3 };

struct job {
    int number, square;
};

struct pipeline {
    size_t room;         // between one stage and the next
    orch_channel *todo;  // from the producer to the workers
    orch_channel *done;  // from the workers to the collector
    int made, collected; // to show who is how far
};

static orch_result produce(void *arg) {
    struct pipeline *p = arg;
    for (int i = 1; i <= JOBS; i++) {
        struct job *job = calloc(1, sizeof *job);
        if (job == NULL) return orch_fail(ORCH_ENOMEM);
        job->number = i;
        p->made++;
        int error = orch_send(p->todo, orch_ok(job, free)); // waits while there is no room
        if (error != 0) return orch_fail(error);
    }
    orch_channel_close(p->todo); // the workers end when they have done what is left
    return orch_ok(NULL, NULL);
}

static orch_result work(void *arg) {
    struct pipeline *p = arg;
    for (;;) {
        orch_result item = orch_recv(p->todo); // the one that waits longest gets the next job
        if (item.error == ORCH_ECLOSED) return orch_ok(NULL, NULL);
        if (item.error != 0) return item;
        struct job *job = item.value;
        orch_sleep(2); // the work
        job->square = job->number * job->number;
        int error = orch_send(p->done, item); // passes it on; if that fails, it is freed
        if (error != 0) return orch_fail(error);
    }
}

// The slow end: what it does not take, the workers can not get rid of, and the producer not send.
static orch_result collect(void *arg) {
    struct pipeline *p = arg;
    int sum = 0;
    for (;;) {
        orch_result item = orch_recv(p->done);
        if (item.error == ORCH_ECLOSED) return orch_ok_int(sum);
        if (item.error != 0) return item;
        const struct job *job = item.value;
        orch_sleep(10);
        sum += job->square;
        p->collected++;
        if (p->collected == 1 || p->collected == JOBS / 2) {
            printf("room for %zu: job %d of %d is done, %d were made\n", p->room, job->number, JOBS,
                   p->made);
        }
        orch_result_free(&item);
    }
}

static orch_result run(struct pipeline *p) {
    orch_future *workers[WORKERS];
    orch_future *collector = orch_go(collect, p);
    for (int i = 0; i < WORKERS; i++) workers[i] = orch_go(work, p);
    orch_future *producer = orch_go(produce, p);
    orch_result r = orch_await(orch_all(producer, orch_all_n(WORKERS, workers)));
    orch_channel_close(p->done); // nobody sends any more
    orch_result sum = orch_await(collector);
    if (r.error != 0) {
        orch_result_free(&sum);
        return r;
    }
    orch_result_free(&r);
    return sum;
}

static orch_result start(void *arg) {
    const size_t rooms[2] = {2, 100};
    (void)arg;
    for (int i = 0; i < 2; i++) {
        struct pipeline p = {.room = rooms[i]};
        p.todo = orch_channel_new(p.room);
        p.done = orch_channel_new(p.room);
        orch_result sum = run(&p);
        orch_channel_free(p.todo); // with whatever is left in it
        orch_channel_free(p.done);
        if (sum.error != 0) return sum;
        printf("room for %zu: all %d are done, their squares add up to %d\n", p.room, p.collected,
               (int)orch_int(&sum));
    }
    return orch_ok(NULL, NULL);
}

int main(void) { return orch_exit(orch_run(start, NULL)); }
