"""The table of who may do what, call by call."""

from __future__ import annotations

import re
from unittest import mock

import pytest
from registry_builders import member, three_clients
from service_runs import (
    chunks_of,
    client_of,
    code_of,
    credential,
    offer_of,
    saved,
    served,
    stub_of,
    unchanged,
)

from fedcompo.errors import ContributionError
from fedcompo.service import access, certificates
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.access import Audience
from fedcompo.service.refusals import Code
from fedcompo.service.server import Settings
from fedcompo.storage.files import CARD

ANSWERED = {"List": wire.ListRequest(), "Verify": wire.VerifyRequest()}


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


@pytest.mark.parametrize("target", ["ben", "nobody", "../ben", "ADA"])
def test_a_client_neither_fetches_nor_removes_another(registry, target):
    with served(registry) as address, stub_of(address, "ada") as stub, unchanged(registry):
        for call in (
            lambda: stub.Fetch(wire.FetchRequest(client=target), timeout=60),
            lambda: stub.Remove(wire.RemoveRequest(client=target), timeout=60),
        ):
            assert code_of(call) is Code.PERMISSION_DENIED


@pytest.mark.parametrize("operator", [False, True])
def test_nobody_publishes_in_another_name(registry, tmp_path, operator, caplog):
    folder = saved(member("ben", seed=9), tmp_path / "forged")
    with (
        served(registry) as address,
        unchanged(registry),
        stub_of(address, "eve", operator=operator) as stub,
    ):
        parts = [offer_of(folder, replace=True), *chunks_of(folder)]
        call = lambda: stub.Publish(iter(parts), timeout=60)  # noqa: E731
        assert code_of(call) is Code.PERMISSION_DENIED
    (line,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("refused"))
    assert '"PERMISSION_DENIED"' in line
    assert re.search(r'"peer": "eve \((client|operator), certificate SHA-256 [0-9a-f]{64}\)"', line)
    assert not list((tmp_path / ".registry.service").rglob(CARD))


def test_a_name_on_the_card_alone_is_no_way_around(registry, tmp_path):
    """The card says eve, as the certificate does; the tensors say ben."""
    folder = saved(member("ben", seed=9), tmp_path / "forged")
    card = (folder / CARD).read_text().replace('"client": "ben"', '"client": "eve"')
    (folder / CARD).write_text(card)
    with served(registry) as address, unchanged(registry), stub_of(address, "eve") as stub:
        parts = [offer_of(folder, replace=True), *chunks_of(folder)]
        assert code_of(lambda: stub.Publish(iter(parts), timeout=60)) is Code.INVALID_ARGUMENT


def test_an_operator_fetches_and_removes_any(registry, tmp_path):
    with served(registry) as address, client_of(address, "olga", operator=True) as client:
        client.fetch(tmp_path / "ben", "ben")
        client.remove("ben", reason="asked by telephone")
    registry.refresh()
    assert registry.clients == ("ada", "cho")


def test_an_operator_that_is_no_client_has_nothing_of_its_own(registry):
    with served(registry) as address, stub_of(address, "olga", operator=True) as stub:
        assert code_of(lambda: stub.Fetch(wire.FetchRequest(), timeout=60)) is Code.NOT_FOUND
        assert code_of(lambda: stub.Remove(wire.RemoveRequest(), timeout=60)) is Code.NOT_FOUND


MAY_COMPOSE = {
    Audience.MEMBERS: {"ada": True, "stranger": False, "olga": True},
    Audience.OPERATORS: {"ada": False, "stranger": False, "olga": True},
}


@pytest.mark.parametrize("audience", Audience)
def test_the_audience_decides_who_composes(registry, audience):
    with served(registry, audience=audience) as address:
        for name, allowed in MAY_COMPOSE[audience].items():
            with stub_of(address, name, operator=name == "olga") as stub:
                call = stub.Compose(wire.ComposeRequest(), timeout=60)
                if allowed:
                    assert list(call)
                else:
                    assert code_of(lambda c=call: c) is Code.PERMISSION_DENIED


REQUESTS = {
    "everyone": ({}, True),
    "itself": ({"only": ["ada"]}, True),
    "itself and one other": ({"only": ["ada", "ben"]}, False),
    "one other": ({"only": ["ben"]}, False),
    "two others": ({"only": ["ben", "cho"]}, True),
    "two others with weights": ({"weights": {"ben": 0.5, "cho": 0.5}}, True),
    "itself and two": ({"weights": {"ada": 0.8, "ben": 0.1, "cho": 0.1}}, True),
    "one that hides behind a tiny weight": ({"weights": {"ben": 0.999, "cho": 0.001}}, False),
    "one that hides behind nothing": ({"weights": {"ben": 1.0, "cho": 0.0}}, False),
    "one that hides behind the caller": ({"weights": {"ada": 0.5, "ben": 0.5, "cho": 0.0}}, False),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_model_for_a_member_holds_so_many_others(registry, what):
    request, allowed = REQUESTS[what]
    with served(registry, least=2) as address:
        for name, may in (("ada", allowed), ("olga", True)):
            with stub_of(address, name, operator=name == "olga") as stub:
                call = stub.Compose(wire.ComposeRequest(**request), timeout=60)
                if may:
                    assert list(call)
                else:
                    assert code_of(lambda c=call: c) is Code.PERMISSION_DENIED


def test_operators_alone_compose_unless_it_is_said_otherwise(registry):
    assert Settings(registry.path, b"", credential("ada")).audience is Audience.OPERATORS


def test_who_has_left_composes_no_more(registry):
    with served(registry) as address, stub_of(address, "ben") as stub:
        assert list(stub.Compose(wire.ComposeRequest(), timeout=60))
        stub.Remove(wire.RemoveRequest(), timeout=60)
        call = stub.Compose(wire.ComposeRequest(), timeout=60)
        assert code_of(lambda: call) is Code.PERMISSION_DENIED


@pytest.mark.parametrize("method", ANSWERED)
def test_everyone_who_is_vouched_for_lists_and_verifies(registry, method):
    with served(registry) as address, stub_of(address, "stranger") as stub:
        assert getattr(stub, method)(ANSWERED[method], timeout=60)


def test_the_table_names_every_method():
    table = access.__doc__ or ""
    service = wire.DESCRIPTOR.services_by_name["Registry"]
    assert all(re.search(rf"^.*\b{method.name}\b.* ", table, re.M) for method in service.methods)


SHARDS = "ada.shard-0", "ada.shard-1"


def test_what_is_a_clients_own_are_its_shards_and_none_that_looks_alike():
    ada = access.Peer("ada", False, "")
    for own in ("ada", *SHARDS, "ada.shard-12"):
        access.require_owner(ada, own, "remove")
        access.require_named(ada, own)
    others = "ada2.shard-0", "ada.shard-01", "ada.shard-l", "ada.shard-0.shard-1", "Ada.shard-0"
    for other in (*others, "x.ada.shard-0", "ada.task-1.shard-0", ".shard-0", "ada.shard-0 "):
        with pytest.raises(access.Refused):
            access.require_owner(ada, other, "remove")
        with pytest.raises(access.Refused):
            access.require_named(ada, other)


def test_shards_of_one_client_are_one_other():
    ben = access.Peer("ben", False, "")
    access.require_audience(access.Peer("ada", False, ""), Audience.MEMBERS, SHARDS)
    with pytest.raises(access.Refused):
        access.require_many(ben, [*SHARDS, "ben"], None, 2)
    access.require_many(ben, [*SHARDS, "cho"], None, 2)
    uneven = {SHARDS[0]: 1.0, SHARDS[1]: 1.0, "cho": 1.0}  # each has a third, ada two
    with pytest.raises(access.Refused):
        access.require_many(ben, uneven, uneven, 2)


def test_no_certificate_bears_the_name_of_a_shard(registry):
    """Nobody is let in as the shard of another."""
    with pytest.raises(ContributionError, match="names a shard"):
        credential(SHARDS[0])
    with mock.patch.object(certificates, "check_whole"):  # another authority's tool issues it
        credential(SHARDS[0])
    with served(registry) as address, unchanged(registry), stub_of(address, SHARDS[0]) as stub:
        call = lambda: stub.Remove(wire.RemoveRequest(), timeout=60)  # noqa: E731
        assert code_of(call) is Code.UNAUTHENTICATED
