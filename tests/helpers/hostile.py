"""Mutants of a contribution: bytes, JSON and tensors, sealed again so that checks are reached."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcompo.method.contribution import Contribution
from fedcompo.storage.digests import content_digest, digests_of
from fedcompo.storage.files import CARD, CONTENT, FISHER
from fedcompo.storage.manifest import digest_of_all, seal
from fedcompo.storage.tensorfile import load

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63, 10**40, 0.5, -0.0, 1e308, "", "x", "cat",
    "ada", "Ada", "../x", "a\0b", "a\nb", "\x1b[2J", "\ud800", "\u202e", "е", "é", "é",
    "x" * 10_000, "9" * 5000, [], {}, [[]], ["cat", "cat"], {"cat": 3}, {"": 0}, [None], ["dog"],
    {"x": {"y": [1, 2, {"z": None}]}}, list(range(2000)), {str(i): i for i in range(2000)},
]  # fmt: skip
"""What stands in place of a value of a manifest."""
DEEP = "[" * 100_000
NUMBERS = [
    float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 3e38, -3e38, 1e30, 2.0**62, 2.0**34,
    1e-45, 1e-310, -0.0, 0.0, 1.0, -1.0, 65504.0, 2.0**16, 2.0**10, 2.0**40, 2.0**31, 255.0,
]  # fmt: skip
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.uint8, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8",
    torch.int8: "I8", torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
OWN = ("sha256", "tensors_sha256", "digests")


class Mutants:
    """Writes mutants of one contribution into a folder, each from a seed."""

    def __init__(self, original: Contribution, folder: Path) -> None:
        original.save(folder)
        self.folder, self.files = folder, {}
        self.manifests: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for name in (CONTENT, FISHER):
            tensors, manifest = load(folder / name)
            self.tensors[name] = {n: t.clone() for n, t in tensors.items()}
            self.manifests[name] = {k: v for k, v in manifest.items() if k not in OWN}
        self.files = {n: (folder / n).read_bytes() for n in (CONTENT, FISHER, CARD)}

    def write(self, seed: int) -> str:
        """Write the mutant of a seed; returns what was done."""
        draw = random.Random(seed)
        kind = draw.choices(["bytes", "header", "manifest", "tensors", "card"], [2, 2, 4, 4, 1])[0]
        files = dict(self.files)
        done = getattr(self, f"_{kind}")(draw, files)
        for path in self.folder.iterdir():
            path.unlink()
        for name, data in files.items():
            (self.folder / name).write_bytes(data)
        return f"{kind}: {done}"

    # -- what is not sealed again -----------------------------------------------------------------

    def _bytes(self, draw: random.Random, files: dict[str, bytes]) -> str:
        name = draw.choice(list(files))
        data = bytearray(files[name])
        how = draw.choice(["flip", "cut", "repeat", "insert", "length", "empty", "gone"])
        place = draw.randrange(min(len(data), draw.choice([8, 100, 3000, len(data)])))
        if how == "flip":
            for _ in range(draw.choice([1, 1, 1, 8, 100])):
                data[(place + draw.randrange(64)) % len(data)] ^= 1 << draw.randrange(8)
        elif how == "cut":
            del data[place:]
        elif how == "repeat":
            data += data[place:]
        elif how == "insert":
            data[place:place] = draw.randbytes(draw.choice([1, 8, 1000]))
        elif how == "length":
            data[:8] = draw.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data)]).to_bytes(8, "little")
        elif how == "empty":
            data = bytearray()
        files[name] = bytes(data)
        if how == "gone":
            del files[name]
        return f"{how} {name} at {place}"

    def _card(self, draw: random.Random, files: dict[str, bytes]) -> str:
        card = json.loads(files[CARD])
        done = mutate_json(draw, card)
        files[CARD] = json.dumps(card).encode()
        return done

    def _header(self, draw: random.Random, files: dict[str, bytes]) -> str:
        """The description of the tensors; the manifest's own seal stays right."""
        name = draw.choice([CONTENT, FISHER])
        data = files[name]
        length = int.from_bytes(data[:8], "little")
        header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
        how = draw.choice(["json", "shape", "offsets", "dtype", "twice", "deep", "nan", "text"])
        tensor = draw.choice([n for n in header if n != "__metadata__"])
        text = None
        if how == "json":
            mutate_json(draw, header)
        elif how == "shape":
            header[tensor]["shape"] = draw.choice(
                [[], [0], [2**62], [0, 2**62], [-1, -1], [1.0], ["1"], [True], None, [1] * 5000]
            )
        elif how == "offsets":
            header[tensor]["data_offsets"] = draw.choice(
                [[0, 0], [0, 2**62], [-8, 0], [0], [1, 2, 3], "ab", [0.0, 4.0], [2**70, 2**71]]
            )
        elif how == "dtype":
            header[tensor]["dtype"] = draw.choice([*NAMES.values(), "F4", "", None, 3, []])
        elif how == "twice":
            text = (
                json.dumps(header)[:-1] + f", {json.dumps(tensor)}: {json.dumps(header[tensor])}}}"
            )
        elif how == "deep":
            text = json.dumps(header)[:-1] + f', "x": {DEEP}'
        elif how == "nan":
            text = json.dumps(header)[:-1] + ', "x": NaN, "y": 1e999}'
        else:
            text = draw.choice(["", "null", "[]", "{}", '"x"', "7", '{"__metadata__": []}', "\xff"])
        raw = (json.dumps(header) if text is None else text).encode(errors="surrogatepass")
        files[name] = len(raw).to_bytes(8, "little") + raw + rest
        return f"{how} of {tensor}"

    # -- what is sealed again ---------------------------------------------------------------------

    def _manifest(self, draw: random.Random, files: dict[str, bytes]) -> str:
        manifests, tensors = copy.deepcopy(self.manifests), self.tensors
        name = CONTENT if draw.random() < 0.85 else FISHER
        done = [mutate_json(draw, manifests[name]) for _ in range(draw.choice([1, 1, 1, 2]))]
        self._seal(files, manifests, tensors)
        return f"{name}: {', '.join(done)}"

    def _tensors(self, draw: random.Random, files: dict[str, bytes]) -> str:
        tensors = {name: dict(own) for name, own in self.tensors.items()}
        name = CONTENT if draw.random() < 0.75 else FISHER
        own, done = tensors[name], []
        for _ in range(draw.choice([1, 1, 2, 20])):
            done.append(mutate_tensors(draw, own))
        self._seal(files, self.manifests, tensors)
        return f"{name}: {', '.join(done[:3])}"

    def _seal(
        self,
        files: dict[str, bytes],
        manifests: dict[str, dict[str, Any]],
        tensors: dict[str, dict[str, Tensor]],
    ) -> None:
        digests = {name: content_digest(own) for name, own in tensors.items()}
        for name, own in tensors.items():
            files[name] = packed(own, manifests[name])
        about = {k: v for k, v in manifests[CONTENT].items() if k != "format_version"}
        about.pop("fedcompo_version", None)
        files[CARD] = json.dumps(about | {"tensors_sha256": digests}).encode()


def packed(tensors: dict[str, Tensor], manifest: dict[str, Any]) -> bytes:
    """A file as fedcompo would write it, of dtypes that it never writes too."""
    digests = digests_of(tensors)
    complete = {**manifest, "digests": digests, "tensors_sha256": digest_of_all(digests)}
    complete["sha256"] = seal(complete)
    text = json.dumps(complete, sort_keys=True, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "manifest": text}}
    parts, position = [], 0
    for name in sorted(tensors):
        raw = tensors[name].contiguous().view(-1)
        part = raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b""
        header[name] = {
            "dtype": NAMES[raw.dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [position, position + len(part)],
        }
        position += len(part)
        parts.append(part)
    head = json.dumps(header).encode(errors="surrogatepass")
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def mutate_json(draw: random.Random, root: Any) -> str:
    """Change one place in a tree of JSON values, in place."""
    place, path = root, ""
    while isinstance(place, dict | list) and len(place) and (not path or draw.random() < 0.6):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        parent, place, path = place, place[key], f"{path}/{key}"
    if not path:
        return "nothing"
    how = draw.choice(["value", "value", "value", "gone", "added", "wrapped", "renamed"])
    value = copy.deepcopy(draw.choice(VALUES))
    if how == "value":
        parent[key] = value
    elif how == "wrapped":
        for _ in range(draw.choice([1, 2, 200, 400])):
            place = draw.choice([[place], {"x": place}])
        parent[key] = place
    elif how == "gone":
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(0, value)
    else:
        new = draw.choice(["", "x", "cat", "\ud800", "sums", "mixtures", "a\0", "y" * 5000])
        parent[new] = parent.pop(key) if how == "renamed" else value
    return f"{how} {path[:60]} {str(value)[:20]!a}"


def mutate_tensors(draw: random.Random, tensors: dict[str, Tensor]) -> str:
    """Change one tensor, in place of the dictionary."""
    if not tensors:
        return "nothing"
    name = draw.choice(list(tensors))
    own, value = tensors[name], draw.choice(NUMBERS)
    changes: dict[str, Callable[[], Tensor | None]] = {
        "one": lambda: _with_one(draw, own, value),
        "all": lambda: torch.full(own.shape, value, dtype=torch.float64),
        "all32": lambda: torch.full(own.shape, value, dtype=torch.float64).float(),
        "scaled": lambda: own.double() * value,
        "negative": lambda: -own,
        "noise": lambda: torch.frombuffer(
            bytearray(draw.randbytes(max(1, own.numel()) * own.element_size())), dtype=own.dtype
        )[: own.numel()].view(own.shape),
        "dtype": lambda: own.to(draw.choice(DTYPES)),
        "flat": lambda: own.reshape(-1),
        "deeper": lambda: own[None],
        "transposed": lambda: own.mT if own.ndim > 1 else own[:-1],
        "empty": lambda: own[:0],
        "wide": lambda: torch.zeros(0, 2**40) if draw.random() < 0.5 else own.new_zeros(300, 300),
        "gone": lambda: None,
    }
    how = draw.choice([*changes, "renamed", "swapped"])
    if how in changes:
        try:
            new = changes[how]()
        except (RuntimeError, TypeError):  # some dtypes know no minus
            return "nothing"
        if new is None:
            del tensors[name]
        else:
            tensors[name] = new.contiguous()
    elif how == "renamed":
        other = draw.choice(["", "x", "task_vector/", "head/weight", "\ud800", "z" * 9999, "a\0b"])
        tensors[other] = tensors.pop(name)
    else:
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return f"{how} {name[:60]} {value:g}"


def _with_one(draw: random.Random, own: Tensor, value: float) -> Tensor:
    changed = own.double().clone()
    if changed.numel():
        changed.view(-1)[draw.randrange(changed.numel())] = value
    return changed if draw.random() < 0.5 else changed.float()
