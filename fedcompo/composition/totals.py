r"""What a registry keeps of all its members together, beside the sum of their task vectors.

::

    counts, sums, second   the members' statistics; see fedcompo.method.statistics
    fisher/<name>          their Fisher diagonals on their grid; see fedcompo.method.fisher

All of it is integers: a version's totals are those of the version before, plus who came, minus who
left, at a cost that does not grow with the members, and they are the bits of a sum taken anew.
The Fisher total is dense if every member's Fisher is, factored if one is factored, and not there
if a member keeps none. Only where that form comes back, because who stood in its way left, is the
total taken anew over all members.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcompo.config.choices import FisherForm
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import COLUMNS, FISHER_BITS, ROWS, FisherDiagonal, from_grid
from fedcompo.method.statistics import BITS, CEILING, FeatureSums, to_grid
from fedcompo.storage.tensorstream import Layout, Section, StreamedTensors, TensorWriter

FISHER = "fisher"


@dataclass(frozen=True)
class FisherTotal:
    """A sum of Fisher diagonals on their grid."""

    sums: Mapping[str, Tensor]
    """By name, int64."""
    factored: bool


@dataclass(frozen=True)
class Totals:
    """Totals of a version, read from its file."""

    tensors: StreamedTensors

    @property
    def statistics(self) -> FeatureSums:
        """Statistics of all members."""
        return exact_from(self.tensors, self.tensors.manifest["classes"])

    @property
    def about(self) -> dict[str, Any]:
        """What the file says of them, but for the version of fedcompo that wrote it."""
        own = "bits", "classes", "fisher_bits", "fisher_forms", "fisher_examples"
        return {name: self.tensors.manifest.get(name) for name in own}

    @property
    def forms(self) -> Counter[str]:
        """Number of members by the form of their Fisher."""
        return Counter(self.tensors.manifest["fisher_forms"])

    @property
    def num_examples(self) -> int:
        """Number of examples in the members' Fisher diagonals."""
        return int(self.tensors.manifest["fisher_examples"])

    @property
    def fisher_total(self) -> FisherTotal | None:
        """Fisher total of all members; None if one of them keeps none."""
        sums = Section(self.tensors, FISHER)
        return FisherTotal(sums, _form(self.forms) is FisherForm.FACTORED) if sums else None

    @property
    def fisher(self) -> FisherDiagonal | None:
        """The same as numbers, float64."""
        total = self.fisher_total
        return from_grid(total.sums, self.num_examples) if total else None


def write_totals(
    path: Path,
    shapes: Weights,
    before: Totals | None,
    *,
    coming: Sequence[Contribution],
    going: Sequence[Contribution],
    everyone: Callable[[], Sequence[Contribution]],
) -> FeatureSums:
    """Write the totals of a version.

    Args:
        path: A new file.
        shapes: Target weights, each (out, in), by name; only their shapes are used.
        before: Totals of the version before; None: nobody was there.
        coming: Members that are new.
        going: Members of the version before that are gone.
        everyone: Opens all members; called only if the Fisher total must be taken anew.

    Returns:
        The statistics of all members.

    Raises:
        ContributionError: If a sum leaves the range of int64.
    """
    statistics = _statistics(before, coming, going)
    forms, examples = (before.forms, before.num_examples) if before else (Counter[str](), 0)
    last = _form(forms)
    for sign, members in ((1, coming), (-1, going)):
        for member in members:
            forms[_form_of(member)] += sign
            examples += sign * (member.fisher.num_examples if member.fisher else 0)
    form = _form(forms)
    signed = [(c, 1) for c in coming] + [(c, -1) for c in going]
    start = before.fisher_total if before else None
    if before and form is not FisherForm.NONE and last not in (form, FisherForm.DENSE):
        signed, start = [(c, 1) for c in everyone()], None
    values = exact_tensors(statistics)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (torch.int64, tuple(tensor.shape)) for name, tensor in values.items()
    }
    layout |= {f"{FISHER}/{name}": entry for name, entry in _layout(form, shapes).items()}
    manifest = {
        "content": "statistics",
        "bits": BITS,
        "classes": list(statistics.classes),
        "fisher_bits": FISHER_BITS,
        "fisher_forms": {str(f): n for f, n in sorted(forms.items()) if n},
        "fisher_examples": examples,
    }
    with TensorWriter(path, layout, manifest) as writer:
        for name in sorted(layout):
            if name in values:
                writer.write(name, values[name])
            else:
                writer.write(name, _fisher(name.removeprefix(f"{FISHER}/"), start, signed))
    return statistics


def exact_tensors(statistics: FeatureSums) -> dict[str, Tensor]:
    """Name the tensors of a total, int64: beyond float32, in which a client's own travel."""
    return {part: getattr(statistics, part) for part in ("counts", "sums", "second")}


def exact_from(tensors: Mapping[str, Tensor], classes: Iterable[str]) -> FeatureSums:
    """Rebuild what :func:`exact_tensors` named."""
    return FeatureSums(tuple(classes), *(tensors[part] for part in ("counts", "sums", "second")))


def sums_of(member: Contribution) -> FeatureSums:
    """Return a member's statistics, which must be sums; raises ``ContributionError``."""
    if not isinstance(member.statistics, FeatureSums):
        raise ContributionError(
            f"Client {member.client!r} describes its features by mixtures, expected sums."
        )
    return member.statistics


def _statistics(
    before: Totals | None, coming: Iterable[Contribution], going: Iterable[Contribution]
) -> FeatureSums:
    terms = [sums_of(member) for member in coming]
    total = before.statistics if before else terms.pop()
    for own in terms:
        total += own
    for member in going:
        total -= sums_of(member)
    return total


def _form_of(member: Contribution) -> FisherForm:
    if member.fisher is None or member.fisher.form is FisherForm.KRONECKER:  # which is no diagonal
        return FisherForm.NONE
    return FisherForm.FACTORED if member.fisher.factored else FisherForm.DENSE


def _form(forms: Mapping[str, int]) -> FisherForm:
    """The form of a total over members of these forms."""
    present = [form for form in (FisherForm.NONE, FisherForm.FACTORED) if forms.get(form)]
    return present[0] if present else FisherForm.DENSE


def _layout(form: FisherForm, shapes: Weights) -> Layout:
    if form is FisherForm.NONE:
        return {}
    if form is FisherForm.DENSE:
        return {name: (torch.int64, tuple(weight.shape)) for name, weight in shapes.items()}
    return {
        f"{name}{end}": (torch.int64, (weight.shape[axis],))
        for name, weight in shapes.items()
        for end, axis in ((ROWS, 0), (COLUMNS, 1))
    }


def _fisher(
    name: str, start: FisherTotal | None, signed: Iterable[tuple[Contribution, int]]
) -> Tensor:
    """Add one entry of the members' Fisher diagonals to a total, exactly."""
    total = None if start is None else _entry(start.sums, name, start.factored, lambda t: t)
    for member, sign in signed:
        assert member.fisher is not None
        sums, factored = member.fisher.sums, member.fisher.factored
        own = sign * _entry(sums, name, factored, lambda t: to_grid(t, FISHER_BITS))
        total = own if total is None else _bounded(total + own)
    assert total is not None
    return total


def _entry(
    sums: Mapping[str, Tensor], name: str, factored: bool, read: Callable[[Tensor], Tensor]
) -> Tensor:
    """Read one entry, int64; row or column sums of a dense one where these are asked for."""
    if factored or not name.endswith((ROWS, COLUMNS)):
        return read(sums[name])
    weight, _, end = name.rpartition("/")
    dense, axis = read(sums[weight]), 1 if ROWS.endswith(end) else 0
    _bounded(dense.double().sum(axis))
    return dense.sum(axis)


def _bounded(values: Tensor) -> Tensor:
    if values.numel() and max(map(abs, values.aminmax())) >= CEILING:
        raise ContributionError(
            "The sum of the Fisher diagonals leaves the range of int64: they are too large. Train "
            "with `keep-fisher = false`, or find out whose they are."
        )
    return values
