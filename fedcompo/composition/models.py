"""Models of the members of a pool, with any coefficients: weight by weight, or in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from fedcompo.backbone.stored import StoredBackbone
from fedcompo.backbone.tangent import TangentModel, change_from
from fedcompo.composition import fixed_point
from fedcompo.composition.head import head_of
from fedcompo.composition.lengths import NORM_DIGITS, squared_length
from fedcompo.composition.rules.rule import Changes
from fedcompo.composition.scale import Factor, FactorBy, norm_preserving, significant
from fedcompo.composition.settings import CompositionSettings
from fedcompo.composition.timm_folder import timm_config
from fedcompo.errors import FileFormatError
from fedcompo.method.pool import Pool
from fedcompo.runtime import in_order
from fedcompo.storage.files import BACKBONE, CONFIG, WEIGHTS, tuples
from fedcompo.storage.tensorstream import StreamedTensors


def stream_composition(
    pool: Pool,
    backbone: StoredBackbone,
    coefficients: Mapping[str, float] | None,
    settings: CompositionSettings,
    factor: float | None = None,
    *,
    names: Iterable[str] | None = None,
    normalise: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    r"""Compose the target weights of a pool, one at a time, in the order of names.

    What the rule makes of the members is in fixed point: to leave a client out gives the same bits
    as to remove it. The mean with other coefficients is in float64.

    Args:
        pool: At least one contribution, all on this backbone.
        backbone: Pre-trained weights.
        coefficients: By client; None: the registry's own.
        settings: The registry's rule, scale and coefficients.
        factor: :math:`\lambda'` on the rule's total, of the mean :math:`\sum_c m_c \tau_c`, or
            :math:`\lambda` with these coefficients; None: see :func:`factor_of`.
        names: Weights to compose; None: all target weights.
        normalise: Whether coefficients must be those of a mean.

    Raises:
        BackboneMismatch: If the pool was trained on another backbone.
        ContributionError: If the pool is empty or mixed, or the coefficients cannot be used by the
            rule.
    """
    pool.check_composable(coefficients, base=backbone.fingerprint, normalise=normalise)
    if factor is None:
        factor = factor_of(pool, backbone, settings, coefficients).value
    rule, times = settings.made_by, times_of(pool, settings, coefficients)
    rule.check(pool.contributions, times)
    chosen = sorted(backbone.target_weights if names is None else names)
    if coefficients is not None and rule.is_sum:
        yield from pool.stream(
            backbone.tensors, coefficients, scale=factor, names=chosen, normalise=normalise
        )
        return

    def composed(name: str) -> tuple[str, Tensor]:
        weight = backbone.tensors[name]
        total = rule.on_grid(Changes(name, weight, pool.contributions, times))
        return name, fixed_point.compose(weight, total, factor=factor)

    yield from in_order(composed, chosen)


def times_of(
    pool: Pool, settings: CompositionSettings, coefficients: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return how often each member counts: as the settings say, or by these coefficients."""
    return dict(coefficients or {c.client: settings.times(c.num_examples) for c in pool})


def factor_of(
    pool: Pool,
    backbone: StoredBackbone,
    settings: CompositionSettings,
    coefficients: Mapping[str, float] | None = None,
) -> Factor:
    """Return the factor of a composition that nobody voted on, of at least one contribution.

    Coefficients in place of the settings' own sum to one, so that the factor is the scale.
    """
    times, rule = times_of(pool, settings, coefficients), settings.made_by
    known = settings.known_factor(sum(times.values()) if coefficients is None else 1)
    if known is not None:
        return known
    rule.check(pool.contributions, times)
    squared_total, lengths = 0.0, dict.fromkeys(times, 0.0)

    def squares(name: str) -> tuple[float, dict[str, float]]:
        own: dict[str, float] = {}
        changes = Changes(name, backbone.tensors[name], pool.contributions, times, squares=own)
        return squared_length(rule.on_grid(changes)), own

    for squared, own in in_order(squares, sorted(backbone.target_weights)):
        squared_total += squared
        for client in own:
            lengths[client] += own[client]
    rounded = {c: (times[c], significant(lengths[c], NORM_DIGITS)) for c in times}
    return Factor(norm_preserving(rounded, squared_total), FactorBy.NORMS)


def composed_model(
    pool: Pool, backbone: StoredBackbone, settings: CompositionSettings, factor: float | None = None
) -> nn.Module:
    """Return a ready timm model of a pool, composed with the registry's own coefficients."""
    weights = dict(backbone.tensors)
    weights |= stream_composition(pool, backbone, None, settings, factor)
    head = head_of(pool, settings)
    weights |= head.as_classifier(backbone.classifier)
    return model_of(backbone, weights, head.classes, linearised=pool.linearised)


def load_tangent_model(folder: Path | str) -> nn.Module:
    """Load a published folder that is composed of tangents.

    Returns:
        A :class:`~fedcompo.backbone.tangent.TangentModel` in evaluation mode.

    Raises:
        FileFormatError: If a file is missing, altered, or belongs to another folder.
    """
    folder = Path(folder)
    backbone, composed = StoredBackbone(folder / BACKBONE), StreamedTensors(folder / WEIGHTS)
    backbone.tensors.check()
    composed.check()
    if composed.manifest.get("base") != backbone.fingerprint:
        raise FileFormatError(
            f"{folder / WEIGHTS} was composed on {composed.manifest.get('base')}, but {BACKBONE} "
            f"beside it holds {backbone.fingerprint}. Restore the folder from where it came."
        )
    try:
        classes = tuple(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["label_names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{folder / CONFIG} cannot be read ({type(error).__name__}: {error}). "
            "Restore the folder from where it came."
        ) from error
    return model_of(backbone, composed, classes, linearised=True)


def model_of(
    backbone: StoredBackbone,
    weights: Mapping[str, Tensor],
    classes: tuple[str, ...],
    *,
    linearised: bool = False,
) -> nn.Module:
    """Return a timm model in evaluation mode, as timm builds it from a folder.

    Args:
        backbone: Gives the architecture.
        weights: All of its weights by name, with the classifier.
        classes: In the order of the logits.
        linearised: Of tangents: a :class:`~fedcompo.backbone.tangent.TangentModel`.
    """
    from fedcompo.backbone.text import timm  # takes seconds to load

    seen = tuples(timm_config(backbone, classes)["pretrained_cfg"])
    model = timm.create_model(
        backbone.architecture,
        pretrained=False,
        pretrained_cfg={**seen, "label_names": list(classes)},
        num_classes=len(classes),
        **backbone.model_args,
    )
    assert isinstance(model, nn.Module)
    if not linearised:
        model.load_state_dict(dict(weights))
        return model.eval()
    theta_0 = backbone.tensors
    model.load_state_dict({n: (theta_0 if n in theta_0 else weights)[n] for n in weights})
    tau = change_from(theta_0, {name: weights[name] for name in backbone.target_weights})
    return TangentModel(model, tau).eval()
