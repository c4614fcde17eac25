"""Certifies keys that were made elsewhere, and certificates anew: approve and renew.

All that is written is public. Several files change together: what they shall hold is written to
``pending.json`` first, and a call that was interrupted after that is completed by the next one on
the same folder. So there is the old state or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedcompo.deployment.plan import Deployment
from fedcompo.errors import ConfigError
from fedcompo.service.authority import AUTHORITY_STEM, Authority, is_issued_by
from fedcompo.service.certificates import (
    CLIENT,
    OPERATOR,
    SERVER,
    Holder,
    key_digest,
    read_certificate,
)
from fedcompo.service.requests import Request, required_key
from fedcompo.storage.files import sync_folder, write_atomically

CERTIFICATES = "certificates"
NODE_KEYS = f"{SERVER}/clients"
PENDING = "pending.json"


@dataclass(frozen=True)
class Issued:
    """A certificate that was issued."""

    certificate: x509.Certificate
    files: tuple[str, ...]
    """What was written, relative to the deployment: the certificate, a client's node key."""
    old: x509.Certificate | None = None
    """The certificate that it replaces, which holds until its end."""

    @property
    def old_key(self) -> str:
        """SHA-256 of the key that was exchanged, as the list ``revoked`` takes it; empty: none."""
        if self.old is None or self.old.public_key() == self.certificate.public_key():
            return ""
        return key_digest(self.old.public_key())


def opened(folder: Path) -> Deployment:
    """Read a deployment's plan, after completing what was interrupted.

    Raises:
        FileFormatError: If the folder is no deployment.
    """
    deployment = Deployment.load(folder)
    if (folder / PENDING).is_file():
        _put(folder, json.loads((folder / PENDING).read_bytes()))
    return deployment


def authority_of(folder: Path) -> Authority:
    """Read the authority of a deployment; raises ``ConfigError`` if it is not there, or ended."""
    place = folder / "authority"
    return Authority.load(place / f"{AUTHORITY_STEM}.crt", place / f"{AUTHORITY_STEM}.key")


def read_requests(
    folder: Path, files: Iterable[Path], renewed: Collection[str] = ()
) -> tuple[Request, ...]:
    """Read requests, and check that they are what the plan foresees; nothing is changed.

    Args:
        folder: The deployment.
        files: Requests.
        renewed: Names of those who may exchange their keys.

    Raises:
        ConfigError: If one was altered; asks for another name, role or host, or with a weak key;
            or if another key has been approved, and the name is not in ``renewed``.
    """
    deployment = opened(folder)
    authority = authority_of(folder)
    requests = tuple(map(Request.read, files))
    names = [request.holder.name for request in requests]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two requests bear one name: {', '.join(names)}. Ask whose is whose.")
    if missing := sorted(set(renewed) - set(names)):
        raise ConfigError(
            f"No request is of {', '.join(missing)}. With --approve, --renew names who may "
            "exchange its keys; without, it renews certificates for the keys that are there."
        )
    for request in requests:
        _require_planned(request, deployment)
        if request.holder.name not in renewed:
            _require_first(folder, request, authority)
    _require_own_node_keys(folder, requests)
    return requests


def approve(folder: Path, requests: Iterable[Request]) -> tuple[Issued, ...]:
    """Certify the keys of requests that were checked, all or none."""
    authority = authority_of(folder)
    return _issue(folder, [granted(authority, r.holder, r.key, r.node_key) for r in requests])


def renew(folder: Path, names: Sequence[str]) -> tuple[Issued, ...]:
    """Issue certificates anew, for the keys that the old ones hold, all or none.

    Args:
        folder: The deployment.
        names: Clients, ``server`` or ``operator``.

    Raises:
        ConfigError: If somebody is not in the plan, or has no certificate of this authority.
    """
    deployment, authority = opened(folder), authority_of(folder)
    asked: list[dict[str, bytes]] = []
    for name in dict.fromkeys(names):
        holder = deployment.holder(name)
        path = folder / place_of(holder)
        if not path.is_file():
            raise ConfigError(
                f"{name} has no certificate yet at {path}: approve its request, which `fedcompo "
                "request-certificate` makes, with --approve."
            )
        old = read_certificate(path)
        if not is_issued_by(old, authority.credential.parsed) or Holder.of(old) != holder:
            raise ConfigError(
                f"{path} is not what this deployment's authority issued for the {holder}. Put the "
                "right one there, or approve a request for a new key."
            )
        asked.append(granted(authority, holder, required_key(old.public_key())))
    return _issue(folder, asked)


def granted(
    authority: Authority, holder: Holder, key: ec.EllipticCurvePublicKey, node_key: bytes = b""
) -> dict[str, bytes]:
    """Certify a key; returns files by their paths in a deployment, the certificate first."""
    files = {place_of(holder): authority.certify(holder, key)}
    if node_key:
        files[f"{NODE_KEYS}/{holder.name}.pub"] = node_key + f" {holder.name}\n".encode()
    return files


def place_of(holder: Holder) -> str:
    """Where a holder's certificate lies in a deployment."""
    folders = {
        SERVER: f"{SERVER}/{CERTIFICATES}",
        OPERATOR: OPERATOR,
        CLIENT: f"clients/{holder.name}/{CERTIFICATES}",
    }
    return f"{folders[holder.role]}/{holder.role}.crt"


def _issue(folder: Path, asked: Sequence[Mapping[str, bytes]]) -> tuple[Issued, ...]:
    """Write what was granted: all of it, also if this is interrupted, or nothing."""
    issued = []
    for files in asked:
        place, content = next(iter(files.items()))
        path = folder / place
        old = read_certificate(path) if path.is_file() else None
        issued.append(Issued(x509.load_pem_x509_certificate(content), tuple(files), old))
    contents = {place: data.decode() for files in asked for place, data in files.items()}
    write_atomically(folder / PENDING, json.dumps(contents).encode())
    _put(folder, contents)
    return tuple(issued)


def _put(folder: Path, contents: Mapping[str, str]) -> None:
    for place, text in contents.items():
        write_atomically(folder / place, text.encode())
    (folder / PENDING).unlink()
    sync_folder(folder)


def _require_planned(request: Request, deployment: Deployment) -> None:
    """Raise ``ConfigError`` unless a request is of somebody who may ask, as the plan has it."""
    planned = deployment.holder(request.holder.name)
    if request.holder != planned or planned.role == OPERATOR:
        same = request.holder == planned
        raise ConfigError(
            f"The request is of the {request.holder}, but "
            f"{'its key is made here' if same else f'the plan has the {planned}'}. Nothing was "
            "changed. Ask who sent it."
        )


def _require_first(folder: Path, request: Request, authority: Authority) -> None:
    """Raise ``ConfigError`` if another key was approved for the holder before."""
    name = request.holder.name
    certificate, node_key = folder / place_of(request.holder), folder / NODE_KEYS / f"{name}.pub"
    other = ""
    if certificate.is_file():
        before = read_certificate(certificate)
        if not is_issued_by(before, authority.credential.parsed):
            raise ConfigError(f"{certificate} is of another authority. Find out how it came there.")
        if before.public_key() != request.key:
            other = f"TLS, until {before.not_valid_after_utc:%Y-%m-%d}"
    if node_key.is_file() and not node_key.read_bytes().startswith(request.node_key + b" "):
        other = other or "the SuperLink"
    if other:
        raise ConfigError(
            f"{name} has been approved with another key ({other}). Nothing was changed. Ask it "
            f"whether this request is its own; if so, add --renew {name}."
        )


def _require_own_node_keys(folder: Path, requests: Iterable[Request]) -> None:
    """Raise ``ConfigError`` if two clients would have one key for the SuperLink."""
    owners = {
        file.read_bytes().rpartition(b" ")[0]: file.stem
        for file in sorted((folder / NODE_KEYS).glob("*.pub"))
    }
    for request in requests:
        name = request.holder.name
        if request.node_key and (owner := owners.setdefault(request.node_key, name)) != name:
            raise ConfigError(
                f"The key for the SuperLink in the request of {name} is that of {owner}. Nothing "
                "was changed. Ask who sent it."
            )
