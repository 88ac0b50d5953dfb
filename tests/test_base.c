// test_base.c: error codes, results, the allocator hook, slots and the order of the ready ring.
#include "../asyncorch.h"
#include "test.h"

#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static int released;
static void *released_last;

static void count_release(void *value) {
    released++;
    released_last = value;
}

// ---- error codes

#define CHECK_NAME(name, value, text)                                                              \
    CHECK_STR(orch_error_name(name), #name);                                                       \
    CHECK_STR(orch_error_text(name), text);                                                        \
    CHECK_INT(name, value);                                                                        \
    CHECK(orch_error_text(name)[0] != '\0');

TEST(every_code_has_its_name_and_its_text){ORCH_ERRORS(CHECK_NAME)}

#define COLLECT(name, value, text) value,

TEST(codes_are_negative_and_differ) {
    static const int codes[] = {ORCH_ERRORS(COLLECT)};
    size_t count = sizeof codes / sizeof codes[0];
    for (size_t i = 0; i < count; i++) {
        CHECK(codes[i] < 0);
        for (size_t j = 0; j < i; j++) CHECK(codes[i] != codes[j]);
    }
}

TEST(an_errno_has_the_systems_text_and_no_name) {
    CHECK_STR(orch_error_text(-EPIPE), strerror(EPIPE));
    CHECK_STR(orch_error_text(-ECONNREFUSED), strerror(ECONNREFUSED));
    CHECK(orch_error_name(-EPIPE) == NULL);
}

TEST(a_strange_code_has_a_text_all_the_same) {
    static const int strange[] = {0, 1, 42, INT_MAX, INT_MIN, -99999, ORCH_ERROR_LAST};
    for (size_t i = 0; i < sizeof strange / sizeof strange[0]; i++) {
        CHECK(orch_error_text(strange[i]) != NULL);
        CHECK(orch_error_text(strange[i]) && orch_error_text(strange[i])[0] != '\0');
        CHECK(orch_error_name(strange[i]) == NULL);
    }
}

// ---- results

TEST(a_fulfilled_result_gives_its_value_back_once) {
    int value = 5;
    orch_result r = orch_ok(&value, count_release);
    CHECK_INT(r.error, 0);
    CHECK(r.value == &value);
    CHECK_STR(orch_message(&r), "ok");
    orch_result_free(&r);
    CHECK_INT(released, 1);
    CHECK(released_last == &value);
    CHECK(r.value == NULL && r.owner == NULL && r.release == NULL); // "and clears it"
    orch_result_free(&r);
    CHECK_INT(released, 1);
}

TEST(a_value_without_release_is_left_alone) {
    int value = 5;
    orch_result r = orch_ok(&value, NULL);
    CHECK(r.value == &value);
    orch_result_free(&r);
    CHECK_INT(value, 5);
}

TEST(freeing_a_zeroed_result_does_nothing) {
    orch_result r;
    memset(&r, 0, sizeof r);
    orch_result_free(&r);
    CHECK_INT(r.error, 0);
    CHECK_STR(orch_message(&r), "ok");
}

TEST(numbers_come_back_as_they_went_in) {
    static const intptr_t numbers[] = {0, 1, -1, INTPTR_MAX, INTPTR_MIN};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        orch_result r = orch_ok_int(numbers[i]);
        CHECK_INT(r.error, 0);
        CHECK_INT(orch_int(&r), numbers[i]);
        CHECK_INT(orch_count(&r), 0);
        orch_result_free(&r);
    }
}

TEST(the_number_of_a_rejected_result_is_0) {
    orch_result plain = orch_fail(7), told = orch_failf(7, "seven");
    CHECK_INT(orch_int(&plain), 0);
    CHECK_INT(orch_int(&told), 0); // not the address of the message
    orch_result_free(&plain);
    orch_result_free(&told);
}

TEST(a_rejection_keeps_its_code) {
    static const int codes[] = {ORCH_ETIMEDOUT, -EPIPE, 1, INT_MAX, INT_MIN};
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        orch_result r = orch_fail(codes[i]);
        CHECK_INT(r.error, codes[i]);
        CHECK_STR(orch_message(&r), orch_error_text(codes[i]));
        orch_result_free(&r);
    }
}

TEST(failing_with_0_is_an_invalid_argument) {
    orch_result r = orch_fail(0), f = orch_failf(0, "nothing");
    CHECK_INT(r.error, ORCH_EINVAL);
    CHECK(f.error != 0);
    orch_result_free(&r);
    orch_result_free(&f);
}

TEST(a_message_is_formatted_and_owned) {
    char name[] = "users";
    orch_result r = orch_failf(404, "no %s at %d%%", name, 7);
    memset(name, 'x', sizeof name - 1); // the result has its own copy
    CHECK_INT(r.error, 404);
    CHECK_STR(orch_message(&r), "no users at 7%");
    orch_result_free(&r);
    orch_result_free(&r);
}

TEST(a_long_message_is_not_cut_off) {
    static char text[10000];
    memset(text, 'm', sizeof text - 1);
    orch_result r = orch_failf(1, "<%s>", text);
    CHECK_INT(strlen(orch_message(&r)), sizeof text - 1 + 2);
    CHECK(orch_message(&r)[0] == '<');
    CHECK(orch_message(&r)[strlen(orch_message(&r)) - 1] == '>');
    orch_result_free(&r);
}

TEST(an_empty_message_is_no_crash) {
    orch_result r = orch_failf(1, "%s", "");
    CHECK_INT(r.error, 1);
    CHECK(orch_message(&r) != NULL);
    orch_result_free(&r);
}

TEST(a_result_without_a_list_has_no_elements) {
    int value = 5;
    orch_result ok = orch_ok(&value, NULL), bad = orch_failf(3, "bad");
    CHECK_INT(orch_count(&ok), 0);
    CHECK_INT(orch_at(&ok, 0)->error, ORCH_ERANGE);
    CHECK_INT(orch_at(&ok, SIZE_MAX)->error, ORCH_ERANGE);
    CHECK_INT(orch_count(&bad), 0);
    CHECK(orch_at(&bad, 0) == &bad); // the outer error
    CHECK(orch_at(&bad, SIZE_MAX) == &bad);
    orch_result_free(&bad);
}

TEST(take_moves_an_owned_value_out_once) {
    int value = 5;
    orch_result r = orch_ok(&value, count_release);
    CHECK(orch_take(&r) == &value);
    orch_result_free(&r);
    CHECK_INT(released, 0); // it was handed over
    CHECK(orch_take(&r) == NULL);
}

static int taken;

static void try_to_take(orch_result *in, void *context) {
    if (in->error == 0) CHECK(in->value == context);
    taken += orch_take(in) != NULL;
    orch_result_free(in); // of a lent result: harmless
}

TEST(take_of_a_shared_value_gives_nothing) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    int value = 5;
    orch_future *f = orch_settled(orch_ok(&value, count_release));
    bool real = orch_peek(f) && orch_peek(f)->error == 0;
    orch_on(orch_ref(f), try_to_take, &value);
    orch_on(orch_ref(f), try_to_take, &value);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(taken, 0);
    if (real) CHECK_INT(released, 0);
    if (real) CHECK(orch_peek(f) && orch_peek(f)->value == &value); // it stays where it is
    orch_drop(f);
    CHECK_INT(released, 1);
    CHECK_INT(orch_loop_free(loop), 0);
}

// ---- allocator hook

typedef struct tally {
    long live, bytes, calls, refuse_at; // refuse_at: the call that is refused, 0 for none
    int wrong;                          // a size or a block that is not what was given out
} tally;

typedef struct block {
    size_t size;
    size_t mark;
} block;

#define BLOCK_MARK ((size_t)0xb10cb10c)

static void *tally_grow(tally *t, block *old, size_t size) {
    if (++t->calls == t->refuse_at) return NULL;
    block *b = realloc(old, sizeof *b + size);
    if (!b) return NULL;
    t->live += old ? 0 : 1;
    t->bytes += (long)size - (old ? (long)b->size : 0);
    *b = (block){size, BLOCK_MARK};
    return b + 1;
}

static void *tally_resize(void *user, void *old, size_t old_size, size_t size) {
    tally *t = user;
    block *b = old ? (block *)old - 1 : NULL;
    if (b && (b->mark != BLOCK_MARK || b->size != old_size)) t->wrong++;
    if (!old && old_size != 0) t->wrong++;
    if (size != 0) return tally_grow(t, b, size);
    if (!b) return NULL;
    t->live--;
    t->bytes -= (long)b->size;
    b->mark = 0;
    free(b);
    return NULL;
}

static orch_result nap(void *arg) {
    (void)arg;
    int error = orch_sleep(1);
    return error ? orch_failf(error, "could not sleep") : orch_ok_int(1);
}

static orch_result pass_on(orch_result *in, void *context) {
    (void)context;
    return orch_ok_int(orch_int(in) + 1);
}

static void ignore(orch_result *in, void *context) {
    (void)in;
    (void)context;
}

// Something of everything that allocates; what it returns needs memory after the loop has gone.
static orch_result mixed_work(void *arg) {
    (void)arg;
    static orch_future *many[600];
    static char copied[3000];
    for (size_t i = 0; i < 600; i++) many[i] = orch_after(i % 3);
    orch_future *all = orch_all_n(600, many);
    orch_future *named =
        orch_go_with(&(orch_task_desc){.name = "nap", .fn = nap, .arg = copied, .arg_size = 3000});
    for (int i = 0; i < 20; i++) orch_drop(orch_go(nap, NULL));
    orch_on(orch_then(orch_timeout(orch_go(nap, NULL), 500), pass_on, NULL, NULL), ignore, NULL);
    orch_result slept = orch_await(orch_all_settled(named, orch_go(nap, NULL), orch_ready(-1, 1)));
    orch_result done = orch_await(all);
    orch_result_free(&slept);
    return done;
}

TEST(the_allocator_gets_back_what_it_gave) {
    tally t = {0};
    orch_loop_desc desc = {.allocator = {tally_resize, &t}};
    orch_result r = orch_run_with(&desc, mixed_work, NULL);
    CHECK_INT(r.error, 0);
    CHECK_INT(orch_count(&r), 600);
    CHECK_INT(orch_at(&r, 599)->error, 0);
    orch_result_free(&r); // after its loop
    CHECK_INT(t.live, 0);
    CHECK_INT(t.bytes, 0);
    CHECK_INT(t.wrong, 0);
    CHECK(t.calls > 0);
}

TEST(an_allocator_may_refuse_any_call) {
    tally all = {0};
    orch_loop_desc unrefused = {.allocator = {tally_resize, &all}};
    orch_result first = orch_run_with(&unrefused, mixed_work, NULL);
    orch_result_free(&first);
    CHECK(all.calls > 10);
    for (long n = 1; n <= all.calls && n < 300; n += test_shared->fail_at ? 29 : 1) {
        tally t = {.refuse_at = n};
        orch_loop_desc desc = {.allocator = {tally_resize, &t}};
        orch_result r = orch_run_with(&desc, mixed_work, NULL);
        orch_result_free(&r);
        CHECK_INT(t.live, 0);
        CHECK_INT(t.bytes, 0);
        CHECK_INT(t.wrong, 0);
    }
}

TEST(a_loop_that_cannot_be_made_leaves_nothing_behind) {
    tally t = {.refuse_at = 1};
    orch_loop *loop = orch_loop_new(&(orch_loop_desc){.allocator = {tally_resize, &t}});
    CHECK(loop == NULL);
    CHECK(orch_loop_current() == NULL);
    CHECK_INT(t.live, 0);
    if (loop) orch_loop_free(loop);
    orch_result r = orch_run(nap, NULL); // and the thread can have another
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
}

// ---- slots

// Of every ticket there ever was, since a debug build uses a slot again only after a while.
TEST(a_ticket_of_a_freed_slot_settles_nothing) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    static orch_promise old[50 * 64];
    int count = 0, refused = 0;
    for (int round = 0; round < 50; round++) {
        for (int i = 0; i < 64; i++) orch_drop(orch_future_new(&old[count++]));
        orch_loop_run(loop); // what was cancelled ends, so that the slots are free
        orch_promise fresh[8];
        orch_future *f[8];
        for (int i = 0; i < 8; i++) f[i] = orch_future_new(&fresh[i]);
        for (int i = 0; i < count; i++) {
            refused += !orch_promise_pending(old[i]);
            refused += !orch_settle(old[i], orch_ok(old, count_release));
        }
        for (int i = 0; i < 8; i++) {
            CHECK(!orch_is_settled(f[i]));
            CHECK(orch_settle(fresh[i], orch_ok_int(round)));
            CHECK(orch_is_settled(f[i]));
            orch_drop(f[i]);
        }
        CHECK_INT(refused, 2 * released); // a result that decides nothing is freed
    }
    CHECK_INT(refused, 64 * 50 * 51); // twice the sum of 64, 128 and so on
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(slots_are_counted_and_used_again) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    static orch_future *f[20000];
    size_t before = orch_loop_statistics(loop).futures;
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 20000; i++) f[i] = orch_settled(orch_ok(f, count_release));
        CHECK_INT(orch_loop_statistics(loop).futures, before + 20000);
        for (int i = 0; i < 20000; i++) orch_drop(f[(i * 7919) % 20000]); // in scattered order
        CHECK_INT(orch_loop_statistics(loop).futures, before);
        CHECK_INT(released, 20000 * (round + 1));
    }
    CHECK_INT(orch_loop_free(loop), 0);
}

TEST(memory_of_slots_is_used_again) {
    tally t = {0};
    orch_loop *loop = orch_loop_new(&(orch_loop_desc){.allocator = {tally_resize, &t}});
    if (!CHECK(loop != NULL)) return;
    static orch_future *f[5000];
    long peak = 0;
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < 5000; i++) f[i] = orch_settled(orch_ok_int(i));
        for (int i = 0; i < 5000; i++) orch_drop(f[i]);
        if (round == 0) peak = t.bytes;
        CHECK_INT(t.bytes, peak); // the high-water mark, no more
    }
    CHECK_INT(orch_loop_free(loop), 0);
    CHECK_INT(t.live, 0);
    CHECK_INT(t.wrong, 0);
}

#ifdef __linux__
// Whether the mapping around an address was asked to be in huge pages.
static bool asked_for_huge_pages(const void *at) {
    FILE *smaps = fopen("/proc/self/smaps", "r");
    char line[512];
    unsigned long from, to;
    bool inside = false, asked = false;
    while (smaps != NULL && fgets(line, sizeof line, smaps) != NULL) {
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
            inside = from <= (uintptr_t)at && (uintptr_t)at < to;
        if (inside && strncmp(line, "VmFlags:", 8) == 0) asked = strstr(line, " hg") != NULL;
    }
    if (smaps != NULL) fclose(smaps);
    return asked;
}

// Emulators and kernels without huge pages do not know the request.
static bool can_ask_for_huge_pages(void) {
    const size_t size = (size_t)1 << 23;
    void *probe = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (probe == MAP_FAILED) return false;
    bool can = madvise(probe, size, MADV_HUGEPAGE) == 0 && asked_for_huge_pages(probe);
    munmap(probe, size);
    return can;
}

TEST(a_million_futures_are_asked_to_be_in_huge_pages) {
    enum { COUNT = 1000000 };
    static orch_future *f[COUNT];
    const int count = test_shared->fail_at ? COUNT / 5 : COUNT; // a sweep repeats this often
    bool can = can_ask_for_huge_pages();
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    for (int i = 0; i < count; i++) f[i] = orch_settled(orch_ok_int(i));
    if (test_shared->refused == 0) CHECK_INT(asked_for_huge_pages(f[count - 1]), can);
    CHECK(!asked_for_huge_pages(f[0])); // a small program has small pages
    for (int i = 0; i < count; i++) orch_drop(f[i]);
    CHECK_INT(orch_loop_free(loop), 0);
}
#endif

// ---- the ready ring

#define RING 10000

typedef struct order {
    int seen[3 * RING];
    int count;
} order;

static order ring;
static int ring_ids[3 * RING];

static void ring_note(orch_result *in, void *context) {
    (void)in;
    if (ring.count < 3 * RING) ring.seen[ring.count++] = *(int *)context;
}

// Callbacks run in the order in which the futures were settled, whatever the order of registration.
TEST(what_became_ready_first_runs_first) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    static orch_promise tickets[RING];
    for (int i = 0; i < RING; i++) {
        ring_ids[i] = i;
        orch_on(orch_future_new(&tickets[i]), ring_note, &ring_ids[i]);
    }
    for (int i = 0; i < RING; i++) orch_settle(tickets[i * 3 % RING], orch_ok_int(i));
    CHECK_INT(ring.count, 0); // never inside settle
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(ring.count, RING);
    for (int i = 0; i < ring.count; i++)
        if (!CHECK_INT(ring.seen[i], i * 3 % RING)) break;
    CHECK_INT(orch_loop_free(loop), 0);
}

// Makes two more for each that ran, so that the ring grows while it is being emptied and wraps.
static void ring_multiply(orch_result *in, void *context) {
    (void)in;
    int *id = context;
    if (ring.count < 3 * RING) ring.seen[ring.count++] = *id;
    for (int i = 0; i < 2; i++) {
        int next = 2 * *id + 1 + i;
        if (next >= 2 * RING) return;
        ring_ids[next] = next;
        orch_on(orch_settled(orch_ok_int(0)), ring_multiply, &ring_ids[next]);
    }
}

TEST(the_order_holds_while_the_ring_grows) {
    orch_loop *loop = orch_loop_new(NULL);
    if (!CHECK(loop != NULL)) return;
    orch_on(orch_settled(orch_ok_int(0)), ring_multiply, &ring_ids[0]);
    CHECK_INT(orch_loop_run(loop), 0);
    CHECK_INT(ring.count, 2 * RING);
    for (int i = 0; i < ring.count; i++)
        if (!CHECK_INT(ring.seen[i], i)) break; // breadth first
    CHECK_INT(orch_loop_free(loop), 0);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
