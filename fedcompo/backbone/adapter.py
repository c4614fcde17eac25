r"""Reads a LoRA adapter that PEFT wrote as a change of a backbone: :math:`\Delta = sBA`.

s is α/r, or α/√r in rsLoRA; rank and α may differ by layer. The factor goes into B. What PEFT can
do beyond that (DoRA, trained biases, layers repeated, …) makes another function of the weights, and
is refused by its name in adapter_config.json. The format is described at
https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.checkpoint import read_checkpoint, require_finite
from fedcompo.backbone.finetuned import FineTuned, rows
from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneError
from fedcompo.method.task_vector import TaskVector

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
CONVERTED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"),
    *("inference_mode", "lora_dropout", "runtime_config", "ensure_weight_tying"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "megatron_core", "qalora_group_size", "fan_in_fan_out"),
}
"""Keys that leave an adapter of nn.Linear what it is: the file's tensors say which layers there
are, and PEFT itself takes no notice of ``fan_in_fan_out`` at an nn.Linear."""
ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}
"""Keys of which some values are converted. Other ways to initialise may change the base weights."""


def read_adapter(folder: Path, backbone: Backbone) -> FineTuned:
    """Read the folder of an adapter.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors (or .bin).
        backbone: The pre-trained weights it was trained on; an adapter does not tell which.

    Returns:
        A task vector of kind ``lora``, float32, zero at target weights without an adapter. The
        classifier of ``modules_to_save`` has no names of classes.

    Raises:
        BackboneError: If a file cannot be read, or the adapter is more than LoRA or for another
            model.
    """
    config = _config(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER
    state = read_checkpoint(path if path.is_file() else path.with_suffix(".bin"))
    assert not isinstance(state, Path)
    require_finite(state)
    found = {name.removeprefix(PREFIX): tensor.float() for name, tensor in state.items()}
    factors: dict[str, Tensor] = {}
    adapted = 0
    for name, weight in backbone.theta_0.items():
        layer = name.removesuffix(".weight")
        a, b = (found.pop(f"{layer}.lora_{factor}.weight", None) for factor in "AB")
        if a is None and b is None:
            a, b = weight.new_zeros(1, weight.shape[1]), weight.new_zeros(weight.shape[0], 1)
        else:
            adapted += 1
            rank = _of_layer(config, "rank_pattern", "r", layer)
            _require_shapes(layer, a, b, (rank, *weight.shape))
            assert b is not None
            alpha = _of_layer(config, "alpha_pattern", "lora_alpha", layer)
            b = b * (alpha / (rank**0.5 if config.get("use_rslora") else rank))
        assert a is not None
        factors |= {f"{name}/A": a.cpu(), f"{name}/B": b.cpu()}
    if not adapted:
        raise BackboneError(
            f"{folder} is an adapter for another model: of {backbone.name!r} it adapts no target "
            f"weight, only {', '.join(sorted(found)[:3])}. Import it into a registry of its model."
        )
    classifier = [found.pop(f"{backbone.classifier}.{part}", None) for part in ("weight", "bias")]
    vector = TaskVector(Kind.LORA, factors, backbone.fingerprint)
    return FineTuned(vector, rows(*classifier), (), tuple(sorted(found)))


def _config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json; refuse what is not converted, by its name."""
    try:
        config = {"peft_type": None, **json.loads(path.read_text(encoding="utf-8"))}
        _refuse_beyond(path, config)
        patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
        ranks = config["r"], *patterns[0].values()
        alphas = config["lora_alpha"], *patterns[1].values()
        for pattern in (key for keys in patterns for key in keys):
            re.compile(pattern)
        if not all(type(r) is int and r > 0 for r in ranks):
            raise ValueError(f"ranks {ranks}, expected positive integers")
        if not all(type(alpha) in (int, float) for alpha in alphas):
            raise ValueError(f"alphas {alphas}, expected numbers")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, re.error) as error:
        raise BackboneError(
            f"{path} cannot be read as PEFT's configuration of a LoRA ({type(error).__name__}: "
            f"{error}). Save the adapter again with `save_pretrained`."
        ) from error
    return config


def _refuse_beyond(path: Path, config: Mapping[str, Any]) -> None:
    plain = CONVERTED | HARMLESS
    beyond = [
        f"{key} = {value!r:.60}"
        for key, value in sorted(config.items())
        if key not in plain and (value not in ALLOWED[key] if key in ALLOWED else value)
    ]
    if beyond:
        raise BackboneError(
            f"{path} asks for more than LoRA, which cannot be converted exactly: "
            f"{', '.join(beyond)}. Merge it into its model with PEFT's `merge_and_unload`, save "
            "the weights, and import those."
        )


def _of_layer(config: Mapping[str, Any], patterns: str, default: str, layer: str) -> Any:
    """A layer's rank or α: of the first pattern that fits the end of its name, as PEFT reads it."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return config[default]


def _require_shapes(
    layer: str, a: Tensor | None, b: Tensor | None, sizes: tuple[int, int, int]
) -> None:
    rank, out, width = sizes
    shapes = [None if factor is None else tuple(factor.shape) for factor in (a, b)]
    if shapes != [(rank, width), (out, rank)]:
        raise BackboneError(
            f"The adapter's factors A, B of {layer!r} have shapes {shapes[0]}, {shapes[1]}, "
            f"expected {(rank, width)}, {(out, rank)} by its configuration and this backbone."
        )
