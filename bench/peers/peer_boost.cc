// Two of the four measures of bench/peers with Boost.Context, which switches and nothing else: no
// scheduler, no futures. Prints one `measure nanoseconds` a line.
#include <boost/context/fiber.hpp>
#include <chrono>
#include <cstdio>

namespace context = boost::context;

static const int yields = 1000000;
static const int tasks = 100000;

static void switches() {
    bool ends = false;
    context::fiber other{[&ends](context::fiber &&from) {
        while (!ends) from = std::move(from).resume();
        return std::move(from);
    }};
    for (int i = 0; i < yields / 2; i++) other = std::move(other).resume();
    ends = true;
    other = std::move(other).resume();
}

static void spawn() {
    int n = 0;
    for (int i = 0; i < tasks; i++) {
        context::fiber task{[&n](context::fiber &&from) {
            n++;
            return std::move(from);
        }};
        task = std::move(task).resume();
    }
}

static void report(const char *what, void (*measure)(), double count) {
    measure();
    auto start = std::chrono::steady_clock::now();
    measure();
    std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    std::printf("%s %.1f\n", what, took.count() / count);
}

int main() {
    report("switch", switches, yields);
    report("spawn", spawn, tasks);
}
