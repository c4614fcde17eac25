"""What no honest client sends: refused, logged, and nothing changed by it."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from registry_builders import member, three_clients
from service_runs import (
    channel,
    chunk,
    chunks_of,
    code_of,
    credential,
    offer_of,
    saved,
    served,
    stub_of,
    unchanged,
)

from fedcompo.service import registry_pb2 as wire
from fedcompo.service.limits import Limits
from fedcompo.service.refusals import Code
from fedcompo.service.server import NAME
from fedcompo.service.transfer import LARGEST_PIECE, FileEntry
from fedcompo.storage.files import CARD, CONTENT, FISHER

METHODS = {m.name: m.input_type for m in wire.DESCRIPTOR.services_by_name["Registry"].methods}
STREAMED = "Publish"
WRONG = "0" * 64


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


@pytest.fixture
def folder(tmp_path):
    """A contribution of dee, who is not in the registry."""
    return saved(member("dee", seed=8, classes=("emu",), with_fisher=True), tmp_path / "dee")


def as_sent(opened, method, data):
    """Call a method with bytes in place of a message."""
    path = f"/{NAME}/{method}"
    if method == STREAMED:
        return opened.stream_stream(path)(iter([data]), timeout=60)
    many = method in ("Fetch", "Compose")
    return (opened.unary_stream if many else opened.unary_unary)(path)(data, timeout=60)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_that_are_no_message_are_refused_and_logged(registry, method, caplog):
    junk = [b"\xff" * 20, b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"]
    if method in ("List", "Verify"):
        junk = junk[:3]  # the last is well formed where it is no text
    with (
        served(registry) as address,
        channel(address, credential("ada")) as opened,
        unchanged(registry),
    ):
        for data in junk:
            assert code_of(lambda d=data: as_sent(opened, method, d)) is Code.INVALID_ARGUMENT
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("refused")]
    assert len(lines) == len(junk)
    assert all(f"/{NAME}/{method}" in line and "ada" in line for line in lines)


def test_random_bytes_never_change_anything_nor_break_the_service(registry):
    draw = random.Random(0)
    whole = wire.RemoveRequest(client="ben", reason="r" * 20).SerializeToString()
    with (
        served(registry, limits=Limits(rate=1e6, burst=10**6)) as address,
        channel(address, credential("eve")) as opened,
        unchanged(registry),
    ):
        for _ in range(60):
            bent = bytearray(whole)
            for _ in range(draw.randint(1, 4)):
                bent[draw.randrange(len(bent))] = draw.randrange(256)
            for method in METHODS.keys() - {"List", "Verify", "Compose"}:
                code = code_of(lambda m=method, b=bytes(bent): as_sent(opened, m, b))
                assert code in (
                    Code.INVALID_ARGUMENT,
                    Code.PERMISSION_DENIED,
                    Code.NOT_FOUND,
                )


def entry(name, size=10, sha256=WRONG):
    return FileEntry(name, size, sha256)


@pytest.mark.parametrize(
    "files",
    [
        [],
        [entry(CONTENT)],
        [entry(CONTENT), entry(CARD), entry("../../state.json")],
        [entry(CONTENT), entry(CARD), entry("/etc/passwd")],
        [entry(CONTENT), entry(CARD), entry(f"x/{FISHER}")],
        [entry(CONTENT), entry(CARD), entry(f"{FISHER}\0")],
        [entry(CONTENT), entry(CARD), entry(CARD)],
        [entry(CONTENT), entry(CARD, size=0)],
        [entry(CONTENT), entry(CARD, size=1 << 40)],
        [entry(CONTENT), entry(CARD, sha256="")],
        [entry(CONTENT), entry(CARD, sha256="../" * 21 + "a")],
        [entry(CONTENT), entry(CARD, sha256="A" * 64)],
        [entry(CONTENT), *(entry(f"{i}") for i in range(1000))],
    ],
    ids=str,
)
def test_an_offer_of_other_files_is_refused(registry, tmp_path, files):
    sent = [wire.File(name=f.name, size=f.size, sha256=f.sha256) for f in files]
    offer = wire.PublishRequest(offer=wire.Offer(files=sent))
    with served(registry) as address, stub_of(address, "dee") as stub, unchanged(registry):
        assert code_of(lambda: stub.Publish(iter([offer]), timeout=60)) is Code.INVALID_ARGUMENT
    assert not (tmp_path / ".registry.service" / "uploads").exists()


def streams(folder):
    """Streams that go wrong, by what is wrong with them."""
    offer, chunks = offer_of(folder), chunks_of(folder)
    size = (folder / CONTENT).stat().st_size
    altered = chunks_of(folder)
    altered[-1] = chunk(FISHER, 0, bytes(reversed((folder / FISHER).read_bytes())))
    return {
        "nothing": [],
        "no offer": chunks,
        "the offer alone": [offer],
        "two offers": [offer, offer],
        "an empty message": [offer, wire.PublishRequest()],
        "the last file is missing": [offer, *chunks[:-1]],
        "the last byte is missing": [offer, *chunks[:-1], _shorter(chunks[-1])],
        "a file that was not announced": [offer, chunk("state.json", 0, b"x")],
        "out of the folder": [offer, chunk("../state.json", 0, b"x")],
        "a gap": [offer, chunk(CONTENT, 1, b"x")],
        "far beyond": [offer, chunk(CONTENT, 1 << 60, b"x")],
        "too much": [offer, chunk(CONTENT, 0, b"x" * (size + 1))],
        "twice": [offer, *chunks, chunks[0]],
        "no bytes": [offer, chunk(CONTENT, 0, b"")],
        "other bytes": [offer, *altered],
        "another digest": [_redigested(folder), *chunks],
    }


def _shorter(part):
    return chunk(part.chunk.file, part.chunk.offset, part.chunk.data[:-1])


def _redigested(folder):
    with (folder / CARD).open("rb") as file:
        return offer_of(folder, card=replace(FileEntry.of(CARD, file), sha256=WRONG))


@pytest.mark.parametrize("number", range(16))
def test_a_stream_that_goes_wrong_changes_nothing(registry, folder, number, caplog):
    what, parts = list(streams(folder).items())[number]
    with served(registry) as address, stub_of(address, "dee") as stub, unchanged(registry):
        code = code_of(lambda: stub.Publish(iter(parts), timeout=60))
    assert code is Code.INVALID_ARGUMENT, what
    assert any(r.getMessage().startswith("refused") for r in caplog.records)


def test_there_are_sixteen_streams_and_the_right_one_is_taken_in(registry, folder):
    assert len(streams(folder)) == 16
    parts = [offer_of(folder), *chunks_of(folder)]
    with served(registry) as address, stub_of(address, "dee") as stub:
        *_, last = stub.Publish(iter(parts), timeout=60)
    assert last.published.client == "dee"


@pytest.mark.parametrize("file", [CONTENT, CARD, FISHER])
def test_digests_that_fit_save_no_contribution_that_does_not(registry, folder, file):
    """Announced as it is, altered all the same: the registry's own checks find it."""
    data = bytearray((folder / file).read_bytes())
    data[-20] ^= 1
    (folder / file).write_bytes(data)
    parts = [offer_of(folder), *chunks_of(folder)]
    with served(registry) as address, stub_of(address, "dee") as stub, unchanged(registry):
        assert code_of(lambda: stub.Publish(iter(parts), timeout=60)) is Code.INVALID_ARGUMENT


def test_a_header_that_would_fill_the_memory_is_not_read(registry, folder):
    data = (folder / CONTENT).read_bytes()
    (folder / CONTENT).write_bytes((1 << 40).to_bytes(8, "little") + data[8:])
    parts = [offer_of(folder), *chunks_of(folder)]
    with (
        served(registry) as address,
        stub_of(address, "dee") as stub,
        unchanged(registry),
        pytest.raises(Exception, match="may have 4194304"),
    ):
        list(stub.Publish(iter(parts), timeout=60))


def test_a_message_beyond_the_limit_is_refused(registry, folder):
    parts = [offer_of(folder), chunk(CONTENT, 0, b"x" * (2 * LARGEST_PIECE))]
    with served(registry) as address, stub_of(address, "dee") as stub, unchanged(registry):
        assert code_of(lambda: stub.Publish(iter(parts), timeout=60)) is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"weights": {"ada": math.nan, "ben": 1.0}}, Code.INVALID_ARGUMENT),
        ({"weights": {"ada": 1e308, "ben": 1e308}}, Code.INVALID_ARGUMENT),
        ({"weights": {"ada": -1.0, "ben": 2.0}}, Code.INVALID_ARGUMENT),
        ({"weights": {"ada": 0.5}}, Code.FAILED_PRECONDITION),
        ({"weights": {"eve": 1.0}}, Code.NOT_FOUND),
        ({"only": ["../ada"]}, Code.NOT_FOUND),
        ({"without": ["ada", "ben", "cho"]}, Code.FAILED_PRECONDITION),
        ({"scale": math.nan}, Code.INVALID_ARGUMENT),
        ({"scale": 0.0}, Code.INVALID_ARGUMENT),
        ({"scale": -1.0}, Code.INVALID_ARGUMENT),
        ({"scale": 1e30}, Code.INVALID_ARGUMENT),
        ({"scale": 30.1}, Code.INVALID_ARGUMENT),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_is_refused(registry, request_, expected):
    with served(registry) as address, stub_of(address, "ada") as stub, unchanged(registry):
        call = stub.Compose(wire.ComposeRequest(**request_), timeout=60)
        assert code_of(lambda: call) is expected


def test_a_reason_has_its_limit(registry):
    request = wire.RemoveRequest(reason="x" * 1001)
    with served(registry) as address, stub_of(address, "ada") as stub, unchanged(registry):
        assert code_of(lambda: stub.Remove(request, timeout=60)) is Code.INVALID_ARGUMENT


def test_a_tensor_that_would_fill_the_memory_is_not_read(registry, folder):
    parts = [offer_of(folder), *chunks_of(folder)]
    with (
        served(registry, limits=Limits(tensor=100)) as address,
        stub_of(address, "dee") as stub,
        unchanged(registry),
        pytest.raises(Exception, match="may have 100"),
    ):
        list(stub.Publish(iter(parts), timeout=60))
