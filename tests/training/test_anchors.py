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

OWNED = {"ann": ("cat", "dog"), "ben": ("dog", "emu"), "eve": ("owl", "cat")}
"""Classes of each client's head."""
NOBODYS = FisherDiagonal(
    {
        "a": normal(3, 2, seed=90).square(),
        "head.weight": torch.zeros(0, 2),
        "head.bias": torch.zeros(0),
    },
    7,
)


def fisher_of(client: str) -> FisherDiagonal:
    seed = 10 * sorted(OWNED).index(client)
    sums = {
        "a": normal(3, 2, seed=seed).square(),
        "head.weight": normal(2, 2, seed=seed + 1).square(),
        "head.bias": normal(2, seed=seed + 2).square(),
    }
    return FisherDiagonal(sums, 4 + seed, OWNED[client])


def anchors(by: AnchorBy, members: tuple[str, ...] = tuple(OWNED)) -> FisherSums:
    return FisherSums.of(members, fisher_of, by=by, reference=NOBODYS)


def mean_by_hand(anchoring: tuple[str, ...], classes: tuple[str, ...]) -> dict[str, Tensor]:
    """Oracle: every entry a sum over the anchoring clients, over all their examples."""
    fishers = [fisher_of(client) for client in anchoring]
    count = sum(fisher.num_examples for fisher in fishers)

    def row(name: str, entry: str) -> Tensor:
        rows = [f.sums[entry][f.classes.index(name)] for f in fishers if name in f.classes]
        return sum(rows, torch.zeros(fishers[0].sums[entry].shape[1:], dtype=torch.float64)) / count

    return {
        "a": sum(fisher.sums["a"] for fisher in fishers) / count,
        "head.weight": torch.stack([row(name, "head.weight") for name in classes]),
        "head.bias": torch.stack([row(name, "head.bias") for name in classes]),
    }


def assert_mean(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float())


@pytest.mark.parametrize("client", OWNED)
def test_the_others_anchor_a_client_by_their_mean_over_examples(client):
    others = tuple(name for name in OWNED if name != client)
    given = anchors(AnchorBy.OTHERS)
    assert_mean(given.mean_for(client, OWNED[client]), mean_by_hand(others, OWNED[client]))
    assert given.others(client) == others


@pytest.mark.parametrize("client", OWNED)
def test_its_own_fisher_anchors_a_client_by_its_mean(client):
    given = anchors(AnchorBy.OWN)
    assert_mean(given.mean_for(client, OWNED[client]), mean_by_hand((client,), OWNED[client]))
    assert given.others(client) == ()


def test_a_reference_anchors_everyone_alike_and_no_head():
    given = anchors(AnchorBy.REFERENCE)
    for client, classes in OWNED.items():
        mean = given.mean_for(client, classes)
        assert torch.equal(mean["a"], (NOBODYS.sums["a"] / 7).float())
        assert mean["head.weight"].shape == (2, 2)
        assert not mean["head.weight"].any()
        assert not mean["head.bias"].any()
        assert given.others(client) == ()


def test_who_is_alone_is_anchored_by_nobody_else():
    assert anchors(AnchorBy.OTHERS, ("ann",)).mean_for("ann", OWNED["ann"]) is None
    assert anchors(AnchorBy.OWN, ("ann",)).mean_for("ann", OWNED["ann"]) is not None


@pytest.mark.parametrize(("times", "noted"), [(1.0, False), (9.0, False), (11.0, True)])
def test_a_reference_on_another_scale_than_the_clients_is_noted(times, noted):
    clients = anchors(AnchorBy.OTHERS).total
    mean = clients.sums["a"].sum() / clients.num_examples
    for factor in (times, 1 / times):
        sums = {"a": torch.full((1,), 3.0, dtype=torch.float64) * mean * factor}
        reference = FisherDiagonal(sums, 3)
        given = FisherSums.of(OWNED, fisher_of, by=AnchorBy.REFERENCE, reference=reference)
        note = given.note(alpha=30.0)
        assert bool(note) == noted
        assert not note or f"set `alpha` to {30 / factor:.3g}." in note
        assert given.note(alpha=0.0) == ""
    assert FisherSums.of(OWNED, fisher_of, by=AnchorBy.OWN).note(alpha=30.0) == ""


def test_the_note_names_the_setting_that_acts_on_the_reference():
    reference = FisherDiagonal({"a": torch.full((1,), 1e6, dtype=torch.float64)}, 3)
    given = FisherSums.of(OWNED, fisher_of, by=AnchorBy.REFERENCE, reference=reference)
    note = given.note(alpha=7.0, setting="beta")
    assert note.startswith("`beta` 7 acts on")
    assert "set `beta` to" in note
    assert "alpha" not in note


def test_where_the_client_is_to_be_counted_too_all_anchor_it_also_if_it_is_alone():
    """In IEL; an anchor that is not of others stays what it is."""
    given = anchors(AnchorBy.OTHERS)
    found = given.mean_for("ben", OWNED["ben"], with_own=True)
    assert_mean(found, mean_by_hand(tuple(OWNED), OWNED["ben"]))
    alone = anchors(AnchorBy.OTHERS, ("ann",)).mean_for("ann", OWNED["ann"], with_own=True)
    assert_mean(alone, mean_by_hand(("ann",), OWNED["ann"]))
    own = anchors(AnchorBy.OWN).mean_for("ben", OWNED["ben"], with_own=True)
    assert_mean(own, mean_by_hand(("ben",), OWNED["ben"]))


def test_no_bit_of_the_sum_depends_on_the_order_of_members():
    first = anchors(AnchorBy.OTHERS).total
    assert first.classes == ("cat", "dog", "emu", "owl")
    for order in permutations(OWNED):
        total = anchors(AnchorBy.OTHERS, order).total
        assert all(torch.equal(total.sums[name], first.sums[name]) for name in first.sums)
