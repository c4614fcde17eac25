"""The service as a whole: how it starts, what it says of itself, how it fails and how it ends."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from registry_builders import member, registry_of, three_clients
from service_runs import (
    channel,
    chunks_of,
    code_of,
    credential,
    offer_of,
    saved,
    served,
    stub_of,
    unchanged,
)

from fedcompo.errors import RegistryError, ServiceError
from fedcompo.service import downloads, publishing
from fedcompo.service import members as answers
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.access import Audience
from fedcompo.service.limits import Limits
from fedcompo.service.refusals import UNFORESEEN, Code
from fedcompo.service.server import NAME, Server, Settings

SERVING = health_pb2.HealthCheckResponse.SERVING
PROTO = Path(wire.__file__).with_name("registry.proto")


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


def test_it_says_that_it_is_well(registry):
    with served(registry) as address, channel(address, credential("ada")) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        for service in ("", NAME):
            request = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(request, timeout=60).status == SERVING
        watched = stub.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=60)
        assert next(watched).status == SERVING
        began = time.monotonic()
    assert time.monotonic() - began < 30  # a watcher does not keep it from ending


def test_the_generated_code_is_that_of_the_proto():
    """Each message and field of the text, with its number; nothing is generated at run time."""
    described = {}
    for line in PROTO.read_text().splitlines():
        code = line.partition("//")[0].strip()
        if code.startswith("message "):
            message = code.split()[1]
            described[message] = {}
        elif "=" in code and code.endswith(";") and not code.startswith("syntax"):
            left, _, number = code.rstrip(";").partition("=")
            described[message][left.split()[-1]] = int(number)
    generated = {
        name: {field.name: field.number for field in message.fields}
        for name, message in wire.DESCRIPTOR.message_types_by_name.items()
    }
    assert generated == described


def test_what_nobody_foresaw_is_logged_here_and_not_told_there(registry, monkeypatch, caplog):
    def failing(self, path):
        raise RuntimeError("the password is hunter2")

    with served(registry) as address, stub_of(address, "ada") as stub, unchanged(registry):
        for module in (answers, downloads, publishing):
            monkeypatch.setattr(module.Registry, "__init__", failing)
        calls = {
            "List": lambda: stub.List(wire.ListRequest(), timeout=60),
            "Compose": lambda: list(stub.Compose(wire.ComposeRequest(), timeout=60)),
        }
        for call in calls.values():
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is Code.INTERNAL
            assert caught.value.details() == UNFORESEEN
    assert "hunter2" in caplog.text


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.ENOSPC, Code.RESOURCE_EXHAUSTED, "No space left on device. Try again later"),
        (errno.EMFILE, Code.RESOURCE_EXHAUSTED, "Too many open files. Try again later"),
        (errno.EROFS, Code.FAILED_PRECONDITION, "Read-only file system. Tell its operator"),
        (errno.EACCES, Code.FAILED_PRECONDITION, "Permission denied. Tell its operator"),
    ],
)
def test_what_is_wrong_with_the_machine_is_said(
    registry, monkeypatch, tmp_path, number, code, said
):
    def full(self, part):
        raise OSError(number, os.strerror(number), "/somewhere/secret")

    monkeypatch.setattr("fedcompo.service.transfer.Incoming.write", full)
    folder = saved(member("dee", seed=8, classes=("emu",)), tmp_path / "dee")
    parts = [offer_of(folder), *chunks_of(folder)]
    with (
        served(registry) as address,
        stub_of(address, "dee") as stub,
        unchanged(registry),
        pytest.raises(grpc.RpcError) as caught,
    ):
        list(stub.Publish(iter(parts), timeout=60))
    assert caught.value.code() is code
    assert said in caught.value.details()
    assert "secret" not in caught.value.details()


def test_what_cannot_be_opened_for_want_of_room_is_no_damage(registry, monkeypatch):
    def full(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with served(registry) as address, stub_of(address, "ada") as stub:
        monkeypatch.setattr(Path, "read_bytes", full)
        assert code_of(lambda: stub.List(wire.ListRequest(), timeout=60)) is Code.RESOURCE_EXHAUSTED


def test_a_file_that_grows_too_large_for_the_system_is_said(registry, tmp_path):
    folder = saved(member("dee", seed=8, classes=("emu",)), tmp_path / "dee")
    parts = [offer_of(folder), *chunks_of(folder)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with served(registry) as address, stub_of(address, "dee") as stub, unchanged(registry):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            code = code_of(lambda: stub.Publish(iter(parts), timeout=60))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code is Code.RESOURCE_EXHAUSTED


def test_refusals_tell_nothing_of_the_machine(tmp_path):
    registry = registry_of(tmp_path / "registry", member("ada"))
    folder = saved(member("dee", seed=8, classes=("emu",)), tmp_path / "dee")
    card = folder / "card.json"
    card.write_text(card.read_text().replace("emu", "gnu"))
    parts = [offer_of(folder), *chunks_of(folder)]
    with (
        served(registry) as address,
        stub_of(address, "dee") as stub,
        pytest.raises(grpc.RpcError) as caught,
    ):
        list(stub.Publish(iter(parts), timeout=60))
    assert "disagree" in caught.value.details()
    assert str(tmp_path) not in caught.value.details()


def test_at_the_end_calls_under_way_are_answered_and_no_new_ones_taken(registry, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    real = downloads.publish

    def slow(output, selection):
        begun.set()
        go_on.wait(60)
        return real(output, selection)

    monkeypatch.setattr(downloads, "publish", slow)
    with stub_and_server(registry) as (stub, server):
        call = stub.Compose(wire.ComposeRequest(), timeout=120)
        assert begun.wait(60)
        ending = threading.Thread(target=server.stop)
        ending.start()
        time.sleep(0.2)
        late = code_of(lambda: stub.List(wire.ListRequest(), timeout=5))
        assert late in (Code.UNAVAILABLE, Code.CANCELLED)
        go_on.set()
        assert len(list(call)) > 1
        ending.join(60)
        assert not ending.is_alive()


class stub_and_server:  # noqa: N801
    """A server that the test stops by itself."""

    def __init__(self, registry):
        from service_runs import authority, server_credential

        self.server = Server(
            Settings(
                registry.path,
                authority().credential.certificate,
                server_credential(),
                port=0,
                audience=Audience.MEMBERS,
                limits=Limits(grace=15.0),
            )
        )

    def __enter__(self):
        self.server.start()
        self.stub = stub_of(f"localhost:{self.server.port}", "ada")
        return self.stub.__enter__(), self.server

    def __exit__(self, *error):
        self.stub.__exit__(*error)
        self.server.stop()


def test_a_port_that_is_taken_is_an_error(registry):
    from service_runs import authority, server_credential

    with served(registry) as address:
        settings = Settings(
            registry.path,
            authority().credential.certificate,
            server_credential(),
            port=int(address.rpartition(":")[2]),
        )
        with pytest.raises(ServiceError, match="cannot listen"):
            Server(settings)


def test_there_must_be_a_registry(tmp_path):
    with pytest.raises(RegistryError, match="no registry"):
        Server(Settings(tmp_path, b"", credential("ada"), port=0))


def test_what_a_killed_service_left_is_deleted_when_it_is_old(registry, tmp_path):
    import os

    models = tmp_path / ".registry.service" / "models"
    for name in ("old", "new"):
        (models / name).mkdir(parents=True)
    os.utime(models / "old", (0, 0))
    with served(registry):
        pass
    assert [path.name for path in models.iterdir()] == ["new"]
