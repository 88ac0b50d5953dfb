// 01_hello_await: tasks that wait, in ordinary C.
//
// shows   orch_run, orch_go, orch_await, orch_sleep; a task starts at once and runs until it waits
// run     cc -O2 -o hello examples/01_hello_await.c && ./hello
// prints
//         Ada reads the question
//         Alan reads the question
//         both are thinking
//         Alan has an answer
//         Ada has an answer
//         the answers: 36 and 6

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>

struct question {
    const char *who;
    uint64_t ms; // how long thinking takes
    int answer;
};

static orch_result think(void *arg) {
    const struct question *q = arg;
    printf("%s reads the question\n", q->who);
    int error = orch_sleep(q->ms); // the others run meanwhile
    if (error != 0) return orch_fail(error);
    printf("%s has an answer\n", q->who);
    return orch_ok_int(q->answer);
}

static orch_result start(void *arg) {
    (void)arg;
    struct question ada = {"Ada", 40, 36}, alan = {"Alan", 10, 6};
    orch_future *first = orch_go(think, &ada);
    orch_future *second = orch_go(think, &alan);
    printf("both are thinking\n");

    orch_result a = orch_await(first); // takes the future; the result is ours
    orch_result b = orch_await(second);
    printf("the answers: %d and %d\n", (int)orch_int(&a), (int)orch_int(&b));
    orch_result_free(&b);
    return a; // what the program ends with: 0, or 1 with the error on stderr
}

int main(void) { return orch_exit(orch_run(start, NULL)); }
