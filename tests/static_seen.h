// static_seen.h: what another task wrote is seen after every call that can switch tasks. A part of
// compile_c.c, as it has to be in one unit with the implementation.
//
// gcc's interprocedural analysis takes inline assembly never to change a static variable whose
// address is not taken, memory clobber or not. With a switch it can look into, it would keep such a
// variable in a register across orch_yield, from -O1 on.

static int seen;       // the variable in question: static, its address never taken
static int stale;      // how often the change was not seen
static int shared_end; // for the tasks, whether to go on

// Sets the variable, lets `call` run, and looks whether the other task's 2 arrived.
#define SEEN_AFTER(call)                                                                           \
    do {                                                                                           \
        seen = 1;                                                                                  \
        call;                                                                                      \
        if (seen != 2) {                                                                           \
            printf("static_seen.h:%d: stale after %s\n", __LINE__, #call);                         \
            stale++;                                                                               \
        }                                                                                          \
    } while (0)

// Writes whenever it gets its turn.
static orch_result writer(void *arg) {
    (void)arg;
    while (!shared_end && orch_yield() == 0) seen = 2;
    return orch_ok_int(0);
}

// Writes at once, and waits.
static orch_result write_first(void *arg) {
    (void)arg;
    seen = 2;
    return orch_ok_int(orch_yield());
}

// Writes when it is told to end.
static orch_result write_last(void *arg) {
    (void)arg;
    int error = orch_sleep(60000);
    orch_shield_begin();
    orch_yield();
    seen = 2;
    orch_shield_end();
    return orch_fail(error);
}

static void *write_there(void *arg) {
    seen = 2;
    return arg;
}

static orch_result write_then(orch_result *in, void *context) {
    (void)context;
    seen = 2;
    return *in;
}

static orch_future *in_time(void) { return orch_after(1); }

static void from_the_writer(void) {
    orch_future *w = orch_go(writer, NULL), *f;
    orch_result r;
    SEEN_AFTER(orch_yield());
    SEEN_AFTER(orch_sleep(1));
    SEEN_AFTER(r = orch_await(in_time()));
    f = in_time();
    SEEN_AFTER(r = orch_wait(f));
    orch_drop(f);
    orch_promise p;
    f = orch_future_new(&p);
    orch_settle(p, orch_ok_int(1));
    SEEN_AFTER(for (int i = 0; i < 200; i++) r = orch_wait(f)); // the 128th takes its turn
    orch_result_free(&r);
    orch_drop(f);
    shared_end = 1;
    SEEN_AFTER(r = orch_await(w));
    orch_result_free(&r);
}

static void from_what_it_starts(void) {
    orch_future *f, *g;
    orch_promise p;
    orch_task_desc desc = {0};
    desc.fn = write_first;
    SEEN_AFTER(f = orch_go(write_first, NULL));
    SEEN_AFTER(g = orch_go_with(&desc));
    SEEN_AFTER(orch_spawn(write_first, NULL));
    orch_drop(f);
    orch_drop(g);
    f = orch_go(write_last, NULL);
    SEEN_AFTER(orch_drop(f));
    f = orch_future_new(&p);
    orch_settle(p, orch_ok_int(1));
    orch_drop(f);
    f = orch_go(write_last, NULL);
    SEEN_AFTER(orch_follow(p, f)); // refused: f is dropped
    f = orch_go(write_last, NULL);
    orch_completion *c = orch_as_completed_n(1, &f);
    SEEN_AFTER(orch_completion_free(c));
    SEEN_AFTER(orch_on_main_stack(write_there, NULL));
    f = orch_go(write_last, NULL);
    orch_result r;
    SEEN_AFTER(r = orch_await(orch_timeout(f, 1)));
    orch_result_free(&r);
    SEEN_AFTER(r = orch_await(orch_then(in_time(), write_then, NULL, NULL)));
    orch_result_free(&r);
}

static orch_result in_a_task(void *arg) {
    (void)arg;
    from_the_writer();
    from_what_it_starts();
    return orch_ok_int(0);
}

static void outside_tasks(void) {
    orch_loop *loop = orch_loop_new(NULL);
    if (loop == NULL) return;
    orch_future *f = orch_then(orch_after(1), write_then, NULL, NULL);
    SEEN_AFTER(orch_loop_run(loop));
    orch_drop(f);
    SEEN_AFTER(f = orch_go(write_first, NULL));
    orch_drop(f);
    f = orch_then(orch_after(1), write_then, NULL, NULL);
    SEEN_AFTER(while (orch_loop_step(loop, 1) == 1) continue);
    orch_drop(f);
    orch_detach(orch_go(write_last, NULL));
    SEEN_AFTER(while (orch_loop_free(loop) == ORCH_EBUSY) orch_loop_step(loop, 1));
}

// How many calls hid the change.
static int count_stale(void) {
    orch_result r;
    SEEN_AFTER(r = orch_run(in_a_task, NULL));
    orch_result_free(&r);
    SEEN_AFTER(r = orch_run(write_first, NULL));
    orch_result_free(&r);
    outside_tasks();
    return stale;
}
