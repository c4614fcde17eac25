"""What leaves a client with its Fisher."""

from __future__ import annotations

import pytest
import torch
from builders import pico_backbone, pixels

from clients.outgoing import fisher_of
from fedcompo.config.choices import Wire
from fedcompo.config.run import RunConfig
from fedcompo.messages.answers import FisherAnswer
from fedcompo.messages.wire import decode
from fedcompo.method.fisher import INPUTS, FisherDiagonal
from fedcompo.training.probing import fisher_of_images
from server.exchange.checks import checked_fisher

BACKBONE = pico_backbone()
IMAGES = pixels(6, 1, 8)
WHO = {"client": "ada", "base": BACKBONE.fingerprint, "classes": ("cat",)}


def answer(**settings: object) -> FisherAnswer:
    config = RunConfig.parse(settings)
    return fisher_of(BACKBONE, None, IMAGES, config, who=WHO)


def arrived(sent: FisherAnswer, wire: str) -> FisherDiagonal:
    tensors = decode(sent.tensors, Wire(wire), source="ada")
    fisher = checked_fisher("ada", FisherAnswer(**{**vars(sent), "tensors": tensors}), BACKBONE)
    assert fisher is not None
    return fisher


@pytest.mark.parametrize("form", ["dense", "kronecker", "factored"])
@pytest.mark.parametrize(("wire", "error"), [("float32", 0), ("bfloat16", 4e-3), ("int8", 5e-2)])
def test_squares_of_inputs_arrive_with_a_fisher_of_any_form_and_wire(form, wire, error):
    config = RunConfig()
    meant, _ = fisher_of_images(BACKBONE, IMAGES, config.fisher, seed=config.seed, owner="ada")
    fisher = arrived(answer(**{"fisher-form": form, "wire": wire}), wire)
    assert fisher.inputs.keys() == {f"{name}{INPUTS}" for name in BACKBONE.theta_0}
    for name, expected in meant.inputs.items():
        apart = (fisher.inputs[name] - expected).abs().max()
        assert apart <= error * expected.max()


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_under_noise_squares_of_inputs_stay_where_they_are(form):
    sent = answer(**{"fisher-form": form, "dp-noise": 1.0})
    assert not [name for name in sent.tensors if INPUTS in name]
    assert not arrived(sent, "bfloat16").inputs
    assert torch.cat([t.flatten() for t in sent.tensors.values()]).isfinite().all()


def test_with_no_fisher_nothing_is_sent():
    assert not answer(**{"fisher-form": "none"}).tensors
