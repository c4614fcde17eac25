"""A registry's life: who comes, who goes, what is composed of those who are there."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import timm
import torch
from builders import normal
from registry_builders import (
    QUICK,
    backbone,
    composition,
    contents,
    member,
    one_of_each_kind,
    overwrite,
    own_statistics,
    registry_of,
    same_bits,
    sums,
    three_clients,
)
from torch.func import functional_call

from fedcompo.errors import ContributionError, RegistryDamaged, RegistryError
from fedcompo.method.heads import Head, discriminant
from fedcompo.method.pool import Pool
from fedcompo.registry.journal import Entry
from fedcompo.registry.registry import Registry
from fedcompo.report.progress import listening
from fedcompo.storage.files import WEIGHTS

ADA, BEN, CHO = one_of_each_kind()


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


def events(registry: Registry) -> list[str]:
    return [entry.event for entry in registry.entries()]


def last(registry: Registry) -> Entry:
    return registry.entries()[-1]


# -- making and opening ---------------------------------------------------------------------------


def test_a_new_registry_holds_nobody_and_says_so(tmp_path):
    registry = Registry.create(tmp_path / "a" / "b", backbone(), QUICK)
    assert (registry.clients, registry.classes, events(registry)) == ((), (), ["created"])
    assert registry.settings == QUICK
    assert Registry(str(tmp_path / "a" / "b")).state == registry.state
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b"}
    for ask in (registry.composed, registry.model, registry.joint_head, registry.theta_p):
        with pytest.raises(RegistryError, match="Nobody is in the registry"):
            ask()
    assert len(registry.pool()) == 0


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("precious")
    before = contents(tmp_path)
    for name in ("file", "folder"):
        with pytest.raises(RegistryError, match="holds something already"):
            Registry.create(tmp_path / name, backbone())
    with pytest.raises(RegistryError, match="No registry could be made"):
        Registry.create(tmp_path / "file" / "below", backbone())
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert Registry.create(tmp_path / "empty", backbone()).clients == ()


def test_what_is_no_registry_cannot_be_opened(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RegistryError, match=r"There is no registry at .*registry\.json"):
            Registry(path)


def test_the_private_key_is_for_its_owner_alone(registry):
    assert stat.S_IMODE((registry.path / "key.pem").stat().st_mode) == 0o600


def test_a_registry_may_be_moved(registry, tmp_path):
    moved = Registry(registry.path.rename(tmp_path / "elsewhere"))
    assert moved.state == registry.state
    moved.remove("ada")
    assert (moved.path / "model" / WEIGHTS).read_bytes() == composition(moved)[WEIGHTS]


# -- what is composed -----------------------------------------------------------------------------


def test_members_classes_and_their_contributions_are_as_given(registry):
    assert registry.clients == ("ada", "ben", "cho")
    assert registry.classes == ("cat", "dog", "owl", "yak")
    for given in (ADA, BEN, CHO):
        held = registry.contribution(given.client)
        assert same_bits(dict(held.task_vector.tensors), dict(given.task_vector.tensors))
        assert torch.equal(held.head.weight, given.head.weight)
        about = registry.member(given.client)
        assert about.kind == given.task_vector.kind
        assert (about.classes, about.num_examples) == (given.head.classes, given.num_examples)
    with pytest.raises(ContributionError, match="no client 'dee'"):
        registry.member("dee")


def test_the_ready_model_is_the_composition_run_functionally(registry):
    images = normal(5, 1, 8, 8, seed=3, dtype=torch.float32)
    model = registry.model()
    assert not model.training
    features = functional_call(backbone().model, registry.theta_p(), (images,))
    torch.testing.assert_close(model(images), registry.joint_head()(features))
    assert model.pretrained_cfg["label_names"] == list(registry.classes)


def test_plain_timm_loads_the_folder_that_the_link_leads_to(registry):
    model = timm.create_model(f"local-dir:{registry.path / 'model'}", pretrained=True)
    assert same_bits(model.state_dict(), registry.model().state_dict())
    seen = [timm.data.resolve_model_data_config(m) for m in (model, registry.model())]
    assert json.dumps(seen[0]) == json.dumps(seen[1])  # which knows no tuples


def test_weights_that_are_no_targets_stay_as_they_were(registry):
    composed = registry.composed()
    for name, tensor in backbone().model.state_dict().items():
        assert torch.equal(composed[name], tensor) == (name not in backbone().theta_0)


def test_the_link_follows_the_composition_and_goes_with_the_last_client(registry):
    link = registry.path / "model"
    for client in ("ada", "ben"):
        registry.remove(client)
        assert str(link.readlink()) == registry.state.version
        assert [path.name for path in (registry.path / "versions").iterdir()] == [
            Path(registry.state.version).name
        ]
    registry.remove("cho")
    assert not link.is_symlink()
    assert list((registry.path / "versions").iterdir()) == []
    assert list((registry.path / "clients").iterdir()) == []
    assert registry.state.root == registry_of(registry.path.parent / "new").state.root


def test_the_pool_composes_with_any_coefficients_without_whom_one_likes(registry):
    theta_0, coefficients = backbone().theta_0, {"ben": 0.25, "cho": 0.75}
    never = Pool((CHO, BEN))
    assert same_bits(registry.pool().without("ada").compose(theta_0), never.compose(theta_0))
    actual = registry.pool().without("ada").compose(theta_0, coefficients, scale=2.0)
    assert same_bits(actual, never.compose(theta_0, coefficients, scale=2.0))


def test_the_pool_and_the_registry_compose_the_same_weights(registry):
    expected = registry.pool().compose(backbone().theta_0, scale=registry.scale)
    for name, weight in registry.theta_p().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)


def test_composing_reads_every_tensor_of_a_member_once(registry, monkeypatch):
    read: list[str] = []
    held = registry.contribution("ben")
    section = type(held.task_vector.tensors)
    original = section.__getitem__

    def counting(self: object, name: str) -> torch.Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(section, "__getitem__", counting)
    Pool((held,)).compose(backbone().theta_0)
    assert sorted(read) == sorted(held.task_vector.tensors)


def test_a_selection_of_nobody_cannot_be_composed(registry):
    for nobody in ({"only": []}, {"without": registry.clients}):
        with pytest.raises(ContributionError, match="empty pool"):
            registry.model(**nobody)


def test_the_number_of_threads_changes_no_bit(registry, tmp_path, monkeypatch):
    used: list[int] = []

    def aligned(*arguments: object, **options: object) -> Head:
        used.append(torch.get_num_threads())
        return discriminant(*arguments, **options)

    monkeypatch.setattr("fedcompo.composition.head.discriminant", aligned)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        other = registry_of(tmp_path / "other", CHO, BEN, ADA)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert other.state.root == registry.state.root
    assert used == [1]  # for the head is computed from sums whose order depends on them


def test_changes_are_told_step_by_step(registry):
    steps: list[str] = []
    with listening(lambda progress: steps.append(str(progress))):
        registry.add(member("dee"))
        registry.remove("dee")
    assert steps[0] == "checking dee"
    assert steps.count("aligning the joint head") == steps.count("composing") == 2
    assert steps[-1] == "writing"


# -- the joint head, aligned again ----------------------------------------------------------------


def test_realigning_changes_the_head_and_nothing_else(registry):
    head, theta_p = registry.joint_head(), registry.theta_p()
    registry.realign(own_statistics(registry))
    assert registry.realigned
    assert same_bits(registry.theta_p(), theta_p)
    assert not torch.equal(registry.joint_head().weight, head.weight)
    assert last(registry).details["clients"] == ["ada", "ben", "cho"]


def test_statistics_may_come_in_any_order(registry, tmp_path):
    other = three_clients(tmp_path / "other")
    given = own_statistics(registry)
    registry.realign(given)
    other.realign(dict(reversed(given.items())))
    assert other.state.root == registry.state.root


def test_a_change_of_members_takes_the_head_back_to_what_all_members_told(registry):
    never = registry_of(registry.path.parent / "never", BEN, CHO)
    registry.realign(own_statistics(registry))
    registry.remove("ada")
    assert not registry.realigned
    assert composition(registry) == composition(never)


@pytest.mark.parametrize(
    "wrong", [{}, {"ada": sums(["cat"], seed=1)}, {"dee": sums(["cat"], seed=1)}]
)
def test_statistics_must_be_those_of_all_members(wrong, registry):
    before = contents(registry.path)
    given = {**own_statistics(registry), **wrong} if wrong else {}
    with pytest.raises(ContributionError, match=r"wrong or missing: .*(ada|dee)"):
        registry.realign(given)
    assert contents(registry.path) == before


# -- replacing ------------------------------------------------------------------------------------


def test_replacing_is_a_removal_and_an_addition(registry, tmp_path):
    registry.add(member("ben", seed=7), member("dee", seed=8), replacing=True)
    assert events(registry) == ["created", "added", "removed", "added"]
    removed, added = registry.entries()[-2:]
    assert (removed.details["client"], removed.details["within"]) == ("ben", "replacement")
    assert [client["client"] for client in added.details["clients"]] == ["ben", "dee"]
    expected = registry_of(tmp_path / "n", ADA, CHO, member("dee", seed=8), member("ben", seed=7))
    assert registry.state.root == expected.state.root


def test_each_member_knows_the_line_that_tells_of_its_coming(registry):
    registry.add(member("ben", seed=7), member("ada", seed=9), member("dee"), replacing=True)
    for client in registry.clients:
        entry = registry.entries()[registry.member(client).added - 1]
        assert entry.event == "added"
        assert client in [added["client"] for added in entry.details["clients"]]


def test_a_client_may_be_replaced_and_leave_and_come_again(registry):
    root = registry.state.root
    for seed in (7, 8, 9):
        registry.add(member("ben", seed=seed), replacing=True)
    registry.remove("ben")
    registry.add(BEN)
    assert registry.state.root == root
    assert {path.name for path in (registry.path / "clients").iterdir()} == {"ada", "ben", "cho"}


def test_the_journal_can_be_read_by_any_program(registry):
    registry.remove("ada")
    lines = (registry.path / "journal.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    assert [value["event"] for value in values] == ["created", "added", "removed"]
    assert values[-1]["details"]["root_after"] == registry.state.root
    overwrite(registry.path / "journal.jsonl", b"{ ")
    with pytest.raises(RegistryDamaged, match="Line 1 of the journal"):
        registry.entries()
