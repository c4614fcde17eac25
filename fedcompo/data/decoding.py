"""Read the pictures that a client keeps, or its texts, as rows of uint8.

They are decoded by several threads, few at a time, into a file (:mod:`fedcompo.data.cache`): memory
does not grow with the number of images. A small set of which no file can be kept stays in memory.

What is odd about pictures is logged, with how many it befell. The log stays with the client.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.choices import Modality
from fedcompo.data.cache import Put, Report, read, stored
from fedcompo.data.catalogue import Catalogue, version_of
from fedcompo.data.draws import Indices
from fedcompo.data.pictures import (
    COLOURS,
    kind_of,
    oddities,
    opened_picture,
    peak_of,
    see_through,
    top_of,
)
from fedcompo.errors import DataError
from fedcompo.method.images import Images, part_of
from fedcompo.report.pictures import ODD, REPEATED, SEE_THROUGH, WIDE, Facts
from fedcompo.report.progress import track
from fedcompo.report.twins import few
from fedcompo.runtime import in_order, one_thread, version, workers
from fedcompo.storage.files import canonical

IN_MEMORY = 64 * 2**20
"""Bytes of decoded images that are held in memory at most."""
AHEAD = 16
"""Images a thread that are decoded before they are stored."""
QUICK = 1.0
"""Seconds of decoding up to which images that fit into memory are decoded again in later phases."""
FORMAT = 1
"""Changes with what this file makes of the same picture."""
logger = logging.getLogger(__name__)


def decode(
    catalogue: Catalogue,
    train: Sequence[Indices],
    test: Sequence[Indices],
    preprocessing: Preprocessing,
    *,
    client: str,
    cache: Path | None = None,
) -> tuple[Images, Images, Facts]:
    """Read and resize images.

    Args:
        catalogue: Where they are.
        train: Indices of the training images of each class, (count,).
        test: Indices of the test images of each class.
        preprocessing: Input that the backbone expects.
        client: Who owns the images, for messages.
        cache: Folder where images are kept for other processes and phases; None: they are not.

    Returns:
        Training images, test images, each (count, channels, image_size, image_size), or of texts
        (count, 1, 1, length), uint8; and facts on them that the results note. More than
        :data:`IN_MEMORY`, and what took longer than :data:`QUICK`, are on disk.

    Raises:
        DataError: If images cannot be read or converted; lists the first few and how many there
            are. If the backbone reads texts and these are none, or the other way round. If there
            is no room on disk.
    """
    check_modality(catalogue, preprocessing)
    whose, kept = f"Client {client!r}", sum(map(len, train))
    reader = Reader(catalogue, np.concatenate([*train, *test]), whose, preprocessing, kept)
    shape = torch.Size((len(reader.chosen), *preprocessing.shape))
    images: Images
    with one_thread():  # torch's own threads would get in the way of those that decode
        if shape.numel() > IN_MEMORY:
            images = stored(cache, reader.name, shape, reader.make)
            report = images.report
        elif found := cache and reader.name and read(cache, reader.name, shape):
            images, report = found, found.report
        else:
            memory, began = torch.empty(shape, dtype=torch.uint8), time.perf_counter()
            images, report = memory, reader.make(memory.__setitem__)
            if cache and reader.name and time.perf_counter() - began > QUICK:
                images = _kept(memory, report, cache, reader.name)
    for note in report.notes:
        logger.warning("%s: %s", whose, note)
    return part_of(images, slice(kept)), part_of(images, slice(kept, None)), report.facts


def _kept(images: Tensor, report: Report, cache: Path, name: str) -> Images:
    """Keep images that are in memory for later phases; they stay there if there is no room."""

    def copied(put: Put) -> Report:
        for row, image in enumerate(images):
            put(row, image)
        return report

    try:
        return stored(cache, name, images.shape, copied)
    except DataError:
        return images


def check_modality(catalogue: Catalogue, preprocessing: Preprocessing) -> None:
    """Refuse texts for a backbone that reads pictures, and the other way round."""
    if catalogue.modality != preprocessing.modality:
        raise DataError(
            f"{catalogue.source} holds {catalogue.modality}, but the backbone reads "
            f"{preprocessing.modality}. Change `data`, or `backbone`."
        )


def refuse(faults: Mapping[int, str], whose: str, of: str, catalogue: Catalogue) -> None:
    """Raise ``DataError`` on examples that cannot be read, by index, if there are any."""
    if faults:
        listed = few([*faults.values()], between="\n  - ")
        raise DataError(
            f"{whose}: {len(faults)} of {of} cannot be used:\n  - {listed}\nRepair them, save them "
            "as PNG with 8 bits a channel, or take them out; images are never skipped.",
            told=f"{catalogue.count(faults)} cannot be used",
        )


@dataclass(frozen=True)
class Example:
    """What became of one example."""

    pixels: Tensor | None = None
    """(channels, height, width), uint8; None: the range of its pixels is not known yet."""
    mark: int = 0
    """Eight bytes of a digest of its pixels, which tell images apart."""
    odd: tuple[str, ...] = ()
    kind: str = ""
    """Of pixels with more than 8 bits; empty: they have 8 or fewer."""
    peak: float = 0.0
    """Its largest pixel, if there is a kind."""
    fault: str = ""
    """Why it cannot be read."""


class Reader:
    """Reads the examples of a client; counts what is odd, and how large pixels get."""

    def __init__(
        self,
        catalogue: Catalogue,
        chosen: Indices,
        whose: str,
        preprocessing: Preprocessing,
        kept: int,
    ) -> None:
        self._catalogue, self.chosen, self._whose = catalogue, chosen, whose
        self._preprocessing, self._kept = preprocessing, kept
        self._unit = "texts" if catalogue.modality is Modality.TEXTS else "images"
        self._of = f"{len(chosen)} {self._unit} in {catalogue.source}"
        self._marks = np.zeros(len(chosen), np.uint64)

    @cached_property
    def name(self) -> str:
        """Digest of all that decides the pixels; empty: that is not known.

        Files are looked up now: a catalogue may have been read when they were others.
        """
        if not self._catalogue.version:
            return ""
        file = self._catalogue.file
        decides = {
            "format": FORMAT,
            "source": self._catalogue.version,
            "files": version_of(file(int(index)) for index in self.chosen) if file else "",
            "chosen": sha256(self.chosen.astype("<i8").tobytes()).hexdigest(),
            "training": self._kept,
            "preprocessing": asdict(self._preprocessing),
            "versions": {package: version(package) for package in ("fedcompo", "pillow", "timm")},
        }
        return sha256(canonical(decides).encode()).hexdigest()

    def make(self, put: Put) -> Report:
        """Store every image, and say what was found.

        Pictures with more than 8 bits are read twice: their range is known when all are seen.
        """
        peaks, odd = dict[str, float](), Counter[str]()
        waiting = self._fill(put, range(len(self.chosen)), {}, peaks, odd)
        tops = {}
        for kind, peak in peaks.items():
            which = f"{self._whose}: {odd[kind]} of {self._of} have {kind}"
            tops[kind] = top_of(kind, peak, which)
        self._fill(put, waiting, tops, {}, Counter())
        notes = []
        for what, count in odd.items():
            top = tops.get(what)
            told = f"have {what}: 0..{top} becomes 0..255" if top else what
            notes.append(f"{count} of {self._of} {told}.")
        facts = {kind: top for kind, top in tops.items() if kind != COLOURS}
        facts |= {what: count for what, count in odd.items() if what in ODD}
        marks, kept = self._marks, self._kept
        if repeated := int(np.isin(marks[kept:], marks[:kept]).sum()):
            facts[REPEATED] = repeated
            notes.append(
                f"{repeated} of {len(marks) - kept} test {self._unit} in "
                f"{self._catalogue.source} are training {self._unit} too, as the backbone sees "
                "them; accuracies are too high. Take them out of one of the two."
            )
        return Report(facts, tuple(notes))

    def _fill(
        self,
        put: Put,
        rows: Sequence[int],
        tops: Mapping[str, int],
        peaks: dict[str, float],
        odd: Counter[str],
    ) -> list[int]:
        """Store some rows, in order; return those whose pictures must be read again."""
        waiting, faults = [], {}
        Image.init()  # two threads that load Pillow's formats at once may each miss some
        example_of = partial(self.example, tops=tops)
        examples = in_order(example_of, rows, most=workers(), ahead=AHEAD)
        with track(len(rows), self._unit, "decoding") as count:
            for row, example in zip(rows, examples, strict=True):
                if example.fault:
                    faults[int(self.chosen[row])] = example.fault
                elif example.pixels is None:
                    waiting.append(row)
                else:
                    put(row, example.pixels)
                    self._marks[row] = example.mark
                odd.update(example.odd)
                if example.kind:
                    peaks[example.kind] = max(example.peak, peaks.get(example.kind, 0))
                count(1)
        refuse(faults, self._whose, self._of, self._catalogue)
        return waiting

    def example(self, row: int, tops: Mapping[str, int]) -> Example:
        """Read an example; several threads do so at the same time.

        Args:
            row: Its place among those that were chosen.
            tops: What becomes 255, by kind of pixels with more than 8 bits, as far as it is known.
        """
        index, about = int(self.chosen[row]), ""
        try:
            content = self._catalogue.open(index)
            if self._catalogue.modality is Modality.TEXTS:
                return self._prepared(content)
            opened = opened_picture(content) if isinstance(content, bytes) else content
            about = f"{opened.format or 'pixels'}, mode {opened.mode}, size {opened.size}: "
            return self._picture(opened, tops)
        except Exception as error:  # Pillow's decoders raise errors of every kind
            reason = str(error) or type(error).__name__
            return Example(fault=f"{self._catalogue.describe(index)}: {about}{reason}")

    def _picture(self, opened: Image.Image, tops: Mapping[str, int]) -> Example:
        """Convert a picture to 8 bits, upright, and to the input's size."""
        kind = kind_of(opened)
        wide, odd = kind in WIDE.values(), oddities(opened, kind)
        self._preprocessing.reduce(opened)
        upright = ImageOps.exif_transpose(opened)
        if not wide and see_through(upright):
            odd.append(SEE_THROUGH)
        peak = peak_of(upright, kind) if kind and kind not in tops else 0.0
        if wide and kind not in tops:
            return Example(odd=tuple(odd), kind=kind, peak=peak)
        if wide:
            pixels = np.rint(np.asarray(upright) / (tops[kind] / 255))
            upright = Image.fromarray(pixels.clip(max=255).astype(np.uint8))
        return replace(self._prepared(upright), odd=tuple(odd), kind=kind, peak=peak)

    def _prepared(self, example: Image.Image | bytes) -> Example:
        pixels = self._preprocessing.prepare(example)
        return Example(pixels, int.from_bytes(sha256(pixels.numpy().data).digest()[:8]))
