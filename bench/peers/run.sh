#!/bin/sh
# The same four measures with asyncorch.h and with what others have, side by side: builds what the
# machine has the tools for, runs all in turns, and prints the medians.
# Run: make bench-peers, or sh bench/peers/run.sh [folder to build in] [runs]
#
#     switch   two tasks yield in alternation, a yield
#     spawn    start a task, run it, await its result
#     all      create, join, settle and read 300,000 pending futures, each
#     oneshot  create a future with a callback (or receiver), settle it, call
set -eu

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-.build/peers}
runs=${2:-${BENCH_RUNS:-3}}
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/*.lines
peers=

has() { command -v "$1" >/dev/null 2>&1; }

# Builds one: its name, then the command. What does not build is left out with a word.
peer() {
    name=$1
    shift
    if "$@" >"$out/$name.log" 2>&1; then peers="$peers $name"
    else echo "bench-peers: without $name (see $out/$name.log)"
    fi
}

build_tokio() {
    registry=/usr/share/cargo/registry # where Debian puts its crates
    [ -d "$registry" ] && cp -r "$here/tokio" "$out/" && cd "$out/tokio" && mkdir -p .cargo &&
        printf '[source.crates-io]\nreplace-with = "system"\n[source.system]\ndirectory = "%s"\n' \
            "$registry" >.cargo/config.toml &&
        cargo build --offline --release && cp target/release/peer "$out/tokio.bin"
}
build_go() { go build -o "$out/go.bin" "$here/peer.go"; }
build_node() { printf '#!/bin/sh\nexec node "%s"\n' "$here/peer.js" >"$out/node.bin" &&
    chmod +x "$out/node.bin"; }

peer asyncorch "${CC:-cc}" -std=gnu99 -O2 -DNDEBUG "$here/asyncorch.c" -o "$out/asyncorch.bin"
if has go; then peer go build_go; else echo "bench-peers: without go (no go)"; fi
if has cargo; then peer tokio build_tokio; else echo "bench-peers: without tokio (no cargo)"; fi
if has node; then peer node build_node; else echo "bench-peers: without node (no node)"; fi
peer st "${CC:-cc}" -O2 "$here/peer_st.c" -o "$out/st.bin" -lst
peer boost "${CXX:-c++}" -O2 "$here/peer_boost.cc" -o "$out/boost.bin" -lboost_context

for run in $(seq "$runs"); do
    for name in $peers; do
        "$out/$name.bin" >>"$out/$name.lines" || echo "bench-peers: $name failed" >&2
    done
done

echo "nanoseconds, medians of $runs runs in turns," \
    "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)," \
    "load $(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null || echo '?')"
printf '%-10s' ''
for name in $peers; do printf '%11s' "$name"; done
echo
for what in switch spawn all oneshot; do
    printf '%-10s' "$what"
    for name in $peers; do
        sed -n "s/^$what //p" "$out/$name.lines" | sort -n |
            awk '{ v[NR] = $1 }
                 END { printf "%11s", NR ? sprintf("%.1f", v[int((NR + 1) / 2)]) : "-" }'
    done
    echo
done
