r"""A model under weights :math:`W + s\Delta` that are trained in :math:`\Delta`'s parameters.

A linear layer needs :math:`W + s\Delta` for one product forward and one backward. Both times it is
made anew, which costs as much as a product of few tokens, and is not kept. From the gradient of the
output, g (tokens, out), and the input, x (tokens, in), a delta computes that of its parameters
without the dense :math:`g^\top x`, if it can. So a step of LoRA takes two large products a layer,
where plain fine-tuning takes three, and keeps x alone (``tests/benchmarks/training_step.py``).
Where (IA)³ is alone and the output is no wider than the input, it scales the output instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedcompo.backbone.backbone import Backbone
from fedcompo.method.deltas import IA3, Delta, Weights


@contextmanager
def trained_forward(
    backbone: Backbone,
    deltas: Mapping[str, Delta],
    base: Weights,
    scale: float,
    *,
    checkpointed: bool = False,
) -> Iterator[Callable[[Tensor], Tensor]]:
    r"""Put :math:`W + s\Delta` into the model; gradients are to be taken before this ends.

    Args:
        backbone: Its model is frozen, and as before at the end.
        deltas: :math:`\Delta` by weight name.
        base: W by weight name, each (out, in), on the backbone's device.
        scale: s.
        checkpointed: Whether to keep the inputs of blocks alone, and run each again for gradients.

    Yields:
        The map from uint8 images to features, (batch, features).
    """
    model, places = backbone.model, []
    blocks = list(model.blocks) if checkpointed else []  # type: ignore[arg-type]
    for name in deltas:
        layer, _, own = name.rpartition(".")
        places.append((model.get_submodule(layer)._parameters, own, base[name], deltas[name]))
    before = [parameters[own] for parameters, own, *_ in places]
    try:
        for parameters, own, weight, delta in places:
            parameters[own] = _Changed.of(weight, delta, scale)  # type: ignore[assignment]
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield lambda images: model(backbone.preprocessing.normalise(images.to(backbone.device)))
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
        for (parameters, own, *_), parameter in zip(places, before, strict=True):
            parameters[own] = parameter


class _Changed(Tensor):
    r"""W, which a linear layer multiplies by as :math:`W + s\Delta`; all else sees that, dense."""

    base: Tensor
    delta: Delta
    scale: float

    @classmethod
    def of(cls, base: Tensor, delta: Delta, scale: float) -> _Changed:
        changed = base.detach().as_subclass(cls)
        changed.base, changed.delta, changed.scale = base.detach(), delta, scale
        return changed

    def scales_output(self, delta: IA3) -> bool:
        r"""Whether :math:`x W_0^\top \odot l` is all, and keeping it no more than keeping x."""
        out, width = self.base.shape
        alone = self.scale == 1 and self.base.data_ptr() == delta.weight.data_ptr()
        return alone and out <= width

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_dense(args), **_dense(kwargs))


def _dense(value: Any) -> Any:
    """Replace changed weights in arguments by what they stand for, differentiably."""
    if isinstance(value, _Changed):
        return value.base + value.scale * value.delta()
    if isinstance(value, list | tuple):
        return type(value)(map(_dense, value))
    return {k: _dense(v) for k, v in value.items()} if isinstance(value, dict) else value


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply as ``F.linear``, whose arguments' names these are."""
    if not isinstance(weight, _Changed):
        return F.linear(_dense(input), weight, _dense(bias))
    trained = bias is not None and bias.requires_grad
    if trained or isinstance(input, _Changed) or input.dim() < 2:
        return F.linear(_dense(input), _dense(weight), _dense(bias))
    delta = weight.delta
    if isinstance(delta, IA3) and weight.scales_output(delta):
        product = F.linear(input, weight.base)
        scales = delta.l.T.to(product)
        return (
            product * scales if bias is None else torch.addcmul(bias.to(product), product, scales)
        )
    result: Tensor = _Product.apply(
        input, bias, weight.base, delta, weight.scale, *delta.parameters()
    )
    return result


class _Product(torch.autograd.Function):
    r""":math:`x (W + s\Delta)^\top + b`, differentiable in x and the delta's parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        base: Tensor,
        delta: Delta,
        scale: float,
        *parameters: Tensor,
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.delta, ctx.scale = delta, scale
        ctx.save_for_backward(x, base, *parameters)
        with torch.autocast(device, enabled=False):
            weight = delta.merged(base, scale).to(x.dtype)
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, base, *_ = ctx.saved_tensors
        g = gradient.flatten(0, -2)
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = (g @ ctx.delta.merged(base, ctx.scale).to(g.dtype)).view(x.shape)
        of_delta = ctx.delta.gradients(g, x.reshape(-1, x.shape[-1]), ctx.scale)
        return of_input, None, None, None, None, *of_delta
