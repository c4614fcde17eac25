"""Notes on clients' pictures that make accuracies wrong, or clients hard to compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedcompo.report.twins import few

WIDE = {"I;16": "16-bit integers", "I": "32-bit integers", "F": "floating-point numbers"}
"""Kinds of pixels with more than 8 bits, by Pillow's mode."""
REPEATED = "repeated"
"""Fact: number of test images that are training images too."""
JOINED = "are marked for validation: they are training images here, as there are test images"
STAND_IN = "are marked for validation: they are the test images, as there are no others"
DEALT = "lie in class folders without folders of clients: one data set, dealt to the clients"
UNLABELLED = "have a class that programs write for no label, such as -1; it is trained as a class"
PAGES = "hold several pages or frames: the first is used"
TURNED = "are turned upright, as their EXIF tag says; most other programs do not turn them"
SEE_THROUGH = "are partly transparent: transparency is ignored, the colours under it are used"
NEGATIVE = "say that 0 is white, with more than 8 bits; they are read as if 0 were black"
WINDOWED = "are DICOM files: their window, or table of values, becomes 0..255"
UNWINDOWED = "are DICOM files without a window: the range that all of a client use becomes 0..255"
ODD = (
    JOINED,
    STAND_IN,
    DEALT,
    UNLABELLED,
    PAGES,
    TURNED,
    SEE_THROUGH,
    NEGATIVE,
    WINDOWED,
    UNWINDOWED,
)
"""Facts: numbers of images of which it is true, training and test."""
Facts = Mapping[str, int]
"""What a client states of its pictures: counts, and by kind the value that became 255."""


def notes_on(facts: Mapping[str, Facts]) -> Iterator[str]:
    """Write a note on each trouble; the facts are by client."""
    repeated = [f"{who} ({own[REPEATED]})" for who, own in facts.items() if own.get(REPEATED)]
    if repeated:
        yield (
            f"Test images that are training images too, at {few(repeated)}: the accuracies "
            "of these clients are too high. Take the images out of one of the two."
        )
    for what in ODD:
        if who := [f"{client} ({own[what]})" for client, own in facts.items() if own.get(what)]:
            yield f"Images that {what}; at {few(who)}."
    for kind in WIDE.values():
        tops = {who: own[kind] for who, own in facts.items() if kind in own}
        listed = few([f"{who} 0..{top}" for who, top in tops.items()])
        if len(set(tops.values())) > 1:
            yield (
                f"Pixels of {kind} become 8 bits by the range that a client's pictures use, and "
                f"the ranges differ: {listed}. If the pictures are alike, save them with 8 bits."
            )
        elif tops:
            yield f"Pixels of {kind} become 8 bits by the range that the pictures use: {listed}."
