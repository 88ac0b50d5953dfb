#!/bin/sh
# gcc -fanalyzer on the header with its implementation. At -O1: what it sees at -O2 of inlined code
# makes it report writes to the immortal futures on paths that are not taken. The two parameters
# bound how many states it follows: with its own bounds it takes more than ten minutes.
set -eu

command -v gcc >/dev/null || { echo 'no gcc'; exit 77; }
unit=$(mktemp -d)
trap 'rm -rf "$unit"' EXIT
printf '#define ASYNCORCH_IMPLEMENTATION\n#include "asyncorch.h"\n' >"$unit/unit.c"
for options in '' -DNDEBUG; do
    # shellcheck disable=SC2086
    gcc -std=c99 -O1 -Wall -Wextra -fanalyzer -Werror $options -I. \
        --param analyzer-bb-explosion-factor=1 \
        --param analyzer-max-enodes-per-program-point=2 \
        -c "$unit/unit.c" -o "$unit/unit.o" 2>"$unit/log" || {
        grep 'error:' "$unit/log" # without the paths it describes; this command shows them
        echo "gcc -O1 -fanalyzer $options"
        exit 1
    }
done
gcc --version | head -n 1
