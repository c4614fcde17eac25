"""Settings of the server alone; none of them changes what a client computes."""

from __future__ import annotations

from dataclasses import dataclass

from fedcompo.config.choices import AUTO, ROUNDS, SCALE, TRACKERS, Action, Coefficients
from fedcompo.config.setting import NAMES, NOT_NEGATIVE, POSITIVE, setting


@dataclass(frozen=True)
class ComposeConfig:
    """How the task vectors are added up."""

    rule: str = setting(
        "mean",
        "How task vectors become one: mean, norm-preserving, task-arithmetic, ties, dare, iso-c, "
        "tsv-m, fisher or regmean, with options as in ties:density=0.2; a registry keeps its rule.",
    )
    coefficients: Coefficients = setting(
        Coefficients.UNIFORM, "uniform, or in proportion to each client's examples."
    )
    scale: str = setting(
        "auto",
        "λ, the factor on the weighted mean of the task vectors, or on what the rule makes in its "
        "place: a number, or auto: the clients choose it, on images that they did not train on.",
        SCALE,
        numeric=True,
    )
    max_count_ratio: float = setting(
        1.5,
        "Let a client weigh by no more images (of a class; in all) than this many times the usual "
        "number, whatever it claims; 0: by all.",
        NOT_NEGATIVE,
    )
    realign: bool = setting(True, "Align the joint head again on features of the composed model.")

    @property
    def fixed_scale(self) -> float | None:
        """λ as a number; None: it is chosen."""
        return None if self.scale == AUTO else float(self.scale)


@dataclass(frozen=True)
class ServerConfig:
    """How many clients the server waits for, how long, and which it leaves out."""

    num_clients: int = setting(
        0, "Clients to wait for; 0: all that are simulated, or connected.", NOT_NEGATIVE
    )
    min_clients: int = setting(2, "Usable clients below which the run fails.", POSITIVE)
    timeout: float = setting(
        1800.0, "Seconds until clients have connected, and from a request to its answer.", POSITIVE
    )
    in_flight: int = setting(
        0, "Clients that work at a time; 0: all. Bounds what waits to be folded in.", NOT_NEGATIVE
    )
    max_norm_ratio: float = setting(
        0.0, "Refuse a task vector this many times longer than the median; 0: none.", NOT_NEGATIVE
    )
    joins: str = setting(
        "", "iel: who joins in a later round than the first: client-3:2, joined by commas.", ROUNDS
    )
    leaves: str = setting(
        "", "iel: who leaves after a round, and is taken out: client-1:3, joined by commas.", ROUNDS
    )
    resume: bool = setting(
        False, "Go on with the interrupted run in `output`, which was begun with these settings."
    )
    track: str = setting(
        "",
        "Trackers that get the run's figures: tensorboard, mlflow, wandb, joined by commas; each "
        "needs the extra of its name.",
        TRACKERS,
    )
    keep_fisher: bool = setting(True, "Store each client's Fisher with its contribution.")
    exclude: str = setting("", "Clients to leave out, by name, joined by commas.", NAMES)


@dataclass(frozen=True)
class RegistryConfig:
    """Which registry a run opens, and whether it adds clients or removes one."""

    action: Action = setting(
        Action.TRAIN, "train (new clients, who join the registry), or remove (one of its clients)."
    )
    registry: str = setting("", "Folder of the registry; empty: a new one in the output.")
    owners: str = setting(
        "", 'TOML table of the clients that may have a class: cat = ["client-1"]; kept with it.'
    )
    replace: bool = setting(
        False, "train: train clients anew that are in the registry, and replace them there."
    )
    keep_versions: bool = setting(False, "Keep earlier compositions, also those with who left.")
    client: str = setting("", "remove: name of the client to remove.")
    repair_rounds: int = setting(
        0,
        "remove: rounds of iel in which those who stay train on without the client.",
        NOT_NEGATIVE,
    )
    requested_by: str = setting("", "remove: on whose request; stands in the record.")
    reason: str = setting("", "remove: why; stands in the record.")
