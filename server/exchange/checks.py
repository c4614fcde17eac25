"""Check a client's answer before anything else uses it.

Each check unpacks one part of an answer and raises if it cannot be used. Contributions are checked
in :mod:`fedcompo.registry.admission`, wherever they come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.voting import WORST, Votes
from fedcompo.config.choices import FisherForm, Wire
from fedcompo.errors import BackboneMismatch, ContributionError
from fedcompo.messages.answers import (
    AveragingAnswer,
    EvaluateAnswer,
    FisherAnswer,
    VoteAnswer,
    caps_of,
)
from fedcompo.messages.body import Body
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.ranges import STRANGE, beyond
from fedcompo.report.confusion import BINS, Bin, Tally

CAP_WORDS: Mapping[str, list[Any]] = {"wire": list(Wire), "form": list(FisherForm)}
"""Caps that a client reports in words, and the words there are."""
WHOSE = ("own_task", "frozen_class_il", "frozen_task_il", "class_il", "task_il", "own_heads")
FIGURES = ("losses", *(f"{name}_accuracy" for name in WHOSE))
"""Entries of answers that people and trackers are told as the run goes."""
LARGEST = torch.finfo(torch.float32).max
"""Largest figure that a client can report: sums of these are finite in float64."""


def check_backbone(client: str, base: str, backbone: Backbone) -> None:
    """Raise ``BackboneMismatch`` if a client holds other pre-trained weights."""
    if base != backbone.fingerprint:
        raise BackboneMismatch(
            f"Client {client!r} holds the backbone {base}, the server holds "
            f"{backbone.fingerprint}. Give both the same `backbone` and `checkpoint`."
        )


def checked_fisher(client: str, answer: FisherAnswer, backbone: Backbone) -> FisherDiagonal | None:
    """Return a client's Fisher sum; None if its form is ``none``.

    Raises:
        ContributionError: If it is not in the form that it names, or cannot anchor a client; see
            :meth:`FisherDiagonal.check`.
    """
    fisher = FisherDiagonal.read(answer.parts, answer.num_examples)
    if answer.form is FisherForm.NONE and not answer.parts:
        return None
    if fisher.form is not answer.form:
        raise ContributionError(
            f"The Fisher of client {client!r} is not in the form that it names, {answer.form}. Use "
            "the same fedcompo version everywhere."
        )
    fisher.check(backbone.theta_0, owner=f"client {client!r}")
    return fisher


def checked_votes(client: str, answer: VoteAnswer, count: int) -> Votes:
    """Return a client's votes on so many candidates.

    Raises:
        ContributionError: If there are more or fewer, more hits than images, or a loss that is not
            one of so many images.
    """
    hits, losses, images = answer.hits, answer.losses, answer.num_examples
    complete = len(hits) == len(losses) == count and all(own <= images for own in hits)
    most = WORST * images + 1e-6
    if not (complete and all(0 <= loss <= most for loss in losses)):  # also if it is no number
        raise ContributionError(
            f"Client {client!r} sent {len(hits)} hits and {len(losses)} losses of {images} images; "
            f"expected {count} of each, no more hits than images, losses of 0 to {WORST:g} an "
            "image. Use the same fedcompo version everywhere."
        )
    return Votes(hits, losses, images)


def checked_fractions(client: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """Return reported accuracies by name; raises ``ContributionError`` if one is not in [0, 1]."""
    for name, value in figures.items():
        if not isinstance(value, float | int) or not 0 <= value <= 1:
            raise ContributionError(
                f"Client {client!r} reports {name} = {value!r}, expected [0, 1]."
            )
    return {name: float(value) for name, value in figures.items()}


def measured_in(
    client: str, body: Body, own: Iterable[str], known: Iterable[str]
) -> tuple[EvaluateAnswer, dict[str, float]]:
    """Read what a client measured, and its accuracies by name; see :func:`checked_tally`."""
    answer = EvaluateAnswer.from_body(body)
    figures = checked_fractions(client, answer.figures)
    checked_tally(client, answer, own, known)
    return answer, figures


def checked_tally(
    client: str, answer: EvaluateAnswer, own: Iterable[str], known: Iterable[str]
) -> Tally | None:
    """Return the counts of a client's test images; None if it keeps them to itself.

    Args:
        client: Its name.
        answer: Its accuracies are checked already.
        own: The client's classes.
        known: All classes that the model can choose.

    Raises:
        ContributionError: If there are other classes, or counts that cannot be those of its images.
    """
    tally, images, own = answer.tally, answer.num_examples, {*own}
    if tally is None:
        return None
    chosen = {name for row in tally.confusion.values() for name in row}
    if strange := sorted({*tally.confusion} - own | chosen - {*known}):
        raise ContributionError(
            f"Client {client!r} counts images of {strange[0]!r}, which is none of the classes that "
            "they have or can be taken for. Use the same fedcompo version everywhere."
        )
    hidden = (images or 0) - tally.images
    hits = answer.class_il_accuracy * (images or 0)
    adds_up = hidden == 0 if own == {*tally.confusion} else hidden >= 0
    adds_up &= tally.correct - 1e-6 <= hits <= tally.correct + hidden + 1e-6
    adds_up &= len(tally.bins) == BINS and sum(one[0] for one in tally.bins) <= (images or 0)
    if not (adds_up and all(_is_bin(number, one) for number, one in enumerate(tally.bins))):
        raise ContributionError(
            f"Client {client!r} counts {tally.images} of its {images} test images by class, "
            f"{tally.correct} of them right, and reports the accuracy {answer.class_il_accuracy}; "
            f"its {len(tally.bins)} bins of confidence hold {sum(b[0] for b in tally.bins)}. This "
            "does not add up. Use the same fedcompo version everywhere."
        )
    return tally


def _is_bin(number: int, counted: Bin) -> bool:
    """Whether a bin's images can have this confidence together; see :class:`Tally`."""
    images, confidence, right = counted
    low, high = number * images / BINS - 1e-6, (number + 1) * images / BINS + 1e-6
    return right <= images and low <= confidence <= high  # also if it is no number


def checked_losses(client: str, answer: AveragingAnswer) -> list[float]:
    """Return reported losses; raises ``ContributionError`` if there is none, or no figure."""
    losses = list(answer.losses)
    if not losses or not all(abs(loss) <= LARGEST for loss in losses):  # also if not a number
        raise ContributionError(f"Client {client!r} reports the losses {losses}.")
    return losses


def checked_caps(client: str, body: Body) -> list[dict[str, float | str]]:
    """Return a client's reports of its caps, and of those of a Fisher inside; empty: none.

    Raises:
        ContributionError: If an entry is neither a known word nor a figure >= 0.
    """
    stated = caps_of(body)
    for caps in stated:
        if not isinstance(caps, dict) or not all(_can_be_true(*entry) for entry in caps.items()):
            raise ContributionError(
                f"Client {client!r} reports the caps {caps!r}; expected a wire, a form and "
                "figures. Use the same fedcompo version everywhere."
            )
    return [dict(caps) for caps in stated]


def figures_of(body: Body) -> dict[str, Any]:
    """Return the losses and accuracies that an answer states; whatever else it states is none."""
    stated = {name: body[1][name] for name in FIGURES if name in body[1]}
    return {n: v for n, v in stated.items() if all(map(_is_figure, v if type(v) is list else [v]))}


def _can_be_true(name: str, value: Any) -> bool:
    if name in CAP_WORDS:
        return value in CAP_WORDS[name]
    return _is_figure(value) and value >= 0


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST  # which NaN is not


def too_large(what: str, traces: Mapping[str, float]) -> dict[str, str]:
    """Find clients whose Fisher, or second moment of features, would outweigh all others'.

    Args:
        what: Which of them.
        traces: Of the mean, by client.

    Returns:
        The reason to leave it out, by client.
    """
    return {
        client: (
            f"The {what} of {client} has the mean trace {traces[client]:.3g}, more than "
            f"{STRANGE:g} times the median {usual:.3g} of the others'. Look at its data and its "
            "version of fedcompo."
        )
        for client, usual in beyond(traces, STRANGE).items()
    }
