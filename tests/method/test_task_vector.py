"""A client's change: dense form and checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import KINDS, dense_by_hand, pico_weights, random_deltas, task_vector
from torch import Tensor

from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneMismatch, ContributionError
from fedcompo.method.task_vector import TaskVector

THETA_0 = pico_weights(dtype=torch.float32)
QKV, FC1 = THETA_0
OWNER = "client 'hospital-b'"


def changed(vector: TaskVector, **tensors: Tensor) -> TaskVector:
    """The vector with the first tensor of each parameter name replaced."""
    found = dict(vector.tensors)
    for parameter, tensor in tensors.items():
        found[f"{FC1}/{parameter}"] = tensor
    return replace(vector, tensors=found)


def check(vector: TaskVector) -> None:
    vector.check(THETA_0, base="pico@0", owner=OWNER)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_form_is_that_of_the_formula(kind):
    vector = task_vector(kind, THETA_0, seed=1)
    dense = vector.dense(THETA_0)
    assert dense.keys() == THETA_0.keys()
    for name, expected in dense_by_hand(vector, THETA_0).items():
        assert dense[name].dtype == THETA_0[name].dtype
        torch.testing.assert_close(dense[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_vector_is_a_copy_of_the_deltas(kind):
    deltas = random_deltas(kind, THETA_0, seed=1)
    vector = TaskVector.of(kind, deltas, base="pico@0")
    before = {name: tensor.clone() for name, tensor in vector.tensors.items()}
    with torch.no_grad():
        for delta in deltas.values():
            for parameter in delta.parameters():
                parameter.zero_()
    assert all(torch.equal(vector.tensors[name], t) for name, t in before.items())
    assert not any(tensor.requires_grad for tensor in vector.tensors.values())
    assert vector.names == tuple(sorted(THETA_0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_passes_the_check(kind):
    check(task_vector(kind, THETA_0, seed=1))


def test_another_backbone_is_refused_and_both_are_named():
    vector = task_vector(Kind.LORA, THETA_0, seed=1, base="vit@beef")
    with pytest.raises(BackboneMismatch, match=r"hospital-b.*vit@beef.*pico@0"):
        check(vector)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_tensor_is_refused(kind):
    vector = task_vector(kind, THETA_0, seed=1)
    for name in vector.tensors:
        rest = {key: tensor for key, tensor in vector.tensors.items() if key != name}
        with pytest.raises(ContributionError, match=f"hospital-b.*'{name}'"):
            check(replace(vector, tensors=rest))


@pytest.mark.parametrize("name", ["extra", f"{FC1}/C", "blocks.7.mlp.fc1.weight/A"])
def test_an_extra_tensor_is_refused(name):
    vector = task_vector(Kind.LORA, THETA_0, seed=1)
    with pytest.raises(ContributionError, match=f"'{name}'"):
        check(replace(vector, tensors={**vector.tensors, name: torch.zeros(2, 2)}))


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        (Kind.FULL, {"delta": torch.zeros(4, 5)}),
        (Kind.FULL, {"delta": torch.zeros(20)}),
        (Kind.LORA, {"A": torch.zeros(2, 5)}),
        (Kind.LORA, {"B": torch.zeros(2, 2)}),
        (Kind.LORA, {"A": torch.zeros(1, 2, 4)}),
        (Kind.IA3, {"l": torch.zeros(5)}),
        (Kind.IA3, {"l": torch.zeros(5, 4)}),
        (Kind.IA3, {"l": torch.zeros(())}),
    ],
)
def test_a_tensor_of_another_shape_is_refused(kind, tensors):
    vector = changed(task_vector(kind, THETA_0, seed=1), **tensors)
    with pytest.raises(ContributionError, match=rf"'{FC1}/\w+' of .*hospital-b.* has shape"):
        check(vector)


def test_factors_of_different_rank_are_refused():
    vector = changed(task_vector(Kind.LORA, THETA_0, seed=1), A=torch.zeros(3, 4))
    with pytest.raises(ContributionError, match=r"ranks 3 \(A\) and 2 \(B\)"):
        check(vector)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64])
def test_a_tensor_that_is_not_floating_point_is_refused(dtype):
    vector = changed(task_vector(Kind.FULL, THETA_0, seed=1), delta=torch.zeros(5, 4, dtype=dtype))
    with pytest.raises(ContributionError, match=f"has dtype {dtype}"):
        check(vector)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_not_finite_is_refused(kind, value):
    vector = task_vector(kind, THETA_0, seed=1)
    for name in vector.tensors:
        broken = {key: tensor.clone() for key, tensor in vector.tensors.items()}
        broken[name].view(-1)[-1] = value
        with pytest.raises(ContributionError, match=f"'{name}' of .* has 1 values"):
            check(replace(vector, tensors=broken))
