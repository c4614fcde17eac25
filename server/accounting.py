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

from fedcompo.privacy.noise import composed_epsilon

ACCOUNTANT = "analytic Gaussian mechanism"
Told = Sequence[Mapping[str, Any]]
"""What a client told of the caps it worked under, answer by answer."""


def spent(told: Told, *, delta: float) -> dict[str, Any] | None:
    """What a client's releases under noise cost each of its images.

    Args:
        told: By the client, answer by answer.
        delta: δ.

    Returns:
        ε (None where there is next to no noise), δ and the number of releases, as JSON values;
        None if nothing was released under noise.
    """
    noises = [float(answer["noise"]) for answer in told if answer.get("noise")]
    if not noises:
        return None
    epsilon = composed_epsilon(noises, delta=delta)
    return {
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": delta,
        "releases": len(noises),
        "accountant": ACCOUNTANT,
    }


def notes(told: Mapping[str, Told], *, delta: float) -> list[str]:
    """What whoever reads the results should know of the clients' caps, in a few sentences.

    Args:
        told: By client.
        delta: δ.
    """
    answers = [answer for one in told.values() for answer in one]
    return [*_errors(answers), *_silence(told), *_privacy(told, delta)]


def _errors(answers: Told) -> list[str]:
    """How far what came is from what was meant, by phase and by what was done to it."""
    found: dict[str, list[float]] = {}
    for answer in answers:
        phase = answer["phase"].partition(",")[0]
        if "form_error" in answer:
            what = f"The {answer.get('form', 'dense')} Fisher of the backbone"
            found.setdefault(what, []).append(answer["form_error"])
        if "wire_error" in answer:
            what = f"What came in {answer.get('wire', 'float32')} in the phase {phase}"
            found.setdefault(what, []).append(answer["wire_error"])
    return [
        f"{what} is off by {fmean(errors):.2%} of its length on average, {max(errors):.2%} at most."
        for what, errors in sorted(found.items())
    ]


def _silence(told: Mapping[str, Told]) -> list[str]:
    silent = sorted(c for c, one in told.items() if any(a.get("form") == "head" for a in one))
    if not silent:
        return []
    return [
        f"{', '.join(silent)} sent nothing of the backbone's Fisher: their images count as ones to "
        "which no weight of it matters, and `alpha` or `beta` holds that much less."
    ]


def _privacy(told: Mapping[str, Told], delta: float) -> list[str]:
    private = {c: cost for c, one in sorted(told.items()) if (cost := spent(one, delta=delta))}
    known = {c: cost["epsilon"] for c, cost in private.items() if cost["epsilon"] is not None}
    found = []
    if known:
        found.append(
            f"Feature statistics and Fisher of {', '.join(known)} are (ε, δ)-private for each "
            f"training image, ε at most {max(known.values()):.3g} at δ = {delta:g}, in this run. "
            "Task vectors, heads, losses and accuracies are not."
        )
    if unknown := sorted(private.keys() - known.keys()):
        found.append(
            f"{', '.join(unknown)} sent feature statistics and Fisher with next to no noise: they "
            "are not private."
        )
    return found
