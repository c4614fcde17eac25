"""What an adapter holds for the target weights of a backbone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Adapted:
    """One layer of the adapter's model."""

    layer: str
    """Its name in that model."""
    part: int | None
    """0, 1 or 2 if it is the query, key or value of a fused weight."""
    tensors: dict[str, Tensor]
    """What the adapter has for it, such as ``lora_A.weight`` or ``ia3_l``."""

    def rows(self, out: int) -> slice:
        """Rows that it is of a target weight with so many."""
        if self.part is None:
            return slice(0, out)
        third = out // 3
        return slice(self.part * third, (self.part + 1) * third)


Layers = dict[str, list[Adapted]]
"""By target weight: one layer, or up to three of a fused one."""
