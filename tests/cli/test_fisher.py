"""`fedcompo fisher`: what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcompo.backbone.backbone import load_backbone
from fedcompo.cli.app import app
from fedcompo.config.choices import Curvature
from fedcompo.config.run import BackboneConfig
from fedcompo.training.probing import load_reference

runner = CliRunner()
FEW = ["fisher", "--data", "digits", "--set", "images-per-class=2", "--set", "fisher-examples=4"]


def test_it_writes_a_reference_for_the_backbone_and_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, [*FEW, "-o", "new/public.safetensors"])
    assert result.exit_code == 0, result.output
    assert "4 images of 10 classes, backbone embedded" in result.stdout
    assert str(tmp_path / "new" / "public.safetensors") in result.stdout
    base = load_backbone(BackboneConfig()).fingerprint
    fisher = load_reference(
        tmp_path / "new" / "public.safetensors", base=base, curvature=Curvature.FEATURES
    )
    assert fisher.num_examples == 4


def test_settings_of_a_scenario_hold_but_for_its_data(tmp_path: Path) -> None:
    scenario = tmp_path / "s.toml"
    scenario.write_text(
        'data = "folder:nowhere"\nfisher-examples = 3\nnum-tasks = 5\n'
        'target-weights = "blocks.0.attn.qkv.weight"\n'
    )
    arguments = [*FEW[:5], str(scenario), "-o", str(tmp_path / "r"), "--json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["file"] == str(tmp_path / "r")
    assert told["data"] == "digits"
    assert (told["classes"], told["num_examples"]) == (10, 3)
    fisher = load_reference(
        tmp_path / "r", base=told["base"], curvature=Curvature(told["curvature"])
    )
    assert set(fisher.sums) == {"blocks.0.attn.qkv.weight"}


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("mine")
    result = runner.invoke(app, [*FEW, "-o", str(tmp_path / "r")])
    assert result.exit_code == 2
    assert "is there already" in result.stderr
    assert (tmp_path / "r").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--data", "digits", "--set", "alpah=1"], 2, "Did you mean `alpha`?"),
        (["--data", "digist"], 1, "Did you mean 'digits'?"),
        (["--data", "folder:/nowhere"], 1, "/nowhere"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(
    arguments: list[str], code: int, reason: str, tmp_path: Path
) -> None:
    result = runner.invoke(app, ["fisher", *arguments, "-o", str(tmp_path / "r")])
    assert result.exit_code == code
    assert reason in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "r").exists()
