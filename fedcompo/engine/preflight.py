"""Look at data and backbone before a run: what cannot be used is known in seconds.

The same checks for one client's own folder (``fedcompo check``) and for all clients of a
simulation, which does not start where one of them fails.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcompo import data
from fedcompo.config.caps import FEWEST_IMAGES
from fedcompo.config.run import BackboneConfig, RunConfig
from fedcompo.config.setting import names_of
from fedcompo.data.checks import Amount, Checked, check_examples, fault_of
from fedcompo.data.client_data import Share, client_names, client_share, drawn_aside, folder_share
from fedcompo.data.enough import check_enough
from fedcompo.engine.findings import WHOSE, Preflight
from fedcompo.errors import DataError, FedcompoError
from fedcompo.names import check_client_names
from fedcompo.report.progress import step
from fedcompo.report.twins import note_on, twins
from fedcompo.report.units import size
from fedcompo.runtime import available_bytes, pick_device

if TYPE_CHECKING:  # which load timm
    from fedcompo.backbone.backbone import Backbone

SECONDS = 1.0
"""Time for each step of the checks of all clients together, before a simulation."""
LONGEST = 5.0
"""Seconds after which a simulation starts, however many clients have not been looked at."""
FULL = math.inf
FILES = {"reference": "train", "owners": "registry"}
"""Settings that name a file which is read later, and their section."""

Listed = tuple[str, Callable[[], Share]]
"""A client's name, and what lists its examples."""


@dataclass(frozen=True)
class Machine:
    """Where clients work."""

    at_once: int = 1
    """Clients that work at a time."""
    threads: int = 0
    """CPUs that each has; 0: as this process."""
    output: Path = Path()
    """Folder of the results."""
    starts: bool = False
    """Whether Flower's engine starts first, and a process for each CPU."""


def look(
    config: RunConfig,
    *,
    own: str = "",
    client: str = "",
    clients: int = 0,
    machine: Machine | None = None,
    seconds: float = SECONDS,
    longest: float = FULL,
    brief: bool = False,
) -> Preflight:
    """Check what a run is going to use; raises nothing that is wrong with it.

    Args:
        config: Settings of the run.
        own: Folder or file of one client's own images; empty: all clients of the settings' `data`.
        client: The client's name; empty: that of its folder or file.
        clients: Number of clients of the source, from the first; 0: all.
        machine: Where they work; None: one after the other, here.
        seconds: Time for each step of the checks of all clients together; infinite: check all.
        longest: Seconds after which no further client is looked at.
        brief: Leave out the backbone and the estimate where neither can be wrong.
    """
    found = Preflight()
    found.faults += _missing_files(config)
    backbone = None
    if not (brief and config.backbone == BackboneConfig() and ":" not in config.data.data):
        step("loading the backbone")
        backbone = _backbone(config, found)
    with _noting(found):
        shares = _own(config, own, client, found) if own else _shares(config, clients, found)
        if backbone and own and config.backbone == BackboneConfig():
            backbone = _unless_of_another_kind(backbone, shares, found)
        if own and not config.caps.min_images:
            config = replace(config, caps=replace(config.caps, min_images=FEWEST_IMAGES))
        amounts = _clients(shares, config, backbone, seconds, longest, found)
    if note := note_on(twins({name: own["classes"] for name, own in found.clients.items()})):
        found.notes.append(note)
    if backbone and amounts and not found.faults:
        machine = machine or Machine()
        _estimate(backbone, config, amounts, machine, found)
        _compare(found, machine)
    return found


@contextmanager
def _noting(found: Preflight) -> Iterator[None]:
    """Note what is logged of the data, instead of logging it: a run logs it again."""
    log, notes = logging.getLogger(data.__name__), logging.Handler(logging.WARNING)
    notes.emit = lambda record: found.notes.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(notes)
    log.propagate = False
    try:
        yield
    finally:
        log.propagate = True
        log.removeHandler(notes)


def _clients(
    shares: list[Listed],
    config: RunConfig,
    backbone: Backbone | None,
    seconds: float,
    longest: float,
    found: Preflight,
) -> list[Amount]:
    """Look at the clients one after the other, while there is time; the rest counts as they do."""
    until, found.total = time.monotonic() + longest, len(shares)
    amounts: list[Amount] = []
    for count, (name, listed) in enumerate(shares, start=1):
        step(f"looking at {name}")
        if amount := _client(name, listed, config, backbone, seconds / len(shares), found):
            amounts.append(amount)
        if time.monotonic() > until and count < len(shares):
            found.notes.append("`fedcompo check` takes its time, and looks at all clients.")
            break
    return amounts * max(1, len(shares) // max(1, len(amounts)))


def _estimate(
    backbone: Backbone,
    config: RunConfig,
    amounts: list[Amount],
    machine: Machine,
    found: Preflight,
) -> None:
    from fedcompo.engine.estimate import estimate, measure

    step("measuring a step of training")
    found.estimate = estimate(
        backbone,
        config,
        measure(backbone, config, threads=machine.threads),
        amounts,
        classes=len({name for own in found.clients.values() for name in own["classes"]}),
        at_once=machine.at_once,
        starts=machine.starts,
    )


def _missing_files(config: RunConfig) -> Iterator[str]:
    for key, section in FILES.items():
        path = getattr(getattr(config, section), key)
        if path and not Path(path).exists():
            yield f"`{key}` is {path}, which is not there. Check the path."


def _backbone(config: RunConfig, found: Preflight) -> Backbone | None:
    from fedcompo.backbone.backbone import load_backbone

    try:
        backbone = load_backbone(config.backbone, pick_device(config.device))
    except FedcompoError as error:
        found.faults.append(str(error))
        return None
    seen = backbone.preprocessing
    found.backbone = {
        "name": backbone.name,
        "parameters": sum(weight.numel() for weight in backbone.model.parameters()),
        "reads": str(seen.modality),
        "shape": seen.shape,
    }
    return backbone


def _own(config: RunConfig, own: str, client: str, found: Preflight) -> list[Listed]:
    """What is one client's own."""
    try:
        cap = config.data.images_per_class
        share = folder_share(own, seed=config.seed, images_per_class=cap, client=client)
        check_client_names([share.name])
    except FedcompoError as error:
        found.faults.append(str(error))
        return []
    return [(share.name, lambda: share)]


def _unless_of_another_kind(
    backbone: Backbone, shares: list[Listed], found: Preflight
) -> Backbone | None:
    """Leave out the default backbone, which nobody named, where it does not read a client's own."""
    reads = backbone.preprocessing.modality
    if all(listed().catalogue.modality == reads for _, listed in shares):
        return backbone
    found.backbone = {}
    found.notes.append(f"The default backbone reads {reads}; name the run's by --scenario.")
    return None


def _shares(config: RunConfig, clients: int, found: Preflight) -> list[Listed]:
    """All clients of a source but those that are left out."""
    source, seed = config.data, config.seed
    try:
        names = client_names(source)[: clients or None]
        check_client_names(names)
    except FedcompoError as error:
        found.faults.append(str(error))
        return []
    excluded = names_of(config.server.exclude)
    return [
        (name, lambda at=at: client_share(source, partition=at, seed=seed))  # type: ignore[misc]
        for at, name in enumerate(names)
        if name not in excluded
    ]


def _client(
    name: str,
    listed: Callable[[], Share],
    config: RunConfig,
    backbone: Backbone | None,
    seconds: float,
    found: Preflight,
) -> Amount | None:
    """Look at one client; returns what it owns, or None if that cannot be told."""
    try:
        share = listed()
        if backbone and share.catalogue.modality != backbone.preprocessing.modality:
            raise DataError(
                f"{share.catalogue.source} holds {share.catalogue.modality}, but the backbone "
                f"reads {backbone.preprocessing.modality}. Change `data`, or `backbone`."
            )
    except FedcompoError as error:
        if str(error) not in found.faults:
            found.faults.append(str(error))
        return None
    tests = sum(map(len, share.test))
    try:
        check_enough(share.classes, share.labels, tests, client=name, config=config)
    except FedcompoError as error:
        found.faults.append(f"{WHOSE}{name!r}: {error}")
    seen = backbone.preprocessing if backbone else None
    checked = check_examples(share, seen, seconds=seconds)
    if fault := fault_of(checked, share):
        found.faults.append(fault)
    if checked.repeated:
        found.notes.append(
            f"{name}: at least {checked.repeated} test files are training files too: accuracies "
            "will be too high. Take them out of one of the two."
        )
    counts = zip(share.classes, share.train, share.test, strict=True)
    classes = {own: [len(train), len(test)] for own, train, test in counts}
    found.clients[name] = {"classes": classes, **_facts(checked)}
    aside = drawn_aside(share.labels, share=config.train.aside, seed=config.seed, client=name)
    return Amount(len(aside), int(aside.sum()), tests, len(classes), checked.rate)


def _facts(checked: Checked) -> dict[str, Any]:
    """What was checked, as JSON values."""
    rate = None if math.isinf(checked.rate) else round(checked.rate, 1)
    return {**asdict(checked), "rate": rate}


def _compare(found: Preflight, machine: Machine) -> None:
    """Compare what a run takes with what this machine has free."""
    assert found.estimate
    output = machine.output.absolute()
    near = next(place for place in (output, *output.parents) if place.exists())
    found.free = {"disk": shutil.disk_usage(near).free, "memory": available_bytes()}
    if found.estimate.disk > found.free["disk"]:
        found.faults.append(
            f"The run's folder takes about {size(found.estimate.disk)}, but on the disk of {near} "
            f"{size(found.free['disk'])} are free. Choose another with --output."
        )
    needed = machine.at_once * found.estimate.memory
    if 0 < found.free["memory"] < needed:
        found.notes.append(
            f"{machine.at_once} clients at a time take about {size(needed)} of memory, but "
            f"{size(found.free['memory'])} are free. With `--engine in-process` one works after "
            "the other."
        )
