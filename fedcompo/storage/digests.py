"""SHA-256 of tensors, several at a time; and which tensors of a file were compared with theirs.

Torch is imported where tensors are read: a header is read without it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, TYPE_CHECKING, TypeVar

from fedcompo.storage.manifest import digest_of_all

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
LARGE = 1 << 20
"""Bytes from which on it pays to hash in another thread."""
WORKERS = min(4, os.cpu_count() or 1)
TICK = 50_000_000
"""Nanoseconds for which a file may change and keep its times: clocks of file systems are coarse."""
COARSE = 2_500_000_000
"""The same where times are whole seconds: some file systems count in these, or in two."""
REMEMBERED = 1 << 16
"""Files of which it is known what was compared."""


class TensorDigest:
    """SHA-256 over all tensors in one sequence, fed one at a time in the order of names."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """Update the digest with one tensor; its name may be any that JSON can hold."""
        heading = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|"
        self._sha.update(heading.encode(errors="surrogatepass"))
        self._sha.update(raw_bytes(tensor))

    def hexdigest(self) -> str:
        """SHA-256 so far, hexadecimal."""
        return self._sha.hexdigest()


def tensor_sha256(name: str, tensor: Tensor) -> str:
    """SHA-256 of one tensor: name, dtype, shape and bytes; hexadecimal."""
    digest = TensorDigest()
    digest.add(name, tensor)
    return digest.hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names; hexadecimal."""
    digest = TensorDigest()
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return digest.hexdigest()


def digests_of(
    tensors: Mapping[str, Tensor], prefix: str = "", dtype: torch.dtype | None = None
) -> dict[str, str]:
    """SHA-256 of each tensor, by name; a prefix stands before each name.

    With a dtype, of its values in that one.
    """
    in_memory, names = isinstance(tensors, dict), list(tensors)
    size = sum(tensor.nbytes for tensor in tensors.values()) if in_memory else LARGE

    def work(name: str) -> str:
        tensor = tensors[name]
        return tensor_sha256(prefix + name, tensor if dtype is None else tensor.to(dtype))

    found = at_once(work, names, size)
    return {prefix + name: digest for name, digest in zip(names, found, strict=True)}


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """What a file of these tensors states of them all."""
    return digest_of_all(digests_of(tensors))


def at_once(work: Callable[[str], T], names: Iterable[str], size: int) -> list[T]:
    """Do work for each name, in several threads if there are many bytes to it."""
    if size < LARGE or WORKERS == 1:
        return [work(name) for name in names]
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, names))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as bytes, in the order of its indices; copied only if need be."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    # Where there is one value, torch takes any stride for contiguous, but reads bytes at 1 only.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


Stamp = tuple[str, int, int, int, int, int] | None
"""SHA-256 of a file's header; its device, inode, size and times. None: they say nothing yet."""
_compared: dict[Stamp, bytearray] = {}
"""For each file a 1 for every tensor that has been compared in this process."""


def stamp_of(header_sha256: str, file: IO[bytes]) -> Stamp:
    """Tell an open file from others, and from itself once it was changed.

    What changed a moment ago could change again within the same tick of the clock: it has none yet.
    """
    began, now = time.time_ns(), os.fstat(file.fileno())
    times = now.st_mtime_ns, now.st_ctime_ns
    tick = TICK if any(at % 1_000_000_000 for at in times) else COARSE
    settled = began - max(times) > tick
    return (header_sha256, now.st_dev, now.st_ino, now.st_size, *times) if settled else None


def is_compared(stamp: Stamp, number: int) -> bool:
    """Whether a tensor of a file has been compared with its SHA-256."""
    known = _compared.get(stamp)
    return known is not None and bool(known[number])


def note_compared(stamp: Stamp, numbers: range, count: int) -> None:
    """Note that some of a file's tensors, of so many, are as their SHA-256 say.

    The stamp is from before they were read.
    """
    if stamp is None:
        return
    if len(_compared) >= REMEMBERED:
        _compared.clear()
    known = _compared.setdefault(stamp, bytearray(count))
    known[numbers.start : numbers.stop] = b"\1" * len(numbers)
