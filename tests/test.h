// test.h - cases that register themselves; each runs in a forked child with a time limit.
//     TEST(name) { CHECK(1 + 1 == 2); }          a failed CHECK is counted and the case goes on
//     TEST_DIES(name, "text on stderr") { ... }  passes when a signal or sanitizer ends it so
//     TEST_SKIP(name, condition) { ... }         counted as skipped when the condition holds
//     int main(int argc, char **argv) { return test_main(argc, argv); }
// Compiled with -std=gnu99. program --list; program --sweep [name]: see refuse.h; program name:
// that case here, for gdb (make DEBUG=-g): TEST_FAIL_AT=17 refuses the 17th allocation, 17+ later
// ones too. TEST_TIME=3 triples the time limit of 5 s.
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct test_case {
    const char *name, *dies; // dies: the text it dies with, or NULL
    void (*fn)(void);
    bool (*skip)(void);
    struct test_case *next;
} test_case;
static volatile struct test_page { // shared with the child; armed: while the case runs
    long armed, count, fail_at, and_later, refused, heap, start;
} * test_shared;
static test_case *test_first, **test_tail = &test_first;
static volatile int test_failures; // volatile: tasks change it behind the compiler's back

#define TEST_CASE(id, text, skip_if)                                                               \
    static void case_##id(void);                                                                   \
    __attribute__((constructor)) static void add_##id(void) {                                      \
        static test_case entry = {#id, text, case_##id, skip_if, NULL};                            \
        *test_tail = &entry, test_tail = &entry.next;                                              \
    }                                                                                              \
    static void case_##id(void)
#define TEST(id) TEST_CASE(id, NULL, NULL)
#define TEST_DIES(id, text) TEST_CASE(id, text, NULL)
#define TEST_SKIP(id, condition)                                                                   \
    static bool skip_##id(void) { return (condition); }                                            \
    TEST_CASE(id, NULL, skip_##id)
#define CHECK(condition) test_say(!!(condition), __FILE__, __LINE__, "%s\n", #condition)
#define CHECK_INT(got, want) test_int((long long)(got), (long long)(want), #got, __FILE__, __LINE__)
#define CHECK_STR(got, want) test_str((got), (want), #got, __FILE__, __LINE__)

static inline bool test_say(bool held, const char *file, int line, const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (!held) fprintf(stderr, "%s:%d: ", file, line), vfprintf(stderr, format, args);
    test_failures += !held;
    va_end(args);
    return held;
}
static inline bool test_int(long long got, long long want, const char *what, const char *file,
                            int line) {
    return test_say(got == want, file, line, "%s is %lld, not %lld\n", what, got, want);
}
static inline bool test_str(const char *got, const char *want, const char *what, const char *file,
                            int line) {
    got = got ? got : "NULL", want = want ? want : "NULL";
    return test_say(!strcmp(got, want), file, line, "%s is \"%s\", not \"%s\"\n", what, got, want);
}

#include "refuse.h"
static __attribute__((noinline)) void test_scrub(void) { // what dead frames hold hides leaks
    for (volatile char space[8192], *p = space; p < space + sizeof space; p++) *p = 0;
}
static inline int test_body(const test_case *c, long fail_at, bool and_later) {
    *test_shared = (struct test_page){1, 0, fail_at, and_later, 0, test_heap(), 0};
    c->fn(), test_scrub();
    test_shared->armed = 0;
    return test_failures ? 10 : 0; // 10: nothing worse than a failed CHECK
}
static inline bool test_run(const test_case *c, long fail_at, bool and_later) {
    static char text[1 << 16];
    long seconds = 5 * (getenv("TEST_TIME") ? atol(getenv("TEST_TIME")) : 1);
    FILE *out = tmpfile();
    int status = 0;
    pid_t pid = out && !fflush(NULL) ? fork() : -1;
    if (pid == 0) {
        setpgid(0, 0);
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){1 << 26, 1 << 26}); // an endless loop may print
        if (dup2(fileno(out), 1) < 0 || dup2(fileno(out), 2) < 0 || fclose(out)) abort();
        alarm((unsigned)seconds);
        exit(test_end(test_body(c, fail_at, and_later))); // leak check and coverage run here
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid) abort();
    kill(-pid, SIGKILL); // what the case left running
    ssize_t size = pread(fileno(out), text, sizeof text - 1, 0);
    text[size > 0 ? size : 0] = '\0', fclose(out);
    int by = WIFSIGNALED(status) ? WTERMSIG(status) : 0, code = by ? 0 : WEXITSTATUS(status);
    bool died = by != SIGALRM && (by || (code != 0 && code != 10));
    bool whole = !by && !test_shared->armed && (code == 0 || (code == 10 && test_shared->refused));
    if (c->dies ? died && strstr(text, c->dies) : whole) return true;
    printf("FAILED %s: ", c->name);
    if (fail_at) printf("TEST_FAIL_AT=%ld%s: ", fail_at, and_later ? "+" : "");
    if (by) printf("killed by signal %d%s\n", by, by == SIGALRM ? " (too slow)" : "");
    else printf("exit code %d\n", code);
    printf("%.9999s\n", text);
    return false;
}
static inline int test_main(int argc, char **argv) {
    unsigned count[3] = {0, 0, 0}; // passed, failed, skipped
    const char *mode = argc > 1 ? argv[1] : "", *at = getenv("TEST_FAIL_AT");
    bool list = !strcmp(mode, "--list"), sweep = !strcmp(mode, "--sweep");
    const char *only = argc > 1 && !list && !sweep ? mode : argc > 2 ? argv[2] : NULL;
    test_shared = mmap(NULL, sizeof *test_shared, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (const test_case *c = test_first; c; c = c->next) {
        if (only && strcmp(only, c->name)) continue;
        if (list) puts(c->name);
        else if (only && !sweep) return test_body(c, at ? atol(at) : 0, at && strchr(at, '+'));
        else if (c->skip && c->skip()) count[2]++, printf("skipped %s\n", c->name);
        else if (!sweep || !c->dies) count[sweep ? !test_sweep(c) : !test_run(c, 0, false)]++;
    }
    if (!list) printf("%u passed, %u failed", count[0], count[1]);
    if (!list) printf(count[2] ? ", %u skipped\n" : "\n", count[2]);
    return !list && (count[1] > 0 || (only && count[0] == 0));
}
