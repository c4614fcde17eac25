"""The command that serves a registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompo.cli import common
from fedcompo.errors import ConfigError
from fedcompo.report.console import say
from fedcompo.report.log import log_to_stderr

if TYPE_CHECKING:
    from fedcompo.service.server import Server


def serve(
    registry: Annotated[Path, typer.Argument(help="Folder of the registry to serve.")],
    *,
    ca: Annotated[Path, typer.Option("--ca", help="Certificate of the authority: ca.crt.")],
    certificate: Annotated[Path, typer.Option(help="The server's own certificate.")],
    key: Annotated[Path, typer.Option(help="The certificate's private key.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 9443,
    compose: Annotated[
        str, typer.Option(metavar="WHO", help="Who may compose: operators, or members too.")
    ] = "operators",
    least: Annotated[
        int,
        typer.Option(min=1, help="How many others a model holds at least, for whom it is opened."),
    ] = 2,
    revoked: Annotated[
        Path | None,
        typer.Option(help="List of certificates that count no more: SHA-256, one a line."),
    ] = None,
    signing_key: common.SigningKeyOption = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Change a limit, such as rate=5; repeatable."),
    ] = None,
    verbose: common.VerboseOption = False,
) -> None:
    """Serve a registry over gRPC, to whoever has a certificate of the authority.

    It ends on Ctrl-C or SIGTERM, when the calls under way have ended. The list of revoked
    certificates is read again whenever it has changed.

    What happened to each call is logged on standard error; every change is in the journal.

    Limits, sizes in bytes and times in seconds: message, contribution, description, tensor, spare
    (room on the disk), stale, rate (calls a second and caller), burst, calls_each, calls, kept (for
    operators), heavy, models, connections, handshake, idle, seconds, grace.
    """
    with common.errors_as_sentences(verbose):
        log_to_stderr()
        from fedcompo.service.access import Audience
        from fedcompo.service.certificates import read_authority, read_credential
        from fedcompo.service.limits import limits_of
        from fedcompo.service.server import Settings
        from fedcompo.service.server import serve as run

        if compose not in list(Audience):
            raise ConfigError(f"`--compose {compose}` is none of {', '.join(Audience)}.")
        settings = Settings(
            registry=registry,
            authority=read_authority(ca),
            credential=read_credential(certificate, key),
            host=host,
            port=port,
            audience=Audience(compose),
            least=least,
            limits=limits_of(limit or ()),
            revoked=revoked,
            signing_key=signing_key,
        )

        def ready(server: Server) -> None:
            say(f"Serving {registry} on {host}:{server.port}; {compose} may compose.")

        run(settings, on_ready=ready)
        say("Ended.")
