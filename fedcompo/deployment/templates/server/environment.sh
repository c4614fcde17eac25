# Read by the scripts of this folder, which stand in it.
@SHARED@
# Where Flower's command line finds the SuperLink, which asks nobody who they are: on loopback only.
FLWR_HOME="$PWD/state/flower"
FEDCOMPO_KNOWN="$PWD/state/known.json"  # the keys of registries that were made here
export FLWR_HOME FEDCOMPO_KNOWN
mkdir -p "$FLWR_HOME"
# Flower wants an absolute path; scripts may start at the same time.
cat > "$FLWR_HOME/config.$$" <<END
[superlink]
default = "federation"

[superlink.federation]
address = "127.0.0.1:@SUPERLINK_PORT@"
root-certificates = "$PWD/certificates/ca.crt"
END
mv "$FLWR_HOME/config.$$" "$FLWR_HOME/config.toml"
