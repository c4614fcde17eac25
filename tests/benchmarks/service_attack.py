"""Sixteen hostile members beside three honest ones and an operator, at one service.

    python tests/benchmarks/service_attack.py
    python tests/benchmarks/service_attack.py --seconds 10 --backbone tiny

``hostile.py`` says what the hostile do. The honest list, fetch, publish anew, and one leaves in the
end; the operator composes. It fails if one of their calls fails, or if the registry does not verify
in the end. Members may compose here, which is harder on the service than its default. Linux only.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import options, parsed
from registry_workload import Job, _backbone, _contribution
from service_load import MEGABYTE, Load, serving, summary, timed

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.settings import CompositionSettings
from fedcompo.method.contribution import Contribution
from fedcompo.method.heads import Head
from fedcompo.method.statistics import FeatureSums
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry
from fedcompo.service.certificates import read_credential
from fedcompo.service.client import Client

HERE = Path(__file__).resolve().parent
HONEST = ("honest-0", "honest-1", "honest-2")
OPERATOR = "olga"
CALLS = {"list", "fetch", "publish", "compose", "operator lists", "operator composes"}
SECONDS = 120.0
"""What an honest call may take."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long the attack lasts")
    parser.add_argument("--quiet", type=float, default=20.0, help="how long the peace before")
    parser.add_argument("--hostile", type=int, default=16)
    parser.add_argument("--backbone", default="vit-ti", help="vit-ti, or tiny")
    arguments = parsed(parser, seconds=0.5, quiet=0.0, hostile=2, backbone="tiny")
    with tempfile.TemporaryDirectory() as folder:
        figures = attack(
            Path(folder),
            seconds=arguments.seconds,
            quiet=arguments.quiet,
            hostile=arguments.hostile,
            backbone=arguments.backbone,
        )
    print(report(figures))


def attack(
    folder: Path,
    *,
    seconds: float,
    quiet: float,
    hostile: int,
    backbone: str,
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure honest calls in peace and under attack; any failure of one is raised."""
    load = Load(folder, clients=0, rounds=0)
    registry = prepare(load, hostile, backbone)
    figures: dict[str, Any] = {}
    serve = serving(load, registry, "--compose", "members", *options)
    with serve as (address, resident), connections(load, address) as clients:
        figures["peace"] = honest(load, clients, quiet)
        figures["resident_before"] = resident()
        with attackers(folder, address):
            time.sleep(min(5.0, seconds / 4))
            figures["attack"] = honest(load, clients, seconds)
            timed(load, "leave", clients["honest-2"].remove).checked("honest-2")
            figures["attack"]["leave"] = summary(load.seconds["leave"])
        figures["resident_peak"] = resident()
    registry.refresh()
    assert set(registry.clients) >= {"honest-0", "honest-1"}
    assert "honest-2" not in registry.clients
    failed = [finding for finding in verify_registry(registry.path) if finding.holds is False]
    assert not failed, failed
    assert set(figures["attack"]) == {*CALLS, "leave"}, figures["attack"]
    figures["log"] = outcomes(folder / "log")
    return figures


def prepare(load: Load, hostile: int, scale: str) -> Registry:
    """A registry of all members, certificates, and contributions good and odd."""
    backbone = _backbone(scale)
    registry = Registry.create(load.folder / "registry", backbone, CompositionSettings())
    names = [f"hostile-{index:02d}" for index in range(hostile)]
    for name in (*HONEST, OPERATOR, *names):
        issued = load.authority.issue_client(name, operator=name == OPERATOR)
        issued.save(load.folder, name)
    for index, name in enumerate((*HONEST, *names)):
        for version in range(2):
            own = contribution(backbone, name, 2 * index + version)
            own.save(load.folder / "sent" / name / str(version))
    registry.add(*(load.folder / "sent" / name / "0" for name in (*HONEST, *names)))
    for name in names:
        for number, odd in enumerate(oddities(backbone, name)):
            odd.save(load.folder / "odd" / name / str(number))
    return registry


def contribution(
    backbone: Backbone, name: str, seed: int, classes: Sequence[str] = ()
) -> Contribution:
    """Four classes of the client's own, unless others are named; 20 images of each."""
    classes = sorted(classes or (f"{name}-{c}" for c in range(4)))
    made = _contribution(Job("add", "", "lora", 0, "", len(classes), 1), backbone, seed)
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(20 * len(classes), backbone.num_features, generator=draw)
    owners = torch.arange(len(images)) % len(classes)
    return replace(
        made,
        client=name,
        head=Head(tuple(classes), made.head.weight, made.head.bias),
        statistics=FeatureSums.of(images, owners, classes),
        num_examples=len(images),
    )


def oddities(backbone: Backbone, name: str) -> Iterator[Contribution]:
    """Well-formed contributions that no honest client makes."""
    plain = contribution(backbone, name, 7)
    own = plain.task_vector.tensors
    for value, dtype in ((1e300, torch.float64), (math.nan, torch.float32), (3e38, torch.float32)):
        yield forged(plain, {n: torch.full_like(t, value, dtype=dtype) for n, t in own.items()})
    weight, theta = next(iter(backbone.theta_0.items()))
    for rank in (0, 10_000):
        rows, columns = theta.shape
        factors = {"B": torch.ones(rows, rank), "A": torch.ones(rank, columns)}
        yield forged(plain, {**own, **{f"{weight}/{n}": t for n, t in factors.items()}})
    yield contribution(backbone, name, 7, [f"shared-{c}" for c in range(400)])
    yield contribution(backbone, name, 7, [f"{name}-{c}" for c in range(3000)])
    yield contribution(
        backbone, name, 7, ["\x1b[2J\x1b[31mred", "two\nlines", "\u202eright", "a" * 9000]
    )


def forged(plain: Contribution, tensors: Mapping[str, torch.Tensor]) -> Contribution:
    """The same with other tensors, past the checks of those who are honest."""
    odd = copy(plain.task_vector)
    object.__setattr__(odd, "tensors", tensors)
    return replace(plain, task_vector=odd)


def honest(load: Load, clients: Mapping[str, Client], seconds: float) -> dict[str, Any]:
    """What the honest do, all at once, again and again; returns figures by call."""
    load.seconds.clear()
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(len(clients)) as threads:
        running = [threads.submit(one, load, name, clients[name], end) for name in clients]
        for done in running:
            done.result()
    return {what: summary(took) for what, took in load.seconds.items()}


def one(load: Load, name: str, client: Client, end: float) -> None:
    """A member lists, fetches, publishes anew, and the first composes; an operator composes."""
    operator, place = name == OPERATOR, load.folder / "fetched" / name
    for turn in itertools.count(1):
        shutil.rmtree(place, ignore_errors=True)
        timed(load, "operator lists" if operator else "list", client.list)
        if not operator:
            sent = load.folder / "sent" / name / str(turn % 2)
            timed(load, "fetch", partial(client.fetch, place / "own"))
            timed(load, "publish", partial(client.publish, sent, replace=True))
        if operator or name == HONEST[0]:
            what = "operator composes" if operator else "compose"
            timed(load, what, partial(client.compose, place / "model", only=HONEST))
        if time.monotonic() > end:
            return


@contextmanager
def connections(load: Load, address: str) -> Iterator[dict[str, Client]]:
    trusted = load.authority.credential.certificate
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                Client(
                    address,
                    trusted,
                    read_credential(load.folder / f"{name}.crt", load.folder / f"{name}.key"),
                    seconds=SECONDS,
                )
            )
            for name in (*HONEST, OPERATOR)
        }


@contextmanager
def attackers(folder: Path, address: str) -> Iterator[None]:
    """Let the hostile at it, in a process of their own."""
    command = [sys.executable, str(HERE / "hostile.py"), str(folder), address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout and process.stdout.readline()
            yield
            assert process.poll() is None, "the hostile gave up"
        finally:
            process.kill()


def outcomes(log: Path) -> dict[str, int]:
    """How many calls the service answered, and how it refused others."""
    lines = (line.split(" ", 4) for line in log.read_text().splitlines())
    found: Counter[str] = Counter()
    for *_, event, values in (line for line in lines if line[3:4] in (["served"], ["refused"])):
        found[json.loads(values).get("code", event)] += 1
    return dict(found)


def report(figures: Mapping[str, Any]) -> str:
    """The figures as a table."""
    lines = ["| call | n | median s | longest s | n under attack | median s | longest s |"]
    lines.append("|---" * 7 + "|")
    for what in sorted({*figures["peace"], *figures["attack"]}):
        cells = []
        for moment in ("peace", "attack"):
            found = figures[moment].get(what)
            cells += (
                [str(found["count"]), f"{found['median']:.2f}", f"{found['longest']:.2f}"]
                if found
                else ["", "", ""]
            )
        lines.append(f"| {what} | {' | '.join(cells)} |")
    before, peak = (figures[f"resident_{m}"] / MEGABYTE for m in ("before", "peak"))
    lines.append(f"Memory of the service: {before:.0f} MB before, {peak:.0f} MB at most.")
    lines.append(f"Calls by outcome: {figures['log']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
