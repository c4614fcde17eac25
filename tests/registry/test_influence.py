"""What of one client is in another's contribution: nothing at all, where the lineage is empty."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from app_runs import BACKBONE, altered, run

from fedcompo.backbone.backbone import load_backbone
from fedcompo.config.choices import Curvature
from fedcompo.config.run import RunConfig
from fedcompo.errors import (
    BackboneMismatch,
    ConfigError,
    ContributionError,
    FileFormatError,
    TooFewClients,
)
from fedcompo.method.contribution import Contribution
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.fisher_file import save_fisher
from fedcompo.registry.envelope import opened
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import CARD, CONTENT, FISHER
from fedcompo.training.probing import (
    load_public_data,
    load_reference,
    reference_fisher,
    save_reference,
)

KINDS = "lora,full,ia3"
"""Dealt in turn: where leaving one client out dealt the others anew, it would show."""
TIGHT = {"kind": KINDS, "trust_region": 1e-6}
"""Today's defaults, but for a bound that so short a training meets."""
LEFT = "client-0"
STAY = ("client-1", "client-2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A reference Fisher, as `fedcompo fisher` makes it, of ten images."""
    config = replace(RunConfig.parse({"images-per-class": 1}), backbone=BACKBONE)
    backbone = load_backbone(config.backbone)
    data = load_public_data(config, backbone.preprocessing)
    fisher, _ = reference_fisher(backbone, data, config)
    path = tmp_path_factory.mktemp("reference") / "fisher.safetensors"
    save_reference(path, fisher, base=backbone.fingerprint, curvature=Curvature.FEATURES)
    return path


def folder(output: Path, client: str) -> Path:
    return output / "registry" / "clients" / client


def contributions(output: Path) -> dict[tuple[str, str], bytes]:
    """Every byte of the files of those who stay."""
    files = {(c, path.name): path for c in STAY for path in folder(output, c).iterdir()}
    assert {name for _, name in files} == {CARD, CONTENT, FISHER}
    return {key: path.read_bytes() for key, path in files.items()}


def lineages(output: Path) -> list[tuple[str, ...]]:
    """Everyone whom the lineages of those who stay name."""
    found = [Contribution.open(folder(output, client)).lineage for client in STAY]
    return [(*f.anchored_by, *f.aligned_with, *f.ensemble) for f in found]


LINEAGE_FREE = {
    "own": {**TIGHT, "anchor": "own"},
    "reference": {**TIGHT, "anchor": "reference", "realign": False},
    "no anchor": {**TIGHT, "trust_region": 0.0, "realign": False},
}


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> tuple[Path, dict]:
    """A run in which everyone is anchored by itself; its folder and results."""
    output = tmp_path_factory.mktemp("own") / "with"
    return output, run({}, output, **LINEAGE_FREE["own"])


@pytest.mark.parametrize("way", LINEAGE_FREE)
def test_without_lineage_not_a_bit_depends_on_who_else_takes_part(way, own, reference, tmp_path):
    settings, together = LINEAGE_FREE[way], own[0]
    if way == "reference":
        settings = {**settings, "reference": str(reference)}
    if way != "own":
        together = tmp_path / "with"
        run({}, together, **settings)
    run({}, tmp_path / "without", **settings, exclude=LEFT)
    assert lineages(together) == [(), ()]
    assert not folder(tmp_path / "without", LEFT).exists()
    assert contributions(together) == contributions(tmp_path / "without")


def test_a_receipt_without_lineage_is_influence_exact_and_names_what_is_left(own, tmp_path):
    registry = Registry(shutil.copytree(own[0] / "registry", tmp_path / "registry", symlinks=True))
    record = registry.remove(LEFT)
    assert own[1]["scale"]["by"] == "vote"
    assert opened(record.text.encode(), source="").statement["predicate"]["lineage"] == {
        **{key: [] for key in ("fisher", "statistics", "ensemble", "indirect", "to_retrain")},
        "composition_exact": True,
        "influence_exact": True,
    }
    # What the client may still have had its say in: the caps, and a λ' until the next vote.
    assert record.caps == registry.settings.caps == (18, 36)
    assert record.factor_before == record.factor_after == own[1]["scale"]["factor"]
    assert record.factor_by == "vote"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "anchored_by"),
        ({"anchor": "own", "head_start": "aligned"}, "aligned_with"),
    ],
    ids=["by default", "joint head"],
)
def test_with_lineage_the_others_show_and_are_named(settings, named, tmp_path):
    settings = {**TIGHT, "realign": False, **settings}
    run({}, tmp_path / "with", **settings)
    run({}, tmp_path / "without", **settings, exclude=LEFT)
    shown = []
    for client in STAY:
        found = Contribution.open(folder(tmp_path / "with", client))
        empty = dict.fromkeys(("anchored_by", "aligned_with", "ensemble"), ())
        others = tuple(sorted({LEFT, *STAY} - {client}))
        assert vars(found.lineage) == {"method": "ita", **empty, named: others}
        alone = Contribution.open(folder(tmp_path / "without", client)).task_vector.tensors
        shown += [n for n in alone if (found.task_vector.tensors[n] != alone[n]).any()]
    assert shown, "the bound held nobody: this would hold without lineage too"
    record = Registry(tmp_path / "with" / "registry").remove(LEFT)
    assert record.influence.to_retrain == STAY


@pytest.mark.parametrize("phase", ["query.describe", "train"])
def test_without_lineage_a_client_that_fails_half_way_leaves_no_trace(phase, own, tmp_path):
    options = {"tamper": {(0, phase): altered(lambda tensors, manifest: manifest.clear())}}
    results = run(options, tmp_path / "failing", **LINEAGE_FREE["own"])
    assert [c["client"] for c in results["left_out"]] == [LEFT]
    assert contributions(own[0]) == contributions(tmp_path / "failing")


def test_to_exclude_a_client_is_as_if_it_had_never_come(tmp_path):
    never = run({"clients": 2}, tmp_path / "never", num_clients=2)
    excluded = run({}, tmp_path / "excluded", exclude=" client-2 ")
    (left_out,) = excluded["left_out"]
    assert (left_out["client"], left_out["phase"]) == ("client-2", "describe")
    assert left_out["reason"] == "excluded by `exclude`"
    for figure in ("class_il_accuracy", "classes", "clients_evaluated", "diagnostics"):
        assert excluded[figure] == never[figure]
    there = [path for path in (tmp_path / "never" / "registry").rglob("*/*") if path.is_file()]
    assert {CONTENT, FISHER, CARD, "model.safetensors", "sum.safetensors"} <= {
        path.name for path in there
    }
    for path in there:
        same = tmp_path / "excluded" / path.relative_to(tmp_path / "never")
        assert path.read_bytes() == same.read_bytes(), path.name


def test_an_excluded_client_that_never_came_is_noted(tmp_path):
    results = run({}, tmp_path / "out", exclude="client-1, client-7", realign=False)
    assert list(results["per_client"]) == ["client-0", "client-2"]
    (note,) = (note for note in results["notes"] if "exclude" in note)
    assert "`exclude` names 'client-7'" in note
    assert "client-0, client-1, client-2 came" in note


def test_too_few_clients_may_be_left_after_excluding(tmp_path):
    with pytest.raises(TooFewClients, match=r"client-1 \(describe\): excluded by `exclude`"):
        run({}, tmp_path / "out", exclude="client-0,client-1")


def _at_other_weights(fisher: FisherDiagonal, path: Path) -> None:
    save_reference(path, fisher, base="embedded@00", curvature=Curvature.FEATURES)


def _of_fewer_weights(fisher: FisherDiagonal, path: Path) -> None:
    sums = {name: total for name, total in fisher.sums.items() if "proj" not in name}
    altered = FisherDiagonal(sums, fisher.num_examples)
    save_reference(path, altered, base=base(), curvature=Curvature.FEATURES)


def _negative(fisher: FisherDiagonal, path: Path) -> None:
    sums = {name: total - 1 for name, total in fisher.sums.items()}
    altered = FisherDiagonal(sums, fisher.num_examples)
    save_reference(path, altered, base=base(), curvature=Curvature.FEATURES)


def _of_class_probabilities(fisher: FisherDiagonal, path: Path) -> None:
    save_reference(path, fisher, base=base(), curvature=Curvature.EXACT)


def _of_a_client(fisher: FisherDiagonal, path: Path) -> None:
    save_fisher(path, fisher, client="client-0", base=base())


def base() -> str:
    return load_backbone(BACKBONE).fingerprint


@pytest.mark.parametrize(
    ("write", "error", "reason"),
    [
        (_at_other_weights, BackboneMismatch, "backbone embedded@00, expected local-dir:vit"),
        (_of_fewer_weights, ContributionError, "proj.*Use the same `target-weights`"),
        (_negative, ContributionError, "out of range"),
        (_of_a_client, FileFormatError, "belongs to client 'client-0', expected '\\(reference\\)'"),
        (_of_class_probabilities, ConfigError, "is of `curvature = exact`, but `curvature` is fea"),
        (lambda fisher, path: None, FileFormatError, "cannot be read"),
    ],
)
def test_a_reference_that_cannot_be_used_stops_the_run_before_anyone_is_asked(
    write, error, reason, reference, tmp_path
):
    fisher = load_reference(reference, base=base(), curvature=Curvature.FEATURES)
    write(fisher, tmp_path / "other.safetensors")
    with pytest.raises(error, match=reason):
        run({}, tmp_path / "out", anchor="reference", reference=str(tmp_path / "other.safetensors"))
    events = (tmp_path / "out" / "events.jsonl").read_text()
    assert "phase-started" not in events
