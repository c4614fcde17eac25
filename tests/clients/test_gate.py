"""Nothing of a client's files reaches the server: not in a fault, not on the wire, not in a log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from app_runs import run
from flwr.app import RecordDict
from PIL import Image
from round_runs import draw_images

from clients import gate
from clients.local import LocalClient
from fedcompo.engine.run_folder import PROGRESS
from fedcompo.errors import BackboneError, ConfigError, TooFewClients
from fedcompo.report import progress

SECRET = "DOE_Jane_1900-01-01"
OWNED = {"site-a": {"ant": 6, "bee": 6}, "site-b": {"cat": 6, "dog": 6}, "site-c": {"eel": 6}}
SEE = "see the client's own log."


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three clients; the third has secrets in a file's name and in EXIF from the beginning."""
    monkeypatch.setenv("FEDCOMPO_STATE", str(tmp_path / "state"))
    folder = draw_images(tmp_path / "images", OWNED)
    exif = Image.Exif()
    exif[0x010E] = SECRET  # ImageDescription
    Image.new("L", (28, 28)).save(folder / "site-c/train/eel" / f"{SECRET}.jpg", exif=exif)
    return folder


def unreadable(site: Path) -> None:
    (site / "train/eel" / f"{SECRET}_2.png").write_text(SECRET)


def truncated(site: Path) -> None:
    picture = site / "train/eel" / f"{SECRET}.jpg"
    picture.write_bytes(picture.read_bytes()[:-80])


def nested(site: Path) -> None:
    (site / "train/eel" / SECRET).mkdir()


def beside(site: Path) -> None:
    (site / "train" / f"{SECRET}.txt").write_text(SECRET)


def empty(site: Path) -> None:
    (site / "train" / SECRET).mkdir()


def misplaced(site: Path) -> None:
    (site / "train").rename(site / SECRET)


FAULTS: dict[Callable[[Path], None], str] = {
    unreadable: f"DataError: 1 image(s) of class 'eel' cannot be used; {SEE}",
    truncated: f"DataError: 1 image(s) of class 'eel' cannot be used; {SEE}",
    nested: f"DataError: a class folder holds a folder; {SEE}",
    beside: f"DataError: there are files beside the class folders; {SEE}",
    empty: f"DataError: a class folder is empty; {SEE}",
    misplaced: f"DataError: there is no folder 'train'; {SEE}",
}


class Watched:
    """Options of a run in this process that keep what the clients send."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        asked = ("query.describe", "train", "query.realign", "query.vote", "evaluate")
        self.options = {"tamper": {(i, kind): self._keep for i in range(3) for kind in asked}}

    def _keep(self, reply):
        self.sent += [a.data for r in reply.content.array_records.values() for a in r.values()]
        self.sent.append(repr((reply.metadata, reply.has_error())).encode())
        return reply


def federate(
    images: Path, output: Path, caplog: pytest.LogCaptureFixture, nodes=None, **settings
) -> None:
    """Run the three; the test fails if a secret is sent, written or logged by the server."""
    watched = Watched()
    watched.options["node_configs"] = nodes or {}
    flower = logging.getLogger("flwr")
    flower.addHandler(caplog.handler)  # it passes nothing on
    try:
        run(watched.options, output, data=f"folder:{images}", num_classes=0, **settings)
    finally:
        flower.removeHandler(caplog.handler)
        files = [path for path in output.rglob("*") if path.is_file()]
        assert (output / "events.jsonl") in files
        assert len(watched.sent) > 2
        hold = [path.read_bytes() for path in files] + [str(path).encode() for path in files]
        assert not [text for text in (*hold, *watched.sent) if SECRET.encode() in text]
        assert SECRET not in "".join(logged(caplog, "flwr"))


def logged(caplog: pytest.LogCaptureFixture, logger: str) -> Iterator[str]:
    """What a logger wrote, tracebacks too."""
    for record in caplog.records:
        if record.name.partition(".")[0] == logger:
            yield logging.Formatter().format(record)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_of_a_fault_in_its_files_the_kind_alone_leaves_a_client(images, tmp_path, caplog, fault):
    fault(images / "site-c")
    with pytest.raises(TooFewClients) as error:
        federate(images, tmp_path / "out", caplog, min_clients=3)
    assert FAULTS[fault] in str(error.value)
    assert SECRET not in str(error.value)
    assert SECRET in "".join(logged(caplog, "clients"))


@pytest.mark.parametrize("faulty", [True, False])
def test_a_run_is_clean_to_the_end(images, tmp_path, caplog, faulty):
    data = tmp_path / SECRET / SECRET
    data.parent.mkdir()
    (images / "site-c").rename(data)
    (data / f"old {SECRET}").mkdir()
    if faulty:
        unreadable(data)
    own = {"client": "site-c", "data": str(data), "state": str(tmp_path / SECRET)}
    nodes = {2: {**own, "min-images": 1}}
    federate(images, tmp_path / "out", caplog, nodes, local_steps=1)
    text = (tmp_path / "out" / "results.json").read_text()
    assert ("1 image(s) of class 'eel' cannot be used" in text) is faulty
    assert (tmp_path / "out" / "registry" / "clients" / "site-c").exists() is not faulty
    assert f"old {SECRET}" in "".join(logged(caplog, "fedcompo"))


def test_of_an_unforeseen_error_its_type_alone_leaves_a_client(
    images, tmp_path, caplog, monkeypatch
):
    alien = type(SECRET, (KeyError,), {})  # of no package that we know

    def fail(self, request):
        raise alien(SECRET) from OSError(2, SECRET, SECRET)

    monkeypatch.setattr(LocalClient, "describe", fail)
    with pytest.raises(TooFewClients, match=f"KeyError; {SEE}"):
        federate(images, tmp_path / "out", caplog)
    assert "".join(logged(caplog, "clients")).count("Traceback") == len(OWNED)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(SECRET), f"MemoryError; {SEE}"),
        (FileNotFoundError(2, SECRET, SECRET), f"FileNotFoundError; {SEE}"),
        (torch.OutOfMemoryError(SECRET), f"OutOfMemoryError; {SEE}"),
        (Image.UnidentifiedImageError(SECRET), f"OSError; {SEE}"),
        (BackboneError(SECRET), f"BackboneError; {SEE}"),
        (ConfigError(SECRET, told="a cap is negative"), f"ConfigError: a cap is negative; {SEE}"),
        (ConfigError.public("`wire` is int8."), "ConfigError: `wire` is int8."),
    ],
)
def test_what_is_told_of_an_error(error: Exception, reason: str) -> None:
    assert gate.told(error) == reason


def test_in_a_simulation_each_client_has_a_log_of_its_own(images, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(gate.LOGS, str(tmp_path / "logs"))
    unreadable(images / "site-c")
    with pytest.raises(TooFewClients):
        run({}, tmp_path / "out", data=f"folder:{images}", num_classes=0, min_clients=3)
    assert f"{SECRET}_2.png" in (tmp_path / "logs" / "site-c.log").read_text()
    assert "Epoch" not in (tmp_path / "logs" / "site-c.log").read_text()
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize("simulated", [True, False])
def test_long_work_is_told_of_in_the_client_s_log_and_in_a_simulation_to_its_display(
    tmp_path, monkeypatch, caplog, simulated
):
    for pause in ("QUIET", "PAUSE", "LINE"):
        monkeypatch.setattr(progress, pause, 0)
    monkeypatch.delenv(gate.LOGS, raising=False)
    if simulated:
        monkeypatch.setenv(gate.LOGS, str(tmp_path))
    caplog.set_level("INFO")
    files, events = progress.Files(tmp_path / PROGRESS), []

    def work() -> RecordDict:
        with progress.track(9, "images", "training") as count:
            count(3)
            events.extend(files.read())
            return RecordDict()

    gate.answer_of(work, "anna", "train")
    assert "training: 3 of 9 images" in caplog.text
    assert [(e["client"], e["phase"], e["done"]) for e in events] == [("anna", "train", 3)][
        :simulated
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["anna.log"][:simulated]


def test_a_log_that_cannot_be_written_ends_the_request(images, tmp_path, monkeypatch):
    (tmp_path / "logs").write_text("no folder")
    monkeypatch.setenv(gate.LOGS, str(tmp_path / "logs"))
    with pytest.raises(TooFewClients, match=f"FileExistsError; {SEE}"):
        run({}, tmp_path / "out", data=f"folder:{images}", num_classes=0)
