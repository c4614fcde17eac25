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


def manifest_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """Read the manifest in a safetensors header; raises if it is altered or of another version."""
    text = header["__metadata__"]["manifest"]
    manifest: dict[str, Any] = json.loads(text)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"format version {manifest.get('format_version')!r}, expected {FORMAT_VERSION}"
        )
    if manifest.get("sha256") != seal(manifest) or text != canonical(manifest):
        raise ValueError("the manifest does not match its own SHA-256")
    return manifest


def require_content(manifest: Mapping[str, Any], content: str, path: Path) -> None:
    """Raise ``FileFormatError`` if a file holds something else than expected."""
    if manifest.get("content") != content:
        raise FileFormatError(
            f"{path} holds a {manifest.get('content')!r}, expected a {content!r}."
        )
