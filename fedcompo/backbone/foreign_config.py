"""What Hugging Face's `transformers` writes beside a checkpoint: config.json, and the pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
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
USUAL = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
"""Activations of models that begin so, where config.json does not say."""
LARGEST_EPS = 1e-5


def described_elsewhere(path: Path, backbone: Backbone) -> tuple[tuple[str, ...], list[str]] | None:
    """Read the configuration that ``transformers`` writes beside a checkpoint.

    The small number in its normalisation is 1e-12 in ViT, 1e-6 in timm, 1e-5 in CLIP, which makes
    no difference to speak of; a larger one is named. An entry that is missing is ``transformers``'
    default: CLIP's activation is not the others'.

    Returns:
        Names of the classifier's rows, if it names them, and what it says otherwise than the
        backbone is; None if there is no such configuration.

    Raises:
        BackboneError: If a file is damaged.
    """
    try:
        config, pixels = (_json(path.with_name(name)) for name in (CONFIG, PIXELS))
        labels = config.get("id2label") or {}
        names = tuple(str(labels[number]) for number in sorted(labels, key=int))
        theirs = [tuple(pixels.get(f"image_{key}") or ()) for key in ("mean", "std")]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{CONFIG} or {PIXELS} beside {path} cannot be read ({type(error).__name__}: {error}). "
            "Get it again, or move the checkpoint elsewhere."
        ) from error
    if "model_type" not in config:
        return None
    kind = str(config["model_type"])
    config = {**config, **(config.get("vision_config") or {})}
    block: Any = backbone.model.blocks[0]  # type: ignore[index]
    heads = getattr(getattr(block, "attn", None), "num_heads", None)
    own = getattr(getattr(block, "mlp", None), "act", None)
    usual = next((own for start, own in USUAL.items() if kind.startswith(start)), "gelu")
    act, points = config.get("hidden_act", usual), torch.linspace(-4, 4, 33)
    with torch.no_grad():
        same = (
            own is not None
            and act in ACTIVATIONS
            and torch.allclose(ACTIVATIONS[act](points), own(points), atol=1e-4)
        )
    ours = backbone.preprocessing
    agree = {
        f"{CONFIG}: num_attention_heads": config.get("num_attention_heads", heads) == heads,
        f"{CONFIG}: hidden_act": same,
        f"{CONFIG}: layer_norm_eps": config.get("layer_norm_eps", 0.0) <= LARGEST_EPS,
        f"{PIXELS}: image_mean": theirs[0] in ((), ours.mean),
        f"{PIXELS}: image_std": theirs[1] in ((), ours.std),
    }
    unnamed = any(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return () if unnamed else names, [what for what, is_so in agree.items() if not is_so]


def _json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
