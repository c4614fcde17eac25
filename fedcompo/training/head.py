r"""The head of a client while it trains.

It acts on features divided by their root mean square s over the client's own images at
:math:`\theta_0`, and s is folded back into its weight at the end. So a backbone whose features are
larger by a factor, which is the same function for any linear head, trains alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcompo.backbone.backbone import Backbone
from fedcompo.method.features import extract_features
from fedcompo.method.heads import Head
from fedcompo.method.images import Images, part_of

IMAGES = 256
"""Most images whose features the scale is taken of."""


def feature_scale(backbone: Backbone, images: Images) -> tuple[float, float]:
    """Return the root mean square of the pre-trained features, and their variance in all.

    Args:
        backbone: Pre-trained weights.
        images: (count, channels, size, size), uint8; of many, some evenly spaced ones are used.

    Returns:
        Both positive: one where the features are all zero, or all the same.
    """
    some = part_of(images, slice(None, None, max(1, -(-len(images) // IMAGES))))
    features = extract_features(backbone.forward({}), some).double()
    variance = float(features.var(0, correction=0).sum())
    return float(features.square().mean().sqrt()) or 1.0, variance or 1.0


class HeadTraining:
    """Rows of a head, trainable or fixed."""

    def __init__(
        self, start: Head, *, scale: float, fixed: bool = False, device: torch.device
    ) -> None:
        """Copy a head.

        Args:
            start: Where training begins.
            scale: s.
            fixed: Whether it stays as it is.
            device: Where to train.
        """
        self._start, self._scale, self._fixed = start, scale, fixed
        weight = (start.weight.double() * scale).float()
        self.weight = nn.Parameter(weight.to(device), requires_grad=not fixed)
        self.bias = nn.Parameter(start.bias.float().to(device, copy=True), requires_grad=not fixed)

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained: weight (classes, features) and bias (classes,), or nothing."""
        return [] if self._fixed else [self.weight, self.bias]

    def logits(self, features: Tensor) -> Tensor:
        """Return (batch, classes) of features (batch, features)."""
        return F.linear(features / self._scale, self.weight, self.bias)

    def result(self) -> Head:
        """Return the head as it is now, on the CPU."""
        if self._fixed:
            return self._start
        weight = (self.weight.detach().double() / self._scale).float()
        return Head(self._start.classes, weight.cpu(), self.bias.detach().cpu())
