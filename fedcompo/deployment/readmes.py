"""What people read beside the files: which folder goes where, and the commands there."""

from __future__ import annotations

from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.templates import fill
from fedcompo.deployment.units import HOME

TOP = """\
# A federation at @{address}

| folder | goes to | holds |
|---|---|---|
| `server/` | the server | its certificate and key, the clients' public keys, start scripts |
| `clients/NAME/` | that client | its keys, the app it runs, start script, settings |
| `operator/` | who administers the registry | certificate, key, and the script `registry` |
| `authority/` | **nowhere** | the key that certifies all others; keep it off the server |
| `given/` | nowhere | the app that clients are given, for those who come later |

Private keys (`*.key`, `supernode`) are readable by their owner alone: copy with `scp -p` or
`rsync -a`.

Another version of fedcompo, once it is installed where this folder lies:

    fedcompo init-deployment . --update

Then copy `server/app/` to the server, and `flower/`, `app.sha256` and `library.sha256` of each
client to it, install that version there, and start everything again. No key changes. Delete first
what they take the place of (`rm -r app`; `chmod -R u+w flower && rm -r flower`): copied over it,
the old version would stay beside the new one, and `./start` refuse both.

A client that comes later, from where this folder lies:

    fedcompo init-deployment . --add NAME

Then copy `clients/NAME/` to it and `server/clients/NAME.pub` to the server's `clients/`, and run
`./register` there. Nobody else notices. A client that leaves: delete its `.pub` on the server and
start the SuperLink again, put its certificate on the server's list `revoked`, and take out what it
contributed with `operator/registry request-removal NAME`.
"""

SERVER = """\
# The server

Copy this folder to @{home}/server on the machine that clients reach as `@{server}`, TCP port
@{port}. There, as an ordinary user, with Python and nginx installed (PROJECT is a checkout of
fedcompo, or its wheel):

    python3 -m venv venv && venv/bin/pip install PROJECT
    ./start-superlink &           # registers the clients of clients/
    ./start-proxy &
    ./run SETTINGS.toml           # once the clients are there
    ./start-registry runs/SETTINGS/registry &      # clients fetch models there, and leave

Or with systemd, as root, after `useradd --system fedcompo` and `chown -R fedcompo: .` in this
folder:

    systemctl enable --now @{home}/server/systemd/fedcompo-superlink.service
    systemctl enable --now @{home}/server/systemd/fedcompo-proxy.service
    sudo -u fedcompo ./run SETTINGS.toml
    systemctl enable --now @{home}/server/systemd/fedcompo-registry.service

(That unit serves `runs/default/registry`: let its `ExecStart=` name another.)

Or with Docker: `PROJECT=/path/of/fedcompo docker compose up -d`.

- The SuperLink listens on loopback alone, because whoever reaches it may start runs: every account
  of this machine can. Give nobody else one.
- The proxy passes on `/v1/fleet/`, what clients need, and nothing else.
- The registry's service listens on TCP port @{registry_port}. Whose certificate stands in the file
  `revoked` is let in no more; `revoked` says how.
- What is in flight stays in memory, not in a database: after a restart clients are registered
  again. A run that was interrupted goes on with `resume = true` in its SETTINGS.toml, and `output`
  the folder that it named.
- No telemetry, no look for updates, no installation at run time: see `environment`.
"""

CLIENT = """\
# Client @{name}

Copy this folder to @{home}/@{name} on the client's machine. Nothing needs to reach that machine
from outside; it must reach @{address}, and @{registry} to talk to the
registry. There, as an ordinary user, not root (PROJECT is a checkout of fedcompo, or its wheel):

    python3 -m venv venv && venv/bin/pip install PROJECT
    vi client.conf                # where the images are, device, limits; PORT if another client of
                                  # this federation is on the same machine
    ./start                       # stays until it is ended

Or with systemd, as root, after `useradd --system fedcompo` and `chown -R fedcompo: .` in this
folder:

    systemctl enable --now @{home}/@{name}/systemd/fedcompo-@{name}.service

Or with Docker: `PROJECT=/path/of/fedcompo docker compose --env-file client.conf up -d`.

To see who is in the registry, fetch a model, or leave at any hour, with a signed receipt:

    ./registry members
    ./registry fetch -o MODEL
    ./registry request-removal

- `./start` runs the app in `flower/apps` alone. It compares it and the installed library with
  `app.sha256` and `library.sha256`, and sees to it that Flower cannot unpack another: code that the
  server sends is not run. A run of another version fails, and says that it may not write there.
  Compare with who wrote this folder, over the telephone:

      sha256sum app.sha256 library.sha256

- A client that was killed is refused for about a minute ("code 2004"), until its session has
  expired, as is one that is connected already. systemd waits that long.
- Private keys: `certificates/supernode` (with the SuperLink), `certificates/client.key` (with the
  registry). Lost one? Ask for a new folder under another name.
- No telemetry, no look for updates, no installation at run time: see `start`.
"""


def top_readme(deployment: Deployment) -> dict[str, str]:
    """The README of the whole, by file name."""
    return {"README.md": fill(TOP, address=deployment.address)}


def server_readme(deployment: Deployment) -> dict[str, str]:
    """The README of the server's folder, by file name."""
    text = fill(
        SERVER,
        home=HOME,
        server=deployment.server,
        port=deployment.port,
        registry_port=deployment.registry_port,
    )
    return {"README.md": text}


def client_readme(name: str, deployment: Deployment) -> dict[str, str]:
    """The README of a client's folder, by file name."""
    text = fill(
        CLIENT,
        home=HOME,
        name=name,
        address=deployment.address,
        registry=deployment.registry_address,
    )
    return {"README.md": text}
