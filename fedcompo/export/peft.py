r"""Writes one LoRA client as an adapter folder, which PEFT loads onto the plain timm model.

PEFT turns a layer's output :math:`W_0x` into :math:`W_0x + \tfrac{\alpha}{r}\,BAx`. With α = r at
every layer this is fedcompo's :math:`(W_0 + BA)x`. The client's head replaces the model's own
(``modules_to_save``), so that the adapted model gives the client's logits::

    model = timm.create_model(architecture, num_classes=len(classes), **model_args)
    model.load_state_dict(pretrained, strict=False)  # the backbone's weights; the head comes below
    model = PeftModel.from_pretrained(model, folder)

The format is two files; PEFT is not needed to write them. It is described at
https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fedcompo.backbone.adapter import ADAPTER, ADAPTER_CONFIG, PREFIX
from fedcompo.backbone.backbone import EMBEDDED, Backbone
from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneError, ContributionError
from fedcompo.export.example import example
from fedcompo.export.hub_metadata import front_matter, license_text
from fedcompo.export.model_card import class_table, escaped, table
from fedcompo.method.contribution import Contribution
from fedcompo.method.deltas import Weights
from fedcompo.storage.files import BACKBONE, MODEL_CARD, write_atomically
from fedcompo.storage.tensorstream import save_streamed


def export_peft(folder: Path, backbone: Backbone, contribution: Contribution) -> None:
    """Write a client's LoRA and head as a PEFT adapter, with a card to read.

    Args:
        folder: Folder to write to; created if it does not exist.
        backbone: What the client was trained on.
        contribution: A client of kind ``lora``.

    Raises:
        ContributionError: If the client is of another kind, or its tensors do not fit.
        BackboneMismatch: If it was trained on another backbone.
        BackboneError: If the model does not call a layer that is adapted, so that PEFT cannot act.
    """
    vector, head, owner = contribution.task_vector, contribution.head, contribution.client
    if vector.kind is not Kind.LORA:
        raise ContributionError(
            f"Client {owner!r} is of kind {vector.kind}, but a PEFT adapter holds a lora only. "
            f"Compose this client alone instead: `fedcompo compose --only {owner}`."
        )
    vector.check(backbone.theta_0, base=backbone.fingerprint, owner=f"client {owner!r}")
    head.check(head.classes, backbone.num_features, f"client {owner!r}")
    _check_called(backbone, map(_layer, vector.names))
    manifest = {
        "content": "peft-adapter",
        "client": owner,
        "base": vector.base,
        "classes": list(head.classes),
        "num_examples": contribution.num_examples,
    }
    save_streamed(folder / ADAPTER, _tensors(backbone, contribution), manifest)
    ranks = {_layer(name): len(vector.tensors[f"{name}/A"]) for name in vector.names}
    config = json.dumps(_config(backbone, ranks), indent=2)
    write_atomically(folder / ADAPTER_CONFIG, f"{config}\n".encode())
    write_atomically(folder / MODEL_CARD, _card(backbone, contribution).encode())


def _tensors(backbone: Backbone, contribution: Contribution) -> Weights:
    """Factors and head under PEFT's names."""
    vector, head = contribution.task_vector, contribution.head
    factors = {
        f"{PREFIX}{_layer(name)}.lora_{factor}.weight": vector.tensors[f"{name}/{factor}"]
        for name in vector.names
        for factor in ("A", "B")
    }
    return factors | head.as_classifier(f"{PREFIX}{backbone.classifier}")


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
            f"layer, so PEFT would change nothing there ({len(idle)} such layers). Compose this "
            "client alone and export it as a timm folder."
        )


def _card(backbone: Backbone, contribution: Contribution) -> str:
    head, lineage = contribution.head, contribution.lineage
    rows = (
        ("client", contribution.client),
        ("training images", str(contribution.num_examples)),
        ("other clients whose data shaped its training", str(len(lineage.shaped_by))),
        ("backbone", backbone.name),
        ("fingerprint of its weights", backbone.fingerprint),
    )
    seen, origin = backbone.preprocessing, backbone.origin
    front = front_matter(
        "peft",
        ("lora", "peft", "timm"),
        backbone=backbone.name,
        origin=origin,
        relation="adapter",
        modality=seen.modality,
    )
    loading = _loading(backbone, len(head.classes))
    beside = f"the registry's `{BACKBONE}`" if BACKBONE in loading else ""
    return f"""\
{front}

# LoRA adapter and head of one client

It goes onto the plain timm model with the weights of the backbone named here, and none other.

{table(("what", "value"), ((what, escaped(value)) for what, value in rows))}

## Use

{example(loading, seen, beside=beside)}

{class_table(head.classes)}

{license_text(backbone.name, origin)}
"""


def _loading(backbone: Backbone, classes: int) -> str:
    """Code that makes the adapted model."""
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
    return "\n".join(("from peft import PeftModel", *lines, adapt))
