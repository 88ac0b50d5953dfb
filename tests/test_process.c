// test_process.c: child processes: started, fed, read, waited for, ended. By pidfd where there is
// one; test_process_sigchld.c is the same by SIGCHLD.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define ASYNCORCH_IMPLEMENTATION // its own, as it looks into a process
#include "../asyncorch.h"
#include "pollers.h"
#include "test.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

// How many descriptors are open.
static int descriptors(void) {
    int count = 0;
    for (int fd = 0; fd < 256; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

// Neither a child that runs nor a zombie: nobody is there to wait for.
static bool no_child(void) { return waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD; }

static void run_clean(const orch_loop_desc *desc, orch_task_fn fn) {
    int before = descriptors();
    orch_result r = orch_run_with(desc, fn, NULL);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    CHECK_INT(descriptors(), before);
    CHECK(no_child());
}

// The body runs as the main task of a loop of its own, and leaves no child and no descriptor.
#define TASK_TEST_ON(name, clock_kind)                                                             \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        test_start();                                                                              \
        name##_body();                                                                             \
        return orch_ok_int(1);                                                                     \
    }                                                                                              \
    TEST(name) {                                                                                   \
        orch_loop_desc desc = {.poller = test_poller(), .clock = clock_kind};                      \
        run_clean(&desc, name##_main);                                                             \
    }                                                                                              \
    static void name##_body(void)
#define TASK_TEST(name) TASK_TEST_ON(name, ORCH_CLOCK_MONOTONIC)

#define SH(text) ((const char *const[]){"sh", "-c", text, NULL})
#define ARGV(...) ((const char *const[]){__VA_ARGS__, NULL})

static int error_of(orch_future *f) {
    orch_result r = orch_await(f);
    int error = r.error;
    orch_result_free(&r);
    return error;
}

// What it has ended with: its code, or 1000 and the signal, or the error.
static int ended(orch_process *p) {
    orch_result r = orch_await(orch_process_wait(p));
    int code = r.error;
    if (code == 0) {
        const orch_exit_status *status = r.value;
        code = status->signal ? 1000 + status->signal : status->code;
    }
    orch_result_free(&r);
    return code;
}

static int run_code(orch_process_desc desc) {
    orch_process *p = orch_process_start(&desc);
    int code = ended(p);
    orch_process_free(p);
    return code;
}

static orch_result run(orch_process_desc desc) { return orch_process_run(&desc); }

static const orch_process_output *output(const orch_result *r) {
    static const orch_process_output none = {{-1, -1}, (char *)"", (char *)"", 0, 0, false};
    CHECK_INT(r->error, 0);
    return r->error == 0 ? r->value : &none;
}

// stdout of a command, which succeeds.
static void check_out(orch_process_desc desc, const char *want) {
    orch_result r = run(desc);
    CHECK_STR(output(&r)->out, want);
    CHECK_STR(output(&r)->err, "");
    CHECK_INT(output(&r)->status.code, 0);
    orch_result_free(&r);
}

// ---- start and end

TASK_TEST(it_runs_and_ends) {
    CHECK_INT(run_code((orch_process_desc){.argv = ARGV("true")}), 0);
    CHECK_INT(run_code((orch_process_desc){.argv = ARGV("false")}), 1);
    CHECK_INT(run_code((orch_process_desc){.argv = SH("exit 42")}), 42);
    CHECK_INT(run_code((orch_process_desc){.argv = ARGV("/bin/sh", "-c", "exit 255")}), 255);
}

TASK_TEST(a_signal_is_told_from_a_code) {
    CHECK_INT(run_code((orch_process_desc){.argv = SH("kill -9 $$")}), 1000 + SIGKILL);
    CHECK_INT(run_code((orch_process_desc){.argv = SH("kill -15 $$")}), 1000 + SIGTERM);
}

TASK_TEST(many_at_once) {
    orch_process *p[40];
    char code[40][24];
    const int many = test_shared->fail_at ? 4 : 40; // a sweep repeats this often
    for (int i = 0; i < many; i++) {
        snprintf(code[i], sizeof code[i], "exit %d", i);
        p[i] = orch_process_start(&(orch_process_desc){.argv = SH(code[i])});
    }
    for (int i = many - 1; i >= 0; i--) CHECK_INT(ended(p[i]), i);
    for (int i = 0; i < many; i++) orch_process_free(p[i]);
}

TASK_TEST(it_may_have_ended_before_the_wait) {
    orch_process *p = orch_process_start(&(orch_process_desc){.argv = SH("exit 3")});
    orch_sleep(30);
    CHECK_INT(ended(p), 3);
    CHECK_INT(ended(p), 3); // and again
    CHECK_INT(orch_process_kill(p, SIGTERM), -ESRCH);
    CHECK(orch_process_id(p) > 0);
    orch_process_free(p);
}

TASK_TEST(several_may_wait) {
    orch_process *p = orch_process_start(&(orch_process_desc){.argv = SH("exit 3")});
    orch_future *a = orch_process_wait(p), *b = orch_process_wait(p);
    orch_result r = orch_await(orch_all(a, b));
    CHECK_INT(r.error, 0);
    if (r.error == 0) {
        CHECK_INT(((const orch_exit_status *)orch_at(&r, 0)->value)->code, 3);
        CHECK_INT(((const orch_exit_status *)orch_at(&r, 1)->value)->code, 3);
    }
    orch_process_free(p);
    orch_result_free(&r); // the status lives as long as the result
}

TASK_TEST(a_wait_given_up_does_nothing_to_it) {
    orch_process *p = orch_process_start(
        &(orch_process_desc){.argv = SH("read x; exit 5"), .in = ORCH_STDIO_PIPE});
    orch_drop(orch_process_wait(p));
    CHECK_INT(error_of(orch_timeout(orch_process_wait(p), 5)), ORCH_ETIMEDOUT);
    orch_future *f = orch_process_wait(p);
    orch_cancel(f, 0);
    CHECK_INT(error_of(f), ORCH_ECANCELED);
    CHECK_INT(orch_process_kill(p, 0), 0);
    CHECK_INT(orch_process_close_stdin(p), 0);
    CHECK_INT(ended(p), 5);
    orch_process_free(p);
}

TASK_TEST(the_environment) {
    setenv("TEST_X", "ours", 1);
    check_out((orch_process_desc){.argv = SH("echo $TEST_X")}, "ours\n");
    check_out((orch_process_desc){.argv = SH("echo $TEST_X $TEST_Y"),
                                  .env = ARGV("TEST_Y=theirs", "TEST_Z=")},
              "theirs\n");
}

TASK_TEST(the_directory) {
    check_out((orch_process_desc){.argv = ARGV("pwd"), .directory = "/"}, "/\n");
    check_out((orch_process_desc){.argv = ARGV("./sh", "-c", "echo here"), .directory = "/bin"},
              "here\n");
}

// ---- what cannot be started

static void cannot_start(orch_process_desc desc, int error, const char *message) {
    orch_process *p = orch_process_start(&desc);
    CHECK_INT(orch_process_id(p), error);
    CHECK_INT(orch_process_stdin(p), error);
    CHECK_INT(orch_process_close_stdin(p), error);
    CHECK_INT(orch_process_kill(p, SIGTERM), error);
    orch_result r = orch_await(orch_process_wait(p));
    CHECK_INT(r.error, error);
    if (message != NULL) CHECK_STR(orch_message(&r), message);
    orch_result_free(&r);
    orch_process_free(p);
    r = run(desc);
    CHECK_INT(r.error, error);
    if (message != NULL) CHECK_STR(orch_message(&r), message);
    orch_result_free(&r);
}

TASK_TEST(no_such_program) {
    cannot_start((orch_process_desc){.argv = ARGV("no-such-program"), .in = ORCH_STDIO_PIPE},
                 -ENOENT, "cannot start no-such-program: No such file or directory");
    cannot_start((orch_process_desc){.argv = ARGV("/no/such/program")}, -ENOENT,
                 "cannot start /no/such/program: No such file or directory");
    cannot_start((orch_process_desc){.argv = ARGV("")}, -ENOENT, NULL);
    cannot_start((orch_process_desc){.argv = ARGV("true"), .directory = "/no/such"}, -ENOENT, NULL);
    cannot_start((orch_process_desc){.argv = ARGV("true"), .directory = "/dev/null"}, -ENOTDIR,
                 NULL);
}

TASK_TEST(what_is_no_program) {
    char name[] = "/tmp/test_process_XXXXXX";
    int fd = mkstemp(name);
    CHECK(fd >= 0 && write(fd, "echo\n", 5) == 5);
    close(fd);
    cannot_start((orch_process_desc){.argv = ARGV(name)}, -EACCES, NULL);
    chmod(name, 0755);
    cannot_start((orch_process_desc){.argv = ARGV(name)}, -ENOEXEC, NULL); // no shell is tried
    unlink(name);
    cannot_start((orch_process_desc){.argv = ARGV("/tmp")}, -EACCES, NULL);
}

TASK_TEST(the_path_is_searched_as_a_shell_does) {
    char folder[] = "/tmp/test_process_XXXXXX", name[64], path[200], *old = strdup(getenv("PATH"));
    if (!CHECK(mkdtemp(folder) != NULL)) return;
    snprintf(name, sizeof name, "%s/true", folder); // found first, but not executable
    close(open(name, O_CREAT | O_WRONLY, 0644));
    snprintf(path, sizeof path, "/no/such:/dev/null:%s:/bin:/usr/bin", folder);
    setenv("PATH", path, 1);
    CHECK_INT(run_code((orch_process_desc){.argv = ARGV("true")}), 0);
    setenv("PATH", folder, 1);
    CHECK_INT(run_code((orch_process_desc){.argv = ARGV("true")}), -EACCES);
    chmod(name, 0755);
    setenv("PATH", "", 1); // an empty place is the directory it starts in
    CHECK_INT(run_code((orch_process_desc){.argv = ARGV("true")}), -ENOENT);
    CHECK_INT(run_code((orch_process_desc){.argv = ARGV("true"), .directory = folder}), -ENOEXEC);
    unsetenv("PATH");
    CHECK_INT(run_code((orch_process_desc){.argv = ARGV("sh", "-c", "exit 4")}), 4);
    if (old != NULL) setenv("PATH", old, 1);
    free(old);
    unlink(name);
    rmdir(folder);
}

TASK_TEST(a_bad_descriptor) {
    cannot_start((orch_process_desc){.argv = ARGV("true"), .out = 250}, -EBADF, NULL);
}

TASK_TEST(no_descriptors_left) {
    struct rlimit limit, few;
    getrlimit(RLIMIT_NOFILE, &limit);
    orch_sleep(1); // makes the loop's own descriptor
    int used = 0, before = descriptors();
    while (fcntl(used, F_GETFD) >= 0) used++;
    for (int extra = 0; extra < 12; extra++) { // each descriptor that a start needs is refused once
        few = limit;
        few.rlim_cur = (rlim_t)(used + extra);
        setrlimit(RLIMIT_NOFILE, &few);
        orch_process *p = orch_process_start(&(orch_process_desc){.argv = SH("exit 3"),
                                                                  .in = ORCH_STDIO_PIPE,
                                                                  .out = ORCH_STDIO_PIPE,
                                                                  .err = ORCH_STDIO_NULL});
        int code = ended(p);
        orch_process_free(p);
        setrlimit(RLIMIT_NOFILE, &limit);
        CHECK(code == -EMFILE || (extra > 6 && code == 3));
        CHECK(descriptors() <= before + 1); // one is the loop's own, when it first sleeps
        CHECK(no_child());
    }
}

static orch_result no_fork_main(void *arg) {
    (void)arg;
    cannot_start((orch_process_desc){.argv = ARGV("true"), .in = ORCH_STDIO_PIPE}, -EAGAIN, NULL);
    return orch_ok_int(1);
}

// In a child, as it cannot become root again; root is exempt from the limit.
TEST(the_system_refuses_to_fork) {
    int status = -1;
    pid_t pid = fork();
    if (pid == 0) {
        orch_loop_desc desc = {.poller = test_poller()};
        struct rlimit none = {0, 0};
        if (setrlimit(RLIMIT_NPROC, &none) != 0) _exit(1);
        if (getuid() == 0 && setuid(65534) != 0) _exit(1);
        run_clean(&desc, no_fork_main);
        _exit(test_failures ? 2 : 0);
    }
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK_INT(status, 0);
}

TEST_DIES(no_program_is_a_misuse, "asyncorch: orch_process_start: invalid argument") {
    orch_loop *loop = orch_loop_new(NULL);
    orch_process_free(orch_process_start(&(orch_process_desc){.argv = NULL}));
    orch_loop_free(loop);
}

TEST_DIES(an_unknown_choice_is_a_misuse, "asyncorch: orch_process_start: invalid argument") {
    orch_loop *loop = orch_loop_new(NULL);
    orch_process_free(
        orch_process_start(&(orch_process_desc){.argv = ARGV("true"), .out = ORCH_STDIO_OUT}));
    orch_loop_free(loop);
}

TEST_DIES(no_loop_is_a_misuse, "asyncorch: orch_process_start: no loop") {
    orch_process_free(orch_process_start(&(orch_process_desc){.argv = ARGV("true")}));
}

TEST_DIES(run_is_for_tasks, "asyncorch: orch_process_run: only a task") {
    orch_loop *loop = orch_loop_new(NULL);
    orch_result r = orch_process_run(&(orch_process_desc){.argv = ARGV("true")});
    orch_result_free(&r);
    orch_loop_free(loop);
}

// ---- what the child has

TASK_TEST(three_descriptors_and_no_other) {
    int leak = open("/dev/null", O_RDONLY), high = fcntl(leak, F_DUPFD, 200); // not close-on-exec
    check_out((orch_process_desc){.argv = SH("for f in /proc/self/fd/*; do"
                                             " n=${f##*/}; [ $n -gt 2 ] && [ -e $f ] && echo $n;"
                                             " done; true"),
                                  .in = ORCH_STDIO_PIPE},
              "");
    CHECK(fcntl(high, F_GETFD) == 0);
    close(leak);
    close(high);
}

TASK_TEST(its_descriptors_block) {
    unsigned long flags[2] = {O_NONBLOCK, 0};
    int found = 0;
    orch_result r = run((orch_process_desc){
        .argv = SH("cat /proc/self/fdinfo/0 /proc/self/fdinfo/1 | grep flags:")});
    if (r.error == 0) found = sscanf(output(&r)->out, "flags: %lo flags: %lo", flags, flags + 1);
    CHECK_INT(found, r.error == 0 ? 2 : 0);
    CHECK((flags[0] | flags[1]) % 010000 < O_NONBLOCK || r.error != 0);
    orch_result_free(&r);
}

// A set of signals of a child, without the two that the C library uses itself.
static long long signals_of_child(const char *what) {
    char command[80];
    snprintf(command, sizeof command, "sed -n 's/^%s:.//p' /proc/self/status", what);
    orch_result r = run((orch_process_desc){.argv = SH(command)});
    unsigned long long set = strtoull(output(&r)->out, NULL, 16);
    orch_result_free(&r);
    return (long long)(set & ~0x180000000u);
}

static void other_handler(int number) { (void)number; }

TASK_TEST(its_signals_are_reset) {
    sigset_t set, old;
    sigfillset(&set);
    sigdelset(&set, SIGALRM); // the test's own limit
    sigprocmask(SIG_BLOCK, &set, &old);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_DFL);
    signal(SIGINT, SIG_DFL); // ignored where a shell runs the tests in the background
    signal(SIGQUIT, SIG_DFL);
    signal(SIGUSR1, other_handler);
    CHECK_INT(signals_of_child("SigBlk"), 0);
    CHECK_INT(signals_of_child("SigIgn"), 0);
    signal(SIGHUP, SIG_IGN); // as nohup does
    CHECK_INT(signals_of_child("SigIgn"), 1);
    signal(SIGHUP, SIG_DFL);
    signal(SIGUSR1, SIG_DFL);
    signal(SIGPIPE, SIG_DFL);
    sigprocmask(SIG_SETMASK, &old, NULL);
}

TASK_TEST(a_process_group_of_its_own_or_ours) {
    orch_process *p =
        orch_process_start(&(orch_process_desc){.argv = ARGV("cat"), .in = ORCH_STDIO_PIPE});
    CHECK_INT(getpgid(orch_process_id(p)), orch_process_id(p));
    orch_process_free(p);
    p = orch_process_start(
        &(orch_process_desc){.argv = ARGV("cat"), .in = ORCH_STDIO_PIPE, .same_group = true});
    CHECK_INT(getpgid(orch_process_id(p)), getpgid(0));
    orch_process_free(p);
}

TASK_TEST(where_its_descriptors_go) {
    char text[8] = "";
    int fd[2];
    CHECK(pipe(fd) == 0);
    fcntl(fd[0], F_SETFL, O_NONBLOCK);
    CHECK_INT(run_code((orch_process_desc){.argv = SH("echo out; echo err >&2"), .out = fd[1]}), 0);
    CHECK_INT(read(fd[0], text, 7), 4);
    CHECK_STR(text, "out\n");
    CHECK(fcntl(fd[1], F_GETFD) >= 0); // stays ours
    check_out((orch_process_desc){.argv = SH("echo out; echo err >&2"), .err = ORCH_STDIO_OUT},
              "out\nerr\n");
    check_out((orch_process_desc){.argv = SH("cat; echo end; echo err >&2"),
                                  .in = ORCH_STDIO_NULL,
                                  .err = ORCH_STDIO_NULL},
              "end\n");
    close(fd[0]);
    close(fd[1]);
}

static orch_result low_descriptors_main(void *arg) {
    (void)arg;
    check_out(
        (orch_process_desc){
            .argv = SH("cat; echo err >&2"), .input = "in", .input_size = 2, .err = ORCH_STDIO_OUT},
        "inerr\n");
    int in = open("/dev/null", O_RDONLY); // gets 0 or 1
    orch_result r = run((orch_process_desc){.argv = SH("cat; echo out"), .in = in > 0 ? in : -2});
    CHECK_STR(output(&r)->out, "out\n");
    orch_result_free(&r);
    close(in);
    return orch_ok_int(1);
}

TEST(a_program_whose_own_descriptors_are_closed) {
    orch_loop_desc desc = {.poller = test_poller()};
    close(0);
    close(1);
    run_clean(&desc, low_descriptors_main);
    CHECK_INT(open("/dev/null", O_RDWR), 0);
    CHECK_INT(open("/dev/null", O_RDWR), 1);
}

TASK_TEST(pipes_by_hand) {
    char text[8] = "";
    orch_process *p = orch_process_start(
        &(orch_process_desc){.argv = ARGV("cat"), .in = ORCH_STDIO_PIPE, .out = ORCH_STDIO_PIPE});
    CHECK_INT(orch_process_stderr(p), orch_process_id(p) > 0 ? -EBADF : orch_process_id(p));
    CHECK_INT(orch_write(orch_process_stdin(p), "hello", 5), 5);
    CHECK_INT(orch_read(orch_process_stdout(p), text, 7), 5);
    CHECK_STR(text, "hello");
    CHECK_INT(orch_process_close_stdin(p), 0);
    CHECK_INT(orch_process_stdin(p), -EBADF);
    CHECK_INT(orch_process_close_stdin(p), -EBADF);
    CHECK_INT(orch_read(orch_process_stdout(p), text, 7), 0);
    CHECK_INT(ended(p), 0);
    orch_process_free(p);
}

// ---- ending it

static uint64_t real_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

// A process that has told that it is ready.
static orch_process *ready_process(orch_process_desc desc) {
    char byte;
    desc.out = ORCH_STDIO_PIPE;
    orch_process *p = orch_process_start(&desc);
    if (orch_process_id(p) > 0) CHECK(orch_read(orch_process_stdout(p), &byte, 1) == 1);
    return p;
}

TASK_TEST(a_free_ends_it) {
    orch_process *p = orch_process_start(&(orch_process_desc){.argv = ARGV("sleep", "1000")});
    orch_future *f = orch_process_wait(p);
    int pid = orch_process_id(p);
    uint64_t start = real_ms();
    orch_process_free(p);
    CHECK(real_ms() - start < 1500); // did not need the grace
    CHECK(pid < 0 || kill(pid, 0) == -1);
    CHECK(orch_is_settled(f));
    orch_result r = orch_await(f);
    if (r.error == 0) CHECK_INT(((const orch_exit_status *)r.value)->signal, SIGTERM);
    orch_result_free(&r);
    orch_process_free(NULL);
}

TASK_TEST(one_that_ignores_sigterm_is_killed) {
    orch_process *p = ready_process((orch_process_desc){
        .argv = SH("trap '' TERM; echo; sleep 1000; sleep 1000"), .grace_ms = 30});
    orch_future *f = orch_process_wait(p);
    uint64_t start = real_ms();
    orch_process_free(p);
    CHECK(real_ms() - start >= 29 || orch_is_settled(f));
    orch_result r = orch_await(f);
    if (r.error == 0) CHECK_INT(((const orch_exit_status *)r.value)->signal, SIGKILL);
    orch_result_free(&r);
}

TASK_TEST(one_that_cleans_up_has_the_time) {
    orch_process *p = ready_process((orch_process_desc){
        .argv = SH("trap 'echo bye; exit 9' TERM; echo; while :; do sleep 0.01; done")});
    orch_future *f = orch_process_wait(p);
    orch_process_free(p);
    orch_result r = orch_await(f);
    if (r.error == 0) CHECK_INT(((const orch_exit_status *)r.value)->code, 9);
    orch_result_free(&r);
}

TASK_TEST(no_grace) {
    orch_process *p = ready_process(
        (orch_process_desc){.argv = SH("trap 'exit 9' TERM; echo; sleep 1000"), .no_grace = true});
    orch_future *f = orch_process_wait(p);
    orch_process_free(p);
    orch_result r = orch_await(f);
    if (r.error == 0) CHECK_INT(((const orch_exit_status *)r.value)->signal, SIGKILL);
    orch_result_free(&r);
}

TASK_TEST(one_that_is_stopped_ends_too) {
    orch_process *p = orch_process_start(&(orch_process_desc){.argv = ARGV("sleep", "1000")});
    CHECK(orch_process_kill(p, SIGSTOP) == 0 || orch_process_id(p) < 0);
    orch_future *f = orch_process_wait(p);
    orch_process_free(p);
    orch_result r = orch_await(f);
    if (r.error == 0) CHECK_INT(((const orch_exit_status *)r.value)->signal, SIGTERM);
    orch_result_free(&r);
}

TASK_TEST(what_it_has_started_ends_with_it) {
    int fd[2];
    char byte;
    CHECK(pipe2(fd, O_CLOEXEC) == 0);
    // Its children hold the pipe; one of them ignores SIGTERM.
    orch_process *p = ready_process((orch_process_desc){
        .argv = SH("trap '' TERM; sleep 1000 & trap - TERM; sleep 1000 & echo; wait"),
        .err = fd[1]});
    close(fd[1]);
    orch_process_free(p);
    CHECK_INT(orch_read(fd[0], &byte, 1), 0); // all its holders are gone
    close(fd[0]);
}

TASK_TEST(what_it_has_started_may_outlive_it) {
    int fd[2];
    char byte;
    CHECK(pipe2(fd, O_CLOEXEC) == 0);
    orch_process *p =
        orch_process_start(&(orch_process_desc){.argv = SH("read x <&2 & exit 0"), .err = fd[0]});
    int code = ended(p);
    orch_process_free(p);
    CHECK(code == 0 || code < 0);
    close(fd[0]);
    if (code == 0) CHECK_INT(write(fd[1], "\n", 1), 1); // it still reads
    (void)byte;
    close(fd[1]);
}

TASK_TEST(a_signal_reaches_the_group) {
    signal(SIGINT, SIG_DFL); // see its_signals_are_reset
    orch_process *p = ready_process((orch_process_desc){.argv = SH("echo; sleep 1000; exit 3")});
    CHECK_INT(orch_process_kill(p, 1000), orch_process_id(p) > 0 ? -EINVAL : orch_process_id(p));
    CHECK(orch_process_kill(p, SIGUSR1) == 0 || orch_process_id(p) < 0);
    int code = ended(p);
    CHECK(code == 1000 + SIGUSR1 || code < 0);
    orch_process_free(p);
}

static orch_result sleeper_task(void *arg) {
    orch_process *p = orch_process_start(&(orch_process_desc){.argv = ARGV("sleep", "1000")});
    *(int *)arg = orch_process_id(p);
    int code = ended(p);
    orch_process_free(p);
    return orch_ok_int(code);
}

TASK_TEST(a_cancelled_task_leaves_nothing) {
    int pid = 0;
    orch_future *f = orch_go(sleeper_task, &pid);
    orch_sleep(5);
    orch_drop(f);
    CHECK(pid <= 0 || kill(pid, 0) == -1);
    CHECK(no_child());
}

static orch_result left_behind(void *arg) {
    orch_process *p = orch_process_start(&(orch_process_desc){.argv = ARGV("sleep", "1000")});
    *(orch_process **)arg = p;
    return orch_ok_int(1);
}

TEST(the_end_of_the_loop_ends_it) {
    orch_loop_desc desc = {.poller = test_poller()};
    orch_process *p = NULL;
    uint64_t start = real_ms();
    orch_result r = orch_run_with(&desc, left_behind, &p);
    CHECK_INT(orch_int(&r), 1);
    CHECK(real_ms() - start < 1500);
    CHECK(no_child());
    orch_result_free(&r);
    // The object was to be freed before. It is not leaked by us: give it back as the loop would.
    if (p != NULL && p->loop != NULL) free(p);
}

TEST(outside_a_task_it_ends_later) {
    orch_loop_desc desc = {.poller = test_poller()};
    orch_loop *loop = orch_loop_new(&desc);
    if (loop == NULL) return;
    orch_process *p = orch_process_start(&(orch_process_desc){.argv = ARGV("sleep", "1000")});
    bool runs = orch_process_id(p) > 0;
    orch_process_free(p);
    int busy = orch_loop_free(loop);
    CHECK(busy == 0 || (runs && busy == ORCH_EBUSY)); // mostly it is still ending
    if (busy != 0) {
        CHECK_INT(orch_loop_run(loop), 0);
        CHECK_INT(orch_loop_free(loop), 0);
    }
    CHECK(no_child());
}

TASK_TEST(somebody_else_has_reaped_it) {
    orch_process *p = orch_process_start(
        &(orch_process_desc){.argv = SH("read x; exit 3"), .in = ORCH_STDIO_PIPE});
    if (orch_process_id(p) > 0) {
        orch_process_close_stdin(p);
        CHECK_INT(waitpid(orch_process_id(p), NULL, 0), orch_process_id(p));
        CHECK_INT(ended(p), -ECHILD);
    }
    orch_process_free(p);
}

// Its copy of the loop gives up processes that are not its own.
TASK_TEST(a_child_made_by_fork_ends_nothing_of_ours) {
    orch_process *p = orch_process_start(&(orch_process_desc){.argv = ARGV("sleep", "1000")});
    int status = 0;
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        orch_process_free(p);
        _exit(3);
    }
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK_INT(status, 3 << 8);
    orch_future *f = orch_process_wait(p);
    orch_process_free(p);
    orch_result r = orch_await(f);
    if (r.error == 0) CHECK_INT(((const orch_exit_status *)r.value)->signal, SIGTERM); // by us
    orch_result_free(&r);
}

TASK_TEST(foreign_children_are_left_alone) {
    int status = 0;
    pid_t pid = fork();
    if (pid == 0) _exit(7);
    CHECK_INT(run_code((orch_process_desc){.argv = SH("exit 3")}), 3);
    orch_sleep(5);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK_INT(WEXITSTATUS(status), 7);
}

// ---- run

TASK_TEST(run_captures_both) {
    orch_result r = run((orch_process_desc){.argv = SH("echo out; echo err >&2; exit 3")});
    const orch_process_output *o = output(&r);
    CHECK_STR(o->out, "out\n");
    CHECK_STR(o->err, "err\n");
    CHECK_INT(o->out_size, 4);
    CHECK_INT(o->err_size, 4);
    CHECK_INT(o->status.code, 3);
    CHECK(!o->truncated);
    orch_result_free(&r);
    check_out((orch_process_desc){.argv = ARGV("true")}, "");
    check_out((orch_process_desc){.argv = ARGV("cat")}, ""); // no input is an empty one
}

enum { BIG = 1 << 20 };
static char big[BIG];

TASK_TEST(big_input_and_big_output_at_once) {
    for (size_t i = 0; i < BIG; i++) big[i] = (char)('a' + i % 23);
    orch_result r = run((orch_process_desc){.argv = ARGV("cat"), .input = big, .input_size = BIG});
    const orch_process_output *o = output(&r);
    if (r.error == 0) CHECK_INT(o->out_size, BIG);
    if (r.error == 0) CHECK(memcmp(o->out, big, BIG) == 0);
    orch_result_free(&r);
    r = run((orch_process_desc){
        .argv = SH("cat >&2; head -c 300000 /dev/zero"), .input = big, .input_size = BIG});
    if (r.error == 0) CHECK_INT(output(&r)->out_size, 300000);
    if (r.error == 0) CHECK_INT(output(&r)->err_size, BIG);
    orch_result_free(&r);
}

TASK_TEST(one_that_does_not_read_its_input) {
    check_out((orch_process_desc){.argv = SH("echo x"), .input = big, .input_size = BIG}, "x\n");
    check_out((orch_process_desc){.argv = SH("exec <&-; sleep 0.02; echo x"),
                                  .input = big,
                                  .input_size = BIG},
              "x\n");
    CHECK(!test_failures || no_child());
}

TASK_TEST(above_the_limit) {
    orch_process_desc desc = {.argv = SH("head -c 100000 /dev/zero"), .limit = 1000};
    orch_result r = run(desc);
    CHECK_INT(r.error, ORCH_ELIMIT);
    CHECK_STR(orch_message(&r), "stdout is longer than 1000 bytes");
    orch_result_free(&r);
    desc.argv = SH("while :; do echo y; done >&2"); // endless: it is ended
    r = run(desc);
    CHECK_INT(r.error, ORCH_ELIMIT);
    CHECK_STR(orch_message(&r), "stderr is longer than 1000 bytes");
    orch_result_free(&r);
    desc.argv = SH("printf 0123456789; head -c 100000 /dev/zero");
    desc.truncate = true;
    r = run(desc);
    CHECK_INT(output(&r)->out_size, r.error == 0 ? 1000 : 0);
    CHECK(output(&r)->truncated || r.error != 0);
    CHECK(strncmp(output(&r)->out, "0123456789", 11) == 0 || r.error != 0);
    orch_result_free(&r);
    desc.limit = 10;
    check_out((orch_process_desc){.argv = SH("printf 0123456789"), .limit = 10}, "0123456789");
}

static orch_result run_task(void *arg) { return orch_process_run(arg); }

TASK_TEST(run_is_cancelled_in_each_phase) {
    static const char *const commands[] = {
        "cat >/dev/null; sleep 1000", "head -c 200000 /dev/zero; sleep 1000",
        "exec >&- 2>&- <&-; sleep 1000", "sleep 1000 & exec sleep 1000"};
    const size_t many = sizeof commands / sizeof commands[0];
    for (size_t i = 0; i < many; i++) {
        if (test_shared->fail_at && (size_t)test_shared->fail_at % many != i) continue; // by turns
        orch_process_desc desc = {.argv = SH(commands[i]), .input = big, .input_size = BIG};
        CHECK_INT(error_of(orch_timeout(orch_go(run_task, &desc), 20)), ORCH_ETIMEDOUT);
        CHECK(no_child());
        orch_drop(orch_go(run_task, &desc)); // at once
        CHECK(no_child());
    }
}

static orch_result run_when_cancelled(void *arg) {
    int error = orch_sleep(1000);
    *(orch_result *)arg = run((orch_process_desc){.argv = ARGV("touch", "/tmp/never")});
    return orch_fail(error);
}

TASK_TEST(a_cancelled_task_starts_nothing) {
    orch_result r = {0};
    orch_drop(orch_go(run_when_cancelled, &r));
    CHECK_INT(r.error, r.error == 0 ? 0 : ORCH_ECANCELED);
    orch_result_free(&r);
}

TASK_TEST(a_scope_bounds_a_run) {
    orch_scope s;
    orch_scope_desc desc = {.timeout_ms = 20};
    if (orch_scope_open(&s, &desc) == 0) {
        orch_result r = run((orch_process_desc){.argv = ARGV("sleep", "1000")});
        CHECK_INT(r.error, ORCH_ECANCELED);
        orch_result_free(&r);
        CHECK(no_child());
    }
    orch_result r = orch_scope_close(&s);
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    orch_result_free(&r);
}

// ---- a virtual clock

TASK_TEST_ON(virtual_time_stands_while_a_child_runs, ORCH_CLOCK_VIRTUAL) {
    orch_future *f = orch_after(1000 * 3600);
    CHECK_INT(run_code((orch_process_desc){.argv = SH("sleep 0.02; exit 3")}), 3);
    CHECK(!orch_is_settled(f));
    CHECK_INT(orch_now(), 0);
    CHECK_INT(error_of(f), 0); // now it jumps
    CHECK(orch_now() >= 1000 * 3600);
}

TASK_TEST_ON(the_grace_is_virtual_too, ORCH_CLOCK_VIRTUAL) {
    orch_process *p = ready_process((orch_process_desc){
        .argv = SH("trap '' TERM; echo; sleep 1000; sleep 1000"), .grace_ms = 3600 * 1000});
    orch_process_free(p);
}

// Another thread's fork may hold the pipe of the report, which then does not end.
TEST(a_report_that_does_not_end_is_given_up) {
    int ends[2], error = -ENOENT;
    if (!CHECK_INT(pipe(ends), 0)) return;
    CHECK_INT(orchi_spawn_report(ends[0]), 0);
    CHECK_INT(write(ends[1], &error, sizeof error), sizeof error);
    CHECK_INT(orchi_spawn_report(ends[0]), -ENOENT);
    close(ends[0]);
    close(ends[1]);
}

// What is known of a closed descriptor would be believed of the next owner of its number.
TASK_TEST(nothing_is_known_of_closed_descriptors) {
    orch_process_desc desc = {.argv = SH("exit 3"), .out = ORCH_STDIO_PIPE, .in = ORCH_STDIO_PIPE};
    int code = run_code(desc);
    CHECK(code == 3 || code == ORCH_ENOMEM);
    for (size_t fd = 0; fd < orchi_loop->poller.watch_count; fd++) {
        bool closed = fcntl((int)fd, F_GETFD) < 0;
        if (closed) CHECK_INT(orchi_loop->poller.watches[fd].hints, 0);
    }
}

// ---- statuses

TEST(statuses_in_words) {
    char text[64];
    CHECK_STR(orch_exit_status_text((orch_exit_status){3, 0}, text, sizeof text), "exited with 3");
    CHECK_STR(orch_exit_status_text((orch_exit_status){0, 9}, text, sizeof text),
              "killed by signal 9 (Killed)");
    CHECK_STR(orch_exit_status_text((orch_exit_status){0, 9}, text, 7), "killed");
    orch_result r = orch_exit_status_check((orch_exit_status){0, 0});
    CHECK_INT(r.error, 0);
    r = orch_exit_status_check((orch_exit_status){3, 0});
    CHECK_INT(r.error, 3);
    CHECK_STR(orch_message(&r), "exited with 3");
    orch_result_free(&r);
    r = orch_exit_status_check((orch_exit_status){0, 15});
    CHECK_INT(r.error, 143);
    orch_result_free(&r);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
