"""Values of settings under a preset, and of settings that an older version stored.

A preset is resolved where settings are read: into a value for every setting, and ``preset =
default``. So nothing later asks which preset a run had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field
from typing import Any

from fedcompo.config.choices import Curvature, FisherForm, Penalty, Preset
from fedcompo.config.setting import Scalar

IMPORTED = "imported-"
"""How names begin that say, beside the settings, where an imported model is from."""
STAND_IN = "stand-in"
"""Value of ``imported-statistics`` where a classifier's rows stand for images."""
PAPER: dict[str, Scalar] = {
    "statistics": "mixtures",
    "curvature": "exact",
    "rank": 16,
    "head-start": "aligned",
    "trust-region": 0.0,
    "alpha": 0.02,
    "beta": 20.0,
    "penalty": "explicit",
    "local-epochs": 20,
    "local-steps": 0,
    "aside": 0.0,
    "batch-size": 128,
    "learning-rate": 0.0003,
    "fisher-form": "dense",
    "wire": "float32",
    "augmentation": "crop-flip",
    "scale": "1.0",
    "max-count-ratio": 0.0,
}
"""``preset = paper``: the protocol, and the values published for CIFAR-100 with LoRA.

For full fine-tuning, where ``explicit`` diverges, the paper's is ``coupled``.
"""
OLDER: dict[str, Scalar] = {
    "statistics": "mixtures",
    "curvature": "exact",
    "head-start": "aligned",
    "augmentation": "none",
    "trust-region": 0.0,
    "local-steps": 0,
    "aside": 0.0,
    "fisher-form": "dense",
    "max-count-ratio": 0.0,
}
"""How a contribution was made that was stored before it said ``statistics``."""
OBSOLETE = ("fisher", "fisher-tolerance", "head-alpha", "head-decay")
"""Settings that such a contribution may name, and that are no more."""
LATER: dict[str, Scalar] = {
    "partition": "classes",
    "clients-per-task": 0,
    "shards": 1,
    "micro-batch": 0,
    "checkpoint-blocks": False,
}
"""Settings that came later, with values at which they change nothing: then they are not stored."""


def with_preset(explicit: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Put the values of the preset under settings that were given explicitly, which win."""
    if explicit.get("preset") != Preset.PAPER:
        return dict(explicit)
    return {**PAPER, **explicit, "preset": str(Preset.DEFAULT)}


def without_preset(
    values: Mapping[str, Scalar], known: Mapping[str, Field[Any]]
) -> dict[str, Scalar]:
    """Resolve the preset of settings that Flower filled up with the defaults.

    What is explicit cannot be told any more. A setting counts as given if it differs from its
    default.
    """
    if values.get("preset") != Preset.PAPER:
        return dict(values)
    return with_preset(
        {
            key: value
            for key, value in values.items()
            if key not in known
            or isinstance(value, bool)  # equals a number in Python
            or value != known[key].default
        }
    )


def from_older(stored: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Translate settings that were stored with a contribution; newer ones stay as they are.

    What says where an imported model is from goes: it is no setting.
    """
    stored = {key: value for key, value in stored.items() if not key.startswith(IMPORTED)}
    if "statistics" in stored:
        return dict(stored)
    kept = {key: value for key, value in stored.items() if key not in OBSOLETE}
    if stored.get("fisher") == Curvature.MONTE_CARLO:
        kept["curvature"] = str(Curvature.MONTE_CARLO)
    if stored.get("penalty") == Penalty.IMPLICIT:  # now in e-foldings, then as still with explicit
        kept["penalty"] = str(Penalty.EXPLICIT)
    if stored.get("fisher-form") == "head":
        kept["fisher-form"] = str(FisherForm.NONE)
    return OLDER | kept
