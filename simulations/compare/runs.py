"""Run simulations, each in a folder of its own; a finished run is not repeated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedcompo.engine.run_folder import RESULTS


def run(
    folder: Path, scenario: str, settings: Mapping[str, str], assignments: Sequence[str]
) -> dict:
    """Run once, or return the results of a finished run; start an interrupted run again.

    In a process of its own, without Flower's engine.

    Args:
        folder: The run's own; beside it ``<folder>.json`` says with what it was made.
        scenario: File; empty: the digits.
        settings: What this run varies.
        assignments: ``key=value`` each, for all runs alike; the run's own settings win.

    Returns:
        What ``results.json`` holds; empty if the run failed, which is printed.
    """
    asked = folder.with_name(f"{folder.name}.json")
    options = [f"--set={assignment}" for assignment in assignments]
    options += [f"--set={key}={value}" for key, value in settings.items()]
    scenarios = [scenario] if scenario else []
    wanted = json.dumps([*scenarios, *options])
    if folder.exists() and asked.exists() and asked.read_text() != wanted:
        sys.exit(
            f"{folder} was made with {asked.read_text()}, not {wanted}; choose another output."
        )
    if (folder / RESULTS).exists():
        return json.loads((folder / RESULTS).read_text())
    if (folder / "events.jsonl").exists():  # ours, and cut short
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text(wanted)
    began = time.monotonic()
    command = [sys.executable, "-m", "fedcompo.cli", "simulate", "--engine", "in-process"]
    command += [*scenarios, "--output", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{folder.name} failed:\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
        return {}
    print(f"{folder.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return json.loads((folder / RESULTS).read_text())
