#!/bin/sh
# Every public prototype has a comment directly above it with Returns, Context and Owns; prototypes
# that follow one another without a gap may share one.
set -eu

awk -f tests/check/clean.awk asyncorch.h | awk -f tests/check/functions.awk |
    awk '$1 == "P" && $5 == "api"' >"${TMPDIR:-/tmp}/contracts.$$"
trap 'rm -f "${TMPDIR:-/tmp}/contracts.$$"' EXIT
awk '
    FILENAME != "asyncorch.h" { name[++n] = $2; first[n] = $3; last[n] = $4; next }
    { line[FNR] = $0 }
    END {
        for (i = 1; i <= n; i++) {
            if (i > 1 && first[i] == last[i - 1] + 1) continue
            blocks++
            block = ""
            for (at = first[i] - 1; at > 0 && line[at] !~ /^$/; at--) {
                block = line[at] "\n" block
                if (line[at] ~ /^\/\*/) break
            }
            missing = ""
            if (line[first[i] - 1] !~ /\*\/$/) missing = " a block"
            else {
                if (block !~ /Returns/) missing = missing " Returns"
                if (block !~ /Context/) missing = missing " Context"
                if (block !~ /Owns/) missing = missing " Owns"
            }
            if (missing == "") continue
            print "asyncorch.h:" first[i] ": " name[i] " lacks" missing
            bad = 1
        }
        print n " prototypes, " blocks " contract blocks"
        exit bad || n == 0
    }' "${TMPDIR:-/tmp}/contracts.$$" asyncorch.h
