#!/bin/sh
# Runs the app on the clients, shows its log, and ends with 0 only if the run was completed.
#   ./run                  with the default settings
#   ./run SETTINGS.toml    with those of a file; `fedcompo settings` lists them
# Unless the file says otherwise, results go to runs/<name of the file>, and all clients take part.
# It waits for all of clients/ for as long as `timeout` says, or for `num-clients`, if the file sets
# that. Ctrl-C, and the end of the terminal, stop the run; `nohup ./run ... &` goes on without one.
set -eu
if [ "$#" -gt 0 ] && [ ! -r "$1" ]; then
    echo "run: there is no settings file $1. Write one, or leave it out for the defaults." >&2
    exit 2
fi
if [ "$#" -gt 0 ]; then given=$(realpath "$1"); else given=/dev/null; fi
cd "$(dirname "$0")"
. ./environment
name=$(basename "$given" .toml)
if [ "$name" = null ]; then name=default; fi
case $name in
    *[\"\\]*)
        echo "run: the name $name holds a double quote or a backslash; rename the file." >&2
        exit 2
        ;;
esac
settings="$TMPDIR/run.$$.toml"
trap 'rm -f "$settings"' EXIT
set -- clients/*.pub
{
    grep -q '^ *output *=' "$given" || echo "output = \"$PWD/runs/$name\""
    grep -q '^ *num-clients *=' "$given" || echo "num-clients = $#"
    cat "$given"
} > "$settings"
fedcompo check-certificate certificates >&2 || exit 2
fedcompo settings --check "$settings" > /dev/null
trap 'echo "run: interrupted while it was submitted; see: flwr list federation" >&2; exit 130'     INT TERM HUP
answer=$(flwr run app federation --run-config "$settings" --format json) || {
    echo "run: the run was not started; is ./start-superlink running? $answer" >&2
    exit 1
}
run=$(echo "$answer" | sed -n 's/.*"run-id": *"\{0,1\}\([0-9]*\).*/\1/p')
if [ -z "$run" ]; then
    echo "run: the run was not started: $answer" >&2
    exit 1
fi
stop() {
    set +e  # nobody may be there to read
    kill "$log" 2>/dev/null
    echo "run: $run is being stopped" >&2
    flwr stop "$run" federation >&2
    exit 130
}
log=
trap stop INT TERM HUP
echo "run: $run has started"
flwr log "$run" federation --stream & log=$!
wait "$log" || true
# Flower's own exit code says nothing about how the run ended.
status=$(flwr list federation --run-id "$run" --format json |
    sed -n 's/.*"status": *"\([^"]*\)".*/\1/p')
echo "run: $run is $status"
[ "$status" = finished:completed ]
