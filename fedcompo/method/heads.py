r"""The classifiers: one a client, and the joint head that holds them side by side.

The backbone's weights are added up, the heads never are: in class-incremental use (class-IL) the
arg max runs over the rows of all clients, in task-incremental use (task-IL) over one client's own.

A head is fitted by minimising cross-entropy plus :math:`\lambda\lVert W - W_{start}\rVert^2` on
features divided by their root mean square: a convex problem, solved by L-BFGS, with one solution
whatever the order of clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcompo.errors import ContributionError
from fedcompo.method.features import FeatureMixture, draw

ITERATIONS = 200


@dataclass(frozen=True)
class Head:
    """A linear classifier; row i belongs to ``classes[i]``."""

    classes: tuple[str, ...]
    weight: Tensor
    """(classes, features)."""
    bias: Tensor
    """(classes,)."""

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits, (batch, classes), of features (batch, features)."""
        return features @ self.weight.to(features).T + self.bias.to(features)

    def as_classifier(self, name: str) -> dict[str, Tensor]:
        """Weights of a model whose classifier has this name, such as ``head``."""
        return {f"{name}.weight": self.weight, f"{name}.bias": self.bias}

    def rows(self, classes: Iterable[str]) -> Head:
        """Return the head of some of the classes, in the order given."""
        classes = tuple(classes)
        index = self.indices(classes)
        return Head(classes, self.weight[index], self.bias[index])

    def indices(self, classes: Iterable[str]) -> Tensor:
        """Positions of classes among this head's rows, (count,)."""
        classes = tuple(classes)
        if unknown := sorted(set(classes) - set(self.classes)):
            raise ContributionError(
                f"The head knows no class {', '.join(unknown)}; it has {', '.join(self.classes)}."
            )
        return torch.tensor([self.classes.index(name) for name in classes])

    def check(self, classes: tuple[str, ...], num_features: int, owner: str) -> None:
        """Refuse a head of other classes, shapes, or not finite; raises ``ContributionError``."""
        expected = (len(classes), num_features), (len(classes),)
        found = tuple(self.weight.shape), tuple(self.bias.shape)
        if self.classes != classes or found != expected:
            raise ContributionError(
                f"The head of {owner} has classes {self.classes} and shapes {found}, expected "
                f"{classes} and {expected}."
            )
        if not (torch.isfinite(self.weight).all() and torch.isfinite(self.bias).all()):
            raise ContributionError(f"The head of {owner} has values that are not finite.")


def zero_head(classes: Iterable[str], num_features: int) -> Head:
    """Return a head that knows nothing."""
    classes = tuple(classes)
    return Head(classes, torch.zeros(len(classes), num_features), torch.zeros(len(classes)))


def fit_head(features: Tensor, labels: Tensor, start: Head, *, ridge: float) -> Head:
    """Fit a head to features, staying near the one it starts from.

    Args:
        features: (count, features).
        labels: (count,), index into ``start.classes``.
        start: Where the fit begins, and what the ridge pulls to.
        ridge: λ, on the scale of features divided by their root mean square.

    Returns:
        The fitted head, float32, on the CPU.
    """
    features, labels = features.double().cpu(), labels.cpu()
    scale = features.square().mean().sqrt().clamp_min(1e-12)
    inputs = torch.cat([features / scale, torch.ones(len(features), 1).double()], 1)
    first = torch.cat([start.weight.double() * scale, start.bias.double().unsqueeze(1)], 1)
    weight = first.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(inputs @ weight.T, labels)
        value = value + ridge * (weight - first).square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    fitted = weight.detach()
    return Head(start.classes, (fitted[:, :-1] / scale).float(), fitted[:, -1].float())


def align(
    mixtures: Mapping[str, list[FeatureMixture]],
    classes: Iterable[str],
    *,
    samples: int,
    ridge: float,
    seed: int,
    start: Head | None = None,
) -> Head:
    """Fit the joint head to features drawn from the mixtures of all clients.

    Args:
        mixtures: By class name, one mixture for each client that owns the class, clients in order
            of their names.
        classes: Names of all classes, in the order of the joint head.
        samples: Features a class.
        ridge: How strongly the head is held to where it starts.
        seed: Seed of the draws.
        start: Where the fit begins; None: zeros.

    Returns:
        The joint head.
    """
    classes = tuple(classes)
    generator = torch.Generator().manual_seed(seed)
    features, labels = draw(mixtures, classes, samples=samples, generator=generator)
    return fit_head(features, labels, start or zero_head(classes, features.shape[1]), ridge=ridge)


def side_by_side(heads: Iterable[tuple[Head, Mapping[str, int]]], classes: Iterable[str]) -> Head:
    """Join the heads of clients into one.

    Args:
        heads: Head of each client and its examples by class; clients that share a class have their
            rows averaged, weighted by their examples of it.
        classes: Names of all classes, in the order of the joint head.

    Returns:
        The joint head.
    """
    heads, classes = list(heads), tuple(classes)
    weights, biases = [], []
    for name in classes:
        owners = [(h.rows([name]), examples[name]) for h, examples in heads if name in h.classes]
        if not owners:
            raise ContributionError(f"No head has the class {name!r}.")
        total = sum(count for _, count in owners)
        weights.append(sum(head.weight[0].double() * (count / total) for head, count in owners))
        biases.append(sum(head.bias[0].double() * (count / total) for head, count in owners))
    return Head(classes, torch.stack(weights).float(), torch.stack(biases).float())  # type: ignore[arg-type]


def head_tensors(head: Head) -> dict[str, Tensor]:
    """A head as tensors; its classes go into the manifest as ``classes``."""
    return {"head/weight": head.weight, "head/bias": head.bias}


def head_from(tensors: Mapping[str, Tensor], classes: list[str]) -> Head:
    """Rebuild a head from :func:`head_tensors` and its classes."""
    return Head(tuple(classes), tensors["head/weight"], tensors["head/bias"])
