"""Compose by each rule of composition: seconds and peak memory, beside the mean in the same run.

    python tests/benchmarks/rules.py
    python tests/benchmarks/rules.py --kind full --members 4 --rules mean ties:density=0.2
    python tests/benchmarks/rules.py --scale tiny

Members are T task vectors of ViT-B/16 with random values, LoRAs of rank 16 (48 for a fused qkv). A
model is composed at a fixed scale and written; each rule has a process of its own, of one thread.
A scale that follows from lengths makes every total twice. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from registry_workload import ARCHITECTURES, Job, fill

from fedcompo.composition.rules.parsing import RULES
from fedcompo.composition.timm_folder import write_model
from fedcompo.export.selection import from_registry
from fedcompo.registry.registry import Registry
from fedcompo.runtime import peak_bytes

COLUMNS = "| rule | seconds | peak memory, MB | removal |\n|---|--:|--:|---|"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--kind", default="lora")
    parser.add_argument("--scale", choices=ARCHITECTURES, default="vit-b")
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--folder", default=None, help="where to work; ViT-B: 3 GB")
    parser.add_argument("--one", default="", help="measure one rule on a filled registry")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(measured(Path(given.folder), given.one)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        job = Job("compose", folder, given.kind, given.members, given.scale, 10, 1)
        fill(job)
        Registry(job.registry).add(job.newcomer)
        print(COLUMNS)
        for text in given.rules:
            if given.scale == "tiny":
                found = measured(Path(folder), text)
            else:
                command = [sys.executable, __file__, "--folder", folder, "--one", text]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout)
            removal = RULES[text.partition(":")[0]].removal
            cells = text, f"{found['seconds']:.1f}", f"{found['bytes'] / 1e6:.0f}", removal
            print(f"| {' | '.join(cells)} |", flush=True)


def measured(folder: Path, text: str) -> dict[str, float]:
    """Compose a registry's members by a rule."""
    output = folder / "model"
    output.mkdir()
    began = time.perf_counter()
    chosen = from_registry(Registry(folder / "registry"), rule=text)
    write_model(output, chosen.backbone, chosen.stream(), chosen.head)
    seconds = time.perf_counter() - began
    shutil.rmtree(output)
    return {"seconds": seconds, "bytes": peak_bytes()["resident"]}


if __name__ == "__main__":
    main()
