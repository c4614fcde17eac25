"""What Flower carries: how large it is, and that memory is free again once it is gone."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fedcompo.errors import FileFormatError
from fedcompo.messages.records import from_record, refusal, size_of, to_record
from fedcompo.storage.tensorfile import to_bytes

TENSORS = {"w": torch.arange(100.0)}


def test_the_size_is_that_of_the_packed_file_and_flowers_header() -> None:
    content = to_record(TENSORS, {"content": "request"})
    packed = len(to_bytes(TENSORS, {"content": "request", "wire": "float32"}))
    assert packed <= size_of(content) <= packed + 256


def test_what_was_looked_at_is_gone_at_once() -> None:
    """A request of 340 MB that waits for the garbage collector is 340 MB a client."""
    gc.collect()
    gc.disable()
    try:
        content = to_record(TENSORS, {"content": "request"})
        assert size_of(content) > 400
        from_record(content, expected="request", source="test")
        gone = weakref.ref(content)
        del content
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "content", [refusal("no \ud800"), to_record({}, {"versions": {"\udfff": ""}})]
)
def test_text_that_no_terminal_could_print_is_refused(content) -> None:
    with pytest.raises(FileFormatError, match="halves of surrogate pairs"):
        from_record(content, expected="request", source="test")


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.int8])
def test_a_tensor_that_no_file_could_hold_is_refused(dtype) -> None:
    content = to_record({"w": torch.ones(2).to(dtype)}, {"content": "request"})
    with pytest.raises(FileFormatError, match=f"'w' of test is of {dtype}"):
        from_record(content, expected="request", source="test")
