"""Run the benchmarks, each in a process of its own, and write what they print to a file.

    python tests/benchmarks/run.py
    python tests/benchmarks/run.py merging_tools images -o tables.md
    python tests/benchmarks/run.py --toy

A benchmark is a script of this folder that takes ``--toy``, with which it runs in seconds. With
``--toy`` all run in this process, so that a test sees in a moment whether they still do.
"""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from measuring import options, run_here

from fedcompo.runtime import installed_versions

FOLDER = Path(__file__).parent
PARTS = "run", "measuring", "hostile", "merges_of_others", "registry_workload"
BENCHMARKS = sorted({path.stem for path in FOLDER.glob("*.py")} - {*PARTS, "server_memory_clients"})
NO_TOYS = ("deployment_phases",)
"""Those that start machines."""
LAST = 3000
"""Characters of what a failed one printed."""


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}")
    parser.add_argument("--toy", action="store_true", help="at toy size, in this process")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks.md"))
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(BENCHMARKS)):
        parser.error(f"no benchmark is named {', '.join(unknown)}: {', '.join(BENCHMARKS)}.")
    names = given.names or [n for n in BENCHMARKS if not (given.toy and n in NO_TOYS)]
    failed, parts = [], [f"# Benchmarks\n\n{machine()}\n"]
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name} ", end="", flush=True)
        began = time.perf_counter()
        text, well = at_toy_size(name) if given.toy else in_a_process(name)
        seconds = time.perf_counter() - began
        failed += [] if well else [name]
        print(f"{seconds:.0f} s" if well else f"failed after {seconds:.0f} s:\n{text}", flush=True)
        parts.append(section(name, text, seconds, toy=given.toy, well=well))
        given.output.write_text("\n".join(parts))  # after each: an interrupt loses one
    print(f"{given.output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def machine() -> str:
    """What figures depend on, in a line."""
    lines = [*facts("/proc/cpuinfo", "model name"), platform.machine()]
    memory = [f"{int(line.split()[0]) / 2**20:.0f} GiB" for line in facts("/proc/meminfo", "MemT")]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else ["no GPU"]
    commit = subprocess.run(
        ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    versions = [f"{name} {version}" for name, version in installed_versions().items()]
    parts = [
        time.strftime("%Y-%m-%d %H:%M"), f"{lines[0]}, {os.cpu_count()} cores", *memory, *gpu,
        f"load {os.getloadavg()[0]:.1f} at the start", f"Python {platform.python_version()}",
        *versions, f"commit {commit or 'unknown'}",
    ]  # fmt: skip
    return ", ".join(parts) + "."


def facts(file: str, key: str) -> list[str]:
    """Values of a file of Linux whose keys begin so; none on another system."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def in_a_process(name: str) -> tuple[str, bool]:
    """Run a benchmark; return what it printed, and whether it ended well."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")], capture_output=True, text=True, check=False
    )
    well = done.returncode == 0
    return done.stdout if well else (done.stdout + done.stderr)[-LAST:], well


def at_toy_size(name: str) -> tuple[str, bool]:
    torch.set_num_threads(1)
    try:
        return run_here([str(FOLDER / f"{name}.py"), "--toy"]).text, True
    except Exception:
        return traceback.format_exc()[-LAST:], False


def section(name: str, text: str, seconds: float, *, toy: bool, well: bool) -> str:
    """A benchmark's title, command, table and seconds."""
    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or name
    title, command = doc.partition("\n")[0], f"python tests/benchmarks/{name}.py"
    body = text.strip() if well else f"Failed:\n\n```text\n{text.strip()}\n```"
    return f"## {title}\n\n`{command}{' --toy' if toy else ''}`, {seconds:.0f} s\n\n{body}\n"


if __name__ == "__main__":
    sys.exit(main())
