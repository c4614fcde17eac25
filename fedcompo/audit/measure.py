"""Measures whether a model forgets a client that is removed from it.

Up to four models are compared: *before*, *after*, and where they are at hand *gold*, the run that
the client never took part in, and *repaired*; for features also the *frozen*, pre-trained weights.
The README of this folder says what each measure shows, and what it cannot.

The attacker kept the joint head of the model before and puts it on every backbone: only the
backbone differs. That head is made of statistics of the client's training features, and can carry
membership by itself; gold shows how much it is. In the likelihood-ratio attack, shadows have the
same head (:mod:`fedcompo.audit.shadows`): what it tells stands on both sides. All shadows hold a
task vector of the client, so after and gold lie beside them: there the attack is weaker than
before, and best read next to gold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fedcompo.audit.estimates import Estimate, as_json
from fedcompo.audit.evaluation import clients_data
from fedcompo.audit.forgetting import probes, similarity
from fedcompo.audit.membership import (
    Attack,
    confidence,
    likelihood_ratio_attack,
    loss_attack,
    losses,
)
from fedcompo.audit.models import (
    AFTER,
    BEFORE,
    FROZEN,
    GOLD,
    REPAIRED,
    AuditedModel,
    all_images,
    audited_images,
    audited_models,
    check_gold,
    check_repaired,
    distances_to_gold,
    frozen,
    map_of,
)
from fedcompo.audit.shadows import ClientTraining, check_count, train_shadows
from fedcompo.audit.verdicts import notes, verdicts
from fedcompo.backbone.backbone import Backbone
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData
from fedcompo.data.shards import maps_beside
from fedcompo.data.tasks import whole_of
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.heads import Head
from fedcompo.method.images import Images
from fedcompo.registry.reader import RegistryReader
from fedcompo.report.progress import step
from fedcompo.runtime import pick_device, version

FORMAT_VERSION = 1
LOSS, LIKELIHOOD_RATIO = "loss", "likelihood-ratio"
CLASS_IL, TASK_IL = "class_il_accuracy", "task_il_accuracy"
FIGURES = (CLASS_IL, TASK_IL)
SHADOWS = 16

Values = dict[str, Any]
Features = dict[str, Tensor]
"""By model, (images, features)."""


def audit(
    registry: RegistryReader,
    client: str,
    *,
    data: str = "",
    gold: RegistryReader | None = None,
    repaired: RegistryReader | None = None,
    shadows: int = SHADOWS,
    seed: int = 0,
) -> Values:
    """Measure what a removal would make a registry's model forget; changes nothing in it.

    Args:
        registry: Still has the client.
        client: Member whose removal is measured.
        data: Source of the clients' images; empty: that of their run.
        gold: Registry of the same run without the client.
        repaired: Copy of the registry from which the client was removed, with rounds of repair.
        shadows: Number of shadow models, even, at least 4.
        seed: Seed of shadows and bootstrap.

    Returns:
        JSON values; accuracies are fractions. ``accuracy`` by whose images and by model;
        ``membership`` by attack and model; ``probe`` by model and images a class; ``similarity`` by
        whose images and pair of models; ``beyond_gold`` and ``resurfacing``, the differences
        after − gold and repaired − after; ``verdicts``, sentences.

    Raises:
        ContributionError: If there is no such client, or a Fisher is missing.
        ConfigError: If another registry is not what it should be, or settings cannot be used.
        BackboneMismatch: If it is of another backbone.
        DataError: If the images are not at hand, or not those that the client was trained on.
    """
    check_count(shadows)
    if gold is not None:
        check_gold(registry, gold, client)
    if repaired is not None:
        check_repaired(registry, repaired, client)
    step("reading backbone and images, composing")
    models = audited_models(registry, client, gold=gold, repaired=repaired)
    audited = _Audited.of(registry, client, data, models)
    own, members = audited.features(all_images(audited.images)[0]), len(audited.images.train.labels)
    tests = {name: features[members:] for name, features in own.items()}
    attacks = audited.membership(own, shadows, seed)
    probe = probes(own, audited.images, seed=seed)
    accuracy, others = audited.accuracy(tests)
    values: Values = {
        "format_version": FORMAT_VERSION,
        "fedcompo_version": version("fedcompo"),
        "root": registry.state.root,
        "gold_root": gold.state.root if gold else None,
        "repaired_root": repaired.state.root if repaired else None,
        "seed": seed,
        "shadows": shadows,
        **audited.about(),
        "accuracy": accuracy,
        "membership": as_json(attacks),
        "probe": as_json(probe),
        "similarity": {
            "removed": as_json(similarity(tests, seed=seed)),
            "remaining": as_json(similarity(others, seed=seed)),
        },
        "beyond_gold": _difference(attacks, probe, AFTER, GOLD),
        "resurfacing": _difference(attacks, probe, REPAIRED, AFTER),
    }
    return {**values, "verdicts": verdicts(values), "notes": notes(values)}


@dataclass(frozen=True)
class _Audited:
    """A client, its images, and the models that are compared."""

    registry: RegistryReader
    contribution: Contribution
    config: RunConfig
    backbone: Backbone
    images: ClientData
    models: Mapping[str, AuditedModel]

    @classmethod
    def of(
        cls, registry: RegistryReader, client: str, data: str, models: Mapping[str, AuditedModel]
    ) -> _Audited:
        contribution = registry.contribution(client)
        if len(known := registry.joint_head().classes) < 2:
            raise ContributionError(
                f"All members have the one class {known[0]!r}, as {client} has: no model can be "
                "more or less confident of its images, so there is nothing to attack."
            )
        config = RunConfig.stored({**contribution.settings, **({"data": data} if data else {})})
        backbone = registry.backbone.load(pick_device(config.device))
        images = audited_images(contribution, backbone, config, maps=maps_beside(registry.path))
        return cls(registry, contribution, config, backbone, images, models)

    @property
    def client(self) -> str:
        return self.contribution.client

    @property
    def remaining(self) -> tuple[str, ...]:
        return tuple(name for name in self.registry.clients if name != self.client)

    @property
    def kept(self) -> Head:
        """The head that the attacker kept: the joint head of the model before."""
        return self.models[BEFORE].head

    def about(self) -> Values:
        train, test = self.images.train.labels, self.images.test.labels
        models = {
            name: {
                "clients": list(model.clients),
                "joint_head": "realigned" if model.realigned else "aligned",
                "rows_of_client": [n for n in self.images.classes if n in model.head.classes],
            }
            for name, model in self.models.items()
        }
        return {
            "client": self.client,
            "remaining": list(self.remaining),
            "base": self.registry.state.base,
            "data": self.config.data.data,
            "classes": list(self.images.classes),
            "images": {"members": len(train), "non_members": len(test)},
            "dealt_anew": self.images.shards is not None
            and not map_of(self.client, self.config, maps_beside(self.registry.path)).is_file(),
            "influence": asdict(self.registry.influence_of(self.client)),
            "models": models,
            "distance_to_gold": distances_to_gold(self.models),
            "settings": dict(self.contribution.settings),
        }

    def features(self, images: Images) -> Features:
        """Features of images under every model, and of the frozen backbone."""
        step("features under every model")
        models = {FROZEN: frozen(self.registry), **self.models}
        return {name: model.features(self.backbone, images) for name, model in models.items()}

    def accuracy(self, tests: Features) -> tuple[Values, Features]:
        """Measure accuracy, by whose images and by model; also return the remaining's features."""
        removed, staying, seen = self._accuracies(self.images, tests), dict[str, Values](), []
        # Shards have the test images of their client, and these are measured once.
        wanted = tuple({*map(whole_of, self.remaining)} - {whole_of(self.client)})
        data, seed = self.config.data, self.config.seed
        others = clients_data(data, self.backbone, seed=seed, wanted=wanted)
        for other in others if wanted else ():
            step(f"accuracy on the images of {other.name}")
            seen.append(self.features(other.test.images))
            staying[other.name] = self._accuracies(other, seen[-1])
        means = {
            name: {key: fmean(own[name][key] for own in staying.values()) for key in FIGURES}
            for name in self.models
            if staying
        }
        per_client = {self.client: removed, **staying}
        values = {"removed": removed, "remaining": means, "per_client": per_client}
        return values, {name: torch.cat([s[name] for s in seen]) for name in tests if seen}

    def _accuracies(self, data: ClientData, tests: Features) -> Values:
        """Measure accuracy on test images; task-IL of the removed client with the kept rows."""
        labels, figures = data.test.labels, {}
        for name, model in self.models.items():
            own = (self.kept if data.name == self.client else model.head).rows(data.classes)
            rows = {known: row for row, known in enumerate(model.head.classes)}
            wanted = torch.tensor([rows.get(known, -1) for known in data.classes])[labels]
            taken = model.head(tests[name]).argmax(1) if rows else torch.full_like(wanted, -2)
            figures[name] = {
                CLASS_IL: float((taken == wanted).double().mean()),
                TASK_IL: float((own(tests[name]).argmax(1) == labels).double().mean()),
                "num_examples": len(labels),
            }
        return figures

    def membership(self, own: Features, shadows: int, seed: int) -> dict[str, dict[str, Attack]]:
        """Run both attacks on each model's backbone, under the head that the attacker kept."""
        training = ClientTraining.of(self.registry, self.client, self.backbone)
        images, kept = self.images, self.kept
        shadow = train_shadows(self.registry, training, images, kept, count=shadows, seed=seed)
        step("attacking")
        attacks: dict[str, dict[str, Attack]] = {LOSS: {}, LIKELIHOOD_RATIO: {}}
        labels = kept.indices(images.classes)[all_images(images)[1]]
        is_member = torch.arange(len(labels)) < len(images.train.labels)
        for name in self.models:
            logits = kept(own[name])
            loss, phi = losses(logits, labels), confidence(logits, labels)
            attacks[LOSS][name] = loss_attack(loss[is_member], loss[~is_member], seed=seed)
            attacks[LIKELIHOOD_RATIO][name] = likelihood_ratio_attack(
                phi, shadow.phi, shadow.trained_on, is_member, seed=seed
            )
        return attacks


def _difference(
    attacks: Mapping[str, Mapping[str, Attack]],
    probe: Mapping[str, Mapping[str, Estimate]],
    first: str,
    second: str,
) -> Values | None:
    """How much better attacks and probe are on the first model; None if one is not there."""
    if not {first, second} <= attacks[LOSS].keys():
        return None
    differences = {
        "auc": {name: own[first].auc - own[second].auc for name, own in attacks.items()},
        "probe": {few: own - probe[second][few] for few, own in probe.get(first, {}).items()},
    }
    return dict(as_json(differences))
