"""Fine-tuned models merged by fedcompo, a plain mean, mergekit and PEFT: seconds, memory, weights.

    python tests/benchmarks/merging_tools.py --mergekit ~/mergekit/bin/python
    python tests/benchmarks/merging_tools.py --backbone vit_base_patch16_224 --rules mean \
        --checkpoints 16 --adapters 64 --mergekit ~/mergekit/bin/python
    python tests/benchmarks/merging_tools.py --backbone deit_tiny_patch16_224 --base deit.pt \
        --checkpoints one.safetensors two.safetensors --adapters one-lora two-lora

A number instead of files asks for so many random models: theta_0, changed by the order of 1e-3.
Each merge is a command in a process of its own, from files to a file; the commands take turns.
*torch mean* loads the task vectors that fedcompo reads, by safetensors, and writes theta_0 + their
mean, unchecked. mergekit has dependencies of its own, so that its interpreter is named; without it,
its rows are left out. fedcompo merges the target weights, so that these are what is compared; a
random rule (DARE) draws elsewhere in each tool: of its rows, read the time alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import timm
import torch
import yaml
from measuring import Taken, head, middle, options, parsed, row, run
from registry_workload import _fisher
from safetensors.torch import load_file, save_file

from fedcompo.backbone.adapter import read_adapter
from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.backbone.finetuned import read_finetuned
from fedcompo.composition.rules.parsing import RULES
from fedcompo.config.run import BackboneConfig
from fedcompo.method.contribution import Contribution
from fedcompo.method.heads import Head
from fedcompo.method.lineage import Lineage
from fedcompo.method.statistics import FeatureSums
from fedcompo.storage.files import CONTENT

MERGEKIT = {
    "mean": ("linear", {"weight": 1}),
    "task-arithmetic": ("task_arithmetic", {"weight": 1, "lambda": 0.7}),
    "ties": ("ties", {"weight": 1, "density": 0.2}),
    "dare": ("dare_linear", {"weight": 0.5, "density": 0.2}),
}
"""Method and parameters by fedcompo's rule."""
PEFT = {
    "mean": ("cat", None, None),
    "task-arithmetic": ("cat", 0.7, None),
    "ties": ("ties_svd", 1.0, 0.2),
    "dare": ("dare_linear_svd", None, 0.2),
}
"""Combination, weight of each adapter (default: one by their number), density."""
PARAMETERS = {"task-arithmetic": ":lambda=0.7", "ties": ":density=0.2", "dare": ":drop=0.8"}
UNSCALED = {"task-arithmetic", "norm-preserving"}
COLUMNS = (
    *("models", "rule", "by", "seconds", "CPU s", "peak MB"),
    *("seconds / torch mean's", "CPU", "peak", "largest difference", "entries that differ"),
)
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
OTHERS = Path(__file__).with_name("merges_of_others.py")


@dataclass(frozen=True)
class Models:
    """Models and where they come from."""

    base: Path
    """theta_0, a checkpoint of timm."""
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
    parser = options(__doc__)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224", help="timm's name")
    parser.add_argument("--base", type=Path, help="pre-trained weights; default: random")
    parser.add_argument("--checkpoints", nargs="+", default=["2"], help="files, or a number")
    parser.add_argument("--adapters", nargs="+", default=["2"], help="rank 16; 0: none")
    parser.add_argument("--mergekit", type=Path, help="interpreter that has mergekit")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to work; 16 checkpoints of ViT-B: 12 GB")
    given = parsed(parser, backbone="test_vit", rules=["mean", "regmean"], repeats=1)
    torch.set_num_threads(1)  # what is measured has processes of its own
    if given.mergekit is None:
        print("Without mergekit: name an interpreter that has it with --mergekit.\n")
    head(*COLUMNS, text=3)
    for what in (given.checkpoints, given.adapters):
        if what == ["0"]:
            continue
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            folder = Path(name)
            base = given.base or random_base(folder, given.backbone)
            backbone = load_backbone(BackboneConfig(backbone=given.backbone, checkpoint=str(base)))
            sources: Iterable[Path] = map(Path, what)
            if what[0].isdigit():
                make = random_checkpoints if what is given.checkpoints else random_adapters
                sources = make(folder, given.backbone, base, int(what[0]))
            models = imported(folder, backbone, given.backbone, base, sources)
            compare(folder, models, given)


def compare(folder: Path, models: Models, given: argparse.Namespace) -> None:
    """Merge the models by each rule with each tool, in turns; print a row each."""
    what = f"{len(models.sources)} {'adapters' if models.adapters else 'checkpoints'}"
    for rule in given.rules:
        commands = {"fedcompo": fedcompo(models, rule), "torch mean": torch_mean(models)}
        if rule in PEFT and models.adapters:
            commands["PEFT"] = with_peft(models, *PEFT[rule])
        if rule in MERGEKIT and given.mergekit and not models.adapters:
            commands["mergekit"] = with_mergekit(folder, models, *MERGEKIT[rule])
        taken: dict[str, list[Taken]] = {tool: [] for tool in commands}
        for _ in range(given.repeats):
            for tool, command in commands.items():
                shutil.rmtree(folder / tool, ignore_errors=True)
                python = given.mergekit if tool == "mergekit" else sys.executable
                words, here = [*command, folder / tool], given.toy and tool != "mergekit"
                taken[tool].append(run(*words, here=here, python=python, **OFFLINE))
        medians = {tool: middle(some) for tool, some in taken.items()}
        of_mean = medians["torch mean"]
        for tool, found in medians.items():
            ratios = (f"{own / other:.2f}" for own, other in zip(found, of_mean, strict=True))
            alike = tool != "fedcompo" and (tool != "torch mean" or rule == "mean")
            apart = differences(folder / "fedcompo", folder / tool) if alike else ("", "")
            row(what, rule, tool, *(f"{value:.1f}" for value in found), *ratios, *apart)


def differences(ours: Path, theirs: Path) -> tuple[str, str]:
    """The largest of the target weights, and in how many entries they are apart by 1e-6 or more."""
    one, other = (load_file(next(path.glob("*.safetensors"))) for path in (ours, theirs))
    names = [n for n in one if (".attn." in n or ".mlp." in n) and n.endswith(".weight")]
    apart = torch.cat([(one[n] - other[n]).abs().flatten() for n in names])
    return f"{float(apart.max()):.1e}", f"{int((apart > 1e-6).sum()):,} of {len(apart):,}"


# -- the tools' commands, to which the output is added --------------------------------------------


def fedcompo(models: Models, rule: str) -> list[object]:
    scale = [] if rule in UNSCALED else ["--scale", "1"]
    start = ["-m", "fedcompo.cli", "compose", *models.contributions, "--checkpoint", models.base]
    return [*start, "--rule", rule + PARAMETERS.get(rule, ""), *scale, "--output"]


def torch_mean(models: Models) -> list[object]:
    vectors = [str(folder / CONTENT) for folder in models.contributions]
    return [OTHERS, "mean", json.dumps({"base": str(models.base), "vectors": vectors})]


def with_mergekit(
    folder: Path, models: Models, method: str, parameters: dict[str, float]
) -> list[object]:
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
    return ["-c", command, "--quiet", "--tensor-intersection", file]


def with_peft(
    models: Models, way: str, weight: float | None, density: float | None
) -> list[object]:
    adapters = [str(path) for path in models.sources]
    request = {"backbone": models.backbone, "base": str(models.base), "adapters": adapters}
    request |= {"way": way, "weight": weight or 1 / len(adapters), "density": density}
    return [OTHERS, "peft", json.dumps(request)]


# -- the models -----------------------------------------------------------------------------------


def random_base(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=0).state_dict(), folder / "base.safetensors")
    return folder / "base.safetensors"


def random_checkpoints(folder: Path, name: str, base: Path, count: int) -> Iterator[Path]:
    for i in range(count):
        draws, state = torch.Generator().manual_seed(i), load_file(base)
        for key, value in state.items():
            if "blocks" in key and value.ndim == 2:
                value.add_(torch.randn(value.shape, generator=draws), alpha=1e-3)
        save_file(state, folder / f"{i}.safetensors")
        yield folder / f"{i}.safetensors"


def random_adapters(folder: Path, name: str, base: Path, count: int) -> Iterator[Path]:
    layers = r".*(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)"
    config = peft.LoraConfig(r=16, target_modules=layers, init_lora_weights=False)
    tuned = peft.get_peft_model(timm.create_model(name, num_classes=0), config)
    for i in range(count):
        torch.manual_seed(i)
        for key, value in tuned.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(value, std=1e-2)
        tuned.save_pretrained(folder / f"{i}-lora")
        yield folder / f"{i}-lora"


def imported(
    folder: Path, backbone: Backbone, name: str, base: Path, sources: Iterable[Path]
) -> Models:
    """Make contributions of sources; their heads, statistics and Fishers are made up."""
    known, contributions = [], []
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
            fisher=_fisher(backbone, 64),
        )
        known.append(source)
        contributions.append(folder / f"client-{i}")
        contribution.save(contributions[-1])
    return Models(base, name, tuple(known), tuple(contributions))


if __name__ == "__main__":
    main()
