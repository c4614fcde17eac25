"""Fewer bits on the wire: what they cost, what survives them, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from builders import normal, pico_weights, random_like, task_vector
from torch import Tensor

from fedcompo.config.choices import Kind, Wire
from fedcompo.errors import ContributionError, FileFormatError
from fedcompo.messages.records import from_record, to_record
from fedcompo.messages.wire import BLOCK, decode, encode, relative_error
from fedcompo.method.deltas import Weights
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage.tensorfile import prefixed

FEWER = (Wire.BFLOAT16, Wire.INT8)
SIZES = (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7)
THETA_0 = pico_weights(dtype=torch.float32)


def there_and_back(tensors: Weights, wire: Wire) -> Weights:
    return decode(encode(tensors, wire), wire, source="test")


def heavy_tailed(*shape: int, seed: int) -> Tensor:
    """Non-negative, over many orders of magnitude, as a Fisher is."""
    return (4 * normal(*shape, seed=seed)).exp().float()


def int8_by_hand(values: Tensor, largest: int) -> Tensor:
    """Oracle: one number at a time, in Python's floats."""
    flat, found = values.flatten().tolist(), []
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        step = max(map(abs, block)) / largest
        found += [round(x / step) * step if step else 0.0 for x in block]
    return torch.tensor(found, dtype=torch.float64).view(values.shape)


def test_float32_leaves_everything_alone():
    tensors = {"task_vector/a/delta": normal(3, 4, seed=1), "head/weight": normal(2, seed=2)}
    assert encode(tensors, Wire.FLOAT32) == decode(tensors, Wire.FLOAT32, source="test") == tensors


@pytest.mark.parametrize("wire", FEWER)
def test_heads_and_mixtures_leave_as_they_are(wire):
    tensors = {n: normal(5, seed=1) for n in ("head/weight", "features/cat/means", "theta/a")}
    assert encode(tensors, wire) == there_and_back(tensors, wire) == tensors


@pytest.mark.parametrize("size", SIZES)
def test_int8_is_the_nearest_of_255_steps_in_each_block(size):
    values = normal(size, seed=size, dtype=torch.float32) * torch.arange(1, size + 1)
    found = there_and_back({"task_vector/a/delta": values}, Wire.INT8)["task_vector/a/delta"]
    expected = int8_by_hand(values, 127)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-12)
    for block, kept in zip(values.split(BLOCK), found.split(BLOCK), strict=True):
        step = float(block.abs().max()) / 127
        assert float((block - kept).abs().max()) <= step * (0.5 + 1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_fisher_is_coded_by_its_square_root_and_stays_at_or_above_zero(size):
    fisher = heavy_tailed(size, seed=size)
    coded = encode({"fisher/a": fisher}, Wire.INT8)
    assert coded["fisher/a"].dtype == torch.uint8
    found = decode(coded, Wire.INT8, source="test")["fisher/a"]
    expected = int8_by_hand(fisher.double().sqrt(), 255).square()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-12)
    assert float(found.min()) >= 0


def test_the_square_root_keeps_small_fishers_that_plain_codes_lose():
    fisher = heavy_tailed(64, BLOCK, seed=3)
    rooted = there_and_back({"fisher/a": fisher}, Wire.INT8)["fisher/a"]
    plain = there_and_back({"task_vector/a/delta": fisher}, Wire.INT8)["task_vector/a/delta"]
    assert int((rooted == 0).sum()) < int((plain == 0).sum()) / 2
    assert relative_error({"f": fisher}, {"f": rooted}) < 0.01


def test_bfloat16_is_torchs_own():
    values = normal(7, 9, seed=1, dtype=torch.float32)
    for name in ("task_vector/a/delta", "fisher/a"):
        found = there_and_back({name: values.abs()}, Wire.BFLOAT16)[name]
        assert torch.equal(found, values.abs().bfloat16().float())


@pytest.mark.parametrize("wire", FEWER)
@pytest.mark.parametrize("kind", Kind)
def test_what_arrives_is_near_in_the_change_itself_whatever_the_kind(kind, wire):
    """Of (IA)³'s l = 1.001, what counts is the 0.001, which fewer bits of 1.001 would not hold."""
    vector = task_vector(kind, THETA_0, seed=1, scale=0.001)
    found = there_and_back(prefixed("task_vector", vector.tensors), wire)
    own = {name.removeprefix("task_vector/"): t for name, t in found.items()}
    received = TaskVector(kind, own, vector.base)
    received.check(THETA_0, base=vector.base, owner="client 'a'")
    error = relative_error(vector.dense(THETA_0), received.dense(THETA_0))
    assert 0 < error < 0.01


@pytest.mark.parametrize(("wire", "most"), [(Wire.BFLOAT16, 2.0), (Wire.INT8, 1 + 4 / BLOCK)])
def test_what_is_sent_is_as_small_as_promised(wire, most):
    tensors = {"fisher/a": heavy_tailed(64, 2 * BLOCK, seed=1)}
    coded = encode(tensors, wire)
    assert sum(t.numel() * t.element_size() for t in coded.values()) == most * 64 * 2 * BLOCK


@pytest.mark.parametrize("wire", FEWER)
def test_zeros_and_nothing_at_all_stay_what_they_are(wire):
    tensors = {
        "task_vector/a/A": torch.zeros(3, 5),
        "fisher/a": torch.zeros(2 * BLOCK + 1),
        "task_vector/b/delta": torch.zeros(0, 4),
    }
    found = there_and_back(tensors, wire)
    assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in tensors.items()}


@pytest.mark.parametrize("wire", FEWER)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_so_and_is_refused_as_ever(wire, bad):
    vector = task_vector(Kind.FULL, THETA_0, seed=1)
    tensors = {name: t.clone() for name, t in vector.tensors.items()}
    next(iter(tensors.values()))[2, 1] = bad
    found = there_and_back(prefixed("task_vector", tensors), wire)
    own = {name.removeprefix("task_vector/"): t for name, t in found.items()}
    with pytest.raises(ContributionError, match="not finite"):
        TaskVector(Kind.FULL, own, vector.base).check(THETA_0, base=vector.base, owner="a")


def test_the_relative_error_is_that_of_all_tensors_together():
    meant, arrived = random_like(THETA_0, seed=1), random_like(THETA_0, seed=9)
    x, y = (torch.cat([w[n].flatten().double() for n in THETA_0]) for w in (meant, arrived))
    assert relative_error(meant, arrived) == pytest.approx(float((x - y).norm() / x.norm()))
    zero = {"a": torch.zeros(2)}
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, {"a": torch.tensor([3.0, 4.0])}) == 5.0


# -- as messages --------------------------------------------------------------------------------


def received(tensors: Weights, wire: str) -> tuple[Weights, dict]:
    content = to_record(tensors, {"content": "train", "wire": wire})
    return from_record(content, expected="train", source="client 'a'")


@pytest.mark.parametrize("wire", FEWER)
def test_whoever_reads_a_message_sees_float32_and_nothing_of_the_wire(wire):
    tensors = prefixed("task_vector", task_vector(Kind.LORA, THETA_0, seed=1).tensors)
    found, manifest = received(encode(tensors, wire), str(wire))
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, torch.float32) for n, t in tensors.items()
    }
    assert "wire" not in manifest
    expected = there_and_back(tensors, wire)
    assert all(torch.equal(found[name], expected[name]) for name in tensors)


CODES = encode({"task_vector/a/delta": normal(2, BLOCK, seed=1)}, Wire.INT8)
SCALE = "scales/task_vector/a/delta"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({SCALE: None}, "are none, expected"),
        ({SCALE: torch.ones(3)}, r"are \(3,\) of torch.float32, expected \(2,\)"),
        ({SCALE: torch.ones(2).double()}, "float64"),
        ({"task_vector/a/delta": torch.ones(2, BLOCK)}, "came in torch.float32, expected torch.i"),
    ],
)
def test_codes_that_cannot_be_read_are_refused(change, complaint):
    tensors = {name: t for name, t in (CODES | change).items() if t is not None}
    with pytest.raises(FileFormatError, match=complaint):
        received(tensors, "int8")


@pytest.mark.parametrize("wire", ["int4", 8, None, ["int8"]])
def test_a_wire_that_nobody_knows_is_refused(wire):
    with pytest.raises(FileFormatError, match="expected one of float32, bfloat16, int8"):
        received({}, wire)


def test_plain_numbers_cannot_pass_as_bfloat16():
    with pytest.raises(FileFormatError, match=r"expected torch\.bfloat16"):
        received({"fisher/a": torch.ones(2)}, "bfloat16")
