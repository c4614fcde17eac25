"""Look at data and backbone before a run: what cannot be used is known in seconds.

The same checks for one client's own folder (``fedcompo check``) and for all clients of a
simulation, which does not start where one of them fails.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedcompo import data
from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.config.caps import FEWEST_IMAGES
from fedcompo.config.run import BackboneConfig, RunConfig
from fedcompo.config.setting import names_of
from fedcompo.data.checks import check_examples
from fedcompo.data.client_data import Share, client_names, client_share, drawn_aside, folder_share
from fedcompo.data.decoding import check_modality, refuse
from fedcompo.data.enough import check_enough
from fedcompo.data.shards import dealt, needed_for
from fedcompo.data.tasks import check_whole
from fedcompo.engine.estimate import Amount, Estimate, estimate, measure
from fedcompo.engine.simulation import count_clients
from fedcompo.errors import DataError, FedcompoError
from fedcompo.names import check_client_name
from fedcompo.report.progress import step
from fedcompo.report.twins import note_on, twins
from fedcompo.report.units import size
from fedcompo.runtime import available_bytes, one_thread, pick_device

SECONDS = 1.0
"""Time for each step of the checks of all clients together, before a simulation."""
LONGEST = 5.0
"""Seconds after which a simulation starts, however many clients have not been looked at."""
FILES = {"reference": "train", "owners": "registry"}
"""Settings that name a file which is read later, and their section."""
WHOSE = "Client "
"""How a fault of a client's own begins."""
ADVICE = (
    " Mend this, or leave clients out with `exclude`. `--no-check` starts anyway, and leaves out "
    "in the run who cannot take part."
)


@dataclass
class Preflight:
    """What is known of a run before it starts."""

    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: ``classes`` with the number of training and of test images, and what was checked."""
    total: int = 0
    """Number of clients; ``clients`` are fewer if time was short, or some have faults."""
    faults: list[str] = field(default_factory=list)
    """Why it cannot be used, each with what to do; empty: it can."""
    notes: list[str] = field(default_factory=list)
    backbone: dict[str, Any] = field(default_factory=dict)
    """Name, number of parameters and input of the backbone; empty: none that suits."""
    estimate: Estimate | None = None

    def values(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"usable": not self.faults, **asdict(self)}

    def require(self) -> Preflight:
        """Return this; raise ``DataError`` with all faults if there is one."""
        if self.faults:
            advice = ADVICE if any(fault.startswith(WHOSE) for fault in self.faults) else ""
            raise DataError("\n".join([*self.faults, f"Nothing was started.{advice}"]))
        return self

    @contextmanager
    def faulting(self, whose: str = "") -> Iterator[None]:
        """Note an error as a fault, once, instead of raising it."""
        try:
            yield
        except FedcompoError as error:
            if (fault := f"{whose}{error}") not in self.faults:
                self.faults.append(fault)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what is logged of the data, instead of logging it: a run logs it again."""
        log, notes = logging.getLogger(data.__name__), logging.Handler(logging.WARNING)
        notes.emit = lambda record: self.notes.append(record.getMessage())  # type: ignore[method-assign]
        log.addHandler(notes)
        log.propagate = False
        try:
            yield
        finally:
            log.propagate = True
            log.removeHandler(notes)


def look(
    config: RunConfig,
    *,
    own: str = "",
    client: str = "",
    at_once: int = 1,
    starts: bool = False,
    seconds: float = SECONDS,
    longest: float = math.inf,
) -> Preflight:
    """Check what a run is going to use; raises nothing that is wrong with it.

    Args:
        config: Settings of the run.
        own: Folder or file of one client's own images; empty: all clients of the settings' `data`.
        client: The client's name; empty: that of its folder or file.
        at_once: Clients that work at a time.
        starts: Whether Flower's engine starts first, and a process for each CPU.
        seconds: Time for each step of the checks of all clients together; infinite: check all.
        longest: Seconds after which no further client is looked at.
    """
    found, backbone, shares = Preflight(), None, list[Callable[[], Share]]()
    for key, section in FILES.items():
        path = getattr(getattr(config, section), key)
        if path and not Path(path).exists():
            found.faults.append(f"`{key}` is {path}, which is not there. Check the path.")
    if own and not config.caps.min_images:
        config = replace(config, caps=replace(config.caps, min_images=FEWEST_IMAGES))
    step("loading the backbone")
    with found.faulting():
        backbone = load_backbone(config.backbone, pick_device(config.device))
        found.backbone = _facts(backbone)
    with found.noting():
        with found.faulting():
            shares = _shares(config, own, client)
        at_once = min(at_once, max(1, len(shares)))
        found.total, until, amounts = len(shares), time.monotonic() + longest, list[Amount]()
        for count, listed in enumerate(shares, start=1):
            step(f"looking at client {count} of {len(shares)}")
            with found.faulting():
                amounts += _client(listed(), own, config, backbone, seconds / len(shares), found)
            if time.monotonic() > until and count < len(shares):
                found.notes.append("`fedcompo check` takes its time, and looks at all clients.")
                break
    if config.data.shards > 1 and not own:
        found.notes.append(
            "Which image is in which shard stands beside the registry, in <registry>.shards: keep "
            "the two together. Without it, a later run deals images anew."
        )
    if note := note_on(twins({name: known["classes"] for name, known in found.clients.items()})):
        found.notes.append(note)
    if backbone and found.backbone and amounts and not found.faults:
        step("measuring a step of training")
        with nullcontext() if own else one_thread():
            measured = measure(backbone, config)
        amounts *= max(1, config.data.shards * len(shares) // len(amounts))  # the rest owns as much
        classes = len({name for known in found.clients.values() for name in known["classes"]})
        found.estimate = estimate(
            backbone, config, measured, amounts, classes=classes, at_once=at_once, starts=starts
        )
        _compare(found.estimate, Path(config.output), at_once, found)
    return found


def _facts(backbone: Backbone) -> dict[str, Any]:
    return {
        "name": backbone.name,
        "parameters": sum(weight.numel() for weight in backbone.model.parameters()),
        "reads": str(backbone.preprocessing.modality),
        "shape": backbone.preprocessing.shape,
    }


def _shares(config: RunConfig, own: str, client: str) -> list[Callable[[], Share]]:
    """What is one client's own, or all clients of a simulation but those left out; to be listed."""
    if own:
        cap = config.data.images_per_class
        return [partial(folder_share, own, seed=config.seed, images_per_class=cap, client=client)]
    names = client_names(config.data)[: count_clients(config)]
    return [
        partial(client_share, config.data, partition=at, seed=config.seed)
        for at, name in enumerate(names)
        if name not in names_of(config.server.exclude)
    ]


def _client(
    share: Share,
    own: str,
    config: RunConfig,
    backbone: Backbone | None,
    seconds: float,
    found: Preflight,
) -> list[Amount]:
    """Look at one client; returns what it owns."""
    name, catalogue = check_whole(check_client_name(share.name)), share.catalogue
    seen = backbone.preprocessing if backbone else None
    if seen and own and seen.modality != catalogue.modality and config.backbone == BackboneConfig():
        found.notes.append(
            f"The default backbone reads {seen.modality}; name the run's by --scenario."
        )
        seen, found.backbone = None, {}
    if seen:
        check_modality(catalogue, seen)
    train, test = (sum(map(len, part)) for part in (share.train, share.test))
    with found.faulting(f"{WHOSE}{name!r}: "):
        check_enough(share.classes, share.labels, test, client=name, config=config)
    checked = check_examples(share, seen, seconds=seconds)
    with found.faulting():
        of = f"{checked.headers} looked at in {catalogue.source}"
        refuse(checked.faults, f"{WHOSE}{name!r}", of, catalogue)
    counts = zip(share.classes, share.train, share.test, strict=True)
    found.clients[name] = {
        "classes": {label: [*map(len, members)] for label, *members in counts},
        **asdict(checked),
        "faults": [checked.faults[index] for index in sorted(checked.faults)],
    }
    drawn = drawn_aside(share.labels, share=config.train.aside, seed=config.seed, client=name)
    rate, shards = checked.read / checked.seconds if checked.read else math.inf, config.data.shards
    if shards > 1:
        needed = needed_for(config.caps.min_images, aside=config.train.aside)
        cap = config.data.images_per_class
        with tempfile.TemporaryDirectory() as folder, found.faulting():
            file = Path(folder) / "map.csv"
            dealt(share, shards, seed=config.seed, cap=cap, needed=needed, file=file)
    aside = int(drawn.sum()) // shards
    return [Amount(train // shards, aside, test, len(share.classes), rate)] * shards


def _compare(estimate: Estimate, output: Path, at_once: int, found: Preflight) -> None:
    """Compare what a run takes with what this machine has free."""
    output = output.absolute()
    near = next(place for place in (output, *output.parents) if place.exists())
    disk, memory = shutil.disk_usage(near).free, available_bytes()
    needed = at_once * estimate.memory
    if estimate.disk > disk:
        found.faults.append(
            f"The run's folder takes about {size(estimate.disk)}, but on the disk of {near} "
            f"{size(disk)} are free. Choose another with --output."
        )
    if 0 < memory < needed:
        found.notes.append(
            f"{at_once} client(s) at a time take about {size(needed)} of memory, but "
            f"{size(memory)} are free."
        )
