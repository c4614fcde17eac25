"""Settings: defaults, checks, and messages that name every fault at once."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcompo.config.choices import (
    AnchorBy,
    Curvature,
    FisherForm,
    HeadStart,
    Kind,
    Penalty,
    Preset,
    Statistics,
    kinds_of,
    rounds_of,
)
from fedcompo.config.presets import LATER, OBSOLETE, PAPER, with_preset
from fedcompo.config.run import SECTIONS, RunConfig, all_settings
from fedcompo.config.setting import names_of
from fedcompo.errors import ConfigError

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
DEFAULTS = RunConfig().flat()


def fault_of(**values: object) -> str:
    """The one fault of settings given with underscores."""
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse({key.replace("_", "-"): value for key, value in values.items()})
    first, fault, _ = str(caught.value).split("\n")
    assert first == "1 setting(s) cannot be used:"
    return fault.removeprefix("  - ")


def test_the_defaults_in_pyproject_are_those_of_the_code():
    declared = tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]
    assert declared == DEFAULTS
    assert all(type(declared[key]) is type(value) for key, value in DEFAULTS.items())


def test_every_setting_is_explained_by_a_sentence():
    for key, declared in all_settings().items():
        text = declared.metadata["help"]
        assert text.endswith("."), key
        assert len(text.split()) >= 3, key


def test_every_field_is_a_setting_or_a_section():
    for kind in (RunConfig, *SECTIONS.values()):
        for declared in dataclasses.fields(kind):
            assert "help" in declared.metadata or declared.name in SECTIONS


def test_no_setting_is_named_twice():
    names = [
        f.name
        for kind in (RunConfig, *SECTIONS.values())
        for f in dataclasses.fields(kind)
        if "help" in f.metadata
    ]
    assert len(set(names)) == len(names) == len(DEFAULTS)


def test_run_config_values_are_scalars_that_flower_can_carry():
    assert all(type(value) in (bool, int, float, str) for value in DEFAULTS.values())


def test_parsing_what_flat_returns_gives_the_same_settings():
    assert RunConfig.parse(DEFAULTS) == RunConfig.parse({}) == RunConfig()
    changed = {
        **DEFAULTS,
        "kind": "full, ia3",
        "rank": 3,
        "alpha": 0.5,
        "curvature": "exact",
        "scale": "2.5",
        "aside": 0.0,
        "penalty": "coupled",
        "head-start": "probe",
        "anchor": "reference",
        "reference": "/data/public.safetensors",
        "exclude": "client-1, client-3",
        "realign": False,
        "output": "runs/a",
        "device": "cuda:1",
    }
    config = RunConfig.parse(changed)
    assert config.flat() == changed
    assert RunConfig.parse(config.flat()) == config
    assert config.train.rank == 3
    assert config.train.penalty is Penalty.COUPLED
    assert config.train.head_start is HeadStart.PROBE
    assert config.train.anchor is AnchorBy.REFERENCE
    assert config.fisher.curvature is Curvature.EXACT
    assert config.compose.fixed_scale == 2.5
    assert config.compose.realign is False


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(
            {
                "ranc": 4,
                "alpha": -1.0,
                "batch-size": "32",
                "penalty": "implict",
                "zzz": 1,
                "seed": 1,
            }
        )
    text = str(caught.value)
    assert text.startswith("5 setting(s) cannot be used:\n")
    assert text.count("\n  - ") == 5
    for part in (
        "`ranc` is no setting. Did you mean `rank`?",
        "`alpha` must be >= 0, got -1.0.",
        "`batch-size` must be of type int, got '32' (str).",
        "`penalty` must be one of coupled, explicit, implicit, got 'implict'. "
        "Did you mean 'implicit'?",
        "`zzz` is no setting.\n",
        "`fedcompo settings` lists all settings",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("given_key", "nearest"),
    [
        ("num_clients", "num-clients"),
        ("learningrate", "learning-rate"),
        ("fisher-samp", "fisher-samples"),
    ],
)
def test_the_nearest_setting_is_suggested(given_key, nearest):
    with pytest.raises(ConfigError, match=f"`{given_key}` is no setting. Did you mean `{nearest}`"):
        RunConfig.parse({given_key: 1})


def test_a_whole_number_may_be_written_either_way():
    config = RunConfig.parse({"alpha": 3, "rank": 8.0})
    assert (config.train.alpha, type(config.train.alpha)) == (3.0, float)
    assert (config.train.rank, type(config.train.rank)) == (8, int)
    assert fault_of(rank=8.5) == "`rank` must be of type int, got 8.5 (float)."


@pytest.mark.parametrize("key", ["rank", "alpha", "output", "seed"])
@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number_and_no_text(key, value):
    assert "must be of type" in fault_of(**{key: value})


@pytest.mark.parametrize("value", [1, 0, 1.0, "true"])
def test_a_number_or_text_is_no_truth_value(value):
    assert "`realign` must be of type bool" in fault_of(realign=value)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["alpha", "ridge", "timeout"])
def test_a_number_that_is_not_finite_is_refused(key, value):
    assert "must be finite" in fault_of(**{key: value})


@pytest.mark.parametrize(
    ("key", "value", "demand"),
    [
        ("rank", 0, "> 0"),
        ("local-epochs", -1, "> 0"),
        ("learning-rate", -0.1, ">= 0"),
        ("seed", -1, ">= 0"),
        ("ridge", -0.1, ">= 0"),
        ("aside", 1.0, r"in [0, 1)"),
        ("aside", -0.1, r"in [0, 1)"),
        ("scale", "max", "auto or a number > 0"),
        ("scale", "0", "auto or a number > 0"),
        ("scale", "nan", "auto or a number > 0"),
        ("kind", "lora,dora", "one of full, lora, ia3"),
        ("kind", "", "one of full, lora, ia3"),
        ("kind", "lora,", "one of full, lora, ia3"),
        ("device", "tpu", "auto, cpu, cuda"),
        ("target-weights", " , ", "at least one pattern"),
        ("anchor", "own,others", "one of others, own, reference"),
        ("exclude", "a,,b", "names joined by commas"),
        ("exclude", ",", "names joined by commas"),
        ("joins", "a:0", "<client>:<round>"),
        ("leaves", "a:2,a:3", "<client>:<round>"),
    ],
)
def test_a_value_out_of_range_is_refused_and_the_range_named(key, value, demand):
    assert f"must be {demand}" in (fault := fault_of(**{key: value})) or demand in fault
    assert fault.startswith(f"`{key}` must ")
    assert repr(value) in fault


@pytest.mark.parametrize("device", ["cuda:x", "cuda:", "cpu:fast", "auto:1", "cuda:0:1"])
def test_a_device_that_torch_does_not_know_is_refused(device):
    assert "`device` must be" in fault_of(device=device)


def test_a_whole_number_too_large_for_floating_point_is_refused():
    assert "`alpha` must be" in fault_of(alpha=10**400)


def test_a_reference_is_given_where_it_anchors_and_only_there():
    assert fault_of(anchor="reference").startswith(
        "`anchor` is reference, but `reference` is empty:"
    )
    assert fault_of(reference="r.safetensors") == (
        "`reference` is 'r.safetensors', but `anchor` is others: only reference makes use of it."
    )
    assert "`anchor` is own" in fault_of(anchor="own", reference="r.safetensors")
    config = RunConfig.parse({"anchor": "reference", "reference": "r.safetensors"})
    assert config.train.reference == "r.safetensors"


def test_settings_that_contradict_each_other_are_told_with_all_other_faults():
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse({"anchor": "own", "reference": "r", "rank": -1, "alpha": -1.0})
    text = str(caught.value)
    assert text.startswith("3 setting(s) cannot be used:\n")
    for part in ("`rank` must", "`alpha` must", "but `anchor` is own"):
        assert part in text


@pytest.mark.parametrize(
    ("anchor", "reference"), [("refrence", "r"), ("refrence", ""), ("reference", 3)]
)
def test_a_setting_that_is_faulty_itself_contradicts_no_other(anchor, reference):
    fault = fault_of(anchor=anchor, reference=reference)
    assert "must be" in fault
    assert "makes use of it" not in fault
    assert "is empty" not in fault


def test_names_are_split_at_commas():
    assert names_of("") == names_of("  ") == ()
    assert names_of(" a , b c,d") == ("a", "b c", "d")


def test_what_cannot_shape_a_contribution_is_apart():
    config = RunConfig.parse({"output": "x", "exclude": "a", "scale": 2.0, "alpha": 3.0, "seed": 4})
    shaping = config.of_client()
    sections = ("data", "backbone", "method", "head", "fisher", "train", "caps")
    declared = [f.name for section in sections for f in dataclasses.fields(SECTIONS[section])]
    expected = {name.replace("_", "-") for name in ("seed", "device", *declared)}
    assert set(shaping) == expected - LATER.keys()
    assert all(config.flat()[key] == value for key, value in shaping.items())
    again = RunConfig.parse(shaping)
    assert (again.train, again.seed) == (config.train, 4)


@pytest.mark.parametrize("value", [2, 2.0, "2", "2.0"])
def test_a_scale_is_a_number_however_it_is_written(value):
    config = RunConfig.parse({"scale": value})
    assert config.compose.fixed_scale == 2.0
    assert RunConfig.parse(config.flat()) == config


def test_nothing_is_kept_aside_where_there_is_nothing_to_choose():
    config = RunConfig.parse({"scale": 2, "aside": 0.2})
    assert config.train.aside == 0.0
    assert RunConfig.parse(config.flat()) == config
    assert RunConfig.parse({"aside": 0.2}).train.aside == 0.2


def test_a_scale_that_is_chosen_is_no_number():
    assert RunConfig.parse({"scale": "auto"}).compose.fixed_scale is None
    assert "`scale` must be of type str, got True" in fault_of(scale=True)
    assert "`scale` must be auto or a number" in fault_of(scale=float("inf"))


def test_the_papers_preset_gives_every_setting_its_value():
    config = RunConfig.parse({"preset": "paper"})
    flat = config.flat()
    assert flat == {**DEFAULTS, **PAPER}
    assert config.preset is Preset.DEFAULT  # all is said; nothing is left to resolve
    assert RunConfig.parse(flat) == config
    assert RunConfig.parse(with_preset({"preset": "paper"})) == config


def test_settings_that_flower_filled_up_take_the_presets_values_where_they_are_at_their_default():
    filled = {**DEFAULTS, "preset": "paper", "rank": 4, "seed": 7}
    assert RunConfig.parse(filled).flat() == {**DEFAULTS, **PAPER, "rank": 4, "seed": 7}


def test_an_explicit_default_wins_over_the_preset_where_it_is_known_to_be_explicit():
    explicit = {"preset": "paper", "rank": DEFAULTS["rank"], "scale": "auto"}
    config = RunConfig.parse(with_preset(explicit))
    assert (config.train.rank, config.compose.fixed_scale) == (DEFAULTS["rank"], None)
    assert config.head.statistics is Statistics.MIXTURES
    assert with_preset({"rank": 4}) == {"rank": 4}


def test_faults_are_told_under_a_preset_too():
    assert fault_of(preset="papers").startswith("`preset` must be one of default, paper")
    assert fault_of(preset="paper", ranc=3) == "`ranc` is no setting. Did you mean `rank`?"
    assert "`rank` must be of type int" in fault_of(preset="paper", rank=True)


OLD = Path(__file__).parents[1] / "golden" / "mixed" / "clients" / "ada" / "card.json"


def test_settings_stored_before_there_were_sums_are_read_as_what_they_meant():
    old = json.loads(OLD.read_text(encoding="utf-8"))["settings"]
    config = RunConfig.stored(old)
    assert config.head.statistics is Statistics.MIXTURES
    assert config.fisher.curvature is Curvature.EXACT
    assert (config.train.local_steps, config.train.aside) == (0, 0.0)
    assert set(OBSOLETE) < old.keys()
    kept = old.keys() - set(OBSOLETE) - {"scale", "penalty"}
    assert config.compose.fixed_scale == 1.0
    assert {key: config.flat()[key] for key in kept} == {key: old[key] for key in kept}
    with pytest.raises(ConfigError, match="`fisher-tolerance` is no setting"):
        RunConfig.parse(old)


def test_obsolete_values_of_stored_settings_are_translated():
    config = RunConfig.stored(
        {"fisher": "monte-carlo", "fisher-form": "head", "penalty": "implicit", "alpha": 3.0}
    )
    assert (config.train.penalty, config.train.alpha) == (Penalty.EXPLICIT, 3.0)  # in one unit
    assert config.fisher.curvature is Curvature.MONTE_CARLO
    assert config.caps.fisher_form is FisherForm.NONE
    assert RunConfig.stored({"fisher": "leading"}).fisher.curvature is Curvature.EXACT


def test_settings_stored_now_are_read_as_they_are():
    shaping = RunConfig.parse({"seed": 3, "kind": "full"}).of_client()
    assert RunConfig.stored(shaping) == RunConfig.parse(shaping)
    with pytest.raises(ConfigError, match="`head-alpha` is no setting"):
        RunConfig.stored({**shaping, "head-alpha": 0.1})


def test_kinds_are_split_at_commas():
    assert kinds_of("lora") == (Kind.LORA,)
    assert kinds_of(" full, ia3 ,lora") == (Kind.FULL, Kind.IA3, Kind.LORA)
    with pytest.raises(ValueError, match="dora"):
        kinds_of("dora")


def test_rounds_are_split_at_commas_and_at_the_last_colon():
    assert rounds_of("") == rounds_of(" ") == {}
    assert rounds_of("client-3:2") == {"client-3": 2}
    assert rounds_of(" hospital a : 1, b:12 ") == {"hospital a": 1, "b": 12}


@pytest.mark.parametrize(
    "value", ["a", "a:", ":2", " :2", "a:0", "a:-1", "a:1.5", "a:b", "a:1,", "a:1,,b:2", "a:1,a:1"]
)
def test_what_names_no_client_and_round_is_refused(value):
    with pytest.raises(ValueError, match=r"invalid literal|names nobody"):
        rounds_of(value)
    fault = fault_of(joins=value)
    assert fault == (
        f"`joins` must be <client>:<round>, the rounds from 1, joined by commas, got {value!r}."
    )


scalars = st.one_of(st.booleans(), st.integers(-(10**6), 10**6), st.floats(), st.text(max_size=5))


@given(st.dictionaries(st.sampled_from([*DEFAULTS, "nonsense"]), scalars, max_size=4))
def test_any_scalars_are_either_settings_of_the_right_type_or_refused(values):
    try:
        config = RunConfig.parse(values)
    except ConfigError:
        return
    flat = config.flat()
    assert RunConfig.parse(flat) == config
    assert all(type(flat[key]) is type(DEFAULTS[key]) for key in flat)
    if config == RunConfig.parse({**values, "preset": "default"}):
        given = {key: str(value) if key == "scale" else value for key, value in values.items()}
        resolved = {"preset"} if flat["scale"] == "auto" else {"preset", "aside"}
        assert all(flat[key] == value for key, value in given.items() if key not in resolved)
