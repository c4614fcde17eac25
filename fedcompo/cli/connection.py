"""The options of a command that calls a registry's service: its address, and certificates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
