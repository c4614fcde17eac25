r"""Does a model forget a client that is taken out of it? What of that can be measured.

Three models are compared:

- *before*: the composition of everyone;
- *after*: the composition without the client, bit for bit what a removal leaves;
- *gold*, where there is one: the composition of a run that the client never took part in.

A removal cannot take back what the client's Fisher or statistics did to the training of others;
before, after and gold show how much of it can be seen. Two things are measured on each.

**Accuracy**, on the removed client's test images and on those of everyone who stays. After the
removal the joint head has no rows of the client's classes, unless others share them: its class-IL
accuracy is then 0 by construction, and its task-IL accuracy is measured with the rows that an
attacker kept.

**Membership inference**: can one tell the client's training images from its test images? The
attacker is a strong one, who kept the joint head of the model before (that of the model after has
no rows to attack) and puts it on the backbone before, after and gold: only the backbone differs.
That head is fitted to mixtures of the client's training features, a few Gaussians a class, so it
can carry a little membership by itself, whatever backbone it sits on. The loss attack sees that
too; gold, a backbone that never met the client, shows how much it is. The likelihood-ratio attack
compares with shadows under the same head (:mod:`fedcompo.shadows`): what the head alone tells
stands on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fedcompo.audited_models import (
    AFTER,
    BEFORE,
    AuditedModel,
    audited_models,
    check_gold,
    distances_to_gold,
)
from fedcompo.backbone import Backbone
from fedcompo.config import RunConfig
from fedcompo.contribution import Contribution
from fedcompo.data import ClientData
from fedcompo.device import pick_device
from fedcompo.errors import ContributionError, DataError
from fedcompo.evaluation import clients_data
from fedcompo.features import extract_features
from fedcompo.heads import Head
from fedcompo.membership import Attack, confidence, likelihood_ratio_attack, loss_attack, losses
from fedcompo.registry import Registry
from fedcompo.shadows import ClientTraining, ShadowModels, check_count, logits_of, train_shadows

FORMAT_VERSION = 1
LOSS, LIKELIHOOD_RATIO = "loss", "likelihood-ratio"
CLASS_IL, TASK_IL = "class_il_accuracy", "task_il_accuracy"
FIGURES = (CLASS_IL, TASK_IL)
SHADOWS = 16
"""Shadow models, unless told otherwise."""

OnStep = Callable[[str], None]
Values = dict[str, Any]


def audit(
    registry: Registry,
    client: str,
    *,
    data: str = "",
    gold: Registry | None = None,
    shadows: int = SHADOWS,
    seed: int = 0,
    on_step: OnStep = lambda step: None,
) -> Values:
    """Measure what a removal would make a registry's model forget; changes nothing in it.

    Args:
        registry: Still has the client.
        client: Who is to be removed.
        data: Source of the clients' images; empty: that of their run.
        gold: Registry of the same run without the client.
        shadows: Number of shadow models, even, at least 4.
        seed: Seed of shadows and bootstrap.
        on_step: Told what is being done.

    Returns:
        JSON values; accuracies are fractions in [0, 1]. ``accuracy`` by whose images (``removed``,
        the mean of ``remaining``, and ``per_client``) and by model; ``membership`` by attack and by
        model.

    Raises:
        ContributionError: If there is no such client, it is the only one, or a Fisher is missing.
        ConfigError: If the gold registry is not of the same run, or settings cannot be used.
        BackboneMismatch: If it is of another backbone.
        DataError: If the images are not at hand, or not those that the client was trained on.
    """
    check_count(shadows)
    contribution = registry.contribution(client)
    remaining = tuple(name for name in registry.clients if name != client)
    if not remaining:
        raise ContributionError(
            f"{client} is alone in the registry: after its removal there is no model to audit."
        )
    config = RunConfig.parse({**contribution.settings, **({"data": data} if data else {})})
    if gold is not None:
        check_gold(registry, gold, client)
    on_step("reading backbone and images")
    backbone = registry.backbone.load(pick_device(config.device))
    images = _images_of(contribution, backbone, config)
    on_step("composing")
    models = audited_models(registry, client, gold)
    training = ClientTraining.of(registry, client, backbone)
    everyone = clients_data(config.data, backbone, seed=config.seed, wanted=remaining)
    per_client = {client: _accuracies(backbone, models, images, kept=models[BEFORE].head)}
    for other in everyone:
        on_step(f"accuracy on the images of {other.name}")
        per_client[other.name] = _accuracies(backbone, models, other)
    shadow_models = train_shadows(
        registry, training, images, models[BEFORE].head, count=shadows, seed=seed, on_step=on_step
    )
    on_step("attacking")
    membership = _attacks(backbone, models, images, shadow_models, seed=seed)
    values: Values = {
        "format_version": FORMAT_VERSION,
        "fedcompo_version": version("fedcompo"),
        "client": client,
        "remaining": list(remaining),
        "base": registry.state.base,
        "root": registry.state.root,
        "gold_root": gold.state.root if gold else None,
        "data": config.data.data,
        "seed": seed,
        "shadows": shadows,
        "images": {
            "members": len(images.train.labels),
            "non_members": len(images.test.labels),
        },
        "influence": asdict(registry.influence_of(client)),
        "models": {name: _about(model, images.classes) for name, model in models.items()},
        "distance_to_gold": distances_to_gold(models),
        "accuracy": {
            "removed": per_client[client],
            "remaining": _means(per_client, without=client),
            "per_client": per_client,
        },
        "membership": membership,
        "settings": dict(contribution.settings),
    }
    return {**values, "notes": _notes(values, models, images)}


def _images_of(contribution: Contribution, backbone: Backbone, config: RunConfig) -> ClientData:
    """The client's images; those it calls its training images must be those it trained on."""
    client, source = contribution.client, config.data.data
    found = next(
        clients_data(config.data, backbone, seed=config.seed, wanted=(client,)),
        None,
    )
    if found is None:
        raise DataError(
            f"`data` {source!r} has no client {client!r}, whose images the audit needs. "
            "Name the source of the run with `--data`."
        )
    counts = torch.bincount(found.train.labels, minlength=len(found.classes)).tolist()
    trained_on = {name: mixture.num_examples for name, mixture in contribution.features.items()}
    at_hand = dict(zip(found.classes, counts, strict=True))
    if at_hand != trained_on:
        raise DataError(
            f"The training images of {client} in {source!r} are {at_hand}, by class, but it was "
            f"trained on {trained_on}. Name the images it was trained on with `--data`."
        )
    return found


def _accuracies(
    backbone: Backbone,
    models: Mapping[str, AuditedModel],
    data: ClientData,
    *,
    kept: Head | None = None,
) -> Values:
    """Accuracy on a client's test images, by model; task-IL by the rows of ``kept``, if given."""
    classes, labels = data.classes, data.test.labels
    figures: Values = {}
    for name, model in models.items():
        features = extract_features(backbone.forward(model.theta), data.test.images)
        own = (kept or model.head).rows(classes)
        rows = {known: row for row, known in enumerate(model.head.classes)}
        wanted = torch.tensor([rows.get(known, -1) for known in classes])[labels]
        figures[name] = {
            CLASS_IL: _share(model.head(features).argmax(1) == wanted),
            TASK_IL: _share(own(features).argmax(1) == labels),
            "num_examples": len(labels),
        }
    return figures


def _attacks(
    backbone: Backbone,
    models: Mapping[str, AuditedModel],
    data: ClientData,
    shadows: ShadowModels,
    *,
    seed: int,
) -> Values:
    """Both attacks on each model's backbone, always under the joint head of the model before."""
    total = len(data.train.labels) + len(data.test.labels)
    is_member = torch.arange(total) < len(data.train.labels)
    found: Values = {LOSS: {}, LIKELIHOOD_RATIO: {}}
    for name, model in models.items():
        logits, labels = logits_of(backbone, model.theta, models[BEFORE].head, data)
        loss, phi = losses(logits, labels), confidence(logits, labels)
        found[LOSS][name] = _figures(loss_attack(loss[is_member], loss[~is_member], seed=seed))
        found[LIKELIHOOD_RATIO][name] = _figures(
            likelihood_ratio_attack(phi, shadows.phi, shadows.trained_on, is_member, seed=seed)
        )
    return found


def _figures(attack: Attack) -> Values:
    return {
        "auc": asdict(attack.auc),
        "tpr": {f"{rate:g}": asdict(estimate) for rate, estimate in attack.tpr.items()},
        "is_chance": attack.is_chance(),
    }


def _means(per_client: Mapping[str, Values], *, without: str) -> Values:
    """Mean over the clients that stay, by model; empty where nobody's images are at hand."""
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


def _notes(values: Values, models: Mapping[str, AuditedModel], images: ClientData) -> list[str]:
    """What a reader must know of these figures, and cannot see from them."""
    client, after = values["client"], models[AFTER]
    gone = [name for name in images.classes if name not in after.head.classes]
    notes = []
    if gone:
        notes.append(
            f"After the removal the joint head has no rows of {', '.join(gone)}, so class-IL on "
            f"images of {client} is 0 there by construction. Its task-IL is measured on every "
            "backbone with the rows of the model before, as an attacker may have kept them."
        )
    if len({model.realigned for model in models.values()}) > 1:
        realigned = ", ".join(name for name, model in models.items() if model.realigned)
        notes.append(
            f"Joint heads differ in how they were fitted: {realigned} on features of the composed "
            "model, the others on pre-trained features. Part of a difference in accuracy is theirs."
        )
    missing = sorted(set(values["remaining"]) - set(values["accuracy"]["per_client"]))
    if missing:
        notes.append(f"No images were at hand of {', '.join(missing)}.")
    if not next(iter(values["membership"][LOSS].values()))["tpr"]:
        notes.append(
            f"{values['images']['non_members']} non-members are too few for a true-positive rate "
            "at a low false-positive rate."
        )
    return notes
