#!/bin/sh
# The compile matrix: compile_c.c, compile_cxx.cc and two_units_*.c with every compiler, standard
# and option. Each is built with -Werror, run, and has to print "all as expected". The tests with
# threads are run under the thread sanitizer.
#
#     sh tests/run_matrix.sh [group...]   c cxx options-gcc options-clang threads cross units
#
# A compiler, option or emulator that is not there (an empty program cannot be built or run with it)
# is skipped by name. OUT is the folder for the programs, default .build/matrix.
#
# Most of the time goes into optimising 10,000 lines, so as a rule standards are tried without
# optimisation, options that do not meddle with each other together, and with one compiler what
# depends on ours only. FULL=1 (make torture) tries each by itself, with both.
set -u

out=${OUT:-.build/matrix}
here=$(dirname "$0")
full=${FULL:-0}
warnings='-Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror'
export UBSAN_OPTIONS=halt_on_error=1 # gcc and clang only print what is undefined, and go on
passed=0 failed=0 skipped=0
mkdir -p "$out"
limit=$(command -v timeout >/dev/null 2>&1 && echo 'timeout 120')

fail() { # name, what went wrong
    failed=$((failed + 1))
    echo "FAILED $1: $2"
    cat "$log"
}

# Can this compiler build and run an empty program with these options? Remembered per group.
usable() { # runner, compiler, flags, language
    key=$(printf '%s' "$2 $3 $1" | cksum | tr ' ' '-')
    if [ ! -e "$out/usable-$$-$key" ]; then
        echo 'int main(void) { return 0; }' >"$out/empty-$$.$4"
        # shellcheck disable=SC2086
        if $2 $3 "$out/empty-$$.$4" -o "$out/empty-$$" && $limit $1 "$out/empty-$$"; then
            echo yes
        else
            echo no
        fi >"$out/usable-$$-$key" 2>/dev/null
        rm -f "$out/empty-$$" "$out/empty-$$.$4"
    fi 2>/dev/null
    [ "$(cat "$out/usable-$$-$key")" = yes ]
}

run() { # name, runner, program
    # shellcheck disable=SC2086
    $limit $2 "$3" >"$log" 2>&1
    status=$?
    if [ $status != 0 ]; then
        fail "$1" "ended with $status"
    else
        case "$(tail -n 1 "$log")" in
        'all as expected' | *' passed, 0 failed'*) passed=$((passed + 1)) ;;
        *) fail "$1" 'printed something else' ;;
        esac
    fi
}

# One case: a program of one source file.
try() { # compiler, flags, source, [runner]
    name="$3: $1 $2${4:+, $4}"
    program=$out/$(printf '%s' "$name" | tr -cs 'a-zA-Z0-9_.\n' '-')
    log=$program.log
    if ! usable "${4-}" "$1" "$2" "${3##*.}"; then
        skipped=$((skipped + 1))
        echo "skipped $name"
        return
    fi
    # shellcheck disable=SC2086
    if $1 $2 $warnings "$here/$3" -o "$program" >"$log" 2>&1; then
        run "$name" "${4-}" "$program"
    else
        fail "$name" 'does not build'
    fi
    rm -f "$program"
}

group_c() {
    for cc in gcc clang; do
        level=-O0
        [ "$full" = 0 ] || level=-O2
        for std in c99 c11 c2x gnu99; do try $cc "-std=$std $level" compile_c.c; done
        # Other headers included first: too late for asyncorch.h to ask for what it needs of them.
        try $cc "-std=c99 $level -D_GNU_SOURCE -DHEADERS_FIRST" compile_c.c
        try $cc "-std=gnu11 $level -DHEADERS_FIRST" compile_c.c
    done
}

group_cxx() {
    for std in 11 17 20; do
        try g++ "-std=c++$std $([ $std = 17 ] && echo -O2 || echo -O0)" compile_cxx.cc
        try clang++ "-std=c++$std -O0" compile_cxx.cc
    done
    [ "$full" = 1 ] || return 0
    try clang++ '-std=c++17 -O2' compile_cxx.cc
    for cxx in g++ clang++; do
        for std in 11 20; do try $cxx "-std=c++$std -O2" compile_cxx.cc; done
        try $cxx '-std=c++17 -O1 -g -fsanitize=address,undefined' compile_cxx.cc
        try $cxx '-std=c++17 -O2 -DORCH_USE_UCONTEXT=1' compile_cxx.cc
    done
    try g++ '-std=c++17 -O3 -flto' compile_cxx.cc
}

# clang's bytecode needs a linker that can read it.
lto() { # compiler
    if [ "$1" = clang ]; then echo '-flto -fuse-ld=lld'; else echo '-flto'; fi
}

group_options() { # compiler; -O0 is in the group c
    cc=$1
    hardened='-fstack-clash-protection -fstack-protector-strong -fPIC -fvisibility=hidden'
    for options in "-O3 $(lto "$cc")" '-O1 -DORCH_USE_UCONTEXT=1' \
        "-O2 -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 -fcf-protection=full $hardened"; do
        try "$cc" "-std=c99 $options" compile_c.c
    done
    if [ "$cc" = gcc ] || [ "$full" = 1 ]; then try "$cc" '-std=c99 -O2 -DNDEBUG' compile_c.c; fi
    [ "$full" = 1 ] || return 0
    for options in '-O1' '-O3' '-Os' '-O2' '-O3 -DORCH_USE_UCONTEXT=1' \
        '-O0 -g -fsanitize=address,undefined' \
        '-O2 -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2' '-O2 -fcf-protection=full' \
        '-O2 -fstack-clash-protection' '-O2 -fstack-protector-strong' \
        '-O2 -fPIC -fvisibility=hidden' '-O1 -g -fsanitize=address,undefined' \
        '-O1 -g -fsanitize=address -DORCH_USE_UCONTEXT=1'; do
        try "$cc" "-std=c99 $options" compile_c.c
    done
}

group_threads() {
    try_threads clang '-std=c99 -O1 -g1 -fsanitize=thread' compile_c.c
    for test in test_thread.c test_file.c; do
        try_threads gcc \
            '-std=gnu99 -O1 -g1 -fsanitize=thread -pthread -DASYNCORCH_IMPLEMENTATION=' $test
        [ "$full" = 0 ] || try_threads clang \
            '-std=gnu99 -O1 -g1 -fsanitize=thread -pthread -DASYNCORCH_IMPLEMENTATION=' $test
    done
    [ "$full" = 1 ] || return 0
    for options in '-O0' '-O1' '-O2' '-O1 -DORCH_USE_UCONTEXT=1'; do
        for cc in gcc clang; do
            try_threads $cc "-std=c99 -g -fsanitize=thread $options" compile_c.c
        done
    done
}

# Thread sanitizer maps fixed addresses; kernels that randomise more than it expects need -R. It
# counts calls and returns per fiber, and crashes when a switch leaves them uneven.
try_threads() { # compiler, flags, source
    if usable '' "$1" "$2" c; then
        try "$1" "$2" "$3" 'env TEST_TIME=4'
    else
        try "$1" "$2" "$3" "setarch $(uname -m) -R env TEST_TIME=4"
    fi
}

group_cross() {
    try aarch64-linux-gnu-gcc '-std=c99 -O2 -mbranch-protection=standard -static' compile_c.c \
        qemu-aarch64-static
    try riscv64-linux-gnu-gcc '-std=c99 -O1 -static' compile_c.c qemu-riscv64-static
    try musl-gcc '-std=c99 -O1' compile_c.c
    try i686-linux-gnu-gcc '-std=c99 -O1 -static' compile_c.c qemu-i386-static # size_t of 32 bits
    [ "$full" = 1 ] || return 0
    try s390x-linux-gnu-gcc '-std=c99 -O1 -static' compile_c.c qemu-s390x-static # big-endian
    for level in -O0 -O2 -O3; do
        try aarch64-linux-gnu-gcc "-std=c99 $level -static" compile_c.c qemu-aarch64-static
        try riscv64-linux-gnu-gcc "-std=c99 $level -static" compile_c.c qemu-riscv64-static
    done
    try musl-gcc '-std=c99 -O3 -static' compile_c.c
}

# Two units: the first implements.
units() { # compiler of a, flags of a, compiler of b, flags of b, flags to link
    name="two units: $1 $2 + $3 $4"
    program=$out/$(printf '%s' "$name" | tr -cs 'a-zA-Z0-9_.\n' '-')
    log=$program.log
    if ! usable '' "$1" "$2 $5" c || ! usable '' "$3" "$4 $5" c; then
        skipped=$((skipped + 1))
        echo "skipped $name"
        return
    fi
    # shellcheck disable=SC2086
    if { $1 $2 $warnings -c "$here/two_units_a.c" -o "$program-a.o" &&
        $3 $4 $warnings -c "$here/two_units_b.c" -o "$program-b.o" &&
        case "$1 $3" in *++*) g++ $5 "$program-a.o" "$program-b.o" -o "$program" ;;
        *) $1 $5 "$program-a.o" "$program-b.o" -o "$program" ;; esac; } >"$log" 2>&1; then
        run "$name" '' "$program"
    else
        fail "$name" 'does not build'
    fi
    rm -f "$program" "$program-a.o" "$program-b.o"
}

group_units() {
    units gcc '-std=c99 -O0' gcc '-std=c99 -O2' ''
    units clang '-std=c99 -O0' gcc '-std=c11 -O2 -DNDEBUG' ''
    units gcc '-std=c99 -O0' g++ '-x c++ -std=c++11 -O2' ''
    units g++ '-x c++ -std=c++17 -O0' gcc '-std=c2x -O2' ''
    units clang++ '-x c++ -std=c++20 -O0' clang '-std=c99 -O2' ''
}

for group in ${*:-c cxx options-gcc options-clang threads cross units}; do
    case $group in
    options-*) group_options "${group#options-}" ;;
    *) "group_$group" ;;
    esac
done
rm -f "$out"/usable-$$-*
printf '%d passed, %d failed' $passed $failed
if [ $skipped != 0 ]; then printf ', %d skipped\n' $skipped; else echo; fi
[ $failed = 0 ]
