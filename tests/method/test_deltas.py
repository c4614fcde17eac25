"""The trainable change of one weight, kind by kind."""

from __future__ import annotations

import pytest
import torch
from builders import KINDS, normal, pico_weights, random_deltas, rng

from fedcompo.config.choices import Kind
from fedcompo.method.deltas import (
    IA3,
    Full,
    LoRA,
    new_deltas,
    rank_of,
    restore_delta,
    stored_shapes,
)

THETA_0 = pico_weights()
QKV, FC1 = "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_starts_at_no_change_of_the_weights_shape_and_type(kind):
    deltas = new_deltas(kind, THETA_0, rank=2, generator=rng(0))
    assert deltas.keys() == THETA_0.keys()
    for name, delta in deltas.items():
        assert delta().shape == THETA_0[name].shape
        assert delta().dtype == THETA_0[name].dtype
        assert (delta() == 0).all()


def test_full_is_the_change_itself():
    delta = Full(THETA_0[FC1])
    change = normal(5, 4, seed=1)
    delta.delta.data.copy_(change)
    assert torch.equal(delta(), change)


def test_lora_is_the_sum_of_products_of_columns_and_rows():
    delta = random_deltas(Kind.LORA, THETA_0, seed=1)[FC1]
    expected = sum(torch.outer(delta.B[:, i], delta.A[i]) for i in range(2))
    torch.testing.assert_close(delta(), expected)


def test_ia3_scales_each_output_row_of_the_weight():
    weight = THETA_0[FC1]
    delta = IA3(weight)
    delta.l.data.copy_(torch.tensor([[2.0], [0.0], [1.0], [-1.0], [0.5]]))
    scaled = torch.stack([2 * weight[0], 0 * weight[1], weight[2], -weight[3], weight[4] / 2])
    torch.testing.assert_close(weight + delta(), scaled)


def test_ia3_keeps_the_weight_as_a_constant_not_as_state():
    delta = IA3(THETA_0[FC1].clone().requires_grad_())
    assert list(delta.state_dict()) == ["l"]
    assert not delta.weight.requires_grad


def test_a_fused_qkv_gets_three_times_the_rank():
    weights = {QKV: torch.zeros(60, 20), "blocks.0.attn.proj.weight": torch.zeros(20, 20)}
    deltas = new_deltas(Kind.LORA, weights, rank=4, generator=rng(0))
    assert deltas[QKV].A.shape == (12, 20)
    assert deltas[QKV].B.shape == (60, 12)
    assert deltas["blocks.0.attn.proj.weight"].A.shape == (4, 20)
    assert rank_of("blocks.0.attn.q_proj.weight", 4) == 4


def test_a_rank_above_that_of_the_weight_is_cut():
    delta = LoRA(THETA_0[FC1], 16)
    assert delta.A.shape == (4, 4)
    assert delta.B.shape == (5, 4)


def test_the_first_factor_is_uniform_within_one_over_the_root_of_its_width():
    a = LoRA(torch.zeros(400, 400), 100, rng(0)).A
    assert a.abs().max() <= 1 / 20
    torch.testing.assert_close(a.std(), torch.tensor(1 / 20 / 3**0.5), rtol=0.02, atol=0)


def test_the_first_factors_depend_on_the_generator_and_not_on_the_order_of_weights():
    reversed_weights = dict(reversed(THETA_0.items()))
    first = new_deltas(Kind.LORA, THETA_0, rank=2, generator=rng(0))
    same = new_deltas(Kind.LORA, reversed_weights, rank=2, generator=rng(0))
    other = new_deltas(Kind.LORA, THETA_0, rank=2, generator=rng(1))
    for name in THETA_0:
        assert torch.equal(first[name].A, same[name].A)
        assert not torch.equal(first[name].A, other[name].A)


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_delta_is_what_the_module_yields(kind):
    for name, delta in random_deltas(kind, THETA_0, seed=2).items():
        stored = {key: value.detach().clone() for key, value in delta.named_parameters()}
        restored = restore_delta(kind, THETA_0[name], stored)
        assert torch.equal(restored, delta())
        assert not restored.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_delta_takes_the_weights_type(kind):
    weights = pico_weights(dtype=torch.float32)
    delta = random_deltas(kind, THETA_0, seed=2)[FC1]
    stored = {key: value.detach() for key, value in delta.named_parameters()}
    restored = restore_delta(kind, weights[FC1], stored)
    assert restored.dtype == torch.float32
    torch.testing.assert_close(restored.double(), delta().detach(), rtol=1e-5, atol=1e-6)


def test_restoring_draws_nothing_at_random():
    delta = random_deltas(Kind.LORA, THETA_0, seed=2)[FC1]
    before = torch.get_rng_state()
    restore_delta(Kind.LORA, THETA_0[FC1], {k: v.detach() for k, v in delta.named_parameters()})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_shapes_are_those_of_the_parameters(kind):
    for name, delta in new_deltas(kind, THETA_0, rank=2, generator=rng(0)).items():
        shapes = stored_shapes(kind, THETA_0[name])
        assert shapes.keys() == dict(delta.named_parameters()).keys()
        for key, parameter in delta.named_parameters():
            found = tuple(parameter.shape)
            assert len(found) == len(shapes[key])
            assert all(s in (None, f) for s, f in zip(shapes[key], found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_linear_layer_needs_is_what_autograd_gives(kind):
    for name, delta in random_deltas(kind, THETA_0, seed=1).items():
        base, x = normal(*THETA_0[name].shape, seed=2), normal(7, 4, seed=3)
        dense = base + 0.3 * delta()
        torch.testing.assert_close(delta.merged(base, 0.3), dense.detach())
        y = x @ dense.T
        g = normal(*y.shape, seed=4)
        expected = torch.autograd.grad(y, list(delta.parameters()), g)
        torch.testing.assert_close(delta.gradients(g, x, 0.3), list(expected))
