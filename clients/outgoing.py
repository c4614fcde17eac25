"""What leaves this client, as its caps (:mod:`fedcompo.config.caps`) allow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.caps import CapsConfig
from fedcompo.config.choices import FisherForm, Statistics, Wire
from fedcompo.config.run import RunConfig
from fedcompo.errors import ConfigError
from fedcompo.messages.answers import FisherAnswer
from fedcompo.messages.body import FISHER, TASK_VECTOR
from fedcompo.messages.requests import own_tensors
from fedcompo.messages.wire import decode, encode, relative_error
from fedcompo.method.contribution import AnyStatistics
from fedcompo.method.features import fit_mixtures
from fedcompo.method.fisher import INPUTS, FisherDiagonal
from fedcompo.method.heads import Head
from fedcompo.method.images import Images, batches
from fedcompo.method.kronecker import whole
from fedcompo.method.statistics import FeatureSums
from fedcompo.privacy.fisher import images_at_a_time, private_fisher
from fedcompo.privacy.statistics import private_sums
from fedcompo.report.progress import each
from fedcompo.storage.tensorfile import prefixed, section
from fedcompo.training.fit import Fitted
from fedcompo.training.probing import fisher_of_images

ITSELF = "this client"


def statistics_of(
    features: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    config: RunConfig,
    *,
    form: Statistics,
    seed: int,
) -> tuple[AnyStatistics, dict[str, Any]]:
    """Describe the features of each class; under `dp-noise` by noised sums.

    Args:
        features: (count, features).
        labels: (count,), index into ``classes``.
        classes: Sorted names.
        config: Settings, capped.
        form: Sums, or mixtures fitted to the features.
        seed: Seed of the fit of mixtures.

    Returns:
        The statistics, and the answer's report on caps.

    Raises:
        ConfigError: If mixtures are asked for under noise.
    """
    caps = config.caps
    if form is Statistics.MIXTURES:
        if caps.dp_noise > 0:
            raise ConfigError.public(
                "Mixtures cannot be made private by noise (`dp-noise`): how much one image changes "
                "them is not known. Use `statistics = sums`."
            )
        components = config.head.mixture_components
        return fit_mixtures(features, labels, classes, components=components, seed=seed), {}
    if caps.dp_noise > 0:
        clip, noise = caps.dp_clip_features, caps.dp_noise
        sums = private_sums(features, labels, classes, clip=clip, noise=noise)
        return sums, {"noise": noise, "clip": clip}
    return FeatureSums.of(features, labels, classes), {}


def fisher_of(
    backbone: Backbone,
    head: Head | None,
    images: Images,
    config: RunConfig,
    *,
    who: Mapping[str, Any],
    seen: list[Tensor] | None = None,
) -> FisherAnswer:
    """Sum the Fisher diagonal, in the form and number format that the caps allow.

    With it go the squares of the layers' inputs; under noise they stay here.

    Args:
        backbone: Pre-trained weights.
        head: Head of the class probabilities that it is the Fisher of; None: of the features.
        images: Of training, (count, channels, size, size), uint8.
        config: Settings, capped.
        who: What every answer states of the client.
        seen: Gets the features of the images used, but under noise; see :func:`fisher_of_images`.
    """
    started, caps = time.perf_counter(), config.caps
    caps_report: dict[str, Any] = {}
    if caps.fisher_form is not FisherForm.DENSE:
        caps_report["form"] = str(caps.fisher_form)
    report: dict[str, Any] = {}  # the figures of an estimator are not noised
    if caps.fisher_form is FisherForm.NONE:
        fisher = FisherDiagonal({}, 0)
    elif caps.dp_noise > 0:
        fisher = _private(backbone, head, images, config)
        caps_report |= {"noise": caps.dp_noise, "clip": caps.dp_clip_fisher}
    else:
        fisher, figures = fisher_of_images(
            backbone,
            images,
            config.fisher,
            seed=config.seed,
            owner=who["client"],
            head=head,
            form=caps.fisher_form,
            seen=seen,
        )
        report = asdict(figures)
        error = report.pop("form_error")
        if caps.fisher_form is FisherForm.KRONECKER:
            sent = fisher.thinned()
            error = relative_error(fisher.sums, {n: whole(t) for n, t in sent.sums.items()})
            fisher = sent
        if caps.fisher_form is not FisherForm.DENSE:
            caps_report["form_error"] = error
    body = prefixed(FISHER, {name: total.float() for name, total in fisher.tensors.items()})
    coded, arrived = _on_the_wire(body, caps.wire)
    if caps.wire is not Wire.FLOAT32 and body:
        own = {name: total for name, total in body.items() if not name.endswith(INPUTS)}
        caps_report |= {"wire_error": relative_error(own, arrived), "wire": str(caps.wire)}
    return FisherAnswer(
        **who,
        tensors=coded,
        num_examples=fisher.num_examples,
        form=caps.fisher_form,
        report={**report, "seconds": time.perf_counter() - started},
        caps=caps_report,
    )


def _private(
    backbone: Backbone, head: Head | None, images: Images, config: RunConfig
) -> FisherDiagonal:
    caps, normalise = config.caps, backbone.preprocessing.normalise
    factored = caps.fisher_form is FisherForm.FACTORED
    most = config.fisher.fisher_batch
    size = images_at_a_time(backbone.theta_0, factored=factored, most=most)
    parts = each(batches(images, size), "images", "Fisher", total=len(images), units=len)
    return private_fisher(
        backbone.model,
        (normalise(part.to(backbone.device)) for part in parts),
        backbone.theta_0,
        head=head,
        factored=factored,
        clip=caps.dp_clip_fisher,
        noise=caps.dp_noise,
    )


def trained(
    fitted: Fitted, backbone: Backbone, caps: CapsConfig
) -> tuple[dict[str, Tensor], Fitted, dict[str, Any]]:
    """Write what was trained in the number format that the caps allow.

    Returns:
        The tensors of the answer; the task vector and head that the server reads from them, which
        the client measures and continues with; the answer's report on caps.
    """
    vector = fitted.task_vector
    body = own_tensors(vector.tensors, fitted.head)
    if caps.wire is Wire.FLOAT32:
        return body, fitted, {}
    coded, arrived = _on_the_wire(body, caps.wire)
    received = replace(vector, tensors=section(TASK_VECTOR, arrived))
    theta_0 = backbone.theta_0
    error = relative_error(vector.dense(theta_0), received.dense(theta_0))
    caps_report = {"wire_error": error, "wire": str(caps.wire)}
    return coded, replace(fitted, task_vector=received), caps_report


def _on_the_wire(
    tensors: dict[str, Tensor], wire: Wire
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that are sent, and those that the server reads from them."""
    coded = encode(tensors, wire)
    return coded, decode(coded, wire, source=ITSELF)
