"""Runs of the real ServerApp and ClientApp over an in-process Grid, small enough for a test."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
from flwr.app import Context, Message, RecordDict
from in_process_grid import InProcessGrid
from markupsafe import Markup
from sklearn.datasets import load_digits
from torch import Tensor

from clients.app import app as client_app
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.run import BackboneConfig
from fedcompo.data import client_data, decoding
from fedcompo.data.catalogue import Catalogue
from fedcompo.data.draws import Indices
from fedcompo.messages.records import from_record, to_record
from fedcompo.method.images import Images
from fedcompo.report import drawing
from fedcompo.report.pictures import Facts
from server.app import app as server_app

TRAINING, TEST = 40, 8
"""Images a class: most of a run's time goes into measuring."""


def few_digits(folder: Path) -> Path:
    """Write some of the handwritten digits as an npz file, which simulated clients share."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.concatenate([np.flatnonzero(labels == d)[: TRAINING + TEST] for d in range(10)])
    split = np.tile([0] * TRAINING + [1] * TEST, 10)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    path = folder / "few_digits.npz"
    names = np.array([str(digit) for digit in range(10)])
    np.savez(path, images=pixels[chosen], labels=labels[chosen], split=split, names=names)
    return path


def two_blocks(folder: Path) -> Path:
    """Write the first two of the embedded backbone's six blocks as timm would: a third of the time.

    They are pre-trained weights like any; `embedded` itself runs in the engine's tests.
    """
    assets = resources.files("fedcompo") / "assets"
    recipe = json.loads((assets / "glyph_vit.json").read_text())
    recipe["model_args"]["depth"] = 2
    recipe["pretrained_cfg"] |= {
        "num_classes": 0,
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }
    keys = ("architecture", "model_args", "pretrained_cfg")
    (folder / "config.json").write_text(json.dumps({key: recipe[key] for key in keys}))
    weights = safetensors.torch.load((assets / "glyph_vit.safetensors").read_bytes())
    kept = {
        n: w
        for n, w in weights.items()
        if not n.startswith(tuple(f"blocks.{i}." for i in range(2, 6)))
    }
    safetensors.torch.save_file(kept, folder / "model.safetensors")
    return folder


FEW_WEIGHTS = "blocks.0.mlp.fc1.weight,blocks.1.attn.proj.weight"
"""Of the attention and of the perceptron one each: a Fisher of all 24 weights takes seconds."""
ALL_WEIGHTS = BackboneConfig().target_weights
_FOLDER = tempfile.TemporaryDirectory(prefix="fedcompo-tests-")
BACKBONE = BackboneConfig(
    backbone=f"local-dir:{two_blocks(Path(_FOLDER.name))}", target_weights=FEW_WEIGHTS
)
QUICK = {
    "data": f"npz:{few_digits(Path(_FOLDER.name))}",
    "num-tasks": 3,
    "num-classes": 6,
    "images-per-class": 12,
    "local-epochs": 1,
    "batch-size": 8,  # the first step from a head of zeros moves no weight of the backbone
    "local-steps": 0,
    "rank": 2,
    "backbone": BACKBONE.backbone,
    "target-weights": FEW_WEIGHTS,
    "fisher-examples": 8,
    "mixture-components": 1,
    "align-samples": 16,
    "timeout": 60.0,
    "num-clients": 3,
}


_DECODED: dict[tuple[object, ...], tuple[Images, Images, Facts]] = {}


def _decode(
    catalogue: Catalogue,
    train: Sequence[Indices],
    test: Sequence[Indices],
    preprocessing: Preprocessing,
    *,
    client: str,
    cache: Path | None,
) -> tuple[Images, Images, Facts]:
    """Decode images once for all messages and runs, which takes a third of a run."""
    chosen, kept = np.concatenate([*train, *test]), sum(map(len, train))
    name = decoding.Reader(catalogue, chosen, client, preprocessing, kept).name
    key = (name, client, cache, decoding.IN_MEMORY, decoding.QUICK)
    if not name or key not in _DECODED:
        found = decoding.decode(catalogue, train, test, preprocessing, client=client, cache=cache)
        if not name or not isinstance(found[0], Tensor):
            return found
        _DECODED[key] = found
    return _DECODED[key]


def run(grid_options: dict, output: Path, **settings) -> dict:
    """Run the apps in this process; returns what ``results.json`` holds.

    Args:
        grid_options: Of :class:`InProcessGrid`, and ``clients``.
        output: Folder of the results.
        settings: Run config that differs from :data:`QUICK`, with underscores.
    """
    config = {**QUICK, **{k.replace("_", "-"): v for k, v in settings.items()}}
    config["output"] = str(output)
    clients = grid_options.pop("clients", 3)
    grid = InProcessGrid(client_app, config, clients, **grid_options)
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config)
    )
    with (
        mock.patch.object(drawing, "drawn", return_value=Markup()),  # takes half a second a run
        mock.patch.object(client_data, "decode", _decode),
    ):
        server_app(grid, context)
    return json.loads((output / "results.json").read_text())


def altered(change) -> object:
    """Tamper with a reply: ``change(tensors, manifest)`` edits in place; the digests stay right."""

    def tamper(reply: Message) -> Message:
        expected = reply.metadata.message_type.rpartition(".")[2]
        tensors, manifest = from_record(reply.content, expected=expected, source="test")
        change(tensors, manifest)
        reply.content = to_record(tensors, manifest)
        return reply

    return tamper
