"""A client without a federation leaves what a run leaves of it, bit for bit."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from app_runs import FEW_WEIGHTS, QUICK, run
from cli_runs import digits_registry
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from fedcompo.cli.app import app
from fedcompo.engine.alone import fit_alone
from fedcompo.errors import ConfigError, FedcompoError
from fedcompo.method.contribution import Contribution
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import CARD, FISHER

CLASSES, TRAINING, TEST = (3, 8), 16, 9


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A client's folder, of digits."""
    folder = tmp_path_factory.mktemp("data") / "newcomer"
    pixels, labels = load_digits(return_X_y=True)
    for digit in CLASSES:
        for index, row in enumerate(pixels[labels == digit][: TRAINING + TEST]):
            part = "train" if index < TRAINING else "test"
            path = folder / part / str(digit) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(row.reshape(8, 8) * 255 / 16).astype(np.uint8)).save(path)
    return folder


@pytest.mark.parametrize(
    "way",
    [
        pytest.param({}, id="as it is"),
        pytest.param(
            # By two blocks alone, the newcomer's Fisher is too large beside the members'.
            {"curvature": "exact", "head_start": "aligned", "wire": "int8", "backbone": "embedded"},
            id="with the joint head",
        ),
        pytest.param({"statistics": "mixtures", "kind": "full,ia3"}, id="kinds are dealt"),
    ],
)
def test_it_leaves_the_bits_of_a_newcomer_to_the_same_registry(
    images: Path, tmp_path: Path, way: dict[str, str]
) -> None:
    run({}, tmp_path / "first", **way)
    path = tmp_path / "first" / "registry"
    shutil.copytree(path, tmp_path / "joined", symlinks=True)
    nodes = {"clients": 1, "node_configs": {0: {"data": str(images), "client": "newcomer"}}}
    joining = {"registry": str(tmp_path / "joined"), "num_clients": 1}
    results = run(nodes, tmp_path / "second", **joining, **way)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}

    made = fit_alone(images, tmp_path / "made", {}, registry=path)

    joined = Registry(tmp_path / "joined")
    member = joined.path / joined.member("newcomer").folder
    there = {file.name: file.read_bytes() for file in member.iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()} == there
    assert {CARD, FISHER} < there.keys()
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    figures = results["per_client"]["newcomer"]
    assert made["own_task_accuracy"] == figures["own_task_accuracy"]
    Registry(path).add(tmp_path / "made")
    assert "newcomer" in Registry(path).clients


def test_a_shard_is_fitted_from_its_part_of_the_images(images: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("FEDCOMPO_STATE", str(tmp_path / "state"))
    few = {"shards": 2, "local-epochs": 1, "local-steps": 0, "target-weights": FEW_WEIGHTS}
    settings = {**few, "backbone": QUICK["backbone"], "aside": 0.0}
    made = fit_alone(images, tmp_path / "made", settings, client="ada.shard-1")
    assert (made["client"], made["num_examples"]) == ("ada.shard-1", 16)
    assert (tmp_path / "state/shards/ada.shards-2.csv").read_text().count("\n1,") == 16
    for client, shards in (("ada", 2), ("ada.shard-2", 2), ("ada.shard-0", 1)):
        with pytest.raises(ConfigError, match="shard by shard"):
            fit_alone(images, tmp_path / "o", {**settings, "shards": shards}, client=client)


def test_without_a_registry_a_command_fits_the_first_of_one(images: Path, tmp_path: Path) -> None:
    few = [f"--set={key}={QUICK[key]}" for key in ("local-epochs", "local-steps", "target-weights")]
    words = ["fit", "--data", str(images), "--client", "ada", "-o", str(tmp_path / "ada"), *few]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert not logging.getLogger("flwr").disabled
    said = " ".join(result.stdout.split())
    assert "Fitted ada (lora) to 32 images of 2 classes: 3, 8." in said
    assert "% of 18 test images" in said
    assert f"fedcompo add {tmp_path / 'ada'}" in said
    made = Contribution.open(tmp_path / "ada", check=True)
    assert (made.client, made.num_examples, made.lineage.anchored_by) == ("ada", 32, ())


@pytest.mark.parametrize(
    ("settings", "client", "message"),
    [
        ({"method": "iel"}, "ada", "--set method=ita"),
        ({}, "../ada", "name"),
        ({"min-images": 99}, "ada", "`min-images` is 99"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    settings: dict[str, str], client: str, message: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedcompoError, match=message):
        fit_alone(images, tmp_path / "out", settings, client=client)
    assert not (tmp_path / "out").exists()


def test_a_registry_keeps_its_backbone_and_a_member_its_name(images: Path, tmp_path: Path) -> None:
    path = digits_registry(tmp_path / "registry").path
    with pytest.raises(FedcompoError, match="has a backbone"):
        fit_alone(images, tmp_path / "out", {"checkpoint": "other.pth"}, registry=path)
    with pytest.raises(FedcompoError, match="replace=true"):
        fit_alone(images, tmp_path / "out", {}, registry=path, client="client-0")
    assert not (tmp_path / "out").exists()
