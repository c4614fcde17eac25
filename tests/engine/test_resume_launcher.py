"""``fedcompo simulate --resume``: the settings of the run that was begun, and a log of its own."""

from __future__ import annotations

import json

import pytest
from cli_runs import run

from fedcompo.engine.run_folder import begun_settings, reopen_output
from fedcompo.errors import LaunchError


def begun(folder, **settings):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"settings": {"output": "elsewhere", **settings}}))
    return folder


def test_a_run_goes_on_with_the_settings_it_was_begun_with_where_it_lies_now(tmp_path):
    output = begun(tmp_path / "run", alpha=3.0)
    assert begun_settings(output) == {"alpha": 3.0, "output": str(output), "resume": True}


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "{"])
def test_a_folder_without_a_run_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(LaunchError, match="holds no run to go on with"):
        begun_settings(tmp_path)


def test_a_finished_run_is_refused(tmp_path):
    (begun(tmp_path / "run") / "results.json").touch()
    with pytest.raises(LaunchError, match="finished"):
        begun_settings(tmp_path / "run")


def test_earlier_logs_are_put_aside_and_never_overwritten(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / "flower.log").write_text(f"log {number}")
        (tmp_path / "events.jsonl").write_text(f"events {number}")
        reopen_output(tmp_path)
    assert (tmp_path / "flower.log").read_text() == ""
    assert not (tmp_path / "events.jsonl").exists()
    assert [(tmp_path / f"flower-{n}.log").read_text() for n in (1, 2, 3)] == [
        f"log {n}" for n in (1, 2, 3)
    ]
    assert (tmp_path / "events-2.jsonl").read_text() == "events 2"


@pytest.mark.parametrize("more", [["--set", "alpha=3"], ["--seed", "1"], ["--output", "x"]])
def test_other_settings_are_refused_with_it(tmp_path, more):
    result = run("simulate", "--resume", begun(tmp_path / "run"), *more, code=2)
    assert "--resume takes all settings from the run that is there" in " ".join(
        result.output.split()
    )
