// 08_profile: the demo. The profile of a user, put together from four services over real sockets.
//
// shows   get the user, then the posts, then for every post comments and likes side by side; each
//         call guarded by orch_timeout, each pair settled by orch_all_settled, so that what fails
//         or hangs degrades to an empty list or 0; and the same one call after the other
// run     sh examples/demo.sh (starts the services, too)
// prints  four pictures such as this, of a run in sequence, one in parallel, one in which the likes
//         of post 10 hang and one in which the comments of post 7 fail; then the first two's times
//         and their ratio
//                           0         100       200       300       ms
//                           |    '    |    '    |    '    |
//         user         41 ms ████✓
//         posts        51 ms     █████✓
//         comments 9   81 ms          ████████✓
//         likes 9      41 ms          ████✓
//         comments 10  81 ms          ████████✓
//         likes 10    250 ms          █████████████████████████⏱
//         ...
//         Alan: 4 posts, 7 comments, 64 likes
//           post 10: likes degraded to 0: Timeout after 250 ms

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "client.h"
#include "json.h"
#include "timeline.h"

enum { POSTS_MAX = 20, TIMEOUT_MS = 250 };
enum { HEALTHY_USER = 1, FAILING_USER = 2, HANGING_USER = 3 }; // as demo.sh sets the server up

typedef struct profile {
    long user, count;
    char name[40];
    struct post {
        long id, comments, likes;
        char no_comments[120], no_likes[120]; // why they degraded; "": they did not
    } posts[POSTS_MAX];
} profile;

static const char *services; // "http://127.0.0.1:8080"
static client *http;
static timeline *picture; // of the run in progress

// ---- a call: a guarded GET that leaves its row in the picture

typedef struct call {
    timeline *picture;
    size_t row;
} call;

static orch_result on_answer(orch_result *in, void *context) {
    const call *c = context;
    const client_response *response = in->value;
    bool good = response->status == 200;
    timeline_end(c->picture, c->row, orch_now(), good ? TIMELINE_OK : TIMELINE_FAILED);
    if (good) return *in;
    return orch_failf((int)response->status, "HTTP status %ld", response->status);
}

static orch_result on_failure(orch_result *in, void *context) {
    const call *c = context;
    timeline_end(c->picture, c->row, orch_now(),
                 in->error == ORCH_ETIMEDOUT ? TIMELINE_TIMEOUT : TIMELINE_FAILED);
    return *in;
}

static orch_future *get(const char *name, const char *format, long id) {
    char path[64], url[256];
    snprintf(path, sizeof path, format, id);
    snprintf(url, sizeof url, "%s%s", services, path);
    call *c = malloc(sizeof *c);
    if (c == NULL) return orch_settled(orch_fail(ORCH_ENOMEM));
    *c = (call){picture, timeline_begin(picture, orch_now(), name)};
    orch_future *f = orch_timeout(client_get(http, url), TIMEOUT_MS);
    return orch_then_with(f, &(orch_then_desc){on_answer, on_failure, c, free});
}

static orch_future *get_comments(const struct post *post) {
    char name[32];
    snprintf(name, sizeof name, "comments %ld", post->id);
    return get(name, "/posts/%ld/comments", post->id);
}

static orch_future *get_likes(const struct post *post) {
    char name[32];
    snprintf(name, sizeof name, "likes %ld", post->id);
    return get(name, "/posts/%ld/likes", post->id);
}

// ---- what the answers say

static const char *body_of(const orch_result *r) {
    return ((const client_response *)r->value)->body;
}

// Without these two there is no profile: they consume the answer and return what went wrong, if
// anything.
static orch_result read_user(profile *p, orch_result r) {
    if (r.error != 0) return r;
    json j = {body_of(&r), false};
    bool good = json_object(&j, 0, "name", NULL, p->name, sizeof p->name);
    orch_result_free(&r);
    return good ? orch_ok(NULL, NULL) : orch_failf(-EPROTO, "not a user");
}

static orch_result read_posts(profile *p, orch_result r) {
    if (r.error != 0) return r;
    long ids[POSTS_MAX];
    long count = json_ids(body_of(&r), ids, POSTS_MAX);
    orch_result_free(&r);
    if (count < 0 || count > POSTS_MAX)
        return orch_failf(-EPROTO, "not a list of at most %d posts", POSTS_MAX);
    for (p->count = 0; p->count < count; p->count++)
        p->posts[p->count] = (struct post){.id = ids[p->count]};
    return orch_ok(NULL, NULL);
}

// These two degrade: an empty list, 0.
static void read_comments(struct post *post, const orch_result *r) {
    if (r->error == 0) post->comments = json_ids(body_of(r), NULL, 0);
    if (r->error == 0 && post->comments >= 0) return;
    post->comments = 0;
    snprintf(post->no_comments, sizeof post->no_comments, "%s",
             r->error == 0 ? "bad JSON" : orch_message(r));
}

static void read_likes(struct post *post, const orch_result *r) {
    json j = {r->error == 0 ? body_of(r) : "", false};
    if (r->error == 0 && json_object(&j, 0, "count", &post->likes, NULL, 0)) return;
    post->likes = 0;
    snprintf(post->no_likes, sizeof post->no_likes, "%s",
             r->error == 0 ? "bad JSON" : orch_message(r));
}

// ---- the orchestration

static void load_posts_in_sequence(profile *p) {
    for (long i = 0; i < p->count; i++) {
        orch_result r = orch_await(get_comments(&p->posts[i]));
        read_comments(&p->posts[i], &r);
        orch_result_free(&r);
        r = orch_await(get_likes(&p->posts[i]));
        read_likes(&p->posts[i], &r);
        orch_result_free(&r);
    }
}

static void load_posts_in_parallel(profile *p) {
    orch_future *pairs[POSTS_MAX];
    for (long i = 0; i < p->count; i++) {
        orch_future *comments = get_comments(&p->posts[i]); // both run from here on
        orch_future *likes = get_likes(&p->posts[i]);
        pairs[i] = orch_all_settled(comments, likes);
    }
    orch_result r = orch_await(orch_all_n((size_t)p->count, pairs));
    for (long i = 0; i < p->count; i++) {
        const orch_result *pair = orch_at(&r, (size_t)i);
        read_comments(&p->posts[i], orch_at(pair, 0));
        read_likes(&p->posts[i], orch_at(pair, 1));
    }
    orch_result_free(&r);
}

static orch_result load(profile *p, bool parallel) {
    orch_result r = read_user(p, orch_await(get("user", "/user/%ld", p->user)));
    if (r.error == 0) r = read_posts(p, orch_await(get("posts", "/users/%ld/posts", p->user)));
    if (r.error == 0 && parallel) load_posts_in_parallel(p);
    if (r.error == 0 && !parallel) load_posts_in_sequence(p);
    return r;
}

// ---- the demo

static void print_profile(const profile *p) {
    long comments = 0, likes = 0;
    for (long i = 0; i < p->count; i++) {
        comments += p->posts[i].comments;
        likes += p->posts[i].likes;
    }
    printf("%s: %ld posts, %ld comments, %ld likes\n", p->name, p->count, comments, likes);
    for (long i = 0; i < p->count; i++) {
        const struct post *post = &p->posts[i];
        const char *format = "  post %ld: %s: %s\n";
        if (*post->no_comments != '\0')
            printf(format, post->id, "comments degraded to an empty list", post->no_comments);
        if (*post->no_likes != '\0')
            printf(format, post->id, "likes degraded to 0", post->no_likes);
    }
}

// Loads and draws one profile. Returns the milliseconds it took, or the error.
static orch_result run(const char *title, long user, bool parallel) {
    profile p = {.user = user};
    timeline lines = {.zero = orch_now()};
    picture = &lines;
    orch_result r = load(&p, parallel);
    uint64_t ms = orch_now() - lines.zero;
    printf("%s\n", title);
    timeline_print(&lines);
    if (r.error == 0) print_profile(&p);
    putchar('\n');
    fflush(stdout);
    return r.error == 0 ? orch_ok_int((intptr_t)ms) : r;
}

static orch_result run_all(void) {
    orch_result slow = run("In sequence:", HEALTHY_USER, false);
    if (slow.error != 0) return slow;
    orch_result fast = run("In parallel:", HEALTHY_USER, true);
    if (fast.error != 0) return fast;
    orch_result r = run("In parallel, and the likes of post 10 hang:", HANGING_USER, true);
    if (r.error == 0) r = run("In parallel, and the comments of post 7 fail:", FAILING_USER, true);
    printf("sequential %d ms, parallel %d ms: %.1f times as fast\n", (int)orch_int(&slow),
           (int)orch_int(&fast),
           (double)orch_int(&slow) / (double)(orch_int(&fast) + !orch_int(&fast)));
    return r;
}

static orch_result start(void *arg) {
    services = arg;
    http = client_new(false);
    if (http == NULL) return orch_failf(ORCH_ENOMEM, "no HTTP client");
    printf("The services are at %s.\nThe client is %s. One column is %d ms.\n\n", services,
           client_name(), TIMELINE_COLUMN_MS);
    orch_result r = run_all();
    client_free(http);
    return r;
}

int main(int argc, char **argv) {
    if (argc != 2 || strncmp(argv[1], "http://", 7) != 0 || strlen(argv[1]) > 128) {
        fputs("usage: 08_profile http://ADDRESS:PORT (of examples/server; examples/demo.sh starts "
              "both)\n",
              stderr);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    return orch_exit(orch_run(start, argv[1]));
}
