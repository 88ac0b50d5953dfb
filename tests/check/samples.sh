#!/bin/sh
# Every code block of README.md and the manual that has a main is compiled in an empty folder with
# the header beside it, and run. Its output is compared with the ```text block that follows, if one
# does. Manual: the lines `//     ...` in >>manual.
set -eu

root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/try"
cp asyncorch.h "$work/try"
[ -e README.md ] || { echo 'there is no README.md'; exit 1; }

# N.c and, where there is one, N.txt; "where" has the line each came from.
awk -v to="$work/" '
    /^```/ && !fence { fence = 1; kind = substr($0, 4); body = ""; start = FNR; next }
    /^```/ {
        fence = 0
        if (kind ~ /^c *$/ && body ~ /[^a-z_]main *\(/) {
            n++
            printf "%s", body > (to n ".c")
            print n, "README.md:" start >> (to "where")
            open = n
            next
        }
        if (kind ~ /^text/ && open) printf "%s", body > (to open ".txt")
        if (kind !~ /^(sh|console|bash)/) open = 0 # the build line may stand in between
        next
    }
    fence { body = body $0 "\n" }
    /^#/ && !fence { open = 0 }' README.md
awk -v to="$work/" '
    /^\/\/ >>/ { flush(); manual = $2 == ">>manual"; next }
    manual && /^\/\/     / { if (body == "") start = FNR; body = body substr($0, 8) "\n"; next }
    manual && /^\/\/$/ && body != "" { body = body "\n"; next }
    { flush() }
    function flush() {
        if (body ~ /[^a-z_]main *\(/) {
            n++
            printf "%s", body > (to "m" n ".c")
            print "m" n, "asyncorch.h:" start >> (to "where")
        }
        body = ""
    }' asyncorch.h
[ -e "$work/where" ] || { echo 'no block with a main was found'; exit 1; }

bad=0
limit=$(command -v timeout >/dev/null && echo timeout 60) || limit=
total=0
compared=0
while read -r n where; do
    total=$((total + 1))
    cp "$work/$n.c" "$work/try/program.c"
    if ! (cd "$work/try" && ${CC:-cc} -std=gnu99 -Wall -Wextra -Wpedantic -Werror \
        -I"$root/examples" program.c -o program) >"$work/log" 2>&1; then
        echo "$where: does not compile"
        cat "$work/log"
        bad=1
    elif ! (cd "$work/try" && $limit ./program) >"$work/out" 2>&1; then
        echo "$where: does not end with 0"
        cat "$work/out"
        bad=1
    elif [ -e "$work/$n.txt" ]; then
        compared=$((compared + 1))
        # Numbers of ms may differ from run to run.
        sed 's/[0-9][0-9]* ms/N ms/g' "$work/$n.txt" >"$work/want"
        sed 's/[0-9][0-9]* ms/N ms/g' "$work/out" >"$work/got"
        if ! diff "$work/want" "$work/got" >"$work/log"; then
            echo "$where: < what the page shows, > what it prints"
            cat "$work/log"
            bad=1
        fi
    fi
done <"$work/where"
echo "$total programs, the output of $compared compared"
exit $bad
