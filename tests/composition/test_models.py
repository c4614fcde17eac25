"""Models of some members: streamed to a folder, or in memory, of whatever coefficients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from builders import normal, pico_backbone, random_head
from registry_builders import (
    QUICK,
    WIDTH,
    backbone,
    contents,
    exact_term,
    one_of_each_kind,
    registry_of,
    same_bits,
    three_clients,
)

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.composition.head import head_of
from fedcompo.composition.models import model_of, stream_composition
from fedcompo.composition.timm_folder import timm_config, write_model
from fedcompo.config.choices import Coefficients
from fedcompo.errors import BackboneMismatch, ContributionError
from fedcompo.method.pool import Pool
from fedcompo.storage.files import WEIGHTS
from fedcompo.storage.tensorstream import StreamedTensors

MEMBERS = one_of_each_kind()
POOL = Pool(tuple(MEMBERS))
MEAN = replace(QUICK, scale=1.0)
BY_EXAMPLES = replace(QUICK, coefficients=Coefficients.EXAMPLES, scale=0.5)


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


@pytest.fixture
def stored(registry):
    return registry.backbone


@pytest.mark.parametrize("settings", [MEAN, BY_EXAMPLES], ids=["uniform", "by examples"])
def test_the_registrys_own_coefficients_are_summed_on_its_grid(settings, stored):
    composed = dict(stream_composition(POOL, stored, None, settings))
    assert list(composed) == sorted(backbone().theta_0)
    times = [m.num_examples if settings is BY_EXAMPLES else 1 for m in MEMBERS]
    for name in ("blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.weight"):
        weight = backbone().theta_0[name]
        terms = [torch.tensor(exact_term(m.task_vector, name, weight)) for m in MEMBERS]
        total = sum(n * term for n, term in zip(times, terms, strict=True))
        factor = settings.scale / sum(times)
        exact = weight.double() + factor * total.double() / 2**40
        torch.testing.assert_close(composed[name], exact.float(), rtol=2e-7, atol=0)


def test_other_coefficients_are_those_of_the_pool(stored):
    coefficients = {"ada": 0.5, "ben": 0.2, "cho": 0.3}
    composed = dict(stream_composition(POOL, stored, coefficients, BY_EXAMPLES))
    expected = POOL.compose(backbone().theta_0, coefficients, scale=0.5)
    assert same_bits(composed, expected)


def test_the_contributions_stay_as_they_are(stored):
    members = [
        replace(m, task_vector=replace(m.task_vector, tensors={
            name: tensor.double() for name, tensor in m.task_vector.tensors.items()
        }))
        for m in MEMBERS
    ]  # fmt: skip
    before = [{n: t.clone() for n, t in m.task_vector.tensors.items()} for m in members]
    dict(stream_composition(Pool(tuple(members)), stored, None, QUICK))
    for member, tensors in zip(members, before, strict=True):
        assert same_bits(dict(member.task_vector.tensors), tensors)


def test_only_pools_that_fit_can_be_composed(stored):
    with pytest.raises(ContributionError, match="empty pool"):
        next(stream_composition(Pool(), stored, None, QUICK))
    with pytest.raises(ContributionError, match="expected exactly ada, ben, cho"):
        next(stream_composition(POOL, stored, {"ada": 1.0}, QUICK))
    stored.fingerprint = "pico@other"
    with pytest.raises(BackboneMismatch, match="pico@other"):
        next(stream_composition(POOL, stored, None, QUICK))


def test_the_head_of_some_is_the_joint_head_of_a_registry_of_them(tmp_path, registry):
    few = registry_of(tmp_path / "few", *MEMBERS[:2])
    head = head_of(registry.pool().without("cho"), registry.settings)
    assert head.classes == few.classes
    assert torch.equal(head.weight, few.joint_head().weight)


def test_timm_reads_the_preprocessing_of_a_written_model():
    seen = Preprocessing((8, 6), 3, (0.1,) * 3, (0.2,) * 3, "bilinear", 0.9, crop_mode="squash")
    config = timm_config(replace(pico_backbone(), preprocessing=seen), ("cat",))["pretrained_cfg"]
    assert Preprocessing.of_timm(config, {}, seen.modality) == seen


def test_a_written_model_is_one_that_plain_timm_loads(tmp_path, stored):
    head = random_head(("x", "y", "z"), WIDTH, seed=1)
    changed = dict(stream_composition(POOL, stored, None, QUICK))
    write_model(tmp_path, stored, changed.items(), head)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    weights = backbone().model.state_dict() | changed
    weights |= {"head.weight": head.weight, "head.bias": head.bias}
    assert same_bits(model.state_dict(), weights)
    images = normal(2, 1, 8, 8, seed=0, dtype=torch.float32)
    ready = model_of(stored, StreamedTensors(tmp_path / WEIGHTS), head.classes)
    assert torch.equal(ready(images), model(images))


def test_weights_out_of_order_or_of_another_model_are_not_lost(tmp_path, stored):
    changed = dict(stream_composition(POOL, stored, None, QUICK))
    head = random_head(("x",), WIDTH, seed=1)
    for number, weights in enumerate((reversed(changed.items()), [("x", torch.zeros(1))])):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(ValueError, match="out of order"):
            write_model(tmp_path / str(number), stored, weights, head)


def test_what_is_not_finite_is_not_written(tmp_path, stored):
    head = random_head(("cat",), WIDTH, seed=1)
    weight = sorted(stored.target_weights)[0]
    for i, changed in enumerate(([], [(weight, stored.tensors[weight] * float("inf"))])):
        (folder := tmp_path / str(i)).mkdir()
        own = head if changed else replace(head, bias=torch.tensor([float("nan")]))
        with pytest.raises(ContributionError, match=rf"composed .*{weight if changed else 'bias'}"):
            write_model(folder, stored, changed, own)


def test_selecting_changes_nothing_on_disk(registry):
    before = contents(registry.path)
    registry.model(only=["ada", "cho"])
    registry.model(without=["ada"])
    registry.pool(with_fisher=True).compose(backbone().theta_0)
    assert contents(registry.path) == before
