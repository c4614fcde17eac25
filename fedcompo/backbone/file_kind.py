"""Tell by its first bytes what a checkpoint file is, whatever its name says."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from fedcompo.errors import BackboneError

SUFFIXES = {
    "safetensors": (".safetensors",),
    "PyTorch": (".pth", ".pt", ".bin"),
    "NumPy": (".npz",),
}
"""Names that a file of each kind may have."""
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of what torch wrote before version 1.6, a pickled magic number."""
AGAIN = "Download or copy it again."


def check_kind(path: Path) -> None:
    """Refuse a file that is no checkpoint, is cut off, or has the suffix of another kind.

    A file that cannot be recognised passes; its reader will refuse it.

    Raises:
        BackboneError: What the file is, and what to do.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise BackboneError(f"{path} is empty (0 bytes). {AGAIN}")
    if start.startswith(b"version https://git-lfs"):
        raise BackboneError(
            f"{path} is a git-lfs pointer, which stands for the weights but does not hold them. "
            "Run `git lfs pull` in the repository it comes from."
        )
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype html", b"<html")):
        raise BackboneError(
            f"{path} is a web page (HTML), not weights. Download the file itself; on a hub its "
            "address has `resolve` or `raw` where the page has `blob`."
        )
    kind = _zip_kind(path) if start.startswith(b"PK\x03\x04") else _kind(path, start)
    if kind and path.suffix not in SUFFIXES[kind]:
        raise BackboneError(
            f"{path} is a {kind} file by its content, but its name ends in {path.suffix!r}. "
            f"Rename it to end in {SUFFIXES[kind][0]}."
        )


def _kind(path: Path, start: bytes) -> str | None:
    if start.startswith(OLD_TORCH):
        return "PyTorch"
    length = int.from_bytes(start[:8], "little")  # of the JSON header that follows
    if start[8:9] != b"{" or length > 100_000_000:  # safetensors' own limit
        return None
    size = path.stat().st_size
    if size >= 8 + length:
        with path.open("rb") as file:
            file.seek(8)
            try:
                header = json.loads(file.read(length))
                ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            except (ValueError, LookupError, TypeError):
                return None
        length += max(ends, default=0)
    if size < 8 + length:
        raise BackboneError(
            f"{path} is a safetensors file that is cut off: it has {size} bytes, and by its "
            f"header at least {8 + length}. {AGAIN}"
        )
    return "safetensors"


def _zip_kind(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:  # the list of contents is at the end
        raise BackboneError(
            f"{path} is a zip archive (as PyTorch and NumPy write) that is cut off or damaged: "
            f"{error}. {AGAIN}"
        ) from error
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return "PyTorch"
    return "NumPy" if names and all(name.endswith(".npy") for name in names) else None
