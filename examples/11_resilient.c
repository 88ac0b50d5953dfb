// 11_resilient: many URLs of a flaky server, each fetched in the end.
//
// shows   policies around one plain function, from the inside out: orch_hedge (a slow answer gets a
//         second request), orch_limit (so many requests a second), orch_retry (with back-off and
//         jitter), orch_map (so many URLs at once, results in order); a live progress line
// run     ./server --port 8080 --error-rate 30 --delay likes=20 --hang likes=7 &
//         ./11_resilient http://127.0.0.1:8080 40
// prints  (and on a terminal a progress line while it runs)
//         39 of 40 URLs fetched, 1 given up
//         requests 69, retries 8, hedges 21, at most 200 a second, by libcurl 7.88.1
//         slowest: /posts/7/likes after 6 attempts

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "client.h"

enum { URLS_MAX = 1000, AT_ONCE = 8, PER_SECOND = 200 };

typedef struct item {
    char url[256];
    unsigned attempts;
} item;

static struct job {
    item list[URLS_MAX];
    size_t count, done, bad;
    unsigned requests, retries, hedges;
    client *client;
    orch_limiter *limiter;
} job;

static void progress(void) {
    if (!isatty(2)) return;
    fprintf(stderr, "\r%zu/%zu done, %zu given up, %u requests, %u retries, %u hedges\033[K%s",
            job.done, job.count, job.bad, job.requests, job.retries, job.hedges,
            job.done == job.count ? "\r\033[K" : "");
}

// One request: this is all there is to write; the rest is policy.
static orch_result request(void *arg) {
    item *it = arg;
    job.hedges += orch_attempt_number() > 1;
    int error = orch_limit(job.limiter, 1);
    if (error != 0) return orch_fail(error);
    job.requests++;
    orch_result r = orch_await(client_get(job.client, it->url));
    if (r.error != 0) return r;
    long status = ((const client_response *)r.value)->status;
    orch_result_free(&r);
    return status == 200 ? orch_ok_int(status) : orch_failf((int)status, "status %ld", status);
}

// One attempt: a request, and a second one when the first takes long.
static orch_result attempt(void *arg) {
    ((item *)arg)->attempts++;
    job.retries += orch_attempt_number() > 1;
    orch_hedge_desc hedge = {.fn = request, .arg = arg, .attempts = 2, .delay_ms = 60};
    return orch_chain(orch_hedge(&hedge));
}

static orch_result fetch(size_t index, void *context) {
    (void)context;
    orch_retry_desc retry = {.fn = attempt,
                             .arg = &job.list[index],
                             .attempts = 6,
                             .delay_ms = 20,
                             .max_delay_ms = 200,
                             .jitter = ORCH_JITTER_FULL,
                             .timeout_ms = 250};
    orch_result r = orch_await(orch_retry(&retry));
    job.done++;
    job.bad += r.error != 0;
    progress();
    return r;
}

static void report(void) {
    const item *slowest = &job.list[0];
    for (size_t i = 0; i < job.count; i++) {
        if (job.list[i].attempts > slowest->attempts) slowest = &job.list[i];
    }
    printf("%zu of %zu URLs fetched, %zu given up\n", job.count - job.bad, job.count, job.bad);
    printf("requests %u, retries %u, hedges %u, at most %d a second, by %s\n", job.requests,
           job.retries, job.hedges, PER_SECOND, client_name());
    printf("slowest: %s after %u attempts\n", strstr(slowest->url, "/posts"), slowest->attempts);
}

static orch_result start(void *arg) {
    (void)arg;
    orch_limiter_desc limit = {.limit = PER_SECOND, .interval_ms = 1000, .burst = 20};
    job.limiter = orch_limiter_new(&limit);
    job.client = client_new(true);
    orch_map_desc map = {
        .count = job.count, .fn = fetch, .concurrency = AT_ONCE, .keep_going = true};
    orch_result r = orch_await(orch_map(&map)); // in order: orch_at(&r, i)
    if (r.error == 0) report();
    client_free(job.client);
    orch_limiter_free(job.limiter);
    return r;
}

int main(int argc, char **argv) {
    long count = argc == 3 ? strtol(argv[2], NULL, 10) : 0;
    if (count < 1 || count > URLS_MAX || strlen(argv[1]) > 200) {
        fprintf(stderr, "usage: %s http://HOST:PORT COUNT   (1 to %d URLs)\n", argv[0], URLS_MAX);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    job.count = (size_t)count;
    for (size_t i = 0; i < job.count; i++) {
        snprintf(job.list[i].url, sizeof job.list[i].url, "%s/posts/%zu/likes", argv[1], i + 1);
    }
    return orch_exit(orch_run(start, NULL));
}
