"""Finds the files of a source by its name, such as ``hf-hub:<repository>``."""

from __future__ import annotations

from pathlib import Path

from fedcompo.backbone.source import LOCAL
from fedcompo.errors import BackboneError

HUBS = ("hf-hub", "hf_hub")
SAFE = ("*.json", "model.safetensors", "adapter_model.safetensors")
OLDER = ("pytorch_model.bin", "adapter_model.bin")
"""Fetched only where there is no safetensors file; read as tensors, never as code."""


def fetched(source: str | Path) -> Path:
    """Return the file or folder of a source; of the hub, fetch what is not in its cache.

    Args:
        source: A path; ``local-dir:<path>``; ``hf-hub:<repository>``, perhaps with ``@<revision>``.

    Raises:
        BackboneError: If the hub does not give it.
    """
    kind, colon, place = str(source).partition(":")
    if colon and kind.lower() == LOCAL:
        return Path(place).expanduser()
    if not colon or kind.lower() not in HUBS:
        return Path(source).expanduser()
    import huggingface_hub

    name, _, revision = place.partition("@")

    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=[*patterns]
            )
        )

    try:
        folder = fetch(SAFE)
        if not any(folder.glob("*.safetensors")):
            folder = fetch(OLDER)
    except Exception as error:  # of the network, the hub, its client or the name
        first = next(iter(str(error).splitlines()), "")[:150]
        raise BackboneError(
            f"{source} could not be had from the hub ({type(error).__name__}: {first}). "
            "Check the name and the network; without one, get its files elsewhere and name their "
            "folder."
        ) from error
    return folder
