"""A transfer that broke off goes on where it was, and never mixes two contents."""

from __future__ import annotations

import hashlib
import time

import pytest
from registry_builders import contents, member, registry_of, three_clients
from service_runs import chunk, client_of, intact, offer_of, saved, served, stub_of

from fedcompo.errors import FileFormatError, RegistryLocked
from fedcompo.service import client as client_module
from fedcompo.service import downloads, publishing, transfer
from fedcompo.service import registry_pb2 as wire
from fedcompo.service import retries as attempts
from fedcompo.service.refusals import Code, Refused
from fedcompo.service.transfer import FileEntry, Incoming, identity
from fedcompo.storage.files import CARD, CONTENT


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pico contributions are a few kB; they shall go in many pieces all the same."""
    monkeypatch.setattr(transfer, "PIECE", 512)
    monkeypatch.setattr(attempts, "FIRST_PAUSE", 0.01)


def written_bytes(monkeypatch, module):
    """Count what a side takes in."""
    sizes = []

    class Counted(Incoming):
        def write(self, part):
            super().write(part)
            sizes.append(len(part.data))

    monkeypatch.setattr(module, "Incoming", Counted)
    return sizes


def test_an_upload_goes_on_where_it_broke_off(tmp_path, monkeypatch):
    registry = registry_of(tmp_path / "registry")
    folder = saved(member("ada"), tmp_path / "ada")
    first = (folder / CARD).read_bytes()
    with served(registry) as address:
        with stub_of(address, "ada") as stub:
            parts = [offer_of(folder), chunk(CARD, 0, first), chunk(CONTENT, 0, b"")]
            with pytest.raises(Exception, match="expected byte 0"):
                list(stub.Publish(iter(parts), timeout=60))
        registry.refresh()
        assert not registry.clients
        sizes = []
        monkeypatch.setattr(
            client_module,
            "outgoing",
            lambda *a: (p for p in transfer.outgoing(*a) if sizes.append(len(p.data)) is None),
        )
        with client_of(address, "ada") as client:
            client.publish(folder)
    assert sum(sizes) == (folder / CONTENT).stat().st_size
    registry.refresh()
    assert registry.clients == ("ada",)


def test_a_line_that_keeps_breaking_delays_an_upload_and_loses_nothing(tmp_path, monkeypatch):
    registry = registry_of(tmp_path / "registry")
    folder = saved(member("ada"), tmp_path / "ada")
    left = [3]

    class Breaking(Incoming):
        def write(self, part):
            super().write(part)
            if left[0] and part.file == CONTENT and part.offset >= 512 * (4 - left[0]):
                left[0] -= 1
                raise Refused(Code.UNAVAILABLE, "The line broke.")

    monkeypatch.setattr("fedcompo.service.publishing.Incoming", Breaking)
    sizes = []
    monkeypatch.setattr(publishing, "_chunk", lambda r: counted(sizes, r))
    with served(registry) as address, client_of(address, "ada") as client:
        client.publish(folder)
    assert left == [0]
    assert sum(sizes) == sum(path.stat().st_size for path in folder.iterdir())
    registry.refresh()
    assert registry.clients == ("ada",)
    assert intact(registry)


def counted(sizes, request):
    sizes.append(len(request.chunk.data))
    return request.chunk


def breaking_sender(monkeypatch, times):
    """Let the server's sending break off in the middle, so many times."""
    left, sent = [times], []

    def outgoing(files, entries, come):
        for number, part in enumerate(transfer.outgoing(files, entries, come)):
            if left[0] and number == 3:
                left[0] -= 1
                raise Refused(Code.UNAVAILABLE, "The line broke.")
            sent.append(len(part.data))
            yield part

    monkeypatch.setattr(downloads, "outgoing", outgoing)
    return sent


def test_a_download_goes_on_where_it_broke_off(registry, tmp_path, monkeypatch):
    sent = breaking_sender(monkeypatch, 4)
    folder = registry.path / registry.member("ben").folder
    with served(registry) as address, client_of(address, "ben") as client:
        client.fetch(tmp_path / "own")
    assert contents(tmp_path / "own") == contents(folder)
    assert sum(sent) == sum(path.stat().st_size for path in folder.iterdir())
    assert not (tmp_path / ".own.part").exists()


def test_a_model_is_composed_again_and_only_the_rest_is_sent(registry, tmp_path, monkeypatch):
    sent = breaking_sender(monkeypatch, 2)
    weights = {"ada": 0.5, "cho": 0.5}
    with served(registry) as address, client_of(address, "ben") as client:
        client.compose(tmp_path / "model", weights=weights)
    assert sum(sent) == sum(path.stat().st_size for path in (tmp_path / "model").iterdir())


def test_what_was_changed_meanwhile_comes_anew_not_mixed(registry, tmp_path, monkeypatch):
    breaking_sender(monkeypatch, 1)
    with served(registry) as address, client_of(address, "ben", attempts=1) as client:
        with pytest.raises(Exception, match="The line broke"):
            client.fetch(tmp_path / "own")
        assert (tmp_path / ".own.part").is_dir()
        registry.add(member("ben", seed=9, classes=("owl",)), replacing=True)
        client.fetch(tmp_path / "own")
    assert contents(tmp_path / "own") == contents(registry.path / registry.member("ben").folder)


def test_a_download_with_another_digest_never_takes_its_place(registry, tmp_path, monkeypatch):
    def lying(*arguments):
        for part in transfer.outgoing(*arguments):
            yield wire.Chunk(file=part.file, offset=part.offset, data=bytes(len(part.data)))

    monkeypatch.setattr(downloads, "outgoing", lying)
    with (
        served(registry) as address,
        client_of(address, "ben") as client,
        pytest.raises(FileFormatError, match="altered on the way"),
    ):
        client.fetch(tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("name", "why"), [("../../evil", "announced"), ("state.json", "announced")]
)
def test_a_server_that_sends_other_files_is_not_believed(tmp_path, name, why):
    entries = [FileEntry(name, 1, "0" * 64)]
    files = [wire.File(name=name, size=1, sha256="0" * 64)]
    content = wire.Content(id=identity(entries), files=files)
    with pytest.raises(FileFormatError, match=why):
        transfer.received(
            tmp_path / "own",
            lambda resume: [wire.Download(content=content)],
            client_module.CONTRIBUTION,
        )
    assert not (tmp_path / "evil").exists()


def test_a_call_is_given_up_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "LONGEST_PAUSE", 0.02)
    began = time.monotonic()
    with (
        client_of("localhost:1", "ada", attempts=3) as client,
        pytest.raises(Exception, match="Nothing listens at localhost:1"),
    ):
        client.list()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("offset", [0, 2, 9])
def test_a_piece_goes_where_the_last_one_ended_and_nowhere_else(tmp_path, offset):
    incoming = Incoming(tmp_path, [FileEntry(CARD, 10, "0" * 64)])
    incoming.write(wire.Chunk(file=CARD, offset=0, data=b"x"))
    with pytest.raises(FileFormatError, match="expected byte 1"):
        incoming.write(wire.Chunk(file=CARD, offset=offset, data=b"y"))
    assert (tmp_path / CARD).read_bytes() == b"x"


def test_a_registry_that_is_busy_costs_no_second_transfer(tmp_path, monkeypatch):
    registry = registry_of(tmp_path / "registry")
    folder = saved(member("ada"), tmp_path / "ada")
    sizes, real, busy = [], publishing.Registry.add, [2]

    def adding(self, *sources, **options):
        if busy[0]:
            busy[0] -= 1
            raise RegistryLocked("Another process is changing the registry.")
        real(self, *sources, **options)

    monkeypatch.setattr(publishing.Registry, "add", adding)
    monkeypatch.setattr(publishing, "_chunk", lambda r: counted(sizes, r))
    with served(registry) as address, client_of(address, "ada") as client:
        client.publish(folder)
    assert busy == [0]
    assert sum(sizes) == sum(path.stat().st_size for path in folder.iterdir())


def test_of_what_was_altered_on_the_way_only_that_file_comes_again(tmp_path):
    right = FileEntry(CARD, 1, hashlib.sha256(b"x").hexdigest())
    wrong = FileEntry(CONTENT, 1, hashlib.sha256(b"y").hexdigest())
    incoming = Incoming(tmp_path, [right, wrong])
    for entry in (right, wrong):
        incoming.write(wire.Chunk(file=entry.name, offset=0, data=b"x"))
    with pytest.raises(FileFormatError, match=CONTENT):
        incoming.check()
    again = Incoming(tmp_path, [right, wrong])
    assert again.positions == {CARD: 1, CONTENT: 0}
    again.write(wire.Chunk(file=CONTENT, offset=0, data=b"y"))
    again.check()


def test_an_id_that_is_not_that_of_the_files_is_not_believed(tmp_path):
    """Else two contents under one id could be mixed by a download that goes on."""
    files = [wire.File(name=name, size=1, sha256="0" * 64) for name in (CARD, CONTENT)]
    content = wire.Content(id="1" * 64, files=files)
    with pytest.raises(FileFormatError, match="an id that is not theirs"):
        transfer.received(
            tmp_path / "own",
            lambda resume: [wire.Download(content=content)],
            client_module.CONTRIBUTION,
        )
