"""Rules of the house: docstrings, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "fedcompo").rglob("*.py"))
SPEAK_FLOWER = {
    ROOT / "fedcompo" / "messages" / "records.py",
    ROOT / "fedcompo" / "engine" / "control.py",
    ROOT / "fedcompo" / "engine" / "in_process.py",
    ROOT / "fedcompo" / "deployment" / "node.py",
}
"""The only files of the library that import Flower."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_says_what_it_is_for(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.split("\n")[0].rstrip().endswith((".", ":"))


def test_all_other_files_do_without_flower():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in FILES
        if path not in SPEAK_FLOWER
    ]
    assert len(names) == len(FILES) - len(SPEAK_FLOWER)
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
        "assert 'flwr' not in sys.modules, 'the library imported flwr'"
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
