"""Read weights from disk, and load them into a model of another input size."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedcompo.backbone.file_kind import SUFFIXES, check_kind
from fedcompo.backbone.prefixes import converter, flatten, without_prefix
from fedcompo.errors import BackboneError
from fedcompo.storage.files import CONFIG

logger = logging.getLogger(__name__)

INPUT_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""Entries of timm's configuration that say how a picture becomes the model's input."""
DRAWS = {"uniform_", "normal_", "erfinv_", "kaiming_uniform_", "trunc_normal_"}
"""Functions of torch that initialise a tensor at random."""
SHAPES = re.compile(
    r"size mismatch for (\S+): copying .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", re.DOTALL
)
"""The first weight of another shape in torch's report: its name, found, expected."""


class Undrawn(TorchFunctionMode):
    """Draws no initial values of a model that :func:`fill` fills; for a ViT-B it takes seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Leave the tensor of a draw as it is."""
        given = kwargs or {}
        if func.__name__ in DRAWS:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def fill(
    model: nn.Module,
    architecture: str,
    cfg: dict[str, Any],
    state: dict[str, Tensor] | Path,
    *,
    channels: int,
) -> None:
    """Load weights into a model; resample position and patch embeddings to its input.

    Args:
        model: A vision transformer without classifier.
        architecture: Its name, for error messages.
        cfg: timm's configuration of the weights, such as the channels they expect.
        state: The weights by name, perhaps behind a prefix, or an .npz in JAX's layout.
        channels: Channels that the model expects.

    Raises:
        BackboneError: If a weight of the model is missing, a block's weight is unknown, or
            anything is infinite or NaN.
    """
    from timm.models import load_pretrained

    with torch.no_grad():  # a parameter that is not loaded stays NaN, which is checked
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    convert = converter(model)
    source: dict[str, Any]
    if isinstance(state, Path):
        source = {"file": str(state), "custom_load": True}
    else:
        state, prefix = without_prefix(state, model)
        floats = {name: tensor.float() for name, tensor in state.items()}
        require_finite(floats, prefix)
        source = {"state_dict": floats}
    # timm drops the classifier where the number of classes differs, and then is not strict.
    local = {**cfg, "url": "", "hf_hub_id": None, "source": "", "num_classes": -1, **source}
    try:
        load_pretrained(
            model, pretrained_cfg=local, num_classes=0, in_chans=channels, filter_fn=convert
        )
    except Exception as error:
        apart = SHAPES.search(str(error))
        fault = "{!r} has shape {}, expected {}".format(*apart.groups()) if apart else str(error)
        raise BackboneError(
            f"The weights do not fit {architecture!r}: {fault[:300]}. "
            "Name the architecture they were trained with in `backbone`."
        ) from error
    known = model.state_dict()
    names = () if isinstance(state, Path) else convert(dict(source["state_dict"]), model)
    unused = sorted(name for name in names if name.startswith("blocks.") and name not in known)
    if unused:
        raise BackboneError(
            f"{architecture!r} has no place for {len(unused)} of the weights, among them "
            f"{unused[0]!r}. Name the architecture they were trained with in `backbone`."
        )
    missing = [name for name, p in model.named_parameters() if torch.isnan(p).any()]
    if missing:
        raise BackboneError(
            f"The weights lack {len(missing)} of the parameters of {architecture!r}, among them "
            f"{missing[0]!r} (or hold NaN there). Name the architecture they were trained with."
        )


def require_finite(state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raise ``BackboneError`` for weights or buffers, by name, that hold infinity or NaN.

    The prefix stands before the name of the first such tensor in the message.
    """
    for name, tensor in state.items():
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise BackboneError(
                f"{prefix + name!r} holds infinity or NaN at {bad} of its {tensor.numel()} places. "
                "Its training diverged or the file is damaged; use another checkpoint."
            )


def read_config(
    path: Path, architecture: str, known: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read timm's config.json beside a checkpoint.

    Args:
        path: The checkpoint.
        architecture: timm's name of the model, perhaps with a tag.
        known: timm's own configuration of it.

    Returns:
        Arguments that build the model, and how its input is made; both empty without such a file.

    Raises:
        BackboneError: If the file is damaged, or describes another architecture.
    """
    file = path.with_name(CONFIG)
    if not file.is_file():
        return {}, {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "architecture" not in content:
            logger.warning("%s is not in timm's format; pictures are prepared without it.", file)
            return {}, {}
        config = content.get("pretrained_cfg", content)
        own = {key: config[key] for key in INPUT_KEYS if config.get(key)}
        args: dict[str, Any] = {}
        if "input_size" in own and list(own["input_size"]) != list(known.get("input_size", ())):
            channels, height, width = own["input_size"]
            size = height if height == width else (height, width)
            args = {"in_chans": channels, "img_size": size}
        args |= content.get("model_args", {})
        args.pop("num_classes", None)  # backbones have none
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{file} cannot be read as timm's configuration of {path.name} "
            f"({type(error).__name__}: {error}). Mend it, or move the checkpoint elsewhere."
        ) from error
    if content["architecture"] != architecture.split(".")[0]:
        raise BackboneError(
            f"{file} describes {content['architecture']!r}, but `backbone` is {architecture!r}. "
            "Name that architecture, or move the checkpoint into a folder of its own."
        )
    return args, own


def read_checkpoint(path: Path) -> dict[str, Tensor] | Path:
    """Read a local checkpoint; of an .npz return the path, since timm reads JAX's layout.

    The names of nested dictionaries are joined, such as ``state_dict.norm.weight``.

    Raises:
        BackboneError: If the file is missing, damaged, of another kind, or would run code.
    """
    if not path.is_file():
        raise BackboneError(
            f"There is no checkpoint {path}. Check `checkpoint`.", told="there is no `checkpoint`"
        )
    check_kind(path)
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        if path.suffix in SUFFIXES["PyTorch"]:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(loaded, Mapping) or not (tensors := flatten(loaded)):
                raise TypeError(f"a {type(loaded).__name__} without tensors by name")
            return tensors
    except Exception as error:
        coded = isinstance(error, pickle.UnpicklingError)  # torch's text tells how to run the code
        fault = "it holds more than tensors" if coded else f"{type(error).__name__}: {error}"
        raise BackboneError(
            f"{path} cannot be read as {path.suffix} ({fault[:200]}). "
            "Checkpoints are read as tensors alone, never as code; save the state dict."
        ) from error
    if path.suffix == ".npz":
        return path
    raise BackboneError(
        f"{path} is of a kind that cannot be read; expected .safetensors, .pth or .npz."
    )
