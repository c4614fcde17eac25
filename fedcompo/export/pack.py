"""The egress pack: a folder of model, receipts, `egress.json` and a page to sign; and its check.

`egress.json` names the SHA-256 of every other file but the page. The page shows what
`egress.json` says, and its SHA-256: whoever signs the page signs all of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from fedcompo.errors import FileFormatError
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.rederivation import Finding, compared
from fedcompo.registry.rotation import key_at
from fedcompo.registry.verification import all_but_folders
from fedcompo.report.pages import egress_page
from fedcompo.runtime import version
from fedcompo.storage.files import EGRESS, write_atomically
from fedcompo.storage.tensorstream import file_sha256

PAGE = "egress.html"


def write_pack(folder: Path, registry: RegistryReader, values: dict[str, Any]) -> None:
    """Add receipts, `egress.json` and the page to the folder of an exported model.

    Args:
        folder: Holds the model, and nothing else.
        registry: Has the receipts.
        values: As :func:`fedcompo.export.egress.statement` states them.

    Raises:
        FileFormatError: If a receipt changed meanwhile.
    """
    entries = registry.entries()
    for receipt in values["removals"]:
        path, place = registry.path / receipt["record"], folder / receipt["receipt"]
        write_atomically(place, path.read_bytes())
        if file_sha256(place) != receipt["receipt_sha256"]:
            raise FileFormatError(f"{path} was changed while it was being read. Try again.")
        write_atomically(place.with_suffix(".pem"), key_at(registry, entries, receipt["line"]))
    files = {name: file_sha256(folder / name) for name in _files(folder)}
    text = json.dumps({**values, "files": files}, indent=2, ensure_ascii=False, allow_nan=False)
    data = f"{text}\n".encode()
    write_atomically(folder / EGRESS, data)
    write_atomically(folder / PAGE, _page(data))


def verify_pack(path: Path) -> list[Finding]:
    """Check that a pack is as it was written: no file altered, added or missing.

    Args:
        path: Its `egress.json`.

    Raises:
        FileFormatError: If that is none, or of another version.
    """
    data = path.read_bytes()
    values, folder = _parsed(data, path), path.parent
    stated: dict[str, str] = values["files"]
    present = _files(folder)
    findings = []
    for name in sorted({*stated, *present}):
        digest = file_sha256(folder / name) if name in present else "that of no file: it is missing"
        claim = f"{name} is unaltered" if name in stated else f"{name} belongs to the pack"
        findings.append(compared(claim, stated.get(name, "nothing"), digest))
    return [*findings, _page_finding(folder / PAGE, data, values["fedcompo_version"])]


def _page_finding(page: Path, data: bytes, writer: str) -> Finding:
    """Hold the page against `egress.json`: its SHA-256, and word for word of the same version."""
    claim = f"{PAGE} shows what {EGRESS} says"
    shown = page.read_bytes() if page.is_file() else b""
    named = hashlib.sha256(data).hexdigest().encode() in shown
    if named and writer != version("fedcompo"):
        return Finding(claim, None, f"it names its SHA-256; its words are of fedcompo {writer}")
    try:
        same = named and shown == _page(data)
    except (TemplateError, LookupError, TypeError, ValueError, AttributeError) as error:
        return Finding(claim, False, f"{EGRESS} lacks what a page shows: {error}")
    return Finding.of(claim, same, f"{page} was altered, or is of another {EGRESS}")


def _files(folder: Path) -> set[str]:
    """Names of all files of a pack that its `egress.json` names, with links among them."""
    names = {path.relative_to(folder).as_posix() for path in all_but_folders(folder)}
    return names - {EGRESS, PAGE}


def _page(data: bytes) -> bytes:
    return egress_page(json.loads(data), hashlib.sha256(data).hexdigest()).encode()


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(data)
        if (values["content"], values["format_version"]) != ("egress-pack", 1):
            raise ValueError(f"format {values['content']} {values['format_version']}")
        dict.items(values["files"])
        _ = values["fedcompo_version"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is no egress pack that this fedcompo reads ({error}). Use the version that "
            "wrote it."
        ) from error
    return values
