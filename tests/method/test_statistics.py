"""Feature statistics: what they sum, that they add up exactly, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import normal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcompo.errors import ContributionError, DataError
from fedcompo.method.statistics import (
    BITS,
    CEILING,
    FeatureSums,
    off_grid,
    packed,
    to_grid,
    total_of,
    unpacked,
)

CLASSES = ("cat", "dog", "emu", "owl")
WIDTH = 3
images = st.lists(st.sampled_from(range(len(CLASSES))), min_size=1, max_size=12)
clients = st.lists(st.tuples(images, st.integers(0, 2**20)), min_size=1, max_size=5)


def sums_of(owners: list[int], seed: int) -> FeatureSums:
    """Of one client: an image for each entry, which is its class."""
    classes = sorted({CLASSES[owner] for owner in owners})
    labels = torch.tensor([classes.index(CLASSES[owner]) for owner in owners])
    return FeatureSums.of(normal(len(owners), WIDTH, seed=seed, scale=20), labels, classes)


def same(one: FeatureSums, other: FeatureSums) -> bool:
    parts = ("counts", "sums", "second")
    return one.classes == other.classes and all(
        torch.equal(getattr(one, part), getattr(other, part)) for part in parts
    )


def test_they_are_sums_over_images_one_at_a_time():
    features, labels = normal(7, WIDTH, seed=1, scale=5), torch.tensor([0, 1, 1, 2, 0, 2, 2])
    found = FeatureSums.of(features, labels, CLASSES[:3])
    counts = [0, 0, 0]
    sums = torch.zeros(3, WIDTH, dtype=torch.float64)
    second = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for f, label in zip(features, labels.tolist(), strict=True):
        counts[label] += 1
        sums[label] += f
        second += torch.outer(f, f)
    assert found.counts.tolist() == counts
    assert (found.num_examples, found.num_features) == (7, WIDTH)
    torch.testing.assert_close(off_grid(found.sums), sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(unpacked(off_grid(found.second)), second, rtol=1e-6, atol=1e-6)
    covariance = torch.cov(features.T, correction=0)
    assert found.variance == pytest.approx(float(covariance.trace()), rel=1e-5)


@given(clients, st.randoms(use_true_random=False))
def test_no_bit_depends_on_the_order_and_who_leaves_leaves_no_trace(given_clients, random):
    members = [sums_of(*client) for client in given_clients]
    order = members.copy()
    random.shuffle(order)
    total = total_of(members)
    assert same(total_of(order), total)
    assert total.classes == tuple(sorted({name for m in members for name in m.classes}))
    if members[1:]:
        assert same(total - members[0], total_of(members[1:]))
    assert (total - total).classes == ()


@given(clients)
def test_they_travel_without_loss(given_clients):
    for client in given_clients:
        own = sums_of(*client)
        tensors = own.tensors()
        assert tensors["statistics/sums"].dtype == torch.float32
        assert same(FeatureSums.from_tensors(tensors, own.classes), own)


@given(st.integers(1, 9), st.integers(0, 2**20))
def test_the_upper_triangle_is_a_whole_symmetric_matrix(size, seed):
    matrix = normal(size, size, seed=seed)
    matrix = matrix + matrix.T
    assert len(packed(matrix)) == size * (size + 1) // 2
    assert torch.equal(unpacked(packed(matrix)), matrix)


def test_numbers_of_single_precision_above_the_grid_are_on_it():
    values = normal(50, seed=1).float().abs() + 1.0
    assert torch.equal(off_grid(to_grid(values)), values.double())
    between = torch.tensor([2.6 * 2.0**-BITS])
    assert to_grid(between).tolist() == [3]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 2.0**34, -(2.0**40)])
def test_numbers_that_cannot_be_summed_are_refused(value):
    with pytest.raises(ContributionError, match="expected numbers below"):
        to_grid(torch.tensor([1.0, value]))


def test_a_sum_that_leaves_the_range_of_int64_is_refused():
    large = torch.full((1, 1), CEILING - 1, dtype=torch.int64)
    one = FeatureSums(("cat",), torch.tensor([1]), large, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ContributionError, match="range of int64"):
        one + one


def test_no_client_alone_leaves_no_room_for_others():
    largest = torch.full((1, 1), 2.0**34 * (1 - 2.0**-24))
    hostile = FeatureSums.read(("cat",), torch.tensor([1]), largest, torch.full((1,), 0.0))
    total = hostile
    for _ in range(14):
        total += hostile
    assert same(total - hostile + hostile, total)


def test_who_leaves_is_let_go_whatever_is_left():
    large = torch.full((1, 1), CEILING - 1, dtype=torch.int64)
    none = torch.zeros(1, dtype=torch.int64)
    total = FeatureSums(("cat",), torch.tensor([2]), large, none)
    leaving = FeatureSums(("cat",), torch.tensor([1]), -large, none)
    assert torch.equal((total - leaving).sums, 2 * large)


def test_a_class_without_an_image_is_refused():
    with pytest.raises(DataError, match="Class 'dog' has no image"):
        FeatureSums.of(torch.ones(2, WIDTH), torch.tensor([0, 2]), CLASSES[:3])


def test_only_images_that_were_summed_can_be_taken_out():
    one, more, other = sums_of([0], 1), sums_of([0, 0], 2), sums_of([1], 3)
    with pytest.raises(ContributionError, match="more images of a class"):
        one - more
    with pytest.raises(ContributionError, match="images of 'dog' out of"):
        one - other


def test_features_of_another_width_are_refused():
    other = FeatureSums.of(torch.ones(1, WIDTH + 1), torch.tensor([0]), ("cat",))
    with pytest.raises(ContributionError, match="widths 3 and 4"):
        sums_of([0], 1) + other


def with_counts(sums: FeatureSums, counts: list[int]) -> FeatureSums:
    return FeatureSums(sums.classes, torch.tensor(counts), sums.sums, sums.second)


def cut(sums: FeatureSums, part: Tensor) -> FeatureSums:
    return FeatureSums(sums.classes, sums.counts, part, sums.second)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s, ""),
        (lambda s: with_counts(s, [1, 0]), "count \\[1, 0\\] … images"),
        (lambda s: with_counts(s, [1, 2**40]), "at most 2"),
        (lambda s: with_counts(s, [1]), "with shapes"),
        (lambda s: cut(s, s.sums[:1]), "with shapes"),
        (lambda s: sums_of([0, 2], 1), "are of the classes"),
    ],
)
def test_statistics_that_are_not_the_clients_are_refused(change, complaint):
    sums = change(sums_of([0, 1, 1], 1))
    if not complaint:
        sums.check(("cat", "dog"), WIDTH, "client 'a'")
        return
    with pytest.raises(ContributionError, match=f"The statistics of client 'a'.*{complaint}"):
        sums.check(("cat", "dog"), WIDTH, "client 'a'")


def test_all_clients_together_may_have_more_images_than_one():
    sums = with_counts(sums_of([0, 1, 1], 1), [2**31 + 5, 2])
    sums.check(("cat", "dog"), WIDTH, "all members", clients=2)
    with pytest.raises(ContributionError, match="at most 2"):
        sums.check(("cat", "dog"), WIDTH, "client 'a'")


@given(
    images,
    st.integers(0, 2**20),
    st.sampled_from([1e-9, 1.0, 100.0]),
    st.sampled_from([0.0, 100.0]),
)
def test_a_scatter_of_images_is_never_refused_whatever_is_rounded(owners, seed, scale, shift):
    classes = sorted({CLASSES[owner] for owner in owners})
    labels = torch.tensor([classes.index(CLASSES[owner]) for owner in owners])
    features = scale * (normal(len(owners), 40, seed=seed) + shift)
    FeatureSums.of(features.float(), labels, classes).check_scatter("client 'a'")


def test_a_scatter_of_no_images_is_refused():
    sums = FeatureSums.of(normal(30, 4, seed=1) + 2, torch.arange(30) % 2, CLASSES[:2])
    axis = torch.eye(4, dtype=torch.float64)[1]
    lost = 1.01 * float(sums.scatter[1, 1]) * torch.outer(axis, axis)
    false = replace(sums, second=sums.second - to_grid(packed(lost)))
    with pytest.raises(ContributionError, match="client 'a' are of no images: within classes"):
        false.check_scatter("client 'a'")
    with pytest.raises(ContributionError, match="of no images"):
        replace(sums, second=-sums.second).check_scatter("client 'a'")
