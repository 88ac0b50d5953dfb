// server: the services of the demo, as a small HTTP server with delays and failures to order.
//
// shows   tasks on real sockets: one per connection, each an ordinary loop (see http_serve.h)
// run     ./server --port 8080 --delay likes=80 --fail comments=3 --hang likes=2
//         curl http://127.0.0.1:8080/users/1/posts
// prints
//         listening on http://127.0.0.1:8080
//
// It answers GET and HEAD of
//     /user/ID            {"id":1,"name":"Ada"}
//     /users/ID/posts     [{"id":1,"title":"Post 1"},...]      N posts from (ID-1)*N+1, see --posts
//     /posts/ID/comments  [{"id":11,"text":"Comment 1"},...]   ID % 3 + 1 of them
//     /posts/ID/likes     {"count":7}                          ID * 7 % 40

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include "http_serve.h"

#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>

enum { RULES_MAX = 64, ID_MAX = 1000000, POSTS_MAX = 100, DELAY_MAX = 600000 };
enum service { USER, POSTS, COMMENTS, LIKES, SERVICES };

static const char *const service_names[SERVICES] = {"user", "posts", "comments", "likes"};
static const char *const service_paths[SERVICES] = {"/user/%", "/users/%/posts",
                                                    "/posts/%/comments", "/posts/%/likes"};

typedef struct rule { // "this service fails, or hangs, for this ID"
    bool hang;
    int service; // SERVICES: all of them
    long id;     // 0: all of them
} rule;

static struct settings {
    long port, posts, error_rate, delay[SERVICES];
    const char *address;
    rule rules[RULES_MAX];
    int rule_count;
    bool until_eof;
    uint32_t dice; // of --error-rate: the same at every start
} settings = {.address = "127.0.0.1", .posts = 4, .dice = 2463534242u};

// ---- the services

// Matches a path like "/users/12/posts" against "/users/%/posts". Returns the number, or 0.
static long match(const char *path, const char *pattern) {
    size_t before = strcspn(pattern, "%");
    if (strncmp(path, pattern, before) != 0 || !isdigit((unsigned char)path[before])) return 0;
    char *end;
    errno = 0;
    long id = strtol(path + before, &end, 10);
    return errno == 0 && id <= ID_MAX && strcmp(end, pattern + before + 1) == 0 ? id : 0;
}

static bool roll_the_dice(void) { // xorshift; Marsaglia, Xorshift RNGs, 2003
    settings.dice ^= settings.dice << 13;
    settings.dice ^= settings.dice >> 17;
    settings.dice ^= settings.dice << 5;
    return settings.dice % 100 < (uint32_t)settings.error_rate;
}

static const rule *find_rule(int service, long id) {
    for (int i = 0; i < settings.rule_count; i++) {
        const rule *r = &settings.rules[i];
        if ((r->service == service || r->service == SERVICES) && (r->id == id || r->id == 0))
            return r;
    }
    return NULL;
}

// Appends to the answer; the sizes of lists are bounded so that all fits.
static void add(http_answer *a, const char *format, ...) ORCH_PRINTF(2, 3);
static void add(http_answer *a, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(a->body + a->length, sizeof a->body - a->length, format, args);
    va_end(args);
    if (n > 0 && (size_t)n < sizeof a->body - a->length) a->length += (size_t)n;
}

static void add_list(http_answer *a, long first, long count, const char *field, const char *text) {
    add(a, "[");
    for (long i = 0; i < count; i++)
        add(a, "%s{\"id\":%ld,\"%s\":\"%s %ld\"}", i > 0 ? "," : "", first + i, field, text,
            first + i);
    add(a, "]");
}

static void fill(http_answer *a, int service, long id) {
    static const char *const names[] = {"Ada", "Grace", "Alan", "Barbara", "Edsger"};
    a->status = 200;
    a->length = 0;
    switch (service) {
    case USER: add(a, "{\"id\":%ld,\"name\":\"%s\"}", id, names[(id - 1) % 5]); break;
    case POSTS: add_list(a, (id - 1) * settings.posts + 1, settings.posts, "title", "Post"); break;
    case COMMENTS: add_list(a, id * 10 + 1, id % 3 + 1, "text", "Comment"); break;
    default: add(a, "{\"count\":%ld}", id * 7 % 40); break;
    }
}

static int serve(const char *path, int fd, http_answer *answer, void *context) {
    (void)context;
    long id = 0;
    int service = 0;
    while (service < SERVICES && (id = match(path, service_paths[service])) == 0) service++;
    if (service == SERVICES) {
        http_refuse(answer, 404);
        return 0;
    }
    const rule *r = find_rule(service, id);
    if (r != NULL && r->hang) { // never answers, but notices when the client gives up
        int error = http_wait(fd, ORCH_READABLE, HTTP_NO_DEADLINE);
        return error != 0 ? error : -ECONNABORTED;
    }
    int error = settings.delay[service] > 0 ? orch_sleep((uint64_t)settings.delay[service]) : 0;
    if (r != NULL || roll_the_dice()) http_refuse(answer, 500);
    else fill(answer, service, id);
    return error;
}

// ---- the command line

static int usage(FILE *to, int code) {
    fputs("usage: server [options]\n"
          "  --port N              0 (the default) takes a free one\n"
          "  --address A           an IPv4 address; default 127.0.0.1\n"
          "  --delay SERVICE=MS    answers after MS milliseconds\n"
          "  --fail SERVICE=ID     answers 500 for this ID, or for all\n"
          "  --hang SERVICE=ID     never answers for this ID, or for all\n"
          "  --error-rate PERCENT  answers 500 to so many of all requests, picked at random\n"
          "  --posts N             posts of each user; default 4\n"
          "  --until-eof           ends when standard input does\n"
          "SERVICE is user, posts, comments, likes or all. Options can be repeated.\n",
          to);
    return code;
}

static bool read_number(const char *text, long max, long *out) {
    char *end;
    errno = 0;
    long n = isdigit((unsigned char)*text) ? strtol(text, &end, 10) : -1;
    if (n < 0 || *end != '\0' || errno != 0 || n > max) return false;
    *out = n;
    return true;
}

// "likes=80": the service (SERVICES: all) and the number (0 for "all", where that is allowed).
static bool read_pair(const char *text, int *service, long *number, long max, bool all) {
    const char *sign = strchr(text, '=');
    if (sign == NULL) return false;
    size_t n = (size_t)(sign - text);
    for (*service = 0; *service < SERVICES; ++*service)
        if (strlen(service_names[*service]) == n && strncmp(text, service_names[*service], n) == 0)
            break;
    if (*service == SERVICES && (n != 3 || strncmp(text, "all", 3) != 0)) return false;
    *number = 0;
    if (all && strcmp(sign + 1, "all") == 0) return true;
    return read_number(sign + 1, max, number) && (!all || *number > 0);
}

static bool read_option(const char *name, const char *value) {
    int service;
    long number;
    if (strcmp(name, "--port") == 0) return read_number(value, 65535, &settings.port);
    if (strcmp(name, "--posts") == 0) return read_number(value, POSTS_MAX, &settings.posts);
    if (strcmp(name, "--error-rate") == 0) return read_number(value, 100, &settings.error_rate);
    if (strcmp(name, "--address") == 0) {
        settings.address = value;
        return true;
    }
    if (strcmp(name, "--delay") == 0) {
        if (!read_pair(value, &service, &number, DELAY_MAX, false)) return false;
        for (int i = 0; i < SERVICES; i++)
            if (service == i || service == SERVICES) settings.delay[i] = number;
        return true;
    }
    bool hang = strcmp(name, "--hang") == 0;
    if (!hang && strcmp(name, "--fail") != 0) return false;
    if (settings.rule_count == RULES_MAX || !read_pair(value, &service, &number, ID_MAX, true))
        return false;
    settings.rules[settings.rule_count++] = (rule){hang, service, number};
    return true;
}

static int read_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) return usage(stdout, -1);
        if (strcmp(argv[i], "--until-eof") == 0) {
            settings.until_eof = true;
        } else if (i + 1 == argc || !read_option(argv[i], argv[i + 1])) {
            fprintf(stderr, "server: cannot use \"%s%s%s\"\n", argv[i], i + 1 < argc ? " " : "",
                    i + 1 < argc ? argv[i + 1] : "");
            return usage(stderr, 2);
        } else {
            i++;
        }
    }
    return 0;
}

// ---- start and end

static int stop_pipe[2];

static void on_signal(int number) { // all that a signal handler may do
    (void)number;
    ssize_t ignored = write(stop_pipe[1], "", 1);
    (void)ignored;
}

static orch_result wait_for_signal(void *arg) {
    (void)arg;
    return orch_chain(orch_ready(stop_pipe[0], ORCH_READABLE));
}

static orch_result wait_for_eof(void *arg) {
    (void)arg;
    char skipped[256];
    for (;;) {
        orch_result r = orch_await(orch_ready(STDIN_FILENO, ORCH_READABLE));
        if (r.error != 0 || read(STDIN_FILENO, skipped, sizeof skipped) <= 0) return r;
        orch_result_free(&r);
    }
}

static orch_result start(void *arg) {
    orch_future *ends[3];
    size_t count = 2;
    ends[0] = orch_go(http_serve, arg);
    ends[1] = orch_go(wait_for_signal, NULL);
    if (settings.until_eof) ends[count++] = orch_go(wait_for_eof, NULL);
    return orch_await(orch_race_n(count, ends)); // connections still open are ended by orch_run
}

// Thousands of connections need more descriptors than the usual 1024.
static void raise_descriptor_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= 65536) return;
    limit.rlim_cur = limit.rlim_max < 65536 ? limit.rlim_max : 65536;
    setrlimit(RLIMIT_NOFILE, &limit);
}

int main(int argc, char **argv) {
    int bad = read_options(argc, argv);
    if (bad != 0) return bad < 0 ? 0 : bad;
    raise_descriptor_limit();
    signal(SIGPIPE, SIG_IGN);
    if (pipe(stop_pipe) != 0 || !http_nonblocking(stop_pipe[1]))
        return orch_exit(orch_fail(-errno));
    signal(SIGINT, on_signal);
    signal(SIGTERM, on_signal);

    uint16_t port = (uint16_t)settings.port;
    int listener = http_listen(settings.address, &port);
    if (listener < 0) {
        fprintf(stderr, "server: cannot listen on %s:%ld: %s\n", settings.address, settings.port,
                orch_error_text(listener));
        return 1;
    }
    printf("listening on http://%s:%u\n", settings.address, (unsigned)port);
    fflush(stdout);
    http_server server = {listener, serve, NULL, 0};
    int code = orch_exit(orch_run(start, &server));
    close(listener);
    return code;
}
