"""The file format: what went in comes out, and nothing else does."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import safetensors.torch
import torch
from builders import normal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedcompo.errors import FileFormatError
from fedcompo.storage import tensorfile
from fedcompo.storage.digests import digests_of
from fedcompo.storage.files import canonical, write_atomically
from fedcompo.storage.manifest import FORMAT_VERSION, complete_manifest, seal

TENSORS = {
    "a/wide": normal(2, 3, seed=1, dtype=torch.float32),
    "b": normal(2, seed=2, dtype=torch.bfloat16),
    "count": torch.tensor(7),
}


def padding_of(data: bytes) -> range:
    """Positions of the white space that safetensors puts behind its header: it says nothing."""
    end = 8 + int.from_bytes(data[:8], "little")
    return range(len(data[:end].rstrip(b" ")), end)


def with_padding() -> tuple[dict[str, Any], bytes]:
    """A manifest and its file; the name is as long as it takes for the header to be padded."""
    for length in range(1, 9):
        settings = {"alpha": 0.1, "seed": 3}
        manifest = {"content": "test", "client": "ü" * length, "settings": settings}
        data = tensorfile.to_bytes(TENSORS, manifest)
        if len(padding_of(data)) > 1:
            return manifest, data
    raise AssertionError("no header was padded")


MANIFEST, DATA = with_padding()
PADDING = padding_of(DATA)
HEADER_END = PADDING.stop


def with_manifest(text: str, tensors: dict[str, Tensor] = TENSORS) -> bytes:
    return safetensors.torch.save(tensors, metadata={"manifest": text})


def refused(data: bytes) -> bool:
    """Whether it is refused; any other exception than the promised one passes through."""
    try:
        tensorfile.from_bytes(data, source="a message")
    except FileFormatError:
        return True
    return False


def test_tensors_and_manifest_come_back_bit_for_bit():
    tensors, manifest = tensorfile.from_bytes(DATA, source="a message")
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert {key: manifest[key] for key in MANIFEST} == MANIFEST
    assert manifest["format_version"] == FORMAT_VERSION


def test_a_file_holds_the_same_bytes_as_a_message(tmp_path):
    tensorfile.save(tmp_path / "new" / "file", TENSORS, MANIFEST)
    assert (tmp_path / "new" / "file").read_bytes() == DATA
    tensors, manifest = tensorfile.load(tmp_path / "new" / "file")
    assert manifest == tensorfile.from_bytes(DATA, source="a message")[1]
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_the_same_content_gives_the_same_bytes_in_any_order():
    shuffled = tensorfile.to_bytes(
        dict(reversed(TENSORS.items())), dict(reversed(MANIFEST.items()))
    )
    assert shuffled == DATA


def test_a_strided_tensor_is_stored_by_its_values():
    data = tensorfile.to_bytes({"a": TENSORS["a/wide"].T}, {})
    tensors, _ = tensorfile.from_bytes(data, source="a message")
    assert torch.equal(tensors["a"], TENSORS["a/wide"].T)


def test_every_flipped_bit_is_found():
    slipped = []
    for position in range(len(DATA)):
        for bit in range(8):
            data = bytearray(DATA)
            data[position] ^= 1 << bit
            if not refused(bytes(data)):
                slipped.append((position, bit))
    assert not slipped


@settings(max_examples=300)
@example(position=PADDING.start, value=ord("\t"))
@example(position=PADDING.start, value=ord("}"))
@given(position=st.integers(0, len(DATA) - 1), value=st.integers(0, 255))
def test_every_replaced_byte_is_found_but_for_other_white_space_behind_the_header(position, value):
    data = bytearray(DATA)
    data[position] = value
    same = bytes(data) == DATA or (position in PADDING and chr(value) in "\t\n\r ")
    assert refused(bytes(data)) is not same


def test_other_white_space_behind_the_header_changes_nothing_that_is_read():
    data = bytearray(DATA)
    for position in PADDING:
        data[position] = ord("\n")
    tensors, manifest = tensorfile.from_bytes(bytes(data), source="a message")
    assert manifest == tensorfile.from_bytes(DATA, source="a message")[1]
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_every_truncation_is_found():
    assert all(refused(DATA[:length]) for length in range(len(DATA)))


def test_every_truncation_of_a_file_is_found(tmp_path):
    path = tmp_path / "file"
    for length in [*range(20), HEADER_END - 1, HEADER_END, HEADER_END + 1, len(DATA) - 1]:
        path.write_bytes(DATA[:length])
        with pytest.raises(FileFormatError, match="not a complete fedcompo file"):
            tensorfile.load(path)


@given(st.binary(min_size=1, max_size=40))
def test_bytes_behind_the_end_are_found(tail):
    assert refused(DATA + tail)


@given(st.binary(max_size=200))
def test_noise_is_refused(data):
    assert refused(data)
    assert refused(len(data).to_bytes(8, "little") + data)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="cannot be read: No such file"):
        tensorfile.load(tmp_path / "nothing")


def test_a_plain_safetensors_file_is_refused():
    assert refused(safetensors.torch.save(TENSORS))


def test_an_added_tensor_is_found():
    text = json.loads(DATA[8:HEADER_END])["__metadata__"]["manifest"]
    assert not refused(with_manifest(text))
    assert refused(with_manifest(text, {**TENSORS, "more": torch.ones(1)}))
    assert refused(with_manifest(text, {name: TENSORS[name] for name in ("a/wide", "b")}))


def test_a_manifest_written_otherwise_is_found_even_if_it_says_the_same():
    text = json.loads(DATA[8:HEADER_END])["__metadata__"]["manifest"]
    assert refused(with_manifest(json.dumps(json.loads(text), indent=1)))


def test_another_version_of_the_format_is_named():
    text = canonical({"format_version": 3})
    with pytest.raises(FileFormatError, match=r"format version 3, this fedcompo reads 1 and 2"):
        tensorfile.from_bytes(with_manifest(text), source="a message")


@pytest.mark.parametrize(
    "text",
    [
        "3",
        "[1]",
        "null",
        '{"format_version":1,"num_examples":1e345}',
        '{"format_version":1,"alpha":NaN}',
        "[" * 100_000,
    ],
    ids=["number", "list", "null", "10345 with one byte changed", "NaN", "deep nesting"],
)
def test_a_manifest_of_another_shape_is_refused(text):
    assert refused(with_manifest(text))


def test_a_sealed_manifest_without_a_digest_of_the_tensors_is_refused():
    manifest = {"format_version": FORMAT_VERSION}
    manifest["sha256"] = seal(manifest)
    assert refused(with_manifest(canonical(manifest)))


def test_a_digest_of_a_tensor_that_is_not_there_is_refused():
    digests = digests_of(TENSORS)
    assert not refused(with_manifest(canonical(complete_manifest({}, digests))))
    assert refused(with_manifest(canonical(complete_manifest({}, {**digests, "x": "none"}))))


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(3, 2)},
        {"a": torch.zeros(3, 2).double()},
        {"a": torch.zeros(3, 2, dtype=torch.int32)},
        {"a": torch.tensor([[0.0, 0], [0, 0], [0, -0.0]])},
    ],
    ids=["shape", "name", "size of type", "type", "sign of zero"],
)
def test_a_digest_tells_apart(other):
    digest = tensorfile.tensor_digest({"a": torch.zeros(3, 2)})
    assert tensorfile.tensor_digest(other) != digest
    assert tensorfile.tensor_digest({"a": torch.zeros(3, 2)}) == digest


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
