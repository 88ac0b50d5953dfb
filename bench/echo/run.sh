#!/bin/sh
# An echo of 64 bytes, side by side: sh bench/echo/run.sh [folder for the programs] [peer...]
#
# For each row (busy connections : idle ones) all servers are up, and take turns under the load of
# one client, see client.c; what is made of it, see figures.awk. Turns are short and many, as the
# speed of a shared machine drifts by a tenth from one second to the next; ten thousand connections
# need longer ones, to be served several times in each. Then all are started again: where the memory
# of a process and its sockets happens to lie makes as much, as long as it lives.
# The servers have one processor and the client another. From the environment:
#   ECHO_SECONDS  of each run, of which the second half counts (0.12; 1 with 10,000 busy ones)
#   ECHO_ROUNDS   runs of each server between two starts (20; 4)
#   ECHO_STARTS   5
#   ECHO_ROWS     '100:0 1000:0 10000:0 10:10000'
#   ECHO_SERVERS  instead of the bare ones, asyncorch under each poller, and the peers
set -eu

here=$(dirname "$0")
dir=${1:-.build/bench/echo}
[ $# -eq 0 ] || shift
starts=${ECHO_STARTS:-5}
work=$(mktemp -d)
running=
trap '[ -z "$running" ] || kill $running 2>/dev/null || true; rm -rf "$work"' EXIT
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

# Starts the servers named, each on two ports of its own. What the client is to know: in $targets.
start() {
    port=$((20000 + $$ % 500 * 20))
    running=
    targets=
    for name; do
        program=${name%%-*}
        mode=${name#"$program"}
        $on "$dir/$program" $port ${mode#-} &
        running="$running $!"
        targets="$targets $name,$port,$!"
        [ "$program" != asyncorch ] || targets="$targets,$((port + 1))"
        port=$((port + 2))
    done
}

stop() {
    # shellcheck disable=SC2086
    { kill $running && wait $running; } 2>/dev/null || true
    running=
}

# What a request of a server costs in system calls, counted in the middle of a run under strace.
count_calls() {
    start "$1"
    { sleep 1; timeout -s INT 1 strace -c -f -o "$work/calls" -p $running 2>/dev/null || true; } &
    counter=$!
    $other "$dir/client" -b 100 -t 3 -r 1 $targets >/dev/null
    wait $counter || true
    stop
    awk -v name="$1" '
        $NF == "sendto" { sends = $4 }
        $4 ~ /^[0-9]+$/ && $NF != "total" { calls[$NF] = $4; order[++n] = $NF }
        END {
            printf "echo calls %s:", name
            for (i = 1; i <= n && sends; i++)
                printf "%s %s %.3f", (i > 1 ? "," : ""), order[i], calls[order[i]] / sends
            print (sends ? " each request" : " not counted")
        }' "$work/calls"
}

# All under the load of a row, from several starts, into $work/row. The first is another one each
# time. A start that failed counts for none of them, as rounds are compared one by one.
row() {
    order=$servers
    case $1 in
    10000:*) seconds=${ECHO_SECONDS:-1} rounds=${ECHO_ROUNDS:-4} ;;
    *) seconds=${ECHO_SECONDS:-0.12} rounds=${ECHO_ROUNDS:-20} ;;
    esac
    : >"$work/row"
    for start in $(seq "$starts"); do
        start $order
        if $other "$dir/client" -b "${1%:*}" -i "${1#*:}" -t "$seconds" -r "$rounds" $targets \
            >"$work/start"; then cat "$work/start" >>"$work/row"
        else echo "bench: no figures of $1 at start $start" >&2
        fi
        stop
        order="${order#"${order%% *}"} ${order%% *}"
        order=${order# }
    done
}

echo "machine: $(uname -sm), $(nproc) processors," \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)," \
    "load $(cut -d ' ' -f 1 /proc/loadavg), medians of the runs after $starts starts"
for row in ${ECHO_ROWS:-100:0 1000:0 10000:0 10:10000}; do
    row "$row"
    cat "$work/row" >>"$work/all"
    awk -f "$here/figures.awk" -v names="$servers" "$work/row"
done
for name in $servers; do
    case $name in poll | epoll | asyncorch*) ;; *) continue ;; esac
    ! command -v strace >/dev/null || count_calls "$name"
done
echo
awk -f "$here/figures.awk" -v names="$servers" -v table=1 "$work/all"
