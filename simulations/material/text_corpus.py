"""Make a text corpus of the source of Python's standard library, which every machine has.

A class is a module or package, an example a few consecutive lines of it (code, comments,
docstrings), 128 bytes at most. Nothing is downloaded. Blank lines, licences and repeated examples
are left out. Each file is cut into stretches of lines, some of them for testing. Between a stretch
for testing and one for training an example is dropped, so that neighbours are never in both parts.

    python simulations/material/text_corpus.py runs/text/corpus.jsonl

writes a file for ``data = "text:runs/text/corpus.jsonl"``. Another version of Python has another
library, and gives a slightly different corpus.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from fedcompo.storage.files import write_atomically

CLASSES = (
    "argparse ast asyncio configparser ctypes dataclasses difflib doctest email enum http imaplib "
    "inspect ipaddress json logging mailbox multiprocessing optparse pickle statistics subprocess "
    "tarfile threading turtle typing unittest urllib xml zipfile"
).split()
"""Modules and packages of Python 3.11 to 3.13 with enough lines."""
LENGTH = 128
SHORTEST = 60  # bytes of an example
STRETCH = 16  # examples of one stretch of a file
TEST_EVERY = 4  # stretches, of which one is for testing
APART = {"test", "tests", "__pycache__"}
LEGAL = re.compile(r"copyright|licen[sc]e|warrant(y|ies)|all rights reserved", re.IGNORECASE)


def library() -> Path:
    """Folder of the standard library that this Python runs with."""
    return Path(sysconfig.get_paths()["stdlib"])


def sources(module: str) -> list[Path]:
    """Files of a module or package, sorted, without its tests; none if it does not exist."""
    folder, file = library() / module, library() / f"{module}.py"
    if file.is_file():
        return [file]
    return sorted(p for p in folder.rglob("*.py") if not APART & set(p.relative_to(folder).parts))


def lines_of(file: Path) -> list[str]:
    """Read the lines of a file, without blank lines and licence."""
    text = file.read_text(encoding="utf-8", errors="replace").replace("\0", " ").expandtabs()
    lines = [line.rstrip() for line in text.splitlines()]
    first = next((i for i, line in enumerate(lines) if line and not line.startswith("#")), 0)
    header = LEGAL.search("\n".join(lines[:first]))
    kept = lines[first:] if header else lines
    return [line for line in kept if line.strip() and not LEGAL.search(line)]


def examples(lines: list[str], length: int = LENGTH) -> Iterator[str]:
    """Cut lines into examples: as many consecutive lines as fit, from where the last one ended."""
    start = 0
    while start < len(lines):
        text, end = example_at(lines, start, length)
        if len(text.encode()) >= SHORTEST:
            yield text
        start = end


def example_at(lines: list[str], start: int, length: int) -> tuple[str, int]:
    """Take as many lines as fit, at least one; return them and the start of the next example."""
    end, text = start, ""
    while end < len(lines):
        longer = textwrap.dedent("\n".join(lines[start : end + 1]))
        if text and len(longer.encode()) > length:
            break
        text, end = longer, end + 1
    return text.encode()[:length].decode(errors="ignore"), end


def split_of(file_examples: list[str]) -> Iterator[tuple[str, str]]:
    """Mark each example of a file as train or test; drop those at a border."""
    for place, text in enumerate(file_examples):
        stretch, within = divmod(place, STRETCH)
        if stretch % TEST_EVERY != TEST_EVERY - 1:
            yield text, "train"
        elif 0 < within < STRETCH - 1:
            yield text, "test"


def corpus(classes: list[str], counts: dict[str, int]) -> list[dict[str, str]]:
    """Collect the examples of modules and packages, each text once.

    Of each, so many are kept by split; where there are more, evenly spaced ones. Returned is what
    :mod:`fedcompo.data.sources.text` reads, one dictionary an example.
    """
    seen: set[str] = set()
    rows = []
    for label in classes:
        found: dict[str, list[str]] = {split: [] for split in counts}
        for file in sources(label):
            for text, split in split_of(list(examples(lines_of(file)))):
                if (plain := " ".join(text.split())) not in seen:
                    seen.add(plain)
                    found[split].append(text)
        for split, count in counts.items():
            texts = found[split]
            if len(texts) < count:
                sys.exit(
                    f"{label} in {library()} yields {len(texts)} examples for {split}, expected "
                    f"{count}. Ask for fewer (--{split})."
                )
            kept = [texts[place * len(texts) // count] for place in range(count)]
            rows += [{"text": text, "label": label, "split": split} for text in kept]
        print(f"{label}: {', '.join(f'{len(t)} {s}' for s, t in found.items())}", flush=True)
    return rows


def main() -> None:
    """Parse the command line, collect, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("output", type=Path, help="the .jsonl file to write")
    parser.add_argument("--train", type=int, default=160, help="training examples a class")
    parser.add_argument("--test", type=int, default=40, help="test examples a class")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".jsonl":
        sys.exit(f"The output must end in .jsonl, got {arguments.output}.")
    for option in ("train", "test"):
        if (given := getattr(arguments, option)) < 1:
            sys.exit(f"--{option} must be at least 1, got {given}.")
    rows = corpus(CLASSES, {"train": arguments.train, "test": arguments.test})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(arguments.output, text.encode())
    print(f"wrote {arguments.output}: {len(rows)} examples of {len(CLASSES)} classes")


if __name__ == "__main__":
    main()
