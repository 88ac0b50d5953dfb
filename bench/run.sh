#!/bin/sh
# Runs the built benchmarks: sh bench/run.sh [folder with the programs] [runs]
#
# The machine may be shared, so every program runs several times, in turns (a slow moment then
# spoils one run of each, not all runs of one), and each number printed is the median over the runs.
# bench_move and bench_request run once, and bench_parallel at the end: they repeat by themselves.
set -eu

dir=${1:-.build/bench}
runs=${2:-${BENCH_RUNS:-5}}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# The lines of one program's runs -> one line, numbers replaced by medians, judged again.
median_line() {
    awk '
        { line[NR] = $0; n = split($0, f, " ")
          if (NR == 1) { fields = n; for (i = 1; i <= n; i++) shape[i] = f[i] }
          for (i = 1; i <= n; i++) value[i, NR] = f[i] }
        function median(i,   k, j, t, a) {
            for (k = 1; k <= NR; k++) a[k] = value[i, k] + 0
            for (k = 2; k <= NR; k++)
                for (j = k; j > 1 && a[j - 1] > a[j]; j--) {
                    t = a[j]; a[j] = a[j - 1]; a[j - 1] = t
                }
            return a[int((NR + 1) / 2)]
        }
        END {
            out = ""; last = 0
            for (i = 1; i <= fields; i++) {
                word = shape[i]
                if (word ~ /^-?[0-9]+\.[0-9]$/) { last = median(i); word = sprintf("%.1f", last) }
                if (shape[i - 2] == "<=" || shape[i - 1] == "<=") limit = shape[i - 1] + 0
                if (word ~ /^(met|MISSED);?$/) {
                    semicolon = word ~ /;$/ ? ";" : ""
                    word = (last <= limit ? "met" : "MISSED") semicolon
                }
                out = out (i > 1 ? " " : "") word
            }
            print out
        }' "$1"
}

failed=
limit=$(command -v timeout >/dev/null 2>&1 && echo timeout 120) || limit= # none takes a tenth of it
programs=$(ls "$dir" | grep '^bench_[a-z_]*$' | grep -v '^bench_parallel$')
echo "machine: $(uname -sm), $(nproc 2>/dev/null || echo '?') processors," \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)," \
    "load $(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null || echo '?')," "medians of $runs runs"
for run in $(seq "$runs"); do
    for program in $programs; do
        case $program in bench_move | bench_request) [ "$run" = 1 ] || continue ;; esac
        $limit "$dir/$program" >>"$work/$program" || failed="$failed $program"
    done
done
for program in $programs; do median_line "$work/$program"; done
if [ -x "$dir/bench_parallel" ]; then
    echo
    server=$dir/server
    ${CC:-cc} -std=gnu99 -O2 -DNDEBUG "$(dirname "$0")/../examples/server.c" -o "$server" || server=
    "$dir/bench_parallel" "$dir/parallel.svg" ${server:+"$server"}
fi
[ -z "$failed" ] || { echo "bench: failed or hung:$failed" >&2; exit 1; }
