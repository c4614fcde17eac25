"""The manifest of a tensor file: its description, with a SHA-256 of itself; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcompo.errors import FileFormatError
from fedcompo.runtime import version
from fedcompo.storage.files import canonical

FORMAT_VERSION = 1


def complete_manifest(manifest: Mapping[str, Any], tensors_sha256: str) -> dict[str, Any]:
    """Add versions, the tensors' digest and the seal to a file's description."""
    complete = {
        **manifest,
        "format_version": FORMAT_VERSION,
        "fedcompo_version": version("fedcompo"),
        "tensors_sha256": tensors_sha256,
    }
    return {**complete, "sha256": seal(complete)}


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
    if manifest.get("format_version") != FORMAT_VERSION:
        raise FileFormatError(
            f"{source} has format version {manifest.get('format_version')!r}, this fedcompo reads "
            f"{FORMAT_VERSION}. Use the fedcompo version that wrote it."
        )
    if manifest.get("sha256") != seal(manifest) or text != canonical(manifest):
        raise FileFormatError(
            f"The manifest of {source} does not match its own SHA-256: it was altered. "
            "Get the file again."
        )
    return manifest


def check_digest(manifest: Mapping[str, Any], actual: str, source: object) -> None:
    """Raise ``FileFormatError`` if tensors have another SHA-256 than their manifest says."""
    stated = str(manifest.get("tensors_sha256"))
    if stated != actual:
        raise FileFormatError(
            f"The tensors of {source} have SHA-256 {actual[:16]}…, the manifest says "
            f"{stated[:16]}…: they were altered. Get the file again."
        )


def require_content(manifest: Mapping[str, Any], content: str, path: Path) -> None:
    """Raise ``FileFormatError`` if a file holds something else than expected."""
    if manifest.get("content") != content:
        raise FileFormatError(
            f"{path} holds a {manifest.get('content')!r}, expected a {content!r}."
        )
