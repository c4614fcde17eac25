"""Check the settings, train or remove clients, write the results."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from logging import ERROR, INFO
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.composition.settings import UNLIMITED, CompositionSettings
from fedcompo.config.choices import Action, Method, Schedule
from fedcompo.config.run import RunConfig
from fedcompo.config.scenario import without_paths
from fedcompo.config.setting import names_of
from fedcompo.data.tasks import one_of_each
from fedcompo.engine.log import SERVER
from fedcompo.engine.run_folder import (
    EVENTS,
    LOG,
    LOGS,
    PROGRESS,
    RESULTS,
    RUN,
    begun_settings,
    reserve_output,
)
from fedcompo.errors import BackboneMismatch, ConfigError
from fedcompo.names import printable
from fedcompo.registry.owners import OWNERS, read_owners
from fedcompo.registry.registry import Registry
from fedcompo.registry.signing import signer_for
from fedcompo.registry.state import ABOUT
from fedcompo.registry.story import story_of_run
from fedcompo.report.pages import write_report
from fedcompo.report.progress import telling
from fedcompo.report.tracking import Tracking
from fedcompo.storage.files import write_atomically
from server import averaging, unlearning
from server.averaging import Averaging
from server.exchange.books import Books
from server.exchange.exchange import Exchange
from server.exchange.kept_answers import KeptAnswers
from server.exchange.nodes import Nodes
from server.results import collect, collect_averaging, collect_removal
from server.resume import Working, clear
from server.sequential import Arrivals
from server.strategy import IelStrategy, ItaStrategy, Strategy
from server.unlearning import Unlearning

REGISTRY = "registry"
HOME_OUTPUT = "fedcompo-runs"

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
RESUMABLE = tuple((Action.TRAIN, method) for method in (Method.ITA, Method.IEL))
"""Actions and methods that can be resumed after an interruption."""

Work = Callable[[Grid, Books, RunConfig, Path], dict[str, Any]]
"""Does the action of a run; the path is its output folder. Returns the results."""


def run(grid: Grid, context: Context) -> None:
    """Do the `action` of the settings once, and write the results to the output folder."""
    config = RunConfig.parse(context.run_config)
    config.caps.check_noise(
        statistics=config.head.statistics,
        curvature=config.fisher.curvature,
        start=config.train.head_start,
    )
    output = claim_output(config)
    books = Books(output / EVENTS)
    work, phases = work_of(config)
    books.tell("run", clients=[], phases=phases)
    try:
        with _followed(books, config, output) as tracking:
            results = work(grid, books, config, output)
            text = json.dumps(results, indent=2, allow_nan=False) + "\n"
            write_atomically(output / RESULTS, text.encode())
            clear(output)
            _report(output, results)
            tracking.finish(
                results, [output / RESULTS, *sorted(output.glob("report.*"))], failed=False
            )
    except BaseException as error:
        log(ERROR, "The run failed: %s", printable(str(error), keep="\n"))
        if isinstance(error, OSError) and error.errno in DISK and (output / RUN).exists():
            log(ERROR, "See to the server's disk, then go on with `resume`: nothing is lost.")
        with suppress(OSError):  # a full disk must not hide what happened
            stopped, told = isinstance(error, KeyboardInterrupt), f"{type(error).__name__}: {error}"
            books.tell("failed", reason="interrupted" if stopped else told)
        raise
    if results.get("class_il_accuracy") is not None:
        class_il, task_il = (100 * results[f"{name}_il_accuracy"] for name in ("class", "task"))
        log(INFO, "Accuracy, %%: all classes %.1f, own classes %.1f", class_il, task_il)
    log(INFO, "Results: %s", output)
    books.tell("finished", results=RESULTS)  # at last: a launcher now ends this process


def _report(output: Path, results: Mapping[str, Any]) -> None:
    """Write the report; a run whose results are safe does not fail by it."""
    try:
        write_report(output, results, story_of_run(output, results))
    except Exception as error:
        log(ERROR, "No report (%s: %s)", type(error).__name__, printable(str(error)))
        log(ERROR, "Write it by: fedcompo report %s", output)


@contextmanager
def _followed(books: Books, config: RunConfig, output: Path) -> Iterator[Tracking]:
    """Let the trackers of the settings, the log and a simulation's display follow the run."""
    folder, names = os.environ.get(LOGS), names_of(config.server.track)
    file = Path(folder) / PROGRESS / "-server" if folder else None  # no client's name begins so
    settings = without_paths(config.flat())
    with (
        Tracking(names, output, settings, books.note) as tracking,
        telling(lambda line: log(INFO, "%s", printable(line)), file, client=SERVER),
    ):
        books.follow = tracking.hear
        yield tracking


def work_of(config: RunConfig) -> tuple[Work, tuple[str, ...]]:
    """The work of a run, and its phases."""
    if config.registry.action is Action.REMOVE:
        return _remove, unlearning.phases_of(config)
    if config.method.method in averaging.METHODS:
        return _average, averaging.phases_of(config)
    return _train, strategy_of(config).phases_of(config)


def _train(grid: Grid, books: Books, config: RunConfig, output: Path) -> dict[str, Any]:
    """Train new clients and add them to the registry."""
    loaded = load_backbone(config.backbone)
    registry = open_or_create(config, loaded, output)
    if table := config.registry.owners:
        read_owners(Path(table))  # raises before it takes the place of an earlier one
        write_atomically(registry.path / OWNERS, Path(table).read_bytes())
    seen = registry.backbone.preprocessing.instead_of(loaded.preprocessing)
    backbone = replace(loaded, preprocessing=seen)
    working = Working.open(output, config, registry)
    # Members count: a single newcomer can join them.
    least = max(1, config.server.min_clients - len(one_of_each(working.members)))
    exchange = new_exchange(grid, books, config, seen, least=least, answers=working.answers)
    if seen != loaded.preprocessing:
        books.note(
            "Pictures are prepared as when the registry was made"
            + (", with other roundings than timm's" if registry.backbone.old_pixels else "")
            + ", not as this run's backbone says."
        )
    uncapped = replace(registry.settings, class_cap=UNLIMITED, client_cap=UNLIMITED)
    if uncapped != CompositionSettings.of(config):
        books.note("The registry composes with its own settings, not with this run's.")
    if (given := registry.settings.factor_given) and config.train.aside > 0:
        books.note(
            f"The registry composes {given}, so nobody votes: the share `aside` = "
            f"{config.train.aside:g} of the images, which clients keep aside to vote on, trains "
            "nobody. Set `aside = 0` to train on all images."
        )
    exchange.gather(config.server.num_clients)
    chosen = strategy_of(config)(exchange, config, backbone, registry, working)
    chosen.run()
    return collect(chosen)


def _average(grid: Grid, books: Books, config: RunConfig, output: Path) -> dict[str, Any]:
    """Train one model of all clients by FedAvg or FedProx; it has no registry."""
    backbone = load_backbone(config.backbone)
    least = config.server.min_clients
    exchange = new_exchange(grid, books, config, backbone.preprocessing, least=least)
    averaged = Averaging(exchange, config, backbone, output)
    exchange.gather(config.server.num_clients)
    averaged.run()
    return collect_averaging(averaged)


def strategy_of(config: RunConfig) -> type[Strategy]:
    """The strategy that the settings name."""
    if config.method.schedule is Schedule.SEQUENTIAL:
        return Arrivals
    return IelStrategy if config.method.method is Method.IEL else ItaStrategy


def _remove(grid: Grid, books: Books, config: RunConfig, output: Path) -> dict[str, Any]:
    """Remove a client from the registry; those who stay and are connected take part."""
    registry = Registry(registry_path(config))
    signer_for(registry.path)  # without its key no client need be asked
    backbone = registry.backbone.load()
    exchange = new_exchange(grid, books, config, backbone.preprocessing, least=0)
    removal = Unlearning(exchange, config, backbone, registry, output)
    exchange.gather(config.server.num_clients)
    removal.run()
    return collect_removal(removal)


def new_exchange(
    grid: Grid,
    books: Books,
    config: RunConfig,
    preprocessing: Preprocessing,
    *,
    least: int,
    answers: KeptAnswers | None = None,
) -> Exchange:
    """Begin the conversation with the clients of a run, which fails with fewer than the least."""
    nodes, timeout = Nodes(grid, shards=config.data.shards), config.server.timeout
    in_flight = config.server.in_flight or getattr(grid, "in_flight", 0)
    return Exchange(books, nodes, timeout, least, in_flight, answers, preprocessing)


def open_or_create(config: RunConfig, backbone: Backbone, output: Path) -> Registry:
    """Open the registry of the settings, or create it; without a name, in the output folder.

    Raises:
        BackboneMismatch: If it was made with other pre-trained weights.
        RegistryError: If it cannot be opened or created.
    """
    path = registry_path(config) if config.registry.registry else output / REGISTRY
    if not (path / ABOUT).exists():
        return Registry.create(path, backbone, CompositionSettings.of(config))
    registry = Registry(path)
    registry.settings.check_run(config)
    if registry.state.base != backbone.fingerprint:
        raise BackboneMismatch(
            f"The registry {path} is one of the backbone {registry.state.base}, this run's is "
            f"{backbone.fingerprint}. Use the same `backbone` and `checkpoint`, or another "
            "registry."
        )
    return registry


def registry_path(config: RunConfig) -> Path:
    """Folder of the registry; raises ``ConfigError`` unless the path is absolute."""
    path = Path(config.registry.registry).expanduser()
    if not path.is_absolute():
        raise ConfigError(
            f"`registry` is {config.registry.registry!r}; a run started by `flwr run` needs an "
            "absolute path. `fedcompo simulate` takes relative ones."
        )
    return path


def claim_output(config: RunConfig) -> Path:
    """Reserve an output folder for this run.

    The launcher passes a folder that it has reserved. Started by plain ``flwr run``, this process
    works in a folder of Flower's, where no user would look: a relative path is refused, and no path
    means ``~/fedcompo-runs/<data>``.

    Raises:
        ConfigError: If the path is relative, or `resume` is set for what cannot be resumed.
        LaunchError: If the folder cannot be made, or holds no interrupted run.
    """
    if config.server.resume and (config.registry.action, config.method.method) not in RESUMABLE:
        raise ConfigError(
            f"`resume` is set, but a run of {config.method.method} or a removal starts anew."
        )
    if config.server.resume and not config.output:
        raise ConfigError("`resume` is set, but not `output`: name the folder of the run.")
    if not config.output:
        source = "".join(c if c.isalnum() else "-" for c in config.data.data).strip("-")
        return reserve_output(Path.home() / HOME_OUTPUT / source[-60:])
    output = Path(config.output).expanduser()
    if not output.is_absolute():
        raise ConfigError(
            f"`output` is {config.output!r}, but a run started by `flwr run` cannot know where you "
            "stand. Give an absolute path, or start it by `fedcompo simulate`."
        )
    if config.server.resume:
        if (output / RESULTS).exists():
            clear(output)  # it was killed between the one and the other
        begun_settings(output)
        return output
    if output.is_dir() and [path.name for path in output.iterdir()] == [LOG]:
        return output
    return reserve_output(output)
