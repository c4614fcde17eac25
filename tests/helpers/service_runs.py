"""A registry served on loopback, and clients with certificates to call it with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from registry_builders import contents

from fedcompo.method.contribution import Contribution
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.access import Audience
from fedcompo.service.authority import Authority
from fedcompo.service.certificates import Credential
from fedcompo.service.client import Client
from fedcompo.service.limits import Limits
from fedcompo.service.methods import RegistryStub
from fedcompo.service.server import Server, Settings
from fedcompo.service.transfer import FileEntry

SECONDS = 120.0
"""What a call may take before a test fails."""


@functools.cache
def authority() -> Authority:
    return Authority.create()


def credential(name: str, *, operator: bool = False) -> Credential:
    return _issued(name, operator)


@functools.cache
def _issued(name: str, operator: bool) -> Credential:
    return authority().issue_client(name, operator=operator)


@functools.cache
def server_credential() -> Credential:
    return authority().issue_server(["localhost", "127.0.0.1"])


@contextmanager
def served(
    registry: Registry,
    *,
    limits: Limits | None = None,
    audience: Audience = Audience.MEMBERS,
    least: int = 1,
    revoked: Path | None = None,
) -> Iterator[str]:
    """Serve a registry; yields the address, and leaves nothing running."""
    settings = Settings(
        registry.path,
        authority().credential.certificate,
        server_credential(),
        port=0,
        limits=limits or Limits(grace=5.0),
        audience=audience,
        least=least,
        revoked=revoked,
    )
    with Server(settings) as server:
        yield f"localhost:{server.port}"


def client_of(address: str, name: str, *, operator: bool = False, attempts: int = 8) -> Client:
    return Client(
        address,
        authority().credential.certificate,
        credential(name, operator=operator),
        attempts=attempts,
        seconds=SECONDS,
    )


@contextmanager
def channel(address: str, given: Credential | None) -> Iterator[grpc.Channel]:
    """A connection for calls that no client of ours would make."""
    trusted = authority().credential.certificate
    key, certificate = (given.key, given.certificate) if given else (None, None)
    credentials = grpc.ssl_channel_credentials(trusted, key, certificate)
    with grpc.secure_channel(address, credentials) as opened:
        yield opened


@contextmanager
def stub_of(address: str, name: str, *, operator: bool = False) -> Iterator[RegistryStub]:
    with channel(address, credential(name, operator=operator)) as opened:
        yield RegistryStub(opened)


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    """The status that a call is refused with; streams are read to their end."""
    try:
        answer = call()
        if isinstance(answer, grpc.Call):
            list(answer)
    except grpc.RpcError as error:
        return error.code()
    raise AssertionError("the call was not refused")


def saved(contribution: Contribution, folder: Path) -> Path:
    contribution.save(folder)
    return folder


def offer_of(folder: Path, *, replace: bool = False, **changes: FileEntry) -> Any:
    """What a client announces of a folder; ``changes`` by the stem of a file's name."""
    files = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            entry = changes.get(path.stem, FileEntry.of(path.name, file))
        files.append(wire.File(name=entry.name, size=entry.size, sha256=entry.sha256))
    return wire.PublishRequest(offer=wire.Offer(files=files, replace=replace))


def chunk(file: str, offset: int, data: bytes) -> Any:
    return wire.PublishRequest(chunk=wire.Chunk(file=file, offset=offset, data=data))


def chunks_of(folder: Path) -> list[Any]:
    """All of a folder, a chunk a file."""
    return [chunk(path.name, 0, path.read_bytes()) for path in sorted(folder.iterdir())]


@contextmanager
def unchanged(registry: Registry) -> Iterator[None]:
    """What happens within must leave every byte of the registry as it is."""
    before = contents(registry.path)
    yield
    assert contents(registry.path) == before


def intact(registry: Registry) -> bool:
    return all(finding.holds for finding in verify_registry(registry.path))
