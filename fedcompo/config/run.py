"""The settings of a run, parsed from Flower's flat run config into frozen dataclasses.

Each setting is declared once, with its default, a sentence that explains it and the checks it must
pass. Its run-config key is its name with hyphens: ``local_epochs`` is ``local-epochs``. The
defaults in ``pyproject.toml`` are the same (a test compares them). A preset is a second set of
defaults, which :meth:`RunConfig.parse` puts in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from fedcompo.config.caps import CapsConfig
from fedcompo.config.choices import (
    DEVICE,
    KINDS,
    UNMIXED,
    Action,
    AnchorBy,
    Augmentation,
    Curvature,
    HeadStart,
    Method,
    Penalty,
    Precision,
    Preset,
    Schedule,
    Statistics,
)
from fedcompo.config.data import DataConfig
from fedcompo.config.presets import LATER, from_older, without_preset
from fedcompo.config.server import ComposeConfig, RegistryConfig, ServerConfig
from fedcompo.config.setting import FRACTION, NOT_NEGATIVE, POSITIVE, Scalar, check_all, setting
from fedcompo.errors import ConfigError


@dataclass(frozen=True)
class BackboneConfig:
    """The pre-trained weights that all clients share, and which of them are adapted."""

    backbone: str = setting("embedded", "embedded, timm's name, local-dir:<path>, hf-hub:<name>.")
    checkpoint: str = setting(
        "", "Weights on disk (.safetensors, .pth, .npz); empty: from the hub, if not embedded."
    )
    image_size: int = setting(0, "Side of the input in pixels; 0: the model's own.", NOT_NEGATIVE)
    channels: int = setting(0, "Channels of the input; 0: the model's own.", NOT_NEGATIVE)
    target_weights: str = setting(
        "blocks.*.attn.qkv.weight,blocks.*.attn.proj.weight,"
        "blocks.*.mlp.fc1.weight,blocks.*.mlp.fc2.weight",
        "Shell patterns, joined by commas, of the weights that get a delta.",
        (lambda value: bool(value.strip(", ")), "must name at least one pattern"),
    )


@dataclass(frozen=True)
class MethodConfig:
    """How the clients train towards one model."""

    method: Method = setting(
        Method.ITA,
        "ita (each trains alone), iel (rounds inside the sum); fedavg, fedprox: baselines.",
    )
    schedule: Schedule = setting(
        Schedule.PARALLEL,
        "parallel, or sequential: one client after the other, in the order of names; those before "
        "stay as they are.",
    )
    num_server_rounds: int = setting(
        5, "iel, fedavg, fedprox: rounds, of `local-epochs` each.", POSITIVE
    )
    beta: float = setting(
        0.0, "iel: strength of the ensemble penalty, in the unit of `alpha`.", NOT_NEGATIVE
    )
    proximal_mu: float = setting(
        0.01, "fedprox: pull of a client's weights to the round's average.", NOT_NEGATIVE
    )

    def check_shards(self, shards: int) -> None:
        """Raise ``ConfigError`` if clients have shards, but cannot train them in this way."""
        apart = self.method in (Method.ITA, Method.IEL) and self.schedule is Schedule.PARALLEL
        if shards > 1 and not apart:
            raise ConfigError(
                f"`shards` is {shards}, but `method` = {self.method} with `schedule` = "
                f"{self.schedule} trains clients as a whole: set `shards` to 1, or train by ita or "
                "iel in parallel."
            )


@dataclass(frozen=True)
class HeadConfig:
    """Feature statistics, the linear probe and the joint head."""

    statistics: Statistics = setting(
        Statistics.SUMS,
        "What describes a client's features: sums (closed-form head), or mixtures (drawn from).",
    )
    mixture_components: int = setting(5, "mixtures: Gaussians a class, at most.", POSITIVE)
    align_samples: int = setting(
        256, "mixtures: features a class drawn to align the joint head.", POSITIVE
    )
    ridge: float = setting(0.001, "Pull of a head's fit to where it starts.", NOT_NEGATIVE)


@dataclass(frozen=True)
class FisherConfig:
    """How each client estimates its Fisher diagonal."""

    curvature: Curvature = setting(
        Curvature.FEATURES,
        "Fisher of what: features (one pass, needs no head), exact or monte-carlo (of the class "
        "probabilities under the head that training starts from).",
    )
    fisher_samples: int = setting(4, "monte-carlo: labels drawn an example.", POSITIVE)
    fisher_batch: int = setting(32, "Images at a time; bounds the memory.", POSITIVE)
    fisher_examples: int = setting(
        0, "Use at most this many examples, drawn by seed; 0: all.", NOT_NEGATIVE
    )


@dataclass(frozen=True)
class TrainConfig:
    """How a client fits its task vector."""

    kind: str = setting(
        "lora",
        "full, lora, ia3 or tangent; several (without tangent), joined by commas: dealt in turn.",
        KINDS,
        UNMIXED,
    )
    rank: int = setting(8, "lora: rank; a fused qkv gets three times as much.", POSITIVE)
    head_start: HeadStart = setting(
        HeadStart.ZERO,
        "Head that training starts from: zero, aligned (joint, made of all clients' statistics) or "
        "probe (own).",
    )
    anchor: AnchorBy = setting(
        AnchorBy.OTHERS,
        "Whose Fisher anchors a client: others, own or reference (a file). own or reference with "
        "head-start zero or probe is lineage-free: nobody trains with anything of another.",
    )
    reference: str = setting("", "File of the reference Fisher; `fedcompo fisher` makes one.")
    trust_region: float = setting(
        0.3,
        "implicit: how far a client may go: bound on ½ τᵀF̄τ, the change of the anchoring images' "
        "features in units of its own features' variance (of class probabilities: in nats); 0: "
        "none.",
        NOT_NEGATIVE,
    )
    alpha: float = setting(
        0.0,
        "Strength of an anchor that pulls all the time. implicit: in e-foldings, how often "
        "training shrinks a weight of mean Fisher by e; else the paper's, on the Fisher's scale.",
        NOT_NEGATIVE,
    )
    target_logit: float = setting(
        15.0, "tangent: what the logit of the true class is fitted to, the others to 0.", POSITIVE
    )
    penalty: Penalty = setting(
        Penalty.IMPLICIT, "How the anchor acts: implicit, explicit (both decoupled) or coupled."
    )
    penalty_every: int = setting(
        4, "implicit: optimiser steps a proximal step makes up for.", POSITIVE
    )
    local_epochs: int = setting(5, "Passes over a client's data.", POSITIVE)
    local_steps: int = setting(
        100,
        "Optimiser steps at least: with few images in smaller batches, down to 8, then in more "
        "passes; 0: no floor.",
        NOT_NEGATIVE,
    )
    aside: float = setting(
        0.1,
        "Share of each class kept aside from training, to choose `scale = auto` on; 0 where "
        "`scale` is a number.",
        FRACTION,
    )
    batch_size: int = setting(32, "Images a step, at most.", POSITIVE)
    micro_batch: int = setting(0, "Images at a time, to save memory; 0: all.", NOT_NEGATIVE)
    checkpoint_blocks: bool = setting(False, "Run blocks twice, to save memory; not of tangents.")
    learning_rate: float = setting(
        0.0,
        "AdamW's peak step size (cosine); 0: by kind (lora 0.002, full 0.0003, ia3 0.01), in "
        "proportion to a weight's size.",
        NOT_NEGATIVE,
    )
    weight_decay: float = setting(
        0.0, "AdamW's weight decay of the delta; not of (IA)³.", NOT_NEGATIVE
    )
    augmentation: Augmentation = setting(
        Augmentation.AUTO,
        "auto (crop; of texts, none), none, shift, crop or crop-flip (mirrors half: not for "
        "characters or signs).",
    )
    precision: Precision = setting(Precision.AUTO, "auto (bfloat16 on a GPU), float32, bfloat16.")

    @property
    def held(self) -> bool:
        """Whether a Fisher holds a client that trains alone: by an anchor, or a trust region."""
        return self.alpha > 0 or self.bounded

    @property
    def bounded(self) -> bool:
        """Whether there is a trust region."""
        return self.trust_region > 0 and self.penalty is Penalty.IMPLICIT


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, checked."""

    output: str = setting("", "Folder of the results; taken relative to where you stand.")
    seed: int = setting(0, "Seed of everything drawn at random.", NOT_NEGATIVE)
    preset: Preset = setting(
        Preset.DEFAULT,
        "Defaults that a run starts from: default, or paper (the published protocol and its "
        "values); once checked, every setting has its value and this is default.",
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:<n>.", DEVICE)
    keep_cache: bool = setting(
        False,
        "Keep decoded images on the client's disk for later runs; else the run deletes them.",
    )
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    method: MethodConfig = MethodConfig()
    head: HeadConfig = HeadConfig()
    fisher: FisherConfig = FisherConfig()
    train: TrainConfig = TrainConfig()
    caps: CapsConfig = CapsConfig()
    compose: ComposeConfig = ComposeConfig()
    server: ServerConfig = ServerConfig()
    registry: RegistryConfig = RegistryConfig()

    @classmethod
    def parse(cls, values: Mapping[str, Scalar]) -> RunConfig:
        """Check a flat run config.

        Args:
            values: Scalars by run-config key (kebab-case); a missing setting keeps its default.
                Flower fills them up with the defaults. So under a preset, a setting that is at its
                default takes the preset's value.

        Raises:
            ConfigError: With *all* faults: unknown keys (and the nearest known one), wrong types,
                values out of range, values that contradict each other.
        """
        known = all_settings()
        needed = ("reference", "anchor", AnchorBy.REFERENCE), ("client", "action", Action.REMOVE)
        parsed = check_all(known, without_preset(values, known), needed)
        sections = {
            section: kind(**{f.name: parsed.pop(f.name) for f in fields(kind) if f.name in parsed})
            for section, kind in SECTIONS.items()
        }
        config = cls(**sections, **parsed)
        config.method.check_shards(config.data.shards)
        if config.compose.fixed_scale is None:
            return config
        return replace(config, train=replace(config.train, aside=0.0))  # there is nothing to choose

    def flat(self) -> dict[str, Scalar]:
        """Return the settings as a flat run config: kebab-case keys, plain scalars."""
        owners = [self, *(getattr(self, section) for section in SECTIONS)]
        values = {
            _key(f): getattr(own, f.name) for own in owners for f in fields(own) if f.metadata
        }
        return {key: str(v) if isinstance(v, StrEnum) else v for key, v in values.items()}

    @classmethod
    def stored(cls, values: Mapping[str, Scalar]) -> RunConfig:
        """Check settings that were stored with a contribution, perhaps by an older version.

        What the older version had no setting for keeps the value that it worked by. Raises as
        :meth:`parse` does.
        """
        return cls.parse(from_older(values))

    def of_client(self) -> dict[str, Scalar]:
        """Return the settings that are stored with a contribution: those that can change it."""
        for_server = fields(ComposeConfig) + fields(ServerConfig) + fields(RegistryConfig)
        apart = {"output", "preset", "keep-cache", *map(_key, for_server)}
        own = self.flat().items()
        return {key: v for key, v in own if key not in apart and v != LATER.get(key)}


SECTIONS: dict[str, Any] = {
    f.name: type(f.default) for f in fields(RunConfig) if "help" not in f.metadata
}


def all_settings() -> dict[str, Field[Any]]:
    """Return every setting by its run-config key, in the order of :class:`RunConfig`."""
    declared = [f for kind in (RunConfig, *SECTIONS.values()) for f in fields(kind)]
    return {_key(f): f for f in declared if "help" in f.metadata}


def _key(declared: Field[Any]) -> str:
    return declared.name.replace("_", "-")
