#!/bin/sh
# How the files look: 100 columns, no trailing blanks or tabs, no #if inside a function of the
# header, nothing unexpected at the top level, and how much of the header is comment.
set -eu

bad=0
# Without git, what is there.
all=$(git ls-files -co --exclude-standard 2>/dev/null ||
    find . -type f ! -path './.git/*' ! -path './.build/*' | sed 's|^\./||')
files=$(echo "$all" | grep -E '\.([ch]|cc|sh|awk|md)$|^(Makefile|\.ci/run)$')

# Columns are characters: bytes that continue one in UTF-8 are taken out. Tables in Markdown may be
# wide.
for file in $files; do
    [ -e "$file" ] || continue
    tr -d '\200-\277' <"$file" | awk -v file="$file" '
        length($0) > 100 && file !~ /\.md$/ {
            print file ":" NR ": " length($0) " columns"
            bad = 1
        }
        /[ \t]$/ { print file ":" NR ": blank at the end"; bad = 1 }
        /\t/ && file !~ /Makefile/ { print file ":" NR ": tab"; bad = 1 }
        END { exit bad }' || bad=1
done

awk -f tests/check/clean.awk asyncorch.h | awk -f tests/check/functions.awk |
    awk 'FNR == NR { if ($1 == "F") for (i = $3; i <= $4; i++) inside[i] = $2; next }
        /^[ \t]*#/ && FNR in inside {
            print "asyncorch.h:" FNR ": " $0 " inside " inside[FNR]
            bad = 1
        }
        END { exit bad }' - asyncorch.h || bad=1

echo "$all" | cut -d/ -f1 | sort -u |
    grep -vxE 'asyncorch\.h|examples|tests|bench|Makefile|README\.md|UNLICENSE' |
    grep -vxE '\.(ci|github|gitignore|clang-format|clang-tidy|editorconfig)' |
    sed 's/^/unexpected at the top level: /' | grep . && bad=1

awk '
    /^\/\/ >>/ { part = $2 }
    part == ">>manual" || /^[ \t]*$/ { next }
    /^[ \t]*(\/\/|\/\*|\*)/ { comment++; next }
    { code++ }
    END {
        printf "asyncorch.h: %d lines, %d of code, %.2f comment lines per code line\n", NR, code,
            comment / code
    }
    ' asyncorch.h
exit $bad
