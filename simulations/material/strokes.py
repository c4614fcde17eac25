r"""Draw tasks for very many clients: characters of invented alphabets, made of a few strokes.

A class is a character that nobody uses: two to four lines, polylines or Bézier curves, drawn from
the seed and the name of the class. Each image varies the character: its points move; it is rotated,
sheared, scaled and shifted; pen width and noise differ. It needs no fonts and no downloads; the
idea is Omniglot's (Lake et al., *Science* 2015). Strokes are light on a dark ground, as in the
training of the embedded backbone.

    python simulations/material/strokes.py runs/strokes-100.npz \
        --classes 200 --train 20 --test 10 --seed 0

writes a file for ``data = "npz:runs/strokes-100.npz"``. An image depends on the seed, its class and
its own number alone: more classes, or more images, do not change the others.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fedcompo.data.draws import frozen_generator
from fedcompo.storage.files import write_atomically

Points = NDArray[np.float64]  # (count, 2): x to the right, y down

IMAGE = 28
FINER = 4  # times finer is the canvas that strokes are drawn on
SEGMENTS = 16  # straight pieces of a curve
GLYPH = 20.0  # pixels that the longer side of a character fills, of IMAGE
SHORTEST = 0.45  # of a stroke from end to end, as a share of the sheet
# How much the images of one character differ:
WANDER = 0.08  # standard deviation of each control point, as a share of the character's size
TURN, SHEAR = 0.22, 0.25  # largest rotation (radians) and shear, either way
SCALE = 0.75, 1.15  # smallest and largest of an axis
SHIFT = 2.0  # largest shift either way, in pixels
PEN = 1.5, 3.2  # thinnest and thickest, in pixels
NOISE = 0.08  # largest standard deviation of a pixel, as a share of white
PARTS = ("train", "test")


@dataclass(frozen=True)
class Stroke:
    """One movement of the pen."""

    points: Points
    """(2, 3 or 4, 2), control points."""
    curved: bool
    """Whether they are those of a Bézier curve, or corners."""


def new_character(draw: np.random.RandomState) -> tuple[Stroke, ...]:
    """Invent a character; its longer side is 1, its centre the origin."""
    strokes: list[Stroke] = []
    for _ in range(draw.randint(2, 5)):
        count = draw.randint(2, 5)
        points = draw.uniform(size=(count, 2))
        if strokes and draw.uniform() < 0.5:  # most strokes of a script touch an earlier one
            points[0] = _along(strokes[draw.randint(len(strokes))])[draw.randint(SEGMENTS + 1)]
        while np.linalg.norm(points[-1] - points[0]) < SHORTEST:
            points[-1] = draw.uniform(size=2)
        strokes.append(Stroke(points, curved=bool(count > 2 and draw.uniform() < 0.75)))
    drawn = np.concatenate([_along(stroke) for stroke in strokes])
    low, high = drawn.min(0), drawn.max(0)
    side = (high - low).max()
    return tuple(Stroke((s.points - (low + high) / 2) / side, s.curved) for s in strokes)


def write_by_hand(character: tuple[Stroke, ...], draw: np.random.RandomState) -> NDArray[np.uint8]:
    """Draw one image of a character, (IMAGE, IMAGE), light on dark."""
    angle, shear = draw.uniform(-TURN, TURN), draw.uniform(-SHEAR, SHEAR)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1.0, shear], [0.0, 1.0]])
    affine = turned * draw.uniform(*SCALE, size=2) * GLYPH
    centre = IMAGE / 2 + draw.uniform(-SHIFT, SHIFT, size=2)
    pen = draw.uniform(*PEN)
    canvas = Image.new("L", (IMAGE * FINER, IMAGE * FINER))
    for stroke in character:
        wandered = stroke.points + WANDER * draw.standard_normal(stroke.points.shape)
        line = _along(Stroke(wandered, stroke.curved)) @ affine.T + centre
        _trace(ImageDraw.Draw(canvas), line * FINER, pen * FINER)
    ink = np.asarray(canvas, dtype=np.float64) / 255
    ink = ink.reshape(IMAGE, FINER, IMAGE, FINER).mean((1, 3))
    ink = ink * draw.uniform(0.7, 1.3)
    ink = ink + draw.uniform(0, NOISE) * draw.standard_normal(ink.shape)
    return np.rint(255 * ink.clip(0, 1)).astype(np.uint8)


def _along(stroke: Stroke) -> Points:
    """Sample a stroke at equal steps of its parameter, (SEGMENTS + 1, 2)."""
    t = np.linspace(0, 1, SEGMENTS + 1)
    if not stroke.curved:
        corners = np.linspace(0, 1, len(stroke.points))
        return np.stack([np.interp(t, corners, axis) for axis in stroke.points.T], axis=1)
    points, t = stroke.points[:, None, :], t[:, None]
    while len(points) > 1:  # de Casteljau: between neighbours, until one point is left
        points = (1 - t) * points[:-1] + t * points[1:]
    return points[0]


def _trace(sheet: ImageDraw.ImageDraw, line: Points, pen: float) -> None:
    """Draw a line with a round pen."""
    sheet.line([tuple(point) for point in line.tolist()], fill=255, width=round(pen))
    radius = pen / 2
    for x, y in line.tolist():
        sheet.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def draw_classes(classes: int, counts: tuple[int, int], seed: int) -> dict[str, NDArray]:
    """Draw every image of every class: so many for training and for testing of each.

    Returns:
        ``images``, ``labels``, ``split`` and ``names``, see :mod:`fedcompo.data.sources.npz`.
    """
    images, started = [], time.monotonic()
    names = [f"glyph-{number:04d}" for number in range(classes)]
    for number, name in enumerate(names, start=1):
        character = new_character(frozen_generator(seed, "strokes", name))
        for part, count in zip(PARTS, counts, strict=True):
            for index in range(count):
                draw = frozen_generator(seed, "strokes", name, part, str(index))
                images.append(write_by_hand(character, draw))
        if number % 50 == 0 or number == classes:
            print(f"{number}/{classes} classes  {time.monotonic() - started:.0f} s", flush=True)
    split = np.repeat(np.array([0, 1], dtype=np.uint8), counts)
    return {
        "images": np.stack(images),
        "labels": np.repeat(np.arange(classes), sum(counts)),
        "split": np.tile(split, classes),
        "names": np.array(names),
    }


def main() -> None:
    """Parse the command line, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("output", type=Path, help="the .npz file to write")
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--train", type=int, default=20, help="training images a class")
    parser.add_argument("--test", type=int, default=10, help="test images a class")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.suffix != ".npz":
        sys.exit(f"The output must end in .npz, got {arguments.output}.")
    for option in ("classes", "train", "test"):
        if (given := getattr(arguments, option)) < 1:
            sys.exit(f"--{option} must be at least 1, got {given}.")
    if arguments.seed < 0:
        sys.exit(f"--seed must be at least 0, got {arguments.seed}.")
    members = draw_classes(arguments.classes, (arguments.train, arguments.test), arguments.seed)
    packed = io.BytesIO()
    np.savez(packed, **members)
    write_atomically(arguments.output, packed.getvalue())
    size = len(packed.getbuffer()) / 1e6
    print(f"wrote {arguments.output}: {len(members['images'])} images, {size:.1f} MB")


if __name__ == "__main__":
    main()
