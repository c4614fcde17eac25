"""Many clients publish and compose over the wire at once, while one of them is removed.

    python tests/benchmarks/service_load.py
    python tests/benchmarks/service_load.py --clients 8 --rounds 1

Each client has a certificate, a connection and a thread of its own; models are of a few thousand
numbers, so that what is measured is the service. It fails if a call fails, if a model holds who had
left before it was asked for, or if the registry does not verify at the end. Linux only.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from measuring import head, options, parsed, row
from registry_builders import member, registry_of

from fedcompo.config.choices import Kind
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry
from fedcompo.service.access import Audience
from fedcompo.service.authority import Authority
from fedcompo.service.certificates import Credential
from fedcompo.service.client import Client
from fedcompo.service.limits import Limits
from fedcompo.service.server import Server, Settings

KINDS = (Kind.LORA, Kind.FULL, Kind.IA3)
SECONDS = 600.0
MEGABYTE = 1e6


@dataclass
class Load:
    """What the clients do, and how it went."""

    folder: Path
    clients: int
    rounds: int
    authority: Authority = field(default_factory=Authority.create)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set once the removal was answered."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of each call, by what it was."""

    @property
    def leaver(self) -> str:
        return name(0)

    def credentials(self) -> list[Credential]:
        return [self.authority.issue_client(name(i)) for i in range(self.clients)]


def name(index: int) -> str:
    return f"client-{index:03d}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="models that each client asks for")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    arguments = parsed(parser, clients=8, rounds=2)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        load = Load(Path(folder), arguments.clients, arguments.rounds)
        registry = registry_of(load.folder / "registry", contribution(0))
        serve = serving_here if arguments.toy else serving
        with serve(load, registry, "--compose", "members", "--least", "1") as (address, resident):
            before = resident()
            took = run(load, address)
            peak = resident()
        check(load, registry)
    figures = {
        "clients": load.clients,
        "seconds": took,
        "resident_before": before,
        "resident_peak": peak,
        "calls": {what: summary(seconds) for what, seconds in load.seconds.items()},
    }
    report(figures)


def contribution(index: int):
    kind = KINDS[index % len(KINDS)]
    return member(name(index), kind, seed=index, classes=(f"{index}-a", f"{index}-b"))


def run(load: Load, address: str) -> float:
    """Let all clients work at once; returns seconds. Any failure is raised."""
    credentials = load.credentials()
    for index in range(1, load.clients):
        contribution(index).save(load.folder / "sent" / name(index))
    start = threading.Barrier(load.clients)
    began = time.perf_counter()
    with ThreadPoolExecutor(load.clients) as threads:
        running = [
            threads.submit(work, load, address, index, credential, start)
            for index, credential in enumerate(credentials)
        ]
        for one in running:
            one.result()
    return time.perf_counter() - began


def work(
    load: Load, address: str, index: int, credential: Credential, start: threading.Barrier
) -> None:
    """One client: publish, then compose; the first is a member already, and leaves."""
    trusted = load.authority.credential.certificate
    draw = random.Random(index)
    with Client(address, trusted, credential, seconds=SECONDS) as client:
        start.wait()
        if index == 0:
            time.sleep(0.5)  # the others are at it
            timed(load, "remove", client.remove)
            load.gone.set()
            return
        timed(load, "publish", lambda: client.publish(load.folder / "sent" / name(index)))
        for turn in range(load.rounds):
            output = load.folder / "models" / f"{name(index)}-{turn}"
            gone, weights = load.gone.is_set(), None
            if draw.random() < 0.5:
                others = [m.client for m in client.list().members if m.client != load.leaver]
                chosen = draw.sample(others, min(3, len(others)))
                weights = {one: 1 / len(chosen) for one in chosen}
            content = timed(
                load, "compose", lambda o=output, w=weights: client.compose(o, weights=w)
            )
            assert not (gone and load.leaver in content.clients), "a model of one who had left"
            assert weights is None or set(content.clients) == set(weights)
            shutil.rmtree(output)


def timed(load: Load, what: str, call: Callable):
    began = time.perf_counter()
    answer = call()
    load.seconds.setdefault(what, []).append(time.perf_counter() - began)
    return answer


def check(load: Load, registry: Registry) -> None:
    """Everybody is in but the one who left, every byte is right, and nothing is left beside."""
    done, others = {what: len(times) for what, times in load.seconds.items()}, load.clients - 1
    assert done == {"publish": others, "compose": others * load.rounds, "remove": 1}, done
    registry.refresh()
    assert registry.clients == tuple(name(i) for i in range(1, load.clients))
    failed = [finding for finding in verify_registry(registry.path) if not finding.holds]
    assert not failed, failed
    beside = registry.path.with_name(f".{registry.path.name}.service")
    left = [path for path in beside.rglob("*") if path.is_file()]
    assert not left, left


@contextmanager
def serving(
    load: Load, registry: Registry, *options: str
) -> Iterator[tuple[str, Callable[[], int]]]:
    """Serve in a process of its own, which may open 1,024 files at first, as most systems have it.

    Yields the address, and a look at its peak memory.
    """
    load.authority.save(load.folder)
    load.authority.issue_server(["localhost"]).save(load.folder, "server")
    command = [sys.executable, "-m", "fedcompo.cli", "serve", str(registry.path), "--port", "0"]
    command = ["sh", "-c", 'ulimit -Sn 1024; exec "$@"', "sh", *command, *options]
    for option, file in (("ca", "ca.crt"), ("certificate", "server.crt"), ("key", "server.key")):
        command += [f"--{option}", str(load.folder / file)]
    with (load.folder / "log").open("wb") as log:
        service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    with service:
        try:
            line = service.stdout.readline() if service.stdout else ""
            port = line.partition("127.0.0.1:")[2].partition(";")[0]
            yield f"localhost:{port}", lambda: peak_resident(service.pid)
        finally:
            service.terminate()
            assert service.wait(60) == 0


@contextmanager
def serving_here(
    load: Load, registry: Registry, *options: str
) -> Iterator[tuple[str, Callable[[], int]]]:
    """The same in this process, with the same options."""
    settings = Settings(
        registry.path,
        load.authority.credential.certificate,
        load.authority.issue_server(["localhost"]),
        port=0,
        audience=Audience.MEMBERS,
        least=1,
        limits=Limits(grace=5.0),
    )
    with Server(settings) as server:
        yield f"localhost:{server.port}", lambda: peak_resident(os.getpid())


def peak_resident(process: int) -> int:
    """Bytes of memory that a process has had at most."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    middle, last = ordered[len(ordered) // 2], ordered[-1]
    return {"count": len(ordered), "median": middle, "longest": last}


def report(figures: dict) -> None:
    print(f"{figures['clients']} clients, {figures['seconds']:.1f} s, no error, all verified")
    head("call", "n", "median s", "longest s")
    for what, found in sorted(figures["calls"].items()):
        row(what, found["count"], f"{found['median']:.2f}", f"{found['longest']:.2f}")
    before, peak = (figures[f"resident_{moment}"] / MEGABYTE for moment in ("before", "peak"))
    print(f"Memory of the service: {before:.0f} MB before, {peak:.0f} MB at most")


if __name__ == "__main__":
    main()
