"""How much a caller may ask: calls, time, bytes, and what is left lying about."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest
from registry_builders import member, three_clients
from service_runs import (
    authority,
    channel,
    chunk,
    client_of,
    code_of,
    credential,
    intact,
    offer_of,
    saved,
    served,
    stub_of,
    unchanged,
)

from fedcompo.errors import ConfigError
from fedcompo.service import downloads
from fedcompo.service import publishing as uploads_module
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.access import Peer
from fedcompo.service.limits import Limits, Places, Turns, limits_of
from fedcompo.service.publishing import Uploads
from fedcompo.service.refusals import Code, Refused
from fedcompo.service.server import NAME
from fedcompo.service.transfer import FileEntry
from fedcompo.storage.files import CARD

ENTRY = FileEntry(CARD, 10, "0" * 64)


def peer(name, *, operator=False):
    return Peer(name, operator, "0" * 64)


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


# -- the parts ------------------------------------------------------------------------------------


def test_a_caller_may_call_so_often_and_again_after_a_pause():
    now = [0.0]
    turns = Turns(Limits(rate=2.0, burst=3), clock=lambda: now[0])

    def call(name):
        with turns.taken(peer(name)):
            pass

    for _ in range(3):
        call("ada")
    with pytest.raises(Refused, match="more than 2 times a second"):
        call("ada")
    call("ben")  # another caller is not concerned
    now[0] = 0.5
    call("ada")
    with pytest.raises(Refused):
        call("ada")
    now[0] = 100.0  # a pause fills the bucket, and no more than that
    for _ in range(3):
        call("ada")
    with pytest.raises(Refused):
        call("ada")


def test_a_flood_is_logged_once_a_second():
    now, quiet = [0.0], []
    turns = Turns(Limits(rate=0.001, burst=1), clock=lambda: now[0])
    for moment in (0.0, 0.1, 0.2, 1.2, 1.3):
        now[0] = moment
        try:
            with turns.taken(peer("eve")):
                pass
        except Refused as refused:
            quiet.append(refused.quiet)
    assert quiet == [False, True, False, True]


def test_a_caller_may_have_so_many_calls_under_way():
    turns = Turns(Limits(calls_each=1, burst=100))
    with turns.taken(peer("ada")):
        with pytest.raises(Refused, match="1 calls under way") as caught, turns.taken(peer("ada")):
            pass
        with turns.taken(peer("ben")):
            pass
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    with turns.taken(peer("ada")):
        pass


def test_callers_that_are_gone_are_forgotten(monkeypatch):
    monkeypatch.setattr("fedcompo.service.limits.CALLERS_KNOWN", 10)
    now = [0.0]
    turns = Turns(Limits(rate=1.0, burst=2), clock=lambda: now[0])
    for number in range(100):
        now[0] += 1
        with turns.taken(peer(f"client-{number}")):
            pass
    assert len(turns._buckets) <= 11
    assert not turns._under_way


def test_a_place_is_waited_for_but_not_for_ever():
    places = Places(1)
    with (
        places.taken(peer("ada"), 1),
        pytest.raises(Refused, match="others to serve"),
        places.taken(peer("ben"), 0.01),
    ):
        pass
    with places.taken(peer("ada"), 0.01):
        pass


def test_few_callers_never_take_all_places_and_operators_have_their_own():
    turns, held = Turns(Limits(calls=8, calls_each=8, burst=100)), ExitStack()
    with held:
        for _ in range(4):
            held.enter_context(turns.taken(peer("eve")))
        with pytest.raises(Refused, match="may have 1 while many call"):
            held.enter_context(turns.taken(peer("eve")))
        for name in ("ada", "ben", "cho", "dee"):
            held.enter_context(turns.taken(peer(name)))
        with pytest.raises(Refused, match="8 calls are under way"):
            held.enter_context(turns.taken(peer("fay")))
        for _ in range(8):  # of the same name as a member, who has no place
            held.enter_context(turns.taken(peer("fay", operator=True)))
        with pytest.raises(Refused, match="may have 8 at a time"):
            held.enter_context(turns.taken(peer("fay", operator=True)))
    with turns.taken(peer("eve")), turns.taken(peer("eve")):
        pass


def test_a_caller_waits_for_two_places_at_most():
    places = Places(5)
    with places.taken(peer("eve"), 1), places.taken(peer("eve"), 1):
        with pytest.raises(Refused, match="waits for 2"), places.taken(peer("eve"), 1):
            pass
        with places.taken(peer("ada"), 1):
            pass


def test_operators_have_a_place_kept_and_come_first():
    places, order = Places(1, kept=1), []

    def waiting(caller):
        with places.taken(caller, 60):
            order.append(caller.name)

    with ThreadPoolExecutor() as threads, places.taken(peer("eve"), 1):
        with places.taken(peer("olga", operator=True), 1):
            for number, caller in enumerate(
                (peer("ada"), peer("ben"), peer("oleg", operator=True)), start=1
            ):
                threads.submit(waiting, caller)
                while len(places._waiting) < number:
                    time.sleep(0.001)
        while order != ["oleg"]:  # the members wait for eve
            time.sleep(0.001)
        assert len(places._waiting) == 2
    # they begin once eve has ended
    assert order == ["oleg", "ada", "ben"]


def test_who_calls_all_the_time_keeps_nobody_waiting_who_calls_once():
    places, order = Places(1), []

    def waiting(caller):
        with places.taken(caller, 60):
            order.append(caller.name)

    waiting(peer("ada"))
    for name in ("mal", "mel"):
        waiting(peer(name))
    with ThreadPoolExecutor() as threads, places.taken(peer("eve"), 1):
        for number, name in enumerate(("mel", "mal", "mel", "ada", "new"), start=1):
            threads.submit(waiting, peer(name))
            while len(places._waiting) < number:
                time.sleep(0.001)
    assert order == ["ada", "mal", "mel", "new", "ada", "mal", "mel", "mel"]


@pytest.mark.parametrize("wrong", ["rate=0", "calls=0", "spare=-1", "seconds=-1"])
def test_limits_are_positive(wrong):
    with pytest.raises(ConfigError, match="must be >"):
        limits_of([wrong])


# -- uploads --------------------------------------------------------------------------------------


def test_a_client_has_one_upload_at_a_time(tmp_path):
    uploads = Uploads(tmp_path / "uploads", Limits())
    for number in range(3):
        with uploads.opened("ada", [FileEntry(CARD, 10, str(number) * 64)]):
            pass
    assert len(list((tmp_path / "uploads").glob("*/*"))) == 1
    with uploads.opened("ada", [ENTRY]):
        with (
            pytest.raises(Refused, match="Another call of ada"),
            uploads.opened("ada", [ENTRY], patience=0.01),
        ):
            pass
        with uploads.opened("Ada", [ENTRY]), uploads.opened("../ada", [ENTRY]):
            pass
    assert len(list((tmp_path / "uploads").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["uploads"]


def test_an_upload_has_its_limit_and_leaves_room_on_the_disk(tmp_path, monkeypatch):
    uploads = Uploads(tmp_path / "uploads", Limits(contribution=10, spare=100))
    with pytest.raises(Refused, match="may have 10"), uploads.opened("ada", [ENTRY, ENTRY]):
        pass
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(uploads_module.shutil, "disk_usage", lambda path: usage(119))
    with (
        pytest.raises(Refused, match="no room for the 20 bytes"),
        uploads.opened("ada", [ENTRY]),
    ):
        pass
    monkeypatch.setattr(uploads_module.shutil, "disk_usage", lambda path: usage(120))
    with uploads.opened("ada", [ENTRY]):
        pass


def test_what_nobody_goes_on_with_is_swept_away(tmp_path):
    uploads = Uploads(tmp_path / "uploads", Limits(stale=3600.0))
    places = {}
    for client in ("old", "busy", "new"):
        with uploads.opened(client, [ENTRY]) as incoming:
            (incoming.folder / CARD).write_bytes(b"x")
            places[client] = incoming.folder
    for client in ("old", "busy"):
        for path in (places[client] / CARD, places[client]):
            os.utime(path, (0, 0))
    with uploads.opened("busy", [ENTRY]):
        uploads.sweep()
    assert [client for client, path in places.items() if path.exists()] == ["busy", "new"]


# -- the service ----------------------------------------------------------------------------------


def test_a_client_that_calls_too_often_is_refused_and_the_others_are_not(registry):
    with (
        served(registry, limits=Limits(rate=0.001, burst=2)) as address,
        stub_of(address, "ada") as ada,
        stub_of(address, "ben") as ben,
    ):
        for _ in range(2):
            ada.List(wire.ListRequest(), timeout=60)
        refused = code_of(lambda: ada.List(wire.ListRequest(), timeout=60))
        assert refused is Code.RESOURCE_EXHAUSTED
        ben.List(wire.ListRequest(), timeout=60)


def test_a_client_that_stalls_is_cut_off_and_its_place_is_free_again(registry, tmp_path):
    folder = saved(member("dee", seed=8, classes=("emu",)), tmp_path / "dee")
    over = threading.Event()

    def stalling():
        yield offer_of(folder)
        over.wait(60)

    limits = Limits(seconds=0.5, calls_each=1, grace=5.0)
    with served(registry, limits=limits) as address, stub_of(address, "dee") as stub:
        with unchanged(registry):
            began = time.monotonic()
            assert code_of(lambda: stub.Publish(stalling(), timeout=60)) is Code.CANCELLED
            over.set()
            assert time.monotonic() - began < 30
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # the server notes it a moment later
            try:
                stub.List(wire.ListRequest(), timeout=60)
                break
            except Exception:
                time.sleep(0.05)
        else:
            raise AssertionError("the stalled call still counts")


def never():
    threading.Event().wait(60)
    yield b""


SILENT = {
    "a publisher that offers nothing": lambda opened: opened.stream_stream(f"/{NAME}/Publish"),
    "a caller whose message does not come": lambda opened: opened.stream_stream(f"/{NAME}/List"),
    "a reader that takes nothing": lambda opened: opened.unary_stream(f"/{NAME}/Fetch"),
}


@pytest.mark.parametrize("what", SILENT)
def test_a_call_that_waits_for_its_caller_is_cut_off(registry, what, monkeypatch):
    parts = [wire.Chunk(file=CARD, data=bytes(1 << 18))] * 400  # more than is under way at a time
    monkeypatch.setattr(downloads, "outgoing", lambda *given: iter(parts))
    limits = Limits(idle=1.0, calls_each=1, rate=1000.0, burst=1000, grace=5.0)
    with (
        served(registry, limits=limits) as address,
        channel(address, credential("ada")) as opened,
        stub_of(address, "ada") as stub,
        unchanged(registry),
    ):
        call = SILENT[what](opened)(b"" if "reader" in what else never())
        began, seen = time.monotonic(), []
        while seen[-2:] != [Code.RESOURCE_EXHAUSTED, None]:  # it has a place, and then has none
            time.sleep(0.05)
            try:
                seen.append(stub.List(wire.ListRequest(), timeout=60) and None)
            except grpc.RpcError as error:
                seen.append(error.code())
        assert 0.9 < time.monotonic() - began < 30
        call.cancel()


def test_a_call_that_computes_for_long_is_not_cut_off(registry, monkeypatch):
    real = downloads.publish

    def slow(output, selection):
        time.sleep(1.5)
        return real(output, selection)

    monkeypatch.setattr(downloads, "publish", slow)
    limits = Limits(idle=0.3, grace=5.0)
    with served(registry, limits=limits) as address, stub_of(address, "ada") as stub:
        assert list(stub.Compose(wire.ComposeRequest(), timeout=60))


def test_silent_callers_shut_nobody_out(registry):
    limits = Limits(calls=8, calls_each=8, kept=2, grace=5.0)
    with served(registry, limits=limits) as address, ExitStack() as stack:
        for name in ("eve", "fay", "gil"):
            opened = stack.enter_context(channel(address, credential(name)))
            for method in ("Publish", "List"):
                for _ in range(8):
                    opened.stream_stream(f"/{NAME}/{method}")(never())
        time.sleep(1)
        for name, operator in (("ada", False), ("olga", True)):
            stub = stack.enter_context(stub_of(address, name, operator=operator))
            for _ in range(5):
                stub.List(wire.ListRequest(), timeout=60)


def raw(address):
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def encrypted(address, folder):
    authority().save(folder)
    credential("ada").save(folder, "ada")
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    context.load_cert_chain(folder / "ada.crt", folder / "ada.key")
    context.set_alpn_protocols(["h2"])
    opened = context.wrap_socket(raw(address), server_hostname="localhost")
    opened.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
    return opened


def test_connections_that_are_not_used_are_closed(registry, tmp_path):
    with served(registry, limits=Limits(handshake=1.0, idle=1.0, grace=5.0)) as address:
        for opened in (raw(address), encrypted(address, tmp_path / "ada")):
            with opened:
                while opened.recv(1 << 16):  # until the server closes it
                    pass


def test_there_are_so_many_connections_and_the_next_have_their_turn(registry):
    limits = Limits(connections=5, handshake=1.0, grace=5.0)
    with served(registry, limits=limits) as address, ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(raw(address))
        late = stack.enter_context(raw(address))
        assert late.recv(1) == b""
        with client_of(address, "ada", attempts=8) as client:
            assert len(client.list().members) == 3


def test_a_client_that_goes_away_leaves_what_it_sent_and_no_lock(registry, tmp_path):
    folder = saved(member("dee", seed=8, classes=("emu",)), tmp_path / "dee")
    data = (folder / CARD).read_bytes()
    over = threading.Event()

    def going():
        yield offer_of(folder)
        yield chunk(CARD, 0, data)
        over.wait(60)

    with served(registry) as address, stub_of(address, "dee") as stub:
        with unchanged(registry):
            call = stub.Publish(going(), timeout=60)
            assert next(call).WhichOneof("part") == "have"
            staged = tmp_path / ".registry.service" / "uploads"
            deadline = time.monotonic() + 60
            while not list(staged.rglob(CARD)) and time.monotonic() < deadline:
                time.sleep(0.02)
            call.cancel()
            over.set()
        again = stub.Publish(iter([offer_of(folder)]), timeout=60)
        positions = {p.file: p.bytes for p in next(again).have.positions}
        again.cancel()
    assert positions[CARD] == len(data)
    assert intact(registry)
