"""Drawn characters: the same for the same seed, one class unlike another, and read as data."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcompo.backbone.backbone import load_backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import DataConfig
from fedcompo.config.run import BackboneConfig
from fedcompo.data.client_data import load_client_data
from fedcompo.method.features import extract_features

SCRIPT = Path(__file__).resolve().parents[2] / "simulations" / "material" / "strokes.py"
GREY = Preprocessing(image_size=28, channels=1, mean=(0.5,), std=(0.5,))
TRAIN, TEST = 4, 2


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("strokes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["strokes"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def members(script):
    return script.draw_classes(8, (TRAIN, TEST), seed=0)


def command(script, monkeypatch, output: Path, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(output), *options])
    script.main()


def test_the_same_seed_draws_the_same_bits_and_another_seed_others(script, members):
    again = script.draw_classes(8, (TRAIN, TEST), seed=0)
    other = script.draw_classes(8, (TRAIN, TEST), seed=1)
    assert all(np.array_equal(members[name], again[name]) for name in members)
    assert not np.array_equal(members["images"], other["images"])


def test_more_classes_and_more_images_leave_the_others_as_they_are(script, members):
    more = script.draw_classes(9, (TRAIN + 1, TEST), seed=0)["images"].reshape(9, -1, 28, 28)
    fewer = members["images"].reshape(8, -1, 28, 28)
    assert np.array_equal(more[:8, :TRAIN], fewer[:, :TRAIN])
    assert np.array_equal(more[:8, TRAIN + 1 :], fewer[:, TRAIN:])


def test_no_two_images_agree(members):
    assert len({image.tobytes() for image in members["images"]}) == len(members["images"])


def test_strokes_are_light_on_a_dark_ground_and_within_the_picture(members):
    images = members["images"]
    assert images.dtype == np.uint8 and images.shape == (8 * (TRAIN + TEST), 28, 28)
    assert np.median(images, axis=(1, 2)).max() < 40
    assert (images > 150).mean((1, 2)).min() > 0.02
    frame = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]])
    assert (frame > 150).mean() < 0.05


def test_to_the_embedded_backbone_classes_differ_more_than_the_images_of_one(members):
    images = torch.from_numpy(members["images"])[:, None]
    features = extract_features(load_backbone(BackboneConfig()).forward({}), images)
    distances = torch.cdist(features, features)
    labels = torch.from_numpy(members["labels"])
    same = labels[:, None] == labels
    within = distances[same & ~torch.eye(len(labels), dtype=torch.bool)].mean()
    assert distances[~same].mean() > 1.15 * within


@pytest.mark.parametrize("curved", [False, True])
def test_a_stroke_goes_from_its_first_point_to_its_last_one(script, curved):
    points = np.array([[0.0, 0.1], [0.9, 0.4], [0.3, 1.0]])
    line = script._along(script.Stroke(points, curved))
    assert np.allclose(line[[0, -1]], points[[0, -1]])
    middle = line[script.SEGMENTS // 2]
    t = 0.5  # Bernstein's form of the same curve; a polyline is at its corner
    bezier = (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]
    assert np.allclose(middle, bezier if curved else points[1])


def test_the_command_writes_what_clients_load_and_the_same_bytes_twice(
    script, monkeypatch, tmp_path: Path
):
    output, again = tmp_path / "new" / "tasks.npz", tmp_path / "again.npz"
    options = ["--classes", "6", "--train", "3", "--test", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, output, *options],
        cwd=SCRIPT.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "6/6 classes" in done.stdout
    assert [path.name for path in output.parent.iterdir()] == ["tasks.npz"]
    source = DataConfig(data=f"npz:{output}", num_tasks=3)
    clients = [load_client_data(source, GREY, partition=i, seed=0) for i in range(3)]
    assert len({name for client in clients for name in client.classes}) == 6
    for client in clients:
        assert client.train.images.shape == (6, 1, 28, 28)
        assert client.test.labels.tolist() == [0, 1]
    command(script, monkeypatch, again, *options)  # in another process
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("tasks.npy", (), "must end in .npz"),
        ("tasks.npz", ("--classes", "0"), "--classes must be at least 1, got 0"),
        ("tasks.npz", ("--test", "-1"), "--test must be at least 1, got -1"),
        ("tasks.npz", ("--seed", "-1"), "--seed must be at least 0, got -1"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    script, monkeypatch, tmp_path: Path, output, options, message
):
    with pytest.raises(SystemExit, match=re.escape(message)):  # printed, and no success
        command(script, monkeypatch, tmp_path / output, *options)
    assert not list(tmp_path.iterdir())
