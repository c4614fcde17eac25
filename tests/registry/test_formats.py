"""Files of format 1 and 2 in one registry; task vectors known by their tensors, or rounded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import altered
from forgery import rewrite_line
from registry_builders import (
    contents,
    member,
    one_of_each_kind,
    overwrite,
    registry_of,
    three_clients,
)

from fedcompo.errors import ContributionError, FileFormatError, RegistryDamaged
from fedcompo.method.contribution import Contribution
from fedcompo.method.task_vector import NOTHING, TENSORS
from fedcompo.registry.history import stays_in
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.registry import Registry
from fedcompo.registry.removed import Removed
from fedcompo.registry.verification import verify_registry
from fedcompo.storage.files import BACKBONE, CONTENT, FISHER, SUM, WEIGHTS
from fedcompo.storage.header import header_of
from fedcompo.storage.identity import HEADER, identity, old_sha256
from fedcompo.storage.tensorstream import StreamedTensors, file_sha256

GOLDEN = Path(__file__).parents[1] / "golden"
GONE = "no file of ben is in the registry"
VECTOR = "nobody has had the task vector of ben since"


@pytest.fixture
def old(tmp_path: Path) -> Registry:
    """A registry that an earlier version wrote."""
    path = Path(shutil.copytree(GOLDEN / "mixed", tmp_path / "old"))
    (path / "key.pem").chmod(0o600)  # git does not keep it
    (path / "model").symlink_to("versions/000003", target_is_directory=True)
    return Registry(path)


def turned(own: Contribution, client: str, *, vector: float = 1.0) -> Contribution:
    """Another's contribution: of other statistics, and by a factor of another task vector."""
    tensors = {name: vector * tensor for name, tensor in own.task_vector.tensors.items()}
    statistics = {c: replace(m, means=1.1 * m.means) for c, m in own.statistics.items()}
    lasting = replace(own.task_vector, tensors=tensors)
    return replace(own, client=client, task_vector=lasting, statistics=statistics, fisher=None)


def failing(registry: Registry, record: Path | None = None) -> list[str]:
    found = verify_record(record, registry=registry) if record else verify_registry(registry.path)
    return [finding.claim for finding in found if finding.holds is False]


def bytes_of(path: Path, name: str) -> range:
    """Where the bytes of a tensor lie in its file."""
    tensors = StreamedTensors(path)
    begin, end = tensors._places[name][3:]
    return range(tensors._start + begin, tensors._start + end)


# -- every byte -----------------------------------------------------------------------------------


def files_of(registry: Registry) -> dict[str, Path]:
    state = registry.state
    return {
        BACKBONE: registry.path / BACKBONE,
        CONTENT: registry.path / "clients/ada" / CONTENT,
        FISHER: registry.path / "clients/ada" / FISHER,
        SUM: registry.path / state.version / SUM,
        WEIGHTS: registry.path / state.version / WEIGHTS,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("whole")
    return registry_of(folder / "registry", member("ada", with_fisher=True), member("ben", seed=1))


@pytest.mark.parametrize("file", [BACKBONE, CONTENT, FISHER, SUM, WEIGHTS])
def test_an_altered_byte_of_any_tensor_is_found_when_it_is_read_first_and_by_verify(
    whole: Registry, file: str
) -> None:
    path, opened = files_of(whole)[file], Registry(whole.path)
    data = path.read_bytes()
    readers = {
        BACKBONE: lambda: opened.backbone.tensors,
        CONTENT: lambda: StreamedTensors(path),
        FISHER: lambda: StreamedTensors(path),
        SUM: opened.running_sum,
        WEIGHTS: opened.composed,
    }
    names = [name for name in StreamedTensors(path) if bytes_of(path, name)]
    tensors = readers[file]()
    assert {*names} >= {*tensors}
    assert all(torch.is_tensor(tensors[name]) for name in tensors)  # it was in order before
    for name in tensors:
        altered(path, bytes_of(path, name)[-1])
        with pytest.raises((RegistryDamaged, FileFormatError), match=f"{name}.*was altered"):
            readers[file]()[name]
        with pytest.raises((RegistryDamaged, FileFormatError), match=f"{name}.*was altered"):
            tensors[name]
        overwrite(path, data)
        assert torch.is_tensor(tensors[name])
    altered(path, bytes_of(path, names[0])[0])
    found = [finding for finding in verify_registry(whole.path) if finding.holds is False]
    assert len(found) == 1 and names[0] in found[0].detail and str(path) in found[0].detail
    overwrite(path, data)
    assert not failing(whole)


def test_damage_of_a_registry_is_called_so_wherever_it_is_read(whole: Registry) -> None:
    path = files_of(whole)[SUM]
    data, name = path.read_bytes(), min(StreamedTensors(path))
    altered(path, bytes_of(path, name)[0])
    before = contents(whole.path)
    with pytest.raises(RegistryDamaged, match=f"{name}.*altered. Restore the registry"):
        whole.add(member("cho", seed=2))
    assert contents(whole.path) == before
    overwrite(path, data)


def test_a_tensor_that_was_swapped_between_two_files_is_found(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    member("ada").save(own)
    member("ada", seed=3).save(other)
    name = min(n for n in StreamedTensors(own / CONTENT) if n.startswith("task_vector"))
    place, data = bytes_of(own / CONTENT, name), bytearray((own / CONTENT).read_bytes())
    theirs = (other / CONTENT).read_bytes()
    data[place.start : place.stop] = theirs[place.start : place.stop]
    overwrite(own / CONTENT, data)
    with pytest.raises(FileFormatError, match=f"{name}.*was altered"):
        Contribution.open(own).task_vector.tensors[name.removeprefix("task_vector/")]


def test_a_file_is_known_by_its_header_and_any_change_of_it_is_another(tmp_path: Path) -> None:
    member("ada").save(tmp_path)
    path = tmp_path / CONTENT
    known, data = identity(path), path.read_bytes()
    with path.open("rb") as file:
        length = len(header_of(file))
    assert known.startswith(HEADER)
    for position in range(0, length, 7):
        altered(path, position)
        assert identity(path) != known
        overwrite(path, data)
    altered(path, -1)
    assert identity(path) == known
    with pytest.raises(FileFormatError, match="was altered"):
        identity(path, checked=True)


def test_what_is_altered_within_a_tick_of_the_clock_is_found(tmp_path: Path) -> None:
    for number in range(20):
        member("ada", seed=number).save(tmp_path)
        tensors = StreamedTensors(tmp_path / CONTENT)
        name = min(tensors)
        assert torch.is_tensor(tensors[name])
        altered(tmp_path / CONTENT, bytes_of(tmp_path / CONTENT, name)[0])
        with pytest.raises(FileFormatError, match="was altered"):
            tensors[name]


# -- an old registry goes on ----------------------------------------------------------------------


def test_formats_live_side_by_side_and_old_members_leave(old: Registry, tmp_path: Path) -> None:
    """Whoever comes into an old registry is known by the rounded form, as all others are."""
    backbone = old.path / BACKBONE
    assert identity(backbone) == file_sha256(backbone) == old.state.fixed[BACKBONE]
    own = old.contribution("ben")
    old.add(turned(own, "fay", vector=1.5), GOLDEN / "eve")
    kinds = {client: m.files[CONTENT].startswith(HEADER) for client, m in old.state.members.items()}
    assert kinds == {"ada": False, "ben": False, "cho": False, "eve": False, "fay": True}
    assert not any(m.rounded_sha256.startswith(TENSORS) for m in old.state.members.values())
    assert not failing(old)
    left = Path(shutil.copytree(old.path / "clients" / "ben", tmp_path / "ben"))
    rounded = old.member("ben").rounded_sha256
    record = old.remove("ben")
    assert record.removed_rounded_sha256 == rounded
    assert not failing(old) and not failing(old, old.path / record.place)
    shutil.move(left, old.path / "left over")  # a copy of files of format 1
    found = {f.claim: f for f in verify_record(old.path / record.place, registry=old)}
    assert found[GONE].holds is False and CONTENT in found[GONE].detail
    assert found[VECTOR].holds is False


def test_who_left_an_old_registry_does_not_come_back_under_another_name(
    old: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ben = Path(shutil.copytree(old.path / "clients" / "ben", tmp_path / "ben"))
    copy = turned(Contribution.open(ben), "fay")
    with pytest.raises(ContributionError, match="byte for byte, the task vector of 'ben'"):
        old.add(copy)
    record = old.path / old.remove("ben").place
    with pytest.raises(ContributionError, match="the task vector of 'ben'"):
        old.add(copy)  # in format 2
    doubled = dict(copy.task_vector.tensors)
    halved = {n: t * (0.5 if n.endswith("/A") else 2) for n, t in doubled.items()}
    with pytest.raises(ContributionError, match="the task vector of 'ben'"):
        old.add(replace(copy, task_vector=replace(copy.task_vector, tensors=halved)))
    monkeypatch.setattr(Removed, "refuse", lambda *_: None)
    old.add(copy)
    assert VECTOR in failing(old, record)


def test_an_old_version_is_recognised_in_what_this_one_writes(old: Registry) -> None:
    for name, stated in old.state.files.items():
        path = old.path / old.state.version / name
        if path.suffix == ".safetensors":
            assert old_sha256(path) == stated == identity(path)


def test_a_journal_of_a_machine_that_rounded_otherwise_is_read(old: Registry) -> None:
    before = old.state.sequence
    rewrite_line(old.path, before, lambda details: {**details, "rounded": {"ada": "0" * 64}})
    ada = next(s for s in stays_in(Registry(old.path).entries()) if s.client == "ada")
    assert ada.rounded[-1] == ada.values["rounded_sha256"] == "0" * 64 != ada.rounded[0]


# -- a new one ------------------------------------------------------------------------------------


def test_whoever_comes_into_a_new_registry_is_known_by_the_tensors(tmp_path: Path) -> None:
    registry = three_clients(tmp_path / "registry")
    for own in one_of_each_kind():
        known = registry.member(own.client).rounded_sha256
        assert known == own.task_vector.sha256  # of tensors in memory
        assert known == registry.contribution(own.client).task_vector.sha256  # of the header
        assert known.startswith(TENSORS) and known != NOTHING


def test_a_copy_that_is_left_over_is_found_by_its_header(tmp_path: Path) -> None:
    registry = three_clients(tmp_path / "registry")
    left = Path(shutil.copytree(registry.path / "clients" / "ben", tmp_path / "ben"))
    record = registry.path / registry.remove("ben").place
    assert not failing(registry, record)
    (left / "card.json").unlink()
    shutil.move(left, registry.path / "left over")
    altered(registry.path / "left over" / CONTENT, -1)  # even so
    assert GONE in failing(registry, record)
