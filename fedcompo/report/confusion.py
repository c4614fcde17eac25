"""What counts of test images say: accuracy by class, confusions, calibration, intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fedcompo.report.twins import visible

LEVEL = 0.95
"""Of the intervals."""
BINS = 15
"""Of confidence, equally wide, each with its upper end; as many as Guo et al. take."""
WORST = 5
"""Most classes that are listed as the worst."""
MISTAKES = 3
"""Most classes that are listed as what one class is mistaken for."""
Figures = Mapping[str, Any]
Bin = tuple[int, float, int]
"""Number of images, sum of their confidence, number of right ones."""
Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True)
class Tally:
    """Counts of one client's test images, classified among the classes of all clients."""

    confusion: Mapping[str, Mapping[str, int]]
    """By class, then by the class that images were taken for."""
    bins: tuple[Bin, ...]
    """By confidence: the probability of the class that was chosen."""

    @property
    def images(self) -> int:
        """Images that are counted by class."""
        return sum(sum(row.values()) for row in self.confusion.values())

    @property
    def correct(self) -> int:
        """Those of them that were classified correctly."""
        return sum(row.get(name, 0) for name, row in self.confusion.items())

    def withholding(self, least: int) -> Tally:
        """Leave out classes and bins of fewer images, so that no rest is that small either."""
        sizes = {name: sum(row.values()) for name, row in self.confusion.items()}
        named = _large(sizes, least)
        kept = _large({index: own[0] for index, own in enumerate(self.bins)}, least)
        return Tally(
            {name: row for name, row in self.confusion.items() if name in named},
            tuple(own if index in kept else (0, 0.0, 0) for index, own in enumerate(self.bins)),
        )


def _large(sizes: Mapping[Group, int], least: int) -> Collection[Group]:
    """Groups of so many images or more. The others together have as many, or none."""
    large, rest = set(), 0
    for group, size in sorted(sizes.items(), key=lambda item: item[1]):
        if size < least or 0 < rest < least:
            rest += size
        else:
            large.add(group)
    return large


def interval(accuracy: float | None, images: int | None) -> list[float] | None:
    """Wilson's interval of an accuracy, 95 %: [low, high]; None without accuracy or images.

    Source: Wilson, JASA 1927.
    """
    if accuracy is None or not images:
        return None
    from scipy.stats import binomtest  # takes a second to import

    found = binomtest(round(accuracy * images), images).proportion_ci(LEVEL, method="wilson")
    return [float(found.low), float(found.high)]


def interval_of_mean(figures: Iterable[tuple[float, Sequence[float]]]) -> list[float] | None:
    r"""Interval of a mean of clients' accuracies, 95 %; None without any.

    .. math:: \bar p - \sqrt{\textstyle\sum_c (p_c - l_c)^2 / C^2}, \qquad
       \bar p + \sqrt{\textstyle\sum_c (u_c - p_c)^2 / C^2}

    It is about these clients, and further images of theirs; not about other clients. Source: Zou,
    Huang and Zhang, *A note on confidence interval estimation for a linear function of binomial
    proportions*, Computational Statistics & Data Analysis 2009.

    Args:
        figures: By client, the accuracy and its interval.
    """
    parts = list(figures)
    if not parts:
        return None
    mean = math.fsum(p for p, _ in parts) / len(parts)
    below = math.hypot(*(p - low for p, (low, _) in parts)) / len(parts)
    above = math.hypot(*(high - p for p, (_, high) in parts)) / len(parts)
    return [max(0.0, mean - below), min(1.0, mean + above)]


def by_class(tallies: Mapping[str, Tally], classes: Sequence[str]) -> dict[str, Any]:
    """What the counts of all clients say together, as JSON values.

    Args:
        tallies: By client.
        classes: Of all clients, in the order of the joint head.

    Returns:
        ``by_class`` of the classes that are counted, ``worst_classes``, ``confusion`` and
        ``calibration``.
    """
    rows: dict[str, Counter[str]] = {name: Counter() for name in classes}
    owners: dict[str, list[str]] = {name: [] for name in classes}
    for client, tally in sorted(tallies.items()):
        for name, row in tally.confusion.items():
            rows[name].update(row)
            owners[name].append(client)
    figures = {n: _of_class(n, row, owners[n]) for n, row in rows.items() if row.total()}
    index = {name: number for number, name in enumerate(classes)}
    counts = sorted([index[n], index[p], k] for n, row in rows.items() for p, k in row.items())
    return {
        "by_class": figures,
        "worst_classes": _worst(figures),
        "confusion": {"classes": list(classes), "counts": counts},
        "calibration": _calibration([tally.bins for tally in tallies.values()]),
    }


def _of_class(name: str, row: Counter[str], clients: list[str]) -> dict[str, Any]:
    images, correct = row.total(), row[name]
    mistaken = sorted((-count, other) for other, count in row.items() if other != name and count)
    return {
        "images": images,
        "correct": correct,
        "accuracy": correct / images,
        "interval": interval(correct / images, images),
        "clients": clients,
        "mistaken_for": [[other, -count] for count, other in mistaken[:MISTAKES]],
    }


def _worst(figures: Mapping[str, Figures]) -> list[str]:
    """Classes with mistakes by the upper ends of their intervals: of 0 in 1 little is known."""
    failing = [name for name, own in figures.items() if own["correct"] < own["images"]]
    return sorted(failing, key=lambda name: (figures[name]["interval"][1], name))[:WORST]


def _calibration(tallied: Sequence[Sequence[Bin]]) -> dict[str, Any]:
    r"""Expected calibration error, and what it is made of by bin of confidence.

    .. math:: \sum_b \frac{n_b}{n} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    Source: Guo et al., *On Calibration of Modern Neural Networks*, ICML 2017, section 2.
    """
    bins, gap, together = [], 0.0, 0
    for number in range(BINS):
        own = [part[number] for part in tallied]
        images, correct = sum(one[0] for one in own), sum(one[2] for one in own)
        confidence = math.fsum(one[1] for one in own)
        gap, together = gap + abs(correct - confidence), together + images
        bins.append(
            {
                "from": number / BINS,
                "to": (number + 1) / BINS,
                "images": images,
                "confidence": confidence / images if images else None,
                "accuracy": correct / images if images else None,
            }
        )
    return {"error": gap / together if together else None, "bins": bins}


def worst_line(results: Figures) -> str:
    """Say which classes are the worst, and what they are mistaken for; empty if none fails."""
    listed = []
    for name in results.get("worst_classes", ()):
        own = results["by_class"][name]
        taken = ", ".join(f"{count} as {visible(other)}" for other, count in own["mistaken_for"])
        listed.append(f"{visible(name)} {own['correct']} of {own['images']} right ({taken})")
    return f"Worst classes: {'; '.join(listed)}." if listed else ""
