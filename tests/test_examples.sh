#!/bin/sh
# Runs every example and compares what it prints with what its header comment says it prints. Times
# are compared as N ms and N times. The programs are those of make examples, in .build/examples or
# in $1.
# Prints `N passed, N failed` and, where a tool is missing, `, N skipped`.
set -u
no_proxy=127.0.0.1 # libcurl would send the requests to the proxy of the environment
export no_proxy
cd "$(dirname "$0")/.." || exit 1
programs=${1:-.build/examples}
case $programs in /*) ;; *) programs=$PWD/$programs ;; esac
folder=$(mktemp -d) || exit 1
passed=0 failed=0 skipped=0 server=
stop_server() {
    [ -z "$server" ] || kill "$server" 2>/dev/null
    [ -z "$server" ] || wait "$server" || fail "the server ended with $?"
    server=
}
trap 'stop_server; rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM HUP

pass() { passed=$((passed + 1)); }
fail() {
    failed=$((failed + 1))
    echo "FAILED $*"
}
# ended NAME WANT GOT: two exit codes
ended() {
    if [ "$2" = "$3" ]; then pass; else fail "$1 ended with $3, not $2"; fi
}
# same NAME WANT GOT: two files
same() {
    if diff "$2" "$3" >"$folder/diff"; then pass; else
        fail "$1: < expected, > printed"
        cat "$folder/diff"
    fi
}
# has NAME FILE TEXT [COUNT]: so many lines have the text, or any number
has() {
    count=$(grep -c -F -e "$3" "$2")
    if [ "$count" = "${4:-$count}" ] && { [ "$count" -gt 0 ] || [ "${4:-}" = 0 ]; }; then pass; else
        fail "$1: \"$3\" in $count lines"
        cat "$2"
    fi
}
# What a header comment says is printed, and what of it differs from run to run made equal.
promised() { sed -n '/^\/\/ prints/,/^$/ s|^//         ||p' "examples/$1.c"; }
plain() {
    sed -E -e 's/in [0-9]+ ms/in N ms/; s/, [0-9]+ ms/, N ms/; s/[0-9.]+ times/N times/' \
        -e 's/ +[0-9]+  http/ N  http/; s/127\.0\.0\.1:[0-9]{2,}/127.0.0.1:PORT/' \
        -e 's/, by .*/, by a client/; s/^( {28})\(.*\)/\1(why)/'
}
# start_server OPTIONS...: sets $server and $url
start_server() {
    rm -f "$folder/says"
    mkfifo "$folder/says"
    "$programs/server" --port 0 "$@" >"$folder/says" &
    server=$!
    read -r line <"$folder/says"
    url=${line##* }
}

for example in 01_hello_await 02_then_callbacks 03_sequential_parallel 04_timeouts 05_all_settled \
    06_wrap_callback 09_dashboard 10_pipeline 12_offload 14_proxy; do
    promised "$example" | plain >"$folder/want"
    "$programs/$example" >"$folder/out" 2>&1 || fail "$example ended with $?"
    plain <"$folder/out" >"$folder/got"
    same "$example" "$folder/want" "$folder/got"
done

# ---- guests of other loops, where their libraries are

for example in 16_guest_poll 17_guest_glib 18_guest_uv; do
    promised "$example" >"$folder/want"
    "$programs/$example" >"$folder/got" 2>&1 || fail "$example ended with $?"
    if grep -q '^built without' "$folder/got"; then
        skipped=$((skipped + 1))
    else
        same "$example" "$folder/want" "$folder/got"
    fi
done

# ---- 11_resilient: every URL in the end, but the one that hangs

start_server --error-rate 30 --delay likes=20 --hang likes=7
"$programs/11_resilient" "$url" 40 >"$folder/got" 2>"$folder/errors"
ended 11_resilient 0 $?
has 11_resilient "$folder/got" "39 of 40 URLs fetched, 1 given up" 1
has 11_resilient "$folder/got" "slowest: /posts/7/likes after 6 attempts" 1
"$programs/11_resilient" "$url" 0 >"$folder/got" 2>"$folder/errors"
ended 11_resilient 2 $?
stop_server

# ---- 15_xargs: outputs in one piece, failures, time-outs, retries, interruption

xargs=$programs/15_xargs
promised 15_xargs >"$folder/want"
seq 3 | "$xargs" -j 2 -t 5 -r 1 sh -c 'sleep 0.{}; echo slept 0.{} s; test {} != 2' \
    >"$folder/got" 2>"$folder/errors"
ended 15_xargs 123 $?
cat "$folder/errors" >>"$folder/got"
same 15_xargs "$folder/want" "$folder/got"
printf 'one item\n\ntwo' | "$xargs" -j 1 echo "<{}{}>" >"$folder/got" 2>&1
ended "15_xargs: lines" 0 $?
printf '<one itemone item>\n<twotwo>\n' >"$folder/want"
same "15_xargs: lines" "$folder/want" "$folder/got"
printf 'a\nb\0c' | "$xargs" -0 -j 1 printf '%s.' >"$folder/got" 2>&1
ended "15_xargs -0" 0 $?
printf 'a\nb.c.' >"$folder/want"
same "15_xargs -0" "$folder/want" "$folder/got"
seq 20 | "$xargs" -j 20 sh -c 'for i in 1 2 3 4 5; do echo {}; done' | uniq -c >"$folder/got"
has "15_xargs: one piece" "$folder/got" " 5 " 20
"$xargs" false </dev/null
ended "15_xargs without items" 0 $?
echo x | "$xargs" no-such-program >"$folder/got" 2>&1
ended "15_xargs: not found" 127 $?
has "15_xargs: not found" "$folder/got" "15_xargs: x: cannot start no-such-program: " 1
echo x | "$xargs" /dev/null >"$folder/got" 2>&1
ended "15_xargs: not to be run" 126 $?
echo x | "$xargs" sh -c 'kill -9 $$' >"$folder/got" 2>&1
ended "15_xargs: killed" 123 $?
has "15_xargs: killed" "$folder/got" "15_xargs: x: killed by signal 9 (Killed)" 1
echo x | "$xargs" -r 3 sh -c "echo run >>'$folder/runs'; [ \$(wc -l <'$folder/runs') = 3 ]"
ended "15_xargs: the third attempt" 0 $?
has "15_xargs: the third attempt" "$folder/runs" run 3
echo x | "$xargs" -t 0.2 sh -c "echo \$\$ >'$folder/pid'; sleep 1000; :" >"$folder/got" 2>&1
ended "15_xargs: a time-out" 123 $?
has "15_xargs: a time-out" "$folder/got" "15_xargs: x: Timeout after 200 ms" 1
if kill -0 "$(cat "$folder/pid")" 2>/dev/null; then fail "15_xargs: it still runs"; else pass; fi
for signal in INT TERM; do
    rm -f "$folder/pid"
    echo x | "$xargs" sh -c "trap 'echo cleaned >>\"$folder/$signal\"; exit' TERM
        echo \$\$ >'$folder/pid'; kill -$signal \$PPID; while :; do sleep 0.05; done" \
        >"$folder/got" 2>&1
    code=$?
    if [ $signal = INT ]; then ended "15_xargs: $signal" 130 $code; else
        ended "15_xargs: $signal" 143 $code
    fi
    : >"$folder/want"
    same "15_xargs: $signal: nothing is printed" "$folder/want" "$folder/got"
    has "15_xargs: $signal: its command may clean up" "$folder/$signal" cleaned 1
    if kill -0 "$(cat "$folder/pid")" 2>/dev/null; then fail "15_xargs: it runs on"; else pass; fi
done
for bad in "" "-j 0 true" "-j x true" "-t true" "-t 0 true" "-r -1 true" "-x true" "-j"; do
    # shellcheck disable=SC2086 # words are wanted
    "$xargs" $bad >"$folder/got" 2>&1 </dev/null
    ended "15_xargs $bad" 2 $?
done

# ---- 07_fetch, as in its header comment

start_server --hang likes=2
for path in /user/1 /nothing /posts/2/likes; do echo "$url$path"; done >"$folder/list"
promised 07_fetch | sed -n '/^ status/,$p' | plain >"$folder/want"
"$programs/07_fetch" -j 4 -t 200 -f "$folder/list" http://127.0.0.1:1/ \
    >"$folder/out" 2>"$folder/err"
ended 07_fetch 1 $?
plain <"$folder/out" >"$folder/got"
same 07_fetch "$folder/want" "$folder/got"
: >"$folder/empty"
same "07_fetch: no progress bar in a file" "$folder/empty" "$folder/err"

for i in 1 2 3 4 5 6 7 8 9 10; do echo "$url/user/$i"; done |
    "$programs/07_fetch" -j 3 -f - >"$folder/out"
ended "07_fetch from standard input" 0 $?
has "07_fetch -j 3" "$folder/out" "10 URLs: 10 fetched, 0 not"
if command -v script >/dev/null 2>&1; then
    script -qec "'$programs/07_fetch' $url/user/1" "$folder/terminal" >/dev/null </dev/null
    has "07_fetch on a terminal: a progress bar" "$folder/terminal" "] 1/1"
else
    skipped=$((skipped + 1))
fi
for bad in "" "-j 0 $url" "-j 1001 $url" "-j x $url" "-t 0 $url" "-t" "-x" "-f $folder/none" \
    "nourl" \
    "-t 99999999999999999999 $url"; do
    # shellcheck disable=SC2086 # words are wanted
    "$programs/07_fetch" $bad >"$folder/out" 2>"$folder/err" </dev/null
    ended "07_fetch $bad" 2 $?
    same "07_fetch $bad: no table" "$folder/empty" "$folder/out"
    has "07_fetch $bad" "$folder/err" "07_fetch: "
done
stop_server

# ---- 13_echo: both in one program, then a server and a client; 14_proxy between them

"$programs/13_echo" >"$folder/got" 2>&1
ended 13_echo 0 $?
has 13_echo "$folder/got" "10 connections: "
has 13_echo "$folder/got" ", 0 failures"
# An echo server and a proxy before it; whether both have got their ports, which others may have.
echo_pair() {
    "$programs/13_echo" serve "$echo_port" &
    server=$!
    "$programs/14_proxy" $((echo_port + 1)) localhost "$echo_port" &
    proxy=$!
    tries=0
    until "$programs/13_echo" load $((echo_port + 1)) 1 0.01 2>/dev/null | grep -q ' 0 failures'; do
        tries=$((tries + 1))
        [ "$tries" -lt 100 ] && kill -0 "$server" "$proxy" 2>/dev/null || return 1
        sleep 0.05
    done
    kill -0 "$server" "$proxy" 2>/dev/null
}
echo_port=$((20000 + $$ % 10000)) # below those the system gives out
up=1
for attempt in 1 2 3 4 5; do
    echo_pair 2>"$folder/err" && up=0 && break
    { kill "$server" "$proxy" && wait "$server" "$proxy"; } 2>/dev/null
    echo_port=$((echo_port + 500))
done
ended "13_echo and 14_proxy, attempt $attempt" 0 $up
"$programs/13_echo" load "$echo_port" 100 0.2 >"$folder/got" 2>&1
ended "13_echo load" 0 $?
has "13_echo load" "$folder/got" "100 connections: " 1
has "13_echo load" "$folder/got" ", 0 failures" 1
"$programs/13_echo" load $((echo_port + 1)) 20 0.2 >"$folder/got" 2>&1
has "13_echo load through 14_proxy" "$folder/got" "20 connections: " 1
has "13_echo load through 14_proxy" "$folder/got" ", 0 failures" 1
kill "$server" "$proxy"
wait "$server" "$proxy" 2>/dev/null
server=
for bad in "serve" "serve 0" "serve 70000" "load" "load 7000 0" "bogus 7000"; do
    # shellcheck disable=SC2086 # words are wanted
    "$programs/13_echo" $bad >"$folder/out" 2>&1
    ended "13_echo $bad" 2 $?
done

# ---- 20_http_files and 21_grep, as in their header comments; test_http.sh does the rest

promised 20_http_files | plain >"$folder/want"
rm -f "$folder/says"
mkfifo "$folder/says"
"$programs/20_http_files" . 0 >"$folder/says" &
server=$!
exec 3<"$folder/says" # until its end
read -r line <&3
echo "$line" | plain >"$folder/got"
same 20_http_files "$folder/want" "$folder/got"
kill "$server"
wait "$server"
ended "20_http_files by SIGTERM" 143 $?
server=
"$programs/21_grep" -n 'from one process to another' tests >"$folder/out"
ended 21_grep 0 $?
has 21_grep "$folder/out" "$(promised 21_grep | sed -n '$s/ \[\.\.\.\]$//p')" 1

# ---- the server's command line

for bad in "--port 70000" "--port" "--delay likes" "--delay nothing=1" "--fail likes=0" \
    "--error-rate 101" \
    "--bogus" "--posts 1000"; do
    # shellcheck disable=SC2086 # words are wanted
    "$programs/server" $bad >"$folder/out" 2>"$folder/err" </dev/null
    ended "server $bad" 2 $?
    has "server $bad" "$folder/err" "server: cannot use"
done
start_server
"$programs/server" --port "${url##*:}" >"$folder/out" 2>"$folder/err"
has "server: a port in use" "$folder/err" "cannot listen"
stop_server

# ---- the demo, with a server whose process we know

mkdir "$folder/programs"
ln -s "$programs/08_profile" "$folder/programs/08_profile"
cat >"$folder/programs/server" <<END
#!/bin/sh
echo \$\$ >"$folder/pid"
exec "$programs/server" "\$@"
END
chmod +x "$folder/programs/server"
sh examples/demo.sh "$folder/programs" >"$folder/out" 2>&1 || fail "the demo ended with $?"
has "demo: calls that succeed" "$folder/out" "█✓" 38
has "demo: calls that time out" "$folder/out" "█⏱" 1
has "demo: calls that fail" "$folder/out" "█✗" 1
has "demo: one healthy user, twice" "$folder/out" "Ada: 4 posts, 8 comments, 70 likes" 2
has "demo: hanging service" "$folder/out" "post 10: likes degraded to 0: Timeout after 250 ms" 1
has "demo: failing service" "$folder/out" \
    "post 7: comments degraded to an empty list: HTTP status 500" 1
has "demo: names its client" "$folder/out" "The client is " 1
has "demo: no colours in a file" "$folder/out" "$(printf '\033')" 0
ratio=$(sed -n 's/^sequential .* ms: \([0-9]*\)\..* times as fast$/\1/p' "$folder/out")
if [ "${ratio:-0}" -ge 2 ]; then pass; else fail "demo: the ratio is \"$ratio\""; fi
if kill -0 "$(cat "$folder/pid")" 2>/dev/null; then
    fail "demo: the server still runs"
else
    pass
fi
sh examples/demo.sh "$folder" >"$folder/out" 2>&1
ended "a demo without programs" 1 $?
"$programs/08_profile" >"$folder/out" 2>&1
ended "08_profile without arguments" 2 $?
"$programs/08_profile" http://127.0.0.1:1 >"$folder/out" 2>&1
ended "08_profile without a server" 1 $?

if [ $skipped -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"; else
    echo "$passed passed, $failed failed"
fi
[ $failed = 0 ]
