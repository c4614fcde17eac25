"""Fixtures that several test files share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

# Keys that tests pin are those of their own session.
_known = tempfile.TemporaryDirectory(prefix="fedcompo-known-")  # deleted when Python ends
os.environ["FEDCOMPO_KNOWN"] = f"{_known.name}/known.json"
for name in ("FEDCOMPO_SIGNING_KEY", "FEDCOMPO_SIGNING_PASSWORD"):
    os.environ.pop(name, None)

if TYPE_CHECKING:
    from engine_runs import Simulated

# One thread: small tensors gain nothing from more, and sums then run in one order.
torch.set_num_threads(1)


def _no_waiting_for_the_disk(handle: int) -> None:
    """Sync nothing: nobody cuts the power, and what was written is there for all who look."""
    os.fstat(handle)  # one that is closed is still an error


# What syncs are worth is shown in registry/test_crashes.py, from what was synced and what not.
os.fsync = _no_waiting_for_the_disk

# No deadline: a busy machine is no failure. Derandomised: the same examples in each run.
settings.register_profile(
    "fedcompo",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fedcompo")


ENGINE = {
    "deployment/test_faults.py", "deployment/test_run.py", "engine/test_guard.py",
    "engine/test_launcher.py", "engine/test_resume_engine.py", "engine/test_simulation.py",
    "engine/test_superlink.py",
}  # fmt: skip
"""Files whose tests start Flower's engine, and look for what it leaves behind."""


def _place(path: Path) -> str:
    """Folder and name of a test file."""
    return f"{path.parent.name}/{path.name}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Long tests are asked for."""
    parser.addoption("--slow", action="store_true", help="also run long tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the engine, which takes longest, and leave out the slow ones."""
    items.sort(key=lambda item: _place(item.path) not in ENGINE)
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes long; run with --slow"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Let one process run all tests of a file, and one all tests that start Flower's engine."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "engine" if _place(Path(file)) in ENGINE else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets and weights; tests that need it are skipped where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FEDCOMPO_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set FEDCOMPO_DATA to a folder that has it")
    return folder


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two clients, a folder each."""
    from deployed_federation import TWO, digits_as_folders

    folder = tmp_path_factory.mktemp("hospitals")
    digits_as_folders(folder, TWO, training=10, test=12)
    return folder


@pytest.fixture(scope="session")
def simulated(hospitals: Path, tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    """Their federation by `fedcompo simulate`: one run for all that is said of such runs."""
    from engine_runs import simulate

    return simulate(tmp_path_factory.mktemp("simulated"), hospitals)
