"""What hostile members do to a service, all at once, from a process of their own.

    python tests/benchmarks/hostile.py FOLDER ADDRESS

FOLDER holds ``ca.crt``, certificates ``hostile-*.crt`` and keys, and contributions in ``odd/*/*``.
It goes on until it is killed. No torch: it starts in a moment.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from fedcompo.errors import FedcompoError
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.certificates import read_credential
from fedcompo.service.client import Client
from fedcompo.service.methods import RegistryStub

RAW, ENCRYPTED = 1300, 200
"""Connections that are opened, and left so; and those of them that show a certificate."""
SILENT = 8
"""Calls of each member that send nothing, and as many that read nothing."""


class Hostile:
    """A member with a certificate, which keeps to no manners."""

    def __init__(self, folder: Path, name: str, address: str) -> None:
        self.folder, self.name, self.address = folder, name, address
        self.credential = read_credential(folder / f"{name}.crt", folder / f"{name}.key")
        self.authority = (folder / "ca.crt").read_bytes()

    def channel(self) -> grpc.Channel:
        given = grpc.ssl_channel_credentials(
            self.authority, self.credential.key, self.credential.certificate
        )
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        return grpc.secure_channel(self.address, given, options)

    def is_silent(self) -> None:
        """Open calls, and send nothing: to a stream, and where a single message is expected."""
        with self.channel() as opened:
            for kind in (opened.stream_stream, opened.stream_unary):
                name = "Publish" if kind == opened.stream_stream else "List"
                calls = [
                    kind(f"/fedcompo.v1.Registry/{name}")(never())
                    if name == "Publish"
                    else kind(f"/fedcompo.v1.Registry/{name}").future(never())
                    for _ in range(SILENT)
                ]
            while not all(call.done() for call in calls):
                time.sleep(0.2)

    def reads_nothing(self) -> None:
        """Ask for models and for what is its own, and take no byte of it."""
        with self.channel() as opened:
            stub = RegistryStub(opened)
            calls = [stub.Compose(wire.ComposeRequest()) for _ in range(SILENT // 2)]
            calls += [stub.Fetch(wire.FetchRequest()) for _ in range(SILENT // 2)]
            while any(call.is_active() for call in calls):
                time.sleep(0.2)

    def floods(self) -> None:
        """Call as fast as it can."""
        with self.channel() as opened:
            stub = RegistryStub(opened)
            calls: tuple[Callable[[], Any], ...] = (
                lambda: stub.List(wire.ListRequest(), timeout=30),
                lambda: list(stub.Fetch(wire.FetchRequest(client="honest-0"), timeout=30)),
                lambda: stub.Remove(wire.RemoveRequest(client="honest-1"), timeout=30),
                lambda: list(opened.unary_stream("/fedcompo.v1.Registry/Compose")(b"\xff" * 99)),
            )
            for call in itertools.islice(itertools.cycle(calls), 200):
                with contextlib.suppress(grpc.RpcError):
                    call()

    def keeps_computing(self) -> None:
        """Ask for models and verifications in a row."""
        with self.channel() as opened:
            stub = RegistryStub(opened)
            for scale in (None, 1.0, 1e30):
                with contextlib.suppress(grpc.RpcError):
                    list(stub.Compose(wire.ComposeRequest(scale=scale), timeout=60))
            with contextlib.suppress(grpc.RpcError):
                stub.Verify(wire.VerifyRequest(), timeout=60)

    def publishes_oddities(self) -> None:
        """Hand in everything in its folder, replacing what it handed in before."""
        with Client(self.address, self.authority, self.credential, attempts=1) as client:
            for folder in sorted((self.folder / "odd" / self.name).iterdir()):
                with contextlib.suppress(FedcompoError, grpc.RpcError):
                    client.publish(folder, replace=True)


def never() -> Iterator[bytes]:
    threading.Event().wait()
    yield b""


def holds_connections(folder: Path, address: str, count: int, *, encrypted: bool) -> None:
    """Keep so many connections open, and say nothing over them."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    context.load_cert_chain(folder / "hostile-00.crt", folder / "hostile-00.key")
    context.set_alpn_protocols(["h2"])
    held: list[socket.socket] = []
    while True:
        held = [one for one in held if is_open(one)]
        for _ in range(count - len(held)):
            with contextlib.suppress(OSError):
                plain = socket.create_connection((host, int(port)), timeout=5)
                if encrypted:
                    plain = context.wrap_socket(plain, server_hostname="localhost")
                plain.setblocking(False)
                held.append(plain)
        time.sleep(0.5)


def is_open(one: socket.socket) -> bool:
    try:
        return one.recv(1 << 16) != b""
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False


def for_ever(act: Callable[[], None]) -> None:
    while True:
        try:
            act()
        except (grpc.RpcError, FedcompoError, ValueError):
            time.sleep(0.1)


def main(folder: Path, address: str) -> None:
    os.nice(5)  # attackers have machines of their own
    names = sorted(path.stem for path in folder.glob("hostile-*.crt"))
    threads = [
        threading.Thread(
            target=holds_connections, args=(folder, address, count), kwargs={"encrypted": encrypted}
        )
        for count, encrypted in ((RAW, False), (ENCRYPTED, True))
    ]
    for name in names:
        one = Hostile(folder, name, address)
        for act in (
            one.is_silent,
            one.reads_nothing,
            one.floods,
            one.keeps_computing,
            one.publishes_oddities,
        ):
            threads.append(threading.Thread(target=for_ever, args=(act,)))
    for thread in threads:
        thread.daemon = True
        thread.start()
    print("attacking", flush=True)
    threads[0].join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
