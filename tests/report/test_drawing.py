"""Figures: marks stand where their values are, and colours are as strong as values are large."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from fedcompo.report import drawing
from fedcompo.report.drawing import BLUE, GREY, ORANGE, STRENGTH, Series

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in parsed(svg).iter(f"{SVG}text")]


def marks(svg: str, colour: str) -> list[tuple[float, float]]:
    """Where the marks of a colour stand."""
    used = [u for u in parsed(svg).iter(f"{SVG}use") if f"fill: {colour}" in u.get("style", "")]
    return [(float(u.get("x")), float(u.get("y"))) for u in used]


def hexadecimal(pixel: np.ndarray) -> str:
    return f"#{bytes(pixel[:3]).hex()}"


def test_points_stand_where_their_values_are_and_intervals_end_where_theirs_do():
    values, interval = [0.0, 0.25, None, 1.0], [0.125, 0.5]
    series = [Series("one", BLUE, values, [None, interval, None, None])]
    svg = drawing.points("A", ["a", "b", "c", "d"], series)
    at = [x for x, _ in marks(svg, BLUE)]
    nothing, quarter, everything = at
    assert (quarter - nothing) / (everything - nothing) == pytest.approx(0.25, abs=1e-6)
    (line,) = [p for p in parsed(svg).iter(f"{SVG}path") if f"stroke: {BLUE}" in p.get("style", "")
               and "stroke-opacity: 0.6" in p.get("style", "")]  # fmt: skip
    ends = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", line.get("d"))]
    shares = [(x - nothing) / (everything - nothing) for x in ends]
    assert shares == pytest.approx(interval, abs=1e-6)
    assert {"a", "b", "c", "d"} <= set(texts(svg))


def test_many_rows_are_curves_of_sorted_values_and_series_are_named():
    rows = drawing.NAMED + 1
    series = [Series("one", BLUE, [(7 * i % rows) / rows for i in range(rows)]),
              Series("other", GREY, [0.5] * rows)]  # fmt: skip
    svg = drawing.points("A", [f"client-{i}" for i in range(rows)], series)
    assert not any(text.startswith("client") for text in texts(svg))
    assert {"one", "other"} <= set(texts(svg))


@pytest.mark.parametrize("count", [2, 30])
def test_a_cell_is_as_strong_as_its_value_and_names_are_all_there(count):
    shares = np.zeros((count, count))
    shares[0, 0], shares[0, 1], shares[1, 1] = 0.25, -1.0, 1.0
    labels = [f"class {i}" for i in range(count)]
    svg = drawing.matrix("A", labels, shares.tolist(), {(0, 1): "seven"})
    (image,) = parsed(svg).iter(f"{SVG}image")
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(image.get(LINK).split(",")[1]))))
    assert pixels.shape == (count, count, 4)
    assert pixels[..., 3] / 255 == pytest.approx(STRENGTH * np.sqrt(np.abs(shares)), abs=1 / 255)
    assert hexadecimal(pixels[0, 0]) == BLUE
    assert hexadecimal(pixels[0, 1]) == ORANGE
    assert texts(svg).count("class 1") == 2  # of a row and a column
    assert ("seven" in texts(svg)) == (count == 2)


def test_a_figure_reads_on_any_ground_and_no_two_share_an_id():
    figures = [drawing.line(title, ("x", "y"), [0, 1], [1, 2]) for title in ("first", "second")]
    for svg in figures:
        assert "currentColor" in svg
        assert drawing.INK not in svg
        assert "#ffffff" not in svg
        assert not any("fill: #000" in node.get("style", "") for node in parsed(svg).iter())
    first, second = (set(re.findall(r' id="([^"]*)"', svg)) for svg in figures)
    assert first
    assert not first & second


def test_dollar_signs_and_long_or_steering_names_are_text():
    svg = drawing.points("A", ["$x_1$", "a\u202eb", "x" * 80], [Series("one", BLUE, [0.5] * 3)])
    assert {"$x_1$", "a⟨U+202E⟩b", "x" * 21 + "…"} <= set(texts(svg))


def test_bars_are_as_long_as_their_values():
    svg = drawing.bars("A", ["a", "b"], {"seconds": [1.0, 4.0], "MB": [2.0, 3.0]})
    filled = [
        p for p in parsed(svg).iter(f"{SVG}path") if f"fill: {drawing.GREEN}" in p.get("style", "")
    ]
    lengths = []
    for path in filled:
        xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path.get("d"))]
        lengths.append(max(xs) - min(xs))
    assert lengths[1] / lengths[0] == pytest.approx(4, rel=1e-4)
    assert lengths[3] / lengths[2] == pytest.approx(1.5, rel=1e-4)
