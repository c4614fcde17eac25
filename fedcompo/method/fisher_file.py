"""A Fisher sum as a file, which says whose it is and of which pre-trained weights."""

from __future__ import annotations

from pathlib import Path

from fedcompo.errors import BackboneMismatch, FileFormatError
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.storage.manifest import require_content
from fedcompo.storage.tensorstream import Guard, Section, StreamedTensors, save_streamed

OLD_HEAD = ("head.weight", "head.bias")
"""Entries of the Fisher files of earlier versions, which are not read; their rows belong to the
``classes`` of the manifest."""


def save_fisher(path: Path, fisher: FisherDiagonal, *, client: str, base: str, **about: str) -> str:
    """Write a client's Fisher sum (float32) to one file; returns the SHA-256 of its tensors.

    The base is the fingerprint of the pre-trained weights that it was estimated at.
    """
    sums = {name: total.float() for name, total in fisher.tensors.items()}
    manifest = {
        "content": "fisher",
        "client": client,
        "base": base,
        "classes": [],
        "num_examples": fisher.num_examples,
        **about,
    }
    return save_streamed(path, sums, manifest)


def load_fisher(
    path: Path, *, client: str, base: str, guard: Guard | None = None
) -> FisherDiagonal:
    """Read a file that :func:`save_fisher` wrote; the head's rows in an old one are left out.

    Args:
        path: The file.
        client: Whose it must be.
        base: Of which pre-trained weights it must be.
        guard: None: all tensors are read now and compared with their digest. Otherwise each tensor
            is read when it is used, after a call of ``guard``, which raises if the file is not to
            be trusted.

    Raises:
        FileFormatError: If it is truncated, altered, incomplete, or not this client's.
        BackboneMismatch: If it was estimated at other pre-trained weights.
    """
    sums = StreamedTensors(path, guard=guard or (lambda wrong: None))
    manifest = sums.manifest
    require_content(manifest, "fisher", path)
    try:
        owner, origin, count = manifest["client"], manifest["base"], int(manifest["num_examples"])
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise FileFormatError(
            f"The manifest of {path} cannot be used ({type(error).__name__}: {error}). It was "
            "written by another version of fedcompo; estimate this Fisher again."
        ) from error
    if owner != client:
        raise FileFormatError(f"{path} belongs to client {owner!r}, expected {client!r}.")
    if origin != base:
        raise BackboneMismatch(
            f"{path} was estimated at the backbone {origin}, expected {base}. "
            "Use the same `backbone` and `checkpoint`, or estimate it again."
        )
    if guard is None:
        sums.check()
    weights = Section(sums, without=OLD_HEAD)
    return FisherDiagonal.read(dict(weights) if guard is None else weights, count)
