"""Two fine-tuned models merged by fedcompo, by mergekit and by PEFT: seconds, memory, weights.

    python tests/benchmarks/merging_tools.py --mergekit ~/mergekit/bin/python
    python tests/benchmarks/merging_tools.py --backbone deit_tiny_patch16_224 --base deit.pt \
        --checkpoints one.safetensors two.safetensors --adapters one-lora two-lora

Without files, the models are random: θ₀, and changes of it by the order of 1e-3. Each merge is a
command in a process of its own, from files to a file. The commands take turns; the table holds
medians. mergekit has dependencies of its own, so that its interpreter is named; without it, its
rows are left out. fedcompo merges the target weights, so that these are what is compared; a
random rule (DARE) draws elsewhere in each tool: of its rows, read the time alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import peft
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from fedcompo.backbone.adapter import read_adapter
from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.backbone.finetuned import read_finetuned
from fedcompo.config.run import BackboneConfig
from fedcompo.method.contribution import Contribution
from fedcompo.method.heads import Head
from fedcompo.method.lineage import Lineage
from fedcompo.method.statistics import FeatureSums
from fedcompo.storage.files import WEIGHTS

MERGES = {
    "mean": (("linear", {"weight": 0.5}), ("cat", [0.5, 0.5], None)),
    "task-arithmetic:lambda=0.7": (
        ("task_arithmetic", {"weight": 1, "lambda": 0.7}),
        ("cat", [0.7, 0.7], None),
    ),
    "ties:density=0.2": (
        ("ties", {"weight": 1, "density": 0.2}),
        ("ties_svd", [1.0, 1.0], 0.2),
    ),
    "dare:drop=0.8": (
        ("dare_linear", {"weight": 0.5, "density": 0.2}),
        ("dare_linear_svd", [0.5, 0.5], 0.2),
    ),
    "iso-c": (None, None),
    "tsv-m": (None, None),
}
"""By fedcompo's rule: mergekit's method with its parameters; PEFT's with weights and density."""
COLUMNS = (
    "| models | rule | by | seconds | peak memory, MB | largest difference | entries that differ |"
)
LAUNCHER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
text = process.stdout.read().decode(errors="replace")
_, status, used = os.wait4(process.pid, 0)
seconds = time.perf_counter() - began
print(json.dumps([status, seconds, used.ru_maxrss / 1e3, text[-3000:]]))
"""
"""A small process between, since the peak of a child is at least the peak of who started it."""


@dataclass(frozen=True)
class Models:
    """Two models and where they come from."""

    base: Path
    """θ₀, a checkpoint of timm."""
    backbone: str
    """timm's name."""
    sources: tuple[Path, ...]
    """Checkpoints, or folders of adapters."""
    contributions: tuple[Path, ...]
    """The same as fedcompo imports them."""

    @property
    def adapters(self) -> bool:
        return self.sources[0].is_dir()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--backbone", default="vit_tiny_patch16_224", help="timm's name")
    parser.add_argument("--base", type=Path, help="pre-trained weights; default: random")
    parser.add_argument("--checkpoints", type=Path, nargs=2, help="default: random")
    parser.add_argument("--adapters", type=Path, nargs=2, help="default: random, of rank 16")
    parser.add_argument("--mergekit", type=Path, help="interpreter that has mergekit")
    parser.add_argument("--rules", nargs="+", choices=MERGES, default=list(MERGES))
    parser.add_argument("--only", choices=("checkpoints", "adapters"))
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if given.mergekit is None:
        print("Without mergekit: name an interpreter that has it with --mergekit.\n")
    print(f"{COLUMNS}\n|---|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = given.base or random_base(folder, given.backbone)
        backbone = load_backbone(BackboneConfig(backbone=given.backbone, checkpoint=str(base)))
        for what in ("checkpoints", "adapters"):
            if given.only in (None, what):
                make = random_checkpoints if what == "checkpoints" else random_adapters
                sources = tuple(getattr(given, what) or make(folder, given.backbone, base))
                models = imported(folder, backbone, given.backbone, base, sources)
                compare(folder, models, given.rules, given.mergekit, given.repeats)


def compare(
    folder: Path, models: Models, rules: list[str], mergekit: Path | None, repeats: int
) -> None:
    """Merge the models by each rule with each tool, in turns; print a row each."""
    for rule in rules:
        theirs, of_peft = MERGES[rule]
        commands = {"fedcompo": fedcompo(models, rule)}
        if theirs and mergekit and not models.adapters:
            commands["mergekit"] = with_mergekit(folder, models, mergekit, *theirs)
        if of_peft and models.adapters:
            commands["PEFT"] = with_peft(models, *of_peft)
        taken = defaultdict(list)
        for turn in range(repeats):
            for tool, command in commands.items():
                output = folder / f"{turn}-{models.adapters}-{rule.partition(':')[0]}-{tool}"
                taken[tool].append((*timed([*command, str(output)]), output))
        ours = taken["fedcompo"][-1][-1]
        for tool, found in taken.items():
            seconds, peaks, outputs = zip(*found, strict=True)
            cells = ["adapters" if models.adapters else "checkpoints", rule, tool]
            cells += [f"{statistics.median(seconds):.2f}", f"{statistics.median(peaks):.0f}"]
            cells += ["", ""] if tool == "fedcompo" else differences(ours, outputs[-1])
            print(f"| {' | '.join(cells)} |", flush=True)


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds and the peak of its memory, MB."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    launcher = [sys.executable, "-S", "-c", LAUNCHER]
    found = subprocess.run(
        [*launcher, *command], env=environment, capture_output=True, text=True, check=True
    )
    status, seconds, peak, text = json.loads(found.stdout)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{text}")
    return seconds, peak


def differences(ours: Path, theirs: Path) -> list[str]:
    """The largest of the target weights, and in how many entries they are apart by 1e-6 or more."""
    one, other = (load_file(next(path.glob("*.safetensors"))) for path in (ours, theirs))
    names = [n for n in one if (".attn." in n or ".mlp." in n) and n.endswith(".weight")]
    apart = torch.cat([(one[n] - other[n]).abs().flatten() for n in names])
    return [f"{float(apart.max()):.1e}", f"{int((apart > 1e-6).sum()):,} of {len(apart):,}"]


# -- the three tools ------------------------------------------------------------------------------


def fedcompo(models: Models, rule: str) -> list[str]:
    scale = [] if rule.startswith("task-arithmetic") else ["--scale", "1"]
    folders = [str(folder) for folder in models.contributions]
    checkpoint = ["--checkpoint", str(models.base)]
    start = [sys.executable, "-m", "fedcompo.cli", "compose", *folders, *checkpoint]
    return [*start, "--rule", rule, *scale, "--output"]


def with_mergekit(
    folder: Path, models: Models, python: Path, method: str, parameters: dict[str, float]
) -> list[str]:
    both = {key: parameters[key] for key in ("weight", "density") if key in parameters}
    config = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": both} for path in models.sources],
        "parameters": {"lambda": parameters.get("lambda", 1.0), "normalize": method == "ties"},
        "base_model": str(models.base),
    }
    if method == "linear":
        del config["base_model"], config["parameters"]
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = "from mergekit.scripts.merge_raw_pytorch import main; main()"
    return [str(python), "-c", command, "--quiet", "--tensor-intersection", str(file)]


def with_peft(
    models: Models, combination: str, weights: list[float], density: float | None
) -> list[str]:
    adapters = [str(path) for path in models.sources]
    request = [models.backbone, str(models.base), adapters, combination, weights, density]
    return [sys.executable, __file__, "--peft", json.dumps(request)]


def merge_with_peft(request: str, output: str) -> None:
    """Load a model and its adapters, merge these, then into the weights; save the model."""
    backbone, base, adapters, combination, weights, density = json.loads(request)
    model = base_model(backbone, Path(base))
    width = model.num_features
    tuned = peft.PeftModel.from_pretrained(model, adapters[0], "0")
    tuned.load_adapter(adapters[1], "1")
    tuned.add_weighted_adapter(
        ["0", "1"],
        weights,
        "merged",
        combination_type=combination,
        density=density,
        svd_rank=width if combination.endswith("svd") else None,  # all: nothing is cut off
    )
    tuned.set_adapter("merged")
    Path(output).mkdir()
    save_file(tuned.merge_and_unload().state_dict(), Path(output) / WEIGHTS)


# -- the models -----------------------------------------------------------------------------------


def base_model(name: str, base: Path) -> torch.nn.Module:
    state = load_file(base)
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    model = timm.create_model(name, num_classes=classes)
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model


def random_base(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    save_file(model.state_dict(), folder / "base.safetensors")
    return folder / "base.safetensors"


def random_checkpoints(folder: Path, name: str, base: Path) -> list[Path]:
    paths = [folder / f"{i}.safetensors" for i in range(2)]
    for i, path in enumerate(paths):
        draws = torch.Generator().manual_seed(i)
        state = load_file(base)
        for key, value in state.items():
            if "blocks" in key and value.ndim == 2:
                value.add_(torch.randn(value.shape, generator=draws), alpha=1e-3)
        save_file(state, path)
    return paths


def random_adapters(folder: Path, name: str, base: Path) -> list[Path]:
    layers = r".*(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)"
    config = peft.LoraConfig(r=16, target_modules=layers, init_lora_weights=False)
    paths = [folder / f"{i}-lora" for i in range(2)]
    for path in paths:
        model = timm.create_model(name, num_classes=0)
        peft.get_peft_model(model, config).save_pretrained(path)
    return paths


def imported(
    folder: Path, backbone: Backbone, name: str, base: Path, sources: tuple[Path, ...]
) -> Models:
    """Make contributions of sources, with heads and statistics that are random."""
    contributions = []
    for i, source in enumerate(sources):
        found = (read_adapter if source.is_dir() else read_finetuned)(source, backbone)
        draws = torch.Generator().manual_seed(i)
        features = torch.randn(64, backbone.num_features, generator=draws)
        classes = f"{i}a", f"{i}b"
        contribution = Contribution(
            client=f"client-{i}",
            task_vector=found.task_vector,
            head=Head(classes, features[:2], torch.zeros(2)),
            statistics=FeatureSums.of(features, torch.arange(64) % 2, classes),
            num_examples=64,
            lineage=Lineage(),
            settings={"backbone": name, "statistics": "sums"},
        )
        contributions.append(folder / f"{source.stem}-{found.task_vector.kind}-{i}")
        contribution.save(contributions[-1])
    return Models(base, name, sources, tuple(contributions))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peft"]:
        merge_with_peft(*sys.argv[2:])
    else:
        main()
