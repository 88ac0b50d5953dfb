#!/bin/sh
# Every public function is named in README.md, and every function named there is one.
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
awk -f tests/check/clean.awk asyncorch.h | awk -f tests/check/functions.awk |
    awk '$1 == "P" && $5 == "api" { print $2 }' | sort -u >"$work/functions"
grep -oE 'orch_[a-z0-9_]*[a-z0-9]' README.md | sort -u >"$work/named"
grep -oE 'orch_[a-z0-9_]*[a-z0-9]' asyncorch.h examples/orch_curl.h | sed 's/.*://' |
    sort -u >"$work/known"
missing=$(comm -23 "$work/functions" "$work/named")
unknown=$(comm -23 "$work/named" "$work/known")
# shellcheck disable=SC2086
[ -z "$missing" ] || echo "not in README.md:" $missing
# shellcheck disable=SC2086
[ -z "$unknown" ] || echo "in README.md, and not in the header:" $unknown
echo "$(wc -l <"$work/functions") functions, $(wc -l <"$work/named") names"
[ -z "$missing$unknown" ]
