"""A selection as a folder for others: the model, its configuration for timm, its card."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcompo.composition.models import write_model
from fedcompo.export.model_card import ExportedModel, Member, model_card
from fedcompo.export.selection import Selection, new_folder
from fedcompo.storage.files import MODEL_CARD, write_atomically
from fedcompo.versions import version


def publish(
    output: Path,
    selection: Selection,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    *,
    negated: str = "",
    strength: float = 1.0,
) -> dict[str, Any]:
    """Write a folder that plain timm loads; of tangents, one that fedcompo loads.

    Args:
        output: A new or empty folder; appears when everything is in it.
        selection: What to compose.
        weights: Target weights to write in place of the selection's own composition, in the order
            of names.
        negated: Client whose task vector was subtracted from them.
        strength: How often it was.

    Returns:
        What was written, as JSON values.

    Raises:
        ConfigError: If something is at ``output`` already.
    """
    backbone, shares = selection.backbone, selection.shares
    linearised = selection.pool.linearised
    changed = selection.stream() if weights is None else weights
    with new_folder(output) as folder:
        sha256 = write_model(folder, backbone, changed, selection.head, linearised=linearised)
        card = ExportedModel(
            members=tuple(Member.of(c, shares[c.client]) for c in selection.pool),
            classes=selection.head.classes,
            backbone=backbone.fingerprint.partition("@")[0],
            architecture=backbone.architecture,
            fingerprint=backbone.fingerprint,
            preprocessing=backbone.preprocessing,
            sha256=sha256,
            fedcompo_version=version("fedcompo"),
            scale=selection.settings.scale,
            only=selection.only,
            without=selection.without,
            negated=negated,
            negation_scale=strength,
            linearised=linearised,
        )
        write_atomically(folder / MODEL_CARD, model_card(card).encode())
    return {
        "output": str(output.absolute()),
        "clients": list(selection.pool.clients),
        "coefficients": shares,
        "scale": selection.settings.scale,
        "classes": list(selection.head.classes),
        "negated": negated or None,
        "linearised": linearised,
        "sha256": sha256,
    }
