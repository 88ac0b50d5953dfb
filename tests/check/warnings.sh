#!/bin/sh
# Examples, tests and benchmarks compile without a warning with gcc and clang. With gcc optimised,
# as some of its warnings come from what the optimiser sees; clang's do not.
set -eu

bad=0
total=0
log=$(mktemp)
unit=$(mktemp)
trap 'rm -f "$log" "$unit"' EXIT
libraries=
! pkg-config --exists libcurl 2>/dev/null || libraries="-DHAVE_CURL $(pkg-config --cflags libcurl)"
! pkg-config --exists glib-2.0 2>/dev/null ||
    libraries="$libraries -DHAVE_GLIB $(pkg-config --cflags glib-2.0)"
! pkg-config --exists libuv 2>/dev/null ||
    libraries="$libraries -DHAVE_UV $(pkg-config --cflags libuv)"
# What is not of the header's own tests needs its declarations only: the implementation is compiled
# with those tests, and by the matrix; 40 more times is most of the time of this check.
source_of() { # compiler, file
    case $1,$2 in
    *,bench/bench_memory.c) cat "$2" ;; # asks how large what it does not declare is
    gcc,examples/* | gcc,bench/*) sed 's/^#define ASYNCORCH_IMPLEMENTATION$//' "$2" ;;
    *) cat "$2" ;;
    esac
}

for cc in gcc clang; do
    command -v $cc >/dev/null || { echo "no $cc"; [ $bad = 1 ] || bad=77; continue; }
    how='-O1 -S'
    [ $cc = gcc ] || how=-fsyntax-only
    for file in examples/*.c bench/*.c tests/test_*.c; do
        total=$((total + 1))
        source_of $cc "$file" >"$unit"
        # shellcheck disable=SC2086
        (cd "${file%/*}" && $cc -std=gnu99 -D_GNU_SOURCE= $how -Wall -Wextra -Wpedantic \
            -Wconversion -Wshadow -Werror $libraries -x c - -o /dev/null) <"$unit" >"$log" 2>&1 ||
            { echo "$cc $file"; cat "$log"; bad=1; }
    done
done
echo "$total compilations"
exit $bad
