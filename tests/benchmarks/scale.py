"""Seconds and memory of the registry's commands, by the number of members: where does it bend?

    python tests/benchmarks/scale.py
    python tests/benchmarks/scale.py --members 4 64 500 --scale vit-ti --classes 1000 --own 0

Task vectors are LoRAs with random values, of rank 2 on the embedded backbone, else of rank 16. Each
command is a process of its own; ``import`` is what a command costs that does nothing. CPU seconds
are those of all its threads. Linux only.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from measuring import head, options, parsed, row, run

FEDCOMPO = "-m", "fedcompo.cli"
MEGABYTE = 1e6


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--members", type=int, nargs="+", default=[10, 100, 1000, 3000])
    parser.add_argument("--classes", type=int, default=200, help="of all clients together")
    parser.add_argument("--own", type=int, default=2, help="classes of a client; 0: all")
    parser.add_argument("--lineage", type=int, default=0, help="clients that anchored each")
    parser.add_argument("--scale", default="embedded", help="or vit-b, vit-ti, tiny")
    parser.add_argument("--only", nargs="+", help="some of the commands")
    parser.add_argument("--folder", help="where to work, and what to go on with")
    parser.add_argument("--fill", help=argparse.SUPPRESS)
    given = parsed(parser, members=[3], scale="tiny", only=["list"])
    if given.fill:
        fill(given.fill)
        return
    head("members", "command", "seconds", "CPU seconds", "peak MB", text=2)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or scratch
        for members in sorted(given.members):
            job = {"folder": folder, "members": members, "scale": given.scale, "own": given.own}
            job |= {"classes": given.classes, "lineage": given.lineage}
            lines = commands(Path(folder), members)
            for command in ["fill", *(given.only or lines)]:
                line = lines.get(command, (__file__, "--fill", json.dumps(job)))
                taken = run(*line, here=given.toy, OMP_NUM_THREADS="1")
                peak = f"{taken.peak / MEGABYTE:.0f}"
                row(members, command, f"{taken.seconds:.2f}", f"{taken.cpu:.2f}", peak)


def fill(values: str) -> None:
    """Bring a registry to one less than so many members, and write the one that comes next."""
    import registry_workload

    job = {"operation": "", "kind": "lora", "threads": 1, **json.loads(values)}
    registry_workload.fill(registry_workload.Job(**job))


def commands(folder: Path, members: int) -> dict[str, tuple[str, ...]]:
    """What is run, by name; who comes by ``add`` goes by ``remove``."""
    output, at = str(folder / f"model-{members}"), ("--registry", str(folder / "registry"))
    return {
        "import": (*FEDCOMPO, "--help"),
        "list": (*FEDCOMPO, "list", *at),
        "show": (*FEDCOMPO, "show", "client-000", *at),
        "add": (*FEDCOMPO, "add", str(folder / "newcomer"), *at),
        "verify": (*FEDCOMPO, "verify", *at),
        "compose": (*FEDCOMPO, "compose", "-o", output, *at),
        "remove": (*FEDCOMPO, "remove", f"client-{members - 1:03d}", "--yes", *at),
    }


if __name__ == "__main__":
    main()
