"""The clients of ``server_memory.py``: answers of the right names and shapes, with random values.

Reads a JSON line ``[message type, client]``, writes the answer to a file, prints the file's path.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from registry_workload import RANK
from safetensors.torch import save_file
from torch import Tensor

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.config.choices import FisherForm, Kind
from fedcompo.config.run import BackboneConfig
from fedcompo.messages.answers import FisherAnswer
from fedcompo.messages.body import Body
from fedcompo.method.contribution import statistics_entry
from fedcompo.method.deltas import rank_of, stored_shapes
from fedcompo.method.statistics import FeatureSums
from fedcompo.runtime import installed_versions
from fedcompo.storage.tensorfile import to_bytes

NUM_EXAMPLES = 20
ARCHITECTURES = {"vit-b": "vit_base_patch16_224", "tiny": "vit_tiny_patch16_224"}


def checkpoint(folder: Path, scale: str) -> dict[str, Any]:
    """Settings of a backbone with random weights, made once."""
    architecture = ARCHITECTURES[scale]
    file = folder / f"{scale}.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        model = timm.create_model(architecture, num_classes=0)
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, file)
    return {"backbone": architecture, "checkpoint": str(file)}


class Clients:
    """All clients; each owns two classes of its own."""

    def __init__(self, about: dict[str, Any]) -> None:
        file = checkpoint(Path(about["folder"]), about["scale"])
        config = BackboneConfig(str(file["backbone"]), str(file["checkpoint"]))
        self.backbone: Backbone = load_backbone(config)
        self.kind, self.work = Kind(about["kind"]), Path(about["work"])
        self.everyone = [self.classes(i) for i in range(about["clients"])]

    def classes(self, client: int) -> list[str]:
        return [f"{client:04d}-a", f"{client:04d}-b"]

    def answer(self, message: str, client: int) -> Path:
        path = self.work / "answer"
        if message == "size":
            with path.open("wb") as file:
                np.save(file, np.array(self.num_weights))
        elif message == "model":
            np.random.default_rng(client).random(self.num_weights, np.float32).tofile(path)
        else:
            content = message.rpartition(".")[2]
            tensors, entries = getattr(self, content)(client)
            about = {
                "content": content,
                "client": f"client-{client:04d}",
                "base": self.backbone.fingerprint,
                "classes": self.classes(client),
                "peak_memory": {},
                "versions": installed_versions(),
            }
            path.write_bytes(to_bytes(tensors, {**about, **entries}))
        return path

    @property
    def num_weights(self) -> int:
        return sum(weight.numel() for weight in self.backbone.theta_0.values())

    def identify(self, client: int) -> Body:
        return {}, {"num_examples": NUM_EXAMPLES, "num_test_examples": 1}

    def describe(self, client: int) -> Body:
        generator = torch.Generator().manual_seed(client)
        features = torch.randn(NUM_EXAMPLES, self.backbone.num_features, generator=generator)
        classes = tuple(self.classes(client))
        sums = FeatureSums.of(features, torch.arange(NUM_EXAMPLES) % len(classes), classes)
        fisher = FisherAnswer(
            base=self.backbone.fingerprint,
            client=f"client-{client:04d}",
            classes=classes,
            num_examples=NUM_EXAMPLES,
            form=FisherForm.NONE,
            report={},
            tensors={},
        )
        entries = {**self.identify(client)[1], **statistics_entry(sums), "kind": ""}
        return sums.tensors(), entries | {"fisher": fisher.to_body()[1]}

    def train(self, client: int) -> Body:
        generator, tensors = torch.Generator().manual_seed(client), dict[str, Tensor]()
        for name, weight in self.backbone.theta_0.items():
            rank = rank_of(name, RANK) if self.kind is Kind.LORA else 0
            for parameter, shape in stored_shapes(self.kind, weight).items():
                size = tuple(rank if side is None else side for side in shape)
                values = torch.empty(size).normal_(0, 1e-3, generator=generator)
                tensors[f"task_vector/{name}/{parameter}"] = values
        width = self.backbone.num_features
        head = {"head/weight": torch.zeros(2, width), "head/bias": torch.zeros(2)}
        figures = dict.fromkeys(
            ("own_task_accuracy", "frozen_class_il_accuracy", "frozen_task_il_accuracy"), 0.5
        )
        return tensors | head, {"kind": str(self.kind), "losses": [1.0], "holds": {}, **figures}

    def evaluate(self, client: int) -> Body:
        return {}, {"class_il_accuracy": 0.5, "task_il_accuracy": 0.5}


def main() -> None:
    clients = Clients(json.loads(sys.argv[1]))
    for line in sys.stdin:
        print(clients.answer(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
