// Does the loop move to the better poller, and stay there? An echo server of 64 bytes on TCP, under
// load from another process: 100, 1,000 and 10,000 connections that are all busy, and 10,000
// idle with 10 busy; pinned to poll, pinned to epoll, and self-moving; requests a second over the
// second half of each run. The three servers take turns of a tenth of a second, each with its own
// load, while the others are stopped: the speed of a shared machine drifts by more from one second
// to the next than they differ. The figure is the median of the ratios of five rounds.
// Run: make bench, or .build/bench/bench_move [seconds of a run, default 1] [row, 1 to 4]   (Linux)
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ROWS = 4, ROUNDS = 5, SERVERS = 3, SIZE = 64, MOST = 10010 };

static const double TURN = 0.1; // seconds

static const struct {
    const char *name;
    int count, busy;
} rows[ROWS] = {
    {"100", 100, 100}, {"1000", 1000, 1000}, {"10000", 10000, 10000}, {"10 of 10010", 10010, 10}};

// What a server tells who measures it.
typedef struct report {
    volatile uint64_t requests, moves;
    volatile int up, poller;
} report;

static int server[MOST], client[MOST];
static double seconds = 1;
static report *reports, *mine;

// ---- the load: one request in flight on each busy connection

static void load(int busy) {
    static struct epoll_event events[1024];
    char block[SIZE] = "a request of 64 bytes";
    int queue = epoll_create1(0);
    for (int i = 0; i < busy; i++) {
        struct epoll_event event = {EPOLLIN, {.fd = client[i]}};
        bench_require(epoll_ctl(queue, EPOLL_CTL_ADD, client[i], &event) == 0, "epoll_ctl");
        bench_require(send(client[i], block, SIZE, 0) == SIZE, "send");
    }
    for (;;) {
        int found = epoll_wait(queue, events, 1024, -1);
        for (int i = 0; i < found; i++) {
            if (recv(events[i].data.fd, block, SIZE, 0) != SIZE) return; // the server has ended
            if (send(events[i].data.fd, block, SIZE, MSG_NOSIGNAL) != SIZE) return;
        }
    }
}

// ---- the server

static orch_result echo(void *arg) {
    int fd = *(int *)arg;
    char block[SIZE];
    orch_adopt(fd);
    for (;;) {
        orch_result r = orch_await(orch_ready(fd, ORCH_READABLE));
        if (r.error != 0) return r;
        ssize_t got = recv(fd, block, SIZE, MSG_DONTWAIT);
        if (got <= 0) return orch_fail(got < 0 ? -errno : -EPIPE);
        if (send(fd, block, (size_t)got, MSG_DONTWAIT | MSG_NOSIGNAL) != got)
            return orch_fail(-EPIPE);
        mine->requests++;
    }
}

static orch_result serve(void *arg) {
    int count = *(int *)arg;
    for (int i = 0; i < count; i++) orch_detach(orch_go(echo, &server[i]));
    mine->up = 1;
    while (orch_sleep(10) == 0) {
        orch_loop_stats stats = orch_loop_statistics(orch_loop_current());
        mine->moves = stats.moves;
        mine->poller = (int)stats.poller;
    }
    return orch_fail(-EINTR); // it is killed before
}

// ---- the rows

static int at_loopback(struct sockaddr_in *address) {
    socklen_t size = sizeof *address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(address, 0, sizeof *address);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    bench_require(bind(fd, (struct sockaddr *)address, size) == 0 && listen(fd, 1024) == 0 &&
                      getsockname(fd, (struct sockaddr *)address, &size) == 0,
                  "listen");
    return fd;
}

static void connect_all(const struct sockaddr_in *address, int count) {
    for (int i = 0, on = 1; i < count; i++) {
        client[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(client[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        bench_require(connect(client[i], (const struct sockaddr *)address, sizeof *address) == 0,
                      "connect");
    }
}

/* The first that connect are the busy ones. The load is another process. */
static void open_all(int count, int busy) {
    struct sockaddr_in address;
    int listener = at_loopback(&address), on = 1;
    pid_t child = fork();
    bench_require(child >= 0, "fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(listener);
        connect_all(&address, count);
        load(busy);
        _exit(0);
    }
    for (int i = 0; i < count; i++) {
        server[i] = accept(listener, NULL, NULL);
        bench_require(server[i] >= 0, "accept");
        setsockopt(server[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    close(listener);
}

/* A server and its load, in a process group of their own. */
static pid_t start(int count, int busy, report *r, orch_poller poller) {
    pid_t child = fork();
    bench_require(child >= 0, "fork");
    if (child > 0) {
        setpgid(child, child);
        while (!r->up && waitpid(child, NULL, WNOHANG) == 0) usleep(1000);
        kill(-child, SIGSTOP);
        return child;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL); // also while it is stopped
    setpgid(0, 0);
    mine = r;
    open_all(count, busy);
    orch_loop_desc desc = {.poller = poller};
    exit(orch_exit(orch_run_with(&desc, serve, &count)));
}

/* The turn of one of them: how many requests a second. */
static double turn(pid_t group, const report *r) {
    uint64_t before = r->requests;
    double from = bench_now();
    kill(-group, SIGCONT);
    usleep((useconds_t)(TURN * 1e6));
    kill(-group, SIGSTOP);
    bench_require(r->requests > before, "a server has ended");
    return (double)(r->requests - before) * 1e9 / (bench_now() - from);
}

/* All of them in turn. Of the second half: the mean rates, and the moves of the last. */
static uint64_t turns_of(const pid_t *groups, double *rates) {
    int turns = (int)(seconds / TURN + 0.5);
    uint64_t moves = 0;
    for (int t = 0; t < turns; t++) {
        if (t == turns / 2) moves = reports[SERVERS - 1].moves;
        for (int s = 0; s < SERVERS; s++) {
            int at = (s + t) % SERVERS;
            double rate = turn(groups[at], &reports[at]);
            if (t >= turns / 2) rates[at] += rate / (turns - turns / 2);
        }
    }
    return reports[SERVERS - 1].moves - moves;
}

/* With servers of its own: where the memory of one happens to lie makes a difference as well. */
static uint64_t round_of(int at, double *rates) {
    const orch_poller pollers[] = {ORCH_POLLER_POLL, ORCH_POLLER_EPOLL, ORCH_POLLER_DEFAULT};
    pid_t groups[SERVERS];
    memset(reports, 0, SERVERS * sizeof *reports);
    for (int s = 0; s < SERVERS; s++) {
        rates[s] = 0;
        groups[s] = start(rows[at].count, rows[at].busy, &reports[s], pollers[s]);
    }
    uint64_t moves = turns_of(groups, rates);
    for (int s = 0; s < SERVERS; s++) kill(-groups[s], SIGKILL), waitpid(groups[s], NULL, 0);
    return moves;
}

static double middle(const double *rates) {
    double sorted[ROUNDS];
    memcpy(sorted, rates, sizeof sorted);
    return bench_median(sorted, ROUNDS);
}

static void say(const char *name, const double *rates, uint64_t moves) {
    if (getenv("BENCH_VERBOSE") == NULL) return;
    fprintf(stderr, "  %s: poll %.0f, epoll %.0f, self %.0f/s, %llu moves, ends with %d\n", name,
            rates[0], rates[1], rates[2], (unsigned long long)moves, reports[2].poller);
}

/* All rounds of a row. The most moves in one of them. */
static uint64_t measure(int at, double rates[SERVERS][ROUNDS]) {
    uint64_t most_moves = 0;
    for (int round = 0; round < ROUNDS; round++) {
        double each[SERVERS];
        uint64_t moves = round_of(at, each);
        if (moves > most_moves) most_moves = moves;
        for (int s = 0; s < SERVERS; s++) rates[s][round] = each[s];
        say(rows[at].name, each, moves);
    }
    return most_moves;
}

// Against the one pinned poller that is the better: the better of each round would be a ratio to
// whichever of the two had the luckier moment.
static void row(int at) {
    double against[ROUNDS], rates[SERVERS][ROUNDS];
    uint64_t most_moves = measure(at, rates);
    const double *better = middle(rates[0]) > middle(rates[1]) ? rates[0] : rates[1];
    for (int round = 0; round < ROUNDS; round++) against[round] = rates[2][round] / better[round];
    double ratio = middle(against);
    printf(" %s: poll %.1f, epoll %.1f, self %.1f thousand/s, ratio %.2f (figure >= 0.95) %s, "
           "%llu moves in the second half%s",
           rows[at].name, middle(rates[0]) / 1e3, middle(rates[1]) / 1e3, middle(rates[2]) / 1e3,
           ratio, ratio >= 0.95 ? "met" : "MISSED", (unsigned long long)most_moves,
           at + 1 < ROWS ? ";" : "");
    fflush(stdout);
}

int main(int argc, char **argv) {
    struct rlimit files = {MOST + 100, MOST + 100};
    bench_require(setrlimit(RLIMIT_NOFILE, &files) == 0, "needs 10,110 descriptors");
    if (argc > 1) seconds = atof(argv[1]);
    size_t size = SERVERS * sizeof *reports;
    void *shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    bench_require(shared != MAP_FAILED, "mmap");
    reports = (report *)shared;
    bench_begin("move");
    for (int at = 0; at < ROWS; at++) {
        if (argc < 3 || atoi(argv[2]) == at + 1) row(at);
    }
    bench_end();
    return 0;
}
