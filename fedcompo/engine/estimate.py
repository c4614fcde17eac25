"""Estimate what a run takes: seconds, memory, bytes sent; from a few measured steps of one client.

The formulas follow the phases of a run (``server/README.md``). Estimated and then run on two idle
cores, the default run took 7 % longer, sent 5 % more bytes, received as many, and took 5 % more
memory and 17 % more disk. Where the machine does other things, a run takes longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.voting import scales
from fedcompo.config.choices import Curvature, FisherForm, Method, Statistics, Wire, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.data.checks import Amount
from fedcompo.data.client_data import Split
from fedcompo.data.decoding import IN_MEMORY
from fedcompo.method.deltas import new_deltas
from fedcompo.method.features import extract_features
from fedcompo.method.heads import zero_head
from fedcompo.runtime import peak_bytes
from fedcompo.training.fit import fit_task_vector
from fedcompo.training.pace import pace
from fedcompo.training.probing import fisher_of_images

MEASURED = 0.3
"""Seconds of forward passes that are measured; the other steps take a few times as long."""
STARTS = 28.0
"""Seconds until Flower's engine and the processes of its clients have started."""
MESSAGE = 0.1
"""Seconds that the engine takes for a request and its answer."""
ENGINE_BYTES = 150_000_000
"""Memory of a client's process besides this one's own: Flower and Ray."""
WIRE = {Wire.FLOAT32: 4, Wire.BFLOAT16: 2, Wire.INT8: 1}
"""Bytes of a number."""


@dataclass(frozen=True)
class Pace:
    """Seconds an image of each step of one client, measured on random pixels."""

    forward: float
    fisher: float
    step: float
    """A forward and a backward step of training."""
    resident: int
    """Memory of this process at its peak, in bytes."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes."""

    seconds: float
    """Of all clients, one group after the other."""
    memory: int
    """Of one client's process, in bytes."""
    sent: int
    """Bytes that a client sends, on average."""
    received: int
    """Bytes that a client receives, on average."""
    disk: int
    """Bytes of the run's folder, and of decoded images that are kept for its phases."""


def measure(backbone: Backbone, config: RunConfig, *, threads: int = 0) -> Pace:
    """Time a few passes of the client's own code on random pixels, and one step of training.

    Args:
        backbone: Pre-trained weights.
        config: Settings of the run.
        threads: CPUs of a client; 0: those of this process.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(threads or usual)
    try:
        return _measured(backbone, config)
    finally:
        torch.set_num_threads(usual)


def _measured(backbone: Backbone, config: RunConfig) -> Pace:
    shape, drawn = backbone.preprocessing.shape, torch.Generator().manual_seed(0)
    one = torch.randint(0, 256, (1, *shape), dtype=torch.uint8, generator=drawn)
    extract_features(backbone.forward({}), one)  # the first time takes longer
    began = time.perf_counter()
    extract_features(backbone.forward({}), one)
    single = time.perf_counter() - began
    count = max(2, min(config.train.batch_size, math.ceil(MEASURED / 3 / single)))
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=drawn)
    classes = ("0", "1")
    head = zero_head(classes, backbone.num_features)
    own = None if config.fisher.curvature is Curvature.FEATURES else head
    form, labels = config.caps.fisher_form, torch.arange(count) % 2

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def fit(epochs: int) -> object:
        kind = kinds_of(config.train.kind)[0]
        own_pace = replace(config.train, local_epochs=epochs, local_steps=0, batch_size=count)
        return fit_task_vector(
            backbone, kind, Split(images, labels), head, own_pace, generator=drawn
        )

    forward = seconds(lambda: extract_features(backbone.forward({}), images))
    given: dict[str, Any] = {"seed": 0, "owner": "", "head": own, "form": form}
    fisher = seconds(lambda: fisher_of_images(backbone, images, config.fisher, **given))
    fit(1)  # the first time takes longer
    short, long = seconds(lambda: fit(1)), seconds(lambda: fit(3))
    step = max((long - short) / 2, long / 6)
    resident = peak_bytes().get("resident", 0)
    return Pace(forward / count, fisher / count, step / count, resident)


def estimate(
    backbone: Backbone,
    config: RunConfig,
    measured: Pace,
    amounts: Sequence[Amount],
    *,
    classes: int,
    at_once: int,
    starts: bool = True,
) -> Estimate:
    """Estimate a run.

    Args:
        backbone: Pre-trained weights.
        config: Settings of the run.
        measured: What :func:`measure` measured.
        amounts: What each client owns.
        classes: Number of classes of all clients together.
        at_once: Clients that work at a time.
        starts: Whether Flower's engine starts first.
    """
    rounds = 1 if config.method.method is Method.ITA else config.method.num_server_rounds
    tried = _models_described(config, len(amounts))
    seconds = [_seconds(config, measured, own, rounds=rounds, tried=tried) for own in amounts]
    if starts:  # whoever trains a client may not be the process that described it, and read it
        seconds = [s + (a.train + a.test) / a.rate for s, a in zip(seconds, amounts, strict=True)]
    messages = (4 + rounds) * MESSAGE * len(amounts)
    longest = max(max(seconds), (sum(seconds) + messages) / at_once)
    traffic = [_traffic(backbone, config, own, classes, rounds, tried) for own in amounts]
    sent, received = (sum(part) // len(amounts) for part in zip(*traffic, strict=True))
    pixels = math.prod(backbone.preprocessing.shape)
    whole = 4 * sum(weight.numel() for weight in backbone.model.parameters())
    decoded = [(own.train + own.test) * pixels for own in amounts]
    stored = sum(held for held in decoded if held > IN_MEMORY)
    return Estimate(
        seconds=STARTS * starts + longest,
        memory=measured.resident + ENGINE_BYTES + min(max(decoded), IN_MEMORY),
        sent=sent,
        received=received,
        disk=3 * whole + 2 * sum(s for s, _ in traffic) + stored,
    )


def _models_described(config: RunConfig, clients: int) -> int:
    """Number of composed models by whose features the clients describe their images again."""
    if not config.compose.realign:
        return 0
    return len(scales(clients)) if _votes(config) else 1


def _votes(config: RunConfig) -> bool:
    sums = config.head.statistics is Statistics.SUMS
    return config.compose.realign and sums and config.train.aside > 0 and not config.caps.dp_noise


def _seconds(config: RunConfig, measured: Pace, own: Amount, *, rounds: int, tried: int) -> float:
    """Seconds of one client's work."""
    kept = own.train - own.aside
    batch, steps = pace(kept, config.train, 1.0)
    fisher = min(own.train, config.fisher.fisher_examples or own.train)
    forward = own.train + kept + 3 * own.test + tried * (kept + own.aside)
    return (
        (own.train + own.test) / own.rate
        + forward * measured.forward
        + fisher * measured.fisher * (config.caps.fisher_form is not FisherForm.NONE)
        + rounds * steps * min(batch, kept) * measured.step
    )


def _traffic(
    backbone: Backbone, config: RunConfig, own: Amount, classes: int, rounds: int, tried: int
) -> tuple[int, int]:
    """Bytes that one client sends and receives."""
    theta_0, width = backbone.theta_0, backbone.num_features
    dense = sum(weight.numel() for weight in theta_0.values())
    margins = sum(sum(weight.shape) for weight in theta_0.values())
    kind = kinds_of(config.train.kind)[0]
    deltas = new_deltas(kind, theta_0, rank=config.train.rank, generator=torch.Generator())
    own_numbers = sum(p.numel() for delta in deltas.values() for p in delta.parameters())
    fisher = {
        FisherForm.DENSE: dense,
        FisherForm.KRONECKER: 9 * margins,
        FisherForm.FACTORED: margins,
        FisherForm.NONE: 0,
    }[config.caps.fisher_form]
    wire = WIRE[config.caps.wire]
    sums = 4 * (own.classes * width + width * (width + 1) // 2)
    head = 4 * (width + 1)
    apart = config.method.method is Method.ITA
    sent = (1 + tried) * sums + wire * fisher + rounds * (wire * own_numbers + head * own.classes)
    received = 4 * fisher if apart else rounds * 4 * dense
    described = 4 * dense * (tried > 0) + _votes(config) * (4 * dense + tried * head * classes)
    return sent, received + described + 4 * dense + 2 * head * classes
