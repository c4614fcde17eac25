r"""What each client released under noise, and the notes on it in the results.

Every answer that carries statistics or a Fisher under noise is one release of the Gaussian
mechanism; :mod:`fedcompo.privacy.noise` turns a run's releases into one :math:`\varepsilon`. Runs
add up, too, but what a client released in earlier runs is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedcompo.config.choices import Wire
from fedcompo.privacy.noise import composed_epsilon

ACCOUNTANT = "analytic Gaussian mechanism"
Reports = Sequence[Mapping[str, Any]]
"""A client's reports of the caps it worked under, one for each answer."""


def spent(reports: Reports, *, delta: float) -> dict[str, Any] | None:
    """Compute the ε at δ of all that a client released under noise, for each of its images.

    Returns:
        ε (None where there is next to no noise), δ and the number of releases, as JSON values;
        None if nothing was released under noise.
    """
    noises = [float(answer["noise"]) for answer in reports if answer.get("noise")]
    if not noises:
        return None
    epsilon = composed_epsilon(noises, delta=delta)
    return {
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": delta,
        "releases": len(noises),
        "accountant": ACCOUNTANT,
    }


def notes(reports: Mapping[str, Reports], *, delta: float) -> list[str]:
    """Write what readers of the results should know of the clients' caps, in a few sentences."""
    answers = [answer for answers in reports.values() for answer in answers]
    return [*_errors(answers), *_silence(reports), *_privacy(reports, delta)]


def _errors(answers: Reports) -> list[str]:
    """Relative errors of what arrived in int8, by phase; those of bfloat16 are below 0.4 %."""
    errors_of: dict[str, list[float]] = {}
    for answer in answers:
        phase = answer["phase"].partition(",")[0]
        if answer.get("wire") == Wire.INT8 and "wire_error" in answer:
            errors_of.setdefault(phase, []).append(answer["wire_error"])
    return [
        f"What came in int8 in the phase {phase} is off by {fmean(errors):.2%} of its length on "
        f"average, {max(errors):.2%} at most."
        for phase, errors in sorted(errors_of.items())
    ]


def _silence(reports: Mapping[str, Reports]) -> list[str]:
    silent = sorted(
        c for c, answers in reports.items() if any(a.get("form") == "none" for a in answers)
    )
    if not silent:
        return []
    return [f"{', '.join(silent)} sent no Fisher: nobody is anchored by what their images need."]


def _privacy(reports: Mapping[str, Reports], delta: float) -> list[str]:
    costs = {c: spent(answers, delta=delta) for c, answers in sorted(reports.items())}
    private = {c: cost for c, cost in costs.items() if cost}
    known = {c: cost["epsilon"] for c, cost in private.items() if cost["epsilon"] is not None}
    sentences = []
    if known:
        sentences.append(
            f"Feature statistics and Fisher of {', '.join(known)} are (ε, δ)-private for each "
            f"training image, ε at most {max(known.values()):.3g} at δ = {delta:g}, in this run. "
            "Task vectors, heads, losses and accuracies are not."
        )
    if unknown := sorted(private.keys() - known.keys()):
        sentences.append(
            f"{', '.join(unknown)} sent feature statistics and Fisher with next to no noise: they "
            "are not private."
        )
    return sentences
