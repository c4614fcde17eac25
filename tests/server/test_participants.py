"""Who takes part in a run, as a value that is replaced."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
from registry_builders import one_of_each_kind, registry_of

from fedcompo.composition.head import joint_head
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind, Statistics
from fedcompo.messages.answers import DescribeAnswer
from server.phases.fitting import Fitting
from server.phases.participants import Participants


def described(*clients: str, **insisting: Kind) -> Participants:
    about = {
        client: DescribeAnswer(
            client=client,
            base="",
            classes=("cat", "dog"),
            num_test_examples=5,
            statistics={},
            kind=insisting.get(client),
        )
        for client in clients
    }
    return Participants(names=frozenset(clients), described=about)


def test_nobody_writes_participants_from_outside():
    with pytest.raises(FrozenInstanceError):
        Participants().members = ("ann",)


def test_newcomers_are_connected_no_members_and_asked():
    connected = ("ann", "ben", "eve")
    assert Participants(members=("ann",)).newcomers(connected) == ("ben", "eve")
    assert Participants(members=("ann",), asked=("eve",)).newcomers(connected) == ("eve",)


def test_kinds_are_dealt_in_turn_once_and_who_insists_on_one_gets_it():
    kinds = (Kind.LORA, Kind.FULL)
    first = described("ann", "ben", "eve", eve=Kind.IA3).with_kinds(kinds)
    assert dict(first.kinds) == {"ann": Kind.LORA, "ben": Kind.FULL, "eve": Kind.IA3}
    assert dict(first.with_kinds((Kind.IA3,)).kinds) == dict(first.kinds)


def test_who_is_forgotten_is_neither_described_nor_absent_but_keeps_its_name():
    who = Participants(
        names=frozenset({"ann", "ben"}),
        described=described("ann", "ben").described,
        absent=frozenset({"ben"}),
    )
    left = who.without(["ben"])
    assert (set(left.described), left.absent, left.names) == ({"ann"}, set(), {"ann", "ben"})
    assert set(who.described) == {"ann", "ben"}


@pytest.mark.parametrize("kind", Statistics)
def test_statistics_of_members_leave_out_who_is_trained_again(kind, tmp_path):
    registry = registry_of(
        tmp_path / "registry",
        *one_of_each_kind(kind),
        settings=CompositionSettings(statistics=kind),
    )
    fitting = SimpleNamespace(registry=registry, settings=registry.settings)
    found = Fitting._statistics_of(fitting, {"ada", "cho"})
    own = {client: registry.contribution(client).statistics for client in ("ada", "cho")}
    head, expected = (joint_head(given, registry.settings) for given in (found, own))
    assert head.classes == expected.classes
    assert torch.equal(head.weight, expected.weight) and torch.equal(head.bias, expected.bias)
    assert Fitting._statistics_of(fitting, set()) == {}
