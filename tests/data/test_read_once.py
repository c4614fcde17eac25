"""A file is read once by a process, and anew when it has changed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedcompo.data import catalogue
from fedcompo.data.catalogue import Catalogue, read_once, version_of
from fedcompo.errors import DataError


class Reader:
    """Reads a catalogue of one class, named by the file's content; counts how often."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self, path: Path) -> Catalogue:
        self.reads += 1
        try:
            name = path.read_text()
        except OSError as error:
            raise DataError(f"{path} cannot be read") from error
        return Catalogue(
            str(path),
            np.array([name]),
            None,
            lambda index: Image.new("L", (1, 1)),
            in_memory=len(name),
        )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_text("cat")
    return path


def test_a_file_is_read_once_however_many_clients_ask(file: Path):
    reader = Reader()
    found = [read_once(reader, file) for _ in range(5)]
    assert reader.reads == 1
    assert all(catalogue is found[0] for catalogue in found)


def test_a_file_that_changed_is_read_anew(file: Path):
    reader = Reader()
    read_once(reader, file)
    file.write_text("catfish")
    assert read_once(reader, file).names == ("catfish",)


def test_a_file_put_in_the_place_of_another_of_its_size_is_read_anew(file: Path):
    reader = Reader()
    read_once(reader, file)
    other = file.with_name("other")
    other.write_text("dog")
    other.replace(file)
    assert read_once(reader, file).names == ("dog",)


def test_a_relative_path_means_the_file_where_the_process_stands(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reader = Reader()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").write_text("emu")
    names = []
    for folder in (tmp_path, elsewhere):
        monkeypatch.chdir(folder)
        names.append(read_once(reader, Path("data")).names[0])
    assert names == ["cat", "emu"]


def test_only_the_last_file_is_kept(file: Path):
    reader = Reader()
    other = file.with_name("other")
    other.write_text("dog")
    for path in (file, other, file):
        read_once(reader, path)
    assert reader.reads == 3


def test_content_that_fills_the_memory_is_not_kept(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(catalogue, "KEPT_BYTES", 2)
    reader = Reader()
    for _ in range(3):
        read_once(reader, file)
    assert reader.reads == 3


def test_a_file_that_cannot_be_read_is_refused_each_time_until_it_can(tmp_path: Path):
    reader, path = Reader(), tmp_path / "late"
    for _ in range(2):
        with pytest.raises(DataError):
            read_once(reader, path)
    path.write_text("cat")
    assert read_once(reader, path).names == ("cat",)


def test_a_version_tells_whether_a_file_may_have_changed(file: Path):
    assert version_of([]) == ""  # what is in memory has none
    first = version_of([file])
    assert version_of([file]) == first != version_of([file, file.with_name("missing")])
    status = file.stat()
    file.write_text("dog")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    assert version_of([file]) != first
