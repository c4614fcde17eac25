"""What every script of a deployment sets first: private files, quiet programs, where they are."""

from __future__ import annotations

from fedcompo.engine.superlink import QUIET


def exports() -> str:
    """Shell lines that switch off telemetry, looking for updates and installing at run time."""
    return "\n".join(f"export {key}={value}" for key, value in QUIET.items())


SHARED = """\
# What is written here is nobody else's business.
umask 077
if [ -d venv ]; then PATH="$PWD/venv/bin:$PATH"; export PATH; fi
# No telemetry, no look for updates, no installation at run time.
@{exports}
# Temporary files may hold what clients sent: they stay in this folder.
TMPDIR="$PWD/state/tmp"
export TMPDIR
mkdir -p "$TMPDIR"
# Flower's processes talk to each other over loopback, where no proxy of the house reaches them.
NO_PROXY="127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}"
no_proxy=$NO_PROXY
export NO_PROXY no_proxy
"""
