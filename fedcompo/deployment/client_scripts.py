"""A client's settings, and the shell script that checks what it was given and starts it."""

from __future__ import annotations

from fedcompo.deployment.environment import SHARED, exports
from fedcompo.deployment.files import fill
from fedcompo.deployment.given_app import APP_DIGESTS, LIBRARY_DIGESTS

CONFIG = """\
# Settings of the client @{name}, read by ./start and by Docker: KEY=value, no spaces around the =;
# a value with spaces in double quotes.

# Folder of its images: train/<class>/* and perhaps test/<class>/*.
DATA=/data/@{name}

# Where it computes: auto (a GPU if there is one), cpu, cuda or cuda:1.
DEVICE=auto

# Kind of task vector it insists on: full, lora or ia3; empty: what the run asks for.
KIND=

# CPU threads at most.
THREADS=4

# Memory at most, for Docker; systemd's limit stands in the unit.
MEMORY=32g

# Loopback port over which Flower's own processes talk; another for each client of one machine.
PORT=9094
"""

START = (
    """\
#!/bin/sh
# Starts the client @{name}; its settings are in client.conf.
#
# Before, it checks that app and library are those that this client was given, and that Flower
# cannot put another app beside them: code that the server sends is never run.
set -eu
cd "$(dirname "$0")"
refuse() {
    echo "start: $*" >&2
    exit @{misconfigured}
}
"""
    + SHARED
    + """\
. ./client.conf
OMP_NUM_THREADS=$THREADS
FLWR_HOME="$PWD/flower"
# Python would write compiled code beside the app.
PYTHONDONTWRITEBYTECODE=1
export OMP_NUM_THREADS FLWR_HOME PYTHONDONTWRITEBYTECODE

supernode=$(command -v flower-supernode) ||
    refuse "Flower is not installed. Run: python3 -m venv venv && venv/bin/pip install PROJECT"
case $DATA in *\\"*) refuse "DATA in client.conf cannot hold a double quote: $DATA" ;; esac
[ -d "$DATA" ] || refuse "DATA in client.conf is no folder: $DATA. Write where the images are."

sha256sum --check --quiet --strict @{app_digests} ||
    refuse "the app in flower/apps is not the one that this client was given."
[ "$(find flower/apps -type f | wc -l)" -eq "$(wc -l < @{app_digests})" ] ||
    refuse "flower/apps holds more than the app that this client was given."
python="$(dirname "$supernode")/python3"
[ -x "$python" ] || python=python3
library=$("$python" -c 'if 1:
    import importlib.util
    print(*importlib.util.find_spec("fedcompo").submodule_search_locations)') ||
    refuse "fedcompo is not installed beside Flower. Run: venv/bin/pip install PROJECT"
digests="$PWD/@{library_digests}"
(cd "$library" && sha256sum --check --quiet --strict "$digests") ||
    refuse "the installed fedcompo in $library is not the version that this client was given."
chmod -R a-w flower 2>/dev/null || true
if mkdir flower/apps/probe 2>/dev/null; then
    rmdir flower/apps/probe
    refuse "flower/apps can be written to, so the server could bring code of its own." \\
        "Start as an ordinary user (root may write everywhere), or mount this folder read-only."
fi

exec flower-supernode --superlink @{address} \\
    --root-certificates certificates/ca.crt \\
    --auth-supernode-private-key certificates/supernode \\
    --port "$PORT" \\
    --node-config "client=\\"@{name}\\" data=\\"$DATA\\" device=\\"$DEVICE\\" \\
state=\\"$PWD/state\\"${KIND:+ kind=\\"$KIND\\"}"
"""
)

MISCONFIGURED = 78
"""Exit code of a start that would fail again (EX_CONFIG): no reason to restart."""


def client_scripts(name: str, address: str) -> dict[str, str]:
    """A client's scripts and settings by file name.

    Args:
        name: Of the client.
        address: Host and port of the server.
    """
    return {
        "client.conf": fill(CONFIG, name=name),
        "start": fill(
            START,
            name=name,
            address=address,
            exports=exports(),
            misconfigured=MISCONFIGURED,
            app_digests=APP_DIGESTS,
            library_digests=LIBRARY_DIGESTS,
        ),
    }
