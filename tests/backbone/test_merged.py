"""A model whose weights change while they are trained, beside the same weights, dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from builders import MIXABLE, pico_backbone, random_deltas, random_like, rng
from torch import Tensor
from torch.func import functional_call

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.merged import trained_forward
from fedcompo.config.choices import Kind

IMAGES = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8, generator=rng(0))


@pytest.fixture
def backbone() -> Backbone:
    return pico_backbone()


def gradients(features: Tensor, deltas: dict) -> list[Tensor]:
    parameters = [p for delta in deltas.values() for p in delta.parameters()]
    return list(torch.autograd.grad(features.square().sum(), parameters))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("kind", MIXABLE)
def test_features_and_gradients_are_those_of_dense_weights(backbone, kind, scale, checkpointed):
    """In a sum with others, too: the base is not θ₀ and the scale is not 1."""
    deltas = random_deltas(kind, backbone.theta_0, seed=1, scale=0.1)
    base = backbone.theta_0
    if scale != 1:
        others = random_like(base, seed=2)
        base = {name: w + 0.1 * others[name] for name, w in base.items()}
    dense = {name: base[name] + scale * delta() for name, delta in deltas.items()}
    expected = backbone.forward(dense)(IMAGES)
    with trained_forward(backbone, deltas, base, scale, checkpointed=checkpointed) as forward:
        found = forward(IMAGES)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            gradients(found, deltas), gradients(expected, deltas), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", MIXABLE)
def test_a_model_that_reads_a_weight_in_another_way_sees_the_change_too(backbone, kind):
    def read(layer, _, output: Tensor) -> Tensor:
        one = F.linear(torch.ones(layer.weight.shape[1]), layer.weight)  # no batch of tokens
        return output + torch.stack([layer.weight, 2 * layer.weight]).sum() * one.sum()

    backbone.model.blocks[0].mlp.fc1.register_forward_hook(read)
    deltas = random_deltas(kind, backbone.theta_0, seed=1, scale=0.1)
    dense = {
        name: w + delta()
        for (name, w), delta in zip(backbone.theta_0.items(), deltas.values(), strict=True)
    }
    batch = backbone.preprocessing.normalise(IMAGES)
    expected = functional_call(backbone.model, dense, (batch,))
    with trained_forward(backbone, deltas, backbone.theta_0, 1.0) as forward:
        found = forward(IMAGES)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            gradients(found, deltas), gradients(expected, deltas), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_model_is_as_before_whatever_happens_inside(backbone, checkpointed):
    deltas = random_deltas(Kind.LORA, backbone.theta_0, seed=1)
    expected = backbone.model(backbone.preprocessing.normalise(IMAGES))
    before = dict(backbone.model.named_parameters())
    with (
        pytest.raises(ZeroDivisionError),
        trained_forward(backbone, deltas, backbone.theta_0, 1.0, checkpointed=checkpointed),
    ):
        raise ZeroDivisionError
    assert all(p is before[name] for name, p in backbone.model.named_parameters())
    assert torch.equal(backbone.model(backbone.preprocessing.normalise(IMAGES)), expected)


@pytest.mark.parametrize("kind", MIXABLE)
def test_a_layer_in_bfloat16_is_near_the_same_in_float32(backbone, kind):
    deltas = random_deltas(kind, backbone.theta_0, seed=1, scale=0.1)
    both = []
    for half in (False, True):
        with trained_forward(backbone, deltas, backbone.theta_0, 1.0) as forward:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                found = forward(IMAGES)
            both.append(torch.cat([g.flatten() for g in gradients(found.float(), deltas)]))
    assert all(g.dtype == torch.float32 for g in both)
    off = float((both[0] - both[1]).norm() / both[0].norm())
    assert 0 < off < 0.05, off


def test_checkpointed_blocks_keep_less(backbone):
    deltas = random_deltas(Kind.LORA, backbone.theta_0, seed=1)
    kept = []
    for checkpointed in (False, True):
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            trained_forward(
                backbone, deltas, backbone.theta_0, 1.0, checkpointed=checkpointed
            ) as forward,
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            forward(IMAGES)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.5 * kept[0]
