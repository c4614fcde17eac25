"""Names of clients: what may become a folder, and what could be taken for another name."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedcompo.errors import ContributionError
from fedcompo.names import LONGEST, LONGEST_BYTES, check_client_name, check_distinct, resembles

ACCEPTED = [
    "client-0",
    "Hospital B",
    "klinik_süd.3",
    "a" * LONGEST,
    "1",
    "com10",
    "console.log",
    "Ward (3) [east]",
    "[b](c)",
    "Smith, J. & Co",
    "A+B #2 {x}",
    "_x_",
    "больница-7",
    "νοσοκομείο",
    "東京サーバー",
    "ひらがなとカタカナと漢字",
    "時々",
    "서울 2",
    "مستشفى",
    "𠀀" * 50,
]

REFUSED = {
    "expected 1 to 64": ["", "a" * 65, "a" * 300, "../" * 100],
    "204 bytes": ["𠀀" * 51],
    "holds": [
        "../x",
        "a/../../b",
        "/etc/passwd",
        "C:\\x",
        "a\\b",
        "a\0b",
        "a\nb",
        "a\tb",
        "\x7f",
        "a\u0085b",
        "a\u2028b",
        *(f"a{c}b" for c in "\"'`<>|:*?;$%!~^@="),
    ],
    "starts with": [".", "..", ".hidden", "-rf", " a", "#a", "+a", ",a", "&a", ")a", "]", "}a"],
    "ends with": ["a.", "a ", "a .", "a,"],
    "reserve": [
        "con",
        "CON",
        "Nul.txt",
        "aux.tar.gz",
        "prn .txt",
        "com1",
        "LPT9.log",
        "com¹",
        "lpt².x",
        "ＣＯＮ",
    ],
    "NFKC": ["e\u0301", "ﬁ", "ａ", "Ⅷ", "½", "a\u00a0b", "x²", "ﾊ", "\u212a"],
    r"holds '\\[uUx]": [
        "a\u200bb",  # zero-width space
        "a\u200db",  # zero-width joiner
        "a\u00adb",  # soft hyphen
        "\ufeffa",  # byte order mark
        "a\u202eb",  # right-to-left override
        "a\u2066b",  # left-to-right isolate
        "a\U000e0041",  # tag letter
        "\u1160",  # invisible Hangul filler
        "q\u0301",  # a mark without a composed form
        "client-١",  # Arabic digit one
        "client-१",  # Devanagari digit one
        "〇",  # ideographic zero
        "\ud800",
        "a\udcff",
        "\ue000",  # private use
        "😀",
    ],
    "mixes letters of": [
        "p\u0430ypal",
        "αlpha",
        "client-\u043e",
        "東京A",
        "서울東",
        "Ꭺb",
        "aʻ",
    ],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_plain_names_of_any_one_script_are_returned_as_they_are(name):
    assert check_client_name(name) == name


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault, names in REFUSED.items() for name in names]
)
def test_hostile_names_are_refused_and_the_fault_is_named(fault, name):
    with pytest.raises(ContributionError, match=fault) as caught:
        check_client_name(name)
    message = str(caught.value)
    message.encode()
    assert message.startswith(f"{name[:80]!r} cannot be a client's name: ")
    assert all(c.isprintable() for c in message)


def test_mixed_scripts_are_named_with_a_letter_of_each():
    with pytest.raises(ContributionError, match=r"CYRILLIC \('\\u0430'\) and LATIN \('p'\)"):
        check_client_name("p\u0430ypal")


@given(st.text(st.characters(exclude_categories=()), max_size=80))
def test_any_text_is_returned_or_refused_with_a_message_that_can_be_written(text):
    try:
        assert check_client_name(text) == text
    except ContributionError as error:
        str(error).encode()


letters = st.sampled_from(["abcXYZéß", "абвЖй", "αβΩ", "漢字ひらカタ", "ابجد", "서울"])
plausible = letters.flatmap(lambda script: st.text(script + "0189 -_.", min_size=1, max_size=70))


@given(st.one_of(plausible, st.text(st.characters(exclude_categories=()), max_size=10)))
def test_an_accepted_name_makes_exactly_one_folder_of_that_name(name):
    try:
        check_client_name(name)
    except ContributionError:
        assume(False)
    with tempfile.TemporaryDirectory() as top:
        registry = Path(top) / "registry"
        registry.mkdir()
        (registry / name).mkdir()
        assert [entry.name for entry in registry.iterdir()] == [name]
        assert [entry.name for entry in Path(top).iterdir()] == ["registry"]
        assert len(name.encode()) <= LONGEST_BYTES


ALIKE = [
    ("client-1", "client-l"),
    ("client-1", "client-I"),
    ("client-1", "client-i"),
    ("client-11", "client-ll"),
    ("Client-0", "client-0"),
    ("client-0", "client-O"),
    ("Straße", "STRASSE"),
    ("coco", "\u0441\u043e\u0441\u043e"),
    ("BMHKTPE", "\u0412\u041c\u041d\u041a\u0422\u0420\u0415"),
    ("NOTE", "\u039d\u039f\u03a4\u0395"),
    ("\u043e\u043a", "\u03bf\u03ba"),
    ("site", "s\u0131te"),
    ("SITE", "S\u0130TE"),
]
DIFFERENT = [
    ("client-1", "client-11"),
    ("client-1", "client-2"),
    ("client-10", "client-01"),
    ("client-1", "client1"),
    ("client-1", "client_1"),
    ("hospital-a", "hospital-b"),
    ("süd", "sud"),
    ("больница", "hospital"),
    ("東京", "京都"),
]


@pytest.mark.parametrize(("name", "known"), ALIKE + [(b, a) for a, b in ALIKE])
def test_a_name_that_could_be_taken_for_a_known_one_is_refused_and_the_known_one_named(name, known):
    with pytest.raises(ContributionError) as caught:
        check_distinct(name, ["zebra", known])
    assert f"mistaken for the client {known!r}" in str(caught.value)


@pytest.mark.parametrize(("name", "known"), DIFFERENT + [(b, a) for a, b in DIFFERENT])
def test_names_that_differ_visibly_are_distinct(name, known):
    assert check_distinct(name, iter([known])) == name


def test_a_name_that_is_known_already_is_not_mistaken_for_itself():
    assert check_distinct("client-1", ["client-1", "client-2"]) == "client-1"


def test_of_several_look_alikes_the_first_by_name_is_named():
    for known in (["client-l", "client-I"], ["client-I", "client-l"]):
        with pytest.raises(ContributionError, match="the client 'client-I'"):
            check_distinct("client-1", known)


@given(plausible)
def test_names_that_a_case_insensitive_file_system_takes_for_one_resemble_each_other(name):
    for variant in (name.upper(), name.lower(), name.swapcase(), name.title(), name.casefold()):
        assert resembles(variant) == resembles(name)


@given(st.text(max_size=20))
def test_a_skeleton_is_its_own_skeleton(text):
    assert resembles(resembles(text)) == resembles(text)
