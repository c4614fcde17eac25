"""The benchmarks still run, at toy size by one command; nothing is said about time."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from fedcompo.config.choices import Wire

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def imported():
    """A script of the benchmarks, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def sections(imported, tmp_path_factory) -> dict[str, str]:
    """What the command writes about each benchmark at toy size."""
    output = tmp_path_factory.mktemp("benchmarks") / "benchmarks.md"
    run = imported("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", "--toy", "-o", str(output)])
        assert run.main() == 0, output.read_text()
    machine, *sections = output.read_text().split("\n## ")
    assert f"Python {sys.version.split()[0]}, fedcompo" in machine
    return {
        section.partition("benchmarks/")[2].partition(".py")[0]: section for section in sections
    }


def rows(section: str) -> list[list[str]]:
    """Cells of a section's tables, with their heads."""
    lines = [line for line in section.splitlines() if line[:1] == "|" and line[:3] != "|--"]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_benchmark_prints_a_table_of_full_rows(sections):
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if "parsed(" in path.read_text()}
    assert set(sections) == scripts - {"measuring"}
    for section in sections.values():
        assert len(rows(section)) > 1, section
        assert section.count("s\n\n") >= 1


def test_tangent_steps_agree_and_hold_less_than_a_full_one(sections):
    section = sections["tangent_step"]
    _, full, own, through = rows(section)
    assert [full[0], own[0], through[0]] == ["full", "JVP + VJP", "through the JVP"]
    assert float(own[3]) < min(float(full[3]), float(through[3]))
    assert float(section.rpartition("differ by ")[2].partition(",")[0]) < 1e-5


def test_describing_is_set_beside_a_forward_pass_by_curvature(sections):
    _, *found = rows(sections["describe"])
    assert [row[:3] for row in found] == [
        ["3", what, passes]
        for what, passes in (
            ("bare forward pass 16", "0"),
            ("describe without Fisher", "0"),
            *(("features", "1"), ("exact", "2"), ("monte-carlo", "4")),
        )
    ]
    assert found[0][4] == "1.00"


def test_training_steps_hold_no_more_than_pefts(sections):
    held = {row[1]: row[4] for row in rows(sections["training_step"])[1:]}
    tied, others = ["lora, bounded", "lora, anchored", "lora, IEL"], ["ia3", "full"]
    assert list(held) == ["PEFT", "plain full", "lora", *tied, *others]
    assert float(held["lora"]) <= float(held["PEFT"]) < float(held["plain full"])


def test_factored_fishers_stay_near_the_dense_one_in_fewer_bytes(sections):
    _, *found = rows(sections["factored_fisher"])
    assert [row[:2] for row in found] == [
        [form, str(wire)] for form in ("dense", "factored") for wire in Wire
    ]
    assert found[0][3:] == ["0.00%", "1.0000", "1.000", "1.000", "1.000", "1.000"]
    sizes = [int(row[2].replace(",", "")) for row in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(float(row[4]) > 0.8 for row in found)


def test_tools_merge_alike(sections):
    means = [row for row in rows(sections["merging_tools"]) if row[1] == "mean"]
    tools = ["fedcompo", "torch mean", "fedcompo", "torch mean", "PEFT"]
    assert [row[2] for row in means] == tools
    theirs = [row for row in means if row[2] != "fedcompo"]
    assert all(float(row[-2]) < 1e-6 and row[-1].startswith("0 of ") for row in theirs)


def test_subtraction_recovers_a_single_client_and_none_of_a_batch(sections):
    cosines = {tuple(row[:2]): row[2] for row in rows(sections["subtraction"]) if len(row) == 7}
    assert float(cosines["float32", "1"]) > 0.999 > 0.9 > float(cosines["float32", "2"])


def test_bytes_are_no_fewer_than_those_of_the_files(imported, tmp_path):
    operations, workload = map(imported, ("registry_operations", "registry_workload"))
    adding = workload.Job("add", str(tmp_path), "full", 2, scale="tiny", classes=2, threads=1)
    workload.fill(adding)
    needed = sum(path.stat().st_size for path in adding.inputs)
    found = operations.run(adding)
    places = [tmp_path / "registry" / "model", adding.contributions[-1].parent]
    made = sum(path.stat().st_size for place in places for path in place.iterdir())
    assert found.read >= needed > 0
    assert found.written >= made > needed


def test_a_process_is_measured_by_itself(imported):
    run = imported("measuring").run
    work = "import json; kept = bytearray(1 << 26); sum(range(10**6)); print(json.dumps({'a': 1}))"
    taken = run("-c", work)
    assert taken.told == {"a": 1}
    assert taken.seconds > 0 < taken.cpu
    assert 1 << 26 < taken.peak < 1 << 28  # this process has more
    with pytest.raises(RuntimeError, match="no such thing"):
        run("-c", "raise SystemExit('no such thing')")


def test_a_failed_benchmark_is_named_with_its_last_lines(imported, tmp_path, monkeypatch, capsys):
    run, output = imported("run"), tmp_path / "found.md"
    (tmp_path / "odd.py").write_text('"""Odd."""\nprint("begun")\nraise ValueError("why")\n')
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "BENCHMARKS", ["odd"])
    monkeypatch.setattr(sys, "argv", ["run.py", "-o", str(output)])
    assert run.main() == 1
    assert "failed: odd" in capsys.readouterr().out
    assert all(said in output.read_text() for said in ("## Odd.", "begun", "ValueError: why"))
