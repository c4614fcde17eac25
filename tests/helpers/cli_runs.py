"""Commands given as a person gives them, and a registry of digits to give them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import Result
from registry_builders import member, registry_of
from typer.testing import CliRunner

from fedcompo.cli.app import app
from fedcompo.config.choices import Kind
from fedcompo.method.lineage import Lineage
from fedcompo.registry.registry import Registry

CLASSES = {"client-0": ("1", "6"), "client-1": ("0", "7"), "client-2": ("2", "8")}
"""As the digits are dealt with seed 0."""


def run(*arguments: object, code: int = 0, answer: str = "") -> Result:
    """Give a command; it must end with this exit code, and never in a traceback."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)
    ended = result.exception is None or isinstance(result.exception, SystemExit)
    assert ended, (arguments, result.exception)
    assert result.exit_code == code, (arguments, result.output)
    assert "Traceback" not in result.output
    return result


def told(*arguments: object, code: int = 0) -> Any:
    """Give a command with ``--json`` and read what it prints."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def digits_registry(path: Path) -> Registry:
    """Three clients of the digits on the pico backbone; client-0 was anchored by client-1."""
    return registry_of(
        path,
        member(
            "client-0",
            Kind.FULL,
            seed=1,
            classes=CLASSES["client-0"],
            lineage=Lineage(anchored_by=("client-1",)),
            with_fisher=True,
        ),
        member("client-1", Kind.LORA, seed=2, classes=CLASSES["client-1"]),
        member("client-2", Kind.IA3, seed=3, classes=CLASSES["client-2"]),
    )
