#!/bin/sh
# Runs the demo: starts the services, waits until they listen, runs 08_profile against them, and
# stops them.
# make demo calls it after building; the programs are looked for in .build/examples or in $1.
set -u
no_proxy=127.0.0.1 # libcurl would send the requests to the proxy of the environment
export no_proxy
programs=${1:-$(dirname "$0")/../.build/examples}
folder=$(mktemp -d) || exit 1
server=
stop() {
    [ -z "$server" ] || kill "$server" 2>/dev/null
    wait
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# One server for all runs: user 2 has posts 5 to 8, user 3 has 9 to 12 (see 08_profile.c).
mkfifo "$folder/says" || exit 1
"$programs/server" --port 0 --posts 4 --delay user=40 --delay posts=50 --delay comments=80 \
    --delay likes=40 --fail comments=7 --hang likes=10 >"$folder/says" &
server=$!
url=
read -r line <"$folder/says" && url=${line##* } # "listening on http://127.0.0.1:PORT"
if [ -z "$url" ]; then
    echo "demo: the server in $programs did not start" >&2
    exit 1
fi
"$programs/08_profile" "$url"
