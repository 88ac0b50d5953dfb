// test_platform.c: what the library takes from the processor, the compiler and the system: the
// clock, aligned stacks, registers and floating point control kept per task, backtraces that end.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../asyncorch.h"
#include "test.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

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

TEST(the_version_is_three_numbers) {
    int major = -1, minor = -1, patch = -1, end = 0;
    sscanf(ORCH_VERSION, "%d.%d.%d%n", &major, &minor, &patch, &end);
    CHECK(major >= 0 && minor >= 0 && patch >= 0);
    CHECK_INT(strlen(ORCH_VERSION), end);
}

TEST(tickets_are_small) {
    CHECK(sizeof(orch_promise) <= 16); // passed by value
    CHECK(sizeof(orch_result) <= 5 * sizeof(void *));
}

// ---- clock

static uint64_t system_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

TEST(the_clock_is_monotonic_and_in_milliseconds) {
    uint64_t outer = system_ms(), first = orch_now();
    uint64_t last = first;
    for (int i = 0; i < 5; i++) {
        nanosleep(&(struct timespec){0, 3000000}, NULL);
        CHECK(orch_now() >= last);
        last = orch_now();
    }
    uint64_t outer_took = system_ms() - outer;
    CHECK(last - first >= 14);             // 15 ms were slept, less what rounding takes
    CHECK(last - first <= outer_took + 1); // and it does not run faster than the system's
}

static orch_result clock_in_task(void *arg) {
    uint64_t *seen = arg;
    seen[0] = orch_now();
    orch_sleep(3);
    seen[1] = orch_now();
    return orch_ok_int(1);
}

TEST(the_clock_is_the_same_inside_and_outside_a_loop) {
    uint64_t seen[2] = {0, 0}, before = orch_now();
    orch_result r = orch_run(clock_in_task, seen);
    uint64_t after = orch_now();
    if (CHECK_INT(orch_int(&r), 1))
        CHECK(before <= seen[0] && seen[0] < seen[1] && seen[1] <= after);
    orch_result_free(&r);
}

// ---- stack alignment

static int misaligned;

static void note_alignment(void) {
    // The compiler relies on the caller for this alignment, so a wrong stack shows in the address.
    __attribute__((aligned(16))) volatile char local[16];
    char text[32];
    volatile double number = 2.5;
    local[0] = 1;
    if ((uintptr_t)local % 16 != 0) misaligned++;
    snprintf(text, sizeof text, "%.1f", number); // saves vector registers with aligned stores
    if (strcmp(text, "2.5") != 0) misaligned++;
}

static orch_result align_task(void *arg) {
    if ((uintptr_t)arg % (2 * sizeof(void *)) != 0) misaligned++; // the copied argument
    note_alignment();
    orch_yield();
    note_alignment();
    return orch_ok_int(1);
}

TASK_TEST(stacks_are_aligned_whatever_is_copied_to_them) {
    static char copied[300];
    for (size_t size = 1; size < sizeof copied; size += 1 + size / 8) {
        orch_task_desc desc = {.fn = align_task, .arg = copied, .arg_size = size};
        orch_result r = orch_await(orch_go_with(&desc));
        CHECK_INT(orch_int(&r), 1);
        orch_result_free(&r);
    }
    CHECK_INT(misaligned, 0);
}

// ---- registers

static void *nothing(void *arg) { return arg; }

static void wait_somehow(int i) {
    if (i % 3 == 0) orch_yield();
    if (i % 3 == 1) orch_on_main_stack(nothing, NULL);
    if (i % 50 == 2) orch_sleep(0);
}

// More values than there are registers, all alive over the waits: each in a register that the
// switch must keep, or in this frame.
static intptr_t hold_values(uint64_t seed, void (*between)(int)) {
    uint64_t a = seed + 1, b = seed + 2, c = seed + 3, d = seed + 4, e = seed + 5, f = seed + 6;
    double p = (double)a, q = (double)b, r = (double)c, s = (double)d, t = (double)e;
    double u = (double)f, v = 7, w = 8;
    for (int i = 0; i < 100; i++) {
        between(i);
        a += b, b += c, c += d, d += e, e += f, f += 1;
        p += q, q += r, r += s, s += t, t += u, u += v, v += w, w += 1;
    }
    double sum = p + q + r + s + t + u + v + w;
    return (intptr_t)((a ^ b ^ c ^ d ^ e ^ f) + (uint64_t)(sum / 1e6));
}

static void no_wait(int i) { (void)i; }

static orch_result hold_task(void *arg) {
    return orch_ok_int(hold_values(*(uint64_t *)arg, wait_somehow));
}

TASK_TEST(registers_are_kept_over_a_switch) {
    static uint64_t seeds[8];
    orch_future *f[8];
    for (uint64_t i = 0; i < 8; i++) {
        seeds[i] = i * 1000003;
        f[i] = orch_go(hold_task, &seeds[i]);
    }
    for (int i = 0; i < 8; i++) {
        orch_result r = orch_await(f[i]);
        CHECK_INT(orch_int(&r), hold_values(seeds[i], no_wait));
        orch_result_free(&r);
    }
}

// ---- floating point control

#if defined(__x86_64__) // 32-bit x86 has ucontext, which leaves MXCSR alone
#define HAS_CONTROL true
#define ROUND_UP 2
// Each unit has a control word of its own: rounding, and flush to zero or precision. Even kinds set
// that of SSE, odd ones that of the x87.
static void control_set(unsigned mode, unsigned kind) {
    unsigned csr;
    unsigned short word;
    __asm__ volatile("stmxcsr %0" : "=m"(csr));
    __asm__ volatile("fnstcw %0" : "=m"(word));
    if (kind % 2 == 0) csr = (csr & ~0xe000u) | mode << 13 | (mode & 1) << 15;
    else word = (unsigned short)((word & ~0x0f00u) | mode << 10 | (mode == 0 ? 3u : 2u) << 8);
    __asm__ volatile("ldmxcsr %0" : : "m"(csr));
    __asm__ volatile("fldcw %0" : : "m"(word));
}
static unsigned control_get(void) {
    unsigned csr;
    unsigned short word;
    __asm__ volatile("stmxcsr %0" : "=m"(csr));
    __asm__ volatile("fnstcw %0" : "=m"(word));
    return (csr & 0xe000u) | ((unsigned)word & 0x0f00u);
}
#elif defined(__aarch64__)
#define HAS_CONTROL true
#define ROUND_UP 1
static void control_set(unsigned mode, unsigned kind) {
    (void)kind;
    __asm__ volatile("msr fpcr, %0" : : "r"((unsigned long)mode << 22));
}
static unsigned control_get(void) {
    unsigned long word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    return (unsigned)word;
}
#elif defined(__riscv) && defined(__riscv_flen)
#define HAS_CONTROL true
#define ROUND_UP 3
static void control_set(unsigned mode, unsigned kind) {
    (void)kind;
    __asm__ volatile("fsrm %0" : : "r"((unsigned long)mode));
}
static unsigned control_get(void) {
    unsigned long word;
    __asm__ volatile("frrm %0" : "=r"(word));
    return (unsigned)word;
}
#else
#define HAS_CONTROL false
#define ROUND_UP 0
static void control_set(unsigned mode, unsigned kind) {
    (void)mode;
    (void)kind;
}
static unsigned control_get(void) { return 0; }
#endif

static int control_lost;

static orch_result control_task(void *arg) {
    unsigned number = *(unsigned *)arg;
    control_set(number % 4, number / 4);
    unsigned mine = control_get();
    for (int i = 0; i < 10; i++) {
        if (i % 2) orch_yield();
        else orch_sleep(1);
        if (control_get() != mine) control_lost++;
        orch_on_main_stack(nothing, NULL);
        if (control_get() != mine) control_lost++;
    }
    return orch_ok_int(1);
}

static orch_result control_main(void *arg) {
    (void)arg;
    static unsigned numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    orch_future *f[8];
    control_set(2, 0);
    unsigned mine = control_get();
    for (int i = 0; i < 8; i++) {
        f[i] = orch_go(control_task, &numbers[i]);
        if (control_get() != mine) control_lost++; // a child that starts inside this call
    }
    for (int i = 0; i < 8; i++) {
        orch_result r = orch_await(f[i]);
        CHECK_INT(orch_int(&r), 1);
        orch_result_free(&r);
        if (control_get() != mine) control_lost++;
    }
    return orch_ok_int(1);
}

TEST_SKIP(floating_point_control_is_kept_per_task, !HAS_CONTROL) {
    unsigned before = control_get();
    orch_result r = orch_run(control_main, NULL);
    CHECK(control_get() == before); // nor does it leak into the thread
    CHECK_INT(orch_int(&r), 1);
    CHECK_INT(control_lost, 0);
    for (unsigned kind = 0; kind < 2; kind++) {
        control_set(1, kind);
        CHECK(before != control_get()); // the instrument itself works
        control_set(0, kind);
    }
    orch_result_free(&r);
}

static volatile double one = 1, three = 3, third_now;

// Volatile, so that the division stays where it is among the settings.
static double divide(void) {
    third_now = one / three;
    return third_now;
}

static orch_result round_task(void *arg) {
    double *third = arg;
    control_set(ROUND_UP, 0);
    control_set(ROUND_UP, 1);
    third[0] = divide();
    orch_yield();
    third[1] = divide();
    control_set(0, 0);
    control_set(0, 1);
    return orch_ok_int(1);
}

TEST_SKIP(a_rounding_mode_does_not_reach_other_tasks, !HAS_CONTROL) {
    double there[2] = {0, 0}, here = divide();
    orch_result r = orch_run(round_task, there);
    CHECK(there[0] == there[1]);
    control_set(ROUND_UP, 0); // an emulator may round to the nearest, whatever it is told
    control_set(ROUND_UP, 1);
    double up = divide();
    control_set(0, 0);
    control_set(0, 1);
    if (CHECK_INT(orch_int(&r), 1)) CHECK(there[0] == up); // the nearest to 1/3 is below it
    CHECK(divide() == here);
    orch_result_free(&r);
}

// ---- backtraces

// The C library's makecontext marks the end of a stack on some processors only.
#if defined(__linux__) && defined(__GLIBC__) &&                                                    \
    (defined(__x86_64__) || defined(__aarch64__) || defined(__riscv))
#define HAS_BACKTRACE true
#include <elf.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>

typedef struct frames {
    void *at[256];
    int count;
} frames;

// The name of the function of this program that holds an address, from the program's own symbol
// table: most of what is wanted is static, which backtrace_symbols cannot name. Result: static.
static const char *function_at(const char *image, const void *address) {
    const ElfW(Ehdr) *head = (const void *)image;
    const ElfW(Shdr) *sections = (const void *)(image + head->e_shoff);
    for (int s = 0; s < head->e_shnum; s++) {
        if (sections[s].sh_type != SHT_SYMTAB) continue;
        const ElfW(Sym) *symbols = (const void *)(image + sections[s].sh_offset);
        const char *names = image + sections[sections[s].sh_link].sh_offset;
        size_t count = sections[s].sh_size / sizeof *symbols;
        uintptr_t bias = 0;
        for (size_t i = 0; i < count; i++)
            if (!strcmp(names + symbols[i].st_name, "orch_now"))
                bias = (uintptr_t)orch_now - (uintptr_t)symbols[i].st_value;
        uintptr_t offset = (uintptr_t)address - 1 - bias; // a return address is behind its call
        const ElfW(Sym) *best = NULL;
        for (size_t i = 0; i < count; i++) {
            int type = symbols[i].st_info & 15;
            if ((type != STT_FUNC && type != STT_NOTYPE) || symbols[i].st_shndx == SHN_UNDEF)
                continue;
            if (symbols[i].st_value > offset || names[symbols[i].st_name] == '\0') continue;
            if (names[symbols[i].st_name] == '$' || names[symbols[i].st_name] == '.') continue;
            if (!best || symbols[i].st_value >= best->st_value) best = &symbols[i];
        }
        return best && offset - best->st_value < 1 << 16 ? names + best->st_name : "";
    }
    return "";
}

static const char *program_image(void) {
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    struct stat info;
    void *image = MAP_FAILED;
    if (fd >= 0 && fstat(fd, &info) == 0)
        image = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (fd >= 0) close(fd);
    return image == MAP_FAILED ? NULL : image; // stays: the process ends with the case
}

typedef int (*depth_fn)(int depth, frames *out);
static int trace_at_depth(int depth, frames *out);
static depth_fn volatile trace_next = trace_at_depth; // unknown to the compiler: nothing is inlined

static int trace_at_depth(int depth, frames *out) {
    int below = 0;
    if (depth == 0) out->count = backtrace(out->at, 256);
    else below = trace_next(depth - 1, out);
    __asm__ volatile("" : "+r"(below)); // no tail call
    return below + 1;
}

typedef struct trace {
    frames first[4], later[4]; // at depths 0 to 3, before and after a wait
} trace;

static orch_result trace_task(void *arg) {
    trace *t = arg;
    for (int depth = 0; depth < 4; depth++) trace_next(depth, &t->first[depth]);
    orch_sleep(1);
    for (int depth = 0; depth < 4; depth++) trace_next(depth, &t->later[depth]);
    return orch_ok_int(1);
}

// The outermost frame inside this program: behind it only the system's own entry may come.
static const char *outermost(const char *image, const frames *f) {
    const char *name = "";
    for (int i = 0; i < f->count; i++)
        if (function_at(image, f->at[i])[0] != '\0') name = function_at(image, f->at[i]);
    return name;
}

static int times_in(const char *image, const frames *f, const char *name) {
    int times = 0;
    for (int i = 0; i < f->count; i++) times += !strcmp(function_at(image, f->at[i]), name);
    return times;
}

static void check_trace(const char *image, const frames *f, int depth) {
    CHECK(f->count > depth && f->count < 64); // it ended
    CHECK(!strncmp(outermost(image, f), "orchi_", 6));
    CHECK_INT(times_in(image, f, "trace_at_depth"), depth + 1);
    CHECK_INT(times_in(image, f, "trace_task"), 1);
    CHECK_INT(times_in(image, f, "starter"), 0); // who started or resumed it is not part of it
    CHECK_INT(times_in(image, f, "test_body"), 0);
}

static orch_result starter(void *arg) {
    orch_result r = orch_await(orch_go(trace_task, arg)); // from a task: nested at its start
    return r;
}

static void check_traces(const trace *t) {
    const char *image = program_image();
    if (!image) return;
    bool named = !strcmp(function_at(image, (const char *)(uintptr_t)orch_now + 1), "orch_now");
    for (int depth = 0; depth < 4; depth++) {
        CHECK_INT(t->first[depth].count, t->first[0].count + depth);
        CHECK_INT(t->later[depth].count, t->first[depth].count); // whoever resumed it
        if (!named) continue;                                    // stripped
        check_trace(image, &t->first[depth], depth);
        check_trace(image, &t->later[depth], depth);
    }
}

static trace traced;

static bool ready_to_trace(void) { // the first call loads a library: on the big stack, please
    void *at[2];
    return backtrace(at, 2) > 0;
}
#else
#define HAS_BACKTRACE false
typedef struct trace {
    int none;
} trace;
static trace traced;
static orch_result starter(void *arg) {
    (void)arg;
    return orch_fail(ORCH_EINVAL);
}
static orch_result trace_task(void *arg) { return starter(arg); }
static void check_traces(const trace *t) { (void)t; }
static bool ready_to_trace(void) { return true; }
#endif

TEST_SKIP(a_backtrace_of_the_main_task_ends_at_its_entry, !HAS_BACKTRACE) {
    CHECK(ready_to_trace());
    orch_result r = orch_run(trace_task, &traced);
    if (CHECK_INT(orch_int(&r), 1)) check_traces(&traced);
    orch_result_free(&r);
}

TEST_SKIP(a_backtrace_of_a_nested_task_ends_at_its_entry, !HAS_BACKTRACE) {
    CHECK(ready_to_trace());
    orch_result r = orch_run(starter, &traced);
    if (CHECK_INT(orch_int(&r), 1)) check_traces(&traced);
    orch_result_free(&r);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
