"""Peak memory and speed of reading a client's folder, whatever the number of its images.

    python tests/benchmarks/images.py --counts 1000 10000 100000 --folder /path/with/20/GB

JPEGs of one size are made once and linked under many names. For each number of images and of
threads a process reads the folder and goes through all images in batches: *cold*, decoding them,
and *again*, from the file of decoded images. Beside it stands what Pillow alone decodes.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from measuring import head, options, parsed, row, run
from PIL import Image

SIZE = 224
"""Side of a backbone's input, in pixels."""
BATCH = 64


def picture(seed: int, width: int, height: int) -> bytes:
    """Make a JPEG of smooth shades and noise."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (height // 32, width // 32, 3)).astype(np.uint8))
    shades = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    pixels = shades + draw.integers(-12, 13, shades.shape, np.int16)
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
    return content.getvalue()


def make_folder(folder: Path, distinct: Iterable[bytes], count: int) -> Path:
    """Write a client's folder of so many names for some pictures, in two classes."""
    originals = []
    (folder / "originals").mkdir(parents=True)
    for number, content in enumerate(distinct):
        originals.append(folder / "originals" / f"{number}.jpg")
        originals[-1].write_bytes(content)
    for number in range(count):
        part, own = "test" if number % 5 == 0 else "train", "ab"[number % 2]
        home = folder / "client" / part / own
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{number:06}.jpg").hardlink_to(originals[number % len(originals)])
    return folder / "client"


def anonymous() -> int:
    """Memory of this process that is no file's, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])


def read_all(client: Path, cache: Path) -> dict[str, float]:
    """Load a client's folder, and read all images once in batches; in a process of its own."""
    from fedcompo.backbone.preprocessing import Preprocessing
    from fedcompo.data.client_data import load_folder
    from fedcompo.method.images import batches
    from fedcompo.runtime import peak_bytes, reset_peak

    seen = Preprocessing(SIZE, 3, (0.5,) * 3, (0.5,) * 3, crop_fraction=0.9)
    seen.resize(Image.new("RGB", (SIZE, SIZE)))  # timm is imported
    peak, done = anonymous(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, anonymous())

    threading.Thread(target=watch, daemon=True).start()
    reset_peak()
    before, started = anonymous(), time.perf_counter()
    data = load_folder(client, seen, seed=0, cache=cache)
    loaded, count = time.perf_counter() - started, 0
    for images in (data.train.images, data.test.images):
        count += sum(map(len, batches(images, BATCH)))
    passed = time.perf_counter() - started - loaded
    done.set()
    return {
        "count": count,
        "load": loaded,
        "pass": passed,
        "resident": peak_bytes()["resident"],
        "anonymous": peak,
        "before": before,
    }


def child(client: Path, cache: Path, threads: int, *, here: bool) -> dict[str, float]:
    """Read a folder in another process that may use so many CPUs."""
    words = __file__, "--read", client, "--cache", cache
    return run(*words, here=here, OMP_NUM_THREADS=str(threads)).told


def rate(work: Callable[[bytes], Any], contents: list[bytes], threads: int) -> float:
    """Pictures a second."""
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, contents):
            pass
    return len(contents) / (time.perf_counter() - started)


def bare(content: bytes) -> None:
    """Let Pillow decode a picture."""
    Image.open(io.BytesIO(content)).load()


def table_of_folders(
    counts: list[int], threads: list[int], side: int, work: Path, *, here: bool
) -> None:
    """Print a line for each number of images and of threads."""
    distinct = [picture(seed, side, side) for seed in range(min([200, *counts]))]
    limits = {n: rate(bare, distinct * 10, n) for n in threads}
    print(
        f"JPEGs of {side} pixels to {SIZE}; Pillow alone decodes, images a second: "
        + ", ".join(f"{limit:,.0f} in {n} thread(s)" for n, limit in limits.items())
    )
    columns = ["images", "threads", "cold s", "images/s", "again s", "a pass s", "images/s"]
    columns += ["peak MiB, cold", "of it anonymous", "anonymous before", "again: anonymous"]
    print()
    head(*columns)
    for count in counts:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            client = make_folder(Path(folder), distinct, count)
            for n in threads:
                with tempfile.TemporaryDirectory(dir=work) as cache:
                    cold, again = (child(client, Path(cache), n, here=here) for _ in range(2))
                cells = [f"{count:,}", n, f"{cold['load']:.1f}", f"{count / cold['load']:,.0f}"]
                cells += [f"{again['load']:.1f}", f"{again['pass']:.1f}"]
                cells += [f"{count / again['pass']:,.0f}"]
                memory = cold["resident"], cold["anonymous"], cold["before"], again["anonymous"]
                cells += [f"{value / 2**20:,.0f}" for value in memory]
                row(*cells)


def table_of_photographs(threads: list[int], count: int) -> None:
    """Print how fast pictures of 12 megapixels become an input, decoded whole and reduced."""
    from fedcompo.backbone.preprocessing import Preprocessing
    from fedcompo.data.pictures import picture_of
    from fedcompo.runtime import one_thread

    seen = Preprocessing(SIZE, 3, (0.5,) * 3, (0.5,) * 3, crop_fraction=0.9)
    contents = [picture(seed, 4032, 3024) for seed in range(2)] * max(1, count // 2)
    print("\n4032 x 3024, images a second:\n")
    head("threads", "Pillow alone", "whole", "reduced")
    ways = bare, lambda c: seen.resize(Image.open(io.BytesIO(c))), lambda c: picture_of(c, seen)
    with one_thread():
        for n in threads:
            row(n, *(f"{rate(way, contents, n):.1f}" for way in ways))


def main() -> None:
    """Measure, print, and leave nothing."""
    parser = options(__doc__)
    parser.add_argument("--counts", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--photographs", type=int, default=16, help="0: none")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    given = parsed(parser, counts=[10, 20], side=64, photographs=0)
    if given.read:
        print(json.dumps(read_all(given.read, given.cache)))
        return
    if given.counts:
        table_of_folders(given.counts, given.threads, given.side, given.folder, here=given.toy)
    if given.photographs:
        table_of_photographs(given.threads, given.photographs)


if __name__ == "__main__":
    main()
