"""Rules of the house: docstrings, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "fedcompo").rglob("*.py"))
PEOPLE = ("cli", "deployment", "engine", "messages", "service")
"""Packages that start Flower, or speak to it; all others must do without."""
CORE = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if path.parent.name not in PEOPLE and path.name != "__init__.py"
)


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
        f"for name in {CORE!r}: importlib.import_module(name)\n"
        "assert 'flwr' not in sys.modules, 'the core imported flwr'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_nothing_imports_the_simulations():
    sources = [p for part in ("fedcompo", "clients", "server") for p in (ROOT / part).rglob("*.py")]
    assert sources
    for path in sources:
        assert "import simulations" not in path.read_text(encoding="utf-8"), path
        assert "from simulations" not in path.read_text(encoding="utf-8"), path
