"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# One thread: small tensors gain nothing from more, and sums then run in one order.
torch.set_num_threads(1)

# No deadline: a busy machine is no failure. Derandomised: the same examples in each run.
settings.register_profile(
    "fedcompo",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fedcompo")


STARTS_ENGINES = {"test_engine.py", "test_guard.py", "test_launcher.py", "test_simulation.py"}
"""Files whose tests start engines, and look for what these leave behind."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tests of many minutes are asked for."""
    parser.addoption("--slow", action="store_true", help="also run tests of many minutes")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let one process run all tests of a file, and one all tests that start Flower's engine."""
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes many minutes; run with --slow"))
        marked = item.get_closest_marker("simulation") is not None
        engine = marked or item.path.name in STARTS_ENGINES
        item.add_marker(pytest.mark.xdist_group("engine" if engine else item.path.name))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets and weights; tests that need it are skipped where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FEDCOMPO_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set FEDCOMPO_DATA to a folder that has it")
    return folder
