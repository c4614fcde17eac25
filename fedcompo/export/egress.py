"""Says what a data controller signs off before a model leaves a trusted environment: JSON values.

What the model is, whose data is in it, how much, what noise was added, which attacks were tried,
who asked to leave, and what the limits are. Only what was recorded is said: a value that nobody
recorded is null. It names no path, user or host. Of images it has totals alone: what `min-images`
keeps back, a count of few or a figure measured on few, is not in it.

The questions are those of the Five Safes and of SACRO-ML (https://github.com/AI-SDC/SACRO-ML).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedcompo.config.caps import FEWEST_IMAGES, CapsConfig
from fedcompo.errors import ConfigError, FileFormatError
from fedcompo.export.model_card import LIMITS, OWN_LICENSE, license_of, still_shaped
from fedcompo.export.recipe import Recipe
from fedcompo.export.selected import Selection
from fedcompo.method.contribution import Contribution
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.story import story
from fedcompo.runtime import version
from fedcompo.storage.files import CONTENT

Values = dict[str, Any]
AUDIT = "audit.json"
RECEIPTS = "receipts"
"""Folder of the removal records in a pack."""
CAPS = [declared.name.replace("_", "-") for declared in fields(CapsConfig)]
FIGURES = (
    *("images", "shadows", "seed", "membership"),
    *("probe", "similarity", "resurfacing", "beyond_gold"),
)
"""What of an audit is stated, beside the accuracy on the client's own test images."""
OF_THIS, OF_OTHER, MISSING = "of this model", "of another model", "no audit"
BEFORE_REMOVAL = "of the model before its removal"


def statement(
    registry: RegistryReader,
    selection: Selection,
    *,
    audits: Sequence[Path] = (),
    licence: str = "",
    results: Mapping[str, Any] | None = None,
) -> Values:
    """State all that is known of a model that is to leave, but for its files.

    Args:
        registry: Has the members, and the receipts of those who left.
        selection: What is exported of it.
        audits: ``audit.json`` files, or their folders.
        licence: Of the members' data; empty: not given.
        results: ``results.json`` of the run that made the registry; None: not at hand.

    Raises:
        FileFormatError: If a receipt does not hold, or an audit cannot be read.
        ConfigError: If an audit is of somebody who never was in the registry.
    """
    known, backbone = story(registry), selection.backbone
    whole = selection.recipe == Recipe() and selection.pool.clients == registry.clients
    removals = [_removal(one) for one in known["removed"]]
    joined = {one["client"]: one["added"] for one in known["clients"]}
    shares, root = selection.shares, registry.state.root
    answers = _answers(registry, results or {})
    return {
        "content": "egress-pack",
        "format_version": 1,
        "fedcompo_version": version("fedcompo"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "registry": registry.identity,
        "root": root,
        "composition": {
            "whole_registry": whole,
            "left_out": {gone: list(who) for gone, who in still_shaped(selection).items()},
            "classes": list(selection.head.classes),
            "rule": selection.settings.rule,
            "factor": selection.factor,
            "scale": selection.scale,
            "scale_by": known["factor_by"] if whole else None,
            "caps": selection.settings.caps,
            "linearised": selection.pool.linearised,
        },
        "backbone": {
            "architecture": backbone.architecture,
            "fingerprint": backbone.fingerprint,
            "hub": backbone.origin.hub or None,
        },
        "members": [
            {
                "client": own.client,
                "kind": str(own.task_vector.kind),
                "classes": list(own.head.classes),
                "images": None if own.without_images else own.num_examples,
                "caps": {key: own.settings.get(key) for key in CAPS},
                "noise": _noise(own, answers.get(own.client)),
                "lineage": {name: value or [] for name, value in vars(own.lineage).items()},
                "tensors_sha256": own.digests.get(CONTENT),
                "joined": joined[own.client],
                "coefficient": shares[own.client],
            }
            for own in selection.pool
        ],
        "removals": removals,
        "audits": list(_audits(audits, selection.pool.clients, removals, root if whole else "")),
        "limits": list(LIMITS),
        "licences": {
            "code": OWN_LICENSE,
            "backbone": license_of(backbone) or None,
            "data": licence or None,
        },
    }


def _noise(own: Contribution, answers: Mapping[str, Any] | None) -> Values:
    """Say which ε holds for statistics and Fisher: by the run's results, else by the settings."""
    asked, spent = own.settings.get("dp-noise"), (answers or {}).get("privacy") or {}
    epsilon = spent.get("epsilon")
    if epsilon is not None:
        says = "of statistics and Fisher alone"
    elif spent:
        says = "next to no noise: ε is not bounded"
    elif asked == 0 or "privacy" in (answers or {}):
        says = "no noise: ε is not bounded"
    else:
        says = "noise was asked for; ε is not recorded" if asked else "not recorded"
    return {"epsilon": epsilon, "delta": spent.get("delta"), "says": says}


def _answers(registry: RegistryReader, results: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the members that stand as the run of these results left them, by client."""
    about, figures = results.get("registry") or {}, results.get("per_client") or {}
    root, members = about.get("root", ""), registry.state.members
    last = max(
        (e.sequence for e in registry.entries() if e.details.get("root_after") == root), default=0
    )
    joined = (client for client in about.get("joined", ()) if client in members)
    return {c: figures[c] for c in joined if c in figures and members[c].added <= last}


def _removal(receipt: Mapping[str, Any]) -> Values:
    """Describe a removal by its receipt, which must hold."""
    if receipt["fault"]:
        raise FileFormatError(
            f"The receipt of the removal of {receipt['client']!r} does not hold: "
            f"{receipt['fault']}. Nothing is exported; see `fedcompo verify`."
        )
    kept = ("client", "time", "line", "requested_by", "reason", "classes", "to_retrain", "record")
    return {
        **{key: receipt[key] for key in (*kept, "root_before", "root_after")},
        "images": receipt["num_examples"],
        "receipt": f"{RECEIPTS}/{Path(receipt['record']).name}",
        "receipt_sha256": receipt["record_sha256"],
    }


def _audits(
    paths: Sequence[Path], members: Sequence[str], removals: Sequence[Values], root: str
) -> Iterator[Values]:
    """Yield a row for each audit, then one for each client that has none.

    The root is that of the model; empty if the model is no registry's own.
    """
    missing = {*members, *(one["client"] for one in removals)}
    known, before = set(missing), {(one["client"], one["root_before"]) for one in removals}
    for path in paths:
        found = _read_audit(path / AUDIT if path.is_dir() else path)
        of = client, measured = found["client"], found["root"]
        if client not in known:
            raise ConfigError(
                f"The audit {path} is of {client!r}, who is neither in the model nor removed from "
                "it. Leave it out, or export what it was measured on."
            )
        missing.discard(client)
        here = client in members and measured == root
        yield {"fits": OF_THIS if here else BEFORE_REMOVAL if of in before else OF_OTHER, **found}
    for client in sorted(missing):
        yield {"client": client, "fits": MISSING, "root": None, "withheld": "", "figures": None}


def _read_audit(path: Path) -> Values:
    """Read whose audit it is, its root, and its figures as numbers.

    None that was measured on fewer images than may be told of.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found: Values = json.loads(text, parse_constant=lambda _: None)  # NaN is no JSON
        figures = _numbers({key: found[key] for key in FIGURES if key in found})
        figures["accuracy"] = _numbers(found["accuracy"]["removed"])
        shown = [own["task_il_accuracy"] for own in figures["accuracy"].values()]
        for auc in (a["auc"] for own in figures["membership"].values() for a in own.values()):
            shown += [auc["value"], auc["low"], auc["high"]]
        if odd := [one for one in shown if type(one) not in (int, float)]:
            raise ValueError(f"a figure is {odd[0]!r}, expected a number")
        least = found["settings"].get("min-images") or FEWEST_IMAGES
        few = min(figures["images"].values()) < least
        about = {"client": str(found["client"]), "root": str(found["root"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"{path} holds no audit ({type(error).__name__}: {error}). Name what `fedcompo audit` "
            "wrote."
        ) from error
    withheld = f"measured on fewer than {least} images" if few else ""
    return {**about, "withheld": withheld, "figures": None if few else figures}


def _numbers(value: Any) -> Any:
    """Keep numbers, by their names; texts go, which may hold a path."""
    if isinstance(value, Mapping):
        return {key: _numbers(own) for key, own in value.items() if not isinstance(own, str)}
    if isinstance(value, list):
        return [_numbers(own) for own in value if not isinstance(own, str)]
    return value
