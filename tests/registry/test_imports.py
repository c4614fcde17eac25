"""Models that were fine-tuned elsewhere, as clients of a registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from builders import PICO_ARGS, normal
from cli_runs import run, told
from image_folders import write_images
from registry_builders import backbone, member, registry_of
from torch import Tensor

from fedcompo.audit.shadows import ClientTraining
from fedcompo.backbone.finetuned import read_finetuned
from fedcompo.config.choices import Kind
from fedcompo.config.run import FisherConfig, RunConfig
from fedcompo.data.client_data import load_folder
from fedcompo.errors import BackboneError, ConfigError, ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.features import extract_features
from fedcompo.method.statistics import FeatureSums
from fedcompo.registry.imports import Wanted, import_model
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry
from fedcompo.training.probing import fisher_of_images

ROWS = ("yak", "dog", "cat")
"""Rows of the classifiers below, in no order."""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return registry_of(tmp_path / "registry", member("ben", classes=("dog", "owl")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def tuned(*, rest: bool = False) -> dict[str, Tensor]:
    """The state of the pico backbone after a fine-tuning, with a classifier of three rows."""
    state = {name: tensor.clone() for name, tensor in backbone().model.state_dict().items()}
    touched = backbone().theta_0.keys() | ({"pos_embed", "blocks.1.norm1.bias"} if rest else set())
    for seed, name in enumerate(sorted(touched)):
        state[name] += normal(*state[name].shape, seed=seed, scale=0.05, dtype=torch.float32)
    state["head.weight"] = normal(3, 8, seed=90, dtype=torch.float32)
    state["head.bias"] = normal(3, seed=91, dtype=torch.float32)
    return state


def saved(folder: Path, form: str, state: dict[str, Tensor]) -> Path:
    """The same weights in each form that timm and its users write."""
    if form == "folder":
        arguments = {**PICO_ARGS, "num_classes": 3}
        model = timm.create_model("vit_tiny_patch16_224", **arguments)
        model.load_state_dict(state)
        config = {"label_names": list(ROWS), "model_args": arguments}
        timm.models.save_for_hf(model, folder / "hf", model_config=config, safe_serialization=True)
        return folder / "hf"
    path = folder / f"tuned.{form}"
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("form", ["safetensors", "pth", "folder"])
def test_a_checkpoint_becomes_a_client(
    form: str, registry: Registry, images: Path, tmp_path: Path
) -> None:
    state = tuned()
    source = saved(tmp_path, form, state)
    classes = () if form == "folder" else ROWS
    given: dict[str, Any] = {"client": "ada", "data": images, "wanted": Wanted(classes)}
    made = import_model(source, registry, **given)
    theta_0 = backbone().theta_0
    expected = {name: state[name].double() - theta_0[name].double() for name in theta_0}
    actual = {name: tau.double() for name, tau in made.task_vector.dense(theta_0).items()}
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert made.head.classes == ("cat", "dog")
    assert torch.equal(made.head.weight, state["head.weight"][[2, 1]])
    assert torch.equal(made.head.bias, state["head.bias"][[2, 1]])
    train = load_folder(images, backbone().preprocessing, seed=0).train
    features = extract_features(backbone().forward({}), train.images)
    own = FeatureSums.of(features, train.labels, ("cat", "dog"))
    assert isinstance(made.statistics, FeatureSums)
    torch.testing.assert_close(made.statistics.tensors(), own.tensors(), rtol=0, atol=0)
    registry.add(made)
    with pytest.raises(ConfigError, match="was imported"):
        ClientTraining.of(registry, "ada", backbone())
    assert all(finding.holds is not False for finding in verify_registry(registry.path))
    registry.remove("ada")
    assert registry.clients == ("ben",)


def test_without_names_of_its_rows_a_head_is_fitted(
    registry: Registry, images: Path, tmp_path: Path
) -> None:
    source = saved(tmp_path, "safetensors", tuned())
    made = import_model(source, registry, client="ada", data=images)
    assert made.settings["imported-head"] == "fitted"
    test = load_folder(images, backbone().preprocessing, seed=0).test
    theta_0 = backbone().theta_0
    theta = {name: theta_0[name] + tau for name, tau in made.task_vector.dense(theta_0).items()}
    logits = made.head(extract_features(backbone().forward(theta), test.images))
    assert (logits.argmax(1) == test.labels).float().mean() > 0.8
    RunConfig.stored(made.settings)  # later commands can read them


def test_what_else_changed_is_named_and_refused_or_recorded(
    registry: Registry, images: Path, tmp_path: Path
) -> None:
    source = saved(tmp_path, "safetensors", tuned(rest=True) | {"extra": torch.ones(2)})
    rest = r"blocks.*.norm1.bias (1), extra (1), pos_embed (1)"
    with pytest.raises(ContributionError) as refused:
        import_model(source, registry, client="ada", data=images)
    assert rest in str(refused.value)
    made = import_model(source, registry, client="ada", data=images, wanted=Wanted(drop_rest=True))
    assert made.settings["imported-dropped"] == rest


@pytest.mark.parametrize(
    ("section", "argument", "value", "said"),
    [
        ("model_args", "num_heads", 4, "model_args"),
        ("model_args", "class_token", False, "model_args"),
        ("", "global_pool", "avg", "global_pool"),
        ("pretrained_cfg", "mean", [0.1], "mean"),
        ("pretrained_cfg", "interpolation", "bilinear", "interpolation"),
    ],
)
def test_a_model_that_computes_something_else_is_named(
    section: str,
    argument: str,
    value: object,
    said: str,
    registry: Registry,
    images: Path,
    tmp_path: Path,
) -> None:
    source = saved(tmp_path, "folder", tuned())
    config = json.loads((source / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 1.0
    (source / "config.json").write_text(json.dumps(config))
    given: dict[str, Any] = {"client": "ada", "data": images}
    made = import_model(source, registry, **given)
    assert (made.settings["imported-head"], made.settings["imported-dropped"]) == ("source", "")
    (config[section] if section else config)[argument] = value
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContributionError, match=f"config.json: {said}"):
        import_model(source, registry, **given)


def test_rounding_to_half_precision_is_no_change(
    registry: Registry, images: Path, tmp_path: Path
) -> None:
    state = tuned() | {"blocks.0.attn.qkv.weight": backbone().theta_0["blocks.0.attn.qkv.weight"]}
    halves = {name: tensor.half() for name, tensor in state.items()}
    mixed = {name: t.bfloat16() if t.ndim > 1 else t for name, t in state.items()}
    for written in (halves, mixed):
        source = saved(tmp_path, "safetensors", written)
        made = import_model(source, registry, client="ada", data=images)
        assert made.settings["imported-dropped"] == ""
        assert not made.task_vector.dense(backbone().theta_0)["blocks.0.attn.qkv.weight"].any()


def test_what_is_not_trained_is_refused(registry: Registry, images: Path, tmp_path: Path) -> None:
    start = {name: t.bfloat16() for name, t in backbone().model.state_dict().items()}
    with pytest.raises(ContributionError, match="changes no target weight"):
        import_model(saved(tmp_path, "safetensors", start), registry, client="ada", data=images)


def test_a_classifier_beside_the_prefix_is_the_models(registry: Registry, tmp_path: Path) -> None:
    state = {n if n.startswith("head") else f"backbone.{n}": t for n, t in tuned().items()}
    found = read_finetuned(saved(tmp_path, "safetensors", state), backbone())
    assert found.classifier is not None
    assert torch.equal(found.classifier[0], state["head.weight"])


def wrong(kind: str, folder: Path) -> Path:
    state = tuned()
    if kind == "nothing":
        return folder / "nowhere.safetensors"
    if kind == "pickle":
        torch.save({"state_dict": state, "args": Path("code")}, folder / "tuned.pth")
        return folder / "tuned.pth"
    if kind == "empty":
        (folder / "empty").mkdir()
        return folder / "empty"
    if kind == "huge":
        with (folder / "huge.safetensors").open("wb") as file:
            file.truncate(3 << 30)  # sparse
        return folder / "huge.safetensors"
    if kind == "cut":
        path = saved(folder, "safetensors", state)
        path.write_bytes(path.read_bytes()[:-100])
        return path
    if kind == "nan":
        state["blocks.0.attn.qkv.weight"][0, 0] = torch.nan
    if kind == "shape":
        state["blocks.0.attn.qkv.weight"] = torch.ones(3, 3)
    if kind == "transposed":
        state["blocks.1.attn.proj.weight"] = state["blocks.1.attn.proj.weight"].T.contiguous()
    if kind == "exchanged":
        query, key, value = state["blocks.1.attn.qkv.weight"].chunk(3)
        state["blocks.1.attn.qkv.weight"] = torch.cat([key, query, value])
    if kind == "lacking":
        del state["blocks.1.mlp.fc2.weight"]
    if kind == "unrelated":
        state |= {
            n: normal(*t.shape, seed=7, dtype=t.dtype) for n, t in state.items() if t.ndim > 1
        }
    if kind == "deeper":
        state["blocks.2.attn.qkv.weight"] = torch.ones(24, 8)
    return saved(folder, "safetensors", state)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nothing", "There are no weights at"),
        ("empty", "There are no weights at"),
        ("huge", r"has 3.2 GB, and the weights of 'pico'"),
        ("cut", "is cut off"),
        ("pickle", "never as code"),
        ("nan", "infinity or NaN"),
        ("shape", "no fine-tuned 'pico'"),
        ("lacking", "blocks.1.mlp.fc2.weight"),
        ("unrelated", "was not fine-tuned from its weights"),
        ("transposed", "'blocks.1.attn.proj.weight': cosine"),
        ("exchanged", "'blocks.1.attn.qkv.weight': cosine"),
        ("deeper", "blocks.2.attn.qkv.weight"),
    ],
)
def test_a_wrong_source_is_refused_in_a_sentence(
    kind: str, said: str, registry: Registry, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match=said):
        import_model(wrong(kind, tmp_path), registry, client="ada", data=images)


@pytest.mark.parametrize("classes", [("cat", "dog"), ("cat", "yak", "owl"), ("cat", "dog", "dog")])
def test_names_that_do_not_fit_the_rows_are_refused(
    classes: tuple[str, ...], registry: Registry, images: Path, tmp_path: Path
) -> None:
    source = saved(tmp_path, "safetensors", tuned())
    with pytest.raises(ContributionError, match="3 rows"):
        import_model(source, registry, client="ada", data=images, wanted=Wanted(classes))


def test_where_no_fisher_can_be_had_it_is_imported_without_and_says_why(
    registry: Registry, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BackboneError("The layer is not called.")

    monkeypatch.setattr("fedcompo.training.probing.fisher_of_images", refuse)
    source = saved(tmp_path, "safetensors", tuned())
    common = ("import", source, "--data", images, "-r", registry.path, "--classes", "yak,dog,cat")
    assert "it has no Fisher. The layer is not called." in run(*common, "--client", "cho").output
    member = Registry(registry.path).contribution("cho", with_fisher=True)
    assert member.fisher is None
    assert member.settings["imported-no-fisher"] == "The layer is not called."


def test_the_command_adds_it_or_writes_its_folder(
    registry: Registry, images: Path, tmp_path: Path
) -> None:
    source = saved(tmp_path, "safetensors", tuned())
    command = ("import", source, "--data", images, "-r", registry.path, "--classes", "yak,dog,cat")
    assert told(*command, "--client", "cho", "-o", tmp_path / "cho")["imported-head"] == "source"
    fisher = Contribution.open(tmp_path / "cho").fisher
    seen = load_folder(images, backbone().preprocessing, seed=0).train.images
    expected, _ = fisher_of_images(backbone(), seen, FisherConfig(), seed=0, owner="cho")
    assert fisher.tensors.keys() == expected.reduced().tensors.keys()
    assert all(torch.equal(fisher.tensors[n], t) for n, t in expected.reduced().tensors.items())
    assert Registry(registry.path).clients == ("ben",)
    run("add", tmp_path / "cho", "-r", registry.path)
    assert "byte for byte" in run(*command, "--client", "dan", code=1).output
    assert Registry(registry.path).member("cho").kind == Kind.FULL
