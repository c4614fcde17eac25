"""Writes a frozen value as tensors and a manifest of JSON values, and reads it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from typing import Any, Self

from torch import Tensor

from fedcompo.errors import FileFormatError

Body = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and a manifest that describes them (JSON values)."""
TASK_VECTOR, FISHER = "task_vector", "fisher"
"""Prefixes of the tensors that :mod:`fedcompo.messages.wire` writes in fewer bits."""
MOST = 2**53
"""Largest count of bytes or examples: up to here a float holds every whole number."""


def entry(
    read: Callable[[Any], Any] = lambda value: value, *, key: str = "", default: Any = MISSING
) -> Any:
    """A field that is an entry of the manifest; None is not written.

    Args:
        read: From the JSON value to the field's.
        key: Name of the entry; empty: the field's.
        default: The field's value where the entry is missing; left out: it must be there.
    """
    about = {"read": read, "key": key}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)


def floats(values: Any) -> tuple[float, ...]:
    """Read a list of numbers."""
    return tuple(map(float, values))


def count(value: Any) -> int:
    """Read a count of bytes or examples; JSON can hold any value."""
    if type(value) is not int or not 0 <= value <= MOST:
        raise FileFormatError(f"It counts {value!r:.80}, expected a whole number from 0 to {MOST}.")
    return value


def counts(values: Mapping[str, Any]) -> dict[str, int]:
    """Read counts by name."""
    return {str(name): count(value) for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Content:
    """A request or an answer; its fields are entries of the manifest, or written by ``_write``."""

    def to_body(self) -> Body:
        """Tensors and manifest."""
        tensors, manifest = self._write()
        values = {key: getattr(self, name) for name, key, *_ in _entries(type(self))}
        return tensors, {k: _json(v) for k, v in values.items() if v is not None} | manifest

    @classmethod
    def from_body(cls, body: Body) -> Self:
        """Read what :meth:`to_body` wrote.

        Raises:
            KeyError: If something is missing.
            TypeError: If something is of another type, also a ``ValueError``.
        """
        tensors, manifest = body
        values = {
            name: read(manifest[key])
            for name, key, read, optional in _entries(cls)
            if key in manifest or not optional
        }
        return cls(**values, **cls._read(tensors, manifest))

    def _write(self) -> Body:
        """Tensors, and the entries that are not simply the value of a field."""
        return {}, {}

    @classmethod
    def _read(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that :meth:`_write` wrote."""
        return {}


def _entries(message: type[Content]) -> list[tuple[str, str, Callable[[Any], Any], bool]]:
    """Field, key, how to read it, and whether it may be missing."""
    return [
        (
            f.name,
            f.metadata["key"] or f.name,
            f.metadata["read"],
            f.default is not MISSING or f.default_factory is not MISSING,
        )
        for f in fields(message)
        if f.metadata
    ]


def _json(value: Any) -> Any:
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
