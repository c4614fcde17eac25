"""A report as one HTML file that needs nothing else: no network, no script, no other file.

Names of clients and classes come from outside. Every text becomes printable and is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from fedcompo.names import printable

REPORT = "report.html"
TEMPLATE = "page.html"
UNFOLDED = 40
"""Rows of a table that is open from the start."""


class Column(NamedTuple):
    """Title of a column, and whether it holds numbers."""

    title: str
    number: bool = False


def numbers(*titles: str) -> list[Column]:
    """Columns for numbers, as wide as needed and aligned to the right."""
    return [Column(title, number=True) for title in titles]


def named(*titles: str, first: str = "client", words: int = 0) -> list[Column]:
    """Columns: what names a row, then so many of words, then numbers."""
    return [Column(first), *map(Column, titles[:words]), *numbers(*titles[words:])]


@dataclass(frozen=True)
class Table:
    """A table; one of many rows is folded."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    """Cells; the first names its row."""
    folded: bool = False

    @property
    def closed(self) -> bool:
        """Whether a reader opens it."""
        return self.folded or len(self.rows) > UNFOLDED


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows in words."""

    title: str
    svg: Markup
    description: str
    large: bool = False
    """Whether it keeps its size, larger than a screen, and is scrolled."""


@dataclass(frozen=True)
class Section:
    """A part of a report; one without parts and sentences is left out."""

    title: str
    parts: Sequence[Table | Picture]
    sentences: Sequence[str] = ()

    @property
    def anchor(self) -> str:
        """What a link within the page leads to."""
        return "-".join(self.title.lower().split())


@dataclass(frozen=True)
class Tile:
    """A figure that one sees first."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True)
class Alert:
    """What a reader must not miss; a grave one changes who or what is in the model."""

    text: str
    grave: bool = False


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    subtitle: str
    tiles: Sequence[Tile]
    alerts: Sequence[Alert]
    sections: Sequence[Section]

    def html(self) -> str:
        """Write it."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_shown,
        )
        environment.filters["code"] = _code
        text = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
        used = [s for s in self.sections if s.parts or s.sentences]
        return environment.from_string(text).render(page=self, sections=used) + "\n"


def _code(text: str) -> Markup:
    """Mark what stands in backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(_shown(text)))))


def _shown(value: Any) -> Any:
    return printable(value, keep="\n") if type(value) is str else value
