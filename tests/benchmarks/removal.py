"""Seconds of a removal, by the number of members and of classes: neither should matter.

    python tests/benchmarks/removal.py
    python tests/benchmarks/removal.py --members 4 64 --classes 10 --scale vit-b

Task vectors are LoRAs of rank 16 with random values; every client owns all classes. The client that
leaves comes back before it leaves again; the median of the repeats is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from registry_workload import ARCHITECTURES, Job, add, fill, remove

COLUMNS = "| classes | members | seconds of a removal | of an addition |\n|--:|--:|--:|--:|"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--members", type=int, nargs="+", default=[4, 64, 500])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--scale", choices=ARCHITECTURES, default="vit-ti")
    parser.add_argument("--kind", default="lora")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to work; 500 members: 3 GB")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(COLUMNS)
    for classes in given.classes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            for members in sorted(given.members):
                job = Job("remove", folder, given.kind, members, given.scale, classes, 1)
                leaves, comes = measured(job, given.repeats)
                print(f"| {classes} | {members} | {leaves:.2f} | {comes:.2f} |", flush=True)


def measured(job: Job, repeats: int) -> tuple[float, float]:
    """Fill the registry; return median seconds of a removal and of an addition."""
    fill(job)
    seconds: dict[str, list[float]] = {"add": [], "remove": []}
    for _ in range(repeats):
        for operation in (add, remove):
            began = time.perf_counter()
            operation(job)
            seconds[operation.__name__].append(time.perf_counter() - began)
    add(job)
    return statistics.median(seconds["remove"]), statistics.median(seconds["add"])


if __name__ == "__main__":
    main()
