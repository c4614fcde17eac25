"""Reads an adapter that PEFT wrote, a LoRA or (IA)³, as a change of a backbone.

What its layers are called in timm is found here; :mod:`fedcompo.backbone.adapter_kinds` says
what each kind computes. The format is described at
https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcompo.backbone.adapter_kinds import Adapted, check_lora, of_ia3, of_lora, scaled_biases
from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.checkpoint import read_checkpoint, require_finite
from fedcompo.backbone.finetuned import (
    LEAST_COSINE,
    FineTuned,
    cosine,
    require_plausible,
    take_classifier,
)
from fedcompo.backbone.foreign_names import timm_name, within
from fedcompo.errors import BackboneError, BackboneMismatch

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
OF_LAYER = re.compile(r"(.+)\.(lora_[AB]\.weight|ia3_l)")
BASE = "base_model_name_or_path"
HARMLESS = {
    *("peft_type", "auto_mapping", BASE, "peft_version", "revision", "task_type"),
    *("inference_mode", "runtime_config", "target_modules", "exclude_modules"),
    *("modules_to_save", "fan_in_fan_out"),
}
"""Keys that leave an adapter of nn.Linear what it is: the file's tensors say which layers there
are, and PEFT itself takes no notice of ``fan_in_fan_out`` at an nn.Linear."""
HARMLESS_IN = {
    "IA3": {"feedforward_modules", "init_ia3_weights"},
    "LORA": {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("lora_dropout", "ensure_weight_tying", "layers_to_transform", "layers_pattern"),
        *("megatron_core", "qalora_group_size"),
    },
}
"""Further ones of each kind that is converted: they are converted too, or change nothing."""
ALLOWED = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
"""Keys of which some values are converted. Other ways to initialise may change the base weights."""


def read_adapter(folder: Path, backbone: Backbone) -> FineTuned:
    """Read the folder of an adapter.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors (or .bin).
        backbone: The pre-trained weights it was trained on. Of them an adapter tells no more than
            a name, :attr:`FineTuned.base`.

    Returns:
        A task vector of its kind, float32, without a change where there is no adapter. The
        classifier of ``modules_to_save`` has no names of classes.

    Raises:
        BackboneError: If a file cannot be read, or the adapter is more than LoRA or (IA)³, or for
            another model.
    """
    config = _config(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER
    path = path if path.is_file() else path.with_suffix(".bin")
    if not path.is_file():
        raise BackboneError(
            f"{folder} has {ADAPTER_CONFIG}, but no {ADAPTER}: the weights are missing. Get the "
            "whole folder again."
        )
    require_plausible(path, backbone)
    state = read_checkpoint(path)
    assert not isinstance(state, Path)
    require_finite(state)
    found = {name.removeprefix(PREFIX): tensor.float() for name, tensor in state.items()}
    layers = _layers(found, backbone)
    if not layers:
        raise BackboneError(
            f"{folder} is an adapter for another model: of {backbone.name!r} it adapts no target "
            f"weight, only {', '.join(sorted(found)[:3])}. Import it into a registry of its model."
        )
    known, start = {n: _known(n, backbone) for n in found}, backbone.model.state_dict()
    beside = {n if known[n][1] is not None else known[n][0]: own for n, own in found.items()}
    classifier, rest = take_classifier(beside, backbone)
    _require_related(folder, beside, start, backbone)
    rest += [n for n, t in beside.items() if n not in start or not torch.equal(t, start[n].cpu())]
    convert = of_lora if config["peft_type"] == "LORA" else of_ia3
    vector = convert(config, layers, backbone)
    rest += scaled_biases(layers, backbone)
    base = config.get(BASE)
    return FineTuned(
        vector, classifier, (), tuple(sorted(rest)), base if isinstance(base, str) else ""
    )


def _layers(found: dict[str, Tensor], backbone: Backbone) -> dict[str, list[Adapted]]:
    """Take what belongs to the target weights out of the adapter's tensors.

    Raises:
        BackboneError: If two layers of the adapter are the same one of the backbone.
    """
    places: dict[tuple[str, int | None], Adapted] = {}
    theta_0 = backbone.theta_0
    for name in sorted(found):
        match = OF_LAYER.fullmatch(name)
        if not match or (place := _known(f"{match[1]}.weight", backbone))[0] not in theta_0:
            continue
        own = places.setdefault(place, Adapted(match[1], place[1], {}))
        if own.layer != match[1]:
            raise BackboneError(
                f"The adapter adapts {own.layer!r} and {match[1]!r}, which are both {place[0]!r} "
                "in timm. Save the adapter of the one model that you want."
            )
        own.tensors[match[2]] = found.pop(name)
    layers: dict[str, list[Adapted]] = {}
    for (weight, _), own in places.items():
        layers.setdefault(weight, []).append(own)
    return layers


def _known(name: str, backbone: Backbone) -> tuple[str, int | None]:
    """Name that timm has for a parameter, else its own; and its part of a fused one."""
    return timm_name(name, backbone.classifier) or (within(name), None)


def _require_related(
    folder: Path, beside: Mapping[str, Tensor], start: Mapping[str, Tensor], backbone: Backbone
) -> None:
    """Compare saved layers, such as norms, with the backbone's; each without its mean, near 1."""
    whole = {n: t for n, t in beside.items() if n in start}
    if not whole or any(t.shape != start[n].shape for n, t in whole.items()):
        return  # nothing to compare with, or of another shape, which is named later
    theirs, ours = (
        torch.cat([state[n].double().cpu().flatten() - state[n].double().mean() for n in whole])
        for state in (whole, start)
    )
    if (alike := cosine(theirs, ours)) < LEAST_COSINE:
        raise BackboneMismatch(
            f"{folder} was trained on other weights than {backbone.name!r} has: the layers that it "
            f"saved whole are not these, fine-tuned (cosine {alike:.2f}, expected above "
            f"{LEAST_COSINE}). Import it into a registry of its model."
        )


def _config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json; refuse what is not converted, by its name."""
    try:
        config = {"peft_type": None, **json.loads(path.read_text(encoding="utf-8"))}
        kind = config["peft_type"]
        beyond = [
            f"{key} = {value!r:.60}"
            for key, value in sorted(config.items())
            if key not in HARMLESS | HARMLESS_IN.get(kind, set())
            and (value not in ALLOWED[key] if key in ALLOWED else value)
        ]
        if beyond or kind not in HARMLESS_IN:
            raise BackboneError(
                f"{path} asks for peft_type = {kind!r:.60}"
                + f" with {', '.join(beyond)}" * bool(beyond)
                + ", and only plain LORA and IA3 can be converted exactly. Merge it into its model "
                "with PEFT's `merge_and_unload`, save the weights, and import those."
            )
        if kind == "LORA":
            check_lora(config)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, re.error) as error:
        raise BackboneError(
            f"{path} cannot be read as PEFT's configuration ({type(error).__name__}: {error}). "
            "Save the adapter again with `save_pretrained`."
        ) from error
    return config
