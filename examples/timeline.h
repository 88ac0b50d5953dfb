// timeline.h - draws when calls ran: one row per call, a bar from its start to its end in columns
// of 10 ms (200 at most), and how it ended. The recording knows nothing of futures; 08_profile.c
// connects the two.

#ifndef TIMELINE_H
#define TIMELINE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { TIMELINE_ROWS = 64, TIMELINE_COLUMN_MS = 10, TIMELINE_COLUMNS = 200, TIMELINE_NAME = 24 };

typedef enum timeline_mark {
    TIMELINE_OPEN,
    TIMELINE_OK,
    TIMELINE_FAILED,
    TIMELINE_TIMEOUT
} timeline_mark;

typedef struct timeline {
    uint64_t zero; // the time of column 0
    size_t count;
    struct timeline_row {
        char name[TIMELINE_NAME];
        uint64_t start, end;
        timeline_mark mark;
    } rows[TIMELINE_ROWS];
} timeline;

// Returns the row, for timeline_end; TIMELINE_ROWS when the picture is full.
static size_t timeline_begin(timeline *t, uint64_t now, const char *name) {
    if (t->count == TIMELINE_ROWS) return TIMELINE_ROWS;
    struct timeline_row *row = &t->rows[t->count];
    snprintf(row->name, sizeof row->name, "%s", name);
    row->start = row->end = now;
    row->mark = TIMELINE_OPEN;
    return t->count++;
}

static void timeline_end(timeline *t, size_t row, uint64_t now, timeline_mark mark) {
    if (row >= t->count) return;
    t->rows[row].end = now;
    t->rows[row].mark = mark;
}

static int timeline_column(const timeline *t, uint64_t time) {
    uint64_t column = (time - t->zero) / TIMELINE_COLUMN_MS;
    return column < TIMELINE_COLUMNS ? (int)column : TIMELINE_COLUMNS;
}

static void timeline_repeat(const char *text, int times) {
    for (; times > 0; times--) fputs(text, stdout);
}

static void timeline_print_axis(int columns) {
    printf("%-11s%7s ", "", "");
    for (int c = 0; c <= columns; c += 10) printf("%-10d", c * TIMELINE_COLUMN_MS);
    printf("ms\n%-11s%7s |", "", "");
    for (int c = 5; c <= columns; c += 5) printf("    %c", c % 10 == 0 ? '|' : '\'');
    putchar('\n');
}

// Colours only on a terminal, and not when NO_COLOR is set.
static void timeline_print(const timeline *t) {
    static const char *const marks[] = {"?", "\xe2\x9c\x93", "\xe2\x9c\x97",
                                        "\xe2\x8f\xb1"}; // ✓ ✗ ⏱
    static const char *const colours[] = {"", "\033[32m", "\033[31m", "\033[33m"};
    bool colour = isatty(STDOUT_FILENO) && getenv("NO_COLOR") == NULL;
    int columns = 0;
    for (size_t i = 0; i < t->count; i++) {
        int end = timeline_column(t, t->rows[i].end);
        if (end > columns) columns = end;
    }
    timeline_print_axis(columns);
    for (size_t i = 0; i < t->count; i++) {
        const struct timeline_row *row = &t->rows[i];
        int from = timeline_column(t, row->start), to = timeline_column(t, row->end);
        printf("%-11s%4d ms ", row->name, (int)(row->end - row->start));
        timeline_repeat(" ", from);
        fputs(colour ? colours[row->mark] : "", stdout);
        timeline_repeat("\xe2\x96\x88", to > from ? to - from : 1); // █, at least one
        printf("%s%s\n", marks[row->mark], colour ? "\033[0m" : "");
    }
}

#endif
