"""Measures a composition's accuracy on the clients' images, where these are on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.data import DataConfig
from fedcompo.config.presets import IMPORTED
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData, client_names, load_client_data
from fedcompo.errors import DataError, FedcompoError
from fedcompo.export.selection import from_registry
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head
from fedcompo.registry.reader import RegistryReader
from fedcompo.report.confusion import interval
from fedcompo.report.progress import step
from fedcompo.training.accuracy import Accuracy, accuracy_of

Figures = dict[str, dict[str, Any]]
"""By client: ``class_il_accuracy`` and its ``interval``, ``task_il_accuracy``, ``num_examples``."""


def run_config_of(registry: RegistryReader, data: str | None = None) -> RunConfig:
    """Return the settings that the registry's clients were trained with, perhaps with other data.

    Raises:
        DataError: If the registry has no members, and so no settings; or no data is named and they
            were imported.
        ConfigError: If the settings cannot be used.
    """
    if not registry.clients:
        raise DataError("Nobody is in the registry, so nothing can be evaluated.")
    settings = dict(registry.contribution(registry.clients[0]).settings)
    if not data and f"{IMPORTED}from" in settings:
        raise DataError(
            f"{registry.clients[0]} was imported, and imports do not say where their images are. "
            "Name them by `--data folder:<path>`: a folder a client, in it test/<class>/*."
        )
    return RunConfig.stored({**settings, **({"data": data} if data else {})})


def clients_data(
    source: DataConfig, backbone: Backbone, *, seed: int, wanted: tuple[str, ...] = ()
) -> Iterator[ClientData]:
    """Load the images of one client after the other, as in a simulation.

    Args:
        source: The data set, and how it is dealt.
        backbone: Says what images must look like.
        seed: Seed of the run that dealt them.
        wanted: Names of the clients; empty: all.

    Raises:
        DataError: If the source cannot be used.
    """
    for partition, name in enumerate(client_names(source)):
        if not wanted or name in wanted:
            yield load_client_data(source, backbone.preprocessing, partition=partition, seed=seed)


def figures_of(accuracies: Mapping[str, Accuracy]) -> Figures:
    """Accuracies by client as JSON values."""
    return {
        client: {
            "class_il_accuracy": accuracy.class_il,
            "interval": interval(accuracy.class_il, accuracy.num_examples),
            "task_il_accuracy": accuracy.task_il,
            "num_examples": accuracy.num_examples,
        }
        for client, accuracy in accuracies.items()
    }


def evaluate_clients(
    backbone: Backbone,
    theta: Mapping[str, Tensor],
    head: Head,
    config: RunConfig,
    *,
    linearised: bool = False,
    wanted: tuple[str, ...] = (),
) -> dict[str, Accuracy]:
    """Measure a composition on every client's test images, by client.

    A client whose classes the head does not have is left out.

    Args:
        backbone: Pre-trained weights.
        theta: Composed target weights, by name.
        head: Joint head.
        config: Says which images.
        linearised: Whether the weights are composed of tangents.
        wanted: Names of the clients; empty: all.

    Raises:
        DataError: If the images cannot be had, or belong to none of the head's classes.
    """
    found: dict[str, Accuracy] = {}
    weights: Weights = dict(theta)
    for data in clients_data(config.data, backbone, seed=config.seed, wanted=wanted):
        if set(data.classes) <= set(head.classes):
            step(f"evaluating on {data.name}")
            found[data.name] = accuracy_of(
                backbone, weights, head, data.classes, data.test, linearised=linearised
            )
    if not found:
        raise DataError(
            f"`data` {config.data.data!r} has no client whose classes the model knows: it knows "
            f"{', '.join(head.classes)}. Name the data that the clients were trained on."
        )
    return found


def effect_of_removal(
    registry: RegistryReader, clients: Sequence[str], data: str | None
) -> dict[str, Any]:
    """Measure what removing some clients would do to accuracy; changes nothing.

    Returns:
        Figures ``before`` and ``after`` by client; or the ``reason`` why there are none.
    """
    try:
        config = run_config_of(registry, data)
        backbone = registry.backbone.load()
        step("evaluating the composition as it is")
        measured = partial(evaluate_clients, config=config, linearised=registry.linearised)
        before = measured(backbone, registry.theta_p(), registry.joint_head())
        after: Mapping[str, Accuracy] = {}
        if {*registry.clients} != {*clients}:
            step("composing without them")
            others = from_registry(registry, without=tuple(clients))
            after = measured(backbone, dict(others.stream()), others.head)
    except FedcompoError as error:
        return {"reason": str(error)}
    return {"before": figures_of(before), "after": figures_of(after)}
