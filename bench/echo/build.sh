#!/bin/sh
# Builds the client and the servers for which this machine has what they need; names the others.
# sh bench/echo/build.sh folder [server...]; the header's and the bare ones without a server named
set -eu

here=$(dirname "$0")
out=$1
shift
mkdir -p "$out"
flags='-std=gnu99 -O2 -DNDEBUG -Wall -Wextra -Wpedantic -Wconversion -Wshadow'

# One in C: name, what it is linked with.
in_c() {
    [ "$out/$1" -nt "$here/$1.c" ] && [ "$out/$1" -nt "$here/../../asyncorch.h" ] && return
    # shellcheck disable=SC2086
    ${CC:-cc} $flags "$here/$1.c" -o "$out/$1" $2
}

in_go() {
    GO111MODULE=off GOCACHE=$(cd "$out" && pwd)/go-cache go build -o "$out/go" "$here/go.go"
}

# From Debian's sources of tokio, which cargo finds in a folder; without it, as cargo is set up.
in_tokio() {
    [ "$out/tokio" -nt "$here/tokio.rs" ] && return
    mkdir -p "$out/tokio-build/src"
    cp "$here/tokio.rs" "$out/tokio-build/src/main.rs"
    printf '[package]\nname = "echo"\nversion = "0.0.0"\nedition = "2021"\n[dependencies]\n%s\n' \
        'tokio = { version = "1", features = ["rt", "net", "io-util"] }' \
        >"$out/tokio-build/Cargo.toml"
    packaged=/usr/share/cargo/registry
    set -- --config 'source.crates-io.replace-with="packaged"' \
        --config "source.packaged.directory=\"$packaged\""
    [ -d $packaged ] || set --
    (cd "$out/tokio-build" && cargo build --release --offline "$@") &&
        cp "$out/tokio-build/target/release/echo" "$out/tokio"
}

build() {
    case $1 in
    libuv) in_c libuv -luv ;;
    libev) in_c libev -lev ;;
    libevent) in_c libevent -levent_core ;;
    go) in_go ;;
    tokio) in_tokio ;;
    *) in_c "$1" '' ;;
    esac
}

for name in client poll epoll asyncorch; do build $name; done
for name; do
    build "$name" >"$out/$name.log" 2>&1 || echo "skipped: $name ($(head -n 1 "$out/$name.log"))"
done
