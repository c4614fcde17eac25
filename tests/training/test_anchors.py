"""Whose Fisher anchors whom, against means taken by hand."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from builders import normal
from torch import Tensor

from fedcompo.config.choices import AnchorBy
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.training.anchors import FisherSums

CLIENTS = ("ann", "ben", "eve")
NOBODYS = FisherDiagonal({"a": normal(3, 2, seed=90).square()}, 7)


def fisher_of(client: str) -> FisherDiagonal:
    seed = 10 * CLIENTS.index(client)
    return FisherDiagonal({"a": normal(3, 2, seed=seed).square()}, 4 + seed)


def anchors(by: AnchorBy, members: tuple[str, ...] = CLIENTS) -> FisherSums:
    return FisherSums(members, fisher_of, by=by, reference=NOBODYS)


def mean_by_hand(anchoring: tuple[str, ...]) -> Tensor:
    """Oracle: every entry a sum over the anchoring clients, over all their examples."""
    fishers = [fisher_of(client) for client in anchoring]
    return sum(f.sums["a"] for f in fishers) / sum(f.num_examples for f in fishers)


def assert_mean(found: dict[str, Tensor] | None, expected: Tensor) -> None:
    assert found is not None
    assert found.keys() == {"a"}
    torch.testing.assert_close(found["a"], expected.float())


@pytest.mark.parametrize("client", CLIENTS)
def test_the_others_anchor_a_client_by_their_mean_over_examples(client):
    others = tuple(name for name in CLIENTS if name != client)
    given = anchors(AnchorBy.OTHERS)
    assert_mean(given.mean_for(client), mean_by_hand(others))
    assert given.others(client) == others


@pytest.mark.parametrize("client", CLIENTS)
def test_its_own_fisher_anchors_a_client_by_its_mean(client):
    given = anchors(AnchorBy.OWN)
    assert_mean(given.mean_for(client), mean_by_hand((client,)))
    assert given.others(client) == ()


def test_a_reference_anchors_everyone_alike():
    given = anchors(AnchorBy.REFERENCE)
    for client in CLIENTS:
        assert_mean(given.mean_for(client), NOBODYS.sums["a"] / 7)
        assert given.others(client) == ()


@pytest.mark.parametrize("dense", [(), ("ben",)], ids=["all factored", "one dense"])
def test_margins_anchor_as_margins_of_the_others_sum(dense):
    def load(client: str) -> FisherDiagonal:
        return fisher_of(client) if client in dense else fisher_of(client).reduced()

    found = FisherSums(CLIENTS, load, by=AnchorBy.OTHERS).mean_for("ann")
    expected = mean_by_hand(("ben", "eve"))
    assert found is not None
    assert found.keys() == {"a/rows", "a/columns"}
    torch.testing.assert_close(found["a/rows"], expected.sum(1).float())
    torch.testing.assert_close(found["a/columns"], expected.sum(0).float())


def test_who_is_alone_is_anchored_by_nobody_else():
    assert anchors(AnchorBy.OTHERS, ("ann",)).mean_for("ann") is None
    assert anchors(AnchorBy.OWN, ("ann",)).mean_for("ann") is not None


@pytest.mark.parametrize(("times", "noted"), [(1.0, False), (9.0, False), (11.0, True)])
def test_a_reference_on_another_scale_than_the_clients_is_noted(times, noted):
    clients = anchors(AnchorBy.OTHERS).total
    mean = clients.sums["a"].sum() / clients.num_examples
    for factor in (times, 1 / times):
        sums = {"a": torch.full((1, 1), 3.0, dtype=torch.float64) * mean * factor}
        reference = FisherDiagonal(sums, 3)
        given = FisherSums(CLIENTS, fisher_of, by=AnchorBy.REFERENCE, reference=reference)
        note = given.note(alpha=30.0)
        assert bool(note) == noted
        assert not note or f"set `alpha` to {30 / factor:.3g}." in note
        assert given.note(alpha=0.0) == ""
    assert FisherSums(CLIENTS, fisher_of, by=AnchorBy.OWN).note(alpha=30.0) == ""


def test_the_note_names_the_setting_that_acts_on_the_reference():
    reference = FisherDiagonal({"a": torch.full((1, 1), 1e6, dtype=torch.float64)}, 3)
    given = FisherSums(CLIENTS, fisher_of, by=AnchorBy.REFERENCE, reference=reference)
    note = given.note(alpha=7.0, setting="beta")
    assert note.startswith("`beta` 7 acts on")
    assert "set `beta` to" in note
    assert "alpha" not in note


def test_where_the_client_is_to_be_counted_too_all_anchor_it_also_if_it_is_alone():
    """In IEL; an anchor that is not of others stays what it is."""
    assert_mean(anchors(AnchorBy.OTHERS).mean_for("ben", with_own=True), mean_by_hand(CLIENTS))
    alone = anchors(AnchorBy.OTHERS, ("ann",)).mean_for("ann", with_own=True)
    assert_mean(alone, mean_by_hand(("ann",)))
    own = anchors(AnchorBy.OWN).mean_for("ben", with_own=True)
    assert_mean(own, mean_by_hand(("ben",)))


def test_no_bit_of_the_sum_depends_on_the_order_of_members():
    first = anchors(AnchorBy.OTHERS).total
    for order in permutations(CLIENTS):
        total = anchors(AnchorBy.OTHERS, order).total
        assert all(torch.equal(total.sums[name], first.sums[name]) for name in first.sums)


@pytest.mark.parametrize("with_own", [False, True])
@pytest.mark.parametrize("by", AnchorBy)
def test_a_mean_of_too_few_others_anchors_nobody(by, with_own):
    sums = {
        fewest: FisherSums(CLIENTS, fisher_of, by=by, reference=NOBODYS, fewest=fewest)
        for fewest in (2, 3)
    }
    means = {n: own.mean_for("ann", with_own=with_own) for n, own in sums.items()}
    assert_mean(means[2], anchors(by).mean_for("ann", with_own=with_own)["a"])
    assert (means[3] is None) == (by is AnchorBy.OTHERS)
    assert bool(sums[2].others("ann")) == (by is AnchorBy.OTHERS)
    assert not sums[3].others("ann")


def test_shards_of_one_client_do_not_anchor_each_other_and_count_once():
    shards = ("ann.shard-0", "ann.shard-1", "ben", "eve")
    named = dict(zip(shards, ("ann", "ben", "eve", "ann"), strict=True))

    def given(fewest: int) -> FisherSums:
        load = lambda member: fisher_of(named[member])  # noqa: E731
        return FisherSums(shards, load, by=AnchorBy.OTHERS, fewest=fewest)

    assert given(2).others("ann.shard-0") == ("ben", "eve")
    assert_mean(given(2).mean_for("ann.shard-0"), mean_by_hand(("eve", "ann")))
    assert given(2).others("ben") == (*shards[:2], "eve")
    assert given(3).others("ben") == ()  # three members, of two clients
