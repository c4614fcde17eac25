"""What a request brings, and what a client is left to remember."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import normal, pico_weights, random_head, random_like, task_vector
from torch import Tensor

from clients.given import Given
from clients.store import Store
from fedcompo.config.choices import Kind
from fedcompo.errors import FileFormatError
from fedcompo.method.heads import head_tensors
from fedcompo.storage.tensorfile import prefixed, tensor_digest
from fedcompo.training.fit import Course

THETA_0 = pico_weights(dtype=torch.float32)
CLASSES = ("cat", "dog")
VECTOR = task_vector(Kind.LORA, THETA_0, seed=1, base="pico@0")
HEAD = random_head(CLASSES, 3, seed=2)
ANCHOR = prefixed("weights", random_like(THETA_0, seed=3, positive=True)) | {
    "head/weight": normal(2, 3, seed=4).square(),
    "head/bias": normal(2, seed=5).square(),
}
OWN = prefixed("task_vector", VECTOR.tensors) | head_tensors(HEAD)
REST = random_like(THETA_0, seed=6)
DIGESTS = {"anchor": tensor_digest(ANCHOR), "own": tensor_digest(OWN)}
REQUEST = {
    "kind": "lora",
    "needs": DIGESTS,
    "ensemble": {"share": 0.25, "scale": 2.0},
    "course": {"passed": 0.5, "share": 0.5},
}
ALL = prefixed("anchor", ANCHOR) | prefixed("own", OWN) | prefixed("rest", REST)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.of(tmp_path, "ab", "ann")


def read(
    tensors: Mapping[str, Tensor], request: Mapping[str, Any], store: Store | None = None
) -> Given:
    return Given.read(tensors, request, store, base="pico@0", classes=CLASSES, beta=7.0)


def assert_whole(given: Given) -> None:
    """All that was sent is there, bit for bit."""
    assert given.lacks == ()
    assert {n: t.tolist() for n, t in given.course.anchor.weights.items()} == {
        n: ANCHOR[f"weights/{n}"].tolist() for n in THETA_0
    }
    assert torch.equal(given.course.anchor.head_weight, ANCHOR["head/weight"])
    assert torch.equal(given.course.anchor.head_bias, ANCHOR["head/bias"])
    begin = given.course.begin
    assert (begin.kind, begin.base) == (Kind.LORA, "pico@0")
    assert {n: t.tolist() for n, t in begin.tensors.items()} == {
        n: t.tolist() for n, t in VECTOR.tensors.items()
    }
    assert (given.course.passed, given.course.share) == (0.5, 0.5)
    assert given.course.head.classes == CLASSES
    assert torch.equal(given.course.head.weight, HEAD.weight)
    ensemble = given.course.ensemble
    assert (ensemble.share, ensemble.scale, ensemble.beta) == (0.25, 2.0, 7.0)
    assert all(torch.equal(ensemble.rest[n], REST[n]) for n in THETA_0)


def test_what_comes_along_is_used_and_kept_for_the_next_time(store):
    first = read(ALL, REQUEST, store)
    assert_whole(first)
    assert first.holds == DIGESTS
    again = read(prefixed("rest", REST), REQUEST, store)
    assert_whole(again)
    assert again.holds == DIGESTS


def test_what_neither_came_nor_was_kept_is_named(store):
    rest = prefixed("rest", REST)
    assert read(rest, REQUEST, store).lacks == ("anchor", "own")
    assert read(rest, REQUEST, None).lacks == ("anchor", "own")
    read(ALL, REQUEST, store)
    stale = {**REQUEST, "needs": {**DIGESTS, "own": "00" * 32}}
    assert read(rest, stale, store).lacks == ("own",)


def test_without_a_store_or_where_none_can_be_written_nothing_is_claimed_to_be_held(tmp_path):
    (tmp_path / "file").write_text("no folder")
    nowhere = Store.of(tmp_path / "file", "ab", "ann")
    given = read(ALL, REQUEST, nowhere)
    assert_whole(given)
    assert given.holds == {}


def test_a_request_of_one_who_trains_alone_brings_an_anchor_or_nothing():
    anchored = read(prefixed("anchor", ANCHOR), {"kind": "full", "needs": {"anchor": ""}})
    assert anchored.course.anchor is not None
    assert replace(anchored.course, anchor=None) == Course()
    assert read({}, {"kind": "full", "needs": {}}) == Given()


@pytest.mark.parametrize("name", ["../own", "/etc/own", "theta"])
def test_a_server_cannot_have_a_client_keep_what_it_likes(store, name):
    with pytest.raises(FileFormatError, match="expected anchor or own"):
        read({f"{name}/a": torch.zeros(1)}, {"kind": "full", "needs": {name: "00"}}, store)
    assert not store.folder.exists()
