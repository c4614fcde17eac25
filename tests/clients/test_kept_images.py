"""A run whose decoded images are on disk: the same bits, decoded once, and deleted at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from app_runs import run
from round_runs import draw_images, same_contributions

from clients.loading import load_images
from fedcompo.data import decoding

OWNED = {"ann": {"ant": 10, "bee": 10}, "ben": {"cat": 10, "dog": 10}}


def forgetful(reply: Any) -> Any:
    """Let each phase load its images again, as if it were a process of its own."""
    load_images.cache_clear()
    return reply


def test_images_on_disk_are_decoded_once_and_deleted_with_the_run_unless_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FEDCOMPO_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    asked = ("query.identify", "query.describe", "train", "query.realign", "query.vote", "evaluate")
    options = {"tamper": {(i, kind): forgetful for i in range(2) for kind in asked}}
    source = f"folder:{draw_images(tmp_path / 'images', OWNED)}"
    settings: dict[str, Any] = {"data": source, "num-clients": 2, "num-classes": 0}
    in_memory = run(options, tmp_path / "memory", **settings)
    decoded, make = [], decoding.Reader.make

    def counted(reader: Any, put: Any) -> Any:
        decoded.append(reader)
        return make(reader, put)

    monkeypatch.setattr(decoding, "IN_MEMORY", 0)
    monkeypatch.setattr(decoding.Reader, "make", counted)
    for keep, left in ((False, 0), (True, 2), (True, 2)):
        output = tmp_path / f"disk-{len(decoded)}"
        on_disk = run(options, output, **settings, **{"keep-cache": keep})
        assert on_disk["class_il_accuracy"] == in_memory["class_il_accuracy"]
        assert same_contributions(tmp_path / "memory", output)
        assert [*(tmp_path / "state/images").iterdir()] == []
        assert len([*tmp_path.glob("xdg/fedcompo/images/*.rows")]) == left
    assert len(decoded) == 4  # twice by either client: of the last run's images there were files
