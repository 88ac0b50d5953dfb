// The load on the echo servers: `busy` connections to each that send 64 bytes and wait for them to
// come back, for ever, and `idle` ones that did so once. The servers take turns, a run of so many
// seconds each, round after round: a slow moment of a shared machine then spoils one run of each
// and not all runs of one. What counts is the second half of a run; it is printed, and figures.awk
// judges. Each server has a worker here, with its connections; only one of them runs. Epoll
// (edge-triggered, as it costs the client least), one thread, no library. The worker asks without
// sleeping: a server would else pay for its wake-ups, the more the faster it is.
// Run: client [-b busy] [-i idle] [-t seconds] [-r rounds] name,port,pid[,port of its report]...
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SIZE = 64, BATCH = 512, PER_ADDRESS = 2000, BUCKETS = 4096, SERVERS = 32 };

typedef struct connection {
    int fd;
    unsigned got;   // bytes of the answer so far
    uint64_t count; // messages sent
    uint64_t sent;  // when, in ns
} connection;

enum { PER_SECOND, SERVER_US, P50, P99, KIB, MOVES, MEASURES }; // as figures.awk reads them

typedef struct figures {
    double of[MEASURES];
} figures;

typedef struct server {
    char name[32];
    int port, pid, report;
    int to, from; // pipes of its worker
    pid_t worker;
} server;

static struct {
    int busy, idle, rounds;
    double seconds;
} options = {100, 0, 5, 1};

static server servers[SERVERS];
static int server_count;
static connection *connections;
static uint64_t latencies[BUCKETS]; // 16 buckets to the power of two, of ns

static void require(int held, const char *what) {
    if (held) return;
    perror(what);
    exit(1);
}

static uint64_t clock_ns(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t) != 0) return 0;
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

// ---- latencies

static unsigned bucket_of(uint64_t ns) {
    if (ns < 16) return (unsigned)ns;
    unsigned log = 63u - (unsigned)__builtin_clzll(ns);
    return (log - 3) * 16 + (unsigned)(ns >> (log - 4)) % 16;
}

static double bucket_us(unsigned bucket) {
    if (bucket < 16) return bucket / 1000.0;
    return (double)((uint64_t)(16 + bucket % 16) << (bucket / 16 - 1)) / 1000.0;
}

// What so many of the answers took at most.
static double percentile(uint64_t total, double part) {
    uint64_t seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += latencies[i];
        if ((double)seen >= part * (double)total) return bucket_us(i);
    }
    return 0;
}

// ---- what the server is asked beside the load

static long resident_kib(const server *s) {
    char path[64], line[256];
    long kib = 0;
    snprintf(path, sizeof path, "/proc/%d/status", s->pid);
    FILE *file = fopen(path, "r");
    if (file == NULL) return 0;
    while (fgets(line, sizeof line, file) != NULL && sscanf(line, "VmRSS: %ld", &kib) != 1) {}
    fclose(file);
    return kib;
}

static uint64_t server_cpu_ns(const server *s) {
    clockid_t clock;
    return clock_getcpuclockid(s->pid, &clock) == 0 ? clock_ns(clock) : 0;
}

static struct sockaddr_in address_of(uint32_t host, int port) {
    struct sockaddr_in a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(host);
    a.sin_port = htons((uint16_t)port);
    return a;
}

// A connection from 127.0.0.2 and on, as one address has too few ports. Closing it resets it, so
// that nothing of it stays behind for a minute. The server may still be starting.
static int connect_from(uint32_t source, int port) {
    struct sockaddr_in from = address_of(INADDR_LOOPBACK + 1 + source, 0);
    struct sockaddr_in to = address_of(INADDR_LOOPBACK, port);
    struct linger reset = {1, 0};
    for (int tries = 0; tries < 100; tries++) {
        int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        require(fd >= 0, "socket");
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        require(bind(fd, (struct sockaddr *)&from, sizeof from) == 0, "bind");
        if (connect(fd, (struct sockaddr *)&to, sizeof to) == 0) return fd;
        close(fd);
        usleep(20000);
    }
    require(0, "connect");
    return -1;
}

// How often the server has moved to another poller, if it reports that: one line for one byte.
static void report_ask(int fd) {
    if (fd >= 0) require(send(fd, "?", 1, MSG_NOSIGNAL) == 1, "send to the report's port");
}

static double report_read(int fd) {
    char text[256];
    double moves = 0;
    ssize_t got = fd >= 0 ? recv(fd, text, sizeof text - 1, 0) : 0;
    text[got > 0 ? got : 0] = '\0';
    return sscanf(text, "moves %lf", &moves) == 1 ? moves : 0;
}

// ---- the load

// A message names its connection and its number; the rest is always the same.
static void compose(char *message, const connection *c) {
    uint64_t words[2] = {(uint64_t)(c - connections), c->count};
    memset(message, 'x', SIZE);
    memcpy(message, words, sizeof words);
}

static void ask(connection *c, uint64_t now) {
    char message[SIZE];
    c->count++;
    c->got = 0;
    c->sent = now;
    compose(message, c);
    require(send(c->fd, message, SIZE, MSG_NOSIGNAL) == SIZE, "send");
}

// Whether the answer is complete now.
static int answered(connection *c) {
    char got[SIZE], expected[SIZE];
    ssize_t n = recv(c->fd, got, SIZE - c->got, 0);
    require(n > 0, "recv");
    compose(expected, c);
    require(memcmp(got, expected + c->got, (size_t)n) == 0, "what came back is not what was sent");
    c->got += (unsigned)n;
    return c->got == SIZE;
}

// In groups, so that the backlog never overflows; each is answered once and so waits in its task.
static void connect_all(int port, int poller) {
    int total = options.busy + options.idle;
    connections = calloc((size_t)total + 1, sizeof *connections);
    require(connections != NULL, "calloc");
    for (int i = 0; i < total; i++) {
        connections[i].fd = connect_from((uint32_t)(i / PER_ADDRESS), port);
        ask(&connections[i], 0);
        if (i % 100 != 99 && i + 1 < total) continue;
        for (int k = i - i % 100; k <= i; k++) {
            while (!answered(&connections[k])) {}
        }
    }
    for (int i = 0; i < options.busy; i++) {
        connection *c = &connections[i];
        struct epoll_event event = {EPOLLIN | EPOLLET, {.ptr = c}};
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        require(epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event) == 0, "epoll_ctl");
    }
}

// Takes answers and asks again until then; `until` 0: takes one from each and asks no more.
static uint64_t load(int poller, uint64_t until) {
    struct epoll_event events[BATCH];
    uint64_t answers = 0, now = 1, last = clock_ns(CLOCK_MONOTONIC);
    while (until == 0 ? answers < (uint64_t)options.busy : now < until) {
        int found = epoll_wait(poller, events, BATCH, 0);
        now = clock_ns(CLOCK_MONOTONIC);
        if (found > 0) last = now;
        require(now - last < 5000000000u, "five seconds without an answer");
        for (int i = 0; i < found; i++) {
            connection *c = events[i].data.ptr;
            if (!answered(c)) continue;
            now = clock_ns(CLOCK_MONOTONIC);
            latencies[bucket_of(now - c->sent)]++;
            answers++;
            if (until != 0) ask(c, now);
        }
    }
    return answers;
}

static figures run_once(const server *s, int poller, int report) {
    figures f = {{0}};
    uint64_t now = clock_ns(CLOCK_MONOTONIC), length = (uint64_t)(options.seconds * 1e9);
    for (int i = 0; i < options.busy; i++) ask(&connections[i], now);
    load(poller, now + length / 2);
    memset(latencies, 0, sizeof latencies);
    report_ask(report);
    uint64_t middle = clock_ns(CLOCK_MONOTONIC);
    uint64_t cpu = server_cpu_ns(s), answers = load(poller, middle + length / 2);
    double n = (double)answers, took = (double)(clock_ns(CLOCK_MONOTONIC) - middle);
    f.of[PER_SECOND] = n * 1e9 / took;
    f.of[SERVER_US] = (double)(server_cpu_ns(s) - cpu) / n / 1000;
    f.of[P50] = percentile(answers, 0.5);
    f.of[P99] = percentile(answers, 0.99);
    f.of[MOVES] = -report_read(report);
    report_ask(report);
    f.of[MOVES] += report_read(report);
    load(poller, 0);
    return f;
}

// ---- one worker for each server

// Says how much memory a connection takes, then runs whenever it is told to.
static int work(const server *s, int in, int out) {
    char go;
    int poller = epoll_create1(0), report = s->report != 0 ? connect_from(0, s->report) : -1;
    close(connect_from(0, s->port)); // it is up now
    figures f = {{0}};
    long before = resident_kib(s);
    connect_all(s->port, poller);
    f.of[KIB] = (double)(resident_kib(s) - before) / (options.busy + options.idle);
    do {
        require(write(out, &f, sizeof f) == sizeof f, "write");
        if (read(in, &go, 1) != 1) return 0;
        double kib = f.of[KIB];
        f = run_once(s, poller, report);
        f.of[KIB] = kib;
    } while (1);
}

static void start_worker(server *s) {
    int to[2], from[2];
    require(pipe2(to, O_CLOEXEC) == 0 && pipe2(from, O_CLOEXEC) == 0, "pipe");
    s->worker = fork();
    require(s->worker >= 0, "fork");
    if (s->worker == 0) {
        for (int i = 0; i < server_count; i++) { // the others see the end of their own pipes
            if (servers[i].to != 0) close(servers[i].to);
        }
        close(to[1]);
        exit(work(s, to[0], from[1]));
    }
    close(to[0]);
    close(from[1]);
    s->to = to[1];
    s->from = from[0];
}

static figures worker_says(const server *s) {
    figures f = {{0}};
    require(read(s->from, &f, sizeof f) == sizeof f, s->name);
    return f;
}

static void print(const server *s, figures f) {
    printf("run %d:%d %s", options.busy, options.idle, s->name);
    for (int i = 0; i < MEASURES; i++) printf(" %.3f", f.of[i]);
    printf("\n");
}

static void options_read(int argc, char **argv) {
    for (int o; (o = getopt(argc, argv, "b:i:t:r:")) != -1;) {
        if (o == 'b') options.busy = atoi(optarg);
        else if (o == 'i') options.idle = atoi(optarg);
        else if (o == 't') options.seconds = atof(optarg);
        else if (o == 'r') options.rounds = atoi(optarg);
        else exit(2);
    }
    require(options.busy > 0 && options.rounds > 0, "options");
    for (; optind < argc && server_count < SERVERS; optind++) {
        server *s = &servers[server_count++];
        int fields =
            sscanf(argv[optind], "%31[^,],%d,%d,%d", s->name, &s->port, &s->pid, &s->report);
        require(fields >= 3, argv[optind]);
    }
}

int main(int argc, char **argv) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    options_read(argc, argv);
    for (int i = 0; i < server_count; i++) {
        start_worker(&servers[i]);
        worker_says(&servers[i]); // all are connected before the first run
    }
    for (int round = 0; round < options.rounds; round++) {
        for (int i = 0; i < server_count; i++) {
            require(write(servers[i].to, "g", 1) == 1, servers[i].name);
            print(&servers[i], worker_says(&servers[i]));
        }
    }
    for (int i = 0; i < server_count; i++) {
        close(servers[i].to);
        waitpid(servers[i].worker, NULL, 0);
    }
    return 0;
}
