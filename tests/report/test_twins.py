"""Classes that may be one: which spellings are found, and how a reader sees the difference."""

from __future__ import annotations

import unicodedata

import pytest

from fedcompo.report.twins import SHOWN, key, note_on, twins, visible

CAFE = "Café 1"
SPELLINGS = {
    "CAFÉ 1": "'CAFÉ 1'",
    "Café1": "'Café1'",
    " Café 1": "' Café 1'",
    "Café 1 ": "'Café 1 '",
    "Café\u00a01": "'Café⟨U+00A0⟩1'",
    "Café\t1\n": "'Café⟨U+0009⟩1⟨U+000A⟩'",
    "Ca\u200bfé 1": "'Ca⟨U+200B⟩fé 1'",
    "Ca\u00adfé 1\ufeff": "'Ca⟨U+00AD⟩fé 1⟨U+FEFF⟩'",
    "Café 1\ufe0f": "'Café 1⟨U+FE0F⟩'",
    "Café 1\u3164": "'Café 1⟨U+3164⟩'",
    unicodedata.normalize("NFD", CAFE): "'Cafe⟨U+0301⟩ 1'",
    "Cafe\u200b\u0301 1": "'Cafe⟨U+200B⟩⟨U+0301⟩ 1'",
    "Café \uff11": "'Café ⟨U+FF11⟩'",
}
"""Other spellings of the same name, and what is shown of each."""


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_is_a_twin_and_the_difference_is_visible(spelling: str):
    assert twins({"a": [CAFE], "b": [spelling]}) == [
        dict(sorted({CAFE: ["a"], spelling: ["b"]}.items()))
    ]
    assert visible(spelling) == SPELLINGS[spelling] != visible(CAFE) == f"'{CAFE}'"


@pytest.mark.parametrize("other", ["Cafe 1", "Café 2", "Café-1", "Café 1\ue000", ""])
def test_names_that_differ_visibly_are_no_twins(other: str):
    assert twins({"a": [CAFE, other]}) == []


@pytest.mark.parametrize("name", ["日本", "हिन्दी", "naïve", "it's", "a_b (c)"])
def test_ordinary_names_are_shown_as_they_are(name: str):
    assert visible(name) == f"'{name}'"


def test_a_key_folds_what_case_folding_composes_anew():
    assert key("STRASSE") == key("straße") == key("Stra\u00adße")
    assert key(key("ﬁne ÅNGSTRÖM")) == key("fine ångström")


def test_twins_name_all_clients_of_each_spelling_also_within_one_client():
    owned = {"south": ["three", "nine"], "north": ["Three", "three"], "west": ["nine", "Three"]}
    assert twins(owned) == [{"Three": ["north", "west"], "three": ["north", "south"]}]
    assert "'Three' (north, west), 'three' (north, south)." in note_on(twins(owned))
    assert note_on(twins({"a": ["x"], "b": ["x"]})) == ""


def test_a_note_stays_short_whatever_clients_send():
    spellings = [f"x{' ' * blanks}{n}" for n in range(50) for blanks in range(50)]
    note = note_on(twins({f"client-{i}": spellings for i in range(50)}))
    assert "(client-0, client-1, client-10, client-11, client-12, and 45 more)" in note
    assert note.count("; and 45 more") == 1
    assert note.count("(client-0") == SHOWN**2
