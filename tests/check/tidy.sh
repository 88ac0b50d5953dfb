#!/bin/sh
# clang-tidy on the header with its implementation; the checks and why some are off: .clang-tidy.
set -eu

command -v clang-tidy >/dev/null || { echo 'no clang-tidy'; exit 77; }
log=$(mktemp)
trap 'rm -f "$log"' EXIT
clang-tidy --quiet --warnings-as-errors='*' --header-filter='asyncorch\.h$' tests/compile_c.c \
    tests/two_units_b.c -- -std=gnu99 >"$log" 2>&1 || {
    grep -vE '^[0-9]+ warnings? (generated|treated)|^Suppressed|^Use -header-filter' "$log"
    exit 1
}
clang-tidy --version | sed -n 's/.*version \([0-9.]*\).*/clang-tidy \1/p'
