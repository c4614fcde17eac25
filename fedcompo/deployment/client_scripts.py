"""A client's settings, and its shell scripts: one starts it, one talks to the registry."""

from __future__ import annotations

from fedcompo.deployment.given_app import APP_DIGESTS, LIBRARY_DIGESTS
from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.templates import SHARED, exports, fill

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

# One process a folder, as long as it lives; the server would refuse another with the same key.
if command -v flock > /dev/null; then
    exec 9> state/lock
    flock -n 9 || {
        echo "start: @{name} runs in this folder already; end it before you start it again." >&2
        exit 1
    }
fi

exec flower-supernode --superlink @{address} \\
    --root-certificates certificates/ca.crt \\
    --auth-supernode-private-key certificates/supernode \\
    --port "$PORT" \\
    --node-config "client=\\"@{name}\\" data=\\"$DATA\\" device=\\"$DEVICE\\" \\
state=\\"$PWD/state\\"${KIND:+ kind=\\"$KIND\\"}"
"""
)

REGISTRY = """\
#!/bin/sh
# Gives a command to the registry in the name of @{name}:
#   ./registry members                  who is there
#   ./registry fetch -o MODEL           a model composed of all, or --only / --without / --weights
#   ./registry publish FOLDER           hand in a contribution
#   ./registry request-removal          leave, with a signed receipt; an operator names the client
# It takes fedcompo from venv/ beside it, or else from the PATH.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -d "$here/venv" ]; then PATH="$here/venv/bin:$PATH"; export PATH; fi
FEDCOMPO_SERVER=@{registry}
FEDCOMPO_CA="$here/@{certificates}ca.crt"
FEDCOMPO_CERTIFICATE="$here/@{certificates}@{stem}.crt"
FEDCOMPO_KEY="$here/@{certificates}@{stem}.key"
export FEDCOMPO_SERVER FEDCOMPO_CA FEDCOMPO_CERTIFICATE FEDCOMPO_KEY
exec fedcompo "$@@"
"""


MISCONFIGURED = 78
"""Exit code of a start that would fail again (EX_CONFIG): no reason to restart."""


def client_scripts(name: str, deployment: Deployment) -> dict[str, str]:
    """A client's scripts and settings by file name.

    Args:
        name: Of the client.
        deployment: Where the server is.
    """
    return {
        "client.conf": fill(CONFIG, name=name),
        "start": fill(
            START,
            name=name,
            address=deployment.address,
            exports=exports(),
            misconfigured=MISCONFIGURED,
            app_digests=APP_DIGESTS,
            library_digests=LIBRARY_DIGESTS,
        ),
        "registry": registry_script(name, "client", "certificates/", deployment),
    }


def registry_script(name: str, stem: str, certificates: str, deployment: Deployment) -> str:
    """The script that talks to the registry in somebody's name.

    Args:
        name: Whose.
        stem: Name of certificate and key, without suffix.
        certificates: Where they lie beside the script: a folder and a slash, or nothing.
        deployment: Where the server is.
    """
    return fill(
        REGISTRY,
        name=name,
        stem=stem,
        certificates=certificates,
        registry=deployment.registry_address,
    )
