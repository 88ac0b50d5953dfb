#!/bin/sh
# Layers only call what stands above them in the file, and functions are short.
set -eu

header=asyncorch.h
allow=tests/check/sizes.allow # lines: name, reason
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
awk -f tests/check/clean.awk $header >"$work/clean"
awk -f tests/check/functions.awk "$work/clean" >"$work/functions"
bad=0

# A static forward declaration is recursion or a layer violation: only in the block >>forward.
awk '
    NR == FNR { if (/^\/\/ >>forward/) block = FNR; if (block && FNR > block + 15) block = 0
                if (block) allowed[FNR] = 1; next }
    $1 == "P" && $6 == "static" && !($3 in allowed) {
        print "asyncorch.h:" $3 ": " $2 " is declared before its definition, outside >>forward"
        bad = 1
    }
    END { exit bad }' $header "$work/functions" || bad=1

# Bodies mention no function of a later section. The C++ overloads in >>api are exempt: their bodies
# are the public functions.
awk -F'\t' '
    FILENAME ~ /functions$/ {
        split($0, f, " ")
        if (f[1] == "F" && f[5] != "api") {
            at[f[2]] = f[3]
            home[f[2]] = f[5]
            for (i = f[3]; i <= f[4]; i++) inside[i] = f[2]
        }
        next
    }
    FNR == 1 { sections = 0 }
    !($1 in order) { order[$1] = ++sections }
    { text[FNR] = $2; lines = FNR }
    END {
        for (i = 1; i <= lines; i++) {
            if (!(i in inside)) continue
            rest = text[i]
            while (match(rest, /orchi?_[a-z0-9_]+/)) {
                name = substr(rest, RSTART, RLENGTH)
                rest = substr(rest, RSTART + RLENGTH)
                if (!(name in home) || order[home[name]] <= order[home[inside[i]]]) continue
                printf "asyncorch.h:%d: %s (%s) uses %s (%s)\n", i, inside[i],
                    home[inside[i]], name, home[name]
                bad = 1
            }
        }
        exit bad
    }' "$work/functions" "$work/clean" || bad=1

awk -v allow=$allow '
    BEGIN {
        while ((getline line < allow) > 0)
            if (split(line, f, " ") > 1 && line !~ /^#/) reason[f[1]] = 1
    }
    $1 == "F" && $5 != "api" {
        size = $4 - $3 + 1
        count[size]++
        all++
        if (size > most) { most = size; largest = $2 }
        if (size <= 60) next
        if ($2 in reason) { used[$2] = 1; next }
        print "asyncorch.h:" $3 ": " $2 " has " size " lines (60, or a reason in " allow ")"
        bad = 1
    }
    END {
        for (name in reason) if (!(name in used)) {
            print allow ": " name " is no function of more than 60 lines"
            bad = 1
        }
        for (size = 1; size <= most; size++) {
            seen += count[size]
            if (!median && seen * 2 >= all) median = size
            if (!ninety && seen * 10 >= all * 9) ninety = size
        }
        if (all == 0) { print "no functions: there is no implementation yet"; exit 1 }
        if (median > 10) { print "the median is above 10 lines"; bad = 1 }
        if (ninety > 30) { print "the 90th percentile is above 30 lines"; bad = 1 }
        printf "%d functions, lines: median %d, 90th percentile %d, largest %d (%s)\n",
            all, median, ninety, most, largest
        exit bad
    }' "$work/functions" || bad=1
exit $bad
