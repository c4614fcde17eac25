"""Settings from scenario files and the command line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcompo.config import scenario
from fedcompo.config.presets import PAPER
from fedcompo.errors import ConfigError


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("kind=lora", ("kind", "lora")),
        ("alpha=0.5", ("alpha", 0.5)),
        ("alpha = 3", ("alpha", 3)),
        ("learning-rate=1e-4", ("learning-rate", 1e-4)),
        ("realign=false", ("realign", False)),
        ("data=npz:/x y.npz", ("data", "npz:/x y.npz")),
        ('data="npz:/x y.npz"', ("data", "npz:/x y.npz")),
        ("output=2026", ("output", "2026")),
        ("output=a=b", ("output", "a=b")),
        ("checkpoint=", ("checkpoint", "")),
        ("output=2026-11-21", ("output", "2026-11-21")),
        ("alpha=[1, 2]", ("alpha", "[1, 2]")),
        ("alpha=1\nseed=2", ("alpha", "1\nseed=2")),
    ],
)
def test_an_assignment_is_a_toml_scalar_or_bare_text(
    assignment: str, expected: tuple[str, object]
) -> None:
    key, value = scenario.parse_assignment(assignment)
    assert (key, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize("assignment", ["kind", "=lora", ""])
def test_an_assignment_without_key_or_equals_sign_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        scenario.parse_assignment(assignment)


def test_all_faults_of_all_sources_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('alpah = 3\nkind = "lora"\n')
    with pytest.raises(ConfigError) as caught:
        scenario.settings_of(file, ["rank=-1", "oops"], {"seed": -2})
    for fault in ("`alpah`", "`alpha`?", "`rank`", "`oops` is not of the form", "`seed`"):
        assert fault in str(caught.value)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('kind = "full"\nalpha = 1\nseed = 1\n')
    values = scenario.settings_of(file, ["alpha=2", "seed=2"], {"seed": 3})
    assert values == {"kind": "full", "alpha": 2, "seed": 3}


def test_a_preset_stands_below_all_that_is_given(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('preset = "paper"\nrank = 4\nscale = 2\n')
    values = scenario.settings_of(file, ["aside=0.1"], {"seed": 3})
    given = {"rank": 4, "scale": 2, "aside": 0.1, "seed": 3, "preset": "default"}
    assert values == {**PAPER, **given}
    assert scenario.settings_of(None, ["preset=paper", "scale=2.5"], {})["scale"] == "2.5"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[train]\nalpha = 1", r"`\[train\]` is a table"),
        ("alpha = [1]", "must be one text, number or true/false"),
        ("alpha = ", "no valid TOML"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_scenario_is_refused(
    tmp_path: Path, text: str | None, complaint: str
) -> None:
    file = tmp_path / "s.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        scenario.read_scenario(file)


def test_paths_become_absolute_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (tmp_path / "scenarios").mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", "/home/ann")
    file = tmp_path / "scenarios" / "s.toml"
    file.write_text(
        'data = "folder:../my images"\ncheckpoint = "~/vit.safetensors"\n'
        'anchor = "reference"\nreference = "../public.safetensors"\n'
    )
    values = scenario.settings_of(file, [], {"output": "out/./x"})
    assert values == {
        "data": f"folder:{tmp_path}/my images",  # not relative to the scenario
        "checkpoint": "/home/ann/vit.safetensors",
        "anchor": "reference",
        "reference": f"{tmp_path}/public.safetensors",
        "output": f"{here}/out/x",
    }


def test_a_data_set_on_the_hub_is_no_path_and_a_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"data": "hf:ann/birds#label=fine_label"}
    assert scenario.with_absolute_paths(values, tmp_path) == values
    assert scenario.without_paths(values) == values
    (tmp_path / "ann/birds").mkdir(parents=True)
    absolute = {"data": f"hf:{tmp_path}/ann/birds#label=fine_label"}
    assert scenario.with_absolute_paths(values, tmp_path) == absolute
    assert scenario.without_paths(absolute) == {"data": f"hf:{scenario.ELSEWHERE}"}


@pytest.mark.parametrize("source", ["folder", "manifest", "npz", "text"])
def test_the_path_of_every_source_that_has_one_becomes_absolute(source: str) -> None:
    values = scenario.with_absolute_paths({"data": f"{source}:a/../b.x"}, Path("/here"))
    assert values == {"data": f"{source}:/here/b.x"}


@pytest.mark.parametrize(
    "values", [{"data": "digits"}, {"output": ""}, {"checkpoint": ""}, {"data": "npz:/a/b.npz"}, {}]
)
def test_what_is_no_relative_path_stays(values: dict[str, str]) -> None:
    assert scenario.with_absolute_paths(values, Path("/somewhere")) == values


@pytest.mark.parametrize(
    ("file", "data", "name"),
    [
        (Path("/a/my.scenario.toml"), "digits", "my.scenario"),
        (None, "digits", "digits"),
        (None, "npz:/x/birds.npz", "birds"),
        (None, "folder:/x/hospitals", "hospitals"),
        (None, "hf:uoft-cs/cifar100#label=fine_label", "cifar100"),
    ],
)
def test_a_run_is_named_after_its_scenario_or_data(file: Path | None, data: str, name: str) -> None:
    assert scenario.scenario_name(file, {"data": data}) == name
    assert scenario.scenario_name(None, {}) == "digits"


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]+(-[a-z]+)*", fullmatch=True),
        st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        max_size=5,
    )
)
def test_toml_brings_back_what_was_written(values: dict[str, scenario.Scalar]) -> None:
    back = tomllib.loads(scenario.as_toml(values))
    assert back == values
    assert [type(value) for value in back.values()] == [type(value) for value in values.values()]
