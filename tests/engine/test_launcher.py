"""Starting a run: where it goes, how it ends, and that nothing of it is left."""

from __future__ import annotations

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_app import fedcompo, write_app

from fedcompo import RunConfig, simulate
from fedcompo.engine import launcher, run_folder, superlink
from fedcompo.engine.log import EventTail
from fedcompo.engine.superlink import MARKER
from fedcompo.errors import ConfigError, LaunchError

COMPONENTS = "[tool.flwr.app.components]\nserverapp = 'a:b'\nclientapp = 'c:d'\n"


def marked(folder: Path) -> list[int]:
    """Processes of engines whose private folders lie in this test's temporary folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if MARKER.encode() in environment and f"MARK_OF_TEST={folder}".encode() in environment:
            found.append(int(process.name))
    return found


# Where a run goes.


def test_a_new_folder_is_taken_as_asked(tmp_path: Path) -> None:
    assert run_folder.reserve_output(tmp_path / "a" / "digits") == tmp_path / "a" / "digits"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    assert run_folder.reserve_output(tmp_path / "digits") == tmp_path / "digits"


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    for name in ("digits", "digits-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("x")
    (tmp_path / "digits-3").write_text("a file")
    assert run_folder.reserve_output(tmp_path / "digits") == tmp_path / "digits-4"
    assert [file.name for file in (tmp_path / "digits").iterdir()] == ["precious"]


def test_runs_that_ask_at_the_same_time_get_a_folder_each(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()  # empty: all may want it
    with ThreadPoolExecutor(32) as pool:
        taken = list(pool.map(run_folder.reserve_output, [tmp_path / "digits"] * 64))
    assert len(set(taken)) == 64


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LaunchError, match="is a file"):
        run_folder.reserve_output(tmp_path / "file")
    with pytest.raises(LaunchError, match="cannot be made"):
        run_folder.reserve_output(tmp_path / "file" / "below")
    with pytest.raises(LaunchError, match="name another"):
        run_folder.reserve_output(Path("/"))


# Which app runs.


def test_the_app_in_the_wheel_comes_before_the_checkout(tmp_path: Path) -> None:
    package = tmp_path / "fedcompo"
    (package / "_app").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(COMPONENTS)
    assert launcher.find_app(package) == tmp_path
    (package / "_app" / "pyproject.toml").write_text(COMPONENTS)
    assert launcher.find_app(package) == package / "_app"


@pytest.mark.parametrize("project", [None, "[project]\nname = 'other'\n", "not toml"])
def test_without_an_app_the_error_says_so(tmp_path: Path, project: str | None) -> None:
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(project)
    with pytest.raises(LaunchError, match="no Flower app"):
        launcher.find_app(tmp_path / "fedcompo")


def test_this_checkout_is_an_app() -> None:
    assert (launcher.find_app() / "server" / "app.py").parent.is_dir()


# How a run ends.


def outcome(folder: Path, status: str, details: str = "", reported: str = "") -> str:
    with pytest.raises(LaunchError) as caught:
        launcher._results(folder, status, details, reported)
    assert str(folder / "flower.log") in str(caught.value)
    return str(caught.value)


def test_a_completed_run_with_results_is_a_success(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"accuracy": 1}')
    assert launcher._results(tmp_path, "finished:completed", "", "") == {"accuracy": 1}


@pytest.mark.parametrize("content", [None, '{"accuracy": ', "[]"])
def test_a_completed_run_without_results_is_a_failure(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert "completed, but results.json" in outcome(tmp_path, "finished:completed")


def test_a_failed_run_gives_the_reason_once_and_the_end_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "flower.log").write_text("INFO :  a\nTraceback (most recent call last):\nOops: x\n")
    said = outcome(tmp_path, "finished:failed", "Simulation failed with exception: no weights", "")
    assert said.startswith("The run failed: no weights\n")
    assert "  Oops: x\n" in said
    for reported in ("no weights", "DataError: no weights"):
        details = "Simulation failed with exception: no weights"
        said = outcome(tmp_path, "finished:failed", details, reported)
        assert said.startswith("The run failed: no weights\n")
    assert "Flower says finished:stopped" in outcome(tmp_path, "finished:stopped")


def test_a_run_is_over_when_the_server_says_so(tmp_path: Path) -> None:
    """Its engine goes on: nothing of it has ended, and nothing is said about the run."""
    tail = EventTail(tmp_path / "events.jsonl")
    engine = SimpleNamespace(alive=True, hear=dict)
    seen = []

    def look() -> bool:
        seen.extend(tail.read())
        if seen:
            event = "finished" if len(seen) > 1 else "phase-finished"
            with (tmp_path / "events.jsonl").open("a") as file:
                file.write(json.dumps({"event": event}) + "\n")
        else:
            (tmp_path / "events.jsonl").write_text('{"event": "run"}\n')
        return tail.finished

    assert launcher._follow(engine, look, print) == ("finished:completed", "")
    assert [event["event"] for event in seen] == ["run", "phase-finished", "finished"]


# The real engine.


@pytest.mark.simulation
def test_a_run_that_raises_is_a_failure_and_says_why_also_when_a_port_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, log = write_app(tmp_path / "app", "raise"), tmp_path / "out" / "flower.log"
    monkeypatch.setattr(launcher, "find_app", lambda: app)
    free = superlink._free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], free])
        monkeypatch.setattr(superlink, "_free_port", lambda: next(ports))
        with pytest.raises(LaunchError) as caught:
            simulate(output=tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("The run failed: the dog ate the weights\n")
    assert "RuntimeError: the dog ate the weights" in said
    assert f"The whole log: {log}" in said
    assert superlink.PORT_TAKEN in log.read_text()


@pytest.mark.simulation
@pytest.mark.slow  # each part is shown without the engine above, or by the runs before
def test_a_run_without_results_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = write_app(tmp_path / "app", "forget")
    monkeypatch.setattr(launcher, "find_app", lambda: app)
    events: list[str] = []
    with pytest.raises(LaunchError, match=r"completed, but results\.json"):
        simulate(output=tmp_path / "out", on_event=lambda event: events.append(event["event"]))
    assert events == ["note", "run", "phase-started", "note", "finished"]


def test_python_users_simulate_as_the_command_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def run(self: launcher.Simulation, on_event: object) -> dict[str, object]:
        started.append(vars(self))
        return {"accuracy": 1.0}

    monkeypatch.setattr(launcher.Simulation, "run", run)
    monkeypatch.chdir(tmp_path)
    settings = {"num-tasks": 3, "checkpoint": "weights.pt"}
    assert simulate(settings, check=False) == {"accuracy": 1.0}
    assert simulate(RunConfig(), output="mine") == {"accuracy": 1.0}
    few, all_defaults = started
    assert few["settings"] == {"num-tasks": 3, "checkpoint": f"{tmp_path}/weights.pt"}
    assert (few["clients"], few["output"]) == (3, tmp_path / "runs" / "digits")
    assert all_defaults["settings"] == {**RunConfig().flat(), "output": f"{tmp_path}/mine"}
    assert all_defaults["output"] == tmp_path / "mine"
    with pytest.raises(ConfigError, match="Did you mean `rank`"):
        simulate({"rnk": 3})


@pytest.mark.simulation
@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.setenv("MARK_OF_TEST", str(tmp_path))
    process = fedcompo(write_app(tmp_path / "app", "hang"), "simulate", cwd=tmp_path)
    log = tmp_path / "runs" / "digits" / "flower.log"
    deadline = time.monotonic() + 200
    while not (log.exists() and "a client works" in log.read_text(errors="replace")):
        assert time.monotonic() < deadline, process.poll()
        time.sleep(0.2)
    assert len(marked(tmp_path)) > 5
    words = " ".join(
        Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        for pid in marked(tmp_path)
    )
    folders = [folder for folder in Path("/tmp").glob("fedcompo-*") if str(folder) in words]
    assert folders
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    deadline = time.monotonic() + (15 if number == signal.SIGKILL else 0)
    while marked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)  # nobody could wait for the guard
    assert marked(tmp_path) == []
    assert not any(folder.exists() for folder in folders)
