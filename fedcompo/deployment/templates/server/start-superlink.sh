#!/bin/sh
# Starts Flower's SuperLink on loopback, and registers the clients once it answers.
#
# It keeps its state in memory: a database would keep task vectors on disk, also after they were
# deleted. A restart therefore forgets the clients, which is why they are registered at each start.
set -eu
cd "$(dirname "$0")"
. ./environment
fedcompo check-certificate certificates >&2 || exit 78
./register &
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.1  # seconds until a run that was submitted starts
exec flower-superlink --host 127.0.0.1 --port @SUPERLINK_PORT@ \
    --ssl-ca-certfile certificates/ca.crt \
    --ssl-certfile certificates/server.crt \
    --ssl-keyfile certificates/server.key \
    --enable-supernode-auth --disable-runtime-dependency-installation
