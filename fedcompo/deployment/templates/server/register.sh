#!/bin/sh
# Registers each client of clients/ with the SuperLink, which lets nobody else in.
# May be repeated: whoever is registered stays so.
set -eu
cd "$(dirname "$0")"
. ./environment
for key in clients/*.pub; do
    if [ ! -e "$key" ]; then
        echo "register: clients/ holds no key; copy those of approved clients to it." >&2
        exit 1
    fi
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
