"""Shadows: balanced halves, trained as the client was, composed in its place."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import replace

import pytest
import torch
from app_runs import run
from audited_federation import FREE, OTHERS, config_of, federate, noise
from builders import pico_backbone, random_head, random_like, rng, task_vector
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

from clients.store import maps_home
from fedcompo.audit.evaluation import clients_data
from fedcompo.audit.measure import audit
from fedcompo.audit.membership import confidence
from fedcompo.audit.models import BEFORE, all_images, audited_images, audited_models
from fedcompo.audit.shadows import ClientTraining, check_count, halves, train_shadows
from fedcompo.audit.verdicts import notes
from fedcompo.config.choices import Curvature, Kind
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import client_share
from fedcompo.data.shards import dealt
from fedcompo.engine.run_folder import LOGS
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.registry.registry import Registry
from fedcompo.seeds import generator_for
from fedcompo.training.probing import save_reference

CLIENT = "client-1"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return f"npz:{noise(tmp_path_factory.mktemp('noise') / 'noise.npz', train=5, test=4)}"


def images_of(registry: Registry, client: str = CLIENT):
    config = RunConfig.stored(registry.contribution(client).settings)
    (found,) = clients_data(config.data, registry.backbone.load(), seed=0, wanted=(client,))
    return found


# --- Halves ---


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    count=st.sampled_from([4, 6, 16]),
    seed=st.integers(0, 5),
)
def test_each_image_is_in_half_of_the_shadows_and_each_class_is_halved(sizes, count, seed):
    labels = torch.tensor([label for label, size in enumerate(sizes) for _ in range(size)])
    drawn = halves(labels, count=count, generator=rng(seed))
    assert drawn.sum(0).tolist() == [count // 2] * len(labels)
    for half in drawn:
        for label, size in enumerate(sizes):
            assert abs(2 * int(half[labels == label].sum()) - size) <= 1
    assert torch.equal(drawn, halves(labels, count=count, generator=rng(seed)))


def test_halves_are_drawn_at_random():
    labels = torch.arange(40) % 2
    drawn = halves(labels, count=200, generator=rng(0)).double()[::2]
    together = (drawn.T @ drawn / 100).fill_diagonal_(0.5)
    same_class = labels.unsqueeze(0) == labels.unsqueeze(1)
    # Of 20 images 10 are drawn: two of one class are together with probability 9/19 · 1/2.
    off_diagonal = ~torch.eye(40, dtype=torch.bool)
    assert together[same_class & off_diagonal].mean() == pytest.approx(9 / 38, abs=0.01)
    assert together[~same_class].mean() == pytest.approx(1 / 4, abs=0.01)
    assert together[off_diagonal].min() > 0.05
    assert together[off_diagonal].max() < 0.45


@pytest.mark.parametrize("count", [-2, 0, 2, 5])
def test_a_number_that_gives_no_two_shadows_each_is_refused(count):
    with pytest.raises(ConfigError, match=f"`--shadows` is {count}, expected an even number"):
        check_count(count)


# --- Training ---


def trained_again(registry: Registry, client: str) -> dict[str, torch.Tensor]:
    """The client's task vector, fitted by a shadow's means to the client's own images."""
    training = ClientTraining.of(registry, client, registry.backbone.load())
    generator = generator_for(training.config.seed, "train", client)
    return dict(training.fit(images_of(registry, client).train, generator=generator).tensors)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        FREE,
        OTHERS,
        {**OTHERS, "head_start": "probe"},
        {**FREE, "head_start": "aligned"},
        {**FREE, "head_start": "zero", "fisher_form": "dense"},
        {**OTHERS, "alpha": 0.0, "trust_region": 0.0},
        {**FREE, "fisher_examples": 4, "penalty": "coupled"},
        {**OTHERS, "fisher_form": "dense", "local_steps": 9},
        {**OTHERS, "num_tasks": 4},  # clients of one class
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", Kind)
def test_on_the_clients_own_images_a_shadow_becomes_the_client(settings, kind, data, tmp_path):
    config = config_of(data, **settings, kind=str(kind), local_epochs=2)
    registry = federate(tmp_path / "registry", config)
    expected = registry.contribution(CLIENT).task_vector.tensors
    actual = trained_again(registry, CLIENT)
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},  # today's defaults: zero head, trust region by the others' Fisher, images aside, a vote
        {"anchor": "own"},
        {"head_start": "probe", "wire": "float32", "kind": "lora,full"},
        {"head_start": "probe", "anchor": "own", "wire": "float32", "aside": 0.0},
        {"head_start": "probe", "wire": "int8", "kind": "lora,full", "scale": 2.0},
    ],
    ids=str,
)
def test_so_it_does_after_a_run_of_the_real_server(settings, tmp_path):
    run({}, tmp_path / "out", realign=False, **settings)
    registry = Registry(tmp_path / "out" / "registry")
    training = becomes_the_client(registry, CLIENT)
    assert (training.anchor is not None) is (settings.get("anchor") != "own")


def becomes_the_client(registry: Registry, member: str) -> ClientTraining:
    """Fit a member's task vector again, by a shadow's means, and compare every bit."""
    training = ClientTraining.of(registry, member, registry.backbone.load())
    config, contribution = training.config, registry.contribution(member)
    data = audited_images(contribution, training.backbone, config)
    generator = generator_for(config.seed, "train", member)
    actual = training.fit(data.train, generator=generator).tensors
    expected = contribution.task_vector.tensors
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    return training


def test_a_shard_is_audited_on_its_own_images_by_the_map_if_there_is_one(tmp_path, monkeypatch):
    run({}, tmp_path / "out", realign=False, shards=2)
    registry, shard = Registry(tmp_path / "out" / "registry"), f"{CLIENT}.shard-1"
    becomes_the_client(registry, shard)
    found = audit(registry, shard, shadows=4)
    assert found["images"]["members"] == 10  # of 12 images of two classes half, less one aside each
    others = {"client-0", "client-2"}
    assert found["accuracy"]["per_client"].keys() == {shard, *others}
    assert found["models"]["after"]["rows_of_client"] == found["classes"]  # its sibling has them
    assert any("dealt anew by the seed" in note for note in found["notes"])
    assert not any("dealt anew" in note for note in notes({**found, "dealt_anew": False}))

    contribution, backbone = registry.contribution(shard), registry.backbone.load()
    config = RunConfig.stored(contribution.settings)
    whole = client_share(config.data, partition=1, seed=config.seed)
    file = tmp_path / f"{CLIENT}.shards-2.csv"
    dealt(whole, 2, seed=config.seed, cap=12, needed=1, file=file)
    monkeypatch.setenv(LOGS, str(tmp_path))  # as a simulation does
    home = maps_home("", RunConfig.parse({"output": str(tmp_path / "out")}))
    home.mkdir()
    shutil.copy(file, home)  # where a simulation keeps it, the audit finds it
    assert not audit(registry, shard, shadows=4)["dealt_anew"]
    lines = file.read_text().splitlines()
    other = {"0": "1", "1": "0"}
    file.write_text("\n".join(other.get(line[0], line[0]) + line[1:] for line in lines) + "\n")
    swapped = audited_images(contribution, backbone, config, maps=tmp_path).train.images[:]
    mine = audited_images(contribution, backbone, config).train.images[:]
    sibling = registry.contribution(f"{CLIENT}.shard-0")
    assert not torch.equal(swapped, mine)
    assert swapped.shape == audited_images(sibling, backbone, config).train.images[:].shape


def test_a_reference_anchors_shadows_too(data, tmp_path):
    backbone = pico_backbone()
    sums = random_like(backbone.theta_0, seed=1, positive=True)
    path = tmp_path / "reference.safetensors"
    fisher, base = FisherDiagonal(sums, 10), backbone.fingerprint
    save_reference(path, fisher, base=base, curvature=Curvature.FEATURES)
    config = config_of(data, anchor="reference", reference=str(path), alpha=1.0, local_epochs=2)
    registry = federate(tmp_path / "anchored", config)
    assert registry.member(CLIENT).lineage.anchored_by == ()
    expected = registry.contribution(CLIENT).task_vector.tensors
    for name, tensor in trained_again(registry, CLIENT).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_a_fisher_that_was_not_kept_is_named(data, tmp_path):
    registry = federate(tmp_path / "whole", config_of(data, **OTHERS, local_epochs=1))
    members = [replace(member, fisher=None) for member in registry.pool()]
    bare = Registry.create(tmp_path / "bare", registry.backbone.load())
    bare.add(*members)
    with pytest.raises(ContributionError, match="no Fisher of client-0, by which client-1"):
        ClientTraining.of(bare, CLIENT, bare.backbone.load())


# --- What shadows say ---


@dataclasses.dataclass
class Recorder:
    """Stands in for training: yields known task vectors, and notes on which images."""

    client: str
    backbone: object
    vectors: list
    seen: list

    def fit(self, split, *, generator):
        self.seen.append((split, torch.rand(1, generator=generator).item()))
        return self.vectors[len(self.seen) - 1]


def test_phi_is_the_log_odds_under_the_composition_with_the_shadow_in_the_clients_place(
    data, tmp_path
):
    registry = federate(tmp_path / "registry", config_of(data, local_epochs=1))
    backbone, images = registry.backbone.load(), images_of(registry)
    vectors = [
        task_vector(Kind.LORA, backbone.theta_0, seed=i, base=backbone.fingerprint, scale=0.1)
        for i in range(4)
    ]
    recorder = Recorder(CLIENT, backbone, vectors, [])
    head = random_head((*images.classes, "other"), backbone.num_features, seed=3)
    shadows = train_shadows(registry, recorder, images, head, count=4, seed=0)

    pictures = torch.cat([images.train.images, images.test.images])
    labels = torch.cat([images.train.labels, images.test.labels])
    other = registry.contribution("client-0").task_vector.dense(backbone.theta_0)
    model = backbone.model.double()
    batch = backbone.preprocessing.normalise(pictures).double()
    for index, vector in enumerate(vectors):
        own = vector.dense(backbone.theta_0)
        theta = {  # coefficients 1/2, scale 2
            name: weight.double() + own[name].double() + other[name].double()
            for name, weight in backbone.theta_0.items()
        }
        features = functional_call(model, theta, (batch,))
        p = (features @ head.weight.double().T + head.bias.double()).softmax(1)
        p = p[torch.arange(len(labels)), labels]
        expected = p.log() - (1 - p).log()
        torch.testing.assert_close(shadows.phi[index], expected, rtol=0, atol=1e-4)
        split, _ = recorder.seen[index]
        assert torch.equal(split.images[:], pictures[shadows.trained_on[index]])
        assert torch.equal(split.labels, labels[shadows.trained_on[index]])
    assert len({draw for _, draw in recorder.seen}) == 4


def test_shadows_are_composed_by_the_registrys_rule_and_what_it_needs(data, tmp_path):
    registry = federate(tmp_path / "registry", config_of(data, local_epochs=1, rule="fisher"))
    backbone, images, head = registry.backbone.load(), images_of(registry), registry.joint_head()
    own = registry.contribution(CLIENT).task_vector
    recorder = Recorder(CLIENT, backbone, [own] * 4, [])
    shadows = train_shadows(registry, recorder, images, head, count=4, seed=0)
    # The same task vector in the client's place: the same model.
    model, (pictures, labels) = audited_models(registry, CLIENT)[BEFORE], all_images(images)
    logits = head(model.features(backbone, pictures))
    expected = confidence(logits, head.indices(images.classes)[labels])
    assert all(torch.equal(phi, expected) for phi in shadows.phi)


def test_equal_seeds_give_equal_shadows_and_others_do_not(data, tmp_path):
    registry = federate(tmp_path / "registry", config_of(data, local_epochs=1, kind="lora"))
    training = ClientTraining.of(registry, CLIENT, registry.backbone.load())
    images, head = images_of(registry), registry.joint_head()
    first, again, other = (
        train_shadows(registry, training, images, head, count=4, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.phi, again.phi)
    assert torch.equal(first.trained_on, again.trained_on)
    assert not torch.equal(first.trained_on, other.trained_on)
    assert not torch.equal(first.phi, other.phi)
