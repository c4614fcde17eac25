# What is written here is nobody else's business.
umask 077
case $PWD in
    *[\"\\]*)
        echo "$0: the path $PWD holds a double quote or a backslash; move this folder." >&2
        exit 78
        ;;
esac
if [ -d venv ]; then PATH="$PWD/venv/bin:$PATH"; export PATH; fi
# No telemetry, no look for updates, no installation at run time.
@EXPORTS@
# Temporary files may hold what clients sent: they stay in this folder.
TMPDIR="$PWD/state/tmp"
export TMPDIR
mkdir -p "$TMPDIR"
# Flower's processes talk to each other over loopback, where no proxy of the house reaches them.
NO_PROXY="127.0.0.1,localhost${NO_PROXY:+,$NO_PROXY}"
no_proxy=$NO_PROXY
export NO_PROXY no_proxy
