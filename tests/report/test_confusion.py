"""What counts of test images say, against slow oracles in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from fedcompo.report.confusion import (
    BINS,
    Tally,
    by_class,
    interval,
    interval_of_mean,
    worst_line,
)

CLASSES = ("Three", "five", "three", "two")
NONE = ((0, 0.0, 0),) * BINS


def wilson(right: int, images: int) -> tuple[float, float]:
    """Oracle: the formula of Wilson, JASA 1927."""
    z, p = 1.959963984540054, right / images
    middle = (p + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * math.sqrt(p * (1 - p) / images + z**2 / (4 * images**2))
    return middle - half, middle + half


@pytest.mark.parametrize("images", [1, 2, 7, 90, 10_000])
def test_an_interval_is_wilsons(images):
    for right in {0, 1, images // 3, images - 1, images}:
        assert interval(right / images, images) == pytest.approx(wilson(right, images), abs=1e-12)
    assert interval(None, images) is interval(0.5, 0) is interval(0.5, None) is None


def test_the_interval_of_a_mean_adds_up_squares_and_of_one_client_is_its_own():
    assert interval_of_mean([]) is None
    assert interval_of_mean([(0.9, [0.7, 0.95])]) == pytest.approx([0.7, 0.95])
    low, high = interval_of_mean([(0.9, [0.7, 0.95]), (0.5, [0.3, 0.7]), (1.0, [0.8, 1.0])])
    assert low == pytest.approx(0.8 - math.sqrt(0.2**2 + 0.2**2 + 0.2**2) / 3)
    assert high == pytest.approx(0.8 + math.sqrt(0.05**2 + 0.2**2 + 0) / 3)


def tally_of(true: list[str], taken: list[str], sure: list[float]) -> Tally:
    """Count image by image."""
    confusion: dict[str, dict[str, int]] = {}
    bins = [[0, 0.0, 0] for _ in range(BINS)]
    for name, other, confidence in zip(true, taken, sure, strict=True):
        row = confusion.setdefault(name, {})
        row[other] = row.get(other, 0) + 1
        own = next(b for n, b in enumerate(bins) if n / BINS < confidence <= (n + 1) / BINS)
        own[0], own[1], own[2] = own[0] + 1, own[1] + confidence, own[2] + (name == other)
    return Tally(confusion, tuple((n, c, r) for n, c, r in bins))


def images_of(seed: int, owned: tuple[str, ...], count: int):
    draw = np.random.default_rng(seed)
    true = [str(name) for name in draw.choice(owned, count)]
    taken = [name if draw.random() < 0.7 else str(draw.choice(CLASSES)) for name in true]
    return true, taken, [float(c) for c in draw.uniform(0.25, 1, count)]


def test_the_counts_of_all_clients_together_are_those_of_their_images():
    north, south = images_of(1, ("Three", "two"), 40), images_of(2, ("five", "two"), 25)
    found = by_class({"south": tally_of(*south), "north": tally_of(*north)}, CLASSES)
    true, taken, sure = (a + b for a, b in zip(north, south, strict=True))

    counts = np.zeros((4, 4), int)
    for row, column, count in found["confusion"]["counts"]:
        counts[row, column] += count
    np.testing.assert_array_equal(counts, confusion_matrix(true, taken, labels=list(CLASSES)))
    assert found["confusion"]["classes"] == list(CLASSES)

    assert list(found["by_class"]) == ["Three", "five", "two"]  # nobody tested `three`
    for name, own in found["by_class"].items():
        mine = [other for one, other in zip(true, taken, strict=True) if one == name]
        assert (own["images"], own["correct"]) == (len(mine), mine.count(name))
        assert own["accuracy"] == mine.count(name) / len(mine)
        assert own["interval"] == interval(own["accuracy"], own["images"])
        wrong = sorted({*mine} - {name}, key=lambda other: (-mine.count(other), other))
        assert own["mistaken_for"] == [[other, mine.count(other)] for other in wrong]
    assert [own["clients"] for own in found["by_class"].values()] == [
        ["north"],
        ["south"],
        ["north", "south"],
    ]

    error = 0.0  # Guo et al., image by image
    for number, own in enumerate(found["calibration"]["bins"]):
        inside = [i for i, c in enumerate(sure) if number / BINS < c <= (number + 1) / BINS]
        assert own["images"] == len(inside)
        if inside:
            right = sum(true[i] == taken[i] for i in inside) / len(inside)
            confidence = sum(sure[i] for i in inside) / len(inside)
            assert (own["accuracy"], own["confidence"]) == pytest.approx((right, confidence))
            error += len(inside) / len(sure) * abs(right - confidence)
        else:
            assert own["accuracy"] is own["confidence"] is None
    assert found["calibration"]["error"] == pytest.approx(error, abs=1e-12)


def test_of_no_counts_nothing_is_said():
    found = by_class({}, CLASSES)
    assert (found["by_class"], found["worst_classes"]) == ({}, [])
    assert found["confusion"]["counts"] == []
    assert found["calibration"]["error"] is None
    assert worst_line(found) == worst_line({}) == ""


def test_the_worst_classes_are_those_of_which_it_is_known_and_the_line_quotes_names():
    confusion = {
        "five": {"two": 1},  # one image says little
        "three": {"three": 20, "Three": 15, "two": 5},
        "two": {"two": 38, "five": 2},
        "Three": {"Three": 9},
    }
    found = by_class({"north": Tally(confusion, NONE)}, CLASSES)
    assert found["worst_classes"] == ["three", "five", "two"]
    assert worst_line(found) == (
        "Worst classes: 'three' 20 of 40 right (15 as 'Three', 5 as 'two'); "
        "'five' 0 of 1 right (1 as 'two'); 'two' 38 of 40 right (2 as 'five')."
    )


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=BINS),
    least=st.integers(0, 12),
)
def test_what_is_withheld_is_not_small_either(sizes, least):
    confusion = {f"c{i}": {f"c{i}": n} for i, n in enumerate(sizes) if n}
    bins = tuple((n, n / 2, 0) for n in sizes) + NONE[len(sizes) :]
    kept = Tally(confusion, bins).withholding(least)
    for told in ([sum(row.values()) for row in kept.confusion.values()], [b[0] for b in kept.bins]):
        told = [n for n in told if n]
        rest = sum(sizes) - sum(told)
        assert all(n >= least for n in told)
        assert rest == 0 or rest >= min(least, sum(sizes))
    assert all(kept.confusion[name] == confusion[name] for name in kept.confusion)
    if all(n >= least for n in sizes if n):
        assert kept.confusion == confusion
