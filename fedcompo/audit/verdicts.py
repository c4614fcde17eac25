"""Says in sentences what an audit's figures show: one a measure, for an examiner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedcompo.audit.models import AFTER, BEFORE
from fedcompo.data.tasks import whole_of
from fedcompo.report.units import percent

Values = Mapping[str, Any]
REALIGNED = "realigned"
BEYOND = "After - gold (above 0: it is known better than to a model that never met it)"
BACK = "Repaired - after (above 0: something comes back)"


def verdicts(values: Values) -> list[str]:
    """Return one sentence a measure: both attacks, probe, likeness, gold, and repair.

    Intervals decide: an AUC is chance where its interval covers 0.5, and two models do not differ
    where that of their difference covers 0.
    """
    sentences = [_attack(name, own) for name, own in values["membership"].items()]
    if probe := values["probe"]:
        sentences.append(_probe(probe))
    if similar := values["similarity"]["removed"]:
        pairs = ", ".join(
            f"{pair.replace('~', ' ~ ')} {bounded(own)}" for pair, own in similar.items()
        )
        sentences.append(f"Its test images are represented this much alike (CKA): {pairs}.")
    if beyond := values["beyond_gold"]:
        sentences.append(_difference(BEYOND, beyond))
    if repair := values["resurfacing"]:
        sentences.append(_difference(BACK, repair))
    return sentences


def notes(values: Values) -> list[str]:
    """List what a reader must know to read the figures."""
    models, client = values["models"], values["client"]
    gone = [name for name in values["classes"] if name not in models[AFTER]["rows_of_client"]]
    found = []
    if gone:
        found.append(
            f"After the removal the joint head has no rows of {', '.join(gone)}, so among all "
            f"classes no image of {client} is right there, by construction. Among its own classes "
            "it is measured on every backbone with the rows of the model before, as an attacker "
            "may have kept them."
        )
    realigned = [name for name, model in models.items() if model["joint_head"] == REALIGNED]
    if realigned and len(realigned) < len(models):
        found.append(
            f"Joint heads differ in what they were made of: {', '.join(realigned)} of features of "
            "the composed model, the rest of pre-trained features. Part of a difference in "
            "accuracy is theirs."
        )
    measured = {*map(whole_of, values["accuracy"]["per_client"])}
    if missing := sorted({*map(whole_of, values["remaining"])} - measured):
        found.append(f"No images were at hand of {', '.join(missing)}.")
    if values["dealt_anew"]:
        found.append(
            f"No map of the shards of {whole_of(client)} lies beside the registry: images were "
            "dealt anew by the seed, as in a first run. If they had been dealt otherwise, an "
            "attack on these says nothing."
        )
    if not values["probe"]:
        found.append(f"{client} has a single class: a probe has nothing to tell apart.")
    if not values["membership"]["loss"][BEFORE]["tpr"]:
        found.append(
            f"{values['images']['non_members']} non-members are too few for a true-positive rate "
            "at a low false-positive rate."
        )
    return found


def bounded(estimate: Values) -> str:
    """Write a figure and its interval."""
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def _attack(name: str, by_model: Values) -> str:
    groups: dict[str, list[str]] = {}
    for model, own in by_model.items():
        auc = own["auc"]
        outcome = "Chance" if own["is_chance"] else "Finds members"
        outcome = "Worse than chance" if auc["high"] < 0.5 else outcome
        groups.setdefault(outcome, []).append(f"{model} (AUC {bounded(auc)})")
    parts = (f"{outcome}: {', '.join(models)}" for outcome, models in groups.items())
    return f"{name.replace('-', ' ').capitalize()} attack. {'. '.join(parts)}."


def _probe(probe: Values) -> str:
    shots = next(iter(next(iter(probe.values()))))
    of = "all its images" if shots == "all" else f"{shots} of its images a class"
    parts = ", ".join(f"{model} {percent(own[shots]['value'])} %" for model, own in probe.items())
    return f"A linear probe fitted to {of} names of its test images: {parts}."


def _difference(title: str, found: Values) -> str:
    """Name the figures that differ between two models."""
    figures = {f"{name.replace('-', ' ')} attack": e for name, e in found["auc"].items()}
    figures |= {f"probe of {shots}": estimate for shots, estimate in found["probe"].items()}
    seen = [f"{name} {_signed(e)}" for name, e in figures.items() if not e["low"] <= 0 <= e["high"]]
    return f"{title}: {'; '.join(seen) or 'no difference is seen'}."


def _signed(estimate: Values) -> str:
    return f"{estimate['value']:+.2f} [{estimate['low']:+.2f}, {estimate['high']:+.2f}]"
