"""systemd units: the same start scripts, restarted when they end, with few rights."""

from __future__ import annotations

from fedcompo.deployment.client_scripts import MISCONFIGURED
from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.templates import fill

HOME = "/opt/fedcompo"
"""Where the folders are expected to lie on their machines."""
CLIENT_DELAY = 60
"""Seconds until a client is restarted: the SuperLink refuses one whose session has not expired,
which after a kill takes 54."""
SERVER_DELAY = 5
BIND_LOW_PORTS = "CAP_NET_BIND_SERVICE"
FIRST_FREE_PORT = 1024
"""Ports below are root's, or of whom root lets."""

UNIT = """\
[Unit]
Description=@{description}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User=fedcompo
WorkingDirectory=@{folder}
ExecStart=@{folder}/@{script}
Restart=always
RestartSec=@{delay}
RestartPreventExitStatus=@{misconfigured}
TimeoutStopSec=30

# What clients send is not to reach the disk.
LimitCORE=0
MemorySwapMax=0
@{limits}
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=@{capabilities}
AmbientCapabilities=@{capabilities}
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths=@{writable}
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""


def client_units(name: str) -> dict[str, str]:
    """The unit of a client, by file name."""
    folder = f"{HOME}/{name}"
    return {
        f"systemd/fedcompo-{name}.service": _unit(
            f"fedcompo client {name}",
            folder,
            "start",
            delay=CLIENT_DELAY,
            writable=f"{folder}/state",
            limits="MemoryMax=80%\nNice=5\n",
        )
    }


def server_units(deployment: Deployment) -> dict[str, str]:
    """The units of the server, by file name."""
    folder = f"{HOME}/server"
    superlink = _unit(
        "fedcompo superlink",
        folder,
        "start-superlink",
        delay=SERVER_DELAY,
        writable=f"{folder}/state {folder}/runs",
    )
    proxy = _unit(
        "fedcompo proxy",
        folder,
        "start-proxy",
        delay=SERVER_DELAY,
        writable=f"{folder}/state",
        capabilities=BIND_LOW_PORTS if deployment.port < FIRST_FREE_PORT else "",
    )
    registry = _unit(
        "fedcompo registry",
        folder,
        "start-registry",
        delay=SERVER_DELAY,
        writable=f"{folder}/state {folder}/runs",
        capabilities=BIND_LOW_PORTS if deployment.registry_port < FIRST_FREE_PORT else "",
    )
    return {
        "systemd/fedcompo-superlink.service": superlink,
        "systemd/fedcompo-proxy.service": proxy,
        "systemd/fedcompo-registry.service": registry,
    }


def _unit(
    description: str,
    folder: str,
    script: str,
    *,
    delay: int,
    writable: str,
    limits: str = "",
    capabilities: str = "",
) -> str:
    return fill(
        UNIT,
        description=description,
        folder=folder,
        script=script,
        delay=delay,
        misconfigured=MISCONFIGURED,
        limits=limits,
        capabilities=capabilities,
        writable=writable,
    )
