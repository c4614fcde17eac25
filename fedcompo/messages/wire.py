r"""Writes tensors in fewer bits for the wire, reads them back, and measures the rounding error.

- *bfloat16*: each number rounded to 8 significant bits.
- *int8*: blocks of :data:`BLOCK` numbers, in the order of indices; of each the scale
  :math:`s = \max|x| / q_{max}` (float32) and the codes :math:`q = \mathrm{round}(x / s)` (8 bits),
  so that no number is off by more than s/2. Source: Dettmers et al., *8-bit Optimizers via
  Block-wise Quantization*, ICLR 2022 (arXiv 2110.02861), with uniform codes.

Two sorts of numbers are transformed first, so that rounding does least harm. A Fisher is
heavy-tailed and never negative: int8 codes its square root, in 255 steps; Kronecker factors are
roots already. (IA)³'s l starts at one: l - 1 is coded, from which τ is made.

The sender decodes what it has sent: both sides continue with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcompo.config.choices import Wire
from fedcompo.errors import FileFormatError
from fedcompo.messages.body import FISHER, TASK_VECTOR
from fedcompo.method.kronecker import LEFT, RIGHT

BLOCK = 256
"""Numbers that share a scale: 4 bytes more for 256."""
CODED = (f"{TASK_VECTOR}/", f"{FISHER}/")
"""Prefixes of tensors that are coded; heads and mixtures are small, and sent as they are."""
SCALES = "scales/"
_LARGEST = {torch.int8: 127, torch.uint8: 255}


def encode(tensors: Mapping[str, Tensor], wire: Wire) -> dict[str, Tensor]:
    """Write tensors in the wire's numbers.

    Args:
        tensors: By name, any shapes; those under :data:`CODED` are coded, the others left alone.
        wire: float32 leaves everything alone.

    Returns:
        The tensors, in int8 with ``scales/<name>``, (blocks,), beside each that is coded.
    """
    coded = dict(tensors)
    for name in _coded(tensors) if wire is not Wire.FLOAT32 else ():
        values = tensors[name].float()
        if _starts_at_one(name):
            values = values - 1
        if wire is Wire.BFLOAT16:
            coded[name] = values.bfloat16()
        elif _is_diagonal(name):
            coded[name], coded[f"{SCALES}{name}"] = _quantised(values.sqrt(), torch.uint8)
        else:
            coded[name], coded[f"{SCALES}{name}"] = _quantised(values, torch.int8)
    return coded


def decode(tensors: Mapping[str, Tensor], wire: Wire, *, source: str) -> dict[str, Tensor]:
    """Read what :func:`encode` wrote; nothing of the wire is left in the result.

    Returns:
        The tensors under the names they had, those that were coded in float32.

    Raises:
        FileFormatError: If codes are not of the wire's dtype, or scales not one a block.
    """
    if wire is Wire.FLOAT32:
        return dict(tensors)
    read = {name: t for name, t in tensors.items() if not name.startswith(SCALES)}
    for name in _coded(read):
        fisher = _is_diagonal(name)
        if wire is Wire.BFLOAT16:
            _expect_dtype(name, read[name], torch.bfloat16, source)
            values = read[name].float()
        else:
            _expect_dtype(name, read[name], torch.uint8 if fisher else torch.int8, source)
            values = _restored(name, read[name], tensors.get(f"{SCALES}{name}"), source)
            values = values.square() if fisher else values
        read[name] = values + 1 if _starts_at_one(name) else values
    return read


def relative_error(meant: Mapping[str, Tensor], arrived: Mapping[str, Tensor]) -> float:
    r"""Distance between tensors, in lengths: :math:`\lVert x - y\rVert_2 / \lVert x\rVert_2`.

    Args:
        meant: x, by name.
        arrived: y, same names and shapes.

    Returns:
        0 where they agree, also where both are zero.
    """
    off = math.fsum(
        float((x.double() - arrived[name].double()).square().sum()) for name, x in meant.items()
    )
    length = math.fsum(float(x.double().square().sum()) for x in meant.values())
    return math.sqrt(off / length) if length > 0 else math.sqrt(off)


def _coded(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.startswith(CODED)]


def _is_diagonal(name: str) -> bool:
    return name.startswith(f"{FISHER}/") and not name.endswith((LEFT, RIGHT))


def _starts_at_one(name: str) -> bool:
    return name.startswith(f"{TASK_VECTOR}/") and name.endswith("/l")


def _quantised(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes in the shape of the values, and scales, (blocks,).

    A number that is not finite makes its block's scale so: what arrives is not finite either, and
    is refused as it would be in float32.
    """
    largest = _LARGEST[dtype]
    flat = values.flatten()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1) / largest
    steps = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(1)
    codes = (blocks / steps).nan_to_num(0.0).round().clamp(-largest, largest).to(dtype)
    return codes.flatten()[: flat.numel()].view(values.shape), scales


def _restored(name: str, codes: Tensor, scales: Tensor | None, source: str) -> Tensor:
    count = -(-codes.numel() // BLOCK)
    if scales is None or scales.shape != (count,) or scales.dtype != torch.float32:
        actual = "none" if scales is None else f"{tuple(scales.shape)} of {scales.dtype}"
        raise FileFormatError(
            f"The scales of {name!r} of {source} are {actual}, expected ({count},) of "
            f"{torch.float32}. Use the same fedcompo version everywhere."
        )
    flat = codes.flatten().float()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK) * scales.unsqueeze(1)
    return blocks.flatten()[: flat.numel()].view(codes.shape)


def _expect_dtype(name: str, codes: Tensor, expected: torch.dtype, source: str) -> None:
    if codes.dtype != expected:
        raise FileFormatError(
            f"Tensor {name!r} of {source} came in {codes.dtype}, expected {expected}. Use the same "
            "fedcompo version everywhere."
        )
