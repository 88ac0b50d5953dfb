// 17_guest_glib.c: GLib's main loop hosts tasks, by a GSource that any GTK program can add.
//
// shows   orch_loop_pollfds and orch_loop_timeout in a source's prepare, orch_loop_dispatch in its
//         dispatch
// run     cc -O2 -DHAVE_GLIB -o guest_glib examples/17_guest_glib.c
//             $(pkg-config --cflags --libs glib-2.0) && ./guest_glib
// prints
//         task: waits for GLib
//         glib: a time-out, writes
//         task: read x, sleeps
//         task: slept 10 ms
//         glib: the source is done

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>
#include <unistd.h>

#ifdef HAVE_GLIB
#include <glib.h>

enum { MOST = 64 }; // descriptors, in this example

typedef struct guest_source {
    GSource source;
    orch_loop *loop;
    GMainLoop *host;
    GPollFD fds[MOST]; // the same as struct pollfd, says GLib's manual
    int count;
} guest_source;

static gboolean prepare(GSource *source, gint *timeout) {
    guest_source *guest = (guest_source *)source;
    for (int i = 0; i < guest->count; i++) g_source_remove_poll(source, &guest->fds[i]);
    guest->count = orch_loop_pollfds(guest->loop, (struct pollfd *)guest->fds, MOST);
    if (guest->count < 0 || guest->count > MOST) g_error("descriptors: %d", guest->count);
    for (int i = 0; i < guest->count; i++) g_source_add_poll(source, &guest->fds[i]);
    uint64_t ms = orch_loop_timeout(guest->loop);
    *timeout = ms < 1000000 ? (gint)ms : -1;
    return ms == 0;
}

static gboolean check(GSource *source) {
    guest_source *guest = (guest_source *)source;
    for (int i = 0; i < guest->count; i++) {
        if (guest->fds[i].revents != 0) return TRUE;
    }
    return orch_loop_timeout(guest->loop) == 0;
}

static gboolean dispatch(GSource *source, GSourceFunc unused, gpointer data) {
    guest_source *guest = (guest_source *)source;
    const struct pollfd *fds = (const struct pollfd *)guest->fds;
    (void)unused;
    (void)data;
    if (orch_loop_dispatch(guest->loop, fds, (size_t)guest->count) == 1) return G_SOURCE_CONTINUE;
    puts("glib: the source is done");
    g_main_loop_quit(guest->host);
    return G_SOURCE_REMOVE;
}

static GSourceFuncs functions = {prepare, check, dispatch, NULL, NULL, NULL};
static int ends[2]; // a pipe

static gboolean write_later(gpointer data) {
    (void)data;
    puts("glib: a time-out, writes");
    if (write(ends[1], "x", 1) != 1) g_error("write");
    return G_SOURCE_REMOVE;
}

static orch_result task(void *arg) {
    char byte = 0;
    (void)arg;
    puts("task: waits for GLib");
    orch_result r = orch_await(orch_ready(ends[0], ORCH_READABLE));
    if (r.error != 0) return r;
    if (read(ends[0], &byte, 1) != 1) return orch_fail(-errno);
    printf("task: read %c, sleeps\n", byte);
    orch_sleep(10);
    puts("task: slept 10 ms");
    return orch_ok(NULL, NULL);
}

int main(void) {
    guest_source *guest = (guest_source *)g_source_new(&functions, sizeof *guest);
    guest->loop = orch_loop_new(NULL);
    guest->host = g_main_loop_new(NULL, FALSE);
    guest->count = 0;
    if (guest->loop == NULL || pipe(ends) != 0) return 1;
    g_source_attach(&guest->source, NULL);
    g_timeout_add(5, write_later, NULL);
    orch_detach(orch_go(task, NULL));
    g_main_loop_run(guest->host);
    int error = orch_loop_free(guest->loop);
    g_main_loop_unref(guest->host);
    g_source_unref(&guest->source);
    return error != 0;
}
#else
int main(void) {
    puts("built without GLib");
    return 0;
}
#endif
