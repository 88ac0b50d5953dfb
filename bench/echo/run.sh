#!/bin/sh
# An echo of 64 bytes, side by side: sh bench/echo/run.sh [folder for the programs] [peer...]
#
# For each row (busy connections : idle ones) every server takes its turn in every round, so that a
# slow moment of a shared machine spoils one run of each and not all runs of one. What counts is the
# median over the rounds, and its ratio to the better of the bare servers on poll(2) and on epoll.
# The server has one processor and the client another. From the environment:
#   ECHO_SECONDS  of each run, of which the second half counts (1; the issue's figures: 10)
#   ECHO_ROUNDS   5
#   ECHO_ROWS     '100:0 1000:0 10000:0 10:10000'
#   ECHO_SERVERS  instead of the bare ones, asyncorch under each poller, and the peers
set -eu

here=$(dirname "$0")
dir=${1:-.build/bench/echo}
[ $# -eq 0 ] || shift
seconds=${ECHO_SECONDS:-1}
rounds=${ECHO_ROUNDS:-5}
rows=${ECHO_ROWS:-100:0 1000:0 10000:0 10:10000}
port=$((20000 + $$ % 5000 * 2))
work=$(mktemp -d)
server=
trap 'kill $server 2>/dev/null; rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

sh "$here/build.sh" "$dir" "$@"
servers="poll epoll asyncorch-poll asyncorch-epoll asyncorch"
for peer; do [ ! -x "$dir/$peer" ] || servers="$servers $peer"; done
servers=${ECHO_SERVERS:-$servers}

on=
other=
if command -v taskset >/dev/null && [ "$(nproc)" -gt 1 ]; then
    on='taskset -c 0'
    other='taskset -c 1'
fi

# name, options of the client: one run of it. The line of the client, or nothing.
run() {
    program=${1%%-*}
    mode=${1#"$program"}
    shift
    $on "$dir/$program" $port ${mode#-} &
    server=$!
    echo $server >"$work/pid"
    [ "$program" != asyncorch ] || set -- "$@" -c $((port + 1))
    $other "$dir/client" -p $port -s $server "$@" || echo "bench: no figures of $program" >&2
    kill $server && wait $server 2>/dev/null || true
}

# The lines of a row, each after its server's name -> one fixed line for each server, with medians.
medians='
function median(name, key,   i, j, n, t, a) {
    n = split(values[name, key], a, " ")
    for (i = 2; i <= n; i++)
        for (j = i; j > 1 && a[j - 1] + 0 > a[j] + 0; j--) { t = a[j]; a[j] = a[j - 1]; a[j - 1] = t }
    return a[int((n + 1) / 2)] + 0
}
{
    if (!($1 in seen)) { seen[$1] = 1; order[++count] = $1 }
    for (i = 2; i < NF; i += 2) values[$1, $i] = values[$1, $i] " " $(i + 1)
}
END {
    for (i = 1; i <= count; i++)
        if (order[i] ~ /^(poll|epoll)$/ && median(order[i], "per_second") > best)
            best = median(order[i], "per_second")
    for (i = 1; i <= count; i++) {
        s = order[i]
        ratio = best ? median(s, "per_second") / best : 0
        printf "echo %s %s: %d a second, ratio %.2f", row, s, median(s, "per_second"), ratio
        if (s ~ /^asyncorch/) printf " (figure >= 0.97) %s", (ratio >= 0.965 ? "met" : "MISSED")
        printf "; p50 %.0f us, p99 %.0f us", median(s, "p50_us"), median(s, "p99_us")
        printf "; processor %.2f us each (client %.2f)", median(s, "server_us"),
            median(s, "client_us")
        if (row ~ /:[1-9]/) printf "; %.2f KiB each connection", median(s, "kib_each")
        if (s ~ /^asyncorch/ && row ~ /:[1-9]/)
            printf " (figure <= 5) %s", (median(s, "kib_each") <= 5 ? "met" : "MISSED")
        if ((s, "moves") in values) printf "; %d moves", median(s, "moves")
        printf "\n"
    }
}'

# What each request of a server costs in system calls, counted in the middle of a run under strace.
count_calls() {
    for name in $servers; do
        case $name in poll | epoll | asyncorch*) ;; *) continue ;; esac
        { sleep 1; timeout -s INT 1 strace -c -f -o "$work/calls" \
            -p "$(cat "$work/pid")" 2>/dev/null || true; } &
        counter=$!
        run "$name" -b 100 -t 3 >/dev/null
        wait $counter || true
        awk -v name="$name" '
            $NF == "sendto" { sends = $4 }
            $4 ~ /^[0-9]+$/ && $NF != "total" { calls[$NF] = $4; order[++n] = $NF }
            END {
                printf "echo calls %s:", name
                for (i = 1; i <= n && sends; i++)
                    printf "%s %s %.3f", (i > 1 ? "," : ""), order[i], calls[order[i]] / sends
                print sends ? " each request" : " not counted"
            }' "$work/calls"
    done
}

echo "machine: $(uname -sm), $(nproc) processors," \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)," \
    "load $(cut -d ' ' -f 1 /proc/loadavg), medians of $rounds rounds of $seconds s"
for row in $rows; do
    for round in $(seq "$rounds"); do
        for name in $servers; do
            figures=$(run "$name" -b "${row%:*}" -i "${row#*:}" -t "$seconds")
            [ -z "$figures" ] || echo "$name $figures" >>"$work/$row"
        done
    done
    awk -v row="$row" "$medians" "$work/$row" | tee -a "$work/all"
done
! command -v strace >/dev/null || count_calls

echo
awk '
    { sub(/:$/, "", $3); ratio = $0; sub(/.*ratio /, "", ratio); cell[$3, $2] = substr(ratio, 1, 4)
      if (!($3 in seen)) { seen[$3] = 1; order[++count] = $3 }
      if (!($2 in known)) { known[$2] = 1; rows[++width] = $2 } }
    END {
        printf "%-16s", "busy:idle"
        for (k = 1; k <= width; k++) printf " %10s", rows[k]
        for (i = 1; i <= count; i++) {
            printf "\n%-16s", order[i]
            for (k = 1; k <= width; k++) printf " %10s", cell[order[i], rows[k]]
        }
        print ""
    }' "$work/all"
