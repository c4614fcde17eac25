"""Rules of the house: docstrings, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "fedcompo").rglob("*.py"))
CORE = [
    "accuracy",
    "accuracy_matrix",
    "admission",
    "anchoring",
    "audit",
    "audit_picture",
    "audit_report",
    "audited_models",
    "augmentation",
    "backbone",
    "caps",
    "checkpoint",
    "choices",
    "composition",
    "config",
    "contribution",
    "curvature",
    "data",
    "data_catalogue",
    "data_draws",
    "data_folders",
    "data_named",
    "data_npz",
    "data_once",
    "data_text",
    "deltas",
    "device",
    "diagnostics",
    "errors",
    "evaluation",
    "export",
    "export_peft",
    "factored_fisher",
    "features",
    "fisher",
    "fisher_file",
    "fixed_point",
    "head_training",
    "heads",
    "journal",
    "membership",
    "memory",
    "model_card",
    "names",
    "negation",
    "penalties",
    "per_example",
    "pool",
    "preprocessing",
    "privacy",
    "private_fisher",
    "private_statistics",
    "probing",
    "publish",
    "record_verification",
    "reference",
    "registry",
    "registry_changes",
    "registry_draft",
    "registry_layout",
    "registry_state",
    "removal",
    "replay",
    "report",
    "report_picture",
    "running_sum",
    "seeds",
    "selection",
    "settings",
    "shadows",
    "signing",
    "specialise",
    "stored_backbone",
    "tangent",
    "task_vector",
    "tensorfile",
    "tensorstream",
    "text_backbone",
    "training",
    "transaction",
    "units",
    "verification",
    "wire",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_says_what_it_is_for(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.split("\n")[0].rstrip().endswith((".", ":"))


def test_imports_keep_to_the_contracts():
    tool = Path(sys.executable).parent / "lint-imports"
    if not tool.exists():
        pytest.skip("import-linter is not installed; `pip install .[dev]`")
    done = subprocess.run(
        [tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_core_does_without_flower():
    code = (
        "import importlib, sys\n"
        f"for name in {CORE!r}: importlib.import_module('fedcompo.' + name)\n"
        "assert 'flwr' not in sys.modules, 'the core imported flwr'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_core_is_named_in_full():
    assert {ROOT / "fedcompo" / f"{name}.py" for name in CORE} <= set(FILES)


def test_nothing_imports_the_simulations():
    sources = [p for part in ("fedcompo", "clients", "server") for p in (ROOT / part).rglob("*.py")]
    assert sources
    for path in sources:
        assert "import simulations" not in path.read_text(encoding="utf-8"), path
        assert "from simulations" not in path.read_text(encoding="utf-8"), path
