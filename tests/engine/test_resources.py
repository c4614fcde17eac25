"""How a machine is shared among the clients."""

from __future__ import annotations

import pytest

from fedcompo.engine import resources
from fedcompo.errors import ConfigError


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_cpus", lambda: 16)
    monkeypatch.setattr(resources, "_gpus", lambda: 0)


def with_gpus(gpus: int, clients: int, device: str, **share: float) -> resources.Resources:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "_gpus", lambda: gpus)
        return resources.fair_resources(clients, device, **share)


@pytest.mark.parametrize(
    ("clients", "gpus", "share"),
    [(5, 0, 0.0), (5, 1, 0.2), (3, 1, 0.3333), (3, 2, 0.5), (1, 4, 1.0), (100, 1, 0.125)],
)
def test_clients_share_the_gpus_evenly(clients: int, gpus: int, share: float) -> None:
    found = with_gpus(gpus, clients, "auto")
    assert found.gpus_per_client == share
    assert found.federation(clients)["client-resources-num-cpus"] == 1


def test_as_many_clients_run_at_a_time_as_fit_on_the_gpus() -> None:
    for clients in range(1, 40):
        for gpus in range(1, 9):
            share = with_gpus(gpus, clients, "cuda").gpus_per_client
            at_once = gpus * int(1 / share)
            assert at_once >= min(clients, 16, gpus * resources.CLIENTS_PER_GPU)


def test_ray_gets_no_more_cpus_than_the_clients_can_use() -> None:
    assert resources.fair_resources(3, "cpu").cpus == 3
    assert resources.fair_resources(100, "cpu").cpus == 16


def test_of_very_many_clients_few_are_asked_at_a_time() -> None:
    assert resources.fair_resources(128, "cpu").in_flight(128) == 0
    assert resources.fair_resources(1000, "cpu").in_flight(1000) == 128


def test_a_run_on_the_cpu_takes_no_gpu() -> None:
    assert with_gpus(2, 3, "cpu").gpus_per_client == 0


def test_what_the_machine_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="GPUs"):
        with_gpus(0, 3, "auto", gpus_per_client=0.5)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
        with_gpus(2, 3, "cuda:1")


def test_the_federation_is_what_flower_calls_it() -> None:
    assert resources.Resources(0.25, 8).federation(5) == {
        "num-supernodes": 5,
        "client-resources-num-cpus": 1,
        "client-resources-num-gpus": 0.25,
        "init-args-num-cpus": 8,
    }
