r"""A linear probe and a Fisher diagonal at :math:`\theta_0`, from one party's images alone.

A party is a client, or the owner of a reference Fisher: the Fisher diagonal of public images, or of
the coordinator's own; of class probabilities, under a linear probe fitted to them. A client
anchored by it does not depend on any other client, and no removal of another concerns it. It keeps
what the backbone knows of *those* images; the more they resemble the clients' images, the better
the reference replaces the Fisher of the others.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.choices import Curvature, FisherForm
from fedcompo.config.data import CLASSES
from fedcompo.config.run import FisherConfig, RunConfig
from fedcompo.data.client_data import ClientData, Split, load_client_data, load_folder
from fedcompo.errors import ConfigError
from fedcompo.method.features import extract_features
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.fisher_file import OLD_HEAD, load_fisher, save_fisher
from fedcompo.method.heads import Head, fit_head, zero_head
from fedcompo.method.images import Images, batches, part_of
from fedcompo.names import REFERENCE
from fedcompo.report.progress import each
from fedcompo.seeds import generator_for
from fedcompo.storage.tensorstream import StreamedTensors
from fedcompo.training.fisher_estimate import FisherReport, estimate_fisher

COMPARED = 64
"""Images of whose Fisher a factored one is compared with the dense form; evenly spaced batches."""


def fit_probe(backbone: Backbone, data: Split, classes: tuple[str, ...], *, ridge: float) -> Head:
    """Fit a linear classifier to the pre-trained features of labelled images.

    The head depends on these images alone.

    Args:
        backbone: Pre-trained weights.
        data: Images and labels; labels index ``classes``.
        classes: Names of the classes.
        ridge: Pull of the head to zero; see :func:`fedcompo.method.heads.fit_head`.
    """
    features = extract_features(backbone.forward({}), data.images)
    start = zero_head(classes, backbone.num_features)
    return fit_head(features, data.labels, start, ridge=ridge)


def fisher_of_images(
    backbone: Backbone,
    images: Images,
    config: FisherConfig,
    *,
    seed: int,
    owner: str,
    head: Head | None = None,
    form: FisherForm = FisherForm.DENSE,
    seen: list[Tensor] | None = None,
) -> tuple[FisherDiagonal, FisherReport]:
    """Estimate the Fisher of the target weights on one party's images.

    Args:
        backbone: Pre-trained weights.
        images: (count, channels, size, size), uint8.
        config: How to estimate it, and on how many of the images.
        seed: Seed of the run.
        owner: Whose images they are; draws are derived from ``seed`` and this name.
        head: Turns features into logits; needed for the Fisher of class probabilities.
        form: See :func:`estimate_fisher`.
        seen: Gets the features of the images used, a batch at a time.

    Returns:
        The *sum* over the images used, float32 on the CPU, and a report.
    """
    if 0 < config.fisher_examples < len(images):
        generator = generator_for(seed, "fisher-examples", owner)
        drawn = torch.randperm(len(images), generator=generator)[: config.fisher_examples]
        images = part_of(images, drawn)

    parts = batches(images, config.fisher_batch)
    counted = each(parts, "images", "Fisher", total=len(images), units=len)
    fisher, report = estimate_fisher(
        backbone.model,
        (backbone.preprocessing.normalise(part.to(backbone.device)) for part in counted),
        backbone.theta_0,
        head=head,
        curvature=config.curvature,
        samples=config.fisher_samples,
        generator=generator_for(seed, "fisher", owner),
        form=form,
        compare=-(-len(images) // max(config.fisher_batch, COMPARED)),
        seen=seen,
    )
    sums = {name: total.float().cpu() for name, total in fisher.tensors.items()}
    return FisherDiagonal.read(sums, fisher.num_examples), report


def load_public_data(config: RunConfig, preprocessing: Preprocessing) -> ClientData:
    """Load all classes of a source as one party's; a ``folder:`` source holds class folders.

    Raises:
        DataError: If the source or one of its images cannot be used.
    """
    source, seed = config.data, config.seed
    if source.data.startswith(("folder:", "manifest:")):
        cap, own = source.images_per_class, source.data
        return load_folder(own, preprocessing, seed=seed, images_per_class=cap, client=None)
    whole = replace(source, num_tasks=1, partition=CLASSES, clients_per_task=0)
    return load_client_data(whole, preprocessing, partition=0, seed=seed)


def reference_fisher(
    backbone: Backbone,
    data: ClientData,
    config: RunConfig,
) -> tuple[FisherDiagonal, FisherReport]:
    """Estimate the Fisher diagonal of public images.

    Of class probabilities: under a linear probe of their classes.

    Args:
        backbone: Pre-trained weights.
        data: The images; those for training are used.
        config: Settings of the probe and of the estimator.

    Returns:
        The *sum* over images, and a report.
    """
    probe = None
    if config.fisher.curvature is not Curvature.FEATURES:
        probe = fit_probe(backbone, data.train, data.classes, ridge=config.head.ridge)
    return fisher_of_images(
        backbone,
        data.train.images,
        config.fisher,
        seed=config.seed,
        owner=REFERENCE,
        head=probe,
    )


def save_reference(path: Path, fisher: FisherDiagonal, *, base: str, curvature: Curvature) -> str:
    """Write a reference Fisher, and of what it is, to one file; returns its tensors' SHA-256."""
    return save_fisher(path, fisher, client=REFERENCE, base=base, curvature=str(curvature))


def load_reference(path: Path, *, base: str, curvature: Curvature) -> FisherDiagonal:
    """Read what :func:`save_reference` wrote.

    Earlier versions did not write of what it is. With entries of a head it is of class
    probabilities, as there was no other at the time; without, it may be of either.

    Args:
        path: The file.
        base: Fingerprint of the pre-trained weights it must belong to.
        curvature: Of what the clients' Fishers are.

    Raises:
        FileFormatError: As :func:`load_fisher`.
        BackboneMismatch: As :func:`load_fisher`.
        ConfigError: If one is of the features and the other of class probabilities, which have
            different units, or if the file does not say.
    """
    fisher = load_fisher(path, client=REFERENCE, base=base)
    file = StreamedTensors(path)
    stated = file.manifest.get("curvature", Curvature.EXACT if OLD_HEAD[0] in file else None)
    if stated not in list(Curvature):
        raise ConfigError(
            f"The reference {path} does not say of which `curvature` it is: an earlier version of "
            "fedcompo wrote it. Make it anew by `fedcompo fisher`."
        )
    if (stated == Curvature.FEATURES) is not (curvature is Curvature.FEATURES):
        raise ConfigError(
            f"The reference {path} is of `curvature = {stated}`, but `curvature` is {curvature}, "
            "which has another unit. Set the same, or make the reference anew by `fedcompo "
            f"fisher --set curvature={curvature}`."
        )
    return fisher
