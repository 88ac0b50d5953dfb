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
#include <stdlib.h>
#include <unistd.h>

enum { BODY_MAX = 8192, RULES_MAX = 64, ID_MAX = 1000000, POSTS_MAX = 100, DELAY_MAX = 600000 };
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

typedef struct answer {
    int status;
    size_t length;
    char body[BODY_MAX];
} answer;

// Appends to the answer; the sizes of lists are bounded so that all fits.
static void add(answer *a, const char *format, ...) ORCH_PRINTF(2, 3);
static void add(answer *a, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(a->body + a->length, sizeof a->body - a->length, format, args);
    va_end(args);
    if (n > 0 && (size_t)n < sizeof a->body - a->length) a->length += (size_t)n;
}

static void add_list(answer *a, long first, long count, const char *field, const char *text) {
    add(a, "[");
    for (long i = 0; i < count; i++)
        add(a, "%s{\"id\":%ld,\"%s\":\"%s %ld\"}", i > 0 ? "," : "", first + i, field, text,
            first + i);
    add(a, "]");
}

static void fill(answer *a, int service, long id) {
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

static void fail(answer *a, int status) {
    a->status = status;
    a->length = 0;
    add(a, "{\"error\":\"%s\"}", http_reason(status));
}

static int wait_and_fill(answer *a, int service, long id, int fd) {
    const rule *r = find_rule(service, id);
    if (r != NULL && r->hang) { // never answers, but notices when the client gives up
        orch_result came = orch_await(orch_ready(fd, ORCH_READABLE));
        int error = came.error != 0 ? came.error : -ECONNABORTED;
        orch_result_free(&came);
        return error;
    }
    int error = settings.delay[service] > 0 ? orch_sleep((uint64_t)settings.delay[service]) : 0;
    if (r != NULL || roll_the_dice()) fail(a, 500);
    else fill(a, service, id);
    return error;
}

static int serve(http_connection *c, void *context) {
    answer a;
    long id = 0;
    int service = 0, error = 0;
    (void)context;
    while (service < SERVICES && (id = match(c->request.path, service_paths[service])) == 0)
        service++;
    if (service == SERVICES) fail(&a, 404);
    else error = wait_and_fill(&a, service, id, c->fd);
    if (error != 0) return error;
    return http_begin(c, a.status, "Content-Type: application/json\r\n", a.length, a.body,
                      a.length);
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

static orch_result wait_for_eof(void *arg) {
    (void)arg;
    char skipped[256];
    for (;;) {
        orch_result r = orch_await(orch_ready(STDIN_FILENO, ORCH_READABLE));
        if (r.error != 0 || read(STDIN_FILENO, skipped, sizeof skipped) <= 0) return r;
        orch_result_free(&r);
    }
}

static orch_result accept_and_serve(void *arg) {
    int listener = *(int *)arg;
    http_service service = {serve, NULL, 0};
    return orch_fail(orch_serve(listener, http_connected,
                                &(orch_serve_desc){.context = &service,
                                                   .max_connections = HTTP_CONNECTIONS_MAX,
                                                   .no_drain = true}));
}

static orch_result start(void *arg) {
    orch_future *ends[4];
    size_t count = 3;
    char where[ORCH_ADDRESS_TEXT];
    orch_address address;
    int listener =
        orch_listen(&(orch_listen_desc){.host = settings.address, .port = (uint16_t)settings.port});
    if (listener < 0)
        return orch_failf(listener, "server: cannot listen on %s:%ld: %s", settings.address,
                          settings.port, orch_error_text(listener));
    (void)arg;
    ends[0] = orch_go(accept_and_serve, &listener);
    ends[1] = orch_signal(SIGINT);
    ends[2] = orch_signal(SIGTERM);
    if (settings.until_eof) ends[count++] = orch_go(wait_for_eof, NULL);
    orch_socket_address(listener, &address);
    printf("listening on http://%s\n", orch_address_text(&address, where, sizeof where));
    fflush(stdout); // who reads it may end this process with a signal: by now that is waited for
    return orch_await(orch_race_n(count, ends)); // which ends the connections that are open
}

int main(int argc, char **argv) {
    int bad = read_options(argc, argv);
    if (bad != 0) return bad < 0 ? 0 : bad;
    http_raise_descriptor_limit();
    return orch_exit(orch_run(start, NULL));
}
