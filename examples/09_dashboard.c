// 09_dashboard: many services, one deadline, and a page with what came in time.
//
// shows   a scope as nursery and deadline: no panel outlives it, a failed one does not take the
//         others with it (keep_going), a late one is cancelled; a panel that asks for parts keeps
//         those that came
// run     cc -O2 -o dashboard examples/09_dashboard.c && ./dashboard
// prints
//         weather     sunny
//         calendar    (the calendar is down)
//         news        3 of 5 sources
//         mail        12 new
//         traffic     (too late)
//         4 of 5 panels in 100 ms: 1 failed, 1 cut off

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>

enum { DEADLINE_MS = 100, SOURCES = 5 };

struct panel {
    const char *name;
    uint64_t ms;      // how long its service takes
    const char *text; // NULL: it fails
    orch_task_fn show;
    char shown[40];
};

static orch_result ask(void *arg) {
    struct panel *p = arg;
    int error = orch_sleep(p->ms);
    if (error != 0) return orch_fail(error); // cut off: the panel stays empty
    if (p->text == NULL) {
        snprintf(p->shown, sizeof p->shown, "(the %s is down)", p->name);
        return orch_failf(503, "the %s is down", p->name);
    }
    snprintf(p->shown, sizeof p->shown, "%s", p->text);
    return orch_ok(NULL, NULL);
}

static orch_result ask_source(void *arg) {
    int error = orch_sleep((uint64_t)(uintptr_t)arg);
    return error != 0 ? orch_fail(error) : orch_ok(NULL, NULL);
}

// A fan-out of its own: it takes what is there a little before its deadline.
static orch_result ask_sources(void *arg) {
    struct panel *p = arg;
    orch_future *sources[SOURCES];
    uint64_t left = orch_time_left();
    for (uintptr_t i = 0; i < SOURCES; i++) {
        sources[i] = orch_go(ask_source, (void *)(i < 3 ? 10 + i : 1000)); // ms
    }
    orch_result r = orch_await(orch_gather_n(SOURCES, sources, left > 20 ? left - 20 : 0));
    int came = 0;
    for (size_t i = 0; i < orch_count(&r); i++) came += orch_at(&r, i)->error == 0;
    orch_result_free(&r);
    snprintf(p->shown, sizeof p->shown, "%d of %d sources", came, SOURCES);
    return orch_ok(NULL, NULL);
}

static struct panel panels[] = {{"weather", 30, "sunny", ask, ""},
                                {"calendar", 40, NULL, ask, ""},
                                {"news", 0, NULL, ask_sources, ""},
                                {"mail", 60, "12 new", ask, ""},
                                {"traffic", 5000, "a jam", ask, ""}};
enum { PANELS = sizeof panels / sizeof panels[0] };

static orch_result start(void *arg) {
    (void)arg;
    orch_scope page;
    uint64_t began = orch_now();
    orch_scope_desc desc = {.name = "page", .timeout_ms = DEADLINE_MS, .keep_going = true};
    int error = orch_scope_open(&page, &desc);
    if (error != 0) return orch_fail(error);
    for (size_t i = 0; i < PANELS; i++) orch_scope_go(&page, panels[i].show, &panels[i]);
    orch_result r = orch_scope_close(&page); // all panels have ended now

    int late = 0;
    for (size_t i = 0; i < PANELS; i++) {
        late += panels[i].shown[0] == '\0';
        printf("%-11s %s\n", panels[i].name, panels[i].shown[0] ? panels[i].shown : "(too late)");
    }
    printf("%d of %d panels in %d ms: %d failed, %d cut off\n", PANELS - late, PANELS,
           (int)(orch_now() - began), (int)orch_count(&r), late);
    bool whole = r.error == 0 || r.error == ORCH_ETIMEDOUT; // a page with gaps is a page
    orch_result_free(&r);
    return whole ? orch_ok(NULL, NULL) : orch_fail(ORCH_ECANCELED);
}

int main(void) { return orch_exit(orch_run(start, NULL)); }
