"""A client's head while it is trained, and the penalty that pulls it to the one it started from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedcompo.config.run import TrainConfig
from fedcompo.method.heads import Head
from fedcompo.method.penalties import head_penalty
from fedcompo.training.penalty import Anchor


class HeadTraining:
    """Trainable rows of a head."""

    def __init__(
        self,
        start: Head,
        aligned: Head,
        anchor: Anchor | None,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        """Begin at a head.

        Args:
            start: Where training begins.
            aligned: What the penalty pulls to; same classes.
            anchor: Metric of the penalty; None: the plain one alone.
            config: Strengths.
            device: Where to train.
        """
        self.classes = start.classes
        self.weight = nn.Parameter(start.weight.float().to(device, copy=True))
        self.bias = nn.Parameter(start.bias.float().to(device, copy=True))
        self._aligned = aligned.weight.float().to(device), aligned.bias.float().to(device)
        zeros = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        given = (anchor.head_weight.to(device), anchor.head_bias.to(device)) if anchor else zeros
        self._fisher = given
        self._strengths = {
            "fisher_strength": config.head_alpha,
            "plain_strength": config.head_decay,
        }

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained: (classes, features) and (classes,)."""
        return [self.weight, self.bias]

    def logits(self, features: Tensor) -> Tensor:
        """Return (batch, classes) of features (batch, features)."""
        return F.linear(features, self.weight, self.bias)

    def penalty(self) -> Tensor:
        """How far the head has gone from the aligned one; a scalar."""
        return torch.stack(
            [
                head_penalty(parameter - aligned, fisher, **self._strengths)
                for parameter, aligned, fisher in zip(
                    self.parameters, self._aligned, self._fisher, strict=True
                )
            ]
        ).sum()

    def result(self) -> Head:
        """The head as it is now, on the CPU."""
        return Head(self.classes, self.weight.detach().cpu(), self.bias.detach().cpu())
