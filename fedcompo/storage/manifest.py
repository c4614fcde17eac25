"""The manifest of a tensor file: its description, with a SHA-256 of itself; no torch.

In format 2 it has a SHA-256 of each tensor, and ``tensors_sha256`` covers these. In format 1, which
is still read, ``tensors_sha256`` is of all tensors in one sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedcompo.errors import FileFormatError
from fedcompo.runtime import version
from fedcompo.storage.files import canonical

FORMAT_VERSION, OLD_VERSION = 2, 1
OWN = ("format_version", "fedcompo_version", "digests", "tensors_sha256", "sha256")
"""Entries that are derived; all others describe the content."""


def complete_manifest(manifest: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Add versions, the tensors' digests and the seal to a file's description."""
    own = {"digests": dict(digests), "tensors_sha256": digest_of_all(digests)}
    return _sealed({**manifest, **own, "format_version": FORMAT_VERSION})


def old_manifest(manifest: Mapping[str, Any], tensors_sha256: str) -> dict[str, Any]:
    """The same as format 1 has it."""
    own = {"tensors_sha256": tensors_sha256, "format_version": OLD_VERSION}
    return _sealed({**manifest, **own})


def _sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    complete = {**manifest, "fedcompo_version": version("fedcompo")}
    return {**complete, "sha256": seal(complete)}


def digest_of_all(digests: Mapping[str, str]) -> str:
    """SHA-256 over those of the tensors, given by name."""
    return hashlib.sha256(canonical(digests).encode()).hexdigest()


def seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's other entries."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(canonical(rest).encode()).hexdigest()


def manifest_of(header: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Read the manifest in a safetensors header.

    Raises:
        FileFormatError: If it is altered or of another version. Where there is none, something
            else is raised.
    """
    text = header["__metadata__"]["manifest"]
    manifest: dict[str, Any] = json.loads(text)
    if (written := manifest.get("format_version")) not in (OLD_VERSION, FORMAT_VERSION):
        raise FileFormatError(
            f"{source} has format version {written!r}, this fedcompo reads {OLD_VERSION} and "
            f"{FORMAT_VERSION}. Use the fedcompo version that wrote it."
        )
    intact = manifest.get("sha256") == seal(manifest)
    if written == FORMAT_VERSION:
        intact = intact and manifest["tensors_sha256"] == digest_of_all(manifest["digests"])
    if not intact or text != canonical(manifest):
        raise FileFormatError(
            f"The manifest of {source} does not match its own SHA-256: it was altered. "
            "Get the file again."
        )
    return manifest


def check_digest(
    stated: object, actual: str, what: str, guard: Callable[[str], None] = lambda wrong: None
) -> None:
    """Raise ``FileFormatError`` if something has another SHA-256 than the manifest says.

    A guard is told before, and may raise another error.
    """
    if stated != actual:
        wrong = f"{what} has SHA-256 {actual[:16]}…, the manifest says {str(stated)[:16]}…"
        guard(f"{wrong}: it was altered")
        raise FileFormatError(f"{wrong}: it was altered. Get the file again.")


def require_content(manifest: Mapping[str, Any], content: str, path: Path) -> None:
    """Raise ``FileFormatError`` if a file holds something else than expected."""
    if manifest.get("content") != content:
        raise FileFormatError(
            f"{path} holds a {manifest.get('content')!r}, expected a {content!r}."
        )
