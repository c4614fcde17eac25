"""The pre-trained weights θ₀ that all clients share: from timm's hub, a file, or embedded.

Depth, width and names of weights come from the model; no architecture is hard-coded. A model reads
images, unless its attribute ``modality`` says texts.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedcompo.backbone.checkpoint import Undrawn, fill, read_checkpoint, read_config, require_finite
from fedcompo.backbone.origin import Origin
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.backbone.source import LOCAL, Source, source_of
from fedcompo.backbone.stored import StoredBackbone, stored_at
from fedcompo.config.choices import Modality
from fedcompo.config.run import BackboneConfig
from fedcompo.errors import BackboneError
from fedcompo.method.deltas import Weights
from fedcompo.storage.digests import tensor_digest

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
Built = tuple[nn.Module, str, dict[str, Any], dict[str, Any]]
"""A model, its architecture, arguments that rebuild it, and timm's configuration of its weights."""


@dataclass(frozen=True)
class Backbone:
    """A transformer without classifier, its target weights and its preprocessing."""

    model: nn.Module
    """Maps normalised images (batch, channels, size, size) to features (batch, features)."""
    theta_0: Weights
    """The target weights at their pre-trained values, each (out, in)."""
    name: str
    """``embedded``, timm's name, or ``local-dir:<architecture>`` of a folder."""
    fingerprint: str
    """Name and SHA-256 over names, dtypes, shapes and bytes of *all* of the backbone's weights."""
    preprocessing: Preprocessing
    architecture: str
    """timm's name of the architecture."""
    classifier: str
    """timm's name of the classifier, ``head`` in all plain vision transformers."""
    model_args: dict[str, Any]
    """Arguments that rebuild the model with ``timm.create_model``."""
    origin: Origin = Origin()
    """Whence the weights came."""

    @property
    def num_features(self) -> int:
        """Width of the features."""
        return int(self.model.num_features)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def forward(self, theta: Weights) -> Callable[[Tensor], Tensor]:
        """Return the map from uint8 images to features under other target weights.

        Args:
            theta: Target weights by name, (out, in); the others stay pre-trained.
        """
        weights = {name: tensor.to(self.device) for name, tensor in theta.items()}

        def features(images: Tensor) -> Tensor:
            batch = self.preprocessing.normalise(images.to(self.device))
            result = functional_call(self.model, weights, (batch,))
            assert isinstance(result, Tensor)
            return result

        return features


def load_backbone(config: BackboneConfig, device: torch.device | str = "cpu") -> Backbone:
    """Load the pre-trained weights.

    Args:
        config: Which backbone, at which image size and number of channels.
        device: Device of the model.

    Returns:
        The backbone, frozen, in evaluation mode, float32.

    Raises:
        BackboneError: If the name is unknown, the weights cannot be loaded, or no weight matches.
    """
    name, origin = config.backbone, Origin()
    if name == EMBEDDED:
        model, architecture, model_args, cfg = _embedded(config)
    elif config.checkpoint and (stored := stored_at(Path(config.checkpoint))):
        name, origin = stored.name_as(name), stored.origin
        model, architecture, model_args, cfg = _from_stored(stored, config)
    else:
        source = source_of(name, config.checkpoint)
        name = source.name
        model, architecture, model_args, cfg = _from_timm(source, config)
        if not config.checkpoint:
            origin = Origin.of(cfg, from_hub=not name.startswith(LOCAL))
    model = model.float().eval().requires_grad_(False)
    require_finite(model.state_dict())
    digest = tensor_digest(model.state_dict())
    model = model.to(device)
    return Backbone(
        model,
        target_weights(model, config.target_weights),
        name,
        f"{name}@{digest}",
        Preprocessing.of_timm(cfg, model_args, getattr(model, "modality", Modality.PICTURES)),
        architecture,
        _classifier_name(model, architecture),
        model_args,
        origin,
    )


def target_weights(model: nn.Module, patterns: str) -> Weights:
    """Select the weights that get a delta.

    Args:
        model: A backbone whose blocks are in ``model.blocks``.
        patterns: Shell patterns joined by commas, e.g. ``blocks.*.attn.qkv.weight``.

    Returns:
        The weights by name, detached, sharing memory with the model.

    Raises:
        BackboneError: If a pattern matches nothing, or a weight of another layer than a linear one.
    """
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matching = {name for name in parameters if fnmatchcase(name, pattern)}
        if not matching:
            raise BackboneError(
                f"No weight matches {pattern!r}. The weights of the first block are: "
                f"{', '.join(n for n in parameters if n.startswith('blocks.0.')) or 'none'}. "
                "Change `target-weights`."
            )
        chosen |= matching
    for name in sorted(chosen):
        layer = model.get_submodule(name.rpartition(".")[0])
        if not (name.endswith(".weight") and isinstance(layer, nn.Linear)):
            raise BackboneError(
                f"{name!r} is no weight of an nn.Linear ({type(layer).__name__}); "
                "only those can be adapted. Change `target-weights`."
            )
    return {name: parameters[name].detach() for name in sorted(chosen)}


def _embedded(config: BackboneConfig) -> Built:
    """Read the backbone that is part of the package (half precision on disk)."""
    if config.checkpoint:
        raise BackboneError(
            f"`checkpoint` is {config.checkpoint!r}, but the embedded backbone brings its weights. "
            "Name the architecture in `backbone`."
        )
    assets = resources.files("fedcompo") / "assets"
    recipe = json.loads((assets / "glyph_vit.json").read_text())
    state = safetensors.torch.load((assets / "glyph_vit.safetensors").read_bytes())
    return _build(
        recipe["architecture"], recipe["model_args"], recipe["pretrained_cfg"], state, config
    )


def _from_timm(source: Source, config: BackboneConfig) -> Built:
    if config.checkpoint:
        path = Path(config.checkpoint)
        args, cfg = read_config(path, source.architecture, source.cfg)
        args, cfg = source.model_args | args, source.cfg | cfg
        return _build(source.architecture, args, cfg, read_checkpoint(path), config)
    from fedcompo.backbone.text import timm  # takes seconds to load

    name, given = config.backbone, _input_args(config)
    known = {"classifier": source.cfg.get("classifier") or "head"}  # which timm leaves out
    try:
        model = timm.create_model(
            name, pretrained=True, num_classes=0, pretrained_cfg_overlay=known, **given
        )
    except Exception as error:
        if given:
            _require_takes(source.architecture, config, {**source.model_args, **given}, {})
        raise BackboneError(
            f"The weights of {name!r} could not be had from the hub or its folder "
            f"({type(error).__name__}: {str(error)[:200]}). Without a network, set `checkpoint` to "
            "a file with its weights, such as a registry's `backbone.safetensors`, or use "
            "`backbone = embedded`."
        ) from error
    _require_blocks(model, name)
    cfg = dict(model.pretrained_cfg)
    _require_whole_patches(model, cfg, config.image_size)
    return model, source.architecture, {**source.model_args, **given}, cfg


def _from_stored(stored: StoredBackbone, config: BackboneConfig) -> Built:
    """Make the model of a registry's file, which tells its arguments and its input."""
    stored.tensors.check()
    seen = stored.preprocessing
    cfg = {"input_size": seen.shape, "crop_pct": seen.crop_fraction}
    cfg["first_conv"] = "patch_embed.proj"  # which is averaged where the channels are others
    cfg |= {key: getattr(seen, key) for key in ("mean", "std", "interpolation", "crop_mode")}
    return _build(stored.architecture, stored.model_args, cfg, dict(stored.tensors), config)


def _build(
    architecture: str,
    fixed_args: dict[str, Any],
    cfg: dict[str, Any],
    state: dict[str, Tensor] | Path,
    config: BackboneConfig,
) -> Built:
    """Make a model and load weights from disk, resampled to the wanted input."""
    model_args = {**fixed_args, **_input_args(config)}
    model = _require_takes(architecture, config, model_args, cfg)
    fill(model, architecture, cfg, state, channels=model_args.get("in_chans", 3))
    return model, architecture, model_args, cfg


def _input_args(config: BackboneConfig) -> dict[str, Any]:
    wanted = {"img_size": config.image_size, "in_chans": config.channels}
    return {name: value for name, value in wanted.items() if value}


def _require_takes(
    name: str, config: BackboneConfig, model_args: dict[str, Any], cfg: dict[str, Any]
) -> nn.Module:
    """Make the model without values for its weights; refuse an input that it does not take."""
    from fedcompo.backbone.text import timm  # takes seconds to load

    try:
        with Undrawn():
            model: nn.Module = timm.create_model(
                name, pretrained=False, num_classes=0, **model_args
            )
    except (TypeError, ValueError, AssertionError) as error:
        raise BackboneError(
            f"{name!r} does not take {model_args}: {error}. "
            "Change `image-size` or `channels`, or choose a plain vision transformer."
        ) from error
    _require_blocks(model, name)
    _require_whole_patches(model, cfg, config.image_size)
    return model


def _classifier_name(model: nn.Module, architecture: str) -> str:
    name = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    if not isinstance(name, str):
        raise BackboneError(
            f"{architecture!r} has the classifiers {', '.join(name)}; one joint head can be put "
            "into a model with a single one. Choose the plain variant of this model."
        )
    return name


def _require_blocks(model: nn.Module, name: str) -> None:
    if not hasattr(model, "blocks") or not hasattr(model, "num_features"):
        raise BackboneError(
            f"{name!r} is a {type(model).__name__} without transformer blocks in `model.blocks`; "
            "choose a vision transformer."
        )


def _require_whole_patches(model: nn.Module, cfg: dict[str, Any], size: int) -> None:
    """Refuse an input whose border would be in no patch, unless the weights were trained so."""
    _, height, width = cfg.get("input_size", (0, 0, 0))
    if size and height != width and getattr(model, "modality", None) != Modality.TEXTS:
        raise BackboneError(
            f"The weights read pictures of {height} x {width} pixels, not square, and timm cannot "
            f"resample them to {size}. Leave `image-size` out."
        )
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", 1)
    side = math.lcm(*patch) if isinstance(patch, tuple) else patch
    as_trained = size == cfg.get("input_size", (0,))[-1]
    if size % side == 0 or as_trained or getattr(embed, "dynamic_img_pad", False):
        return
    below = size - size % side
    raise BackboneError(
        f"`image-size` is {size}, no multiple of the {side} pixels of a patch; the last "
        f"{size % side} would be cut off. Set it to "
        + (f"{below} or {below + side}." if below else f"{side}.")
    )
