"""The chain of lines: nothing can be changed, dropped, added or moved without being noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry_builders import overwrite

from fedcompo.errors import RegistryDamaged
from fedcompo.registry import journal
from fedcompo.registry.journal import START, Entry

EVENTS = [
    ("created", {"identity": "1f"}),
    ("added", {"clients": [{"client": "Größe\nII", "num_examples": 3}]}),
    ("removed", {"client": "ada", "record": "removals/000003-ada.json"}),
]


def written(path: Path, entries: Sequence[Entry]) -> Path:
    path.write_text("".join(f"{entry.line}\n" for entry in entries))
    return path


@pytest.fixture
def path(tmp_path):
    return written(tmp_path / "journal.jsonl", journal.follow(None, EVENTS))


def test_what_was_written_is_read(path):
    entries = journal.read(path)
    assert [(entry.event, entry.details) for entry in entries] == EVENTS
    assert [entry.sequence for entry in entries] == [1, 2, 3]


def test_each_line_carries_the_hash_of_the_one_before_as_anyone_can_compute_it(path):
    previous = START
    for line in path.read_text().splitlines():
        values = json.loads(line)
        assert values["previous"] == previous
        claimed = values.pop("sha256")
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        assert claimed == hashlib.sha256(text.encode()).hexdigest()
        previous = claimed


def test_a_journal_goes_on_where_it_ended(path):
    earlier = journal.read(path)
    later = journal.follow(earlier[-1], [("removed", {"client": "ben"}), ("realigned", {})])
    assert journal.read(written(path, [*earlier, *later])) == [*earlier, *later]
    assert [entry.sequence for entry in later] == [4, 5]


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.booleans()), max_size=4))
def test_any_details_survive_and_stay_on_their_line(details):
    (entry,) = journal.follow(None, [("created", details)])
    assert "\n" not in entry.line
    assert json.loads(entry.line)["details"] == details


def test_every_altered_byte_is_found_and_its_line_named(path):
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[position] ^= 1 << bit
            overwrite(path, altered)
            number = data[:position].count(b"\n") + 1
            with pytest.raises(RegistryDamaged) as caught:
                journal.read(path)
            told = str(caught.value)
            assert f"Line {number} of" in told or "cannot be read" in told or "within" in told


@pytest.mark.parametrize(
    ("order", "line"),
    [
        ((2, 3), 1),
        ((1, 3), 2),
        ((1, 3, 2), 2),
        ((1, 2, 2, 3), 3),
        ((1, 2, 3, 1), 4),
        ((2, 1, 3), 1),
    ],
)
def test_lines_dropped_moved_or_repeated_are_found(order, line, path):
    entries = journal.read(path)
    written(path, [entries[number - 1] for number in order])
    with pytest.raises(RegistryDamaged, match=f"Line {line} of the journal .* chain is broken"):
        journal.read(path)


def test_a_forged_line_breaks_the_chain_behind_it(path):
    first, second, third = journal.read(path)
    forged = Entry(2, second.time, second.event, {"clients": []}, first.sha256)
    with pytest.raises(RegistryDamaged, match="Line 3"):
        journal.read(written(path, [first, forged, third]))


def test_lines_of_a_change_under_way_are_not_read(path):
    entries = journal.read(path)
    with path.open("a") as file:
        file.write('{"half a li')
    assert journal.read(path, upto=3) == entries
    assert journal.read(path, upto=2) == entries[:2]
    with pytest.raises(RegistryDamaged, match="ends within a line, after line 3"):
        journal.read(path)


def test_a_journal_that_is_too_short_or_missing_is_damaged(path):
    with pytest.raises(RegistryDamaged, match="has 3 lines, expected 4"):
        journal.read(path, upto=4)
    path.unlink()
    with pytest.raises(RegistryDamaged, match="cannot be read"):
        journal.read(path)


@pytest.mark.parametrize("line", ["", "[]", "3", "null", "{}", '{"sequence": 1}', "[" * 5000])
def test_something_else_is_no_line(line, path):
    path.write_text(f"{line}\n")
    with pytest.raises(RegistryDamaged, match="Line 1"):
        journal.read(path)
