"""A run whose server has no room left: it fails, blames no client, and goes on once there is."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_runs import ALL_WEIGHTS, run

from fedcompo.errors import RegistryError

MEGABYTE = 1 << 20
ENOUGH = 512
LARGE = {"target_weights": ALL_WEIGHTS}
"""A run that needs some fourteen megabytes."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Where a small disk can be mounted; there is none yet."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not resized(folder, ENOUGH, new=True):
        pytest.skip("nobody but root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # tensors may still be mapped from it


def resized(folder: Path, megabytes: float, *, new: bool = False) -> bool:
    """Give a disk in memory another size; returns whether that is allowed."""
    kind = ["-t", "tmpfs", "tmpfs"] if new else []
    size = f"size={int(megabytes * MEGABYTE)}"
    options = ["-o", size if new else f"remount,{size}"]
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, *options, *kind, folder], capture_output=True)
    return bool(done) and done.returncode == 0


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run({}, tmp_path_factory.mktemp("whole") / "run", **LARGE)


@pytest.mark.parametrize("megabytes", [1.8, 2.2, 4, 10])
def test_a_full_disk_fails_the_run_and_with_room_it_goes_on(disk, expected, megabytes):
    assert resized(disk, megabytes)
    output = disk / "run"
    with pytest.raises((OSError, RegistryError), match="No space left"):
        run({}, output, **LARGE)
    assert resized(disk, ENOUGH)
    results = run({}, output, **LARGE, resume=True)
    assert results["left_out"] == []
    assert results["registry"]["root"] == expected["registry"]["root"]
    assert results["class_il_accuracy"] == expected["class_il_accuracy"]
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if event.get("status") in ("left-out", "missed")]
