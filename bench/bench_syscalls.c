// Do the hot paths enter the kernel? Runs each of them in a child that is traced (ptrace), and
// counts the system calls between two marks; every path has run once before, so that memory is
// there. With a descriptor waited for, a look at it now and then is due, and is told apart.
// Run: make bench, or .build/bench/bench_syscalls (Linux)
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#include <unistd.h>

#define OPERATIONS 100000
#define BATCH 100

static void check(int error) { bench_require(error == 0, "an operation failed"); }

static orch_result yielder(void *arg) {
    (void)arg;
    for (size_t i = 0; i < OPERATIONS / 2; i++) check(orch_yield());
    return orch_ok(NULL, NULL);
}

static void run_switch(void) {
    orch_future *first = orch_go(yielder, NULL);
    orch_future *second = orch_go(yielder, NULL);
    bench_await_ok(orch_all(first, second), "a yield failed");
}

static void run_switch_watching(void) {
    int ends[2];
    check(pipe(ends));
    orch_future *waiting = orch_ready(ends[0], ORCH_READABLE);
    run_switch();
    orch_drop(waiting);
    close(ends[0]);
    close(ends[1]);
}

static orch_result pass(orch_result *in, void *context) {
    (void)context;
    return *in;
}

static void run_then(void) {
    orch_promise tickets[BATCH];
    orch_future *futures[BATCH];
    for (size_t n = 0; n < OPERATIONS / BATCH; n++) {
        for (size_t i = 0; i < BATCH; i++) {
            futures[i] = orch_then(orch_future_new(&tickets[i]), pass, NULL, NULL);
        }
        for (size_t i = 0; i < BATCH; i++) orch_settle(tickets[i], orch_ok_int(1));
        check(orch_yield());
        for (size_t i = 0; i < BATCH; i++) orch_drop(futures[i]);
    }
}

static void see(orch_result *in, void *context) {
    (void)context;
    check(in->error);
}

static void run_on(void) {
    orch_promise tickets[BATCH];
    for (size_t n = 0; n < OPERATIONS / BATCH; n++) {
        for (size_t i = 0; i < BATCH; i++) orch_on(orch_future_new(&tickets[i]), see, NULL);
        for (size_t i = 0; i < BATCH; i++) orch_settle(tickets[i], orch_ok_int(1));
        check(orch_yield());
    }
}

static orch_result no_wait(void *arg) { return orch_ok(arg, NULL); }

static void run_spawn(void) {
    for (size_t i = 0; i < OPERATIONS; i++) bench_await_ok(orch_go(no_wait, NULL), "a task failed");
}

static void run_all(void) {
    orch_promise tickets[BATCH];
    orch_future *futures[BATCH];
    for (size_t n = 0; n < OPERATIONS / BATCH; n++) {
        for (size_t i = 0; i < BATCH; i++) futures[i] = orch_future_new(&tickets[i]);
        orch_future *all = orch_all_n(BATCH, futures);
        for (size_t i = 0; i < BATCH; i++) orch_settle(tickets[i], orch_ok_int(1));
        bench_await_ok(all, "all failed");
    }
}

static void run_timeout(void) {
    orch_promise ticket;
    for (size_t i = 0; i < OPERATIONS; i++) {
        orch_future *f = orch_timeout(orch_future_new(&ticket), 60000);
        orch_settle(ticket, orch_ok_int(1));
        bench_await_ok(f, "a timeout fired");
    }
}

typedef struct path {
    const char *name;
    void (*run)(void);
} path;

static const path paths[] = {
    {"switch", run_switch},
    {"then", run_then},
    {"on", run_on},
    {"spawn", run_spawn},
    {"all", run_all},
    {"timeout", run_timeout},
    {"switch while a descriptor waits", run_switch_watching},
};
enum { PATHS = sizeof paths / sizeof *paths };

#ifdef __linux__
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>

// A system call that nothing else here makes: the tracer takes it for a mark.
static void mark(void) { (void)syscall(SYS_getppid); }

static orch_result run_paths(void *arg) {
    (void)arg;
    for (size_t i = 0; i < PATHS; i++) {
        paths[i].run();
        mark();
        paths[i].run();
        mark();
    }
    return orch_ok(NULL, NULL);
}

static int child(void) {
    bench_require(ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0, "ptrace is not allowed here");
    raise(SIGSTOP);
    return orch_exit(orch_run(run_paths, NULL));
}

// Which system call the child is about to make; -1 when it stands at a call's end.
static long entered(pid_t pid) {
    struct __ptrace_syscall_info info; // glibc's name for it
    memset(&info, 0, sizeof info);
    ptrace(PTRACE_GET_SYSCALL_INFO, pid, (void *)sizeof info, &info);
    return info.op == PTRACE_SYSCALL_INFO_ENTRY ? (long)info.entry.nr : -1;
}

// counts[i]: the system calls between marks 2i and 2i + 1. Returns the marks seen.
static size_t trace(pid_t pid, double *counts) {
    int status = 0;
    size_t marks = 0;
    waitpid(pid, &status, 0);
    if (!WIFSTOPPED(status)) return 0;
    ptrace(PTRACE_SETOPTIONS, pid, NULL, (void *)PTRACE_O_TRACESYSGOOD);
    for (int deliver = 0;;) {
        ptrace(PTRACE_SYSCALL, pid, NULL, (void *)(intptr_t)deliver);
        if (waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status)) return marks;
        bool at_call = WSTOPSIG(status) == (SIGTRAP | 0x80);
        long number = at_call ? entered(pid) : -1;
        deliver = at_call ? 0 : WSTOPSIG(status);
        if (number == SYS_getppid) marks++;
        else if (number >= 0 && marks % 2 == 1 && marks < 2 * PATHS) counts[marks / 2]++;
    }
}

static bool count(double *counts) {
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) exit(child());
    return pid > 0 && trace(pid, counts) == 2 * PATHS;
}
#else
static bool count(double *counts) {
    (void)counts;
    return false;
}
#endif

int main(void) {
    double counts[PATHS] = {0};
    if (!count(counts)) {
        printf("syscalls: not measured (needs ptrace on Linux)\n");
        return 0;
    }
    bench_begin("syscalls");
    for (size_t i = 0; i < PATHS; i++) {
        if (i > 0) bench_and();
        bench_figure(paths[i].name, counts[i], "per 100,000", 0);
    }
    bench_end();
    return 0;
}
