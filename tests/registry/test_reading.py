"""What is read was checked; what is not as it was is damage, or a change to be told of."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from builders import altered
from registry_builders import (
    OF_MIXTURES,
    backbone,
    contents,
    member,
    one_of_each_kind,
    overwrite,
    own_statistics,
    registry_of,
    same_bits,
    three_clients,
)
from torch import Tensor

from fedcompo.config.choices import Kind, Statistics
from fedcompo.errors import RegistryDamaged, RegistryError
from fedcompo.registry.registry import Registry
from fedcompo.storage import tensorfile
from fedcompo.storage.digests import TICK, tensor_sha256
from fedcompo.storage.files import BACKBONE, CARD, CONTENT, FISHER, SUM, TOTALS

ADA, BEN, CHO = one_of_each_kind()


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


def test_every_file_is_checked_before_it_is_believed(registry):
    reads = {
        "backbone.safetensors": lambda r: r.model(only=["ada"]),
        "clients/ada/contribution.safetensors": lambda r: dict(
            r.contribution("ada").task_vector.tensors
        ),
        "clients/ada/card.json": lambda r: r.contribution("ada"),
        f"{registry.state.version}/model.safetensors": lambda r: dict(r.composed()),
        f"{registry.state.version}/sum.safetensors": lambda r: dict(r.running_sum()),
        "journal.jsonl": lambda r: r.entries(),
        "state.json": lambda r: Registry(r.path),
        "registry.json": lambda r: Registry(r.path),
    }
    for name, read in reads.items():
        size = (registry.path / name).stat().st_size
        for position in (9, size // 2, size - 2):
            altered(registry.path / name, position)
            with pytest.raises(RegistryDamaged, match=Path(name).name):
                read(Registry(registry.path))
            altered(registry.path / name, position)
        read(Registry(registry.path))


def test_an_altered_fisher_is_found_when_it_is_asked_for(tmp_path):
    registry = registry_of(tmp_path / "r", member("ada", with_fisher=True))
    path = registry.path / "clients" / "ada" / FISHER
    altered(path, path.stat().st_size - 2)
    registry = Registry(registry.path)
    assert registry.contribution("ada").fisher is None
    with pytest.raises(RegistryDamaged, match="fisher"):
        dict(registry.contribution("ada", with_fisher=True).fisher.sums)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.add(member("dee")),
        lambda r: r.remove("ada"),
        lambda r: r.realign(own_statistics(r)),
    ],
    ids=["add", "remove", "realign"],
)
@pytest.mark.parametrize("name", [SUM, TOTALS, BACKBONE])
def test_nothing_is_composed_of_altered_files(name, change, registry):
    folder = registry.path / registry.state.version if name != BACKBONE else registry.path
    altered(folder / name, (folder / name).stat().st_size - 3)
    before = contents(registry.path)
    with pytest.raises(RegistryDamaged, match=name):
        change(Registry(registry.path))
    assert contents(registry.path) == before


@pytest.mark.parametrize(
    "change",
    [lambda r: r.add(member("dee", statistics=Statistics.MIXTURES)), lambda r: r.remove("ada")],
)
def test_a_joint_head_is_not_aligned_with_altered_mixtures(change, tmp_path):
    members = one_of_each_kind(Statistics.MIXTURES)
    registry = registry_of(tmp_path / "r", *members, settings=OF_MIXTURES)
    path = registry.path / "clients" / "ben" / CONTENT  # who neither comes nor goes
    data = path.read_bytes()
    means = registry.contribution("ben").statistics["dog"].means.numpy().tobytes()
    altered(path, data.index(means) + 5)
    with pytest.raises(RegistryDamaged, match=r"Head and mixtures in .*ben were altered"):
        change(registry)
    overwrite(path, data)
    tensors, manifest = tensorfile.load(path)
    claims = manifest | {"mixtures": dict.fromkeys(manifest["mixtures"], 999)}
    tensorfile.save(path, {n: t.clone() for n, t in tensors.items()}, claims)
    card = json.loads((path.parent / CARD).read_text())
    (path.parent / CARD).write_text(json.dumps(card | {"mixtures": claims["mixtures"]}))
    with pytest.raises(RegistryDamaged, match=r"Head and mixtures in .*ben were altered"):
        change(registry)


def test_a_missing_file_is_damage_and_named(registry):
    (registry.path / "clients" / "ben" / CONTENT).unlink()
    with pytest.raises(RegistryDamaged, match=r"ben.*cannot be read.*Restore"):
        registry.contribution("ben")


def test_a_tensor_is_hashed_once_in_a_process(registry, monkeypatch):
    hashed: list[tuple[str, str]] = []
    time.sleep(2 * TICK / 1e9)  # of a file that was written just now nothing is remembered

    def counting(name: str, tensor: Tensor) -> str:
        hashed.append((name, tensor_sha256(name, tensor)))
        return hashed[-1][1]

    monkeypatch.setattr("fedcompo.storage.tensorstream.tensor_sha256", counting)
    for opened in (registry, Registry(registry.path), Registry(registry.path)):
        opened.theta_p()
        dict(opened.pool().only("ada").contributions[0].task_vector.tensors)
    assert len(hashed) == len(set(hashed)) > 0


def test_one_who_read_on_is_told_of_the_change_and_not_of_damage(registry):
    early = Registry(registry.path)
    held, composed = early.contribution("ada"), early.composed()
    registry.remove("ada")
    reads = (
        lambda: early.theta_p(),
        lambda: early.contribution("ada"),
        lambda: dict(composed),
        lambda: held.task_vector.dense(backbone().theta_0),
    )
    for read in reads:
        with pytest.raises(RegistryError, match="was changed while it was being read") as caught:
            read()
        assert not isinstance(caught.value, RegistryDamaged)
    early.refresh()
    assert early.clients == ("ben", "cho")
    assert same_bits(early.theta_p(), registry.theta_p())


def test_another_contribution_under_the_same_name_is_no_damage(registry):
    early = Registry(registry.path)
    held = early.contribution("ada")
    registry.remove("ada")
    registry.add(member("ada", Kind.FULL, seed=77, classes=("cat", "dog"), num_examples=10))
    with pytest.raises(RegistryError, match="Try again") as caught:
        held.task_vector.dense(backbone().theta_0)
    assert not isinstance(caught.value, RegistryDamaged)


def test_even_white_space_in_a_card_is_held_against_its_digest(registry):
    path = registry.path / "clients" / "ben" / CARD
    overwrite(path, path.read_bytes().replace(b"\n  ", b"\n\t ", 1))
    with pytest.raises(RegistryDamaged, match=r"card\.json has SHA-256"):
        registry.contribution("ben")
