"""Seeds derived from one number and a purpose."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcompo.seeds import derive_seed, generator_for


@given(st.integers(0, 2**63), st.lists(st.text(max_size=5), max_size=3))
def test_a_seed_depends_on_number_and_purpose_alone_and_fits_every_library(seed, purpose):
    derived = derive_seed(seed, *purpose)
    assert derived == derive_seed(seed, *purpose)
    assert 0 <= derived < 2**31


def test_other_numbers_and_purposes_give_other_seeds():
    derived = {
        derive_seed(seed, *purpose)
        for seed in range(20)
        for purpose in [
            (),
            ("train",),
            ("train", "a"),
            ("train", "b"),
            ("traina",),
            ("fisher", "a"),
        ]
    }
    assert len(derived) == 120


def test_a_seed_never_changes_between_versions():
    assert derive_seed(0, "train", "client-0") == 1112375113


def test_generators_for_the_same_purpose_draw_the_same_numbers():
    draws = [torch.rand(3, generator=generator_for(1, *p)) for p in (("a",), ("a",), ("b",))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
