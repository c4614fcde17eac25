"""Hugging Face data sets: from folders, and from the hub with a stand-in for the network."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import DataConfig
from fedcompo.data.client_data import load_client_data, load_folder
from fedcompo.data.sources import hugging_face
from fedcompo.data.sources.kinds import catalogue_of
from fedcompo.errors import DataError
from fedcompo.report.pictures import STAND_IN

datasets = pytest.importorskip("datasets")
RGB = Preprocessing(image_size=4, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
NAMES = ["zebra", "ant", "cat", "dog"]


def rows(labels: list[Any], *, mark: int, label: Any = None, **columns: Any) -> Any:
    """A part whose images tell their label and their part."""
    contents = []
    for value in labels:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (value if isinstance(value, int) else 9, mark, 0)).save(
            file, "PNG"
        )
        contents.append({"bytes": file.getvalue(), "path": None})
    features = {"image": datasets.Image(), "label": label or datasets.ClassLabel(names=NAMES)}
    made = {"image": contents, "label": labels} | columns
    features |= {name: datasets.Value("string") for name in columns}
    return datasets.Dataset.from_dict(made, features=datasets.Features(features))


def parts(**names: str) -> Any:
    """Twelve images for training, four for testing, with a column of their sites."""
    whole = {
        names.get("train", "train"): rows([0, 1, 2, 3] * 3, mark=100, site=["n", "s"] * 6),
        names.get("test", "test"): rows([3, 2, 1, 0], mark=200, site=["n"] * 4),
    }
    return datasets.DatasetDict(whole)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    hugging_face.hub_catalogue.cache_clear()
    yield
    hugging_face.hub_catalogue.cache_clear()


def check_both_clients(data: str) -> None:
    owned = []
    for partition in range(2):
        client = load_client_data(
            DataConfig(data=data, num_tasks=2), RGB, partition=partition, seed=0
        )
        owned += client.classes
        for split, mark, count in ((client.train, 100, 6), (client.test, 200, 2)):
            assert len(split.labels) == count
            images = split.images[:]
            assert images[:, 1].unique().tolist() == [mark]
            told = [NAMES[int(label)] for label in images[:, 0, 0, 0]]
            assert told == [client.classes[label] for label in split.labels]
    assert sorted(owned) == sorted(NAMES)


def test_what_save_to_disk_wrote_is_dealt_by_class(tmp_path: Path):
    parts().save_to_disk(tmp_path / "saved")
    check_both_clients(f"hf:{tmp_path / 'saved'}")
    assert len(load_folder(tmp_path / "saved", RGB, seed=0).train.labels) == 12  # a node's own


@pytest.mark.parametrize("name", ["data/{}-00000-of-00001.parquet", "{}/0000.parquet"])
def test_parquet_files_are_read_as_the_hub_calls_them(tmp_path: Path, name: str):
    for part, content in parts().items():
        file = tmp_path / "set" / name.format(part)
        file.parent.mkdir(parents=True, exist_ok=True)
        content.to_parquet(file)
    check_both_clients(f"hf:{tmp_path / 'set'}")


def test_a_table_without_parts_draws_its_test_images_and_keeps_its_columns(tmp_path: Path):
    parts()["train"].save_to_disk(tmp_path / "one")
    catalogue = catalogue_of(f"hf:{tmp_path / 'one'}")
    assert catalogue.is_test is None
    assert catalogue.columns["site"].tolist() == ["n", "s"] * 6
    assert catalogue.describe(1) == "row 1 of 'train' (class 'ant')"
    version = catalogue.version
    rows([0, 1], mark=1).save_to_disk(tmp_path / "one")
    changed = catalogue_of(f"hf:{tmp_path / 'one'}")
    assert (len(changed.classes), changed.version != version) == (2, True)


def test_parts_are_known_by_name_or_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    whole = parts(test="validation")
    whole["extra"] = rows([0], mark=7, site=["n"])
    whole.save_to_disk(tmp_path / "saved")
    place = f"hf:{tmp_path / 'saved'}"
    catalogue = catalogue_of(place)
    assert (len(catalogue.classes), catalogue.marks[STAND_IN].sum()) == (16, 4)
    assert "parts that are not read: 'extra'" in caplog.text
    chosen = catalogue_of(f"{place}#train=validation,test=extra")
    assert chosen.is_test is not None
    assert chosen.is_test.tolist() == [False] * 4 + [True]
    with pytest.raises(DataError, match=r"has the parts .*expected 'train', 'tests'"):
        catalogue_of(f"{place}#test=tests")


def test_columns_are_found_by_type_and_what_is_ambiguous_is_asked_for(tmp_path: Path):
    part = parts()["train"]
    part = part.add_column("coarse", [0, 1] * 6).cast_column(
        "coarse", datasets.ClassLabel(names=["wild", "tame"])
    )
    part.save_to_disk(tmp_path / "saved")
    place = f"hf:{tmp_path / 'saved'}"
    with pytest.raises(DataError, match="2 columns that may be the label: 'label', 'coarse'"):
        catalogue_of(place)
    assert catalogue_of(f"{place}#label=coarse").names == ("tame", "wild")
    assert catalogue_of(f"{place}#label=site").names == ("n", "s")
    with pytest.raises(DataError, match=r"no column 'coarce'.*Did you mean #label=coarse"):
        catalogue_of(f"{place}#label=coarce")
    with pytest.raises(DataError, match=r"#labl=site.*Did you mean #label=site"):
        catalogue_of(f"{place}#labl=site")
    with pytest.raises(DataError, match="'site' is no column of images"):
        catalogue_of(f"{place}#image=site,label=label")


def test_rows_without_a_label_or_with_several_are_refused(tmp_path: Path):
    rows([0, -1, None, 2], mark=1).save_to_disk(tmp_path / "none")
    with pytest.raises(DataError, match=r"2 of 4 images .*no label: row 1 of 'train', row 2"):
        catalogue_of(f"hf:{tmp_path / 'none'}")
    several = datasets.List(datasets.ClassLabel(names=NAMES))
    rows([[0], [1, 2]], mark=1, label=several).save_to_disk(tmp_path / "several")
    with pytest.raises(DataError, match=r"lists labels. Several labels an image are not supported"):
        catalogue_of(f"hf:{tmp_path / 'several'}#label=label")


def test_parts_need_the_same_label_and_share_other_columns(tmp_path: Path):
    whole = parts()
    whole["test"] = whole["test"].remove_columns("site")
    whole.save_to_disk(tmp_path / "saved")
    assert not catalogue_of(f"hf:{tmp_path / 'saved'}").columns
    whole["test"] = whole["test"].remove_columns("label")
    whole.save_to_disk(tmp_path / "bare")
    with pytest.raises(DataError, match=r"the part 'test' has no column 'label'.*#test=<part>"):
        catalogue_of(f"hf:{tmp_path / 'bare'}")


def test_what_is_no_data_set_is_refused(tmp_path: Path):
    for place, reason in ((tmp_path, "it holds neither"), (tmp_path / "no", "no such folder")):
        with pytest.raises(DataError, match=f"{reason}.*`save_to_disk`, or of Parquet"):
            catalogue_of(f"hf:{place}")


def test_cifar100_is_a_name_for_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch):
    def fetch(name: str, config: str | None) -> Any:
        assert (name, config) == ("uoft-cs/cifar100", None)
        return parts().rename_columns({"image": "img", "label": "fine_label"})

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    check_both_clients("cifar100")


def test_without_a_network_or_the_library_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
):
    def offline(*_: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"(?s)unreachable.*the network.*save_to_disk.*hf:<folder>"):
        catalogue_of("hf:somebody/birds")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "fedcompo\[datasets\]"'):
        catalogue_of("cifar100")


def test_images_are_read_as_files_so_that_nothing_is_decoded_before(tmp_path: Path):
    parts()["test"].save_to_disk(tmp_path / "saved")
    content = catalogue_of(f"hf:{tmp_path / 'saved'}").open(3)
    assert isinstance(content, bytes)
    assert np.asarray(Image.open(io.BytesIO(content)))[0, 0].tolist() == [0, 200, 0]
