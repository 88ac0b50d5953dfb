// refuse.h - the allocation-failure sweep of test.h.
//
// Each case runs with its Nth allocation refused, N = 1, 2, ... until none was, and again with all
// from the Nth on refused (unless it asked for none after the Nth: that would be the same run). A
// failed CHECK is no failure then; a crash, a sanitizer's report, a leak or a hang is. Cases of
// more than 10,000 allocations are swept at N = 1..200 and 200 points spread over the rest;
// TEST_SWEEP=50 makes that 50 and 50 for cases of more than 100. A case that calls test_start() is
// swept from there: what cases of the upper layers ask for to have a loop and its main task is
// refused in all cases of the core.
//
// It needs a linker with --wrap: build with -DTEST_WRAP and
// -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=mmap; without them every case just runs.
// Only calls of the test program itself are counted, not those inside the C library.

#include <limits.h>

static inline bool test_run(const test_case *c, long fail_at, bool and_later);

static long test_left; // on the heap after the case's first run, in bytes: what the library keeps

static inline void test_start(void) {
    if (test_shared->start == 0) test_shared->start = test_shared->count;
}

static inline bool test_sweep(const test_case *c) {
    static bool asked[20000]; // for more, after the refused one, at this step
    long points = getenv("TEST_SWEEP") ? atol(getenv("TEST_SWEEP")) : 0;
    long most = points > 0 ? 2 * points : 10000, head = points > 0 ? points : 200;
    if (!test_run(c, LONG_MAX, false)) return false; // none is refused, but it knows of the sweep
    test_left = test_shared->heap;
    const long start = test_shared->start + 1, total = test_shared->count - test_shared->start;
    long far = total > most ? 1 + (total - head) / head : 1, steps = 0, refused = 1;
    for (long n = start; refused && steps < 20000; n += n - start < head - 1 ? 1 : far) {
        if (!test_run(c, n, false)) return false;
        refused = test_shared->refused;
        asked[steps++] = test_shared->count > n;
    }
    for (long n = start, step = 0; step < steps; n += n - start < head - 1 ? 1 : far)
        if (asked[step++] && !test_run(c, n, true)) return false;
    return true;
}

// What is on the heap now, in bytes, as AddressSanitizer counts it; 0 without it.
size_t __sanitizer_get_current_allocated_bytes(void) __attribute__((weak));

static inline long test_heap(void) {
    return __sanitizer_get_current_allocated_bytes == NULL
               ? 0
               : (long)__sanitizer_get_current_allocated_bytes();
}

#ifdef __linux__
#include <link.h>

// A leak check looks for pointers in all static memory, and most of that are the tables of the
// sanitizers' own libraries: each page of them is a page fault in each child, which together take
// longer than the case. So it is given the memory of the program and of the other libraries.
void __lsan_register_root_region(const void *start, size_t size) __attribute__((weak));
const char *__lsan_default_options(void);
const char *__lsan_default_options(void) { return "use_globals=0"; }

static int test_root(struct dl_phdr_info *module, size_t size, void *user) {
    (void)size, (void)user;
    if (strstr(module->dlpi_name, "san.so") != NULL) return 0;
    for (int i = 0; i < module->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &module->dlpi_phdr[i];
        const char *start = (const char *)module->dlpi_addr + part->p_vaddr;
        if (part->p_type == PT_LOAD && (part->p_flags & PF_W) != 0)
            __lsan_register_root_region(start, part->p_memsz);
    }
    return 0;
}

// At the exit, before the check, as libraries may be loaded until then.
static void test_roots(void) { dl_iterate_phdr(test_root, NULL); }

__attribute__((constructor)) static void test_roots_at_exit(void) {
    if (__lsan_register_root_region != NULL) atexit(test_roots);
}
#endif

// The end of a child. The leak check takes as long as the rest of a swept case; so it is
// left out where the heap is as it was before the case, or as the first run left it, which was
// checked: nothing can have leaked then.
static inline int test_end(int code) {
    long left = test_heap() - test_shared->heap;
    bool first = test_shared->fail_at == 0 || test_shared->fail_at == LONG_MAX;
    test_shared->heap = left;
    if (first || test_heap() == 0 || (left != 0 && left != test_left)) return code;
    fflush(NULL);
    _exit(code);
}

#ifdef TEST_WRAP
#include <errno.h>

static bool test_refuse(void) {
    if (!test_shared || !test_shared->armed) return false;
    long n = __atomic_add_fetch(&test_shared->count, 1, __ATOMIC_RELAXED);
    long at = test_shared->fail_at;
    if (at == 0 || n < at || (n > at && !test_shared->and_later)) return false;
    test_shared->refused++;
    errno = ENOMEM;
    return true;
}

// The names are ld's: a call of malloc arrives at __wrap_malloc, the C library's is __real_malloc.
void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_malloc(size_t size) { return test_refuse() ? NULL : __real_malloc(size); }

void *__real_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size) {
    return test_refuse() ? NULL : __real_calloc(count, size);
}

void *__real_realloc(void *old, size_t size);
void *__wrap_realloc(void *old, size_t size);
void *__wrap_realloc(void *old, size_t size) {
    return test_refuse() ? NULL : __real_realloc(old, size);
}

void *__real_mmap(void *at, size_t size, int access, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t size, int access, int flags, int fd, off_t offset);
void *__wrap_mmap(void *at, size_t size, int access, int flags, int fd, off_t offset) {
    return test_refuse() ? MAP_FAILED : __real_mmap(at, size, access, flags, fd, offset);
}
#endif

// What the sanitizers' run times ask for: SIZE_MAX bytes are refused and not a bug of the caller.
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "allocator_may_return_null=1"; }
const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void) { return "print_stacktrace=1"; }
