"""Contributions and requests as Flower records, and back: the only file that imports flwr.

Tensors travel packed, as *one* array of bytes: a :mod:`fedcompo.storage.tensorfile` with its
manifest. Many small arrays are slow to store on their way, and bfloat16 would not pass at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fedcompo.config.choices import Wire
from fedcompo.errors import FedcompoError, FileFormatError
from fedcompo.messages.body import Body
from fedcompo.messages.wire import decode
from fedcompo.storage import tensorfile
from fedcompo.storage.header import NAMES

PAYLOAD = "payload"
REFUSAL = "refusal"


class ClientRefusal(FedcompoError):
    """A client refuses a request; the message is its reason."""

    client = ""
    """What the client calls itself, if it came to know that."""


def to_record(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> RecordDict:
    """Pack tensors and a manifest into the content of a message."""
    data = np.frombuffer(tensorfile.to_bytes(tensors, manifest), dtype=np.uint8)
    return RecordDict({PAYLOAD: ArrayRecord({PAYLOAD: Array(data)})})


def refusal(reason: str, client: str = "") -> RecordDict:
    """Pack a refusal of a request, with its reason and the client's name, if it is known."""
    return to_record({}, {"content": REFUSAL, "reason": reason, "client": client})


def from_record(content: RecordDict, *, expected: str, source: str) -> Body:
    """Unpack and check the content of a message.

    Args:
        content: What :func:`to_record` made.
        expected: The manifest's ``content`` entry.
        source: Whose message it is, for error messages.

    Raises:
        ClientRefusal: If the message is a refusal.
        FileFormatError: If it is altered, incomplete or something else.
    """
    try:
        data = content[PAYLOAD][PAYLOAD].numpy().tobytes()
    except Exception as error:  # whatever strange bytes can provoke
        raise FileFormatError(
            f"The message of {source} holds no packed tensors ({type(error).__name__}: {error}). "
            "Use the same fedcompo version everywhere."
        ) from error
    tensors, manifest = tensorfile.from_bytes(data, source=f"the message of {source}")
    if not _is_text(manifest):
        raise FileFormatError(f"The message of {source} holds halves of surrogate pairs.")
    if manifest.get("content") == REFUSAL:
        refused = ClientRefusal(str(manifest.get("reason")))
        refused.client = str(manifest.get("client", ""))
        raise refused
    if manifest.get("content") != expected:
        raise FileFormatError(
            f"The message of {source} holds a {manifest.get('content')!r}, expected {expected!r}."
        )
    return _off_the_wire(tensors, manifest, source)


def _is_text(manifest: Mapping[str, Any]) -> bool:
    """Whether all text can be printed; half of a surrogate pair, which JSON can hold, cannot."""
    try:
        json.dumps(manifest, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _off_the_wire(tensors: dict[str, Tensor], manifest: dict[str, Any], source: str) -> Body:
    """Tensors in float32 again, where they were sent in fewer bits."""
    rest = dict(manifest)
    stated = rest.pop("wire", str(Wire.FLOAT32))
    if stated not in list(Wire):
        raise FileFormatError(
            f"The message of {source} is in {stated!r}, expected one of {', '.join(Wire)}. "
            "Use the same fedcompo version everywhere."
        )
    decoded = decode(tensors, Wire(stated), source=source)
    for name, tensor in decoded.items():
        if str(tensor.dtype) not in NAMES:
            raise FileFormatError(
                f"Tensor {name!r} of {source} is of {tensor.dtype}, which fedcompo's files cannot "
                "hold. Use the same fedcompo version everywhere."
            )
    return decoded, rest


def size_of(content: RecordDict) -> int:
    """Bytes of a message's packed tensors and manifest.

    Flower's ``content.array_records`` would tie the content to itself, and keep it in memory until
    Python's garbage collector next looks.
    """
    records = [record for record in content.values() if isinstance(record, ArrayRecord)]
    return sum(len(array.data) for record in records for array in record.values())
