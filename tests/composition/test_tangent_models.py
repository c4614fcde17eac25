"""What is composed of tangents: kept apart from other kinds, removed exactly, never bent."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import registry_builders
import timm
import torch
from builders import MIXABLE, contribution, dense_by_hand, pico_weights, pixels
from cli_runs import CLASSES, run, told
from registry_builders import (
    QUICK,
    backbone,
    composition,
    contents,
    member,
    one_of_each_kind,
    own_statistics,
    same_bits,
    tangents,
)
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedcompo.audit.evaluation import clients_data, effect_of_removal, evaluate_clients
from fedcompo.audit.membership import confidence
from fedcompo.audit.models import AFTER, BEFORE, all_images, audited_models
from fedcompo.audit.shadows import ClientTraining, train_shadows
from fedcompo.composition.head import head_of
from fedcompo.composition.models import load_tangent_model
from fedcompo.config.choices import Kind
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import Split
from fedcompo.errors import ContributionError, FileFormatError
from fedcompo.export.folder import publish
from fedcompo.export.selection import from_registry
from fedcompo.method.contribution import Contribution
from fedcompo.method.heads import Head
from fedcompo.method.pool import Pool
from fedcompo.registry.registry import Registry
from fedcompo.seeds import generator_for
from fedcompo.storage.files import MODEL_CARD, RECIPE
from fedcompo.training.accuracy import accuracy_of

registry_of = functools.partial(registry_builders.registry_of, settings=replace(QUICK, scale=1.0))
"""A registry that composes the mean of task vectors."""
IMAGES = backbone().preprocessing.normalise(pixels(4, 1, 8, seed=2))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return registry_of(tmp_path / "registry", *tangents())


def averaged(members: Sequence[Contribution]) -> dict[str, Tensor]:
    """The mean of task vectors, in float64."""
    dense = [dense_by_hand(m.task_vector, backbone().theta_0) for m in members]
    return {name: sum(d[name] for d in dense) / len(dense) for name in dense[0]}


def logits_by_hand(tau: dict[str, Tensor], head: Head, images: Tensor = IMAGES) -> Tensor:
    """Oracle in float64: the head on f0 + J tau, one client's or a composition's."""
    model = backbone().model
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    theta_0 = {name: weights[name] for name in tau}

    def features(theta: dict[str, Tensor]) -> Tensor:
        return functional_call(model, {**weights, **theta}, (images.double(),))

    with sdpa_kernel(SDPBackend.MATH):
        value, change = jvp(features, (theta_0,), (tau,))
    return (value + change) @ head.weight.double().T + head.bias.double()


def assert_logits(model: torch.nn.Module, expected: Tensor) -> None:
    actual, expected = model(IMAGES).double().detach(), expected.detach()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# -- the registry ---------------------------------------------------------------------------------


def test_the_ready_model_is_linearised_at_the_mean_of_the_task_vectors(registry):
    head = registry.joint_head()
    expected = logits_by_hand(averaged(tangents()), head)
    assert_logits(registry.model(), expected)
    bent = functional_call(backbone().model, registry.theta_p(), (IMAGES,))
    assert (head(bent) - expected).abs().max() > 0.1 * expected.abs().max()


def test_logits_of_the_composition_are_the_clients_own_averaged(registry):
    head = registry.joint_head()
    own = [logits_by_hand(averaged([m]), head) for m in tangents()]
    assert_logits(registry.model(), sum(own) / 3)


@pytest.mark.parametrize("options", [{"only": ["ada", "cho"]}, {"without": ["ben"]}], ids=str)
def test_a_specialised_model_is_linearised_too(registry, tmp_path, options):
    ada, _, cho = tangents()
    model = registry.model(**options)
    assert_logits(
        model, logits_by_hand(averaged([ada, cho]), head_of(Pool((ada, cho)), registry.settings))
    )
    few = registry_of(tmp_path / "few", ada, cho)
    assert same_bits(model.state_dict(), few.model().state_dict())
    assert torch.equal(model(IMAGES), few.model()(IMAGES))


def test_removing_a_client_equals_never_adding_it(registry, tmp_path):
    record = registry.remove("ben")
    ada, _, cho = tangents()
    never = registry_of(tmp_path / "never", cho, ada)
    assert record.root_after == registry.state.root == never.state.root
    assert composition(registry) == composition(never)
    assert torch.equal(registry.model()(IMAGES), never.model()(IMAGES))


def test_the_ready_model_can_be_asked_what_timm_asks_and_be_saved(registry):
    model = registry.model()
    assert not model.training
    assert model.pretrained_cfg["label_names"] == list(registry.classes)
    seen = timm.data.resolve_model_data_config(model)
    assert seen["input_size"] == (1, 8, 8)
    other = registry.model()
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IMAGES), model(IMAGES))
    double = model.double()(IMAGES.double())
    assert double.dtype == torch.float64
    assert_logits(registry.model(), double)


@pytest.mark.parametrize(
    ("members", "linearised"), [(tangents(), True), (one_of_each_kind(), False), ([], False)]
)
def test_pool_and_registry_know_whether_they_are_linearised(members, linearised, tmp_path):
    assert Pool(tuple(members)).linearised is linearised
    registry = registry_of(tmp_path / "r", *members)
    assert registry.linearised is linearised
    assert Registry(registry.path).linearised is linearised


# -- kinds that do not mix ------------------------------------------------------------------------


def refused(registry: Registry, *sources: Contribution | Path, replacing: bool = False) -> str:
    before, root = contents(registry.path), registry.state.root
    with pytest.raises(ContributionError) as caught:
        registry.add(*sources, replacing=replacing)
    assert contents(registry.path) == before
    assert registry.state.root == root
    return str(caught.value)


@pytest.mark.parametrize("kind", MIXABLE)
def test_a_tangent_and_another_kind_never_meet_in_a_registry(kind, tmp_path):
    tangent, other = member("dee", Kind.TANGENT, seed=7), member("eva", kind, seed=8)
    for first, second in ((tangent, other), (other, tangent)):
        registry = registry_of(tmp_path / first.client, first)
        message = refused(registry, second)
        assert f"Client 'dee' is of kind tangent, client 'eva' of kind {kind}" in message
        assert "registries of their own" in message
        second.save(tmp_path / "inbox" / second.client)
        assert refused(registry, tmp_path / "inbox" / second.client) == message
        assert refused(registry, replace(second, client="flo"), second)


def test_newcomers_of_both_sorts_are_refused_together(tmp_path):
    registry = registry_of(tmp_path / "r")
    assert "dee" in refused(registry, member("dee", Kind.TANGENT), member("eva", Kind.LORA, seed=1))


def test_replacing_one_of_two_is_refused_and_replacing_both_is_not(tmp_path):
    registry = registry_of(tmp_path / "r", *one_of_each_kind()[:2])
    ada, ben, _ = tangents()
    assert "'ada' is of kind tangent" in refused(registry, ada, replacing=True)
    registry.add(ada, ben, replacing=True)
    assert registry.linearised
    assert registry.state.root == registry_of(tmp_path / "new", ada, ben).state.root


def test_a_mixed_pool_is_held_but_not_composed():
    theta_0 = pico_weights(dtype=torch.float32)
    tangent = contribution("t", Kind.TANGENT, theta_0=theta_0, seed=1)
    others = [contribution(str(kind), kind, theta_0=theta_0, seed=2) for kind in MIXABLE]
    pool = Pool((tangent, *others))
    assert not pool.linearised
    for compose in (pool.compose, lambda weights: dict(pool.stream(weights))):
        with pytest.raises(ContributionError, match="Client 't' is of kind tangent, client 'full'"):
            compose(theta_0)
    assert pool.only("t").linearised
    alone = pool.only("t").compose(theta_0)
    for name, change in dense_by_hand(tangent.task_vector, theta_0).items():
        torch.testing.assert_close(alone[name].double(), theta_0[name] + change)
    assert same_bits(pool.without("t").compose(theta_0), Pool(tuple(others)).compose(theta_0))


def test_folders_that_do_not_mix_are_not_composed(tmp_path):
    for given in (member("dee", Kind.TANGENT), member("eva", Kind.LORA, seed=1)):
        given.save(tmp_path / given.client)
    result = run("compose", tmp_path / "dee", tmp_path / "eva", "-o", tmp_path / "out", code=1)
    assert "'dee' is of kind tangent, client 'eva' of kind lora" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


# -- accuracy -------------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path: Path) -> Registry:
    return registry_of(
        tmp_path / "digits",
        *(
            member(client, Kind.TANGENT, seed=seed, classes=classes)
            for seed, (client, classes) in enumerate(CLASSES.items())
        ),
    )


def shares(members: Sequence[Contribution], head: Head, client: str) -> tuple[float, float]:
    """Oracle of class-IL and task-IL accuracy, from logits in float64."""
    (data,) = clients_data(RunConfig().data, backbone(), seed=0, wanted=(client,))
    images = backbone().preprocessing.normalise(data.test.images)
    logits = logits_by_hand(averaged(members), head, images)
    own = head.indices(data.classes)
    return (
        float((logits.argmax(1) == own[data.test.labels]).double().mean()),
        float((logits[:, own].argmax(1) == data.test.labels).double().mean()),
    )


def test_a_removals_effect_on_accuracy_is_that_of_linearised_models(digits):
    members, head = list(digits.pool()), digits.joint_head()
    effect = effect_of_removal(digits, ["client-1"], None)
    for client in CLASSES:
        found = effect["before"][client]
        expected = shares(members, head, client)
        assert (found["class_il_accuracy"], found["task_il_accuracy"]) == expected
    staying = [m for m in members if m.client != "client-1"]
    head = head_of(Pool(tuple(staying)), digits.settings)
    for client, found in effect["after"].items():
        expected = shares(staying, head, client)
        assert (found["class_il_accuracy"], found["task_il_accuracy"]) == expected
    plain = evaluate_clients(backbone(), digits.theta_p(), digits.joint_head(), RunConfig())
    assert plain != effect["before"]


def test_the_evaluate_command_linearises(digits):
    found = told("evaluate", "--registry", digits.path)["accuracy"]
    for client in CLASSES:
        expected = shares(list(digits.pool()), digits.joint_head(), client)
        figures = found[client]
        assert (figures["class_il_accuracy"], figures["task_il_accuracy"]) == expected


def test_audited_models_are_linearised(digits):
    models = audited_models(digits, "client-1")
    assert all(model.linearised for model in models.values())
    (data,) = clients_data(RunConfig().data, backbone(), seed=0, wanted=("client-0",))
    members = {BEFORE: list(digits.pool()), AFTER: list(digits.pool().without("client-1"))}
    images = torch.cat([data.train.images, data.test.images])
    for name, model in models.items():
        head = model.head
        expected = logits_by_hand(
            averaged(members[name]), head, backbone().preprocessing.normalise(images)
        )
        close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
        features = model.features(backbone(), images)
        torch.testing.assert_close(head(features).double(), expected, **close)
        accuracy = accuracy_of(
            backbone(), model.theta, head, data.classes, data.test, linearised=True
        )
        labels = head.indices(data.classes)[data.test.labels]
        hits = expected[-len(labels) :].argmax(1) == labels
        assert accuracy.class_il == float(hits.double().mean())


def test_shadows_are_asked_as_linearised_models(tmp_path):
    settings = {**RunConfig().flat(), "kind": "tangent", "local-epochs": 1, "learning-rate": 0.01}
    registry = registry_of(
        tmp_path / "r",
        *(
            replace(
                member(client, Kind.TANGENT, seed=i, classes=CLASSES[client]), settings=settings
            )
            for i, client in enumerate(("client-0", "client-1"))
        ),
    )
    (data,) = clients_data(RunConfig().data, backbone(), seed=0, wanted=("client-1",))
    training = ClientTraining.of(registry, "client-1", backbone())
    head = registry.joint_head()
    shadows = train_shadows(registry, training, data, head, count=2, seed=0)
    images, labels = all_images(data)
    other, own = registry.pool()
    for index, chosen in enumerate(shadows.trained_on):
        generator = generator_for(0, "shadow", "client-1", str(index))
        vector = training.fit(Split(images[chosen], labels[chosen]), generator=generator)
        logits = logits_by_hand(
            averaged([other, replace(own, task_vector=vector)]),
            head,
            backbone().preprocessing.normalise(images[:]),
        )
        expected = confidence(logits, head.indices(data.classes)[labels])
        torch.testing.assert_close(shadows.phi[index], expected, rtol=1e-3, atol=1e-3)


# -- published ------------------------------------------------------------------------------------


def test_a_published_folder_is_the_registrys_model_when_fedcompo_loads_it(registry, tmp_path):
    said = publish(tmp_path / "out", from_registry(registry))
    assert said["linearised"] is True
    shutil.rmtree(registry.path)
    model = load_tangent_model(str(tmp_path / "out"))
    assert not model.training
    assert_logits(model, logits_by_hand(averaged(tangents()), registry_head(tmp_path / "anew")))


def registry_head(path: Path) -> Head:
    return registry_of(path, *tangents()).joint_head()


def test_plain_timm_refuses_what_it_would_compute_otherwise(registry, tmp_path):
    publish(tmp_path / "out", from_registry(registry))
    for folder in (tmp_path / "out", registry.path / "model"):
        with pytest.raises(RuntimeError, match=r"Unknown model.*linearised.*Registry.model"):
            timm.create_model(f"local-dir:{folder}", pretrained=True)
        config = json.loads((folder / "config.json").read_text())
        assert config["label_names"] == list(registry.classes)


def test_the_card_says_how_a_composition_of_tangents_is_used(registry, tmp_path):
    publish(tmp_path / "out", from_registry(registry))
    card = (tmp_path / "out" / MODEL_CARD).read_text()
    assert "f(x; θ₀) + J (λ Σ w τ)" in card
    assert "**Not for plain timm**" in card
    assert "library_name: fedcompo" in card
    assert "timm.create_model" not in card


def test_a_negated_copy_is_linearised_too(registry, tmp_path):
    run("negate", "ben", "--registry", registry.path, "--strength", "0.5", "-o", tmp_path / "out")
    ada, ben, cho = tangents()
    tau, own = averaged([ada, cho]), averaged([ben])
    expected = {name: tau[name] - 0.5 * own[name] for name in tau}
    head = head_of(Pool((ada, cho)), registry.settings)
    assert_logits(load_tangent_model(tmp_path / "out"), logits_by_hand(expected, head))
    card = (tmp_path / "out" / MODEL_CARD).read_text()
    assert "J (λ Σ w τ − 0.5 τ₋)" in card and "do not deploy" in card


def test_the_compose_command_says_who_loads_the_folder(registry, tmp_path):
    out = run("compose", "--registry", registry.path, "-o", tmp_path / "out").stdout
    assert "timm.create_model" not in out
    scope: dict[str, object] = {}
    exec(out.strip().splitlines()[-1].replace("; ", "; model = ", 1), scope)
    assert torch.equal(scope["model"](IMAGES), registry.model()(IMAGES))


@pytest.mark.parametrize("name", ["model.safetensors", "backbone.safetensors", "config.json"])
def test_a_published_folder_with_a_file_missing_or_altered_is_refused(name, registry, tmp_path):
    publish(tmp_path / "out", from_registry(registry))
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileFormatError, match=name):
        load_tangent_model(tmp_path / "out")
    path.unlink()
    with pytest.raises(FileFormatError, match=name):
        load_tangent_model(tmp_path / "out")


def test_files_of_different_backbones_make_no_model(registry, tmp_path):
    publish(tmp_path / "out", from_registry(registry))
    stored = registry.backbone.load()
    other = Registry.create(tmp_path / "r", replace(stored, fingerprint="pico@other"))
    shutil.copy(other.path / "backbone.safetensors", tmp_path / "out")
    with pytest.raises(
        FileFormatError, match=r"but backbone\.safetensors beside it holds pico@other"
    ):
        load_tangent_model(tmp_path / "out")


def test_other_kinds_are_published_for_timm_as_ever(tmp_path):
    registry = registry_of(tmp_path / "r", *one_of_each_kind())
    publish(tmp_path / "out", from_registry(registry))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        MODEL_CARD,
        RECIPE,
        "config.json",
        "model.safetensors",
    }
    with pytest.raises(FileFormatError, match=r"backbone\.safetensors"):
        load_tangent_model(tmp_path / "out")


# -- aligned again --------------------------------------------------------------------------------


def test_aligning_the_head_again_keeps_the_model_linearised(registry):
    registry.realign(own_statistics(registry))
    assert registry.realigned and registry.linearised
    assert_logits(registry.model(), logits_by_hand(averaged(tangents()), registry.joint_head()))
