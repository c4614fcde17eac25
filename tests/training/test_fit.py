"""One client's training on a problem that a line can solve."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from builders import (
    KINDS,
    MIXABLE,
    contribution,
    left_or_right,
    pico_backbone,
    random_head,
    rng,
)
from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.tangent import feature_map, square_loss
from fedcompo.config.choices import Augmentation, Kind, Penalty
from fedcompo.config.run import TrainConfig
from fedcompo.data.client_data import Split
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head, zero_head
from fedcompo.method.pool import Pool
from fedcompo.method.task_vector import TaskVector
from fedcompo.report import progress
from fedcompo.training import penalty as acting
from fedcompo.training.accuracy import accuracy_of
from fedcompo.training.fisher_estimate import estimate_fisher
from fedcompo.training.fit import Course, Fitted, fit_task_vector
from fedcompo.training.head import feature_scale
from fedcompo.training.penalty import Anchor

CLASSES = ("left", "right")
DATA = left_or_right(24)
CONFIG = TrainConfig(
    rank=2,
    trust_region=0.0,
    alpha=1.0,
    local_epochs=6,
    local_steps=0,
    batch_size=8,
    learning_rate=0.02,
    augmentation=Augmentation.NONE,
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return pico_backbone()


def anchor_of(backbone: Backbone, value: float = 1.0) -> Anchor:
    return Anchor({name: torch.full_like(w, value) for name, w in backbone.theta_0.items()})


def fit(
    backbone: Backbone,
    kind: Kind = Kind.LORA,
    *,
    seed: int = 0,
    start: Head | None = None,
    anchor: Anchor | None = None,
    data: Split = DATA,
    **settings: object,
) -> Fitted:
    return fit_task_vector(
        backbone,
        kind,
        data,
        start or zero_head(CLASSES, 8),
        replace(CONFIG, **settings),
        generator=rng(seed),
        course=Course(anchor=anchor),
    )


def size(vector: TaskVector, theta_0: Weights) -> float:
    return float(torch.stack([t.norm() for t in vector.dense(theta_0).values()]).norm())


def theta_of(backbone: Backbone, vector: TaskVector) -> Weights:
    return {n: backbone.theta_0[n] + t for n, t in vector.dense(backbone.theta_0).items()}


def loss_of(kind: Kind, logits: Tensor) -> float:
    """What a kind is trained to lower."""
    if kind is Kind.TANGENT:
        return float(square_loss(logits, DATA.labels, CONFIG.target_logit))
    return float(torch.nn.functional.cross_entropy(logits, DATA.labels))


def assert_same(actual: Fitted, expected: Fitted) -> None:
    assert actual.losses == expected.losses
    for name, tensor in expected.task_vector.tensors.items():
        assert torch.equal(actual.task_vector.tensors[name], tensor)
    assert torch.equal(actual.head.weight, expected.head.weight)
    assert torch.equal(actual.head.bias, expected.head.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_learns_a_problem_that_can_be_solved(backbone, kind):
    fitted = fit(backbone, kind, local_epochs=25, target_logit=2.0)
    assert len(fitted.losses) == 25
    assert fitted.losses[-1] < 0.5 * fitted.losses[0]
    vector = fitted.task_vector
    vector.check(backbone.theta_0, base=backbone.fingerprint, owner="client 'a'")
    theta, tangent = theta_of(backbone, vector), kind is Kind.TANGENT
    accuracy = accuracy_of(backbone, theta, fitted.head, CLASSES, DATA, linearised=tangent)
    assert (accuracy.class_il, accuracy.task_il) == (1.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_vector_lowers_the_loss_that_the_head_alone_is_left_with(backbone, kind):
    fitted = fit(backbone, kind)

    def loss(theta: Weights) -> float:
        features = feature_map(backbone, theta, tangent=kind is Kind.TANGENT)(DATA.images)
        return loss_of(kind, fitted.head(features))

    assert loss(theta_of(backbone, fitted.task_vector)) < 0.9 * loss(backbone.theta_0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_epochs_loss_starts_at_that_of_the_pre_trained_weights(backbone, kind):
    """With steps too small to matter, the reported loss is the start's: τ starts at zero."""
    start = random_head(CLASSES, 8, seed=1)
    fitted = fit(backbone, kind, start=start, learning_rate=1e-12, local_epochs=1)
    expected = loss_of(kind, start(backbone.forward({})(DATA.images)))
    assert fitted.losses[0] == pytest.approx(expected, rel=1e-4)


def rescaled(backbone: Backbone, *, factor: float) -> Backbone:
    """The same function, with inputs of the linear layers that are ``factor`` times as large."""
    model = copy.deepcopy(backbone.model)
    for block in model.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            linear.weight.div_(factor)
    parameters = dict(model.named_parameters())
    return replace(backbone, model=model, theta_0={n: parameters[n] for n in backbone.theta_0})


@pytest.mark.parametrize("kind", [Kind.FULL, Kind.LORA, Kind.IA3])
@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_a_backbone_that_computes_the_same_with_other_scales_trains_alike(backbone, kind, factor):
    other = rescaled(backbone, factor=factor)
    assert torch.allclose(other.forward({})(DATA.images), backbone.forward({})(DATA.images))
    fitted = [
        fit(
            one,
            kind,
            learning_rate=0.0,
            local_epochs=20,
            alpha=0.0,
            trust_region=0.02,
            anchor=anchor,
        )
        for one, anchor in ((backbone, features_anchor(backbone)), (other, features_anchor(other)))
    ]
    assert fitted[0].losses == pytest.approx(fitted[1].losses, rel=1e-3)
    assert 0 < fitted[0].held == pytest.approx(fitted[1].held, rel=0.05)
    ours, theirs = (
        one.forward(theta_of(one, fit.task_vector))(DATA.images)
        for one, fit in zip((backbone, other), fitted, strict=True)
    )
    moved = (ours - backbone.forward({})(DATA.images)).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def features_anchor(backbone: Backbone) -> Anchor:
    """The mean Fisher of the features on the very images."""
    images = backbone.preprocessing.normalise(DATA.images)
    fisher, _ = estimate_fisher(backbone.model, [images], backbone.theta_0, generator=rng(0))
    return Anchor(fisher.mean(), of_features=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_tensors_and_another_seed_others(backbone, kind):
    settings = {"augmentation": Augmentation.SHIFT, "local_epochs": 1}
    torch.manual_seed(1)
    first = fit(backbone, kind, **settings)
    torch.manual_seed(2)  # the global generator has no say
    assert_same(fit(backbone, kind, **settings), first)
    other = fit(backbone, kind, seed=1, **settings)
    assert any(
        not torch.equal(other.task_vector.tensors[name], tensor)
        for name, tensor in first.task_vector.tensors.items()
    )


def test_training_leaves_the_backbone_alone(backbone):
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    fit(backbone, Kind.FULL, local_epochs=1)
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in backbone.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_implicit_anchor_keeps_the_task_vector_at_zero(backbone, kind):
    free = size(fit(backbone, kind).task_vector, backbone.theta_0)
    held = fit(backbone, kind, anchor=anchor_of(backbone), alpha=1e8)
    assert size(held.task_vector, backbone.theta_0) < 1e-3 * free


@pytest.mark.parametrize("penalty", list(Penalty))
@pytest.mark.parametrize("kind", KINDS)
def test_each_penalty_holds_the_task_vector_shorter_and_still_learns(backbone, kind, penalty):
    free = size(fit(backbone, kind).task_vector, backbone.theta_0)
    alpha = 1.0 if penalty is Penalty.IMPLICIT else 0.1  # e-foldings, or per step
    fitted = fit(backbone, kind, anchor=anchor_of(backbone), alpha=alpha, penalty=penalty)
    assert fitted.losses[-1] < fitted.losses[0]
    assert size(fitted.task_vector, backbone.theta_0) < 0.95 * free


@pytest.mark.parametrize("penalty", list(Penalty))
def test_an_anchor_of_no_strength_or_no_fisher_changes_no_bit(backbone, penalty):
    settings = {"penalty": penalty, "local_epochs": 1}
    free = fit(backbone, Kind.FULL, **settings)
    assert_same(fit(backbone, Kind.FULL, anchor=anchor_of(backbone), alpha=0.0, **settings), free)
    nobody = anchor_of(backbone, 0.0)
    assert_same(fit(backbone, Kind.FULL, anchor=nobody, alpha=9.0, **settings), free)


@pytest.mark.parametrize(
    ("penalty", "every", "expected"),
    [
        (Penalty.IMPLICIT, 1, [[0], [1], [2], [3], [4], [5]]),
        (Penalty.IMPLICIT, 4, [[0, 1, 2, 3], [4, 5]]),
        (Penalty.IMPLICIT, 99, [[0, 1, 2, 3, 4, 5]]),
        (Penalty.EXPLICIT, 4, [[0], [1], [2], [3], [4], [5]]),
        (Penalty.COUPLED, 1, []),
    ],
)
def test_one_implicit_step_makes_up_for_all_since_the_one_before(
    backbone, monkeypatch, penalty, every, expected
):
    """Six optimiser steps on the cosine schedule; the last is always followed by a penalty."""
    taken = []

    def step(deltas: object, fisher: object, alpha: float, schedule: float, pull: None) -> Tensor:
        taken.append((alpha, schedule))
        return torch.zeros(())

    monkeypatch.setattr(acting, "implicit_step", step)
    monkeypatch.setattr(acting, "explicit_step", step)
    settings = {"penalty": penalty, "penalty_every": every, "local_epochs": 2}
    fit(backbone, anchor=anchor_of(backbone), alpha=7.0, **settings)
    cosine = [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    strength = 7.0 / 3 if penalty is Penalty.IMPLICIT else 7.0  # six steps of a half on average
    assert [alpha for alpha, _ in taken] == pytest.approx([strength] * len(expected))
    assert [schedule for _, schedule in taken] == pytest.approx(
        [sum(cosine[i] for i in group) for group in expected]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_parts_gives_the_same_result(backbone, kind):
    sizes: set[int] = set()
    expected = fit(backbone, kind, local_epochs=1, learning_rate=1e-3)
    note = backbone.model.norm.register_forward_hook(lambda _, x, __: sizes.add(len(x[0])))
    found = fit(backbone, kind, local_epochs=1, learning_rate=1e-3, micro_batch=3)
    note.remove()
    assert sizes == {len(DATA.labels), 3, 2}  # all of them: the head's scale
    assert_close(found, expected)


@pytest.mark.parametrize("kind", MIXABLE)
def test_blocks_that_run_twice_give_the_same_result(backbone, kind):
    calls: list[object] = []
    expected = fit(backbone, kind, local_epochs=1, learning_rate=1e-3)
    note = backbone.model.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(None))
    found = fit(backbone, kind, local_epochs=1, learning_rate=1e-3, checkpoint_blocks=True)
    note.remove()
    assert len(calls) == 1 + 2 * 3  # the head's scale, and three steps
    assert_close(found, expected)


def test_blocks_of_tangents_do_not_run_twice(backbone):
    with pytest.raises(ConfigError, match="micro-batch"):
        fit(backbone, Kind.TANGENT, checkpoint_blocks=True)


def assert_close(actual: Fitted, expected: Fitted) -> None:
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, tensor in expected.task_vector.tensors.items():
        torch.testing.assert_close(actual.task_vector.tensors[name], tensor, rtol=1e-3, atol=1e-4)


# -- how long -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "size", "floor", "share", "batches"),
    [
        (2, 8, 0, 1.0, [3, 3]),
        (2, 8, 5, 1.0, [3, 3]),
        (2, 8, 7, 1.0, [3, 3, 1]),
        (1, 8, 12, 1.0, [3, 3, 3, 3]),
        (2, 8, 20, 0.25, [3, 3]),
        (1, 8, 20, 0.25, [3, 2]),
        (1, 8, 21, 1 / 3, [3, 3, 1]),  # no step more by rounding
        (3, 24, 0, 1.0, [1, 1, 1]),
        (3, 24, 6, 1.0, [2, 2, 2]),  # batches of 12 take six steps in three passes
        (3, 24, 9, 1.0, [3, 3, 3]),  # of 8
        (3, 24, 20, 1.0, [3, 3, 3, 3, 3, 3, 2]),  # smaller ones than 8 are not taken
        (3, 24, 20, 0.25, [2, 2, 2]),  # of 14: three passes make five steps, and one more
        (1, 4, 9, 1.0, [6, 3]),  # unless they are asked for
    ],
)
def test_small_clients_train_for_a_floor_of_steps_in_more_epochs(
    backbone, monkeypatch, epochs, size, floor, share, batches
):
    """24 images; smaller batches come before more passes, and a part has a share of the floor."""
    schedules = []

    def step(self, images, labels, schedule, *, last) -> float:
        schedules.append((schedule, last))
        return 2.0

    monkeypatch.setattr("fedcompo.training.fit._Training.step", step)
    fitted = fit_task_vector(
        backbone,
        Kind.LORA,
        DATA,
        zero_head(CLASSES, 8),
        replace(CONFIG, local_epochs=epochs, local_steps=floor, batch_size=size),
        generator=rng(0),
        course=Course(passed=0.25, share=share),
    )
    steps = sum(batches)
    assert len(schedules) == steps
    assert fitted.losses == (2.0,) * len(batches)  # of a part of an epoch, too
    cosine = [0.5 * (1 + math.cos(math.pi * (0.25 + share * i / steps))) for i in range(steps)]
    assert [schedule for schedule, _ in schedules] == pytest.approx(cosine)
    assert [last for _, last in schedules] == [False] * (steps - 1) + [True]


# -- the head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MIXABLE)
def test_a_backbone_of_larger_features_trains_alike(backbone, kind):
    """The last LayerNorm times 8: features are multiplied by 8, no linear head can tell."""
    larger = pico_backbone()
    norm = larger.model.norm
    with torch.no_grad():
        norm.weight.mul_(8)
        norm.bias.mul_(8)
    expected, found = fit(backbone, kind), fit(larger, kind)
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    for name, tensor in expected.task_vector.tensors.items():
        torch.testing.assert_close(found.task_vector.tensors[name], tensor, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(8 * found.head.weight, expected.head.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.head.bias, expected.head.bias, rtol=1e-3, atol=1e-4)


def test_the_scale_and_variance_of_features_are_those_of_some_evenly_spaced_images(
    backbone, monkeypatch
):
    monkeypatch.setattr("fedcompo.training.head.IMAGES", 10)
    features = backbone.forward({})(DATA.images).double()
    for images, some in ((DATA.images, features[::3]), (DATA.images[:10], features[:10])):
        total = sum(value**2 for row in some.tolist() for value in row)
        mean = some.mean(0)
        variance = sum(float((row - mean).square().sum()) for row in some) / len(some)
        expected = math.sqrt(total / some.numel()), variance
        assert feature_scale(backbone, images) == pytest.approx(expected, rel=1e-5)


def test_features_of_zeros_have_the_scale_one(backbone):
    silent = pico_backbone()
    with torch.no_grad():
        silent.model.norm.weight.zero_()
        silent.model.norm.bias.zero_()
    assert feature_scale(silent, DATA.images) == (1.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_of_one_class_trains_the_backbone_under_a_head_of_all(backbone, kind):
    joint = random_head(("far", "left", "right"), 8, seed=1)
    left = DATA.images[DATA.labels == 0]
    data = Split(left, torch.ones(len(left), dtype=torch.int64))  # its row of the joint head
    fitted = fit_task_vector(
        backbone,
        kind,
        data,
        joint,
        replace(CONFIG, target_logit=2.0, local_epochs=25),
        generator=rng(0),
        course=Course(fixed=True),
    )
    assert fitted.losses[-1] < 0.8 * fitted.losses[0]
    assert fitted.head.classes == ("left",)
    assert torch.equal(fitted.head.weight, joint.weight[1:2])
    assert torch.equal(fitted.head.bias, joint.bias[1:2])
    assert size(fitted.task_vector, backbone.theta_0) > 0


def test_a_loss_that_is_no_number_is_refused_with_advice(backbone):
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]).to(torch.uint8)
    data = Split(images, torch.tensor([0, 1]))
    with pytest.raises(ContributionError, match=r"loss is nan after epoch \d.*`learning-rate`"):
        fit(backbone, Kind.FULL, data=data, learning_rate=1e25)


@pytest.mark.parametrize("floor", [0, 7])
def test_images_are_counted_over_all_passes_and_epochs_logged(backbone, floor, monkeypatch, caplog):
    monkeypatch.setattr(progress, "QUIET", 0)
    monkeypatch.setattr(progress, "PAUSE", 0)
    told: list[progress.Progress] = []
    caplog.set_level("INFO")
    with progress.listening(told.append):
        fitted = fit(backbone, Kind.IA3, local_epochs=3, local_steps=floor)
    counts = [p for p in told if p.what == "training"]
    assert [p.ended for p in counts] == [False] * (len(counts) - 1) + [True]
    assert counts[-1].done == counts[-1].total
    assert f"Epoch 3 of {len(fitted.losses)}, loss {fitted.losses[2]:.4f}" in caplog.text


def test_clients_of_all_kinds_compose_to_a_model_that_still_solves_the_problem(backbone):
    pool = Pool()
    for kind in MIXABLE:
        fitted = fit(backbone, kind)
        member = contribution(f"client-{kind}", kind, theta_0=backbone.theta_0)
        own = replace(member, task_vector=fitted.task_vector, head=fitted.head)
        pool = Pool((*pool, own))
    theta_p = pool.compose(backbone.theta_0)
    accuracies = [accuracy_of(backbone, theta_p, c.head, CLASSES, DATA).task_il for c in pool]
    assert min(accuracies) >= 0.9
