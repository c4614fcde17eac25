"""Writes a deployment: everything at once, one more client, or another version of the app.

A folder is written beside its place and renamed when it is complete. An interrupted call leaves
nothing that looks like a deployment.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from fedcompo.deployment import given_app
from fedcompo.deployment.approval import CERTIFICATES, authority_of, granted, opened, place_of
from fedcompo.deployment.contents import client_files, other_files, server_files
from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.templates import write_files
from fedcompo.errors import ConfigError
from fedcompo.service.authority import AUTHORITY_STEM, Authority
from fedcompo.service.certificates import OPERATOR, SERVER, Holder
from fedcompo.service.requests import prepare
from fedcompo.storage.files import completed, is_free, write_atomically

OWNER_ALONE = 0o700


def create(folder: Path, deployment: Deployment, app: Path, *, with_keys: bool = False) -> None:
    """Write all folders of a federation on separate machines.

    Private keys of the authority and of the operator are made here, because they are used here.

    Args:
        folder: Folder to write to; must not exist, or be empty.
        deployment: Server and clients.
        app: Folder of the Flower app; see :func:`fedcompo.engine.launcher.find_app`.
        with_keys: Make the keys of server and clients, too, and certify them: for trials.

    Raises:
        ConfigError: If the folder holds something, or the server's name is no host.
        LaunchError: If Flower cannot bundle the app.
    """
    if not is_free(folder):
        raise ConfigError(
            f"{folder} exists and holds something; nothing was changed. Name a new folder, or add "
            f"a client with `fedcompo init-deployment {folder} --add CLIENT`."
        )
    authority = Authority.create()
    with completed(folder, OWNER_ALONE) as draft:
        authority.save(draft / "authority")
        _copy_authority(draft, draft / OPERATOR)
        _write_server(draft, deployment, app)
        given_app.give(draft / "server" / "app", draft / "given")
        for name in deployment.clients:
            _write_client(draft, name, deployment)
        for name in deployment.holders if with_keys else (OPERATOR,):
            _certify(draft, deployment.holders[name], authority)
        write_files(draft, other_files(deployment))
        deployment.save(draft)


def add(folder: Path, name: str, *, with_keys: bool = False) -> None:
    """Add a client to a deployment; the files of the others stay as they are.

    Args:
        folder: What :func:`create` wrote.
        name: Of the client.
        with_keys: Make its keys, too, and certify them: for trials.

    Raises:
        FileFormatError: If the folder is no deployment.
        ConfigError: If the client is already there.
        ContributionError: If the name cannot be a client's, or resembles another.
    """
    deployment = opened(folder).with_client(name)
    authority = authority_of(folder)
    _write_client(folder, name, deployment)
    if with_keys:
        _certify(folder, deployment.holders[name], authority)
    deployment.save(folder)


def update(folder: Path, app: Path) -> Deployment:
    """Give server and clients another version of the app; keys, names and settings stay.

    Interrupted, it is repeated: a client whose files do not belong together does not start. What
    an earlier version wrote and this one does not, such as Docker Compose files, is left alone.

    Args:
        folder: What :func:`create` wrote.
        app: Folder of the Flower app, of the version that is installed.

    Returns:
        The deployment.

    Raises:
        FileFormatError: If the folder is no deployment.
        LaunchError: If Flower cannot bundle the app.
    """
    deployment = opened(folder)
    with tempfile.TemporaryDirectory(prefix=".update.", dir=folder) as scratch:
        fresh, given = Path(scratch) / "app", Path(scratch) / "given"
        given_app.copy_app(app, fresh)
        given.mkdir()
        given_app.give(fresh, given)
        targets = [folder / "given", *(folder / "clients" / name for name in deployment.clients)]
        for target in targets:
            for part in sorted(given.iterdir()):
                _put(part, target / part.name)
        _put(fresh, folder / "server" / "app")
    return deployment


def _put(source: Path, target: Path) -> None:
    """Replace a file or a folder by a copy of another."""
    if source.is_dir():
        draft, old = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
        for rest in (draft, old):
            _delete(rest)
        shutil.copytree(source, draft)
        if target.exists():
            target.replace(old)
        draft.replace(target)
        _delete(old)
    else:
        write_atomically(target, source.read_bytes())


def _delete(folder: Path) -> None:
    """Delete a folder, also one that a start script has made read-only."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o700)
    if folder.exists():
        shutil.rmtree(folder)


def _write_server(folder: Path, deployment: Deployment, app: Path) -> None:
    server = folder / SERVER
    _write_certificates(folder, server, deployment.holders[SERVER])
    given_app.copy_app(app, server / "app")
    for part in ("clients", "state", "runs"):
        (server / part).mkdir()
    write_files(server, server_files(deployment))


def _write_client(folder: Path, name: str, deployment: Deployment) -> None:
    with completed(folder / "clients" / name, OWNER_ALONE) as client:
        shutil.copytree(folder / "given", client, dirs_exist_ok=True)
        _write_certificates(folder, client, deployment.holders[name])
        (client / "state").mkdir()
        write_files(client, client_files(name, deployment))


def _write_certificates(folder: Path, target: Path, holder: Holder) -> None:
    """Write the authority's certificate, and for whom keys are to be made there."""
    _copy_authority(folder, target / CERTIFICATES)
    holder.save(target / CERTIFICATES)


def _certify(folder: Path, holder: Holder, authority: Authority) -> None:
    """Make a holder's keys in its folder, and certify them."""
    request = prepare((folder / place_of(holder)).parent, holder)
    for place, content in granted(authority, holder, request.key, request.node_key).items():
        (folder / place).write_bytes(content)


def _copy_authority(folder: Path, target: Path) -> None:
    """Copy the authority's certificate, never its key."""
    target.mkdir(parents=True)
    certificate = f"{AUTHORITY_STEM}.crt"
    shutil.copyfile(folder / "authority" / certificate, target / certificate)
