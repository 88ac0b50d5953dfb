#!/bin/sh
# Runs test programs side by side and sums them up.
#
#     printf 'label command...\n' | sh tests/run.sh folder      (JOBS at a time, default 2)
#
# Each command ends with a line "N passed, N failed" (", N skipped" when any) of its own. This
# prints one line per command, its output only when something failed or was skipped, and the sum as
# the last line. A command that ends in any other way counts as one failed. Ends with 1 when
# anything failed.
set -u

closing='^[0-9][0-9]* passed, [0-9][0-9]* failed\(, [0-9][0-9]* skipped\)\{0,1\}$'

one() { # folder, line number
    line=$(sed -n "$2p" "$1/list")
    label=${line%% *}
    log=$1/$(printf '%s' "$label" | tr '/' '-').log
    start=$(date +%s)
    LD_BIND_NOW=1 sh -c "${line#* }" >"$log" 2>&1 </dev/null # for all forked cases together
    status=$?
    sum=$(tail -n 1 "$log" | grep "$closing")
    case $status,$sum in
    [!0]*,*' 0 failed'* | *,) sum="0 passed, 1 failed"
        echo "$label: ended with status $status" >>"$log"
        echo "$sum" >>"$log" ;;
    esac
    echo "$sum" >"$1/$2.sum"
    {
        printf '%-26s %s, %s s\n' "$label" "$sum" "$(($(date +%s) - start))"
        case $sum in
        *' 0 failed') ;;
        *) sed '$d' "$log" | head -n 60 | cut -c 1-200 | sed 's/^/    /'
           [ "$(wc -l <"$log")" -le 61 ] || echo "    ... all of it: $log" ;;
        esac
    } >"$1/$2.show"
    cat "$1/$2.show" # in one piece, as others print too
}

if [ "$1" = --one ]; then
    one "$2" "$3"
    exit 0
fi

mkdir -p "$1"
rm -f "$1"/*.sum "$1"/*.show "$1"/*.log
grep '[^[:space:]]' >"$1/list"
awk '{print NR}' "$1/list" | xargs -P "${JOBS:-2}" -n 1 sh "$0" --one "$1"
cat "$1"/*.sum | awk '
    { passed += $1; failed += $3; skipped += $5 }
    END {
        printf "%d passed, %d failed", passed, failed
        if (skipped) printf ", %d skipped", skipped
        print ""
        exit failed > 0
    }'
