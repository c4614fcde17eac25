"""What Hugging Face's `transformers` writes beside a checkpoint: config.json, and the pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.errors import BackboneError
from fedcompo.storage.files import CONFIG

PIXELS = "preprocessor_config.json"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def described_elsewhere(path: Path, backbone: Backbone) -> tuple[tuple[str, ...], list[str]] | None:
    """Read the configuration that ``transformers`` writes beside a checkpoint.

    The small number in its normalisation (1e-12 in ViT, 1e-6 in timm) makes no difference to speak
    of and is not compared.

    Returns:
        Names of the classifier's rows, if it names them, and what it says otherwise than the
        backbone is; None if there is no such configuration.

    Raises:
        BackboneError: If a file is damaged.
    """
    config, pixels = (_json(path.with_name(name)) for name in (CONFIG, PIXELS))
    if "model_type" not in config:
        return None
    config = {**config, **(config.get("vision_config") or {})}
    names = [str(name) for _, name in sorted(_labels(config), key=lambda row: int(row[0]))]
    if any(re.fullmatch(r"LABEL_\d+", name) for name in names):
        names = []
    block: Any = backbone.model.blocks[0]  # type: ignore[index]
    differ, ours = [], backbone.preprocessing
    heads = config.get("num_attention_heads")
    if heads is not None and heads != getattr(block.attn, "num_heads", heads):
        differ.append(f"{CONFIG}: num_attention_heads")
    act, points = config.get("hidden_act", "gelu"), torch.linspace(-4, 4, 33)
    with torch.no_grad():
        same = act in ACTIVATIONS and torch.allclose(
            ACTIVATIONS[act](points), block.mlp.act(points), atol=1e-4
        )
    if not same:
        differ.append(f"{CONFIG}: hidden_act")
    for key, own in (("image_mean", ours.mean), ("image_std", ours.std)):
        if key in pixels and tuple(pixels[key]) != own:
            differ.append(f"{PIXELS}: {key}")
    return tuple(names), differ


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _labels(content)
        return dict(content)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{file} cannot be read as JSON of `transformers` ({type(error).__name__}: {error}). "
            "Get it again, or take it away."
        ) from error


def _labels(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Entries of ``id2label``, whose keys are numbers as text."""
    rows = list((config.get("id2label") or {}).items())
    for number, _ in rows:
        int(number)
    return rows
