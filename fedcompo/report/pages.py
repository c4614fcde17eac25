"""The report of a run, from its ``results.json``, and that of a registry, as one HTML file.

It needs nothing else: no network, no script, no other file. Names of clients and classes come from
outside: every text becomes printable and is escaped. Results that an earlier version wrote lack
some figures; their sections are left out. What stands where: ``templates/``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from fedcompo.config.run import RunConfig
from fedcompo.names import printable
from fedcompo.report import drawing, figures, results, units
from fedcompo.storage.files import write_atomically

if TYPE_CHECKING:
    from jinja2 import Template

REPORT = "report.html"
TEMPLATES = Path(__file__).with_name("templates")

Values = Mapping[str, Any]


def write_report(folder: Path, found: Values, registry: Values | None = None) -> None:
    """Write ``report.html``.

    Args:
        folder: Of the run.
        found: What ``results.json`` holds.
        registry: The run's registry, as :func:`fedcompo.registry.story.story` describes it.
    """
    write_atomically(folder / REPORT, run_page(found, registry).encode())


def run_page(found: Values, registry: Values | None = None) -> str:
    """Make the report of a run, a removal or a baseline; arguments as of :func:`write_report`."""
    return _template().render(results=found, registry=registry, of_run=True) + "\n"


def registry_page(registry: Values, found: Values | None = None) -> str:
    """Make the report of a registry.

    Args:
        registry: As :func:`fedcompo.registry.story.story` describes it.
        found: Results of the run that made it, for the accuracies; None: there are none.
    """
    return _template().render(results=found, registry=registry, of_run=False) + "\n"


def egress_page(pack: Values, sha256: str) -> str:
    """Make the page that a data controller signs.

    Args:
        pack: What ``egress.json`` holds, as :mod:`fedcompo.export.egress` states it.
        sha256: Of the file, hexadecimal.
    """
    return _template("egress.html").render(pack=pack, sha256=sha256) + "\n"


@cache
def _template(name: str = "page.html") -> Template:
    """Read a template once: to compile it takes longer than to fill it in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    written = (units.percent, units.between, units.duration, units.size, units.listed, _code)
    environment.filters |= {maker.__name__.strip("_"): maker for maker in written}
    environment.globals |= {
        **vars(units),
        "drawing": drawing,
        "figures": figures,
        "TITLES": figures.TITLES,
        "LINES": results.LINES,
        "tables": results,
        "zip": zip,
        "defaults": RunConfig().flat(),
    }
    return environment.get_template(name)


def _code(text: str) -> Markup:
    """Mark what stands in backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(_shown(text)))))


def _shown(value: Any) -> Any:
    return printable(value, keep="\n") if type(value) is str else value
