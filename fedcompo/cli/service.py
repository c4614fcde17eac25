"""A client's commands of a registry's service: `publish`, `fetch`, `members`, `request-removal`."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompo.cli import common
from fedcompo.cli.certificates import warn
from fedcompo.errors import ConfigError
from fedcompo.report.console import print_json, say
from fedcompo.report.newcomers import note_on_newcomers
from fedcompo.report.progress import step
from fedcompo.report.units import listed

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
        """Read the certificates, and warn of those that end; calls connect when they are made."""
        from fedcompo.service.certificates import read_authority
        from fedcompo.service.client import Client
        from fedcompo.service.lifetimes import endings, server_ending

        authority, credential = read_authority(self.ca), self.credential
        client = Client(self.server, authority, credential, insisting=True)
        warn(*endings(authority, credential))
        warn(server_ending(self.server, self.ca, self.certificate, self.key))
        return client


@common.with_options("connection", Connection)
def publish(
    folder: Annotated[Path, typer.Argument(help="Folder that holds your contribution.")],
    *,
    connection: Connection,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of your earlier contribution.")
    ] = False,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Hand in your contribution, wherever it was trained; a broken transfer goes on.

    FOLDER bears the name that your certificate bears. Every byte is checked before it is taken in.
    """
    with common.errors_as_sentences(verbose), connection.open() as client:
        with common.progress(quiet=as_json):
            client.list()  # is it the registry that this machine knows?
            published = client.publish(folder, replace=replace)
            there = client.list()  # from now on, a registry set back to before is refused
        if as_json:
            fields = ("client", "already", "root")
            print_json({field: getattr(published, field) for field in fields})
        elif published.already:
            say(f"{published.client} was there already, with these files. Root {published.root}")
        else:
            say(f"Published {published.client}. Root {published.root}")
            arrivals = [(m.added, m.client, m.classes) for m in there.members]
            if note := note_on_newcomers(arrivals, [published.client]):
                say(f"Note: {note}")


@common.with_options("connection", Connection)
@common.with_options("choice", common.Choice)
def fetch(
    client: Annotated[
        str | None, typer.Argument(help="Whose contribution to fetch; none: a composed model.")
    ] = None,
    *,
    output: common.OutputOption,
    connection: Connection,
    choice: common.Choice,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Fetch a model composed for you, or a contribution; a broken transfer goes on.

    With CLIENT, its contribution, byte for byte: your own, or any if you are an operator.
    """
    with common.errors_as_sentences(verbose), connection.open() as service:
        if client is not None and choice != common.Choice():
            raise ConfigError(
                "A contribution is fetched as it is: name a client, or say what to "
                "compose, not both."
            )
        with common.progress(quiet=as_json):
            service.list()  # is it the registry that this machine knows?
            if client is not None:
                content = service.fetch(output, client)
            else:
                content = service.compose(output, **choice.parsed())
        files = {file.name: file.sha256 for file in content.files}
        reply = {"output": str(output.absolute()), "clients": list(content.clients)}
        if as_json:
            print_json({**reply, "root": content.root, "files": files})
            return
        what = "Contribution of" if client is not None else "Model composed of"
        say(f"{what} {listed(content.clients)}: {output}")


@common.with_options("connection", Connection)
def request_removal(
    client: Annotated[
        str | None, typer.Argument(help="Who shall go; none: you. Others need an operator.")
    ] = None,
    *,
    connection: Connection,
    shard: Annotated[
        int | None,
        typer.Option(
            min=0, help="Only this shard, as your map numbers it; none: all of the client."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File of the receipt; default removal-<client>.json."),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; stands in the receipt.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Leave a registry, at any hour, and keep the signed receipt.

    It is checked, and the public key is written beside it. A client with shards leaves shard by
    shard, each with a receipt of its own; with --shard, the others stay.

    Asked again, when an answer was lost, the service sends the same receipt; that of a shard, with
    --shard.
    """
    with common.errors_as_sentences(verbose), connection.open() as service:
        from fedcompo.data.tasks import shard_name, whole_of
        from fedcompo.service.certificates import common_name

        if as_json and not yes:
            raise ConfigError("With --json nobody is asked: add --yes.")
        name = shard_name(client or common_name(connection.credential.parsed), shard)
        shards = [m.client for m in service.list().members if whole_of(m.client) == name]
        paths = {
            going: output or Path(f"removal-{going}.json")
            for going in sorted({*shards} - {name}) or [name]
        }
        if output and len(paths) > 1:
            raise ConfigError(
                f"{name} has {len(paths)} shards, each with a receipt: leave out --output, or name "
                "one of them with --shard."
            )
        if output and output.suffix == ".pem":
            raise ConfigError(f"{output} will hold the public key; name another file by --output.")
        files = [file for path in paths.values() for file in (path, path.with_suffix(".pem"))]
        if taken := next((file for file in files if file.exists()), None):
            raise ConfigError(
                f"{taken} exists: has {name} left already? Check it by `fedcompo verify`, or name "
                "another file with --output."
            )
        if not yes:
            common.confirm(f"Remove {listed(paths)} from the registry at {connection.server}?")
        for going, path in paths.items():
            _leave(service, going, path, reason, as_json=as_json)


def _leave(service: Client, name: str, path: Path, reason: str, *, as_json: bool) -> None:
    """Have one member removed, and keep the receipt."""
    from fedcompo.registry.signing import fingerprint_of
    from fedcompo.storage.files import write_atomically

    public = path.with_suffix(".pem")
    with common.progress(quiet=as_json):
        step(f"removing {name}")
        receipt = service.remove(name, reason=reason)
    write_atomically(path, receipt.record)
    write_atomically(public, receipt.public_key)
    record = receipt.checked(name)
    if as_json:
        typer.echo(receipt.record.decode(), nl=False)  # byte for byte: it can be kept
    else:
        say(f"Removed {name} on {record.time}. Receipt: {path}")
        key = fingerprint_of(receipt.public_key)
        check = ["fedcompo", "verify", str(path), "--public-key", key]
        say(f"Check it by: {shlex.join(check)}")
    receipt.require_in(service.list())  # from now on, a registry set back to before is refused


@common.with_options("connection", Connection)
def members(
    *,
    connection: Connection,
    verify: Annotated[
        bool, typer.Option("--verify", help="Let the server derive again what it claims.")
    ] = False,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """List who is in a registry that is served.

    With --verify it exits with 1 if a claim does not hold.
    """
    with common.errors_as_sentences(verbose), connection.open() as service:
        from fedcompo.cli import tables
        from fedcompo.registry.signing import fingerprint_of

        with common.progress(quiet=as_json):
            step("asking")
            there = service.list()
            findings = service.verify() if verify else ()
        keys = ("client", "kind", "num_examples", "classes", "added")
        rows = [
            {key: getattr(member, key) for key in keys} | {"classes": list(member.classes)}
            for member in there.members
        ]
        if as_json:
            reply = {"root": there.root, "backbone": there.base, "members": rows}
            print_json(reply | ({"findings": [asdict(f) for f in findings]} if verify else {}))
        else:
            key = fingerprint_of(there.public_key)
            tables.print_members(connection.server, there.root, rows, key=key)
            if verify:
                tables.print_findings(findings)
        if any(finding.holds is False for finding in findings):
            raise typer.Exit(1)
