"""ITA, in parallel: features → align → fisher → train → compose → realign → evaluate.

Every client trains alone, held near the pre-trained weights by a Fisher diagonal (see
:mod:`server.anchors`); the server adds up what comes back. It holds no data: statistics, sums and
task vectors are all it sees. What they add up to lives in a registry: a new one, or one whose
members the clients of this run join.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from logging import INFO
from pathlib import Path

from flwr.common.logger import log

from fedcompo.backbone import Backbone
from fedcompo.config import RunConfig
from fedcompo.registry import Registry
from server import composing, fitting
from server.composing import Composing
from server.exchange import Exchange
from server.fitting import Fitting

PHASES = (*fitting.PHASES, *composing.PHASES)
INCOMING = "incoming"


@dataclass
class ItaStrategy:
    """One run: contributions are fitted, then composed."""

    exchange: Exchange
    config: RunConfig
    backbone: Backbone
    registry: Registry
    output: Path

    def __post_init__(self) -> None:
        """Refuse a reference Fisher that cannot be used, before any client is asked."""
        self.fitting = Fitting(
            self.exchange, self.config, self.backbone, self.registry, self.output / INCOMING
        )
        self.composing = Composing(self.exchange, self.backbone, self.registry)

    def run(self) -> None:
        """Do all phases; afterwards both halves hold what there is to report."""
        self.fitting.run()
        self.exchange.timed("compose", self.compose)
        if self.config.compose.realign:
            self.composing.realign()
        self.composing.evaluate()

    def compose(self) -> None:
        """Add the contributions to the registry, which adds them up; they then live there alone."""
        fitting = self.fitting
        folders = [fitting.folder(client) for client in fitting.trained]
        self.registry.add(
            *folders,
            replacing=self.config.registry.replace,
            on_step=lambda step: log(INFO, "registry: %s", step),
        )
        shutil.rmtree(fitting.contributions)
        self.composing.compare(fitting.anchors.total)
