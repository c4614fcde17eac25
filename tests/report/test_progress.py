"""Progress: who is told what, and when."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcompo.report import progress
from fedcompo.report.progress import (
    Files,
    Progress,
    each,
    listening,
    step,
    telling,
    to_lines,
    track,
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def counted(clock, seconds: list[float], units: list[int]) -> list[Progress]:
    """What is told of work whose steps take these seconds, and do these units."""
    told: list[Progress] = []
    with listening(told.append), track(sum(units), "images", "decoding") as count:
        for wait, done in zip(seconds, units, strict=True):
            clock[0] += wait
            count(done)
    return told


def test_nobody_is_told_of_work_of_less_than_two_seconds(clock):
    assert counted(clock, [0.5] * 3, [10] * 3) == []


def test_longer_work_is_told_of_once_a_second_and_at_its_end(clock):
    told = counted(clock, [0.3] * 11, [10] * 11)
    assert [p.done for p in told] == [70, 110]  # after 2.1 s; after 3.3 s, which is the end
    assert told[-1].ended
    assert str(told[-1]) == "decoding: 110 of 110 images in 3.3 s"


def test_the_time_left_follows_the_recent_rate(clock):
    told = counted(clock, [1.0] * 10 + [10.0] * 20, [100] * 10 + [10] * 20)
    assert told[3].rate == 100
    assert told[-2].rate == pytest.approx(1.0)
    assert str(told[-2]) == "decoding: 1,190 of 1,200 images, 1/s, 10 s left"


def test_items_are_passed_on_and_counted(clock):
    told: list[Progress] = []

    def slow():
        for item in "abc":
            clock[0] += 2
            yield item

    with listening(told.append):
        assert list(each(slow(), "files", "hashing", total=3)) == ["a", "b", "c"]
    assert [p.done for p in told] == [1, 2, 3]


def test_steps_without_a_number_are_told_at_once_and_only_to_listeners():
    told: list[Progress] = []
    step("composing")
    with listening(told.append):
        step("writing")
    assert [str(p) for p in told] == ["writing"]


def test_a_log_has_a_line_every_ten_seconds_and_one_at_the_end(clock):
    lines: list[str] = []
    listener = to_lines(lines.append)
    with listening(listener), track(25, "images", "training") as count:
        for _ in range(25):
            clock[0] += 1
            count(1)
    assert [line.partition(" of ")[0] for line in lines] == [
        "training: 10",
        "training: 20",
        "training: 25",
    ]


def test_another_process_reads_the_latest_from_a_file_which_is_gone_in_the_end(clock, tmp_path):
    files, lines = Files(tmp_path / "told"), []
    assert files.read() == []
    with (
        telling(lines.append, tmp_path / "told" / "anna", client="anna", phase="train"),
        track(9, "images", "training") as count,
    ):
        clock[0] += 3
        count(1)
        clock[0] += 2
        count(2)
        (event,) = files.read()
        assert files.read() == []
    assert (event["event"], event["client"], event["phase"]) == ("progress", "anna", "train")
    assert Progress.of(event) == Progress("training", 3, 9, "images", 0.6, 5.0)
    assert not (tmp_path / "told").exists()


def test_a_file_that_cannot_be_written_does_not_end_the_work(tmp_path):
    (tmp_path / "told").write_text("no folder")
    with telling(print, tmp_path / "told" / "anna"):
        step("training")


def test_a_folder_that_goes_while_it_is_read_holds_nothing(tmp_path, monkeypatch):
    def gone(*_):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "glob", gone)
    assert Files(tmp_path).read() == []


def test_bytes_are_written_as_sizes():
    progress = Progress("sending", 4_700_000, 10_000_000, "bytes", 1e6)
    assert str(progress) == "sending: 4.7 MB of 10.0 MB, 1.0 MB/s, 5 s left"
