"""Events, and what people see of them."""

from __future__ import annotations

import inspect
import io
import json
import pdb
import sys
from pathlib import Path
from typing import Any

from fedcompo.engine.live import LEFT_OUT, OK, RUNNING, Display, State, line
from fedcompo.engine.log import SERVER, Event, EventTail, note
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


def after(events: list[Event]) -> State:
    progress = State()
    for event in events:
        progress = progress.after(event)
    return progress


def shown(progress: State, now: float) -> str:
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
    assert {cell.standing for cell in progress.cells.values()} == {RUNNING}
    progress = after(RUN)
    standings = {at: cell.standing for at, cell in progress.cells.items()}
    assert standings == {
        ("anna", "train"): OK,
        ("ben", "train"): LEFT_OUT,
        ("cleo", "train"): LEFT_OUT,  # the phase ended without a word from cleo
        (SERVER, "compose"): OK,
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
    assert progress.cells["ben", "train"].standing == RUNNING
    progress = after(in_round(2))
    cell = progress.cells["ben", "train"]
    assert (cell.standing, cell.part, cell.reason) == ("missed", "round 2", "no answer")


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
    assert after([{"event": "coffee"}]) == State()
    assert note("x")["text"] == "x"


def counting(client: str, done: int, **about: Any) -> dict[str, Any]:
    counts = {"what": "decoding", "done": done, "total": 5000, "unit": "images", "rate": 310.0}
    return {"event": "progress", "client": client, **counts, "seconds": 9.0, **about}


def test_a_client_at_work_says_how_far_it_is_in_the_phase_that_runs() -> None:
    state = after([*RUN[:3], counting("cleo", 1200), counting("anna", 10)])
    far = "cleo decoding: 1,200 of 5,000 images, 310/s, 12 s left"
    assert state.at_work(3) == [far, "1 more to answer"]
    assert state.cells["anna", "train"].standing == OK  # it has answered
    named = after([{**RUN[1], "clients": []}, counting("cleo", 1200)])
    assert set(named.cells) == {("cleo", "train")}
    assert after([counting("cleo", 1200)]) == State()


def crowd(count: int) -> list[dict[str, Any]]:
    names = [f"client-{i}" for i in range(count)]
    answers = [{**RUN[2], "client": name} for name in names[1:-30]]
    return [{**RUN[1], "clients": names}, {**RUN[3], "client": names[0]}, *answers]


def test_of_a_thousand_clients_the_table_shows_those_at_work_and_counts_the_rest() -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, width=100, height=40, force_terminal=True)
    with Display(console) as display:
        for event in (*crowd(1000), counting("client-980", 1200)):
            display.show(event)
    last = out.getvalue().rpartition("┏")[2]
    assert len(last.splitlines()) <= 40
    assert "310/s, 12 s left" in last
    assert " more " in last
    table = after(crowd(1000)).table(112.0, rows=33)
    named = ["client-0", "client-1", *(f"client-{i}" for i in range(970, 1000))]
    assert [str(cell) for cell in table.columns[0].cells] == [*named, "968 more"]


def test_a_pipe_gets_a_line_every_ten_seconds_whoever_is_at_work(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fedcompo.engine.live.time.time", lambda: now[0])
    out = io.StringIO()
    with Display(PlainConsole(file=out, width=20)) as display:
        display.show({**RUN[1], "clients": [*"abcdef"], "time": 100.0})
        for second in range(25):
            now[0] += 1
            for client in "abcd":
                display.show(counting(client, 10 * second, phase="train", time=now[0]))
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("[  10.0 s] a decoding: 90 of 5,000 images, 310/s, 16 s left")
    assert lines[2].endswith("; 3 more to answer")


def test_of_work_before_the_first_phase_a_pipe_is_told_too(monkeypatch) -> None:
    out = io.StringIO()
    with Display(PlainConsole(file=out, width=200)) as display:
        monkeypatch.setattr("fedcompo.engine.live.time.time", lambda: display._began + 11)
        display.show({"event": "progress", "client": SERVER, "what": "loading", "time": 0.0})
    assert out.getvalue().endswith("] server loading\n")


def test_numbers_for_people() -> None:
    durations = [duration(seconds) for seconds in (-1, 4.21, 59.94, 185, 7800)]
    assert durations == ["0.0 s", "4.2 s", "59.9 s", "3 min 5 s", "2 h 10 min"]
    sizes = [size(count) for count in (0, 999, 1_000, 2_345_678, 5 * 10**12)]
    assert sizes == ["0 B", "999 B", "1.0 kB", "2.3 MB", "5.0 TB"]


def test_a_breakpoint_gets_the_terminal_and_stops_where_it_stands(monkeypatch):
    stopped, before = [], sys.breakpointhook
    monkeypatch.setattr(pdb.Pdb, "set_trace", lambda self, frame: stopped.append(frame.f_code))
    with Display(PlainConsole(file=io.StringIO(), force_terminal=True)) as display:
        breakpoint()
        assert not display._live.is_started
    assert [code.co_name for code in stopped] == [inspect.currentframe().f_code.co_name]
    assert sys.breakpointhook == before
