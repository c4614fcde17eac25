"""What an earlier version wrote opens, verifies and composes to the same bits; see README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from golden import commands_of, facts_of
from typer.testing import CliRunner

from fedcompo.cli.app import app
from fedcompo.registry.envelope import opened
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry

GOLDEN = Path(__file__).parent
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
FITTED = ("the joint head is that of the members", "the survivors alone give the record's model")
"""Claims that another processor can leave open: it fits a classifier with other roundings."""


@pytest.fixture
def copy_of(tmp_path):
    def copied(name: str) -> Path:
        path = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
        (path / "key.pem").chmod(0o600)  # git does not keep it
        state = json.loads((path / "state.json").read_text())
        (path / "model").symlink_to(state["version"], target_is_directory=True)
        return path

    return copied


def assert_facts(path: Path, step: str) -> None:
    """Hold a registry against what is pinned, its classifier up to rounding."""
    actual, expected = facts_of(Registry(path)), dict(EXPECTED[path.name][step])
    rows, pinned = actual.pop("classifier"), expected.pop("classifier")
    for part, other in zip(rows, pinned, strict=True):
        torch.testing.assert_close(torch.tensor(part), torch.tensor(other), rtol=1e-4, atol=1e-4)
    if step != "opened" and (rows != pinned or path.name == "tangents"):
        # The root covers the classifier's bits, and a text on how to load a model of tangents.
        del actual["root"], expected["root"]
    assert actual == expected


def assert_verified(path: Path) -> None:
    """Every claim of a registry holds."""
    findings = verify_registry(path)
    assert len(findings) > 10
    assert_hold(findings)


def assert_hold(findings: list[Any]) -> None:
    broken = [f for f in findings if not f.holds and not (f.holds is None and _is_fitted(f))]
    assert not broken, broken


def _is_fitted(finding: Any) -> bool:
    return finding.claim.startswith(FITTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_earlier_registry_opens_verifies_and_says_the_same(name, copy_of):
    path = copy_of(name)
    assert_verified(path)
    assert_facts(path, "opened")
    assert Registry(path).backbone.preprocessing.rule == 1
    said = CliRunner().invoke(app, ["list", "--registry", str(path)]).stdout
    assert "Pictures are resized as by earlier versions" in said


def test_an_earlier_receipt_is_valid(copy_of):
    path = copy_of("mixed")
    (receipt,) = (path / "removals").iterdir()
    findings = verify_record(receipt, registry=Registry(path))
    assert len(findings) > 5
    assert_hold(findings)


def test_an_earlier_contribution_is_added_and_composes_to_the_same_bits(copy_of):
    path = copy_of("mixed")
    Registry(path).add(GOLDEN / "eve", requested_by="eve")
    assert_facts(path, "added")
    assert_verified(path)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_client_leaves_an_earlier_registry_as_it_always_did(name, copy_of):
    path = copy_of(name)
    if "added" in EXPECTED[name]:
        Registry(path).add(GOLDEN / "eve", requested_by="eve")
    record = Registry(path).remove("ben", requested_by="ben", reason="Golden bits.")
    assert_facts(path, "removed")
    assert_verified(path)
    (receipt,) = (path / "removals").glob("*-ben.json")
    assert_hold(verify_record(receipt, registry=Registry(path)))
    statement = opened(record.text.encode(), source=str(receipt)).statement
    actual, expected = statement["predicate"], EXPECTED[name]["receipt"]
    expected = {k: v for k, v in expected.items() if k not in ("content", "format_version")}
    assert expected.keys() < actual.keys()
    covers_the_classifier = {"root_before", "root_after", "composition_before", "composition_after"}
    for part in expected.keys() - covers_the_classifier:
        assert actual[part] == expected[part], part


def test_no_command_loses_or_changes_an_option():
    """Commands, and options of `fedcompo` itself, may be added; a command is exactly as pinned."""
    actual = commands_of(typer.main.get_command(app))
    pinned = json.loads((GOLDEN / "commands.json").read_text())
    assert not pinned.keys() - actual.keys()
    assert pinned.pop("").items() <= actual.pop("").items()
    differing = {
        f"{command} {parameter}": (was.get(parameter), actual[command].get(parameter))
        for command, was in pinned.items()
        for parameter in was.keys() | actual[command].keys()
        if was.get(parameter) != actual[command].get(parameter)
    }
    assert not differing, "\n".join(
        f"{name}: pinned {was}, is {now}" for name, (was, now) in differing.items()
    )
