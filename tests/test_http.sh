#!/bin/sh
# Runs the larger examples against real programs: 20_http_files with curl, nc, wrk and ab, and
# 21_grep beside grep. The programs are those of make examples, in .build/examples or in $1.
# Prints `N passed, N failed` and, where a tool is missing, `, N skipped`.
set -u
no_proxy=127.0.0.1 # curl would ask the proxy of the environment
LC_ALL=C
export no_proxy LC_ALL
cd "$(dirname "$0")/.." || exit 1
programs=${1:-.build/examples}
case $programs in /*) ;; *) programs=$PWD/$programs ;; esac
folder=$(mktemp -d) || exit 1
passed=0 failed=0 skipped=0 server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null; rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM HUP

pass() { passed=$((passed + 1)); }
fail() {
    failed=$((failed + 1))
    echo "FAILED $*"
}
# equal NAME WANT GOT: two texts
equal() {
    if [ "$2" = "$3" ]; then pass; else fail "$1: \"$3\", not \"$2\""; fi
}
# same NAME WANT GOT: two files
same() {
    if cmp -s "$2" "$3"; then pass; else fail "$1: $2 and $3 differ"; fi
}
# has NAME FILE TEXT
has() {
    if grep -q -F -e "$3" "$2"; then pass; else
        fail "$1: no \"$3\""
        cat "$2"
    fi
}
missing() {
    ! command -v "$1" >/dev/null 2>&1 || return 1
    skipped=$((skipped + 1))
    echo "skipped: no $1"
}

# ---- a site, and the server

mkdir -p "$folder/site/sub" "$folder/outside"
echo 'hello world' >"$folder/site/a.txt"
echo secret >"$folder/outside/secret"
echo secret >"$folder/site/.hidden"
echo '<h1>page</h1>' >"$folder/site/sub/index.html"
echo odd >"$folder/site/a b<&>\".txt"
ln -s ../outside "$folder/site/out"
ln -s a.txt "$folder/site/link"
dd if=/dev/urandom of="$folder/site/big" bs=65536 count=77 2>/dev/null
mkfifo "$folder/says"
"$programs/20_http_files" "$folder/site" 0 >"$folder/says" &
server=$!
exec 3<"$folder/says"
read -r line <&3
url=${line##* }
port=${url##*:}
if [ -z "$url" ]; then
    echo "FAILED: 20_http_files does not start"
    echo "0 passed, 1 failed"
    exit 1
fi

# ---- curl

# get NAME STATUS CURL-ARGUMENTS...: the answer's head in $folder/head, its body in $folder/body
get() {
    name=$1 want=$2
    shift 2
    : >"$folder/body"
    got=$(curl -s --max-time 10 --path-as-is -D "$folder/head" -o "$folder/body" \
        -w '%{http_code}' "$@")
    equal "$name" "$want" "$got"
}

if ! missing curl; then
    get "a file" 200 "$url/a.txt"
    same "a file" "$folder/site/a.txt" "$folder/body"
    has "a type" "$folder/head" "Content-Type: text/plain"
    etag=$(tr -d '\r' <"$folder/head" | sed -n 's/^ETag: //p')
    date=$(tr -d '\r' <"$folder/head" | sed -n 's/^Last-Modified: //p')
    get "a large file" 200 "$url/big"
    same "a large file" "$folder/site/big" "$folder/body"
    get "a file in parts" 206 -r 100000-3000000 "$url/big"
    tail -c +100001 "$folder/site/big" | head -c 2900001 >"$folder/part"
    same "a file in parts" "$folder/part" "$folder/body"
    get "the end of a file" 206 -r -7 "$url/big"
    tail -c 7 "$folder/site/big" >"$folder/part"
    same "the end of a file" "$folder/part" "$folder/body"
    get "a part behind the end" 416 -r 99999999- "$url/big"
    has "a part behind the end" "$folder/head" "Content-Range: bytes */5046272"
    head -c 1000000 "$folder/site/big" >"$folder/resumed"
    curl -s --max-time 10 -C - -o "$folder/resumed" "$url/big"
    same "a download that is resumed" "$folder/site/big" "$folder/resumed"
    get "HEAD" 200 -I "$url/big"
    has "HEAD" "$folder/head" "Content-Length: 5046272"
    get "not modified, by tag" 304 -H "If-None-Match: $etag" "$url/a.txt"
    get "not modified, by date" 304 -H "If-Modified-Since: $date" "$url/a.txt"
    get "modified" 200 -H 'If-None-Match: "other"' "$url/a.txt"
    get "a name with all kinds of characters" 200 "$url/a%20b%3C%26%3E%22.txt"
    get "a list" 200 "$url/"
    has "a list" "$folder/body" '<a href="./a%20b%3C%26%3E%22.txt">a b&lt;&amp;&gt;&quot;.txt</a>'
    get "a folder without slash" 301 "$url/sub"
    get "a folder, redirected" 200 -L "$url/sub"
    same "a folder, redirected" "$folder/site/sub/index.html" "$folder/body"
    get "nothing" 404 "$url/nothing"
    for path in /../outside/secret /%2e%2e/outside/secret /sub/../../outside/secret; do
        get "out by $path" 400 "$url$path"
    done
    for path in /..%2foutside/secret /out/secret /out/ /link /.hidden //etc/passwd \
        "/$folder/outside/secret"; do
        get "out by $path" 404 "$url$path"
    done
    for method in POST PUT DELETE OPTIONS BREW; do
        get "$method" 405 -X $method "$url/a.txt"
        has "$method" "$folder/head" "Allow: GET, HEAD"
    done
    get "a body" 405 --data hello "$url/a.txt"
    get "GET with a body" 413 -X GET --data hello "$url/a.txt"
    get "a large body" 405 --data-binary "@$folder/site/big" -H Expect: "$url/a.txt"
    long=$(dd if=/dev/zero bs=5000 count=1 2>/dev/null | tr '\0' a)
    get "a long path" 414 "$url/$long"
    get "a long field" 431 -H "A: $long" -H "B: $long" "$url/a.txt"
    get "HTTP/1.0" 200 -0 "$url/a.txt"
    count=$(curl -s --max-time 10 -o "$folder/body" -w '%{num_connects}\n' "$url/a.txt" \
        -o "$folder/body" "$url/nothing" -o "$folder/body" "$url/sub/" |
        awk '{ sum += $1 } END { print sum }')
    equal "three requests on one connection" 1 "$count"
fi

# ---- by hand: pipelining, and what could be read in two ways

# ask REQUESTS: the status codes of what is answered until the server closes or 5 s are over
ask() {
    # shellcheck disable=SC2059 # escapes are wanted
    printf "$1" | nc -w 5 127.0.0.1 "$port" | tr -d '\r\0' |
        sed -n 's|^HTTP/1.1 \([0-9]*\).*|\1|p' | tr '\n' ' '
}

if ! missing nc; then
    last='GET /a.txt HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n'
    next='GET /a.txt HTTP/1.1\r\nHost: a\r\n'
    equal "three in one go" "200 404 200 " \
        "$(ask "$next\r\nGET /no HTTP/1.1\r\nHost: a\r\n\r\n$last$last")"
    equal "two lengths" "400 " \
        "$(ask "${next}Content-Length: 0\r\nContent-Length: 60\r\n\r\n$last")"
    equal "a length and chunks" "400 " \
        "$(ask "${next}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n$last")"
    equal "chunks" "413 " "$(ask "${next}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n$last")"
    equal "a folded line" "400 " "$(ask "${next}A: b\r\n c: d\r\n\r\n$last")"
    equal "a bare CR" "400 " "$(ask "${next}A: b\rc: d\r\n\r\n$last")"
    equal "a bare LF" "400 " "$(ask "${next}A: b\nc: d\r\n\r\n$last")"
    equal "a blank before the colon" "400 " "$(ask "${next}Content-Length : 5\r\n\r\n$last")"
    equal "two hosts" "400 " "$(ask "${next}Host: b\r\n\r\n$last")"
    equal "no host" "400 " "$(ask "GET / HTTP/1.1\r\n\r\n$last")"
    equal "another protocol" "400 " "$(ask '\026\003\001\001\r\n\r\n')"
    equal "HTTP/2" "505 " "$(ask 'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n')"
fi

# ---- under load

if ! missing wrk; then
    wrk -t 2 -c 50 -d 1 "$url/a.txt" >"$folder/wrk" 2>&1
    has "wrk" "$folder/wrk" "Requests/sec"
    equal "wrk: errors" "" "$(grep -E 'Non-2xx|Socket errors' "$folder/wrk")"
    wrk -t 2 -c 8 -d 1 "$url/big" >"$folder/wrk" 2>&1
    equal "wrk, a large file: errors" "" "$(grep -E 'Non-2xx|Socket errors' "$folder/wrk")"
fi
if ! missing ab; then
    for keep in "" -k; do
        # shellcheck disable=SC2086 # nothing is wanted, too
        ab -q $keep -n 2000 -c 20 "$url/a.txt" >"$folder/ab" 2>&1
        equal "ab $keep: complete" 2000 "$(awk '/^Complete requests/ { print $3 }' "$folder/ab")"
        equal "ab $keep: failed" 0 "$(awk '/^Failed requests/ { print $3 }' "$folder/ab")"
    done
fi

# ---- libcurl, through orch_curl.h (or http_get.h without it)

"$programs/07_fetch" -j 4 "$url/a.txt" "$url/big" "$url/sub/" "$url/a.txt" "$url/" >"$folder/out"
equal "07_fetch" 0 $?
has "07_fetch" "$folder/out" "5 URLs: 5 fetched, 0 not"

# ---- the end: asked to, it finishes what it has begun

if ! missing curl; then
    curl -s --max-time 10 --limit-rate 4M -o "$folder/body" "$url/big" &
    download=$!
    curl -s --max-time 10 -o "$folder/idle" "$url/a.txt" --next -s --max-time 10 -o "$folder/idle" \
        "$url/a.txt"
    sleep 0.3
    kill -TERM "$server"
    wait $download
    equal "a download at the end" 0 $?
    same "a download at the end" "$folder/site/big" "$folder/body"
    wait "$server"
    equal "the server's end" 143 $?
    server=
    read -r line <&3
    equal "the server's last words" "requests" "${line#* }"
fi
"$programs/20_http_files" >"$folder/out" 2>&1
equal "20_http_files without arguments" 2 $?
"$programs/20_http_files" "$folder/nothing" >"$folder/out" 2>&1
equal "20_http_files without a folder" 1 $?
"$programs/20_http_files" . 70000 >"$folder/out" 2>&1
equal "20_http_files with no port" 2 $?

# ---- 21_grep beside grep

# find_with NAME ARGUMENTS...: both find the same, in any order, and end alike
find_with() {
    name=$1
    shift
    "$programs/21_grep" "$@" >"$folder/out" 2>"$folder/errors"
    got=$?
    grep -rFIH "$@" >"$folder/grep" 2>"$folder/grep.errors"
    equal "21_grep, $name" $? $got
    sort "$folder/grep" >"$folder/want"
    sort "$folder/out" >"$folder/got"
    same "21_grep, $name" "$folder/want" "$folder/got"
}

mkdir -p "$folder/tree/a/b/c/d" "$folder/tree/empty"
cp examples/*.h "$folder/tree"
cp tests/*.sh "$folder/tree/a/b"
cp asyncorch.h "$folder/tree/a/b/c/d"
printf 'orch_await\0' >"$folder/tree/binary"
printf 'no line end: orch_await' >"$folder/tree/a/end"
ln -s .. "$folder/tree/a/loop"
mkfifo "$folder/tree/fifo"
find_with "a folder" orch_await "$folder/tree"
find_with "with numbers" -n orch_await "$folder/tree"
find_with "without case" -in ORCH_Await "$folder/tree"
find_with "two folders and a file" -n for "$folder/tree/a/b" "$folder/tree/empty" README.md
find_with "nothing" 'nowhere to be found, this' "$folder/tree/a"
find_with "what is not there" -n orch_await "$folder/tree/none" "$folder/tree/a"
has "21_grep, what is not there" "$folder/errors" "tree/none: No such file"
find_with "a file each" -n orch "$folder/tree"
awk -F: '$1 != last { if ($1 in seen) { bad = 1 }; seen[$1] = 1; last = $1 } END { exit bad }' \
    "$folder/out"
equal "21_grep: lines of a file together" 0 $?
"$programs/21_grep" orch_await >"$folder/out" 2>&1
equal "21_grep without a path" 2 $?
if command -v script >/dev/null 2>&1; then
    script -qec "'$programs/21_grep' -n the '$folder/tree' >'$folder/out'" "$folder/terminal" \
        >/dev/null </dev/null
    has "21_grep on a terminal: the line is cleared" "$folder/terminal" "$(printf '\033[K')"
fi

if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else
    echo "$passed passed, $failed failed"
fi
[ $failed = 0 ]
