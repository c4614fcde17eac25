#!/bin/sh
# Starts nginx, the only way to the SuperLink from outside.
set -eu
cd "$(dirname "$0")"
. ./environment
PATH="$PATH:/usr/sbin:/usr/local/sbin"
exec nginx -p "$PWD" -c nginx.conf -e stderr -g 'daemon off;'
