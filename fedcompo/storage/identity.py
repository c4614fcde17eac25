"""What a file is known by: a digest that needs no second pass over its tensors."""

from __future__ import annotations

import hashlib
import json
from io import BufferedReader
from pathlib import Path

from fedcompo.storage.digests import raw_bytes, tensor_digest
from fedcompo.storage.header import header_bytes, header_of
from fedcompo.storage.manifest import FORMAT_VERSION, OWN, manifest_of, old_manifest
from fedcompo.storage.tensorstream import StreamedTensors

HEADER = "header:"
"""Mark of a SHA-256 of the header alone, which holds those of all tensors."""


def identity(path: Path, *, checked: bool = False) -> str:
    """Return what a file is known by; :func:`identity_of` an open one.

    Args:
        path: The file.
        checked: Read every byte of it, whatever was compared before.

    Raises:
        FileFormatError: If a byte of a tensor was altered.
    """
    with path.open("rb") as file:
        found = identity_of(file)
    if checked and found.startswith(HEADER):
        StreamedTensors(path).check()
    return found


def identity_of(file: BufferedReader) -> str:
    """Return the marked SHA-256 of a file's header, if it holds those of the tensors, else its own.

    A copy has the same. Tensors are compared with the header when they are read.
    """
    file.seek(0)
    try:
        text = header_of(file)
        if manifest_of(json.loads(text[8:]), "")["format_version"] == FORMAT_VERSION:
            return HEADER + hashlib.sha256(text).hexdigest()
    except Exception:  # whatever strange bytes can provoke: it is something else
        pass
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def old_sha256(path: Path) -> str:
    """SHA-256 of the file that earlier versions, of format 1, would write in place of this one."""
    tensors = StreamedTensors(path)
    about = {key: value for key, value in tensors.manifest.items() if key not in OWN}
    manifest = old_manifest(about, tensor_digest(tensors))
    digest = hashlib.sha256(header_bytes(tensors.layout, manifest))
    for tensor in tensors.values():
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
