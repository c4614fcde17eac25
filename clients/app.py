"""The ClientApp: leaves each request to :mod:`clients.work`, which is loaded with the first.

Flower loads the app where it only passes messages on, too. There torch is not needed; and where it
is, a simulation loads it before the first request (:mod:`clients.preload`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()

QUERIES = ("identify", "describe", "fisher", "notice", "realign", "vote")


def _on(asked: str) -> Callable[[Message, Context], Message]:
    def answer(message: Message, context: Context) -> Message:
        return import_module("clients.work").answer(asked, message, context)

    return answer


app.train()(_on("train"))
app.evaluate()(_on("evaluate"))
for query in QUERIES:
    app.query(query)(_on(f"query.{query}"))
