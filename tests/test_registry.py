"""A registry's life: who comes, who goes, what is composed of those who are there."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from builders import altered, normal
from registry_builders import (
    QUICK,
    backbone,
    composition,
    contents,
    member,
    mixtures,
    one_of_each_kind,
    overwrite,
    registry_of,
    same_bits,
)
from torch.func import functional_call

from fedcompo import fixed_point
from fedcompo.config import Kind
from fedcompo.contribution import CONTENT, FISHER, Contribution, Lineage
from fedcompo.errors import ContributionError, RegistryDamaged, RegistryError
from fedcompo.export import WEIGHTS
from fedcompo.features import FeatureMixture
from fedcompo.journal import Entry
from fedcompo.pool import Pool
from fedcompo.registry import Registry
from fedcompo.removal import RemovalRecord
from fedcompo.signing import is_signed
from fedcompo.tensorstream import file_sha256

ADA, BEN, CHO = one_of_each_kind()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return registry_of(tmp_path_factory.mktemp("template") / "r", ADA, BEN, CHO).path


@pytest.fixture
def registry(template, tmp_path):
    return Registry(shutil.copytree(template, tmp_path / "registry", symlinks=True))


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
    expected = registry.pool().compose(backbone().theta_0)
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


def test_the_number_of_threads_changes_no_bit(registry, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        other = registry_of(tmp_path / "other", CHO, BEN, ADA)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert other.state.root == registry.state.root


def test_changes_are_told_step_by_step(registry):
    steps: list[str] = []
    registry.add(member("dee"), on_step=steps.append)
    registry.remove("dee", on_step=steps.append)
    assert steps[0] == "checking dee"
    assert steps.count("aligning the joint head") == steps.count("composing") == 2
    assert steps[-1] == "writing"


# -- the joint head, aligned again ----------------------------------------------------------------


def own_mixtures(registry: Registry) -> dict[str, dict[str, FeatureMixture]]:
    members = registry.state.members.items()
    return {c: mixtures(m.classes, seed=100 * i) for i, (c, m) in enumerate(members)}


def test_realigning_changes_the_head_and_nothing_else(registry):
    head, theta_p = registry.joint_head(), registry.theta_p()
    registry.realign(own_mixtures(registry))
    assert registry.realigned
    assert same_bits(registry.theta_p(), theta_p)
    assert not torch.equal(registry.joint_head().weight, head.weight)
    assert last(registry).details["clients"] == ["ada", "ben", "cho"]


def test_a_change_of_members_takes_the_head_back_to_what_all_members_told(registry):
    never = registry_of(registry.path.parent / "never", BEN, CHO)
    registry.realign(own_mixtures(registry))
    registry.remove("ada")
    assert not registry.realigned
    assert composition(registry) == composition(never)


@pytest.mark.parametrize("wrong", [{}, {"ada": {}}, {"dee": mixtures(["cat"], seed=1)}])
def test_mixtures_must_be_those_of_all_members(wrong, registry):
    before = contents(registry.path)
    given = {**own_mixtures(registry), **wrong} if wrong else {}
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


# -- reading what was altered ---------------------------------------------------------------------


def test_every_file_is_checked_before_it_is_believed(registry):
    reads = {
        "backbone.safetensors": lambda r: r.model(only=["ada"]),
        "clients/ada/contribution.safetensors": lambda r: r.contribution("ada"),
        "clients/ada/card.json": lambda r: r.contribution("ada"),
        f"{registry.state.version}/model.safetensors": lambda r: r.theta_p(),
        f"{registry.state.version}/sum.safetensors": lambda r: dict(r.running_sum()),
        "journal.jsonl": lambda r: r.entries(),
        "state.json": lambda r: Registry(r.path),
        "registry.json": lambda r: Registry(r.path),
    }
    for name, read in reads.items():
        size = (registry.path / name).stat().st_size
        for position in (9, size // 2, size - 2):
            altered(registry.path / name, position)
            with pytest.raises(RegistryDamaged, match=Path(name).name):
                read(Registry(registry.path))
            altered(registry.path / name, position)
        read(Registry(registry.path))


def test_an_altered_fisher_is_found_when_it_is_asked_for(tmp_path):
    registry = registry_of(tmp_path / "r", member("ada", with_fisher=True))
    path = registry.path / "clients" / "ada" / FISHER
    altered(path, path.stat().st_size - 2)
    registry = Registry(registry.path)
    assert registry.contribution("ada").fisher is None
    with pytest.raises(RegistryDamaged, match="fisher"):
        dict(registry.contribution("ada", with_fisher=True).fisher.sums)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.add(member("dee")),
        lambda r: r.remove("ada"),
        lambda r: r.realign(own_mixtures(r)),
    ],
    ids=["add", "remove", "realign"],
)
@pytest.mark.parametrize("name", ["sum.safetensors", "backbone.safetensors"])
def test_nothing_is_composed_of_altered_files(name, change, registry):
    folder = registry.path / registry.state.version if name.startswith("sum") else registry.path
    altered(folder / name, (folder / name).stat().st_size - 3)
    before = contents(registry.path)
    with pytest.raises(RegistryDamaged, match=name):
        change(Registry(registry.path))
    assert contents(registry.path) == before


def test_a_missing_file_is_damage_and_named(registry):
    (registry.path / "clients" / "ben" / CONTENT).unlink()
    with pytest.raises(RegistryDamaged, match=r"ben.*cannot be read.*Restore"):
        registry.contribution("ben")


def test_a_file_is_hashed_once_for_each_opening(registry, monkeypatch):
    hashed: list[Path] = []
    original = file_sha256

    def counting(path: Path) -> str:
        hashed.append(path)
        return original(path)

    monkeypatch.setattr("fedcompo.registry.file_sha256", counting)
    for _ in range(3):
        registry.theta_p()
        dict(registry.pool().only("ada").contributions[0].task_vector.tensors)
    assert len(hashed) == len(set(hashed)) > 0


def test_one_who_read_on_is_told_of_the_change_and_not_of_damage(registry):
    early = Registry(registry.path)
    held, composed = early.contribution("ada"), early.composed()
    registry.remove("ada")
    reads = (
        lambda: early.theta_p(),
        lambda: early.contribution("ada"),
        lambda: dict(composed),
        lambda: held.task_vector.dense(backbone().theta_0),
    )
    for read in reads:
        with pytest.raises(RegistryError, match="was changed while it was being read") as caught:
            read()
        assert not isinstance(caught.value, RegistryDamaged)
    early.refresh()
    assert early.clients == ("ben", "cho")
    assert same_bits(early.theta_p(), registry.theta_p())


def test_another_contribution_under_the_same_name_is_no_damage(registry):
    early = Registry(registry.path)
    held = early.contribution("ada")
    registry.remove("ada")
    registry.add(member("ada", Kind.FULL, seed=77, classes=("cat", "dog"), num_examples=10))
    with pytest.raises(RegistryError, match="Try again") as caught:
        held.task_vector.dense(backbone().theta_0)
    assert not isinstance(caught.value, RegistryDamaged)


# -- removal records ------------------------------------------------------------------------------


def test_the_record_says_what_happened_and_is_signed(registry):
    before, theirs = registry.state, registry.member("ben")
    record = registry.remove("ben", requested_by="Dr. B", reason="§ 17")
    path = registry.path / last(registry).details["record"]
    assert RemovalRecord.parse(path.read_bytes(), source="x") == record
    assert is_signed(record.signed_bytes, record.signature, registry.path / "public.pem")
    assert last(registry).details["record_sha256"] == file_sha256(path)
    assert (record.registry, record.sequence) == (registry.identity, registry.state.sequence)
    assert (record.requested_by, record.reason) == ("Dr. B", "§ 17")
    assert (record.root_before, record.root_after) == (before.root, registry.state.root)
    assert record.journal_before == before.journal_sha256
    assert record.composition_before == before.files
    assert record.composition_after == registry.state.files
    assert record.removed_files == theirs.files
    assert record.removed_rounded_sha256 == theirs.rounded_sha256
    assert (record.kind, record.num_examples, record.added) == ("lora", 25, theirs.added)
    assert (record.classes, record.classes_after) == (("dog", "owl"), ("cat", "dog", "yak"))
    assert record.survivors == registry.clients == ("ada", "cho")
    assert record.influence.exact and not record.recomposed


def test_lineage_is_followed_through_clients_and_contributions_that_are_gone(tmp_path):
    registry = registry_of(
        tmp_path / "r",
        member("ada"),
        member("ben", lineage=Lineage(anchored_by=("ada",))),
        member("cho", lineage=Lineage(aligned_with=("ben",))),
        member("dee", lineage=Lineage(ensemble=("cho",))),
        member("eva"),
    )
    registry.remove("cho")
    registry.add(member("ben", seed=5), replacing=True)  # trained again, without anyone
    record = registry.remove("ada")
    assert record.influence.to_retrain == ("dee",)
    assert record.influence.indirect == ("dee",)
    assert registry.influence_of("ben").to_retrain == ("dee",)
    registry.add(member("dee", seed=5), replacing=True)
    assert registry.influence_of("eva").exact


# -- deleting means deleting ----------------------------------------------------------------------


def raw(contribution: Contribution) -> dict[str, bytes]:
    """Bytes of everything a client sent; a LoRA's product and (IA)³'s change too."""
    tensors = {f"task vector {n}": t for n, t in contribution.task_vector.tensors.items()}
    tensors |= {f"τ {n}": t for n, t in contribution.task_vector.dense(backbone().theta_0).items()}
    tensors |= {"head": contribution.head.weight, "bias": contribution.head.bias}
    for name, mixture in contribution.features.items():
        tensors |= {f"{name} means": mixture.means, f"{name} variances": mixture.variances}
        tensors |= {f"{name} shares": mixture.weights}
    if contribution.fisher is not None:
        tensors |= {f"Fisher {n}": t for n, t in contribution.fisher.sums.items()}
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}


def traces(registry: Registry, parts: dict[str, bytes]) -> set[str]:
    """Which of the parts are found anywhere in the registry's files."""
    files = [path.read_bytes() for path in registry.path.rglob("*") if path.is_file()]
    return {name for name, data in parts.items() if any(data in file for file in files)}


def composed_parts(registry: Registry) -> dict[str, bytes]:
    """Bytes of all that a composition changes, and of its sum."""
    names = [*backbone().theta_0, "head.weight", "head.bias"]
    parts = {f"composed {n}": registry.composed()[n].numpy().tobytes() for n in names}
    return parts | {f"sum {n}": t.numpy().tobytes() for n, t in registry.running_sum().items()}


@pytest.mark.parametrize("kind", list(Kind))
def test_after_a_removal_no_byte_of_the_client_is_left(kind, tmp_path):
    given = member("dee", kind, seed=30, with_fisher=True)
    registry = registry_of(tmp_path / "r", ADA)
    registry.add(given, member("eva", seed=40, with_fisher=True))
    registry.realign(own_mixtures(registry))
    realigned = own_mixtures(registry)["dee"]
    theirs = {f"realigned {n}": m.means.numpy().tobytes() for n, m in realigned.items()}
    theirs |= raw(given) | composed_parts(registry)
    kept_dense = {name for name in theirs if name.startswith("τ") and kind is not Kind.FULL}
    assert traces(registry, theirs) == theirs.keys() - kept_dense
    registry.remove("dee")
    assert traces(registry, theirs) == set()
    assert traces(registry, raw(member("eva", seed=40, with_fisher=True)))


def test_after_a_replacement_no_byte_of_the_old_contribution_is_left(registry):
    theirs = raw(BEN) | composed_parts(registry)
    assert traces(registry, theirs)
    registry.add(member("ben", seed=55), replacing=True)
    assert traces(registry, theirs) == set()


def test_a_refused_contribution_leaves_no_byte_behind(registry):
    given = member("dee", seed=30)
    bad = replace(given, num_examples=0)
    with pytest.raises(ContributionError):
        registry.add(bad)
    assert traces(registry, raw(given)) == set()


def test_earlier_versions_go_with_the_client_unless_they_are_kept_on_request(tmp_path):
    settings = replace(QUICK, keep_versions=True)
    registry = registry_of(tmp_path / "r", ADA, settings=settings)
    alone = composed_parts(registry)
    registry.add(BEN)
    both = composed_parts(registry)
    registry.add(CHO)
    three = composed_parts(registry)
    assert traces(registry, alone | both | three) == {*alone, *both, *three}
    assert [kept["clients"] for kept in registry.state.kept.values()] == [["ada"], ["ada", "ben"]]
    record = registry.remove("cho", keep_versions=True)
    assert traces(registry, raw(CHO)) == set()
    assert traces(registry, three) == set(three)
    assert record.kept_versions == ("versions/000004",)
    record = registry.remove("ben")
    assert record.kept_versions == ()
    assert traces(registry, both) == traces(registry, three) == set()
    assert traces(registry, alone) == set(alone)
    assert {f"versions/{p.name}" for p in (registry.path / "versions").iterdir()} == {
        registry.state.version,
        "versions/000002",
    }


def test_the_composition_until_now_is_kept_on_request_where_none_are_kept_otherwise(registry):
    last_version, parts = registry.state.version, composed_parts(registry)
    record = registry.remove("ben", keep_versions=True)
    assert record.kept_versions == (last_version,)
    assert traces(registry, parts) == set(parts)
    assert traces(registry, raw(BEN)) == set()
    registry.remove("ada")  # it was in there, too
    assert traces(registry, parts) == set()
    assert registry.state.kept == {}


# -- another machine ------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch):
    """While on, LoRAs round as they might on a machine that sums otherwise."""
    here = fixed_point.reproducible_delta

    def switch(on: bool) -> None:
        def there(vector, name, weight):
            delta = here(vector, name, weight)
            return delta + (2e-12 if on and vector.kind is Kind.LORA else 0)

        monkeypatch.setattr(fixed_point, "reproducible_delta", there)

    return switch


def test_what_was_rounded_elsewhere_is_composed_anew_when_it_goes(elsewhere, tmp_path):
    lora = member("dee", Kind.LORA, seed=40)
    elsewhere(True)
    registry = registry_of(tmp_path / "moved", ADA, BEN, CHO, lora)
    elsewhere(False)
    never = registry_of(tmp_path / "never", CHO, ADA, lora)
    steps: list[str] = []
    rounded = registry.member("ben").rounded_sha256
    record = registry.remove("ben", on_step=steps.append)
    assert record.recomposed
    assert any("ben rounds" in step for step in steps)
    assert record.removed_rounded_sha256 == rounded  # as it stood in the sum
    assert registry.state.root == never.state.root  # so survivors are rounded as here, too
    assert composition(registry) == composition(never)
    told = {client: m.rounded_sha256 for client, m in registry.state.members.items()}
    assert last(registry).details["rounded"] == told
    assert not registry.remove("dee").recomposed  # and from now on subtracting is exact again


def test_what_rounds_alike_is_subtracted_wherever_it_was_added(elsewhere, tmp_path):
    elsewhere(True)
    registry = registry_of(tmp_path / "moved", ADA, BEN, CHO)
    elsewhere(False)
    record = registry.remove("ada")  # not a LoRA
    assert not record.recomposed
    elsewhere(True)
    assert registry.state.root == registry_of(tmp_path / "there", BEN, CHO).state.root


def test_replacing_what_was_rounded_elsewhere_composes_anew(elsewhere, tmp_path):
    elsewhere(True)
    registry = registry_of(tmp_path / "moved", ADA, BEN, CHO)
    elsewhere(False)
    registry.add(member("ben", seed=9), replacing=True)
    expected = registry_of(tmp_path / "here", ADA, member("ben", seed=9), CHO)
    assert registry.state.root == expected.state.root


def test_the_journal_can_be_read_by_any_program(registry):
    registry.remove("ada")
    lines = (registry.path / "journal.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    assert [value["event"] for value in values] == ["created", "added", "removed"]
    assert values[-1]["details"]["root_after"] == registry.state.root
    overwrite(registry.path / "journal.jsonl", b"{ ")
    with pytest.raises(RegistryDamaged, match="Line 1 of the journal"):
        registry.entries()
