// test_process.c: processes, commands and signals, with real programs and in real time, of which
// they take little.
// also built with -DNDEBUG (misuse returns errors there)
//
// After every case its process has the descriptors that it had before and no child, and the loop's
// allocator has got its bytes back: if not, the case aborts, in the sweep too.
//
// adopted behaviour                                known from                      cases
// the exit code is a value, a signal an error      Trio run_process, Go ExitError  exit_codes, ended_by_signal
// what cannot be started says why, at once         Python, Rust (pipe from child)  start_*
// PATH of the parent, relative names from the cwd  execvp                          start_searches_path
// a file without permission does not end the search execvp                         start_searches_path
// streams: inherit, pipe, null, descriptor, merge  Python Popen, Rust Stdio        stdio_*
// works where 0 to 2 are closed, or swapped        Python _posixsubprocess, libuv  stdio_closed, stdio_swapped
// only 0 to 2 are passed on                        Python close_fds, Rust CLOEXEC  inherits_nothing
// mask empty, caught signals default, SIGPIPE too  libuv, Rust; nohup              inherits_signals
// cancelling kills: kindly, then not               Trio deliver_cancel, GNU timeout cancel_*
// both directions at once do not deadlock          Python communicate              pipes_both_ways, command_both_ways
// a program that does not read its input           Python communicate (EPIPE)      command_reads_no_input
// no zombie, no other's child is waited for        Rust, libuv (waitpid(-1) bug)   every case, others_*
// its own SIGCHLD handler goes on working          Go, signal-hook                 others_handler
// works without pidfd                              libuv                           without_pidfd_*
// every delivery is seen, by everyone who waits    tokio signal, Trio              signal_*, listen_*
// the action of before is put back                 Trio open_signal_receiver       signal_puts_back*
// an earlier handler is called too                 signal-hook                     signal_chains
// a child of a fork is not its parent              libuv (uv_loop_fork)            signal_fork_*
// Ctrl-C: clean up, then die of SIGINT; twice: now Cracauer, asyncio.run, Trio     main_*
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "test.h"

#include <dirent.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#if __has_include(<linux/seccomp.h>)
#include <linux/filter.h>
#include <linux/seccomp.h>
#endif

// ---- kit

static size_t bytes;
static int descriptors, unhandled;

static void *count_bytes(void *user, void *old, size_t old_size, size_t size) {
    void *made = NULL;
    (void)user;
    if (size == 0) free(old);
    else if ((made = realloc(old, size)) == NULL) return NULL;
    bytes = bytes - (old ? old_size : 0) + size;
    return made;
}

static void on_unhandled(const orch_result *r, void *context) {
    (void)context;
    (void)r;
    unhandled++;
}

static void on_report(const char *text, void *context) {
    (void)context;
    if (!test_shared->fail_at) fputs(text, stderr);
}

static const orch_loop_desc settings = {
    .allocator = {count_bytes, NULL}, .on_unhandled = on_unhandled, .on_report = on_report};

static int count_descriptors(void) {
    int count = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (folder != NULL && readdir(folder) != NULL) count++;
    if (folder != NULL) closedir(folder);
    return count;
}

static void must(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "not so: %s\n", what);
    abort();
}

static void balance(void) {
    must(bytes == 0, "all memory is back");
    must(count_descriptors() == descriptors, "all descriptors are closed");
    must(waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD, "no child is left");
    for (int n = 1; n <= ORCHI_SIGNALS; n++) {
        must(orchi_signal_table.of[n].users == 0, "nobody listens to a signal");
    }
}

/* Runs a case as main task. Refused memory is no failure of the case. */
static void run_with(orch_task_fn fn, void *arg) {
    descriptors = count_descriptors();
    orch_result r = orch_run_with(&settings, fn, arg);
    if (r.error != 0 && !test_shared->refused) fprintf(stderr, "%s\n", orch_message(&r));
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    balance();
}

static void run(orch_task_fn fn) { run_with(fn, NULL); }

#define RUN(id)                                                                                    \
    static orch_result body_##id(void *arg);                                                       \
    TEST(id) { run(body_##id); }                                                                   \
    static orch_result body_##id(void *arg __attribute__((unused)))

static orch_result done(void) { return orch_ok(NULL, NULL); }

#define SHELL(script)                                                                              \
    ((orch_process_desc){.argv = (char *[]){"/bin/sh", "-c", (char *)(uintptr_t)(script), NULL}})

static orch_process *start_shell(const char *script) {
    orch_process_desc desc = SHELL(script);
    return orch_process_start(&desc);
}

/* Waits, frees, and returns the exit code, or the error. */
static int finish(orch_process *p) {
    orch_result r = orch_await(orch_process_wait(p));
    int code = r.error != 0 ? r.error : (int)orch_int(&r);
    orch_result_free(&r);
    orch_process_free(p);
    return code;
}

static int shell(const char *script) { return finish(start_shell(script)); }

/* Reads one line, so that the program is known to have come so far. */
static bool said(orch_process *p, const char *line) {
    char got[100] = "";
    size_t size = 0;
    while (size < sizeof got - 1 && strchr(got, '\n') == NULL) {
        ptrdiff_t n = orch_read(orch_process_out(p), got + size, 1);
        if (n <= 0) break;
        size += (size_t)n;
    }
    got[strcspn(got, "\n")] = '\0';
    return strcmp(got, line) == 0 || !CHECK_STR(got, line);
}

/* What a command printed. */
static const char *output_of(const orch_command_desc *desc) {
    static char text[4096];
    orch_result r = orch_await(orch_command_with(desc));
    orch_output *o = r.value;
    snprintf(text, sizeof text, "%s", r.error == 0 ? o->out : orch_message(&r));
    orch_result_free(&r);
    return text;
}

static const char *output(const char *script) {
    orch_command_desc desc = {.process = SHELL(script)};
    return output_of(&desc);
}

/* Whether a process is gone, or dead and somebody else's to wait for. */
static bool is_gone(int pid) {
    char path[64], state = 'Z';
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    if (file == NULL) return true;
    if (fscanf(file, "%*d (%*[^)]) %c", &state) != 1) state = 'Z';
    fclose(file);
    return state == 'Z' || state == 'X';
}

static char folder[40];

/* A file in a folder that remove_folder takes away. */
static char *file_in_folder(const char *name, const char *text, mode_t mode) {
    static char path[200];
    if (folder[0] == '\0') {
        strcpy(folder, "/tmp/test_process.XXXXXX");
        if (mkdtemp(folder) == NULL) abort();
    }
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "w");
    if (file == NULL) abort();
    fputs(text, file);
    fclose(file);
    chmod(path, mode);
    return path;
}

static void remove_folder(void) {
    char command[200];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    if (system(command) != 0) abort();
    folder[0] = '\0';
}

// ---- how it ends

RUN(exit_codes) {
    CHECK_INT(finish(orch_process_start(&(orch_process_desc){.file = "true"})), 0);
    CHECK_INT(finish(orch_process_start(&(orch_process_desc){.file = "false"})), 1);
    CHECK_INT(shell("exit 7"), 7);
    CHECK_INT(shell("exit 255"), 255);
    return done();
}

RUN(ended_by_signal) {
    orch_process *p = start_shell("kill -KILL $$");
    orch_result r = orch_await(orch_process_wait(p));
    CHECK_INT(r.error, 128 + SIGKILL);
    CHECK_STR(orch_message(&r), "'/bin/sh' was ended by signal 9");
    orch_result_free(&r);
    orch_process_free(p);
    return done();
}

RUN(wait_again) {
    orch_process *p = start_shell("exit 3");
    for (int i = 0; i < 3; i++) {
        orch_result r = orch_await(orch_process_wait(p));
        CHECK_INT(orch_int(&r), 3);
        orch_result_free(&r);
    }
    CHECK_INT(orch_process_error(p), 0);
    CHECK(orch_process_pid(p) > 0);
    CHECK_INT(orch_process_kill(p, SIGTERM), -ESRCH);
    orch_process_free(p);
    return done();
}

RUN(waits_together) {
    orch_process *p = start_shell("exit 4");
    orch_future *both[2] = {orch_process_wait(p), orch_process_wait(p)};
    orch_result r = orch_await(orch_all_n(2, both));
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_int(orch_at(&r, 0)), 4);
    CHECK_INT(orch_int(orch_at(&r, 1)), 4);
    orch_result_free(&r);
    orch_process_free(p);
    return done();
}

RUN(many_at_once) {
    enum { MANY = 20 };
    orch_process *p[MANY];
    for (int i = 0; i < MANY; i++) p[i] = start_shell(i % 2 ? "exit 1" : "exit 2");
    for (int i = 0; i < MANY; i++) CHECK_INT(finish(p[i]), i % 2 ? 1 : 2);
    return done();
}

RUN(free_after_end) {
    orch_process *p = start_shell("exit 0");
    orch_sleep(20);
    orch_process_free(p);
    return done();
}

// ---- starting

static void check_start(const char *file, int error, const char *message) {
    orch_process *p = orch_process_start(&(orch_process_desc){.file = file});
    if (test_shared->refused) error = orch_process_error(p);
    CHECK_INT(orch_process_error(p), error);
    CHECK_INT(orch_process_pid(p), error);
    CHECK_INT(orch_process_kill(p, SIGTERM), error);
    CHECK_INT(orch_process_in(p), error);
    orch_process_close_in(p);
    orch_result r = orch_await(orch_process_wait(p));
    CHECK_INT(r.error, error);
    if (message != NULL) CHECK_STR(orch_message(&r), message);
    orch_result_free(&r);
    orch_process_free(p);
}

RUN(start_unknown) {
    check_start("no-such-program", -ENOENT,
                "'no-such-program' cannot be started: No such file or directory");
    check_start("/no/such/program", -ENOENT, NULL);
    check_start("", -ENOENT, NULL);
    check_start("/etc/passwd/program", -ENOENT, NULL);
    return done();
}

RUN(start_without_permission) {
    check_start(file_in_folder("data", "#!/bin/sh\nexit 0\n", 0644), -EACCES, NULL);
    check_start("/tmp", -EACCES, NULL);
    check_start(file_in_folder("noise", "\x7f no program", 0755), -ENOEXEC, NULL);
    remove_folder();
    return done();
}

RUN(start_too_much) {
    enum { MANY = 1 << 17 };
    static char *argv[MANY + 1], text[100];
    memset(text, 'x', sizeof text - 1);
    for (int i = 0; i < MANY; i++) argv[i] = text;
    orch_process *p = orch_process_start(&(orch_process_desc){.file = "/bin/true", .argv = argv});
    CHECK_INT(orch_process_error(p), -E2BIG);
    orch_process_free(p);
    return done();
}

RUN(start_searches_path) {
    char path[300], both[400];
    snprintf(path, sizeof path, "%s", getenv("PATH"));
    file_in_folder("found", "#!/bin/sh\nexit 5\n", 0755);
    file_in_folder("denied", "#!/bin/sh\nexit 6\n", 0644);
    snprintf(both, sizeof both, "/no/such:/etc/passwd:%s:/bin:/usr/bin", folder);
    setenv("PATH", both, 1);
    CHECK_INT(finish(orch_process_start(&(orch_process_desc){.file = "found"})), 5);
    check_start("denied", -EACCES, NULL);
    file_in_folder("true", "not this one", 0644); // but that of /bin
    CHECK_INT(finish(orch_process_start(&(orch_process_desc){.file = "true"})), 0);
    setenv("PATH", "", 1); // the current directory
    if (chdir(folder) == 0)
        CHECK_INT(finish(orch_process_start(&(orch_process_desc){.file = "found"})), 5);
    unsetenv("PATH");
    CHECK_INT(finish(orch_process_start(&(orch_process_desc){.file = "true"})), 0);
    setenv("PATH", path, 1);
    remove_folder();
    return done();
}

RUN(start_file_and_argv) {
    orch_command_desc desc = {.process = {.file = "/bin/sh",
                                          .argv = (char *[]){"name", "-c", "echo $0", NULL}}};
    CHECK_STR(output_of(&desc), "name\n");
    return done();
}

RUN(start_env) {
    setenv("ORCH_PARENT", "yes", 1);
    CHECK_STR(output("echo $ORCH_PARENT"), "yes\n");
    orch_command_desc desc = {.process = SHELL("echo $ORCH_PARENT$ORCH_CHILD")};
    desc.process.env = (char *[]){"ORCH_CHILD=one", NULL};
    CHECK_STR(output_of(&desc), "one\n");
    return done();
}

RUN(start_directory) {
    orch_command_desc desc = {.process = SHELL("pwd")};
    desc.process.directory = "/usr";
    CHECK_STR(output_of(&desc), "/usr\n");
    desc.process.directory = "/no/such";
    CHECK_STR(output_of(&desc),
              "'/bin/sh' cannot be started in its directory: No such file or directory");
    return done();
}

RUN(start_without_descriptors) {
    struct rlimit limit, none;
    getrlimit(RLIMIT_NOFILE, &limit);
    int fds[1000], count = 0;
    none = limit;
    none.rlim_cur = 64;
    setrlimit(RLIMIT_NOFILE, &none);
    while ((fds[count] = dup(2)) >= 0) count++;
    orch_process_desc desc = SHELL("exit 1");
    for (int left = 0; left < 9; left++) { // each call on the way has none once
        desc.in = desc.out = desc.err = ORCH_STDIO_PIPE;
        orch_process *p = orch_process_start(&desc);
        int error = orch_process_error(p);
        CHECK(error == -EMFILE || error == 0 || test_shared->refused);
        int code = finish(p);
        if (left < 8) CHECK(code == -EMFILE || code == 1 || test_shared->refused);
        close(fds[--count]);
    }
    while (count > 0) close(fds[--count]);
    setrlimit(RLIMIT_NOFILE, &limit);
    CHECK_INT(shell("exit 1"), 1);
    return done();
}

// ---- streams

RUN(stdio_pipes) {
    orch_process_desc desc = SHELL("read line; echo \"out $line\"; echo \"err $line\" >&2");
    desc.in = desc.out = desc.err = ORCH_STDIO_PIPE;
    orch_process *p = orch_process_start(&desc);
    int fds[3] = {orch_process_in(p), orch_process_out(p), orch_process_err(p)};
    for (int i = 0; i < 3 && orch_process_error(p) == 0; i++) {
        CHECK(fcntl(fds[i], F_GETFD) & FD_CLOEXEC);
        CHECK(fcntl(fds[i], F_GETFL) & O_NONBLOCK);
    }
    char text[40] = "";
    CHECK_INT(orch_write(fds[0], "x\n", 2), 2);
    CHECK_INT(orch_read(fds[1], text, sizeof text - 1), 6);
    CHECK_STR(text, "out x\n");
    CHECK_INT(orch_read(fds[2], text, sizeof text - 1), 6);
    CHECK_STR(text, "err x\n");
    CHECK_INT(orch_read(fds[1], text, sizeof text), 0);
    orch_process_close_in(p);
    orch_process_close_in(p);
    CHECK_INT(finish(p), 0);
    return done();
}

RUN(stdio_no_pipe) {
    orch_process *p = start_shell("exit 0");
    if (orch_process_error(p) == 0) {
        CHECK_INT(orch_process_in(p), -EBADF);
        CHECK_INT(orch_process_out(p), -EBADF);
        CHECK_INT(orch_process_err(p), -EBADF);
    }
    CHECK_INT(finish(p), 0);
    return done();
}

RUN(stdio_null) {
    orch_process_desc desc = SHELL("cat; echo lost; echo lost >&2; ls -l /proc/self/fd/0 | grep -q null");
    desc.in = desc.out = desc.err = ORCH_STDIO_NULL;
    CHECK_INT(finish(orch_process_start(&desc)), 0);
    return done();
}

static const char *read_file(const char *path) {
    static char text[200];
    FILE *file = fopen(path, "r");
    size_t size = file != NULL ? fread(text, 1, sizeof text - 1, file) : 0;
    if (file != NULL) fclose(file);
    text[size] = '\0';
    return text;
}

RUN(stdio_descriptors) {
    char *path = file_in_folder("both", "first\n", 0600);
    int in = open(path, O_RDONLY | O_CLOEXEC), out = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
    orch_process_desc desc = SHELL("read line; echo \"out $line\"; echo \"err $line\" >&2");
    desc.in = in;
    desc.out = desc.err = out;
    CHECK_INT(finish(orch_process_start(&desc)), 0);
    CHECK_STR(read_file(path), "first\nout first\nerr first\n");
    close(in);
    close(out);
    desc.out = 999;
    orch_process *p = orch_process_start(&desc);
    CHECK_INT(orch_process_error(p), -EBADF);
    orch_process_free(p);
    remove_folder();
    return done();
}

RUN(stdio_err_to_out) {
    orch_command_desc desc = {.process = SHELL("echo a; echo b >&2; echo c")};
    desc.process.err = ORCH_STDIO_OUT;
    CHECK_STR(output_of(&desc), "a\nb\nc\n");
    desc.process.out = ORCH_STDIO_NULL;
    CHECK_STR(output_of(&desc), "");
    return done();
}

RUN(stdio_swapped) {
    char one[200], two[200];
    snprintf(one, sizeof one, "%s", file_in_folder("one", "", 0600));
    snprintf(two, sizeof two, "%s", file_in_folder("two", "", 0600));
    int kept[3] = {0, dup(1), dup(2)}, fds[2] = {open(one, O_WRONLY), open(two, O_WRONLY)};
    fflush(NULL);
    dup2(fds[0], 1);
    dup2(fds[1], 2);
    orch_process_desc desc = SHELL("echo out; echo err >&2");
    desc.out = 2;
    desc.err = 1;
    int code = finish(orch_process_start(&desc));
    for (int i = 1; i < 3; i++) dup2(kept[i], i), close(kept[i]), close(fds[i - 1]);
    CHECK_INT(code, 0);
    CHECK_STR(read_file(one), "err\n");
    CHECK_STR(read_file(two), "out\n");
    remove_folder();
    return done();
}

RUN(stdio_closed) {
    int kept[3];
    fflush(NULL);
    for (int i = 0; i < 3; i++) kept[i] = fcntl(i, F_DUPFD_CLOEXEC, 100);
    for (int i = 0; i < 3; i++) close(i);
    orch_process_desc desc = SHELL("read line; echo \"out $line\"; echo \"err $line\" >&2");
    desc.in = desc.out = desc.err = ORCH_STDIO_PIPE; // get numbers from 0 on
    orch_process *p = orch_process_start(&desc);
    char out[40] = "", err[40] = "";
    orch_write(orch_process_in(p), "x\n", 2);
    orch_read(orch_process_out(p), out, sizeof out - 1);
    orch_read(orch_process_err(p), err, sizeof err - 1);
    int code = finish(p);
    int null = finish(orch_process_start(&(orch_process_desc){
        .file = "true", .in = ORCH_STDIO_NULL, .out = ORCH_STDIO_NULL, .err = ORCH_STDIO_OUT}));
    for (int i = 0; i < 3; i++) dup2(kept[i], i), close(kept[i]);
    CHECK_INT(code, 0);
    CHECK_INT(null, 0);
    CHECK_STR(out, "out x\n");
    CHECK_STR(err, "err x\n");
    return done();
}

typedef struct transfer {
    int fd;
    char *data;
    size_t size, moved;
    orch_process *process; // whose input is to be closed
} transfer;

static orch_result send_all(void *arg) {
    transfer *t = arg;
    ptrdiff_t n = orch_write(t->fd, t->data, t->size);
    t->moved = n > 0 ? (size_t)n : 0;
    orch_process_close_in(t->process);
    return done();
}

static orch_result receive_all(void *arg) {
    transfer *t = arg;
    for (ptrdiff_t n = 1; n > 0 && t->moved < t->size; t->moved += n > 0 ? (size_t)n : 0) {
        n = orch_read(t->fd, t->data + t->moved, t->size - t->moved);
    }
    return done();
}

enum { BIG = 1 << 20 };

static char *big(void) {
    char *data = malloc(BIG);
    for (size_t i = 0; data != NULL && i < BIG; i++) data[i] = (char)(i * 7 + i / 1000);
    return data;
}

RUN(pipes_both_ways) {
    char *sent = big(), *got = malloc(BIG);
    orch_process *p = orch_process_start(
        &(orch_process_desc){.file = "cat", .in = ORCH_STDIO_PIPE, .out = ORCH_STDIO_PIPE});
    transfer to = {orch_process_in(p), sent, BIG, 0, p}, from = {orch_process_out(p), got, BIG, 0, p};
    if (sent != NULL && got != NULL && orch_process_error(p) == 0) {
        orch_future *sending = orch_go(send_all, &to), *receiving = orch_go(receive_all, &from);
        orch_result r = orch_await(orch_all(sending, receiving));
        CHECK_INT(r.error, 0);
        orch_result_free(&r);
        CHECK_INT(from.moved, BIG);
        CHECK(memcmp(sent, got, BIG) == 0);
        CHECK_INT(finish(p), 0);
    } else {
        orch_process_free(p);
    }
    free(sent);
    free(got);
    return done();
}

// ---- what it inherits

RUN(inherits_nothing) {
    int fds[2];
    for (int fd = 3; fd < 1000; fd++) (void)fcntl(fd, F_SETFD, FD_CLOEXEC); // of whoever runs this
    CHECK_INT(orch_pipe(fds), 0);
    CHECK_STR(output("cd /proc/$$/fd && echo *"), "0 1 2 3\n"); // 3 is how it looks
    close(fds[0]);
    close(fds[1]);
    return done();
}

static void nothing(int number) { (void)number; }

RUN(inherits_signals) {
    sigset_t some, before;
    sigemptyset(&some);
    sigaddset(&some, SIGUSR1);
    sigaddset(&some, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &some, &before);
    signal(SIGINT, nothing);
    signal(SIGHUP, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    CHECK_STR(output("sed -n 's/^Sig\\(Blk\\|Ign\\|Cgt\\):.*\\(........\\)$/\\1 \\2/p' /proc/self/status"),
              "Blk 00000000\nIgn 00000001\nCgt 00000000\n");
    sigset_t now;
    pthread_sigmask(SIG_SETMASK, &before, &now);
    CHECK(sigismember(&now, SIGUSR1) && !sigismember(&now, SIGUSR2)); // as it was
    signal(SIGPIPE, SIG_DFL);
    signal(SIGHUP, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    return done();
}

// ---- cancelling

static orch_process *start_sleeper(void) {
    return orch_process_start(
        &(orch_process_desc){.argv = (char *[]){"sleep", test_shared->fail_at ? "0.1" : "100", NULL},
                             .grace_ms = 1000});
}

RUN(cancel_ends_it) {
    orch_process *p = start_sleeper();
    int pid = orch_process_pid(p);
    uint64_t began = orch_now();
    orch_result r = orch_await(orch_timeout(orch_process_wait(p), 20));
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    orch_result_free(&r);
    if (pid > 0) CHECK(kill(pid, 0) < 0 && errno == ESRCH); // it has ended, and was reaped
    CHECK(orch_now() - began < 1000);
    CHECK_INT(finish(p), 128 + SIGTERM);
    return done();
}

RUN(cancel_says_so) {
    orch_process *p = start_sleeper();
    orch_future *wait = orch_process_wait(p);
    orch_cancel(wait, 0);
    orch_result r = orch_await(wait);
    CHECK_INT(r.error, ORCH_ECANCELED);
    orch_result_free(&r);
    orch_process_free(p);
    return done();
}

RUN(cancel_too_late) {
    orch_process *p = start_shell("exit 6");
    orch_future *wait = orch_process_wait(p);
    struct timespec moment = {0, 30000000};
    nanosleep(&moment, NULL); // it has ended, and the loop does not know yet
    orch_cancel(wait, 0);
    orch_result r = orch_await(wait);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_int(&r), 6);
    orch_result_free(&r);
    orch_process_free(p);
    return done();
}

RUN(cancel_one_of_two) {
    orch_process_desc desc = SHELL("read line; exit 2");
    desc.in = ORCH_STDIO_PIPE;
    orch_process *p = orch_process_start(&desc);
    orch_future *first = orch_process_wait(p), *second = orch_process_wait(p);
    orch_future *third = orch_process_wait(p);
    orch_drop(second);
    orch_cancel(first, 0);
    orch_result r = orch_await(first);
    CHECK_INT(r.error, ORCH_ECANCELED);
    orch_write(orch_process_in(p), "\n", 1);
    r = orch_await(third);
    CHECK_INT(orch_int(&r), 2);
    orch_result_free(&r);
    orch_process_free(p);
    return done();
}

RUN(cancel_both) {
    orch_process *p = start_sleeper();
    orch_future *both[2] = {orch_process_wait(p), orch_process_wait(p)};
    orch_result r = orch_await(orch_timeout(orch_all_n(2, both), 10));
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    orch_result_free(&r);
    CHECK_INT(finish(p), 128 + SIGTERM);
    return done();
}

RUN(cancel_escalates) {
    orch_process_desc desc = SHELL("trap '' TERM; echo deaf; while :; do sleep 1; done");
    desc.out = ORCH_STDIO_PIPE;
    desc.grace_ms = 40;
    desc.new_group = true; // the sleep as well
    orch_process *p = orch_process_start(&desc);
    if (said(p, "deaf")) {
        uint64_t began = orch_now();
        orch_result r = orch_await(orch_timeout(orch_process_wait(p), 1));
        CHECK_INT(r.error, ORCH_ETIMEDOUT);
        orch_result_free(&r);
        CHECK(orch_now() - began >= 40);
        CHECK(orch_now() - began < 1500);
        CHECK_INT(finish(p), 128 + SIGKILL);
    } else {
        orch_process_free(p);
    }
    return done();
}

RUN(cancel_in_grace) {
    orch_process_desc desc = SHELL("trap 'exit 3' TERM; echo ready; while :; do sleep 0.01; done");
    desc.out = ORCH_STDIO_PIPE;
    orch_process *p = orch_process_start(&desc);
    said(p, "ready");
    orch_future *wait = orch_process_wait(p);
    orch_cancel(wait, 0);
    orch_result r = orch_await(wait);
    CHECK_INT(r.error, ORCH_ECANCELED);
    orch_result_free(&r);
    CHECK_INT(finish(p), 3);
    return done();
}

RUN(cancel_by_other_signal) {
    orch_process_desc desc = {.argv = (char *[]){"sleep", "100", NULL}, .kill_signal = SIGKILL};
    orch_process *p = orch_process_start(&desc);
    orch_drop(orch_process_wait(p));
    CHECK_INT(finish(p), 128 + SIGKILL);
    desc.kill_signal = SIGINT;
    p = orch_process_start(&desc);
    orch_drop(orch_process_wait(p));
    CHECK_INT(finish(p), 128 + SIGINT);
    return done();
}

RUN(cancel_stopped) {
    orch_process *p = start_sleeper();
    if (orch_process_error(p) == 0) CHECK_INT(orch_process_kill(p, SIGSTOP), 0);
    orch_drop(orch_process_wait(p));
    CHECK_INT(finish(p), 128 + SIGTERM);
    return done();
}

RUN(cancel_group) {
    orch_process_desc desc = SHELL("sleep 100 & echo $!; wait");
    desc.out = ORCH_STDIO_PIPE;
    desc.new_group = true;
    orch_process *p = orch_process_start(&desc);
    char text[40] = "";
    ptrdiff_t n = orch_read(orch_process_out(p), text, sizeof text - 1);
    int grandchild = n > 0 ? atoi(text) : 0;
    if (orch_process_error(p) == 0) CHECK_INT(getpgid(orch_process_pid(p)), orch_process_pid(p));
    orch_drop(orch_process_wait(p));
    for (int i = 0; i < 100 && !is_gone(grandchild); i++) orch_sleep(5);
    CHECK(grandchild == 0 || is_gone(grandchild));
    orch_process_free(p);
    return done();
}

static orch_result wait_for_it(void *arg) {
    orch_result r = orch_await(orch_process_wait(arg));
    orch_process_free(arg);
    return r;
}

RUN(cancel_by_end_of_main) { // somebody else's process is left: it ends with the loop
    orch_process *p = start_sleeper();
    if (orch_spawn(wait_for_it, p) != 0) orch_process_free(p);
    return done();
}

static orch_result start_and_wait(void *arg) {
    (void)arg;
    return orch_ok_int(finish(start_sleeper()));
}

RUN(cancel_by_scope) {
    orch_scope scope;
    orch_scope_open(&scope, &(orch_scope_desc){.timeout_ms = 20});
    orch_scope_go(&scope, start_and_wait, NULL);
    int code = finish(start_sleeper());
    CHECK(code == ORCH_ECANCELED || code == ORCH_ENOMEM);
    orch_result r = orch_scope_close(&scope);
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    orch_result_free(&r);
    return done();
}

RUN(deadline_without_a_wait) {
    orch_scope scope;
    orch_scope_open(&scope, &(orch_scope_desc){.timeout_ms = 10});
    orch_process *p = start_sleeper();
    orch_result closed = orch_scope_close(&scope); // at once: nothing is in it
    orch_result_free(&closed);
    CHECK_INT(finish(p), ORCH_ECANCELED); // it has the deadline all the same
    return done();
}

// ---- freeing

RUN(free_running) {
    orch_process *p = start_sleeper();
    int pid = orch_process_pid(p);
    orch_process_free(p);
    if (pid > 0) CHECK(kill(pid, 0) < 0 && errno == ESRCH);
    orch_process_free(NULL);
    return done();
}

RUN(free_while_waited_for) {
    orch_process *p = start_sleeper();
    orch_future *wait = orch_process_wait(p), *other = orch_process_wait(p);
    int error = orch_process_error(p);
    orch_process_free(p);
    orch_result r = orch_await(wait);
    CHECK(r.error == ORCH_ECLOSED || error != 0);
    orch_result_free(&r);
    orch_drop(other);
    return done();
}

static orch_result free_it(void *arg) {
    orch_process_free(arg);
    return done();
}

RUN(free_in_cancelled_task) {
    orch_process *p = start_sleeper();
    int pid = orch_process_pid(p);
    orch_future *freeing = orch_go(free_it, p);
    orch_cancel(freeing, 0);
    orch_result r = orch_await(freeing);
    if (r.error == ORCH_ENOMEM) orch_process_free(p);
    orch_result_free(&r);
    if (pid > 0) CHECK(kill(pid, 0) < 0 && errno == ESRCH);
    return done();
}

TEST(free_outside_a_task) {
    descriptors = count_descriptors();
    orch_loop *loop = orch_loop_new(&settings);
    if (loop == NULL) return;
    orch_process *p = start_sleeper();
    int pid = orch_process_pid(p);
    if (pid > 0) CHECK_INT(orch_loop_free(loop), ORCH_EBUSY); // it was asked to end
    orch_process_free(p);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(orch_loop_free(loop), 0);
    balance();
}

TEST(callbacks) {
    descriptors = count_descriptors();
    orch_loop *loop = orch_loop_new(&settings);
    if (loop == NULL) return;
    orch_process *p = start_shell("exit 9");
    orch_future *wait = orch_process_wait(p);
    CHECK_INT(orch_loop_run(loop), 0);
    const orch_result *r = orch_peek(wait);
    if (r != NULL) CHECK_INT(orch_int(r), 9);
    orch_drop(wait);
    orch_process_free(p);
    CHECK_INT(orch_loop_free(loop), 0);
    balance();
}

// ---- other code's children and handlers

static volatile int chld;
static void on_chld(int number) {
    (void)number;
    chld++;
}

static orch_result others(void *arg) {
    (void)arg;
    pid_t mine = fork();
    if (mine == 0) _exit(33);
    int status = 0, code = shell("exit 2");
    CHECK(code == 2 || code == ORCH_ENOMEM);
    CHECK_INT(waitpid(mine, &status, 0), mine); // nobody has taken it
    CHECK_INT(WEXITSTATUS(status), 33);
    return done();
}

TEST(others_handler) {
    signal(SIGCHLD, on_chld);
    run(others);
    CHECK(chld >= 1);
    struct sigaction now;
    sigaction(SIGCHLD, NULL, &now);
    CHECK(now.sa_handler == on_chld);
}

static orch_result start_and_end(void *arg) {
    (void)arg;
    return orch_ok_int(shell("sleep 0.02; exit 2"));
}

TEST(others_ignore_children) {
    signal(SIGCHLD, SIG_IGN);
    descriptors = count_descriptors();
    orch_result r = orch_run_with(&settings, start_and_end, NULL);
    CHECK_INT(orch_int(&r), -ECHILD);
    orch_result_free(&r);
    balance();
}

RUN(others_took_it) {
    orch_process *p = start_shell("sleep 0.02; exit 2");
    int pid = orch_process_pid(p);
    if (pid > 0) waitpid(pid, NULL, 0);
    orch_result r = orch_await(orch_process_wait(p));
    CHECK_INT(r.error, -ECHILD);
    CHECK_STR(orch_message(&r), "'/bin/sh' was waited for by somebody else");
    orch_result_free(&r);
    orch_process_free(p);
    return done();
}

// ---- without pidfd

/* As on an older kernel. False where this cannot be done. */
static bool without_pidfd(void) {
#ifdef SECCOMP_RET_ERRNO
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 434, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {sizeof code / sizeof code[0], code};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
#else
    return false;
#endif
}

#define RUN_WITHOUT_PIDFD(id)                                                                      \
    TEST(without_pidfd_##id) {                                                                     \
        if (without_pidfd()) run(body_##id);                                                       \
    }
RUN_WITHOUT_PIDFD(exit_codes)
RUN_WITHOUT_PIDFD(many_at_once)
RUN_WITHOUT_PIDFD(cancel_ends_it)
RUN_WITHOUT_PIDFD(cancel_escalates)
RUN_WITHOUT_PIDFD(cancel_by_end_of_main)
RUN_WITHOUT_PIDFD(free_running)
RUN_WITHOUT_PIDFD(free_while_waited_for)
RUN_WITHOUT_PIDFD(others_took_it)
RUN_WITHOUT_PIDFD(start_without_descriptors)

TEST(without_pidfd_handler) { // of other code: called, and there afterwards
    if (!without_pidfd()) return;
    signal(SIGCHLD, on_chld);
    run(others);
    CHECK(chld >= 1);
    struct sigaction now;
    sigaction(SIGCHLD, NULL, &now);
    CHECK(now.sa_handler == on_chld);
}

TEST(without_pidfd_ignored) {
    if (!without_pidfd()) return;
    signal(SIGCHLD, SIG_IGN);
    run(body_free_running);
    struct sigaction now;
    sigaction(SIGCHLD, NULL, &now);
    CHECK(now.sa_handler == SIG_IGN);
}

static orch_result replaced(void *arg) {
    (void)arg;
    orch_process_desc desc = SHELL("read line; exit 2");
    desc.in = ORCH_STDIO_PIPE;
    orch_process *p = orch_process_start(&desc);
    orch_future *wait = orch_process_wait(p);
    orch_sleep(5);
    signal(SIGCHLD, on_chld); // calls nobody else
    orch_process_close_in(p);
    orch_result r = orch_await(wait);
    CHECK_INT(orch_int(&r), 2);
    orch_result_free(&r);
    orch_process_free(p);
    return done();
}

TEST(without_pidfd_replaced) { // somebody installs a handler above: noticed a little later
    if (without_pidfd()) run(replaced);
}

// ---- commands

RUN(command_output) {
    orch_result r = orch_await(orch_command((char *[]){"echo", "hello", NULL}));
    CHECK_INT(r.error, 0);
    orch_output *o = r.value;
    if (r.error == 0) {
        CHECK_INT(o->status, 0);
        CHECK_STR(o->out, "hello\n");
        CHECK_INT(o->out_size, 6);
        CHECK_INT(o->err_size, 0);
        CHECK_STR(o->err, "");
    }
    orch_result_free(&r);
    return done();
}

RUN(command_status) {
    orch_command_desc desc = {.process = SHELL("echo text; echo wrong >&2; exit 3")};
    desc.process.err = ORCH_STDIO_PIPE;
    orch_result r = orch_await(orch_command_with(&desc));
    orch_output *o = r.value;
    CHECK_INT(r.error, 0);
    if (r.error == 0) {
        CHECK_INT(o->status, 3);
        CHECK_STR(o->out, "text\n");
        CHECK_STR(o->err, "wrong\n");
    }
    orch_result_free(&r);
    desc.check = true;
    r = orch_await(orch_command_with(&desc));
    CHECK_INT(r.error, 3);
    CHECK_STR(orch_message(&r), "'/bin/sh' ended with exit code 3");
    orch_result_free(&r);
    return done();
}

RUN(command_fails) {
    orch_result r = orch_await(orch_command((char *[]){"no-such-program", NULL}));
    CHECK_INT(r.error, -ENOENT);
    CHECK_STR(orch_message(&r), "'no-such-program' cannot be started: No such file or directory");
    orch_result_free(&r);
    orch_command_desc desc = {.process = SHELL("kill -SEGV $$")};
    r = orch_await(orch_command_with(&desc));
    CHECK_INT(r.error, 128 + SIGSEGV);
    CHECK_STR(orch_message(&r), "'/bin/sh' was ended by signal 11");
    orch_result_free(&r);
    return done();
}

RUN(command_both_ways) {
    char *sent = big();
    orch_command_desc desc = {.process = {.file = "cat"}, .input = sent, .input_size = BIG};
    if (sent == NULL) return done();
    orch_result r = orch_await(orch_command_with(&desc));
    orch_output *o = r.value;
    CHECK_INT(r.error, 0);
    if (r.error == 0 && CHECK_INT(o->out_size, BIG)) CHECK(memcmp(sent, o->out, BIG) == 0);
    orch_result_free(&r);
    free(sent);
    return done();
}

RUN(command_reads_no_input) {
    char *sent = big();
    orch_command_desc desc = {
        .process = SHELL("exec 0<&-; echo none"), .input = sent, .input_size = BIG};
    if (sent != NULL) CHECK_STR(output_of(&desc), "none\n");
    free(sent);
    desc.input = "";
    desc.input_size = 0;
    desc.process = SHELL("cat; echo empty");
    CHECK_STR(output_of(&desc), "empty\n");
    return done();
}

RUN(command_default_input) {
    CHECK_STR(output("readlink /proc/self/fd/0"), "/dev/null\n");
    return done();
}

RUN(command_limit) {
    orch_command_desc desc = {.process = {.file = "yes"}, .limit = 10000};
    orch_result r = orch_await(orch_command_with(&desc));
    CHECK_INT(r.error, ORCH_ELIMIT);
    CHECK_STR(orch_message(&r), "'yes' wrote more than 10000 bytes");
    orch_result_free(&r);
    desc.process = SHELL("yes >&2");
    desc.process.err = ORCH_STDIO_PIPE;
    desc.process.new_group = true;
    r = orch_await(orch_command_with(&desc));
    CHECK_INT(r.error, ORCH_ELIMIT);
    orch_result_free(&r);
    desc = (orch_command_desc){.process = SHELL("printf 12345"), .limit = 5}; // not more
    CHECK_STR(output_of(&desc), "12345");
    desc.limit = 4;
    CHECK_STR(output_of(&desc), "'/bin/sh' wrote more than 4 bytes");
    return done();
}

RUN(command_timeout) {
    uint64_t began = orch_now();
    orch_result r = orch_await(orch_timeout(orch_command((char *[]){"sleep", "100", NULL}), 20));
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    orch_result_free(&r);
    CHECK(orch_now() - began < 1000);
    return done();
}

RUN(command_race) {
    orch_command_desc desc = {.process = SHELL("sleep 0.03; echo fast")};
    orch_future *slow = orch_command((char *[]){"sleep", "100", NULL});
    orch_result r = orch_await(orch_race(slow, orch_command_with(&desc)));
    CHECK_INT(r.index, 1);
    if (r.error == 0) CHECK_STR(((orch_output *)r.value)->out, "fast\n");
    orch_result_free(&r);
    return done();
}

static orch_result command_of_main(void *arg) {
    (void)arg;
    return orch_await(orch_command((char *[]){"echo", "kept", NULL}));
}

TEST(command_outlives_loop) {
    orch_result r = orch_run(command_of_main, NULL);
    if (r.error == 0) CHECK_STR(((orch_output *)r.value)->out, "kept\n");
    orch_result_free(&r);
}

RUN(command_left_open) { // its output ends when the last who writes has ended
    CHECK_STR(output("(sleep 0.03; echo late) & echo early"), "early\nlate\n");
    return done();
}

RUN(command_detached) { // and cancelled by the end of main
    orch_detach(orch_command((char *[]){"sleep", "100", NULL}));
    return done();
}

// ---- signals

static struct sigaction action_of(int number) {
    struct sigaction now;
    sigaction(number, NULL, &now);
    return now;
}

/* Sends a signal, unless nobody could be made to wait for it. */
static void send_signal(int number) {
    void (*handler)(int) = action_of(number).sa_handler;
    if (handler != SIG_DFL) raise(number);
}

/* Awaits; the number of the signal, or the error. */
static int next_of(orch_signals *s) {
    orch_result r = orch_await(orch_signals_next(s));
    return r.error != 0 ? r.error : (int)orch_int(&r);
}

static orch_result raise_later(void *arg) {
    orch_sleep(2);
    send_signal((int)(intptr_t)arg);
    return done();
}

RUN(signal_next) {
    orch_future *f = orch_signal(SIGUSR1);
    send_signal(SIGUSR1);
    CHECK(!orch_is_settled(f)); // only the loop settles it
    orch_result r = orch_await(f);
    CHECK_INT(orch_int(&r), SIGUSR1);
    return done();
}

RUN(signal_puts_back) {
    struct sigaction mine = {.sa_handler = nothing}, now;
    CHECK(action_of(SIGUSR1).sa_handler == SIG_DFL);
    orch_future *first = orch_signal(SIGUSR1), *second = orch_signal(SIGUSR1);
    orch_drop(first);
    if (!orch_is_settled(second)) CHECK(action_of(SIGUSR1).sa_handler != SIG_DFL);
    orch_drop(second);
    CHECK(action_of(SIGUSR1).sa_handler == SIG_DFL);
    sigaction(SIGUSR1, &mine, NULL);
    orch_drop(orch_signal(SIGUSR1));
    now = action_of(SIGUSR1);
    CHECK(now.sa_handler == nothing && !(now.sa_flags & SA_SIGINFO));
    signal(SIGUSR1, SIG_IGN);
    orch_drop(orch_signal(SIGUSR1));
    CHECK(action_of(SIGUSR1).sa_handler == SIG_IGN);
    signal(SIGUSR1, SIG_DFL);
    return done();
}

static volatile int plain, informed;
static void on_plain(int number) { plain += number; }
static void on_informed(int number, siginfo_t *info, void *context) {
    informed += info->si_signo == number && context != NULL;
}

RUN(signal_chains) {
    signal(SIGUSR1, on_plain);
    struct sigaction mine = {.sa_sigaction = on_informed, .sa_flags = SA_SIGINFO};
    sigaction(SIGUSR2, &mine, NULL);
    orch_future *one = orch_signal(SIGUSR1), *two = orch_signal(SIGUSR2);
    send_signal(SIGUSR1);
    send_signal(SIGUSR2);
    CHECK_INT(plain, SIGUSR1);
    CHECK_INT(informed, 1);
    orch_result r = orch_await(orch_all(one, two));
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    signal(SIGUSR1, SIG_DFL);
    signal(SIGUSR2, SIG_DFL);
    return done();
}

RUN(signal_buried) { // somebody installs a handler above and leaves it there
    signal(SIGUSR1, SIG_IGN);
    orch_future *f = orch_signal(SIGUSR1);
    struct sigaction above = {.sa_handler = on_plain}, below;
    sigaction(SIGUSR1, &above, &below);
    orch_drop(f);
    CHECK(action_of(SIGUSR1).sa_handler == on_plain);
    f = orch_signal(SIGUSR1);
    send_signal(SIGUSR1);
    orch_result r = orch_await(f);
    CHECK_INT(orch_int(&r), SIGUSR1);
    CHECK(action_of(SIGUSR1).sa_handler == on_plain);
    if (below.sa_flags & SA_SIGINFO) below.sa_sigaction(SIGUSR1, NULL, NULL); // it may still call
    signal(SIGUSR1, SIG_DFL);
    return done();
}

RUN(signal_not_waitable) {
    static const int numbers[] = {0, -1, 65, 1000, SIGKILL, SIGSTOP, SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        orch_result r = orch_await(orch_signal(numbers[i]));
        CHECK_INT(r.error, ORCH_EINVAL);
    }
    orch_signals *s = orch_signals_new(2, (int[]){SIGUSR1, SIGKILL});
    CHECK_INT(next_of(s), ORCH_EINVAL);
    orch_signals_free(s);
    orch_result r = orch_await(orch_signal(32)); // the C library's own
    CHECK_INT(r.error, -EINVAL);
    CHECK(action_of(SIGUSR1).sa_handler == SIG_DFL);
    return done();
}

RUN(signal_cancelled) {
    orch_future *f = orch_signal(SIGUSR1);
    orch_cancel(f, 0);
    orch_result r = orch_await(f);
    CHECK_INT(r.error, ORCH_ECANCELED);
    r = orch_await(orch_timeout(orch_signal(SIGUSR1), 2));
    CHECK_INT(r.error, ORCH_ETIMEDOUT);
    orch_result_free(&r);
    CHECK(action_of(SIGUSR1).sa_handler == SIG_DFL);
    return done();
}

RUN(signal_wakes_the_loop) {
    orch_future *f = orch_signal(SIGUSR1);
    orch_spawn(raise_later, (void *)(intptr_t)SIGUSR1);
    orch_result r = orch_await(orch_timeout(f, 2000));
    CHECK_INT(orch_int(&r), SIGUSR1);
    orch_result_free(&r);
    return done();
}

RUN(signal_many_waiters) {
    orch_future *f[10];
    for (int i = 0; i < 10; i++) f[i] = orch_signal(i % 2 ? SIGUSR1 : SIGUSR2);
    send_signal(SIGUSR2);
    send_signal(SIGUSR1);
    orch_result r = orch_await(orch_all_settled_n(10, f));
    for (size_t i = 0; i < 10; i++) CHECK_INT(orch_int(orch_at(&r, i)), i % 2 ? SIGUSR1 : SIGUSR2);
    orch_result_free(&r);
    return done();
}

static orch_result in_shield(void *arg) {
    orch_shield_begin();
    orch_sleep(1);
    orch_future *f = orch_signal(SIGUSR1);
    orch_spawn(raise_later, (void *)(intptr_t)SIGUSR1);
    orch_result r = orch_await(f);
    *(int *)arg = (int)orch_int(&r);
    orch_shield_end();
    return r;
}

static int shielded;
RUN(signal_in_shield) { // while the loop ends
    orch_spawn(in_shield, &shielded);
    return done();
}

TEST(signal_in_shield_was_seen) {
    run(body_signal_in_shield);
    CHECK_INT(shielded, SIGUSR1);
}

RUN(signal_left_pending) {
    orch_detach(orch_signal(SIGUSR1));
    orch_detach(orch_signal(SIGUSR2));
    return done();
}

TEST(signal_loop_free) {
    descriptors = count_descriptors();
    orch_loop *loop = orch_loop_new(&settings);
    if (loop == NULL) return;
    orch_future *f = orch_signal(SIGUSR1);
    orch_signals *s = orch_signals_new(1, (int[]){SIGUSR2});
    orch_detach(orch_signals_next(s));
    orch_loop_step(loop, 0);
    orch_drop(f);
    orch_signals_free(s);
    CHECK_INT(orch_loop_free(loop), 0);
    balance();
}

RUN(listen_keeps_all) {
    orch_signals *s = orch_signals_new(2, (int[]){SIGUSR2, SIGUSR1});
    for (int i = 0; i < 3; i++) send_signal(SIGUSR1);
    send_signal(SIGUSR2);
    for (int i = 0; i < 3; i++) CHECK_INT(next_of(s), SIGUSR1);
    CHECK_INT(next_of(s), SIGUSR2);
    send_signal(SIGUSR2);
    CHECK_INT(next_of(s), SIGUSR2);
    orch_future *none = orch_signals_next(s);
    orch_sleep(2);
    CHECK(!orch_is_settled(none));
    orch_drop(none);
    orch_signals_free(s);
    return done();
}

RUN(listen_in_order) {
    orch_signals *s = orch_signals_new(1, (int[]){SIGUSR1});
    orch_future *first = orch_signals_next(s), *second = orch_signals_next(s);
    orch_future *third = orch_signals_next(s);
    send_signal(SIGUSR1);
    orch_sleep(2);
    CHECK(orch_is_settled(first) && !orch_is_settled(second) && !orch_is_settled(third));
    orch_drop(second);
    send_signal(SIGUSR1);
    orch_sleep(2);
    CHECK(orch_is_settled(third));
    orch_drop(first);
    orch_drop(third);
    orch_signals_free(s);
    return done();
}

RUN(listen_lost_race_takes_none) {
    orch_signals *s = orch_signals_new(1, (int[]){SIGUSR1}), *t = orch_signals_new(1, (int[]){SIGUSR1});
    send_signal(SIGUSR1);
    orch_result r = orch_await(orch_race(orch_signals_next(s), orch_signals_next(t)));
    CHECK_INT(orch_int(&r), SIGUSR1);
    CHECK_INT(next_of(r.index == 0 ? t : s), SIGUSR1); // still there
    orch_future *left = orch_signals_next(s);
    orch_sleep(2);
    CHECK(!orch_is_settled(left));
    orch_drop(left);
    orch_signals_free(s);
    orch_signals_free(t);
    return done();
}

RUN(listen_free_while_waited_for) {
    orch_signals *s = orch_signals_new(1, (int[]){SIGUSR1});
    orch_signals *other = orch_signals_new(1, (int[]){SIGUSR2});
    orch_future *f = orch_signals_next(s), *g = orch_signals_next(s);
    orch_signals_free(s);
    orch_result r = orch_await(f);
    CHECK(r.error == ORCH_ECLOSED || r.error == ORCH_ENOMEM);
    orch_drop(g);
    orch_signals_free(other);
    orch_signals_free(NULL);
    return done();
}

static orch_result hang(void *arg) {
    orch_promise promise;
    (void)arg;
    orch_signals *s = orch_signals_new(1, (int[]){SIGUSR1});
    orch_drop(orch_signal(SIGUSR1));
    orch_result r = orch_await(orch_future_new(&promise));
    orch_signals_free(s);
    return r;
}

static void no_report(const char *text, void *context) {
    (void)text;
    (void)context;
}

TEST(listen_alone_keeps_no_loop) {
    descriptors = count_descriptors();
    orch_loop_desc desc = settings;
    desc.on_report = no_report;
    orch_result r = orch_run_with(&desc, hang, NULL);
    CHECK_INT(r.error, ORCH_EDEADLK);
    balance();
}

RUN(listen_without_descriptors) {
    struct rlimit limit, none;
    getrlimit(RLIMIT_NOFILE, &limit);
    none = limit;
    none.rlim_cur = 3;
    setrlimit(RLIMIT_NOFILE, &none);
    orch_result r = orch_await(orch_signal(SIGUSR1));
    setrlimit(RLIMIT_NOFILE, &limit);
    CHECK_INT(r.error, -EMFILE);
    CHECK(action_of(SIGUSR1).sa_handler == SIG_DFL);
    return done();
}

RUN(listen_too_many_loops) {
    static orchi_port full;
    orch_drop(orch_signal(SIGUSR1)); // the table is this process's own now
    for (int i = 0; i < ORCHI_PORTS; i++) orchi_signal_table.ports[i] = &full;
    orch_result r = orch_await(orch_timeout(orch_signal(SIGUSR1), 1000));
    for (int i = 0; i < ORCHI_PORTS; i++) orchi_signal_table.ports[i] = NULL;
    CHECK_INT(r.error, -ENFILE);
    return done();
}

// ---- threads

static int threads_ready;

static orch_result thread_body(void *arg) {
    orch_signals *s = orch_signals_new(1, (int[]){SIGUSR1});
    __atomic_add_fetch(&threads_ready, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < 20; i++) {
        int got = next_of(s);
        if (got != SIGUSR1) return orch_fail(got);
        ++*(int *)arg;
    }
    orch_signals_free(s);
    return done();
}

static void *thread_main(void *arg) {
    orch_result r = orch_run(thread_body, arg);
    if (r.error != 0) *(int *)arg = r.error;
    orch_result_free(&r);
    return NULL;
}

TEST(threads_see_all) {
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    int seen[THREADS] = {0};
    if (test_shared->fail_at) return;
    for (int i = 0; i < THREADS; i++) pthread_create(&threads[i], NULL, thread_main, &seen[i]);
    while (__atomic_load_n(&threads_ready, __ATOMIC_SEQ_CST) < THREADS) usleep(1000);
    for (int i = 0; i < 20; i++) {
        kill(getpid(), SIGUSR1);
        usleep(500);
    }
    for (int i = 0; i < 5; i++) usleep(1000), raise(SIGCONT); // nothing to anybody
    for (int i = 0; i < 20; i++) { // what the system has merged
        bool all = true;
        for (int t = 0; t < THREADS; t++) all = all && __atomic_load_n(&seen[t], __ATOMIC_SEQ_CST) == 20;
        if (!all && action_of(SIGUSR1).sa_handler != SIG_DFL) kill(getpid(), SIGUSR1);
        usleep(1000);
    }
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < THREADS; i++) CHECK_INT(seen[i], 20);
    CHECK(action_of(SIGUSR1).sa_handler == SIG_DFL);
}

static orch_result thread_comes_and_goes(void *arg) {
    (void)arg;
    for (int i = 0; i < 50; i++) {
        orch_future *f = orch_signal(SIGUSR2);
        if (i % 5 == 0) orch_yield();
        orch_drop(f);
        CHECK_INT(shell("exit 1"), 1);
        if (i % 10 == 9) i += 5;
    }
    return done();
}

static void *coming_and_going(void *arg) {
    orch_result r = orch_run(thread_comes_and_goes, NULL);
    orch_result_free(&r);
    return arg;
}

TEST(threads_come_and_go) { // handlers write while ports are closed
    pthread_t threads[3];
    if (test_shared->fail_at) return;
    signal(SIGUSR2, SIG_IGN);
    for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, coming_and_going, NULL);
    for (int i = 0; i < 300; i++) kill(getpid(), SIGUSR2), usleep(200);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    CHECK(action_of(SIGUSR2).sa_handler == SIG_IGN);
}

// ---- fork

static int status_of(pid_t pid) {
    int status = 0;
    return waitpid(pid, &status, 0) == pid ? status : -1;
}

RUN(signal_fork_default) { // the child has the action of before, and the parent hears nothing
    orch_future *f = orch_signal(SIGUSR1);
    if (!orch_is_settled(f)) {
        pid_t child = fork();
        if (child == 0) raise(SIGUSR1), _exit(1);
        int status = status_of(child);
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGUSR1);
    }
    orch_sleep(2);
    CHECK(!orch_is_settled(f) || test_shared->refused);
    orch_drop(f);
    return done();
}

static void *child_loop(void *arg) {
    *(int *)arg = 1;
    orch_result r = orch_run(body_signal_next, NULL);
    *(int *)arg = r.error;
    orch_result_free(&r);
    return NULL;
}

RUN(signal_fork_own) { // the child waits for signals of its own
    orch_future *f = orch_signal(SIGUSR1), *g = orch_signal(SIGUSR2);
    pid_t child = test_shared->fail_at ? -1 : fork();
    if (child == 0) {
        pthread_t thread;
        int error = 1;
        pthread_create(&thread, NULL, child_loop, &error);
        pthread_join(thread, NULL);
        if (error == 0 && action_of(SIGUSR2).sa_handler != SIG_DFL) error = 2;
        orch_drop(f); // the parent's, of which it has a copy
        orch_drop(g);
        _exit(error);
    }
    if (child > 0) CHECK_INT(status_of(child), 0);
    send_signal(SIGUSR1);
    orch_result r = orch_await(f);
    CHECK_INT(orch_int(&r), SIGUSR1);
    orch_drop(g);
    return done();
}

// ---- orch_main

typedef struct program {
    const char *does;
    int out;
} program;

static void tell(const program *p, const char *text) {
    if (write(p->out, text, strlen(text)) < 0) abort();
}

static orch_result program_main(void *arg) {
    const program *p = arg;
    if (strcmp(p->does, "succeeds") == 0) return done();
    if (strcmp(p->does, "fails") == 0) return orch_failf(5, "it failed");
    tell(p, "ready\n");
    if (strcmp(p->does, "is stuck") == 0) {
        for (;;) pause();
    }
    orch_sleep(strcmp(p->does, "ends by itself") == 0 ? 40 : 4000);
    int reason = orch_cancel_reason();
    orch_shield_begin();
    tell(p, "cleaning up\n");
    orch_sleep(strcmp(p->does, "cleans up for long") == 0 ? 4000 : 5);
    tell(p, reason == SIGINT ? "SIGINT\n" : reason == SIGTERM ? "SIGTERM\n" : "nothing\n");
    orch_shield_end();
    printf("buffered\n");
    if (strcmp(p->does, "is a server") == 0) return done();
    if (strcmp(p->does, "fails to clean up") == 0) return orch_failf(5, "it failed");
    return orch_fail(ORCH_ECANCELED);
}

/* Runs orch_main in a child, sends it signals when it says something, and collects what it says. */
static int run_program(const char *does, const int *signals, char *text, size_t size) {
    int fds[2];
    text[0] = '\0';
    if (pipe(fds) != 0) return -1;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        program p = {does, fds[1]};
        dup2(fds[1], 1);
        dup2(fds[1], 2);
        close(fds[0]);
        int code = orch_main(&settings, program_main, &p);
        fflush(NULL);
        _exit(code);
    }
    close(fds[1]);
    size_t length = 0;
    for (ssize_t n = 1; n > 0 && length < size - 1;) {
        n = read(fds[0], text + length, size - 1 - length);
        if (n <= 0) break;
        text[length += (size_t)n] = '\0';
        if (signals != NULL && *signals != 0) kill(child, *signals++), usleep(20000);
    }
    close(fds[0]);
    return status_of(child);
}

static void check_program(const char *does, const int *signals, int number, const char *says) {
    char text[1000];
    int status = run_program(does, signals, text, sizeof text);
    if (test_shared->refused) return;
    CHECK_INT(WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status), number);
    CHECK_STR(text, says);
}

static int code_of(const char *does) {
    program p = {does, 1};
    return orch_main(&settings, program_main, &p);
}

TEST(main_returns) {
    if (test_shared->fail_at) return;
    CHECK_INT(code_of("succeeds"), 0);
    CHECK_INT(code_of("fails"), 1);
    CHECK(action_of(SIGINT).sa_handler == SIG_DFL);
    CHECK(action_of(SIGTERM).sa_handler == SIG_DFL);
}

TEST(main_returns_swept) {
    int code = code_of("succeeds");
    CHECK_INT(code, 0);
    CHECK(action_of(SIGINT).sa_handler == SIG_DFL);
}

TEST(main_interrupted) {
    check_program("ends", (int[]){SIGINT, 0}, SIGINT, "ready\ncleaning up\nSIGINT\nbuffered\n");
}

TEST(main_terminated) {
    check_program("ends", (int[]){SIGTERM, 0}, SIGTERM, "ready\ncleaning up\nSIGTERM\nbuffered\n");
}

TEST(main_of_a_server) {
    check_program("is a server", (int[]){SIGTERM, 0}, 0,
                  "ready\ncleaning up\nSIGTERM\nbuffered\n");
}

TEST(main_fails_to_clean_up) {
    check_program("fails to clean up", (int[]){SIGINT, 0}, SIGINT,
                  "ready\ncleaning up\nSIGINT\nit failed\nbuffered\n");
}

TEST(main_twice) {
    check_program("cleans up for long", (int[]){SIGINT, SIGINT, 0}, SIGINT,
                  "ready\ncleaning up\n");
    check_program("cleans up for long", (int[]){SIGINT, SIGTERM, 0}, SIGTERM,
                  "ready\ncleaning up\n");
}

TEST(main_ignored) {
    signal(SIGINT, SIG_IGN); // as a shell does for what runs in the background
    check_program("ends by itself", (int[]){SIGINT, 0}, -1,
                  "ready\ncleaning up\nnothing\ncancelled\nbuffered\n");
}

TEST(main_stuck) {
    int fds[2];
    char c[10];
    if (pipe(fds) != 0) abort();
    pid_t child = fork();
    if (child == 0) {
        program p = {"is stuck", fds[1]};
        _exit(orch_main(&settings, program_main, &p));
    }
    close(fds[1]);
    if (read(fds[0], c, sizeof c) > 0) {
        kill(child, SIGINT);
        usleep(20000);
        kill(child, SIGINT);
    }
    int status = status_of(child);
    if (!test_shared->refused) CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGINT);
    close(fds[0]);
}

// ---- misuse

static orch_result no_desc(void *arg) {
    (void)arg;
    orch_process *p = orch_process_start(NULL);
    int error = orch_process_error(p);
    orch_process_free(p);
    return orch_ok_int(error);
}

static orch_result no_file(void *arg) {
    (void)arg;
    orch_process *p = orch_process_start(&(orch_process_desc){.directory = "/"});
    CHECK_INT(orch_process_pid(p), ORCH_EINVAL);
    CHECK_INT(orch_process_out(p), ORCH_EINVAL);
    CHECK_INT(orch_process_kill(p, 9), ORCH_EINVAL);
    orch_process_close_in(p);
    int error = finish(p);
    return orch_ok_int(error);
}

static orch_result bad_stream(void *arg) {
    (void)arg;
    return orch_ok_int(
        finish(orch_process_start(&(orch_process_desc){.file = "true", .out = ORCH_STDIO_OUT})));
}

static orch_result bad_signal(void *arg) {
    (void)arg;
    return orch_ok_int(
        finish(orch_process_start(&(orch_process_desc){.file = "true", .kill_signal = 99})));
}

static orch_result bad_command(void *arg) {
    (void)arg;
    orch_result r = orch_await(orch_command_with(NULL));
    return orch_ok_int(r.error);
}

static orch_result null_argv(void *arg) {
    (void)arg;
    orch_result r = orch_await(orch_command(NULL));
    return orch_ok_int(r.error);
}

static orch_result null_process(void *arg) {
    (void)arg;
    orch_result r = orch_await(orch_process_wait(NULL));
    return orch_ok_int(r.error);
}

static orch_result null_signals(void *arg) {
    (void)arg;
    return orch_ok_int(next_of(NULL));
}

static orch_result no_numbers(void *arg) {
    (void)arg;
    orch_signals *s = orch_signals_new(0, NULL);
    int error = next_of(s);
    orch_signals_free(s);
    return orch_ok_int(error);
}

static orch_result make_process(void *arg) {
    *(orch_process **)arg = start_shell("sleep 0.2");
    sigset_t none;
    sigemptyset(&none);
    orch_sleep(1);
    return done();
}

static void *another_thread(void *arg) {
    orch_loop *loop = orch_loop_new(NULL);
    orch_process *p = *(orch_process **)arg;
    *(int *)arg = orch_process_kill(p, SIGTERM);
    orch_process_free(p);
    orch_loop_free(loop);
    return NULL;
}

static orch_result other_thread(void *arg) {
    pthread_t thread;
    union {
        orch_process *p;
        int error;
    } shared;
    (void)arg;
    make_process(&shared.p);
    orch_process *p = shared.p;
    pthread_create(&thread, NULL, another_thread, &shared);
    pthread_join(thread, NULL);
    int code = finish(p);
    if (code != 0) return orch_ok_int(code);
    return orch_ok_int(shared.error);
}

#ifdef NDEBUG
#define MISUSE(id, fn, error, text)                                                                \
    TEST(misuse_##id) {                                                                            \
        descriptors = count_descriptors();                                                         \
        orch_result r = orch_run_with(&settings, fn, NULL);                                        \
        CHECK_INT(orch_int(&r), error);                                                            \
        balance();                                                                                 \
    }
#else
#define MISUSE(id, fn, error, text)                                                                \
    TEST_DIES(misuse_##id, text) { run(fn); }
#endif
MISUSE(no_desc, no_desc, ORCH_EINVAL, "orch_process_start: invalid argument")
MISUSE(no_file, no_file, ORCH_EINVAL, "orch_process_start: invalid argument")
MISUSE(bad_stream, bad_stream, ORCH_EINVAL, "orch_process_start: invalid argument")
MISUSE(bad_signal, bad_signal, ORCH_EINVAL, "orch_process_start: invalid argument")
MISUSE(bad_command, bad_command, ORCH_EINVAL, "orch_command: invalid argument")
MISUSE(null_argv, null_argv, ORCH_EINVAL, "orch_command: invalid argument")
MISUSE(null_process, null_process, ORCH_EINVAL, "orch_process_wait: invalid argument")
MISUSE(null_signals, null_signals, ORCH_EINVAL, "orch_signals_next: invalid argument")
MISUSE(no_numbers, no_numbers, ORCH_EINVAL, "orch_signals_new: invalid argument")
MISUSE(other_thread, other_thread, ORCH_ETHREAD, "orch_process_kill: the future belongs")

#ifdef NDEBUG
TEST(misuse_no_loop) {
    orch_process *p = orch_process_start(&(orch_process_desc){.file = "true"});
    CHECK_INT(orch_process_error(p), ORCH_ENOLOOP);
    orch_process_free(p);
    orch_signals *s = orch_signals_new(1, (int[]){SIGUSR1});
    orch_signals_free(s);
    const orch_result *r = orch_peek(orch_command((char *[]){"true", NULL}));
    CHECK(r != NULL && r->error == ORCH_ENOLOOP);
    r = orch_peek(orch_signal(SIGUSR1));
    CHECK(r != NULL && r->error == ORCH_ENOLOOP);
    CHECK_INT(orch_main(NULL, NULL, NULL), 1);
}
#else
TEST_DIES(misuse_no_loop, "orch_process_start: no loop on this thread") {
    orch_process_free(orch_process_start(&(orch_process_desc){.file = "true"}));
}
TEST_DIES(misuse_no_main, "orch_main: invalid argument") { orch_main(NULL, NULL, NULL); }
TEST_DIES(misuse_no_loop_command, "orch_command: no loop on this thread") {
    orch_drop(orch_command((char *[]){"true", NULL}));
}
TEST_DIES(misuse_no_loop_signal, "orch_signals_new: no loop on this thread") {
    orch_drop(orch_signal(SIGUSR1));
}
#endif

int main(int argc, char **argv) { return test_main(argc, argv); }
