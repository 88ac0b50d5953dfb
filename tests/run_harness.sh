#!/bin/sh
# Checks the harness from outside: what does `program` (tests/test_harness.c) say of cases that fail
# on purpose, is the closing line right, does the sweep find what is seeded.
#
#     sh tests/run_harness.sh program [no-sanitizers] [no-sweep]
#
# Without sanitizers nobody sees the leak and the overrun; without ld --wrap there is no sweep.
set -u

program=$1
sanitizers=yes sweep=yes
for option; do
    [ "$option" != no-sanitizers ] || sanitizers=no
    [ "$option" != no-sweep ] || sweep=no
done
passed=0 failed=0 skipped=0
out=$(mktemp)
trap 'rm -f "$out"' EXIT

verdict() { # what, 0 when it held
    if [ "$2" = 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $1"
    fi
}

says() { # text: a whole line of the last output, but for what follows
    grep -q "^$1" "$out"
    verdict "says \"$1\"" $?
}

skip() {
    skipped=$((skipped + 1))
    echo "skipped $1"
}

"$program" >"$out" 2>/dev/null
[ $? = 1 ]
verdict "the exit code of a run with failures is 1" $?
says 'FAILED bad_check: exit code 10$'
says 'tests/test_harness.c:[0-9]*: 1 + 1 == 3$'
says 'tests/test_harness.c:[0-9]*: 1 + 1 is 2, not 4$'
says 'tests/test_harness.c:[0-9]*: "two" is "two", not "NULL"$'
says 'FAILED bad_hang: killed by signal 14 (too slow)$'
says 'FAILED bad_child_left: killed by signal'
says 'left running: [1-9][0-9]*$'
says 'FAILED bad_flood: killed by signal 25$'
says 'FAILED bad_crash: '
says 'FAILED bad_exit: exit code 0$'
says 'FAILED bad_dies_otherwise: killed by signal'
says 'FAILED bad_lives_on: exit code 0$'
says 'FAILED bad_dies_of_a_check: exit code 10$'
says 'skipped skipped_case$'
if [ $sanitizers = yes ]; then
    says 'FAILED bad_leak: exit code 1$'
    says 'FAILED bad_overrun: exit code 1$'
    [ "$(tail -n 1 "$out")" = '7 passed, 11 failed, 1 skipped' ]
else
    skip 'bad_leak and bad_overrun (no sanitizers)'
    [ "$(tail -n 1 "$out")" = '9 passed, 9 failed, 1 skipped' ]
fi
verdict "the closing line: $(tail -n 1 "$out")" $?
! grep -q 'FAILED good' "$out"
verdict 'good cases pass' $?
left=$(sed -n 's/^left running: //p' "$out")
! kill -0 "$left" 2>/dev/null || grep -q ') Z ' "/proc/$left/stat" # dead, and not buried by init
verdict 'nothing is left running' $?

"$program" good >"$out" 2>&1
verdict 'one case by name' $?
"$program" bad_check >"$out" 2>&1
[ $? = 10 ]
verdict 'one bad case by name' $?
"$program" no_such_case >"$out" 2>&1
[ $? = 1 ]
verdict 'an unknown name is an error' $?
"$program" --list >"$out"
[ "$(wc -l <"$out")" -eq 19 ]
verdict 'the list has all cases' $?

if [ $sweep = yes ]; then
    "$program" --sweep good_sweep >"$out"
    verdict 'the sweep passes a good case' $?
    [ "$(tail -n 1 "$out")" = '1 passed, 0 failed' ]
    verdict 'and counts it' $?
    [ $sanitizers = no ] || "$program" --sweep sweep_leak >"$out"
    [ $sanitizers = no ] || says 'FAILED sweep_leak: TEST_FAIL_AT=2: exit code 1$'
    "$program" --sweep sweep_crash_late >"$out"
    says 'FAILED sweep_crash_late: TEST_FAIL_AT=21: '
    TEST_SWEEP=5 "$program" --sweep sweep_crash_late >"$out"
    says 'FAILED sweep_crash_late: TEST_FAIL_AT=[0-9]*+: ' # 21 is no point of a spread of 6
    "$program" --sweep sweep_hang_persistent >"$out"
    says 'FAILED sweep_hang_persistent: TEST_FAIL_AT=1+: killed by signal 14 (too slow)$'
    TEST_FAIL_AT=2 "$program" good_sweep >"$out" 2>&1
    [ $? = 10 ]
    verdict 'TEST_FAIL_AT refuses in a single run' $?
else
    skip 'the sweep (no ld --wrap)'
fi

if [ $skipped = 0 ]; then
    echo "$passed passed, $failed failed"
else
    echo "$passed passed, $failed failed, $skipped skipped"
fi
[ $failed = 0 ]
