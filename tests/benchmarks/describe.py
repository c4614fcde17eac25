"""What a client's first phase costs beside a bare forward pass: images a second, passes, memory.

    python tests/benchmarks/describe.py
    python tests/benchmarks/describe.py --backbone deit_tiny_patch16_224 --image-size 80 \
        --checkpoint data/deit_tiny_patch16_224.fp16.safetensors --threads 1 --cpu

Pixels and labels are random and lie in a file, as decoded images do: neither changes the cost. All
take turns in one process, so that ratios hold on a noisy machine; figures are medians. Memory is
the rise of the process's peak, for so many images and for four times as many.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import head, options, parsed, row

from clients.local import LocalClient
from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.config.choices import Curvature
from fedcompo.config.run import BackboneConfig, RunConfig
from fedcompo.data.cache import Put, Report, Stored, stored
from fedcompo.data.client_data import ClientData, Split
from fedcompo.messages.requests import DescribeRequest
from fedcompo.method.images import part_of
from fedcompo.runtime import memory_kept, peak_bytes, reset_peak

BATCHES = (16, 32, 64, 128)
"""Images at a time of the bare forward pass; the fastest counts."""
BARE, ALONE = "bare forward pass", "describe without Fisher"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--backbone", default="embedded")
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--image-size", type=int, default=0)
    parser.add_argument("--classes", type=int, nargs="+", default=[10])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--curvatures", nargs="*", default=list(Curvature))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--cpu", action="store_true", help="seconds of the CPU; with one thread")
    given = parsed(parser, images=16, rounds=1, classes=[3])
    torch.set_num_threads(given.threads or torch.get_num_threads())
    config = BackboneConfig(given.backbone, given.checkpoint, given.image_size)
    backbone = load_backbone(config)
    columns = "backward passes", "images/s", "forward passes", "MiB", "MiB, 4 × images"
    head("classes", "what", *columns, text=2)
    with tempfile.TemporaryDirectory() as folder:
        whole = pixels(backbone, 4 * given.images, Path(folder))
        for classes in given.classes:
            table(backbone, whole, classes, given)


def table(backbone: Backbone, whole: Stored, classes: int, given: argparse.Namespace) -> None:
    """Print the rows for so many classes."""
    passes = dict.fromkeys((BARE, ALONE), 0.0)

    def describe(name: str, count: int) -> None:
        client = client_of(backbone, whole, classes, count, name)
        answer = client.describe(DescribeRequest(fisher=name != ALONE))
        if answer.fisher:
            passes[name] = answer.fisher.report["passes"] / answer.fisher.report["batches"]

    def bare(size: int, count: int) -> None:
        batch = backbone.preprocessing.normalise(whole[:size].to(backbone.device))
        with torch.inference_mode():
            for _ in range(count // size):
                backbone.model(batch)

    sizes = [size for size in BATCHES if given.images % size == 0] or [1]
    work: dict[str, Callable[[int], None]]
    work = {f"{BARE} {size}": partial(bare, size) for size in sizes}
    work |= {name: partial(describe, name) for name in (ALONE, *given.curvatures)}
    memory = {
        name: [rise(do, factor * given.images) for factor in (1, 4)] for name, do in work.items()
    }
    clock = time.process_time if given.cpu else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for name in given.rounds * list(work):
        with memory_kept():
            began = clock()
            work[name](given.images)
            seconds[name].append(clock() - began)
    taken = {name: statistics.median(values) for name, values in seconds.items()}
    least = min((taken[name], name) for name in taken if name.startswith(BARE))[1]
    for name in (least, ALONE, *given.curvatures):
        speed = f"{given.images / taken[name]:,.0f}", f"{taken[name] / taken[least]:.2f}"
        row(classes, name, f"{passes.get(name, 0):g}", *speed, *memory[name])


def rise(work: Callable[[int], None], count: int) -> int:
    """MiB by which the peak memory rises."""
    reset_peak()
    before = peak_bytes().get("resident", 0)
    with memory_kept():
        work(count)
    return (peak_bytes().get("resident", 0) - before) // 2**20


def pixels(backbone: Backbone, count: int, folder: Path) -> Stored:
    """Random images in a file, as those that were decoded."""
    generator, seen = torch.Generator().manual_seed(0), backbone.preprocessing.shape

    def make(put: Put) -> Report:
        for place in range(count):
            put(place, torch.randint(0, 256, seen, generator=generator, dtype=torch.uint8))
        return Report({})

    return stored(folder, "", torch.Size((count, *seen)), make)


def client_of(
    backbone: Backbone, whole: Stored, classes: int, count: int, curvature: str
) -> LocalClient:
    """A client with the first images, dealt to classes in turn."""
    settings = {} if curvature == ALONE else {"curvature": curvature}
    split = Split(part_of(whole, slice(count)), torch.arange(count) % classes)
    names = tuple(f"{index:04}" for index in range(classes))
    return LocalClient(
        "ada", RunConfig.parse(settings), backbone, ClientData("ada", names, split, split)
    )


if __name__ == "__main__":
    main()
