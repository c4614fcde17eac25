"""What the commands share: errors as sentences, output for people or programs, the registry."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedcompo.config.setting import names_of
from fedcompo.errors import ConfigError, FedcompoError
from fedcompo.report.console import literal, say

if TYPE_CHECKING:
    from fedcompo.registry.reader import RegistryReader

INTERRUPTED = 130
VARIABLE = "FEDCOMPO_REGISTRY"

RegistryOption = Annotated[
    Path | None,
    typer.Option(
        "--registry",
        "-r",
        help="Folder of the registry; default: $FEDCOMPO_REGISTRY, else where you stand, "
        "or its `registry`.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show tracebacks and log messages.")
]
OnlyOption = Annotated[str | None, typer.Option(metavar="A,B", help="Compose these clients alone.")]
WithoutOption = Annotated[str | None, typer.Option(metavar="A,B", help="Leave these clients out.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(metavar="A=0.7,B=0.3", help="Coefficients; they must sum to 1. Default: equal."),
]
ScaleOption = Annotated[
    float | None, typer.Option(help="Factor on the sum; default: the registry's own.")
]


@contextlib.contextmanager
def errors_as_sentences(verbose: bool = False) -> Iterator[None]:
    """Turn errors into sentences and exit codes: 2 for settings, 130 for Ctrl-C, else 1.

    An error of the system (no room, no permission) is said as it is; a closed pipe is the reader's
    wish, and left to typer.
    """
    if verbose:
        logging.basicConfig(level=logging.INFO)
    try:
        yield
    except KeyboardInterrupt:
        say("Interrupted; everything that was started has been ended.", Console(stderr=True))
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except (FedcompoError, OSError) as error:
        sentence = f"The system refuses: {error}" if isinstance(error, OSError) else str(error)
        say(traceback.format_exc() if verbose else sentence, Console(stderr=True))
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


@contextlib.contextmanager
def progress(*, quiet: bool) -> Iterator[Any]:
    """Show what is being done while it is done, on standard error; yields who to tell."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda step: None
        return
    with console.status("…") as status:
        yield lambda step: status.update(literal(f"{step} …"))


def open_registry(given: Path | None) -> RegistryReader:
    """Open the registry that was named, or the one that is near, to read it; loads no torch.

    Raises:
        RegistryError: If there is none.
    """
    from fedcompo.registry.reader import RegistryReader

    return RegistryReader(registry_path(given))


def registry_path(given: Path | None) -> Path:
    """Folder of the registry that was named, or of the one that is near."""
    if given is None and os.environ.get(VARIABLE):
        given = Path(os.environ[VARIABLE])
    near = (path for path in (Path(), Path("registry")) if (path / "registry.json").is_file())
    return given or next(near, Path())


def listed_names(text: str | None) -> tuple[str, ...]:
    """Split ``a,b,c``; raises ``ConfigError`` if a name is empty."""
    if text is None:
        return ()
    names = names_of(text)
    if not names or not all(names):
        raise ConfigError(f"{text!r} is no list of clients; write names joined by commas: a,b,c.")
    return names


def weights_of(text: str | None) -> dict[str, float] | None:
    """Parse ``a=0.7,b=0.3``; raises ``ConfigError`` if it is something else, or no mean."""
    if text is None:
        return None
    weights: dict[str, float] = {}
    for part in listed_names(text):
        name, equals, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            equals = ""
        name = name.strip()
        if not equals or not name or name in weights:
            raise ConfigError(
                f"`--weights {text}` is not of the form a=0.7,b=0.3, each client once."
            )
        weights[name] = value
    total = math.fsum(weights.values())
    if not abs(total - 1) <= 1e-6 or min(weights.values()) < 0:  # as pools demand it
        raise ConfigError(
            f"`--weights {text}` must be >= 0 and sum to 1, but sum to {total:.6g}. "
            "`--scale` enlarges the sum."
        )
    return weights


def choice_of(
    only: str | None, without: str | None, weights: str | None, scale: float | None
) -> dict[str, Any]:
    """Read the options that choose whom to compose, and with what.

    Raises:
        ConfigError: If one is not of its form.
    """
    return {
        "only": listed_names(only),
        "without": listed_names(without),
        "weights": weights_of(weights),
        "scale": scale,
    }
