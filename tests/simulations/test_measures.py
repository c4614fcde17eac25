"""The heads of clients side by side: what the comparison puts on composed weights."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch
from builders import random_head

sys.path.append(str(Path(__file__).resolve().parents[2] / "simulations" / "compare"))
measures = import_module("measures")


def test_heads_side_by_side_keep_the_rows_of_their_owners():
    a, b = random_head(("cat", "owl"), 4, seed=1), random_head(("dog",), 4, seed=5)
    joint = measures.side_by_side(
        [(a, dict.fromkeys(a.classes, 3)), (b, dict.fromkeys(b.classes, 90))], ("cat", "dog", "owl")
    )
    assert joint.classes == ("cat", "dog", "owl")
    assert torch.equal(joint.weight, torch.stack([a.weight[0], b.weight[0], a.weight[1]]))
    assert torch.equal(joint.bias, torch.stack([a.bias[0], b.bias[0], a.bias[1]]))


def test_rows_of_a_shared_class_are_averaged_by_examples():
    a, b = random_head(("cat", "dog"), 4, seed=1), random_head(("dog",), 4, seed=5)
    joint = measures.side_by_side(
        [(a, dict.fromkeys(a.classes, 30)), (b, dict.fromkeys(b.classes, 10))], ("cat", "dog")
    )
    expected = 0.75 * a.weight[1].double() + 0.25 * b.weight[0].double()
    torch.testing.assert_close(joint.weight[1], expected.float())
    torch.testing.assert_close(joint.bias[1], 0.75 * a.bias[1] + 0.25 * b.bias[0])
    assert torch.equal(joint.weight[0], a.weight[0])
