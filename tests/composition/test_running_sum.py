"""The sum of clients' last task vectors, whatever came and went before, against sums taken anew."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from builders import MIXABLE, dense_by_hand, pico_weights, running_sum_of, task_vector
from hypothesis import given
from hypothesis import strategies as st

from fedcompo.composition import fixed_point
from fedcompo.composition.running_sum import RunningSum
from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage.tensorstream import Section, StreamedTensors, save_streamed

THETA_0 = pico_weights(dtype=torch.float32)
CLIENTS = ("ann", "ben", "eve")
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(CLIENTS),
        st.sampled_from([*MIXABLE, None]),  # None: it leaves
        st.integers(0, 99),
        st.integers(1, 500),
    ),
    min_size=1,
    max_size=12,
)


def assert_same(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def after(operations: list[tuple[str, Kind | None, int, int]]) -> RunningSum:
    running = RunningSum(THETA_0)
    for client, kind, seed, times in operations:
        if kind is not None:
            running.put(client, task_vector(kind, THETA_0, seed=seed), times=times)
        elif client in running.clients:
            running.drop(client)
    return running


def last_of(operations: list[tuple[str, Kind | None, int, int]]) -> dict:
    """Oracle: what each client did last, if it was not to leave."""
    last = {client: (kind, seed, times) for client, kind, seed, times in operations}
    return {client: done for client, done in last.items() if done[0] is not None}


@given(OPERATIONS)
def test_after_any_history_the_sum_is_that_of_the_last_task_vectors_bit_for_bit(operations):
    running, last = after(operations), last_of(operations)
    assert running.clients == tuple(sorted(last))
    assert running.times == {client: times for client, (_, _, times) in last.items()}
    vectors = {c: task_vector(kind, THETA_0, seed=seed) for c, (kind, seed, _) in last.items()}
    assert_same(running.total, running_sum_of(THETA_0, vectors, running.times).total)
    assert all(total.dtype == torch.int64 for total in running.total.values())


@given(OPERATIONS, st.sampled_from([*CLIENTS, "new"]), st.integers(1, 99))
def test_what_a_client_sees_is_the_mean_over_the_others_with_the_share_of_those_to_come(
    operations, client, to_come
):
    running, last = after(operations), last_of(operations)
    together = sum(times for _, _, times in last.values()) + to_come
    others = {c: done for c, done in last.items() if c != client}
    dense = {
        c: dense_by_hand(task_vector(kind, THETA_0, seed=seed), THETA_0)
        for c, (kind, seed, _) in others.items()
    }
    rest = running.rest(client, together=together)
    for name, weight in THETA_0.items():
        expected = torch.zeros(weight.shape, dtype=torch.float64)
        for c, (_, _, times) in others.items():
            expected += times / together * dense[c][name]
        assert rest[name].dtype == torch.float32
        torch.testing.assert_close(rest[name], expected.float(), rtol=1e-6, atol=1e-8)


def test_of_dense_task_vectors_it_is_the_fraction_rounded_once_to_float32():
    vectors = {c: task_vector(Kind.FULL, THETA_0, seed=i) for i, c in enumerate(CLIENTS)}
    times = dict(zip(CLIENTS, (3, 5, 7), strict=True))
    rest = running_sum_of(THETA_0, vectors, times).rest("ben", together=16)
    for name in THETA_0:
        entries = [vectors[c].tensors[f"{name}/delta"].flatten().tolist() for c in ("ann", "eve")]
        for ann, eve, found in zip(*entries, rest[name].flatten().tolist(), strict=True):
            grid = [round(Fraction(value) * 2**40) for value in (ann, eve)]
            exact = Fraction(3 * grid[0] + 7 * grid[1], 16 * 2**40)
            assert torch.tensor(float(exact)).item() == found


def test_nobody_is_seen_as_zeros():
    alone = running_sum_of(THETA_0, {"ann": task_vector(Kind.LORA, THETA_0, seed=1)}, {"ann": 4})
    for running in (RunningSum(THETA_0), alone):
        rest = running.rest("ann", together=4)
        assert all(torch.equal(rest[n], torch.zeros_like(w)) for n, w in THETA_0.items())


def diverged() -> TaskVector:
    """The last weight, in the order of names, holds a value that is beyond the grid."""
    vector = task_vector(Kind.FULL, THETA_0, seed=1)
    vector.tensors[f"{max(THETA_0)}/delta"][0, 0] = 2 * fixed_point.LARGEST
    return vector


@pytest.mark.parametrize("client", ["ann", "new"])
def test_a_task_vector_that_cannot_be_summed_leaves_everything_as_it_was(client):
    vectors = {"ann": task_vector(Kind.LORA, THETA_0, seed=5)}
    running = running_sum_of(THETA_0, vectors, {"ann": 2})
    total = dict(running.total)
    with pytest.raises(ContributionError, match=rf"client '{client}' .* at most"):
        running.put(client, diverged(), times=3)
    assert_same(running.total, total)
    assert running.vectors == vectors
    assert running.times == {"ann": 2}
    running.drop("ann")
    assert_same(running.total, RunningSum(THETA_0).total)


def test_nor_does_one_that_counts_so_often_that_the_sum_would_overflow():
    running = RunningSum(THETA_0)
    with pytest.raises(ContributionError, match="coefficients = uniform"):
        running.put("ann", task_vector(Kind.FULL, THETA_0, seed=1), times=2**24)
    assert_same(running.total, RunningSum(THETA_0).total)
    assert running.clients == ()


def test_who_is_not_there_cannot_be_taken_out():
    running = running_sum_of(THETA_0, {"ann": task_vector(Kind.IA3, THETA_0, seed=1)}, {"ann": 1})
    with pytest.raises(ContributionError, match=r"no task vector of 'ben' .* holds ann"):
        running.drop("ben")
    running.drop("ann")
    with pytest.raises(ContributionError, match="holds nobody"):
        running.drop("ann")


def test_task_vectors_are_read_from_where_they_lie_at_the_time(tmp_path):
    first, second = (task_vector(kind, THETA_0, seed=5) for kind in (Kind.LORA, Kind.FULL))
    running, path = RunningSum(THETA_0), tmp_path / "own.safetensors"
    save_streamed(path, {f"task_vector/{n}": t for n, t in first.tensors.items()}, {})
    stored = Section(StreamedTensors(path), "task_vector")
    running.put("ann", TaskVector(Kind.LORA, stored, first.base), times=2)
    running.put("ann", second, times=1)
    assert_same(running.total, running_sum_of(THETA_0, {"ann": second}, {"ann": 1}).total)


def test_it_goes_on_from_a_sum_that_is_given():
    members = {c: task_vector(Kind.LORA, THETA_0, seed=i) for i, c in enumerate(CLIENTS)}
    times = dict.fromkeys(CLIENTS, 2)
    given_sum = running_sum_of(THETA_0, members, times).total
    own = {"ben": members["ben"]}
    rest = RunningSum(THETA_0, own, {"ben": 2}, given_sum).rest("ben", together=6)
    assert_same(rest, running_sum_of(THETA_0, members, times).rest("ben", together=6))
