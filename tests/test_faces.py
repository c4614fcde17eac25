"""The public face, and the faces of the packages."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedcompo

ROOT = Path(__file__).parents[1]
PACKAGES = [
    "fedcompo",
    *(
        f"fedcompo.{module.name}"
        for module in pkgutil.iter_modules(fedcompo.__path__)
        if module.ispkg
    ),
]
PROMISED = (
    "Backbone Contribution FedcompoError FisherDiagonal Pool Registry RunConfig TaskVector "
    "load_backbone load_tangent_model simulate"
)
HEAVY = {"torch", "timm", "flwr", "ray", "grpc", "sklearn", "numpy"}


def test_the_public_face_is_what_is_promised():
    assert fedcompo.__all__ == PROMISED.split()
    assert set(fedcompo.__all__) <= set(dir(fedcompo))


@pytest.mark.parametrize("name", PACKAGES)
def test_every_name_of_a_face_can_be_had(name):
    package = importlib.import_module(name)
    assert package.__doc__
    assert package.__all__
    for public in package.__all__:
        value = getattr(package, public)
        if module := getattr(value, "__module__", None):
            assert module.startswith(f"{name}."), "a face shows what its own files define"
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("name", PACKAGES)
def test_no_file_bears_the_name_of_a_function_that_its_package_exports(name):
    package = importlib.import_module(name)
    files = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert not files & set(package.__all__)


def test_faces_load_nothing_heavy():
    code = (
        f"import importlib, sys\nfor name in {[*PACKAGES, 'fedcompo.cli.app']!r}:\n"
        f"    importlib.import_module(name)\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_library_imports_from_files_never_from_faces():
    for path in (ROOT / "fedcompo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
                files = {
                    entry.stem
                    for entry in (ROOT / node.module.replace(".", "/")).iterdir()
                    if entry.suffix == ".py" or entry.is_dir()
                }
                assert {alias.name for alias in node.names} <= files, (path, node.lineno)
