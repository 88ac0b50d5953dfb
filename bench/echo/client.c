// The load on an echo server, and the only judge of it: `busy` connections that send 64 bytes and
// wait for them to come back, for ever, and `idle` ones that did so once. What counts is the second
// half of the time. Epoll (edge-triggered, as it costs the client least), one thread, no library.
// Run: client [-p port] [-b busy] [-i idle] [-t seconds] [-s server's pid] [-c port of its report]
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
#include <time.h>
#include <unistd.h>

enum { SIZE = 64, BATCH = 512, PER_ADDRESS = 2000, BUCKETS = 4096 };

typedef struct connection {
    int fd;
    unsigned got;   // bytes of the answer so far
    uint64_t count; // messages sent
    uint64_t sent;  // when, in ns
} connection;

static struct {
    int port, busy, idle, report;
    double seconds;
    pid_t server;
} options = {7000, 100, 0, 0, 2, 0};

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

static long resident_kib(void) {
    char path[64], line[256];
    long kib = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)options.server);
    FILE *file = options.server != 0 ? fopen(path, "r") : NULL;
    if (file == NULL) return 0;
    while (fgets(line, sizeof line, file) != NULL && sscanf(line, "VmRSS: %ld", &kib) != 1) {}
    fclose(file);
    return kib;
}

static uint64_t server_cpu_ns(void) {
    clockid_t clock;
    if (options.server == 0 || clock_getcpuclockid(options.server, &clock) != 0) return 0;
    return clock_ns(clock);
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

// The server's report is asked for in the middle and at the end, and read when all is over.
static void report_ask(int fd) {
    if (fd >= 0) require(send(fd, "?", 1, MSG_NOSIGNAL) == 1, "send to the report's port");
}

static void report_read(int fd) {
    char text[256];
    ssize_t got = fd >= 0 ? recv(fd, text, sizeof text - 1, 0) : 0;
    text[got > 0 ? got : 0] = '\0';
    for (char *p = text; *p != '\0'; p++) *p = *p == '\n' ? ' ' : *p;
    printf("%s", text);
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
static void connect_all(int poller) {
    int total = options.busy + options.idle;
    connections = calloc((size_t)total + 1, sizeof *connections);
    require(connections != NULL, "calloc");
    for (int i = 0; i < total; i++) {
        connections[i].fd = connect_from((uint32_t)(i / PER_ADDRESS), options.port);
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

// Returns how many answers came. Ends with the time, or when the server stalls for five seconds.
static uint64_t load(int poller, uint64_t until) {
    struct epoll_event events[BATCH];
    uint64_t answers = 0, now = 0;
    while ((now = clock_ns(CLOCK_MONOTONIC)) < until) {
        int found = epoll_wait(poller, events, BATCH, 5000);
        require(found > 0, "epoll_wait (or five seconds without an answer)");
        for (int i = 0; i < found; i++) {
            connection *c = events[i].data.ptr;
            if (!answered(c)) continue;
            now = clock_ns(CLOCK_MONOTONIC);
            latencies[bucket_of(now - c->sent)]++;
            answers++;
            ask(c, now);
        }
    }
    return answers;
}

static void options_read(int argc, char **argv) {
    for (int o; (o = getopt(argc, argv, "p:b:i:t:s:c:")) != -1;) {
        if (o == 'p') options.port = atoi(optarg);
        else if (o == 'b') options.busy = atoi(optarg);
        else if (o == 'i') options.idle = atoi(optarg);
        else if (o == 't') options.seconds = atof(optarg);
        else if (o == 's') options.server = (pid_t)atoi(optarg);
        else if (o == 'c') options.report = atoi(optarg);
        else exit(2);
    }
}

int main(int argc, char **argv) {
    options_read(argc, argv);
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    int poller = epoll_create1(0), total = options.busy + options.idle;
    int report = options.report != 0 ? connect_from(0, options.report) : -1;
    close(connect_from(0, options.port)); // it is up now
    long before = resident_kib();
    connect_all(poller);
    long kib = resident_kib() - before;

    uint64_t start = clock_ns(CLOCK_MONOTONIC), length = (uint64_t)(options.seconds * 1e9);
    for (int i = 0; i < options.busy; i++) ask(&connections[i], start);
    if (options.busy > 0) load(poller, start + length / 2);
    memset(latencies, 0, sizeof latencies);
    report_ask(report);
    uint64_t middle = clock_ns(CLOCK_MONOTONIC);
    uint64_t cpu = server_cpu_ns(), mine = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    uint64_t answers = options.busy > 0 ? load(poller, middle + length / 2) : 0;
    double took = (double)(clock_ns(CLOCK_MONOTONIC) - middle);
    cpu = server_cpu_ns() - cpu;
    mine = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - mine;
    report_ask(report);

    double n = answers > 0 ? (double)answers : 1;
    printf("per_second %.0f p50_us %.1f p99_us %.1f max_us %.1f server_us %.3f client_us %.3f "
           "kib_each %.2f ",
           (double)answers * 1e9 / took, percentile(answers, 0.5), percentile(answers, 0.99),
           percentile(answers, 1), (double)cpu / n / 1000, (double)mine / n / 1000,
           (double)kib / total);
    usleep(50000);
    report_read(report);
    printf("\n");
    return 0;
}
