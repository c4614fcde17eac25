"""Writes a selection as a folder for others: model, configuration, recipe, card."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedcompo.composition.timm_folder import write_model
from fedcompo.export.model_card import model_card
from fedcompo.export.recipe_file import recipe_text
from fedcompo.export.selected import Selection
from fedcompo.export.selection import new_folder
from fedcompo.storage.files import BACKBONE, MODEL_CARD, RECIPE, WEIGHTS, write_atomically
from fedcompo.storage.tensorstream import file_sha256


def publish(
    output: Path,
    selection: Selection,
    *,
    sealing: Callable[[Path, Mapping[str, Any]], None] = lambda folder, told: None,
) -> dict[str, Any]:
    """Write a folder that plain timm loads; of tangents, one that fedcompo loads.

    Args:
        output: A new or empty folder; appears when everything is in it.
        selection: Contributions to compose.
        sealing: Called last, before the folder appears, with where it is and what was written.

    Returns:
        What was written, as JSON values.

    Raises:
        ConfigError: If something is at ``output`` already.
    """
    backbone, negated = selection.backbone, selection.recipe.negated
    linearised, text = selection.pool.linearised, recipe_text(selection.written)
    with new_folder(output) as folder:
        write_model(
            folder,
            backbone,
            selection.stream(),
            selection.head,
            linearised=linearised,
            dtype=getattr(torch, selection.recipe.dtype),
        )
        if linearised:  # load_tangent_model needs the pre-trained weights too
            shutil.copyfile(backbone.path, folder / BACKBONE)
        write_atomically(folder / RECIPE, text.encode())
        told = write_card(selection, folder / WEIGHTS, recipe=text)
        sealing(folder, told)
    return {
        "output": str(output.absolute()),
        **told,
        "negated": None if negated is None else negated.client,
        "linearised": linearised,
    }


def write_card(selection: Selection, file: Path, **more: str) -> dict[str, Any]:
    """Write the card of a selection beside the file of its weights.

    Args:
        selection: What it is composed of.
        file: File of the weights.
        more: For :func:`~fedcompo.export.model_card.model_card`.

    Returns:
        What was written, as JSON values.
    """
    sha256 = file_sha256(file)
    card = model_card(selection, file.name, sha256, **more)
    write_atomically(file.with_name(MODEL_CARD), card.encode())
    return {
        "clients": list(selection.pool.clients),
        "coefficients": selection.shares,
        "scale": selection.scale,
        "rule": selection.settings.rule,
        "classes": list(selection.head.classes),
        "sha256": sha256,
    }
