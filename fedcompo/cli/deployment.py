"""The command that writes the folders of a federation on separate machines, and certifies keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcompo.cli import common
from fedcompo.errors import ConfigError
from fedcompo.report.console import say

if TYPE_CHECKING:
    from fedcompo.deployment.approval import Issued


def init_deployment(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of the deployment; new with --server.")
    ],
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="DNS name or IP address at which clients reach it."),
    ] = None,
    clients: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Names of the clients.")
    ] = None,
    with_keys: Annotated[
        bool,
        typer.Option("--with-keys", help="Make all private keys here, for trials; they travel."),
    ] = False,
    add: Annotated[
        str | None,
        typer.Option(metavar="CLIENT", help="Add this client to what was written before."),
    ] = None,
    approve: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Certify the keys of this request; repeatable."),
    ] = None,
    renew: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Renew the certificates of these clients, of server or operator; with --approve: "
            "let them exchange their keys.",
        ),
    ] = None,
    update: Annotated[
        bool,
        typer.Option("--update", help="Give everyone the installed version; keys stay."),
    ] = False,
    port: Annotated[
        int | None, typer.Option(help="Port at which clients reach the server; default 8443.")
    ] = None,
    superlink_port: Annotated[
        int | None,
        typer.Option(help="Port of the SuperLink on the server's loopback; default 8000."),
    ] = None,
    registry_port: Annotated[
        int | None, typer.Option(help="Port at which clients reach the registry; default 9443.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before approving.")] = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Write the files of a federation on separate machines, and certify the keys made there.

    One folder for the server, one a client: copy each to its machine, follow the README in it.

    Requests of `fedcompo request-certificate` are approved by --approve, all or none.
    """
    with common.errors_as_sentences(verbose):
        ports = {"port": port, "superlink_port": superlink_port, "registry_port": registry_port}
        modes = {"update": update or None, "add": add, "approve": approve, "renew": renew}
        new = {"server": server, "clients": clients, "with_keys": with_keys or None, **ports}
        _require_one_mode(modes, [key for key, v in {**modes, **new}.items() if v is not None])
        if update:
            _update(folder)
        elif add is not None:
            _add(folder, add.strip(), with_keys)
        elif approve or renew is not None:
            _issue(folder, approve or [], common.listed_names(renew), yes)
        elif server is None or clients is None:
            raise ConfigError(
                "A new deployment needs `--server HOST` and `--clients a,b,c`; one that exists "
                "takes another client with `--add CLIENT`, and a request with `--approve FILE`."
            )
        else:
            chosen = {key: number for key, number in ports.items() if number is not None}
            _create(folder, server, common.listed_names(clients), chosen, with_keys)


def _require_one_mode(modes: Collection[str], given: Sequence[str]) -> None:
    together = ("add", "with_keys"), ("approve", "renew")
    extra = [f"`--{option}`" for option in given[1:] if (given[0], option) not in together]
    if extra and given[0] in modes:
        raise ConfigError(
            f"`--{given[0]}` changes what DIR holds; give no other option: leave out "
            f"{', '.join(extra).replace('_', '-')}."
        )


def _create(
    folder: Path, server: str, clients: tuple[str, ...], ports: dict[str, int], with_keys: bool
) -> None:
    from fedcompo.deployment import folders
    from fedcompo.deployment.plan import Deployment
    from fedcompo.engine.launcher import find_app

    deployment = Deployment(server, clients, **ports)
    folders.create(folder, deployment, find_app(), with_keys=with_keys)
    say(f"Wrote {folder}: a server at {deployment.address} and {len(clients)} clients.")
    say(f"  {folder / 'server'}: copy it to the server")
    for name in clients:
        say(f"  {folder / 'clients' / name}: copy it to the machine of {name}")
    say(f"  {folder / 'operator'}: for who administers the registry")
    say(f"  {folder / 'authority'}: its key certifies all others; keep it off the server")
    _say_where_keys_are(folder, with_keys)
    say("Each folder's README.md has the commands.")


def _add(folder: Path, client: str, with_keys: bool) -> None:
    from fedcompo.deployment import folders

    folders.add(folder, client, with_keys=with_keys)
    say(f"Added {client}.")
    say(f"  {folder / 'clients' / client}: copy it to the machine of {client}")
    if with_keys:
        listed = folder / "server" / "clients" / f"{client}.pub"
        say(f"  {listed}: copy it to the server's clients/, and run ./register there")
    _say_where_keys_are(folder, with_keys)


def _say_where_keys_are(folder: Path, with_keys: bool) -> None:
    if with_keys:
        say("Private keys of all lie in these folders, as is good for trials alone. Without")
        say("--with-keys each machine makes its own.")
    else:
        say("No key of server or client is there: run `fedcompo request-certificate` in each")
        say(f"folder on its machine, then `fedcompo init-deployment {folder} --approve FILE` here.")


def _issue(folder: Path, files: list[Path], renewed: tuple[str, ...], yes: bool) -> None:
    from fedcompo.deployment import approval

    if not files:
        _say_issued(folder, approval.renew(folder, renewed))
        return
    requests = approval.read_requests(folder, files, renewed)
    for request in requests:
        say(f"{request.holder}, SHA-256 of the request: {request.fingerprint}")
    if not yes:
        common.confirm("Do the senders read out the same, over the telephone? Approve?")
    _say_issued(folder, approval.approve(folder, requests))


def _say_issued(folder: Path, issued: Iterable[Issued]) -> None:
    """Say what was issued, what to copy and restart, and how to lock out what it replaces."""
    from fedcompo.service.certificates import Holder

    for each in issued:
        holder, (certificate, *node_key) = Holder.of(each.certificate), each.files
        first = "" if each.old else "; then go on with the README.md there"
        say(f"Certified the {holder} until {each.certificate.not_valid_after_utc:%Y-%m-%d}.")
        if holder.role == "server":
            say(f"  {folder / certificate}: copy it to the server's certificates/{first}")
            if each.old:
                say("    Between two runs, start ./start-superlink, ./start-proxy and")
                say("    ./start-registry again.")
        elif holder.role == "operator":
            say(f"  {folder / certificate}: copy it to where the operator works, if not here")
        else:
            then = ", with its new keys, and start it again" if each.old_key else first
            say(f"  {folder / certificate}: copy it to certificates/ of {holder.name}{then}")
        for place in node_key:
            what = "start ./start-superlink again" if each.old else "run ./register"
            say(f"  {folder / place}: copy it to the server's clients/, and {what} there")
        if each.old:
            say(f"  The old one holds until {each.old.not_valid_after_utc:%Y-%m-%d}.")
            if each.old_key and holder.role == "server":
                say("    No list locks it out before: that takes a new deployment.")
            elif each.old_key:
                say("    To lock out its key before, add this line to the server's `revoked`:")
                say(f"    {each.old_key}")


def _update(folder: Path) -> None:
    from fedcompo.deployment import folders
    from fedcompo.engine.launcher import find_app

    deployment = folders.update(folder, find_app())
    say(f"Updated {folder} to the installed version; no key has changed.")
    say(f"  {folder / 'server' / 'app'}: copy it to the server, in place of the one there")
    for name in deployment.clients:
        say(f"  {folder / 'clients' / name}: copy flower/, app.sha256 and library.sha256 to {name}")
    say("Delete what they take the place of first (chmod -R u+w flower && rm -r flower).")
    say("Install the same version of fedcompo on each of these machines, and start again.")
