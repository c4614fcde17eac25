"""One client's part in choosing and measuring the composed model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from torch import Tensor

from clients.local import LocalClient
from fedcompo.backbone.tangent import feature_map
from fedcompo.composition.voting import Votes
from fedcompo.data.cache import forget
from fedcompo.data.client_data import Split
from fedcompo.errors import ConfigError
from fedcompo.messages.answers import EvaluateAnswer, RealignAnswer, VoteAnswer
from fedcompo.messages.requests import EvaluateRequest, RealignRequest, VoteRequest
from fedcompo.method.deltas import Weights
from fedcompo.method.features import extract_features
from fedcompo.training.accuracy import accuracies_of


def realign(client: LocalClient, request: RealignRequest) -> RealignAnswer:
    """Describe the client's images by the features of composed models.

    Raises:
        ConfigError: If several are asked for under noise: each is a release of its own.
    """
    if client.config.caps.dp_noise > 0 and len(request.factors) > 1:
        raise ConfigError.public(
            f"This node sends statistics under noise (`dp-noise`), of one model and not of "
            f"{len(request.factors)}. Set `scale` to a number."
        )
    results = [
        client.statistics(
            client.split[0] if request.vote else client.data.train,
            theta,
            form=request.form,
            purpose=RealignAnswer.CONTENT,
            linearised=request.linearised,
        )
        for theta in _models(client, request)
    ]
    statistics, caps = tuple(own for own, _ in results), results[0][1]
    return RealignAnswer(**client.who(), statistics=statistics, caps=caps)


def vote(client: LocalClient, request: VoteRequest) -> VoteAnswer:
    """Measure each model under a head of its own, on the images kept aside from training.

    A client with fewer of them than ``min-images`` abstains.
    """
    aside = client.split[1]
    if len(aside.labels) < max(1, client.config.caps.min_images):
        return VoteAnswer(**client.who(), **asdict(Votes.none(len(request.heads))))
    labels = request.heads[0].indices(client.data.classes)[aside.labels]
    logits = (
        head(_features(client, theta, aside, request.linearised))
        for theta, head in zip(_models(client, request), request.heads, strict=True)
    )
    return VoteAnswer(**client.who(), **asdict(Votes.of(logits, labels)))


def evaluate(client: LocalClient, request: EvaluateRequest) -> EvaluateAnswer:
    """Measure the composed model on the client's test images.

    Counts by class and confidence are sent of at least ``min-images`` images, and not under noise.
    """
    heads = [head for head in (request.joint, request.own_heads) if head]
    caps = client.config.caps
    accuracy, *beside = accuracies_of(
        client.backbone,
        request.theta,
        heads,
        client.data.classes,
        client.data.test,
        linearised=request.linearised,
    )
    if request.last and not client.config.keep_cache:
        forget(client.data.train.images, client.data.test.images)
    return EvaluateAnswer(
        **client.who(),
        class_il_accuracy=accuracy.class_il,
        task_il_accuracy=accuracy.task_il,
        own_heads_accuracy=beside[0].class_il if beside else None,
        num_examples=accuracy.num_examples,
        tally=None if caps.dp_noise > 0 else accuracy.tally.withholding(caps.min_images),
    )


def _models(client: LocalClient, request: RealignRequest | VoteRequest) -> Iterator[Weights]:
    """The weights of each model that a request asks about; of the frozen backbone: none."""
    theta_0 = client.backbone.theta_0
    total = {name: request.total[name].to(theta) for name, theta in theta_0.items()}
    for factor in request.factors:
        changed = theta_0 if factor else {}
        yield {name: theta + factor * total[name] for name, theta in changed.items()}


def _features(client: LocalClient, theta: Weights, images: Split, linearised: bool) -> Tensor:
    """Features of images under composed weights, (count, features)."""
    return extract_features(feature_map(client.backbone, theta, tangent=linearised), images.images)
