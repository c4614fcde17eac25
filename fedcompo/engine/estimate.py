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

import torch

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.voting import scales
from fedcompo.config.choices import Curvature, FisherForm, Method, Statistics, Wire, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import Split
from fedcompo.data.decoding import IN_MEMORY
from fedcompo.method.deltas import new_deltas
from fedcompo.method.features import extract_features
from fedcompo.method.heads import zero_head
from fedcompo.runtime import peak_bytes
from fedcompo.training.fit import fit_task_vector
from fedcompo.training.pace import pace
from fedcompo.training.probing import fisher_of_images

MEASURED = 0.1
"""Seconds of the forward passes of a batch; the other steps take a few times as long."""
STARTS = 20.0
"""Seconds until Flower's engine and the processes of its clients have started, and ended."""
MESSAGE = 0.1
"""Seconds that the engine takes for a request and its answer."""
ENGINE_BYTES = 150_000_000
"""Memory of a client's process besides this one's own: Flower and Ray."""
WIRE = {Wire.FLOAT32: 4, Wire.BFLOAT16: 2, Wire.INT8: 1}
"""Bytes of a number."""


@dataclass(frozen=True)
class Amount:
    """What one client owns: its images and classes."""

    train: int
    aside: int
    """Of the training images, those kept aside."""
    test: int
    classes: int
    rate: float
    """Images read a second; infinite: no time."""


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


def measure(backbone: Backbone, config: RunConfig) -> Pace:
    """Time a few passes of the client's own code on random pixels, and steps of training."""
    drawn, labels = torch.Generator().manual_seed(0), torch.arange(config.train.batch_size) % 2
    shape = (config.train.batch_size, *backbone.preprocessing.shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=drawn)
    head = zero_head(("0", "1"), backbone.num_features)
    own = None if config.fisher.curvature is Curvature.FEATURES else head
    kind, form = kinds_of(config.train.kind)[0], config.caps.fisher_form

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def forward() -> object:
        return extract_features(backbone.forward({}), images)

    def fisher() -> object:
        return fisher_of_images(
            backbone, images, config.fisher, seed=0, owner="", head=own, form=form
        )

    def fit(epochs: int) -> object:
        fast = replace(config.train, local_epochs=epochs, local_steps=0, batch_size=len(images))
        split = Split(images, labels[: len(images)])
        return fit_task_vector(backbone, kind, split, head, fast, generator=drawn)

    every, images = images, images[:1]
    forward()  # the first time takes longer
    count = max(2, math.ceil(MEASURED / seconds(forward)))
    images = every[:count]
    taken = seconds(forward), seconds(fisher)
    fit(1)
    short, long = seconds(lambda: fit(1)), seconds(lambda: fit(3))
    step = max((long - short) / 2, long / 6)
    each = [spent / len(images) for spent in (*taken, step)]
    return Pace(each[0], each[1], each[2], peak_bytes().get("resident", 0))


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
    sums = config.head.statistics is Statistics.SUMS and not config.caps.dp_noise
    votes = config.compose.realign and sums and config.train.aside > 0
    tried = len(scales(len(amounts))) if votes else int(config.compose.realign)
    seconds = [_seconds(config, measured, own, rounds, tried) for own in amounts]
    if starts:  # whoever trains a client may not be the process that described it, and read it
        seconds = [s + (a.train + a.test) / a.rate for s, a in zip(seconds, amounts, strict=True)]
    messages = (4 + rounds) * MESSAGE * len(amounts)
    longest = max(max(seconds), (sum(seconds) + messages) / at_once)
    theta_0, head = backbone.theta_0, 4 * (backbone.num_features + 1)
    sent = [_sent(backbone, config, own, rounds, tried) for own in amounts]
    dense = 4 * sum(weight.numel() for weight in theta_0.values())
    received = dense + 2 * head * classes + dense * (tried > 0)
    received += votes * (dense + tried * head * classes)
    alone = config.method.method is Method.ITA
    received += _fisher(config, backbone, 4) if alone else rounds * dense
    whole = 4 * sum(weight.numel() for weight in backbone.model.parameters())
    pixels = math.prod(backbone.preprocessing.shape)
    decoded = [(own.train + own.test) * pixels for own in amounts]
    return Estimate(
        seconds=STARTS * starts + longest,
        memory=measured.resident + ENGINE_BYTES + min(max(decoded), IN_MEMORY),
        sent=sum(sent) // len(amounts),
        received=received,
        disk=3 * whole + 2 * sum(sent) + sum(held for held in decoded if held > IN_MEMORY),
    )


def _seconds(config: RunConfig, measured: Pace, own: Amount, rounds: int, tried: int) -> float:
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


def _sent(backbone: Backbone, config: RunConfig, own: Amount, rounds: int, tried: int) -> int:
    """Bytes that one client sends."""
    width, kind = backbone.num_features, kinds_of(config.train.kind)[0]
    deltas = new_deltas(kind, backbone.theta_0, rank=config.train.rank, generator=torch.Generator())
    numbers = sum(p.numel() for delta in deltas.values() for p in delta.parameters())
    wire, sums = WIRE[config.caps.wire], 4 * (own.classes * width + width * (width + 1) // 2)
    rounded = rounds * (wire * numbers + 4 * (width + 1) * own.classes)
    return (1 + tried) * sums + _fisher(config, backbone, wire) + rounded


def _fisher(config: RunConfig, backbone: Backbone, number: int) -> int:
    """Bytes of a Fisher of so many bytes a number, in the form that the caps allow."""
    margins = sum(sum(weight.shape) for weight in backbone.theta_0.values())
    numbers = {
        FisherForm.DENSE: sum(weight.numel() for weight in backbone.theta_0.values()),
        FisherForm.KRONECKER: 9 * margins,
        FisherForm.FACTORED: margins,
        FisherForm.NONE: 0,
    }
    return number * numbers[config.caps.fisher_form]
