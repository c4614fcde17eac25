"""The Fisher of layers whose rows are not the batch's examples, against one example at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from builders import normal, rng
from timm.models.hieradet_sam2 import HieraDet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from fedcompo.config.choices import FisherForm
from fedcompo.errors import BackboneError
from fedcompo.privacy.fisher import private_fisher
from fedcompo.training.fisher_estimate import directions, estimate_fisher

IMAGES = normal(3, 3, 32, 32, seed=1)
SAM = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2, 2)}


def sam() -> nn.Module:
    """One block of four windows, padded; one that attends to all."""
    options = {"window_size": 3, "global_attn_indexes": (1,), "global_pool": "avg"}
    return VisionTransformerSAM(**SAM, **options, neck_chans=0, num_classes=0)


def hiera() -> nn.Module:
    options = {"stages": (1, 1, 2, 1), "window_spec": (4, 2, 2, 2), "global_att_blocks": (3,)}
    return HieraDet(embed_dim=8, **options, num_classes=0)


def swin(kind: type[nn.Module] = SwinTransformer) -> nn.Module:
    return kind(**SWIN, num_heads=(2, 2), num_classes=0)


def far_from_trivial(model: nn.Module) -> nn.Module:
    generator = rng(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.2 if parameter.ndim > 1 else 0.1) * noise)
    return model.double().eval()


def linear_weights(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("build", [sam, hiera, swin])
def test_windows_in_the_batch_add_to_the_gradient_of_their_own_image(build):
    model = far_from_trivial(build())
    names, parameters = linear_weights(model), dict(model.named_parameters())
    drawn = directions(model(IMAGES).detach(), rng(3))
    found, _ = estimate_fisher(model, [IMAGES], names, generator=rng(3))
    factors, _ = estimate_fisher(
        model, [IMAGES], names, generator=rng(3), form=FisherForm.KRONECKER
    )
    rows = [
        torch.autograd.grad(model(image[None])[0] @ z, [parameters[name] for name in names])
        for image, z in zip(IMAGES, drawn, strict=True)
    ]
    for name, alone in zip(names, zip(*rows, strict=True), strict=True):
        assert float(sum(g.abs().sum() for g in alone)) > 0
        expected = {
            name: sum(g.square() for g in alone),
            f"{name}/left": sum(g @ g.T for g in alone),
            f"{name}/right": sum(g.T @ g for g in alone),
        }
        for key, wanted in expected.items():
            actual = (found.sums | factors.sums)[key]
            atol = 1e-10 * float(wanted.abs().max())
            torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=atol)


class Toy(nn.Module):
    """A linear layer on four tokens of each image, in the rows that it is told."""

    def __init__(self, to_rows: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]):
        super().__init__()
        self.layer, self.to_rows, self.back = nn.Linear(5, 3).double(), to_rows, back

    def forward(self, images: Tensor) -> Tensor:
        return self.back(self.layer(self.to_rows(images))).tanh().sum(1)


TOKENS = normal(6, 4, 5, seed=4)


def interleaved() -> Toy:
    """Token 0 of all images, then token 1 of all, and so on."""
    return Toy(
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y: y.unflatten(0, (4, -1)).transpose(0, 1),
    )


def sequence_first() -> Toy:
    return Toy(lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1))


def backwards() -> Toy:
    return Toy(lambda x: x.flip(0), lambda y: y.flip(0))


def whole_batch() -> Toy:
    """Each image sees the mean over the batch."""
    return Toy(lambda x: x, lambda y: y + y.mean(0))


def one_row_more() -> Toy:
    """A row that is no image's, as a token of a register shared by all."""
    return Toy(
        lambda x: torch.cat([x.flatten(0, 1), x.new_ones(1, 5)]),
        lambda y: y[:-1].unflatten(0, (-1, 4)) + y[-1],
    )


class Twice(Toy):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + super().forward(images.flip(1))


def twice() -> Toy:
    return Twice(lambda x: x, lambda y: y)


REFUSED = pytest.mark.parametrize(
    ("build", "why"),
    [
        (interleaved, "mixes the rows of several examples"),
        (sequence_first, "mixes the rows of several examples"),
        (backwards, "mixes the rows of several examples"),
        (whole_batch, "mixes the rows of several examples"),
        (one_row_more, "has 9 rows for 2 examples"),
        (twice, "is called more than once"),
    ],
)


@REFUSED
def test_a_layer_whose_rows_are_another_examples_is_refused_by_name(build, why):
    model = build()
    with pytest.raises(BackboneError, match=f"'layer.weight' {why}.*`target-weights`"):
        estimate_fisher(model, [TOKENS], ["layer.weight"])
    with pytest.raises(BackboneError, match=f"'layer.weight' {why}"):
        private_fisher(model, [TOKENS], ["layer.weight"], factored=True, clip=1.0, noise=1.0)
    assert not model.layer._forward_hooks


def test_tokens_of_an_image_in_rows_that_follow_each_other_are_its_own():
    folded = Toy(lambda x: x.flatten(0, 1), lambda y: y.unflatten(0, (-1, 4)))
    plain = Toy(lambda x: x, lambda y: y)
    plain.load_state_dict(folded.state_dict())
    found, expected = (
        estimate_fisher(model, [TOKENS], ["layer.weight"], generator=rng(5))[0].sums
        for model in (folded, plain)
    )
    torch.testing.assert_close(found["layer.weight"], expected["layer.weight"])


def test_a_single_image_owns_all_rows_in_whatever_order():
    model, plain = interleaved(), Toy(lambda x: x, lambda y: y)
    plain.load_state_dict(model.state_dict())
    found, expected = (
        estimate_fisher(each, TOKENS.split(1), ["layer.weight"], generator=rng(6))[0].sums
        for each in (model, plain)
    )
    torch.testing.assert_close(found["layer.weight"], expected["layer.weight"])


def test_a_table_of_positions_is_no_examples_and_is_refused():
    model = far_from_trivial(swin(SwinTransformerV2))
    names = [name for name in linear_weights(model) if "cpb_mlp" in name][:1]
    with pytest.raises(BackboneError, match="cpb_mlp"):
        estimate_fisher(model, [IMAGES], names)


def test_an_activation_in_place_does_not_overwrite_what_is_recorded():
    def mlp(inplace: bool) -> nn.Sequential:
        steps = [nn.Linear(5, 6), nn.ReLU(inplace), nn.Linear(6, 6), nn.ReLU(inplace)]
        return far_from_trivial(nn.Sequential(*steps, nn.Linear(6, 3)))

    overwriting, plain = mlp(True), mlp(False)
    plain.load_state_dict(overwriting.state_dict())
    names = linear_weights(plain)
    found, expected = (
        estimate_fisher(model, [normal(6, 5, seed=7)], names, generator=rng(8))[0].sums
        for model in (overwriting, plain)
    )
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0)
