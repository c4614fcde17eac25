r"""A client's change to the pre-trained weights: :math:`\tau = \theta - \theta_0`.

A task vector is stored as its kind trains it: a LoRA as its factors. It is made dense only where
task vectors are added up. Source: Ilharco et al., *Editing Models with Task Arithmetic*, ICLR 2023
(arXiv 2212.04089); Porrello et al., ICLR 2025 (arXiv 2405.16350).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneMismatch, ContributionError
from fedcompo.method.deltas import Delta, Weights, restore_delta, stored_shapes
from fedcompo.method.ranges import PARAMETER, check_range
from fedcompo.runtime import in_order
from fedcompo.storage.digests import digests_of
from fedcompo.storage.manifest import digest_of_all
from fedcompo.storage.tensorstream import Section

TENSORS = "tensors:"
"""Mark of a SHA-256 of a task vector's tensors."""
NOTHING = TENSORS + "0" * 64
"""Stands for that of every task vector of zeros: who learnt nothing is nobody's copy."""

STACKED = 256
"""Ranks that are multiplied at a time, where LoRAs are added up."""


@dataclass(frozen=True)
class TaskVector:
    """The change of all target weights, as parameters of its kind."""

    kind: Kind
    """How the change is parametrised."""
    tensors: Mapping[str, Tensor]
    """Parameters of the deltas, named ``<weight name>/<parameter name>``."""
    base: str
    """Fingerprint of the pre-trained weights that it changes."""

    @classmethod
    def of(cls, kind: Kind, deltas: Mapping[str, Delta], *, base: str) -> TaskVector:
        """Copy the parameters of trained deltas, given by weight name, to the CPU."""
        tensors = {
            f"{name}/{parameter}": value.detach().cpu().clone()
            for name, delta in deltas.items()
            for parameter, value in delta.named_parameters()
        }
        return cls(kind, tensors, base)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights it changes, sorted."""
        return tuple(sorted({name.rpartition("/")[0] for name in self.tensors}))

    @cached_property
    def sha256(self) -> str:
        """Marked SHA-256 of its tensors as float32; a file of such states it: nothing is read."""
        kept, dtype = self.tensors, torch.float32
        stated = kept.digests(dtype) if isinstance(kept, Section) else {}
        return TENSORS + digest_of_all(stated or digests_of(kept, "task_vector/", dtype))

    def delta(self, name: str, weight: Tensor) -> Tensor:
        r"""Return the change of one weight.

        Args:
            name: Name of the weight.
            weight: Its pre-trained value, (out, in); gives dtype and device of the result.

        Returns:
            :math:`\tau` of this weight, (out, in).
        """
        parts = stored_shapes(self.kind, weight)
        return restore_delta(self.kind, weight, {p: self.tensors[f"{name}/{p}"] for p in parts})

    def dense(self, theta_0: Weights) -> Weights:
        r"""Return :math:`\tau` of all weights, by name, each (out, in)."""
        return {name: self.delta(name, theta_0[name]) for name in self.names}

    def check(self, theta_0: Weights, *, base: str, owner: str) -> None:
        """Refuse an owner's task vector that cannot be added to these weights of a base.

        Raises:
            BackboneMismatch, ContributionError: As :meth:`check_names` and :meth:`checked` do.
        """
        self.check_names(theta_0, base=base, owner=owner)
        for _ in in_order(lambda n: self.checked(n, theta_0[n], owner=owner), sorted(theta_0)):
            pass

    def check_names(self, theta_0: Weights, *, base: str, owner: str) -> None:
        """Look at what needs no tensor.

        Raises:
            BackboneMismatch: If it was trained on other pre-trained weights.
            ContributionError: If it has other tensors than a change of these weights.
        """
        if self.base != base:
            raise BackboneMismatch(
                f"{owner} was trained on the backbone {self.base}, expected {base}. "
                "Use the same backbone everywhere, or train this client again."
            )
        wanted = {
            f"{name}/{parameter}"
            for name, weight in theta_0.items()
            for parameter in stored_shapes(self.kind, weight)
        }
        if differing := sorted(wanted ^ self.tensors.keys()):
            raise ContributionError(
                f"{owner} sent {len(self.tensors)} tensors of kind {self.kind}, expected "
                f"{len(wanted)}; first difference: {differing[0]!r}. "
                "Use the same `target-weights` everywhere."
            )

    def checked(self, name: str, weight: Tensor, *, owner: str) -> TaskVector:
        """Read the change of one weight, (out, in), which must fit it.

        Raises:
            ContributionError: If a shape or dtype does not fit or a value is out of range.
        """
        hint = "Its training diverged: lower `learning-rate`, or use `penalty = implicit`."
        found = {}
        for parameter, shape in stored_shapes(self.kind, weight).items():
            tensor = found[f"{name}/{parameter}"] = self.tensors[f"{name}/{parameter}"]
            what, own = f"Tensor '{name}/{parameter}' of {owner}", tuple(tensor.shape)
            if len(own) != len(shape) or any(
                size not in (None, length) for size, length in zip(shape, own, strict=True)
            ):
                raise ContributionError(
                    f"{what} has shape {own}, expected {shape} (None: any rank)."
                )
            check_range(tensor, PARAMETER, what, hint=hint)
        if self.kind is Kind.LORA:
            rank_a, rank_b = found[f"{name}/A"].shape[0], found[f"{name}/B"].shape[1]
            if rank_a != rank_b:
                raise ContributionError(
                    f"The factors of {name!r} of {owner} have ranks {rank_a} (A) and {rank_b} (B); "
                    "they must agree."
                )
            most = min(weight.shape)
            if not 1 <= rank_a <= most:
                raise ContributionError(
                    f"The factors of {name!r} of {owner} have the rank {rank_a}, expected 1 to "
                    f"{most}. Train it with another `rank`."
                )
        return TaskVector(self.kind, found, self.base)


def weighted_sum(terms: Iterable[tuple[TaskVector, float]], name: str, weight: Tensor) -> Tensor:
    r"""Add up changes of one weight: :math:`\sum_c w_c \tau_c`, (out, in), float64.

    LoRAs side by side are one product: :math:`(w_1 B_1, w_2 B_2, …)\,(A_1; A_2; …)`.

    Args:
        terms: Task vectors and how much each counts, :math:`w_c`.
        name: Name of the weight.
        weight: Its pre-trained value, (out, in); gives the device of the result.
    """
    total = torch.zeros_like(weight, dtype=torch.float64)
    left, right = [total[:, :0]], [total[:0]]
    for vector, times in terms:
        if vector.kind is not Kind.LORA:
            total.add_(vector.delta(name, weight).double(), alpha=times)
            continue
        left.append(times * vector.tensors[f"{name}/B"].to(total))
        right.append(vector.tensors[f"{name}/A"].to(total))
        if sum(map(len, right)) >= STACKED:
            total.addmm_(torch.cat(left, 1), torch.cat(right))
            del left[1:], right[1:]
    return total.addmm_(torch.cat(left, 1), torch.cat(right))
