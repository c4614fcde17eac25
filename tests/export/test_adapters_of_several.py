"""One adapter of several clients: its product is the composed change, or the nearest of a rank."""

from __future__ import annotations

import shutil
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from builders import dense_by_hand, normal, pixels, random_deltas
from cli_runs import run, told
from registry_builders import backbone, contents, member, registry_of, scale_by_hand, tangents
from timm_folders import logits_as_printed
from torch import Tensor

from fedcompo.backbone.adapter import ADAPTER, PREFIX
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Coefficients, Kind
from fedcompo.errors import ContributionError
from fedcompo.export.low_rank import cut, joined
from fedcompo.export.peft import export_peft
from fedcompo.export.selected import Selection
from fedcompo.export.selection import from_registry
from fedcompo.method.contribution import Contribution
from fedcompo.method.deltas import Weights
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import BACKBONE, MODEL_CARD
from fedcompo.storage.tensorstream import StreamedTensors

IMAGES = pixels(5, 1, 8, seed=5)
BY_EXAMPLES = CompositionSettings(coefficients=Coefficients.EXAMPLES)


def of_rank(client: str, rank: int, **given: Any) -> Contribution:
    """A LoRA client; its factors have this rank, three times that at qkv."""
    deltas = random_deltas(
        Kind.LORA, backbone().theta_0, seed=zlib.crc32(client.encode()) % 1000, rank=rank
    )
    vector = TaskVector.of(Kind.LORA, deltas, base=backbone().fingerprint)
    return replace(member(client, **given), task_vector=vector)


def loras() -> list[Contribution]:
    """Three of unlike ranks and numbers of examples."""
    return [
        of_rank("ada", 1, classes=("cat", "dog"), num_examples=10),
        of_rank("ben", 1, classes=("dog", "owl"), num_examples=25),
        of_rank("cho", 2, classes=("yak",), num_examples=40),
    ]


@pytest.fixture(scope="module", params=[CompositionSettings(), BY_EXAMPLES], ids=["equal", "many"])
def registry(request, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    path = tmp_path_factory.mktemp("loras") / "registry"
    return registry_of(path, *loras(), settings=request.param)


def product(folder: Path, name: str) -> Tensor:
    """BA of one weight, from the file alone, in float64."""
    tensors = StreamedTensors(folder / ADAPTER)
    layer = PREFIX + name.removesuffix(".weight")
    a, b = (tensors[f"{layer}.lora_{factor}.weight"].double() for factor in "AB")
    return b @ a


def change_by_hand(selection: Selection, times: dict[str, float], scale: float | None) -> Weights:
    """λ Σ w τ, dense, in float64."""
    pool, theta_0 = selection.pool, backbone().theta_0
    scale = scale_by_hand(pool, theta_0, times) if scale is None else scale
    shares = {client: count / sum(times.values()) for client, count in times.items()}
    dense = {c.client: dense_by_hand(c.task_vector, theta_0) for c in pool}
    return {
        name: scale * sum(shares[client] * own[name] for client, own in dense.items())
        for name in theta_0
    }


@pytest.mark.parametrize(
    ("choice", "clients"),
    [
        ({}, ("ada", "ben", "cho")),
        ({"only": ("ada", "cho"), "scale": 1.5}, ("ada", "cho")),
        ({"without": ("ada",)}, ("ben", "cho")),
        ({"weights": {"ada": 0.7, "ben": 0.3}}, ("ada", "ben")),
        ({"weights": {"ada": 0.7, "ben": 0.3}, "scale": 2.0}, ("ada", "ben")),
    ],
    ids=lambda given: ",".join(given),
)
def test_the_product_is_the_composed_change(registry, choice, clients, tmp_path):
    selection = from_registry(registry, **choice)
    written = export_peft(tmp_path, selection)
    by_examples = registry.settings.coefficients is Coefficients.EXAMPLES
    times = {c: registry.member(c).num_examples if by_examples else 1 for c in clients}
    expected = change_by_hand(selection, choice.get("weights", times), choice.get("scale"))
    composed = dict(selection.stream())
    for name, change in expected.items():
        found = product(tmp_path, name)
        torch.testing.assert_close(found, change, rtol=0, atol=3e-7 * float(change.abs().max()))
        theta = backbone().theta_0[name].double() + found
        torch.testing.assert_close(theta, composed[name].double(), rtol=1e-6, atol=1e-6)
    assert written["error"] == written["worst"]["error"] == 0
    assert written["clients"] == list(clients)


def adapted_logits(folder: Path, classes: int, images: Tensor = IMAGES) -> Tensor:
    """What PEFT makes of the plain timm model with the backbone's weights."""
    peft = pytest.importorskip("peft", reason="`pip install .[dev]` brings PEFT")
    model = timm.create_model(
        backbone().architecture, num_classes=classes, **backbone().model_args
    ).eval()
    model.load_state_dict(backbone().model.state_dict(), strict=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # PEFT warns of keys that are missing or unknown
        adapted = peft.PeftModel.from_pretrained(model, folder).eval()
        return adapted(backbone().preprocessing.normalise(images))


def logits_of(registry: Registry) -> Tensor:
    with torch.no_grad():
        return registry.model()(backbone().preprocessing.normalise(IMAGES))


def test_peft_gives_the_logits_of_the_registrys_model(registry, tmp_path):
    out = run("export", "--adapter", "-r", registry.path, "-o", tmp_path / "out").stdout
    assert "for PEFT, of rank 4 to 8" in out  # 12 at qkv, but no weight has more than 8 columns
    assert "It is the composed change, to float32's rounding." in out
    found, expected = adapted_logits(tmp_path / "out", 4), logits_of(registry)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    again = told("export", "--adapter", "--rank", "4", "-r", registry.path, "-o", tmp_path / "b")
    assert contents(tmp_path / "b") == contents(tmp_path / "out"), "the sum of ranks is enough"
    assert again["ranks"]["blocks.0.mlp.fc1.weight"] == 4


def test_an_adapter_says_what_it_is_made_of_and_its_code_runs(registry, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="`pip install .[dev]` brings PEFT")
    chosen = "--adapter", "--without", "ada", "--rank", "1", "-r", registry.path
    written = told("export", *chosen, "-o", tmp_path / "out")
    card = (tmp_path / "out" / MODEL_CARD).read_text(encoding="utf-8")
    assert "# A LoRA adapter composed of 2 clients" in card
    assert "The adapter is LoRA of rank 1 to 3, cut to this rank" in card
    assert f"{written['error']:.3g} in all and at most {written['worst']['error']:.3g}" in card
    assert f"Without ada. λ = {written['scale']:g}." in card
    for client, share in written["coefficients"].items():
        assert f"| {client} | lora | {share:.6g} |" in card
    assert written["sha256"] in card
    shutil.copy(registry.path / BACKBONE, tmp_path / "out")
    logits, images = logits_as_printed(tmp_path / "out", backbone().preprocessing, monkeypatch)
    assert torch.equal(logits, adapted_logits(tmp_path / "out", 3, images))


def unlike_kinds() -> list[Contribution]:
    return [of_rank("ada", 1), member("ben", Kind.FULL, seed=2), member("cho", Kind.IA3, seed=3)]


@pytest.mark.parametrize("make", [loras, unlike_kinds])
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_a_smaller_rank_is_the_nearest_one_and_the_error_is_told(make, rank, tmp_path):
    selection = from_registry(registry_of(tmp_path / "registry", *make()))
    written = export_peft(tmp_path / "out", selection, rank=rank)
    changes = change_by_hand(selection, dict.fromkeys(selection.pool.clients, 1), None)
    lost = squares = worst = 0.0
    for name, change in changes.items():
        kept = 3 * rank if "qkv" in name else rank
        tail = torch.linalg.svdvals(change)[kept:].norm()
        found = product(tmp_path / "out", name)
        floor = 1e-6 * change.norm()
        assert written["ranks"][name] <= min(kept, *change.shape)
        torch.testing.assert_close((found - change).norm(), tail, rtol=1e-5, atol=float(floor))
        worst = max(worst, float(tail / change.norm()))
        lost, squares = lost + float(tail**2), squares + float(change.norm() ** 2)
    assert written["error"] == pytest.approx((lost / squares) ** 0.5, rel=1e-5, abs=1e-9)
    assert written["worst"]["error"] == pytest.approx(worst, rel=1e-5, abs=1e-9)
    assert (written["error"] == 0) == (rank == 8)


@pytest.mark.parametrize(("rule", "is_sum"), [("task-arithmetic", True), ("ties", False)])
def test_an_adapter_of_a_rule_is_cut_of_its_change(registry, rule, is_sum, tmp_path):
    selection = from_registry(registry, rule=rule)
    if not is_sum:
        with pytest.raises(ContributionError, match=r"The rule ties.* makes no sum.*`--rank`"):
            export_peft(tmp_path / "out", selection)
    written = export_peft(tmp_path / "out", selection, rank=None if is_sum else 8)
    for name, theta in selection.stream():
        found = backbone().theta_0[name].double() + product(tmp_path / "out", name)
        torch.testing.assert_close(found, theta.double(), rtol=1e-6, atol=1e-6)
    assert written["error"] == 0


def test_kinds_without_factors_need_a_rank_and_tangents_have_none(tmp_path):
    registry_of(tmp_path / "r", *unlike_kinds())
    error = run("export", "--adapter", "-r", tmp_path / "r", "-o", tmp_path / "o", code=1).stderr
    assert "'ben' is of kind full" in error
    assert "`--rank`" in error
    registry_of(tmp_path / "t", *tangents())
    given = "--adapter", "--rank", "2", "-r", tmp_path / "t"
    error = run("export", *given, "-o", tmp_path / "o", code=1).stderr
    assert "'ada' is of kind tangent: its model is linearised" in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--client ada --only ada", "`--client` takes one client"),
        ("--rank 3", "`--rank` goes with"),
        ("--adapter --rank 0", "0 is not in the range"),
    ],
)
def test_options_that_do_not_go_together_are_refused(registry, options, reason, tmp_path):
    given = *options.split(), "-r", registry.path, "-o", tmp_path / "out"
    assert reason in run("export", *given, code=2).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
@pytest.mark.parametrize("ranks", [(2, 1), (4, 3, 5)])
def test_factors_cut_are_the_dense_change_cut(shape, ranks):
    out, width = shape
    terms = [
        (0.5 + i, normal(out, r, seed=i), normal(r, width, seed=10 + i))
        for i, r in enumerate(ranks)
    ]
    change = sum(k * b @ a for k, b, a in terms)
    for rank in range(1, 6):
        made, dense = joined(terms, rank), cut(change, rank)
        torch.testing.assert_close(made.b @ made.a, dense.b @ dense.a)
        assert made.squared_norm == pytest.approx(float(change.square().sum()))
        assert made.squared_error == pytest.approx(dense.squared_error, abs=1e-9)
        if rank < sum(ranks):  # both factors are of one size
            torch.testing.assert_close(made.b.norm(dim=0), made.a.norm(dim=1))
    assert torch.equal(made.a, torch.cat([a for _, _, a in terms])) == (sum(ranks) <= 5)
