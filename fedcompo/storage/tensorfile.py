"""One file format for disk and wire: safetensors with a manifest, checked as a whole.

A file is an ordinary safetensors file. Its metadata has one entry, ``manifest``: canonical JSON
that describes the content, with the SHA-256 of the manifest's other entries and of each tensor
(name, dtype, shape, bytes). A file with a changed byte, a missing end or an added tensor is
refused on reading. Messages are packed the same way. :mod:`fedcompo.storage.tensorstream` reads and
writes such files one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fedcompo.errors import FileFormatError
from fedcompo.storage.digests import digests_of, tensor_digest
from fedcompo.storage.files import canonical, write_atomically
from fedcompo.storage.manifest import (
    FORMAT_VERSION,
    check_digest,
    complete_manifest,
    manifest_of,
)


def to_bytes(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> bytes:
    """Pack tensors and a manifest of JSON values, sealed, as a safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    complete = complete_manifest(manifest, digests_of(tensors))
    metadata = {"manifest": canonical(complete)}
    return bytes(safetensors.torch.save(tensors, metadata=metadata))


def from_bytes(data: bytes, *, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Unpack and check bytes that :func:`to_bytes` packed and a source sent.

    Raises:
        FileFormatError: If it is truncated, altered, or not a file of this kind.
    """
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return _checked(header, lambda: safetensors.torch.load(data), source)


def save(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Write :func:`to_bytes` to a file; a crash leaves the old file or the new one."""
    write_atomically(path, to_bytes(tensors, manifest))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and check a file that :func:`save` wrote; see :func:`from_bytes`.

    The tensors are mapped from the file, not copied: pages are read when they are used.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, path.stat().st_size))
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror}.") from error
    return _checked(header, lambda: safetensors.torch.load_file(path), str(path))


def _checked(
    header: bytes, read: Callable[[], dict[str, Tensor]], source: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Parse the manifest, read the tensors, and compare one with the other."""
    try:
        manifest = manifest_of(json.loads(header), source)
        tensors = read()
        if manifest["format_version"] == FORMAT_VERSION:
            found, stated = digests_of(tensors), manifest["digests"]
            if found.keys() != stated.keys():
                raise ValueError("its digests are of other tensors")
            for name in sorted(found):
                check_digest(stated[name], found[name], f"The tensor {name!r} of {source}")
        else:
            check_digest(manifest["tensors_sha256"], tensor_digest(tensors), f"What {source} holds")
    except FileFormatError:
        raise
    except Exception as error:  # whatever strange bytes can provoke
        raise FileFormatError(
            f"{source} is not a complete fedcompo file ({type(error).__name__}: {error}). "
            "It was truncated, altered or written by something else; get it again."
        ) from error
    return tensors, manifest


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put ``<prefix>/`` before every name."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def section(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors that :func:`prefixed` named, under their own names."""
    start = f"{prefix}/"
    return {n.removeprefix(start): tensor for n, tensor in tensors.items() if n.startswith(start)}
