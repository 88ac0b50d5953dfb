#!/bin/sh
# cppcheck on the header with its implementation, as gcc on x86-64 Linux sees it.
# ctunullpointer is off: it follows NULL into calls that another function's error code rules out.
# returnDanglingLifetime too: it takes what a function returns for the variable it was given.
set -eu

command -v cppcheck >/dev/null || { echo 'no cppcheck'; exit 77; }
cppcheck --quiet --language=c --std=c99 --enable=warning,performance,portability \
    --suppress=missingIncludeSystem --suppress=ctunullpointer \
    --suppress=returnDanglingLifetime --error-exitcode=1 --inconclusive \
    -DASYNCORCH_IMPLEMENTATION -D__GNUC__=12 -D__linux__=1 -D__x86_64__=1 -D__ELF__=1 -D__LP64__=1 \
    -D__SSE2__=1 -U__cplusplus -UNDEBUG asyncorch.h
cppcheck --version
