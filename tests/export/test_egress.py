"""The egress pack: what it says of a model that leaves, what it keeps back, and who altered it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runs import run
from registry_builders import member, registry_of

from fedcompo.export.egress import MISSING, OF_OTHER, OF_THIS
from fedcompo.method.lineage import Lineage
from fedcompo.registry.registry import Registry
from fedcompo.registry.signing import fingerprint_of
from fedcompo.storage.files import EGRESS

SETTINGS = {
    "data": "folder:/home/alice/wards/ward-7",
    "checkpoint": "/home/alice/weights/secret-name.safetensors",
    "imported-from": "alice-model.safetensors",
    "wire": "bfloat16",
    "fisher-form": "factored",
    "dp-noise": 0.0,
    "min-images": 8,
}
NOISY = {"epsilon": 3.25, "delta": 1e-5, "releases": 2, "accountant": "analytic"}


def audit_of(client: str, root: str, **changes: object) -> dict:
    """As `fedcompo audit` writes it, with what must not leave among it."""
    auc = {"value": 0.71, "low": 0.6, "high": 0.8}
    models = ("before", "after")
    right = {"class_il_accuracy": 0.5, "task_il_accuracy": 0.8125, "num_examples": 16}
    return {
        "format_version": 1,
        "client": client,
        "root": root,
        "data": SETTINGS["data"],
        "images": {"members": 20, "non_members": 16},
        "settings": SETTINGS,
        "accuracy": {"removed": dict.fromkeys(models, right), "per_client": {}},
        "membership": {
            a: {m: {"auc": auc, "tpr": {}, "is_chance": False} for m in models}
            for a in ("loss", "likelihood-ratio")
        },
        "similarity": {"after": 0.9, "where": "/home/alice"},
        **changes,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run's folder: ada with noise, ben of an older version, cho who was removed, and audits."""
    home = tmp_path_factory.mktemp("alice") / "run-of-alice"
    ada = replace(
        member("ada", num_examples=40, lineage=Lineage(anchored_by=("cho",))), settings=SETTINGS
    )
    ben = replace(member("ben", classes=("owl", "yak")), settings={})
    cho = member("cho", classes=("emu", "fox"))
    registry = registry_of(home / "registry", ada, ben, cho)
    before = registry.state.root
    results = {
        **dict.fromkeys(("method", "created", "seconds", "seed", "settings", "backbone")),
        **dict.fromkeys(("phases", "notes", "versions", "platform")),
        "registry": {"path": str(home / "registry"), "root": before, "joined": ["ada"]},
        "per_client": {"ada": {"privacy": NOISY}, "ben": {"privacy": None}},
        "by_class": {"cat": {"images": 9}},
    }
    (home / "results.json").write_text(json.dumps(results))
    registry.remove("cho", requested_by="Dr. C.", reason="withdrawn")
    for name, found in {
        "ada": audit_of("ada", registry.state.root),
        "other": audit_of("ben", before),
        "few": audit_of("ada", registry.state.root, images={"members": 20, "non_members": 7}),
        "cho": audit_of("cho", before),
        "eve": audit_of("eve", before),
    }.items():
        (home / f"audit-{name}").mkdir()
        (home / f"audit-{name}" / "audit.json").write_text(json.dumps(found))
    return home


def export(home: Path, output: Path, *options: object, code: int = 0) -> str:
    command = "export", "--egress", "-r", home / "registry", "-o", output
    return run(*command, *options, code=code).output


@pytest.fixture(scope="module")
def pack(home, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("out") / "pack"
    audits = [("--audit", home / f"audit-{name}") for name in ("ada", "other", "cho")]
    export(home, output, *(word for pair in audits for word in pair), "--licence", "CC BY <4.0>")
    return output


@pytest.fixture(scope="module")
def stated(pack) -> dict:
    return json.loads((pack / EGRESS).read_text())


def test_it_says_what_is_known_and_invents_nothing(stated):
    ada, ben = stated["members"]
    assert ada["noise"]["epsilon"] == 3.25 and ada["images"] == 40
    assert ada["caps"]["min-images"] == 8 and ada["lineage"]["anchored_by"] == ["cho"]
    assert set(ben["caps"].values()) == {None}, "an older member's caps are not recorded"
    assert ben["noise"] == {"epsilon": None, "delta": None, "says": "not recorded"}
    (gone,) = stated["removals"]
    assert (gone["client"], gone["requested_by"]) == ("cho", "Dr. C.")
    assert gone["to_retrain"] == ["ada"]
    assert stated["licences"] == {"code": "apache-2.0", "backbone": None, "data": "CC BY <4.0>"}
    fits = [(one["client"], one["fits"]) for one in stated["audits"]]
    assert fits == [("ada", OF_THIS), ("ben", OF_OTHER), ("cho", "of the model before its removal")]


def test_the_page_shows_names_as_they_are(pack):
    assert "data CC BY &lt;4.0&gt;" in (pack / "egress.html").read_text()


def test_no_path_no_host_no_name_of_a_file_and_no_count_of_few_leaves(pack, home):
    texts = [path.read_bytes() for path in pack.rglob("*") if path.is_file()]
    assert len(texts) == 8
    kept_back = "alice", "secret-name", "ward-7", str(home), str(Path.home()), platform.node()
    for word in (*kept_back, "by_class", "results.json"):
        assert not [text for text in texts if word.encode() in text], word


def test_what_was_measured_on_few_images_is_withheld(home, tmp_path):
    export(home, tmp_path / "pack", "--audit", home / "audit-few" / "audit.json")
    audits = json.loads((tmp_path / "pack" / EGRESS).read_text())["audits"]
    assert audits[0]["figures"] is None
    assert audits[0]["withheld"] == "measured on fewer than 8 images"
    assert [one["fits"] for one in audits] == [OF_THIS, MISSING, MISSING]


def test_an_audit_is_of_this_model_only_where_nothing_else_was_chosen(home, tmp_path):
    audit = "--audit", home / "audit-ada"
    export(home, tmp_path / "some", "--without", "ben", *audit)
    export(home, tmp_path / "scaled", "--scale", "0.5", *audit)
    for name in ("some", "scaled"):
        values = json.loads((tmp_path / name / EGRESS).read_text())
        assert values["composition"]["whole_registry"] is False
        assert values["audits"][0]["fits"] == OF_OTHER
    some = json.loads((tmp_path / "some" / EGRESS).read_text())
    assert some["composition"]["left_out"] == {"ben": []}
    assert [own["client"] for own in some["members"]] == ["ada"]


def hollow(pack: Path) -> None:
    """Take the members out of the statement, and put its new SHA-256 on the page."""
    old, page = (pack / EGRESS).read_bytes(), (pack / "egress.html").read_text()
    new = json.dumps({**json.loads(old), "members": None}).encode()
    (pack / EGRESS).write_bytes(new)
    names = [hashlib.sha256(data).hexdigest() for data in (old, new)]
    (pack / "egress.html").write_text(page.replace(*names))


def alter(pack: Path, name: str) -> None:
    path = pack / name
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))


@pytest.mark.parametrize(
    ("lie", "caught"),
    [
        (lambda pack: alter(pack, "model.safetensors"), "model.safetensors is unaltered"),
        (lambda pack: alter(pack, "receipts/000003-cho.json"), "000003-cho.json is unaltered"),
        (lambda pack: alter(pack, "egress.html"), "egress.html shows what egress.json says"),
        (lambda pack: alter(pack, EGRESS), "egress.html shows what egress.json says"),
        (hollow, "lacks what a page shows"),
        (lambda pack: (pack / "recipe.toml").unlink(), "it is missing"),
        (lambda pack: (pack / "more.txt").write_text("x"), "more.txt belongs to the pack"),
    ],
    ids=["weights", "receipt", "page", "statement", "hollow", "missing", "added"],
)
def test_a_pack_that_was_altered_is_told_from_one_that_was_not(lie, caught, pack, tmp_path):
    copy = Path(shutil.copytree(pack, tmp_path / "pack"))
    run("verify", copy / EGRESS)
    lie(copy)
    assert caught in " ".join(run("verify", copy / EGRESS, code=1).output.split())


def test_its_receipts_are_those_of_the_registry_and_its_model_that_of_a_plain_export(
    pack, home, tmp_path, monkeypatch
):
    key = pack / "receipts/000003-cho.pem"
    assert key.read_bytes() == (home / "registry/public.pem").read_bytes()
    run("verify", pack / "receipts/000003-cho.json")
    monkeypatch.setenv("FEDCOMPO_KNOWN", str(tmp_path / "an-auditor's.json"))
    run("verify", pack / "receipts/000003-cho.json", code=1)
    named = "--public-key", fingerprint_of(key.read_bytes())
    run("verify", pack / "receipts/000003-cho.json", *named)
    run("export", "-r", home / "registry", "-o", tmp_path / "plain")
    for path in (tmp_path / "plain").iterdir():
        assert (pack / path.name).read_bytes() == path.read_bytes()


def test_results_of_a_run_do_not_speak_for_who_came_later(home, tmp_path):
    copy = Path(shutil.copytree(home, tmp_path / "run-of-alice", symlinks=True))
    registry = Registry(copy / "registry")
    again = replace(member("ada", num_examples=40, seed=5), settings={"dp-noise": 0.0})
    again.save(tmp_path / "ada")
    registry.add(tmp_path / "ada", replacing=True)
    export(copy, tmp_path / "pack")
    ada = json.loads((tmp_path / "pack" / EGRESS).read_text())["members"][0]
    assert ada["noise"]["says"] == "no noise: ε is not bounded"


def test_what_cannot_be_stated_is_refused_before_anything_is_written(home, tmp_path):
    copy = Path(shutil.copytree(home, tmp_path / "run-of-alice", symlinks=True))
    output = tmp_path / "pack"
    assert "'eve', who is neither" in export(copy, output, "--audit", copy / "audit-eve", code=2)
    assert "holds no audit" in export(copy, output, "--audit", copy / "results.json", code=1)
    assert "go with `--egress`" in run(
        "export", "-r", copy / "registry", "-o", output, "--licence", "x", code=2
    ).output  # fmt: skip
    odd = audit_of("ada", "", membership={"loss": {"before": {"auc": {"value": "0.5"}}}})
    (copy / "odd.json").write_text(json.dumps(odd))
    assert "holds no audit" in export(copy, output, "--audit", copy / "odd.json", code=1)
    odd["membership"]["loss"]["before"]["auc"]["value"] = float("nan")
    (copy / "odd.json").write_text(json.dumps(odd))
    assert "holds no audit" in export(copy, output, "--audit", copy / "odd.json", code=1)
    alter(copy / "registry", "removals/000003-cho.json")
    assert "receipt of the removal of 'cho' does not hold" in export(copy, output, code=1)
    assert not output.exists()
