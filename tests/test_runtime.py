"""Work in threads: results and errors come in the order of items, whoever is first."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from registry_builders import QUICK, one_of_each_kind, registry_of

from fedcompo import runtime
from fedcompo.composition.models import stream_composition
from fedcompo.registry.rederivation import recomposed
from fedcompo.runtime import in_order


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(runtime, "workers", lambda: request.param)
    monkeypatch.setattr(runtime, "SOON", 0.0)
    return request.param


def test_results_come_in_order_and_few_are_begun_before_their_turn(threads):
    begun, used = [], set()

    def work(item):
        begun.append(item)
        used.add(threading.get_ident())
        time.sleep(0.002 * (item % 3))
        return item * item

    for place, result in enumerate(in_order(work, range(30))):
        assert result == place * place
        assert len(begun) <= place + 1 + 2 * threads
    assert len(used - {threading.get_ident()}) == (threads if threads > 1 else 0)


def test_what_is_soon_done_is_done_by_the_caller(monkeypatch):
    monkeypatch.setattr(runtime, "workers", lambda: 3)
    monkeypatch.setattr(runtime, "SOON", 60.0)
    assert {*in_order(lambda _: threading.get_ident(), range(9))} == {threading.get_ident()}


def test_torch_has_one_thread_meanwhile_and_its_own_afterwards(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(in_order(lambda _: torch.get_num_threads(), range(9))) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_torch_has_one_thread_in_each_whatever_other_threads_set_meanwhile(threads):
    before, asked = torch.get_num_threads(), threading.Event()

    def used(item):
        assert not item or asked.wait(10)
        return torch.get_num_threads() if item else 1

    results = in_order(used, range(9 if threads > 1 else 1))
    try:
        assert next(results) == 1
        other = threading.Thread(target=torch.set_num_threads, args=(2,))
        other.start()
        other.join()
        asked.set()
        assert {*results} <= {1}
    finally:
        torch.set_num_threads(before)


def test_the_error_is_that_of_the_first_item_and_no_more_is_begun(threads):
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.02 if item == 4 else 0)
        if item >= 4:
            raise ValueError(f"item {item}")
        return item

    with pytest.raises(ValueError, match="item 4"):
        list(in_order(work, range(100)))
    assert len(begun) <= 5 + 2 * threads


def test_who_stops_asking_leaves_no_thread_behind(threads):
    results = in_order(lambda item: item, range(1000))
    assert next(results) == 0
    results.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("fedcompo")]


@pytest.mark.parametrize("rule", ["mean", "ties:density=0.2", "dare", "tsv-m"])
def test_a_composition_has_the_same_bits_for_any_number_of_threads(rule, tmp_path, monkeypatch):
    made = []
    for count in (1, 3):
        monkeypatch.setattr(runtime, "workers", lambda count=count: count)
        settings = replace(QUICK, rule=rule)
        registry = registry_of(tmp_path / str(count), *one_of_each_kind(), settings=settings)
        assert recomposed(registry).holds is not False
        streamed = stream_composition(registry.pool(), registry.backbone, None, settings)
        bits = {name: tensor.numpy().tobytes() for name, tensor in streamed}
        made.append((registry.factor, registry.state.members, registry.state.root, bits))
    assert made[0] == made[1]
