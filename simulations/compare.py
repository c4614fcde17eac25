"""Run a scenario over kinds, anchor strengths and seeds, and print one table.

    python simulations/compare.py runs/compare-digits
    python simulations/compare.py runs/compare-cifar simulations/cifar100_small.toml \
        --kind lora --kind ia3 --alpha 0 --alpha 100 --seed 0 --seed 1 --set local-epochs=2

Each run is a ``fedcompo simulate`` of its own, in a folder named after what is varied; runs already
finished are not run again. The table goes to ``table.md`` beside them: mean and standard deviation
over seeds, in per cent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

FEDCOMPO = Path(sys.executable).parent / "fedcompo"
COLUMNS = (
    ("frozen class-IL", "frozen_class_il_accuracy"),
    ("own task", "own_task_accuracy"),
    ("composed class-IL", "class_il_accuracy"),
    ("composed task-IL", "task_il_accuracy"),
)


def run(folder: Path, arguments: argparse.Namespace, settings: dict[str, str]) -> dict:
    """Run once, or take the results that are there; a run that was cut short is started anew."""
    results, asked = folder / "results.json", folder.with_suffix(".json")
    options = [f"--set={key}={value}" for key, value in settings.items()]
    options += [f"--set={assignment}" for assignment in arguments.set]
    scenario = [arguments.scenario] if arguments.scenario else []
    wanted = json.dumps([*scenario, *options])
    if folder.exists() and asked.exists() and asked.read_text() != wanted:
        sys.exit(
            f"{folder} was made with {asked.read_text()}, not {wanted}; choose another output."
        )
    if not results.exists():
        if (folder / "events.jsonl").exists():  # ours, and cut short
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        asked.write_text(wanted)
        began = time.monotonic()
        done = subprocess.run(
            [FEDCOMPO, "simulate", *scenario, "--output", folder, *options],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{folder.name} failed:\n{done.stderr}", flush=True)
            return {}
        print(f"{folder.name}: {time.monotonic() - began:.0f} s", flush=True)
    return json.loads(results.read_text())


def table(rows: dict[tuple[str, str], list[dict]]) -> str:
    """One line for each kind and strength."""
    heads = ["kind", "α", "runs", *(title for title, _ in COLUMNS), "Ω"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (kind, alpha), results in rows.items():
        cells = [kind, alpha, str(len(results))]
        for _, key in COLUMNS:
            values = [100 * r[key] for r in results]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}")
        cells.append(
            f"{statistics.fmean(r['diagnostics']['composition_gap'] for r in results):.2g}"
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("scenario", nargs="?", default="")
    parser.add_argument("--kind", action="append", help="repeat for several; default: all")
    parser.add_argument("--alpha", action="append", help="repeat for several; default: 0 and 100")
    parser.add_argument("--seed", action="append", help="repeat for several; default: 0, 1, 2")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    arguments.output = arguments.output.absolute()
    rows: dict[tuple[str, str], list[dict]] = {}
    failed = 0
    varied = itertools.product(
        arguments.seed or ["0", "1", "2"],
        arguments.kind or ["lora", "full", "ia3"],
        arguments.alpha or ["0", "100"],
    )
    for seed, kind, alpha in varied:
        settings = {"kind": kind, "alpha": alpha, "seed": seed}
        results = run(arguments.output / f"{kind}-alpha{alpha}-seed{seed}", arguments, settings)
        failed += not results
        if results:
            rows.setdefault((kind, alpha), []).append(results)
            (arguments.output / "table.md").write_text(table(rows) + "\n")
    print(table(rows))
    if failed:
        sys.exit(f"{failed} run(s) failed.")


if __name__ == "__main__":
    main()
