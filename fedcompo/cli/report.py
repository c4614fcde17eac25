"""The command that writes a report of a registry, or of a run that is over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcompo.cli import common
from fedcompo.engine.run_folder import RESULTS
from fedcompo.errors import ConfigError, FileFormatError
from fedcompo.report.console import say

NEEDED = {
    *("method", "created", "seconds", "seed", "settings", "backbone"),
    *("phases", "notes", "versions", "platform"),
}
"""Keys that results have, whatever ran."""


def report(
    folder: Annotated[
        Path | None, typer.Argument(help="A registry, or the folder of a run that is over.")
    ] = None,
    registry: common.RegistryOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, .html; replaces an earlier one.")
    ] = Path("report.html"),
    verbose: common.VerboseOption = False,
) -> None:
    """Write a report as one HTML file, which needs no network: read it in a browser, print it.

    Of a registry: who is in it, who was removed, and the receipts; accuracies too if the run that
    made it lies beside it. Of a run's folder: the run's report, written anew.
    """
    with common.errors_as_sentences(verbose):
        if folder is not None and registry is not None:
            raise ConfigError("Name one: a folder, or a registry by --registry.")
        if output.suffix != ".html":
            raise ConfigError(f"`--output` is {str(output)!r}, expected a name that ends in .html.")
        from fedcompo.registry.state import ABOUT
        from fedcompo.registry.story import story, story_of_run
        from fedcompo.report.pages import registry_page, run_page
        from fedcompo.storage.files import write_atomically

        if folder and (folder / RESULTS).is_file() and not (folder / ABOUT).is_file():
            results = _results(folder / RESULTS)
            page = run_page(results, story_of_run(folder, results))
        else:
            opened = common.open_registry(folder or registry)
            page = registry_page(story(opened), results_beside(opened.path))
        write_atomically(output, page.encode())
        say(f"Report: {output}")


def results_beside(registry: Path) -> dict[str, Any] | None:
    """Read the results of the run that made a registry; None if they do not lie beside it."""
    path = registry.absolute()
    beside = path.with_name(RESULTS)
    found = _results(beside) if beside.is_file() else {}
    made = Path((found.get("registry") or {}).get("path", ""))  # both may have been moved
    return found if made.name == path.name else None


def _results(path: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if missing := NEEDED - results.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, AttributeError) as error:
        raise FileFormatError(f"{path} holds no results of a run: {error}.") from error
    return results
