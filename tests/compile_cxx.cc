// compile_cxx.cc: what differs in C++: initialiser lists, descs by reference, exceptions and
// destructors inside a task. The rest is compile_c.c's. Prints "all as expected" and ends with 0.
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

static int wrong;

static void expect_at(bool held, int line) {
    if (!held) std::printf("compile_cxx.cc:%d: not as expected\n", line);
    wrong += !held;
}
#define EXPECT(condition) expect_at((condition), __LINE__)

static void expect_result_at(orch_result r, int error, intptr_t value, int line) {
    if (r.error != error || orch_int(&r) != value)
        std::printf("%d \"%s\" %ld\n", r.error, orch_message(&r), static_cast<long>(orch_int(&r)));
    expect_at(r.error == error && orch_int(&r) == value, line);
    orch_result_free(&r);
}
#define EXPECT_RESULT(r, error, value) expect_result_at((r), (error), (value), __LINE__)

static orch_result doubled(void *arg) {
    int n = *static_cast<int *>(arg);
    int error = orch_sleep(1);
    return error != 0 ? orch_fail(error) : orch_ok_int(2 * n);
}

static orch_result for_ever(void *arg) {
    struct counter {
        int *ended;
        ~counter() { ++*ended; }
    } when_ended = {static_cast<int *>(arg)};
    int error = 0;
    while (error == 0) error = orch_sleep(60000);
    return orch_fail(error);
}

static void thrower(int depth) {
    std::string a_local("with a destructor, and too long to be stored in place");
    orch_yield();
    if (depth == 0) throw std::runtime_error("thrown");
    thrower(depth - 1);
    EXPECT(a_local.empty()); // never reached
}

static orch_result throwing(void *) {
    try {
        thrower(5);
    } catch (const std::runtime_error &e) {   // not to wait in here: the run time has one list of
        return orch_failf(7, "%s", e.what()); // caught exceptions per thread
    }
    return orch_ok_int(1);
}

static orch_result plus_one(orch_result *in, void *) { return orch_ok_int(orch_int(in) + 1); }

static void delete_string(void *value) { delete static_cast<std::string *>(value); }

static void delete_int(void *value) { delete static_cast<int *>(value); }

static void tasks() {
    int n = 4, ended = 0;
    EXPECT_RESULT(orch_await(orch_go(doubled, &n)), 0, 8);
    orch_drop(orch_go(for_ever, &ended));
    EXPECT(ended == 1);
    orch_future *f =
        orch_go(throwing, nullptr); // two at once, so that both are in the middle of it
    orch_future *g = orch_go(throwing, nullptr);
    orch_result r = orch_await(f);
    EXPECT(std::strcmp(orch_message(&r), "thrown") == 0);
    EXPECT_RESULT(r, 7, 0);
    EXPECT_RESULT(orch_await(g), 7, 0);
    orch_task_desc desc = orch_task_desc();
    desc.name = "owner";
    desc.fn = doubled;
    desc.arg = new int(3);
    desc.release = delete_int;
    EXPECT_RESULT(orch_await(orch_go_with(desc)), 0, 6);
    r = orch_await(orch_settled(orch_ok(new std::string("a value that is owned"), delete_string)));
    std::string *owned = static_cast<std::string *>(orch_take(&r));
    EXPECT(owned != nullptr && *owned == "a value that is owned");
    delete owned;
    orch_result_free(&r);
}

static void futures() {
    orch_promise p;
    orch_then_desc desc = orch_then_desc();
    desc.on_ok = plus_one;
    desc.context = new int(1);
    desc.release = delete_int;
    orch_future *f = orch_then_with(orch_future_new(&p), desc);
    EXPECT(orch_settle(p, orch_ok_int(1)) && !orch_settle(p, orch_ok_int(2)));
    EXPECT_RESULT(orch_await(f), 0, 2);
}

static void combinators() {
    int n = 4, m = 6, ended = 0;
    orch_result r = orch_await(orch_all(orch_go(doubled, &n), orch_go(doubled, &m)));
    EXPECT(r.error == 0 && orch_count(&r) == 2); // C++ evaluates a braced list from left to right
    EXPECT(orch_int(orch_at(&r, 0)) == 8 && orch_int(orch_at(&r, 1)) == 12);
    orch_result_free(&r);
    r = orch_await(orch_race(orch_go(for_ever, &ended), orch_go(doubled, &m)));
    EXPECT(r.index == 1 && ended == 1);
    EXPECT_RESULT(r, 0, 12);
    r = orch_await(orch_any(orch_go(for_ever, &ended), orch_go(doubled, &m)));
    EXPECT_RESULT(r, 0, 12);
    r = orch_await(orch_all_settled(orch_go(throwing, nullptr), orch_go(doubled, &m)));
    EXPECT(orch_at(&r, 0)->error == 7 && orch_int(orch_at(&r, 1)) == 12);
    orch_result_free(&r);
    r = orch_await(orch_gather(15, orch_go(for_ever, &ended), orch_go(doubled, &m)));
    EXPECT(orch_at(&r, 0)->error == ORCH_ETIMEDOUT && orch_int(orch_at(&r, 1)) == 12);
    orch_result_free(&r);
    r = orch_await(orch_quorum(1, orch_go(for_ever, &ended), orch_go(doubled, &m)));
    EXPECT(r.error == 0 && orch_at(&r, 0)->error == ORCH_ECANCELED);
    orch_result_free(&r);
    orch_completion *c = orch_as_completed(orch_go(doubled, &n), orch_go(throwing, nullptr));
    EXPECT_RESULT(orch_await(orch_completion_next(c)), 7, 0);
    orch_completion_free(c);
    std::vector<orch_future *> many;
    for (int i = 0; i < 10; i++) many.push_back(orch_go(doubled, &n));
    r = orch_await(orch_timeout(orch_all_n(many.size(), many.data()), 20000));
    EXPECT(r.error == 0 && orch_count(&r) == 10);
    orch_result_free(&r);
    EXPECT(ended == 4);
}

static orch_result all_of_it(void *arg) {
    tasks();
    futures();
    combinators();
    return orch_ok(arg, nullptr);
}

int main() {
    orch_loop_desc desc = orch_loop_desc();
    desc.stack_size = 128 * 1024; // throwing takes a few KiB, and sanitizers a lot more
    orch_result r = orch_run_with(desc, all_of_it, &wrong);
    EXPECT(r.error == 0 && r.value == &wrong);
    orch_result_free(&r);
    if (wrong == 0) std::puts("all as expected");
    return wrong != 0;
}
