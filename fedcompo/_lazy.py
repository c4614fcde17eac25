"""The face of a package: names that are imported when they are first asked for (PEP 562).

Importing a package therefore loads neither torch nor timm nor gRPC, and every name can be had from
the package that it belongs to.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

Face = tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]
"""``__all__``, ``__getattr__`` and ``__dir__`` of a package."""


def face(package: str) -> Face:
    """Make the face of a package: the names that its ``if TYPE_CHECKING:`` imports.

    So each name is said once, for type checkers and for Python.

    Args:
        package: Its full name. It must have its source.
    """
    tree = ast.parse(Path(str(sys.modules[package].__file__)).read_text(encoding="utf-8"))
    homes = {
        alias.name: str(statement.module)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return sorted(homes), get, lambda: sorted({*vars(sys.modules[package]), *homes})
