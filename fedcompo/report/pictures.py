"""Notes on clients' pictures that make accuracies wrong, or clients hard to compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedcompo.report.twins import few

WIDE = {"I;16": "16-bit integers", "I": "32-bit integers", "F": "floating-point numbers"}
"""Kinds of pixels with more than 8 bits, by Pillow's mode."""
REPEATED = "repeated"
"""Fact: number of test images that are training images too."""
Facts = Mapping[str, int]
"""What a client states of its pictures: :data:`REPEATED`, and by kind the value that became 255."""


def notes_on(facts: Mapping[str, Facts]) -> Iterator[str]:
    """Write a note on each trouble; the facts are by client."""
    repeated = [f"{who} ({own[REPEATED]})" for who, own in facts.items() if own.get(REPEATED)]
    if repeated:
        yield (
            f"Test images that are training images too, at {few(repeated)}: the accuracies "
            "of these clients are too high. Take the images out of one of the two."
        )
    for kind in WIDE.values():
        tops = {who: own[kind] for who, own in facts.items() if kind in own}
        if len(set(tops.values())) > 1:
            listed = few([f"{who} 0..{top}" for who, top in tops.items()])
            yield (
                f"Pixels of {kind} become 8 bits by the range that a client's pictures use, and "
                f"the ranges differ: {listed}. If the pictures are alike, save them with 8 bits."
            )
