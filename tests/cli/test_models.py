"""Commands that make models: what they write is what the library computes, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from builders import contribution, pixels, random_head, random_sums
from cli_runs import CLASSES, digits_registry, run, told
from registry_builders import QUICK, backbone, contents, member, same_bits, scale_by_hand
from torch import Tensor
from torch.func import functional_call

from fedcompo.backbone.adapter import ADAPTER, ADAPTER_CONFIG
from fedcompo.backbone.backbone import load_backbone
from fedcompo.cli.common import VARIABLE
from fedcompo.composition.head import head_of
from fedcompo.config.choices import Kind
from fedcompo.config.run import BackboneConfig, RunConfig
from fedcompo.data.client_data import load_client_data
from fedcompo.export.negation import negated
from fedcompo.export.prediction import model_from
from fedcompo.method.contribution import Contribution
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.registry.registry import Registry
from fedcompo.report.confusion import by_class, interval, worst_line
from fedcompo.report.units import percent, percent_between
from fedcompo.storage.files import MODEL_CARD
from fedcompo.storage.tensorstream import StreamedTensors
from fedcompo.training.accuracy import accuracy_of

IMAGES = pixels(6, 1, 8, seed=5)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_registry(tmp_path_factory.mktemp("digits") / "registry").path


@pytest.fixture
def home(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands are given: a folder with a copy of the registry in it."""
    shutil.copytree(original, tmp_path / "registry", symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path


def logits_of_folder(folder: Path) -> Tensor:
    """What plain timm makes of a folder."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        return model(backbone().preprocessing.normalise(IMAGES))


def logits(theta: Weights, head: Head) -> Tensor:
    """What functional calls give: the backbone under other weights, then a linear layer."""
    with torch.no_grad():
        batch = backbone().preprocessing.normalise(IMAGES)
        features = functional_call(backbone().model, theta, (batch,))
        return F.linear(features, head.weight, head.bias)


def tensors(folder: Path) -> dict[str, Tensor]:
    return dict(StreamedTensors(folder / "model.safetensors"))


# -- compose --------------------------------------------------------------------------------------


def test_the_composition_of_everyone_is_the_registrys_own(home: Path) -> None:
    out = run("compose", "-o", "out").stdout
    assert "Composed of client-0 × 0.3333, client-1 × 0.3333, client-2 × 0.3333; 6 classes." in out
    assert f'timm.create_model("local-dir:{home / "out"}", pretrained=True)' in out
    registry = Registry("registry")
    assert same_bits(tensors(home / "out"), dict(registry.composed()))
    assert torch.equal(
        logits_of_folder(home / "out"), logits(registry.theta_p(), registry.joint_head())
    )
    run("export", "-o", "exported")
    assert contents(home / "exported") == contents(home / "out")


WEIGHTS = {"client-0": 0.7, "client-2": 0.3}
CHOICES: dict[str, Callable[[Pool, Weights], tuple[Pool, Weights]]] = {
    "--only client-0,client-2": lambda pool, theta_0: (
        (some := pool.only("client-0", "client-2")),
        some.compose(theta_0, scale=scale_by_hand(some, theta_0)),
    ),
    "--without client-0": lambda pool, theta_0: (
        (some := pool.without("client-0")),
        some.compose(theta_0, scale=scale_by_hand(some, theta_0)),
    ),
    "--weights client-0=0.7,client-2=0.3": lambda pool, theta_0: (
        (some := pool.only(*WEIGHTS)),
        some.compose(theta_0, WEIGHTS, scale=scale_by_hand(some, theta_0, WEIGHTS)),
    ),
    "--weights client-0=0.7,client-2=0.3 --scale 2": lambda pool, theta_0: (
        (some := pool.only(*WEIGHTS)),
        some.compose(theta_0, WEIGHTS, scale=2),
    ),
}


@pytest.mark.parametrize("options", CHOICES)
def test_a_composition_of_some_is_the_pools(home: Path, options: str) -> None:
    found = told("compose", *options.split(), "-o", "out")
    pool, theta = CHOICES[options](Registry("registry").pool(), backbone().theta_0)
    assert tuple(found["clients"]) == pool.clients
    assert found["output"] == str(home / "out")
    written = tensors(home / "out")
    for name, weight in theta.items():
        torch.testing.assert_close(written[name], weight, rtol=1e-5, atol=1e-6)
        if "--weights" in options:
            assert torch.equal(written[name], weight)
    head = head_of(pool, QUICK)
    own = {name: written[name] for name in theta}
    assert torch.equal(logits_of_folder(home / "out"), logits(own, head))


def test_specialise_is_compose_only(home: Path) -> None:
    run("specialise", "client-0,client-2", "-o", "a")
    run("compose", "--only", "client-0,client-2", "-o", "b")
    assert contents(home / "a") == contents(home / "b")
    weights = ["--weights", "client-0=0.7,client-2=0.3", "--scale", "2", "--rule", "ties"]
    run("specialise", "client-0,client-2", *weights, "-o", "c")
    run("compose", "--only", "client-0,client-2", *weights, "-o", "d")
    assert contents(home / "c") == contents(home / "d")


def test_without_a_client_is_what_its_removal_gives_bit_for_bit(home: Path) -> None:
    run("compose", "--without", "client-1", "-o", "out")
    run("remove", "client-1", "--yes")
    assert same_bits(tensors(home / "out"), tensors(home / "registry" / "model"))
    config = "config.json"
    model = home / "registry" / "model"
    assert (home / "out" / config).read_bytes() == (model / config).read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        ("--weights client-0=x", 2, "is not of the form a=0.7,b=0.3"),
        ("--weights client-0=0.7,client-1=0.7", 2, "sum to 1.4"),
        ("--only client-0,,client-1", 2, "no list of clients"),
        ("--without= ", 2, "no list of clients"),
        ("--scale 0", 2, "positive number"),
        ("--rule tis", 2, "no rule 'tis' in fedcompo "),
        ("--rule dare:drop=1", 2, "`drop` must be in [0, 1)"),
        ("--rule task-arithmetic --scale 1", 2, "says λ itself"),
        ("--rule tsv-m --weights client-0=0.7,client-1=0.3", 1, "no weights in its equation"),
        ("--checkpoint x", 2, "goes with folders"),
        ("folder --registry registry", 2, "not both"),
        ("--weights client-9=1", 1, "no client 'client-9'"),
        ("--only client-0 --weights client-1=1", 1, "expected exactly client-0"),
        ("--without client-0,client-1,client-2", 1, "empty pool"),
        ("nowhere", 1, "nowhere"),
    ],
)
def test_what_cannot_be_composed_is_said_in_a_sentence(
    home: Path, options: str, code: int, reason: str
) -> None:
    before = contents(home)
    assert reason in run("compose", *options.split(" "), "-o", "out", code=code).stderr
    assert contents(home) == before


@pytest.mark.parametrize("command", ["compose", "export", "specialise client-0", "negate client-0"])
def test_what_is_there_is_not_written_over(home: Path, command: str) -> None:
    (home / "out").mkdir()
    (home / "out" / "mine").write_text("mine")
    assert "holds something already" in run(*command.split(), "-o", "out", code=2).stderr
    assert contents(home / "out") == {"mine": b"mine"}
    assert "in the registry" in run(*command.split(), "-o", "registry/out", code=2).stderr
    assert not (home / "registry" / "out").exists()


def test_odd_names_are_printed_as_they_are_and_come_into_the_model(home: Path) -> None:
    registry, names = Registry("registry"), ["[/]", "[bold]7", ":smile:"]
    registry.add(member("odd", Kind.IA3, classes=sorted(names)))
    found = told("compose", "--only", "odd", "-o", "[bold]out")
    assert found["classes"] == sorted(names)
    assert f'"local-dir:{home}/[bold]more"' in run("export", "-o", "[bold]more").stdout
    config = json.loads((home / "[bold]out" / "config.json").read_text())
    assert config["label_names"] == sorted(names)


# -- folders, without a registry ------------------------------------------------------------------


def test_folders_compose_without_registry_or_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    embedded = load_backbone(BackboneConfig())
    width = embedded.num_features
    for i, client in enumerate(("ada", "ben")):
        made = contribution(
            client,
            Kind.IA3,
            theta_0=embedded.theta_0,
            base=embedded.fingerprint,
            seed=i,
            classes=(f"{client}-1", f"{client}-2"),
            scale=0.01,
        )
        replace(
            made,
            head=random_head(made.head.classes, width, seed=i),
            statistics=random_sums(made.head.classes, width, seed=i),
            settings=RunConfig().of_client(),
        ).save(tmp_path / f"from-{client}")
    found = told("compose", "from-ben", "from-ada", "-o", "out")
    assert found["clients"] == ["ada", "ben"]
    assert found["classes"] == ["ada-1", "ada-2", "ben-1", "ben-2"]
    pool = Pool(tuple(Contribution.open(tmp_path / f"from-{c}") for c in found["clients"]))
    written = tensors(tmp_path / "out")
    scale = scale_by_hand(pool, embedded.theta_0)
    assert found["scale"] == pytest.approx(scale, rel=1e-9)
    for name, weight in pool.compose(embedded.theta_0, scale=scale).items():
        torch.testing.assert_close(written[name], weight, rtol=1e-5, atol=1e-6)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert same_bits(model.state_dict(), written)
    run("compose", "from-ada", "from-ben", "--weights", "ada=0.25,ben=0.75", "-o", "weighted")
    weights = {"ada": 0.25, "ben": 0.75}
    scale = scale_by_hand(pool, embedded.theta_0, weights)
    expected = pool.compose(embedded.theta_0, weights, scale=scale)
    written = tensors(tmp_path / "weighted")
    assert same_bits({name: written[name] for name in expected}, expected)


# -- evaluate -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    ["", "--without client-1", "--weights client-0=0.7,client-2=0.3 --scale 2", "--rule ties"],
)
def test_accuracies_are_the_librarys(home: Path, options: str) -> None:
    found = told("evaluate", *options.split())
    run("compose", *options.split(), "-o", "out")
    written = tensors(home / "out")
    theta = {name: written[name] for name in backbone().theta_0}
    classes = tuple(json.loads((home / "out" / "config.json").read_text())["label_names"])
    head = Head(classes, written["head.weight"], written["head.bias"])
    expected, tallies = {}, {}
    for partition, name in enumerate(CLASSES):
        if name in found["clients"]:
            seen = backbone().preprocessing
            own = load_client_data(RunConfig().data, seen, partition=partition, seed=0)
            accuracy = accuracy_of(backbone(), theta, head, own.classes, own.test)
            tallies[name] = accuracy.tally
            expected[name] = {
                "class_il_accuracy": accuracy.class_il,
                "interval": interval(accuracy.class_il, len(own.test.labels)),
                "task_il_accuracy": accuracy.task_il,
                "num_examples": len(own.test.labels),
            }
    assert found["accuracy"] == expected
    counted = by_class(tallies, classes)
    assert {key: found[key] for key in counted} == json.loads(json.dumps(counted))
    assert len(expected) == len(found["clients"]) >= 2
    out = run("evaluate", *options.split()).stdout
    others = [f"client-{i}" for i in range(RunConfig().data.num_tasks)]
    others = [name for name in others if name not in expected]
    assert found["not_measured"] == others
    assert f"does not know their classes: {', '.join(others)}." in " ".join(out.split())
    for name, figures in expected.items():
        (line,) = (line for line in out.splitlines() if line.startswith(f"│ {name} "))
        cells = [cell.strip() for cell in line.split("│")]
        assert cells[2:5] == [
            str(figures["num_examples"]),
            percent_between(figures["class_il_accuracy"], figures["interval"], 1),
            percent(figures["task_il_accuracy"]),
        ]
    assert (worst_line(found) or "No image is mistaken") in out


def test_data_of_somebody_else_are_no_basis(home: Path) -> None:
    assert "/nowhere" in run("evaluate", "--data", "folder:/nowhere", code=1).stderr
    assert "Did you mean 'digits'" in run("evaluate", "--data", "digist", code=1).stderr


# -- negate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [None, "0.5"])
def test_a_negated_copy_subtracts_the_task_vector_and_says_so(
    home: Path, strength: str | None
) -> None:
    before = contents(home / "registry")
    options = ["--strength", strength] if strength else []
    assert (
        "A negated copy: client-1 was subtracted."
        in run("negate", "client-1", *options, "-o", "out").stdout
    )
    assert contents(home / "registry") == before
    run("compose", "--without", "client-1", "-o", "without")
    vector = Registry("registry").contribution("client-1").task_vector
    absent, written = tensors(home / "without"), tensors(home / "out")
    scale = float(strength or 1)
    expected = absent | dict(
        negated(
            {n: absent[n] for n in vector.names}.items(), vector, backbone().theta_0, scale=scale
        )
    )
    assert same_bits(written, expected)
    assert not torch.equal(written[vector.names[0]], absent[vector.names[0]])
    card = (home / "out" / MODEL_CARD).read_text()
    assert "A negated copy: do not deploy it." in card
    assert f"{scale:g} times the task vector τ₋" in card
    assert told("negate", "client-1", "-o", "more")["negated"] == "client-1"


def test_a_negation_needs_a_positive_strength(home: Path) -> None:
    for strength in ("0", "-1", "nan", "inf"):
        error = run("negate", "client-1", f"--strength={strength}", "-o", "out", code=2).stderr
        assert "strength of a negation must be a positive number" in error
    assert not (home / "out").exists()


# -- export ---------------------------------------------------------------------------------------


def test_a_lora_client_becomes_an_adapter(home: Path) -> None:
    out = run("export", "--client", "client-1", "-o", "peft").stdout
    assert out == (
        "Composed of client-1 × 1; 2 classes.\nλ = 1.\n"
        f"LoRA adapter for PEFT, of rank 2 to 6: {home / 'peft'}\n"
        "It is the composed change, to float32's rounding.\n"
    )
    assert sorted(p.name for p in (home / "peft").iterdir()) == sorted(
        [ADAPTER, ADAPTER_CONFIG, MODEL_CARD]
    )
    found = told("export", "--client", "client-1", "-o", "again")
    expected = {"output": str(home / "again"), "client": "client-1", "format": "peft"}
    assert found == found | expected | {"clients": ["client-1"], "scale": 1.0, "error": 0.0}
    assert contents(home / "again") == contents(home / "peft")


@pytest.mark.parametrize(("client", "kind"), [("client-0", "full"), ("client-2", "ia3")])
def test_other_kinds_have_no_adapter(home: Path, client: str, kind: str) -> None:
    error = run("export", "--client", client, "-o", "peft", code=1).stderr
    assert f"'{client}' is of kind {kind}" in error
    assert [path.name for path in home.iterdir()] == ["registry"]


# -- by a recipe ----------------------------------------------------------------------------------


def test_a_recipe_composes_what_options_did_and_what_options_cannot(home: Path) -> None:
    options = ["--weights", "client-0=0.7,client-2=0.3", "--scale", "2", "--rule", "ties"]
    run("compose", *options, "-o", "a")
    found = told("compose", "--recipe", "a/recipe.toml", "-r", "registry", "-o", "b")
    assert (found["scale"], found["coefficients"]) == (2.0, WEIGHTS)
    parts = [{**contents(home / name), MODEL_CARD: b""} for name in "ab"]
    assert parts[0] == parts[1]
    assert "Only client-0, client-2." in (home / "b" / MODEL_CARD).read_text()
    Path("own.toml").write_text('dtype = "bfloat16"\nnormalise = false\n[weights]\nclient-0 = -1\n')
    run("compose", "--recipe", "own.toml", "-o", "c")
    model = model_from(home / "c")
    assert tensors(home / "c")["head.weight"].dtype == torch.bfloat16
    assert torch.equal(model.head.weight, tensors(home / "c")["head.weight"].float())
    run("negate", "client-1", "--strength", "0.5", "-o", "d")
    run("compose", "--recipe", "d/recipe.toml", "-o", "e")
    assert same_bits(tensors(home / "d"), tensors(home / "e"))
    assert "do not deploy" in (home / "e" / MODEL_CARD).read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--scale 1 --rule ties", "leave out `--scale`, `--rule`, or write it into own.toml"),
        ("--only client-0", "leave out `--only`"),
        ("", "`membres` is no setting. Did you mean `members`?"),
    ],
)
def test_options_beside_a_recipe_and_misspelt_keys_are_refused(
    home: Path, options: str, reason: str
) -> None:
    Path("own.toml").write_text("membres = ['client-0']")
    before = contents(home)
    given = ["compose", "--recipe", "own.toml", *options.split(), "-o", "out"]
    assert reason in run(*given, code=2).stderr
    assert contents(home) == before
