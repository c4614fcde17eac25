"""Names of files, JSON, PEM, and writes that leave the old file or the new one after a crash.

The module imports nothing slow: a client of the service does not wait for PyTorch.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

CONTENT, FISHER, CARD = "contribution.safetensors", "fisher.safetensors", "card.json"
"""Files of a contribution."""
WEIGHTS, CONFIG, MODEL_CARD = "model.safetensors", "config.json", "README.md"
"""Files of a composed model."""
RECIPE = "recipe.toml"
"""File beside them in an exported folder: how the model is composed."""
EGRESS = "egress.json"
"""File in a pack that leaves a trusted environment: what a data controller signs off."""
SUM, REALIGNED = "sum.safetensors", "realigned.safetensors"
"""Files beside it in a registry: the integer sum; statistics that its head was made of again."""
RULED = "ruled.safetensors"
"""And what a rule of composition makes of its members, where it is another total than the sum."""
TOTALS, OLD_TOTALS = "totals.safetensors", "statistics.safetensors"
"""And the members' statistics, summed; in old versions together with their Fisher diagonals."""
PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of the installed library."""
BACKBONE = "backbone.safetensors"
"""File of the pre-trained weights in a registry, and in a folder composed of tangents."""
OWNER_ONLY = 0o600
"""Mode of a private key's file."""
UNREADABLE = (OSError, ValueError, TypeError, UnsupportedAlgorithm, InternalError)
"""Exceptions of reading a key or a certificate from a file that holds none."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside ``path``, sync it, rename it, sync the folder."""
    with replaced(path) as temporary:
        write_synced(temporary, data, mode="xb")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield the name of a new file beside ``path``, which takes its place unless an error occurs.

    Whoever writes it syncs it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield temporary
        put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def completed(folder: Path, mode: int = 0o777) -> Iterator[Path]:
    """Yield a new folder beside its place, to which it moves unless an error occurs."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    try:
        draft.mkdir(mode)
        yield draft
        put_in_place(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def is_free(folder: Path) -> bool:
    """Whether nothing lies there, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a synced file and sync the folder."""
    temporary.replace(path)
    sync_folder(path.parent)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: the same value gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn lists among the values into tuples again: JSON has lists only."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def sync(file: IO[bytes]) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def write_synced(path: Path, data: bytes, *, mode: str = "wb") -> None:
    """Write a file and sync it; with mode ``xb`` it must not exist yet."""
    with path.open(mode) as file:
        file.write(data)
        sync(file)


def write_private(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read, from the first moment, and sync it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        sync(file)


def private_pem(key: PrivateKeyTypes, password: str = "") -> bytes:
    """A private key as PEM, PKCS8; encrypted if there is a password."""
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        how = serialization.BestAvailableEncryption(password.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
