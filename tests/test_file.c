// test_file.c: files, read and written on threads.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../asyncorch.h"
#include "pollers.h"
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

// The body runs as a task, in an empty folder that goes with it.
#define TASK_TEST(name)                                                                            \
    static void name##_body(void);                                                                 \
    static orch_result name##_main(void *arg) {                                                    \
        (void)arg;                                                                                 \
        test_start();                                                                              \
        name##_body();                                                                             \
        return orch_ok_int(1);                                                                     \
    }                                                                                              \
    TEST(name) {                                                                                   \
        if (!folder_make()) return;                                                                \
        orch_loop_desc desc = {.poller = test_poller()};                                           \
        orch_result r = orch_run_with(&desc, name##_main, NULL);                                   \
        CHECK_INT(r.error, 0);                                                                     \
        orch_result_free(&r);                                                                      \
        folder_remove();                                                                           \
    }                                                                                              \
    static void name##_body(void)

static char folder[64];
static bool folder_make(void) {
    strcpy(folder, "/tmp/orch_file_XXXXXX");
    return CHECK(mkdtemp(folder) != NULL) && CHECK(chdir(folder) == 0);
}

static void folder_remove(void) {
    static char command[128];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    CHECK(chdir("/") == 0 && system(command) == 0);
}

static int files(void) { // in the folder
    FILE *list = popen("ls -A | wc -l", "r");
    int n = -1;
    if (list != NULL && fscanf(list, "%d", &n) != 1) n = -1;
    if (list != NULL) pclose(list);
    return n;
}

static int descriptors(void) {
    int n = 0;
    for (int fd = 0; fd < 64; fd++) n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

static int load_size(const char *path) {
    orch_result r = orch_file_load(path);
    int n = r.error;
    if (n == 0) {
        const orch_buffer *b = r.value;
        CHECK_INT(b->data[b->size], 0);
        n = (int)b->size;
    }
    orch_result_free(&r);
    return n;
}

TASK_TEST(a_whole_file_is_saved_and_loaded) {
    CHECK_INT(orch_file_save("a", "hello", 5), 0);
    orch_result r = orch_file_load("a");
    if (CHECK_INT(r.error, 0)) {
        const orch_buffer *b = r.value;
        CHECK_INT(b->size, 5);
        CHECK_STR(b->data, "hello");
        orch_buffer *mine = orch_take(&r);
        free(mine);
    }
    orch_result_free(&r);
    CHECK_INT(orch_file_save("a", NULL, 0), 0);
    CHECK_INT(load_size("a"), 0);
    CHECK_INT(files(), 1);
}

TASK_TEST(a_file_of_unknown_size_is_loaded) { CHECK(load_size("/proc/self/status") > 100); }

TASK_TEST(a_file_that_is_not_there) {
    orch_result r = orch_file_load("nothing");
    CHECK_INT(r.error, -ENOENT);
    CHECK_STR(orch_message(&r), "nothing: No such file or directory");
    orch_result_free(&r);
    CHECK_INT(load_size("."), -EISDIR);
    CHECK_INT(orch_file_open("nothing", O_RDONLY, 0), -ENOENT);
    CHECK_INT(orch_file_remove("nothing"), -ENOENT);
    CHECK_INT(orch_file_rename("nothing", "else"), -ENOENT);
    CHECK_INT(orch_file_save("no/folder", "x", 1), -ENOENT);
    orch_file_info info;
    CHECK_INT(orch_file_stat("nothing", &info), -ENOENT);
}

TASK_TEST(a_save_keeps_permissions_and_links) {
    struct stat st;
    CHECK_INT(orch_file_save("real", "one", 3), 0);
    CHECK_INT(chmod("real", 0640), 0);
    CHECK_INT(symlink("real", "link"), 0);
    CHECK_INT(orch_file_save("link", "three", 5), 0);
    CHECK(lstat("link", &st) == 0 && S_ISLNK(st.st_mode));
    CHECK(stat("real", &st) == 0 && (st.st_mode & 0777) == 0640);
    CHECK_INT(load_size("real"), 5);
    CHECK_INT(files(), 2);
}

// The old file stays, and nothing beside it.
TASK_TEST(a_save_that_fails_changes_nothing) {
    static char big[100000];
    struct rlimit limit, small;
    CHECK_INT(orch_file_save("a", "old", 3), 0);
    signal(SIGXFSZ, SIG_IGN);
    CHECK_INT(getrlimit(RLIMIT_FSIZE, &limit), 0);
    small = limit;
    small.rlim_cur = 50000;
    CHECK_INT(setrlimit(RLIMIT_FSIZE, &small), 0);
    CHECK_INT(orch_file_save("a", big, sizeof big), -EFBIG);
    CHECK_INT(setrlimit(RLIMIT_FSIZE, &limit), 0);
    CHECK_INT(load_size("a"), 3);
    CHECK_INT(files(), 1);
}

TASK_TEST(pieces_are_read_and_written_in_place) {
    char text[16] = "";
    int fd = orch_file_open("a", O_RDWR | O_CREAT, 0600);
    if (!CHECK(fd >= 0)) return;
    CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    CHECK_INT(orch_file_write(fd, "0123456789", 10, 0), 10);
    CHECK_INT(orch_file_write(fd, "xy", 2, 3), 2);
    CHECK_INT(orch_file_read(fd, text, 4, 2), 4);
    CHECK_STR(text, "2xy5");
    CHECK_INT(orch_file_read(fd, text, sizeof text, 8), 2);
    CHECK_INT(orch_file_read(fd, text, sizeof text, 99), 0);
    CHECK_INT(orch_file_read(fd, NULL, 0, 0), 0);
    CHECK_INT(orch_file_write(fd, NULL, 0, 0), 0);
    CHECK_INT(lseek(fd, 0, SEEK_CUR), 0); // as it was
    CHECK_INT(orch_file_truncate(fd, 4), 0);
    CHECK_INT(orch_file_sync(fd), 0);
    CHECK_INT(orch_file_read(fd, text, sizeof text, UINT64_MAX), -EOVERFLOW);
    CHECK_INT(orch_file_truncate(fd, UINT64_MAX), -EOVERFLOW);
    CHECK_INT(orch_close(fd), 0);
    CHECK_INT(load_size("a"), 4);
    CHECK_INT(orch_file_read(fd, text, sizeof text, 0), -EBADF);
    CHECK_INT(orch_file_write(-1, text, 1, 0), -EBADF);
    CHECK_INT(orch_file_sync(-1), -EBADF);
    CHECK_INT(orch_file_truncate(-1, 1), -EBADF);
}

TASK_TEST(more_than_a_piece_at_a_time) {
    size_t size = (5u << 20) / 2;
    char *out = malloc(size), *in = malloc(size);
    int fd = orch_file_open("big", O_RDWR | O_CREAT, 0600);
    if (out != NULL && in != NULL && CHECK(fd >= 0)) {
        for (size_t i = 0; i < size; i++) out[i] = (char)(i * 7 + i / 4096);
        CHECK_INT(orch_file_write(fd, out, size, 3), size);
        CHECK_INT(orch_file_read(fd, in, size, 3), size);
        CHECK_INT(memcmp(in, out, size) == 0 || test_shared->refused, 1);
    }
    if (fd >= 0) orch_close(fd);
    free(out);
    free(in);
}

TASK_TEST(what_there_is_to_know) {
    orch_file_info info = {0, 0, 0, false, false};
    CHECK_INT(orch_file_save("a", "hello", 5), 0);
    CHECK_INT(chmod("a", 0604), 0);
    CHECK_INT(orch_file_stat("a", &info), 0);
    CHECK(info.is_file && !info.is_directory);
    CHECK_INT(info.size, 5);
    CHECK_INT(info.mode, 0604);
    CHECK(info.modified_ns > (int64_t)1600000000 * 1000000000);
    CHECK_INT(orch_file_rename("a", "b"), 0);
    CHECK_INT(orch_file_stat(".", &info), 0);
    CHECK(info.is_directory && !info.is_file);
    CHECK_INT(orch_file_remove("b"), 0);
    CHECK_INT(files(), 0);
}

// ---- cancelled

// All threads of the lane are busy until the gate opens.
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool open_gate;
static orch_result block(void *arg) {
    pthread_mutex_lock(&mutex);
    while (!open_gate) pthread_cond_wait(&changed, &mutex);
    pthread_mutex_unlock(&mutex);
    return orch_ok(arg, NULL);
}

static void unblock(void) {
    pthread_mutex_lock(&mutex);
    open_gate = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

static orch_future *occupy(void) {
    orch_future *f[4];
    for (int i = 0; i < 4; i++) {
        orch_offload_desc desc = {"busy", block, NULL, 0, NULL, ORCH_LANE_FILE};
        f[i] = orch_offload_with(&desc);
    }
    return orch_all_settled_n(4, f);
}

static void end(orch_future *f) {
    orch_result r = orch_await(f);
    orch_result_free(&r);
}

static orch_result read_late(void *arg) {
    char text[8] = "unread"; // dead when the read is done
    ptrdiff_t n = orch_file_read(*(int *)arg, text, sizeof text, 0);
    CHECK_STR(text, "unread");
    return orch_ok_int(n);
}

TASK_TEST(a_cancelled_read_writes_nowhere) {
    int fd = open("a", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    CHECK_INT(write(fd, "content", 7), 7);
    orch_future *busy = occupy(), *f = orch_go(read_late, &fd);
    CHECK(!orch_is_settled(f));
    CHECK_INT(orch_yield(), 0);
    if (!orch_is_settled(f)) orch_cancel(f, 0);
    orch_result r = orch_await(f);
    CHECK_INT(orch_int(&r), ORCH_ECANCELED);
    unblock();
    end(busy);
    close(fd);
}

static orch_result do_all(void *arg) {
    orch_file_info info;
    (void)arg;
    CHECK_INT(orch_sleep(3600000), ORCH_ECANCELED);
    CHECK_INT(orch_file_save("never", "x", 1), ORCH_ECANCELED);
    CHECK_INT(orch_file_open("never", O_RDWR | O_CREAT, 0600), ORCH_ECANCELED);
    CHECK_INT(orch_file_stat(".", &info), ORCH_ECANCELED);
    CHECK_INT(load_size("/proc/self/status"), ORCH_ECANCELED);
    CHECK_INT(files(), 0);
    orch_shield_begin();
    CHECK_INT(orch_file_save("now", "x", 1), 0);
    orch_shield_end();
    return orch_ok_int(1);
}

TASK_TEST(a_cancelled_task_begins_nothing) {
    orch_future *f = orch_go(do_all, NULL);
    if (!orch_is_settled(f)) orch_cancel(f, 0);
    orch_result r = orch_await(f);
    CHECK_INT(orch_int(&r), 1);
    orch_result_free(&r);
}

static orch_result open_late(void *arg) {
    (void)arg;
    int fd = orch_file_open("a", O_RDWR | O_CREAT, 0600);
    return orch_ok_int(fd);
}

// Nobody has the descriptor: it is closed, by whoever comes last.
TASK_TEST(a_cancelled_open_leaves_no_descriptor) {
    CHECK_INT(load_size("/proc/self/status") > 0, 1);
    CHECK_INT(orch_sleep(1), 0); // now what the loop needs for a sleep is open, too
    int before = descriptors();
    for (int i = 0; i < 20; i++) {
        orch_future *f = orch_go(open_late, NULL);
        if (i % 2 == 0) orch_yield();
        orch_drop(f);
    }
    orch_offload_desc desc = {"last", block, NULL, 0, NULL, ORCH_LANE_FILE};
    unblock();
    for (int i = 0; i < 20; i++) end(orch_offload_with(&desc));
    for (int i = 0; i < 100 && descriptors() != before; i++) orch_sleep(1);
    CHECK_INT(descriptors(), before);
}

#ifdef NDEBUG
#define MISUSE(name, text) TEST(name)
#else
#define MISUSE(name, text) TEST_DIES(name, "asyncorch: " text)
#endif

MISUSE(a_file_outside_a_task, "orch_file_sync") { CHECK_INT(orch_file_sync(0), ORCH_ENOLOOP); }

static orch_result load_null(void *arg) { return orch_file_load(arg); }
MISUSE(no_path, "orch_file_load") {
    orch_result r = orch_run(load_null, NULL);
    CHECK_INT(r.error, ORCH_EINVAL);
}

static orch_result read_null(void *arg) { return orch_fail((int)orch_file_read(0, arg, 1, 0)); }
MISUSE(no_buffer, "orch_file_read") {
    orch_result r = orch_run(read_null, NULL);
    CHECK_INT(r.error, ORCH_EINVAL);
}

int main(int argc, char **argv) { return test_main(argc, argv); }
