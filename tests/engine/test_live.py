"""Events, and what people see of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from fedcompo.engine.live import SERVER, Display, Progress, Standing, line
from fedcompo.engine.log import Event, EventTail, note
from fedcompo.report.console import PlainConsole
from fedcompo.report.units import duration, size

REPLY = {"bytes_sent": 1_500_000, "bytes_received": 2_000, "seconds": 4.25, "reason": ""}
RUN: list[dict[str, Any]] = [
    {"event": "run", "clients": ["anna", "ben"], "phases": ["train", "compose"], "time": 101.0},
    {"event": "phase-started", "phase": "train", "clients": ["anna", "ben", "cleo"], "time": 102.0},
    {"event": "client", "phase": "train", "client": "anna", "status": "ok", **REPLY, "time": 106.0},
    {
        "event": "client",
        "phase": "train",
        "client": "ben",
        "status": "left-out",
        "reason": "[disk] full",
        "seconds": 5.0,
        "time": 107.0,
    },
    {"event": "phase-finished", "phase": "train", "seconds": 6.0, "time": 108.0},
    {"event": "phase-started", "phase": "compose", "clients": [], "time": 109.0},
    {"event": "note", "text": "halfway", "time": 110.0},
    {"event": "phase-finished", "phase": "compose", "seconds": 0.5, "time": 110.0},
    {"event": "finished", "results": "results.json", "time": 111.0},
]


def after(events: list[Event]) -> Progress:
    progress = Progress()
    for event in events:
        progress = progress.after(event)
    return progress


def shown(progress: Progress, now: float) -> str:
    console = PlainConsole(file=io.StringIO(), width=120, record=True)
    console.print(progress.table(now))
    return console.export_text()


def test_events_are_read_once_and_partial_lines_wait(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    tail = EventTail(file)
    assert tail.read() == []
    with file.open("w", buffering=1) as stream:
        first, second = (json.dumps(event) for event in RUN[:2])
        stream.write(first + "\n" + second[:20])
        stream.flush()
        assert tail.read() == RUN[:1]
        assert tail.read() == []
        stream.write(second[20:] + "\n\n")
        assert tail.read() == RUN[1:2]


def test_a_line_that_is_no_event_is_told_not_dropped(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"event": 3}\nnonsense\n[]\n' + json.dumps(RUN[0]) + "\n")
    events = EventTail(file).read()
    assert [event["event"] for event in events] == ["note", "note", "note", "run"]
    assert "nonsense" in events[1]["text"]


def test_the_reason_of_a_failure_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"event": "failed", "reason": "nobody came", "time": 1}\n')
    tail = EventTail(file)
    tail.read()
    assert tail.failure == "nobody came"


def test_progress_follows_the_events() -> None:
    progress = after(RUN[:2])
    assert progress.clients == ("anna", "ben", "cleo")
    assert {cell.standing for cell in progress.cells.values()} == {Standing.RUNNING}
    progress = after(RUN)
    standings = {at: cell.standing for at, cell in progress.cells.items()}
    assert standings == {
        ("anna", "train"): Standing.OK,
        ("ben", "train"): Standing.LEFT_OUT,
        ("cleo", "train"): Standing.LEFT_OUT,  # the phase ended without a word from cleo
        (SERVER, "compose"): Standing.OK,
    }
    assert (progress.bytes_sent, progress.bytes_received) == (1_500_000, 2_000)


def test_a_phase_begun_without_names_belongs_to_its_clients_once_they_reply() -> None:
    begun = after([{**RUN[1], "clients": []}])
    assert set(begun.cells) == {(SERVER, "train")}
    assert set(begun.after(RUN[2]).cells) == {("anna", "train")}


def test_an_event_does_not_change_the_progress_before_it() -> None:
    before = after(RUN[:2])
    before.after(RUN[2])
    assert before == after(RUN[:2])


def test_the_table_shows_each_client_in_each_phase() -> None:
    running = shown(after(RUN[:3]), now=112.0)
    assert "running 10.0 s" in running
    assert "waiting" in running
    done = shown(after(RUN), now=112.0)
    for text in ("ok 4.2 s", "LEFT OUT [disk] full", "LEFT OUT no reply", "sent 1.5 MB", "server"):
        assert text in done


ROUNDS: list[dict[str, Any]] = [
    {"event": "phase-started", "clients": ["anna", "ben"], "time": 102.0},
    {"event": "client", "client": "anna", "status": "ok", **REPLY, "time": 106.0},
    {
        "event": "client",
        "client": "ben",
        "status": "missed",
        "reason": "no answer",
        "seconds": 5.0,
        "time": 107.0,
    },
    {"event": "phase-finished", "seconds": 6.0, "time": 108.0},
]
"""A round; its number and phase are added."""


def in_round(number: int) -> list[dict[str, Any]]:
    return [{**event, "phase": "train", "part": f"round {number}"} for event in ROUNDS]


def test_of_like_phases_there_is_one_column_that_says_which_it_is() -> None:
    first = after(in_round(1))
    assert first.phases == ("train",)
    done = shown(first, now=112.0)
    assert "ok 4.2 s (round 1)" in done
    assert "MISSED (round 1) no answer" in done
    second = shown(after([*in_round(1), *in_round(2)[:2]]), now=112.0)
    assert "ok 4.2 s (round 2)" in second
    assert "running 10.0 s (round 2)" in second
    assert "MISSED" not in second


def test_who_missed_a_round_is_not_left_out() -> None:
    progress = after([*in_round(1), in_round(2)[0]])
    assert progress.cells["ben", "train"].standing is Standing.RUNNING
    progress = after(in_round(2))
    cell = progress.cells["ben", "train"]
    assert (cell.standing, cell.part, cell.reason) == (Standing.MISSED, "round 2", "no answer")


def test_a_line_says_which_round_it_is() -> None:
    assert [line(event, 100.0) for event in in_round(3)] == [
        "[   2.0 s] train, round 3: started with anna, ben",
        "[   6.0 s] train, round 3: anna ok, 4.2 s, sent 1.5 MB, received 2.0 kB",
        "[   7.0 s] train, round 3: ben MISSED: no answer",
        "[   8.0 s] train, round 3: finished, 6.0 s",
    ]


def test_a_pipe_gets_one_line_an_event() -> None:
    out = io.StringIO()
    with Display(PlainConsole(file=out, width=20)) as display:
        for event in RUN:
            display.show(event)
    assert len(out.getvalue().splitlines()) == len(RUN)
    assert [line(event, 100.0) for event in RUN] == [
        "[   1.0 s] run: train -> compose; anna, ben",
        "[   2.0 s] train: started with anna, ben, cleo",
        "[   6.0 s] train: anna ok, 4.2 s, sent 1.5 MB, received 2.0 kB",
        "[   7.0 s] train: ben LEFT OUT: [disk] full",
        "[   8.0 s] train: finished, 6.0 s",
        "[   9.0 s] compose: started",
        "[  10.0 s] halfway",
        "[  10.0 s] compose: finished, 0.5 s",
        "[  11.0 s] finished",
    ]


def test_a_terminal_gets_the_table_and_the_notes() -> None:
    out = io.StringIO()
    with Display(PlainConsole(file=out, width=120, force_terminal=True)) as display:
        for event in RUN:
            display.show(event)
    text = out.getvalue()
    assert "halfway" in text
    assert "LEFT OUT" in text
    assert "since the start" in text
    assert "train: started with" not in text


def test_an_unknown_event_is_shown_by_its_name() -> None:
    assert line({"event": "coffee", "time": 1.0}, 0.0) == "[   1.0 s] coffee"
    assert after([{"event": "coffee"}]) == Progress()
    assert note("x")["text"] == "x"


def test_numbers_for_people() -> None:
    durations = [duration(seconds) for seconds in (-1, 4.21, 59.94, 185, 7800)]
    assert durations == ["0.0 s", "4.2 s", "59.9 s", "3 min 5 s", "2 h 10 min"]
    sizes = [size(count) for count in (0, 999, 1_000, 2_345_678, 5 * 10**12)]
    assert sizes == ["0 B", "999 B", "1.0 kB", "2.3 MB", "5.0 TB"]
