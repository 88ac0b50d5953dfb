// test_signal.c: signals as futures, in one loop and in several, in threads and forked children;
// and how they end orch_run.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../asyncorch.h"
#include "pollers.h"
#include "test.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

// The body runs as the main task of a loop of its own.
#define TASK_TEST(name)                                                                            \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        test_start();                                                                              \
        name##_body();                                                                             \
        return orch_ok_int(1);                                                                     \
    }                                                                                              \
    TEST(name) {                                                                                   \
        orch_loop_desc desc = {.poller = test_poller()};                                           \
        int before = descriptors();                                                                \
        orch_result r = orch_run_with(&desc, name##_main, NULL);                                   \
        CHECK_INT(r.error, 0);                                                                     \
        CHECK_INT(orch_int(&r), 1);                                                                \
        orch_result_free(&r);                                                                      \
        CHECK_INT(descriptors(), before);                                                          \
        CHECK(is_default(SIGUSR1) && is_default(SIGUSR2));                                         \
    }                                                                                              \
    static void name##_body(void)

// How many descriptors are open.
static int descriptors(void) {
    int count = 0;
    for (int fd = 0; fd < 256; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static bool has_handler(int number, void (*handler)(int)) {
    struct sigaction now;
    return sigaction(number, NULL, &now) == 0 && now.sa_handler == handler;
}

static bool is_default(int number) { return has_handler(number, SIG_DFL); }

// Awaits: the number the future ended with, or its error.
static intptr_t join(orch_future *f) {
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

// The same within two seconds; after a refusal it may never come.
static intptr_t soon(orch_future *f) {
    return join(orch_timeout(f, test_shared->refused ? 100 : 2000));
}

// Sends a signal to this process, unless it would end it: where memory is refused nobody may wait.
static void hit(int number) {
    if (!is_default(number)) kill(getpid(), number);
}

// ---- one wait

TASK_TEST(the_next_time_it_comes) {
    orch_future *f = orch_signal(SIGUSR1);
    CHECK(!orch_is_settled(f));
    hit(SIGUSR1);
    CHECK_INT(soon(f), SIGUSR1);
}

TASK_TEST(what_came_before_does_not_count) {
    signal(SIGUSR1, SIG_IGN);
    hit(SIGUSR1);
    orch_future *f = orch_signal(SIGUSR1);
    CHECK_INT(orch_sleep(2), 0);
    CHECK(!orch_is_settled(f));
    orch_drop(f);
    CHECK(has_handler(SIGUSR1, SIG_IGN));
    signal(SIGUSR1, SIG_DFL);
}

static void other_handler(int number) { (void)number; }

TASK_TEST(the_last_wait_puts_back_what_was_there) {
    signal(SIGUSR1, other_handler);
    orch_future *a = orch_signal(SIGUSR1), *b = orch_signal(SIGUSR1);
    CHECK(!has_handler(SIGUSR1, other_handler));
    orch_drop(a);
    CHECK(!has_handler(SIGUSR1, other_handler) || orch_is_settled(b));
    hit(SIGUSR1);
    CHECK_INT(soon(b), SIGUSR1);
    CHECK(has_handler(SIGUSR1, other_handler));
    signal(SIGUSR1, SIG_DFL);
}

TASK_TEST(a_handler_that_was_put_in_place_of_ours_stays) {
    orch_future *f = orch_signal(SIGUSR1);
    signal(SIGUSR1, other_handler);
    orch_drop(f);
    CHECK(has_handler(SIGUSR1, other_handler));
    signal(SIGUSR1, SIG_DFL);
}

TASK_TEST(two_waits_for_one_signal_both_get_it) {
    orch_future *a = orch_signal(SIGUSR1), *b = orch_signal(SIGUSR1), *c = orch_signal(SIGUSR2);
    hit(SIGUSR1);
    CHECK_INT(soon(a), SIGUSR1);
    CHECK_INT(soon(b), SIGUSR1);
    CHECK(!orch_is_settled(c));
    orch_drop(c);
}

TASK_TEST(a_wait_that_is_cancelled_catches_nothing) {
    orch_future *f = orch_signal(SIGUSR1);
    CHECK_INT(join(orch_timeout(f, 1)), ORCH_ETIMEDOUT);
    CHECK(is_default(SIGUSR1));
}

TASK_TEST(what_cannot_be_waited_for_is_refused) {
    static const int bad[] = {SIGKILL, SIGSTOP, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP,
                              SIGSYS,  0,       -1,      65,     1000,   32,     INT_MIN, INT_MAX};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK_INT(join(orch_signal(bad[i])), ORCH_EINVAL);
    }
    const int mixed[] = {SIGUSR1, SIGKILL};
    orch_signals *s = orch_signals_new(mixed, 2);
    CHECK_INT(join(orch_signals_next(s)), ORCH_EINVAL);
    CHECK(is_default(SIGUSR1));
    orch_signals_free(s);
    const int reserved[] = {SIGUSR1, 33}; // of the C library: the system refuses it late
    s = orch_signals_new(reserved, 2);
    CHECK_INT(join(orch_signals_next(s)), ORCH_EINVAL);
    CHECK(is_default(SIGUSR1));
    orch_signals_free(s);
}

TASK_TEST(no_descriptor_is_an_error) {
    struct rlimit limit, none;
    getrlimit(RLIMIT_NOFILE, &limit);
    none = limit;
    none.rlim_cur = 3;
    setrlimit(RLIMIT_NOFILE, &none);
    intptr_t error = join(orch_signal(SIGUSR1));
    setrlimit(RLIMIT_NOFILE, &limit);
    CHECK_INT(error, -EMFILE);
    CHECK(is_default(SIGUSR1));
}

// ---- several signals, several waits

static const int both[] = {SIGUSR2, SIGUSR1};

TASK_TEST(nothing_is_lost_between_two_waits) {
    orch_signals *s = orch_signals_new(both, 2);
    hit(SIGUSR2);
    hit(SIGUSR1);
    CHECK_INT(soon(orch_signals_next(s)), SIGUSR1); // lowest number first
    CHECK_INT(soon(orch_signals_next(s)), SIGUSR2);
    hit(SIGUSR2);
    CHECK_INT(orch_sleep(1), 0);
    hit(SIGUSR2);
    hit(SIGUSR2);
    CHECK_INT(soon(orch_signals_next(s)), SIGUSR2); // three before the look are one
    orch_future *f = orch_signals_next(s);
    CHECK_INT(orch_sleep(2), 0);
    CHECK(!orch_is_settled(f));
    hit(SIGUSR1);
    CHECK_INT(soon(f), SIGUSR1);
    orch_signals_free(s);
}

TASK_TEST(a_wait_that_loses_takes_nothing) {
    orch_signals *s = orch_signals_new(both, 2);
    hit(SIGUSR1);
    orch_result r = orch_await(orch_race(orch_settled(orch_ok_int(7)), orch_signals_next(s)));
    CHECK_INT(orch_int(&r), 7);
    orch_result_free(&r);
    orch_drop(orch_signals_next(s));
    CHECK_INT(soon(orch_signals_next(s)), SIGUSR1);
    orch_signals_free(s);
}

TASK_TEST(a_race_in_one_look_loses_nothing) {
    int fd[2];
    CHECK(pipe(fd) == 0 && write(fd[1], "x", 1) == 1);
    orch_signals *s = orch_signals_new(both, 2);
    unsigned came = 0;
    for (int i = 0; i < 20; i++) {
        hit(SIGUSR1);
        orch_future *a = orch_ready(fd[0], ORCH_READABLE), *b = orch_signals_next(s);
        orch_result r = orch_await(i % 2 ? orch_race(a, b) : orch_race(b, a));
        bool signalled = r.index == (i % 2 ? 1u : 0u);
        orch_result_free(&r);
        if (!signalled) signalled = soon(orch_signals_next(s)) == SIGUSR1;
        came += signalled;
    }
    CHECK_INT(came, 20);
    orch_signals_free(s);
    close(fd[0]);
    close(fd[1]);
}

TASK_TEST(one_next_at_a_time) {
    orch_signals *s = orch_signals_new(both, 2);
    orch_future *f = orch_signals_next(s);
    CHECK_INT(soon(orch_signals_next(s)), ORCH_EBUSY);
    hit(SIGUSR1);
    CHECK_INT(soon(f), SIGUSR1);
    orch_signals_free(s);
}

TASK_TEST(a_free_wakes_who_waits) {
    orch_signals *s = orch_signals_new(both, 2);
    orch_future *f = orch_signals_next(s);
    orch_signals_free(s);
    CHECK_INT(soon(f), ORCH_ECLOSED);
    orch_signals_free(NULL);
}

TASK_TEST(a_shared_wait_takes_the_signal_once) {
    orch_signals *s = orch_signals_new(both, 2);
    orch_future *f = orch_signals_next(s), *g = orch_ref(f);
    hit(SIGUSR2);
    CHECK_INT(soon(f), SIGUSR2);
    CHECK_INT(soon(g), SIGUSR2);
    orch_signals_free(s);
}

#ifdef TEST_EMULATED
enum { EMULATED = true, RT_MOST = 62 }; // qemu keeps two for itself
#else
enum { EMULATED = false, RT_MOST = 64 };
#endif

TASK_TEST(many_waits_for_many_signals) {
    orch_future *all[64];
    int numbers[64], count = 0;
    for (int number = SIGRTMIN; number <= SIGRTMAX && number <= RT_MOST; number++) {
        numbers[count] = number;
        all[count++] = orch_signal(number);
    }
    for (int i = 0; i < count; i++) hit(numbers[i]);
    for (int i = 0; i < count; i++) CHECK_INT(soon(all[i]), numbers[i]);
    CHECK(is_default(SIGRTMIN) && is_default(SIGRTMAX));
}

TEST_DIES(an_empty_list_is_a_misuse, "asyncorch: orch_signals_new: invalid argument") {
    orch_loop *loop = orch_loop_new(NULL);
    orch_signals_free(orch_signals_new(both, 0));
    orch_loop_free(loop);
}

TEST_DIES(no_object_is_a_misuse, "asyncorch: orch_signals_next: invalid argument") {
    orch_loop *loop = orch_loop_new(NULL);
    orch_drop(orch_signals_next(NULL));
    orch_loop_free(loop);
}

TEST_DIES(no_loop_is_a_misuse, "asyncorch: orch_signal: no loop") {
    orch_drop(orch_signal(SIGINT));
}

// ---- loops and threads

TEST(a_loop_that_is_freed_leaves_nothing) {
    orch_loop_desc desc = {.poller = test_poller()};
    int before = descriptors();
    orch_loop *loop = orch_loop_new(&desc);
    if (loop == NULL) return;
    orch_detach(orch_signal(SIGUSR1));
    CHECK_INT(orch_loop_step(loop, 1), 1);
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK(is_default(SIGUSR1));
    CHECK_INT(descriptors(), before);
}

static void *send_later(void *arg) {
    usleep(20000);
    hit(*(int *)arg);
    return NULL;
}

static int usr1 = SIGUSR1, sigterm = SIGTERM;

TASK_TEST(a_wait_is_not_a_deadlock) {
    pthread_t thread;
    orch_future *f = orch_signal(SIGUSR1);
    pthread_create(&thread, NULL, send_later, &usr1);
    CHECK_INT(join(f), SIGUSR1); // nothing else can wake the loop
    pthread_join(thread, NULL);
}

TASK_TEST(whichever_thread_gets_it) {
    pthread_t thread;
    sigset_t set;
    orch_future *f = orch_signal(SIGUSR1);
    pthread_create(&thread, NULL, send_later, &usr1);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, NULL); // so it is the other one
    CHECK_INT(join(f), SIGUSR1);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    pthread_join(thread, NULL);
}

enum { LOOPS = 3 };
static int waiting, got[LOOPS];

static orch_result wait_usr1(void *arg) {
    orch_future *f = orch_signal(SIGUSR1);
    __atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST);
    *(int *)arg = (int)join(f);
    return orch_ok(NULL, NULL);
}

static void *loop_thread(void *arg) {
    orch_loop_desc desc = {.poller = test_poller()};
    orch_result r = orch_run_with(&desc, wait_usr1, arg);
    if (r.error != 0) __atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST);
    orch_result_free(&r);
    return NULL;
}

TEST(every_loop_that_waits_gets_it) {
    pthread_t threads[LOOPS];
    signal(SIGUSR1, SIG_IGN);
    for (int i = 0; i < LOOPS; i++) pthread_create(&threads[i], NULL, loop_thread, &got[i]);
    while (__atomic_load_n(&waiting, __ATOMIC_SEQ_CST) < LOOPS) usleep(100);
    kill(getpid(), SIGUSR1);
    for (int i = 0; i < LOOPS; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < LOOPS; i++) CHECK_INT(got[i], SIGUSR1);
    CHECK(has_handler(SIGUSR1, SIG_IGN));
}

static int storm_over;

static orch_result come_and_go(void *arg) {
    (void)arg;
    int rounds = test_shared->fail_at ? 6 : 300;
    for (int i = 0; i < rounds; i++) {
        orch_signals *s = orch_signals_new(both, 2);
        orch_future *f = orch_signals_next(s);
        if (i % 3 == 0) join(orch_timeout(f, 1));
        else orch_drop(f);
        orch_signals_free(s);
    }
    return orch_ok(NULL, NULL);
}

static void *storm_thread(void *arg) {
    (void)arg;
    while (!__atomic_load_n(&storm_over, __ATOMIC_SEQ_CST)) kill(getpid(), SIGUSR1), usleep(20);
    return NULL;
}

static void *come_and_go_thread(void *arg) {
    orch_loop_desc desc = {.poller = test_poller()};
    orch_result r = orch_run_with(&desc, come_and_go, arg);
    orch_result_free(&r);
    return NULL;
}

// qemu-user 7.2 calls the handler that sigaction has just taken away, and crashes.
TEST_SKIP(objects_come_and_go_in_a_storm, EMULATED) {
    pthread_t storm, threads[2];
    signal(SIGUSR1, SIG_IGN);
    pthread_create(&storm, NULL, storm_thread, NULL);
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, come_and_go_thread, NULL);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    __atomic_store_n(&storm_over, 1, __ATOMIC_SEQ_CST);
    pthread_join(storm, NULL);
    CHECK(has_handler(SIGUSR1, SIG_IGN));
}

// ---- time

static orch_result virtual_main(void *arg) {
    pthread_t thread;
    orch_future *f = orch_signal(SIGUSR1);
    (void)arg;
    CHECK_INT(orch_sleep(3600 * 1000), 0); // passes, as for any descriptor
    CHECK(!orch_is_settled(f));
    pthread_create(&thread, NULL, send_later, &usr1);
    CHECK_INT(join(f), SIGUSR1); // a real wait
    pthread_join(thread, NULL);
    return orch_ok_int(1);
}

TEST(a_virtual_clock_waits_for_a_signal) {
    orch_loop_desc desc = {.poller = test_poller(), .clock = ORCH_CLOCK_VIRTUAL};
    orch_result r = orch_run_with(&desc, virtual_main, NULL);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
}

// ---- forked children

// What the child ended with: its code, or 1000 and the signal.
static int ended(pid_t pid) {
    int status = -1;
    CHECK_INT(waitpid(pid, &status, 0), pid);
    return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status);
}

// The thread sanitizer keeps signals back until a call that blocks, and loses those of a child.
#ifdef __SANITIZE_THREAD__
static const bool keeps_signals = true;
#else
static const bool keeps_signals = false;
#endif

static pid_t child_that_raises(int number) {
    pid_t pid = fork();
    if (pid == 0) {
        raise(number);
        _exit(0);
    }
    return pid;
}

TASK_TEST(a_child_does_what_was_done_before) {
    if (keeps_signals) return;
    orch_future *f = orch_signal(SIGUSR1);
    CHECK_INT(ended(child_that_raises(SIGUSR1)), 1000 + SIGUSR1);
    CHECK_INT(orch_sleep(2), 0);
    CHECK(!orch_is_settled(f)); // the child did not ring our bell
    orch_drop(f);
    signal(SIGUSR1, SIG_IGN);
    f = orch_signal(SIGUSR1);
    CHECK_INT(ended(child_that_raises(SIGUSR1)), 0);
    hit(SIGUSR1);
    CHECK_INT(soon(f), SIGUSR1); // and we still catch it
    signal(SIGUSR1, SIG_DFL);
}

static void exit_seven(int number) { _exit(number == SIGUSR1 ? 7 : 8); }

TASK_TEST(a_child_calls_the_handler_that_was_there) {
    if (keeps_signals) return;
    signal(SIGUSR1, exit_seven);
    orch_future *f = orch_signal(SIGUSR1);
    CHECK_INT(ended(child_that_raises(SIGUSR1)), 7);
    orch_drop(f);
    signal(SIGUSR1, SIG_DFL);
}

static orch_result child_main(void *arg) {
    (void)arg;
    orch_future *f = orch_signal(SIGUSR2);
    hit(SIGUSR2);
    return orch_ok_int(soon(f) == SIGUSR2 && is_default(SIGUSR1));
}

static orch_loop *parent_loop;
static orch_future *parent_wait;

// A loop of its own, after what it inherited has been freed. Its exit code.
static int child_with_a_loop(void) {
    orch_drop(parent_wait);
    if (orch_loop_free(parent_loop) != 0) return 1;
    orch_loop_desc desc = {.poller = test_poller()};
    orch_result r = orch_run_with(&desc, child_main, NULL);
    int code = orch_int(&r) == 1 ? 0 : 2;
    orch_result_free(&r);
    return code;
}

TEST(a_child_may_have_a_loop_of_its_own) {
    orch_loop_desc desc = {.poller = test_poller()};
    parent_loop = orch_loop_new(&desc);
    if (parent_loop == NULL) return;
    parent_wait = orch_signal(SIGUSR1);
    orch_loop_step(parent_loop, 1);
    pid_t pid = fork();
    if (pid == 0) _exit(child_with_a_loop());
    CHECK_INT(ended(pid), 0);
    CHECK(!orch_is_settled(parent_wait));
    hit(SIGUSR1);
    orch_loop_step(parent_loop, 1000);
    CHECK(orch_is_settled(parent_wait));
    orch_drop(parent_wait);
    CHECK_INT(orch_loop_free(parent_loop), 0);
    CHECK(is_default(SIGUSR1));
}

// ---- orch_run

static orch_loop_desc handling(void) {
    return (orch_loop_desc){.poller = test_poller(), .handle_signals = true};
}

static int reason, cleaned;

static orch_result sleeper(void *arg) {
    raise(*(int *)arg);
    int error = orch_sleep(10000);
    reason = orch_cancel_reason();
    orch_shield_begin();
    cleaned = orch_sleep(20) == 0;
    orch_shield_end();
    return orch_fail(error);
}

TEST(a_signal_cancels_the_main_task) {
    orch_loop_desc desc = handling();
    int before = descriptors();
    orch_result r = orch_run_with(&desc, sleeper, &sigterm);
    CHECK_INT(r.error, ORCH_ESIGNAL);
    CHECK_INT(r.index, SIGTERM);
    CHECK_INT(reason, 128 + SIGTERM);
    CHECK_INT(cleaned, 1);
    CHECK_STR(orch_message(&r), "ended by a signal");
    orch_result_free(&r);
    CHECK(is_default(SIGTERM) && is_default(SIGINT));
    CHECK_INT(descriptors(), before);
}

// What orch_exit prints and returns, in a child with its stderr in a pipe.
static int exit_of(orch_task_fn fn, void *arg, char *text, size_t size) {
    int fd[2];
    if (!CHECK(pipe(fd) == 0)) return -1;
    pid_t pid = fork();
    if (pid == 0) {
        orch_loop_desc desc = handling();
        dup2(fd[1], 2);
        close(fd[0]);
        close(fd[1]);
        _exit(orch_exit(orch_run_with(&desc, fn, arg)));
    }
    close(fd[1]);
    size_t have = 0;
    ssize_t n;
    while ((n = read(fd[0], text + have, size - 1 - have)) > 0) have += (size_t)n;
    text[have] = '\0';
    close(fd[0]);
    char *line = strchr(text, '\n'); // with ucontext ASan says what it thinks of it
    if (line != NULL && strncmp(text, "==", 2) == 0 && strstr(text, "swapcontext") != NULL)
        memmove(text, line + 1, strlen(line));
    return ended(pid);
}

TEST(exit_codes_are_a_shells_and_nothing_is_printed) {
    char text[400];
    int sigint = SIGINT;
    CHECK_INT(exit_of(sleeper, &sigterm, text, sizeof text), 128 + SIGTERM);
    CHECK_STR(text, "");
    CHECK_INT(exit_of(sleeper, &sigint, text, sizeof text), 128 + SIGINT);
    CHECK_STR(text, "");
}

static orch_result with_a_message(void *arg) {
    raise(*(int *)arg);
    orch_sleep(10000);
    return orch_failf(5, "half of it is done");
}

TEST(a_message_of_its_own_is_printed) {
    char text[400];
    CHECK_INT(exit_of(with_a_message, &sigterm, text, sizeof text), 128 + SIGTERM);
    CHECK_STR(text, "half of it is done\n");
}

static orch_result ends_well(void *arg) {
    raise(*(int *)arg);
    return orch_ok_int(orch_sleep(10000) == ORCH_ECANCELED);
}

TEST(a_main_that_ends_well_has_succeeded) {
    orch_loop_desc desc = handling();
    orch_result r = orch_run_with(&desc, ends_well, &sigterm);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
}

static orch_result fails_itself(void *arg) {
    (void)arg;
    return orch_fail(7);
}

TEST(a_failure_without_a_signal_stays) {
    orch_loop_desc desc = handling();
    orch_result r = orch_run_with(&desc, fails_itself, NULL);
    CHECK_INT(r.error, 7);
    orch_result_free(&r);
}

static orch_result computes(void *arg) {
    raise(*(int *)arg);
    raise(*(int *)arg);
    return orch_ok_int(1); // not reached
}

static orch_result winds_down(void *arg) {
    raise(*(int *)arg);
    orch_sleep(10000);
    raise(SIGINT);
    orch_shield_begin();
    orch_sleep(10000);
    return orch_fail(1);
}

TEST(a_second_signal_ends_the_process) {
    char text[200];
    CHECK_INT(exit_of(computes, &sigterm, text, sizeof text), 1000 + SIGTERM);
    CHECK_INT(exit_of(winds_down, &sigterm, text, sizeof text), 1000 + SIGINT);
}

static orch_result raises_int(void *arg) {
    (void)arg;
    raise(SIGINT);
    return orch_ok_int(orch_sleep(2) == 0);
}

TEST(what_was_ignored_stays_ignored) {
    orch_loop_desc desc = handling();
    signal(SIGINT, SIG_IGN);
    orch_result r = orch_run_with(&desc, raises_int, NULL);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
    CHECK(has_handler(SIGINT, SIG_IGN));
}

static orch_result waits_for_ever(void *arg) {
    orch_promise p;
    (void)arg;
    return orch_await(orch_future_new(&p));
}

static void no_report(const char *text, void *context) {
    (void)text;
    ++*(int *)context;
}

TEST(a_deadlock_is_still_one) {
    int lines = 0;
    orch_loop_desc desc = handling();
    desc.on_report = no_report;
    desc.context = &lines;
    orch_result r = orch_run_with(&desc, waits_for_ever, NULL);
    CHECK_INT(r.error, ORCH_EDEADLK);
    CHECK(lines > 0);
    orch_result_free(&r);
}

static orch_result takes_it_too(void *arg) {
    orch_future *f = orch_signal(SIGTERM);
    raise(*(int *)arg);
    orch_shield_begin();
    intptr_t n = soon(f);
    orch_shield_end();
    return orch_ok_int(n);
}

TEST(main_can_wait_for_it_as_well) {
    orch_loop_desc desc = handling();
    orch_result r = orch_run_with(&desc, takes_it_too, &sigterm);
    CHECK_INT(orch_int(&r), SIGTERM);
    orch_result_free(&r);
}

static orch_result no_main(void *arg) {
    (void)arg;
    CHECK(false);
    return orch_ok(NULL, NULL);
}

TEST(what_cannot_be_caught_is_an_error) {
    orch_loop_desc desc = handling();
    struct rlimit limit, none;
    getrlimit(RLIMIT_NOFILE, &limit);
    none = limit;
    none.rlim_cur = 3;
    setrlimit(RLIMIT_NOFILE, &none);
    orch_result r = orch_run_with(&desc, no_main, NULL);
    setrlimit(RLIMIT_NOFILE, &limit);
    CHECK_INT(r.error, -EMFILE);
    CHECK(is_default(SIGTERM));
    orch_result_free(&r);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
