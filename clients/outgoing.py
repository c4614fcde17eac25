"""What leaves this client, as its caps (:mod:`fedcompo.config.caps`) allow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.caps import CapsConfig
from fedcompo.config.choices import FisherForm, Wire
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData
from fedcompo.messages.answers import FisherAnswer
from fedcompo.messages.body import FISHER, TASK_VECTOR
from fedcompo.messages.requests import own_tensors
from fedcompo.messages.wire import decode, encode, relative_error
from fedcompo.method.deltas import Weights
from fedcompo.method.features import FeatureMixture, fit_mixtures
from fedcompo.method.fisher import HEAD
from fedcompo.method.heads import Head
from fedcompo.privacy.factored import reduced, restored
from fedcompo.privacy.fisher import images_at_a_time, private_fisher
from fedcompo.privacy.statistics import private_mixtures
from fedcompo.storage.tensorfile import prefixed, section
from fedcompo.training.fit import Fitted
from fedcompo.training.probing import fisher_of_images

ITSELF = "this client"


def mixtures_of(
    features: Tensor, data: ClientData, config: RunConfig, *, seed: int
) -> tuple[dict[str, FeatureMixture], dict[str, Any]]:
    """Fit mixtures to the features of each class; under `dp-noise` from noised sums.

    Args:
        features: Of the training images, (count, features).
        data: Labels and classes.
        config: Settings, capped.
        seed: Seed of the fit without noise.

    Returns:
        Mixtures by class name, and the answer's report on caps.
    """
    labels, caps = data.train.labels, config.caps
    if caps.dp_noise > 0:
        mixtures = private_mixtures(
            features, labels, data.classes, clip=caps.dp_clip_features, noise=caps.dp_noise
        )
        return mixtures, {"noise": caps.dp_noise, "clip": caps.dp_clip_features}
    components = config.head.mixture_components
    return fit_mixtures(features, labels, data.classes, components=components, seed=seed), {}


def fisher_of(
    backbone: Backbone, head: Head, images: Tensor, config: RunConfig, *, client: str
) -> FisherAnswer:
    """Sum the Fisher diagonal, in the form and number format that the caps allow.

    Args:
        backbone: Pre-trained weights.
        head: Head of the model that it is the Fisher of.
        images: Of training, (count, channels, size, size), uint8.
        config: Settings, capped.
        client: Its name.
    """
    started, caps = time.perf_counter(), config.caps
    caps_report: dict[str, Any] = {}
    if caps.fisher_form is not FisherForm.DENSE:
        caps_report["form"] = str(caps.fisher_form)
    if caps.dp_noise > 0:
        parts, count = _private(backbone, head, images, config)
        report: dict[str, Any] = {}  # the figures of an estimator are not noised
        caps_report |= {"noise": caps.dp_noise, "clip": caps.dp_clip_fisher}
    else:
        measured = caps.fisher_form is not FisherForm.HEAD
        held = backbone if measured else replace(backbone, theta_0={})
        fisher, figures = fisher_of_images(
            held, head, images, config.fisher, seed=config.seed, owner=client
        )
        parts, count = reduced(fisher.sums, caps.fisher_form), fisher.num_examples
        report = asdict(figures)
        if caps.fisher_form is FisherForm.FACTORED:
            caps_report["form_error"] = _factoring_error(fisher.sums, parts, backbone)
    body = prefixed(FISHER, parts)
    coded, arrived = _on_the_wire(body, caps.wire)
    if caps.wire is not Wire.FLOAT32:
        caps_report |= {"wire_error": relative_error(body, arrived), "wire": str(caps.wire)}
    return FisherAnswer(
        client=client,
        base=backbone.fingerprint,
        classes=head.classes,
        tensors=coded,
        num_examples=count,
        form=caps.fisher_form,
        report={**report, "seconds": time.perf_counter() - started},
        caps=caps_report,
    )


def _private(
    backbone: Backbone, head: Head, images: Tensor, config: RunConfig
) -> tuple[Weights, int]:
    caps, normalise = config.caps, backbone.preprocessing.normalise
    size = images_at_a_time(backbone.theta_0, caps.fisher_form, config.fisher.fisher_batch)
    return private_fisher(
        backbone.model,
        head,
        (normalise(part.to(backbone.device)) for part in torch.split(images, size)),
        backbone.theta_0,
        form=caps.fisher_form,
        clip=caps.dp_clip_fisher,
        noise=caps.dp_noise,
    )


def _factoring_error(sums: Mapping[str, Tensor], parts: Weights, backbone: Backbone) -> float:
    """Relative error of the factored Fisher once it is expanded, without the head."""
    expanded = restored(parts, FisherForm.FACTORED, backbone.theta_0, owner=ITSELF)
    meant = {name: total for name, total in sums.items() if name not in HEAD}
    return relative_error(meant, expanded)


def trained(
    fitted: Fitted, backbone: Backbone, caps: CapsConfig
) -> tuple[dict[str, Tensor], Fitted, dict[str, Any]]:
    """Write what was trained in the number format that the caps allow.

    Args:
        fitted: As it was trained.
        backbone: Pre-trained weights.
        caps: Which format.

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
