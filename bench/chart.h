// chart.h: the picture of bench_parallel: time over the number of calls, both axes logarithmic, as
// a self-contained SVG file.
#ifndef BENCH_CHART_H
#define BENCH_CHART_H

#include <stdbool.h>
#include <stdio.h>

typedef struct chart_series {
    const char *name;   // in the legend
    const char *colour; // of line and points
    bool dashed;
    size_t count;
    const double *x; // number of calls, 1 or more
    const double *y; // milliseconds, above 0
} chart_series;

typedef struct chart {
    const char *title;
    const char *note; // below the title: what was measured, on what
    size_t count;
    const chart_series *series;
    int low, high; // powers of ten of the y axis; set by chart_write
} chart;

enum {
    CHART_WIDTH = 880,
    CHART_HEIGHT = 560,
    CHART_LEFT = 84,
    CHART_RIGHT = 210, // room for the names at the ends of the lines
    CHART_TOP = 92,
    CHART_BOTTOM = 70,
    CHART_DECADES = 3 // of calls: 1 to 1,000
};

// Of a value above 0. By hand, so that nothing has to be linked: powers of ten, then the series of
// the inverse hyperbolic tangent, which is good to a hundredth of a pixel here.
static inline double chart_log10(double value) {
    double whole = 0, sum = 0;
    for (; value >= 2; value /= 10) whole++;
    for (; value < 0.2; value *= 10) whole--;
    double z = (value - 1) / (value + 1), power = z;
    for (int i = 1; i < 40; i += 2, power *= z * z) sum += power / i;
    return whole + 2 * sum / 2.302585092994046;
}

// The exponent of the power of ten at or below value.
static inline int chart_decade_below(double value) {
    int decade = 0;
    for (double power = 1; value < power; power /= 10) decade--;
    for (double power = 10; value >= power; power *= 10) decade++;
    return decade;
}

static inline double chart_power(int decade) {
    double power = 1;
    for (; decade > 0; decade--) power *= 10;
    for (; decade < 0; decade++) power /= 10;
    return power;
}

static inline double chart_x(double calls) {
    double inner = CHART_WIDTH - CHART_LEFT - CHART_RIGHT;
    return CHART_LEFT + inner * chart_log10(calls) / CHART_DECADES;
}

static inline double chart_y(const chart *c, double ms) {
    double inner = CHART_HEIGHT - CHART_TOP - CHART_BOTTOM;
    return CHART_HEIGHT - CHART_BOTTOM - inner * (chart_log10(ms) - c->low) / (c->high - c->low);
}

// The y axis covers whole powers of ten around all values.
static inline void chart_scale(chart *c) {
    c->low = 100;
    c->high = -100;
    for (size_t s = 0; s < c->count; s++) {
        for (size_t i = 0; i < c->series[s].count; i++) {
            int decade = chart_decade_below(c->series[s].y[i]);
            if (decade < c->low) c->low = decade;
            if (decade + 1 > c->high) c->high = decade + 1;
        }
    }
}

static inline void chart_line(FILE *out, const char *kind, double x1, double y1, double x2,
                              double y2) {
    fprintf(out, "<line class='%s' x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f'/>\n", kind, x1, y1, x2,
            y2);
}

static inline void chart_vertical_grid(FILE *out, int decade) {
    double base = chart_power(decade), bottom = CHART_HEIGHT - CHART_BOTTOM;
    for (int k = 2; k < 10 && decade < CHART_DECADES; k++) {
        chart_line(out, "minor", chart_x(base * k), CHART_TOP, chart_x(base * k), bottom);
    }
    chart_line(out, "major", chart_x(base), CHART_TOP, chart_x(base), bottom);
    fprintf(out, "<text class='tick' text-anchor='middle' x='%.1f' y='%.1f'>%s</text>\n",
            chart_x(base), bottom + 20, ((const char *[]){"1", "10", "100", "1,000"})[decade]);
}

static inline void chart_horizontal_grid(const chart *c, FILE *out, int decade) {
    double base = chart_power(decade), right = CHART_WIDTH - CHART_RIGHT;
    for (int k = 2; k < 10 && decade < c->high; k++) {
        chart_line(out, "minor", CHART_LEFT, chart_y(c, base * k), right, chart_y(c, base * k));
    }
    chart_line(out, "major", CHART_LEFT, chart_y(c, base), right, chart_y(c, base));
    fprintf(out, "<text class='tick' text-anchor='end' x='%d' y='%.1f'>%g %s</text>\n",
            CHART_LEFT - 8, chart_y(c, base) + 4.5, base < 1000 ? base : base / 1000,
            base < 1000 ? "ms" : "s");
}

static inline void chart_axes(const chart *c, FILE *out) {
    double middle = (CHART_LEFT + CHART_WIDTH - CHART_RIGHT) / 2.0;
    double centre = (CHART_TOP + CHART_HEIGHT - CHART_BOTTOM) / 2.0;
    for (int decade = 0; decade <= CHART_DECADES; decade++) chart_vertical_grid(out, decade);
    for (int decade = c->low; decade <= c->high; decade++) chart_horizontal_grid(c, out, decade);
    fprintf(out, "<text class='axis' text-anchor='middle' x='%.1f' y='%d'>number of calls</text>\n",
            middle, CHART_HEIGHT - 24);
    fprintf(out,
            "<text class='axis' text-anchor='middle' transform='translate(24 %.1f) rotate(-90)'>"
            "time until all have answered</text>\n",
            centre);
}

static inline void chart_series_write(const chart *c, const chart_series *s, FILE *out) {
    fprintf(out, "<polyline fill='none' stroke='%s' stroke-width='2.5'%s points='", s->colour,
            s->dashed ? " stroke-dasharray='7 5'" : "");
    for (size_t i = 0; i < s->count; i++) {
        fprintf(out, "%.1f,%.1f ", chart_x(s->x[i]), chart_y(c, s->y[i]));
    }
    fprintf(out, "'/>\n");
    for (size_t i = 0; i < s->count; i++) {
        fprintf(out, "<circle cx='%.1f' cy='%.1f' r='4' stroke-width='2' stroke='%s' fill='%s'/>\n",
                chart_x(s->x[i]), chart_y(c, s->y[i]), s->colour, s->dashed ? "#fff" : s->colour);
    }
}

// Names stand beside the ends of their lines, moved apart where two ends are close.
static inline void chart_legend(const chart *c, FILE *out) {
    double taken[16];
    for (size_t s = 0; s < c->count && s < 16; s++) {
        const chart_series *one = &c->series[s];
        double y = chart_y(c, one->y[one->count - 1]), last = one->y[one->count - 1];
        for (size_t k = 0; k < s; k++) {
            double apart = y - taken[k];
            if (apart < 38 && apart > -38) y = taken[k] + (apart < 0 ? -38 : 38);
        }
        taken[s] = y;
        fprintf(out, "<text class='name' fill='%s' x='%d' y='%.1f'>%s</text>\n", one->colour,
                CHART_WIDTH - CHART_RIGHT + 14, y, one->name);
        fprintf(out, "<text class='tick' x='%d' y='%.1f'>%.*f %s</text>\n",
                CHART_WIDTH - CHART_RIGHT + 14, y + 16, last < 1000 ? 1 : 2,
                last < 1000 ? last : last / 1000, last < 1000 ? "ms" : "s");
    }
}

// Whether the file could be written.
static inline bool chart_write(chart *c, const char *path) {
    FILE *out = fopen(path, "w");
    if (out == NULL) return false;
    chart_scale(c);
    fprintf(out,
            "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %d %d' width='%d' height='%d'"
            " font-family='Helvetica, Arial, DejaVu Sans, sans-serif'>\n",
            CHART_WIDTH, CHART_HEIGHT, CHART_WIDTH, CHART_HEIGHT);
    fprintf(out,
            "<style>.minor{stroke:#eef0f2}.major{stroke:#cfd4d9}.tick{font-size:13px;fill:#444}"
            ".axis{font-size:14px;fill:#222}.name{font-size:14px;font-weight:bold}</style>\n");
    fprintf(out, "<rect width='%d' height='%d' fill='#fff'/>\n", CHART_WIDTH, CHART_HEIGHT);
    fprintf(out, "<text x='%d' y='36' font-size='20' font-weight='bold' fill='#111'>%s</text>\n",
            CHART_LEFT, c->title);
    fprintf(out, "<text x='%d' y='60' font-size='14' fill='#555'>%s</text>\n", CHART_LEFT, c->note);
    chart_axes(c, out);
    for (size_t s = 0; s < c->count; s++) chart_series_write(c, &c->series[s], out);
    chart_legend(c, out);
    fprintf(out, "</svg>\n");
    return fclose(out) == 0;
}

#endif
