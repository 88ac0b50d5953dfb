#!/bin/sh
# clang-format has nothing to change (make format does it). Versions differ; .clang-format is for
# 14.
set -eu

command -v clang-format >/dev/null || { echo 'no clang-format'; exit 77; }
clang-format --version | grep -q ' version 14\.' || { echo 'not clang-format 14'; exit 77; }
bad=0
total=0
for file in asyncorch.h tests/*.[ch] tests/*.cc examples/*.[ch] bench/*.[ch] bench/*/*.[ch]; do
    total=$((total + 1))
    clang-format "$file" | diff "$file" - >/tmp/format.$$ || {
        echo "$file: $(grep -c '^<' /tmp/format.$$) lines"
        [ "$file" != asyncorch.h ] || cat /tmp/format.$$
        bad=1
    }
done
rm -f /tmp/format.$$
echo "$total files"
exit $bad
