"""Runs of the real ServerApp and ClientApp over an in-process Grid, small enough for a test."""

from __future__ import annotations

import functools
import json
import tempfile
from importlib import resources
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
from flwr.app import Context, Message, RecordDict
from in_process_grid import InProcessGrid
from markupsafe import Markup
from sklearn.datasets import load_digits

from clients import loading
from clients.app import app as client_app
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.data import DataConfig
from fedcompo.config.run import BackboneConfig
from fedcompo.data import client_data
from fedcompo.data.client_data import ClientData
from fedcompo.messages.records import from_record, to_record
from fedcompo.report import drawing
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


@functools.lru_cache(maxsize=64)
def _decoded(
    files: tuple[tuple[str, int, int], ...],
    config: DataConfig,
    preprocessing: Preprocessing,
    partition: int,
    seed: int,
    cache: Path,
) -> ClientData:
    return client_data.load_client_data(
        config, preprocessing, partition=partition, seed=seed, cache=cache
    )


def _load_client_data(
    config: DataConfig, preprocessing: Preprocessing, *, partition: int, seed: int, cache: Path
) -> ClientData:
    """Decode images once for all messages and runs, which takes a third of a run."""
    folder = Path(config.data.partition(":")[2])
    paths = sorted((folder, *folder.rglob("*")) if folder.exists() else ())
    seen = tuple((str(p), (about := p.stat()).st_mtime_ns, about.st_size) for p in paths)
    return _decoded(seen, config, preprocessing, partition, seed, cache)


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
        mock.patch.object(loading, "load_client_data", _load_client_data),
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
