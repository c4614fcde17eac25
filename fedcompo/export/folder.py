"""Writes a selection as a folder for others: model, configuration, recipe, card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from fedcompo.composition.timm_folder import write_model
from fedcompo.export.model_card import ExportedModel, model_card
from fedcompo.export.recipe_file import recipe_text
from fedcompo.export.selected import Selection
from fedcompo.export.selection import new_folder
from fedcompo.storage.files import BACKBONE, MODEL_CARD, RECIPE, WEIGHTS, write_atomically
from fedcompo.storage.tensorstream import file_sha256


def publish(output: Path, selection: Selection) -> dict[str, Any]:
    """Write a folder that plain timm loads; of tangents, one that fedcompo loads.

    Args:
        output: A new or empty folder; appears when everything is in it.
        selection: Contributions to compose.

    Returns:
        What was written, as JSON values.

    Raises:
        ConfigError: If something is at ``output`` already.
    """
    backbone, recipe = selection.backbone, selection.recipe
    linearised, negation = selection.pool.linearised, recipe.negated
    negated = "" if negation is None else negation.client
    text = recipe_text(selection.written)
    with new_folder(output) as folder:
        write_model(
            folder,
            backbone,
            selection.stream(),
            selection.head,
            linearised=linearised,
            dtype=getattr(torch, recipe.dtype),
        )
        if linearised:  # load_tangent_model needs the pre-trained weights too
            shutil.copyfile(backbone.path, folder / BACKBONE)
        card = described(
            selection,
            folder / WEIGHTS,
            negated=negated,
            negation_scale=1.0 if negation is None else negation.strength,
            recipe=text,
        )
        write_atomically(folder / RECIPE, text.encode())
        write_atomically(folder / MODEL_CARD, model_card(card).encode())
    return {
        "output": str(output.absolute()),
        "clients": list(selection.pool.clients),
        "coefficients": selection.shares,
        "scale": selection.scale,
        "rule": selection.settings.rule,
        "classes": list(selection.head.classes),
        "negated": negated or None,
        "linearised": linearised,
        "sha256": card.sha256,
    }


def described(selection: Selection, file: Path, **more: Any) -> ExportedModel:
    """Describe a selection for the card of a file that holds its weights; ``more`` fields of it."""
    backbone = selection.backbone
    return ExportedModel(
        members=selection.pool.contributions,
        shares=selection.shares,
        classes=selection.head.classes,
        architecture=backbone.architecture,
        fingerprint=backbone.fingerprint,
        preprocessing=backbone.preprocessing,
        file=file.name,
        sha256=file_sha256(file),
        scale=selection.scale,
        rule=selection.settings.rule,
        only=selection.only,
        without=selection.without,
        linearised=selection.pool.linearised,
        origin=backbone.origin,
        **more,
    )
