"""Compare methods, kinds and seeds on a scenario, in tables.

    python simulations/compare/compare.py runs/compare-digits
    python simulations/compare/compare.py runs/compare-cifar simulations/cifar100_small.toml \
        --method ita --method iel:beta=10 --method fedavg --kind lora --seed 0 --seed 1

Without ``--method`` all methods are run (``--list`` lists them); ``name:key=value`` runs one with
another setting, under that name. Each run executes the real apps, in a folder of its own. A
finished run is not repeated, so an interrupted comparison can be continued. Runs share this
machine's cores, ``--jobs`` at a time, without Flower's engine.

``table.md`` holds mean and standard deviation over seeds, ``comparison.json`` each seed's figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

from comparison_tables import Row, tables
from measures import measured
from methods import METHODS, Method, settings_of
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from runs import run

from fedcompo.config.scenario import settings_of as scenario_settings
from fedcompo.errors import FedcompoError

SEEDS = ("0", "1", "2")


@dataclass(frozen=True)
class Job:
    """One method with one kind and seed."""

    name: str
    """The method's, with the settings that differ."""
    method: Method
    kind: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of the run's folder."""
        base = self.method.of or self.name
        safe = "".join(c if c.isalnum() or c in "-.=" else "-" for c in base)
        return f"{safe}-{self.kind}-seed{self.seed}"


def parsed(spec: str) -> tuple[str, Method]:
    """Read ``name`` or ``name:key=value,key=value``."""
    name, _, varied = spec.partition(":")
    if name not in METHODS:
        sys.exit(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
    pairs = dict(pair.split("=", 1) for pair in varied.split(",")) if varied else {}
    method = METHODS[name]
    title = f"{method.title} ({varied.replace('=', ' ')})" if varied else method.title
    return spec, replace(method, title=title, settings={**method.settings, **pairs})


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """Return all jobs of the comparison; derived methods come after their origin."""
    specs = dict(parsed(spec) for spec in arguments.method or METHODS)
    kinds = tuple(arguments.kind or ("lora", "full", "ia3"))
    jobs = [
        Job(name, method, kind, int(seed))
        for seed, (name, method) in product(arguments.seed or SEEDS, specs.items())
        for kind in method.kinds
        if kind in kinds or kind == "tangent"
    ]
    return sorted(jobs, key=lambda job: (job.seed, bool(job.method.of)))


def work(job: Job, arguments: argparse.Namespace, passes: int) -> dict:
    """Do one job, or return its earlier result; empty if it failed."""
    base = METHODS[job.method.of] if job.method.of else job.method
    folder = arguments.output / job.folder
    settings = settings_of(base, job.kind, job.seed, passes)
    results = run(folder, arguments.scenario, settings, arguments.set)
    if not results:
        return {}
    name, changes = job.name.partition(":")[0], not arguments.without_changes
    try:
        return measured(folder, name, results, changes=changes)
    except FedcompoError as error:
        print(f"{folder}, {name} failed: {error}", file=sys.stderr)
        return {}


def main() -> None:
    """Parse the command line, run, write, print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/compare"))
    parser.add_argument("scenario", nargs="?", default="")
    parser.add_argument("--method", action="append", help="repeat for several; default: all")
    parser.add_argument("--kind", action="append", help="repeat for several; default: all")
    parser.add_argument("--seed", action="append", help="repeat for several; default: 0, 1, 2")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument(
        "--without-changes",
        action="store_true",
        help="do not specialise and remove, which takes longer than a run",
    )
    parser.add_argument("--list", action="store_true", help="tell which methods there are")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.list:
        sys.exit("\n".join(f"{name:16} {method.title}" for name, method in METHODS.items()))
    arguments.output = arguments.output.absolute()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    scenario = Path(arguments.scenario) if arguments.scenario else None
    passes = int(scenario_settings(scenario, arguments.set, {}).get("local-epochs", 5))
    jobs, rows = jobs_of(arguments), dict[tuple[str, str], Row]()
    failed = 0
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn()) as progress:
        bar = progress.add_task("runs", total=len(jobs))
        for stage in (False, True):  # derived methods need the runs they are derived from
            own = [job for job in jobs if bool(job.method.of) is stage]
            with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
                found = pool.map(partial(work, arguments=arguments, passes=passes), own)
                for job, figures in zip(own, found, strict=True):
                    progress.advance(bar)
                    failed += not figures
                    if figures:
                        key = job.name, job.kind
                        row = rows.get(key, Row(job.method.title, job.kind, ()))
                        rows[key] = replace(row, seeds=(*row.seeds, figures))
                        write(arguments.output, rows)
    print(tables(list(rows.values())))
    if failed:
        sys.exit(f"{failed} run(s) failed.")


def write(output: Path, rows: dict[tuple[str, str], Row]) -> None:
    """Write the table and the figures of the results so far."""
    listed = list(rows.values())
    (output / "table.md").write_text(tables(listed) + "\n")
    figures = {f"{name} {kind}": list(row.seeds) for (name, kind), row in rows.items()}
    (output / "comparison.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
