// 07_fetch: fetches a list of URLs, so many at once, each with a time limit.
//
// shows   a bound on concurrency by worker tasks over one list; orch_timeout around each transfer;
//         libcurl by orch_curl.h (without its headers: http_get.h)
// run     ./server --port 8080 --hang likes=2 &
//         for path in /user/1 /nothing /posts/2/likes; do
//             echo http://127.0.0.1:8080$path
//         done >list
//         ./07_fetch -j 4 -t 200 -f list http://127.0.0.1:1/
// prints  (and on a terminal a progress bar while it runs)
//          status      bytes      ms  URL
//             200         21       2  http://127.0.0.1:8080/user/1
//             404         21       1  http://127.0.0.1:8080/nothing
//         timeout          -     201  http://127.0.0.1:8080/posts/2/likes
//          failed          -       1  http://127.0.0.1:1/
//                                     (Failed to connect to 127.0.0.1 port 1 after 0 ms: ...)
//         4 URLs: 1 fetched, 3 not, 42 bytes, 202 ms, by libcurl 7.88.1

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <ctype.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "client.h"

enum { WORKERS_MAX = 1000, LINE_MAX_BYTES = 8192, BAR = 30 };

typedef struct fetch {
    char *url;
    int error; // 0: there is a status
    long status;
    size_t bytes;
    uint64_t ms;
    char *message;
} fetch;

static struct job {
    fetch *list;
    size_t count, capacity, next, done, bad;
    unsigned long workers, timeout_ms;
    client *client;
    bool bar; // standard error is a terminal
} job = {.workers = 8, .timeout_ms = 10000};

static void *need(void *memory) {
    if (memory != NULL) return memory;
    fputs("07_fetch: out of memory\n", stderr);
    exit(1);
}

static char *copy(const char *text) {
    size_t size = strlen(text) + 1;
    return memcpy(need(malloc(size)), text, size);
}

// ---- fetching

static void draw_bar(void) {
    if (!job.bar) return;
    int full = (int)(job.done * BAR / job.count);
    fprintf(stderr, "\r[%.*s%*s] %zu/%zu", full, "##############################", BAR - full, "",
            job.done, job.count);
    if (job.bad > 0) fprintf(stderr, ", %zu not fetched", job.bad);
    fputs(job.done == job.count ? "\r\033[K" : "\033[K", stderr); // cleared at the end
}

static void fetch_one(fetch *f) {
    uint64_t begin = orch_now();
    orch_result r = orch_await(orch_timeout(client_get(job.client, f->url), job.timeout_ms));
    f->ms = orch_now() - begin;
    f->error = r.error;
    if (r.error == 0) {
        const client_response *response = r.value;
        f->status = response->status;
        f->bytes = response->length;
    } else if (r.error != ORCH_ETIMEDOUT) {
        f->message = copy(orch_message(&r));
    }
    orch_result_free(&r);
    job.done++;
    job.bad += f->error != 0 || f->status >= 400;
    draw_bar();
}

// As many of these run as transfers may run at once; each takes the next URL until none is left.
static orch_result worker(void *arg) {
    (void)arg;
    while (job.next < job.count) fetch_one(&job.list[job.next++]);
    return orch_ok(NULL, NULL);
}

static orch_result start(void *arg) {
    (void)arg;
    job.client = client_new(true); // of the bodies only the sizes count
    if (job.client == NULL) return orch_failf(ORCH_ENOMEM, "no HTTP client");
    size_t count = job.workers < job.count ? job.workers : job.count;
    orch_future **workers = need(malloc(count * sizeof *workers));
    draw_bar();
    for (size_t i = 0; i < count; i++) workers[i] = orch_go(worker, NULL);
    orch_result r = orch_await(orch_all_n(count, workers));
    free(workers);
    client_free(job.client);
    return r;
}

// ---- the table

static void print_table(uint64_t ms) {
    size_t bytes = 0;
    printf("%7s %10s %7s  URL\n", "status", "bytes", "ms");
    for (size_t i = 0; i < job.count; i++) {
        const fetch *f = &job.list[i];
        const char *word = f->error == ORCH_ETIMEDOUT ? "timeout" : "failed";
        if (f->error == 0) printf("%7ld %10zu %7d  %s\n", f->status, f->bytes, (int)f->ms, f->url);
        else printf("%7s %10s %7d  %s\n", word, "-", (int)f->ms, f->url);
        if (f->message != NULL) printf("%28s(%s)\n", "", f->message);
        bytes += f->bytes;
    }
    printf("%zu URL%s: %zu fetched, %zu not, %zu bytes, %d ms, by %s\n", job.count,
           job.count == 1 ? "" : "s", job.count - job.bad, job.bad, bytes, (int)ms, client_name());
}

// ---- the command line

static int usage(FILE *to, int code) {
    fputs(
        "usage: 07_fetch [-j N] [-t MS] [-f FILE] [URL...]\n"
        "  -j N     at most N transfers at once, 1 to 1000; default 8\n"
        "  -t MS    time limit of each URL in milliseconds, 1 to 3600000; default 10000\n"
        "  -f FILE  takes URLs from FILE too, one a line, # starts a comment; - is standard input\n"
        "Ends with 0 when every URL answered with a status below 400, else with 1.\n",
        to);
    return code;
}

// Says what is wrong with the command line.
static bool refuse(const char *what, const char *value) {
    fprintf(stderr, "07_fetch: %s: %s\n", what, value);
    return false;
}

static bool add_url(const char *url) {
    for (const char *p = url; *p != '\0'; p++)
        if ((unsigned char)*p <= ' ' || *p == 127)
            return refuse("space or control character in URL", url);
    if (strstr(url, "://") == NULL) return refuse("not a URL (http://... or https://...)", url);
    if (job.count == job.capacity) {
        job.capacity = job.capacity > 0 ? 2 * job.capacity : 64;
        job.list = need(realloc(job.list, job.capacity * sizeof *job.list));
    }
    job.list[job.count++] = (fetch){.url = copy(url)};
    return true;
}

static bool add_file(const char *name) {
    char line[LINE_MAX_BYTES];
    FILE *file = strcmp(name, "-") == 0 ? stdin : fopen(name, "r");
    if (file == NULL) {
        fprintf(stderr, "07_fetch: cannot read %s: %s\n", name, strerror(errno));
        return false;
    }
    bool good = true;
    while (good && fgets(line, sizeof line, file) != NULL) {
        if (strchr(line, '\n') == NULL && !feof(file))
            good = refuse("line of more than 8190 bytes in", name);
        char *first = line + strspn(line, " \t"), *end = first + strcspn(first, "\r\n");
        while (end > first && isspace((unsigned char)end[-1])) end--;
        *end = '\0';
        if (good && *first != '\0' && *first != '#') good = add_url(first);
    }
    if (good && ferror(file)) good = refuse("cannot read", name);
    if (file != stdin) fclose(file);
    return good;
}

static bool read_number(const char *text, unsigned long max, unsigned long *out) {
    char *end;
    errno = 0;
    *out = isdigit((unsigned char)*text) ? strtoul(text, &end, 10) : 0;
    return *out > 0 && *end == '\0' && errno == 0 && *out <= max;
}

static bool read_options(int argc, char **argv) {
    int option;
    while ((option = getopt(argc, argv, ":j:t:f:")) != -1) {
        const char letter[3] = {'-', (char)optopt, '\0'};
        if (option == '?') return refuse("no such option", letter);
        if (option == ':') return refuse("value missing after option", letter);
        if (option == 'j' && !read_number(optarg, WORKERS_MAX, &job.workers))
            return refuse("-j takes a number from 1 to 1000, not", optarg);
        if (option == 't' && !read_number(optarg, 3600000, &job.timeout_ms))
            return refuse("-t takes milliseconds from 1 to 3600000, not", optarg);
        if (option == 'f' && !add_file(optarg)) return false;
    }
    for (; optind < argc; optind++)
        if (!add_url(argv[optind])) return false;
    return job.count > 0 || refuse("nothing to fetch", "give a URL or -f FILE");
}

// So many connections may need more descriptors than the usual 1024 or 256.
static void raise_descriptor_limit(void) {
    struct rlimit limit;
    rlim_t wanted = job.workers + 64;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
    limit.rlim_cur = limit.rlim_max < wanted ? limit.rlim_max : wanted;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static void free_list(void) {
    for (size_t i = 0; i < job.count; i++) {
        free(job.list[i].url);
        free(job.list[i].message);
    }
    free(job.list);
}

int main(int argc, char **argv) {
    if (argc == 2 && (strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "--help") == 0))
        return usage(stdout, 0);
    int code = 2;
    if (read_options(argc, argv)) {
        signal(SIGPIPE, SIG_IGN); // a server that hangs up is an error of its URL, not our end
        raise_descriptor_limit();
        job.bar = isatty(STDERR_FILENO) != 0;
        uint64_t begin = orch_now();
        code = orch_exit(orch_run(start, NULL));
        if (code == 0) print_table(orch_now() - begin);
        if (job.bad > 0) code = 1;
    } else {
        usage(stderr, 2);
    }
    free_list();
    return code;
}
