"""The command that writes the folders of a federation on separate machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcompo.cli.common import VerboseOption, errors_as_sentences, listed_names
from fedcompo.errors import ConfigError
from fedcompo.report.console import say


def init_deployment(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write; new, unless with --add.")
    ],
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="DNS name or IP address at which clients reach it."),
    ] = None,
    clients: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Names of the clients.")
    ] = None,
    add: Annotated[
        str | None,
        typer.Option(metavar="CLIENT", help="Add this client to what was written before."),
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
    verbose: VerboseOption = False,
) -> None:
    """Write keys, certificates and start files of a federation on separate machines.

    One folder for the server, one a client: copy each to its machine, follow the README in it.
    """
    with errors_as_sentences(verbose):
        if update:
            others = (add, server, clients, port, superlink_port, registry_port)
            if any(option is not None for option in others):
                raise ConfigError("`--update` changes what DIR holds; give no other option.")
            _update(folder)
            return
        if add is not None:
            if server is not None or clients is not None:
                raise ConfigError(
                    "`--add` takes the server from DIR and adds one client; leave out `--server` "
                    "and `--clients`."
                )
            _add(folder, add.strip())
            return
        if server is None or clients is None:
            raise ConfigError(
                "A new deployment needs `--server HOST` and `--clients a,b,c`; one that exists "
                "takes another client with `--add CLIENT`."
            )
        chosen = {"port": port, "superlink_port": superlink_port, "registry_port": registry_port}
        ports = {key: number for key, number in chosen.items() if number is not None}
        _create(folder, server, listed_names(clients), ports)


def _create(folder: Path, server: str, clients: tuple[str, ...], ports: dict[str, int]) -> None:
    from fedcompo.deployment import folders
    from fedcompo.deployment.plan import Deployment
    from fedcompo.engine.launcher import find_app

    deployment = Deployment(server, clients, **ports)
    folders.create(folder, deployment, find_app())
    say(f"Wrote {folder}: a server at {deployment.address} and {len(clients)} clients.")
    say(f"  {folder / 'server'}: copy it to the server")
    for name in clients:
        say(f"  {folder / 'clients' / name}: copy it to the machine of {name}")
    say(f"  {folder / 'operator'}: for who administers the registry")
    say(f"  {folder / 'authority'}: its key certifies all others; keep it off the server")
    say("Each folder's README.md has the commands.")


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


def _add(folder: Path, client: str) -> None:
    from fedcompo.deployment import folders

    folders.add(folder, client)
    listed = folder / "server" / "clients" / f"{client}.pub"
    say(f"Added {client}.")
    say(f"  {folder / 'clients' / client}: copy it to the machine of {client}")
    say(f"  {listed}: copy it to the server's clients/, and run ./register there")
