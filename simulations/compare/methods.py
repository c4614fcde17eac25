"""The methods that are compared: this one, its variants, and baselines.

Each is a run of the apps with some settings, or is derived from the task vectors of such a run.
All train for the same number of passes over the data, or of steps where a client has few images,
unless their title says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ALL_KINDS = ("lora", "full", "ia3")
FREE = {"alpha": "0", "trust-region": "0"}
"""Settings without an anchor."""


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    title: str
    settings: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = ALL_KINDS
    of: str = ""
    """Method whose task vectors it is derived from; empty: a run of its own."""
    in_rounds: float = 0
    """Rounds of one pass each, as a multiple of the passes that the others make; 0: no rounds."""


METHODS: dict[str, Method] = {
    "frozen": Method("frozen backbone, joint head", of="ita", kinds=("lora",)),
    "ita": Method("ITA"),
    "no-penalty": Method("task arithmetic, no penalty", FREE),
    "softmax": Method("ITA, Fisher of the class probabilities", {"curvature": "exact"}),
    "dense": Method("ITA, dense Fisher", {"fisher-form": "dense"}),
    "paper": Method("as published", {"preset": "paper"}),
    "iel": Method("IEL", {"method": "iel"}, in_rounds=1),
    "iel-no-penalty": Method(
        "IEL, no penalty", {**FREE, "method": "iel", "beta": "0"}, in_rounds=1
    ),
    "tmc": Method("TMC", FREE, kinds=("tangent",)),
    "average_factors": Method("one-shot mean of A and of B", of="no-penalty", kinds=("lora",)),
    "ties": Method("TIES", of="no-penalty"),
    "fisher_weighted": Method("Fisher-weighted merge", of="no-penalty"),
    "fedavg": Method("FedAvg", {"method": "fedavg"}, in_rounds=1),
    "fedavg-4": Method("FedAvg, 4 times the rounds", {"method": "fedavg"}, in_rounds=4),
    "fedprox": Method("FedProx", {"method": "fedprox"}, in_rounds=1),
    "sequential-ita": Method("ITA, one after the other", {"schedule": "sequential"}),
    "sequential-iel": Method(
        "IEL, one after the other", {"schedule": "sequential", "method": "iel"}
    ),
    "joint": Method("joint training (no federation)", of="ita"),
}


def settings_of(method: Method, kind: str, seed: int, passes: int) -> dict[str, str]:
    """Settings of the run of a method that has one, with so many passes over a client's data."""
    settings = {"kind": kind, "seed": str(seed), **method.settings}
    if method.in_rounds:
        settings |= {"num-server-rounds": str(round(passes * method.in_rounds))}
    return settings | {"local-epochs": "1" if method.in_rounds else str(passes)}
