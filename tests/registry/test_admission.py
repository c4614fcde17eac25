"""The registry's door: what is refused there leaves every byte of the registry as it was."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import altered, random_head, random_sums
from registry_builders import (
    OF_MIXTURES,
    WIDTH,
    contents,
    member,
    one_of_each_kind,
    registry_of,
    sums,
    three_clients,
)
from torch import Tensor

from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Coefficients, Kind, Statistics
from fedcompo.errors import BackboneMismatch, ContributionError, FedcompoError, FileFormatError
from fedcompo.method.contribution import Contribution
from fedcompo.method.lineage import Lineage
from fedcompo.method.statistics import FeatureSums, off_grid
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import CARD, CONTENT, FISHER
from fedcompo.storage.manifest import OWN
from fedcompo.storage.tensorfile import load, save

NAME = "blocks.0.mlp.fc1.weight"


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


def refused(registry: Registry, *sources: Contribution | Path, **options: bool) -> FedcompoError:
    """The error of adding; nothing may have happened."""
    before, state = contents(registry.path), registry.state
    with pytest.raises(FedcompoError) as caught:
        registry.add(*sources, **options)
    assert contents(registry.path) == before
    assert registry.state == state
    return caught.value


def with_tensor(contribution: Contribution, name: str, value: Tensor) -> Contribution:
    vector = contribution.task_vector
    return replace(
        contribution, task_vector=replace(vector, tensors={**vector.tensors, name: value})
    )


def with_mixture(contribution: Contribution, **parts: Any) -> Contribution:
    mixture = replace(contribution.statistics["cat"], **parts)
    return replace(contribution, statistics={**contribution.statistics, "cat": mixture})


def with_head(classes: tuple[str, ...]) -> Contribution:
    return replace(full(), head=random_head(classes, WIDTH, seed=0))


def with_count(contribution: Contribution, count: int) -> Contribution:
    counts = contribution.statistics.counts.clone()
    counts[0] = count
    return replace(contribution, statistics=replace(contribution.statistics, counts=counts))


def rewritten(folder: Path, **claims: Any) -> Path:
    """The folder with other claims in manifest and card, sealed as fedcompo itself would."""
    tensors, manifest = load(folder / CONTENT)
    manifest = {k: v for k, v in manifest.items() if k not in OWN} | claims
    card = json.loads((folder / CARD).read_text())
    save(folder / CONTENT, dict(tensors), manifest)
    (folder / CARD).write_text(json.dumps(manifest | {"tensors_sha256": card["tensors_sha256"]}))
    return folder


# -- names ----------------------------------------------------------------------------------------

HOSTILE = {
    "parent": "../x",
    "absolute": "/etc/passwd",
    "nested": "a/b",
    "windows path": "a\\b",
    "NUL": "a\0b",
    "newline": "a\nb",
    "300 characters": "x" * 300,
    "empty": "",
    "dots": "..",
    "hidden": ".x",
    "reserved": "CON",
    "reserved with suffix": "nul.txt",
    "a replacement's folder": "ada~5",
    "trailing dot": "x.",
    "Cyrillic a": "аda",
    "right to left": "a\u202eb",
    "half a pair": "\ud800",
    "other case": "ADA",
    "look-alike": "Ada",
    "full-width": "ａda",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("replacing", [False, True], ids=["add", "replace"])
def test_hostile_names_are_refused(name, replacing, registry):
    around = contents(registry.path.parent)
    error = refused(registry, member(name), replacing=replacing)
    assert isinstance(error, ContributionError)
    assert "name" in str(error) or "mistaken" in str(error)
    assert contents(registry.path.parent) == around


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\0b", "", "ADA", "ada~5", "lock"])
def test_names_of_no_member_are_refused_on_removal(name, registry):
    before = contents(registry.path.parent)
    with pytest.raises(ContributionError, match="There is no client"):
        registry.remove(name)
    assert contents(registry.path.parent) == before


def test_a_mistyped_name_is_met_with_the_right_one(registry):
    with pytest.raises(ContributionError, match="Did you mean 'cho'"):
        registry.remove("choo")


def test_newcomers_that_look_alike_are_refused_together(registry):
    error = refused(registry, member("site-1"), member("site-l"))
    assert "mistaken" in str(error)


# -- who is there already -------------------------------------------------------------------------


def test_a_name_that_is_there_is_refused_unless_it_is_to_be_replaced(registry):
    assert "`--replace`" in str(refused(registry, member("ada", seed=9)))
    registry.add(member("ada", seed=9), replacing=True)
    assert registry.clients == ("ada", "ben", "cho")


@pytest.mark.parametrize("name", ["dee", "ada"], ids=["new", "there"])
def test_the_same_name_twice_at_once_is_refused(name, registry):
    error = refused(registry, member(name, seed=1), member(name, seed=2), replacing=True)
    assert f"Two of the contributions are of {name!r}" in str(error)


def test_all_are_added_or_none(registry):
    refused(registry, member("dee"), member("eva"), member("ben"))
    assert registry.clients == ("ada", "ben", "cho")


def test_adding_nothing_is_an_error(registry):
    assert "nothing to add" in str(refused(registry))


# -- what it holds --------------------------------------------------------------------------------


def full() -> Contribution:
    return member("dee", Kind.FULL, with_fisher=True)


def described() -> Contribution:
    return member("dee", Kind.FULL, statistics=Statistics.MIXTURES)


def lora() -> Contribution:
    return member("dee", Kind.LORA)


def of_full(change: Callable[[Tensor], Tensor]) -> Contribution:
    made = full()
    name = f"{NAME}/delta"
    return with_tensor(made, name, change(made.task_vector.tensors[name].clone()))


def fill(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


BAD: dict[str, tuple[Callable[[], Contribution], str]] = {
    "NaN": (lambda: of_full(fill(math.nan)), "not finite"),
    "infinite": (lambda: of_full(fill(-math.inf)), "not finite"),
    "out of range": (lambda: of_full(fill(2.0**11)), "changes 'blocks.0.mlp.fc1.weight' by 2048"),
    "wrong shape": (lambda: of_full(lambda t: t.T), "has shape"),
    "a row short": (lambda: of_full(lambda t: t[1:]), "has shape"),
    "whole numbers": (lambda: of_full(lambda t: t.long()), "dtype"),
    "ranks differ": (
        lambda: with_tensor(lora(), f"{NAME}/A", torch.zeros(1, WIDTH)),
        "ranks 1 .A. and 2 .B.",
    ),
    "a weight too many": (lambda: with_tensor(full(), "x/delta", torch.zeros(1)), "difference"),
    "a LoRA out of range": (
        lambda: with_tensor(lora(), f"{NAME}/A", torch.full((2, WIDTH), 6e4)),
        "at most 1024",
    ),
    "head too narrow": (
        lambda: replace(full(), head=replace(full().head, weight=torch.zeros(2, 3))),
        "head",
    ),
    "head not finite": (
        lambda: replace(full(), head=replace(full().head, bias=torch.full((2,), math.nan))),
        "not finite",
    ),
    "no class": (lambda: with_head(()), "classes"),
    "classes not sorted": (lambda: member("dee", classes=("dog", "cat")), "sorted"),
    "a class twice": (lambda: with_head(("cat", "cat")), "each once"),
    "other classes described": (
        lambda: replace(full(), statistics=sums(("cat", "owl"), seed=0)),
        "are of the classes",
    ),
    "sums too narrow": (
        lambda: replace(full(), statistics=random_sums(("cat", "dog"), 3, seed=0)),
        "are of the classes",
    ),
    "mixtures among sums": (
        lambda: member("dee", statistics=Statistics.MIXTURES),
        "by mixtures, the others by sums.*into a new registry",
    ),
    "no image of a class": (lambda: with_count(full(), 0), "at least one each"),
    "too many images of a class": (lambda: with_count(full(), 2**60), "at most 2147483648"),
    "no example": (lambda: replace(full(), num_examples=0), "names 0 examples in all, and 20"),
    "half an example": (lambda: replace(full(), num_examples=2.5), "names 2.5 examples"),
    "class of half a character": (lambda: member("dee", classes=("\ud800",)), "ud800.* in Unicode"),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_live_with_the_others_is_refused(make, reason, registry):
    error = refused(registry, make())
    assert isinstance(error, ContributionError)
    assert re.search(reason, str(error)), str(error)


BAD_MIXTURES: dict[str, tuple[Callable[[], Contribution], str]] = {
    "negative variance": (
        lambda: with_mixture(described(), variances=-torch.ones(2, WIDTH)),
        "out of range",
    ),
    "shares": (lambda: with_mixture(described(), weights=torch.tensor([0.9, 0.9])), "sum of 1"),
    "share without dimension": (
        lambda: with_mixture(described(), weights=torch.tensor(1.0)),
        "has shapes",
    ),
    "shares in whole numbers": (
        lambda: with_mixture(described(), weights=torch.tensor([0, 1])),
        "floating point",
    ),
    "a class of no example": (
        lambda: with_mixture(described(), num_examples=0),
        "at least 1 example",
    ),
    "sums among mixtures": (full, "by sums, the others by mixtures"),
}


@pytest.mark.parametrize(("make", "reason"), BAD_MIXTURES.values(), ids=BAD_MIXTURES)
def test_mixtures_that_no_head_can_be_made_of_are_refused(make, reason, tmp_path):
    members = one_of_each_kind(Statistics.MIXTURES)
    error = refused(registry_of(tmp_path / "r", *members, settings=OF_MIXTURES), make())
    assert isinstance(error, ContributionError)
    assert re.search(reason, str(error)), str(error)


def of_features(contribution: Contribution, factor: float, times: int = 1) -> Contribution:
    """Statistics of features so many times as long, of so many times as many images."""
    own = contribution.statistics
    scaled = FeatureSums.read(
        own.classes,
        own.counts * times,
        off_grid(own.sums) * factor * times,
        off_grid(own.second) * factor**2 * times,
    )
    return replace(contribution, statistics=scaled, num_examples=scaled.num_examples)


def test_features_that_outweigh_all_others_are_refused(registry):
    error = refused(registry, of_features(member("dee"), 100))
    assert "times the members'" in str(error)
    registry.add(of_features(member("dee"), 5))


def test_nobody_is_refused_for_what_one_member_claims(registry):
    registry.add(of_features(member("mallory"), 2**-10, times=2**24))
    assert registry.total_statistics().mean_square < 0.01
    registry.add(member("dee", seed=3))


def test_a_fisher_that_can_anchor_nobody_is_refused(registry):
    made = full()
    for name, value in (
        (NAME, -made.fisher.sums[NAME]),
        (NAME, made.fisher.sums[NAME] * math.nan),
        (NAME, made.fisher.sums[NAME][1:]),
        ("head.norm", torch.zeros(2, 3)),
    ):
        sums = {**made.fisher.sums, name: value}
        error = refused(registry, replace(made, fisher=replace(made.fisher, sums=sums)))
        assert "Fisher" in str(error)


def test_another_backbone_is_refused_and_both_are_named(registry):
    made = full()
    foreign = replace(made, task_vector=replace(made.task_vector, base="pico@other"), fisher=None)
    error = refused(registry, foreign)
    assert isinstance(error, BackboneMismatch)
    assert "pico@other" in str(error) and registry.state.base in str(error)


def test_examples_that_leave_the_range_of_the_sum_are_refused(tmp_path):
    how = CompositionSettings(coefficients=Coefficients.EXAMPLES)
    registry = registry_of(tmp_path / "r", member("ada"), settings=how)
    many = with_count(full(), 10**7)
    error = refused(registry, replace(many, num_examples=many.statistics.num_examples))
    assert "`coefficients = uniform`" in str(error)


# -- folders from anywhere ------------------------------------------------------------------------


@pytest.fixture
def inbox(tmp_path):
    full().save(tmp_path / "inbox")
    return tmp_path / "inbox"


def test_a_whole_folder_is_taken_with_its_own_files_only(inbox, registry):
    (inbox / "notes.txt").write_text("ours")
    (inbox / "more").mkdir()
    registry.add(inbox)
    taken = {path.name for path in (registry.path / "clients" / "dee").iterdir()}
    assert taken == {CONTENT, FISHER, CARD}


@pytest.mark.parametrize("name", [CONTENT, FISHER, CARD])
def test_a_missing_file_is_refused(name, inbox, registry):
    (inbox / name).unlink()
    assert isinstance(refused(registry, inbox), FileFormatError)


@pytest.mark.parametrize("name", [CONTENT, FISHER])
def test_a_truncated_file_is_refused(name, inbox, registry):
    (inbox / name).write_bytes((inbox / name).read_bytes()[:-1])
    assert isinstance(refused(registry, inbox), FileFormatError)


@pytest.mark.parametrize("name", [CONTENT, FISHER, CARD])
def test_an_altered_byte_is_refused_wherever_it_is(name, inbox, registry):
    size = (inbox / name).stat().st_size
    for position in range(60, size, size // 12):
        altered(inbox / name, position)
        assert isinstance(refused(registry, inbox), FileFormatError), position
        altered(inbox / name, position)
    registry.add(inbox)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 5000, "{}", '{"tensors_sha256": 1}'])
def test_a_card_that_says_nothing_is_refused(text, inbox, registry):
    (inbox / CARD).write_text(text)
    assert isinstance(refused(registry, inbox), FileFormatError)


def test_a_fisher_of_another_time_is_refused(inbox, tmp_path, registry):
    member("dee", Kind.FULL, seed=8, with_fisher=True).save(tmp_path / "other")
    (tmp_path / "other" / FISHER).replace(inbox / FISHER)
    assert "disagree" in str(refused(registry, inbox))


def test_a_fisher_that_the_card_does_not_name_is_not_taken(inbox, tmp_path, registry):
    member("dee").save(tmp_path / "plain")
    (inbox / FISHER).replace(tmp_path / "plain" / FISHER)
    registry.add(tmp_path / "plain")
    assert not (registry.path / "clients" / "dee" / FISHER).exists()


def test_no_folder_and_an_empty_one_are_refused(tmp_path, registry):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        assert isinstance(refused(registry, path), FileFormatError)


LINEAGE = {"method": "ita", "anchored_by": [], "aligned_with": [], "ensemble": []}
CLAIMS: dict[str, dict[str, Any]] = {
    "client is a number": {"client": 5},
    "client is a list": {"client": ["dee"]},
    "client leads elsewhere": {"client": "../../x"},
    "classes are numbers": {"classes": [1, 2]},
    "classes are null": {"classes": None},
    "examples in words": {"num_examples": "many"},
    "half an example": {"num_examples": 0.5},
    "true examples": {"num_examples": True},
    "sums of a class more": {"sums": {"cat": 3, "dog": 3, "yak": 3}},
    "sums are null": {"sums": None},
    "sums are not told of": {"sums": 3},
    "lineage is null": {"lineage": None},
    "lineage of nothing": {"lineage": {**LINEAGE, "anchored_by": None}},
    "lineage of lists": {"lineage": {**LINEAGE, "anchored_by": [["ada"]]}},
    "lineage of half characters": {"lineage": {**LINEAGE, "ensemble": ["\ud800"]}},
    "lineage with more": {"lineage": {**LINEAGE, "more": []}},
    "method is a number": {"lineage": {**LINEAGE, "method": 1}},
    "settings are a list": {"settings": [1]},
    "unknown kind": {"kind": "magic"},
    "kind of another": {"kind": "lora"},
    "base is null": {"base": None},
}


@pytest.mark.parametrize("claims", CLAIMS.values(), ids=CLAIMS)
def test_claims_that_no_client_of_ours_makes_are_refused(claims, tmp_path, registry):
    member("dee", Kind.FULL).save(tmp_path / "inbox")
    refused(registry, rewritten(tmp_path / "inbox", **claims))
    registry.remove("ada")  # and nobody is kept from leaving


def test_rewriting_alone_is_no_reason_to_refuse(tmp_path, registry):
    member("dee", Kind.FULL, lineage=Lineage(anchored_by=("zoe",))).save(tmp_path / "inbox")
    registry.add(rewritten(tmp_path / "inbox", settings={"seed": 3}))
    assert registry.card("dee")["settings"] == {"seed": 3}
    assert registry.member("dee").lineage.anchored_by == ("zoe",)


def test_shards_of_two_ways_to_deal_a_client_are_refused(registry):
    def shard(number: int, of: int) -> Contribution:
        return replace(member(f"zoe.shard-{number}"), settings={"shards": of})

    registry.add(shard(0, 2), shard(1, 2))
    error = refused(registry, shard(3, 4))
    assert "'zoe.shard-3' is one of 4 shards, 'zoe.shard-0' one of 2" in str(error)
    assert "count twice" in str(refused(registry, shard(0, 2), shard(1, 3), replacing=True))
    registry.add(shard(0, 3), shard(1, 3), replacing=True)
