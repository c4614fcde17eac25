"""What Flower carries: how large it is, and that memory is free again once it is gone."""

from __future__ import annotations

import gc
import weakref

import torch

from fedcompo.messages.records import from_record, size_of, to_record
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
