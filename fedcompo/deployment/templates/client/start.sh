#!/bin/sh
# Starts the client @NAME@; its settings are in client.conf.
#
# Before, it checks that app and library are those that this client was given, and that Flower
# cannot put another app beside them: code that the server sends is never run.
set -eu
cd "$(dirname "$0")"
refuse() {
    echo "start: $*" >&2
    exit 78
}
@SHARED@
for key in DATA DEVICE KIND THREADS PORT; do
    grep -q "^$key=" client.conf || refuse "client.conf sets no $key; write $key=VALUE there."
done
. ./client.conf
OMP_NUM_THREADS=$THREADS
FLWR_HOME="$PWD/flower"
# Python would write compiled code beside the app.
PYTHONDONTWRITEBYTECODE=1
export OMP_NUM_THREADS FLWR_HOME PYTHONDONTWRITEBYTECODE

supernode=$(command -v flower-supernode) ||
    refuse "Flower is not installed. Run: python3 -m venv venv && venv/bin/pip install PROJECT"
case $DATA$DEVICE$KIND in
    *[\"\\]*) refuse "client.conf sets a value with a double quote or a backslash; rename it." ;;
esac
[ -e "$DATA" ] || refuse "DATA in client.conf does not exist: $DATA. Write where the images are."

sha256sum --check --quiet --strict app.sha256 ||
    refuse "the app in flower/apps is not the one that this client was given."
[ "$(find flower/apps -type f | wc -l)" -eq "$(wc -l < app.sha256)" ] ||
    refuse "flower/apps holds more than the app that this client was given."
python="$(dirname "$supernode")/python3"
[ -x "$python" ] || python=python3
library=$("$python" -c 'if 1:
    import importlib.util
    print(*importlib.util.find_spec("fedcompo").submodule_search_locations)') ||
    refuse "fedcompo is not installed beside Flower. Run: venv/bin/pip install PROJECT"
digests="$PWD/library.sha256"
(cd "$library" && sha256sum --check --quiet --strict "$digests") ||
    refuse "the installed fedcompo in $library is not the version that this client was given."
"$python" -P -m fedcompo.cli check-certificate certificates >&2 || exit 78
chmod -R a-w flower 2>/dev/null || true
if mkdir flower/apps/probe 2>/dev/null; then
    rmdir flower/apps/probe
    refuse "flower/apps can be written to, so the server could bring code of its own." \
        "Start as an ordinary user (root may write everywhere), or mount this folder read-only."
fi

# One process a folder, as long as it lives; the server would refuse another with the same key.
if command -v flock > /dev/null; then
    exec 9> state/lock
    flock -n 9 || {
        echo "start: @NAME@ runs in this folder already; end it before you start it again." >&2
        exit 1
    }
fi

exec "$python" -P -m fedcompo.deployment.node --superlink '@ADDRESS@' \
    --root-certificates certificates/ca.crt \
    --auth-supernode-private-key certificates/supernode \
    --port "$PORT" \
    --node-config "client=\"@NAME@\" data=\"$DATA\" device=\"$DEVICE\" \
state=\"$PWD/state\"${KIND:+ kind=\"$KIND\"}${CAPS:+ $CAPS}"
