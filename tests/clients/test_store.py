"""What a client keeps between rounds: found again by its digest, or not at all."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import altered, normal, pico_weights, random_head, random_like, task_vector

from clients.store import HOME, Store, completed, store_home
from fedcompo.config.choices import Kind
from fedcompo.errors import FileFormatError
from fedcompo.messages.requests import ANCHOR, OWN, TrainRequest, own_tensors
from fedcompo.storage.digests import content_digest

TENSORS = {"task_vector/a": normal(3, 2, seed=1), "head/bias": torch.zeros(0)}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.of(tmp_path, "0f" * 16, "hospital-a")


def files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_what_is_kept_is_recalled_bit_for_bit_by_its_digest(store):
    digest = store.keep("own", TENSORS)
    assert digest == content_digest(TENSORS)
    recalled = store.recall("own", digest)
    assert recalled.keys() == TENSORS.keys()
    assert all(torch.equal(recalled[name], tensor) for name, tensor in TENSORS.items())


def test_what_is_others_or_altered_or_gone_is_not_recalled(store):
    digest = store.keep("own", TENSORS)
    assert store.recall("anchor", digest) is None
    assert store.recall("own", "00" * 32) is None
    other = store.keep("own", {"a": normal(2, seed=2)})
    assert store.recall("own", digest) is None
    assert store.recall("own", other) is not None
    altered(store.folder / "own.safetensors", -1)
    assert store.recall("own", other) is None
    store.clear()
    assert store.recall("own", other) is None


def test_what_was_recalled_stays_good_when_another_takes_its_place(store):
    recalled = store.recall("own", store.keep("own", TENSORS))
    store.keep("own", {name: tensor + 1 for name, tensor in TENSORS.items()})
    store.clear()
    assert all(torch.equal(recalled[name], tensor) for name, tensor in TENSORS.items())


def test_clients_and_federations_keep_apart(tmp_path):
    stores = [Store.of(tmp_path, "ab", "ann"), Store.of(tmp_path, "ab", "ben")]
    stores.append(Store.of(tmp_path, "cd", "ann"))
    kept = [store.keep("own", {"a": normal(2, seed=i)}) for i, store in enumerate(stores)]
    stores[0].clear()
    assert stores[0].recall("own", kept[0]) is None
    assert all(s.recall("own", d) for s, d in zip(stores[1:], kept[1:], strict=True))
    for store in stores:
        store.clear()
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_may_look_into_a_store(store):
    store.keep("own", TENSORS)
    assert stat.S_IMODE(store.folder.stat().st_mode) & 0o077 == 0


def test_a_store_that_cannot_be_written_keeps_nothing_and_breaks_nothing(tmp_path):
    (tmp_path / "file").write_text("no folder")
    store = Store.of(tmp_path / "file", "ab", "ann")
    assert store.keep("own", TENSORS) == ""
    assert store.recall("own", content_digest(TENSORS)) is None
    store.clear()
    assert files(tmp_path) == ["file"]


@pytest.mark.parametrize("federation", ["", "..", "../up", "/etc", "a/b", "a.b"])
def test_a_server_cannot_lead_a_store_out_of_its_home(tmp_path, federation):
    with pytest.raises(FileFormatError, match="letters and digits"):
        Store.of(tmp_path, federation, "ann")


def test_its_home_is_what_the_node_states_then_the_environment_then_the_users_own(monkeypatch):
    monkeypatch.setenv(HOME, "/from/environment")
    assert store_home("/stated") == Path("/stated")
    assert store_home() == Path("/from/environment")
    monkeypatch.delenv(HOME)
    assert store_home() == Path.home() / ".local" / "state" / "fedcompo"
    assert store_home("~/mine") == Path.home() / "mine"


# -- what a request leaves the client to keep --------------------------------------------------

THETA_0 = pico_weights(dtype=torch.float32)
HEAD = random_head(("cat", "dog"), 3, seed=2)
VECTOR = task_vector(Kind.LORA, THETA_0, seed=1, base="pico@0")
SENT = {
    ANCHOR: random_like(THETA_0, seed=3, positive=True),
    OWN: own_tensors(VECTOR.tensors, HEAD),
}
DIGESTS = {name: content_digest(tensors) for name, tensors in SENT.items()}
BARE = TrainRequest(joint=HEAD, kind=Kind.LORA, frozen=False, needs=DIGESTS)
WHOLE = replace(BARE, sent=SENT)


def test_what_comes_along_is_used_and_kept_for_the_next_time(store):
    assert completed(WHOLE, store) == (WHOLE, DIGESTS)
    again, holds = completed(BARE, store)
    assert (again.lacks, holds) == ((), DIGESTS)
    for name, tensors in SENT.items():
        assert again.sent[name].keys() == tensors.keys()
        assert all(torch.equal(again.sent[name][n], tensors[n]) for n in tensors)


def test_what_neither_came_nor_was_kept_is_lacking(store):
    assert completed(BARE, store)[0].lacks == (ANCHOR, OWN)
    assert completed(BARE, None)[0].lacks == (ANCHOR, OWN)
    completed(WHOLE, store)
    stale = replace(BARE, needs={**DIGESTS, OWN: "00" * 32})
    assert completed(stale, store)[0].lacks == (OWN,)


def test_where_nothing_can_be_written_nothing_is_claimed_to_be_held(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert completed(WHOLE, Store.of(tmp_path / "file", "ab", "ann")) == (WHOLE, {})


def test_a_request_of_one_who_trains_alone_is_complete_and_leaves_nothing_to_keep():
    alone = replace(WHOLE, needs={ANCHOR: ""}, sent={ANCHOR: SENT[ANCHOR]})
    assert completed(alone, None) == (alone, {})
