"""What commands share: options, errors as sentences, progress, and how a registry is found."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.text import Text

from fedcompo.config.setting import names_of
from fedcompo.errors import ConfigError, FedcompoError
from fedcompo.names import printable
from fedcompo.report.console import PlainConsole, say
from fedcompo.report.log import log_to_stderr
from fedcompo.report.progress import Progress, listening, to_lines

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
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to write to; must be new or empty.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
SigningKeyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The registry's private key; default: $FEDCOMPO_SIGNING_KEY, else key.pem in the "
        "registry. Its password, if any: $FEDCOMPO_SIGNING_PASSWORD, or asked for.",
    ),
]
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
    float | None,
    typer.Option(
        help="λ, a multiple of the rule's mean; default: the registry's own; by another rule, that "
        "which keeps the length of the task vectors."
    ),
]
RuleOption = Annotated[
    str,
    typer.Option(
        metavar="NAME[:OPTION=VALUE,…]",
        help="mean, norm-preserving, task-arithmetic:lambda=0.3, ties:density=0.2, "
        "dare:drop=0.9,seed=0, iso-c, tsv-m, fisher or regmean; default: the registry's own.",
    ),
]
AssignmentsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one setting, such as kind=lora or alpha=0.5. May be repeated.",
    ),
]


@contextlib.contextmanager
def errors_as_sentences(verbose: bool = False) -> Iterator[None]:
    """Turn errors into sentences and exit codes: 2 for settings, 130 for Ctrl-C, else 1.

    An error of the system (no room, no permission) is printed as it is. A closed pipe is what its
    reader wanted, and left to typer.
    """
    if verbose:
        log_to_stderr()
    try:
        yield
    except KeyboardInterrupt:
        say("Interrupted; everything that was started has been ended.", PlainConsole(stderr=True))
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except (FedcompoError, OSError) as error:
        sentence = f"The system refuses: {error}" if isinstance(error, OSError) else str(error)
        say(traceback.format_exc() if verbose else sentence, PlainConsole(stderr=True))
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from error


@contextlib.contextmanager
def progress(*, quiet: bool) -> Iterator[None]:
    """Show on standard error what is being done: in a terminal at once, else every ten seconds."""
    console = PlainConsole(stderr=True)
    if quiet:
        yield
        return
    if not console.is_terminal:
        with listening(to_lines(lambda line: say(line, console), terse=True)):
            yield
        return
    last = ""
    with console.status("…") as status:

        def show(progress: Progress) -> None:
            nonlocal last
            if not progress.total:
                last = progress.what
            told = (last, str(progress)) if progress.total and last else (str(progress),)
            status.update(Text(printable(f"{', '.join(told)} …")))

        with listening(show):
            yield


def confirm(question: str) -> None:
    """Ask, and go on with a yes alone; a script, whose answer may be missing, is told of --yes."""
    if not sys.stdin.isatty():
        question += " Nobody may be there to answer: --yes does without."
    typer.confirm(question, abort=True)


def open_registry(named: Path | None) -> RegistryReader:
    """Open a registry to read it; loads no torch. See :func:`registry_path` for its place.

    Raises:
        RegistryError: If there is none.
    """
    from fedcompo.registry.reader import RegistryReader

    return RegistryReader(registry_path(named))


def registry_path(named: Path | None) -> Path:
    """Find the folder of the registry: as named, by the environment, here, or in ``registry``."""
    if named is None and os.environ.get(VARIABLE):
        named = Path(os.environ[VARIABLE])
    near = (path for path in (Path(), Path("registry")) if (path / "registry.json").is_file())
    return named or next(near, Path())


def listed_names(text: str | None) -> tuple[str, ...]:
    """Split ``a,b,c``; raises ``ConfigError`` if a name is empty."""
    if text is None:
        return ()
    names = names_of(text)
    if not names or not all(names):
        raise ConfigError(
            f"{text!r} is no list of clients; write names joined by commas, one with a comma in "
            'double quotes: a,b,"c, d".'
        )
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
    total = sum(weights.values())
    if not abs(total - 1) <= 1e-6 or min(weights.values()) < 0:  # as pools demand it
        raise ConfigError(
            f"`--weights {text}` must be >= 0 and sum to 1, but sum to {total:.6g}. "
            "`--scale` enlarges the sum; in a recipe, `normalise = false` allows any."
        )
    return weights


@dataclass(frozen=True)
class Choice:
    """The options that choose whom to compose, and with what."""

    only: OnlyOption = None
    without: WithoutOption = None
    weights: WeightsOption = None
    scale: ScaleOption = None

    def parsed(self) -> dict[str, Any]:
        """Read the lists of names and the weights.

        Raises:
            ConfigError: If one is not of its form.
        """
        names = {"only": listed_names(self.only), "without": listed_names(self.without)}
        return {**vars(self), **names, "weights": weights_of(self.weights)}


@dataclass(frozen=True)
class RuledChoice(Choice):
    """And by which rule."""

    rule: RuleOption = ""


def with_options(
    parameter: str, group: type
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that a dataclass declares, in place of one of its parameters.

    Typer reads the options of a command from its signature.

    Args:
        parameter: The command's parameter that takes the dataclass; keyword-only.
        group: The dataclass, whose fields are annotated as options.
    """
    options = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            annotation=kind,
            default=getattr(group, name, Parameter.empty),
        )
        for name, kind in get_type_hints(group, include_extras=True).items()
    ]

    def replaced(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def gathering(**values: Any) -> None:
            own = {o.name: values.pop(o.name) for o in options if o.name in values}
            command(**{parameter: group(**own)}, **values)

        signed = signature(command, eval_str=True)
        parameters = list(signed.parameters.values())
        at = list(signed.parameters).index(parameter)
        parameters[at : at + 1] = options
        gathering.__signature__ = signed.replace(parameters=parameters)  # type: ignore[attr-defined]
        gathering.__annotations__ = {each.name: each.annotation for each in parameters}
        return gathering

    return replaced
