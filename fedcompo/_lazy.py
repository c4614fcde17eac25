"""The face of a package: names that are imported when they are first asked for (PEP 562).

Importing a package therefore loads neither torch nor timm nor gRPC, and every name can be had from
the package that it belongs to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

Face = tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]
"""``__all__``, ``__getattr__`` and ``__dir__`` of a package."""


def face(package: str, files: Mapping[str, str]) -> Face:
    """Make the face of a package.

    Args:
        package: Its full name.
        files: By public name, the module inside the package that defines it.
    """

    def get(name: str) -> Any:
        if name not in files:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{files[name]}"), name)

    return sorted(files), get, lambda: sorted({*vars(sys.modules[package]), *files})
