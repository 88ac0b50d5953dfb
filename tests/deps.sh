#!/bin/sh
# Installs what the examples, tests and checks can use: the headers of libcurl, GLib and libuv, a
# second compiler, cross compilers with an emulator, the analysers. asyncorch.h itself needs none.
# As root or with sudo that asks for no password; otherwise prints the one line to run.
set -eu

case $(uname -s) in Darwin) system=brew ;; *) system= ;; esac
for manager in apt-get dnf pacman apk; do
    [ -n "$system" ] || ! command -v $manager >/dev/null 2>&1 || system=$manager
done

may=yes as= # may install; what goes before the command
if [ "$system" != brew ] && [ "$(id -u)" != 0 ]; then
    as=sudo
    command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null || may=no
fi

update=
case $system in
apt-get) # Debian, Ubuntu
    packages='gcc g++ libc6-dev make clang lld libclang-rt-dev pkg-config libcurl4-openssl-dev
        libglib2.0-dev libuv1-dev clang-format clang-tidy cppcheck valgrind gcovr musl-tools
        qemu-user-static curl wrk apache2-utils netcat-openbsd strace libev-dev libevent-dev
        gcc-aarch64-linux-gnu libc6-dev-arm64-cross gcc-riscv64-linux-gnu libc6-dev-riscv64-cross
        gcc-i686-linux-gnu libc6-dev-i386-cross gcc-s390x-linux-gnu libc6-dev-s390x-cross'
    known=
    if ! apt-cache show gcc >/dev/null 2>&1; then # no package lists yet, as in a fresh container
        update='apt-get update'
        [ $may = no ] || $as $update
    fi
    for package in $packages; do # releases differ: leave out what this one does not have
        if [ "$update/$may" = 'apt-get update/no' ] ||
            apt-cache show "$package" >/dev/null 2>&1; then
            known="$known $package"
        else
            echo "not in this release: $package" >&2
        fi
    done
    install="env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends$known" ;;
dnf) # Fedora: its cross compilers have no C library
    install='dnf install -y gcc gcc-c++ make clang lld compiler-rt clang-tools-extra
        pkgconf-pkg-config libcurl-devel glib2-devel libuv-devel libasan libubsan libtsan cppcheck
        valgrind gcovr musl-gcc' ;;
pacman) # Arch
    install='pacman -S --needed --noconfirm gcc make clang lld compiler-rt pkgconf curl glib2 libuv
        cppcheck valgrind musl qemu-user-static aarch64-linux-gnu-gcc riscv64-linux-gnu-gcc' ;;
apk) # Alpine: its gcc comes without sanitizers
    install='apk add build-base linux-headers clang lld compiler-rt clang-extra-tools pkgconf
        curl-dev glib-dev libuv-dev cppcheck valgrind gcovr' ;;
brew) # macOS, where Xcode's tools are the compiler
    install='brew install pkgconf curl glib libuv clang-format cppcheck gcovr' ;;
*)
    echo 'no known package manager; see tests/deps.sh for what to install' >&2
    exit 1 ;;
esac

# shellcheck disable=SC2086
install=$(echo $install)
[ $may = no ] || exec $as $install
echo 'not root, and sudo asks for a password; run:'
echo "    ${update:+sudo $update && }sudo $install"
