"""The texts in each folder of a deployment: scripts, settings, systemd units, a README.

Why the SuperLink listens on loopback, behind nginx, is in README.md. It checks clients' keys only
under TLS of its own: the way over loopback is encrypted once more.

Start scripts end with status 78 (EX_CONFIG) where another start would fail again; the units do not
restart them then.
"""

from __future__ import annotations

from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.templates import filled, filled_folder
from fedcompo.engine.superlink import QUIET
from fedcompo.service.certificates import OPERATOR

HOME = "/opt/fedcompo"
"""Where the folders lie on their machines, for units and READMEs."""
CLIENT_DELAY = 60
"""Seconds until a client is restarted: the SuperLink refuses one whose session has not expired,
which after a kill takes 54."""
SERVER_DELAY = 5
BIND_LOW_PORTS = "CAP_NET_BIND_SERVICE"
FIRST_FREE_PORT = 1024
"""A process needs a right to listen on a port below."""


def other_files(deployment: Deployment) -> dict[str, str]:
    """The files beside the server's and the clients', by relative path."""
    script = _registry_script(OPERATOR, OPERATOR, "", deployment)
    return {"README.md": filled("README.md", _values(deployment)), f"{OPERATOR}/registry": script}


def client_files(name: str, deployment: Deployment) -> dict[str, str]:
    """A client's files by relative path."""
    folder = f"{HOME}/{name}"
    unit = _unit(
        f"client {name}",
        folder,
        "start",
        delay=CLIENT_DELAY,
        writable=f"{folder}/state",
        limits="MemoryMax=80%\nNice=5\n",
    )
    return {
        **filled_folder("client", {**_values(deployment), "name": name}),
        "registry": _registry_script(name, "client", "certificates/", deployment),
        f"systemd/fedcompo-{name}.service": unit,
    }


def server_files(deployment: Deployment) -> dict[str, str]:
    """The server's files by relative path."""
    folder = f"{HOME}/server"
    state, results = f"{folder}/state", f"{folder}/state {folder}/runs"
    return {
        **filled_folder("server", _values(deployment)),
        "systemd/fedcompo-superlink.service": _unit(
            "superlink", folder, "start-superlink", writable=results
        ),
        "systemd/fedcompo-proxy.service": _unit(
            "proxy", folder, "start-proxy", writable=state, port=deployment.port
        ),
        "systemd/fedcompo-registry.service": _unit(
            "registry", folder, "start-registry", writable=results, port=deployment.registry_port
        ),
    }


def _values(deployment: Deployment) -> dict[str, object]:
    """The values that most templates take."""
    exports = "\n".join(f"export {key}={value}" for key, value in QUIET.items())
    ipv6 = ":" in deployment.server
    return {
        "home": HOME,
        "shared": filled("shared.sh", {"exports": exports}).rstrip("\n"),
        "server": deployment.server,
        "address": deployment.address,
        "registry": deployment.registry_address,
        "port": deployment.port,
        "superlink_port": deployment.superlink_port,
        "registry_port": deployment.registry_port,
        # Every address of the machine, of the kind that clients use.
        "host": "::" if ipv6 else "0.0.0.0",
        # nginx would not start where a machine has no IPv6.
        "ipv6": "" if ipv6 else "# ",
    }


def _registry_script(name: str, stem: str, certificates: str, deployment: Deployment) -> str:
    """The script that calls the registry; certificates lie in a folder ("name/") or beside it."""
    own = {"name": name, "stem": stem, "certificates": certificates}
    return filled("registry.sh", {**_values(deployment), **own})


def _unit(
    what: str,
    folder: str,
    script: str,
    *,
    writable: str,
    delay: int = SERVER_DELAY,
    limits: str = "",
    port: int = FIRST_FREE_PORT,
) -> str:
    """A systemd unit that starts a script again, ``delay`` seconds after it ends, with few rights.

    It may write to the ``writable`` folders; ``limits`` are further lines of the unit.
    """
    values = {
        "description": f"fedcompo {what}",
        "folder": folder,
        "script": script,
        "delay": delay,
        "limits": limits,
        "capabilities": BIND_LOW_PORTS if port < FIRST_FREE_PORT else "",
        "writable": writable,
    }
    return filled("unit.service", values)
