#!/bin/sh
# The version is the same in the banner, ORCH_VERSION, the pkg-config file and the README's changes.
set -eu

version=$(sed -n 's/^#define ORCH_VERSION "\(.*\)"/\1/p' asyncorch.h)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bad=0

says() { # where, what it says
    [ "$2" = "$version" ] || { echo "$1 says \"$2\", ORCH_VERSION \"$version\""; bad=1; }
}
says 'the banner' "$(sed -n '1s/.* v\([0-9.]*[0-9]\) .*/\1/p' asyncorch.h)"
make -s install DESTDIR="$work" PREFIX=/usr >/dev/null
says asyncorch.pc "$(sed -n 's/^Version: //p' "$work/usr/lib/pkgconfig/asyncorch.pc")"
cmp asyncorch.h "$work/usr/include/asyncorch.h" || bad=1
if command -v pkg-config >/dev/null; then
    says pkg-config "$(PKG_CONFIG_PATH=$work/usr/lib/pkgconfig pkg-config --modversion asyncorch)"
fi
make -s uninstall DESTDIR="$work" PREFIX=/usr >/dev/null
[ -z "$(find "$work" -type f)" ] || { echo 'make uninstall leaves something'; bad=1; }
says "README.md's latest change" "$(awk '
    /^#/ { changes = tolower($0) ~ /change/ ? 1 : changes && /[0-9]\.[0-9]/ }
    changes && match($0, /[0-9]+\.[0-9]+\.[0-9]+/) { print substr($0, RSTART, RLENGTH); exit }
    ' README.md)"
echo "$version"
exit $bad
