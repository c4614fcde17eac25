r"""Two measures of what a model's features still know of a client, without its head.

**Linear probe**: how well a linear classifier, fitted to features of some of the client's training
images, names its test images. Few images a class show how fast the task could be learnt again.

**Linear CKA**: how alike two models represent the same images. With the Gram matrices K and L of
their features and H the dependence of two kernels (HSIC):

.. math:: \mathrm{CKA} = \frac{H(K, L)}{\sqrt{H(K, K)\,H(L, L)}}

It is 1 for features that are equal up to a rotation and one scale, 0 for unrelated ones. H is
estimated without bias, from pairs of different images: on 80 images the plain estimate is up to 0.1
too high, as it is where a resampling draws an image twice. Sources: Kornblith et al., *Similarity
of Neural Network Representations Revisited*, ICML 2019 (arXiv 1905.00414); unbiased: Song et al.,
*Feature Selection via Dependence Maximization*, JMLR 2012, as in Nguyen et al., ICLR 2021 (arXiv
2010.15327).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedcompo.audit.estimates import Estimate, Numbers, estimated
from fedcompo.audit.models import AFTER, BEFORE, FROZEN, GOLD, REPAIRED
from fedcompo.data.client_data import ClientData
from fedcompo.report.progress import step
from fedcompo.seeds import generator_for

SHOTS = (1, 5)
"""Images a class that a probe is fitted to, besides all."""
DRAWS = 20
"""Drawings of so few images; accuracy is their mean."""
STRENGTHS = np.logspace(-2, 4, 7)
"""Ridges of a probe, for features of mean square 1; it takes that with the least error left out."""
ALL = "all"
PAIRS = (BEFORE, AFTER), (BEFORE, GOLD), (AFTER, GOLD), (AFTER, REPAIRED), (FROZEN, AFTER)
FEWEST, MOST = 4, 1000
"""Images whose features are compared."""


def probes(
    features: Mapping[str, Tensor], data: ClientData, *, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Fit probes to each model's features of a client's images, training images first.

    A single class leaves nothing to tell apart, and the table empty.
    """
    if len(data.classes) == 1:
        return {}
    step("fitting linear probes")
    train, test = data.train.labels, data.test.labels
    parts = {n: (f[: len(train)], f[len(train) :]) for n, f in features.items()}
    return {n: probe_accuracy((a, train), (b, test), seed=seed) for n, (a, b) in parts.items()}


def probe_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, seed: int
) -> dict[str, Estimate]:
    """Fit linear probes in closed form (ridge) and count the test images they name.

    Args:
        train: Features (images, features) and labels (images,) of two classes or more.
        test: The same of the images that are named.
        seed: Seed of the drawings and of the interval, which is over test images.

    Returns:
        Accuracy by images a class: ``1``, ``5`` (where each class has more) and ``all``.
    """
    features, labels = train
    least = int(labels.bincount().min())
    found = {}
    for shots in SHOTS:
        if shots < least:
            drawings = [_few(labels, shots, seed=seed, drawing=d) for d in range(DRAWS)]
            hits = [_hits((features[few], labels[few]), test) for few in drawings]
            found[str(shots)] = estimated(np.mean, np.mean(hits, axis=0), seed=seed)
    return {**found, ALL: estimated(np.mean, _hits(train, test), seed=seed)}


def similarity(features: Mapping[str, Tensor], *, seed: int) -> dict[str, Estimate]:
    """Compare what models represent alike, by pair such as ``before~after``.

    Of more than 1,000 images that many are drawn. Fewer than 4 compare nothing.

    Args:
        features: By model, (images, features) of the same images.
        seed: Seed of the drawing and of the intervals.
    """
    images = len(next(iter(features.values()), ()))
    if images < FEWEST:
        return {}
    drawn = torch.randperm(images, generator=generator_for(seed, "similarity"))[:MOST]
    return {
        f"{one}~{other}": linear_cka(features[one][drawn], features[other][drawn], seed=seed)
        for one, other in PAIRS
        if {one, other} <= features.keys()
    }


def linear_cka(first: Tensor, second: Tensor, *, seed: int) -> Estimate:
    """Compare two models' features of the same images, each (images, features); 4 at least."""
    grams = [(f - f.mean(0)) @ (f - f.mean(0)).T for f in (first.double(), second.double())]
    first_gram, other_gram = (gram.fill_diagonal_(0).numpy() for gram in grams)
    images = len(first_gram)

    def cka(drawn: Numbers, axis: int) -> Numbers:
        rows = drawn.reshape(-1, images)
        times = np.stack([np.bincount(row, minlength=images) for row in rows]).astype(float)
        shared = _dependence(first_gram, other_gram, times)
        own = [_dependence(gram, gram, times) for gram in (first_gram, other_gram)]
        scale = np.sqrt(np.maximum(own[0] * own[1], 0))
        alike = np.divide(shared, scale, out=np.zeros_like(scale), where=scale > 0)
        return np.asarray(alike.reshape(drawn.shape[:-1]))

    return estimated(cka, np.arange(images), seed=seed)


def _dependence(first: Numbers, other: Numbers, times: Numbers) -> Numbers:
    r"""Return n(n - 3) times the unbiased H, where image i is counted :math:`t_i` times.

    .. math:: t^\top (K \circ L)\,t + \frac{t^\top K t \; t^\top L t}{(n - 1)(n - 2)}
              - \frac{2}{n - 2} \sum_i t_i (K t)_i (L t)_i

    Args:
        first: K, a Gram matrix (images, images) whose diagonal is 0.
        other: L, another.
        times: t, (resamplings, images); each row sums to n.
    """
    of_first, of_other, n = times @ first, times @ other, times.shape[1]
    means = (of_first * times).sum(1) * (of_other * times).sum(1) / ((n - 1) * (n - 2))
    together = ((times @ (first * other)) * times).sum(1)
    return np.asarray(together + means - 2 / (n - 2) * (times * of_first * of_other).sum(1))


def _few(labels: Tensor, shots: int, *, seed: int, drawing: int) -> Tensor:
    """Draw so many images of each class; indices."""
    generator = generator_for(seed, "probe", str(shots), str(drawing))
    order = torch.randperm(len(labels), generator=generator)
    own = [order[labels[order] == label][:shots] for label in range(int(labels.max()) + 1)]
    return torch.cat(own)


def _hits(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Numbers:
    """Whether a ridge classifier names each test image, (test images,), 0 or 1."""
    from sklearn.linear_model import RidgeClassifierCV  # takes a second to import

    scale = train[0].square().mean().sqrt().clamp_min(1e-12)
    (features, labels), (images, expected) = train, test
    probe = RidgeClassifierCV(STRENGTHS).fit((features / scale).numpy(), labels.numpy())
    named = probe.predict((images / scale).numpy())
    return np.asarray(named == expected.numpy(), dtype=float)
