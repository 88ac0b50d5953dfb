// Ten thousand connections at a time, from one process to another: each is served, none costs more
// than a task's stack as far as it is touched, and memory does not grow from wave to wave.
#include "../asyncorch.h"
#include "test.h"

#include <fcntl.h>
#include <sys/socket.h>

enum { MANY = 10000, TASKS = 1000, CONNECTION_MAX = 16384 }; // the last: bytes of memory

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1 }; // memory is another then
#elif defined(__has_feature)
enum { SANITIZED = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) };
#else
enum { SANITIZED = 0 };
#endif

static size_t many; // in a sweep fewer
static int fds[MANY];
static orch_address address;

static bool too_few_descriptors(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_max < MANY + 100) return true;
    limit.rlim_cur = MANY + 100;
    return setrlimit(RLIMIT_NOFILE, &limit) != 0;
}

// ---- the server, a process of its own

static orch_result echo(int fd, void *context) {
    char line[64];
    ptrdiff_t n;
    (void)context;
    while ((n = orch_read(fd, line, sizeof line)) > 0 && orch_write(fd, line, (size_t)n) == n)
        continue;
    return orch_ok(NULL, NULL); // a reset is how the clients here end
}

static orch_result serve(void *listener) {
    orch_serve_desc desc = {.max_connections = MANY, .no_drain = true};
    return orch_fail(orch_serve(*(int *)listener, echo, &desc));
}

static struct server {
    int listener, control; // it ends when the other end of control is closed
    pid_t pid;
} server;

static orch_result serve_until_told(void *arg) {
    char none;
    orch_future *serving = orch_go(serve, &server.listener);
    (void)arg;
    orch_read(server.control, &none, 1);
    orch_drop(serving);
    return orch_ok(NULL, NULL);
}

static bool start_server(void) {
    int ends[2];
    server.listener = orch_listen(&(orch_listen_desc){.host = "127.0.0.1"});
    if (!CHECK(server.listener >= 0) || !CHECK(orch_socketpair(ends) == 0)) return false;
    CHECK_INT(orch_socket_address(server.listener, &address), 0);
    fflush(NULL);
    server.pid = fork();
    if (server.pid == 0) {
        close(ends[1]);
        server.control = ends[0];
        exit(orch_exit(orch_run(serve_until_told, NULL)));
    }
    close(ends[0]);
    close(server.listener);
    server.control = ends[1];
    return CHECK(server.pid > 0);
}

static void stop_server(void) {
    int status = -1;
    close(server.control);
    CHECK(waitpid(server.pid, &status, 0) == server.pid);
    CHECK(WIFEXITED(status) && (WEXITSTATUS(status) == 0 || test_shared->refused > 0));
}

static size_t server_memory(void) { // bytes; 0: unknown
    char path[64];
    size_t whole = 0, resident = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)server.pid);
    FILE *from = fopen(path, "r");
    if (from == NULL) return 0;
    if (fscanf(from, "%zu %zu", &whole, &resident) != 2) resident = 0;
    fclose(from);
    return resident * (size_t)sysconf(_SC_PAGESIZE);
}

// ---- the clients

static size_t connected, served;

// arg: which of the tasks this is; it has every TASKS-th connection.
static orch_result connect_some(void *arg) {
    for (size_t i = (size_t)(uintptr_t)arg; i < many; i += TASKS) {
        orch_connect_desc desc = {.addresses = &address, .count = 1};
        struct linger at_once = {1, 0}; // else ten thousand ports wait for a minute
        fds[i] = orch_connect_with(&desc);
        if (fds[i] < 0) return orch_fail(fds[i]);
        setsockopt(fds[i], SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        connected++;
    }
    return orch_ok(NULL, NULL);
}

static orch_result use_some(void *arg) {
    for (size_t i = (size_t)(uintptr_t)arg; i < many; i += TASKS) {
        char text[32], back[32];
        size_t size = (size_t)snprintf(text, sizeof text, "connection %zu", i);
        ptrdiff_t n = orch_write(fds[i], text, size);
        if (n > 0) n = orch_read_full(fds[i], back, size);
        if (n != (ptrdiff_t)size) return orch_fail(n < 0 ? (int)n : -ECONNRESET);
        served += memcmp(text, back, size) == 0;
    }
    return orch_ok(NULL, NULL);
}

static int in_tasks(orch_task_fn fn) {
    orch_scope scope;
    orch_scope_open(&scope, &(orch_scope_desc){.name = "clients"});
    for (uintptr_t i = 0; i < TASKS; i++) orch_scope_go(&scope, fn, (void *)i);
    orch_result r = orch_scope_close(&scope);
    int error = r.error;
    if (error != 0) fprintf(stderr, "%s\n", orch_message(&r));
    orch_result_free(&r);
    return error;
}

static void close_all(void) {
    for (size_t i = 0; i < many; i++) {
        if (fds[i] >= 0) orch_close(fds[i]);
        fds[i] = -1;
    }
}

static orch_result run_waves(void *arg) {
    size_t before = server_memory(), after[2] = {0, 0};
    (void)arg;
    for (size_t wave = 0; wave < 2; wave++) {
        connected = served = 0;
        memset(fds, -1, sizeof fds);
        CHECK_INT(in_tasks(connect_some), 0);
        CHECK_INT(connected, many); // all are open at this time
        if (connected == many) CHECK_INT(in_tasks(use_some), 0);
        CHECK_INT(served, many);
        after[wave] = server_memory();
        close_all();
        if (served < many) break;
    }
    printf("%zu connections: %zu bytes each\n", many, (after[0] - before) / many);
    if (SANITIZED || before == 0 || many < MANY) return orch_ok(NULL, NULL);
    CHECK(after[0] - before < (size_t)MANY * CONNECTION_MAX);
    CHECK(after[1] < after[0] + after[0] / 4);
    return orch_ok(NULL, NULL);
}

TEST_SKIP(ten_thousand_connections, too_few_descriptors()) {
    many = test_shared->fail_at > 0 ? 20 : MANY; // a sweep repeats this often
    alarm(60); // the kernel's part alone takes seconds on a busy machine
    if (!start_server()) return;
    orch_result r = orch_run(run_waves, NULL);
    CHECK_STR(orch_message(&r), "ok");
    orch_result_free(&r);
    stop_server();
}

int main(int argc, char **argv) { return test_main(argc, argv); }
