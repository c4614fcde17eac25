"""The composed model as a folder that plain timm loads.

::

    import timm
    model = timm.create_model("local-dir:runs/digits/model", pretrained=True).eval()
    logits = model(images)  # normalised as config.json says; class names are in config.json too
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.stored import StoredBackbone
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head
from fedcompo.storage.files import CONFIG, WEIGHTS, write_atomically
from fedcompo.storage.tensorstream import TensorWriter

LINEARISED = (
    "{architecture} linearised: timm would let the weights go all the way and compute something "
    "else; load it with Registry.model, or a published folder with fedcompo.load_tangent_model"
)
"""Stands in place of the architecture for a composition of tangents; timm knows no such model."""


def export_timm(folder: Path, backbone: Backbone, theta: Weights, head: Head) -> None:
    """Write weights and configuration for ``timm.create_model("local-dir:...")``.

    The folder is created. What ``theta`` does not name stays pre-trained. Not for a composition of
    tangents; see :func:`write_model`.
    """
    state = {name: tensor.detach() for name, tensor in backbone.model.state_dict().items()}
    state |= {name: tensor.detach() for name, tensor in theta.items()}
    state |= head.as_classifier(backbone.classifier)
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in state.items()}
    write_atomically(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    _write_config(folder, timm_config(backbone, head.classes))


def timm_config(
    backbone: Backbone | StoredBackbone, classes: tuple[str, ...], *, linearised: bool = False
) -> dict[str, Any]:
    """Return the content of config.json: what timm needs to build the model and feed it.

    Classes are in the order of the logits. Of weights composed of tangents, timm refuses it.
    """
    seen = backbone.preprocessing
    name = LINEARISED if linearised else "{architecture}"
    return {
        "architecture": name.format(architecture=backbone.architecture),
        "num_classes": len(classes),
        "num_features": backbone.num_features,
        "label_names": list(classes),
        "model_args": backbone.model_args,
        "pretrained_cfg": {
            "tag": "fedcompo",
            "custom_load": False,
            "num_classes": len(classes),
            "input_size": list(seen.shape),
            "fixed_input_size": True,
            "interpolation": seen.interpolation,
            "crop_pct": seen.crop_fraction,
            **({} if seen.crop_mode == "center" else {"crop_mode": seen.crop_mode}),
            "mean": list(seen.mean),
            "std": list(seen.std),
            "first_conv": "patch_embed.proj",
            "classifier": backbone.classifier,
        },
    }


def write_model(
    folder: Path,
    backbone: StoredBackbone,
    changed: Iterable[tuple[str, Tensor]],
    head: Head,
    *,
    linearised: bool = False,
    about: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a folder that plain timm loads (of tangents: refuses), one weight at a time.

    Args:
        folder: A folder that exists.
        backbone: Pre-trained weights, for all that is not changed.
        changed: Names and values of target weights, in the order of names.
        head: Joint head.
        linearised: Whether the weights are composed of tangents.
        about: Further entries of the manifest.
        dtype: Of all floating-point tensors, each rounded once; None: as they are.

    Raises:
        ConfigError: If tangents would be rounded to another dtype.
        ContributionError: If a value is not finite, or leaves the range of the dtype.
    """
    if linearised and dtype not in (None, torch.float32):
        raise ConfigError(
            f"A composition of tangents cannot be written as {dtype}: its change is found again by "
            "subtracting θ₀, of which rounding would leave little. Use `dtype = float32`."
        )
    classifier = head.as_classifier(backbone.classifier)
    layout = dict(backbone.tensors.layout)
    layout |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in classifier.items()}
    if dtype is not None:
        layout = {n: (dtype if t.is_floating_point else t, s) for n, (t, s) in layout.items()}
    upcoming = iter(changed)
    pending = next(upcoming, None)
    manifest = {"content": "model", "base": backbone.fingerprint, **(about or {})}
    with TensorWriter(folder / WEIGHTS, layout, manifest) as writer:
        for name in sorted(layout):
            own = classifier.get(name)
            if pending is not None and pending[0] == name:
                own, pending = pending[1], next(upcoming, None)
            value = (backbone.tensors[name] if own is None else own).to(layout[name][0])
            if not value.isfinite().all():
                raise ContributionError(
                    f"The composed {name!r} has values that are not finite as {value.dtype}. Use a "
                    "smaller `scale`, or a `dtype` with a larger range."
                )
            writer.write(name, value)
    if pending is not None:
        raise ValueError(f"{pending[0]!r} is no weight of the backbone, or came out of order")
    _write_config(folder, timm_config(backbone, head.classes, linearised=linearised))


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    write_atomically(folder / CONFIG, f"{json.dumps(config, indent=2)}\n".encode())
