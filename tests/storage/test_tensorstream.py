"""Files read and written tensor by tensor: the same files, the same checks, little memory."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from itertools import product
from pathlib import Path

import pytest
import safetensors.torch
import torch
from builders import normal, random_mixture
from registry_builders import contents, overwrite, same_bits
from torch import Tensor

from fedcompo.errors import FileFormatError
from fedcompo.method.contribution import statistics_entry, statistics_from, statistics_tensors
from fedcompo.storage import digests, tensorfile
from fedcompo.storage.digests import (
    TensorDigest,
    content_digest,
    digests_of,
    is_compared,
    note_compared,
    stamp_of,
    tensor_digest,
)
from fedcompo.storage.header import header_bytes
from fedcompo.storage.manifest import complete_manifest, old_manifest
from fedcompo.storage.tensorstream import (
    DTYPES,
    Section,
    StreamedTensors,
    TensorWriter,
    file_sha256,
    save_streamed,
)

MANIFEST = {"content": "test", "note": "Größe"}


def tensors() -> dict[str, Tensor]:
    """Every dtype, and every odd shape."""
    drawn = {
        f"of/{name}": (50 * normal(2, 3, seed=1)).to(getattr(torch, d))
        for name, (d, _) in DTYPES.items()
    }
    odd = {"empty": torch.zeros(0, 4), "scalar": torch.tensor(0.5), "a b/ü": torch.arange(5)}
    return drawn | odd


def saved(folder: Path) -> Path:
    save_streamed(folder / "t.safetensors", tensors(), MANIFEST)
    return folder / "t.safetensors"


def rewritten(path: Path, **changes: object) -> Path:
    """The file with other entries of one tensor in its header; the bytes of the tensors stay."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["scalar"] |= changes
    text = json.dumps(header, ensure_ascii=False).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


# -- the format -----------------------------------------------------------------------------------


def test_what_is_streamed_out_is_what_every_reader_reads(tmp_path):
    path = saved(tmp_path)
    by_fedcompo, manifest = tensorfile.load(path)
    for found in (dict(StreamedTensors(path)), by_fedcompo, safetensors.torch.load_file(path)):
        assert same_bits(found, tensors())
    assert StreamedTensors(path).manifest == manifest
    assert manifest.items() >= MANIFEST.items()


def test_what_was_written_in_one_piece_is_streamed_in(tmp_path):
    tensorfile.save(tmp_path / "t", tensors(), MANIFEST)
    streamed = StreamedTensors(tmp_path / "t")
    streamed.check()
    assert same_bits(dict(streamed), tensors())
    assert list(streamed) == sorted(tensors())


def test_layout_is_known_before_a_tensor_is_read(tmp_path):
    def refuse(wrong: str) -> None:
        raise AssertionError("a tensor was read")

    streamed = StreamedTensors(saved(tmp_path), guard=refuse)
    assert streamed.layout == {n: (t.dtype, tuple(t.shape)) for n, t in tensors().items()}
    assert len(streamed) == len(tensors())
    with pytest.raises(AssertionError):
        streamed["scalar"]


def test_equal_tensors_give_equal_files_whatever_their_order(tmp_path):
    save_streamed(tmp_path / "a", tensors(), MANIFEST)
    digest = save_streamed(tmp_path / "b", dict(reversed(tensors().items())), MANIFEST)
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "b")
    assert digest == content_digest(tensors())


def test_digest_fed_in_pieces_is_that_of_the_whole():
    digest = TensorDigest()
    for name in sorted(tensors()):
        digest.add(name, tensors()[name])
    assert digest.hexdigest() == tensorfile.tensor_digest(tensors())


def test_tensors_that_are_views_are_written_as_they_look(tmp_path):
    wide = normal(4, 6, seed=0, dtype=torch.float32)
    views = {"turned": wide.T, "part": wide[:, 1::2], "learnt": wide.clone().requires_grad_()}
    save_streamed(tmp_path / "t", views, {})
    found = StreamedTensors(tmp_path / "t")
    assert all(torch.equal(found[name], views[name]) for name in views)


def test_a_section_is_the_tensors_below_a_name(tmp_path):
    mixtures = {"a/b": random_mixture(3, seed=0)}
    entry = statistics_entry(mixtures)
    save_streamed(tmp_path / "t", statistics_tensors(mixtures) | tensors(), entry)
    streamed = StreamedTensors(tmp_path / "t")
    section = Section(streamed, "of")
    assert dict(section).keys() == DTYPES.keys()
    assert torch.equal(section["F32"], streamed["of/F32"])
    found = statistics_from(streamed, streamed.manifest)
    assert torch.equal(found["a/b"].means, mixtures["a/b"].means)


# -- writing --------------------------------------------------------------------------------------

LAYOUT = {"a": (torch.float32, (2,)), "b": (torch.int64, ())}


@pytest.mark.parametrize(
    "steps",
    [
        [("b", torch.tensor(1))],
        [("a", torch.zeros(3))],
        [("a", torch.zeros(2).double())],
        [("a", torch.zeros(2)), ("b", torch.tensor(1)), ("c", torch.zeros(1))],
        [("a", torch.zeros(2))],
    ],
    ids=["out of order", "other shape", "other dtype", "one too many", "one too few"],
)
def test_only_what_was_announced_can_be_written(steps, tmp_path):
    with (
        pytest.raises(ValueError, match=r"is due|ends before"),
        TensorWriter(tmp_path / "t", LAYOUT, {}) as writer,
    ):
        for name, tensor in steps:
            writer.write(name, tensor)


def test_a_file_that_was_not_finished_is_not_one(tmp_path):
    with pytest.raises(KeyError), TensorWriter(tmp_path / "t", LAYOUT, {}) as writer:
        writer.write("a", torch.zeros(2))
        raise KeyError
    with pytest.raises(FileFormatError):
        StreamedTensors(tmp_path / "t")


def test_a_whole_file_without_its_digest_does_not_pass(tmp_path):
    with pytest.raises(KeyError), TensorWriter(tmp_path / "t", LAYOUT, {}) as writer:
        writer.write("a", torch.zeros(2))
        writer.write("b", torch.tensor(1))
        raise KeyError  # before the digest is filled in
    with pytest.raises(FileFormatError, match="altered"):
        StreamedTensors(tmp_path / "t").check()


def test_a_file_is_never_overwritten_in_place(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(FileExistsError), TensorWriter(path, LAYOUT, {}):
        pass
    assert same_bits(dict(StreamedTensors(path)), tensors())


def test_an_error_while_saving_leaves_the_old_file_alone(tmp_path):
    saved(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(TypeError):
        save_streamed(tmp_path / "t.safetensors", tensors(), {"not": {"JSON"}})
    assert contents(tmp_path) == before


# -- altered files --------------------------------------------------------------------------------


def test_every_altered_byte_is_found_or_means_nothing(tmp_path):
    path, given = tmp_path / "t", {"ü": normal(3, seed=0), "z": torch.tensor(7)}
    save_streamed(path, given, {"content": "test"})
    data, manifest = path.read_bytes(), StreamedTensors(path).manifest
    unnoticed = set()
    for position, mask in product(range(len(data)), (1 << bit for bit in range(8))):
        altered = bytearray(data)
        altered[position] ^= mask
        overwrite(path, altered)
        try:
            streamed = StreamedTensors(path)
            streamed.check()
        except FileFormatError:
            continue
        assert same_bits(dict(streamed), given)
        assert streamed.manifest == manifest
        unnoticed.add(position)
    # a note to other readers, and the capitals of hexadecimal digits; who keeps a file's SHA-256,
    # as a registry does, finds these too
    silent = (b'"format":"pt"', b"\\u00fc")
    assert unnoticed <= {data.rindex(text) + i for text in silent for i in range(len(text))}


def test_every_shortened_file_is_refused(tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    for length in {*range(0, len(data), 11), *range(len(data) - 9, len(data))}:
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError):
            StreamedTensors(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [-1, -1]},
        {"shape": [1.0]},
        {"shape": [True]},
        {"shape": ["1"]},
        {"shape": 1},
        {"shape": [2]},
        {"dtype": "C64"},
        {"dtype": None},
        {"data_offsets": [0, 4]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 4, 8]},
        {"data_offsets": [None, None]},
    ],
    ids=str,
)
def test_a_header_that_describes_nothing_real_is_refused(entry, tmp_path):
    path = rewritten(saved(tmp_path))
    StreamedTensors(path)["scalar"]  # rewriting alone does no harm
    with pytest.raises(FileFormatError, match="altered"):
        StreamedTensors(rewritten(path, **entry))


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\xff" * 64, b"\0" * 8, b"\2\0\0\0\0\0\0\0[]"])
def test_something_else_is_refused(data, tmp_path):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(FileFormatError, match="not a complete fedcompo file"):
        StreamedTensors(tmp_path / "t")


def test_a_file_that_goes_away_is_an_error_of_ours(tmp_path):
    with pytest.raises(FileFormatError, match="No such file"):
        StreamedTensors(tmp_path / "none")
    streamed = StreamedTensors(saved(tmp_path))
    streamed.path.write_bytes(streamed.path.read_bytes()[:-4])
    with pytest.raises(FileFormatError, match="ended before its tensor"):
        streamed[max(streamed, key=lambda name: streamed._places[name][3])]
    streamed.path.unlink()
    with pytest.raises(FileFormatError, match="No such file"):
        streamed["scalar"]


@pytest.mark.parametrize("old", [False, True])
def test_a_header_counts_only_for_the_file_that_it_was_read_from(old, tmp_path):
    path, values = tmp_path / "t", {"a": torch.zeros(4), "b": torch.ones(4)}
    save_streamed(path, values, MANIFEST)
    data, layout = path.read_bytes(), StreamedTensors(path).layout
    length, exchanged = int.from_bytes(data[:8], "little"), {"a": values["b"], "b": values["a"]}
    manifest = complete_manifest(MANIFEST, digests_of(exchanged))
    if old:
        manifest = old_manifest(MANIFEST, tensor_digest(exchanged))
    header = json.loads(header_bytes(layout, manifest)[8:])
    header["a"], header["b"] = header["b"], header["a"]  # each where the other's values are
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + text + data[8 + length :])
    streamed = StreamedTensors(path)
    streamed.check()
    assert torch.equal(streamed["a"], values["b"])
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"The header of .* was altered"):
        streamed["a"]


def test_a_file_that_was_changed_a_moment_before_is_not_known_by_its_times(tmp_path):
    path = saved(tmp_path)
    os.utime(path, ns=(0, time.time_ns() + 500_000_000))
    with path.open("rb") as file:
        fresh = stamp_of("", file)
        time.sleep(0.6)
        note_compared(fresh, range(1), 1)  # it took long to compare
        assert not is_compared(fresh, 0)
        assert not is_compared(stamp_of("", file), 0)
        note_compared(stamp_of("", file), range(1), 1)
        assert is_compared(stamp_of("", file), 0)


def test_what_is_remembered_of_files_does_not_grow(monkeypatch):
    monkeypatch.setattr(digests, "REMEMBERED", 3)
    monkeypatch.setattr(digests, "_compared", known := {})
    for inode in range(9):
        note_compared(("", 0, inode, 0, 0, 0), range(1), 1)
        assert is_compared(("", 0, inode, 0, 0, 0), 0)
        assert len(known) <= 3


def test_the_guard_is_asked_before_every_tensor_and_says_why_one_cannot_be_read(tmp_path):
    asked = []
    streamed = StreamedTensors(saved(tmp_path), guard=asked.append)
    dict(streamed)
    assert len(asked) == len(tensors())
    streamed.path.unlink()
    with pytest.raises(FileFormatError):
        streamed["scalar"]
    assert len(asked) == len(tensors()) + 2


# -- memory ---------------------------------------------------------------------------------------


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    piece = 1 << 20  # bytes
    layout = {f"{i:03}": (torch.float32, (piece // 4,)) for i in range(100)}
    one = torch.zeros(piece // 4)
    tracemalloc.start()
    try:
        with TensorWriter(tmp_path / "t", layout, {}) as writer:
            for name in sorted(layout):
                writer.write(name, one)
        streamed = StreamedTensors(tmp_path / "t")
        streamed.check()
        file_sha256(tmp_path / "t")
        assert sum(float(streamed[name].sum()) for name in streamed) == 0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * piece
