"""Add, remove, compose: seconds, bytes and memory, beside a plain read of the same files.

    python tests/benchmarks/registry_operations.py
    python tests/benchmarks/registry_operations.py --kind lora --members 4 16 --json found.json
    python tests/benchmarks/registry_operations.py --scale tiny

Task vectors of ViT-B/16 with random values: full (340 MB) and LoRA of rank 16 (14 MB). Each
operation has a process of its own; ``tiny`` is a test of this script, in one process. Linux only.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from registry_workload import OPERATIONS, Job

from fedcompo.composition import fixed_point, head
from fedcompo.method.task_vector import TaskVector
from fedcompo.runtime import peak_bytes
from fedcompo.storage.digests import TensorDigest
from fedcompo.storage.tensorstream import StreamedTensors, TensorWriter

PIECE = 1 << 22
MEGABYTE = 1e6
CHEAP = 60.0
"""Seconds; what takes longer is not repeated."""
GROUPS = (
    (("add", "remove"), "add"),
    (("compose", "load_file_mean", "safe_open_mean"), "compare"),
)
"""Operations that take turns, and what is done after them."""
SECTIONS = (
    ("read", StreamedTensors, "__getitem__"),
    ("SHA-256", hashlib, "file_digest"),
    ("SHA-256", TensorDigest, "add"),
    ("SHA-256", fixed_point, "hash_rounded"),
    ("arithmetic", TaskVector, "check"),
    ("arithmetic", fixed_point, "rounded"),
    ("arithmetic", fixed_point, "add"),
    ("arithmetic", fixed_point, "compose"),
    ("head", head, "discriminant"),
    ("write", TensorWriter, "write"),
    ("write", shutil, "copyfileobj"),
    ("sync", os, "fsync"),
)
"""Whose time is whose; that of a section within another is not the other's."""
HEADER = (
    "| kind | T | operation | n | cache | seconds | CPU s | seconds went to | read MB | written MB "
    "| from disk MB | to disk MB | peak RSS +MB | plain read s | ratio | ratio to read + write |\n"
    "|---|--:|---|--:|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)
MEANING = """
T: members with the one that comes or goes. n: repeats, of which this is the median one.
cache: `warm` where the files were read just before, `dropped` where they do not fit in memory and
were put out of it; the same for the operation and for the plain read beside it.
CPU s: of all threads, the system's share included; where others use the machine, the steadier one.
Only here counts what other threads hash meanwhile.
seconds went to: parts of 3 % or more. SHA-256: the registry's checks, and the reading of whole
files for them. write: until the system took the bytes, copying included; sync: until the disk had
them. head: the joint head of {classes} classes.
read, written: bytes asked of the system (files mapped by safetensors are not among them); from
disk, to disk: what it then moved.
peak RSS +: above the {base:.0f} MB of a process that imports the same modules and does nothing;
safetensors maps files, and what is mapped counts.
ratio: to reading the same files once, in pieces of 4 MiB, and doing nothing with them. Ratio to
read + write: to that and writing as many bytes as the operation wrote, synced.
compose: `fedcompo compose`, uniform. load_file_mean, safe_open_mean: θ₀ + mean of the same task
vectors by safetensors and torch, unchecked, synced; their weights are compose's, but for rounding.
"""


@dataclass(frozen=True)
class Measured:
    """What an operation took."""

    seconds: float
    cpu: float
    """Seconds, of all threads."""
    parts: dict[str, float]
    """Seconds by section; their sum."""
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--kind", nargs="+", choices=("full", "lora"), default=("full", "lora"))
    parser.add_argument("--members", nargs="+", type=int, default=(4, 16, 64))
    parser.add_argument("--scale", choices=("vit-b", "tiny"), default="vit-b")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--folder", default=None, help="where to work; full, T = 64: 28 GB")
    parser.add_argument("--json", type=Path, help="file for the same figures")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(asdict(measure(Job(**json.loads(arguments.job))))))
        return
    rows = []
    print(HEADER)
    for kind in arguments.kind:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            start = Job(
                "nothing", folder, kind, 0, arguments.scale, arguments.classes, arguments.threads
            )
            base = run(start).peak
            for members in sorted(arguments.members):
                for job, n, found in series(replace(start, members=members), arguments.repeats):
                    print(row(job, n, found, base), flush=True)
                    rows.append({**asdict(job), "n": n, **asdict(found), "base": base})
    print(MEANING.format(classes=arguments.classes, base=base / MEGABYTE))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def series(job: Job, repeats: int) -> Iterator[tuple[Job, int, Measured]]:
    """Measure all operations at one number of members, which the registry has afterwards."""
    run(replace(job, operation="fill"))
    found: dict[Job, list[Measured]] = {}
    for group, afterwards in GROUPS:
        jobs = [replace(job, operation=operation) for operation in group]
        for _ in range(repeats):
            for one in jobs:
                found.setdefault(one, []).append(beside_plain(one))
            if max(found[one][0].seconds for one in jobs) > CHEAP:
                break
        run(replace(job, operation=afterwards))
    for one, several in found.items():
        middle = sorted(several, key=lambda measured: measured.seconds)[(len(several) - 1) // 2]
        yield one, len(several), middle


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
    if job.scale == "tiny":
        return measure(job)
    command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


# -- within the process that works ----------------------------------------------------------------


def measure(job: Job) -> Measured:
    torch.set_num_threads(job.threads)
    shutil.rmtree(job.output, ignore_errors=True)
    job.output.mkdir(parents=True)
    before, began = transferred(), time.process_time()
    with clocks() as seconds:
        OPERATIONS[job.operation](job)
    cpu, after = time.process_time() - began, transferred()
    keys = ("rchar", "wchar", "read_bytes", "write_bytes")
    moved = (after[key] - before[key] for key in keys)
    peak = peak_bytes()["resident"]
    return Measured(sum(seconds.values()), cpu, dict(seconds), *moved, peak=peak)


@contextmanager
def clocks() -> Iterator[Counter[str]]:
    """Share out the seconds of this thread among sections; what is in none, or waits: ``other``."""
    seconds: Counter[str] = Counter()
    sections, since, here = ["other"], time.perf_counter(), threading.get_ident()

    def turn() -> None:
        nonlocal since
        now = time.perf_counter()
        seconds[sections[-1]] += now - since
        since = now

    def timed(section: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if threading.get_ident() != here:  # what passes beside counts in CPU s alone
                return function(*args, **kwargs)
            turn()
            sections.append(section)
            try:
                return function(*args, **kwargs)
            finally:
                turn()
                sections.pop()

        return wrapped

    with ExitStack() as patches:
        for section, owner, attribute in SECTIONS:
            function = timed(section, getattr(owner, attribute))
            patches.enter_context(mock.patch.object(owner, attribute, function))
        yield seconds
        turn()


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


# -- the table ------------------------------------------------------------------------------------


def row(job: Job, n: int, found: Measured, base: int) -> str:
    shares = {part: seconds / found.seconds for part, seconds in found.parts.items()}
    parts = sorted((s, part) for part, s in shares.items() if s >= 0.03)
    moved = (found.read, found.written, found.from_disk, found.to_disk, found.peak - base)
    cells = (
        job.kind,
        job.members,
        job.operation,
        n,
        "warm" if found.warm else "dropped",
        f"{found.seconds:.2f}",
        f"{found.cpu:.2f}",
        ", ".join(f"{part} {100 * share:.0f} %" for share, part in reversed(parts)),
        *(f"{count / MEGABYTE:.0f}" for count in moved),
        f"{found.plain_read:.2f}",
        f"{found.seconds / found.plain_read:.1f}",
        f"{found.seconds / (found.plain_read + found.plain_write):.1f}",
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |"


if __name__ == "__main__":
    main()
