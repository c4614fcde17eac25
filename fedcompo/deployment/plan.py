"""The plan of a deployment: its clients, and the server's address and ports."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedcompo.data.tasks import check_whole
from fedcompo.errors import ConfigError, FedcompoError, FileFormatError
from fedcompo.names import address, check_client_name, check_distinct
from fedcompo.service.certificates import CLIENT, OPERATOR, SERVER, Holder, check_host
from fedcompo.storage.files import write_atomically

FILE = "deployment.json"
PORT = 8443
"""Where clients reach the server."""
SUPERLINK_PORT = 8000
"""Where, on the server's loopback, Flower's SuperLink listens."""
REGISTRY_PORT = 9443
"""Where clients reach the registry, to leave or to fetch a model."""
LOOPBACK = ("localhost", "127.0.0.1")
"""Where the SuperLink itself listens; the server's certificate must name that, too."""
PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)


@dataclass(frozen=True)
class Deployment:
    """A server and its clients."""

    server: str
    """DNS name or IP address under which clients reach the server."""
    clients: tuple[str, ...]
    port: int = PORT
    superlink_port: int = SUPERLINK_PORT
    registry_port: int = REGISTRY_PORT

    def __post_init__(self) -> None:
        """Check ports and names.

        Raises:
            ConfigError: If the server is no host; if a port is not valid, or used twice; if a name
                occurs twice, or cannot name a service.
            ContributionError: If a name cannot be a client's, or resembles another.
        """
        ports = (self.port, self.superlink_port, self.registry_port)
        check_host(self.server)
        for port in ports:
            if not 0 < int(port) == port < 65536:
                raise ConfigError(f"{port} is no port; expected 1 to 65535.")
        if len(set(ports)) < len(ports):
            raise ConfigError(
                f"Of the ports {ports} of proxy, SuperLink and registry, two cannot share one. "
                "Choose three."
            )
        if not self.clients:
            raise ConfigError("A deployment needs a client. Name one, such as --clients a,b,c.")
        for position, name in enumerate(self.clients):
            check_whole(check_client_name(name))
            if not PLAIN.fullmatch(name):
                raise ConfigError(
                    f"{name!r} cannot name a service: use the letters a to z, digits, hyphens, "
                    "underscores and dots, without spaces. What it names its folder of images is "
                    "its own affair."
                )
            if name in (SERVER, OPERATOR):
                raise ConfigError(f"{name!r} is not free to name a client; choose another name.")
            if name in self.clients[:position]:
                raise ConfigError(f"The client {name!r} is named twice. Name each client once.")
            check_distinct(name, self.clients[:position])

    @property
    def address(self) -> str:
        """Host and port at which clients reach the server."""
        return address(self.server, self.port)

    @property
    def registry_address(self) -> str:
        """Host and port at which clients reach the registry."""
        return address(self.server, self.registry_port)

    @property
    def holders(self) -> dict[str, Holder]:
        """Who gets a certificate, by name: the server, the operator, the clients."""
        return {
            SERVER: server_holder(self.server),
            OPERATOR: Holder(OPERATOR, OPERATOR),
            **{name: Holder(name, CLIENT) for name in self.clients},
        }

    def holder(self, name: str) -> Holder:
        """Who bears this name in the plan; raises ``ConfigError`` if nobody does."""
        if name not in self.holders:
            raise ConfigError(
                f"{name!r} is not in the plan; it has {', '.join(self.holders)}. `--add` adds a "
                "client."
            )
        return self.holders[name]

    def with_client(self, name: str) -> Deployment:
        """The same deployment with one more client; raises ``ConfigError`` if it is there."""
        if name in self.clients:
            raise ConfigError(f"The client {name!r} is in the deployment already.")
        return replace(self, clients=(*self.clients, name))

    def save(self, folder: Path) -> None:
        """Write ``deployment.json``."""
        write_atomically(folder / FILE, f"{json.dumps(asdict(self), indent=2)}\n".encode())

    @classmethod
    def load(cls, folder: Path) -> Deployment:
        """Read what :meth:`save` wrote.

        Raises:
            FileFormatError: If there is no such file, or it holds something else.
        """
        file = folder / FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**values, "clients": tuple(values["clients"])})
        except FedcompoError as error:
            raise FileFormatError(
                f"{file} cannot be used: {error} What runs goes on; to change it, make a "
                "new deployment with other names."
            ) from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FileFormatError(
                f"{folder} is no deployment: {file} cannot be read ({error}). Make one with "
                "`fedcompo init-deployment DIR --server HOST --clients a,b,c`."
            ) from error


def server_holder(*hosts: str) -> Holder:
    """The holder of a server's certificate, which is reached under these hosts and on loopback."""
    return Holder.server((*hosts, *LOOPBACK))
