# What the client measured, one line a run, to a line for each server or (table=1) one table:
# awk -f figures.awk -v names="server..." [-v table=1] file
#
# A ratio is to the better of the bare servers: the median over the rounds of what a server reached
# by what the bare one reached in the same round, as the speed of a shared machine drifts. Of the
# self-moving loop also to the better of the two pinned ones. First of requests a second, then of
# processor time for a request.
$1 == "run" {
    if (!($2 in seen)) { seen[$2] = 1; rows[++row_count] = $2 }
    run = ++runs[$2, $3]
    for (i = 4; i <= NF; i++) value[$2, $3, i - 3, run] = $i
}

function sort_and_take_middle(list, n,   i, k, t) {
    for (i = 2; i <= n; i++)
        for (k = i; k > 1 && list[k - 1] > list[k]; k--) {
            t = list[k]
            list[k] = list[k - 1]
            list[k - 1] = t
        }
    return list[int((n + 1) / 2)]
}

function median(row, name, measure,   list, i) {
    for (i = 1; i <= runs[row, name]; i++) list[i] = value[row, name, measure, i]
    return sort_and_take_middle(list, runs[row, name])
}

# What is more is better; of time (measure 2) what is less.
function better(row, one, other, measure,   a, b) {
    if (!((row, one) in runs)) return other
    if (!((row, other) in runs)) return one
    a = median(row, one, measure)
    b = median(row, other, measure)
    return (measure == 2 ? a < b : a > b) ? one : other
}

function ratio(row, name, to, measure,   list, i, n) {
    if (!((row, name) in runs) || !((row, to) in runs)) return "-"
    for (i = 1; i <= runs[row, name] && i <= runs[row, to]; i++) {
        n = value[row, to, measure, i]
        list[i] = n == 0 ? 0 : value[row, name, measure, i] / n
        if (measure == 2 && list[i] > 0) list[i] = 1 / list[i]
    }
    return sprintf("%.2f", sort_and_take_middle(list, i - 1))
}

function judged(value, held) { return sprintf(" (figure %s) %s", value, held ? "met" : "MISSED") }

function report(row, name,   ours, r, idle, pinned) {
    ours = name ~ /^asyncorch/
    r = ratio(row, name, better(row, "poll", "epoll", 1), 1)
    printf "echo %s %s: %.0f a second, ratio %s", row, name, median(row, name, 1), r
    if (name == "asyncorch" && r != "-") printf "%s", judged(">= 0.97", r >= 0.97)
    printf "; processor %.2f us each, ratio %s", median(row, name, 2), \
        ratio(row, name, better(row, "poll", "epoll", 2), 2)
    if (name == "asyncorch" && (row, "asyncorch-poll") in runs) {
        pinned = ratio(row, name, better(row, "asyncorch-poll", "asyncorch-epoll", 1), 1)
        printf "; ratio to the better one pinned %s%s", pinned, judged(">= 0.95", pinned >= 0.95)
    }
    printf "; p50 %.0f us, p99 %.0f us", median(row, name, 3), median(row, name, 4)
    idle = row
    sub(/.*:/, "", idle)
    if (idle > 0) printf "; %.2f KiB each connection", median(row, name, 5)
    if (idle > 0 && ours) printf "%s", judged("<= 5", median(row, name, 5) <= 5)
    if (name == "asyncorch") printf "; moves %d", median(row, name, 6)
    print ""
}

END {
    count = split(names, order, " ")
    if (!table) {
        for (i = 1; i <= row_count; i++)
            for (k = 1; k <= count; k++)
                if ((rows[i], order[k]) in runs) report(rows[i], order[k])
        exit
    }
    printf "%-16s", "busy:idle"
    for (i = 1; i <= row_count; i++) printf " %12s", rows[i]
    for (k = 1; k <= count; k++) {
        printf "\n%-16s", order[k]
        for (i = 1; i <= row_count; i++)
            printf " %12s", ratio(rows[i], order[k], better(rows[i], "poll", "epoll", 1), 1) " / " \
                ratio(rows[i], order[k], better(rows[i], "poll", "epoll", 2), 2)
    }
    print ""
}
