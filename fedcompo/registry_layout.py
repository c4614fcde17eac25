"""The files of a registry that never change: what it is, its pre-trained weights, its keys."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from pathlib import Path

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.stored import save_backbone
from fedcompo.errors import RegistryDamaged
from fedcompo.registry import journal, signing
from fedcompo.registry.state import RegistrySettings, State
from fedcompo.registry.transaction import JOURNAL, STATE
from fedcompo.storage.files import BACKBONE, write_atomically
from fedcompo.storage.tensorstream import file_sha256
from fedcompo.versions import version

ABOUT, PRIVATE, PUBLIC = "registry.json", "key.pem", "public.pem"
FORMAT_VERSION = 1


def write_new(folder: Path, backbone: Backbone, settings: RegistrySettings) -> None:
    """Write what a registry of nobody holds."""
    save_backbone(folder / BACKBONE, backbone)
    about = {
        "content": "registry",
        "format_version": FORMAT_VERSION,
        "fedcompo_version": version("fedcompo"),
        "identity": uuid.uuid4().hex,
        "created": journal.utc_now(),
        "base": backbone.fingerprint,
        "settings": asdict(settings),
    }
    write_atomically(folder / ABOUT, f"{json.dumps(about, indent=2)}\n".encode())
    signing.create_key(folder / PRIVATE, folder / PUBLIC)
    fixed = {name: file_sha256(folder / name) for name in (ABOUT, BACKBONE, PUBLIC)}
    details = {"identity": about["identity"], "base": backbone.fingerprint, "fixed": fixed}
    (entry,) = journal.follow(None, [("created", details)])
    write_atomically(folder / JOURNAL, f"{entry.line}\n".encode())
    state = State(entry.sequence, entry.sha256, backbone.fingerprint, settings, fixed)
    write_atomically(folder / STATE, state.text.encode())


def read_about(path: Path, state: State) -> tuple[str, str]:
    """Identity and time of creation."""
    if file_sha256(path) != state.fixed.get(ABOUT):
        raise RegistryDamaged(
            f"{path} was altered, or what {STATE} says of it. Restore the registry from a copy."
        )
    about = json.loads(path.read_text(encoding="utf-8"))
    return about["identity"], about["created"]
