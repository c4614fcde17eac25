"""Printing for people and programs: sentences, tables, JSON."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Column
from rich.text import Text

PIPE_WIDTH = 120
"""Columns of a table that no terminal will show."""


def literal(text: str) -> Text:
    """Make text that is printed as it is: without markup, invisible characters by their numbers.

    Some characters steer terminals, and names of classes come from outside.
    """
    visible = (c if c.isprintable() or c in "\n\t" else f"⟨U+{ord(c):04X}⟩" for c in text)
    return Text("".join(visible))


def say(text: str, console: Console | None = None) -> None:
    """Print a sentence as it is."""
    (console or Console()).print(literal(text), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document, in ASCII: every terminal and every program can take it."""
    typer.echo(json.dumps(value, indent=2, default=list))


def numbers(*titles: str) -> list[Column]:
    """Columns of a table for numbers: aligned to the right."""
    return [Column(title, justify="right") for title in titles]


def table_console(console: Console | None = None) -> Console:
    """Make a console wide enough for tables, also where there is no terminal."""
    console = console or Console()
    if console.is_terminal:
        return console
    return Console(file=console.file, width=max(PIPE_WIDTH, console.width))
