"""Settings of the data: which images, and how they are dealt to the clients."""

from __future__ import annotations

from dataclasses import dataclass

from fedcompo.config.setting import NOT_NEGATIVE, POSITIVE, setting


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are dealt to the clients."""

    data: str = setting(
        "digits",
        "digits, folder:<path> (of clients' folders, or of class folders), manifest:<path> (CSV or "
        "Parquet), npz:<path>, text:<path>, hf:<name or folder> (Hugging Face) or cifar100.",
    )
    num_tasks: int = setting(5, "Class groups a named data set or npz is cut into.", POSITIVE)
    num_classes: int = setting(0, "Keep this many classes, drawn by seed; 0: all.", NOT_NEGATIVE)
    images_per_class: int = setting(
        0, "Keep at most this many training images a class; 0: all.", NOT_NEGATIVE
    )
