"""Files of :mod:`fedcompo.storage.tensorfile`, read and written one tensor at a time.

Memory is needed for the tensor in use alone, whatever the size of the file. Files are read, not
mapped: mapped pages count as memory of the process until the system needs them for something else.
A tensor is compared with its SHA-256 when it is first read, and again once its file has changed.

Torch is imported where tensors are read or written: a header is read without it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedcompo.errors import FileFormatError
from fedcompo.storage.digests import (
    LARGE,
    Stamp,
    at_once,
    is_compared,
    note_compared,
    raw_bytes,
    stamp_of,
    tensor_digest,
    tensor_sha256,
)
from fedcompo.storage.files import replaced, sync
from fedcompo.storage.header import DTYPES, Layout, header_bytes, header_of
from fedcompo.storage.manifest import (
    FORMAT_VERSION,
    check_digest,
    complete_manifest,
    digest_of_all,
    manifest_of,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Guard = Callable[[str], None]
"""Given what is wrong with a tensor, or nothing before one is read; raises if it is not trusted."""


class StreamedTensors(Mapping[str, "Tensor"]):
    """The tensors of a file; each is read at every access, and not kept."""

    def __init__(self, path: Path, *, guard: Guard = lambda wrong: None) -> None:
        """Read the header.

        Args:
            path: The file.
            guard: Called before a tensor is read, and when one was altered.

        Raises:
            FileFormatError: If the file cannot be read, is truncated, or its header does not
                describe what it holds.
        """
        self.path, self._guard = path, guard
        try:
            with path.open("rb") as file:
                size, text = os.fstat(file.fileno()).st_size, header_of(file)
                self._start, self._sha256 = len(text), hashlib.sha256(text).hexdigest()
                self._stamp = stamp_of(self._sha256, file)
            header = json.loads(text[8:])
            self.manifest = manifest_of(header, path)
            self._is_old = self.manifest["format_version"] != FORMAT_VERSION
            self.digests: dict[str, str] = {} if self._is_old else self.manifest["digests"]
            """SHA-256 of each tensor, by name; empty in format 1, where one covers all."""
            self._places = {
                str(name): (*DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
            self._check_places(size - self._start)
            if not self._is_old and self.digests.keys() != self._places.keys():
                raise ValueError("its digests are of other tensors")
            self._numbers = {name: number for number, name in enumerate(self)}
        except FileFormatError:
            raise
        except OSError as error:
            raise FileFormatError(f"{path} cannot be read: {error.strerror}.") from error
        except Exception as error:  # whatever strange bytes can provoke
            raise FileFormatError(
                f"{path} is not a complete fedcompo file ({type(error).__name__}: {error}). "
                "It was truncated, altered or written by something else; get it again."
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor; raises ``FileFormatError`` if a byte of it was altered."""
        tensor, stamp = self._read(name)
        if not self._is_old and not is_compared(stamp, self._numbers[name]):
            self._compare(name, tensor, stamp)
        return tensor

    def _compare(self, name: str, tensor: Tensor, stamp: Stamp) -> None:
        number, what = self._numbers[name], f"The tensor {name!r} of {self.path}"
        check_digest(self.digests[name], tensor_sha256(name, tensor), what, self._guard)
        note_compared(stamp, range(number, number + 1), len(self))

    def _read(self, name: str) -> tuple[Tensor, Stamp]:
        import numpy as np
        import torch

        self._guard("")
        torch_name, _, shape, begin, end = self._places[name]
        dtype = getattr(torch, torch_name)
        try:
            with self.path.open("rb") as file:
                stamp = stamp_of(self._sha256, file)
                if stamp is None or stamp != self._stamp:  # another may have come in its place
                    found = hashlib.sha256(file.read(self._start)).hexdigest()
                    check_digest(self._sha256, found, f"The header of {self.path}", self._guard)
                file.seek(self._start + begin)
                data = np.fromfile(file, dtype=np.uint8, count=end - begin)
        except OSError as error:
            self._guard("")  # it may know better why
            raise FileFormatError(f"{self.path} cannot be read: {error.strerror}.") from error
        if len(data) != end - begin:
            raise FileFormatError(f"{self.path} ended before its tensor {name!r}; get it again.")
        if not len(data):  # which torch cannot see as another dtype
            return torch.empty(shape, dtype=dtype), stamp
        return torch.from_numpy(data).view(dtype).view(shape), stamp

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name; nothing is read."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """Names, sorted."""
        return iter(sorted(self._places))

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._places)

    @property
    def layout(self) -> Layout:
        """Dtype and shape of each tensor, by name; nothing is read."""
        import torch

        return {name: (getattr(torch, p[0]), p[2]) for name, p in self._places.items()}

    def check(self) -> None:
        """Read every tensor now and compare it with its digest, several at a time.

        Raises:
            FileFormatError: If a byte was altered.
        """
        if self._is_old:
            what = f"What {self.path} holds"
            check_digest(self.manifest.get("tensors_sha256"), tensor_digest(self), what)
        else:
            size = self.path.stat().st_size
            at_once(lambda name: self._compare(name, *self._read(name)), self, size)

    def _check_places(self, available: int) -> None:
        """Raise ``ValueError`` for tensors that overlap, leave gaps, or do not fill the file."""
        position = 0
        for _, width, shape, begin, end in sorted(self._places.values(), key=lambda p: p[3:]):
            if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
                raise ValueError(f"shape {shape} or place {begin}, {end} of a tensor")
            if begin != position or end - begin != math.prod(shape) * width:
                raise ValueError(f"the tensors do not lie end to end at byte {position}")
            position = end
        if position != available:
            raise ValueError(f"{available} bytes of tensors, expected {position}")


class Section(Mapping[str, "Tensor"]):
    """The tensors whose names start with ``<prefix>/``, named without it; read when they are used.

    Without a prefix all, but for those of some names.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], prefix: str = "", *, without: Iterable[str] = ()
    ) -> None:
        start, self._tensors = f"{prefix}/" if prefix else "", tensors
        chosen = (name for name in tensors if name.startswith(start) and name not in without)
        self._names = {name.removeprefix(start): name for name in chosen}

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[self._names[name]]

    def digests(self, dtype: torch.dtype) -> dict[str, str]:
        """SHA-256 of each tensor, by its whole name, as the file says.

        Empty if it does not, or if a tensor is of another dtype.
        """
        stated, layout = (getattr(self._tensors, what, {}) for what in ("digests", "layout"))
        alike = stated and all(layout[name][0] == dtype for name in self._names.values())
        return {name: stated[name] for name in self._names.values()} if alike else {}

    def __iter__(self) -> Iterator[str]:
        """Names, in their order."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._names)


class TensorWriter:
    """Writes a file tensor by tensor, in the order of names; use it as a context.

    The digests of the tensors stand in the header, before them. They are written at the end, over
    placeholders of the same length. The file is synced to disk when the context ends without an
    error; the caller renames it. A tensor is hashed in a thread of its own, while it is written and
    the next one is made.
    """

    def __init__(self, path: Path, layout: Layout, manifest: Mapping[str, Any]) -> None:
        """Take the description of the file; nothing is written yet.

        Args:
            path: A new file.
            layout: Dtype and shape of every tensor.
            manifest: See :func:`fedcompo.storage.tensorfile.to_bytes`.
        """
        self.path, self._layout, self._entries = path, dict(layout), dict(manifest)
        self._digests, self._due = dict.fromkeys(layout, "0" * 64), iter(sorted(layout))
        self._thread, self._pending = ThreadPoolExecutor(1), dict[str, Future[str]]()
        self._file: IO[bytes]

    def __enter__(self) -> TensorWriter:
        """Create the file."""
        self._file = self.path.open("xb")
        self._file.write(self._header())
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; names must come sorted, dtypes and shapes as announced.

        Its values must stay as they are until the next call.
        """
        due = next(self._due, None)
        kind = tensor.dtype, tuple(tensor.shape)
        if name != due or kind != self._layout[name]:
            raise ValueError(f"{name!r} {kind} is written to {self.path.name}, but {due!r} is due")
        self._settle()
        if tensor.nbytes < LARGE:
            self._digests[name] = tensor_sha256(name, tensor)
        else:
            self._pending[name] = self._thread.submit(tensor_sha256, name, tensor)
        self._file.write(raw_bytes(tensor))

    def _settle(self) -> None:
        """Wait for the digest of the last tensor."""
        while self._pending:
            name, digest = self._pending.popitem()
            self._digests[name] = digest.result()

    def __exit__(self, kind: object, *error: object) -> None:
        """Write the digests and sync; after an error leave the file as it is."""
        with self._file as file, self._thread:
            if kind is not None:
                return
            if (due := next(self._due, None)) is not None:
                raise ValueError(f"{self.path.name} ends before {due!r}")
            self._settle()
            file.seek(0)
            file.write(self._header())
            sync(file)
            stamp = stamp_of(hashlib.sha256(self._header()).hexdigest(), file)
            note_compared(stamp, range(len(self._layout)), len(self._layout))  # on their way

    @property
    def digest(self) -> str:
        """SHA-256 of all tensors; see :func:`~fedcompo.storage.manifest.digest_of_all`."""
        return digest_of_all(self._digests)

    def _header(self) -> bytes:
        return header_bytes(self._layout, complete_manifest(self._entries, self._digests))


def save_streamed(path: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> str:
    """Write a file tensor by tensor; a crash leaves the old file or the new one.

    Returns:
        SHA-256 of the tensors.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replaced(path) as temporary, TensorWriter(temporary, layout, manifest) as writer:
        for name in sorted(tensors):
            writer.write(name, tensors[name])
    return writer.digest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as ``sha256sum`` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
