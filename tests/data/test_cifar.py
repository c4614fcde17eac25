"""CIFAR-100 from the network, with stand-ins for the libraries that fetch it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.run import DataConfig
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


def torchvision(*, downloads: list[Path]) -> Any:
    module: Any = ModuleType("torchvision.datasets")

    class CIFAR100:
        base_folder = "cifar-100-python"
        classes = NAMES

        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            folder = Path(root) / self.base_folder
            if download:
                folder.mkdir()
                (folder / "train").touch()
                downloads.append(folder)
            if not (folder / "train").is_file():
                raise RuntimeError("Dataset not found or corrupted.")
            self.train, self.targets = train, TRAIN if train else TEST

        def __getitem__(self, row: int) -> tuple[Image.Image, int]:
            label = self.targets[row]
            return shown(label, test=not self.train), label

    module.CIFAR100 = CIFAR100
    return module


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Torchvision is installed, Flower Datasets is not."""
    fetched: list[Path] = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", torchvision(downloads=fetched))
    return fetched


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


def test_flower_datasets_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "flwr_datasets", flower(asked=asked))
    check_both_clients()
    assert (asked["dataset"], asked["shuffle"]) == ("uoft-cs/cifar100", False)


def test_torchvision_serves_otherwise_and_fetches_once(downloads: list[Path]):
    check_both_clients()
    assert len(downloads) == 1


def test_a_client_that_fetches_at_the_same_time_does_no_harm(
    downloads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    library = sys.modules["torchvision.datasets"]
    start = library.CIFAR100.__init__

    def overtaken(self: Any, root: str, train: bool = True, download: bool = False) -> None:
        start(self, root, train, download)
        if download:
            kept = tmp_path / "fedcompo/cifar-100-python"
            kept.mkdir()
            (kept / "train").touch()

    monkeypatch.setattr(library.CIFAR100, "__init__", overtaken)
    check_both_clients()
    assert [path.name for path in (tmp_path / "fedcompo").iterdir()] == ["cifar-100-python"]


def test_a_damaged_copy_is_refused_by_name(downloads: list[Path], tmp_path: Path):
    (tmp_path / "fedcompo/cifar-100-python").mkdir(parents=True)
    with pytest.raises(DataError, match="cifar-100-python is damaged; delete it"):
        load_client_data(CONFIG, RGB, partition=0, seed=0)
    assert not downloads


def test_without_a_network_the_error_says_what_to_do(
    downloads: list[Path], monkeypatch: pytest.MonkeyPatch
):
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(sys.modules["torchvision.datasets"].CIFAR100, "__init__", offline)
    with pytest.raises(DataError, match=r"(?s)unreachable.*Check the network.*npz:<path>"):
        load_client_data(CONFIG, RGB, partition=0, seed=0)


def test_without_a_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match=r'pip install "fedcompo\[cifar\]"'):
        load_client_data(CONFIG, RGB, partition=0, seed=0)


def test_the_installed_torchvision_has_what_is_used_of_it():
    library = pytest.importorskip("torchvision.datasets")
    assert library.CIFAR100.base_folder == "cifar-100-python"
