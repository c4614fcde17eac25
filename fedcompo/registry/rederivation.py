"""Derives a composition again from its members: sums, factor, weights, joint head."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcompo.composition import fixed_point
from fedcompo.composition.head import joint_head
from fedcompo.composition.lengths import Rounding, squared_length
from fedcompo.composition.models import times_of
from fedcompo.composition.realigned import realigned_head
from fedcompo.composition.rules.rule import Changes
from fedcompo.composition.scale import FactorBy, norm_preserving
from fedcompo.composition.totals import exact_tensors, total_after
from fedcompo.composition.version import terms_of
from fedcompo.method.heads import Head
from fedcompo.method.task_vector import TENSORS
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.removed import vector_digest
from fedcompo.registry.state import State
from fedcompo.runtime import THREADS, in_order
from fedcompo.storage.files import REALIGNED, canonical

CLOSE = 1e-4
"""Largest difference of a joint head, or of a total relative to its largest value, that another
machine's rounding can explain."""
OTHERWISE = "up to {:.1e}: this machine's arithmetic rounds otherwise"


@dataclass(frozen=True)
class Finding:
    """One claim and whether it holds."""

    claim: str
    """The claim, as a sentence."""
    holds: bool | None
    """None: it cannot be derived again from what is at hand."""
    detail: str = ""
    """Why it does not hold; names the file."""

    @classmethod
    def of(cls, claim: str, holds: bool, detail: str) -> Finding:
        """Judge a claim; the detail is kept only if it does not hold."""
        return cls(claim, holds, "" if holds else detail)


def compared(claim: str, stated: object, derived: object) -> Finding:
    """Judge the claim that two values are equal."""
    detail = f"stated is {str(stated)[:200]}, derived {str(derived)[:200]}"
    return Finding.of(claim, stated == derived, detail)


def recomposed(registry: RegistryReader) -> Finding:
    """Sum the members' task vectors again and compare every weight with the composition."""
    claim = "the composition is that of the members"
    state, backbone = registry.state, registry.backbone
    running, model = registry.running_sum(), registry.composed()
    stated = {name: model.manifest.get(name) for name in state.about}
    if stated != as_json(state.about):
        return Finding(claim, False, f"the model says {stated}, expected {state.about}")
    rule = state.settings.made_by
    pool, ruled = registry.pool(), registry.total()
    terms, times = terms_of(pool, state.settings), times_of(pool, state.settings)
    known, squared_norm, apart = [m.rounded_sha256 for m in state.members.values()], 0.0, 0.0
    roundings = [Rounding(hashed=not digest.startswith(TENSORS)) for digest in known]

    def again(name: str) -> tuple[str, list[Rounding], float, float]:
        """What differs at a weight, its roundings, its squared length, how far the rule is off."""
        parts: list[Rounding] = []
        weight, squared, here = backbone.tensors[name], 0.0, 0.0
        if name in backbone.target_weights:
            parts = [rounding.part() for rounding in roundings]
            total = fixed_point.sum_of(terms, name, weight, roundings=parts)
            if not torch.equal(total, running[name]):
                return f"the running sum differs at {name!r}", [], 0.0, 0.0
            if not rule.is_sum:
                made = rule.on_grid(Changes(name, weight, pool.contributions, times, total))
                total = ruled[name]
                here = distance(total, made)
                if here > (0 if rule.portable else CLOSE):
                    return f"what {rule.text} makes differs at {name!r}", [], 0.0, 0.0
            squared = squared_length(total)
            weight = fixed_point.compose(weight, total, factor=state.factor)
        differing = "" if torch.equal(weight, model[name]) else f"the model differs at {name!r}"
        return differing, parts, squared, here

    threads = THREADS if all(digest.startswith(TENSORS) for digest in known) else 1
    for differing, parts, squared, here in in_order(again, sorted(backbone.tensors), most=threads):
        if differing:
            return Finding(claim, False, differing)
        for rounding, part in zip(roundings, parts, strict=False):
            rounding.take(part)
        squared_norm, apart = squared_norm + squared, max(apart, here)
    for member, term, rounding in zip(state.members.values(), terms, roundings, strict=True):
        if vector_digest(term.vector, rounding) != member.rounded_sha256:
            return Finding(claim, False, f"{member.client} has a task vector of another digest")
        if member.squared_norm not in (None, rounding.squared_norm):
            return Finding(claim, False, f"{member.client} has another length")
    factor = expected_factor(state, squared_norm)
    if state.factor != factor:
        return Finding(claim, False, f"the factor is not {factor}")
    return Finding(claim, None if apart else True, OTHERWISE.format(apart) if apart else "")


def distance(stated: Tensor, derived: Tensor) -> float:
    """Largest difference of two totals on the grid, as a share of the largest value."""
    apart = fixed_point.largest(stated - derived)
    return apart / max(1, fixed_point.largest(derived)) if apart else 0.0


def expected_factor(state: State, squared_norm: float) -> float:
    """Derive the factor again, of the total's squared length; a voted one is taken as it is."""
    voted = state.factor if state.factor_by == FactorBy.VOTE else None
    known = state.settings.known_factor(state.count, voted)
    return known.value if known else norm_preserving(state.lengths, squared_norm)


def totals_again(registry: RegistryReader) -> Finding:
    """Add up the members' statistics again and compare every number."""
    claim = "the totals are those of the members"
    derived = total_after(None, registry.pool(), (), registry.settings)
    stored = registry.total_statistics()
    if derived.classes != stored.classes:
        return Finding(claim, False, f"they are of {stored.classes}, expected {derived.classes}")
    totals = exact_tensors(stored)
    for name, total in exact_tensors(derived).items():
        if not torch.equal(total, totals[name]):
            return Finding(claim, False, f"they differ at {name!r}")
    return Finding(claim, True)


def aligned_again(registry: RegistryReader) -> Finding:
    """Make the joint head again and compare it with the stored one."""
    state, settings = registry.state, registry.settings
    if registry.realigned:
        path = registry.path / state.version / REALIGNED
        head = realigned_head(path, settings, state.shrinkage)
    else:
        statistics = {c: registry.contribution(c).statistics for c in registry.clients}
        head = joint_head(statistics, settings, shrinkage=state.shrinkage)
    return head_finding(registry.joint_head(), head)


def head_finding(stored: Head, derived: Head) -> Finding:
    """Compare two heads, bit for bit; ``holds`` is None if rounding can explain the difference."""
    claim = "the joint head is that of the members"
    if stored.classes != derived.classes:
        return Finding(claim, False, f"its classes are {stored.classes}, not {derived.classes}")
    if torch.equal(stored.weight, derived.weight) and torch.equal(stored.bias, derived.bias):
        return Finding(claim, True)
    apart = max(
        float((stored.weight - derived.weight).abs().max()),
        float((stored.bias - derived.bias).abs().max()),
    )
    scale = max(1.0, float(derived.weight.abs().max()))
    if apart <= CLOSE * scale:
        return Finding(claim, None, OTHERWISE.format(apart))
    return Finding(claim, False, f"it differs by up to {apart:.3g}")


def as_json(values: object) -> object:
    """Values as they are once they were JSON: tuples are lists."""
    return json.loads(canonical(values))
