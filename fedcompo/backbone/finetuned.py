r"""Reads a model that was fine-tuned elsewhere as a change :math:`\theta - \theta_0` of a backbone.

A contribution changes the target weights alone. Whatever else the source changed is named in
:attr:`FineTuned.rest`, so that nothing is lost without a word.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.checkpoint import fill, read_checkpoint, read_config, require_finite
from fedcompo.backbone.foreign_config import described_elsewhere
from fedcompo.backbone.foreign_names import as_timm, within
from fedcompo.backbone.prefixes import converter, without_prefix
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneError
from fedcompo.method.deltas import Weights
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage.files import CONFIG, WEIGHTS

LEAST_COSINE = 0.5
"""Weights that are less alike than this were never fine-tuned from one another: between two
trainings from other starts it is near 0, after a fine-tuning near 1."""
FIELDS = {"input_size": "shape", "mean": "mean", "std": "std", "interpolation": "interpolation"}
"""What a key of timm's configuration is called in :class:`Preprocessing`: those of the model's
input. How much of a picture's border an evaluation cuts off is no matter of training."""
MODEL_FROM = 0.5
"""A fine-tuning changes weights by a few hundredths of their length, up to a few tenths. What is
longer than this multiple of it is no difference, and what is shorter no model."""
LARGEST, TIMES = 1 << 30, 16
"""A file of more bytes, and of more than so many times the backbone's, is not read."""
INPUT_ARGS = ("img_size", "in_chans")


@dataclass(frozen=True)
class FineTuned:
    """What was found in a source."""

    task_vector: TaskVector
    classifier: tuple[Tensor, Tensor] | None
    """Weight (classes, features) and bias (classes,); None: the source has none."""
    classes: tuple[str, ...]
    """Names of the classifier's rows, in their order; empty: not known."""
    rest: tuple[str, ...]
    """Names of all that the source changed beside the target weights and the classifier."""
    base: str = ""
    """What the source calls the model that it started from; empty: it does not say."""

    @property
    def rest_counted(self) -> str:
        """The rest in short: ``blocks.*.norm1.weight (12), pos_embed (1)``."""
        counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in self.rest)
        return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def read_finetuned(source: Path, backbone: Backbone) -> FineTuned:
    """Read a timm checkpoint, or the folder of one that ``timm.models.save_for_hf`` wrote.

    Args:
        source: File (.safetensors, .pth, .pt, .bin) or folder, perhaps with timm's config.json.
        backbone: The pre-trained weights it was fine-tuned from.

    Returns:
        A task vector of kind ``full``, float32, and what else there is.

    Raises:
        BackboneError: If the source cannot be read, is of another architecture, holds infinity or
            NaN, or does not come from these pre-trained weights.
    """
    path, state = _read_source(source, backbone)
    model = copy.deepcopy(backbone.model)
    channels, height, width = backbone.preprocessing.shape
    # Without `first_conv`, channels are never averaged: it must read as many as the backbone.
    cfg = {"input_size": (channels, height, width), "classifier": backbone.classifier}
    try:
        names = (f"{backbone.classifier}.{part}" for part in ("weight", "bias"))
        beside = {name: state[name] for name in names if name in state}  # of the model itself
        state = beside | without_prefix(state, backbone.model)[0]
        fill(model, backbone.architecture, cfg, state, channels=channels)
    except BackboneError as error:
        raise BackboneError(
            f"{path} is no fine-tuned {backbone.name!r}, which the registry's weights are. {error} "
            "If it holds a difference θ - θ₀ alone, add `--delta`."
        ) from error
    classes, differ = _configured(path, replace(backbone, model=model))
    found = dict(converter(model)(dict(state), model))
    classifier, unread = take_classifier(found, backbone)
    theta = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    start = {name: tensor.cpu() for name, tensor in backbone.model.state_dict().items()}
    for name in theta.keys() & found.keys():  # rounding alone is no change
        stored = found[name].dtype
        same = theta[name].to(stored) == start[name].to(stored)
        theta[name] = torch.where(same, start[name], theta[name])
    rest = theta.keys() - backbone.theta_0.keys()
    changed = (name for name in rest if not torch.equal(theta[name], start[name]))
    _require_related(path, backbone, theta)
    tensors = {f"{name}/delta": theta[name] - start[name] for name in backbone.theta_0}
    return FineTuned(
        TaskVector(Kind.FULL, tensors, backbone.fingerprint),
        classifier,
        classes,
        tuple(sorted({*changed, *(found.keys() - theta.keys()), *differ, *unread})),
    )


def read_difference(source: Path, backbone: Backbone) -> FineTuned:
    r"""Read a file that holds :math:`\theta - \theta_0`; a weight that it lacks is unchanged.

    Such files look like checkpoints: names and shapes are the same. Nothing in them says what they
    are. So whoever imports one says it, and the lengths of the weights must agree.

    Args:
        source: As for :func:`read_finetuned`.
        backbone: The pre-trained weights it is a difference to.

    Returns:
        A task vector of kind ``full``. A classifier is no part of the pre-trained weights, so that
        nobody knows what it is a difference to; it counts to the rest.

    Raises:
        BackboneError: If the source cannot be read, fits other weights, or holds a model.
    """
    path, state = _read_source(source, backbone)
    require_finite(state)
    found = {within(name): tensor.float() for name, tensor in state.items()}
    if len(found) < len(state):
        raise BackboneError(
            f"{path} holds several models: names differ only in what stands before `blocks.`. "
            "Save the difference of the one you want in a file of its own."
        )
    start = backbone.model.state_dict()
    own = backbone.theta_0
    if own.keys().isdisjoint(found):
        raise BackboneError(
            f"{path} holds no target weight of {backbone.name!r}, only "
            f"{', '.join(sorted(state)[:3])}. Import it into a registry of its model."
        )
    tau: Weights = {}
    for name, weight in own.items():
        tensor = found.get(name, torch.zeros(weight.shape))
        if tensor.shape != weight.shape:
            raise BackboneError(
                f"{name!r} of {path} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(weight.shape)} as in {backbone.name!r}, which the registry's weights are."
            )
        tau[name] = tensor
    if not (share := _length(tau) / _length(own)) < MODEL_FROM:
        raise BackboneError(
            f"{path} is no difference to {backbone.name!r}: its weights are as long as {share:.2g} "
            f"of the pre-trained ones, expected below {MODEL_FROM}. If it holds a model, leave "
            "`--delta` out."
        )
    rest = (n for n, t in found.items() if n not in own and (n not in start or bool(t.any())))
    tensors = {f"{name}/delta": tensor for name, tensor in tau.items()}
    vector = TaskVector(Kind.FULL, tensors, backbone.fingerprint)
    return FineTuned(vector, None, (), tuple(sorted(rest)))


def _read_source(source: Path, backbone: Backbone) -> tuple[Path, dict[str, Tensor]]:
    """Read a file's tensors under timm's names, or those of the first one in a folder.

    Raises:
        BackboneError: If there are none, or they cannot be read.
    """
    files = (source / WEIGHTS, source / "pytorch_model.bin") if source.is_dir() else (source,)
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise BackboneError(
            f"There are no weights at {source}. Expected a .safetensors or .pth file, a folder "
            f"with {WEIGHTS}, or the folder of a PEFT adapter."
        )
    require_plausible(path, backbone)
    state = read_checkpoint(path)
    if isinstance(state, Path):
        raise BackboneError(f"{path} is in JAX's layout. Save it from timm as .safetensors first.")
    return path, as_timm(path, state, backbone.classifier)


def require_plausible(path: Path, backbone: Backbone) -> None:
    """Refuse a file that no fine-tuning of the backbone can be, before it fills the memory."""
    own = sum(t.numel() * t.element_size() for t in backbone.model.state_dict().values())
    size = path.stat().st_size if path.is_file() else 0
    if size > max(LARGEST, TIMES * own):
        raise BackboneError(
            f"{path} has {size / 1e9:.1f} GB, and the weights of {backbone.name!r} "
            f"{own / 1e9:.2g} GB. Save the state dict alone, without the optimiser's."
        )


def take_classifier(
    found: dict[str, Tensor], backbone: Backbone
) -> tuple[tuple[Tensor, Tensor] | None, list[str]]:
    """Take a classifier out of a model's tensors: weight (classes, features), bias (classes,).

    None without one, or if it reads something else than the backbone's features; then the names of
    its tensors come second.
    """
    names = [f"{backbone.classifier}.{part}" for part in ("weight", "bias")]
    held = [name for name in names if name in found]
    weight, bias = (found.pop(name, None) for name in names)
    if weight is None or weight.ndim != 2 or weight.shape[1] != backbone.num_features:
        return None, held
    return (weight.float(), torch.zeros(len(weight)) if bias is None else bias.float()), []


def _configured(path: Path, tuned: Backbone) -> tuple[tuple[str, ...], list[str]]:
    """The classes that timm's config.json names, and what of the model it describes otherwise.

    Its arguments may be written out or left at their defaults. So they are compared by what a model
    that is built with them computes.
    """
    if (described := described_elsewhere(path, tuned)) is not None:
        return described
    args, own = read_config(path, tuned.architecture, {})
    file = path.with_name(CONFIG)
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "architecture" not in config:
        return (), []
    ours, pool = tuned.preprocessing, getattr(tuned.model, "global_pool", None)
    theirs = Preprocessing.of_timm(own, args, ours.modality)
    differ = [
        f"{CONFIG}: {key}"
        for key, field in FIELDS.items()
        if key in own and getattr(theirs, field) != getattr(ours, field)
    ]
    if config.get("global_pool", pool) != pool:
        differ.append(f"{CONFIG}: global_pool")
    built = {key: value for key, value in args.items() if key not in INPUT_ARGS}
    built |= {key: value for key, value in tuned.model_args.items() if key in INPUT_ARGS}
    example = torch.linspace(-1, 1, math.prod(ours.shape)).reshape(1, *ours.shape)
    try:
        twin = timm.create_model(tuned.architecture, num_classes=0, **built).eval()
        twin.load_state_dict(tuned.model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(twin(example), tuned.model(example))
    except (RuntimeError, TypeError, ValueError, AssertionError):
        differ.append(f"{CONFIG}: model_args")
    names = config.get("label_names") or []
    listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if listed and len({*names}) == len(names) else (), differ


def _require_related(path: Path, backbone: Backbone, theta: Weights) -> None:
    """Compare each target weight with the pre-trained one: one may be transposed, another not."""
    cosines = {name: cosine(theta[name], start) for name, start in backbone.theta_0.items()}
    name = min(cosines, key=cosines.__getitem__)
    if cosines[name] >= LEAST_COSINE:
        return
    share = _length({n: theta[n] for n in cosines}) / (_length(backbone.theta_0) or 1.0)
    raise BackboneError(
        f"{path} has the architecture of {backbone.name!r}, but was not fine-tuned from its weights"
        f" ({name!r}: cosine {cosines[name]:.2f}, expected above {LEAST_COSINE}). "
        + (
            f"They are as long as {share:.2g} of the pre-trained ones: if it holds a difference "
            "θ - θ₀, add `--delta`."
            if share < MODEL_FROM
            else "Import it into a registry of the weights it started from. If these are they, "
            "that one is transposed, or its query, key and value stand in another order."
        )
    )


def cosine(theirs: Tensor, ours: Tensor) -> float:
    """Of two tensors as vectors; 1 where ours is zero, which nothing can be compared with."""
    a, b = theirs.double().cpu().flatten(), ours.double().cpu().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-30)) if b.any() else 1.0


def _length(weights: Weights) -> float:
    """Length of all weights together."""
    return float(sum(float(t.double().square().sum()) for t in weights.values()) ** 0.5)
