"""The options of a command that calls a registry's service: its address, and certificates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from fedcompo.service.certificates import Credential
    from fedcompo.service.client import Client


@dataclass(frozen=True)
class Connection:
    """Where a service listens, and the certificate to call it with."""

    server: Annotated[
        str,
        typer.Option(
            envvar="FEDCOMPO_SERVER", metavar="HOST:PORT", help="Where the service listens."
        ),
    ]
    ca: Annotated[
        Path, typer.Option(envvar="FEDCOMPO_CA", help="Certificate of the authority: ca.crt.")
    ]
    certificate: Annotated[
        Path, typer.Option(envvar="FEDCOMPO_CERTIFICATE", help="Your own; it names you.")
    ]
    key: Annotated[Path, typer.Option(envvar="FEDCOMPO_KEY", help="The certificate's private key.")]

    @property
    def credential(self) -> Credential:
        """The caller's certificate and key."""
        from fedcompo.service.certificates import read_credential

        return read_credential(self.certificate, self.key)

    def open(self) -> Client:
        """Read the certificates; the connection is made at the first call."""
        from fedcompo.service.certificates import read_authority
        from fedcompo.service.client import Client

        return Client(self.server, read_authority(self.ca), self.credential)


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a :class:`Connection`, in place of its parameter of that type.

    Typer reads the options of a command from its signature.
    """
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind)
        for name, kind in get_type_hints(Connection, include_extras=True).items()
    ]

    @functools.wraps(command)
    def connecting(**values: Any) -> None:
        connection = Connection(**{option.name: values.pop(option.name) for option in options})
        command(connection=connection, **values)

    own = signature(command, eval_str=True)
    parameters = list(own.parameters.values())
    at = list(own.parameters).index("connection")
    parameters[at : at + 1] = options
    connecting.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    connecting.__annotations__ = {each.name: each.annotation for each in parameters}
    return connecting
