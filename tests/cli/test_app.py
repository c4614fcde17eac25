"""The command line: what it refuses, what it prints, how it exits."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner

import fedcompo
from fedcompo.cli import app as cli
from fedcompo.config.run import RunConfig, all_settings
from fedcompo.engine import launcher
from fedcompo.engine.run_folder import RUN
from fedcompo.errors import ConfigError, FedcompoError, LaunchError

runner = CliRunner()
ROOT = Path(__file__).resolve().parents[2]
Started = list[dict[str, Any]]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    """Stand in `tmp_path`, and note what would be started instead of starting it."""
    calls: Started = []

    def run(self: launcher.Simulation, on_event: Callable[..., Any]) -> dict[str, Any]:
        calls.append(vars(self))
        on_event({"event": "note", "text": "a note", "time": 0.0})
        return {"accuracy": 0.5}

    report = ModuleType("fedcompo.report.results")
    report.print_results = lambda results, console, **_: console.print(results)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedcompo.report.results", report)
    monkeypatch.setattr(launcher.Simulation, "run", run)
    monkeypatch.chdir(tmp_path)
    return calls


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


def test_a_simulation_passes_settings_on_and_ends_with_the_place_of_its_results(
    started: Started, tmp_path: Path
) -> None:
    (tmp_path / "my.toml").write_text("alpha = 3\n")
    arguments = [
        "simulate",
        "my.toml",
        "--set",
        "kind=ia3",
        "--seed",
        "7",
        "--engine",
        "in-process",
    ]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    (call,) = started
    assert call["settings"] == {"alpha": 3, "kind": "ia3", "seed": 7}
    assert call["engine"] == "in-process"
    assert call["clients"] == 5
    assert call["output"] == tmp_path / "runs" / "my"
    lines = result.stdout.splitlines()
    assert lines[0] == f"Simulating 5 clients. Results go to {tmp_path}/runs/my"
    assert lines[-1] == f"Results: {tmp_path}/runs/my"
    assert "{'accuracy': 0.5}" in lines


@pytest.mark.parametrize("more", [[], ["--no-check"]])
@pytest.mark.parametrize("engine", [[], ["--engine", "in-process"]])
def test_an_interrupted_run_goes_on_as_it_was_begun(
    started: Started,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: list[str],
    more: list[str],
) -> None:
    def interrupted(self: launcher.Simulation, on_event: Callable[..., Any]) -> None:
        (self.output / RUN).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher.Simulation, "run", interrupted)
    result = runner.invoke(cli.app, ["simulate", *engine, *more])
    resume = ["--resume", str(tmp_path / "runs" / "digits")]
    words = ["fedcompo", "simulate", *resume, *engine, *more]
    assert f"Go on with it by: {' '.join(words)}" in result.stderr


def test_a_second_simulation_does_not_touch_the_first(started: Started, tmp_path: Path) -> None:
    for name in ("digits", "digits-2"):
        result = runner.invoke(cli.app, ["simulate"])
        assert result.stdout.splitlines()[-1] == f"Results: {tmp_path}/runs/{name}"


@pytest.mark.parametrize(
    "arguments",
    [["--output", "a b"], ["--set", "output=a b"], ["--set", "output=x", "--output", "a b"]],
)
def test_the_output_folder_can_be_chosen(
    started: Started, tmp_path: Path, arguments: list[str]
) -> None:
    assert runner.invoke(cli.app, ["simulate", *arguments]).exit_code == 0
    assert started[0]["output"] == tmp_path / "a b"


def test_wrong_settings_are_refused_all_at_once_before_anything_starts(
    started: Started, tmp_path: Path
) -> None:
    arguments = ["--set", "knid=lora", "--set", "rank=many", "--set", "alpha", "--seed", "-1"]
    result = runner.invoke(cli.app, ["simulate", *arguments])
    assert result.exit_code == 2
    for fault in ("`knid`", "`rank` must be of type int", "`alpha` is not", "`seed`"):
        assert fault in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert started == []
    assert list(tmp_path.iterdir()) == []


def test_a_scenario_that_is_not_there_is_a_sentence(started: Started) -> None:
    result = runner.invoke(cli.app, ["simulate", "nowhere.toml"])
    assert result.exit_code == 2
    assert "The scenario nowhere.toml cannot be read" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LaunchError("[no] engine"), 1),
        (ConfigError("[no] engine"), 2),
        (FedcompoError("[no] engine"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
    ],
)
def test_errors_become_sentences_and_exit_codes(
    started: Started, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    monkeypatch.setattr(launcher.Simulation, "run", failing(error))
    result = runner.invoke(cli.app, ["simulate"])
    assert result.exit_code == code
    assert "Traceback" not in result.output
    if isinstance(error, FedcompoError):
        assert result.stderr == "[no] engine\n"


def test_verbose_shows_the_traceback_and_keeps_the_exit_code(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.Simulation, "run", failing(LaunchError("no engine")))
    result = runner.invoke(cli.app, ["simulate", "--verbose"])
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "LaunchError: no engine" in result.stderr


def test_settings_lists_every_setting_with_its_default() -> None:
    rows = json.loads(runner.invoke(cli.app, ["settings", "--json"]).stdout)
    assert {row["setting"]: row["default"] for row in rows} == RunConfig().flat()
    assert all(row["help"] for row in rows)
    table = runner.invoke(cli.app, ["settings"]).stdout
    assert all(key in table for key in all_settings())


def test_a_file_of_settings_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "first.toml"
    file.write_text('seed = 3\ndata = "folder:/nowhere/yet"\n')
    assert (
        "every setting is known"
        in runner.invoke(cli.app, ["settings", "--check", str(file)]).stdout
    )
    file.write_text('sead = 3\nrank = "two"\n')
    result = runner.invoke(cli.app, ["settings", "--check", str(file)])
    assert result.exit_code == 2
    assert all(fault in result.stderr for fault in ("`sead`", "`rank` must be of type int"))
    file.write_text('rule = "ties:density=2"\n')
    result = runner.invoke(cli.app, ["settings", "--check", str(file)])
    assert (result.exit_code, "`density` must be in (0, 1], got 2" in result.stderr) == (2, True)


def test_version_is_that_of_the_project() -> None:
    for arguments in (["--version"], ["-V"]):
        assert runner.invoke(cli.app, arguments).stdout.strip() == fedcompo.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fedcompo.__version__ == project["version"]


def test_every_command_explains_itself_by_a_short_option_too() -> None:
    root = typer.main.get_command(cli.app)
    context = click.Context(root, **root.context_settings)
    for command in root.commands.values():  # type: ignore[attr-defined]
        own = click.Context(command, parent=context, **command.context_settings)
        assert command.get_help_option_names(own) == ["-h", "--help"]
    long, short = (runner.invoke(cli.app, ["list", option]) for option in ("--help", "-h"))
    assert short.exit_code == 0
    assert short.stdout == long.stdout


def test_shells_can_complete_the_commands() -> None:
    completed = runner.invoke(
        cli.app,
        [],
        prog_name="fedcompo",
        env={
            "_FEDCOMPO_COMPLETE": "complete_bash",
            "COMP_WORDS": "fedcompo spec",
            "COMP_CWORD": "1",
        },
    )
    assert completed.stdout.split() == ["specialise"]
