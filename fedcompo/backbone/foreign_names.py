"""Names of vision transformers in `transformers` (ViT, DeiT, DINOv2, CLIP), as timm's.

In Hugging Face's `transformers`, query, key and value are three layers. timm has one fused
``attn.qkv``, whose rows are those of query, key and value, in this order. The rest is a matter of
names. ``transformers`` 5 has others than its files, and adapters are written under them, so both
are in the tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedcompo.errors import BackboneError

BLOCK = re.compile(r"(?!(?:.*\.)?text_model\.)(?:.*\.)?layers?\.(\d+)\.(.+)")
FUSED = "attn.qkv"
SEPARATE = {
    f"{attention}.{name}": part
    for attention, names in {
        "attention.attention": ("query", "key", "value"),
        "attention": ("q_proj", "k_proj", "v_proj"),
        "self_attn": ("q_proj", "k_proj", "v_proj"),
    }.items()
    for part, name in enumerate(names)
}
"""Layers in a block that are a part of the fused one: 0 query, 1 key, 2 value."""
IN_BLOCK = {
    **dict.fromkeys(SEPARATE, FUSED),
    **dict.fromkeys(
        ("attention.output.dense", "attention.o_proj", "self_attn.out_proj"), "attn.proj"
    ),
    **dict.fromkeys(("intermediate.dense", "mlp.fc1"), "mlp.fc1"),
    **dict.fromkeys(("output.dense", "mlp.fc2"), "mlp.fc2"),
    **dict.fromkeys(("layernorm_before", "layer_norm1", "norm1"), "norm1"),
    **dict.fromkeys(("layernorm_after", "layer_norm2", "norm2"), "norm2"),
    **{f"layer_scale{i}": f"ls{i}" for i in (1, 2)},
}
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    **{
        f"{theirs}.{leaf}": f"{ours}.{leaf}"
        for theirs, ours in {
            "embeddings.patch_embeddings.projection": "patch_embed.proj",
            "embeddings.patch_embedding": "patch_embed.proj",
            "pre_layrnorm": "norm_pre",
            "layernorm": "norm",
            "post_layernorm": "norm",
        }.items()
        for leaf in ("weight", "bias")
    },
}
IDLE = "embeddings.position_ids", "embeddings.mask_token"
"""Counts from 0, and what stands for hidden patches in a pre-training: no image meets them."""
PARTS = ("query", "key", "value")


def timm_name(name: str, classifier: str) -> tuple[str, int | None] | None:
    """Return timm's name of a parameter, and its part of a fused layer.

    Args:
        name: As ``transformers`` has it, behind any prefix: ``<layer>.weight``, ``<layer>.bias``.
        classifier: timm's name of the classifier.

    Returns:
        The name, and 0, 1 or 2 of query, key or value, else None; None if it is not in the tables.
    """
    if match := BLOCK.fullmatch(name):
        layer, _, leaf = match[2].rpartition(".")
        if layer not in IN_BLOCK:
            return None
        leaf = "gamma" if leaf == "lambda1" else leaf
        return f"blocks.{match[1]}.{IN_BLOCK[layer]}.{leaf}", SEPARATE.get(layer)
    if match := re.fullmatch(r"(?:.*\.)?classifier\.(weight|bias)", name):
        return f"{classifier}.{match[1]}", None
    for theirs, ours in OUTSIDE.items():
        if name == theirs or (name.endswith(f".{theirs}") and "text_model." not in name):
            return ours, None
    return None


def within(name: str) -> str:
    """Take off what stands before ``blocks.``, as in ``module.blocks.0.attn.qkv.weight``."""
    return re.sub(r"^.*?\.(?=blocks\.\d+\.)", "", name)


def as_timm(path: Path, state: Mapping[str, Tensor], classifier: str) -> dict[str, Tensor]:
    """Give a checkpoint timm's names, with query, key and value fused.

    Args:
        path: Its file, for error messages.
        state: Tensors by name. Where no block is named as in ``transformers``, they stay.
        classifier: timm's name of the classifier.

    Returns:
        Tensors by timm's name; what is in no table under its own.

    Raises:
        BackboneError: If it holds two models, or a part of a fused layer is missing.
    """
    if not any(BLOCK.fullmatch(name) and timm_name(name, classifier) for name in state):
        return dict(state)
    found: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        known = timm_name(name, classifier)
        if known is None:
            if not name.endswith(IDLE):
                found[name] = tensor
            continue
        ours, part = known
        if ours in found or part in fused.get(ours, {}):
            raise BackboneError(
                f"{path} holds several models: {name!r} and another one are {ours!r} in timm. "
                "Save the state dict of the one you want in a file of its own."
            )
        if part is None:
            flat = ours in ("cls_token", "pos_embed") and tensor.ndim < 3  # CLIP has no batch axis
            found[ours] = tensor.reshape(1, -1, tensor.shape[-1]) if flat else tensor
        else:
            fused.setdefault(ours, {})[part] = tensor
    for ours, parts in fused.items():
        if missing := [name for part, name in enumerate(PARTS) if part not in parts]:
            raise BackboneError(
                f"{path} lacks the {missing[0]} of {ours!r}; timm's layer has query, key and "
                "value. Save the whole state dict again."
            )
        try:
            found[ours] = torch.cat([parts[part] for part in range(3)])
        except RuntimeError as error:
            shapes = [tuple(parts[part].shape) for part in range(3)]
            raise BackboneError(
                f"In {path}, query, key and value of {ours!r} have shapes {shapes}, which cannot "
                "be fused. It is no plain vision transformer."
            ) from error
    return found
