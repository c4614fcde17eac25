"""Texts in one file: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.choices import Modality
from fedcompo.config.data import DataConfig
from fedcompo.data.client_data import ClientData, load_client_data
from fedcompo.data.sources.text import text_catalogue
from fedcompo.errors import DataError
from fedcompo.report.pictures import STAND_IN

LENGTH = 12
TEXTS = Preprocessing(LENGTH, 1, mean=(0.0,), std=(1 / 255,), modality=Modality.TEXTS)
PICTURES = Preprocessing(LENGTH, 1, mean=(0.5,), std=(0.5,))
NAMES = ("ant", "bee", "cat", "dog", "emu", "fox")


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Six classes of five texts, the last of each for testing; changes are made to all of them."""
    made = [
        {
            "text": f"{name} {place}",
            "label": name,
            "split": "test" if place == 4 else "train",
            **changes,
        }
        for place in range(5)
        for name in NAMES
    ]
    return [{key: value for key, value in row.items() if value is not None} for row in made]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(row) + "\n" for row in content)
    return path


def load(
    path: Path, *, partition: int = 0, tasks: int = 3, preprocessing: Preprocessing = TEXTS
) -> ClientData:
    source = DataConfig(data=f"text:{path}", num_tasks=tasks)
    return load_client_data(source, preprocessing, partition=partition, seed=0)


def decoded(data: ClientData, part: str) -> list[tuple[str, str]]:
    """The texts of a client and their classes, as they were before they became bytes."""
    split = getattr(data, part)
    texts = [bytes(row.flatten().tolist()).rstrip(b"\0").decode() for row in split.images]
    return [(text, data.classes[label]) for text, label in zip(texts, split.labels, strict=True)]


def test_all_clients_together_hold_each_text_once_under_its_class(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", rows())
    clients = [load(path, partition=partition) for partition in range(3)]
    for part in ("train", "test"):
        found = [pair for client in clients for pair in decoded(client, part)]
        expected = [(row["text"], row["label"]) for row in rows() if row["split"] == part]
        assert sorted(found) == sorted(expected)
    assert clients[0].train.images.shape == (8, 1, 1, LENGTH)


@pytest.mark.parametrize("text", ["two\nlines", "a\ttab", 'a "quote"', "naïve ☃", "  indented"])
def test_a_text_is_read_to_the_letter(tmp_path: Path, text: str):
    path = write(tmp_path / "data.jsonl", rows(text=text))
    assert {found for found, _ in decoded(load(path), "train")} == {text}


def test_a_text_is_cut_at_the_length_that_the_backbone_reads(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", rows(text="abcdefghijklmnopq"))
    assert decoded(load(path), "test")[0][0] == "abcdefghijkl"


def test_without_a_split_a_fifth_of_each_class_is_drawn(tmp_path: Path):
    client = load(write(tmp_path / "data.jsonl", rows(split=None)))
    assert np.bincount(client.test.labels).tolist() == [1, 1]
    assert not set(decoded(client, "train")) & set(decoded(client, "test"))


def test_blank_lines_and_a_byte_order_mark_do_not_count(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", rows())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\n\n"))
    assert len(decoded(load(path, tasks=1), "train")) == 24


def test_names_are_brought_into_composed_unicode(tmp_path: Path):
    content = [{**row, "label": row["label"] + "e\u0301"} for row in rows()]
    client = load(write(tmp_path / "data.jsonl", content), tasks=1)
    assert client.classes == tuple(f"{name}\u00e9" for name in NAMES)


def test_texts_stay_on_disk_until_they_are_asked_for(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", rows(text="naïve ☃"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    catalogue = text_catalogue(path)
    assert catalogue.in_memory == 0
    assert {catalogue.open(index) for index in range(30)} == {"naïve ☃".encode()}
    path.unlink()
    with pytest.raises(FileNotFoundError):
        catalogue.open(0)


def test_validation_texts_are_test_texts_where_there_are_no_others(tmp_path: Path):
    content = [{**row, "split": "val" if row["split"] == "test" else "train"} for row in rows()]
    client = load(write(tmp_path / "data.jsonl", content), tasks=1)
    assert (len(client.train.labels), len(client.test.labels)) == (24, 6)
    assert client.facts[STAND_IN] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, r"line 2, must have `text`, a text; its fields are label, split"),
        ({"label": None}, r"line 2, must have `label`, a text; its fields are text, split"),
        ({"text": 7}, "must have `text`, a text; got 7"),
        ({"label": ["a"]}, r"line 2, lists labels, \['a'\].*Several labels .* are not supported"),
        ({"label": 7}, "must have `label`, a text; got 7"),
        ({"label": " "}, "line 2 is empty"),
        ({"text": " \n"}, "line 2, is empty"),
        ({"text": "a\0b"}, "line 2, holds a NUL character"),
        ({"text": "\ud800"}, "line 2, is no valid Unicode"),
        (
            {"split": "later"},
            "split of 1 of 30 rows in .*unknown, such as 'later' in text 2",
        ),
        ({"split": None}, "such as '' in text 2. Expected one of train, .*, in all rows or none"),
    ],
)
def test_a_fault_is_refused_by_line(tmp_path: Path, change: dict[str, Any], message: str):
    content = rows()
    content[1] = {key: value for key, value in (content[1] | change).items() if value is not None}
    with pytest.raises(DataError, match=message) as caught:
        load(write(tmp_path / "data.jsonl", content))
    assert "data.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b"", "holds no texts"),
        ("data.jsonl", b"a line\n", "line 1, is no JSON .*one object a line"),
        ("data.jsonl", b"[1, 2]\n", r"line 1, is no JSON object, got '\[1, 2\]'"),
        ("data.jsonl", b"\xff\xfe\n", "cannot be read as UTF-8"),
        ("data.csv", b"", r"must end in \.jsonl .*got '\.csv'"),
        ("data", b"", "got 'no ending'"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path):
    with pytest.raises(DataError, match=rf"{tmp_path}/nothing\.jsonl cannot be read"):
        load(tmp_path / "nothing.jsonl")


def test_texts_are_refused_where_the_backbone_reads_pictures_and_the_other_way_round(
    tmp_path: Path,
):
    path = write(tmp_path / "data.jsonl", rows())
    with pytest.raises(DataError, match="holds texts, but the backbone reads pictures"):
        load(path, preprocessing=PICTURES)
    with pytest.raises(DataError, match="digits holds pictures, but the backbone reads texts"):
        load_client_data(DataConfig(), TEXTS, partition=0, seed=0)


def test_the_path_of_a_text_file_alone_is_refused_and_the_source_is_suggested(tmp_path: Path):
    path = write(tmp_path / "corpus.jsonl", rows())
    with pytest.raises(DataError, match=f"Did you mean 'text:{path}'"):
        load_client_data(DataConfig(data=str(path)), TEXTS, partition=0, seed=0)
    with pytest.raises(DataError, match="text needs a path: text:<path>"):
        load_client_data(DataConfig(data="text:"), TEXTS, partition=0, seed=0)
