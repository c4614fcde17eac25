"""Shell scripts of the server: start what serves, register clients, run the app."""

from __future__ import annotations

from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.templates import SHARED, exports, fill

ENVIRONMENT = (
    """\
# Read by the scripts of this folder, which stand in it.
"""
    + SHARED
    + """\
# Where Flower's command line finds the SuperLink, which asks nobody who they are: on loopback only.
FLWR_HOME="$PWD/state/flower"
export FLWR_HOME
mkdir -p "$FLWR_HOME"
# Flower wants an absolute path; scripts may start at the same time.
cat > "$FLWR_HOME/config.$$" <<END
[superlink]
default = "federation"

[superlink.federation]
address = "127.0.0.1:@{superlink_port}"
root-certificates = "$PWD/certificates/ca.crt"
END
mv "$FLWR_HOME/config.$$" "$FLWR_HOME/config.toml"
"""
)

START_SUPERLINK = """\
#!/bin/sh
# Starts Flower's SuperLink on loopback, and registers the clients once it answers.
#
# It keeps its state in memory: a database would keep task vectors on disk, also after they were
# deleted. A restart therefore forgets the clients, which is why they are registered at each start.
set -eu
cd "$(dirname "$0")"
. ./environment
./register &
exec flower-superlink --host 127.0.0.1 --port @{superlink_port} \\
    --ssl-ca-certfile certificates/ca.crt \\
    --ssl-certfile certificates/server.crt \\
    --ssl-keyfile certificates/server.key \\
    --enable-supernode-auth --disable-runtime-dependency-installation
"""

START_PROXY = """\
#!/bin/sh
# Starts nginx, the only way to the SuperLink from outside.
set -eu
cd "$(dirname "$0")"
. ./environment
PATH="$PATH:/usr/sbin:/usr/local/sbin"
exec nginx -p "$PWD" -c nginx.conf -e stderr -g 'daemon off;'
"""

REGISTER = """\
#!/bin/sh
# Registers each client of clients/ with the SuperLink, which lets nobody else in.
# May be repeated: whoever is registered stays so.
set -eu
cd "$(dirname "$0")"
. ./environment
for key in clients/*.pub; do
    name=$(basename "$key" .pub)
    attempts=60
    until said=$(flwr supernode register "$key" federation --name "$name" 2>&1); do
        case $said in *"already"*) said=; break ;; esac
        attempts=$((attempts - 1))
        if [ "$attempts" -eq 0 ]; then
            echo "register: $name could not be registered: $said" >&2
            exit 1
        fi
        sleep 1
    done
    if [ -n "$said" ]; then
        echo "register: $name is registered"
    else
        echo "register: $name was registered before"
    fi
done
"""

RUN = """\
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
settings="$TMPDIR/run.$$.toml"
trap 'rm -f "$settings"' EXIT
set -- clients/*.pub
{
    grep -q '^ *output *=' "$given" || echo "output = \\"$PWD/runs/$name\\""
    grep -q '^ *num-clients *=' "$given" || echo "num-clients = $#"
    cat "$given"
} > "$settings"
fedcompo settings --check "$settings" > /dev/null
trap 'echo "run: interrupted while it was submitted; see: flwr list federation" >&2; exit 130' \
    INT TERM HUP
answer=$(flwr run app federation --run-config "$settings" --format json) || {
    echo "run: the run was not started; is ./start-superlink running? $answer" >&2
    exit 1
}
run=$(echo "$answer" | sed -n 's/.*"run-id": *"\\{0,1\\}\\([0-9]*\\).*/\\1/p')
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
    sed -n 's/.*"status": *"\\([^"]*\\)".*/\\1/p')
echo "run: $run is $status"
[ "$status" = finished:completed ]
"""

START_REGISTRY = """\
#!/bin/sh
# Serves a registry, so that clients fetch models and leave at any hour.
#   ./start-registry             that of the run with the default settings
#   ./start-registry REGISTRY    another, such as runs/first/registry
# The file `revoked` locks certificates out; it is read again whenever it has changed.
set -eu
if [ "$#" -gt 0 ] && [ ! -d "$1" ]; then
    echo "start-registry: there is no registry $1. Name that of a run: runs/NAME/registry." >&2
    exit 2
fi
if [ "$#" -gt 0 ]; then registry=$(realpath "$1"); else registry=runs/default/registry; fi
cd "$(dirname "$0")"
. ./environment
exec fedcompo serve "$registry" --host @{host} --port @{registry_port} --revoked revoked \\
    --ca certificates/ca.crt --certificate certificates/server.crt --key certificates/server.key
"""

REVOKED = """\
# Certificates that the registry lets in no more: the SHA-256 of each on a line of its own, as the
# registry's journal has it, or as this prints it, where the folder of the deployment lies:
#   openssl x509 -noout -fingerprint -sha256 -in clients/NAME/certificates/client.crt
"""


def server_scripts(deployment: Deployment) -> dict[str, str]:
    """The server's scripts by file name."""
    port = deployment.superlink_port
    # Every address of the machine, of the kind that clients use.
    host = "::" if deployment.registry_address.startswith("[") else "0.0.0.0"
    return {
        "environment": fill(ENVIRONMENT, exports=exports(), superlink_port=port),
        "start-superlink": fill(START_SUPERLINK, superlink_port=port),
        "start-proxy": START_PROXY,
        "register": REGISTER,
        "run": RUN,
        "start-registry": fill(START_REGISTRY, host=host, registry_port=deployment.registry_port),
        "revoked": REVOKED,
    }
