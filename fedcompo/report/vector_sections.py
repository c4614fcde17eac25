"""Sections of a report on task vectors: the vote on λ, overlaps, lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedcompo.report import drawing
from fedcompo.report.page import Picture, Section, Table, named
from fedcompo.report.results import Results, cosines_of
from fedcompo.report.units import percent

Values = Mapping[str, Any]


def vector_section(results: Results) -> Section:
    """Say how the task vectors were weighed, and how they go together."""
    parts: list[Table | Picture] = []
    sentences = []
    scale, found = results.get("scale"), results.get("diagnostics")
    if scale:
        sentences.append(
            f"λ = {scale['scale']:.4g}, how much of the task vectors' mean the model takes; "
            f"chosen by: {scale['by']}."
        )
    if scale and scale["candidates"]:
        parts += _vote(scale)
    if not found:
        return Section("Task vectors", parts, sentences)
    clients, gap = found["clients"], found["composition_gap"]
    sentences.append(f"Gap Ω of Theorem 1 (mean Fisher, composition's coefficients): {gap:.4g}.")
    gram = found["fisher_gram"]
    cosines = cosines_of(gram) if gram else []
    if cosines:
        texts = {(i, j): f"{v:+.2f}" for i, row in enumerate(cosines) for j, v in enumerate(row)}
        parts.append(
            Picture(
                "Overlap of the task vectors",
                drawing.matrix("Overlap of the task vectors", clients, cosines, texts),
                "Cosine in the metric of the mean Fisher: blue, the vectors agree; orange, they "
                "oppose each other; pale, they have little to do with each other.",
                large=len(clients) > drawing.WRITTEN,
            )
        )
        rows = [[c, *(f"{v:+.3f}" for v in own)] for c, own in zip(clients, cosines, strict=True)]
        parts.append(Table("Cosines", named(*clients), rows, folded=True))
    rows = [
        [client, f"{norm:.4g}", *([f"{gram[i][i]:.4g}"] if gram else [])]
        for i, (client, norm) in enumerate(zip(clients, found["tau_norms"], strict=True))
    ]
    titles = ["length ‖τ‖", *(["τᵀF̄τ"] if gram else [])]
    return Section("Task vectors", [*parts, Table("Lengths", named(*titles), rows)], sentences)


def _vote(scale: Values) -> Iterable[Table | Picture]:
    tried = scale["candidates"]
    least: dict[float, float] = {}
    for one in tried:
        least[one["scale"]] = min(one["loss"], least.get(one["scale"], one["loss"]))
    yield Picture(
        "Vote on λ",
        drawing.line("Vote on λ", "λ", "loss", sorted(least.items())),
        f"Loss on {scale['votes']} images that the clients kept aside, at the best shrinkage of "
        "the head; the least is chosen.",
    )
    rows = [
        [
            f"{one['scale']:.4g}",
            f"{one.get('shrinkage') or 0:g}",
            f"{one['loss']:.4g}",
            percent(one["accuracy"]),
        ]
        for one in tried
    ]
    columns = named("shrinkage of the head", "loss", "accuracy, %", first="λ")
    yield Table("Candidates", columns, rows, folded=True)
