"""Predict the classes of pictures, by a registry's model or a folder that timm loads.

Pixels are those of timm's evaluation transform. As in training, a picture is turned upright first,
as its EXIF tag says; plain timm does not turn it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from fedcompo.backbone.checkpoint import require_finite
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.composition.models import load_tangent_model, model_of
from fedcompo.config.choices import Modality
from fedcompo.data.pictures import picture_of
from fedcompo.data.sources.folders import left_behind
from fedcompo.errors import BackboneError, DataError
from fedcompo.registry.reader import RegistryReader
from fedcompo.report.progress import each
from fedcompo.storage.files import BACKBONE

BATCH = 64
"""Pictures at a time."""


def model_from(source: RegistryReader | Path) -> nn.Module:
    """Load a registry's model, or a folder's as plain timm does; one of tangents linearised.

    Returns:
        A model in evaluation mode; its ``pretrained_cfg`` holds the names of the classes.

    Raises:
        BackboneError: If timm cannot load the folder, or a weight is not finite.
        FileFormatError: If a folder of tangents was altered.
    """
    if isinstance(source, RegistryReader):
        return model_of(
            source.backbone, source.composed(), source.classes, linearised=source.linearised
        )
    if (source / BACKBONE).is_file():
        return load_tangent_model(source)
    try:
        model: nn.Module = timm.create_model(f"local-dir:{source}", pretrained=True)
    except Exception as error:  # timm's errors are of every kind
        raise BackboneError(
            f"timm cannot load {source} ({type(error).__name__}: {str(error)[:200]}). Name a "
            "folder that `fedcompo compose` or `fedcompo export` wrote for timm."
        ) from error
    require_finite(model.state_dict())
    return model.eval()


@torch.no_grad()
def predict(
    model: nn.Module, paths: Iterable[Path], *, top: int = 1
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Classify pictures.

    Args:
        model: See :func:`model_from`.
        paths: Pictures, and folders of them; each file is read once.
        top: Number of classes for each picture, the most probable first.

    Returns:
        ``file``, ``class`` and ``probability``, ``top`` rows a picture; and by file the reasons
        why others cannot be read.

    Raises:
        DataError: If the model reads texts, or there is no file.
        BackboneError: If the model does not say what it reads, or what its classes are.
    """
    cfg: Any = model.pretrained_cfg
    modality = getattr(getattr(model, "model", model), "modality", Modality.PICTURES)
    if modality != Modality.PICTURES:
        raise DataError(f"The model reads {modality}; only classes of pictures can be predicted.")
    seen = Preprocessing.of_timm(cfg, {}, modality)
    files = list(dict.fromkeys(_files(paths)))
    if not files:
        raise DataError("The folders hold no file. Name pictures, or folders of pictures.")
    rows, unreadable = list[dict[str, Any]](), dict[str, str]()
    batches = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    for batch in each(batches, "pictures", "predicting", total=len(files), units=len):
        pixels = {}
        for file in batch:
            try:
                pixels[str(file)] = picture_of(file.read_bytes(), seen)
            except Exception as error:  # Pillow's decoders raise errors of every kind
                reason = getattr(error, "strerror", None) or str(error)
                unreadable[str(file)] = reason or type(error).__name__
        if not pixels:
            continue
        shares = model(seen.normalise(torch.stack([*pixels.values()]))).softmax(1)
        classes = cfg.get("label_names") or [*map(str, range(shares.shape[1]))]
        if len(classes) != shares.shape[1]:
            raise BackboneError(
                f"The model has {shares.shape[1]} classes, but config.json names {len(classes)}."
            )
        for name, own in zip(pixels, shares, strict=True):
            for index in own.argsort(descending=True, stable=True)[:top].tolist():
                share = float(own[index])
                rows.append({"file": name, "class": str(classes[index]), "probability": share})
    return rows, unreadable


def _files(paths: Iterable[Path], above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """List files, those in folders sorted, without the files that operating systems create."""
    for path in paths:
        try:
            inside = sorted(path.iterdir()) if path.is_dir() else [path]
        except OSError:
            inside = [path]  # to read it will say why it cannot be read
        if inside == [path]:
            yield path
        elif (place := path.resolve()) not in above:  # no link leads round and round
            yield from _files((p for p in inside if not left_behind(p.name)), (*above, place))
