"""Makes a contribution of a model that was fine-tuned elsewhere, and of images to describe it by.

The images give the statistics of the pre-trained features, as in a federation. The head is the
source's own, where the names of its rows are known and cover the images' classes; else it is
fitted to the features of the fine-tuned model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedcompo.backbone.adapter import ADAPTER_CONFIG, read_adapter
from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.finetuned import FineTuned, read_finetuned
from fedcompo.config.choices import Statistics
from fedcompo.config.presets import IMPORTED
from fedcompo.config.run import RunConfig
from fedcompo.config.setting import Scalar
from fedcompo.data.client_data import ClientData, load_folder
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head, fit_head, zero_head
from fedcompo.method.lineage import Lineage
from fedcompo.method.statistics import FeatureSums
from fedcompo.names import check_client_name
from fedcompo.registry.admission import admit
from fedcompo.registry.company import Company
from fedcompo.registry.reader import RegistryReader

SEED = 0
"""Draws test images where the folder has no ``test``."""


def import_model(
    source: Path,
    registry: RegistryReader,
    *,
    client: str,
    data: Path,
    classes: tuple[str, ...] = (),
    drop_rest: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> Contribution:
    """Make a contribution to a registry of a fine-tuned model; the registry stays as it is.

    Args:
        source: See :func:`~fedcompo.backbone.finetuned.read_finetuned`; or the folder of a LoRA
            adapter, see :func:`~fedcompo.backbone.adapter.read_adapter`.
        registry: Has the pre-trained weights.
        client: Name of the contribution.
        data: Folder with ``train/<class>/*``.
        classes: Names of the rows of the source's classifier; empty: as its config.json says.
        drop_rest: Leave out what the source changed beside the target weights.
        on_step: Called with what is being done.

    Returns:
        A contribution that the registry would take, whose settings say where it is from.

    Raises:
        BackboneError: If the source cannot be read, or belongs to another backbone.
        ContributionError: If it changed more than the target weights, ``classes`` do not fit, or
            the registry would refuse it.
        DataError: If the images cannot be used.
    """
    check_client_name(client)
    on_step("reading")
    backbone = registry.backbone.load()
    found = _read(source, backbone, drop_rest=drop_rest)
    images = load_folder(data, backbone.preprocessing, seed=SEED)
    on_step("describing")
    features = extract_features(backbone.forward({}), images.train.images)
    head, whose = _head_of(found, classes, backbone, images)
    contribution = Contribution(
        client=client,
        task_vector=found.task_vector,
        head=head,
        statistics=FeatureSums.of(features, images.train.labels, images.classes),
        num_examples=len(features),
        lineage=Lineage(),
        settings=_settings(backbone, found)
        | {f"{IMPORTED}from": source.name, f"{IMPORTED}head": whose},
    )
    admit(contribution, Company.of(registry, backbone))
    return contribution


def _read(source: Path, backbone: Backbone, *, drop_rest: bool) -> FineTuned:
    read = read_adapter if (source / ADAPTER_CONFIG).is_file() else read_finetuned
    found = read(source, backbone)
    if found.rest and not drop_rest:
        raise ContributionError(
            f"{source} changed more than the target weights, which is all that a contribution can "
            f"change: {found.rest_counted}. Without them it is another model than yours; "
            "`--drop-rest` leaves them out, and says so in the card."
        )
    return found


def _head_of(
    found: FineTuned, given: tuple[str, ...], backbone: Backbone, images: ClientData
) -> tuple[Head, str]:
    """The rows of the images' classes, and whose they are: ``source`` or ``fitted``."""
    rows = 0 if found.classifier is None else len(found.classifier[0])
    names = given or found.classes
    fits = len(names) == rows and {*images.classes} <= {*names}
    if given and not fits:
        raise ContributionError(
            f"`--classes` names {len(given)} classes, and the source's classifier has {rows} rows. "
            f"Name each row, among them those of the images: {', '.join(images.classes)}."
        )
    if fits and found.classifier is not None:
        return Head(names, *found.classifier).rows(images.classes), "source"
    theta = found.task_vector.dense(backbone.theta_0)
    theta = {name: backbone.theta_0[name] + tau for name, tau in theta.items()}
    features = extract_features(backbone.forward(theta), images.train.images)
    start = zero_head(images.classes, backbone.num_features)
    ridge = RunConfig().head.ridge
    return fit_head(features, images.train.labels, start, ridge=ridge), "fitted"


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
        f"{IMPORTED}dropped": found.rest_counted,
    }
