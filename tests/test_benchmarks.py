"""The benchmarks still run, on models of a few numbers; nothing is said about time."""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_runs import CLASSES, run
from registry_builders import member, registry_of
from safetensors.torch import load_file, save_file

from fedcompo.config.choices import Wire
from fedcompo.storage.tensorstream import TensorDigest

BENCHMARKS = Path(__file__).parent / "benchmarks"
OPERATIONS = ["add", "remove", "compose", "load_file_mean", "safe_open_mean"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("registry_operations")


def job(script, folder: Path, **changes):
    start = script.Job("nothing", str(folder), "lora", 2, scale="tiny", classes=2, threads=1)
    return replace(start, **changes)


def test_registry_operations_fill_a_table_and_leave_nothing(script, tmp_path, monkeypatch, capsys):
    work, found = tmp_path / "work", tmp_path / "found.json"
    work.mkdir()
    options = ["--scale", "tiny", "--members", "3", "2", "--repeats", "2", "--classes", "2"]
    options += ["--folder", str(work), "--json", str(found)]
    monkeypatch.setattr(sys, "argv", ["registry_operations.py", *options])
    script.main()
    header, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:4] for row in cells] == [
        [kind, members, operation, "2"]
        for kind in ("full", "lora")
        for members in ("2", "3")
        for operation in OPERATIONS
    ]
    assert {len(row) for row in cells} == {header.count("|") - 1}
    rows = json.loads(found.read_text())
    assert [(row["kind"], str(row["members"]), row["operation"]) for row in rows] == [
        tuple(row[:3]) for row in cells
    ]
    for row in rows:
        assert row["seconds"] == pytest.approx(sum(row["parts"].values()))
        assert min(row["plain_read"], row["plain_write"], row["peak"], row["base"]) > 0
        expected = {"read", "write", "sync", "head", "arithmetic", "SHA-256", "other"}
        assert (set(row["parts"]) == expected) == (row["operation"] not in OPERATIONS[3:])
    assert not any(work.iterdir())


def test_bytes_are_no_fewer_than_those_of_the_files(script, tmp_path):
    adding = job(script, tmp_path, kind="full", operation="add")
    script.run(replace(adding, operation="fill"))
    needed = sum(path.stat().st_size for path in adding.inputs)
    found = script.run(adding)
    places = [tmp_path / "registry" / "model", adding.contributions[-1].parent]
    made = sum(path.stat().st_size for place in places for path in place.iterdir())
    assert found.read >= needed > 0
    assert found.read > found.written >= made > needed  # what was written is read for its SHA-256


def test_a_section_ends_where_it_ends(script):
    with script.clocks() as seconds:
        TensorDigest().add("weight", torch.zeros(1))
        time.sleep(0.2)
    assert seconds["other"] >= 0.2 > seconds["SHA-256"] > 0


def test_compositions_of_other_weights_are_refused(script, tmp_path):
    for operation in ("fill", "add", *OPERATIONS[2:], "compare"):
        script.run(job(script, tmp_path, operation=operation))
    path = tmp_path / "safe_open_mean" / "model.safetensors"
    weights = {name: tensor + 1e-4 for name, tensor in load_file(path).items()}
    save_file(weights, path)
    with pytest.raises(AssertionError):
        script.run(job(script, tmp_path, operation="compare"))


def test_an_operation_has_a_process_of_its_own(script, tmp_path):
    before = sys.modules["registry_operations"].measure
    try:
        script.measure = None  # not here
        found = script.run(job(script, tmp_path, scale="vit-b"))
    finally:
        script.measure = before
    assert found.peak > 50e6
    assert found.written < 1000


def test_tangent_steps_fill_a_table_and_agree(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("tangent_step")
    monkeypatch.setattr(sys, "argv", ["tangent_step.py", "--batch", "2", "--rounds", "1"])
    script.main()
    out = capsys.readouterr().out
    _, _, *lines = [line for line in out.splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["full", "JVP + VJP", "through the JVP"]
    assert all(float(value) > 0 for _, *values in rows for value in values)
    held = [float(row[3]) for row in rows]
    assert held[1] < min(held[0], held[2])
    assert float(out.rpartition("differ by ")[2].partition(",")[0]) < 1e-5


def table_of(monkeypatch, capsys, name: str, *options: str) -> list[list[str]]:
    """Rows of the table that a benchmark prints, without its head."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    script.main()
    _, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_fisher_passes_grow_with_the_classes_but_for_those_of_features(monkeypatch, capsys):
    options = ["--images", "2", "--rounds", "1", "--classes", "3", "9"]
    rows = table_of(monkeypatch, capsys, "fisher_passes", *options)
    assert [row[:3] for row in rows] == [
        [classes, curvature, passes]
        for classes, exact in (("3", "2"), ("9", "8"))
        for curvature, passes in (("features", "1"), ("exact", exact), ("monte-carlo", "4"))
    ]


def test_training_steps_are_set_beside_pefts(monkeypatch, capsys):
    pytest.importorskip("peft", reason="`pip install .[dev]` brings PEFT")
    rows = table_of(monkeypatch, capsys, "training_step", "--batches", "2", "--rounds", "1")
    assert [row[1] for row in rows] == [
        "PEFT", "plain full", "lora", "lora, bounded", "lora, anchored", "lora, IEL", "ia3",
        "full",
    ]  # fmt: skip
    held = {row[1]: float(row[4]) for row in rows}
    assert held["lora"] <= held["PEFT"] < held["plain full"]


def test_factored_fisher_sets_every_form_beside_the_dense_one(monkeypatch, capsys):
    rows = table_of(monkeypatch, capsys, "factored_fisher", "--images", "2", "--epochs", "2")
    assert [row[:2] for row in rows] == [
        [form, str(wire)] for form in ("dense", "factored") for wire in Wire
    ]
    assert rows[0][3:] == ["0.00%", "1.0000", "1.000", "1.000", "1.000", "1.000"]
    sizes = [int(row[2].replace(",", "")) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert all(float(row[4]) > 0.8 for row in rows)


def test_removals_fill_a_table(monkeypatch, capsys, tmp_path):
    options = ["--scale", "tiny", "--members", "2", "4", "--classes", "2", "3", "--repeats", "1"]
    rows = table_of(monkeypatch, capsys, "removal", *options, "--folder", str(tmp_path))
    assert [row[:2] for row in rows] == [["2", "2"], ["2", "4"], ["3", "2"], ["3", "4"]]
    assert all(float(value) >= 0 for row in rows for value in row[2:])


def test_a_rule_has_a_line_beside_the_mean(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rules = importlib.import_module("rules")
    options = ["--scale", "tiny", "--members", "2", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["rules.py", *options, "--rules", "regmean"])
    rules.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["regmean"]
    assert not list(tmp_path.iterdir())


def test_tools_merge_alike_and_fill_a_table(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("merging_tools")

    def here(command: list[str]) -> tuple[float, float]:
        if "--peft" in command:
            script.merge_with_peft(*command[-2:])
        else:
            run(*command[command.index("compose") :])
        return 1.0, 1.0

    monkeypatch.setattr(script, "timed", here)
    options = ["--backbone", "test_vit", "--rules", "mean", "--repeats", "1"]
    rows = table_of(monkeypatch, capsys, "merging_tools", *options)
    assert [row[:3] for row in rows] == [
        ["checkpoints", "mean", "fedcompo"],
        ["adapters", "mean", "fedcompo"],
        ["adapters", "mean", "PEFT"],
    ]
    assert rows[2][6].startswith("0 of ")
    assert float(rows[2][5]) < 1e-6


def test_images_fill_their_tables_and_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("images")
    monkeypatch.setattr(script, "child", lambda client, cache, _: script.read_all(client, cache))
    options = ["--counts", "10", "20", "--side", "64", "--photographs", "0"]
    monkeypatch.setattr(sys, "argv", ["images.py", *options, "--folder", str(tmp_path)])
    script.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [[cell.strip() for cell in row[:2]] for row in rows[2:]] == [
        [count, threads] for count in ("10", "20") for threads in "12"
    ]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert not any(tmp_path.iterdir())


def test_subtraction_recovers_a_single_client_and_none_of_a_batch(monkeypatch, capsys, tmp_path):
    leavers = [
        member(client, seed=seed, classes=classes)
        for seed, (client, classes) in enumerate(CLASSES.items())
    ]
    registry_of(tmp_path / "registry", *leavers)
    given = [str(tmp_path / "registry"), "--data", "digits", "--batches", "1", "2"]
    rows = table_of(monkeypatch, capsys, "subtraction", *given)
    figures = {tuple(row[:2]): row[2:] for row in rows if len(row) == 7}
    assert float(figures["float32", "1"][0]) > 0.999 > 0.9 > float(figures["float32", "2"][0])
