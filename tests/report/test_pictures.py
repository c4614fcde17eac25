"""Notes on clients' pictures: which clients, how many, and what to do."""

from __future__ import annotations

import pytest

from fedcompo.report.pictures import ODD, REPEATED, notes_on
from fedcompo.report.twins import SHOWN


def test_test_images_seen_in_training_are_noted_by_client():
    (note,) = notes_on({"north": {REPEATED: 3}, "south": {}, "west": {REPEATED: 12}})
    assert "at north (3), west (12): the accuracies of these clients are too high" in note


@pytest.mark.parametrize("fact", ODD)
def test_every_decision_on_odd_images_is_noted_with_their_number(fact: str):
    notes = list(notes_on({"north": {fact: 3}, "south": {}, "west": {fact: 1, "else": 9}}))
    assert notes == [f"Images that {fact}; at north (3), west (1)."]


def test_ranges_are_noted_and_whether_clients_differ_in_one_kind():
    same, other = {"16-bit integers": 4095}, {"16-bit integers": 1023, "32-bit integers": 255}
    alike = list(notes_on({"north": same, "south": same, "west": {"32-bit integers": 255}}))
    assert alike == [
        "Pixels of 16-bit integers become 8 bits by the range that the pictures use: north "
        "0..4095, south 0..4095.",
        "Pixels of 32-bit integers become 8 bits by the range that the pictures use: west 0..255.",
    ]
    note, _ = notes_on({"north": same, "south": other, "west": {}})
    assert "16-bit integers" in note
    assert "differ: north 0..4095, south 0..1023." in note


def test_notes_stay_short_whatever_clients_send():
    facts = {f"client-{i}": {REPEATED: i + 1, "16-bit integers": i, "else": 7} for i in range(50)}
    repeated, ranges = notes_on(facts)
    assert repeated.count("client-") == ranges.count("client-") == SHOWN
    assert "45 more" in repeated
