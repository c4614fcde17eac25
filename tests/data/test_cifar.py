"""CIFAR-100 from the network, with a stand-in for the library that fetches it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import DataConfig
from fedcompo.data.client_data import load_client_data
from fedcompo.errors import DataError

RGB = Preprocessing(image_size=4, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
CONFIG = DataConfig(data="cifar100", num_tasks=2)
NAMES = ["zebra", "ant", "cat", "dog"]
TRAIN, TEST = [0, 1, 2, 3] * 3, [3, 2, 1, 0]


def shown(label: int, *, test: bool) -> Image.Image:
    """An image that tells its label and its part."""
    return Image.new("RGB", (4, 4), (label, 200 if test else 100, 0))


class FlowerPart:
    """One part of a data set, as the Hugging Face hub's library gives it."""

    def __init__(self, labels: list[int], *, test: bool) -> None:
        self.labels, self.test = labels, test
        self.features = {"fine_label": SimpleNamespace(names=NAMES)}

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            return {"fine_label": self.labels}[key]
        return {"img": shown(self.labels[key], test=self.test)}


def flower(*, asked: dict[str, Any]) -> Any:
    module: Any = ModuleType("flwr_datasets")

    class FederatedDataset:
        def __init__(self, **options: Any) -> None:
            asked.update(options)

        def load_split(self, name: str) -> FlowerPart:
            return FlowerPart(TEST if name == "test" else TRAIN, test=name == "test")

    module.FederatedDataset = FederatedDataset
    return module


def check_both_clients() -> None:
    owned = []
    for partition in range(2):
        client = load_client_data(CONFIG, RGB, partition=partition, seed=0)
        owned += client.classes
        for split, mark, count in ((client.train, 100, 6), (client.test, 200, 2)):
            assert len(split.labels) == count
            assert split.images[:, 1].unique().tolist() == [mark]
            told = [NAMES[int(label)] for label in split.images[:, 0, 0, 0]]
            assert told == [client.classes[label] for label in split.labels]
    assert sorted(owned) == sorted(NAMES)


def test_flower_datasets_fetches_it(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "flwr_datasets", flower(asked=asked))
    check_both_clients()
    assert (asked["dataset"], asked["shuffle"]) == ("uoft-cs/cifar100", False)


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    module = flower(asked={})
    monkeypatch.setattr(module.FederatedDataset, "load_split", offline)
    monkeypatch.setitem(sys.modules, "flwr_datasets", module)
    with pytest.raises(DataError, match=r"(?s)unreachable.*Check the network.*npz:<path>"):
        load_client_data(CONFIG, RGB, partition=0, seed=0)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(DataError, match=r'pip install "fedcompo\[cifar\]"'):
        load_client_data(CONFIG, RGB, partition=0, seed=0)
