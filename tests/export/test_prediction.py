"""Predictions are those of plain timm: its own reading of the folder, its transform, its model."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from cli_runs import digits_registry, run, told
from PIL import ExifTags, Image
from registry_builders import registry_of, tangents
from timm.data import create_transform, resolve_model_data_config
from timm_folders import write_folder

from fedcompo.cli.common import VARIABLE
from fedcompo.composition.models import load_tangent_model
from fedcompo.errors import DataError
from fedcompo.export import prediction
from fedcompo.registry.registry import Registry

SIZES = [(8, 8), (40, 23), (5, 90), (1, 1), (64, 65)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return digits_registry(tmp_path_factory.mktemp("digits") / "registry")


@pytest.fixture
def home(original: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are given: a folder with pictures, some of them in folders."""
    for number, (width, height) in enumerate(SIZES):
        folder = tmp_path / "pictures" / ("ab"[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, str(original.path))
    return tmp_path


def colours(folder: Path) -> Path:
    """A folder as timm writes it, of colours, a crop and named classes."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3, init_values=1.0
    )
    torch.nn.init.normal_(model.head.weight)
    model.pretrained_cfg |= {"crop_pct": 0.8, "input_size": (3, 32, 32)}
    timm.models.save_for_hf(
        model,
        folder,
        model_config={"label_names": ["ant", "bee", "cow"]},
        model_args={"img_size": 32, "depth": 1, "init_values": 1.0},
        safe_serialization=True,
    )
    return folder


def by_timm(model: torch.nn.Module, files: list[Path], names: list[str]) -> list[dict]:
    """Slow and obvious: one picture after the other, all classes, the most probable first."""
    config = resolve_model_data_config(model)
    transform, mode = create_transform(**config), "L" if config["input_size"][0] == 1 else "RGB"
    rows = []
    for file in files:
        with torch.no_grad():
            shares = model(transform(Image.open(file).convert(mode))[None]).softmax(1)[0].tolist()
        rows += [
            {"file": str(file), "class": name, "probability": pytest.approx(share, abs=1e-6)}
            for share, name in sorted(zip(shares, names, strict=True), reverse=True)
        ]
    return rows


FOLDERS: dict[str, Callable[[Path], object]] = {
    "exported": lambda folder: run("export", "-o", folder),
    "grey, without names": write_folder,
    "colours": colours,
}


@pytest.mark.parametrize("made", FOLDERS)
@pytest.mark.parametrize("batch", [2, 64])
def test_a_folder_is_predicted_by_as_plain_timm_does(
    home: Path, made: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "BATCH", batch)
    FOLDERS[made](home / "model")
    model = timm.create_model(f"local-dir:{home / 'model'}", pretrained=True).eval()
    names = model.pretrained_cfg.get("label_names") or ["0", "1", "2"]
    found = told("predict", "pictures", "--model", "model", "--top", 99)
    files = [Path("pictures") / place for place in ("a/0.png", "a/2.png", "a/4.png")]
    files += [Path("pictures/b/1.png"), Path("pictures/b/3.png")]
    assert found == {"predictions": by_timm(model, files, names), "unreadable": {}}
    if made == "exported":
        assert told("predict", "pictures", "--top", 99) == found
    first = told("predict", "pictures", "--model", "model")["predictions"]
    assert first == found["predictions"][:: len(names)]
    assert len({row["class"] for row in first}) > 1 or made != "colours"


def test_a_composition_of_tangents_is_linearised(home: Path) -> None:
    registry_of(home / "registry", *tangents())
    run("export", "-r", "registry", "-o", "model")
    model, file = load_tangent_model("model"), Path("pictures/a/0.png")
    found = told("predict", file, "--model", "model", "--top", 4)
    expected = by_timm(model, [file], model.pretrained_cfg["label_names"])
    assert found["predictions"] == expected
    assert told("predict", file, "-r", "registry", "--top", 4) == found


def test_what_cannot_be_read_is_named_and_the_others_are_predicted(home: Path) -> None:
    odd = home / "pictures" / "odd"
    (odd / ".hidden").mkdir(parents=True)
    (odd / "Thumbs.db").write_bytes(b"no picture")
    (odd / "loop").symlink_to(home / "pictures")
    (odd / "empty.png").touch()
    (odd / "page.png").write_text("<html>")
    whole = (home / "pictures/a/4.png").read_bytes()
    (odd / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(odd / "wide.png")
    shown = run("predict", "pictures", "gone.png", "--csv", code=1)
    rows = list(csv.DictReader(io.StringIO(shown.stdout)))
    found = told("predict", "pictures", "gone.png", code=1)
    assert [row["file"] for row in rows] == [row["file"] for row in found["predictions"]]
    assert [float(row["probability"]) for row in rows] == [
        row["probability"] for row in found["predictions"]
    ]
    assert found["predictions"] == told("predict", "pictures/a", "pictures/b")["predictions"]
    reasons = {
        "pictures/odd/empty.png": "it is empty",
        "pictures/odd/page.png": "it is a web page",
        "pictures/odd/cut.png": "truncated",
        "pictures/odd/wide.png": "it has 16-bit integers, whose range is not known",
        "gone.png": "No such file",
    }
    assert found["unreadable"].keys() == reasons.keys()
    for file, reason in reasons.items():
        assert reason in found["unreadable"][file]
        assert f"{file} cannot be read: {found['unreadable'][file]}" in shown.stderr
    table = run("predict", "pictures/a/0.png", "pictures/a/0.png").stdout
    assert table.count("0.png") == 1
    assert f"{found['predictions'][0]['probability']:.4f}" in table
    assert "4.png" not in run("predict", "gone.png", code=1).stdout


def test_a_picture_is_turned_upright_as_in_training(home: Path) -> None:
    upright = Image.open("pictures/b/1.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright.rotate(90, expand=True).save("lying.png", exif=exif)
    one, other = told("predict", "pictures/b/1.png", "lying.png", "--top", 2)["predictions"][::2]
    assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX alone")
def test_names_of_files_come_out_as_the_bytes_they_are(home: Path) -> None:
    name = os.fsdecode(b"\xff,1.png")
    os.link("pictures/a/0.png", name)
    assert run("predict", name, "--csv").stdout_bytes.split(b"\n")[1].startswith(b'"\xff,1.png",')
    assert told("predict", name)["predictions"][0]["file"] == name
    assert "0.png" not in run("predict", name).stdout


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        ("pictures --csv --json", 2, "one of"),
        ("pictures --model pictures --registry R", 2, "one of"),
        ("pictures --model pictures", 2, "it needs the files config.json and model.safetensors"),
        ("pictures --top 0", 2, "top"),
        ("hollow", 1, "hold no file"),
        ("pictures --model broken", 1, "timm cannot load broken"),
        ("pictures --model diverged", 1, "holds infinity or NaN"),
        ("pictures --model misnamed", 1, "has 3 classes, but config.json names 2"),
    ],
)
def test_what_cannot_be_predicted_is_said_in_a_sentence(
    home: Path, options: str, code: int, reason: str
) -> None:
    (home / "hollow").mkdir()
    for name in ("broken", "diverged", "misnamed"):
        if name in options:
            write_folder(home / name)
    if "broken" in options:
        (home / "broken" / "model.safetensors").write_bytes(b"no weights")
    if "diverged" in options:
        model = timm.create_model(f"local-dir:{home}/diverged", pretrained=True)
        torch.nn.init.constant_(model.head.bias, float("nan"))
        timm.models.save_for_hf(model, home / "again", safe_serialization=True)
        (home / "again/model.safetensors").replace(home / "diverged/model.safetensors")
    if "misnamed" in options:
        config = home / "misnamed" / "config.json"
        config.write_text(config.read_text().replace("{", '{"label_names": ["a", "b"],', 1))
    assert reason in run("predict", *options.split(), code=code).stderr


def test_a_model_of_texts_predicts_no_pictures(home: Path) -> None:
    model = timm.create_model("byte_transformer_small", num_classes=2)
    with pytest.raises(DataError, match="The model reads texts"):
        prediction.predict(model, [home])
