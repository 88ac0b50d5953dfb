#!/bin/sh
# Runs every other script of this folder, two at a time: "ok", "FAILED" or "skipped", its name and
# its last line for each, all its output when it failed. The last line is "N passed, N failed".
# A check ends with 0 when all is well, with 77 when it lacks a tool, otherwise with 1.
#
#     sh tests/check/run.sh [name...]
set -u
cd "$(dirname "$0")/../.." || exit 1

if [ "${1-}" = --one ]; then
    log=$2/$3.log
    sh "tests/check/$3.sh" >"$log" 2>&1 </dev/null
    case $? in
    0) printf 'ok       %-12s %s\n' "$3" "$(tail -n 1 "$log")" ;;
    77) printf 'skipped  %-12s %s\n' "$3" "$(tail -n 1 "$log")" ;;
    *) printf 'FAILED   %-12s\n' "$3"
       head -n 100 "$log" | cut -c 1-300 | sed 's/^/    /' ;;
    esac >"$2/$3.verdict"
    cat "$2/$3.verdict"
    exit 0
fi

logs=.build/check
mkdir -p $logs
rm -f $logs/*.log $logs/*.verdict
for name in ${*:-$(cd tests/check && ls -r ./*.sh)}; do # backwards: warnings takes longest
    name=$(basename "$name" .sh)
    [ "$name" = run ] || echo "$name"
done | xargs -P "${JOBS:-2}" -n 1 sh tests/check/run.sh --one $logs
cat $logs/*.verdict | awk '
    /^ok /      { passed++ }
    /^FAILED /  { failed++ }
    /^skipped / { skipped++ }
    END {
        printf "%d passed, %d failed", passed, failed
        if (skipped) printf ", %d skipped", skipped
        print ""
        exit failed > 0
    }'
