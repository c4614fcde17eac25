"""Changes need memory for a few weights a thread, however large the model is."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from builders import PATTERNS, PICO_ARGS, contribution, random_head, random_sums
from failing_disk import PATIENCE
from timm.models.vision_transformer import VisionTransformer

from fedcompo.backbone.backbone import Backbone, target_weights
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind
from fedcompo.registry.registry import Registry
from fedcompo.runtime import peak_bytes, reset_peak
from fedcompo.storage import tensorfile

PROCESSES = multiprocessing.get_context("spawn")  # which reads the allocator's options
WIDTH, DEPTH = 192, 16
LARGEST = 8 * WIDTH * 4 * WIDTH
"""Bytes of the largest weight, as whole numbers of 64 bits."""


def wide_backbone() -> Backbone:
    """27 MB in 64 target weights."""
    args = {**PICO_ARGS, "embed_dim": WIDTH, "depth": DEPTH, "mlp_ratio": 4}
    model = VisionTransformer(**args).eval().requires_grad_(False)
    return Backbone(
        model=model,
        theta_0=target_weights(model, PATTERNS),
        name="wide",
        fingerprint=f"wide@{tensorfile.tensor_digest(model.state_dict())}",
        preprocessing=Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,)),
        architecture="vit_tiny_patch16_224",
        classifier="head",
        model_args={key: value for key, value in args.items() if key != "num_classes"},
    )


def prepare(folder: Path) -> None:
    """A registry, and folders of two clients to add to it."""
    backbone = wide_backbone()
    Registry.create(folder / "registry", backbone, CompositionSettings())
    for seed, client in enumerate(("ada", "ben")):
        made = contribution(
            client,
            Kind.FULL,
            theta_0=backbone.theta_0,
            base=backbone.fingerprint,
            seed=seed,
            with_fisher=False,
        )
        statistics = random_sums(made.head.classes, WIDTH, seed=seed)
        head = random_head(made.head.classes, WIDTH, seed=seed)
        small = {name: delta / 10 for name, delta in made.task_vector.tensors.items()}
        vector = replace(made.task_vector, tensors=small)
        replace(made, task_vector=vector, head=head, statistics=statistics).save(folder / client)


def measure(folder: Path, weights: float) -> None:
    """Exit with an error if a step took more than so many of the largest weights."""
    prepare(folder)
    registry = Registry(folder / "registry")
    steps = {
        "first": lambda: registry.add(folder / "ada"),  # loads what is used for the first time
        "add": lambda: registry.add(folder / "ben"),
        "replace": lambda: registry.add(folder / "ben", replacing=True),
        "compose": lambda: [None for _ in registry.pool().stream(registry.backbone.tensors)],
        "read": lambda: [None for _ in registry.composed().values()],
        "remove": lambda: registry.remove("ada"),
    }
    for name, step in steps.items():
        reset_peak()
        before = peak_bytes()["resident"]
        step()
        taken = (peak_bytes()["resident"] - before) / LARGEST
        assert name == "first" or taken <= weights, f"{name} took {taken:.1f} weights"


def test_a_change_takes_a_few_weights_of_memory(tmp_path, monkeypatch):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not tell how much memory a step took")
    model = DEPTH * 12 * WIDTH**2 * 4
    assert model > 23 * LARGEST
    for option in ("MMAP", "TRIM"):  # what is freed is gone: the allocator keeps none of it
        monkeypatch.setenv(f"MALLOC_{option}_THRESHOLD_", str(1 << 16))
    process = PROCESSES.Process(target=measure, args=(tmp_path, 16))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
