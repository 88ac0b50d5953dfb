// test_chaos.c: an echo server behind a proxy that cuts, delays and splits what passes (chaos.h),
// over seeds: TEST_SEEDS=50 runs that many. What comes back is what was sent, or a beginning of it,
// and everything ends.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../asyncorch.h"
#include "pollers.h"
#include "test.h"

#include <fcntl.h>
#include <sys/socket.h>

#include "chaos.h"

enum { CLIENTS = 8, SIZE = 6000 };

static int open_count(void) {
    int count = 0;
    for (int fd = 0; fd < 256; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static int live; // connections of the server

static orch_result echo(int fd, void *context) {
    char data[512];
    ptrdiff_t n;
    (void)context;
    live++;
    while ((n = orch_read(fd, data, sizeof data)) > 0) {
        if (orch_write(fd, data, (size_t)n) < 0) break;
    }
    live--;
    return orch_ok(NULL, NULL); // resets are what is tested here
}

static orch_result serve(void *listener) {
    return orch_fail(orch_serve(*(int *)listener, echo, NULL));
}

static int listen_here(orch_address *at) {
    orch_listen_desc desc = {.host = "127.0.0.1"};
    int fd = orch_listen(&desc);
    if (fd >= 0) orch_socket_address(fd, at);
    return fd;
}

typedef struct exchange {
    const orch_address *to;
    const char *data;
    size_t size, got; // bytes
    int error;        // of the reader
    int fd;
    bool differs;
} exchange;

static orch_result send_all(void *arg) {
    const exchange *x = arg;
    if (orch_write(x->fd, x->data, x->size) >= 0) shutdown(x->fd, SHUT_WR);
    return orch_ok(NULL, NULL);
}

static void receive_all(exchange *x) {
    char data[700];
    ptrdiff_t n;
    while ((n = orch_read(x->fd, data, sizeof data)) > 0) {
        bool fits = (size_t)n <= x->size - x->got;
        if (!fits || memcmp(x->data + x->got, data, (size_t)n) != 0) x->differs = true;
        x->got += fits ? (size_t)n : 0;
    }
    x->error = (int)n;
}

static orch_result client(void *arg) {
    exchange *x = arg;
    orch_connect_desc desc = {.addresses = x->to, .count = 1};
    x->fd = orch_connect_with(&desc);
    if (x->fd < 0) return orch_fail(x->fd);
    orch_future *sender = orch_go(send_all, x);
    receive_all(x);
    shutdown(x->fd, SHUT_RDWR); // a sender whose reader went waits for nothing
    orch_result r = orch_await(sender);
    orch_close(x->fd);
    return r;
}

static char stream[SIZE];

// Whether all came back, of how many.
static int run_clients(const chaos *c, const orch_address *at, uint64_t seed, unsigned modes) {
    exchange x[CLIENTS];
    orch_future *running[CLIENTS];
    int whole = 0;
    for (int i = 0; i < CLIENTS; i++) {
        size_t size = modes & CHAOS_BYTES ? 100u + (unsigned)i : SIZE - 500u * (unsigned)i;
        x[i] = (exchange){at, stream, size, 0, 0, -1, false};
        running[i] = orch_go(client, &x[i]);
    }
    for (int i = 0; i < CLIENTS; i++) {
        orch_result r = orch_await(running[i]);
        orch_result_free(&r);
        bool all = x[i].got == x[i].size && x[i].error == 0;
        CHECK(!x[i].differs);
        if (!(modes & (CHAOS_CUT | CHAOS_HALF)) && !CHECK(all)) {
            fprintf(stderr, "seed %d, modes %u: %d of %d bytes, error %d\n", (int)seed, modes,
                    (int)x[i].got, (int)x[i].size, x[i].error);
        }
        whole += all;
    }
    if (modes & CHAOS_CUT) CHECK(c->cuts > 0);
    return whole;
}

static void run_seed(uint64_t seed, unsigned modes) {
    orch_address server, proxy;
    int listener = listen_here(&server);
    chaos c = {.to = server, .seed = seed, .modes = modes};
    c.listener = listen_here(&proxy);
    orch_future *serving = orch_go(serve, &listener), *passing = orch_go(chaos_run, &c);
    int whole = run_clients(&c, &proxy, seed, modes);
    if (modes & (CHAOS_CUT | CHAOS_HALF)) CHECK(whole < CLIENTS);
    orch_drop(passing);
    orch_drop(serving);
    CHECK_INT(live, 0);
}

static unsigned chaos_modes;

static orch_result run_seeds(void *arg) {
    (void)arg;
    int seeds = getenv("TEST_SEEDS") ? atoi(getenv("TEST_SEEDS")) : 3;
    if (seeds > 100) seeds = 100; // each takes its time, at most ten minutes for all
    uint64_t start = orch_now();
    orch_scope s; // where memory is refused, what it waits for may never come
    orch_scope_desc desc = {"test", test_shared->fail_at ? 300 : 60000, false};
    if (orch_scope_open(&s, &desc) != 0) return orch_fail(ORCH_ENOMEM);
    test_start();
    for (int seed = 1; seed <= seeds && orch_now() - start < 3000; seed++) {
        run_seed((uint64_t)seed, chaos_modes);
    }
    return orch_scope_close(&s);
}

static void run_modes(unsigned modes) {
    int before = open_count();
    chaos_modes = modes;
    for (size_t i = 0; i < SIZE; i++) stream[i] = (char)(i * 7 + i / 256);
    orch_loop_desc desc = {.poller = test_poller()};
    orch_result r = orch_run_with(&desc, run_seeds, NULL);
    CHECK_INT(r.error, 0);
    orch_result_free(&r);
    CHECK_INT(open_count(), before);
}

TEST(nothing_happens) { run_modes(0); }
TEST(pieces_of_any_size) { run_modes(CHAOS_PIECES); }
TEST(single_bytes) { run_modes(CHAOS_BYTES); }
TEST(delays) { run_modes(CHAOS_PIECES | CHAOS_DELAY); }
TEST(resets) { run_modes(CHAOS_PIECES | CHAOS_CUT); }
TEST(half_closes) { run_modes(CHAOS_HALF); }
TEST(everything) { run_modes(CHAOS_PIECES | CHAOS_DELAY | CHAOS_CUT | CHAOS_HALF); }

int main(int argc, char **argv) { return test_main(argc, argv); }
