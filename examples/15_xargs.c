// 15_xargs: runs a command for each line of standard input, several at a time: a small xargs -P.
//
// shows   orch_process_run (output captured, children killed on every way out), orch_map (so many
//         at a time) with a retry for each, handle_signals (Ctrl-C ends the children, then us)
// run     seq 3 | ./15_xargs -j 2 -t 5 -r 1 sh -c 'sleep 0.{}; echo slept 0.{} s; test {} != 2'
// prints
//         slept 0.1 s
//         slept 0.2 s
//         slept 0.3 s
//         slept 0.2 s
//         15_xargs: 2: exited with 1
//
// -j N   so many at a time, 1 to 1000; default 4        -0  items end with NUL, not with a newline
// -t S   seconds for each attempt; default: any number  -r N  so many more attempts; default 0
// {} in the command is replaced by the item; without one the item is the last argument. What a
// command prints appears when it has ended, in one piece. Exit code: as xargs 0, or 123 when a
// command failed, 126 when it cannot be run, 127 when it is not found; 1 for an error of our own, 2
// for wrong options, 130 and 143 when interrupted.

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct job {
    char **command; // with a NULL at the end
    int words;
    char **items;
    size_t count, at_once;
    unsigned retries;
    uint64_t timeout_ms;
    char end;
    int code; // what to exit with
} job = {.at_once = 4, .end = '\n'};

// ---- one command

// A copy of a word in which each {} is the item.
static char *fill(const char *word, const char *item, bool *used) {
    size_t holes = 0, length = strlen(item);
    for (const char *at = word; (at = strstr(at, "{}")) != NULL; at += 2) holes++;
    char *text = malloc(strlen(word) + holes * length + 1), *to = text;
    if (text == NULL) return NULL;
    while (*word != '\0') {
        bool hole = strncmp(word, "{}", 2) == 0;
        memcpy(to, hole ? item : word, hole ? length : 1);
        to += hole ? length : 1;
        word += hole ? 2 : 1;
    }
    *to = '\0';
    *used = *used || holes > 0;
    return text;
}

static void free_words(char **words) {
    for (size_t i = 0; words[i] != NULL; i++) free(words[i]);
    free(words);
}

static char **command_for(const char *item) {
    bool used = false, failed = false;
    char **words = calloc((size_t)job.words + 2, sizeof *words);
    if (words == NULL) return NULL;
    for (int i = 0; i < job.words && !failed; i++) {
        words[i] = fill(job.command[i], item, &used);
        failed = words[i] == NULL;
    }
    if (!used && !failed) failed = (words[job.words] = strdup(item)) == NULL;
    if (!failed) return words;
    free_words(words);
    return NULL;
}

// One attempt. Cancelled, by a time-out or a signal, it returns when its processes have ended.
static orch_result attempt(void *arg) {
    char **words = command_for(*(char **)arg);
    if (words == NULL) return orch_fail(ORCH_ENOMEM);
    orch_process_desc desc = {.argv = (const char *const *)words, .in = ORCH_STDIO_NULL};
    orch_result r = orch_process_run(&desc);
    free_words(words);
    if (r.error != 0) return r;
    const orch_process_output *output = r.value;
    orch_result status = orch_exit_status_check(output->status);
    fwrite(output->out, 1, output->out_size, stdout);
    fflush(stdout);
    fwrite(output->err, 1, output->err_size, stderr);
    orch_result_free(&r);
    return status;
}

// A command that cannot be started will not start the next time.
static bool may_pass(const orch_result *r, void *context) {
    (void)context;
    return r->error > 0 || r->error == ORCH_ETIMEDOUT || r->error == ORCH_ELIMIT;
}

static int code_of(int error) { return error == -ENOENT ? 127 : error == -EACCES ? 126 : 123; }

static orch_result run_item(size_t i, void *context) {
    (void)context;
    orch_retry_desc retry = {.fn = attempt,
                             .arg = &job.items[i],
                             .attempts = job.retries + 1,
                             .delay_ms = 100,
                             .timeout_ms = job.timeout_ms,
                             .retry_if = may_pass};
    orch_result r = orch_await(orch_retry(&retry));
    if (r.error == 0 || r.error == ORCH_ECANCELED) return r;
    fprintf(stderr, "15_xargs: %s: %s\n", job.items[i], orch_message(&r));
    if (code_of(r.error) > job.code) job.code = code_of(r.error);
    if (code_of(r.error) != 123) return r; // the map ends
    orch_result_free(&r);
    return orch_ok(NULL, NULL);
}

static orch_result run_all(void *arg) {
    (void)arg;
    orch_map_desc map = {.count = job.count, .fn = run_item, .concurrency = job.at_once};
    orch_result r = orch_await(orch_map(&map));
    bool told = r.error != 0 && job.code > 123;
    if (r.error != 0 && !told) return r;
    orch_result_free(&r);
    return orch_ok_int(job.code);
}

// ---- the command line, standard input

static int usage(void) {
    fprintf(stderr, "usage: 15_xargs [-0] [-j N] [-t SECONDS] [-r N] COMMAND [WORD...]\n");
    return 2;
}

// The number behind an option, in thousandths; false when it is none or out of range.
static bool number(const char *text, double least, double most, uint64_t *thousandths) {
    char *end = NULL;
    double value = text != NULL ? strtod(text, &end) : 0;
    if (text == NULL || *text == '\0' || *end != '\0' || !(value >= least && value <= most))
        return false;
    *thousandths = (uint64_t)(value * 1000 + 0.5);
    return true;
}

static bool options(char **argv) {
    uint64_t n = 0;
    for (argv++; *argv != NULL && **argv == '-'; argv++) {
        if (strcmp(*argv, "-0") == 0) {
            job.end = '\0';
        } else if (strcmp(*argv, "-j") == 0 && number(argv[1], 1, 1000, &n)) {
            job.at_once = (size_t)(n / 1000);
            argv++;
        } else if (strcmp(*argv, "-r") == 0 && number(argv[1], 0, 1000, &n)) {
            job.retries = (unsigned)(n / 1000);
            argv++;
        } else if (strcmp(*argv, "-t") == 0 && number(argv[1], 0.001, 1e6, &job.timeout_ms)) {
            argv++;
        } else {
            return false;
        }
    }
    job.command = argv;
    while (argv[job.words] != NULL) job.words++;
    return job.words > 0;
}

// All items, before the first command: it may take its time.
static bool read_items(void) {
    char *item = NULL;
    size_t size = 0, room = 0;
    ssize_t length;
    while ((length = getdelim(&item, &size, job.end, stdin)) > 0) {
        if (item[length - 1] == job.end) item[--length] = '\0';
        if (length == 0) continue;
        if (job.count == room) {
            char **grown = realloc(job.items, (room = room * 2 + 64) * sizeof *grown);
            if (grown == NULL) break;
            job.items = grown;
        }
        if ((job.items[job.count] = strdup(item)) == NULL) break;
        job.count++;
    }
    free(item);
    return feof(stdin) && !ferror(stdin);
}

int main(int argc, char **argv) {
    (void)argc;
    if (!options(argv)) return usage();
    if (!read_items()) return perror("15_xargs: standard input"), 1;
    orch_loop_desc desc = {.handle_signals = true};
    orch_result r = orch_run_with(&desc, run_all, NULL);
    int code = r.error == 0 ? (int)orch_int(&r) : orch_exit(r);
    for (size_t i = 0; i < job.count; i++) free(job.items[i]);
    free(job.items);
    return code;
}
