"""Clients whose contribution is a sum of shards: one leaves exactly, and comes back alone."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from unittest import mock

import pytest
from app_runs import altered, run
from cli_runs import run as command
from cli_runs import told
from deployed_federation import TWO, digits_as_folders
from in_process_grid import lost

from fedcompo.config.run import RunConfig
from fedcompo.engine import in_process
from fedcompo.errors import ConfigError, TooFewClients
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.verification import verify_registry

A, B = TWO
MEMBERS = tuple(f"{client}.shard-{shard}" for client in (A, B) for shard in (0, 1))
GONE = f"{A}.shard-1"
SETTINGS = {"shards": 2, "anchor": "own", "scale": 1.0, "realign": False, "num_clients": 2}


def hospitals(folder: Path) -> dict[int, dict]:
    """The nodes of two hospitals; of the first, a table says who the patients are."""
    digits_as_folders(folder, TWO, training=10, test=4)
    files = sorted((folder / A).rglob("*.png"))
    lines = ["path,label,split,group"]
    for number, file in enumerate(files):
        place = file.relative_to(folder / A)
        lines.append(f"{place},{place.parts[1]},{place.parts[0]},patient-{number % 12}")
    (folder / A / "scans.csv").write_text("\n".join(lines) + "\n")
    return nodes_of(folder)


def nodes_of(folder: Path) -> dict[int, dict]:
    """The nodes whose data and state lie in a folder."""
    data = {A: folder / A / "scans.csv", B: folder / B}
    return {
        i: {"client": c, "data": str(d), "state": str(folder / "state" / c), "min-images": 3}
        for i, (c, d) in enumerate(data.items())
    }


def federate(nodes, output: Path, **settings) -> dict:
    options = {"clients": 2, "names": dict(enumerate(TWO)), "node_configs": nodes}
    return run(options, output, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run; its folder, its results, and all that the clients sent."""
    folder = tmp_path_factory.mktemp("shards")
    sent, answer = [], in_process.InProcessGrid.answer

    def recorded(grid, message, partition):
        reply = answer(grid, message, partition)
        sent.extend(a.data for r in reply.content.array_records.values() for a in r.values())
        return reply

    with mock.patch.object(in_process.InProcessGrid, "answer", recorded):
        results = federate(hospitals(folder / "data"), folder / "run")
    return folder, results, sent


def mapped(folder: Path) -> list[list[str]]:
    (file,) = (folder / "data/state" / A / "shards").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    with file.open(newline="") as opened:
        return list(csv.reader(opened))[1:]


def files_of(registry: Registry, *but: str) -> dict:
    return {m.client: dict(m.files) for m in registry.state.members.values() if m.client not in but}


def leaks(sent: list[bytes], samples: list[list[str]]) -> bool:
    """Whether a message names an image or a patient."""
    words = {word.encode() for row in samples for word in (*row[1:], Path(row[1]).name) if word}
    return any(word in message for word in words for message in sent)


def test_a_client_is_measured_once_and_each_shard_is_a_member(finished):
    folder, results, _ = finished
    assert Registry(folder / "run/registry").clients == MEMBERS
    evaluated = {c: f["num_test_examples"] for c, f in results["per_client"].items()}
    assert evaluated == {MEMBERS[0]: 12, MEMBERS[1]: None, MEMBERS[2]: 12, MEMBERS[3]: None}
    assert results["clients_evaluated"] == [MEMBERS[0], MEMBERS[2]]
    assert sum(count for *_, count in results["confusion"]["counts"]) == 24
    assert all(not f["lineage"]["anchored_by"] for f in results["per_client"].values())


def test_the_map_never_leaves_the_client(finished):
    folder, _, sent = finished
    samples = mapped(folder)
    assert len(samples) == 30
    assert not leaks(sent, samples)
    for word in samples[0][1:]:  # it would be found
        assert leaks([*sent, f'{{"told": "{word}"}}'.encode()], samples)


def test_a_removed_shard_leaves_the_registry_of_one_that_never_was(finished, tmp_path):
    folder, _, _ = finished
    registry = Registry(shutil.copytree(folder / "run/registry", tmp_path / "r", symlinks=True))
    before = files_of(registry, GONE)
    never = federate(hospitals(tmp_path / "data"), tmp_path / "never", exclude=GONE)
    assert registry.state.root != never["registry"]["root"]
    out = command("remove", GONE, "--yes", "--registry", str(registry.path)).stdout
    assert f"Removed {GONE}" in out
    registry.refresh()
    assert registry.state.root == never["registry"]["root"]
    assert files_of(registry) == before == files_of(Registry(tmp_path / "never/registry"))
    (receipt,) = (registry.path / "removals").glob("*.json")
    assert RemovalRecord.parse(receipt.read_bytes(), source="x").client == GONE
    assert all(f.holds for f in verify_record(receipt, registry=registry))


def test_the_shard_comes_back_without_the_patient_and_nobody_else_trains(finished, tmp_path):
    folder, _, _ = finished
    shutil.copytree(folder, tmp_path / "x", symlinks=True)
    folder = tmp_path / "x"
    registry = Registry(folder / "run/registry")
    samples = mapped(folder)
    patient = next(group for where, _, group in samples if where == "1")
    alike = [row for row in samples if row[2] == patient]
    assert {where for where, *_ in alike} == {"1"}  # the patient is in one shard
    first = registry.member(GONE).files
    registry.remove(GONE, requested_by=patient)
    others = files_of(registry)
    table = folder / "data" / A / "scans.csv"
    table.write_text("".join(x for x in table.open() if not x.endswith(f",{patient}\n")))
    nodes = nodes_of(folder / "data")
    for _, sample, _ in alike:
        (folder / "data" / A / sample).unlink()
    results = federate(nodes, tmp_path / "again", registry=str(registry.path), min_clients=1)
    assert results["registry"]["joined"] == [GONE]
    registry.refresh()
    assert registry.clients == MEMBERS
    assert files_of(registry, GONE) == others
    assert registry.member(GONE).files != first
    assert registry.member(GONE).num_examples == len(
        [row for row in samples if row[0] == "1" and row not in alike]
    )
    assert mapped(folder) == [row for row in samples if row not in alike]
    assert all(f.holds is not False for f in verify_registry(registry.path))


def test_a_client_leaves_with_all_its_shards_and_is_listed_by_them(finished, tmp_path):
    folder, _, _ = finished
    registry = Registry(shutil.copytree(folder / "run/registry", tmp_path / "r", symlinks=True))
    listing = command("list", "--registry", str(registry.path)).stdout
    assert f"Shards of {A}: 0, 1." in listing
    assert len(told("remove", A, "--yes", "--registry", str(registry.path))) == 2
    receipts = sorted((registry.path / "removals").glob("*.json"))
    gone = [RemovalRecord.parse(file.read_bytes(), source="x").client for file in receipts]
    assert gone == list(MEMBERS[:2])
    registry.refresh()
    assert registry.clients == MEMBERS[2:]


def test_two_shards_are_one_client_and_no_node_answers_for_anothers(tmp_path):
    """A node that claims another's shard takes both out; the two shards that are left are one."""
    posing = altered(lambda _, manifest: manifest.update(client="client-0.shard-1"))
    with pytest.raises(TooFewClients, match="1 usable client") as stopped:
        run({"tamper": {(2, "query.describe"): posing}}, tmp_path / "o", shards=2)
    said = str(stopped.value)
    assert "'client-0.shard-1', and was asked as shard 0" in said
    assert said.count("Two nodes call themselves 'client-0'") == 3
    assert "client-1" not in said


def test_a_node_has_time_for_each_of_its_shards(tmp_path):
    """All requests leave at once, and it answers one after the other."""
    silent = {"clients": 1, "tamper": {(0, "query.describe"): lost}}
    with pytest.raises(TooFewClients, match=r"no answer within 0\.4 s"):
        run(silent, tmp_path / "o", shards=2, timeout=0.2, num_clients=1, min_clients=1)


def test_no_client_bears_the_name_of_a_shard(tmp_path):
    names = {0: "client-0", 1: "client-0.shard-1", 2: "client-2"}
    with pytest.raises(TooFewClients, match="names a shard of the client 'client-0'"):
        run({"names": names}, tmp_path / "o", min_clients=3)


def test_other_shards_than_the_registrys_are_refused(finished, tmp_path):
    folder, _, _ = finished
    registry = shutil.copytree(folder / "run/registry", tmp_path / "r", symlinks=True)
    for shards, fault in ((3, "with `shards` = 2, and this run sets 3"), (1, "count twice")):
        with pytest.raises(TooFewClients, match=fault):
            federate(
                nodes_of(folder / "data"),
                tmp_path / f"o{shards}",
                registry=str(registry),
                shards=shards,
                exclude=B,
            )


def test_too_many_shards_end_the_run_before_training(tmp_path):
    with pytest.raises(TooFewClients, match="`shards` is 13, and the client's images allow 12"):
        run({"clients": 1}, tmp_path / "o", shards=13, aside=0.0, num_clients=1, min_clients=1)
    assert '"train"' not in (tmp_path / "o/events.jsonl").read_text().partition("phase-started")[2]


@pytest.mark.parametrize(
    "settings",
    [{"shards": 0}, {"shards": 1001}, {"shards": 2, "schedule": "sequential"}]
    + [{"shards": 2, "method": method} for method in ("fedavg", "fedprox")],
)
def test_settings_that_no_shard_goes_with_are_refused(settings):
    with pytest.raises(ConfigError, match="shards"):
        RunConfig.parse(settings)


def test_shards_train_in_rounds_too(tmp_path):
    """IEL: what is said of when a client comes and goes is said of its shards."""
    results = run(
        {"clients": 2},
        tmp_path / "o",
        num_clients=2,
        num_tasks=2,
        num_classes=4,
        images_per_class=4,
        shards=2,
        method="iel",
        num_server_rounds=2,
        anchor="own",
        min_clients=1,
        joins="client-0:2",
        leaves="client-1:1",
        realign=False,
    )
    first, second = results["rounds"]
    assert first["trained"] == first["went"] == ["client-1.shard-0", "client-1.shard-1"]
    assert second["came"] == second["members"] == ["client-0.shard-0", "client-0.shard-1"]
    assert not [note for note in results["notes"] if "never came" in note]
    assert results["clients_evaluated"] == ["client-0.shard-0"]
