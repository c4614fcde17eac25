"""Recipes as files: what is written is read again, and what cannot be is refused with its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry_builders import member

from fedcompo.errors import BackboneMismatch, ConfigError, ContributionError
from fedcompo.export.recipe import Dtype, Group, Negation, Recipe
from fedcompo.export.recipe_file import LARGEST, read_recipe, recipe_text
from fedcompo.method.contribution import Contribution
from fedcompo.storage.files import CONTENT, FISHER

A, B = "a" * 64, "b" * 64
FULL = Recipe(
    fedcompo="0.1.0",
    backbone="embedded@12",
    rule="ties:density=0.2",
    scale=1 / 3,
    normalise=False,
    dtype=Dtype.BFLOAT16,
    head=f"realigned:{A}",
    settings={"coefficients": "examples", "class-cap": 0, "client-cap": 7, "ridge": 1e-7},
    members={"ada": A, "hôpital b": ""},
    fisher={"ada": B},
    weights={"ada": -1.5, "hôpital b": 1e22},
    groups=(
        Group("blocks.1?.*", 2.0, {"ada": 0.1 + 0.2, "hôpital b": 0.0}),
        Group("`\u202e\"'\\\n[!a]", 1.0),
    ),
    negated=Negation("cho", B, 0.5),
)


def read(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "r.toml").write_bytes(text.encode())
    return read_recipe(tmp_path / "r.toml")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for recipe in (FULL, Recipe(), Recipe(factor=0.1 + 0.2, members={"ada": ""})):
        text = recipe_text(recipe)
        assert read(tmp_path, text) == recipe
        assert all(c.isprintable() for line in text.splitlines() for c in line)
    assert recipe_text(Recipe()).strip() == 'dtype = "float32"'


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
def test_any_number_and_any_text_come_back(
    tmp_path_factory: pytest.TempPathFactory, number: float, text: str
) -> None:
    recipe = Recipe(weights={text: number}, normalise=False)
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(recipe_text(recipe).encode())
    assert read_recipe(path) == recipe


def test_by_hand_it_names_what_differs_alone(tmp_path: Path) -> None:
    assert read(tmp_path, 'members = ["ben", "ada"]\nscale = 2') == Recipe(
        members={"ben": "", "ada": ""}, scale=2.0
    )
    assert read(tmp_path, "[weights]\nada = 1") == Recipe(weights={"ada": 1.0})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("waights = {ada = 1.0}", "`waights` is no setting. Did you mean `weights`?"),
        ("member = ['ada']", "Did you mean `members`?"),
        ("[weight]\nada = 1.0", "Did you mean `weights`?"),
        ("class_cap = 1", "Did you mean `class-cap`?"),
        ("[[groups]]\npatern = 'x'\nscale = 1.0", "`groups[0].pattern` is missing"),
        ("[[groups]]\npattern = 'x'", "`groups[0].weights` and `groups[0].scale` are missing"),
        ("[[groups]]\npattern = 'x'\nscale = 0", "`groups[0].scale` must be > 0"),
        ("[groups]\npattern = 'x'", "[[groups]]"),
        ("groups = [3]", "`groups[0]` must be a table, got 3"),
        ("scale = '1'", "`scale` must be of type float, got '1'"),
        ("scale = 0", "`scale` must be > 0, got 0.0"),
        ("scale = nan", "`scale` must be finite"),
        ("factor = -inf", "`factor` must be finite"),
        ("dtype = 'bf16'", "`dtype` must be one of float32, bfloat16, float16"),
        ("head = 'other'", "`head` must be `members`, or `realigned:`"),
        ("coefficients = 'equal'", "must be one of uniform, examples"),
        ("members = 'ada'", "`members` must be a table"),
        ("members = 5", "`members` must be a table"),
        ("members = []", "`members` names nobody"),
        ("[members]\nada = 'abc'", "`members.ada` must be a SHA-256"),
        ("[weights]", "`weights` names nobody"),
        ("[weights]\nada = true", "`weights.ada` must be of type float, got True"),
        ("[weights]\nada = inf", "`weights.ada` must be finite"),
        ("members = ['ada']\n[weights]\nben = 1.0", "exactly the members; 'ada' is on one side"),
        ("factor = 1.0\nscale = 1.0", "`factor` goes with neither"),
        ("factor = 1.0\n[weights]\nada = 1.0", "`factor` goes with neither"),
        ("normalise = false", "`normalise = false` is said of weights, and there are none"),
        ("[negated]\nstrength = 1.0", "`negated.client` is missing"),
        ("[negated]\nclient = 'ada'\nstrength = 0", "`negated.strength` must be > 0"),
        ("members = ['ada']\n[fisher]\nben = ''", "`fisher` names 'ben', who is no member"),
        ("class-cap = 4611686018427387905", "`class-cap` must be at most 2**62"),
        ("scale 1", "is no valid TOML"),
        ("a = " + "[" * 5000, "is no valid TOML"),
        ("#" * (LARGEST + 1), f"has more than {LARGEST} bytes"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert reason in str(caught.value) and "r.toml" in str(caught.value)


def test_all_faults_are_told_at_once_and_bytes_and_folders_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)`scal`.*`dtype`.*`weights\.b`"):
        read(tmp_path, "scal = 1\ndtype = 3\n[weights]\nb = 'x'")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for place, reason in (("bytes", "no valid TOML"), ("", "cannot be read"), ("x", "No such")):
        with pytest.raises(ConfigError, match=reason):
            read_recipe(tmp_path / place)


def test_other_sources_than_it_names_are_refused_with_both_digests() -> None:
    def made(client: str, content: str, fisher: str = A) -> Contribution:
        return replace(member(client), digests={CONTENT: content, FISHER: fisher})

    recipe = Recipe(
        backbone="e@1",
        members={"ada": A, "ben": ""},
        fisher={"ben": A},
        negated=Negation("cho", B),
    )
    right = [made("ada", A), made("ben", B), made("cho", B, B), made("dan", B)]
    recipe.check_sources("e@1", right)
    Recipe().check_sources("e@2", right)
    with pytest.raises(BackboneMismatch, match=r"for the backbone e@1, found is e@2"):
        recipe.check_sources("e@2", [])
    for wrong, wanted, found in (
        (made("ada", B), A, B),
        (made("ben", A, B), A, B),
        (made("cho", A), B, A),
        (replace(made("ada", A), digests={}), A, "unknown"),
    ):
        with pytest.raises(
            ContributionError, match=f"{wrong.client!r} have SHA-256 {found}.*{wanted}"
        ):
            recipe.check_sources("e@1", [wrong])


def test_a_group_has_the_weights_that_fit_its_pattern() -> None:
    names = ["blocks.1.mlp.fc1.weight", "blocks.2.mlp.fc1.weight", "blocks.12.mlp.fc1.weight"]
    one, other = Group("blocks.1?.*", 1.0), Group("blocks.?.mlp*", 2.0)
    found = Recipe(groups=(one, other)).grouped(names)
    assert found == [(one, names[2:]), (other, names[:2])]
    with pytest.raises(
        ConfigError, match=r"'Blocks\.\*' of the recipe fits no weight.*blocks\.1\."
    ):
        Recipe(groups=(Group("Blocks.*", 1.0),)).grouped(names)
    with pytest.raises(ConfigError, match=r"fits two patterns of the recipe, '\*12\*' and"):
        Recipe(groups=(Group("*12*", 1.0), one)).grouped(names)
