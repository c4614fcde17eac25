"""A Fisher sum on disk: whose it is, at which weights, and which class each head row belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcompo.errors import BackboneMismatch, ContributionError, FileFormatError
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.storage import tensorfile
from fedcompo.storage.tensorstream import StreamedTensors


def save_fisher(path: Path, fisher: FisherDiagonal, *, client: str, base: str) -> str:
    """Write a Fisher sum (float32) to one file.

    Args:
        path: Where to.
        fisher: The sum.
        client: Whose examples it sums over.
        base: Fingerprint of the pre-trained weights it was estimated at.

    Returns:
        SHA-256 of its tensors.
    """
    sums = {name: total.float() for name, total in fisher.sums.items()}
    manifest = {
        "content": "fisher",
        "client": client,
        "base": base,
        "classes": list(fisher.classes),
        "num_examples": fisher.num_examples,
    }
    tensorfile.save(path, sums, manifest)
    return tensorfile.tensor_digest(sums)


def load_fisher(path: Path, *, client: str, base: str) -> FisherDiagonal:
    """Read what :func:`save_fisher` wrote.

    Args:
        path: The file.
        client: Whose it must be.
        base: Fingerprint of the pre-trained weights it must belong to.

    Raises:
        FileFormatError: If it is truncated, altered, incomplete, or not this client's.
        BackboneMismatch: If it was estimated at other pre-trained weights.
    """
    sums, manifest = tensorfile.load(path)
    return _checked(sums, manifest, path, client, base)


def open_fisher(
    path: Path, *, client: str, base: str, guard: Callable[[], None] = lambda: None
) -> FisherDiagonal:
    """Like :func:`load_fisher`, but tensors are read when asked for, and not held to a digest.

    Args:
        path: The file.
        client: Whose it must be.
        base: Fingerprint of the pre-trained weights it must belong to.
        guard: Called before a tensor is read; raises if the file is not to be trusted.
    """
    sums = StreamedTensors(path, guard=guard)
    return _checked(sums, sums.manifest, path, client, base)


def _checked(
    sums: Mapping[str, Tensor], manifest: Mapping[str, Any], path: Path, client: str, base: str
) -> FisherDiagonal:
    if manifest.get("content") != "fisher":
        raise FileFormatError(f"{path} holds a {manifest.get('content')!r}, expected a 'fisher'.")
    if missing := sorted({"client", "base", "classes", "num_examples"} - manifest.keys()):
        raise FileFormatError(
            f"The manifest of {path} has no {missing[0]!r}. It was written by another version of "
            "fedcompo; estimate this Fisher again."
        )
    if manifest["client"] != client:
        raise FileFormatError(
            f"{path} belongs to client {manifest['client']!r}, expected {client!r}."
        )
    if manifest["base"] != base:
        raise BackboneMismatch(
            f"{path} was estimated at the backbone {manifest['base']}, expected {base}. "
            "Use the same `backbone` and `checkpoint`, or estimate it again."
        )
    try:
        return FisherDiagonal(sums, int(manifest["num_examples"]), tuple(manifest["classes"]))
    except (ContributionError, ValueError, TypeError) as error:
        raise FileFormatError(f"The manifest of {path} cannot be used: {error}") from error
