"""The command `audit`: what it prints, writes and refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from audited_federation import config_of, federate, noise
from typer.testing import CliRunner

from fedcompo.audit.report import markdown
from fedcompo.audit.verdicts import verdicts
from fedcompo.cli import app as cli

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A registry, the gold one beside it, and the figures of an audit by the command."""
    folder = tmp_path_factory.mktemp("audited")
    config = config_of(f"npz:{noise(folder / 'noise.npz')}")
    federate(folder / "registry", config)
    federate(folder / "gold", config, without=["client-1"])
    return folder


def run(*arguments: str) -> object:
    return runner.invoke(cli.app, ["audit", "--remove", "client-1", "--shadows", "4", *arguments])


@pytest.fixture(scope="module")
def found(folder) -> dict:
    options = ("-r", f"{folder}/registry", "--gold", f"{folder}/gold", "-o", f"{folder}/audit")
    result = run(*options, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_what_is_printed_for_programs_is_what_is_written(found, folder):
    assert json.loads((folder / "audit" / "audit.json").read_text()) == found
    assert {path.name for path in (folder / "audit").iterdir()} == {"audit.json", "audit.md"}
    assert found["shadows"] == 4
    assert list(found["models"]) == ["before", "after", "gold"]


def test_people_get_tables_and_the_place_of_the_files(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDCOMPO_REGISTRY", str(folder / "registry"))
    result = run()
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "audit-client-1" / "audit.json").read_text())
    assert list(values["models"]) == ["before", "after"]
    auc = values["membership"]["likelihood-ratio"]["before"]["auc"]
    for said in (
        "client-1 (removed)",
        "mean of the remaining",
        f"{auc['value']:.2f} [{auc['low']:.2f}, {auc['high']:.2f}]",
        "Before: everyone (client-0, client-1); after: the client removed (client-0).",
        "is right there, by construction",
        "kept the joint head",
        "4 shadow models, seed 0",
    ):
        assert said in result.stdout
    assert "**" not in result.stdout
    printed = " ".join(result.stdout.split())
    assert all(verdict in printed for verdict in values["verdicts"])
    assert result.stdout.splitlines()[-1].endswith(": audit-client-1")


def test_the_markdown_holds_every_figure(found):
    text = markdown(found)
    lines = text.splitlines()
    for figures in found["accuracy"]["per_client"].values():
        cells = [
            f"{100 * figures[name][key]:.1f}"
            for key in ("class_il_accuracy", "task_il_accuracy")
            for name in ("before", "after", "gold")
        ]
        assert any(line.endswith(f"| {' | '.join(cells)} |") for line in lines)
    for attack in ("loss", "likelihood ratio"):
        (line,) = [line for line in lines if line.startswith(f"| {attack} | AUC")]
        for name in ("before", "after", "gold"):
            estimate = found["membership"][attack.replace(" ", "-")][name]["auc"]
            assert f"{estimate['value']:.2f} [{estimate['low']:.2f}, " in line
    widths = {line.count("|") for line in lines if line.startswith("| loss") or "attack |" in line}
    assert len(widths) == 1
    assert all(note in text for note in found["notes"])


def test_a_verdict_a_line_opens_the_report_and_tables_hold_what_features_know(found):
    lines = markdown(found).splitlines()
    first = lines.index(f"- {found['verdicts'][0]}")
    assert [f"- {verdict}" for verdict in found["verdicts"]] == lines[first : first + 5]
    assert not any(line.startswith("#") for line in lines[1:first])
    for shots, label in (("1", "1 image"), ("5", "5 images"), ("all", "all images")):
        cells = [f"{own[shots]['value']:.2f} " for own in found["probe"].values()]
        (line,) = [line for line in lines if line.startswith(f"| {label} |")]
        assert all(cell in line for cell in cells)
    pairs = " | ".join(("before ~ after", "before ~ gold", "after ~ gold", "frozen ~ after"))
    assert f"| test images of | {pairs} |" in lines


def estimate(low: float, high: float) -> dict:
    return {"low": low, "value": (low + high) / 2, "high": high}


def test_verdicts_go_by_intervals_and_say_what_speaks_against_forgetting(found):
    changed = copy.deepcopy(found)
    for model, ends in {"before": (0.6, 0.8), "after": (0.51, 0.7), "gold": (0.3, 0.48)}.items():
        own = changed["membership"]["loss"][model]
        own |= {"auc": estimate(*ends), "is_chance": False}
    changed["beyond_gold"] = {
        "auc": {"loss": estimate(0.01, 0.2), "likelihood-ratio": estimate(-0.1, 0.1)},
        "probe": {"1": estimate(-0.3, -0.1), "all": estimate(0, 0.1)},
    }
    said = verdicts(changed)
    assert said[0] == (
        "Loss attack. Finds members: before (AUC 0.70 [0.60, 0.80]), after (AUC 0.60 [0.51, "
        "0.70]). Worse than chance: gold (AUC 0.39 [0.30, 0.48])."
    )
    beyond = "; ".join(("loss attack +0.11 [+0.01, +0.20]", "probe of 1 -0.20 [-0.30, -0.10]"))
    assert said[4].endswith(f"never met it): {beyond}.")
    changed["beyond_gold"]["auc"]["loss"] = estimate(-0.01, 0.2)
    changed["beyond_gold"]["probe"] = {}
    assert verdicts(changed)[4].endswith("never met it): no difference is seen.")


def with_auc(found: dict, low: float, value: float, high: float) -> dict:
    changed = copy.deepcopy(found)
    changed["membership"]["loss"]["after"]["auc"] = {"low": low, "value": value, "high": high}
    return changed


@pytest.mark.parametrize(
    ("low", "value", "high", "cell"),
    [
        (0.5, 0.6, 0.7, "| 0.60 [0.50, 0.70] |"),
        (0.501, 0.6, 0.7, "| **0.60 [0.50, 0.70]** |"),
        (0.2, 0.3, 0.499, "| **0.30 [0.20, 0.50]** |"),
    ],
)
def test_an_interval_that_excludes_chance_is_bold(found, low, value, high, cell):
    assert cell in markdown(with_auc(found, low, value, high))


def test_weights_that_are_those_of_gold_are_said_to_be(found):
    assert "bit for bit" not in markdown(found)
    equal = {**found, "distance_to_gold": {"before": 1.0, "after": 0.0}}
    assert "The weights after are those of gold, bit for bit." in markdown(equal)


def test_true_positive_rates_have_rows_of_their_own(found):
    assert "TPR" not in markdown(found)
    changed = copy.deepcopy(found)
    for attack in changed["membership"].values():
        for figures in attack.values():
            figures["tpr"] = {"0.05": {"value": 0.25, "low": 0.125, "high": 0.375}}
    cells = " | ".join(["0.25 [0.12, 0.38]"] * 3)
    assert f"| loss | TPR at FPR 0.05 | {cells} |" in markdown(changed)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--remove", "client-2"], 1, "Did you mean 'client-1'?"),
        (["--remove", "a/../../b"], 1, "There is no client"),
        (["--shadows", "5"], 2, "`--shadows` is 5, expected an even number"),
        (["--gold", "nowhere"], 1, "There is no registry at nowhere"),
        (["--data", "npz:nowhere.npz"], 1, "nowhere.npz"),
    ],
)
def test_what_cannot_be_audited_is_a_sentence_and_leaves_nothing(
    folder, tmp_path, monkeypatch, arguments, code, said
):
    monkeypatch.chdir(tmp_path)
    result = run("-r", f"{folder}/registry", *arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_at_once(folder, tmp_path, monkeypatch):
    (tmp_path / "audit-client-1").mkdir()
    (tmp_path / "audit-client-1" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedcompo.audit.measure.audit", None)
    result = run("-r", f"{folder}/registry")
    assert result.exit_code == 2
    assert "audit-client-1 holds something already" in result.stderr
    assert [path.name for path in tmp_path.rglob("*.*")] == ["notes.txt"]


def test_whom_to_remove_must_be_said(folder):
    result = runner.invoke(cli.app, ["audit", "-r", f"{folder}/registry"])
    assert result.exit_code == 2
    assert "--remove" in result.output
