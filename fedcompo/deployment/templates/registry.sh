#!/bin/sh
# Gives a command to the registry in the name of @NAME@:
#   ./registry members                  who is there
#   ./registry fetch -o MODEL           a model composed of all, or --only / --without / --weights
#   ./registry publish FOLDER           hand in a contribution
#   ./registry request-removal          leave, with a signed receipt; an operator names the client
# It takes fedcompo from venv/ beside it, or else from the PATH.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -d "$here/venv" ]; then PATH="$here/venv/bin:$PATH"; export PATH; fi
FEDCOMPO_SERVER='@REGISTRY@'
FEDCOMPO_CA="$here/@CERTIFICATES@ca.crt"
FEDCOMPO_CERTIFICATE="$here/@CERTIFICATES@@STEM@.crt"
FEDCOMPO_KEY="$here/@CERTIFICATES@@STEM@.key"
FEDCOMPO_KNOWN="$here/state/known.json"  # the registry's key, and the last that was seen of it
export FEDCOMPO_SERVER FEDCOMPO_CA FEDCOMPO_CERTIFICATE FEDCOMPO_KEY FEDCOMPO_KNOWN
exec fedcompo "$@"
