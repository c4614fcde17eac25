"""A backbone that reads texts: a small transformer over bytes, made of timm's own blocks.

The rest of fedcompo treats it as any timm model. It is registered under its name: in a program
that imports this module, ``timm.create_model("byte_transformer_small")`` builds it. Its weights in
``blocks.*`` have the names of a vision transformer's, and get the same task vectors::

    bytes (batch, 1, 1, length) -> embedding of each byte -> overlapping windows, one token each
    -> + position -> blocks -> norm -> mean over the tokens with text -> features (batch, features)

A text is UTF-8, cut to ``length`` bytes or filled with zeros; the model sees bytes, not characters.
Windows instead of single bytes give a quarter of the tokens, as in *CANINE* (Clark et al., TACL
2022, arXiv 2103.06874), so that one core can train attention over 32 tokens.
"""

from __future__ import annotations

from typing import Any

import timm as timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fedcompo.config.choices import Modality

BYTES = 256
FILLING = 0
"""Byte that fills short texts; no text contains it."""
LENGTH = 128
"""Bytes of a text by default."""

default_cfgs = generate_default_cfgs(
    {
        "byte_transformer_small": {
            "input_size": (1, 1, LENGTH),
            "fixed_input_size": True,
            # Undo the division by 255 that pixels go through: bytes arrive as they are.
            "mean": (0.0,),
            "std": (1 / 255,),
            "crop_pct": 1.0,
            "num_classes": 0,
            "classifier": "head",
        }
    }
)


class ByteTransformer(nn.Module):
    """Maps bytes to features, or with classes to logits."""

    modality = Modality.TEXTS

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = LENGTH,
        in_chans: int = 1,
        num_classes: int = 0,
        stride: int = 4,
        embed_dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
    ) -> None:
        """Make a model with random weights; the arguments have timm's names.

        Args:
            img_size: Bytes of a text, a multiple of ``stride``; or as (1, bytes).
            in_chans: 1.
            num_classes: Rows of the classifier; 0: none, return features.
            stride: Bytes from one token to the next, even; its window is twice as wide.
            embed_dim: Width of the tokens, and number of features; even.
            depth: Number of blocks.
            num_heads: Attention heads of a block.
            mlp_ratio: Width of a block's hidden layer, as a multiple of ``embed_dim``.

        Raises:
            ValueError: If ``img_size`` is no multiple of ``stride``, or ``in_chans`` is not 1.
        """
        super().__init__()
        length = img_size if isinstance(img_size, int) else img_size[-1]
        if length % stride or in_chans != 1:
            raise ValueError(
                f"a text of {length} bytes and {in_chans} channel(s) cannot be read; `image-size` "
                f"must be a multiple of {stride}, and `channels` 1"
            )
        self.num_classes, self.num_features, self.stride = num_classes, embed_dim, stride
        self.byte_embed = nn.Embedding(BYTES, embed_dim // 2)
        self.windows = nn.Conv1d(
            embed_dim // 2, embed_dim, kernel_size=2 * stride, stride=stride, padding=stride // 2
        )
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, length // stride, embed_dim))
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def forward(self, texts: Tensor) -> Tensor:
        """Compute the features, or logits, of texts.

        Args:
            texts: (batch, 1, 1, length), bytes as numbers of any type.

        Returns:
            (batch, features), or (batch, classes).
        """
        text = texts.flatten(1).round().long()  # (batch, length)
        embedded = self.byte_embed(text).mT  # (batch, dim / 2, length)
        tokens = self.windows(embedded).mT  # (batch, tokens, dim)
        tokens = self.norm(self.blocks(tokens + self.pos_embed))
        written = (text != FILLING).reshape(len(text), -1, self.stride)
        holds_text = written.any(2, keepdim=True)  # (batch, tokens, 1)
        summed = (tokens * holds_text).sum(1)
        features: Tensor = self.head(summed / holds_text.sum(1).clamp_min(1))
        return features


@register_model  # type: ignore[untyped-decorator]
def byte_transformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build four blocks of width 128 (0.8 million target weights) that read 128 bytes."""
    model: nn.Module = build_model_with_cfg(
        ByteTransformer, "byte_transformer_small", pretrained, **kwargs
    )
    return model
