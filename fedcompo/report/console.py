"""What commands print: sentences, tables, JSON."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

PIPE_WIDTH = 120
"""Columns of a table that no terminal will show."""


def literal(text: str) -> Text:
    """Text to print as it is: without markup; invisible characters, by their numbers.

    Some of those steer terminals, and names of classes come from outside.
    """
    visible = (c if c.isprintable() or c in "\n\t" else f"⟨U+{ord(c):04X}⟩" for c in text)
    return Text("".join(visible))


def say(text: str, console: Console | None = None) -> None:
    """Print a sentence as it is."""
    (console or Console()).print(literal(text), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document, in ASCII: every terminal and every program can take it."""
    typer.echo(json.dumps(value, indent=2, default=list))


def table_console() -> Console:
    """A console for tables: as wide as the terminal, or wide enough where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=max(PIPE_WIDTH, console.width))
