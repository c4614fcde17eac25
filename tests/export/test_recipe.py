"""Recipes followed: the same bits again, other bits by groups, signs and dtypes, or a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from builders import dense_by_hand
from registry_builders import (
    OF_MIXTURES,
    backbone,
    member,
    own_statistics,
    registry_of,
    tangents,
    three_clients,
)
from torch import Tensor

from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Coefficients, Kind, Statistics
from fedcompo.errors import BackboneMismatch, ConfigError, ContributionError
from fedcompo.export import selection as module
from fedcompo.export.folder import publish
from fedcompo.export.recipe import Dtype, Group, Negation, Recipe
from fedcompo.export.recipe_file import read_recipe
from fedcompo.export.selection import from_folders, from_registry
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import RECIPE
from fedcompo.storage.tensorstream import StreamedTensors, file_sha256

FIRST, REST = "blocks.0.*", "blocks.1.*"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return three_clients(tmp_path_factory.mktemp("recipe") / "registry")


def folders(registry: Registry) -> list[Path]:
    """The members' contributions, as if they had been mailed."""
    return [registry.path / own.folder for own in registry.state.members.values()]


def written(folder: Path) -> tuple[str, Recipe]:
    return file_sha256(folder / "model.safetensors"), read_recipe(folder / RECIPE)


def tensors(folder: Path) -> dict[str, Tensor]:
    return dict(StreamedTensors(folder / "model.safetensors"))


def again(registry: Registry, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose by the written recipe, of the registry and of folders: the same file, and recipe."""
    monkeypatch.setattr(module, "load_backbone", lambda config: backbone())
    recipe = read_recipe(first / RECIPE)
    publish(first.with_name("again"), from_registry(registry, recipe=recipe))
    assert written(first.with_name("again")) == written(first)
    if not recipe.head.startswith("realigned:"):
        with from_folders(folders(registry), recipe=recipe) as selection:
            publish(first.with_name("mailed"), selection)
        assert written(first.with_name("mailed")) == written(first)


GROUPED = Recipe(
    weights={"ada": 0.2, "cho": 0.8},
    groups=(Group(FIRST, 0.0, {"ada": 0.9, "cho": 0.1}), Group("*.1.mlp.*", 0.7)),
    dtype=Dtype.BFLOAT16,
)
RECIPES = {
    "everyone": Recipe(),
    "some": Recipe(members={"ada": "", "ben": ""}),
    "scaled": Recipe(scale=1 / 3),
    "half": Recipe(dtype=Dtype.FLOAT16),
    "grouped": GROUPED,
    "groups of everyone": Recipe(groups=GROUPED.groups[1:]),
    "signed": Recipe(weights={"ada": 1.5, "ben": -0.25}, normalise=False, dtype=Dtype.BFLOAT16),
    "signed and scaled": Recipe(
        rule="task-arithmetic:lambda=0.7", weights={"ada": -1.0, "ben": 0.5}, normalise=False
    ),
    "ties": Recipe(
        rule="ties", weights={"ada": 0.5, "ben": 0.5}, scale=0.3, groups=(Group(FIRST, 0.4),)
    ),
    "ties of everyone": Recipe(rule="ties:density=0.5", groups=(Group(REST, 1.5),)),
    "dare": Recipe(rule="dare:drop=0.5,seed=3", dtype=Dtype.FLOAT16),
    "norm-preserving": Recipe(rule="norm-preserving", members={"ada": "", "cho": ""}),
    "task arithmetic": Recipe(rule="task-arithmetic", groups=GROUPED.groups[1:]),
    "negated": Recipe(negated=Negation("ben", strength=0.5)),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_what_is_written_makes_the_same_bits_again(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    publish(tmp_path / "first", from_registry(registry, recipe=recipe))
    again(registry, tmp_path / "first", monkeypatch)


VOTED = 0.1 + 0.2  # a number whose every digit counts


@pytest.mark.parametrize(
    "settings",
    [
        CompositionSettings(),
        OF_MIXTURES,
        CompositionSettings(coefficients=Coefficients.EXAMPLES, max_count_ratio=1.5),
        CompositionSettings(scale=1 / 3, max_count_ratio=1.5),
    ],
    ids=["voted", "mixtures", "examples", "fixed"],
)
@pytest.mark.parametrize("realigned", [False, True])
def test_so_does_that_of_a_registry_with_a_vote_and_a_head_of_its_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: CompositionSettings,
    realigned: bool,
) -> None:
    kind = settings.statistics
    clients = [
        member("ada", Kind.FULL, num_examples=10, statistics=kind),
        member("ben", classes=("dog", "owl"), num_examples=40, statistics=kind),
    ]
    if kind is Statistics.MIXTURES:
        older = {"fisher": "leading", "fisher-form": "head", "align-samples": 3}
        clients = [replace(client, settings=older) for client in clients]
    registry = registry_of(tmp_path / "r", *clients, settings=settings)
    if realigned:
        registry.realign(own_statistics(registry), factor=None if settings.scale else VOTED)
    publish(tmp_path / "first", from_registry(registry))
    _, recipe = written(tmp_path / "first")
    assert tensors(tmp_path / "first").keys() == dict(registry.composed()).keys()
    assert recipe.factor == registry.factor
    again(registry, tmp_path / "first", monkeypatch)
    if not realigned:
        return
    elsewhere = pytest.raises(ContributionError, match=r"lie in a registry.*`head = \"members\"`")
    with elsewhere, from_folders(folders(registry), recipe=recipe):
        pass
    registry.realign(own_statistics(registry, seed=5))
    with pytest.raises(ContributionError, match="Name the registry as it was then"):
        from_registry(registry, recipe=recipe)
    other = from_registry(registry, recipe=replace(recipe, head="members"))
    assert other.made_of == "members" and not torch.equal(
        other.head.weight, registry.joint_head().weight
    )


def test_a_group_has_its_own_weights_and_scale_and_the_rest_is_as_without_it(
    registry: Registry,
) -> None:
    found = dict(from_registry(registry, recipe=GROUPED).stream())
    plain = from_registry(registry, weights=GROUPED.weights)
    expected = dict(plain.stream())
    assert list(found) == sorted(expected)
    for name, weight in backbone().theta_0.items():
        tau = {
            c: dense_by_hand(registry.contribution(c).task_vector, {name: weight})[name]
            for c in ("ada", "cho")
        }
        if name.startswith("blocks.0."):
            change = plain.scale * (0.9 * tau["ada"] + 0.1 * tau["cho"])
        elif ".1.mlp." in name:
            change = 0.7 * (0.2 * tau["ada"] + 0.8 * tau["cho"])
        else:
            assert torch.equal(found[name], expected[name])
            continue
        torch.testing.assert_close(
            found[name].double(), weight.double() + change, rtol=0, atol=1e-6
        )


def test_weights_may_be_negative_where_that_is_said(registry: Registry) -> None:
    weights = {"ada": 1.5, "ben": -0.25}
    found = dict(from_registry(registry, recipe=RECIPES["signed"]).stream())
    for name, weight in backbone().theta_0.items():
        change = sum(
            w * dense_by_hand(registry.contribution(c).task_vector, {name: weight})[name]
            for c, w in weights.items()
        )
        torch.testing.assert_close(
            found[name].double(), weight.double() + change, rtol=0, atol=1e-6
        )
    with pytest.raises(ContributionError, match=r"sum to 1.*`normalise = false`"):
        from_registry(registry, recipe=Recipe(weights=weights))
    with pytest.raises(ContributionError, match=r"sum to 1.*`normalise = false`"):
        from_registry(
            registry,
            recipe=Recipe(groups=(Group(FIRST, 0.0, {"ada": 2.0, "ben": 0.0, "cho": 0.0}),)),
        )


@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT16])
def test_every_weight_and_the_head_are_rounded_once_and_timm_loads_them(
    registry: Registry, tmp_path: Path, dtype: Dtype
) -> None:
    publish(tmp_path / "full", from_registry(registry))
    publish(tmp_path / "half", from_registry(registry, recipe=Recipe(dtype=dtype)))
    full, half = tensors(tmp_path / "full"), tensors(tmp_path / "half")
    assert full.keys() == half.keys()
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.to(getattr(torch, dtype)))
        assert half[name].dtype == getattr(torch, dtype)
    model = timm.create_model(f"local-dir:{tmp_path / 'half'}", pretrained=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, half[name].float())


def test_what_a_dtype_cannot_hold_is_refused(registry: Registry, tmp_path: Path) -> None:
    huge = replace(from_registry(registry), factor=1e7, recipe=Recipe(dtype=Dtype.FLOAT16))
    with pytest.raises(ContributionError, match=r"not finite as torch\.float16"):
        publish(tmp_path / "out", huge)
    of_tangents = registry_of(tmp_path / "r", *tangents())
    with pytest.raises(ConfigError, match=r"tangents cannot be written as torch\.bfloat16"):
        publish(tmp_path / "out", from_registry(of_tangents, recipe=Recipe(dtype=Dtype.BFLOAT16)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "error", "reason"),
    [
        (Recipe(members={"bne": ""}), ContributionError, "Did you mean 'ben'"),
        (Recipe(weights={"ada": 0.5, "zoe": 0.5}), ContributionError, "no client 'zoe'"),
        (Recipe(negated=Negation("zoe")), ContributionError, "no client 'zoe'"),
        (Recipe(members={"ada": "0" * 64}), ContributionError, f"the recipe names {'0' * 64}"),
        (
            Recipe(negated=Negation("ada", "0" * 64)),
            ContributionError,
            "it is another contribution",
        ),
        (Recipe(backbone="e@1"), BackboneMismatch, "for the backbone e@1"),
        (Recipe(groups=(Group("Block*", 1.0),)), ConfigError, "fits no weight"),
        (Recipe(groups=(Group(FIRST, 1.0), Group("*", 1.0))), ConfigError, "two patterns"),
        (
            Recipe(groups=(Group(FIRST, 0.0, {"ada": 1.0}),)),
            ContributionError,
            "expected exactly ada, ben, cho",
        ),
        (
            Recipe(weights={"ada": 1e308, "ben": 1e308}, normalise=False),
            ContributionError,
            "with the sum inf",
        ),
        (Recipe(rule="tise"), ConfigError, "no rule 'tise'"),
        (Recipe(rule="norm-preserving", scale=2.0), ConfigError, "says λ itself"),
        (Recipe(rule="task-arithmetic", factor=0.3), ConfigError, "says λ itself"),
        (
            Recipe(rule="ties", weights={"ada": -1.0}, normalise=False),
            ContributionError,
            "the rules mean and task-arithmetic take any",
        ),
        (
            Recipe(rule="norm-preserving", weights={"ada": -1.0}, normalise=False),
            ContributionError,
            "takes weights that are >= 0 and sum to 1",
        ),
        (Recipe(head=f"realigned:{'0' * 64}"), ContributionError, "of features of the composed"),
    ],
)
def test_a_recipe_for_something_else_is_refused_before_anything_is_composed(
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe,
    error: type[Exception],
    reason: str,
) -> None:
    with pytest.raises(error, match=reason):
        from_registry(registry, recipe=recipe)
    monkeypatch.setattr(module, "load_backbone", lambda config: backbone())
    with pytest.raises(error, match=reason), from_folders(folders(registry), recipe=recipe):
        pass


def test_a_rule_that_reads_fishers_names_them_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [member(name, with_fisher=True) for name in ("ada", "ben")]
    registry = registry_of(tmp_path / "r", *clients)
    publish(tmp_path / "first", from_registry(registry, rule="fisher"))
    again(registry, tmp_path / "first", monkeypatch)
    recipe = read_recipe(tmp_path / "first" / RECIPE)
    card = json.loads((folders(registry)[0] / "card.json").read_text())
    assert recipe.fisher["ada"] == card["tensors_sha256"]["fisher.safetensors"]
    other = replace(recipe, fisher={**recipe.fisher, "ben": recipe.fisher["ada"]})
    with pytest.raises(
        ContributionError, match=r"fisher\.safetensors of client 'ben' have SHA-256"
    ):
        from_registry(registry, recipe=other)


def test_the_card_shows_the_recipe(registry: Registry, tmp_path: Path) -> None:
    publish(tmp_path / "out", from_registry(registry, recipe=GROUPED))
    text = (tmp_path / "out" / RECIPE).read_text()
    assert f"```toml\n{text}```" in (tmp_path / "out" / "README.md").read_text()
    digest = json.loads((folders(registry)[0] / "card.json").read_text())["tensors_sha256"]
    assert f'ada = "{digest["contribution.safetensors"]}"' in text
