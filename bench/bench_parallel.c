// Sequential against parallel, for 1 to 1,000 calls of two kinds: simulated (a task that sleeps)
// and libcurl (a GET from examples/server.c on this machine, which answers after the same delay).
// Prints a table and a bar chart and draws an SVG file. The libcurl kind needs -DHAVE_CURL, -lcurl,
// and the
// server program.
// Run: make bench, or .build/bench/bench_parallel [file.svg [server]]
#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"
#include "bench.h"
#include "chart.h"

#define DELAY_MS 2 // of each call, so that 1,000 in sequence take seconds
#define MOST 1000
#define BAR_COLUMNS 44

static const size_t sizes[] = {1, 2, 5, 10, 20, 50, 100, 200, 500, MOST};
enum { SIZES = sizeof sizes / sizeof *sizes };

typedef struct kind {
    const char *name;
    orch_future *(*call)(size_t i); // starts call i
    double sequential[SIZES];       // milliseconds
    double parallel[SIZES];
} kind;

// ---- the two ways, the same for every kind of call

static double sequential(const kind *k, size_t count) {
    double start = bench_now();
    for (size_t i = 0; i < count; i++) bench_await_ok(k->call(i), "a call failed");
    return (bench_now() - start) / 1e6;
}

static double parallel(const kind *k, size_t count) {
    static orch_future *futures[MOST];
    double start = bench_now();
    for (size_t i = 0; i < count; i++) futures[i] = k->call(i);
    bench_await_ok(orch_all_n(count, futures), "a call failed");
    return (bench_now() - start) / 1e6;
}

// Few calls are repeated more often than many: a sum of many delays is a mean by itself.
static double median_of(double (*way)(const kind *, size_t), const kind *k, size_t count) {
    double values[9];
    size_t repeats = way == parallel || count <= 20 ? 9 : count <= 100 ? 3 : 1;
    for (size_t i = 0; i < repeats; i++) values[i] = way(k, count);
    return bench_median(values, repeats);
}

static void measure_kind(kind *k) {
    parallel(k, MOST); // warms up stacks and connections
    for (size_t i = 0; i < SIZES; i++) {
        k->sequential[i] = median_of(sequential, k, sizes[i]);
        k->parallel[i] = median_of(parallel, k, sizes[i]);
    }
}

// ---- the simulated kind

static orch_result sleep_task(void *arg) {
    int error = orch_sleep(DELAY_MS);
    return error != 0 ? orch_fail(error) : orch_ok(arg, NULL);
}

static orch_future *simulated_call(size_t i) {
    (void)i;
    return orch_go(sleep_task, NULL);
}

// ---- the libcurl kind

#ifdef HAVE_CURL
#define ORCH_CURL_IMPLEMENTATION
#include "../examples/orch_curl.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static struct {
    pid_t pid;
    int input; // its end is the server's end, also when this program dies
    char url[128];
    orch_curl *client;
} server;

static orch_future *curl_call(size_t i) {
    (void)i;
    return orch_curl_get(server.client, server.url);
}

// Every one of the calls side by side has a connection.
static void raise_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    limit.rlim_cur = limit.rlim_max < 8192 ? limit.rlim_max : 8192;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static void become_server(const char *program, int input, int output) {
    char delay[32];
    snprintf(delay, sizeof delay, "likes=%d", DELAY_MS);
    dup2(input, STDIN_FILENO);
    dup2(output, STDOUT_FILENO);
    for (int fd = 3; fd < 32; fd++) close(fd); // an end of the pipes left open would hide their end
    execl(program, program, "--until-eof", "--delay", delay, (char *)NULL);
    _exit(127);
}

// Whether the server listens, with server.url set.
static bool start_server(const char *program) {
    int to[2], from[2];
    char base[64];
    bench_require(pipe(to) == 0 && pipe(from) == 0, "no pipe");
    fflush(NULL);
    server.pid = fork();
    if (server.pid == 0) become_server(program, to[0], from[1]);
    close(to[0]);
    close(from[1]);
    server.input = to[1];
    FILE *says = fdopen(from[0], "r");
    bool listens = says != NULL && fscanf(says, "listening on %63s", base) == 1;
    if (says != NULL) fclose(says);
    if (!listens) waitpid(server.pid, NULL, 0);
    if (listens) snprintf(server.url, sizeof server.url, "%s/posts/7/likes", base);
    return listens;
}

static void stop_server(void) {
    orch_curl_free(server.client);
    close(server.input);
    waitpid(server.pid, NULL, 0);
}

static void check_answer(void) {
    orch_result r = orch_await(curl_call(0));
    bench_require(r.error == 0, orch_message(&r));
    bench_require(((orch_curl_response *)r.value)->status == 200, "the server does not answer 200");
    orch_result_free(&r);
}

static bool measure_curl(kind *k, const char *program) {
    *k = (kind){.name = "libcurl", .call = curl_call};
    raise_descriptor_limit();
    if (program == NULL || !start_server(program)) {
        printf("libcurl: skipped (no server program to start: pass its path)\n\n");
        return false;
    }
    server.client = orch_curl_new(NULL);
    bench_require(server.client != NULL, "no libcurl client");
    check_answer();
    measure_kind(k);
    stop_server();
    return true;
}
#else
static bool measure_curl(kind *k, const char *program) {
    (void)k;
    (void)program;
    printf("libcurl: skipped (built without libcurl; make deps installs it)\n\n");
    return false;
}
#endif

// ---- output

static const char *duration(double ms, char *text, size_t size) {
    if (ms < 1000) snprintf(text, size, "%.1f ms", ms);
    else snprintf(text, size, "%.2f s", ms / 1000);
    return text;
}

static void print_table(const kind *k) {
    char one[32], two[32];
    printf("%s, %d ms each\n", k->name, DELAY_MS);
    printf("%7s %12s %12s %8s\n", "calls", "sequential", "parallel", "ratio");
    for (size_t i = 0; i < SIZES; i++) {
        printf("%7zu %12s %12s %7.1fx\n", sizes[i], duration(k->sequential[i], one, sizeof one),
               duration(k->parallel[i], two, sizeof two), k->sequential[i] / k->parallel[i]);
    }
    printf("\n");
}

// A bar with an eighth of a column as its unit; logarithmic, from 1 ms.
static void print_bar(const char *label, double ms, double most) {
    static const char *const eighths[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
    char text[32];
    double length = ms <= 1 ? 0 : BAR_COLUMNS * chart_log10(ms) / chart_log10(most);
    size_t units = (size_t)(length * 8 + 0.5);
    printf("%s ", label);
    for (size_t i = 0; i < units / 8; i++) printf("█");
    printf("%s %s\n", units == 0 ? "▏" : eighths[units % 8], duration(ms, text, sizeof text));
}

static void print_bars(const kind *k) {
    char label[40];
    double most = k->sequential[SIZES - 1];
    printf("%s: time on a logarithmic scale\n", k->name);
    for (size_t i = 0; i < SIZES; i++) {
        snprintf(label, sizeof label, "%5zu sequential", sizes[i]);
        print_bar(label, k->sequential[i], most);
        print_bar("      parallel  ", k->parallel[i], most);
    }
    printf("\n");
}

static void draw(const kind *kinds, size_t count, const char *path) {
    static const char *const colours[2][2] = {{"#c2410c", "#1d4ed8"}, {"#a16207", "#0f766e"}};
    chart_series series[4];
    double x[SIZES];
    char names[4][64], note[160];
    for (size_t i = 0; i < SIZES; i++) x[i] = (double)sizes[i];
    for (size_t k = 0; k < count; k++) {
        for (size_t way = 0; way < 2; way++) {
            size_t s = 2 * k + way;
            snprintf(names[s], sizeof names[s], "%s, %s", way ? "parallel" : "sequential",
                     kinds[k].name);
            const double *y = way ? kinds[k].parallel : kinds[k].sequential;
            series[s] = (chart_series){names[s], colours[k][way], k > 0, SIZES, x, y};
        }
    }
    snprintf(note, sizeof note, "%d ms each; asyncorch.h %s, one thread; both axes logarithmic",
             DELAY_MS, ORCH_VERSION);
    const char *title = "The same calls, one after the other and side by side";
    chart c = {title, note, 2 * count, series, 0, 0};
    if (chart_write(&c, path)) printf("drawn: %s\n", path);
    else fprintf(stderr, "bench: cannot write %s\n", path);
}

static orch_result measure(void *arg) {
    char **paths = (char **)arg;
    kind kinds[2] = {{.name = "simulated", .call = simulated_call}};
    measure_kind(&kinds[0]);
    size_t count = measure_curl(&kinds[1], paths[1]) ? 2 : 1;
    for (size_t k = 0; k < count; k++) print_table(&kinds[k]);
    for (size_t k = 0; k < count; k++) print_bars(&kinds[k]);
    draw(kinds, count, paths[0]);
    return orch_ok(NULL, NULL);
}

int main(int argc, char **argv) {
    static char drawing[] = "parallel.svg";
    char *paths[2] = {argc > 1 ? argv[1] : drawing, argc > 2 ? argv[2] : NULL};
    return orch_exit(orch_run(measure, paths));
}
