"""Printing for people and programs: sentences, tables, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.style import Style
from rich.table import Column
from rich.text import Text

from fedcompo.names import printable

PIPE_WIDTH = 120
"""Columns of a table that no terminal will show."""


class PlainConsole(Console):
    """Prints every text as it is: no markup, no emoji codes, no control characters."""

    def render_str(self, text: str, *, style: str | Style = "", **options: Any) -> Text:
        """Make what rich prints of a text, in cells and titles too."""
        keep = {key: options[key] for key in ("justify", "overflow") if key in options}
        return Text(printable(text, keep="\n\t"), style, **keep)


def say(text: str, console: PlainConsole | None = None) -> None:
    """Print a sentence as it is."""
    (console or PlainConsole()).print(text, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON document, in ASCII: every terminal and every program can take it."""
    typer.echo(json.dumps(value, indent=2, default=list))


def print_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Print CSV with a header, in UTF-8; names of files keep bytes that are none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    typer.echo(text.getvalue().encode(errors="surrogateescape"), nl=False)


def numbers(*titles: str) -> list[Column]:
    """Columns of a table for numbers: aligned to the right."""
    return [Column(title, justify="right") for title in titles]


def table_console(console: PlainConsole | None = None) -> PlainConsole:
    """Make a console wide enough for tables, also where there is no terminal."""
    console = console or PlainConsole()
    if console.is_terminal:
        return console
    return PlainConsole(file=console.file, width=max(PIPE_WIDTH, console.width))
