"""Gradients of single examples with respect to the weights of linear layers.

One backward pass serves a whole batch. A linear layer's gradient for one example is the sum over
its tokens of (gradient of the output) × (input), and hooks record both. Source: Goodfellow,
*Efficient Per-Example Gradient Computations*, 2015 (arXiv 1510.01799).

A layer may see more rows than examples: windowed attention folds the windows of an image into the
batch. The rows of one example must follow each other; :func:`require_own_rows` tries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fedcompo.errors import BackboneError

CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Memory for per-example gradients of one weight, by device; a larger batch is taken in parts. On a
CPU they fit its cache."""
TRIED = 2
"""Examples on which it is tried out whose rows are whose."""
LEAK = 1e-5
"""Share of a gradient's norm that rounding may put on rows of other examples."""


def squared_gradients(
    record: Mapping[str, tuple[Tensor, GradientEdge]], features: Tensor, cotangent: Tensor
) -> Iterator[tuple[str, slice, Tensor]]:
    """Square each example's gradient of a function of the features, a part of the batch at a time.

    Args:
        record: From :func:`recorded`, after a forward pass.
        features: What that pass returned, (batch, features).
        cotangent: Gradient of the function at each example's features, (batch, features).

    Yields:
        Weight name, the examples of this part, their squared gradients (examples, out, in).
    """
    for name, g, a in _token_factors(record, features, cotangent):
        for part, squares in _squares(g, a):
            yield name, part, squares


def _squares(g: Tensor, a: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield examples, and their squared gradients (examples, out, in), a part at a time."""
    chunk = CHUNK_BYTES.get(g.device.type, CHUNK_BYTES["cuda"])
    step = max(1, chunk // (g.shape[-1] * a.shape[-1] * g.element_size()))
    for start in range(0, len(g), step):
        part = slice(start, start + step)
        yield part, torch.bmm(g[part].mT, a[part]).square_()


def squared_margins(
    record: Mapping[str, tuple[Tensor, GradientEdge]], features: Tensor, cotangent: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    r"""Sum the squared gradients of a batch over columns, and over rows.

    Of few tokens no gradient is formed: the row sums of the squares are the diagonal of
    :func:`gradient_products`' first matrix, the column sums that of the second.

    Args:
        record: From :func:`recorded`, after a forward pass.
        features: What that pass returned, (batch, features).
        cotangent: Gradient of the function at each example's features, (batch, features).

    Yields:
        Weight name, (out,), (in,).
    """
    for name, g, a in _token_factors(record, features, cotangent):
        if 2 * g.shape[1] * (g.shape[2] + a.shape[2]) < g.shape[2] * a.shape[2]:
            rows, columns = ((a @ a.mT @ g).mul_(g), (g @ g.mT @ a).mul_(a))
            yield name, rows.sum((0, 1)).clamp_min_(0), columns.sum((0, 1)).clamp_min_(0)
        else:
            total = sum(squares.sum(0) for _, squares in _squares(g, a))
            assert isinstance(total, Tensor)
            yield name, total.sum(1), total.sum(0)


def gradient_products(
    record: Mapping[str, tuple[Tensor, GradientEdge]], features: Tensor, cotangent: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    r"""Sum :math:`M_x M_x^\top` and :math:`M_x^\top M_x` over a batch's gradients :math:`M_x`.

    With tokens t, :math:`M_x = \sum_t g_t a_t^\top` is never formed: the first is
    :math:`g^\top (a a^\top) g`, the second :math:`a^\top (g g^\top) a`.

    Args:
        record: From :func:`recorded`, after a forward pass.
        features: What that pass returned, (batch, features).
        cotangent: Gradient of the function at each example's features, (batch, features).

    Yields:
        Weight name, (out, out), (in, in).
    """
    for name, g, a in _token_factors(record, features, cotangent):
        left = g.flatten(0, 1).T @ (a @ a.mT @ g).flatten(0, 1)
        yield name, left, a.flatten(0, 1).T @ (g @ g.mT @ a).flatten(0, 1)


def _token_factors(
    record: Mapping[str, tuple[Tensor, GradientEdge]], features: Tensor, cotangent: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield weight names with g, (batch, tokens, out), and a, (batch, tokens, in)."""
    outputs = [edge for _, edge in record.values()]
    gradients = torch.autograd.grad(
        features, outputs, grad_outputs=cotangent.to(features), retain_graph=True
    )
    batch = len(features)
    for (name, (inputs, _)), gradient in zip(record.items(), gradients, strict=True):
        rows = gradient.numel() // gradient.shape[-1]
        if rows % batch:
            raise _refused(name, f"has {rows} rows for {batch} examples, no whole number for each")
        g = gradient.reshape(batch, -1, gradient.shape[-1])
        yield name, g, inputs.reshape(batch, -1, inputs.shape[-1])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode (no dropout), and back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def recorded(
    model: nn.Module, names: Iterable[str]
) -> Iterator[dict[str, tuple[Tensor, GradientEdge]]]:
    """Record input and output of the linear layers whose weights are named, on each forward.

    Of the output it is the place in the graph: an activation may overwrite the numbers.
    The parameters are frozen meanwhile: gradients flow to the layers' outputs alone, and no
    backward pass spends time on sums over the batch.
    """
    record: dict[str, tuple[Tensor, GradientEdge]] = {}
    handles = []
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for name in names:
            handles.append(_linear(model, name).register_forward_hook(_recorder(record, name)))
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield record
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)


def require_recorded(record: Mapping[str, object], names: Iterable[str]) -> None:
    """Refuse weights whose layer the forward pass did not call.

    Raises:
        BackboneError: If there is one. BEiT, for instance, uses the weight of its fused qkv in a
            function of its own.
    """
    if unused := sorted(set(names) - set(record)):
        raise BackboneError.public(
            f"{len(unused)} target weights are used without calling their layer, among them "
            f"{unused[0]!r}; their Fisher cannot be computed. Leave them out of `target-weights`, "
            "or choose a plain vision transformer."
        )


def require_own_rows(
    model: nn.Module,
    images: Tensor,
    names: Iterable[str],
    record: dict[str, tuple[Tensor, GradientEdge]],
) -> None:
    """Try out that a layer's rows of one example follow each other, and no other example's do.

    The gradient of an example's features must be zero at the rows of the others. A single example
    needs no trial: all rows are its own.

    Args:
        model: Maps images to features; in evaluation mode.
        images: A batch; the first two are used.
        names: Weights of linear layers.
        record: From :func:`recorded`; empty before and after.

    Raises:
        BackboneError: If it is not so, or as :func:`require_recorded`.
    """
    features = model(images[:TRIED])
    require_recorded(record, names)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(features.shape, generator=generator).to(features)
    for example in range(len(features)):
        own = torch.zeros_like(direction)
        own[example] = direction[example]
        for name, g, _ in _token_factors(record, features, own):
            norms = g.flatten(1).norm(dim=1)
            total = norms.norm()
            norms[example] = 0
            if norms.norm() > LEAK * total:
                raise _refused(name, "mixes the rows of several examples")
    record.clear()


def _refused(name: str, why: str) -> BackboneError:
    return BackboneError.public(
        f"The layer of {name!r} {why}; the Fisher of its weight cannot be computed. "
        "Leave it out of `target-weights`, or choose a plain vision transformer."
    )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(layer, nn.Linear):
        raise BackboneError.public(
            f"Weight {name!r} belongs to a {type(layer).__name__}; Fisher diagonals are "
            "computed for nn.Linear alone. Choose other `target-weights`."
        )
    return layer


def _recorder(
    record: dict[str, tuple[Tensor, GradientEdge]], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a forward hook that records a layer's input and output under its weight's name."""

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if name in record:
            raise _refused(name, "is called more than once for an image")
        start = not output.requires_grad  # of the graph; such a tensor must not be overwritten
        record[name] = inputs[0].detach(), get_gradient_edge(output.requires_grad_())
        return output.clone() if start else output

    return keep
