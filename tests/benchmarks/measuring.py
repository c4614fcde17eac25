"""What benchmarks share: options, rows of a table, and a process that is measured."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fedcompo.runtime import peak_bytes

sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))  # the tests' pico models
LAUNCHER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
text = process.stdout.read().decode(errors="replace")
_, status, used = os.wait4(process.pid, 0)
seconds = time.perf_counter() - began
print(json.dumps([status, text, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))
"""
"""A small process between, since the peak of a child is at least the peak of who started it."""


@dataclass(frozen=True)
class Taken:
    """What a process took."""

    seconds: float
    cpu: float
    """Seconds, of all threads."""
    peak: int
    """Bytes, resident."""
    text: str
    """What it printed."""

    @property
    def told(self) -> dict[str, Any]:
        """The last JSON object that it printed."""
        lines = self.text.splitlines()
        return dict(json.loads(next(line for line in reversed(lines) if line[:1] == "{")))


def middle(some: Sequence[Taken]) -> list[float]:
    """Medians: seconds, CPU seconds, peak MB."""
    figures = ((one.seconds, one.cpu, one.peak / 1e6) for one in some)
    return [statistics.median(values) for values in zip(*figures, strict=True)]


def options(doc: str | None) -> argparse.ArgumentParser:
    """Begin a parser; its description is the first line of a script's docstring."""
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0])


def parsed(parser: argparse.ArgumentParser, **toy: Any) -> argparse.Namespace:
    """Parse the command line; ``--toy`` has these values in place of the defaults.

    A folder to work in is made.
    """
    parser.add_argument("--toy", action="store_true", help="a test of this script, in seconds")
    if "--toy" in sys.argv:
        parser.set_defaults(**toy)
    given = parser.parse_args()
    if getattr(given, "folder", None):
        Path(given.folder).mkdir(parents=True, exist_ok=True)
    return given


def row(*cells: object) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def head(*columns: str, text: int = 1) -> None:
    """Print the head of a table whose first columns are text, and the others numbers."""
    row(*columns)
    print("|---" * text + "|--:" * (len(columns) - text) + "|")


def kept_for_backward(step: Callable[[], object]) -> dict[int, int]:
    """Bytes of each piece of memory that a step keeps for its backward pass, by its place."""
    sizes: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # else its memory would be used, and counted, again
        memory = tensor.untyped_storage()
        sizes[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sizes


def run(
    *command: object, here: bool = False, python: object = sys.executable, **environment: str
) -> Taken:
    """Run Python with these arguments in a process of its own; with ``here``, in this one."""
    words = [str(word) for word in command]
    if here:
        return run_here(words)
    launcher = [sys.executable, "-S", "-c", LAUNCHER, str(python), *words]
    done = subprocess.run(
        launcher, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    status, text, *figures = json.loads(done.stdout)
    if status:
        raise RuntimeError(f"{' '.join(words)} failed:\n{text[-3000:]}")
    return Taken(*figures, text=text)


def run_here(words: list[str]) -> Taken:
    """A process of its own would spend seconds on its imports."""
    module = words[0] == "-m"
    start, name = (runpy.run_module, words[1]) if module else (runpy.run_path, words[0])
    began, used, printed = time.perf_counter(), time.process_time(), io.StringIO()
    with mock.patch.object(sys, "argv", words[module:]), contextlib.redirect_stdout(printed):
        try:
            start(name, run_name="__main__")  # type: ignore[operator]
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{' '.join(words)} failed:\n{printed.getvalue()}") from ended
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    return Taken(seconds, cpu, peak_bytes()["resident"], printed.getvalue())
