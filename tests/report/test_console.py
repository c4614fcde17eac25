"""Whatever clients, servers and old registries call their things, terminals and logs stay sound."""

from __future__ import annotations

import io
import json
import logging

import pytest

from fedcompo.cli.tables import print_members
from fedcompo.engine.live import Display
from fedcompo.names import printable
from fedcompo.report.console import PlainConsole, say
from fedcompo.report.log import LogFormatter
from fedcompo.runtime import check_versions, installed_versions
from server.exchange.books import LONGEST, Books

HOSTILE = "\x1b[2J\x1b]0;owned\x07cat\r\n2026-01-01 INFO 0\x9b31m\u202e\u2028[red]x[/red]:smile:"
FORBIDDEN = {"\x1b", "\x07", "\r", "\x9b", "\u202e", "\u2028"}


def test_what_cannot_be_seen_is_shown_by_its_number() -> None:
    text = "a\tb\nc \x1b[2J \u202egnp \x9b [red]é"
    assert printable(text, keep="\n\t") == "a\tb\nc ⟨U+001B⟩[2J ⟨U+202E⟩gnp ⟨U+009B⟩ [red]é"
    assert printable(text) == "a⟨U+0009⟩b⟨U+000A⟩c ⟨U+001B⟩[2J ⟨U+202E⟩gnp ⟨U+009B⟩ [red]é"


def test_a_console_prints_what_it_is_given_and_steers_no_terminal() -> None:
    out = io.StringIO()
    say(HOSTILE, PlainConsole(file=out, width=200, color_system=None, force_terminal=True))
    assert out.getvalue() == printable(HOSTILE, keep="\n") + "\n"


def test_members_of_a_served_registry_are_printed_on_their_lines(capsys) -> None:
    member = {
        "client": "a",
        "kind": HOSTILE,
        "num_examples": 1,
        "classes": [HOSTILE, "dog"],
        "added": 2,
    }
    print_members(HOSTILE, "1", [member], key="2")
    out = capsys.readouterr().out
    assert not FORBIDDEN & set(out)
    assert "[red]" in out
    assert out.rstrip().endswith("Root 1\nIts key has SHA-256 2")


@pytest.mark.parametrize("terminal", [True, False])
def test_events_and_books_hold_one_printable_line_of_each_reason(tmp_path, caplog, terminal):
    books = Books(tmp_path / "events.jsonl")
    flower = logging.getLogger("flwr")
    flower.addHandler(caplog.handler)
    try:
        books.leave_out("describe", "a", HOSTILE)
        books.miss("train", "a", HOSTILE + "x" * 10**6)
    finally:
        flower.removeHandler(caplog.handler)
    books.note(check_versions("a", {**installed_versions(), "torch": HOSTILE}))
    books.note(check_versions("a", {**installed_versions(), "torch": HOSTILE}))
    books.note("")
    assert books.left_out[0].reason == printable(HOSTILE)
    assert len(books.missed[0].reason) == LONGEST + 2
    assert len(books.notes) == 1
    out = io.StringIO()
    with Display(PlainConsole(file=out, width=200, force_terminal=terminal)) as display:
        for line in (tmp_path / "events.jsonl").read_text().splitlines():
            display.show({**json.loads(line), "client": HOSTILE})
    for text in (caplog.text, *books.notes):
        assert not FORBIDDEN & set(text)
        assert "\n2026" not in text
    steered = {"\x1b", "\r"} if terminal else set()  # by rich itself
    assert FORBIDDEN & set(out.getvalue()) <= steered
    assert "\x1b]0;owned" not in out.getvalue()


def test_entries_of_a_log_cannot_be_forged() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 1, "%s", (HOSTILE,), None)
    first, second = LogFormatter().format(record).split("\n")
    assert first.endswith("cat⟨U+000D⟩")
    assert second.startswith("    2026-01-01 INFO")
    assert not FORBIDDEN & set(first + second)
