r"""What noise is worth: :math:`\varepsilon` at a :math:`\delta`, by Flower's accountant.

Every answer that carries statistics or a Fisher under noise is one release of the Gaussian
mechanism (:mod:`fedcompo.privacy.noise`); a run's releases add up. No image is drawn by chance, so
that nothing is amplified. Runs add up, too: what a client gave away in earlier ones is not known
here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from fedcompo.config.run import RunConfig
from fedcompo.errors import ConfigError

ACCOUNTANT = "flwr.serverapp.RdpAccountant"
BACKEND = "dp_accounting"
INSTALL = "pip install 'fedcompo[dp]'"
WEAKEST, STRONGEST = 1e-6, 1e6
"""Noise below is none; above, it counts as this much, since the accountant's floats overflow."""
Told = Sequence[Mapping[str, Any]]
"""What a client told of the caps it worked under, answer by answer."""


def check_noise(config: RunConfig) -> None:
    """Refuse noise that would not protect, or whose ε nobody could tell; raises ``ConfigError``."""
    config.caps.check_head_start(config.train.head_start)
    if config.caps.dp_noise > 0 and find_spec(BACKEND) is None:
        raise ConfigError(
            f"`dp-noise` is {config.caps.dp_noise:g}, but Flower's accountant, which tells ε, is "
            f"not complete here. Install the rest of it where the server runs: {INSTALL}"
        )


def spent(told: Told, *, delta: float) -> dict[str, Any] | None:
    """What a client's releases under noise cost each of its images.

    Args:
        told: By the client, answer by answer.
        delta: δ.

    Returns:
        ε (None where the accountant is not installed), δ and the number of releases, as JSON
        values; None if nothing was released under noise.
    """
    noises = [float(answer["noise"]) for answer in told if answer.get("noise")]
    if not noises:
        return None
    known = find_spec(BACKEND) is not None
    epsilon = composed_epsilon(noises, delta=delta) if known else math.inf
    return {
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": delta,
        "releases": len(noises),
        "accountant": ACCOUNTANT if known else None,
    }


def composed_epsilon(noises: Sequence[float], *, delta: float) -> float:
    """ε of several releases of the Gaussian mechanism together.

    Args:
        noises: Noise of each, in sensitivities, above 0.
        delta: δ.

    Returns:
        ε, never too small; infinite where there is next to no noise.
    """
    if min(noises) < WEAKEST:
        return math.inf
    from flwr.serverapp import (  # its backend comes with `fedcompo[dp]` alone
        GaussianPrivacyEvent,
        NeighboringRelation,
        PrivacyConfig,
        RdpAccountant,
        SamplingMethod,
    )

    accountant = RdpAccountant(
        PrivacyConfig(
            target_delta=delta,
            population_size=1,  # counts only where examples are drawn by chance
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=SamplingMethod.NO_AMPLIFICATION,
        )
    )
    for noise in noises:
        event = GaussianPrivacyEvent(min(noise, STRONGEST), sample_size=1, population_size=1)
        accountant.compose(event)
    return float(accountant.get_epsilon(delta))


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
            f"ε of {', '.join(unknown)} is not known: the noise is next to none, or Flower's "
            f"accountant is not complete where the server runs ({INSTALL})."
        )
    return found
