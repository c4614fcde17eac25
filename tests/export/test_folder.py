"""A selection as a folder for others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from registry_builders import backbone, member, registry_of
from torch import Tensor

from fedcompo.config.choices import Kind
from fedcompo.errors import ConfigError
from fedcompo.export.folder import publish
from fedcompo.export.recipe import Negation, Recipe
from fedcompo.export.selected import Selection
from fedcompo.export.selection import from_registry
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import MODEL_CARD, RECIPE
from fedcompo.storage.tensorstream import StreamedTensors, file_sha256


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return registry_of(
        tmp_path_factory.mktemp("publish") / "registry",
        member("ada", Kind.FULL, seed=1),
        member("ben", Kind.LORA, seed=2, classes=("owl", "yak")),
        member("cho", Kind.IA3, seed=3, classes=("emu",)),
    )


def test_the_folder_holds_model_configuration_and_card_and_what_is_told_is_in_it(
    registry: Registry, tmp_path: Path
) -> None:
    selection = from_registry(registry, without=("cho",), scale=2.0)
    told = publish(tmp_path / "out", selection)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        MODEL_CARD,
        "config.json",
        "model.safetensors",
        RECIPE,
    ]
    assert told == {
        "output": str(tmp_path / "out"),
        "clients": ["ada", "ben"],
        "coefficients": {"ada": 0.5, "ben": 0.5},
        "scale": 2.0,
        "rule": "mean",
        "classes": ["cat", "dog", "owl", "yak"],
        "negated": None,
        "linearised": False,
        "sha256": file_sha256(tmp_path / "out" / "model.safetensors"),
    }
    assert json.loads(json.dumps(told)) == told
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == told["classes"]
    card = (tmp_path / "out" / MODEL_CARD).read_text()
    for text in (told["sha256"], "Without cho.", "λ = 2.", "| ada |", "| ben |", "owl"):
        assert text in card
    assert "| cho |" not in card


def test_every_weight_is_the_selections_or_the_backbones(
    registry: Registry, tmp_path: Path
) -> None:
    selection = from_registry(registry, only=("ada", "cho"))
    publish(tmp_path / "out", selection)
    expected = dict(backbone().model.state_dict()) | dict(selection.stream())
    expected |= {"head.weight": selection.head.weight, "head.bias": selection.head.bias}
    found = StreamedTensors(tmp_path / "out" / "model.safetensors")
    found.check()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_negated_copy_is_labelled(registry: Registry, tmp_path: Path) -> None:
    selection = from_registry(registry, recipe=Recipe(negated=Negation("cho", strength=0.5)))
    assert selection.pool.clients == ("ada", "ben") and selection.without == ("cho",)
    assert publish(tmp_path / "out", selection)["negated"] == "cho"
    card = (tmp_path / "out" / MODEL_CARD).read_text()
    assert "do not deploy" in card and "0.5 times the task vector" in card
    found = StreamedTensors(tmp_path / "out" / "model.safetensors")
    vector = registry.contribution("cho").task_vector
    for name, weight in from_registry(registry, without=("cho",)).stream():
        tau = vector.delta(name, backbone().theta_0[name])
        expected = (weight.double() - 0.5 * tau.double()).float()
        assert torch.equal(found[name], expected)


def test_what_is_there_is_never_written_over(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="holds something already"):
        publish(tmp_path / "out", from_registry(registry))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def composing(values: Iterable[tuple[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let selections compose these values."""
    monkeypatch.setattr(Selection, "stream", lambda self: iter(values))


def test_nothing_appears_if_composing_fails_half_way(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = from_registry(registry)

    def failing(composed: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        yield next(composed)
        raise KeyboardInterrupt

    composing(failing(selection.stream()), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "out", selection)
    assert list(tmp_path.iterdir()) == []


def test_weights_out_of_order_are_no_model(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = from_registry(registry)
    composing(reversed(list(selection.stream())), monkeypatch)
    with pytest.raises(ValueError, match="out of order"):
        publish(tmp_path / "out", selection)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_can_be_read_by_others_and_moved(registry: Registry, tmp_path: Path) -> None:
    publish(tmp_path / "out", from_registry(registry))
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    (tmp_path / "out").rename(tmp_path / "moved")
    model = timm.create_model(f"local-dir:{tmp_path / 'moved'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == list(registry.classes)
