"""What a request to train brings along, and what it leaves the client to remember."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clients.store import Store
from fedcompo.config.choices import Kind
from fedcompo.errors import FileFormatError
from fedcompo.method.heads import head_from
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage.tensorfile import section
from fedcompo.training.fit import Course
from fedcompo.training.penalty import Anchor, Ensemble

ANCHOR, OWN = "anchor", "own"
"""What a client may be left to remember: the metric, and its own last task vector and head."""


@dataclass(frozen=True)
class Given:
    """A request, read."""

    course: Course = field(default_factory=Course)
    lacks: tuple[str, ...] = ()
    """What the client was left to remember, and does not have."""
    holds: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of what it will remember."""

    @classmethod
    def read(
        cls,
        tensors: Mapping[str, Tensor],
        request: Mapping[str, Any],
        store: Store | None,
        *,
        base: str,
        classes: tuple[str, ...],
        beta: float,
    ) -> Given:
        """Read a request; what did not come along is looked for in the store.

        Args:
            tensors: Of the request.
            request: Its manifest.
            store: What the client keeps between rounds; None: nothing.
            base: Fingerprint of the client's backbone.
            classes: The client's own.
            beta: Strength of the penalty that holds it to the others.

        Raises:
            FileFormatError: If it needs what no client keeps.
        """
        lacks, holds, found = [], {}, {}
        for name, digest in dict(request.get("needs", {})).items():
            if name not in (ANCHOR, OWN):
                raise FileFormatError(
                    f"The server asks for {name!r}, expected {ANCHOR} or {OWN}. Use the same "
                    "fedcompo version everywhere."
                )
            found[name], kept = section(name, tensors), digest
            if not found[name] and store is not None:
                found[name] = store.recall(name, digest) or {}
            elif store is not None:
                kept = store.keep(name, found[name])
            if not found[name]:
                lacks.append(name)
            if kept:
                holds[name] = kept
        if lacks:
            return cls(lacks=tuple(lacks))
        own = found.get(OWN, {})
        part = request.get("course", {})
        begin = None
        if own:
            begin = TaskVector(Kind(request["kind"]), section("task_vector", own), base)
        course = Course(
            begin,
            head_from(own, list(classes)) if own else None,
            _anchor(found[ANCHOR]) if ANCHOR in found else None,
            _ensemble(tensors, request, beta),
            **part,
        )
        return cls(course, holds=holds)


def _anchor(found: Mapping[str, Tensor]) -> Anchor:
    return Anchor(section("weights", found), found["head/weight"], found["head/bias"])


def _ensemble(
    tensors: Mapping[str, Tensor], request: Mapping[str, Any], beta: float
) -> Ensemble | None:
    if "ensemble" not in request:
        return None
    stated = request["ensemble"]
    return Ensemble(section("rest", tensors), stated["share"], beta, stated["scale"])
