// compile_c.c: a bit of everything; run_matrix.sh builds it with every compiler, standard and
// option. Prints "all as expected" and ends with 0, or names the lines that went wrong.
#ifdef HEADERS_FIRST // as in a program whose other headers come first
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#endif
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "static_seen.h"

static int wrong;

static void expect_at(bool held, int line) {
    if (!held) printf("compile_c.c:%d: not as expected\n", line);
    wrong += !held;
}
#define EXPECT(condition) expect_at((condition), __LINE__)

// What a result should be, which is freed.
static void expect_result_at(orch_result r, int error, intptr_t value, int line) {
    if (r.error != error || orch_int(&r) != value)
        printf("%d \"%s\" %ld\n", r.error, orch_message(&r), (long)orch_int(&r));
    expect_at(r.error == error && orch_int(&r) == value, line);
    orch_result_free(&r);
}
#define EXPECT_RESULT(r, error, value) expect_result_at((r), (error), (value), __LINE__)

static orch_result doubled(void *arg) {
    double half = *(int *)arg / 2.0;
    int error = orch_sleep(1);
    if (error != 0) return orch_fail(error);
    return orch_ok_int((intptr_t)(half * 4.0)); // half lived across the switch
}

static orch_result for_ever(void *arg) {
    int *ended = (int *)arg, error = 0;
    while (error == 0) error = orch_sleep(60000);
    orch_shield_begin();
    orch_yield(); // clean-up may wait
    orch_shield_end();
    ++*ended;
    return orch_fail(error);
}

static orch_result failing(void *arg) {
    (void)arg;
    orch_yield();
    return orch_failf(7, "number %d is %s", 7, "down");
}

static orch_result chaining(void *arg) { return orch_chain(orch_go(doubled, arg)); }

static orch_result plus_one(orch_result *in, void *context) {
    (void)context;
    return orch_ok_int(orch_int(in) + 1);
}

static orch_result to_zero(orch_result *in, void *context) {
    *(int *)context = in->error;
    return orch_ok_int(0);
}

static void count(void *context) { ++*(int *)context; }

static void keep_int(orch_result *in, void *context) { *(intptr_t *)context = orch_int(in); }

static void *add_on_main_stack(void *arg) {
    char big[200000]; // more than a task has
    memset(big, *(int *)arg, sizeof big);
    *(int *)arg += big[sizeof big - 1];
    return arg;
}

static bool usr1_is_blocked(void) {
    sigset_t set;
    return sigprocmask(SIG_BLOCK, NULL, &set) == 0 && sigismember(&set, SIGUSR1) == 1;
}

static orch_result block_usr1(void *arg) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
    orch_yield();
    EXPECT(usr1_is_blocked());
    sigprocmask(SIG_UNBLOCK, &set, NULL);
    return orch_ok(arg, NULL);
}

// A thread has one signal mask, whatever its tasks are switched with.
static void signal_mask(void) {
    orch_future *f = orch_go(block_usr1, NULL);
    EXPECT(usr1_is_blocked());
    EXPECT_RESULT(orch_await(f), 0, 0);
    EXPECT(!usr1_is_blocked());
}

static void tasks(void) {
    int n = 4, ended = 0;
    EXPECT_RESULT(orch_await(orch_go(doubled, &n)), 0, 8);
    EXPECT_RESULT(orch_await(orch_go(chaining, &n)), 0, 8);
    orch_result r = orch_await(orch_go(failing, NULL));
    EXPECT(strcmp(orch_message(&r), "number 7 is down") == 0);
    EXPECT_RESULT(r, 7, 0);
    orch_drop(orch_go(for_ever, &ended));
    EXPECT(ended == 1); // it had ended before orch_drop returned
    orch_task_desc desc = {0};
    desc.name = "a copy";
    desc.fn = doubled;
    desc.arg = &n;
    desc.arg_size = sizeof n;
    orch_future *f = orch_go_with(&desc);
    n = 5;
    r = orch_wait(f);
    EXPECT(orch_int(&r) == 8);
    EXPECT_RESULT(orch_await(f), 0, 8);
    EXPECT(orch_on_main_stack(add_on_main_stack, &n) == &n && n == 10);
    EXPECT(orch_spawn(doubled, &n) == 0);
    EXPECT(orch_yield() == 0 && orch_self() != NULL && orch_cancel_reason() == 0);
}

static void futures(void) {
    int n = 4, error = 0, times = 0;
    intptr_t kept = 0;
    orch_promise p;
    orch_future *f = orch_then(orch_future_new(&p), plus_one, NULL, NULL);
    EXPECT(orch_settle(p, orch_ok_int(1)) && !orch_settle(p, orch_ok_int(2)));
    EXPECT_RESULT(orch_await(f), 0, 2);
    f = orch_finally(orch_then(orch_go(failing, NULL), plus_one, to_zero, &error), count, &times);
    EXPECT_RESULT(orch_await(f), 0, 0);
    EXPECT(error == 7 && times == 1);
    f = orch_future_new(&p);
    EXPECT(orch_follow(p, orch_go(doubled, &n)));
    orch_on(orch_ref(f), keep_int, &kept);
    EXPECT_RESULT(orch_await(f), 0, 8);
    orch_yield();
    EXPECT(kept == 8);
    f = orch_future_new(&p);
    void *box = orch_promise_box(p);
    orch_drop(f);
    EXPECT(!orch_settle(orch_promise_unbox(box), orch_ok_int(1))); // late, and harmless
    orch_cancel(f = orch_after(60000), 0);
    EXPECT_RESULT(orch_await(f), ORCH_ECANCELED, 0);
}

static void combinators(void) {
    int n = 4, m = 6, ended = 0;
    orch_future *f = orch_go(doubled, &n), *g = orch_go(doubled, &m);
    orch_result r = orch_await(orch_all(f, g));
    EXPECT(r.error == 0 && orch_count(&r) == 2);
    EXPECT(orch_int(orch_at(&r, 0)) == 8 && orch_int(orch_at(&r, 1)) == 12);
    orch_result_free(&r);
    f = orch_go(for_ever, &ended), g = orch_go(doubled, &m);
    r = orch_await(orch_race(f, g));
    EXPECT(r.index == 1 && ended == 1); // the loser ended first
    EXPECT_RESULT(r, 0, 12);
    EXPECT_RESULT(orch_await(orch_timeout(orch_go(for_ever, &ended), 2)), ORCH_ETIMEDOUT, 0);
    f = orch_go(failing, NULL), g = orch_go(doubled, &m);
    EXPECT_RESULT(orch_await(orch_any(f, g)), 0, 12);
    f = orch_go(failing, NULL), g = orch_go(doubled, &m);
    r = orch_await(orch_all_settled(f, g));
    EXPECT(orch_at(&r, 0)->error == 7 && orch_int(orch_at(&r, 1)) == 12);
    orch_result_free(&r);
    f = orch_go(for_ever, &ended), g = orch_go(doubled, &m);
    r = orch_await(orch_gather(15, f, g));
    EXPECT(orch_at(&r, 0)->error == ORCH_ETIMEDOUT && orch_int(orch_at(&r, 1)) == 12);
    orch_result_free(&r);
    f = orch_go(for_ever, &ended), g = orch_go(doubled, &m);
    r = orch_await(orch_quorum(1, f, g));
    EXPECT(r.error == 0 && orch_at(&r, 0)->error == ORCH_ECANCELED);
    orch_result_free(&r);
    f = orch_go(doubled, &n), g = orch_go(failing, NULL);
    orch_completion *c = orch_as_completed(f, g);
    r = orch_await(orch_completion_next(c));
    EXPECT(r.index == 1);
    EXPECT_RESULT(r, 7, 0);
    EXPECT_RESULT(orch_await(orch_completion_next(c)), 0, 8);
    EXPECT_RESULT(orch_await(orch_completion_next(c)), ORCH_EEND, 0);
    orch_completion_free(c);
    EXPECT(ended == 4);
}

static void readiness(void) {
    int fd[2];
    EXPECT(pipe(fd) == 0);
    EXPECT_RESULT(orch_await(orch_timeout(orch_ready(fd[0], ORCH_READABLE), 2)), ORCH_ETIMEDOUT, 0);
    EXPECT(write(fd[1], "x", 1) == 1);
    EXPECT_RESULT(orch_await(orch_ready(fd[0], ORCH_READABLE)), 0, ORCH_READABLE);
    close(fd[0]);
    close(fd[1]);
}

// Nothing has no address: clang's sanitizer watches that none is counted from.
static void nothing(void) {
    int fd[2] = {-1, -1};
    const char *line = NULL;
    EXPECT(orch_socketpair(fd) == 0);
    EXPECT(orch_write(fd[1], NULL, 0) == 0);
    EXPECT(orch_write(fd[1], "x\n", 2) == 2);
    orch_reader *r = orch_reader_new(fd[0], 0);
    EXPECT(orch_reader_line(r, &line) == 1 && *line == 'x');
    orch_reader_free(r);
    EXPECT(orch_close(fd[0]) == 0 && orch_close(fd[1]) == 0);
}

static orch_result all_of_it(void *arg) {
    tasks();
    signal_mask();
    futures();
    combinators();
    readiness();
    nothing();
    return orch_ok(arg, NULL);
}

int main(void) {
    orch_result r = orch_run(all_of_it, &wrong);
    EXPECT(r.error == 0 && r.value == &wrong);
    orch_result_free(&r);
    EXPECT(count_stale() == 0);
    if (wrong == 0) puts("all as expected");
    return wrong != 0;
}
