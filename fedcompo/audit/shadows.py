r"""Models of the same federation, trained with and without each of a client's images.

The likelihood-ratio attack (:mod:`fedcompo.audit.membership`) holds an image's confidence under a
model against that of *shadows*: models that had the image, and models that had not. Here a shadow
is the composition as it stands, with one client's task vector fitted again on half of the client's
images, training and test images alike. What the other clients sent does not vary, nor does anything
else but the draws of training: an attacker who can do this knows all but who was trained on.

Shadows come in pairs. The first is fitted on a random half of every class, the second on the rest:
of N shadows each image is in exactly N/2, and no image is missing from all by chance.

A shadow is trained as the client was, but for what cannot be had again:

- on half of all its images, so on fewer than the client had, for as many epochs;
- with its own draws of LoRA's A and of the order of images;
- anchored and aligned by those of its lineage who are *still* in the registry;
- under a joint head, where the client was, of the statistics that the registry keeps: the client's
  real training images had a part in it, the same for all shadows.

What it trains, and its own Fisher, are rounded as on the run's `wire`, before they are used. (A
node that set a coarser wire of its own is not recorded.)

A client's own probe and own Fisher are made of the images that the shadow is fitted on, and no
image is kept aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedcompo.audit.membership import FEWEST_SHADOWS, confidence
from fedcompo.audit.models import AuditedModel, all_images
from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.head import head_of
from fedcompo.composition.models import stream_composition
from fedcompo.config.choices import AnchorBy, Curvature, FisherForm, HeadStart, Kind
from fedcompo.config.presets import IMPORTED
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, Split
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.messages.body import FISHER, TASK_VECTOR
from fedcompo.messages.wire import decode, encode
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import FisherDiagonal, expanded
from fedcompo.method.heads import Head, zero_head
from fedcompo.method.pool import Pool
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.reader import RegistryReader
from fedcompo.report.progress import step
from fedcompo.seeds import generator_for
from fedcompo.storage.tensorfile import prefixed, section
from fedcompo.training.anchors import FisherSums
from fedcompo.training.fit import Course, fit_task_vector
from fedcompo.training.penalty import Anchor
from fedcompo.training.probing import fisher_of_images, fit_probe, load_reference


@dataclass(frozen=True)
class ShadowModels:
    """The shadows' confidences on a client's images, training images first."""

    phi: Tensor
    """:func:`~fedcompo.audit.membership.confidence`, (shadows, examples), float64."""
    trained_on: Tensor
    """Which shadow was fitted on which image, bool, (shadows, examples)."""


@dataclass(frozen=True)
class ClientTraining:
    """How a client was trained, so that it can be trained again on other images."""

    client: str
    classes: tuple[str, ...]
    kind: Kind
    backbone: Backbone
    config: RunConfig
    joint: Head | None
    """Joint head of those whom it was aligned with; None: it had nothing of a joint head."""
    anchor: Weights | None
    """*Mean* Fisher that anchors it, in either form; None: no anchor, or the Fisher of the images
    themselves."""

    @classmethod
    def of(cls, registry: RegistryReader, client: str, backbone: Backbone) -> ClientTraining:
        """Gather from a registry what a member was trained with.

        Raises:
            ContributionError: If a Fisher that anchored the client was not kept.
            ConfigError: If the client's settings cannot be used.
            FileFormatError: If the reference Fisher that it was anchored by cannot be read.
        """
        contribution = registry.contribution(client)
        if any(key.startswith(IMPORTED) for key in contribution.settings):
            raise ConfigError(
                f"Client {client!r} was imported: how it was trained is not known, so shadows of "
                "it cannot be trained. Audit a client that was trained here."
            )
        config = RunConfig.stored(contribution.settings)
        classes, joint = contribution.head.classes, None
        if len(classes) == 1 or _under_joint_head(config):
            pool = registry.pool()
            members = {client, *contribution.lineage.aligned_with} & set(pool.clients)
            joint = head_of(pool.only(*members), registry.settings)
        kind, anchor = contribution.task_vector.kind, _anchor_of(registry, client, config)
        return cls(client, classes, kind, backbone, config, joint, anchor)

    def fit(self, data: Split, *, generator: torch.Generator) -> TaskVector:
        """Fit a task vector as the client did; labels index its classes."""
        start, mean, train = self._start(data), self.anchor, self.config.train
        has_own = train.held and self.config.caps.fisher_form is not FisherForm.NONE
        if train.anchor is AnchorBy.OWN and has_own:
            mean = self._own_fisher(start, data)
        anchor = None
        if mean is not None:
            of_features = self.config.fisher.curvature is Curvature.FEATURES
            anchor = Anchor(expanded(mean, self.backbone.theta_0), of_features)
        course = Course(anchor=anchor)
        if len(self.classes) == 1 and self.joint:  # its own head has nothing to tell apart
            start, course = self.joint, replace(course, fixed=True)
            data = Split(data.images, start.indices(self.classes)[data.labels])
        fitted = fit_task_vector(
            self.backbone, self.kind, data, start, train, generator=generator, course=course
        )
        vector = fitted.task_vector
        return replace(vector, tensors=self._arrived(TASK_VECTOR, vector.tensors))

    def _arrived(self, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as the server would read them."""
        wire = self.config.caps.wire
        coded = encode(prefixed(prefix, tensors), wire)
        return section(prefix, decode(coded, wire, source=f"a shadow of {self.client}"))

    def _start(self, data: Split) -> Head:
        begin = self.config.train.head_start
        if begin is HeadStart.PROBE:
            return fit_probe(self.backbone, data, self.classes, ridge=self.config.head.ridge)
        if begin is HeadStart.ALIGNED and self.joint:
            return self.joint.rows(self.classes)
        return zero_head(self.classes, self.backbone.num_features)

    def _own_fisher(self, start: Head, data: Split) -> Weights:
        config = self.config
        head = start if config.train.head_start is HeadStart.PROBE else self.joint
        fisher, _ = fisher_of_images(
            self.backbone,
            data.images,
            config.fisher,
            seed=config.seed,
            owner=self.client,
            head=head,
            form=config.caps.fisher_form,
        )
        fisher = fisher.reduced() if config.caps.fisher_form is FisherForm.FACTORED else fisher
        return replace(fisher, sums=self._arrived(FISHER, fisher.sums)).mean()


def train_shadows(
    registry: RegistryReader,
    training: ClientTraining,
    data: ClientData,
    head: Head,
    *,
    count: int,
    seed: int,
) -> ShadowModels:
    """Train shadows and compute the confidence of each on all of the client's images.

    Args:
        registry: The composition that the client is in.
        training: How the client was trained.
        data: The client's images.
        head: Joint head that the attacker puts on every backbone; has the client's classes.
        count: Number of shadows; see :func:`check_count`.
        seed: Seed of the halves and of training.
    """
    whole = Split(*all_images(data))
    trained_on = halves(
        whole.labels, count=count, generator=generator_for(seed, "halves", data.name)
    )
    everyone = registry.pool()  # with what the registry's rule needs of them
    (member,), others = everyone.only(training.client), everyone.without(training.client)
    labels, phi = head.indices(data.classes)[whole.labels], []
    for index, chosen in enumerate(trained_on):
        step(f"shadow {index + 1} of {count}")
        vector = training.fit(
            whole.part(chosen),
            generator=generator_for(seed, "shadow", training.client, str(index)),
        )
        pool = Pool((*others, replace(member, task_vector=vector)))
        composed = stream_composition(
            pool, registry.backbone, None, registry.settings, factor=registry.factor
        )
        model = AuditedModel(dict(composed), head, pool.clients, linearised=pool.linearised)
        phi.append(confidence(head(model.features(training.backbone, whole.images)), labels))
    return ShadowModels(torch.stack(phi), trained_on)


def check_count(count: int) -> None:
    """Refuse a number of shadows that cannot be used; raises ``ConfigError``."""
    if count < 2 * FEWEST_SHADOWS or count % 2:
        raise ConfigError(
            f"`--shadows` is {count}, expected an even number, at least {2 * FEWEST_SHADOWS}: "
            "shadows come in pairs, and each image needs two with it and two without."
        )


def halves(labels: Tensor, *, count: int, generator: torch.Generator) -> Tensor:
    """Draw halves of every class, each followed by the other half.

    Args:
        labels: (examples,).
        count: Number of halves, even, at least 4.
        generator: On the CPU.

    Returns:
        Which half has which example, bool, (count, examples). Of an odd number of examples of a
        class, the first of two halves has one more.
    """
    drawn = torch.zeros(count, len(labels), dtype=torch.bool)
    for first in range(0, count, 2):
        for label in sorted(set(labels.tolist())):
            members = (labels == label).nonzero().flatten()
            order = torch.randperm(len(members), generator=generator)
            drawn[first, members[order[: (len(members) + 1) // 2]]] = True
        drawn[first + 1] = ~drawn[first]
    return drawn


def _under_joint_head(config: RunConfig) -> bool:
    """Whether the joint head had a part in a client's start, or in its own Fisher."""
    start, curvature = config.train.head_start, config.fisher.curvature
    of_classes = curvature is not Curvature.FEATURES
    return start is HeadStart.ALIGNED or (of_classes and start is HeadStart.ZERO)


def _anchor_of(registry: RegistryReader, client: str, config: RunConfig) -> Weights | None:
    """Return the mean Fisher that anchors a client, unless it is that of its own images."""
    if config.train.anchor is AnchorBy.OWN or not config.train.held:
        return None
    if config.train.anchor is AnchorBy.REFERENCE:
        path, base = Path(config.train.reference).expanduser(), registry.backbone.fingerprint
        return load_reference(path, base=base, curvature=config.fisher.curvature).mean()
    others = set(registry.member(client).lineage.anchored_by) & set(registry.clients)
    if not others:
        return None

    def kept(name: str) -> FisherDiagonal:
        fisher = registry.contribution(name, with_fisher=True).fisher
        if fisher is None:
            raise ContributionError(
                f"The registry keeps no Fisher of {name}, by which {client} was anchored: shadows "
                f"cannot be trained as {client} was. Run with `keep-fisher = true`."
            )
        return fisher

    return FisherSums(tuple({client, *others}), kept, AnchorBy.OTHERS).mean_for(client)
