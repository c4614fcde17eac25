"""Add, remove, compose: seconds, bytes and memory, beside a plain read and write of the same files.

    python tests/benchmarks/registry_operations.py
    python tests/benchmarks/registry_operations.py --kind full --members 4 64
    python tests/benchmarks/registry_operations.py --scale vit-ti --members 4 500 --classes 10 1000

Task vectors of ViT-B/16 with random values: full (340 MB) and LoRA of rank 16 (14 MB). Each
operation has a process of its own. The client that leaves comes back before it leaves again; every
client owns all classes. ``merging_tools.py`` sets composing beside what others do. Linux only.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import measuring
import torch
from measuring import head, options, parsed, row
from registry_workload import ARCHITECTURES, OPERATIONS, Job

from fedcompo.runtime import peak_bytes

PIECE = 1 << 22
CHEAP = 60.0
"""Seconds; what takes longer is not repeated."""
MEASURED = ("add", "compose", "remove")
"""They take turns in this order."""
COLUMNS = (
    *("kind", "classes", "T", "operation", "cache", "seconds", "CPU s", "read MB", "written MB"),
    *("from disk MB", "to disk MB", "peak RSS +MB", "read s", "ratio", "ratio to read + write"),
)
MEANING = """
T: members with the one that comes or goes. Medians; cache: `warm` where the files were read just
before, `dropped` where they do not fit in memory and were put out of it. CPU s: of all threads, the
system's share included. read, written: bytes asked of the system (files mapped by safetensors are
not among them); from disk, to disk: what it then moved. peak RSS +: above the {base:.0f} MB of a
process that imports the same modules and does nothing. ratio: to reading the same files once, in
pieces of 4 MiB; ratio to read + write: to that and writing as many bytes as the operation, synced.
"""


@dataclass(frozen=True)
class Measured:
    """What an operation took."""

    seconds: float
    cpu: float
    """Seconds, of all threads."""
    read: int
    written: int
    from_disk: int
    to_disk: int
    peak: int
    """Largest resident size of the process, with all it imported."""
    warm: bool = True
    plain_read: float = 0.0
    plain_write: float = 0.0
    """Seconds; of the same files, and of as many bytes."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--kind", nargs="+", choices=("full", "lora"), default=("full", "lora"))
    parser.add_argument("--members", nargs="+", type=int, default=(4, 16))
    parser.add_argument("--scale", choices=ARCHITECTURES, default="vit-b")
    parser.add_argument("--classes", nargs="+", type=int, default=(10,))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--folder", default=None, help="where to work; full, T = 64: 28 GB")
    parser.add_argument("--job", help="what one process does")
    given = parsed(parser, members=(2, 3), scale="tiny", classes=(2,), repeats=1)
    if given.job:
        print(json.dumps(asdict(measure(Job(**json.loads(given.job))))))
        return
    head(*COLUMNS, text=5)
    for kind in given.kind:
        for classes in given.classes:
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                start = Job("nothing", folder, kind, 0, given.scale, classes, given.threads)
                base = run(start).peak
                for members in sorted(given.members):
                    series(replace(start, members=members), given.repeats, base)
    print(MEANING.format(base=base / 1e6))


def series(job: Job, repeats: int, base: int) -> None:
    """Measure all operations at one number of members; afterwards one is missing."""
    run(replace(job, operation="fill"))
    taken: dict[str, list[Measured]] = {operation: [] for operation in MEASURED}
    for _ in range(repeats):
        for operation, found in taken.items():
            found.append(beside_plain(replace(job, operation=operation)))
        if max(found[0].seconds for found in taken.values()) > CHEAP:
            break
    for operation, found in taken.items():
        fields = {name: [getattr(one, name) for one in found] for name in asdict(found[0])}
        middle = {name: statistics.median(values) for name, values in fields.items()}
        print_row(job, operation, Measured(**middle), base)


def beside_plain(job: Job) -> Measured:
    """Measure an operation, and around it a plain read and write of as many bytes."""
    files = job.inputs
    warm = settle(files)
    plain_read = timed_read(files)
    settle(files)
    found = run(job)
    plain_write = timed_write(Path(job.folder) / "plain", found.written)
    return replace(found, warm=warm, plain_read=plain_read, plain_write=plain_write)


def run(job: Job) -> Measured:
    """Run a job in a process of its own; a tiny one here."""
    here, threads = job.scale == "tiny", str(job.threads)
    words = __file__, "--job", json.dumps(asdict(job))
    return Measured(**measuring.run(*words, here=here, OMP_NUM_THREADS=threads).told)


def measure(job: Job) -> Measured:
    """Do a job in this process."""
    torch.set_num_threads(job.threads)
    shutil.rmtree(job.output, ignore_errors=True)
    job.output.mkdir(parents=True)
    before, began, used = transferred(), time.perf_counter(), time.process_time()
    OPERATIONS[job.operation](job)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    after = transferred()
    keys = ("rchar", "wchar", "read_bytes", "write_bytes")
    moved = (after[key] - before[key] for key in keys)
    return Measured(seconds, cpu, *moved, peak=peak_bytes()["resident"])


def transferred() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


# -- plain reading and writing --------------------------------------------------------------------


def settle(files: Sequence[Path]) -> bool:
    """Read the files ahead if half of the free memory holds them, else drop them; tell which."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    warm = sum(path.stat().st_size for path in files) < free / 2
    if warm:
        timed_read(files)
    else:
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return warm


def timed_read(files: Sequence[Path]) -> float:
    piece, began = bytearray(PIECE), time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    return time.perf_counter() - began


def timed_write(path: Path, count: int) -> float:
    piece, began = os.urandom(PIECE), time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for left in range(count, 0, -PIECE):
            file.write(piece[:left])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def print_row(job: Job, operation: str, found: Measured, base: int) -> None:
    moved = (found.read, found.written, found.from_disk, found.to_disk, found.peak - base)
    row(
        *(job.kind, job.classes, job.members, operation, "warm" if found.warm else "dropped"),
        *(f"{found.seconds:.2f}", f"{found.cpu:.2f}", *(f"{count / 1e6:.0f}" for count in moved)),
        f"{found.plain_read:.2f}",
        f"{found.seconds / found.plain_read:.1f}",
        f"{found.seconds / (found.plain_read + found.plain_write):.1f}",
    )


if __name__ == "__main__":
    main()
