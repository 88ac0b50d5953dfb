// orch_curl.h - libcurl transfers as futures, on asyncorch.h. Public domain.
//
//     #define ASYNCORCH_IMPLEMENTATION   // in one .c file
//     #include "asyncorch.h"
//     #define ORCH_CURL_IMPLEMENTATION   // in one .c file, after asyncorch.h
//     #include "orch_curl.h"
//     cc program.c -lcurl
//
//     orch_curl *c = orch_curl_new(NULL);
//     orch_result r = orch_await(orch_timeout(orch_curl_get(c, "https://example.org/"), 2000));
//     if (r.error == 0) puts(((orch_curl_response *)r.value)->body);
//     orch_result_free(&r);
//     orch_curl_free(c);
//
// How it works: libcurl's multi-socket interface tells which descriptors and which timer it waits
// for; each becomes an orch_ready or orch_after whose callback calls curl_multi_socket_action from
// the loop. libcurl is never entered from one of its own callbacks. Written for libcurl 7.30 and
// later.

#ifndef ORCH_CURL_H
#define ORCH_CURL_H

#include <curl/curl.h>
#include <stdbool.h>
#include <stddef.h>

typedef struct orch_curl orch_curl; // connections, kept alive between transfers; one loop's

typedef struct orch_curl_desc {
    long max_connections; // open at once, further transfers wait; default: no limit
    size_t max_body;      // bytes a transfer may bring, more is -EMSGSIZE; default: 64 MiB
    bool discard_body;    // count the body and keep nothing of it; max_body is then not looked at
} orch_curl_desc;

// What a transfer is fulfilled with. The result owns it and everything in it.
typedef struct orch_curl_response {
    long status;   // 200, 404, ...; 0 for protocols that have none
    size_t length; // bytes of the body
    char *body;    // never NULL, with a 0 behind its last byte; "" when it is discarded
} orch_curl_response;

/* Makes a client of this thread's loop.
 * Returns the client; NULL when out of memory, without a loop, or when libcurl cannot start.
 * Context: loop thread; does not suspend.
 * Owns: hands over the client, for orch_curl_free. desc NULL: all defaults. */
orch_curl *orch_curl_new(const orch_curl_desc *desc);

/* Ends a client: transfers in progress are rejected with ORCH_ECANCELED, connections are closed.
 * Returns nothing.
 * Context: loop thread, while its loop exists; does not suspend.
 * Owns: consumes c. NULL does nothing. */
void orch_curl_free(orch_curl *c);

/* Starts to GET a http or https URL; redirects are not followed. An answer of any status, 404 and
 * 500 included, fulfils the future: it is the caller who knows what a status means.
 * Returns a future of an orch_curl_response, never NULL. Rejected: ORCH_ETIMEDOUT for a timeout of
 * libcurl's own, ORCH_ENOMEM, -EMSGSIZE for a body above max_body, ORCH_EINVAL for NULL, else the
 * positive CURLcode (CURLE_COULDNT_CONNECT) with libcurl's message. Dropping it cancels it.
 * Context: loop thread; does not suspend.
 * Owns: borrows url during the call; hands the future over. */
ORCH_NODISCARD orch_future *orch_curl_get(orch_curl *c, const char *url);

/* Starts the transfer that an easy handle describes: any method, headers, protocol and option but
 * for CURLOPT_WRITEFUNCTION, _WRITEDATA, _PRIVATE, _ERRORBUFFER and _NOSIGNAL, which are set here.
 * Returns a future as orch_curl_get; ORCH_EINVAL also when easy is NULL.
 * Context: loop thread; does not suspend.
 * Owns: consumes easy (curl_easy_cleanup when the transfer has ended, also on failure). What its
 * options point to, such as a header list, must live until the future has settled. */
ORCH_NODISCARD orch_future *orch_curl_send(orch_curl *c, CURL *easy);

/* How many transfers have not ended.
 * Returns the count.
 * Context: loop thread.
 * Owns: borrows c. */
size_t orch_curl_running(const orch_curl *c);

#endif // ORCH_CURL_H

#ifdef ORCH_CURL_IMPLEMENTATION

#include <errno.h>
#include <stdlib.h>
#include <string.h>

typedef struct orch_curl_transfer {
    orch_curl *client;
    struct orch_curl_transfer *next, **link; // in client->transfers
    CURL *easy;
    orch_promise promise;
    orch_curl_response *response;
    size_t capacity;
    int error; // why the body was refused, 0: it was not
    char message[CURL_ERROR_SIZE];
} orch_curl_transfer;

// A descriptor and what libcurl waits for on it; never changed, but replaced. Held by libcurl's
// socket table until CURL_POLL_REMOVE, and by the callback in flight, which may still come after
// that.
typedef struct orch_curl_watch {
    orch_curl *client;                    // NULL: removed
    struct orch_curl_watch *next, **link; // in client->watches
    curl_socket_t fd;
    int events;         // ORCH_READABLE | ORCH_WRITABLE
    orch_future *ready; // the orch_ready in flight, with its callback
    unsigned references;
} orch_curl_watch;

struct orch_curl {
    CURLM *multi;
    orch_curl_desc desc;
    orch_curl_transfer *transfers;
    orch_curl_watch *watches;
    size_t running;
    orch_future *timer;  // libcurl's one timer, with its callback, or NULL
    int broken;          // libcurl could not be served: the error that ends every transfer, or 0
    bool freed;          // by its owner
    unsigned references; // the owner's, and one for each callback that may still come
};

static void orch_curl_unref(void *context) {
    orch_curl *c = context;
    if (--c->references == 0) free(c);
}

static void orch_curl_watch_unref(void *context) {
    orch_curl_watch *w = context;
    if (--w->references == 0) free(w);
}

// f and then fn. Returns NULL when out of memory; release was then called.
static orch_future *orch_curl_chain(orch_future *f, orch_then_fn fn, void *context,
                                    void (*release)(void *context)) {
    f = orch_then_with(f, &(orch_then_desc){fn, fn, context, release});
    if (!orch_is_settled(f)) return f;
    orch_drop(f);
    return NULL;
}

// Gives up a chain. Not by orch_drop, which in a task may suspend: libcurl may be on the stack
// here.
static void orch_curl_forget(orch_future **f) {
    if (*f == NULL) return;
    orch_cancel(*f, 0);
    orch_detach(*f);
    *f = NULL;
}

// ---- transfers

static char orch_curl_empty[1]; // the body of a response that has none

static void orch_curl_response_free(void *value) {
    orch_curl_response *response = value;
    if (response->body != orch_curl_empty) free(response->body);
    free(response);
}

static size_t orch_curl_on_body(char *data, size_t size, size_t count, void *user) {
    orch_curl_transfer *t = user;
    orch_curl_response *response = t->response;
    const orch_curl_desc *desc = &t->client->desc;
    size_t n = size * count, needed = response->length + n + 1;
    if (desc->discard_body) {
        response->length += n;
        return n;
    }
    if (n > desc->max_body - response->length) {
        t->error = -EMSGSIZE;
        return 0; // refused: libcurl ends the transfer
    }
    if (needed > t->capacity) {
        size_t capacity = needed > 2 * t->capacity ? needed : 2 * t->capacity;
        char *old = response->body != orch_curl_empty ? response->body : NULL;
        char *body = realloc(old, capacity);
        if (body == NULL) {
            t->error = ORCH_ENOMEM;
            return 0;
        }
        response->body = body;
        t->capacity = capacity;
    }
    memcpy(response->body + response->length, data, n);
    response->length += n;
    response->body[response->length] = '\0';
    return n;
}

static orch_curl_transfer *orch_curl_transfer_new(orch_curl *c, CURL *easy, orch_promise promise) {
    orch_curl_transfer *t = calloc(1, sizeof *t);
    orch_curl_response *response = calloc(1, sizeof *response);
    if (t == NULL || response == NULL) {
        free(t);
        free(response);
        return NULL;
    }
    response->body = orch_curl_empty;
    t->client = c;
    t->easy = easy;
    t->promise = promise;
    t->response = response;
    t->link = &c->transfers;
    t->next = c->transfers;
    if (t->next != NULL) t->next->link = &t->next;
    c->transfers = t;
    c->running++;
    curl_easy_setopt(easy, CURLOPT_PRIVATE, t);
    curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, t->message);
    curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, orch_curl_on_body);
    curl_easy_setopt(easy, CURLOPT_WRITEDATA, t);
    curl_easy_setopt(easy, CURLOPT_NOSIGNAL,
                     1L); // no SIGALRM: its handler would jump between stacks
    return t;
}

// Ends a transfer and all it holds, but for its promise. Here libcurl closes or keeps the
// connection.
static void orch_curl_close(orch_curl_transfer *t) {
    orch_curl *c = t->client;
    curl_multi_remove_handle(c->multi, t->easy);
    curl_easy_cleanup(t->easy);
    if (t->response != NULL) orch_curl_response_free(t->response);
    *t->link = t->next;
    if (t->next != NULL) t->next->link = t->link;
    c->running--;
    free(t);
}

static void orch_curl_end(orch_curl_transfer *t, orch_result r) {
    orch_promise promise = t->promise;
    orch_curl_close(t);
    orch_settle(promise, r); // calls nobody back: all of that comes from the loop
}

static orch_result orch_curl_outcome(orch_curl_transfer *t, CURLcode code) {
    if (t->error == -EMSGSIZE)
        return orch_failf(-EMSGSIZE, "body of more than %zu bytes", t->client->desc.max_body);
    if (t->error != 0) return orch_fail(t->error);
    if (code == CURLE_OUT_OF_MEMORY) return orch_fail(ORCH_ENOMEM);
    if (code != CURLE_OK)
        return orch_failf(code == CURLE_OPERATION_TIMEDOUT ? ORCH_ETIMEDOUT : (int)code, "%s",
                          t->message[0] != '\0' ? t->message : curl_easy_strerror(code));
    orch_curl_response *response = t->response;
    curl_easy_getinfo(t->easy, CURLINFO_RESPONSE_CODE, &response->status);
    t->response = NULL;
    return orch_ok(response, orch_curl_response_free);
}

// Settles what libcurl has finished; or everything, when nothing could wake it any more.
static void orch_curl_collect(orch_curl *c) {
    int left;
    for (CURLMsg *m; (m = curl_multi_info_read(c->multi, &left)) != NULL;) {
        char *t = NULL;
        if (m->msg != CURLMSG_DONE) continue;
        CURLcode code = m->data.result;
        curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, &t);
        orch_curl_end((void *)t, orch_curl_outcome((void *)t, code));
    }
    while (c->broken != 0 && c->transfers != NULL)
        orch_curl_end(c->transfers, orch_fail(c->broken));
    c->broken = 0;
}

// The future was dropped or cancelled: called from the loop.
static bool orch_curl_on_cancel(void *context, int reason) {
    (void)reason;
    orch_curl_transfer *t = context;
    orch_curl *c = t->client;
    orch_curl_close(t);
    orch_curl_collect(c);
    return true;
}

// ---- what libcurl waits for

static void orch_curl_act(orch_curl *c, curl_socket_t fd, int events) {
    int running;
    CURLMcode code = curl_multi_socket_action(c->multi, fd, events, &running);
    if (code != CURLM_OK) c->broken = code == CURLM_OUT_OF_MEMORY ? ORCH_ENOMEM : -EIO;
    orch_curl_collect(c);
}

static orch_result orch_curl_on_timer(orch_result *in, void *context) {
    orch_curl *c = context;
    if (c->freed || in->error == ORCH_ECANCELED) return orch_ok(NULL, NULL);
    c->broken = in->error;
    orch_curl_act(c, CURL_SOCKET_TIMEOUT, 0);
    return orch_ok(NULL, NULL);
}

// libcurl moves its timer. 0 ms is the loop's next look at the clock: neither inside this call,
// which libcurl forbids, nor a millisecond later, which would cost each transfer several.
static int orch_curl_on_set_timer(CURLM *multi, long ms, void *user) {
    (void)multi;
    orch_curl *c = user;
    orch_curl_forget(&c->timer);
    if (ms < 0 || c->freed) return 0;
    c->references++;
    c->timer = orch_curl_chain(orch_after((uint64_t)ms), orch_curl_on_timer, c, orch_curl_unref);
    if (c->timer == NULL) c->broken = ORCH_ENOMEM;
    return 0;
}

static orch_result orch_curl_on_ready(orch_result *in, void *context);

static void orch_curl_watch_arm(orch_curl_watch *w) {
    orch_curl_forget(&w->ready); // the one before, which is over
    w->references++;
    w->ready = orch_curl_chain(orch_ready((int)w->fd, w->events), orch_curl_on_ready, w,
                               orch_curl_watch_unref);
    if (w->ready == NULL) w->client->broken = ORCH_ENOMEM;
}

static orch_result orch_curl_on_ready(orch_result *in, void *context) {
    orch_curl_watch *w = context;
    orch_curl *c = w->client;
    if (c == NULL || in->error == ORCH_ECANCELED) return orch_ok(NULL, NULL);
    intptr_t events = orch_int(in);
    c->broken = in->error;
    orch_curl_act(c, w->fd,
                  ((events & ORCH_READABLE) != 0 ? CURL_CSELECT_IN : 0) |
                      ((events & ORCH_WRITABLE) != 0 ? CURL_CSELECT_OUT : 0));
    if (w->client != NULL) orch_curl_watch_arm(w); // libcurl still wants the same
    if (c->broken != 0) orch_curl_collect(c);
    return orch_ok(NULL, NULL);
}

static void orch_curl_watch_new(orch_curl *c, curl_socket_t fd, int events) {
    orch_curl_watch *w = calloc(1, sizeof *w);
    if (w == NULL) {
        c->broken = ORCH_ENOMEM;
        return;
    }
    w->client = c;
    w->fd = fd;
    w->events = events;
    w->references = 1;
    w->link = &c->watches;
    w->next = c->watches;
    if (w->next != NULL) w->next->link = &w->next;
    c->watches = w;
    curl_multi_assign(c->multi, fd, w);
    orch_curl_watch_arm(w);
}

static void orch_curl_watch_remove(orch_curl_watch *w) {
    curl_multi_assign(w->client->multi, w->fd, NULL);
    *w->link = w->next;
    if (w->next != NULL) w->next->link = w->link;
    w->client = NULL;
    orch_curl_forget(&w->ready);
    orch_curl_watch_unref(w);
}

// libcurl says what it waits for on a descriptor, or, before it closes it, that it no longer does.
static int orch_curl_on_set_events(CURL *easy, curl_socket_t fd, int what, void *user,
                                   void *assigned) {
    (void)easy;
    orch_curl *c = user;
    orch_curl_watch *w = assigned;
    int events = ((what & CURL_POLL_IN) != 0 ? ORCH_READABLE : 0) |
                 ((what & CURL_POLL_OUT) != 0 ? ORCH_WRITABLE : 0); // none at CURL_POLL_REMOVE
    if (c->freed || (w != NULL && w->events == events)) return 0;
    if (w != NULL) orch_curl_watch_remove(w);
    if (events != 0) orch_curl_watch_new(c, fd, events);
    return 0; // never -1, which ends the whole multi handle
}

// ---- the client

orch_curl *orch_curl_new(const orch_curl_desc *desc) {
    if (orch_loop_current() == NULL || curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK)
        return NULL;
    orch_curl *c = calloc(1, sizeof *c);
    CURLM *multi = c != NULL ? curl_multi_init() : NULL;
    if (multi == NULL) {
        free(c);
        curl_global_cleanup();
        return NULL;
    }
    if (desc != NULL) c->desc = *desc;
    if (c->desc.max_body == 0) c->desc.max_body = (size_t)64 << 20;
    c->multi = multi;
    c->references = 1;
    curl_multi_setopt(multi, CURLMOPT_SOCKETFUNCTION, orch_curl_on_set_events);
    curl_multi_setopt(multi, CURLMOPT_SOCKETDATA, c);
    curl_multi_setopt(multi, CURLMOPT_TIMERFUNCTION, orch_curl_on_set_timer);
    curl_multi_setopt(multi, CURLMOPT_TIMERDATA, c);
    curl_multi_setopt(multi, CURLMOPT_MAX_TOTAL_CONNECTIONS, c->desc.max_connections);
    return c;
}

void orch_curl_free(orch_curl *c) {
    if (c == NULL) return;
    while (c->transfers != NULL) orch_curl_end(c->transfers, orch_fail(ORCH_ECANCELED));
    c->freed = true; // from here on libcurl's callbacks do nothing
    orch_curl_forget(&c->timer);
    while (c->watches != NULL) orch_curl_watch_remove(c->watches);
    curl_multi_cleanup(c->multi);
    curl_global_cleanup();
    orch_curl_unref(c);
}

orch_future *orch_curl_send(orch_curl *c, CURL *easy) {
    if (c == NULL || easy == NULL) {
        curl_easy_cleanup(easy); // NULL does nothing
        return orch_settled(orch_fail(ORCH_EINVAL));
    }
    orch_promise promise;
    orch_future *f = orch_future_new(&promise);
    orch_curl_transfer *t = orch_curl_transfer_new(c, easy, promise);
    if (t == NULL) {
        curl_easy_cleanup(easy);
        orch_settle(promise, orch_fail(ORCH_ENOMEM));
    } else if (!orch_promise_on_cancel(promise, orch_curl_on_cancel, t)) {
        orch_curl_close(t); // no memory for f, which says so
    } else {
        CURLMcode code = curl_multi_add_handle(c->multi, easy);
        if (code == CURLM_OUT_OF_MEMORY) orch_curl_end(t, orch_fail(ORCH_ENOMEM));
        else if (code != CURLM_OK)
            orch_curl_end(t, orch_failf(ORCH_EINVAL, "%s", curl_multi_strerror(code)));
        if (c->broken != 0) orch_curl_collect(c);
    }
    return f;
}

#if LIBCURL_VERSION_NUM >= 0x075500
static void orch_curl_only_http(CURL *easy) {
    curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
}
#else
static void orch_curl_only_http(CURL *easy) {
    curl_easy_setopt(easy, CURLOPT_PROTOCOLS, (long)(CURLPROTO_HTTP | CURLPROTO_HTTPS));
}
#endif

orch_future *orch_curl_get(orch_curl *c, const char *url) {
    if (c == NULL || url == NULL) return orch_settled(orch_fail(ORCH_EINVAL));
    CURL *easy = curl_easy_init();
    if (easy == NULL || curl_easy_setopt(easy, CURLOPT_URL, url) != CURLE_OK) {
        curl_easy_cleanup(easy);
        return orch_settled(orch_fail(ORCH_ENOMEM));
    }
    orch_curl_only_http(easy); // not file: a URL may be anybody's
    return orch_curl_send(c, easy);
}

size_t orch_curl_running(const orch_curl *c) { return c != NULL ? c->running : 0; }

#endif // ORCH_CURL_IMPLEMENTATION
