// 21_grep: searches files for a text, many at a time, in the manner of grep -rFI.
//
// shows   orch_offload: reading folders and files blocks, so threads do it, while all decisions are
//         made here, on one thread, without a lock; a channel between who finds files and who
//         searches them keeps both busy and memory bounded; a progress line on a terminal
// run     cc -O2 -o search examples/21_grep.c && ./search -n 'from one process to another' tests
//         -i ignores the case of ASCII letters, -n prints line numbers; ends with 0 when something
//         was found, 1 when not, 2 when something could not be read
// prints  (the lines of a file together, files as they are done)
//         tests/test_connections.c:1:// Ten thousand connections at a time, from one process [...]

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

enum { AT_ONCE = 8, AHEAD = 64 }; // files being searched, and found but not yet searched

static struct job {
    const char *text;
    size_t length;
    bool fold, numbers;
    orch_channel *files; // paths
    size_t searched, lines, errors;
} job;

// ---- on threads: a path in, text out. They only read what is in job.

typedef struct answer {
    size_t lines, size;
    char *text; // a folder's entries, one string after the other; or the lines that match
} answer;

static void answer_free(void *arg) {
    free(((answer *)arg)->text);
    free(arg);
}

// Entries as paths, folders with a slash; symbolic links are not followed.
static int list_folder(const char *path, answer *a, FILE *to) {
    DIR *folder = opendir(path);
    if (folder == NULL) return -errno;
    (void)a;
    for (const struct dirent *d; (d = readdir(folder)) != NULL;) {
        struct stat st;
        if (strcmp(d->d_name, ".") == 0 || strcmp(d->d_name, "..") == 0) continue;
        if (fstatat(dirfd(folder), d->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0) continue;
        if (S_ISREG(st.st_mode)) fprintf(to, "%s%s%c", path, d->d_name, '\0');
        if (S_ISDIR(st.st_mode)) fprintf(to, "%s%s/%c", path, d->d_name, '\0');
    }
    closedir(folder);
    return 0;
}

static bool matches(const char *line, size_t size) {
    if (!job.fold) return memmem(line, size, job.text, job.length) != NULL;
    for (size_t i = 0; i + job.length <= size; i++)
        if (strncasecmp(line + i, job.text, job.length) == 0) return true;
    return false;
}

static int search_file(const char *path, answer *a, FILE *to) {
    FILE *file = fopen(path, "rbe");
    if (file == NULL) return -errno;
    char *line = NULL;
    size_t room = 0, number = 0;
    bool binary = false;
    for (ssize_t n; !binary && (n = getline(&line, &room, file)) > 0;) {
        binary = memchr(line, '\0', (size_t)n) != NULL;
        if (line[n - 1] == '\n') n--;
        number++;
        if (!matches(line, (size_t)n)) continue;
        a->lines++;
        if (job.numbers) fprintf(to, "%s:%zu:", path, number);
        else fprintf(to, "%s:", path);
        fwrite(line, 1, (size_t)n, to);
        fputc('\n', to);
    }
    int error = ferror(file) ? -EIO : 0;
    if (binary) a->lines = 0;
    free(line);
    fclose(file);
    return error;
}

static orch_result fill(const char *path, int (*with)(const char *path, answer *a, FILE *to)) {
    answer *a = calloc(1, sizeof *a);
    FILE *to = a != NULL ? open_memstream(&a->text, &a->size) : NULL;
    int error = to != NULL ? with(path, a, to) : ORCH_ENOMEM;
    if (to != NULL && fclose(to) != 0) error = ORCH_ENOMEM;
    if (error == 0) return orch_ok(a, answer_free);
    if (a != NULL) answer_free(a);
    return orch_fail(error);
}

static orch_result list(void *path) { return fill(path, list_folder); }
static orch_result search(void *path) { return fill(path, search_file); }

// ---- on this thread

static orch_result on_a_thread(orch_task_fn fn, const char *path) {
    orch_offload_desc desc = {.name = "file", .fn = fn, .arg_size = strlen(path) + 1};
    desc.arg = (void *)(uintptr_t)path; // it gets a copy, and may go on when this task is cancelled
    orch_result r = orch_await(orch_offload_with(&desc));
    if (r.error == 0 || r.error == ORCH_ECANCELED) return r;
    job.errors++;
    fprintf(stderr, "%s21_grep: %s: %s\n", isatty(2) ? "\r\033[K" : "", path, orch_message(&r));
    return r;
}

static orch_result progress(void *arg) {
    (void)arg;
    while (isatty(2) && orch_sleep(100) == 0)
        fprintf(stderr, "\r%zu files, %zu lines\033[K", job.searched, job.lines);
    return orch_ok(NULL, NULL);
}

// Sends files to the searchers, which waits while they are behind, and goes down into folders.
static int walk(const char *path) {
    if (path[0] == '\0' || path[strlen(path) - 1] != '/') {
        char *copy = strdup(path);
        return copy != NULL ? orch_send(job.files, orch_ok(copy, free)) : ORCH_ENOMEM;
    }
    orch_result r = on_a_thread(list, path);
    const answer *a = r.value;
    int error = r.error == ORCH_ECANCELED ? r.error : 0;
    for (size_t at = 0; r.error == 0 && error == 0 && at < a->size; at += strlen(a->text + at) + 1)
        error = walk(a->text + at);
    orch_result_free(&r);
    return error;
}

static orch_result walk_all(void *paths) {
    int error = 0;
    for (char **path = paths; *path != NULL && error == 0; path++) {
        char name[4096];
        struct stat st; // one a word of the command line: not worth a thread
        bool folder = stat(*path, &st) == 0 && S_ISDIR(st.st_mode);
        bool slash = **path != '\0' && (*path)[strlen(*path) - 1] == '/';
        snprintf(name, sizeof name, "%s%s", *path, folder && !slash ? "/" : "");
        error = walk(name);
    }
    orch_channel_close(job.files); // the searchers end when they have done what is left
    return error != 0 ? orch_fail(error) : orch_ok(NULL, NULL);
}

static orch_result search_all(void *arg) {
    (void)arg;
    for (;;) {
        orch_result file = orch_recv(job.files);
        if (file.error == ORCH_ECLOSED) return orch_ok(NULL, NULL);
        if (file.error != 0) return file;
        orch_result r = on_a_thread(search, file.value);
        const answer *a = r.value;
        if (r.error == 0 && a->lines > 0) {
            if (isatty(2)) fputs("\r\033[K", stderr);
            fwrite(a->text, 1, a->size, stdout); // no other task comes between
            fflush(stdout);
            job.lines += a->lines;
        }
        job.searched++;
        orch_result_free(&r);
        orch_result_free(&file);
    }
}

static orch_result start(void *paths) {
    orch_future *tasks[AT_ONCE + 1], *shows = orch_go(progress, NULL);
    job.files = orch_channel_new(AHEAD);
    for (int i = 0; i < AT_ONCE; i++) tasks[i] = orch_go(search_all, NULL);
    tasks[AT_ONCE] = orch_go_with(&(orch_task_desc){
        .name = "walk", .fn = walk_all, .arg = paths, .stack_size = 1 << 20}); // deep folders
    orch_result r = orch_await(orch_all_n(AT_ONCE + 1, tasks));
    orch_drop(shows);
    if (isatty(2)) fputs("\r\033[K", stderr);
    orch_channel_free(job.files);
    return r;
}

int main(int argc, char **argv) {
    for (int option; (option = getopt(argc, argv, "in")) != -1;) {
        if (option == '?') return 2;
        if (option == 'i') job.fold = true;
        else job.numbers = true;
    }
    if (argc - optind < 2) return fputs("usage: 21_grep [-i] [-n] TEXT PATH...\n", stderr), 2;
    job.text = argv[optind];
    job.length = strlen(job.text);
    orch_loop_desc desc = {.handle_signals = true}; // Ctrl-C ends it in good order
    int code = orch_exit(orch_run_with(&desc, start, argv + optind + 1));
    if (code != 0) return code == 1 ? 2 : code;
    return job.errors > 0 ? 2 : job.lines > 0 ? 0 : 1;
}
