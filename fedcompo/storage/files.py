"""What files of every kind share: names, JSON, and writing so that a crash leaves old or new.

It imports nothing that takes long: whoever only sends files or asks for them need not wait for
PyTorch.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTENT, FISHER, CARD = "contribution.safetensors", "fisher.safetensors", "card.json"
"""Files of a contribution."""
WEIGHTS, CONFIG, MODEL_CARD = "model.safetensors", "config.json", "README.md"
"""Files of a composed model."""
PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of the installed library."""
BACKBONE = "backbone.safetensors"
"""The pre-trained weights, in a registry; also beside what is composed of tangents."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside ``path``, sync it, rename it, sync the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_beside(path: Path) -> Path:
    """Name of a file that does not exist, in the same folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a synced file and sync the folder."""
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same value gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only: turn those among the values back into tuples."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def write_synced(path: Path, data: bytes) -> None:
    """Write a staged file, to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
