"""Settings of the data: which images, and how they are dealt to the clients."""

from __future__ import annotations

from dataclasses import dataclass

from fedcompo.config.setting import NOT_NEGATIVE, POSITIVE, Check, setting
from fedcompo.errors import ConfigError

CLASSES, IID, DIRICHLET, COLUMN = "classes", "iid", "dirichlet", "column"
"""Values of ``partition``, or how they begin."""
MOST_SHARDS = 1000
"""Of one client: each is a member, with a request and an answer in every phase."""


def _is_partition(value: str) -> bool:
    rule, _, option = value.partition(":")
    if rule == COLUMN:
        return bool(option.strip())
    if rule != DIRICHLET:
        return value in (CLASSES, IID)
    try:
        return 0 < float(option) < float("inf")
    except ValueError:
        return False


PARTITION: Check = (
    _is_partition,
    "must be classes, iid, dirichlet:<alpha> with a number > 0, or column:<name>",
)


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are dealt to the clients."""

    data: str = setting(
        "digits",
        "digits, folder:<path> (of clients' folders, or of class folders), manifest:<path> (CSV or "
        "Parquet), npz:<path>, text:<path>, hf:<name or folder> (Hugging Face) or cifar100.",
    )
    num_tasks: int = setting(
        5,
        "Parts that data without clients is cut into: a client each; with `clients-per-task`, a "
        "task each.",
        POSITIVE,
    )
    partition: str = setting(
        CLASSES,
        "How it is cut: classes (each belongs to one part), iid, dirichlet:<alpha> (clients share "
        "classes; the smaller alpha, the less evenly) or column:<name> (a part for each value).",
        PARTITION,
    )
    clients_per_task: int = setting(
        0,
        "Cut the classes into `num-tasks` tasks, and each task by `partition` among this many "
        "clients, members <client>.task-<number>; `schedule = sequential`: task after task. 0: "
        "none.",
        NOT_NEGATIVE,
    )
    num_classes: int = setting(0, "Keep this many classes, drawn by seed; 0: all.", NOT_NEGATIVE)
    images_per_class: int = setting(
        0, "Keep at most this many training images a class; 0: all.", NOT_NEGATIVE
    )

    shards: int = setting(
        1,
        "Parts of each client's training images, each a member <client>.shard-<number> with a task "
        "vector of its own, which can leave alone; 1: the client is one member.",
        (lambda value: 1 <= value <= MOST_SHARDS, f"must be from 1 to {MOST_SHARDS}"),
    )

    def __post_init__(self) -> None:
        """Refuse clients that share tasks without a rule by which they do."""
        if self.clients_per_task and self.rule not in (IID, DIRICHLET):
            raise ConfigError(
                f"`clients-per-task` is {self.clients_per_task}, but `partition` is "
                f"{self.partition!r}: clients share the images of a task by `partition = iid` or "
                "`dirichlet:<alpha>`."
            )

    @property
    def rule(self) -> str:
        """The first word of ``partition``."""
        return self.partition.partition(":")[0]

    @property
    def option(self) -> str:
        """What follows it: the alpha, or the column's name."""
        return self.partition.partition(":")[2].strip()
