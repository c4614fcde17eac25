"""The command `import`: its options, what it refuses first, and what is said of a member later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from builders import normal
from cli_runs import run, told
from image_folders import write_images
from registry_builders import OF_MIXTURES, backbone, member, registry_of
from safetensors.torch import save_file
from torch import Tensor

from fedcompo.backbone.stored import StoredBackbone
from fedcompo.config.choices import Modality, Statistics
from fedcompo.method.contribution import Contribution
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry

ROWS = ("yak", "dog", "cat")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return registry_of(tmp_path / "registry", member("ben", classes=("eel", "owl")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def state(seed: int = 0) -> dict[str, Tensor]:
    made = {name: tensor.clone() for name, tensor in backbone().model.state_dict().items()}
    for name in backbone().theta_0:
        seed += 1
        made[name] += normal(*made[name].shape, seed=seed, scale=0.05, dtype=torch.float32)
    head = {"head.weight": (3, 8), "head.bias": (3,)}
    return made | {n: normal(*s, seed=seed + 50, dtype=torch.float32) for n, s in head.items()}


def saved(path: Path, **given: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file(state(**given), path)
    return path


def test_a_model_without_images_joins_and_leaves(registry: Registry, tmp_path: Path) -> None:
    source, before = saved(tmp_path / "tuned.safetensors"), registry.state.root
    alone = registry.joint_head()
    common = ("import", source, "--client", "ada", "-r", registry.path)
    assert "does not name its classes" in run(*common, code=1).output
    assert "3 rows" in run(*common, "--classes", "yak,dog", code=1).output
    report = told(*common, "--classes", ",".join(ROWS))
    assert (report["imported-statistics"], report["imported-head"]) == ("stand-in", "source")
    opened = Registry(registry.path)
    assert opened.member("ada").num_examples == 3 * 10  # as ben's classes have
    joint = opened.joint_head()
    torch.testing.assert_close(joint.rows(alone.classes).weight, alone.weight, rtol=1e-3, atol=1e-3)
    features = normal(200, 8, seed=3)
    own = {name: tensor.double() for name, tensor in state().items() if "head" in name}
    logits = features @ own["head.weight"].T + own["head.bias"]
    decided = joint.rows(ROWS)(features).argmax(1)
    assert float((decided == logits.argmax(1)).float().mean()) > 0.99
    assert "none" in run("list", "-r", registry.path).output
    assert "No images describe ada" in run("list", "-r", registry.path).output
    shown = run("show", "ada", "-r", registry.path).output
    assert "none; counts as 30" in shown and "tuned.safetensors" in shown
    assert all(finding.holds is not False for finding in verify_registry(registry.path))
    run("remove", "ada", "-r", registry.path, "--yes")
    assert Registry(registry.path).state.root == before


def folder_of(contribution: Contribution, folder: Path) -> Path:
    contribution.save(folder)
    return folder


def test_models_without_images_need_nobody_there(tmp_path: Path) -> None:
    empty = registry_of(tmp_path / "registry")
    source = saved(tmp_path / "tuned.safetensors")
    common = ("import", source, "--client", "ada", "-r", empty.path, "--classes", ",".join(ROWS))
    assert "count as 40 images" in run(*common, "--counts-as", 40).output.replace("\n", " ")
    assert Registry(empty.path).member("ada").num_examples == 120
    head = Registry(empty.path).joint_head()
    own = state()
    spread = [w.double() - w.double().mean(0) for w in (head.rows(ROWS).weight, own["head.weight"])]
    torch.testing.assert_close(*spread, rtol=0, atol=1e-3)
    run(*common, "--replace", "--counts-as", 40)  # nobody else is there, so it is the same again
    again = Registry(empty.path).joint_head()
    torch.testing.assert_close(again.weight, head.weight, rtol=0, atol=0)
    run("add", folder_of(member("ben"), tmp_path / "ben"), "-r", empty.path)
    run(*common, "--replace", "--counts-as", 40)
    assert Registry(empty.path).clients == ("ada", "ben")


def test_a_name_that_is_taken_is_replaced_on_demand(
    registry: Registry, images: Path, tmp_path: Path
) -> None:
    common = ("import", saved(tmp_path / "a.safetensors"), "-r", registry.path, "--data", images)
    assert "`--replace`" in run(*common, "--client", "ben", code=1).output
    nobody = run(*common, "--client", "ben", "--replace", "-o", tmp_path / "out", code=2)
    assert "`--replace` replaces nobody" in nobody.output
    run(*common, "--client", "ben", "--replace")
    assert Registry(registry.path).member("ben").classes == ("cat", "dog")


def test_few_images_are_refused_unless_told(registry: Registry, tmp_path: Path) -> None:
    few = write_images(tmp_path / "few", count=14)  # four of each class, and six to test
    source = saved(tmp_path / "a.safetensors")
    common = ("import", source, "--client", "ada", "-r", registry.path, "--data", few)
    assert "`--min-images` is 8" in run(*common, code=1).output.replace("\n", " ")
    run(*common, "--min-images", 2)
    assert "`--counts-as` without it" in run(*common, "--counts-as", 9, code=2).output


def test_a_registry_that_none_can_join_is_refused_first(
    registry: Registry, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtures = registry_of(
        tmp_path / "mixtures",
        member("ben", statistics=Statistics.MIXTURES),
        settings=OF_MIXTURES,
    )
    common = ("import", tmp_path / "nowhere", "--client", "ada", "--data", images)
    assert "by mixtures" in run(*common, "-r", mixtures.path, code=1).output
    texts = type("Texts", (), {"modality": Modality.TEXTS})()
    monkeypatch.setattr(StoredBackbone, "preprocessing", texts)
    assert "reads texts" in run(*common, "-r", registry.path, code=1).output


def adapter(folder: Path, base: str | None) -> Path:
    """A LoRA of the first block's first layer."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.blocks.0.mlp.fc1"
    factors = {
        f"{layer}.lora_A.weight": torch.ones(1, 8),
        f"{layer}.lora_B.weight": torch.ones(16, 1),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        (None, ""),
        ("pico", ""),
        ("google/vit-base-patch16-224", "google/vit-base-patch16-224"),
        ("/home/eve/models/secret", "secret"),
        ("timm/vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k"),
    ],
)
def test_what_an_adapter_was_trained_on_is_noted(
    base: str | None, kept: str, registry: Registry, images: Path, tmp_path: Path
) -> None:
    source = adapter(tmp_path / "adapter", base)
    common = ("import", source, "--client", "ada", "-r", registry.path, "--data", images)
    said = run(*common).output.replace("\n", " ")
    assert ("the registry's weights are pico" in said) == bool(kept)
    card = Registry(registry.path).card("ada")
    assert card["settings"].get("imported-base", "") == kept


def test_an_adapter_of_another_of_timms_models_is_refused(
    registry: Registry, images: Path, tmp_path: Path
) -> None:
    source = adapter(tmp_path / "adapter", "timm/deit_tiny_patch16_224.fb_in1k")
    common = ("import", source, "--client", "ada", "-r", registry.path)
    said = run(*common, "--data", images, code=1).output.replace("\n", " ")
    assert "'timm/deit_tiny_patch16_224.fb_in1k'" in said and "'pico'" in said
    assert "Leave `--delta` out" in run(*common, "--delta", code=1).output


def test_sources_of_the_hub_and_of_local_folders(
    registry: Registry, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network: a stand-in for the hub, then the hub's own refusal."""
    save_file(state(), tmp_path / "model.safetensors")
    asked: list[Any] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(tmp_path)

    common = ("-r", registry.path, "--data", images)
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "snapshot_download", snapshot)
        run("import", "hf-hub:eve/tuned@v2", "--client", "ada", *common, "-o", tmp_path / "a")
    assert asked == [("eve/tuned", "v2")]
    run("import", f"local-dir:{tmp_path}", "--client", "ada", *common, "-o", tmp_path / "b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    said = run("import", "hf-hub:eve/other", "--client", "cho", *common, code=1).output
    assert "could not be had from the hub" in said.replace("\n", " ")


def test_nobody_knows_the_images_of_imports(registry: Registry, tmp_path: Path) -> None:
    source = saved(tmp_path / "tuned.safetensors")
    told("import", source, "--client", "ada", "-r", registry.path, "--classes", ",".join(ROWS))
    said = " ".join(run("evaluate", "-r", registry.path, code=1).output.split())
    assert "ada was imported" in said
    assert "`--data folder:<path>`" in said
