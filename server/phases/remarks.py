"""Notes on clients whose training came to nothing, from the figures that they report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedcompo.report.units import listed

UNDONE = 0.9
"""Share of the way that the anchor took back, from which on it undid the training."""


def remarks(reported: Mapping[str, Mapping[str, Any]], *, strength: str) -> Iterator[str]:
    """Write a sentence on each trouble, with the names of the clients that it befell.

    The strength is the name of the anchor's setting.
    """
    if flat := _named(reported, _learnt_nothing):
        yield (
            f"{flat} learnt nothing: the training loss is not below its start. Statistics still go "
            "into the joint head."
        )
    if undone := _named(reported, lambda own: own.get("held", 0.0) > UNDONE):
        yield (
            f"The anchor undid the training of {undone}: lower `{strength}`, or widen "
            "`trust-region`."
        )
    if worse := _named(reported, _is_worse):
        yield (
            f"The own task vector of {worse} is worse on its own task than the frozen backbone: "
            "lower `learning-rate`, or give it more images."
        )


def _named(reported: Mapping[str, Mapping[str, Any]], befell: Callable[[Any], bool]) -> str:
    return listed(client for client, own in reported.items() if befell(own))


def _learnt_nothing(own: Mapping[str, Any]) -> bool:
    losses = own.get("losses", [])
    return len(losses) > 1 and losses[-1] >= losses[0]


def _is_worse(own: Mapping[str, Any]) -> bool:
    accuracy, frozen = own.get("own_task_accuracy"), own.get("frozen_task_il_accuracy")
    return accuracy is not None and frozen is not None and accuracy < frozen
