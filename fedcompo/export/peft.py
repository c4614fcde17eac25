r"""Writes a selection of clients as one LoRA adapter, which PEFT loads onto the plain timm model.

PEFT turns a layer's output :math:`W_0x` into :math:`W_0x + \tfrac{\alpha}{r}\,BAx`. With α = r at
every layer this is :math:`(W_0 + BA)x`, where BA is the composed change of the weight, or the
nearest of a smaller rank (:mod:`fedcompo.export.low_rank`). timm computes q, k and v of a layer by
one weight, which PEFT adapts as one layer, as fedcompo does: nothing is taken apart. The head
replaces the model's own (``modules_to_save``), so that the adapted model gives the composed model's
logits::

    model = timm.create_model(architecture, num_classes=len(classes), **model_args)
    model.load_state_dict(pretrained, strict=False)  # the backbone's weights; the head comes below
    model = PeftModel.from_pretrained(model, folder)

The format is two files; PEFT is not needed to write them. It is described at
https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedcompo.backbone.adapter import ADAPTER, ADAPTER_CONFIG, PREFIX
from fedcompo.backbone.backbone import EMBEDDED, Backbone
from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneError, ConfigError, ContributionError
from fedcompo.export.example import example
from fedcompo.export.folder import write_card
from fedcompo.export.low_rank import Product, cut, joined
from fedcompo.export.selected import Selection
from fedcompo.export.selection import new_folder
from fedcompo.method.deltas import rank_of
from fedcompo.storage.files import BACKBONE, write_atomically
from fedcompo.storage.tensorstream import TensorWriter

NAME_RANK = (
    "Name the adapter's largest rank by `--rank`; it then says how far it is from the composed "
    "change."
)


def export_peft(output: Path, selection: Selection, *, rank: int | None = None) -> dict[str, Any]:
    r"""Write the composed change and the head as a PEFT adapter, with a card to read.

    Args:
        output: A new or empty folder; appears when everything is in it.
        selection: Contributions to compose.
        rank: Largest rank of a weight's change, three times it for a fused qkv, as in training.
            None: the sum of the clients' ranks, or the smaller side of the weight. The product then
            is the composed change to float32's rounding.

    Returns:
        What was written, as JSON values. The errors are relative, by Frobenius' norm.

    Raises:
        ConfigError: If the rank is not positive, or something is at ``output`` already.
        ContributionError: If clients are tangents, or of a kind that has no factors and no rank is
            given.
        BackboneMismatch: If they were trained on another backbone.
        BackboneError: If the model does not call a layer that is adapted, so that PEFT cannot act.
    """
    backbone = selection.backbone.load()
    _check_kinds(selection, rank)
    selection.pool.check_composable(
        selection.coefficients, base=backbone.fingerprint, normalise=selection.recipe.normalise
    )
    _check_called(backbone, map(_layer, backbone.theta_0))
    ranks = {name: _rank(selection, name, rank) for name in sorted(backbone.theta_0)}
    config = json.dumps(_config(backbone, {_layer(n): r for n, r in ranks.items()}), indent=2)
    with new_folder(output) as folder:
        errors = _write(folder / ADAPTER, selection, ranks)
        write_atomically(folder / ADAPTER_CONFIG, f"{config}\n".encode())
        use = f"{_nearness(ranks, errors)}\n{_example(backbone, len(selection.head.classes))}"
        told = write_card(selection, folder / ADAPTER, adapter=use)
    return {"output": str(output.absolute()), **told, "format": "peft", "ranks": ranks, **errors}


def _check_kinds(selection: Selection, rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise ConfigError(f"`rank` must be a positive number, got {rank}.")
    if selection.recipe.groups or selection.negated:
        raise ContributionError(
            "No adapter is made of a recipe with groups or a negated client. Compose a folder."
        )
    for member in selection.pool:
        kind = member.task_vector.kind
        if kind is Kind.TANGENT:
            raise ContributionError(
                f"Client {member.client!r} is of kind {kind}: its model is linearised, which no "
                "PEFT adapter can do. Export it as a folder instead, without `--adapter`."
            )
        if kind is not Kind.LORA and rank is None:
            raise ContributionError(
                f"Client {member.client!r} is of kind {kind}, which has no factors to join. "
                f"{NAME_RANK}"
            )
    if rank is None and selection.multipliers is None:
        raise ContributionError(
            f"The rule {selection.settings.rule} makes no sum, so there are no factors to join. "
            f"{NAME_RANK}"
        )


def _rank(selection: Selection, name: str, most: int | None) -> int:
    """Return the rank of a weight's change in the adapter."""
    bounds = [*selection.backbone.tensors.layout[name][1]]
    bounds += [] if most is None else [rank_of(name, most)]
    if selection.multipliers is not None:
        bounds.append(sum(len(c.task_vector.tensors[f"{name}/A"]) for c in selection.pool))
    return min(bounds)


def _product(selection: Selection, name: str, rank: int) -> Product:
    """Compose the change of one weight; dense only if it has no factors."""
    times = selection.multipliers
    if times is None:
        return cut(selection.change(name), rank)
    tensors = [(times[c.client], c.task_vector.tensors) for c in selection.pool]
    return joined([(k, own[f"{name}/B"], own[f"{name}/A"]) for k, own in tensors], rank)


def _write(path: Path, selection: Selection, ranks: dict[str, int]) -> dict[str, Any]:
    """Write factors and head under PEFT's names, one weight at a time; return the errors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rank in ranks.items():
        out, width = selection.backbone.tensors.layout[name][1]
        shapes |= {_part(name, "A"): (rank, width), _part(name, "B"): (out, rank)}
    head = selection.head.as_classifier(f"{PREFIX}{selection.backbone.classifier}")
    shapes |= {name: tuple(tensor.shape) for name, tensor in head.items()}
    layout = {name: (torch.float32, shape) for name, shape in shapes.items()}
    names = {_part(name, "A"): name for name in ranks}
    squares: dict[str, tuple[float, float]] = {}
    manifest = {
        "content": "peft-adapter",
        "clients": list(selection.pool.clients),
        "base": selection.backbone.fingerprint,
        "classes": list(selection.head.classes),
    }
    pending = dict(head)
    with TensorWriter(path, layout, manifest) as writer:
        for key in sorted(layout):
            if key in names:
                name = names[key]
                made = _product(selection, name, ranks[name])
                squares[name] = made.squared_error, made.squared_norm
                pending |= {key: made.a, _part(name, "B"): made.b}
            tensor = pending.pop(key).float()
            if not tensor.isfinite().all():
                raise ContributionError(
                    f"The composed {key!r} has values that are not finite. Use a smaller `scale`."
                )
            writer.write(key, tensor)
    errors = {name: _relative([own]) for name, own in squares.items()}
    worst = max(errors, key=errors.__getitem__)
    return {
        "error": _relative(squares.values()),
        "worst": {"weight": worst, "error": errors[worst]},
    }


def _relative(squares: Iterable[tuple[float, float]]) -> float:
    """Return the length of the error, relative to the change, of their squares by weight."""
    error, norm = map(sum, zip(*squares, strict=True))
    return math.sqrt(error / norm) if norm else 0.0


def _part(name: str, factor: str) -> str:
    """Name that PEFT gives a factor of a weight's change."""
    return f"{PREFIX}{_layer(name)}.lora_{factor}.weight"


def _layer(name: str) -> str:
    """Name of the layer whose weight it is."""
    return name.removesuffix(".weight")


def _config(backbone: Backbone, ranks: dict[str, int]) -> dict[str, Any]:
    """Return PEFT's configuration: the most common rank, and the layers whose rank differs."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {layer: rank for layer, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": backbone.origin.hub or None,
        "target_modules": sorted(ranks),
        "modules_to_save": [backbone.classifier],
        "r": usual,
        "rank_pattern": others,
        "lora_alpha": usual,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def _check_called(backbone: Backbone, layers: Iterable[str]) -> None:
    """Check, with an empty image, that the layers are called: PEFT changes what they return."""
    idle = set(layers)
    hooks = [
        backbone.model.get_submodule(layer).register_forward_hook(
            lambda *_, layer=layer: idle.discard(layer)
        )
        for layer in tuple(idle)
    ]
    try:
        with torch.no_grad():
            empty = torch.zeros(1, *backbone.preprocessing.shape)
            backbone.model(empty.to(backbone.device))
    finally:
        for hook in hooks:
            hook.remove()
    if idle:
        raise BackboneError(
            f"{backbone.architecture!r} reads the weight of {min(idle)!r} without calling the "
            f"layer, so PEFT would change nothing there ({len(idle)} such layers). Export a timm "
            "folder instead, without `--adapter`."
        )


def _nearness(ranks: Mapping[str, int], errors: Mapping[str, Any]) -> str:
    """Say how far the adapter is from the composed change."""
    least, most = min(ranks.values()), max(ranks.values())
    how = (
        "cut to this rank: relative to the change, its error is\n"
        f"{errors['error']:.3g} in all and at most {errors['worst']['error']:.3g} in one weight, "
        "by Frobenius' norm"
        if errors["error"]
        else "the composed change itself, to float32's rounding"
    )
    return f"""\
The adapter is LoRA of rank {least if least == most else f"{least} to {most}"}, {how}.
It goes onto the plain timm model with the weights of the backbone named below, and none other.
It brings its head along.
"""


def _example(backbone: Backbone, classes: int) -> str:
    """Write the example of the card."""
    arguments = {"num_classes": classes, **backbone.model_args}
    listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    make = f"model = timm.create_model({backbone.architecture!r}, {listed})"
    fill = "model.load_state_dict(weights, strict=False)  # the adapter brings the head"
    seen = backbone.preprocessing
    lines: tuple[str, ...]
    if backbone.origin.hub:
        lines = ("", f"model = timm.create_model({backbone.name!r}, pretrained=True, {listed})")
    elif backbone.name == EMBEDDED:
        settings = f'{{"image-size": {seen.image_size}, "channels": {seen.channels}}}'
        config = f"config = RunConfig.parse({settings})"
        weights = "weights = load_backbone(config.backbone).model.state_dict()"
        lines = ("from fedcompo import RunConfig, load_backbone", "", config, weights, make, fill)
    else:
        weights = f'weights = load_file("{BACKBONE}")'
        lines = ("from safetensors.torch import load_file", "", weights, make, fill)
    adapt = 'model = PeftModel.from_pretrained(model, ".").eval()'
    loading = "\n".join(("from peft import PeftModel", *lines, adapt))
    beside = f"the registry's `{BACKBONE}`" if BACKBONE in loading else ""
    return example(loading, seen, beside=beside)
