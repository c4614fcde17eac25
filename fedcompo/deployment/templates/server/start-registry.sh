#!/bin/sh
# Serves a registry, so that operators fetch models and clients leave at any hour.
#   ./start-registry             that of the run with the default settings
#   ./start-registry REGISTRY    another, such as runs/first/registry; options of `fedcompo serve`
#                                may follow, such as --compose members
# The file `revoked` locks certificates out; it is read again whenever it has changed.
set -eu
if [ "$#" -gt 0 ] && [ ! -d "$1" ]; then
    echo "start-registry: there is no registry $1. Name that of a run: runs/NAME/registry." >&2
    exit 2
fi
registry=runs/default/registry
if [ "$#" -gt 0 ]; then
    registry=$(realpath "$1")
    shift
fi
cd "$(dirname "$0")"
. ./environment
exec fedcompo serve "$registry" --host '@HOST@' --port @REGISTRY_PORT@ --revoked revoked \
    --ca certificates/ca.crt --certificate certificates/server.crt --key certificates/server.key \
    "$@"
