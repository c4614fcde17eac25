"""Resolves a name in ``backbone`` to timm's architecture, its arguments and its configuration.

A folder that timm wrote (``local-dir:<path>``, ``hf-hub:<repository>``) brings arguments of its
own. Together with the plain architecture they rebuild the model, so that what is written later does
not need the folder. Sources of ``fedcompo import`` are found by such names too.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedcompo.errors import BackboneError

LOCAL = "local-dir"
FOLDERS = {
    LOCAL: "load_model_config_from_path",
    "hf-hub": "load_model_config_from_hf",
    "hf_hub": "load_model_config_from_hf",
}
"""Prefixes of folders that timm wrote, and what reads their configuration."""
SAFE = ("*.json", "model.safetensors", "adapter_model.safetensors")
OLDER = ("pytorch_model.bin", "adapter_model.bin")
"""Fetched only where there is no safetensors file; read as tensors, never as code."""


@dataclass(frozen=True)
class Source:
    """What a name in ``backbone`` stands for."""

    name: str
    """The name, without the path of a local folder: its digest tells the weights."""
    architecture: str
    """timm's plain name of the architecture."""
    model_args: dict[str, Any]
    """Arguments that rebuild the model with ``timm.create_model``, besides those of the input."""
    cfg: dict[str, Any]
    """timm's configuration of the weights."""


def source_of(name: str, checkpoint: str = "") -> Source:
    """Resolve a name; no weights are loaded.

    Args:
        name: timm's name of a model, perhaps with a tag, or a folder that timm wrote.
        checkpoint: File of the weights, if they come from elsewhere; a local folder that is gone
            may be where this lies now.

    Raises:
        BackboneError: If timm knows no such model, or the folder's configuration cannot be read.
    """
    from fedcompo.backbone.text import timm  # takes seconds to load

    kind, colon, place = name.partition(":")
    if colon and kind.lower() in FOLDERS:
        if kind.lower() == LOCAL and checkpoint and not Path(place).is_dir():
            place = str(Path(checkpoint).parent)
        return _of_folder(kind.lower(), place)
    if not timm.is_model(name):
        near = difflib.get_close_matches(
            name, [m for like in ("*vit*", "*deit*", "byte_*") for m in timm.list_models(like)]
        )
        raise BackboneError(
            f"timm knows no model {name!r}. "
            + (f"Did you mean {' or '.join(near)}? " if near else "")
            + "`timm.list_models('*vit*')` lists vision transformers; `hf-hub:<repository>` and "
            "`local-dir:<path>` name folders."
        )
    try:
        cfg = timm.get_pretrained_cfg(name)
    except Exception as error:
        raise BackboneError(f"timm cannot tell how {name!r} was trained: {error}.") from error
    return Source(name, name.partition(".")[0], {}, cfg.to_dict() if cfg else {})


def _of_folder(kind: str, place: str) -> Source:
    from timm.models import _hub

    from fedcompo.backbone.text import timm

    try:
        cfg, architecture, args = getattr(_hub, FOLDERS[kind])(place)
    except Exception as error:
        advice = (
            "Name a folder that `timm.models.save_for_hf` wrote; or as `checkpoint` a file in one, "
            "or a registry's `backbone.safetensors`."
            if kind == LOCAL
            else "Without the hub, get its files and set `backbone = local-dir:<their folder>`."
        )
        raise BackboneError(
            f"The configuration of `backbone = {kind}:{place}` cannot be read "
            f"({type(error).__name__}: {str(error)[:200]}). {advice}"
        ) from error
    if not timm.is_model(architecture):
        raise BackboneError(
            f"{kind}:{place} holds a model of the architecture {architecture!r}, which this timm "
            f"({timm.__version__}) does not know."
        )
    channels, *sides = cfg.get("input_size", (3, 224, 224))
    args = {"in_chans": channels, **args}
    if cfg.get("fixed_input_size"):
        args.setdefault("img_size", sides)
    args.pop("num_classes", None)
    size = args.get("img_size")
    if not isinstance(size, int | None) and len({*size}) == 1:
        args["img_size"] = size[0]
    architecture = architecture.partition(".")[0]
    return Source(f"{kind}:{architecture if kind == LOCAL else place}", architecture, args, cfg)


def fetched(source: str | Path) -> Path:
    """Return the file or folder of a source; of the hub, fetch what is not in its cache.

    Args:
        source: A path; ``local-dir:<path>``; ``hf-hub:<repository>``, perhaps with ``@<revision>``.

    Raises:
        BackboneError: If the hub does not give it.
    """
    kind, colon, place = str(source).partition(":")
    if not colon or kind.lower() not in FOLDERS.keys() - {LOCAL}:
        return Path(place if colon and kind.lower() == LOCAL else source).expanduser()
    import huggingface_hub

    name, _, revision = place.partition("@")
    fetch = partial(huggingface_hub.snapshot_download, name, revision=revision or None)
    try:
        folder = Path(fetch(allow_patterns=[*SAFE]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(fetch(allow_patterns=[*OLDER]))
    except Exception as error:  # of the network, the hub, its client or the name
        first = next(iter(str(error).splitlines()), "")[:150]
        raise BackboneError(
            f"{source} could not be had from the hub ({type(error).__name__}: {first}). "
            "Check the name and the network; without one, get its files elsewhere and name their "
            "folder."
        ) from error
    return folder
