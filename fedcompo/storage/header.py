"""The header of a safetensors file: where each tensor lies, and the manifest."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from fedcompo.storage.files import canonical

if TYPE_CHECKING:
    import torch

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "U8": ("uint8", 1),
}
"""Torch's name and the bytes of one value, by the name of safetensors."""
NAMES = {f"torch.{name}": key for key, (name, _) in DTYPES.items()}

Layout = Mapping[str, tuple["torch.dtype", tuple[int, ...]]]
"""Dtype and shape of each tensor, by name."""


def header_bytes(layout: Layout, manifest: Mapping[str, Any]) -> bytes:
    """The start of a file, before its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "manifest": canonical(manifest)}}
    position = 0
    for name in sorted(layout):
        dtype, shape = layout[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[str(dtype)],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def header_of(file: IO[bytes]) -> bytes:
    """Read the same from an open file; raises ``ValueError`` if it ends before."""
    start = file.read(8)
    length, left = int.from_bytes(start, "little"), os.fstat(file.fileno()).st_size - len(start)
    if len(start) < 8 or length > left:
        raise ValueError(f"{left} bytes follow, expected a header of {length}")
    return start + file.read(length)
