r"""Measures whether a model forgets a client that is removed from it.

Up to five models are compared:

- *before*: the composition of everyone;
- *after*: the composition without the client, bit for bit what a removal leaves; without the last
  member, the pre-trained weights;
- *gold*, where there is one: the composition of a run that the client never took part in;
- *repaired*, where there is one: *after*, when those who stay have trained on;
- *frozen*: the pre-trained weights, for the measures that need no head.

A removal cannot take back what the client's Fisher or statistics did to the training of others;
before, after and gold show how much of it can be seen. Measured are:

**Accuracy**, on the removed client's test images and on those of everyone who stays. After the
removal the joint head has no rows of the client's classes, unless others share them: its class-IL
accuracy is then 0 by construction, and its task-IL accuracy is measured with the rows that an
attacker kept.

**Membership inference**: can one tell the client's training images from its test images? The
attacker is a strong one, who kept the joint head of the model before (that of the model after has
no rows to attack) and puts it on every backbone: only the backbone differs. That head is made of
statistics of the client's training features, so it can carry a little membership by itself,
whatever backbone it sits on. The loss attack sees that too; gold, a backbone that never met the
client, shows how much it is. The likelihood-ratio attack compares with shadows under the same head
(:mod:`fedcompo.audit.shadows`): what the head alone tells stands on both sides. All shadows hold a
task vector of the client, so backbones after and gold lie beside them: there the attack is weaker
than before, and best read next to gold.

**Features** (:mod:`fedcompo.audit.forgetting`): how fast a linear probe learns the client's task
again, and how alike the models represent the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fedcompo.audit.estimates import Estimate
from fedcompo.audit.evaluation import clients_data
from fedcompo.audit.forgetting import probe_accuracy, similarity
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
)
from fedcompo.audit.shadows import ClientTraining, check_count, train_shadows
from fedcompo.audit.verdicts import verdicts
from fedcompo.backbone.backbone import Backbone
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData
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
"""Default number of shadow models."""

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
        JSON values; accuracies are fractions in [0, 1]. ``accuracy`` by whose images (``removed``,
        the mean of ``remaining``, and ``per_client``) and by model; ``membership`` by attack and by
        model; ``probe`` by model and by images a class; ``similarity`` by whose images and by pair
        of models; ``beyond_gold`` and ``resurfacing``, differences after − gold and repaired −
        after; ``verdicts``, sentences.

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
    audited = _Audited.of(registry, client, data, audited_models(registry, client, gold, repaired))
    own = audited.features(all_images(audited.images)[0])
    attacks = audited.membership(own, shadows, seed)
    accuracy, others = audited.accuracy(own)
    probe, members = audited.probe(own, seed), len(audited.images.train.labels)
    tests = {name: features[members:] for name, features in own.items()}
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
        "membership": _by(attacks, _figures),
        "probe": _by(probe, Estimate.json),
        "similarity": _by(
            {"removed": similarity(tests, seed=seed), "remaining": similarity(others, seed=seed)},
            Estimate.json,
        ),
        "beyond_gold": _difference(attacks, probe, AFTER, GOLD),
        "resurfacing": _difference(attacks, probe, REPAIRED, AFTER),
    }
    return {**values, "verdicts": verdicts(values), "notes": _notes(values, audited)}


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
        images = audited_images(contribution, backbone, config)
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
        return {
            "client": self.client,
            "remaining": list(self.remaining),
            "base": self.registry.state.base,
            "data": self.config.data.data,
            "images": {"members": len(train), "non_members": len(test)},
            "influence": asdict(self.registry.influence_of(self.client)),
            "models": {n: _about(model, self.images.classes) for n, model in self.models.items()},
            "distance_to_gold": distances_to_gold(self.models),
            "settings": dict(self.contribution.settings),
        }

    def features(self, images: Images) -> Features:
        """Features of images under every model, and of the frozen backbone."""
        step("features under every model")
        models = {**self.models, FROZEN: frozen(self.registry)}
        return {name: model.features(self.backbone, images) for name, model in models.items()}

    def accuracy(self, own: Features) -> tuple[Values, Features]:
        """Measure accuracy, by whose images and by model; also the remaining's features.

        Args:
            own: Of all images of the removed client, training images first.
        """
        members = len(self.images.train.labels)
        tests = {name: features[members:] for name, features in own.items()}
        per_client, others = {self.client: self._accuracies(self.images, tests)}, list[Features]()
        staying = clients_data(
            self.config.data, self.backbone, seed=self.config.seed, wanted=self.remaining
        )
        for other in staying if self.remaining else ():
            step(f"accuracy on the images of {other.name}")
            others.append(self.features(other.test.images))
            per_client[other.name] = self._accuracies(other, others[-1])
        values = {
            "removed": per_client[self.client],
            "remaining": _means(per_client, without=self.client),
            "per_client": per_client,
        }
        return values, {name: torch.cat([o[name] for o in others]) for name in own if others}

    def _accuracies(self, data: ClientData, tests: Features) -> Values:
        """Measure accuracy on a client's test images; task-IL of the removed one with kept rows."""
        labels, figures = data.test.labels, {}
        for name, model in self.models.items():
            own = (self.kept if data.name == self.client else model.head).rows(data.classes)
            rows = {known: row for row, known in enumerate(model.head.classes)}
            wanted = torch.tensor([rows.get(known, -1) for known in data.classes])[labels]
            taken = model.head(tests[name]).argmax(1) if rows else torch.full_like(wanted, -2)
            figures[name] = {
                CLASS_IL: _share(taken == wanted),
                TASK_IL: _share(own(tests[name]).argmax(1) == labels),
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

    def probe(self, own: Features, seed: int) -> dict[str, dict[str, Estimate]]:
        """Fit probes to each model's features of the client; none for a single class."""
        if len(self.images.classes) == 1:
            return {}
        train, test, members = self.images.train, self.images.test, len(self.images.train.labels)
        step("fitting linear probes")
        return {
            name: probe_accuracy(
                (features[:members], train.labels), (features[members:], test.labels), seed=seed
            )
            for name, features in ((name, own[name]) for name in (FROZEN, *self.models))
        }


def _by(nested: Mapping[str, Mapping[str, Any]], as_json: Callable[[Any], Any]) -> Values:
    """Turn the values of a table into JSON values."""
    return {k: {n: as_json(v) for n, v in inner.items()} for k, inner in nested.items()}


def _figures(attack: Attack) -> Values:
    return {
        "auc": attack.auc.json(),
        "tpr": {f"{rate:g}": estimate.json() for rate, estimate in attack.tpr.items()},
        "is_chance": attack.is_chance(),
    }


def _difference(
    attacks: Mapping[str, Mapping[str, Attack]],
    probe: Mapping[str, Mapping[str, Estimate]],
    first: str,
    second: str,
) -> Values | None:
    """How much better attacks and probe are on the first model; None if one is not there."""
    if not {first, second} <= attacks[LOSS].keys():
        return None
    shots = probe[first] if probe else {}
    return {
        "auc": {name: (own[first].auc - own[second].auc).json() for name, own in attacks.items()},
        "probe": {few: (probe[first][few] - probe[second][few]).json() for few in shots},
    }


def _means(per_client: Mapping[str, Values], *, without: str) -> Values:
    """Mean over the clients that stay, by model; empty if none of their images are at hand."""
    staying = [figures for client, figures in per_client.items() if client != without]
    names = staying[0] if staying else ()
    return {
        name: {key: fmean(figures[name][key] for figures in staying) for key in FIGURES}
        for name in names
    }


def _about(model: AuditedModel, classes: Iterable[str]) -> Values:
    return {
        "clients": list(model.clients),
        "joint_head": "realigned" if model.realigned else "aligned",
        "rows_of_client": [name for name in classes if name in model.head.classes],
    }


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _notes(values: Values, audited: _Audited) -> list[str]:
    """List what a reader must know to read these figures."""
    models, left = audited.models, values["models"][AFTER]["rows_of_client"]
    gone = [name for name in audited.images.classes if name not in left]
    notes = []
    if gone:
        notes.append(
            f"After the removal the joint head has no rows of {', '.join(gone)}, so among "
            f"all classes no image of {audited.client} is right there, by construction. Among its "
            "own classes it is measured on every backbone with the rows of the model before, as an "
            "attacker may have kept them."
        )
    if len({model.realigned for model in models.values()}) > 1:
        realigned = ", ".join(name for name, model in models.items() if model.realigned)
        notes.append(
            f"Joint heads differ in what they were made of: {realigned} of features of the "
            "composed model, the rest of pre-trained features. Part of a difference in accuracy is "
            "theirs."
        )
    missing = sorted(set(audited.remaining) - set(values["accuracy"]["per_client"]))
    if missing:
        notes.append(f"No images were at hand of {', '.join(missing)}.")
    if not values["membership"][LOSS][BEFORE]["tpr"]:
        notes.append(
            f"{values['images']['non_members']} non-members are too few for a true-positive rate "
            "at a low false-positive rate."
        )
    return notes
