"""Training inside a sum, and in parts: where it starts, on which schedule, and what holds it."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from builders import (
    MIXABLE,
    dense_by_hand,
    left_or_right,
    pico_backbone,
    random_deltas,
    random_head,
    random_like,
    rng,
    task_vector,
)

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.choices import Augmentation, Kind, Penalty
from fedcompo.config.run import TrainConfig
from fedcompo.method.deltas import new_deltas
from fedcompo.method.penalties import iel_penalty
from fedcompo.training import penalty as acting
from fedcompo.training.fit import Course, Fitted, ensembled, fit_task_vector
from fedcompo.training.head import feature_scale
from fedcompo.training.penalty import Anchor, Ensemble

CLASSES = ("left", "right")
DATA = left_or_right(24)
HEAD = random_head(CLASSES, 8, seed=1)
STILL = TrainConfig(
    rank=2,
    trust_region=0.0,
    local_epochs=1,
    batch_size=8,
    learning_rate=1e-12,
    local_steps=0,
    augmentation=Augmentation.NONE,
)
"""Steps too small to matter."""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return pico_backbone()


def ensemble_of(backbone: Backbone, *, share: float = 0.25, beta: float = 0.0) -> Ensemble:
    rest = {name: 0.2 * r for name, r in random_like(backbone.theta_0, seed=50).items()}
    return Ensemble(rest, share, beta, scale=1.5)


def anchor_of(backbone: Backbone) -> Anchor:
    return Anchor(random_like(backbone.theta_0, seed=70, positive=True))


def fit(
    backbone: Backbone,
    kind: Kind = Kind.LORA,
    *,
    anchor: Anchor | None = None,
    ensemble: Ensemble | None = None,
    course: Course | None = None,
    **settings: object,
) -> Fitted:
    return fit_task_vector(
        backbone,
        kind,
        DATA,
        HEAD,
        replace(STILL, **settings),
        generator=rng(0),
        course=replace(course or Course(), anchor=anchor, ensemble=ensemble),
    )


@pytest.mark.parametrize("kind", MIXABLE)
def test_a_client_is_trained_at_the_weights_of_the_sum_with_its_share_in_it(backbone, kind):
    begin, ensemble = task_vector(kind, backbone.theta_0, seed=3), ensemble_of(backbone)
    own = dense_by_hand(begin, backbone.theta_0)
    theta = {
        name: (weight + 1.5 * (ensemble.rest[name] + 0.25 * own[name])).float()
        for name, weight in backbone.theta_0.items()
    }
    logits = HEAD(backbone.forward(theta)(DATA.images))
    expected = float(torch.nn.functional.cross_entropy(logits, DATA.labels))
    fitted = fit(backbone, kind, ensemble=ensemble, course=Course(begin))
    assert fitted.losses[0] == pytest.approx(expected, rel=1e-4)
    found = ensembled(begin.dense(backbone.theta_0), backbone.theta_0, ensemble)
    for name, weight in theta.items():
        torch.testing.assert_close(found[name], weight)


def test_alone_it_is_trained_at_its_own_weights(backbone):
    own = task_vector(Kind.FULL, backbone.theta_0, seed=3).dense(backbone.theta_0)
    found = ensembled(own, backbone.theta_0, None)
    assert all(torch.equal(found[n], w + own[n]) for n, w in backbone.theta_0.items())


@pytest.mark.parametrize("kind", MIXABLE)
def test_a_part_goes_on_from_where_the_one_before_ended_and_leaves_that_alone(backbone, kind):
    begin = task_vector(kind, backbone.theta_0, seed=3)
    before = {name: tensor.clone() for name, tensor in begin.tensors.items()}
    same = fit(backbone, kind, course=Course(begin)).task_vector
    for name, tensor in before.items():
        torch.testing.assert_close(same.tensors[name], tensor, rtol=0, atol=1e-9)
    moved = fit(backbone, kind, course=Course(begin), learning_rate=0.01).task_vector
    assert any(not torch.equal(moved.tensors[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(begin.tensors[name], tensor) for name, tensor in before.items())


@pytest.fixture
def steps(monkeypatch) -> list[tuple]:
    """Strength, schedule and pull of each proximal step."""
    taken = []

    def step(deltas, fisher, strength, schedule, pull) -> torch.Tensor:
        taken.append((strength, schedule, pull))
        return torch.zeros(())

    monkeypatch.setattr(acting, "implicit_step", step)
    return taken


def test_the_parts_run_one_cosine_schedule_over_the_whole(backbone, steps):
    """Three parts of two epochs of three steps."""
    settings = {"alpha": 1.0, "penalty_every": 1, "local_epochs": 2}
    for part in range(3):
        course = Course(passed=part / 3, share=1 / 3)
        fit(backbone, anchor=anchor_of(backbone), course=course, **settings)
    whole = [0.5 * (1 + math.cos(math.pi * i / 18)) for i in range(18)]
    assert [schedule for _, schedule, _ in steps] == pytest.approx(whole)


@pytest.mark.parametrize(("share", "factor"), [(0.25, 0.75), (1.0, 0.5)])
def test_beside_the_optimiser_beta_holds_it_to_the_others(backbone, steps, share, factor):
    ensemble = ensemble_of(backbone, share=share, beta=7.0)
    fit(backbone, anchor=anchor_of(backbone), ensemble=ensemble, alpha=99.0)
    ((strength, _, pull),) = steps
    beta = 7.0 / folding(anchor_of(backbone), steps=3)
    assert strength == pytest.approx(beta * factor)
    for name, rest in ensemble.rest.items():
        torch.testing.assert_close(pull[name], beta * rest)


def folding(anchor: Anchor, *, steps: int) -> float:
    """Oracle: mean of all entries times the sum of the schedule, which is a half on average."""
    entries = [value for values in anchor.weights.values() for value in values.flatten().tolist()]
    return sum(entries) / len(entries) * steps / 2


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_beside_the_optimiser_alpha_counts_e_foldings_over_the_whole_training(
    backbone, steps, share
):
    anchor, course = anchor_of(backbone), Course(passed=0.2, share=share)
    fit(backbone, anchor=anchor, course=course, alpha=0.5)
    ((strength, _, _),) = steps
    assert strength == pytest.approx(0.5 / folding(anchor, steps=round(3 / share)))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 3.0])
def test_a_weight_of_mean_curvature_is_shrunk_by_as_many_e_foldings(backbone, alpha):
    deltas = new_deltas(Kind.FULL, backbone.theta_0, rank=1, generator=rng(0))
    for delta in deltas.values():
        delta.delta.data.fill_(1.0)
    anchor = Anchor({name: torch.full_like(w, 1e-5) for name, w in backbone.theta_0.items()})
    config = TrainConfig(trust_region=0.0, alpha=alpha, penalty_every=4)
    penalty = acting.TrainingPenalty(deltas, anchor, None, config, steps=400)
    for step in range(400):
        penalty.step(0.5 * (1 + math.cos(math.pi * step / 400)), last=step == 399)
    for delta in deltas.values():
        torch.testing.assert_close(
            delta.delta.detach(), torch.full_like(delta.delta, math.exp(-alpha)), rtol=0.1, atol=0
        )
    # From length 1 to e^-alpha: what was taken back and what is left are the whole way.
    assert penalty.held() == pytest.approx(1 - math.exp(-alpha), abs=0.01)


@pytest.mark.parametrize("kind", MIXABLE)
@pytest.mark.parametrize("ensembled_too", [False, True])
def test_the_unit_of_the_fisher_has_no_say(backbone, kind, ensembled_too):
    ensemble = ensemble_of(backbone, beta=0.4) if ensembled_too else None
    found = []
    for unit in (1.0, 2.0**-20):  # a power of two: no rounding
        weights = {name: unit * f for name, f in anchor_of(backbone).weights.items()}
        settings = {"alpha": 0.4, "learning_rate": 0.01, "local_epochs": 2}
        fitted = fit(backbone, kind, anchor=Anchor(weights), ensemble=ensemble, **settings)
        found.append(fitted)
    for name, tensor in found[0].task_vector.tensors.items():
        torch.testing.assert_close(found[1].task_vector.tensors[name], tensor, rtol=1e-4, atol=1e-6)
    assert found[1].held == pytest.approx(found[0].held, rel=1e-3)


@pytest.mark.parametrize("penalty", list(Penalty))
def test_a_fisher_of_zeros_holds_nothing(backbone, penalty):
    anchor = Anchor({name: torch.zeros_like(w) for name, w in backbone.theta_0.items()})
    settings = {"penalty": penalty, "learning_rate": 0.01}
    free, held = fit(backbone, **settings), fit(backbone, anchor=anchor, alpha=9.0, **settings)
    assert held.held == 0.0
    for name, tensor in free.task_vector.tensors.items():
        assert torch.equal(held.task_vector.tensors[name], tensor)


@pytest.mark.parametrize("kind", MIXABLE)
def test_held_says_how_much_of_the_way_the_anchor_took_back(backbone, kind):
    shares = [
        fit(
            backbone,
            kind,
            anchor=anchor_of(backbone),
            alpha=alpha,
            learning_rate=0.01,
            local_epochs=4,
        ).held
        for alpha in (0.0, 0.3, 3.0, 1e4)
    ]
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert 0 < shares[1] < 0.5
    assert 0.9 < shares[-1] <= 1.0


def test_coupled_to_the_loss_it_is_the_ensemble_penalty(backbone):
    anchor, ensemble = anchor_of(backbone), ensemble_of(backbone, beta=7.0)
    config = replace(STILL, penalty=Penalty.COUPLED, alpha=99.0)
    deltas = random_deltas(Kind.LORA, backbone.theta_0, seed=3)
    tau = {name: delta() for name, delta in deltas.items()}
    found = acting.TrainingPenalty(deltas, anchor, ensemble, config, steps=3).loss()
    expected = iel_penalty(tau, anchor.weights, ensemble.rest, share=0.25, beta=7.0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("penalty", list(Penalty))
def test_without_strength_or_metric_only_the_sum_is_left(backbone, penalty):
    settings = {"penalty": penalty, "learning_rate": 0.01, "alpha": 99.0}
    free = fit(backbone, ensemble=ensemble_of(backbone, beta=7.0), **settings)
    weak = ensemble_of(backbone, beta=0.0)
    held = fit(backbone, anchor=anchor_of(backbone), ensemble=weak, **settings)
    for name, tensor in free.task_vector.tensors.items():
        assert torch.equal(held.task_vector.tensors[name], tensor)


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_the_trust_region_bounds_how_far_features_move_in_units_of_their_variance(backbone, factor):
    config = {"trust_region": 0.01, "learning_rate": 0.05, "local_epochs": 4}
    anchor = Anchor({n: torch.full_like(w, factor**2) for n, w in backbone.theta_0.items()}, True)
    larger = replace(backbone, model=deepcopy(backbone.model))
    with torch.no_grad():
        for parameter in larger.model.norm.parameters():
            parameter.mul_(factor)
    free = fit(larger, Kind.FULL, anchor=anchor, **{**config, "trust_region": 0.0})
    bound = fit(larger, Kind.FULL, anchor=anchor, **config)
    _, variance = feature_scale(larger, DATA.images)

    def energy(fitted):
        tau = fitted.task_vector.dense(larger.theta_0)
        return 0.5 * factor**2 * sum(float(t.square().sum()) for t in tau.values()) / variance

    assert energy(bound) <= 0.01 * 1.0001 < energy(free)
    assert bound.held > 0 == free.held
