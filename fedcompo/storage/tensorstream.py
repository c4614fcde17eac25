"""Files of :mod:`fedcompo.storage.tensorfile`, read and written one tensor at a time.

Memory is needed for the tensor in use alone, whatever the size of the file. Files are read, not
mapped: mapped pages count as memory of the process until the system needs them for something else.

Torch is imported where tensors are read or written: a header is read without it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedcompo.errors import FileFormatError
from fedcompo.storage.files import canonical, replaced, sync
from fedcompo.storage.manifest import check_digest, complete_manifest, manifest_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "U8": ("uint8", 1),
}
"""Torch's name and the bytes of one value, by the name of safetensors."""
NAMES = {f"torch.{name}": key for key, (name, _) in DTYPES.items()}

Layout = Mapping[str, tuple["torch.dtype", tuple[int, ...]]]
"""Dtype and shape of each tensor, by name."""


class StreamedTensors(Mapping[str, "Tensor"]):
    """The tensors of a file; each is read at every access, and not kept."""

    def __init__(self, path: Path, *, guard: Callable[[], None] = lambda: None) -> None:
        """Read the header.

        Args:
            path: The file.
            guard: Called before a tensor is read; raises if the file is not to be trusted.

        Raises:
            FileFormatError: If the file cannot be read, is truncated, or its header does not
                describe what it holds.
        """
        self.path, self._guard = path, guard
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, size)))
            self._start = 8 + length
            self.manifest = manifest_of(header, path)
            self._places = {
                str(name): (*DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
            self._check_places(size - self._start)
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
        """Read one tensor."""
        import numpy as np
        import torch

        self._guard()
        torch_name, _, shape, begin, end = self._places[name]
        dtype = getattr(torch, torch_name)
        try:
            with self.path.open("rb") as file:
                file.seek(self._start + begin)
                data = np.fromfile(file, dtype=np.uint8, count=end - begin)
        except OSError as error:
            self._guard()  # it may know better why
            raise FileFormatError(f"{self.path} cannot be read: {error.strerror}.") from error
        if len(data) != end - begin:
            raise FileFormatError(f"{self.path} ended before its tensor {name!r}; get it again.")
        if not len(data):  # which torch cannot see as another dtype
            return torch.empty(shape, dtype=dtype)
        return torch.from_numpy(data).view(dtype).view(shape)

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
        """Read every tensor once and compare their digest with the manifest.

        Raises:
            FileFormatError: If a byte was altered.
        """
        digest = TensorDigest()
        for name in self:
            digest.add(name, self[name])
        check_digest(self.manifest, digest.hexdigest(), self.path)

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

    def __iter__(self) -> Iterator[str]:
        """Names, in their order."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._names)


class TensorWriter:
    """Writes a file tensor by tensor, in the order of names; use it as a context.

    The digest of the tensors stands in the header, before them. It is written at the end, over a
    placeholder of the same length. The file is synced to disk when the context ends without an
    error; the caller renames it.
    """

    def __init__(self, path: Path, layout: Layout, manifest: Mapping[str, Any]) -> None:
        """Take the description of the file; nothing is written yet.

        Args:
            path: A new file.
            layout: Dtype and shape of every tensor.
            manifest: See :func:`fedcompo.storage.tensorfile.to_bytes`.
        """
        self.path, self._layout, self._entries = path, dict(layout), dict(manifest)
        self._digest, self._due = TensorDigest(), iter(sorted(layout))
        self._file: IO[bytes]

    def __enter__(self) -> TensorWriter:
        """Create the file."""
        self._file = self.path.open("xb")
        self._file.write(self._header("0" * 64))
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; names must come sorted, dtypes and shapes as announced."""
        due = next(self._due, None)
        kind = tensor.dtype, tuple(tensor.shape)
        if name != due or kind != self._layout[name]:
            raise ValueError(f"{name!r} {kind} is written to {self.path.name}, but {due!r} is due")
        self._digest.add(name, tensor)
        self._file.write(raw_bytes(tensor))

    def __exit__(self, kind: object, *error: object) -> None:
        """Write the digest and sync; after an error leave the file as it is."""
        with self._file as file:
            if kind is not None:
                return
            if (due := next(self._due, None)) is not None:
                raise ValueError(f"{self.path.name} ends before {due!r}")
            file.seek(0)
            file.write(self._header(self._digest.hexdigest()))
            sync(file)

    @property
    def digest(self) -> str:
        """SHA-256 of the tensors written so far."""
        return self._digest.hexdigest()

    def _header(self, digest: str) -> bytes:
        manifest = complete_manifest(self._entries, digest)
        metadata = {"format": "pt", "manifest": canonical(manifest)}
        header: dict[str, Any] = {"__metadata__": metadata}
        position = 0
        for name in sorted(self._layout):
            dtype, shape = self._layout[name]
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": NAMES[str(dtype)],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


class TensorDigest:
    """What ``tensorfile.tensor_digest`` makes, fed one tensor at a time in the order of names."""

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


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as bytes, in the order of its indices; copied only if need be."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    # Where there is one value, torch takes any stride for contiguous, but reads bytes at 1 only.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
