"""The tree of errors, as its module draws it."""

from __future__ import annotations

import inspect
import re

from fedcompo import errors


def drawn_tree() -> dict[str, str]:
    """Each error of the drawing and the one it hangs from."""
    lines = re.findall(r"^ {4}([│├└─ ]*)(\w+)", errors.__doc__, re.MULTILINE)
    trunk: dict[int, str] = {}
    parents = {}
    for indent, name in lines:
        trunk[len(indent)] = name
        parents[name] = trunk[max((d for d in trunk if d < len(indent)), default=0)]
        trunk = {depth: n for depth, n in trunk.items() if depth <= len(indent)}
    return parents


def test_the_drawing_shows_every_error_below_its_base():
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception)
    }
    drawn = drawn_tree()
    assert drawn.keys() == classes.keys()
    for name, parent in drawn.items():
        assert issubclass(classes[name], classes[parent])
        if name != parent:
            assert parent in [base.__name__ for base in classes[name].__bases__]
