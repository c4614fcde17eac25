r"""The range of the numbers that a client sends: what follows from them is finite.

A number is converted to float32, in which models compute, and then compared with a limit. float32
ends at :math:`2^{128}`. With :math:`2^{24}` entries in a weight, :math:`2^{12}` ranks and
:math:`2^{14}` features at most, these are below it:

- :data:`PARAMETER`: the squared length of a product BA, :math:`2^{24} (2^{12} 2^{16} 2^{16})^2 =
  2^{112}`. What is summed is at most :math:`2^{10}`; see :mod:`fedcompo.composition.fixed_point`;
- :data:`FISHER`, of a *sum* over images: :math:`\tau^\top F\,\tau`, :math:`2^{24} 2^{10} 2^{60}
  2^{10} = 2^{104}`. Kronecker factors are roots;
- :data:`HEAD` and :data:`FEATURE`: a logit, :math:`2^{14} 2^{40} 2^{20} = 2^{74}`. A variance is
  within a feature's square. Sums of features: see :mod:`fedcompo.method.statistics`.

What is trained is of order one to a thousand, far below.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import torch
from torch import Tensor

from fedcompo.errors import ContributionError

PARAMETER = 2.0**16
"""Largest parameter of a task vector."""
HEAD = 2.0**40
"""Largest number in a head."""
FISHER = 2.0**60
"""Largest number in a sum of Fishers."""
FEATURE = 2.0**20
"""Largest mean of a feature."""
MOST_IMAGES = 2**31
"""Most images that a client has of a class, and in all."""
FEWEST = 3
"""Number of clients from which on one can stand out among the others."""
STRANGE = 100.0
"""Largest mean square of a client's features, and trace of its Fisher, beside the others'."""
FLOATS = torch.float32, torch.float64, torch.float16, torch.bfloat16


def check_floats(tensor: Tensor, what: str) -> None:
    """Raise ``ContributionError`` if a tensor is not of 16, 32 or 64 bit floating point."""
    if tensor.dtype not in FLOATS:
        raise ContributionError(f"{what} has dtype {tensor.dtype}, expected floating point.")


def check_range(
    tensor: Tensor, largest: float, what: str, *, least: float | None = None, hint: str = ""
) -> None:
    """Refuse numbers that are out of range once they are float32, or not finite.

    Args:
        tensor: Any shape.
        largest: Largest number.
        what: Name of the tensor and of its owner, for the error message.
        least: Smallest number; None: minus the largest.
        hint: What to do, for the error message.

    Raises:
        ContributionError: If it has another dtype, or a number is out of range.
    """
    check_floats(tensor, what)
    least, values = -largest if least is None else least, tensor.detach().float()
    low, high = values.aminmax() if values.numel() else (least, least)
    if not (low >= least and high <= largest):  # also if one is not a number
        inside = (values >= least) & (values <= largest)
        raise ContributionError(
            f"{what} has {int((~inside).sum())} values that are not finite or out of range in "
            f"float32, expected {least:g} to {largest:g}.{hint and ' '}{hint}"
        )


def beyond(values: Mapping[str, float], ratio: float) -> dict[str, float]:
    """Find clients whose value is more than a multiple of what is usual beside it.

    Usual is the median of the others' values, the smallest of them left aside. So no single client
    has another found: who is found exceeds the multiple of the median of the others whichever one
    of them is not counted.

    Returns:
        What is usual, by client; empty among fewer than :data:`FEWEST`, and where it is zero.
    """
    if len(values) < FEWEST:
        return {}
    _, *rest = ordered = sorted(values.values())

    def usual(value: float) -> float:
        own = max(bisect_left(ordered, value) - 1, 0)  # who is smallest leaves the next aside
        lower, upper = (len(rest) - 2) // 2, (len(rest) - 1) // 2
        return (rest[lower + (lower >= own)] + rest[upper + (upper >= own)]) / 2

    found = {client: usual(value) for client, value in values.items()}
    return {c: found[c] for c, value in values.items() if value > ratio * found[c] > 0}
