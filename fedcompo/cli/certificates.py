"""Commands for the holder of a certificate: ask for one, and see how long it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcompo.cli.common import VerboseOption, errors_as_sentences
from fedcompo.errors import ConfigError
from fedcompo.report.console import PlainConsole, say

CERTIFICATES = Path("certificates")
"""Folder of keys and certificates in the folder of a client or of the server."""


def request_certificate(
    name: Annotated[
        str | None,
        typer.Option(help="Name of the client; default: whose folder of a deployment this is."),
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option(help="For a server instead: host under which it is reached; repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the keys; default: certificates."),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Make private keys where they are used, and a request for a certificate to send.

    The keys stay. Keys that are there already are kept, and asked for again.
    """
    with errors_as_sentences(verbose):
        from fedcompo.deployment.plan import server_holder
        from fedcompo.service.certificates import Holder
        from fedcompo.service.requests import prepare, save

        if (name is not None or host) and output is None:
            raise ConfigError("Say by `-o DIR` where the keys are to lie.")
        if name is not None and host:
            raise ConfigError("`--name` is of a client, `--host` of a server: give one of them.")
        if host:
            holder = server_holder(*host)
        else:
            holder = Holder(name) if name is not None else Holder.load(CERTIFICATES)
        folder = output or CERTIFICATES
        request = prepare(folder, holder)
        path = save(request, folder)
        say(f"Private keys of the {holder}: in {folder}; they stay there.")
        say(f"Send this file to who keeps the authority: {path}")
        say(f"Tell its SHA-256 over another channel, such as the telephone: {request.fingerprint}")
        say(f"Put the certificate that comes back, {holder.role}.crt, in {folder}.")


def check_certificate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of ca.crt, certificates and keys.")
    ] = CERTIFICATES,
    verbose: VerboseOption = False,
) -> None:
    """Check the certificates in a folder: whose they are, by whom, and how long they hold.

    It warns sixty days before one ends, and exits with 2 if one has ended or is missing.
    """
    with errors_as_sentences(verbose):
        from cryptography import x509

        from fedcompo.service.authority import is_issued_by
        from fedcompo.service.certificates import read_authority, read_credential
        from fedcompo.service.lifetimes import endings

        authority = read_authority(folder / "ca.crt")
        trusted = x509.load_pem_x509_certificates(authority)
        own = sorted(path for path in folder.glob("*.crt") if path.name != "ca.crt")
        if not own:
            raise ConfigError(
                f"{folder} holds no certificate yet. Run `fedcompo request-certificate`, send the "
                "request, and put the certificate that comes back there."
            )
        for path in own:
            credential = read_credential(path, path.with_suffix(".key"))
            certificate = credential.parsed
            if not any(is_issued_by(certificate, one) for one in trusted):
                raise ConfigError(
                    f"{path} is of another authority than {folder / 'ca.crt'}. Ask for the "
                    "certificate of this deployment."
                )
            warn(*endings(authority, credential))
            say(f"{path} holds until {certificate.not_valid_after_utc:%Y-%m-%d}.")


def warn(*sentences: str) -> None:
    """Print warnings on standard error; empty ones are none."""
    for sentence in filter(None, sentences):
        say(f"Warning: {sentence}", PlainConsole(stderr=True))
