r"""A reference Fisher: an anchor that comes from no client, so that nobody's leaving concerns it.

It is the Fisher diagonal at :math:`\theta_0` of images that are public, or the coordinator's own,
under a linear probe fitted to them. A client anchored by it is kept from changing what the backbone
knows of *those* images; the closer they are to what the clients see, the better it stands in for
the Fisher of the others.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, load_client_data, load_folder
from fedcompo.fisher_file import load_fisher, save_fisher
from fedcompo.method.fisher import FisherDiagonal, FisherReport
from fedcompo.training.probing import ImagesCallback, fisher_of_images, fit_probe

OWNER = "(reference)"
"""Stands in the file where the client's name would; no client can be called so."""


def load_public_data(config: RunConfig, preprocessing: Preprocessing) -> ClientData:
    """Load all classes of a source as one party's; ``folder:`` holds ``train/<class>/*`` itself.

    Raises:
        DataError: If the source or one of its images cannot be used.
    """
    source, seed = config.data, config.seed
    kind, _, path = source.data.partition(":")
    if kind == "folder" and path:
        cap = source.images_per_class
        return load_folder(Path(path), preprocessing, seed=seed, images_per_class=cap)
    whole = replace(source, num_tasks=1)
    return load_client_data(whole, preprocessing, partition=0, seed=seed)


def reference_fisher(
    backbone: Backbone,
    data: ClientData,
    config: RunConfig,
    *,
    on_images: ImagesCallback = lambda taken, total: None,
) -> tuple[FisherDiagonal, FisherReport]:
    """Estimate the Fisher diagonal of public images under a linear probe of their classes.

    Args:
        backbone: Pre-trained weights.
        data: The images; those for training are used.
        config: Settings of the probe and of the estimator.
        on_images: Told of progress.

    Returns:
        The *sum* over images, and a report. The head has no rows: nobody else has its classes.
    """
    probe = fit_probe(backbone, data.train, data.classes, ridge=config.head.ridge)
    fisher, report = fisher_of_images(
        backbone,
        probe,
        data.train.images,
        config.fisher,
        seed=config.seed,
        owner=OWNER,
        on_images=on_images,
    )
    return fisher.for_classes(()), report


def save_reference(path: Path, fisher: FisherDiagonal, *, base: str) -> str:
    """Write a reference Fisher to one file; returns the SHA-256 of its tensors."""
    return save_fisher(path, fisher, client=OWNER, base=base)


def load_reference(path: Path, *, base: str) -> FisherDiagonal:
    """Read what :func:`save_reference` wrote; raises as :func:`load_fisher` does."""
    return load_fisher(path, client=OWNER, base=base)
