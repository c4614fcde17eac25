"""The report as a page: its figures are those of the results, and names from outside do no harm."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup
from typer.testing import CliRunner

from fedcompo.cli.app import app
from fedcompo.config.run import RunConfig
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.story import story
from fedcompo.report.pages import registry_page, run_page, write_report

GOLDEN = Path(__file__).parents[1] / "golden"
BROWSER = shutil.which("chromium")
HOSTILE = (
    "<script>alert(1)</script>", "</svg><img src=x onerror=alert(2)>", "a\u202egnp.exe",
    "\x1b[31mred", "$x_1$ & \"q\" 'p'", "-->", "{{ 7 * 7 }}",
)  # fmt: skip


class Document(HTMLParser):
    """What a page consists of: tags, attributes, text, and the cells of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if dict(attributes).get("role") == "region":
            self.tables[dict(attributes)["aria-label"]] = self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self._rows[-1][-1] += data

    def rows(self, title: str) -> list[dict[str, str]]:
        header, *rows = self.tables[title]
        return [dict(zip(header, row, strict=True)) for row in rows]


def results(clients: int = 3) -> dict:
    """What a run writes: each client has a class of its own."""
    names, classes = [f"client-{i}" for i in range(clients)], [f"class {i}" for i in range(clients)]
    accuracies = {
        "frozen_class_il_accuracy": 0.25, "own_task_accuracy": 0.9375, "own_heads_accuracy": None,
        "class_il_accuracy": 0.75, "task_il_accuracy": 1.0,
    }  # fmt: skip
    cost = {"seconds": 1.26, "bytes_sent": 2_345_678, "bytes_received": 616}
    counts = [[i, i, 3] for i in range(clients)] + [
        [i, (i + 1) % clients, 1] for i in range(clients)
    ]
    return {
        "method": "ita",
        "created": "2026-01-02T03:04:05Z",
        "seconds": 65.0,
        "seed": 7,
        "settings": {**RunConfig().flat(), "rank": 4, "output": "/somewhere"},
        "backbone": {"name": "pico", "parameters": 1234},
        "versions": {"torch": "2.6"},
        "platform": {"system": "a machine"},
        "left_out": [{"client": "late", "phase": "train", "reason": "no answer"}],
        "missed": [],
        "notes": ["Look at `rank`."],
        "phases": {
            label: {**cost, "peak_memory_bytes": {"client": 5 * 10**8, "server": 10**9}}
            for label in ("describe", "train, round 1", "train, round 2")
        },
        **accuracies,
        "interval": [0.7, 0.8],
        "clients_evaluated": names,
        "per_client": {
            name: {
                **accuracies, "class_il_accuracy": (i + 1) / clients, "interval": [0.125, 0.875],
                "classes": [classes[i]], "kind": "lora", "num_examples": 20 + i,
                "num_test_examples": 4,
            }
            for i, name in enumerate(names)
        },
        "by_class": {
            name: {
                "images": 4, "correct": 3, "accuracy": 0.75, "interval": [0.3, 0.95],
                "clients": [names[i]], "mistaken_for": [[classes[(i + 1) % clients], 1]],
            }
            for i, name in enumerate(classes)
        },
        "worst_classes": classes[:2],
        "confusion": {"classes": classes, "counts": counts},
        "calibration": {
            "error": 0.0625,
            "bins": [
                {"from": 0.0, "to": 0.5, "images": 0, "confidence": None, "accuracy": None},
                {"from": 0.5, "to": 1.0, "images": 12, "confidence": 0.8, "accuracy": 0.75},
            ],
        },
        "scale": {
            "scale": 2.5, "by": "vote", "votes": 40,
            "candidates": [
                {"scale": scale, "loss": 1 / (scale + 1), "accuracy": 0.5, "shrinkage": 0.1}
                for scale in (0.0, 2.5)
            ],
        },
        "registry": {"path": "/somewhere/registry", "root": "a" * 64},
        "diagnostics": {
            "clients": names, "tau_norms": [1.5] * clients, "composition_gap": 0.125,
            "outliers": [],
            "fisher_gram": [[4.0 if i == j else -1.0 for j in names] for i in names],
        },
        "classes": classes,
    }  # fmt: skip


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Draw nothing: that takes half a second."""
    monkeypatch.setattr("fedcompo.report.drawing.drawn", lambda *_, **__: Markup())


@pytest.fixture(scope="module")
def page() -> Document:
    return Document(run_page(results()))


def test_every_table_holds_the_figures_of_the_results(page):
    values = results()
    for client, row in zip(values["per_client"], page.rows("Accuracy by client, %"), strict=True):
        own = values["per_client"][client]
        assert row == {
            "client": client, "train images": str(own["num_examples"]), "test images": "4",
            "frozen": "25.0", "alone": "93.8",
            "all classes": f"{100 * own['class_il_accuracy']:.1f}",
            "own classes": "100.0", "95 % interval": "12.5 to 87.5", "classes": own["classes"][0],
        }  # fmt: skip
    assert page.rows("Mean over clients, %")[0]["all classes"] == "75.0"
    assert page.rows("Mean over clients, %")[0]["95 % interval"] == "70.0 to 80.0"
    assert page.tables["Accuracy by class"][1:] == [
        [f"class {i}", f"client-{i}", "4", "3", "75.0", "30.0 to 95.0", f"class {(i + 1) % 3} (1)"]
        for i in range(3)
    ]
    assert [row["class"] for row in page.rows("Worst classes")] == ["class 0", "class 1"]
    assert page.tables["Mistakes"][1:] == [
        [f"class {i}", f"class {(i + 1) % 3}", "1", "25.0"] for i in range(3)
    ]
    assert page.tables["Bins of confidence"][1:] == [["50.0 to 100.0", "12", "80.0", "75.0"]]
    assert page.tables["Candidates"][1:] == [
        ["0", "0.1", "1", "50.0"], ["2.5", "0.1", "0.2857", "50.0"]
    ]  # fmt: skip
    cosines = [["+1.000" if i == j else "-0.250" for j in range(3)] for i in range(3)]
    assert [row[1:] for row in page.tables["Cosines"][1:]] == cosines
    assert page.tables["Lengths"][1:] == [[f"client-{i}", "1.5", "4"] for i in range(3)]
    assert page.tables["Phases"][1:] == [
        ["describe", "1", "1.3", "2.3 MB", "616 B", "500 MB", "1.0 GB"],
        ["train", "2", "2.5", "4.7 MB", "1.2 kB", "500 MB", "1.0 GB"],
    ]
    assert page.tables["Settings that differ from the defaults"][1:] == [["rank", "4", "8"]]
    assert page.tables["Clients"][1:] == [["late", "left out", "train", "no answer"]]


def test_what_one_sees_first_says_how_it_went_and_who_was_left_out(page):
    for said in ("75.0 %", "95 % interval 70.0 to 80.0", "1 min 5 s", "Left out: late (train): "):
        assert said in page.text
    for said in ("λ = 2.5", "Gap Ω of Theorem 1", "0.125", "calibration error: 6.2 %"):
        assert said in page.text
    assert "9 of 12 test images are right" in page.text


def test_a_page_asks_for_nothing_from_anywhere(page):
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes
    assert not page.tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), value


def test_the_same_results_give_the_same_bytes(tmp_path):
    write_report(tmp_path, results())
    before = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path, results())
    assert (tmp_path / "report.html").read_bytes() == before


def hostile() -> dict:
    text = json.dumps(results(len(HOSTILE)))
    for i, name in enumerate(HOSTILE):
        inside = json.dumps(name)[1:-1]
        text = text.replace(f'"class {i}"', f'"{inside}"').replace(f'"client-{i}"', f'"{inside}"')
    values = json.loads(text)
    values["left_out"][0]["reason"] = HOSTILE[0]
    values["notes"] = list(HOSTILE)
    return values


def test_names_from_outside_are_text_and_steer_nothing(page):
    html = run_page(hostile())
    seen = Document(html)
    assert seen.tags <= page.tags
    assert {name for name, _ in seen.attributes} <= {name for name, _ in page.attributes}
    assert not any(c in html for c in "\x1b\u202e")
    for name in ("<script>alert(1)</script>", "a⟨U+202E⟩gnp.exe", "⟨U+001B⟩[31mred", "{{ 7 * 7 }}"):
        assert name in [row["client"] for row in seen.rows("Accuracy by client, %")]
        assert name in [row["class"] for row in seen.rows("Accuracy by class")]


def test_results_of_an_earlier_version_lack_sections_and_no_more(undrawn):
    old = results()
    for key in ("by_class", "worst_classes", "confusion", "calibration", "interval", "missed"):
        del old[key]
    for own in old["per_client"].values():
        del own["interval"]
    seen = Document(run_page(old))
    assert "95 % interval" not in seen.tables["Accuracy by client, %"][0]
    assert not {"Accuracy by class", "Mistakes", "Bins of confidence"} & seen.tables.keys()


def test_a_baseline_has_rounds_and_no_task_vectors(undrawn):
    values = {**results(), "method": "fedavg"}
    del values["scale"], values["registry"], values["diagnostics"]
    values["rounds"] = [{"round": n, "trained": ["a", "b"], "mean_loss": 1 / n} for n in (1, 2)]
    seen = Document(run_page(values))
    assert seen.tables["Rounds"][1:] == [["1", "2", "1"], ["2", "2", "0.5"]]
    assert "Lengths" not in seen.tables


def test_clients_that_came_one_after_the_other_have_a_matrix(undrawn):
    course = {
        "arrivals": ["a", "b"], "matrix": [[1.0, None], [0.5, 0.75]], "course": [1.0, 0.625],
        "average": 0.8125, "final": 0.625, "forgetting": 0.5,
    }  # fmt: skip
    values = {**results(), "arrivals": {"class_il_accuracy": course}}
    seen = Document(run_page(values))
    assert seen.tables["After each arrival: all classes, %"] == [
        ["after", "a", "b"], ["a", "100.0", "–"], ["b", "50.0", "75.0"]
    ]  # fmt: skip
    assert "average 81.2 %, final 62.5 %, forgetting 50.0 %" in seen.text


def test_a_removal_says_who_left_and_what_it_did(undrawn):
    kept = ("created", "seconds", "seed", "settings", "backbone", "versions", "platform", "phases")
    values = {key: results()[key] for key in (*kept, "left_out", "missed", "notes", "scale")}
    figures = {"class_il_accuracy": 0.5, "task_il_accuracy": 0.75}
    values |= {
        "method": "removal", "removed": "dan", "record": "r.json", "survivors": ["ada", "ben"],
        "root_before": "0", "root_after": "1", "root": "2", "to_retrain": ["ben"], "rounds": [],
        "accuracy_before": {"ada": figures}, "accuracy_after": {"ada": figures, "ben": figures},
    }  # fmt: skip
    seen = Document(run_page(values))
    assert "dan left; ada, ben stay." in seen.text
    assert "train again: ben." in seen.text
    assert seen.tables["Accuracy of those who stay, %"][1:] == [
        ["ada", "50.0", "50.0", "75.0", "75.0"], ["ben", "–", "50.0", "–", "75.0"]
    ]  # fmt: skip


def test_a_thousand_clients_fold_into_a_page_that_one_can_open():
    values = results(1000)
    values["diagnostics"]["fisher_gram"] = None
    html = run_page(values)
    seen = Document(html)
    assert len(html.encode()) < 5_000_000
    assert "Accuracy by client, % (1000 rows)" in seen.text
    assert [row["client"] for row in seen.rows("The 10 lowest, %")] == [
        f"client-{i}" for i in range(10)
    ]
    assert "The 200 most frequent of 1000 mistakes" in seen.tables


def test_a_registry_tells_who_is_in_who_left_and_shows_the_receipts():
    registry = story(RegistryReader(GOLDEN / "mixed"))
    seen = Document(registry_page(registry))
    assert [row["client"] for row in seen.rows("Members")] == ["ada", "ben", "cho"]
    (gone,), (receipt,) = seen.rows("Removed"), seen.rows("Receipts")
    assert (gone["client"], gone["asked by"]) == ("dan", "dan")
    assert gone["reason"] == "Golden bits need a receipt."
    assert gone["to train again"] == "ben, cho"
    record = json.loads((GOLDEN / "mixed" / "removals" / "000003-dan.json").read_text())
    assert receipt["signature"] == "holds"
    assert (receipt["root before"], receipt["root after"]) == (
        record["root_before"], record["root_after"]
    )  # fmt: skip
    assert receipt["SHA-256 of the record"].startswith("8b318f878f2359d9")
    assert [row["event"] for row in seen.rows("Journal")] == ["created", "added", "removed"]
    assert "Accuracy by client, %" not in seen.tables


@pytest.mark.parametrize(
    ("change", "said"),
    [(str.upper, "not signed by the registry&#39;s key"), (None, "No such file")],
)
def test_a_receipt_that_does_not_hold_is_told_at_the_top(tmp_path, change, said):
    shutil.copytree(GOLDEN / "mixed", tmp_path / "registry")
    record = tmp_path / "registry" / "removals" / "000003-dan.json"
    if change:
        record.write_text(record.read_text().replace("Golden bits", change("Golden bits")))
    else:
        record.unlink()
    page = registry_page(story(RegistryReader(tmp_path / "registry")))
    (alert,) = re.findall('<li class="grave">(.*?)</li>', page)
    assert "000003-dan.json" in alert
    assert said in alert


def test_the_command_finds_registries_and_runs_and_the_run_beside_a_registry(
    tmp_path, monkeypatch, undrawn
):
    shutil.copytree(GOLDEN / "mixed", tmp_path / "run" / "registry")
    (tmp_path / "run" / "results.json").write_text(json.dumps(results()))
    shutil.copytree(GOLDEN / "mixed", tmp_path / "run" / "pets")  # the run did not make this one
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"created": 1, "settings": {}}')
    monkeypatch.chdir(tmp_path)
    for arguments, said in (
        (["run/registry"], "the registry has changed since"),
        (["-r", "run/registry", "-o", "other.html"], "Who is out"),
        (["run", "-o", "run.html"], "fedcompo: ita on digits"),
    ):
        done = CliRunner().invoke(app, ["report", *arguments])
        assert done.exit_code == 0, done.output
        text = Document(Path(done.stdout.removeprefix("Report: ").strip()).read_text()).text
        assert said in text
    CliRunner().invoke(app, ["report", "run/pets", "-o", "pets.html"])
    assert "Accuracy by client, %" not in Document(Path("pets.html").read_text()).tables
    for arguments, said in (
        (["run", "-o", "run/results.json"], "ends in .html"),
        (["run", "-r", "run/registry"], "Name one"),
        (["nowhere"], "There is no registry at nowhere"),
        (["other"], "holds no results of a run: it lacks backbone"),
    ):
        done = CliRunner().invoke(app, ["report", *arguments])
        assert done.exit_code in (1, 2)
        assert said in done.stderr


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_a_browser_opens_it_without_an_error_and_runs_nothing(tmp_path):
    write_report(tmp_path, hostile())
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/report.html",
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    seen, written = Document(done.stdout), Document((tmp_path / "report.html").read_text())
    assert "script" not in seen.tags
    assert seen.tables == written.tables
