"""The linearised backbone: its values and gradients against the Jacobian itself, in float64."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from builders import (
    PATTERNS,
    left_or_right,
    normal,
    pico_backbone,
    pixels,
    random_head,
    random_like,
)
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedcompo.backbone.backbone import Backbone, target_weights
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.backbone.tangent import (
    TangentModel,
    feature_map,
    square_loss,
    tangent_features,
)
from fedcompo.errors import BackboneError
from fedcompo.method.deltas import Weights
from fedcompo.training.accuracy import accuracy_of

IMAGES = pixels(3, 1, 8, seed=1)
QKV, FC2 = "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"


class InFloat64(Preprocessing):
    def normalise(self, images: Tensor) -> Tensor:
        return super().normalise(images).double()


def linearised(backbone, theta):
    return feature_map(backbone, theta, tangent=True)


def double_backbone() -> Backbone:
    """The pico backbone with float64 throughout."""
    backbone = pico_backbone()
    model = backbone.model.double()
    seen = InFloat64(**asdict(backbone.preprocessing))
    return replace(
        backbone, model=model, theta_0=target_weights(model, PATTERNS), preprocessing=seen
    )


EXACT = double_backbone()
TAU = random_like(EXACT.theta_0, seed=5)


def features_at(theta: Weights) -> Tensor:
    return functional_call(EXACT.model, theta, (EXACT.preprocessing.normalise(IMAGES),))


with sdpa_kernel(SDPBackend.MATH):
    JACOBIAN = jacrev(features_at)(EXACT.theta_0)
"""By weight name, (batch, features, out, in)."""
AT_THETA_0 = features_at({})


def first_order(tau: Weights) -> Tensor:
    """Oracle: f0 + J tau, with the Jacobian written out."""
    return AT_THETA_0 + sum(torch.einsum("bfoi,oi->bf", JACOBIAN[name], tau[name]) for name in tau)


def moved(backbone: Backbone, tau: Weights) -> Weights:
    return {name: backbone.theta_0[name] + change for name, change in tau.items()}


def trainable(tau: Weights) -> Weights:
    return {name: change.clone().requires_grad_() for name, change in tau.items()}


def forwards(backbone: Backbone) -> list[int]:
    """Batch sizes of the passes through a model from now on."""
    seen: list[int] = []
    backbone.model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    return seen


# -- values ---------------------------------------------------------------------------------------


def test_features_are_the_value_and_the_jacobian_times_the_change():
    expected = first_order(TAU)
    assert (expected - features_at(moved(EXACT, TAU))).abs().max() > 1  # far from the curve
    torch.testing.assert_close(tangent_features(EXACT, TAU, IMAGES), expected, rtol=0, atol=1e-10)
    actual = linearised(EXACT, moved(EXACT, TAU))(IMAGES)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_the_change_of_features_is_the_slope_of_the_network():
    step = 1e-5
    ahead, behind = (
        features_at(moved(EXACT, {name: sign * step * change for name, change in TAU.items()}))
        for sign in (1, -1)
    )
    slope = (ahead - behind) / (2 * step)
    actual = tangent_features(EXACT, TAU, IMAGES) - AT_THETA_0
    torch.testing.assert_close(actual, slope, rtol=0, atol=1e-6)


def test_weights_that_are_not_named_do_not_change():
    some = {QKV: TAU[QKV], FC2: TAU[FC2]}
    torch.testing.assert_close(tangent_features(EXACT, some, IMAGES), first_order(some))
    torch.testing.assert_close(linearised(EXACT, moved(EXACT, some))(IMAGES), first_order(some))


def test_no_change_is_the_pre_trained_backbone():
    for theta in ({}, EXACT.theta_0):
        torch.testing.assert_close(linearised(EXACT, theta)(IMAGES), AT_THETA_0)


def test_features_of_a_composition_are_the_clients_own_averaged():
    clients = [random_like(EXACT.theta_0, seed=seed) for seed in (10, 50, 90)]
    coefficients = (0.5, 0.2, 0.3)
    composed = {
        name: sum(w * tau[name] for w, tau in zip(coefficients, clients, strict=True))
        for name in EXACT.theta_0
    }
    own = [linearised(EXACT, moved(EXACT, tau))(IMAGES) - AT_THETA_0 for tau in clients]
    expected = AT_THETA_0 + sum(w * change for w, change in zip(coefficients, own, strict=True))
    actual = linearised(EXACT, moved(EXACT, composed))(IMAGES)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_in_float32_features_are_right_to_its_precision():
    backbone = pico_backbone()
    tau = {name: change.float() for name, change in TAU.items()}
    for actual in (
        tangent_features(backbone, tau, IMAGES),
        linearised(backbone, moved(backbone, tau))(IMAGES),
    ):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), first_order(TAU), rtol=1e-4, atol=1e-4)


def test_task_vectors_of_another_precision_are_taken_as_the_weights_are():
    tau = {name: change.bfloat16() for name, change in TAU.items()}
    rounded = {name: change.double() for name, change in tau.items()}
    torch.testing.assert_close(tangent_features(EXACT, tau, IMAGES), first_order(rounded))


def test_the_pre_trained_weights_and_the_change_stay_as_they_are():
    backbone = double_backbone()
    tau = trainable(TAU)
    tangent_features(backbone, tau, IMAGES).sum().backward()
    for name in TAU:
        assert torch.equal(tau[name], TAU[name])
        assert torch.equal(backbone.theta_0[name], EXACT.theta_0[name])
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("tangent", [True, False])
def test_a_feature_map_is_linearised_for_tangents_alone(tangent):
    theta = moved(EXACT, TAU)
    expected = first_order(TAU) if tangent else features_at(theta)
    torch.testing.assert_close(feature_map(EXACT, theta, tangent=tangent)(IMAGES), expected)


# -- gradients ------------------------------------------------------------------------------------

COTANGENT = normal(3, 8, seed=9)


def gradients(features: Tensor, tau: Weights) -> Weights:
    found = torch.autograd.grad(features, list(tau.values()), COTANGENT)
    return dict(zip(tau, found, strict=True))


def assert_gradients(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-10)


def test_the_gradient_is_the_transposed_jacobian_times_the_cotangent():
    tau = trainable(TAU)
    expected = {n: torch.einsum("bfoi,bf->oi", j, COTANGENT) for n, j in JACOBIAN.items()}
    assert_gradients(gradients(tangent_features(EXACT, tau, IMAGES), tau), expected)


def test_the_gradient_is_that_of_autograd_through_the_jvp():
    tau = trainable(TAU)
    with sdpa_kernel(SDPBackend.MATH):
        value, change = jvp(features_at, (EXACT.theta_0,), (tau,))
    expected = gradients(value + change, tau)
    assert_gradients(gradients(tangent_features(EXACT, tau, IMAGES), tau), expected)


def test_gradients_flow_on_to_what_the_change_is_made_of():
    factors = {name: normal(*w.shape, seed=i) for i, (name, w) in enumerate(TAU.items())}
    strength = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    tau = {name: strength * factor for name, factor in factors.items()}
    tangent_features(EXACT, tau, IMAGES).backward(COTANGENT)
    expected = sum(
        (COTANGENT * (first_order({n: f}) - AT_THETA_0)).sum() for n, f in factors.items()
    )
    torch.testing.assert_close(strength.grad, expected)


def test_only_those_who_ask_get_a_gradient():
    tau = {**TAU, QKV: TAU[QKV].clone().requires_grad_()}
    tangent_features(EXACT, tau, IMAGES).backward(COTANGENT)
    expected = torch.einsum("bfoi,bf->oi", JACOBIAN[QKV], COTANGENT)
    torch.testing.assert_close(tau[QKV].grad, expected)
    assert not tangent_features(EXACT, TAU, IMAGES).requires_grad


def test_the_gradient_can_be_taken_again_and_does_not_depend_on_the_change():
    tau, elsewhere = trainable(TAU), trainable(random_like(TAU, seed=70))
    features = tangent_features(EXACT, tau, IMAGES)
    first = torch.autograd.grad(features, list(tau.values()), COTANGENT, retain_graph=True)
    again = dict(zip(tau, first, strict=True))
    assert_gradients(gradients(features, tau), again)
    assert_gradients(gradients(tangent_features(EXACT, elsewhere, IMAGES), elsewhere), again)


def test_a_gradient_of_the_gradient_is_refused():
    tau = trainable(TAU)
    features = tangent_features(EXACT, tau, IMAGES)
    (gradient,) = torch.autograd.grad(features.square().sum(), tau[QKV], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_descent_along_the_gradient_fits_targets_that_the_features_can_reach():
    wanted = first_order(random_like(TAU, seed=30)).detach()
    tau = trainable({name: torch.zeros_like(change) for name, change in TAU.items()})
    optimiser = torch.optim.LBFGS(list(tau.values()), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (tangent_features(EXACT, tau, IMAGES) - wanted).square().mean()
        value.backward()
        return value

    start = loss().item()
    optimiser.step(loss)
    assert loss().item() < 1e-8 * start


# -- what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_composition_of_any_number_of_clients_costs_one_pass(count):
    backbone = pico_backbone()
    clients = [random_like(backbone.theta_0, seed=10 * i) for i in range(count)]
    theta = {n: w + sum(c[n] for c in clients) / count for n, w in backbone.theta_0.items()}
    seen = forwards(backbone)
    linearised(backbone, theta)(IMAGES)
    assert seen == [len(IMAGES)]


def test_a_training_step_costs_a_jvp_and_one_pass_that_is_gone_back_over():
    backbone = pico_backbone()
    tau = trainable({name: change.float() for name, change in TAU.items()})
    seen = forwards(backbone)
    features = tangent_features(backbone, tau, IMAGES)
    assert seen == [len(IMAGES)]
    features.sum().backward()
    assert seen == [len(IMAGES)] * 2


def test_nothing_of_the_network_is_held_from_the_value_to_the_gradient():
    tau, held = trainable(TAU), []
    with torch.autograd.graph.saved_tensors_hooks(held.append, lambda tensor: tensor):
        tangent_features(EXACT, tau, IMAGES)
    assert held == []


# -- half precision -------------------------------------------------------------------------------


def test_under_autocast_both_passes_run_in_its_precision():
    backbone = pico_backbone()
    tau = trainable({name: 0.1 * change.float() for name, change in TAU.items()})
    seen: list[torch.dtype] = []
    layer = backbone.model.get_submodule("blocks.0.mlp.fc1")
    layer.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features = tangent_features(backbone, tau, IMAGES)
    features.float().backward(COTANGENT.float())
    assert seen == [torch.bfloat16] * 2
    exact = trainable({name: 0.1 * change for name, change in TAU.items()})
    expected = gradients(tangent_features(EXACT, exact, IMAGES), exact)
    for name in tau:
        assert tau[name].grad.dtype == torch.float32
        off = (tau[name].grad.double() - expected[name]).norm() / expected[name].norm()
        assert 1e-5 < off < 0.05
    off = (features.double() - first_order(exact)).norm() / first_order(exact).norm()
    assert 1e-5 < off < 0.05


def test_without_autocast_the_gradient_is_exact_also_where_backward_is_called_under_it():
    tau = trainable(TAU)
    features = tangent_features(EXACT, tau, IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(features, tau)
    expected = {n: torch.einsum("bfoi,bf->oi", j, COTANGENT) for n, j in JACOBIAN.items()}
    assert_gradients(actual, expected)


# -- the loss -------------------------------------------------------------------------------------


def test_the_square_loss_is_the_mean_over_batch_and_classes():
    logits, labels = normal(4, 3, seed=1), torch.tensor([2, 0, 1, 1])
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for index, logit in enumerate(row):
            total += (logit - (15.0 if index == label else 0.0)) ** 2
    assert float(square_loss(logits, labels, 15.0)) == pytest.approx(total / 12, rel=1e-12)


def test_the_square_loss_is_nothing_where_logits_are_the_targets():
    logits = torch.tensor([[0.0, 5.0], [5.0, 0.0]])
    assert square_loss(logits, torch.tensor([1, 0]), 5.0) == 0


# -- a model and its accuracy ---------------------------------------------------------------------


def test_the_model_gives_the_logits_of_linearised_features():
    head = random_head(("a", "b", "c", "d"), 8, seed=3)
    model = double_backbone().model
    model.reset_classifier(4)
    model.double().load_state_dict(
        {**EXACT.model.state_dict(), "head.weight": head.weight, "head.bias": head.bias}
    )
    model.pretrained_cfg = {"architecture": "pico"}
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tangent = TangentModel(model, TAU).eval()
    actual = tangent(EXACT.preprocessing.normalise(IMAGES))
    torch.testing.assert_close(actual, head(first_order(TAU)))
    assert tangent.pretrained_cfg == model.pretrained_cfg
    assert all(torch.equal(weight, before[n]) for n, weight in model.state_dict().items())
    assert {n.rpartition(".")[2].replace("/", ".") for n, _ in tangent.tau.named_buffers()} == set(
        TAU
    )


def test_accuracy_of_tangents_is_counted_on_linearised_features():
    backbone = pico_backbone()
    data = left_or_right(60, seed=4)
    head = random_head(("bright left", "bright right", "else"), 8, seed=5)
    tau = {name: change.float() for name, change in TAU.items()}
    exact = double_backbone()
    features = {
        True: tangent_features(exact, TAU, data.images),
        False: exact.forward(moved(exact, TAU))(data.images),
    }
    hits = {}
    for tangent, values in features.items():
        found = accuracy_of(
            backbone, moved(backbone, tau), head, head.classes[:2], data, linearised=tangent
        )
        logits = head(values)
        hits[tangent] = float((logits.argmax(1) == data.labels).double().mean())
        assert found.class_il == hits[tangent]
        assert found.task_il == float((logits[:, :2].argmax(1) == data.labels).double().mean())
    assert hits[True] != hits[False]


class FusedAttention(nn.Module):
    """Calls an operation of which torch knows no forward-mode derivative."""

    def forward(self, values: Tensor) -> Tensor:
        one = values.unsqueeze(1)  # head
        attended, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(one, one, one)
        return attended.squeeze(1)


def test_a_model_that_cannot_be_linearised_is_refused_with_advice():
    backbone = pico_backbone()
    backbone.model.norm = FusedAttention()
    with pytest.raises(BackboneError, match=r"cannot be linearised.*another `kind` than tangent"):
        linearised(backbone, random_like(backbone.theta_0, seed=1))(IMAGES)
