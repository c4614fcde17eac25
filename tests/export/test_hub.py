"""Uploads to a hub: what arrives is what lies in the folder, and what is not known stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from builders import altered
from cli_runs import run, told
from hub_stand_in import Hub, hub_stand_in
from registry_builders import member, registry_of, same_bits, tangents

from fedcompo.backbone.backbone import load_backbone
from fedcompo.backbone.origin import Origin
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind
from fedcompo.config.run import BackboneConfig
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import BACKBONE


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one of tangents, and an adapter."""
    home = tmp_path_factory.mktemp("written")
    registry_of(home / "r", member("ada", Kind.LORA, seed=1))
    registry_of(home / "t", *tangents())
    run("export", "-r", home / "r", "-o", home / "model")
    run("export", "-r", home / "r", "--client", "ada", "-o", home / "adapter")
    run("export", "-r", home / "t", "-o", home / "tangents")
    return home


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "model", tmp_path / "model"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_stand_in(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["model", "adapter", "tangents"])
def test_every_byte_arrives_and_nothing_else(written, hub, kind):
    done = told("push", written / kind, "org/mine")
    assert hub.repos == {"org/mine": {"private": False, "files": bytes_of(written / kind)}}
    assert done["address"] == f"{hub.address}/org/mine"
    assert done["commit"] == f"{hub.address}/org/mine/commit/1"
    assert (done["left"], done["license"]) == ([], None)
    assert BACKBONE in done["files"] or kind != "tangents"
    assert not any(str(written) in str(text) for text in hub.repos["org/mine"]["files"].values())


def test_what_was_sent_is_a_model_for_timm_and_a_backbone_for_the_next(written, hub, tmp_path):
    run("push", written / "model", "org/mine")
    here = timm.create_model(f"local-dir:{written / 'model'}", pretrained=True).state_dict()
    there = timm.create_model("hf-hub:org/mine", pretrained=True).state_dict()
    assert same_bits(dict(there), dict(here))
    backbone = load_backbone(BackboneConfig("hf-hub:org/mine"))
    assert backbone.origin == Origin("org/mine")
    assert torch.equal(backbone.model.state_dict()["norm.weight"], here["norm.weight"])
    registry = Registry.create(tmp_path / "next", backbone, CompositionSettings())
    made = member("eve", Kind.LORA, seed=2)
    vector = replace(made.task_vector, base=backbone.fingerprint)
    registry.add(replace(made, task_vector=vector))
    for options, relation in (((), "finetune"), (("--client", "eve"), "adapter")):
        out = tmp_path / relation
        run("export", "-r", registry.path, "-o", out, *options)
        data = huggingface_hub.ModelCard.load(out / "README.md").data
        assert (data.base_model, data.base_model_relation) == ("org/mine", relation)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/mine"


def test_files_of_others_stay_and_are_named(folder, hub):
    mine = bytes_of(folder)
    (folder / "patients.csv").write_text("secret")
    (folder / ".cache").mkdir()
    text = run("push", folder, "org/mine").output
    assert "Left here: .cache." in text and "Left here: patients.csv." in text
    assert f"Address: {hub.address}/org/mine" in text
    assert hub.repos["org/mine"]["files"] == mine


def test_a_second_upload_goes_to_the_same_repository(written, hub):
    run("push", written / "model", "org/mine")
    run("push", written / "adapter", "org/mine")
    both = bytes_of(written / "model") | bytes_of(written / "adapter")
    assert hub.repos["org/mine"]["files"] == both


def test_private_is_private_or_nothing_is_sent(folder, hub):
    run("push", folder, "org/mine", "--private")
    assert hub.repos["org/mine"]["private"]
    hub.repos["org/open"] = {"private": False, "files": {}}
    text = run("push", folder, "org/open", "--private", code=2).output
    assert "exists and is public" in text and hub.repos["org/open"]["files"] == {}


def test_a_dry_run_needs_neither_token_nor_network(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: pytest.fail("no token is needed"))
    done = told("push", folder, "org/mine", "--dry-run")
    sizes = {name: len(data) for name, data in bytes_of(folder).items()}
    assert done == {
        "repo": "org/mine", "files": sizes, "left": [], "license": None
    }  # fmt: skip
    size = sizes["model.safetensors"]
    text = run("push", folder, "org/mine", "--dry-run").output
    assert f"Would send model.safetensors: {size:,} bytes." in text
    assert (
        "The card states no license; `license: ...` adds one, in the first lines of README.md."
        in text
    )


def linked(folder):
    """Somebody's file of another place lies under a name that is sent."""
    (folder.parent / "secret").write_bytes((folder / "recipe.toml").read_bytes())
    (folder / "recipe.toml").unlink()
    (folder / "recipe.toml").symlink_to(folder.parent / "secret")


def test_the_card_of_another_adapter_is_not_sent_with_it(written, tmp_path, hub):
    folder = Path(shutil.copytree(written / "adapter", tmp_path / "adapter"))
    shutil.copy(written / "model" / "README.md", folder)
    assert "the card of another model" in run("push", folder, "org/mine", code=1).output
    assert hub.seen == []


@pytest.mark.parametrize(
    ("harm", "code", "message"),
    [
        (lambda f: altered(f / "model.safetensors", -1), 1, "was altered"),
        (lambda f: (f / "config.json").write_text("{"), 1, "config.json or README.md"),
        (lambda f: (f / "README.md").write_text("Mine."), 1, "the card of another model"),
        (lambda f: (f / "README.md").unlink(), 2, "has no README.md"),
        (lambda f: (f / "model.safetensors").unlink(), 2, "has no model.safetensors"),
        (lambda f: (f / BACKBONE).write_bytes(b"1"), 1, "not a complete fedcompo file"),
        (lambda f: (f / "recipe.toml").write_text("password"), 2, "no valid TOML"),
        (lambda f: (f / "recipe.toml").write_text(""), 1, "is not the recipe of model.safetensors"),
        (linked, 2, "recipe.toml is a link, which fedcompo does not write"),
    ],
)
def test_what_is_not_intact_is_not_sent(folder, hub, harm, code, message):
    harm(folder)
    assert message in " ".join(run("push", folder, "org/mine", code=code).output.split())
    assert hub.seen == []


@pytest.mark.parametrize("repo", ["mine", "a/b/c", "org/", "org/a b", "../up", "org/-x"])
def test_a_wrong_name_is_refused_before_anything_is_read(repo, tmp_path, hub):
    text = run("push", tmp_path, "--", repo, code=2).output
    assert "write OWNER/NAME" in text and hub.seen == []


@pytest.mark.parametrize("token", [None, "hf_mine two", "hf_mine\x01", "hf_mineé"])
def test_without_a_token_it_says_where_to_get_one(folder, hub, monkeypatch, token):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    text = run("push", folder, "org/mine", code=2).output
    assert "`hf auth login`" in text and "mine two" not in text and "hf_mine" not in text
    assert hub.seen == []


@pytest.mark.parametrize(
    ("where", "status", "advice"),
    [
        ("/repos/create", 401, "The token is not valid there"),
        ("create|api/models", 403, "a right to org"),
        ("/preupload/", 404, "There is no org/mine"),
        ("/objects/batch", 403, "needs the role `write`"),
        ("/put/", 403, "needs the role `write`"),
        ("/commit/", 429, "Try again later"),
    ],
)
def test_a_refusal_is_one_sentence_and_what_to_do(folder, hub, where, status, advice):
    hub.refused[where] = status
    text = run("push", folder, "org/mine", code=1).output
    assert advice in text and f"refuses org/mine ({status}: " in text and text.count("\n") == 1
    assert not any(repo["files"] for repo in hub.repos.values())


def test_a_hub_out_of_reach_is_named_without_the_password_of_its_address(folder, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://eve:secret@127.0.0.1:1")
    text = run("push", folder, "org/mine", code=1).output
    assert "http://127.0.0.1:1 cannot be reached" in text and "HF_ENDPOINT" in text
    assert "secret" not in text
