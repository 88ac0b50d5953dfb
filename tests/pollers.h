// pollers.h - the poller that a test's loops are to use; include it after asyncorch.h.
//     orch_loop_desc desc = {.poller = test_poller()};
// TEST_POLLER=poll|epoll|kqueue pins one, without it the loop moves itself; the Makefile runs what
// includes this file under each.
#include <stdlib.h>
#include <string.h>

static inline orch_poller test_poller(void) {
    const char *name = getenv("TEST_POLLER");
    if (name == NULL || name[0] == '\0') return ORCH_POLLER_DEFAULT;
    if (!strcmp(name, "poll")) return ORCH_POLLER_POLL;
    if (!strcmp(name, "epoll")) return ORCH_POLLER_EPOLL;
    if (!strcmp(name, "kqueue")) return ORCH_POLLER_KQUEUE;
    abort(); // a typing error must not pass as the default
}
