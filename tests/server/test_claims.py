"""A client that lies about its counts, in runs of the real apps: it wins nothing by the lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from app_runs import altered, run
from builders import random_like
from PIL import Image
from sklearn.datasets import load_digits

from fedcompo.composition.voting import Votes
from fedcompo.config.choices import AnchorBy
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.training.anchors import FisherSums

TIMES = 10**6
OWNED = {"ada": (0, 1, 2, 3), "ben": (4, 5, 6, 7), "eve": (8, 9)}
SETTINGS = {"local_epochs": 1, "num_clients": 3}


def images(folder: Path, *, of: int) -> Path:
    """Digits of three clients, of whom eve has zeros too: her pictures of them show this digit."""
    data = load_digits()

    def draw(client: str, name: int, shown: int, first: int) -> None:
        for number, row in enumerate((data.target == shown).nonzero()[0][first : first + 40]):
            part = "train" if number < 25 else "test"
            file = folder / client / part / str(name) / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((data.images[row] * 15.9).astype("uint8")).save(file)

    for client, digits in OWNED.items():
        for digit in digits:
            draw(client, digit, digit, 0)
    draw("eve", 0, of, 60)
    return folder


def inflated(tensors, manifest):
    """Each image counts a million times: in sums, second moments and Fisher alike."""
    for name in tensors:
        if "statistics/" in name or "fisher/" in name:
            tensors[name] = tensors[name] * TIMES
    for entry in [manifest, *manifest.get("statistics", [])]:
        if "sums" in entry:
            entry["sums"] = {name: count * TIMES for name, count in entry["sums"].items()}
    if manifest.get("fisher"):
        manifest["fisher"]["num_examples"] *= TIMES
    if manifest["content"] == "vote":
        manifest["losses"] = [loss * TIMES for loss in manifest["losses"]]
        manifest["num_examples"] *= TIMES


LIES = {(2, f"query.{name}"): altered(inflated) for name in ("describe", "realign", "vote")}


def accuracy(results: dict) -> tuple[float, float]:
    """Of ada, whose zeros eve claims, under the frozen backbone and in the end."""
    own = results["per_client"]["ada"]
    return own["frozen_class_il_accuracy"], own["class_il_accuracy"]


def test_a_lie_about_counts_takes_nobody_s_class(tmp_path):
    """Wrong pictures of zeros do some harm by themselves; a million times as many do no more."""
    honest, wrong = images(tmp_path / "a", of=0), images(tmp_path / "b", of=9)

    def of(data: Path, lies: dict, **more) -> tuple[float, float]:
        output = tmp_path / f"{data.name}{len(lies)}{len(more)}"
        return accuracy(run({"tamper": lies}, output, data=f"folder:{data}", **SETTINGS, **more))

    shared, lied = of(honest, {}), of(wrong, LIES)
    notes = json.loads((tmp_path / f"b{len(LIES)}0" / "results.json").read_text())["notes"]
    assert any(note.startswith("eve weigh by 18 images of a class") for note in notes)
    assert all(after > before - 0.1 for after, before in zip(lied, shared, strict=True)), (
        shared,
        lied,
    )
    believed = of(wrong, LIES, max_count_ratio=0.0)
    assert max(believed) < 0.8


def test_who_claims_a_class_of_others_is_left_out(tmp_path):
    table = tmp_path / "owners.toml"
    table.write_text('0 = ["ada"]\n')
    data = images(tmp_path / "images", of=9)
    results = run({}, tmp_path / "out", data=f"folder:{data}", owners=str(table), **SETTINGS)
    assert list(results["per_client"]) == ["ada", "ben"]
    (left,) = results["left_out"]
    assert left["phase"] == "describe"
    assert "'eve' claims the class '0', which owners.toml keeps for others" in left["reason"]
    assert (tmp_path / "out" / "registry" / "owners.toml").read_text() == table.read_text()


def test_who_joins_a_class_of_a_member_is_noted(tmp_path):
    data = images(tmp_path / "images", of=0)
    first = run({}, tmp_path / "first", data=f"folder:{data}", exclude="eve", **SETTINGS)
    assert not any("others had before" in note for note in first["notes"])
    later = run(
        {},
        tmp_path / "later",
        data=f"folder:{data}",
        registry=first["registry"]["path"],
        **SETTINGS,
    )
    assert any("others had before: eve ('0')" in note for note in later["notes"])


def test_a_vote_on_any_number_of_images_weighs_as_much_as_the_cap():
    honest, liar = Votes((8, 2), (3.0, 9.0), 10), Votes((0, 10**9), (2e9, 0.0), 10**9)
    assert (honest.capped(15), Votes.none(2).capped(15)) == (honest, Votes.none(2))
    together = honest + liar.capped(15)
    assert (together.hits, together.losses, together.num_examples) == ((8, 17), (33, 9), 25)


@pytest.mark.parametrize("reduced", [False, True])
def test_a_fisher_of_any_number_of_images_weighs_as_much_as_the_cap(reduced):
    weights = {"w": torch.zeros(3, 4)}
    sums = {name: random_like(weights, seed=seed, positive=True) for seed, name in enumerate("abc")}
    own = {
        c: FisherDiagonal(total, n)
        for (c, total), n in zip(sums.items(), (10, 20, 10**9), strict=True)
    }
    if reduced:
        own = {client: fisher.reduced() for client, fisher in own.items()}
    total = FisherSums(own, lambda c: own[c].capped(30), by=AnchorBy.OTHERS)
    means = {client: fisher.mean() for client, fisher in own.items()}
    for name, mean in total.mean_for("a").items():
        expected = (20 * means["b"][name].double() + 30 * means["c"][name].double()) / 50
        torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=0)
    assert own["b"].capped(30) is own["b"]
