"""Makes a contribution of a model that was fine-tuned elsewhere.

With images, they give the statistics of the pre-trained features, as in a federation. The head is
the source's own, where the names of its rows are known and cover the images' classes; else it is
fitted to the features of the fine-tuned model. Without images, the rows of its classifier stand
for the statistics, see :mod:`fedcompo.method.stand_in`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low

import timm
import torch

from fedcompo.backbone.adapter import ADAPTER_CONFIG, read_adapter
from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.finetuned import FineTuned, read_difference, read_finetuned
from fedcompo.backbone.source import fetched
from fedcompo.composition.head import SHRINKAGE
from fedcompo.composition.totals import total_after
from fedcompo.config.caps import FEWEST_IMAGES
from fedcompo.config.choices import Modality, Statistics
from fedcompo.config.presets import IMPORTED, STAND_IN
from fedcompo.config.run import RunConfig
from fedcompo.config.setting import Scalar
from fedcompo.data.client_data import ClientData, load_folder
from fedcompo.errors import BackboneMismatch, ContributionError, DataError
from fedcompo.method.contribution import Contribution
from fedcompo.method.features import extract_features
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.heads import Head, fit_head, zero_head
from fedcompo.method.images import Images
from fedcompo.method.lineage import Lineage
from fedcompo.method.stand_in import Assumed, stand_in
from fedcompo.method.statistics import FeatureSums
from fedcompo.names import check_client_name
from fedcompo.registry.admission import admit
from fedcompo.registry.company import Company
from fedcompo.registry.reader import RegistryReader
from fedcompo.report.progress import step

LONELY = 100
"""Images that a class counts as that no images describe, where nobody is there."""
SEED = 0
"""Draws test images where the folder has no ``test``."""
FisherOf = Callable[[Backbone, Images], tuple[FisherDiagonal | None, str]]
"""Returns the Fisher *sum* over images, (count, channels, size, size); or none, and why."""


@dataclass(frozen=True)
class Wanted:
    """How a source is to be read."""

    classes: tuple[str, ...] = ()
    """Names of the rows of its classifier; empty: as its config.json says."""
    difference: bool = False
    """It holds θ - θ₀, not a model."""
    drop_rest: bool = False
    """Leave out what it changed beside the target weights."""
    min_images: int = FEWEST_IMAGES
    """Fewest training images of a class."""
    counts_as: int = 0
    """Images that a class counts as that no images describe; 0: as many as others usually have."""


def import_model(
    source: str | Path,
    registry: RegistryReader,
    *,
    client: str,
    data: Path | None = None,
    wanted: Wanted = Wanted(),
    fisher_of: FisherOf = lambda backbone, images: (None, ""),
) -> Contribution:
    """Make a contribution to a registry of a fine-tuned model; the registry stays as it is.

    Args:
        source: See :func:`~fedcompo.backbone.source.fetched`: a checkpoint, or the folder of one
            or of an adapter.
        registry: Has the pre-trained weights.
        client: Name of the contribution.
        data: Folder with ``train/<class>/*``; None: the source's classifier stands for it.
        wanted: How it is to be read.
        fisher_of: Estimates the Fisher of images.

    Returns:
        A contribution that the registry would take, whose settings say where it is from.

    Raises:
        BackboneError: If the source cannot be read, or belongs to another backbone.
        ContributionError: If it changed more than the target weights, names do not fit, or the
            registry would refuse it.
        DataError: If the images cannot be used.
    """
    check_client_name(client)
    _check_registry(registry, reads_images=data is not None)
    step("reading")
    path = fetched(source)
    backbone = registry.backbone.load()
    found = _read(path, backbone, wanted)
    step("describing")
    if data is None:
        head, statistics = _of_rows(path, found, wanted, _others(registry, client), backbone)
        said, fisher = {"head": "source", "statistics": STAND_IN}, None
    else:
        images = _images(data, wanted, backbone)
        head, statistics, whose = _of_images(images, found, wanted, backbone)
        said = {"head": whose, "statistics": "images"}
        fisher, said["no-fisher"] = fisher_of(backbone, images.train.images)
    said |= {"from": path.name, "base": found.base, "dropped": found.rest_counted}
    contribution = Contribution(
        client=client,
        task_vector=found.task_vector,
        head=head,
        statistics=statistics,
        num_examples=statistics.num_examples,
        lineage=Lineage(),
        fisher=fisher,
        settings=_settings(backbone, found)
        | {f"{IMPORTED}{key}": value for key, value in said.items() if value or key == "dropped"},
    )
    admit(contribution, Company.of(registry, backbone))
    return contribution


def _check_registry(registry: RegistryReader, *, reads_images: bool) -> None:
    """Refuse a registry that no import can join, before anything is read."""
    if registry.settings.statistics is not Statistics.SUMS:
        raise ContributionError(
            f"The clients of {registry.path} are described by mixtures, and what is imported by "
            "sums. Import it into a new registry; runs make one with `statistics = sums`."
        )
    if reads_images and registry.backbone.preprocessing.modality == Modality.TEXTS:
        raise ContributionError(
            f"The backbone of {registry.path} reads texts; what is imported is described by "
            "pictures. Leave `--data` out, or train on texts with `fedcompo run` or `simulate`."
        )


def _read(path: Path, backbone: Backbone, wanted: Wanted) -> FineTuned:
    if (path / ADAPTER_CONFIG).is_file():
        if wanted.difference:
            raise ContributionError(f"{path} is an adapter, a change already. Leave `--delta` out.")
        found = read_adapter(path, backbone)
        found = replace(found, base=_other_base(path, found.base, backbone))
    else:
        found = (read_difference if wanted.difference else read_finetuned)(path, backbone)
    if not any(tau.any() for tau in found.task_vector.dense(backbone.theta_0).values()):
        raise ContributionError(
            f"{path} changes no target weight of {backbone.name!r}: it is not trained, or trained "
            "elsewhere. Name the fine-tuned one, or another registry."
        )
    if found.rest and not wanted.drop_rest:
        raise ContributionError(
            f"{path} changed more than the target weights, which is all that a contribution can "
            f"change: {found.rest_counted}. Without them it is another model than yours; "
            "`--drop-rest` leaves them out, and says so in the card."
        )
    return found


def _other_base(path: Path, named: str, backbone: Backbone) -> str:
    """Return what an adapter calls its model, for the card; empty if that is the backbone's name.

    A name of another library, or one without a tag, may or may not stand for the same weights. Of
    a path the last part is returned.

    Raises:
        BackboneMismatch: If both names are timm's, and of other weights.
    """
    theirs, ours = (name.rpartition("/")[2].rpartition(":")[2] for name in (named, backbone.name))
    architecture, _, tag = theirs.partition(".")
    own_tag = ours.partition(".")[2]
    if timm.is_model(architecture) and (
        architecture != backbone.architecture or (tag and own_tag and tag != own_tag)
    ):
        raise BackboneMismatch(
            f"{path} is an adapter of {named!r} by its configuration, and the registry's weights "
            f"are {backbone.name!r}. Import it into a registry of its model."
        )
    if theirs == ours:
        return ""
    return theirs if named.startswith(("/", ".", "~")) or named.count("/") > 1 else named


def _images(data: Path, wanted: Wanted, backbone: Backbone) -> ClientData:
    """Read the images; refuse too few of a class."""
    images = load_folder(data, backbone.preprocessing, seed=SEED)
    counts = torch.bincount(images.train.labels, minlength=len(images.classes)).tolist()
    if few := [
        f"{name!r} {count}"
        for name, count in zip(images.classes, counts, strict=True)
        if count < wanted.min_images
    ]:
        raise DataError(
            f"Too few training images of {len(few)} classes in {data}, without those drawn for "
            f"tests: {', '.join(few)}; `--min-images` is {wanted.min_images}. Add images, or set "
            "it lower: what is made of few images tells much of each."
        )
    return images


def _of_images(
    images: ClientData, found: FineTuned, wanted: Wanted, backbone: Backbone
) -> tuple[Head, FeatureSums, str]:
    """Head and statistics of images, and whose the head is: ``source`` or ``fitted``."""
    features = extract_features(backbone.forward({}), images.train.images)
    statistics = FeatureSums.of(features, images.train.labels, images.classes)
    own = _own_head(found, wanted)
    if own is not None and {*images.classes} <= {*own.classes}:
        return own.rows(images.classes), statistics, "source"
    if wanted.classes:
        raise ContributionError(
            f"`--classes` names the classifier's {len(wanted.classes)} rows "
            f"{', '.join(wanted.classes)}, and the images are of {', '.join(images.classes)}. "
            "Call the rows as the images' folders are called."
        )
    theta = found.task_vector.dense(backbone.theta_0)
    theta = {name: backbone.theta_0[name] + tau for name, tau in theta.items()}
    features = extract_features(backbone.forward(theta), images.train.images)
    start = zero_head(images.classes, backbone.num_features)
    head = fit_head(features, images.train.labels, start, ridge=RunConfig().head.ridge)
    return head, statistics, "fitted"


def _others(registry: RegistryReader, client: str) -> FeatureSums | None:
    """Statistics of the members, without the one that is replaced; None: nobody else is there."""
    if not {*registry.clients} - {client}:
        return None
    going = [registry.contribution(client)] if client in registry.clients else []
    return total_after(registry.total_statistics(), (), going, registry.settings)


def _of_rows(
    path: Path, found: FineTuned, wanted: Wanted, total: FeatureSums | None, backbone: Backbone
) -> tuple[Head, FeatureSums]:
    """Head and statistics of the source's own classifier."""
    own = _own_head(found, wanted)
    if own is None:
        lacks = "has no classifier" if found.classifier is None else "does not name its classes"
        raise ContributionError(
            f"{path} {lacks}, and without `--data` its classes are described by the rows of its "
            "classifier. Name a folder of images in `--data`"
            + (
                "."
                if found.classifier is None
                else f", or its {len(found.classifier[0])} rows in `--classes`, in their order."
            )
        )
    head = own.rows(sorted(own.classes))
    if total is None:
        assumed, usual = Assumed.of_norm(backbone.model, backbone.num_features), LONELY
    else:
        assumed = Assumed.of(total, shrinkage=SHRINKAGE)
        usual = max(2, median_low(total.counts.tolist()))
    images = wanted.counts_as or usual
    return head, stand_in(head, assumed, shrinkage=SHRINKAGE, images=images)


def _own_head(found: FineTuned, wanted: Wanted) -> Head | None:
    """The source's classifier; None without one, or if the names of its rows are not known."""
    rows = 0 if found.classifier is None else len(found.classifier[0])
    if wanted.classes and not len(wanted.classes) == len({*wanted.classes}) == rows:
        raise ContributionError(
            f"`--classes` names {', '.join(wanted.classes)}, and the source's classifier has "
            f"{rows} rows. Name each row, by a name of its own."
        )
    names = wanted.classes or found.classes
    return Head(names, *found.classifier) if found.classifier and len(names) == rows else None


def _settings(backbone: Backbone, found: FineTuned) -> dict[str, Scalar]:
    """What a run would have to be told to train on the same weights; nothing of the training."""
    size = backbone.preprocessing.image_size
    return {
        "backbone": backbone.name,
        "image-size": size if isinstance(size, int) else 0,  # one that is not square stays
        "channels": backbone.preprocessing.channels,
        "target-weights": ",".join(backbone.theta_0),
        "kind": str(found.task_vector.kind),
        "statistics": str(Statistics.SUMS),
    }
