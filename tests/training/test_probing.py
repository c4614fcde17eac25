"""A reference Fisher: of whose images, under which head, and for which backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import left_or_right, pico_backbone
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from fedcompo.backbone.backbone import Backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.choices import Curvature
from fedcompo.config.run import RunConfig
from fedcompo.data.client_data import ClientData
from fedcompo.errors import (
    BackboneMismatch,
    ConfigError,
    ContributionError,
    DataError,
    FileFormatError,
)
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.fisher_file import OLD_HEAD, save_fisher
from fedcompo.names import REFERENCE, check_client_name
from fedcompo.report import progress
from fedcompo.training.probing import (
    fisher_of_images,
    fit_probe,
    load_public_data,
    load_reference,
    reference_fisher,
    save_reference,
)

CLASSES = ("left", "right")
FEATURES = RunConfig.parse({"fisher-batch": 4})
EXACT = RunConfig.parse({"curvature": "exact", "fisher-batch": 4})


def public(count: int = 10) -> ClientData:
    return ClientData("public", CLASSES, left_or_right(count), left_or_right(4, seed=1))


def fisher_by_hand(backbone: Backbone, data: ClientData) -> dict[str, Tensor]:
    """Oracle: p_c (d log p_c)² summed over classes and images, one at a time."""
    head = fit_probe(backbone, data.train, data.classes, ridge=EXACT.head.ridge)
    total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in backbone.theta_0.items()}
    for image in data.train.images:
        pixels = backbone.preprocessing.normalise(image.unsqueeze(0))

        def log_p(theta: dict[str, Tensor], c: int, pixels: Tensor = pixels) -> Tensor:
            features = functional_call(backbone.model, theta, (pixels,))
            return head(features).log_softmax(-1)[0, c]

        for c in range(len(data.classes)):
            gradients, value = torch.func.grad_and_value(log_p)(backbone.theta_0, c)
            for name, gradient in gradients.items():
                total[name] += (value.exp() * gradient.square()).double()
    return total


def test_it_is_the_fisher_under_a_probe_of_the_public_classes():
    backbone, data = pico_backbone(), public()
    fisher, report = reference_fisher(backbone, data, EXACT)
    assert fisher.num_examples == 10
    assert report.trace > 0
    for name, expected in fisher_by_hand(backbone, data).items():
        torch.testing.assert_close(
            fisher.sums[name].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.max())
        )


def test_of_features_it_takes_no_probe(monkeypatch):
    monkeypatch.delattr("fedcompo.training.probing.fit_probe")
    fisher, report = reference_fisher(pico_backbone(), public(), FEATURES)
    assert (fisher.num_examples, report.passes) == (10, 3)
    fisher.check(pico_backbone().theta_0, owner="the reference")


def test_no_more_images_are_used_than_asked_for_and_progress_is_told(monkeypatch):
    monkeypatch.setattr(progress, "QUIET", 0)
    monkeypatch.setattr(progress, "PAUSE", 0)
    told: list[progress.Progress] = []
    config = RunConfig.parse({"fisher-examples": 7, "fisher-batch": 3})
    with progress.listening(told.append):
        fisher, _ = reference_fisher(pico_backbone(), public(), config)
    assert fisher.num_examples == 7
    assert [(p.what, p.done, p.total) for p in told] == [("Fisher", n, 7) for n in (3, 6, 7)]


def test_images_and_directions_depend_on_their_owner_and_the_seed():
    backbone, data = pico_backbone(), public()
    config = RunConfig.parse({"fisher-examples": 5}).fisher

    def drawn(seed: int, owner: str) -> Tensor:
        fisher, _ = fisher_of_images(backbone, data.train.images, config, seed=seed, owner=owner)
        return fisher.sums["blocks.0.attn.qkv.weight"]

    assert torch.equal(drawn(0, "ann"), drawn(0, "ann"))
    assert not torch.equal(drawn(0, "ann"), drawn(0, "ben"))
    assert not torch.equal(drawn(0, "ann"), drawn(1, "ann"))


def test_what_is_loaded_is_what_was_saved(tmp_path):
    backbone = pico_backbone()
    fisher, _ = reference_fisher(backbone, public(), EXACT)
    base, exact = backbone.fingerprint, Curvature.EXACT
    save_reference(tmp_path / "r", fisher, base=base, curvature=exact)
    loaded = load_reference(tmp_path / "r", base=base, curvature=exact)
    assert loaded.num_examples == 10
    assert loaded.sums.keys() == fisher.sums.keys()
    assert all(torch.equal(loaded.sums[name], fisher.sums[name]) for name in fisher.sums)
    with pytest.raises(BackboneMismatch, match="expected pico@other"):
        load_reference(tmp_path / "r", base="pico@other", curvature=exact)


def test_no_clients_fisher_passes_for_a_reference(tmp_path):
    with pytest.raises(ContributionError):
        check_client_name(REFERENCE)
    fisher, _ = reference_fisher(pico_backbone(), public(), EXACT)
    save_fisher(tmp_path / "r", fisher, client="reference", base="pico@0")
    with pytest.raises(FileFormatError, match="belongs to client 'reference'"):
        load_reference(tmp_path / "r", base="pico@0", curvature=Curvature.EXACT)


@pytest.mark.parametrize(
    ("stated", "head", "wanted", "fault"),
    [
        (Curvature.FEATURES, False, Curvature.FEATURES, None),
        (Curvature.EXACT, False, Curvature.MONTE_CARLO, None),
        (Curvature.FEATURES, False, Curvature.EXACT, "is of `curvature = features`"),
        (Curvature.MONTE_CARLO, False, Curvature.FEATURES, "is of `curvature = monte-carlo`"),
        (None, True, Curvature.EXACT, None),
        (None, True, Curvature.FEATURES, "is of `curvature = exact`"),
        (None, False, Curvature.FEATURES, "does not say of which `curvature`"),
        (None, False, Curvature.EXACT, "does not say of which `curvature`"),
    ],
)
def test_a_reference_of_another_unit_is_refused(stated, head, wanted, fault, tmp_path):
    sums = {"w": torch.ones(2, 3)} | ({OLD_HEAD[0]: torch.zeros(0, 3)} if head else {})
    about = {"curvature": str(stated)} if stated else {}  # what earlier versions did not write
    save_fisher(tmp_path / "r", FisherDiagonal(sums, 2), client=REFERENCE, base="pico@0", **about)
    if fault is None:
        loaded = load_reference(tmp_path / "r", base="pico@0", curvature=wanted)
        assert set(loaded.sums) == {"w"}
        return
    with pytest.raises(ConfigError, match=fault):
        load_reference(tmp_path / "r", base="pico@0", curvature=wanted)


def test_public_data_is_one_partys_with_all_its_classes():
    seen = Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,))
    data = load_public_data(RunConfig.parse({"images-per-class": 2}), seen)
    assert data.classes == tuple("0123456789")
    assert len(data.train.labels) == 20


def test_a_folder_of_public_images_holds_its_classes_itself(tmp_path):
    seen = Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,))
    for name in ("cat", "dog"):
        folder = tmp_path / "public" / "train" / name
        folder.mkdir(parents=True)
        for i in range(5):
            Image.new("L", (8, 8), 10 * i).save(folder / f"{i}.png")
    config = RunConfig.parse({"data": f"folder:{tmp_path / 'public'}"})
    data = load_public_data(config, seen)
    assert data.classes == ("cat", "dog")
    assert len(data.train.labels) == 8  # one a class is kept for testing
    with pytest.raises(DataError, match="no folder 'train'"):
        load_public_data(RunConfig.parse({"data": f"folder:{Path(tmp_path)}"}), seen)
