"""The Fisher diagonal against sums over examples, features and classes, one at a time."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from builders import normal, pico_model, rng
from torch import Tensor, nn
from torch.func import functional_call

from fedcompo.backbone.backbone import target_weights
from fedcompo.config.choices import Curvature, FisherForm
from fedcompo.config.run import BackboneConfig
from fedcompo.errors import BackboneError
from fedcompo.method.deltas import Weights
from fedcompo.method.fisher import FisherDiagonal, expanded
from fedcompo.method.heads import Head
from fedcompo.method.kronecker import whole
from fedcompo.training import fisher_estimate, per_example
from fedcompo.training.fisher_estimate import FisherReport, curvature_factors, estimate_fisher

FEATURES = 8
FEW, MANY = 5, 11
"""Classes: fewer and more than features."""
IMAGES = normal(6, 1, 8, 8, seed=1)
NAMES = tuple(target_weights(pico_model(), BackboneConfig().target_weights))


def head(classes: int) -> Head:
    names = tuple(f"class-{index}" for index in range(classes))
    return Head(names, normal(classes, FEATURES, seed=2, scale=0.7), normal(classes, seed=3))


def estimate(
    classes: int = FEW, *, batch: int = 6, **options: object
) -> tuple[FisherDiagonal, FisherReport]:
    options = {"curvature": Curvature.EXACT, "head": head(classes), **options}
    return estimate_fisher(pico_model(), IMAGES.split(batch), NAMES, **options)


@functools.cache
def brute_force(classes: int) -> Weights:
    """Oracle: F = sum over x and c of p_c (d log p_c)², one class of one example at a time."""
    model = pico_model()
    own = dict(model.named_parameters())
    parameters = {name: own[name].detach() for name in NAMES}
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def log_p(parameters: Weights, image: Tensor, c: int) -> Tensor:
        features = functional_call(model, parameters, (image.unsqueeze(0),))
        return head(classes)(features).log_softmax(-1)[0, c]

    for image in IMAGES:
        for c in range(classes):
            gradient, value = torch.func.grad_and_value(log_p)(parameters, image, c)
            for name in total:
                total[name] += (value.exp() * gradient[name].square()).detach()
    return total


@functools.cache
def squared_jacobian() -> Weights:
    """Oracle: diag(JᵀJ) = sum over x and i of (d f_i)², one feature of one example at a time."""
    model = pico_model()
    own = dict(model.named_parameters())
    total = {name: torch.zeros_like(own[name]) for name in NAMES}
    for image in IMAGES:
        for feature in model(image.unsqueeze(0))[0]:
            gradients = torch.autograd.grad(
                feature, [own[name] for name in NAMES], retain_graph=True
            )
            for name, gradient in zip(NAMES, gradients, strict=True):
                total[name] += gradient.square()
    return total


def assert_same(actual: Weights, expected: Weights, rtol: float = 1e-10) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(
            actual[name], wanted, rtol=rtol, atol=rtol * float(wanted.mean()), msg=lambda m: m
        )


@pytest.mark.parametrize("classes", [FEW, MANY])
def test_exact_equals_the_sum_over_classes_and_examples_one_at_a_time(classes):
    found, report = estimate(classes)
    assert_same(found.sums, brute_force(classes))
    assert found.num_examples == len(IMAGES)
    assert report.trace == pytest.approx(float(sum(t.sum() for t in brute_force(classes).values())))


def test_exact_needs_at_most_one_pass_less_than_classes_and_one_a_feature():
    for classes, most in ((FEW, FEW - 1), (MANY, FEATURES)):
        assert estimate(classes)[1].passes <= most


@pytest.mark.parametrize("batch", [1, 4])
def test_exact_does_not_depend_on_how_examples_are_batched(batch):
    found, report = estimate(batch=batch)
    assert_same(found.sums, estimate()[0].sums)
    assert found.num_examples == len(IMAGES)
    assert report.batches == math.ceil(len(IMAGES) / batch)


@pytest.mark.parametrize("chunk", [1, 5000])  # one example at a time; three, four or nine
@pytest.mark.parametrize("curvature", [Curvature.EXACT, Curvature.FEATURES])
def test_the_size_of_memory_chunks_does_not_change_the_result(monkeypatch, curvature, chunk):
    expected, _ = estimate(curvature=curvature)
    monkeypatch.setattr(per_example, "CHUNK_BYTES", {"cpu": chunk, "cuda": chunk})
    assert_same(estimate(curvature=curvature)[0].sums, expected.sums)


@pytest.mark.parametrize("form", [FisherForm.DENSE, FisherForm.KRONECKER])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_squares_of_inputs_are_those_of_each_layer_token_by_token(form, batch):
    model, expected = pico_model(), {}

    def add(name: str, given: Tensor) -> None:
        total = expected.setdefault(f"{name}/inputs", torch.zeros(given.shape[-1]).double())
        for token in given.flatten(0, -2):
            total += token * token

    for name in NAMES:
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda _, given, name=name: add(name, given[0].detach()))
    for image in IMAGES:
        model(image.unsqueeze(0))
    found, _ = estimate(curvature=Curvature.FEATURES, batch=batch, form=form)
    assert_same(dict(found.inputs), expected)
    for kept in (found.reduced(), found.thinned()):
        assert_same(dict(kept.inputs), expected)


class Pooled(nn.Module):
    """A layer that sees few tokens beside its size."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(30, 20)

    def forward(self, tokens):
        return self.layer(tokens).tanh().mean(1)


@pytest.mark.parametrize("compare", [1, 2, 9])
@pytest.mark.parametrize("curvature", [Curvature.FEATURES, Curvature.EXACT])
@pytest.mark.parametrize("few_tokens", [True, False])
def test_the_factored_form_has_the_margins_of_the_dense_one(few_tokens, curvature, compare):
    model, images, names = pico_model(), IMAGES, NAMES
    if few_tokens:
        model, images, names = Pooled().double(), normal(6, 3, 30, seed=4), ("layer.weight",)
    weight = normal(FEW, 20 if few_tokens else FEATURES, seed=2)
    options = {"head": replace(head(FEW), weight=weight), "curvature": curvature}
    seen: list[Tensor] = []
    dense, report = estimate_fisher(model, images.split(1), names, seen=seen, **options)
    found, told = estimate_fisher(
        model, images.split(1), names, form=FisherForm.FACTORED, compare=compare, **options
    )
    assert_same(found.sums, dense.reduced().sums)
    assert_same(found.inputs, dense.inputs)
    assert told.trace == pytest.approx(report.trace)
    torch.testing.assert_close(torch.cat(seen), model(images).float())
    kept = [dense] if compare == 1 else []
    if compare == 9:  # the first batch alone
        kept = [estimate_fisher(model, [images[:1]], names, **options)[0]]
    for whole_one in kept:
        read = expanded(whole_one.reduced().sums, names)
        off = sum(float((t - read[n]).square().sum()) for n, t in whole_one.sums.items())
        length = sum(float(t.square().sum()) for t in whole_one.sums.values())
        assert told.form_error == pytest.approx(math.sqrt(off / length), rel=1e-5)


# -- of the features ----------------------------------------------------------------------------


def test_directions_along_every_feature_give_the_squared_jacobian(monkeypatch):
    """With z = √d e_i the mean over i of (Jᵀz)² is diag(JᵀJ), whatever the images."""
    sums = {name: torch.zeros(1, dtype=torch.float64) for name in NAMES}
    for index in range(FEATURES):
        axis = math.sqrt(FEATURES) * torch.eye(FEATURES, dtype=torch.float64)[index]
        monkeypatch.setattr(
            fisher_estimate, "directions", lambda f, generator, axis=axis: axis.expand_as(f)
        )
        found, _ = estimate(curvature=Curvature.FEATURES, head=None, batch=4)
        sums = {name: sums[name] + found.sums[name] / FEATURES for name in NAMES}
    assert_same(sums, squared_jacobian())


def test_one_random_direction_an_example_is_unbiased():
    """z has variance one and is independent: the mean over seeds is within its own error."""
    drawn = []
    for seed in range(400):
        found, _ = estimate(curvature=Curvature.FEATURES, head=None, generator=rng(seed))
        drawn.append(torch.cat([found.sums[name].flatten() for name in NAMES]))
    values = torch.stack(drawn)
    exact = torch.cat([squared_jacobian()[name].flatten() for name in NAMES])
    errors = (values.mean(0) - exact) / (values.std(0) / math.sqrt(len(drawn)))
    assert errors.abs().max() < 6
    assert float(errors.square().mean()) == pytest.approx(1, abs=0.25)
    total = values.sum(1)
    assert float(total.mean()) == pytest.approx(float(exact.sum()), rel=0.02)


def test_it_takes_one_pass_a_batch_whatever_the_number_of_classes():
    for classes in (FEW, MANY):
        _, report = estimate(classes, curvature=Curvature.FEATURES, batch=4)
        assert (report.passes, report.batches) == (2, 2)


def test_no_head_changes_a_bit_of_it():
    with_head, _ = estimate(curvature=Curvature.FEATURES)
    without, _ = estimate(curvature=Curvature.FEATURES, head=None)
    assert all(torch.equal(with_head.sums[name], without.sums[name]) for name in NAMES)


@pytest.mark.parametrize("curvature", [Curvature.EXACT, Curvature.MONTE_CARLO])
def test_the_fisher_of_class_probabilities_needs_a_head(curvature):
    with pytest.raises(ValueError, match=f"`curvature = {curvature}` needs a head"):
        estimate(curvature=curvature, head=None)


# -- of the class probabilities -----------------------------------------------------------------


@pytest.mark.parametrize("classes", [FEW, MANY])
def test_cotangents_factor_the_softmax_hessian_seen_through_the_head(classes):
    weight = head(classes).weight
    logits = normal(3, classes, seed=4)
    cotangents, mass = curvature_factors(logits, weight)
    for example in range(3):
        p = logits[example].softmax(-1)
        expected = weight.T @ (p.diag() - p.outer(p)) @ weight
        v = cotangents[example]
        torch.testing.assert_close(v.T @ v, expected)
        torch.testing.assert_close(v.square().sum(1), mass[example])
    assert (mass.diff(dim=1) <= 0).all()


def test_a_certain_prediction_has_no_fisher():
    certain = replace(
        head(FEW),
        weight=torch.zeros(FEW, FEATURES, dtype=torch.float64),
        bias=torch.tensor([1e6, 0, 0, 0, 0], dtype=torch.float64),
    )
    found, report = estimate(head=certain)
    assert all((total == 0).all() for total in found.sums.values())
    assert report.passes == 0


def shallow_model() -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh()).double()
    with torch.no_grad():
        model[1].weight.copy_(normal(4, 6, seed=5))
        model[1].bias.zero_()
    return model


SHALLOW_HEAD = Head(("a", "b", "c"), normal(3, 4, seed=6), normal(3, seed=7))
SHALLOW_IMAGES = normal(5, 1, 2, 3, seed=8)


def shallow_estimate(samples: int, seed: int) -> Tensor:
    found, _ = estimate_fisher(
        shallow_model(),
        [SHALLOW_IMAGES],
        ["1.weight"],
        head=SHALLOW_HEAD,
        curvature=Curvature.MONTE_CARLO,
        samples=samples,
        generator=rng(seed),
    )
    return found.sums["1.weight"]


def moments_of_one_label() -> tuple[Tensor, Tensor]:
    """Oracle: mean and variance of (d log p_y)² for a label y drawn from p, summed over x."""
    model = shallow_model()
    mean = variance = torch.zeros(4, 6, dtype=torch.float64)
    for image in SHALLOW_IMAGES:
        log_p = SHALLOW_HEAD(model(image.unsqueeze(0))).log_softmax(-1)[0]
        squares = torch.stack(
            [
                torch.autograd.grad(value, model[1].weight, retain_graph=True)[0].square()
                for value in log_p
            ]
        )  # (classes, out, in)
        p = log_p.detach().exp().view(-1, 1, 1)
        mean = mean + (p * squares).sum(0)
        variance = variance + (p * squares.square()).sum(0) - (p * squares).sum(0).square()
    return mean, variance


@pytest.mark.parametrize("samples", [4, 64])
def test_monte_carlo_misses_exact_by_one_standard_error(samples):
    mean, variance = moments_of_one_label()
    squared = [(shallow_estimate(samples, seed) - mean).square().sum() for seed in range(40)]
    expected = (variance.sum() / samples).sqrt()
    assert float(torch.stack(squared).mean().sqrt() / expected) == pytest.approx(1, abs=0.25)


def test_monte_carlo_converges_to_exact():
    mean, _ = moments_of_one_label()
    torch.testing.assert_close(shallow_estimate(5000, 0).sum(), mean.sum(), rtol=0.02, atol=0)


def test_monte_carlo_of_a_transformer_is_near_exact():
    _, report = estimate(curvature=Curvature.MONTE_CARLO, samples=150, generator=rng(0))
    exact = brute_force(FEW)
    assert report.passes == 150
    assert report.trace == pytest.approx(float(sum(exact[n].sum() for n in NAMES)), rel=0.15)


@pytest.mark.parametrize("curvature", [Curvature.FEATURES, Curvature.MONTE_CARLO])
def test_the_same_generator_gives_the_same_estimate_and_another_another(curvature):
    (first, report), (second, again), (other, _) = (
        estimate(curvature=curvature, samples=2, generator=rng(seed)) for seed in (4, 4, 5)
    )
    assert not torch.equal(first.sums[NAMES[0]], other.sums[NAMES[0]])
    assert report == again
    assert all(torch.equal(first.sums[name], second.sums[name]) for name in first.sums)


def test_an_estimate_in_single_precision_is_near_that_in_double():
    model = pico_model(dtype=torch.float32)
    given = head(FEW)
    single = replace(given, weight=given.weight.float(), bias=given.bias.float())
    found, _ = estimate_fisher(
        model, [IMAGES.float()], NAMES, head=single, curvature=Curvature.EXACT
    )
    assert_same(found.sums, brute_force(FEW), rtol=1e-4)


def test_dropout_is_off_and_the_model_is_left_as_it_was():
    model = pico_model(dropout=0.5).train()
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    frozen = dict(model.named_parameters())
    for name, parameter in frozen.items():
        parameter.requires_grad_("norm" not in name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, _ = estimate_fisher(model, [IMAGES], NAMES, head=head(FEW), curvature=Curvature.EXACT)
    assert_same(found.sums, brute_force(FEW))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad == ("norm" not in name) for name, p in frozen.items())
    assert all(p.grad is None for p in frozen.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_part_of_the_model_that_was_in_evaluation_mode_stays_there():
    model = pico_model().train()
    model.blocks[0].eval()
    estimate_fisher(model, [IMAGES], NAMES)
    assert model.training
    assert not model.blocks[0].training


def test_an_estimate_is_possible_where_gradients_are_switched_off():
    with torch.no_grad():
        found, _ = estimate()
    assert_same(found.sums, brute_force(FEW))


def refuse_a_convolution() -> nn.Module:
    model = pico_model().train()
    with pytest.raises(BackboneError, match=r"'patch_embed\.proj\.weight' belongs to a Conv2d"):
        estimate_fisher(model, [IMAGES], [*NAMES, "patch_embed.proj.weight"])
    return model


def test_a_weight_that_is_no_linear_layers_is_refused():
    model = refuse_a_convolution()
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_a_refused_weight_leaves_no_hooks_behind():
    assert not any(module._forward_hooks for module in refuse_a_convolution().modules())


class BehindItsBack(nn.Module):
    """Uses a layer's weight without calling the layer, as BEiT's attention does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, images):
        return nn.functional.linear(images.flatten(1), self.layer.weight)


def test_a_weight_used_behind_its_layers_back_is_refused_by_name():
    with pytest.raises(BackboneError, match=r"'layer\.weight'"):
        estimate_fisher(BehindItsBack(), [torch.ones(3, 64)], ["layer.weight"])


# -- Kronecker factors --------------------------------------------------------------------------


def jacobians(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """Oracle: the gradient of each feature of each example, (examples, features, out, in)."""
    weight = dict(model.named_parameters())[name]
    rows = [
        [torch.autograd.grad(f, weight, retain_graph=True)[0] for f in model(image.unsqueeze(0))[0]]
        for image in images
    ]
    return torch.stack([torch.stack(row) for row in rows])


def test_kronecker_factors_are_the_partial_traces_of_the_exact_block(monkeypatch):
    """With z = √d e_i the mean over i is the Gauss-Newton block's own, whatever the images."""
    sums: Weights = {}
    for index in range(FEATURES):
        axis = math.sqrt(FEATURES) * torch.eye(FEATURES, dtype=torch.float64)[index]
        monkeypatch.setattr(
            fisher_estimate, "directions", lambda f, generator, axis=axis: axis.expand_as(f)
        )
        found, report = estimate(
            curvature=Curvature.FEATURES, head=None, batch=4, form=FisherForm.KRONECKER
        )
        assert (report.passes, found.num_examples) == (2, len(IMAGES))
        for name, total in found.sums.items():
            sums[name] = sums.get(name, torch.zeros_like(total)) + total / FEATURES
    for name in NAMES:
        rows = jacobians(pico_model(), IMAGES, name).flatten(0, 1)
        block = torch.einsum("noi,npj->oipj", rows, rows)
        left, right = sums[f"{name}/left"], sums[f"{name}/right"]
        torch.testing.assert_close(left, torch.einsum("oipi->op", block), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(right, torch.einsum("oioj->ij", block), rtol=1e-9, atol=1e-12)
        assert float(left.trace()) == pytest.approx(float(torch.einsum("oioi->", block)))


@pytest.mark.parametrize("curvature", Curvature)
def test_their_diagonals_are_the_row_and_column_sums_of_the_dense_fisher(curvature):
    found, report = estimate(curvature=curvature, form=FisherForm.KRONECKER)
    dense, theirs = estimate(curvature=curvature)
    assert_same(found.reduced().sums, dense.reduced().sums)
    assert report.trace == pytest.approx(theirs.trace)


def test_of_one_example_and_one_token_the_product_is_the_exact_block():
    model, image = shallow_model(), normal(1, 6, seed=8)
    found, _ = estimate_fisher(
        model, [image], ["1.weight"], generator=rng(3), form=FisherForm.KRONECKER
    )
    z = fisher_estimate.directions(model(image), rng(3))[0]
    row = torch.einsum("i,ioj->oj", z, jacobians(model, image, "1.weight")[0]).flatten()
    block = expanded(found.thinned().sums, ["1.weight"])["1.weight"]
    product = torch.kron(whole(block.left), whole(block.right))
    torch.testing.assert_close(product, torch.outer(row, row), rtol=1e-9, atol=1e-12)
