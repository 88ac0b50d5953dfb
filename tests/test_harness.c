// The harness itself. Half of these cases fail on purpose: tests/run_harness.sh runs them from
// outside and compares what the harness says with what it should say. The volatile pointers keep
// compilers from leaving out a malloc whose result is only freed.
#include "test.h"

static void *volatile harness_keep; // volatile: a leak must not be optimised away

TEST(good) {
    CHECK(1 + 1 == 2);
    CHECK_INT(1 + 1, 2);
    CHECK_STR("two", "two");
    CHECK_STR(NULL, NULL);
}

TEST(bad_check) {
    CHECK(!CHECK(1 + 1 == 3)); // says so, and goes on
    CHECK_INT(1 + 1, 4);
    CHECK_STR("two", NULL);
}

TEST(bad_hang) {
    for (;;) pause();
}

TEST(bad_child_left) {
    pid_t child = fork(); // the harness ends it, and does not wait for it
    if (child == 0)
        for (;;) pause();
    printf("left running: %ld\n", (long)child), fflush(stdout);
    abort();
}

TEST(bad_flood) {
    for (;;) printf("and so on ");
}

TEST(bad_crash) { raise(SIGSEGV); }

TEST(bad_exit) {
    exit(0); // a case that never came to its end has not passed
}

TEST(bad_leak) {
    harness_keep = malloc(100);
    harness_keep = NULL;
}

TEST(bad_overrun) {
    char *p = malloc(4);
    if (p) p[4] = 1;
    harness_keep = p;
    free(p);
}

TEST_DIES(good_dies, "last words") {
    fprintf(stderr, "some last words\n");
    abort();
}

TEST_DIES(bad_dies_otherwise, "last words") { abort(); }

TEST_DIES(bad_lives_on, "last words") { fprintf(stderr, "some last words\n"); }

TEST_DIES(bad_dies_of_a_check, "last words") { CHECK_STR("none", "last words"); }

TEST_SKIP(skipped_case, true) { CHECK(false); }

TEST_SKIP(good_unskipped, false) { CHECK(true); }

// What the sweep should find. Without a refusal all of these pass.

TEST(good_sweep) {
    void *volatile a = malloc(10), *volatile b = calloc(1, 10), *volatile c = realloc(NULL, 10);
    void *d = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(a && b && c);
    if (CHECK(d != MAP_FAILED)) munmap(d, 4096);
    free(a);
    free(b);
    free(c);
}

TEST(sweep_leak) {
    void *volatile a = malloc(10), *volatile b = malloc(10);
    if (CHECK(b)) free(a); // the second refused: the first leaks
    free(b);
}

TEST(sweep_crash_late) {
    char *volatile p[30];
    for (int i = 0; i < 30; i++) p[i] = malloc(8);
    p[20][0] = 1;
    for (int i = 0; i < 30; i++) free(p[i]);
}

TEST(sweep_hang_persistent) {
    void *volatile p = malloc(8), *volatile q = malloc(8);
    while (!q && !p) pause(); // only when both are refused
    free(p);
    free(q);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
