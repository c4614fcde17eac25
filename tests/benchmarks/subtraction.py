"""What two published models tell of the clients that were removed between them.

    fedcompo simulate --engine in-process --set data=npz:cifar100_32.npz --set num-tasks=5
    python tests/benchmarks/subtraction.py runs/*/registry

The attacker knows the pre-trained weights, both published files and the rank of the LoRAs. It
divides each model's change by its factor and subtracts: what is left is the sum of the removed task
vectors, which it cuts to their rank. The model after has 0.8 times the factor of the model before,
as after another vote. Batches begin with each client in turn; all figures are about the first of a
batch. They are means over clients, then mean and standard deviation over registries.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cli_runs import CLASSES
from measuring import head, options, parsed, row, run
from registry_builders import member, registry_of
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from fedcompo.audit.evaluation import clients_data, run_config_of
from fedcompo.audit.membership import losses
from fedcompo.backbone.backbone import Backbone
from fedcompo.data.client_data import Split, set_aside
from fedcompo.export.selection import from_registry
from fedcompo.method.deltas import Weights
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head
from fedcompo.registry.registry import Registry

LATER = 0.8
"""Factor after the removal, as a share of the one before."""
SHRINKAGE = 0.3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TABLES = {
    "task vector": ("cosine", "error", "cosine, cut", "error, cut", "cosine, factors fitted"),
    "images": ("energy, trained on", "own test", "another client's", "AUC"),
    "class means": ("cosine, own class", "another client's"),
}
"""Columns by table."""
Figures = dict[tuple[str, str, str, str], list[float]]
"""By table, what is published, how many leave at once, column."""
Moments = dict[str, Tensor]
"""Second moments of the inputs of each target weight about the pooled mean, (in, in)."""


@dataclass(frozen=True)
class Client:
    """A client's images, and what the layers of θ₀ see of them."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    seen: tuple[Moments, Moments]
    """Of images that were trained on, and of test images."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("registries", nargs="*", type=Path, help="of LoRAs; default: of digits")
    parser.add_argument("--data", help="images; default: those that the clients were trained on")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--clients", type=int, help="so many of each registry leave first; all")
    given = parsed(parser, data="digits", batches=[1, 2])
    torch.set_num_threads(1)
    found: Figures = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for path in given.registries or [made_up(Path(folder), toy=given.toy)]:
            own: Figures = defaultdict(list)
            with torch.no_grad():
                Attack(Registry(path), given.data, own).run(given.batches, given.clients)
            for key, values in own.items():
                found[key].append(statistics.fmean(values))
    for table, columns in TABLES.items():
        print()
        head(table, "removed at once", *columns)
        for about in dict.fromkeys(key[1:3] for key in found if key[0] == table):
            row(*about, *(shown(found.get((table, *about, column), [])) for column in columns))


def made_up(folder: Path, *, toy: bool) -> Path:
    """A registry of LoRAs of the digits."""
    if toy:
        clients = enumerate(CLASSES.items())
        members = (member(name, seed=seed, classes=own) for seed, (name, own) in clients)
        return registry_of(folder / "registry", *members).path
    run("-m", "fedcompo.cli", "simulate", "--output", folder / "run")
    return folder / "run" / "registry"


def shown(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}" if values else "–"


class Attack:
    """All figures of one registry."""

    def __init__(self, registry: Registry, data: str | None, figures: Figures) -> None:
        self.registry, self.figures = registry, figures
        self.backbone, self.head = registry.backbone.load(), registry.joint_head()
        self.composed = registry.theta_p()
        self.theta_0 = {name: self.backbone.theta_0[name] for name in self.composed}
        self.clients = clients_of(registry, self.backbone, data)
        factors = registry.contribution(registry.clients[0]).task_vector.tensors
        self.ranks = {name: len(factors[f"{name}/A"]) for name in self.theta_0}

    def run(self, batches: Sequence[int], clients: int | None) -> None:
        for place, own in enumerate(self.clients[:clients]):
            around = [*self.clients[place:], *self.clients[:place]]
            tau = self.registry.contribution(own.name).task_vector.dense(self.theta_0)
            self.leak("true task vector", "1", tau, self.head, around)
            auc = membership(self.backbone, self.composed, self.head, own)
            self.note("images", "model before", "0", AUC=auc)
            for name, dtype in DTYPES.items():
                before, rows = rounded(self.composed, dtype), rounded_head(self.head, dtype)
                self.from_head(name, before, rows, around)
                for size in batches:
                    gone = tuple(client.name for client in around[:size])
                    after = rounded(self.after(gone), dtype)
                    best = self.recovered(name, before, after, tau, size)
                    self.leak(name, str(size), best, rows, around)

    def note(self, table: str, published: str, size: str, **values: float) -> None:
        for column, value in values.items():
            self.figures[table, published, size, column].append(value)

    def after(self, gone: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        scale = LATER * self.registry.factor * (len(self.clients) - len(gone))
        return from_registry(self.registry, without=gone, scale=scale).stream()

    def recovered(
        self, name: str, before: Weights, after: Weights, tau: Weights, size: int
    ) -> Weights:
        """Estimate the removed task vectors' sum, compare it with one of them, and return it."""
        factor, ranks = self.registry.factor, {n: size * r for n, r in self.ranks.items()}
        change = {n: (before[n] - start) / factor for n, start in self.theta_0.items()}
        later = {n: (after[n] - start) / factor for n, start in self.theta_0.items()}
        raw = {n: change[n] - later[n] / LATER for n in change}
        best = {n: cut(value, ranks[n]) for n, value in raw.items()}
        ratio = fitted(change, later, ranks)
        blind = {n: cut(change[n] - ratio * later[n], ranks[n]) for n in change}
        values: dict[str, Any] = {"cosine": cosine(raw, tau), "error": error(raw, tau)}
        values |= {"cosine, cut": cosine(best, tau), "error, cut": error(best, tau)}
        values |= {"cosine, factors fitted": cosine(blind, tau)}
        self.note("task vector", name, str(size), **values)
        return best

    def leak(
        self, name: str, size: str, tau: Weights, head: Head, around: Sequence[Client]
    ) -> None:
        """Note what a task vector tells of the first client's images, beside others' images."""
        own, other = around[0], around[-1]
        theta = {n: start + tau[n] for n, start in self.theta_0.items()}
        subspaces = {n: leading(value, self.ranks[n]) for n, value in tau.items()}
        moments = dict(zip(TABLES["images"], (*own.seen, other.seen[0]), strict=False))
        values = {column: energy(subspaces, seen) for column, seen in moments.items()}
        auc = membership(self.backbone, theta, head, own)
        self.note("images", name, size, **values, AUC=auc)

    def from_head(self, name: str, before: Weights, head: Head, around: Sequence[Client]) -> None:
        """Note how well rows of the head give class means, W = S⁻¹ μ, by others' covariance S."""
        own, other = around[0], around[-1]
        public = [labelled(self.backbone, before, client.test) for client in around[1:]]
        means = torch.cat([features for _, features in public])
        spread = torch.cat([residues for residues, _ in public])
        shared = spread.T @ spread / max(1, len(spread) - len(means))
        level = SHRINKAGE * shared.diagonal().mean()
        shared = (1 - SHRINKAGE) * shared + level * torch.eye(len(shared))
        middle, guessed = means.mean(0), head.rows(own.classes).weight @ shared
        true, control = (labelled(self.backbone, before, c.train)[1] for c in (own, other))
        against = nn.functional.normalize(guessed - middle)
        cosines = [against @ nn.functional.normalize(some - middle).T for some in (true, control)]
        values = float(cosines[0].diagonal().mean()), float(cosines[1].mean())
        self.note(
            "class means", name, "any", **dict(zip(TABLES["class means"], values, strict=True))
        )


def clients_of(registry: Registry, backbone: Backbone, data: str | None) -> list[Client]:
    """Read the members' images, and the second moments of what the layers see of them."""
    config = run_config_of(registry, data)
    share, seed, found = config.train.aside, config.seed, []
    for own in clients_data(config.data, backbone, seed=seed, wanted=registry.clients):
        train = set_aside(own.train, share=share, seed=seed, client=own.name)[0]
        sums = inputs(backbone, train), inputs(backbone, own.test)
        found.append(Client(own.name, own.classes, train, own.test, sums))
    pooled = [client.seen[1] for client in found]
    middle = {n: sum(seen[n][-1] for seen in pooled) for n in pooled[0]}
    return [
        Client(c.name, c.classes, c.train, c.test, tuple(about(seen, middle) for seen in c.seen))
        for c in found
    ]


def inputs(backbone: Backbone, split: Split) -> Moments:
    """Σ x xᵀ of the inputs x of each target weight with a 1 behind, (in + 1, in + 1)."""
    sums: Moments = {}

    def keep(name: str, inputs: Tensor) -> None:
        rows = nn.functional.pad(inputs.flatten(0, -2), (0, 1), value=1.0)
        sums[name] = sums.get(name, 0) + rows.T @ rows

    with ExitStack() as hooks:
        for name in backbone.theta_0:
            module = backbone.model.get_submodule(name.removesuffix(".weight"))
            handle = module.register_forward_pre_hook(lambda _, given, n=name: keep(n, given[0]))
            hooks.callback(handle.remove)
        extract_features(backbone.forward({}), split.images)
    return sums


def about(sums: Moments, pooled: Mapping[str, Tensor]) -> Moments:
    """Second moments about the mean that the last rows of pooled sums give, (in, in)."""
    centred = {}
    for name, value in sums.items():
        mean, total, count = pooled[name][:-1] / pooled[name][-1], value[-1, :-1], value[-1, -1]
        cross = torch.outer(total, mean)
        centred[name] = value[:-1, :-1] - cross - cross.T + count * torch.outer(mean, mean)
    return centred


def energy(subspaces: Mapping[str, Tensor], seen: Moments) -> float:
    """Share of the inputs' energy in each layer's subspace, (rank, in); mean over layers."""
    return statistics.fmean(
        float((v @ seen[name] @ v.T).trace() / seen[name].trace()) for name, v in subspaces.items()
    )


def labelled(backbone: Backbone, theta: Weights, split: Split) -> tuple[Tensor, Tensor]:
    """Features minus their class's mean, (count, features), and the means, (classes, features)."""
    features = extract_features(backbone.forward(theta), split.images)
    means = torch.stack([features[split.labels == k].mean(0) for k in split.labels.unique()])
    return features - means[torch.unique(split.labels, return_inverse=True)[1]], means


def membership(backbone: Backbone, theta: Weights, head: Head, own: Client) -> float:
    """AUC of low loss among the client's classes: images trained on against test images."""
    rows = head.rows(own.classes)
    inside, outside = (
        losses(rows(extract_features(backbone.forward(theta), part.images)), part.labels)
        for part in (own.train, own.test)
    )
    return float((inside.unsqueeze(1) < outside).double().mean())


def rounded(weights: Mapping[str, Tensor] | Iterable[Any], dtype: torch.dtype) -> Weights:
    return {name: weight.to(dtype).float() for name, weight in dict(weights).items()}


def rounded_head(head: Head, dtype: torch.dtype) -> Head:
    return Head(head.classes, *(part.to(dtype).float() for part in (head.weight, head.bias)))


def leading(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal rows that span its leading right singular vectors, (rank, in)."""
    wide = matrix if len(matrix) < matrix.shape[1] else matrix.T
    vectors = torch.linalg.eigh(wide.double() @ wide.T.double())[1][:, -rank:].to(matrix).T
    return vectors if wide is not matrix else torch.linalg.qr((vectors @ matrix).T)[0].T


def cut(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of this rank."""
    rows = leading(matrix, rank)
    return matrix @ rows.T @ rows


def fitted(change: Weights, later: Weights, ranks: Mapping[str, int]) -> float:
    """Ratio of the factors: that at which a difference is nearest to the rank of who left."""
    name = min(change, key=lambda n: (change[n].numel(), n))

    def rest(logarithm: float) -> float:
        values = torch.linalg.svdvals(change[name] - 2.0**logarithm * later[name]).square()
        return float(values[ranks[name] :].sum() / values.sum())

    start = min((step / 10 for step in range(-20, 21)), key=rest)
    return float(
        2.0 ** minimize_scalar(rest, bounds=(start - 0.1, start + 0.1), method="bounded").x
    )


def flat(weights: Weights) -> Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)]).double()


def cosine(found: Weights, true: Weights) -> float:
    return float(nn.functional.cosine_similarity(flat(found), flat(true), dim=0))


def error(found: Weights, true: Weights) -> float:
    return float((flat(found) - flat(true)).norm() / flat(true).norm())


if __name__ == "__main__":
    main()
