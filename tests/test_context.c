// test_context.c: stacks (size, guard, peak, reuse, overflow), the switch, the main stack.
// Build with -fstack-clash-protection: without it a large frame may jump over any guard.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../asyncorch.h"
#include "test.h"

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#define ON_LINUX true
#else
#define ON_LINUX false
#endif

// For gcc the flag is set here where it matters; other compilers need it on their command line.
#if defined(__GNUC__) && !defined(__clang__)
#define PROBED __attribute__((optimize("stack-clash-protection")))
#else
#define PROBED
#endif
#define UNCHECKED __attribute__((no_sanitize_address))

// What the sanitizers allow: ThreadSanitizer knows at most 8,128 threads and fibers, and only so
// deep a call stack; both keep mappings of their own for every stack, and take time to make them.
#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#elif defined(__SANITIZE_ADDRESS__)
#define UNDER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#elif __has_feature(address_sanitizer)
#define UNDER_ASAN 1
#endif
#endif
#if defined(UNDER_TSAN)
enum { DEEP = 10000, MANY = 1000, AGAIN = 5000, OWN_MAPPINGS = 0 };
#elif defined(UNDER_ASAN)
enum { DEEP = 100000, MANY = 10000, AGAIN = 3000, OWN_MAPPINGS = 0 };
#else
enum { DEEP = 100000, MANY = 10000, AGAIN = 100000, OWN_MAPPINGS = ON_LINUX };
#endif

#define KIB ((size_t)1024)
#define MIB (1024 * KIB)

// The body runs as the main task of a loop of its own.
#define TASK_TEST(name)                                                                            \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        name##_body();                                                                             \
        return orch_ok_int(1);                                                                     \
    }                                                                                              \
    TEST(name) {                                                                                   \
        orch_result r = orch_run(name##_main, NULL);                                               \
        CHECK_INT(r.error, 0);                                                                     \
        CHECK_INT(orch_int(&r), 1);                                                                \
        orch_result_free(&r);                                                                      \
    }                                                                                              \
    static void name##_body(void)

static orch_loop_stats stats(void) { return orch_loop_statistics(orch_loop_current()); }

// Awaits and says what the task returned: its number, or its error.
static intptr_t join(orch_future *f) {
    orch_result r = orch_await(f);
    intptr_t n = r.error ? r.error : orch_int(&r);
    orch_result_free(&r);
    return n;
}

static orch_future *go_sized(orch_task_fn fn, void *arg, size_t stack_size) {
    return orch_go_with(
        &(orch_task_desc){.name = "sized", .fn = fn, .arg = arg, .stack_size = stack_size});
}

// Not the address of a local, which the sanitizers may keep elsewhere.
static uintptr_t here(void) { return (uintptr_t)__builtin_frame_address(0); }

// ---- sizes

static orch_result own_stack_size(void *arg) {
    (void)arg;
    return orch_ok_int((intptr_t)orch_task_stack_size(orch_self()));
}

TASK_TEST(the_default_stack_is_64_kib) {
    CHECK_INT(join(orch_go(own_stack_size, NULL)), 64 * KIB);
    CHECK_INT(orch_loop_settings(orch_loop_current())->stack_size, 64 * KIB);
}

TASK_TEST(a_stack_has_the_size_asked_for_rounded_up) {
    CHECK_INT(join(go_sized(own_stack_size, NULL, 16 * KIB)), 16 * KIB);
    CHECK_INT(join(go_sized(own_stack_size, NULL, 16 * KIB + 1)), 32 * KIB);
    CHECK_INT(join(go_sized(own_stack_size, NULL, 100 * KIB)), 128 * KIB);
    CHECK_INT(join(go_sized(own_stack_size, NULL, 256 * MIB)), 256 * MIB);
    CHECK_INT(join(orch_go(own_stack_size, NULL)), 64 * KIB);
}

static orch_result child_stack_size(void *arg) {
    return orch_ok_int(join(orch_go(own_stack_size, arg)));
}

TEST(the_loop_sets_the_size_of_all_its_stacks) {
    orch_loop_desc desc = {.stack_size = 200 * KIB};
    orch_result r = orch_run_with(&desc, child_stack_size, NULL);
    CHECK_INT(orch_int(&r), 256 * KIB);
    orch_result_free(&r);
}

// ---- depth

typedef unsigned (*dive_fn)(unsigned depth);
static unsigned dive(unsigned depth);
static dive_fn volatile dive_next = dive; // unknown to the compiler: no loop made of it

static unsigned dive(unsigned depth) {
    volatile char frame[128];
    frame[0] = (char)depth;
    frame[127] = 1;
    unsigned below = depth ? dive_next(depth - 1) : 0;
    return below + (unsigned)frame[127];
}

static orch_result dive_task(void *arg) {
    return orch_ok_int((intptr_t)dive_next(*(unsigned *)arg));
}

TASK_TEST(deep_recursion_fits_a_big_stack) {
    unsigned depth = DEEP;
    CHECK_INT(join(go_sized(dive_task, &depth, 128 * MIB)), depth + 1);
}

static orch_result fill_most(void *arg) {
    volatile char all[44 * 1024];
    for (size_t i = 0; i < sizeof all; i++) all[i] = (char)i;
    orch_yield();
    int wrong = 0;
    for (size_t i = 0; i < sizeof all; i++) wrong += all[i] != (char)i;
    *(int *)arg += wrong;
    return orch_ok_int(wrong == 0);
}

TASK_TEST(most_of_a_stack_is_the_tasks_own) {
    static int wrong[20];
    orch_future *f[20];
    for (int i = 0; i < 20; i++) f[i] = orch_go(fill_most, &wrong[i]);
    for (int i = 0; i < 20; i++) CHECK_INT(join(f[i]), 1);
}

static orch_result small_frame(void *arg) {
    volatile char some[6 * 1024];
    (void)arg;
    for (size_t i = 0; i < sizeof some; i++) some[i] = 3;
    orch_sleep(1);
    return orch_ok_int(some[sizeof some - 1]);
}

TASK_TEST(the_smallest_stack_is_of_use) {
    CHECK_INT(join(go_sized(small_frame, NULL, 16 * KIB)), 3);
}

// ---- peak

static void touch(size_t size) {
    volatile char deep[size]; // of variable size: its probes touch all of it
    for (size_t i = 0; i < size; i += 512) deep[i] = 1;
    if (deep[0] != 1) abort();
}

static void (*volatile touch_now)(size_t size) = touch;

static orch_result peak_task(void *arg) {
    size_t *peaks = arg;
    peaks[0] = orch_task_stack_peak(orch_self());
    touch_now(400 * 1024);
    peaks[1] = orch_task_stack_peak(orch_self());
    orch_yield();
    peaks[2] = orch_task_stack_peak(orch_self());
    return orch_ok_int(1);
}

TASK_TEST(the_peak_shows_what_was_touched) {
    size_t peaks[3] = {0, 0, 0}, page = (size_t)sysconf(_SC_PAGESIZE);
    CHECK_INT(join(go_sized(peak_task, peaks, MIB)), 1);
    CHECK(peaks[0] > 0 && peaks[0] < 100 * KIB);
    CHECK(peaks[1] >= 400 * KIB && peaks[1] < 500 * KIB);
    CHECK(peaks[2] >= peaks[1]);
    for (int i = 0; i < 3; i++) CHECK_INT(peaks[i] % page, 0);
}

static orch_result rest(void *arg) {
    (void)arg;
    orch_sleep(1000);
    return orch_ok_int(1);
}

static orch_result introduce(void *arg) {
    *(orch_task **)arg = orch_self();
    touch_now(200 * 1024);
    orch_sleep(1000);
    return orch_ok_int(1);
}

TASK_TEST(the_peak_of_another_task_can_be_read) {
    orch_task *other = NULL;
    orch_future *f = go_sized(introduce, &other, MIB);
    if (other && !orch_is_settled(f)) {
        CHECK_INT(orch_task_stack_size(other), MIB);
        size_t peak = orch_task_stack_peak(other), own = orch_task_stack_peak(orch_self());
        CHECK(peak >= 200 * KIB && peak < 300 * KIB);
        CHECK(own > 0 && own <= 64 * KIB);
    }
    orch_drop(f);
}

// ---- guard

typedef struct walk {
    size_t usable, guarded; // bytes below the frame, and the unreadable bytes below those
} walk;

#if ON_LINUX
// Whether the kernel can read a byte: asked without risking a signal.
static bool readable(const int fd[2], uintptr_t at) {
    char byte;
    if (syscall(SYS_write, fd[1], at, 1) != 1) return false;
    return read(fd[0], &byte, 1) == 1;
}
#endif

static orch_result walk_down(void *arg) {
    walk *w = arg;
#if ON_LINUX
    int fd[2];
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), at = here() / page * page;
    if (pipe(fd)) return orch_fail(-errno);
    size_t limit = 2 * orch_task_stack_size(orch_self());
    for (; w->usable < limit && readable(fd, at - page); at -= page) w->usable += page;
    for (; w->guarded < limit && !readable(fd, at - page); at -= page) w->guarded += page;
    close(fd[0]);
    close(fd[1]);
#endif
    return orch_ok_int(1);
}

static void check_guards(void) {
    for (int i = 0; i < 5; i++) {
        walk w = {0, 0};
        size_t size = i < 3 ? 64 * KIB : 16 * KIB << i;
        if (!CHECK_INT(join(go_sized(walk_down, &w, size)), 1)) return;
        CHECK(w.usable > size / 2 && w.usable <= size);
        CHECK(w.guarded >= 16 * KIB);
    }
}

TEST(no_guard_is_claimed_before_there_is_a_stack) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    CHECK_INT(orch_loop_statistics(loop).guard, ORCH_GUARD_UNKNOWN);
    CHECK_INT(orch_loop_free(loop), 0);
}

TASK_TEST(the_guard_in_force_is_reported) {
    orch_guard guard = stats().guard;
    CHECK(guard == ORCH_GUARD_CANARY || guard == ORCH_GUARD_MPROTECT ||
          guard == ORCH_GUARD_MADVISE);
    if (ON_LINUX && guard != ORCH_GUARD_CANARY) check_guards();
}

static int count_mappings(void) {
    FILE *maps = fopen("/proc/self/maps", "r");
    int lines = 0, c;
    if (!maps) return 0;
    while ((c = getc(maps)) != EOF) lines += c == '\n';
    fclose(maps);
    return lines;
}

// ---- guard, on systems that offer less

#if ON_LINUX
// Refuses what is given here, as an older kernel would: MADV_GUARD_INSTALL, and on request every
// mprotect of 16 KiB or more (the sanitizers' own are smaller).
static bool pretend_old_kernel(bool no_mprotect) {
    const unsigned refuse_einval = SECCOMP_RET_ERRNO | EINVAL,
                   refuse_nomem = SECCOMP_RET_ERRNO | ENOMEM;
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 102, 0, 7), // MADV_GUARD_INSTALL
        BPF_STMT(BPF_RET | BPF_K, refuse_einval),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 440, 0, 1), // process_madvise
        BPF_STMT(BPF_RET | BPF_K, refuse_einval),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, no_mprotect ? SYS_mprotect : UINT32_MAX, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 16384, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, refuse_nomem),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof code[0], code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return false;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}
#else
static bool pretend_old_kernel(bool no_mprotect) {
    (void)no_mprotect;
    return false;
}
#endif

static orch_result guards_by_mprotect(void *arg) {
    (void)arg;
    CHECK_INT(stats().guard, ORCH_GUARD_MPROTECT);
    check_guards();
    return orch_ok_int(1);
}

TEST_SKIP(an_older_kernel_gets_its_guards_by_mprotect, !ON_LINUX) {
    if (!pretend_old_kernel(false)) return;
    orch_result r = orch_run(guards_by_mprotect, NULL);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
}

static orch_result guards_by_canary(void *arg) {
    (void)arg;
    CHECK_INT(stats().guard, ORCH_GUARD_CANARY);
    CHECK_INT(join(orch_go(fill_most, &(int){0})), 1);
    return orch_ok_int(1);
}

TEST_SKIP(without_mprotect_a_canary_is_left, !ON_LINUX) {
    if (!pretend_old_kernel(true)) return;
    orch_result r = orch_run(guards_by_canary, NULL);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
}

// ---- overflow

static orch_result dive_too_deep(void *arg) {
    (void)arg;
    return orch_ok_int((intptr_t)dive_next(10 * DEEP));
}

PROBED static orch_result variable_frame(void *arg) {
    size_t size = *(size_t *)arg;
    volatile char frame[size];
    frame[0] = 1;
    frame[size - 1] = 1;
    return orch_ok_int(frame[0]);
}

static orch_result late_dive(void *arg) {
    orch_sleep(1);
    orch_yield();
    return dive_too_deep(arg);
}

static orch_result others_first(void *arg) {
    orch_task_desc *desc = arg;
    for (int i = 0; i < 3; i++) orch_detach(orch_go(rest, NULL));
    orch_result r = orch_await(orch_go_with(desc));
    return r;
}

static void overflow(orch_task_fn fn, void *arg) {
    orch_task_desc desc = {.name = "deep-diver", .fn = fn, .arg = arg};
    orch_result r = orch_run(others_first, &desc);
    orch_result_free(&r);
}

TEST_DIES(an_overflow_names_its_task, "deep-diver") { overflow(dive_too_deep, NULL); }

TEST_DIES(an_overflow_says_what_it_is, "stack overflow") { overflow(dive_too_deep, NULL); }

TEST_DIES(an_overflow_after_a_wait_names_its_task, "deep-diver") { overflow(late_dive, NULL); }

#ifndef __riscv // where gcc 12 does not probe
PROBED static orch_result large_frame(void *arg) {
    volatile char frame[100 * 1024]; // larger than the stack and than any guard
    (void)arg;
    frame[0] = 1;
    frame[sizeof frame - 1] = 1;
    return orch_ok_int(frame[0]);
}

TEST_DIES(a_large_frame_is_named_too, "deep-diver") { overflow(large_frame, NULL); }
#endif

TEST_DIES(a_large_frame_of_variable_size_is_named_too, "deep-diver") {
    size_t size = 150 * KIB;
    overflow(variable_frame, &size);
}

/* Over its own guard and others' stacks, into a guard: that of the second stack below, where guards
 * have 16 KiB; that of the first, where they have 64. */
static orch_result jump_far(void *arg) {
    volatile char here = 0;
    (void)arg;
    *(&here - 230 * KIB) = 1;
    return orch_ok_int(here);
}

static orch_result above_another(void *arg) {
    orch_task_desc other = {.name = "bystander", .fn = rest};
    orch_task_desc jumper = {.name = "deep-diver", .fn = jump_far};
    (void)arg;
    for (int i = 0; i < 3; i++) orch_detach(orch_go_with(&other)); // the first lie lowest
    orch_result r = orch_await(orch_go_with(&jumper));
    return r;
}

TEST_DIES(a_jump_into_anothers_guard_names_who_jumped, "deep-diver") {
    orch_result r = orch_run(above_another, NULL);
    orch_result_free(&r);
}

static orch_result fault_elsewhere(void *arg) {
    *(volatile char *)arg = 1;
    return orch_ok_int(1);
}

/* What a child says that dies of a fault in a task. Returns how it ended; 0: it did not die. */
static int last_words(char *text, size_t size) {
    int ends[2], status = 0;
    size_t length = 0;
    if (pipe(ends) != 0) return 0;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        overflow(fault_elsewhere, (void *)8);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t n = 1; n > 0 && length + 1 < size; length += n > 0 ? (size_t)n : 0) {
        n = read(ends[0], text + length, size - 1 - length);
    }
    text[length] = '\0';
    close(ends[0]);
    return waitpid(child, &status, 0) == child ? status : 0;
}

TEST(a_fault_that_hits_no_guard_is_no_overflow) {
    static char text[65536];
    CHECK(last_words(text, sizeof text) != 0);
    CHECK(strstr(text, "stack overflow") == NULL);
}

static orch_result overflow_small(void *arg) {
    (void)arg;
    orch_result r = orch_await(orch_go_with(
        &(orch_task_desc){.name = "deep-diver", .fn = dive_too_deep, .stack_size = 16 * KIB}));
    return r;
}

TEST_DIES(an_overflow_of_the_smallest_stack_is_named, "deep-diver") {
    orch_result r = orch_run(overflow_small, NULL);
    orch_result_free(&r);
}

static void *overflow_thread(void *arg) {
    (void)arg;
    overflow(dive_too_deep, NULL);
    return NULL;
}

static void in_thread(void *(*fn)(void *)) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, fn, NULL) == 0) pthread_join(thread, NULL);
}

TEST_DIES(an_overflow_in_another_thread_is_named, "deep-diver") { in_thread(overflow_thread); }

static void *free_own_loop(void *arg) {
    (void)arg;
    orch_result r = orch_run(own_stack_size, NULL);
    orch_result_free(&r);
    return NULL;
}

static orch_result overflow_beside_others(void *arg) {
    in_thread(free_own_loop); // its loop comes and goes while this one lives
    overflow_small(arg);
    return orch_ok_int(1);
}

TEST_DIES(the_end_of_another_loop_leaves_the_report_in_place, "deep-diver") {
    orch_result r = orch_run(overflow_beside_others, NULL);
    orch_result_free(&r);
}

static orch_result return_list(void *arg) {
    (void)arg;
    return orch_await(orch_all_settled(orch_go(own_stack_size, NULL)));
}

static orch_result free_older_then_overflow(void *arg) {
    orch_result_free(arg); // and with it what was left of the loop it came from
    return overflow_small(NULL);
}

static void *overflow_after_older(void *arg) {
    (void)arg;
    orch_result older = orch_run(return_list, NULL);
    orch_result r = orch_run(free_older_then_overflow, &older);
    orch_result_free(&r);
    return NULL;
}

TEST_DIES(the_last_of_an_older_loop_leaves_the_report_in_place, "deep-diver") {
    overflow_after_older(NULL);
}

TEST_DIES(and_so_it_is_in_another_thread, "deep-diver") { in_thread(overflow_after_older); }

TEST_DIES(the_second_loop_of_a_thread_reports_too, "deep-diver") {
    free_own_loop(NULL);
    overflow(dive_too_deep, NULL);
}

#ifndef TEST_EMULATED // qemu-user has no seccomp to pretend with
TEST_DIES(under_an_older_kernel_an_overflow_is_named, "deep-diver") {
    if (!pretend_old_kernel(false)) return;
    overflow(dive_too_deep, NULL);
}

static orch_result yield_often(void *arg) {
    (void)arg;
    for (int i = 0; i < 10; i++) orch_yield();
    return orch_ok_int(1);
}

// Overflows by a little, then waits. Below may be another stack, marked by the sanitizer.
UNCHECKED static orch_result overflow_then_wait(void *arg) {
    size_t size = orch_task_stack_size(orch_self()); // of it some is used above this frame
    volatile char frame[size];
    for (size_t i = 0; i < 4096; i++) frame[i] = (char)i;
    int error = orch_yield();
    return orch_ok_int(error + frame[1] + (arg != NULL));
}

TEST_DIES(with_a_canary_an_overflow_is_named_at_the_next_wait, "deep-diver") {
    if (!pretend_old_kernel(true)) return;
    overflow(overflow_then_wait, NULL);
}

// The first wait goes back to who started the task; a later one may go to the next ready task.
static orch_result overflow_then_yield(void *arg) {
    orch_yield();
    orch_detach(orch_go(yield_often, NULL));
    return overflow_then_wait(arg);
}

TEST_DIES(with_a_canary_an_overflow_is_named_at_a_later_wait, "deep-diver") {
    if (!pretend_old_kernel(true)) return;
    overflow(overflow_then_yield, NULL);
}
#endif

// ---- the overflow report and the program's own signal handling

static void own_handler(int signal_number) {
    static const char text[] = "the program's own handler\n";
    if (write(2, text, sizeof text - 1) < 0) abort();
    signal(signal_number, SIG_DFL); // and again, for good
}

static void install_own_handler(void) {
    static char stack[64 * 1024];
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = own_handler;
    action.sa_flags = SA_ONSTACK;
    sigaltstack(&(stack_t){.ss_sp = stack, .ss_size = sizeof stack}, NULL);
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
}

TEST_DIES(the_overflow_report_can_be_left_out, "the program's own handler") {
    install_own_handler();
    orch_loop_desc desc = {.no_overflow_report = true};
    orch_result r = orch_run_with(&desc, overflow_small, NULL);
    orch_result_free(&r);
}

static orch_result read_handler(void *arg) {
    sigaction(SIGSEGV, NULL, arg);
    return orch_ok_int(1);
}

TEST(left_out_it_installs_nothing) {
    struct sigaction seen, own;
    install_own_handler();
    sigaction(SIGSEGV, NULL, &own);
    orch_loop_desc desc = {.no_overflow_report = true};
    orch_result r = orch_run_with(&desc, read_handler, &seen);
    if (CHECK_INT(orch_int(&r), 1)) CHECK(seen.sa_handler == own.sa_handler);
    orch_result_free(&r);
}

static orch_result write_nowhere(void *arg) {
    (void)arg;
    volatile char *volatile nowhere = (volatile char *)(uintptr_t)8192;
    *nowhere = 1;
    return orch_ok_int(1);
}

TEST_DIES(another_fault_still_reaches_the_programs_handler, "the program's own handler") {
    install_own_handler();
    orch_result r = orch_run(write_nowhere, NULL);
    orch_result_free(&r);
}

TEST(no_signal_stack_is_left_behind_in_memory_that_was_freed) {
    stack_t stack[2];
    sigaltstack(NULL, &stack[0]);
    free_own_loop(NULL);
    sigaltstack(NULL, &stack[1]);
    CHECK_INT(stack[0].ss_flags, stack[1].ss_flags);
    CHECK((stack[0].ss_flags & SS_DISABLE) || stack[0].ss_sp == stack[1].ss_sp);
}

// ---- many, and again

static int many_done;

static orch_result many_task(void *arg) {
    (void)arg;
    int error = orch_sleep(10);
    many_done++;
    return error ? orch_fail(error) : orch_ok_int(1);
}

TASK_TEST(ten_thousand_tasks_sleep_side_by_side) {
    static orch_future *f[MANY];
    size_t stacks[2];
    const int many = test_shared->fail_at ? 500 : MANY; // a sweep repeats this often
    for (int round = 0; round < 2; round++) {
        many_done = 0;
        for (int i = 0; i < many; i++) {
            f[i] = orch_go(many_task, NULL);
            if (!CHECK(!orch_is_settled(f[i]))) return; // the end of main ends the others
        }
        CHECK_INT(stats().tasks, many + 1);
        CHECK_INT(many_done, 0);
        stacks[round] = stats().stacks;
        if (OWN_MAPPINGS && stats().guard == ORCH_GUARD_MADVISE) CHECK(count_mappings() < 1000);
        for (int i = 0; i < many; i++)
            if (!CHECK_INT(join(f[i]), 1)) many_done = -many;
        CHECK_INT(many_done, many);
        CHECK_INT(stats().tasks, 1);
    }
    CHECK(stacks[0] >= (size_t)many && stacks[0] < 2 * (size_t)many);
    CHECK_INT(stacks[1], stacks[0]); // all used again
}

static orch_result yield_once(void *arg) {
    int error = orch_yield();
    return error ? orch_fail(error) : orch_ok_int(arg == NULL);
}

// More often than there is room for in what a sanitizer keeps of each stack.
TASK_TEST(one_after_another_share_a_stack) {
    for (int i = 0; i < 3; i++) CHECK_INT(join(orch_go(yield_once, NULL)), 1);
    size_t before = stats().stacks;
    for (int i = 0; i < AGAIN; i++)
        if (!CHECK_INT(join(orch_go(own_stack_size, NULL)), 64 * KIB)) break;
    for (int i = 0; i < AGAIN; i++)
        if (!CHECK_INT(join(orch_go(yield_once, NULL)), 1)) break;
    CHECK_INT(stats().stacks, before);
    CHECK(before <= 64);
}

TASK_TEST(big_stacks_are_used_again_too) {
    unsigned depth = 10;
    for (int i = 0; i < 3; i++) CHECK_INT(join(go_sized(dive_task, &depth, 8 * MIB)), 11);
    size_t before = stats().stacks;
    for (int i = 0; i < 500; i++)
        if (!CHECK_INT(join(go_sized(dive_task, &depth, 8 * MIB)), 11)) break;
    CHECK_INT(stats().stacks, before);
}

// ---- what the compiler may believe about a suspending call

static int shared_step; // its address is never taken: only the switch itself can say it changed

static orch_result stepper(void *arg) {
    (void)arg;
    do shared_step++;
    while (orch_yield() == 0);
    return orch_ok_int(1);
}

static orch_result one_step(void *arg) {
    shared_step++;
    return orch_ok_int((intptr_t)(arg != NULL));
}

TASK_TEST(a_static_changed_by_another_task_is_seen_at_once) {
    int seen;
    orch_future *f = orch_go(stepper, NULL); // one step at its start
    if (orch_is_settled(f)) {
        orch_drop(f);
        return;
    }
    seen = shared_step;
    CHECK_INT(seen, 1);
    orch_yield();
    CHECK(shared_step == seen + 1);
    seen = shared_step;
    orch_sleep(1);
    CHECK(shared_step > seen);
    seen = shared_step;
    orch_result r = orch_await(orch_after(1));
    CHECK(shared_step > seen);
    orch_result_free(&r);
    seen = shared_step;
    orch_future *later = orch_after(1);
    orch_wait(later);
    CHECK(shared_step > seen);
    orch_drop(later);
    seen = shared_step;
    orch_future *child = orch_go(one_step, NULL); // runs inside this call
    CHECK(shared_step == seen + 1);
    orch_drop(child);
    seen = shared_step;
    CHECK_INT(orch_spawn(one_step, NULL), 0);
    CHECK(shared_step == seen + 1);
    orch_drop(f);
}

static orch_result step_at_end(void *arg) {
    (void)arg;
    orch_sleep(10000);
    orch_shield_begin();
    orch_yield();
    shared_step++;
    orch_shield_end();
    return orch_ok_int(1);
}

TASK_TEST(a_static_changed_during_a_drop_is_seen_at_once) {
    orch_future *f = orch_go(step_at_end, NULL);
    if (orch_is_settled(f)) {
        orch_drop(f);
        return;
    }
    int seen = shared_step;
    orch_drop(f);
    CHECK(shared_step == seen + 1);
}

static void *step_on_main(void *arg) {
    shared_step++;
    return arg;
}

TASK_TEST(a_static_changed_on_the_main_stack_is_seen_at_once) {
    int seen = shared_step;
    orch_on_main_stack(step_on_main, NULL);
    CHECK(shared_step == seen + 1);
}

// ---- the main stack

static void *where(void *arg) {
    *(uintptr_t *)arg = here();
    return arg;
}

static orch_result check_where(void *arg) {
    uintptr_t there = 0, own = here(), size = orch_task_stack_size(orch_self());
    CHECK(orch_on_main_stack(where, &there) == &there); // what fn returns
    CHECK(there < own - size || there > own + size);
    uintptr_t main_stack = *(uintptr_t *)arg;
    uintptr_t apart = main_stack > there ? main_stack - there : there - main_stack;
    CHECK(apart < 1 << 20);
    return orch_ok_int(1);
}

static orch_result nest_where(void *arg) {
    static int level;
    if (++level == 4) return check_where(arg);
    orch_result r = check_where(arg); // before, inside and after a child
    orch_result_free(&r);
    orch_result child = orch_await(orch_go(nest_where, arg));
    orch_result_free(&child);
    return check_where(arg);
}

TEST(the_main_stack_is_the_threads_own) {
    uintptr_t main_stack = here();
    orch_result r = orch_run(nest_where, &main_stack);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
}

static void *big_frame(void *arg) {
    volatile char frame[1024 * 1024];
    for (size_t i = 0; i < sizeof frame; i += 512) frame[i] = 2;
    *(int *)arg = frame[512];
    return arg;
}

static orch_result call_big_frame(void *arg) {
    int got = 0;
    for (int i = 0; i < 3; i++) {
        got = 0;
        orch_on_main_stack(big_frame, &got);
        if (got != 2) break;
        orch_yield();
    }
    (void)arg;
    return orch_ok_int(got);
}

TASK_TEST(the_main_stack_has_room_for_a_big_frame) {
    orch_future *f[5];
    for (int i = 0; i < 5; i++) f[i] = go_sized(call_big_frame, NULL, 16 * KIB);
    for (int i = 0; i < 5; i++) CHECK_INT(join(f[i]), 2);
}

static void *again(void *arg) {
    uintptr_t inner = 0;
    void *back = orch_on_main_stack(where, &inner);
    return back == &inner ? arg : NULL;
}

TASK_TEST(calls_to_the_main_stack_nest) {
    int token = 0;
    CHECK(orch_on_main_stack(again, &token) == &token);
    CHECK(orch_on_main_stack(again, NULL) == NULL);
}

TEST(outside_a_task_the_main_stack_is_a_plain_call) {
    uintptr_t there = 0;
    CHECK(orch_on_main_stack(where, &there) == &there); // no loop at all
    CHECK(there != 0);
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    there = 0;
    CHECK(orch_on_main_stack(where, &there) == &there);
    CHECK(there != 0);
    CHECK_INT(orch_loop_free(loop), 0);
}

static orch_promise main_stack_ticket;

static void *settle_from_main(void *arg) {
    orch_settle(main_stack_ticket, orch_ok_int(9));
    return arg;
}

static orch_result await_gate(void *arg) { return orch_await(arg); }

TASK_TEST(the_library_can_be_used_on_the_main_stack) {
    orch_future *waiter = orch_go(await_gate, orch_future_new(&main_stack_ticket));
    orch_on_main_stack(settle_from_main, NULL);
    CHECK_INT(join(waiter), 9);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
