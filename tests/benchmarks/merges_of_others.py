"""Merges that ``merging_tools.py`` sets beside fedcompo's: a process each, with its imports alone.

merges_of_others.py mean '{"base": ..., "vectors": [...]}' OUTPUT
merges_of_others.py peft '{"backbone": ..., "base": ..., "adapters": [...], ...}' OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def mean(base: str, vectors: list[str]) -> dict[str, torch.Tensor]:
    """θ₀ + the mean of the task vectors, in float32; nothing is checked, all are in memory."""
    theta, loaded = load_file(base), [load_file(path) for path in vectors]
    for name in {key.split("/")[1] for key in loaded[0] if key.startswith("task_vector/")}:
        theta[name] += sum(dense(vector, f"task_vector/{name}") for vector in loaded) / len(loaded)
    return theta


def dense(vector: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    delta = vector.get(f"{name}/delta")
    return vector[f"{name}/B"] @ vector[f"{name}/A"] if delta is None else delta


def with_peft(
    backbone: str, base: str, adapters: list[str], way: str, weight: float, density: float | None
) -> dict[str, torch.Tensor]:
    """Load a model and its adapters, merge these, then into the weights."""
    import peft
    import timm

    state = load_file(base)
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    model = timm.create_model(backbone, num_classes=classes)
    model.load_state_dict({key: value.float() for key, value in state.items()})
    rank = model.num_features if way.endswith("svd") else None  # all: nothing is cut off
    tuned = peft.PeftModel.from_pretrained(model, adapters[0], "0")
    names = [str(i) for i in range(len(adapters))]
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        tuned.load_adapter(adapter, name)
    tuned.add_weighted_adapter(
        names, [weight] * len(names), "merged", way, svd_rank=rank, density=density
    )
    tuned.set_adapter("merged")
    return tuned.merge_and_unload().state_dict()


if __name__ == "__main__":
    merged = {"mean": mean, "peft": with_peft}[sys.argv[1]](**json.loads(sys.argv[2]))
    file = Path(sys.argv[3]) / "model.safetensors"
    file.parent.mkdir()
    save_file(merged, file)
    with file.open("rb+") as written:
        os.fsync(written.fileno())
