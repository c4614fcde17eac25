"""Manifests: a table of images, their classes, splits and clients."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import DataConfig
from fedcompo.data.client_data import client_names, load_client_data, load_folder
from fedcompo.data.sources.kinds import catalogue_of
from fedcompo.data.sources.labels import MULTI_LABEL
from fedcompo.errors import DataError
from fedcompo.report.pictures import JOINED

GREY = Preprocessing(image_size=4, channels=1, mean=(0.5,), std=(0.5,), interpolation="nearest")
COUNT = 12
LABELS = ["cat", "dog"] * 6
SITES = ["north"] * 6 + ["süd"] * 6


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images 0..11, each of its own value."""
    (tmp_path / "scans").mkdir()
    for number in range(COUNT):
        Image.new("L", (4, 4), number).save(tmp_path / f"scans/{number}.png")
    return tmp_path


def table(folder: Path, *, separator: str = ",", encoding: str = "utf-8", **columns: Any) -> str:
    """Write a manifest of all images; columns are lists of cells, None: left out."""
    whole = {"path": [f"scans/{i}.png" for i in range(COUNT)], "label": LABELS, **columns}
    whole = {name: cells for name, cells in whole.items() if cells is not None}
    lines = [separator.join(whole), *map(separator.join, zip(*whole.values(), strict=True))]
    path = folder / "list.csv"
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return f"manifest:{path}"


def values(images: Any) -> list[int]:
    return torch.as_tensor(images[:])[:, 0, 0, 0].tolist()


def refused(data: str) -> str:
    with pytest.raises(DataError) as caught:
        catalogue_of(data)
    return str(caught.value)


def test_without_clients_the_classes_are_dealt(images: Path):
    config = DataConfig(data=table(images), num_tasks=2)
    assert client_names(config) == ("client-0", "client-1")
    clients = [load_client_data(config, GREY, partition=n, seed=0) for n in range(2)]
    for client in clients:
        expected = [i for i in range(COUNT) if LABELS[i] == client.classes[0]]
        assert sorted(values(client.train.images) + values(client.test.images)) == expected
    assert {client.classes for client in clients} == {("cat",), ("dog",)}


def test_a_column_of_clients_makes_each_a_client_with_its_rows(images: Path):
    split = ["train", "train", "train", "train", "test", "test"] * 2
    config = DataConfig(data=table(images, client=SITES, split=split), num_tasks=99)
    assert client_names(config) == ("north", "süd")
    client = load_client_data(config, GREY, partition=1, seed=0)
    assert (client.name, client.classes) == ("süd", ("cat", "dog"))
    assert values(client.train.images) == [6, 8, 7, 9]
    assert values(client.test.images) == [10, 11]


def test_a_node_owns_its_rows_of_a_manifest(images: Path):
    path = table(images, client=SITES).removeprefix("manifest:")
    client = load_folder(path, GREY, seed=0, client="süd")
    assert (client.name, len(client.train.labels) + len(client.test.labels)) == ("süd", 6)
    with pytest.raises(DataError, match=r"of 2 clients, north, süd, and .* not known by 'west'"):
        load_folder(path, GREY, seed=0, client="west")
    whole = load_folder(path, GREY, seed=0, client=None)
    assert (whole.name, len(whole.train.labels) + len(whole.test.labels)) == ("list", COUNT)
    alone = table(images).removeprefix("manifest:")
    assert load_folder(alone, GREY, seed=0, client="west").name == "west"


def test_validation_rows_are_trained_on_where_there_are_test_rows(images: Path):
    split = ["Train", "training", "VAL", "dev", "test", "Test"] * 2
    config = DataConfig(data=table(images, split=split), num_tasks=1)
    client = load_client_data(config, GREY, partition=0, seed=0)
    assert values(client.test.images) == [4, 10, 5, 11]
    assert client.facts == {JOINED: 4}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_is_read_as_spreadsheets_write_it(images: Path, separator: str, encoding: str):
    data = table(
        images,
        separator=separator,
        encoding=encoding,
        path=None,
        label=None,
        **{"Image File": [f"scans\\{i}.png" for i in range(COUNT)], "Class": LABELS},
        note=['"a, b; c"'] * COUNT,
    )
    with Path(data.removeprefix("manifest:")).open("a") as file:
        file.write(separator * 2 + "\n")  # a row without cells
    catalogue = catalogue_of(data)
    assert catalogue.classes.tolist() == LABELS
    assert set(catalogue.columns) == {"note"}
    assert catalogue.columns["note"].tolist() == ["a, b; c"] * COUNT
    assert catalogue.describe(2) == f"line 4, {images}/scans/2.png (class 'cat')"


def test_parquet_is_read_alike(images: Path, monkeypatch: pytest.MonkeyPatch):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    paths = [f"scans/{i}.png" for i in range(COUNT)]
    columns = {"filename": paths, "target": [i % 2 for i in range(COUNT)], "site": SITES}
    parquet.write_table(arrow.table(columns), images / "list.parquet")
    data = f"manifest:{images / 'list.parquet'}"
    catalogue = catalogue_of(data)
    assert (catalogue.names, catalogue.describe(0)[:5]) == (("0", "1"), "row 1")
    assert catalogue.clients is not None
    assert catalogue.clients.tolist() == SITES
    nested = {"path": paths, "label": [["a", "b"]] * COUNT}
    parquet.write_table(arrow.table(nested), images / "list.parquet")
    assert MULTI_LABEL in refused(data)
    inside = {"image": [{"bytes": b"", "path": ""}] * COUNT, "label": LABELS}
    parquet.write_table(arrow.table(inside), images / "list.parquet")
    assert "holds images themselves (image), not their paths" in refused(data)
    (images / "list.parquet").write_bytes(b"PAR1")
    assert "cannot be read as a Parquet file" in refused(data)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'pip install "fedcompo[datasets]"' in refused(data)


def test_columns_are_chosen_where_their_names_do_not_tell(images: Path):
    data = table(images, label=None, finding=LABELS, stage=["I", "II"] * 6)
    assert "no column that is surely the label; columns found: 'path', 'finding'" in refused(data)
    assert catalogue_of(f"{data}#label=finding").names == ("cat", "dog")
    assert "Did you mean #label=finding?" in refused(f"{data}#label=findings")
    assert "Did you mean #label=stage?" in refused(f"{data}#labels=stage")
    data = table(images, path=None, image=["x"] * COUNT, file=["x"] * COUNT)
    assert "2 columns that may be the path: 'image', 'file'" in refused(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": ["cat", "", "nan", *LABELS[3:]]}, "2 of 12 images .*no label: line 3, line 4"),
        (
            {"label": ["cat|dog", *LABELS[1:]]},
            "1 of 12 .*several labels, such as line 2: 'cat|dog'",
        ),
        ({"label": ["'cat;dog'", *LABELS[1:]]}, ""),
        ({"label": ['"dog, cat"', *LABELS[1:]]}, "several labels, such as line 2: 'dog, cat'"),
        ({"label": ["['cat']", *LABELS[1:]]}, "several labels"),
        ({"path": ["scans/0.png"] * COUNT}, r"the labels 'cat' and 'dog' \(line 2, line 3\)"),
        (
            {"path": ["scans/0.png"] * COUNT, "label": ["cat"] * COUNT},
            "11 of 12 images .*listed twice: line 2 and line 3",
        ),
        (
            {"path": ["scans/x.png", "", *(f"scans/{i}.png" for i in range(2, COUNT))]},
            r"2 of 12 images .*no files: line 2 \('scans/x.png'\), line 3 \(''\)",
        ),
        ({"path": ["a text " * 50] * COUNT}, "12 of 12 images .*no files: line 2"),
        ({"split": ["train", "later", "", *["test"] * 9]}, "2 of 12 rows .*'later' in line 3"),
        ({"client": ["", *SITES[1:]]}, "1 of 12 rows .*name no client: line 2"),
        ({"client": ["a\x1bb", *SITES[1:]]}, "steers a terminal"),
        ({"label": None, "edema": ["0", "1"] * 6, "mass": ["1.0", ""] * 6}, "'edema', 'mass'"),
        ({"Path": SITES}, "2 columns that may be the path"),
        ({"note": ["a,b"] * COUNT}, "line 2, has 4 cells, expected 3"),
        ({"note": ['"a'] * COUNT}, "cannot be read as a table"),
    ],
)
def test_faults_are_refused_by_row(images: Path, changes: dict[str, Any], message: str):
    data = table(images, **changes)
    if not message:  # a separator in a label that is no other label says nothing
        assert "'cat;dog'" in catalogue_of(data).names
        return
    text = refused(data)
    assert re.search(message, text)
    assert str(images) in text


def test_several_labels_are_refused_with_what_they_would_need(images: Path):
    for changes in (
        {"label": ["cat|dog"] * COUNT},
        {"path": ["scans/0.png"] * COUNT},
        {"label": None, "edema": ["0", "1"] * 6, "mass": ["1", "1"] * 6},
    ):
        assert MULTI_LABEL in refused(table(images, **changes))
    assert "binary cross-entropy" in MULTI_LABEL


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", b"", "holds no rows; columns found: none"),
        ("list.csv", b"path,label\n", "holds no rows; columns found: 'path', 'label'"),
        ("list.csv", b"path,label,path\nx,y,z\n", "has the column 'path' twice"),
        ("list.csv", "path,label\nx,ä\n".encode("latin-1"), "as a table in UTF-8"),
        ("list.xlsx", b"", r"must be a table that ends in \.csv.*got '\.xlsx'"),
        ("missing.csv", None, r"missing\.csv cannot be read .*No such file"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, content: Any, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        catalogue_of(f"manifest:{tmp_path / name}")


def test_a_part_of_a_catalogue_has_a_version_of_its_own(images: Path):
    whole = catalogue_of(table(images, client=SITES))
    north, south = (whole.part(np.arange(6) + start) for start in (0, 6))
    assert len({whole.version, north.version, south.version}) == 3
    assert south.describe(0) == whole.describe(6)
    assert south.open(0) == whole.open(6)
