"""Find a model's weights in a checkpoint whose names stand behind a prefix."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fedcompo.errors import BackboneError

logger = logging.getLogger(__name__)

LAST = frozenset({"student", "ema", "model_ema", "state_dict_ema"})
"""Parts of a prefix whose weights are read only if no others fit."""


def flatten(nested: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dictionaries, by their keys joined with dots.

    ``{"teacher": {"norm.weight": w}, "epoch": 1}`` gives ``{"teacher.norm.weight": w}``.
    """
    found: dict[str, Tensor] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
    return found


def converter(model: nn.Module) -> Callable[[dict[str, Any], nn.Module], dict[str, Any]]:
    """What timm makes of the names in a checkpoint to those in this model."""
    module = sys.modules[type(model).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state, model: state)


def without_prefix(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Take a prefix such as ``module.`` off, if all of the model's parameters are found then.

    Args:
        state: The checkpoint's tensors by name.
        model: A vision transformer without classifier.

    Returns:
        The tensors that are read, by name, and the prefix they had in ``state``.
        If nothing fits: ``state`` and an empty prefix.

    Raises:
        BackboneError: If several prefixes fit, or one that was found lacks parameters.
    """
    lacking = _missing(state, model)
    if not lacking:
        return state, ""
    missing = {prefix: _missing(_cut(state, prefix), model) for prefix in _likely(state, model)}
    fitting: list[str] = []
    for prefix in sorted((p for p in missing if not missing[p]), key=len):
        if not prefix.startswith(tuple(fitting)):  # timm itself knows what follows a shorter one
            fitting.append(prefix)
    if not fitting:
        best = min(missing, key=lambda prefix: len(missing[prefix]), default="")
        if not best or len(missing[best]) >= len(lacking):
            return state, ""
        raise BackboneError(
            f"The checkpoint's names begin with {best!r}; without it, {len(missing[best])} of the "
            f"model's parameters are missing, among them {missing[best][0]!r}. Name the "
            "architecture that the weights were trained with in `backbone`."
        )
    chosen = [p for p in fitting if LAST.isdisjoint(p.split("."))] or fitting
    if len(chosen) > 1:
        raise BackboneError(
            f"The checkpoint holds several models that fit, behind {' and '.join(chosen)}. "
            "Save the state dict of the one you want in a file of its own."
        )
    if others := [name for name in state if not name.startswith(chosen[0])]:
        logger.warning(
            f"{len(others)} tensors of the checkpoint do not begin with {chosen[0]!r} and are "
            f"not read, such as {others[0]!r}."
        )
    return _cut(state, chosen[0]), chosen[0]


def _likely(state: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Prefixes, with their last dot, that stand before half as many weights as the model has."""
    known = {name for name, _ in model.named_parameters()}
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            # The rest is a name of the model's; or, after the first dot, one that timm may know.
            if cut == 1 or ".".join(parts[cut:]) in known:
                counts[".".join(parts[:cut]) + "."] += 1
    return [prefix for prefix, count in counts.items() if 2 * count > len(known)]


def _cut(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}


def _missing(state: dict[str, Tensor], model: nn.Module) -> list[str]:
    try:
        names = converter(model)(dict(state), model)
    except Exception:  # timm's conversions raise anything; loading will say it
        names = {}
    return [name for name, _ in model.named_parameters() if name not in names]
