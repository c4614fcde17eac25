"""What tests that start Flower's real engine share: small settings, and a limit of time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fedcompo.config.scenario import as_toml
from fedcompo.config.setting import Scalar

BIN = Path(sys.executable).parent
QUICK = {
    "num-tasks": 2,
    "num-classes": 4,
    "images-per-class": 12,
    "local-epochs": 1,
    "local-steps": 2,
    "rank": 2,
    "fisher-examples": 8,
}
PROXIES = {
    name: f"{scheme}://127.0.0.1:1"
    for kind, scheme in (("http", "http"), ("https", "http"), ("grpc", "http"), ("all", "socks5"))
    for name in (f"{kind}_proxy", f"{kind}_proxy".upper())
}
"""A house whose proxies refuse everything."""
LIMIT = 300
"""Seconds after which a run has hung."""
SHARED: dict[str, Scalar] = {
    "seed": 3,
    "local-epochs": 1,
    "local-steps": 2,
    "rank": 2,
    "fisher-examples": 8,
    "realign": False,
    "kind": "full",
    "scale": 1.0,  # no vote, and one kind: in a deployment each question costs seconds
    "device": "cpu",
    "wire": "float32",
}
"""Settings of the one run that is simulated and deployed."""
AWKWARD = """it's "mine"  \\ ü = [1]"""
"""Name of a folder that shells, TOML and Flower would each read in another way."""
SECRET = "DOE_Jane_1900-01-01"
"""Stands in names and contents of files that cannot be read."""


@dataclass(frozen=True)
class Simulated:
    """A simulation that has ended."""

    command: subprocess.CompletedProcess[str]
    folder: Path
    """Where the command was given."""
    output: Path
    """Where its results were asked for."""


def simulate(folder: Path, images: Path) -> Simulated:
    """Give the command as a user would: some settings in a file, one beside it, a relative output.

    No proxy of the user's is in the way of what stays on this machine. A third client, whose images
    are spoilt, is left out.

    Args:
        folder: Where it is given.
        images: Of all clients.
    """
    spoil(Path(shutil.copytree(images, folder / "images")))
    settings = {**SHARED, "data": "folder:images"}
    rank = settings.pop("rank")
    (folder / "scenario.toml").write_text(as_toml(settings))
    options = ["--no-check", "--output", f"here/{AWKWARD}", "--set", f"rank={rank}"]
    done = subprocess.run(
        [BIN / "fedcompo", "simulate", "scenario.toml", *options],
        cwd=folder,
        env={**os.environ, **PROXIES},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    return Simulated(done, folder, folder / "here" / AWKWARD)


def spoil(images: Path) -> None:
    """Give the first client a folder that is not read, and a third one what cannot be read."""
    shutil.copytree(images / "hospital-a", images / "hospital-c")
    shutil.move(images / "hospital-a" / "test", images / "hospital-a" / "val")
    (images / "hospital-a" / SECRET).mkdir()  # is not read, which its log says
    spoilt = images / "hospital-c" / "train" / "0"
    exif = Image.Exif()
    exif[0x010E] = SECRET
    Image.new("L", (28, 28)).save(spoilt / f"{SECRET}.jpg", exif=exif)
    (spoilt / f"{SECRET}.jpg").write_bytes((spoilt / f"{SECRET}.jpg").read_bytes()[:-80])
    (spoilt / f"{SECRET}.png").write_text(SECRET)
