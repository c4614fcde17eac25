r"""Tangent task vectors: features are expanded to first order in the change of the weights.

.. math:: f(x;\tau) = f(x;\theta_0) + J_{\theta_0}(x)\,\tau

with f the backbone's features and J their Jacobian in the target weights. Features are linear in
:math:`\tau`: those of the average :math:`\sum_c w_c\tau_c` are the clients' features, averaged with
the same weights, at the cost of one Jacobian-vector product (JVP) for any number of clients. A
client that is left out has no effect through the others.

As :math:`\partial L/\partial\tau = J_{\theta_0}^\top\,\partial L/\partial f`, a training step is
one JVP and one ordinary backward pass at :math:`\theta_0`, and holds no more activations than a
step of plain fine-tuning. To differentiate through the JVP gives the same gradient; on a CPU it is
a tenth faster, and holds 1.4 to 1.8 times as much (``tests/benchmarks/tangent_step.py``).

Source: Liu & Soatto, *Tangent Model Composition for Ensembling and Continual Fine-tuning*, ICCV
2023 (arXiv 2307.08114).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedcompo.backbone.backbone import Backbone
from fedcompo.errors import BackboneError
from fedcompo.method.deltas import Weights

OfWeights = Callable[[Weights], Tensor]
"""A differentiable function of some of a model's weights, by name."""


def tangent_features(backbone: Backbone, tau: Weights, images: Tensor) -> Tensor:
    r"""Compute the features of a batch under a tangent task vector, differentiable in it.

    Under autocast the JVP and the backward pass both run in its precision.

    Args:
        backbone: Pre-trained weights, in evaluation mode.
        tau: :math:`\tau` by weight name, each (out, in); target weights not named do not change.
        images: (batch, channels, size, size), uint8.

    Returns:
        :math:`f(x;\theta_0) + J\tau`, (batch, features). Its gradient in :math:`\tau` cannot be
        differentiated again.

    Raises:
        BackboneError: If the model uses an operation that has no forward-mode derivative.
    """
    names = sorted(tau)
    if not names:
        return backbone.forward({})(images)
    theta_0 = {name: backbone.theta_0[name] for name in names}
    changes = (tau[name].to(backbone.theta_0[name]) for name in names)

    def features(theta: Weights) -> Tensor:
        return backbone.forward(theta)(images)

    result: Tensor = _ToFirstOrder.apply(features, theta_0, *changes)
    return result


def feature_map(backbone: Backbone, theta: Weights, *, tangent: bool) -> Callable[[Tensor], Tensor]:
    r"""Return the map from uint8 images to features under composed weights.

    Args:
        backbone: Pre-trained weights.
        theta: Composed target weights by name, (out, in); those not named stay pre-trained.
        tangent: Whether they are composed of tangents. The backbone is then linearised at the
            pre-trained weights: :math:`f(x;\theta_0) + J(\theta - \theta_0)`, by one JVP a batch.
    """
    if not tangent:
        return backbone.forward(theta)
    return partial(tangent_features, backbone, change_from(backbone.theta_0, theta))


def change_from(theta_0: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> Weights:
    r"""Return :math:`\tau = \theta - \theta_0` of the weights in ``theta``, like ``theta_0``'s."""
    return {name: theta[name].to(start := theta_0[name]) - start for name in theta}


def square_loss(logits: Tensor, labels: Tensor, target: float) -> Tensor:
    r"""Mean squared error of logits against :math:`\kappa` for the true class, 0 for the others.

    The mean is over batch *and* classes. Logits are (batch, classes), labels (batch,).
    """
    wanted = target * F.one_hot(labels, logits.shape[1])
    return F.mse_loss(logits, wanted.to(logits))


class TangentModel(nn.Module):
    r"""A composition of tangents, used like a timm model: normalised images to logits.

    The classifier is linear in the features, so the whole model is linearised at once: with W and b
    its weight and bias, logits are :math:`W(f(x;\theta_0) + J\tau) + b`.
    """

    def __init__(self, model: nn.Module, tau: Weights) -> None:
        r"""Wrap the model, which is not copied.

        Args:
            model: A timm model at the pre-trained weights, with the joint head.
            tau: :math:`\tau` by name of the model's weights, each (out, in).
        """
        super().__init__()
        self.model = model
        self.tau = nn.Module()
        for name, change in tau.items():  # torch allows no dots in a buffer's name
            self.tau.register_buffer(name.replace(".", "/"), change)
        self.pretrained_cfg = model.pretrained_cfg  # timm asks a model how it wants its images

    def forward(self, images: Tensor) -> Tensor:
        """Classify normalised images (batch, channels, size, size); returns (batch, classes)."""
        tau = {name.replace("/", "."): change for name, change in self.tau.named_buffers()}
        theta_0: Weights = {name: self.model.get_parameter(name) for name in tau}

        def logits(theta: Weights) -> Tensor:
            result = functional_call(self.model, theta, (images,))
            assert isinstance(result, Tensor)
            return result

        return _to_first_order(logits, theta_0, tau)


def _to_first_order(function: OfWeights, theta_0: Weights, tau: Weights) -> Tensor:
    """Return a function's value plus its derivative in the direction of a change: one JVP."""
    try:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
            value, change = jvp(function, (theta_0,), (tau,))[:2]
    except NotImplementedError as error:
        reason, *_ = str(error).split("\n")
        raise BackboneError(
            f"The backbone cannot be linearised: {reason} "
            "Choose another `kind` than tangent, or a plain vision transformer."
        ) from error
    result: Tensor = value + change
    return result


class _ToFirstOrder(torch.autograd.Function):
    """Forward: one JVP. Backward: one ordinary backward pass at θ₀."""

    @staticmethod
    def forward(ctx: Any, function: OfWeights, theta_0: Weights, *tau: Tensor) -> Tensor:
        device = tau[0].device.type
        ctx.function, ctx.theta_0 = function, theta_0
        ctx.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device)
        )
        return _to_first_order(function, theta_0, dict(zip(theta_0, tau, strict=True)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        _, _, *needed = ctx.needs_input_grad
        wanted = [name for name, need in zip(ctx.theta_0, needed, strict=True) if need]
        theta_0 = {name: ctx.theta_0[name].detach().requires_grad_() for name in wanted}
        with torch.enable_grad(), ctx.autocast:
            value = ctx.function(theta_0)
        gradients = torch.autograd.grad(
            value, list(theta_0.values()), cotangent.to(value), materialize_grads=True
        )
        by_name = dict(zip(wanted, gradients, strict=True))
        return None, None, *(by_name.get(name) for name in ctx.theta_0)
