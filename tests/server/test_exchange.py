"""Requests and answers: how many are under way, how long one waits, who is booked for what."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from app_runs import QUICK
from flwr.app import Message
from in_process_grid import InProcessGrid, lost

from clients.app import app as client_app
from fedcompo.errors import ContributionError, TooFewClients
from fedcompo.messages.body import Body
from server.exchange.books import Books, Traffic
from server.exchange.exchange import Exchange
from server.exchange.nodes import Nodes

IDENTIFY = "query.identify"
FOUR = {**QUICK, "num-tasks": 4, "num-classes": 8}


class SlowGrid(InProcessGrid):
    """Answers are there some seconds after they were asked for; counts those under way."""

    def __init__(self, *arguments: object, delay: float = 0.0, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.delay, self.departed = delay, {}
        self.most = 0
        """Requests that were under way at a time."""
        self.times = []
        """When requests departed."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = super().push_messages(messages)
        self.times.append(time.monotonic())
        self.departed |= dict.fromkeys(ids, self.times[-1])
        self.most = max(self.most, len(self.departed))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        due = [i for i in message_ids if time.monotonic() >= self.departed[i] + self.delay]
        replies = super().pull_messages(due)
        for message_id in due[: len(replies)]:
            del self.departed[message_id]
        return replies


def connected(
    tmp_path: Path, clients: int = 4, *, in_flight: int = 0, timeout: float = 60.0, **options
) -> tuple[Exchange, SlowGrid]:
    grid = SlowGrid(client_app, FOUR, clients, **options)
    books = Books(tmp_path / "events.jsonl")
    exchange = Exchange(books, Nodes(grid), timeout, 1, in_flight)
    exchange.gather(clients)
    return exchange, grid


def name_of(client: str, body: Body) -> str:
    return str(body[1]["client"])


def identify(exchange: Exchange, **options) -> list[str]:
    """Ask everyone who they are; returns names in the order in which they were folded in."""
    order = []

    def fold(client: str, body: Body) -> str:
        order.append(name_of(client, body))
        return order[-1]

    exchange.ask("identify", IDENTIFY, lambda client: ({}, {}), fold, decisive=False, **options)
    return order


def events(exchange: Exchange) -> list[dict]:
    return [json.loads(line) for line in exchange.books.events.read_text().splitlines()]


@pytest.mark.parametrize(("in_flight", "most"), [(0, 4), (1, 1), (3, 3), (9, 4)])
def test_no_more_requests_are_under_way_than_allowed(tmp_path, in_flight, most):
    exchange, grid = connected(tmp_path, in_flight=in_flight)
    assert sorted(identify(exchange)) == [f"client-{i}" for i in range(4)]
    assert (grid.most, grid.largest_backlog) == (most, most)
    assert grid.departed == {}


def test_one_request_at_a_time_is_made_only_when_its_turn_has_come(tmp_path):
    """What the server sends is made from what it knows then: memory holds one at a time."""
    exchange, _ = connected(tmp_path, in_flight=1)
    log = []

    def request(client: str) -> Body:
        log.append("made")
        return {}, {}

    def fold(client: str, body: Body) -> str:
        log.append("folded")
        return name_of(client, body)

    exchange.ask("identify", IDENTIFY, request, fold)
    assert log == ["made", "folded"] * 4


def test_the_time_of_an_answer_runs_from_its_own_requests_departure(tmp_path):
    """Four answers of 0.5 s, one after the other: each within 1.5 s, though not all together."""
    exchange, _ = connected(tmp_path, in_flight=1, timeout=1.5, delay=0.5)
    assert len(identify(exchange)) == 4
    assert exchange.books.left_out == []


def test_an_answer_that_never_comes_holds_its_place_until_its_time_is_over(tmp_path):
    tamper = {(i, IDENTIFY): lost for i in (0, 1)}
    exchange, grid = connected(tmp_path, in_flight=2, timeout=0.5, tamper=tamper)
    assert sorted(identify(exchange)) == ["client-2", "client-3"]
    assert [left.reason for left in exchange.books.left_out] == ["no answer within 0.5 s"] * 2
    first, _, third, _ = grid.times
    assert third - first >= 0.5  # when the first was given up, and not before


def test_who_may_miss_a_phase_stays_in_the_run(tmp_path):
    exchange, _ = connected(tmp_path)
    identify(exchange)
    exchange.books.part = "round 2"

    def fold(client: str, body: Body) -> str:
        if client == "client-1":
            raise ContributionError("it makes no sense")
        return client

    exchange.ask("identify", IDENTIFY, lambda c: ({}, {}), fold, may_miss=True)
    (missed,) = exchange.books.missed
    assert (missed.client, missed.phase) == ("client-1", "identify, round 2")
    assert missed.reason == "it makes no sense"
    assert "client-1" in exchange.clients
    assert exchange.books.left_out == []
    (told,) = [e for e in events(exchange) if e.get("status") == "missed"]
    assert (told["client"], told["phase"], told["part"]) == ("client-1", "identify", "round 2")


def test_the_books_add_up_what_is_asked_twice(tmp_path):
    exchange, _ = connected(tmp_path)
    identify(exchange)
    once, seconds = dict(exchange.books.traffic["identify"]), exchange.books.seconds["identify"]
    identify(exchange, clients=["client-2"])
    twice = exchange.books.traffic["identify"]
    assert twice.keys() == once.keys()
    assert twice["client-1"] == once["client-1"]
    assert twice["client-2"].bytes_received == 2 * once["client-2"].bytes_received
    assert exchange.books.seconds["identify"] > seconds
    assert Traffic(1, 2, 3.0) + Traffic(10, 20, 30.0) == Traffic(11, 22, 33.0)


def test_too_few_are_named_whether_left_out_or_missing(tmp_path):
    exchange, _ = connected(tmp_path)
    identify(exchange)
    exchange.min_clients = 3
    exchange.leave_out("features", "client-0", "it is late")
    exchange.books.part = "round 1"
    exchange.books.miss("train", "client-1", "it is tired")
    exchange.require_clients("train")  # three are still in the run
    with pytest.raises(TooFewClients) as caught:
        exchange.require_clients("train", ["client-2", "client-3"])
    assert str(caught.value) == (
        "2 usable client(s) after the phase 'train', `min-clients` is 3. Left out:\n"
        "  - client-0 (features): it is late\n"
        "  - client-1 (train, round 1): it is tired"
    )


# -- who comes and goes -----------------------------------------------------------------------


def test_who_waits_for_clients_says_for_how_many_and_how_long(tmp_path, caplog):
    there = {0}
    grid = SlowGrid(client_app, FOUR, 3, present=lambda i: i in there)
    exchange = Exchange(Books(tmp_path / "events.jsonl"), Nodes(grid), 1.0, 1)
    with caplog.at_level(logging.INFO, "flwr"):
        exchange.gather(3)
    assert "1 of 3 client(s) are connected; waiting at most 1 s for the others" in caplog.messages
    there |= {1, 2}
    caplog.clear()
    exchange.gather(3)
    assert not [said for said in caplog.messages if "waiting" in said]


def test_a_second_look_finds_who_came_and_who_went(tmp_path):
    there = {0, 1}
    exchange, _ = connected(tmp_path, 2, present=lambda i: i in there)
    identify(exchange)
    assert exchange.nodes.look_again() == ((), ())
    there.remove(1)
    assert exchange.nodes.look_again() == ((), ("client-1",))
    assert exchange.clients == ("client-0",)
    there.add(1)  # under the same id: it was out of reach
    assert exchange.nodes.look_again() == (("node 1001",), ())
    assert exchange.nodes.look_again() == ((), ())


def test_a_node_that_restarts_is_gone_and_new_at_once(tmp_path):
    ids = Counter({1: 0})
    exchange, _ = connected(tmp_path, 2, node_of=lambda i: 1000 + i + ids[i])
    identify(exchange)
    ids[1] = 500
    assert exchange.nodes.look_again() == (("node 1501",), ("client-1",))


def test_who_was_left_out_is_not_taken_up_again_unless_it_is_to_be_looked_at_anew(tmp_path):
    exchange, _ = connected(tmp_path, 2)
    identify(exchange)
    exchange.nodes.look_anew("client-1")
    for client in ("client-0", "client-1"):
        exchange.leave_out("identify", client, "not now")
    assert exchange.nodes.look_again() == (("node 1001",), ())


def test_who_refuses_before_it_has_said_who_it_is_goes_by_the_name_it_knows(tmp_path):
    wrong = {"kind": "nonsense"}
    own = {0: wrong, 1: {"client": "ben", **wrong}, 2: {"client": "a\nb", **wrong}, 3: {}}
    own[4] = {"client": "client-3", **wrong}  # another's name
    exchange, _ = connected(tmp_path, 5, node_configs=own)
    identify(exchange)
    assert exchange.clients == ("client-3",)
    called = [left.client for left in exchange.books.left_out]
    assert called == ["client-0", "ben", "node 1002", "node 1004"]


def test_who_fails_before_it_has_said_who_it_is_has_its_registered_name(tmp_path):
    tamper = {(1, IDENTIFY): lost}
    exchange, _ = connected(tmp_path, 2, timeout=0.5, names={0: "ada", 1: "ben"}, tamper=tamper)
    identify(exchange)
    assert [left.client for left in exchange.books.left_out] == ["ben"]
