#!/bin/sh
# No unprefixed name leaves the header: functions and variables of the object are orch_ or orchi_
# (constants ORCHI_), macros ORCH_, ASYNCORCH_ or orch_; ORCHI_ macros are undefined at the end.
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bad=0

# ---- symbols; the compiler's own (.LC0, __func__.1, CSWTCH.2) have a dot
printf '#define ASYNCORCH_IMPLEMENTATION\n#include "asyncorch.h"\n' >"$work/unit.c"
for options in '-O0' '-O2' '-O2 -DORCH_USE_UCONTEXT=1' '-O1 -fsanitize=address'; do
    # shellcheck disable=SC2086
    ${CC:-cc} -std=c99 $options -I. -c "$work/unit.c" -o "$work/unit.o"
    nm "$work/unit.o" | awk -v options="$options" '
        NF != 3 || $2 == "U" || $3 ~ /^orchi?_/ || $3 ~ /^__odr_asan\.orchi?_/ { next }
        $2 ~ /^[a-z]$/ && ($3 ~ /^ORCHI_|\./ || (options ~ /sanitize/ && $3 ~ /^_/)) { next }
        { print "symbol " $3 " (" options ")"; bad = 1 }
        END { exit bad }' || bad=1
done
symbols=$(nm -g --defined-only "$work/unit.o" | wc -l)

# ---- macros: what the header adds to those of the system headers it includes
macros() { # name of the list, text of the unit
    printf '%b' "$2" >"$work/macros.c"
    ${CC:-cc} -std=gnu99 -I. -dM -E "$work/macros.c" |
        awk '{ sub(/\(.*/, "", $2); print $2 }' | sort >"$work/$1"
}
system=$(sed -n 's/^# *\(include <[a-z_/0-9]*\.h>\).*/#\1/p' asyncorch.h | sort -u)
for header in $system; do
    case $header in
    '<'*) # leave out those of other systems
        echo "#include $header" >"$work/one.c"
        ! ${CC:-cc} -E "$work/one.c" >/dev/null 2>&1 || echo "#include $header" ;;
    esac
done >"$work/includes"
{ printf '#define _GNU_SOURCE\n'; cat "$work/includes"; } >"$work/before.h"
public_headers=$(printf '#include <%s.h>\\n' errno stdbool stddef stdint)
macros public_before "$public_headers"
macros public_after '#include "asyncorch.h"\n'
macros all_before "$(cat "$work/before.h")\n"
macros all_after '#define ASYNCORCH_IMPLEMENTATION\n#include "asyncorch.h"\n'
for part in public all; do
    comm -13 "$work/${part}_before" "$work/${part}_after" >"$work/added"
    grep -vE '^(ORCH|ASYNCORCH|orch)_' "$work/added" | sed "s/^/macro ($part): /" | grep . && bad=1
    grep -E '^ORCHI_' "$work/${part}_after" | sed 's/^/left defined: /' | grep . && bad=1
done

# Each internal macro is undefined at the end, also those of other systems.
sed -n 's/^ *# *define \(ORCHI_[A-Z0-9_a-z]*\).*/\1/p' asyncorch.h | sort -u >"$work/defined"
sed -n 's/^ *# *undef \(ORCHI_[A-Z0-9_a-z]*\).*/\1/p' asyncorch.h | sort -u >"$work/undefined"
comm -23 "$work/defined" "$work/undefined" | sed 's/^/never undefined: /' | grep . && bad=1
comm -13 "$work/defined" "$work/undefined" | sed 's/^/never defined: /' | grep . && bad=1

echo "$symbols global symbols, $(wc -l <"$work/added") macros"
exit $bad
