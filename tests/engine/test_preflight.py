"""What cannot be used is refused before anything starts, with what to do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fedcompo.backbone.backbone import load_backbone
from fedcompo.cli.app import app
from fedcompo.config.run import RunConfig
from fedcompo.data.checks import check_examples
from fedcompo.data.client_data import folder_share
from fedcompo.engine import launcher, resources, simulation
from fedcompo.engine.estimate import STARTS, Amount, Estimate, Pace, estimate
from fedcompo.engine.preflight import look
from fedcompo.method.deltas import new_deltas
from fedcompo.report.preflight import lines_on

runner = CliRunner()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clients, each with two classes of 12 pictures; the first six of each are for testing."""
    home, draw = tmp_path_factory.mktemp("made"), np.random.RandomState(0)
    for client, classes in (("ada", ("cat", "dog")), ("bob", ("emu", "fox"))):
        for name in classes:
            for i in range(18):
                folder = home / client / ("test" if i < 6 else "train") / name
                folder.mkdir(parents=True, exist_ok=True)
                pixels = draw.randint(0, 255, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.jpg")
    return home


@pytest.fixture
def images(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, in the working directory; whatever would start a run fails the test."""

    def started(*_: object, **__: object) -> None:
        pytest.fail("something was started")

    monkeypatch.setattr(launcher.Simulation, "run", started)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(made, tmp_path / "images"))


def shard_like(images: Path) -> None:
    (images / "bob").rename(images / "ada.shard-1")


def empty_class(images: Path) -> None:
    for file in (images / "bob" / "train" / "fox").iterdir():
        file.unlink()


def no_picture(images: Path) -> None:
    (images / "bob" / "train" / "fox" / "note.jpg").write_text("hello")


def cut_short(images: Path) -> None:
    file = next((images / "bob" / "train" / "fox").iterdir())
    file.write_bytes(file.read_bytes()[:-200])


def no_bytes(images: Path) -> None:
    (images / "bob" / "test" / "fox" / "void.jpg").write_bytes(b"")


def no_layout(images: Path) -> None:
    shutil.rmtree(images / "bob" / "train")


def bad_name(images: Path) -> None:
    (images / "bob").rename(images / "-bob")


def texts(images: Path) -> None:
    lines = [json.dumps({"text": f"text {i}", "label": str(i % 8)}) for i in range(40)]
    (images.parent / "t.jsonl").write_text("\n".join(lines))


def alike(images: Path) -> None:
    (images / "bob").rename(images / "Ada")


@pytest.mark.parametrize(
    ("spoil", "words", "said"),
    [
        (empty_class, [], "class 'fox' is empty"),
        (no_picture, [], "fox/note.jpg (class 'fox'): Pillow knows no such picture"),
        (cut_short, [], "size (30, 40): image file is truncated"),
        (no_bytes, [], "fox/void.jpg (class 'fox'): it is empty (0 bytes)"),
        (no_layout, [], "Client 'bob'"),
        (bad_name, [], "'-bob' cannot be a client's name"),
        (alike, [], "could be mistaken for"),
        (None, ["--set", "min-images=12"], "'cat' 11"),
        (None, ["--set", "backbone=vit_tiny_patch16_224", "--set", "checkpoint=no.pth"], "no.pth"),
        (None, ["--set", "backbone=vit_tyni"], "timm knows no model 'vit_tyni'"),
        (texts, ["--set", "data=text:t.jsonl"], "holds texts, but the backbone reads pictures"),
        (None, ["--set", "image-size=30"], "multiple of the"),
        (None, ["--set", "anchor=reference", "--set", "reference=no.bin"], "no.bin"),
        (None, ["--set", "num-clients=3"], "`num-clients` asks for 3 clients"),
        (None, ["--set", "shards=13"], "allow 12 shard(s)"),
        (shard_like, [], "names a shard of the client 'ada'"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_starts(
    images: Path, spoil: Any, words: list[str], said: str
) -> None:
    if spoil:
        spoil(images)
    code = 2 if "num-clients=3" in words else 1
    result = runner.invoke(app, ["simulate", "--set", "data=folder:images", *words])
    assert result.exit_code == code, result.output
    assert said in " ".join(result.output.split())
    assert not Path("runs").exists()


def test_a_client_s_own_folder_is_checked_where_it_is(images: Path) -> None:
    result = runner.invoke(app, ["check", "--data", "images/ada", "--json"])
    said = json.loads(result.stdout)
    assert (result.exit_code, said["usable"], said["faults"]) == (0, True, [])
    ada = said["clients"]["ada"]
    assert ada["classes"] == {"cat": [12, 6], "dog": [12, 6]}
    files = [file for file in (images / "ada").rglob("*") if file.is_file()]
    assert ada["size"] == sum(len(file.read_bytes()) for file in files)
    assert ada["headers"] == ada["read"] == len(files) == 36
    assert said["estimate"]["sent"] > 0
    no_picture(images)
    for more in ([], ["--json"], ["--full"]):
        result = runner.invoke(app, ["check", "--data", "images/bob", *more])
        assert result.exit_code == 1
        assert "note.jpg" in result.stdout


def test_a_deployed_client_needs_eight_images_of_a_class_and_a_simulated_one_does_not(
    images: Path,
) -> None:
    for file in sorted((images / "ada" / "train" / "cat").iterdir())[6:]:
        file.unlink()
    alone = look(RunConfig.parse({}), own=str(images / "ada"))
    assert "'cat' 5; `min-images` is 8" in alone.faults[0]
    assert not look(RunConfig.parse({"data": f"folder:{images}"})).faults
    scenario = images.parent / "own.toml"
    scenario.write_text("min-images = 5\n")
    result = runner.invoke(app, ["check", "--data", "images/ada", "--scenario", str(scenario)])
    assert result.exit_code == 0, result.stdout


def test_without_data_there_is_nothing_to_check() -> None:
    result = runner.invoke(app, ["check"])
    assert result.exit_code == 2
    assert "--data" in result.output


def test_twins_are_noted_and_stop_nothing(images: Path) -> None:
    for part in ("train", "test"):
        (images / "bob" / part / "fox").rename(images / "bob" / part / "Cat ")
    found = look(RunConfig.parse({"data": f"folder:{images}"}), seconds=math.inf)
    assert not found.faults
    assert "'Cat '" in found.notes[0]
    assert "'cat' (ada)" in found.notes[0]
    lines = [*lines_on(found.values())]
    assert lines[0] == "2 client(s): 4 classes, 48 images to train on and 24 to test on"
    assert "(estimates)" in lines[1]


def test_a_client_that_is_left_out_is_not_looked_at(images: Path) -> None:
    empty_class(images)
    values = {"data": f"folder:{images}", "exclude": "bob"}
    assert [*look(RunConfig.parse(values)).clients] == ["ada"]


def test_pixels_of_many_bits_are_no_fault(images: Path) -> None:
    wide = np.arange(1200, dtype=np.uint16).reshape(40, 30) * 50
    home = images / "ada" / "train" / "cat"
    Image.fromarray(wide).save(home / "wide.png")
    Image.frombytes("I;16B", (30, 40), wide.astype(">u2").tobytes()).save(home / "big.tif")
    Image.fromarray(wide.astype(np.float32)).save(home / "float.tif")
    found = look(RunConfig.parse({}), own=str(images / "ada"), seconds=math.inf)
    assert not found.faults
    assert found.clients["ada"]["read"] == 39


def test_without_time_nothing_is_read_but_every_file_is_looked_up(images: Path) -> None:
    (images / "ada" / "train" / "cat" / "06.jpg").unlink()
    (images / "ada" / "train" / "cat" / "06.jpg").symlink_to(images / "gone.jpg")
    checked = check_examples(folder_share(images / "ada", seed=0), None, seconds=0.0)
    assert (checked.headers, checked.read, checked.seconds) == (0, 0, 0)
    assert "06.jpg (class 'cat'): No such file" in next(iter(checked.faults.values()))


def test_of_too_many_clients_it_is_said_how_many_were_looked_at(images: Path) -> None:
    found = look(RunConfig.parse({"data": f"folder:{images}"}), longest=0.0)
    assert [*found.clients] == ["ada"]
    assert next(lines_on(found.values())).startswith("1 client(s) of 2 were looked at: 2 classes")
    assert "looks at all clients" in found.notes[0]
    assert found.estimate


def test_a_wrong_path_and_a_folder_of_several_clients_are_called_that(images: Path) -> None:
    for data, said in (
        ("imges", "There is no such file or folder"),
        ("images", "`--data folder:images`"),
    ):
        assert said in " ".join(runner.invoke(app, ["check", "--data", data]).stdout.split())


def test_no_more_clients_work_at_a_time_than_there_are(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "_cpus", lambda: 64)
    said = runner.invoke(app, ["check", "--data", "folder:images"]).stdout
    assert "for each of 2 at a time" in " ".join(said.split())


def test_whoever_wants_to_start_anyway_can(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_class(images)
    monkeypatch.setattr(simulation, "reserve_output", lambda wanted: wanted)
    settings = {"data": f"folder:{images}"}
    assert simulation.prepare(settings, name="x", check=False).preflight == {}
    assert simulation.prepare({}, name="x").preflight == {}  # what comes with fedcompo works


def test_bytes_and_seconds_are_those_of_a_run_that_was_measured() -> None:
    """Of the default run, two at a time on two cores: 20 s beside the start of Flower's engine."""
    backbone, config = load_backbone(RunConfig().backbone), RunConfig()
    measured = Pace(forward=0.0008, fisher=0.006, step=0.0023, resident=10**9)
    amounts = [Amount(train=270, aside=27, test=90, classes=2, rate=9000.0)] * 5
    made = estimate(backbone, config, measured, amounts, classes=10, at_once=2)
    assert made.sent == pytest.approx(554_168, rel=0.1)
    assert made.received == pytest.approx(14_262_976, rel=0.01)
    assert made.disk == pytest.approx(22_859_083, rel=0.2)
    assert made.seconds - STARTS == pytest.approx(20, rel=0.2)


@pytest.mark.parametrize("kind", ["full", "lora", "ia3"])
def test_a_task_vector_is_sent_in_the_numbers_of_its_kind(kind: str) -> None:
    backbone = load_backbone(RunConfig().backbone)
    some = {"kind": kind, "realign": False, "fisher-form": "none", "scale": 1.0, "wire": "float32"}
    amounts = [Amount(10, 0, 5, 2, 100.0)]
    made = estimate(
        backbone,
        RunConfig.parse(some),
        Pace(0, 0, 0, 0),
        amounts,
        classes=2,
        at_once=1,
        starts=False,
    )
    draw, theta_0 = torch.Generator(), backbone.theta_0
    deltas = new_deltas(kind, theta_0, rank=8, generator=draw)  # type: ignore[arg-type]
    vector = sum(4 * p.numel() for delta in deltas.values() for p in delta.parameters())
    width = backbone.num_features
    sums, head = 4 * (2 * width + width * (width + 1) // 2), 4 * 2 * (width + 1)
    assert made.sent == vector + sums + head
    assert isinstance(made, Estimate)


def test_texts_are_checked_without_the_backbone_that_nobody_named(images: Path) -> None:
    texts(images)
    result = runner.invoke(app, ["check", "--data", "t.jsonl", "--json", "--set", "min-images=1"])
    said = json.loads(result.stdout)
    assert (result.exit_code, said["faults"], said["estimate"]) == (0, [], None)
    assert "name the run's by --scenario" in said["notes"][0]
    named = ["--set", "backbone=embedded", "--set", "image-size=56"]
    assert runner.invoke(app, ["check", "--data", "t.jsonl", *named]).exit_code == 1


def test_a_source_of_several_clients_is_one_s_own_where_its_name_is_given(images: Path) -> None:
    rows = ["path,label,client"]
    rows += [
        f"images/{f.relative_to(images)},{f.parent.name},{f.relative_to(images).parts[0]}"
        for f in sorted(images.rglob("*.jpg"))
    ]
    (images.parent / "list.csv").write_text("\n".join(rows))
    own = runner.invoke(app, ["check", "--data", "list.csv", "--client", "ada", "--json"])
    all_of_them = runner.invoke(app, ["check", "--data", "manifest:list.csv", "--json"])
    assert [*json.loads(own.stdout)["clients"]] == ["ada"]
    assert [*json.loads(all_of_them.stdout)["clients"]] == ["ada", "bob"]
    (images / "bob" / "train" / "fox" / "07.jpg").write_bytes(b"no picture")
    again = runner.invoke(app, ["check", "--data", "manifest:list.csv"])
    assert again.exit_code == 1
    assert "07.jpg" in again.output


def test_what_a_source_logs_is_noted_once(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    (images / "ada" / "spare").mkdir()
    found = look(RunConfig.parse({"data": f"folder:{images}"}))
    assert "not read: 'spare'" in found.notes[0] or "not read: spare" in found.notes[0]
    assert len(found.notes) == 1
    assert not caplog.records
