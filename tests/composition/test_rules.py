"""Rules of composition against slow, obvious oracles in float64, and against PEFT's functions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import normal

from fedcompo.composition.rules import Changes, parse_rule
from fedcompo.composition.rules.parsing import RULES
from fedcompo.composition.rules.singular import numerical_svd
from fedcompo.config.choices import Kind
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.method.task_vector import TaskVector

NAME = "blocks.0.mlp.fc1.weight"
GRID = 2.0**-40
SHAPES = [(6, 9), (9, 4)]
PINNED = [[0, 0], [0, 12], [0, 24], [1, 0], [1, 1], [1, 10], [1, 14], [1, 22]]
"""Entries that DARE keeps of the change of a weight, (2, 25), of client a; seed 7, four of five
dropped."""
ALL = ["mean", "norm-preserving", "task-arithmetic", "ties", "dare:drop=0.5", "iso-c", "tsv-m"]


def changes(taus, *, times=None, clients="abcdefgh"):
    """Changes of members who sent these dense task vectors, on the grid."""
    members = [
        SimpleNamespace(client=client, task_vector=vector_of(tau))
        for client, tau in zip(clients, taus, strict=False)
    ]
    counts = times or [1] * len(members)
    by_client = {m.client: count for m, count in zip(members, counts, strict=True)}
    members.sort(key=lambda member: member.client)
    return Changes(NAME, torch.zeros(shape_of(taus[0])), members, by_client)


def vector_of(tau):
    """A LoRA of its factors (B, A), or what is dense."""
    if isinstance(tau, tuple):
        return TaskVector(Kind.LORA, {f"{NAME}/B": tau[0], f"{NAME}/A": tau[1]}, "b")
    return TaskVector(Kind.FULL, {f"{NAME}/delta": tau}, "b")


def shape_of(tau):
    return (len(tau[0]), tau[1].shape[1]) if isinstance(tau, tuple) else tau.shape


def several(shape, count=3, seed=0):
    return [
        normal(*shape, seed=10 * seed + i, scale=0.1, dtype=torch.float32) for i in range(count)
    ]


def loras(count=3, rank=2, shape=(6, 9)):
    sides = [(shape[0], rank), (rank, shape[1])]
    return [
        tuple(several(side, 1, 100 * i + j)[0] for j, side in enumerate(sides))
        for i in range(count)
    ]


def on_grid(taus):
    dense = [tau[0].double() @ tau[1].double() if isinstance(tau, tuple) else tau for tau in taus]
    return [(tau.double() / GRID).round().numpy() * GRID for tau in dense]


# -- oracles --------------------------------------------------------------------------------------


def the_sum(taus, times, rule):
    return sum(m * tau for m, tau in zip(times, taus, strict=True))


def ties(taus, times, rule):
    """Entry by entry, in Python's numbers."""
    trimmed = []
    for tau in taus:
        kept = max(1, int(rule.density * tau.size))
        least = sorted(np.abs(tau).flatten())[-kept]
        trimmed.append(np.where(np.abs(tau) >= least, tau, 0))
    total = np.zeros_like(taus[0])
    for place in np.ndindex(total.shape):
        entries = [tau[place] for tau in trimmed]
        mass = sum(m * entry for m, entry in zip(times, entries, strict=True))
        sign = 1 if mass >= 0 else -1
        agreed = [(m, e) for m, e in zip(times, entries, strict=True) if e * sign > 0]
        if agreed:
            total[place] = sum(times) * sum(m * e for m, e in agreed) / sum(m for m, _ in agreed)
    return total


def dare(taus, times, rule):
    kept = [
        rule.kept(c, NAME, torch.Size(tau.shape)).numpy()
        for c, tau in zip("abcdefgh", taus, strict=False)
    ]
    terms = zip(times, kept, taus, strict=True)
    return sum(m * b * tau / (1 - rule.drop) for m, b, tau in terms)


def iso_c(taus, times, rule):
    total = the_sum(taus, times, rule)
    u, s, vh = np.linalg.svd(total, full_matrices=False)
    rank = (s > 1e-9).sum()
    if not rank:
        return 0 * total
    return s[:rank].mean() * u[:, :rank] @ vh[:rank]


def tsv_m(taus, times, rule):
    """The nearest isometry by an inverse root of the Gram matrix."""
    us, ss, vs = [], [], []
    for tau in taus:
        u, s, vh = np.linalg.svd(tau, full_matrices=False)
        k = min(max(1, len(s) // len(taus)), (s > 1e-9).sum())
        us, ss, vs = [*us, u[:, :k]], [*ss, s[:k]], [*vs, vh[:k].T]
    u, v = (isometry(np.concatenate(side, 1)) for side in (us, vs))
    return times[0] * (u @ np.diag(np.concatenate(ss)) @ v.T)


def isometry(x):
    values, vectors = np.linalg.eigh(x.T @ x)
    roots = [1 / value**0.5 if value > 1e-12 else 0 for value in values]
    return x @ vectors @ np.diag(roots) @ vectors.T


ORACLES = {
    "mean": the_sum,
    "norm-preserving": the_sum,
    "task-arithmetic": the_sum,
    "ties": ties,
    "dare": dare,
    "iso-c": iso_c,
    "tsv-m": tsv_m,
}


@pytest.mark.parametrize("text", [*ALL, "ties:density=0.5", "ties:density=1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rule_is_its_equation(text, shape):
    rule = parse_rule(text)
    cases = [several(shape), several(shape, 1), several(shape, 8), several(shape, 1) * 2]
    cases += [
        [*several(shape, 2), torch.zeros(shape)],
        [torch.zeros(shape)] * 2,
        loras(shape=shape),
    ]
    for taus in cases:
        for times in ([1] * len(taus), [3, 1, 2, 1, 5, 1, 1, 1][: len(taus)]):
            if len(set(times)) > 1 and not rule.weighted:
                continue
            expected = ORACLES[rule.name](on_grid(taus), times, rule)
            actual = rule.on_grid(changes(taus, times=times)).double() * GRID
            torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("text", ALL)
def test_the_order_of_members_does_not_matter_and_a_rule_reads_anew(text):
    taus, rule = several((6, 9), 4), parse_rule(text)
    first = changes(taus)
    total = rule.on_grid(first)
    assert torch.equal(rule.on_grid(changes(taus[::-1], clients="dcba")), total)
    assert torch.equal(rule.on_grid(first), total)


def test_the_mean_is_the_exact_sum():
    taus = several((6, 9))
    expected = sum((tau.double() / GRID).round().long() for tau in taus)
    for text in ("mean", "norm-preserving", "task-arithmetic:lambda=2"):
        assert torch.equal(parse_rule(text).on_grid(changes(taus)), expected)


@pytest.mark.parametrize("text", ["iso-c", "tsv-m"])
def test_loras_stay_in_the_directions_that_they_trained(text):
    taus = loras(shape=(160, 200))
    total = parse_rule(text).total(changes(taus))
    outside = torch.linalg.svd(torch.cat([b for b, _ in taus], 1).double()).U[:, 6:]
    assert (outside.T @ total).abs().max() < 1e-6 * total.abs().max()
    assert torch.linalg.matrix_rank(total, rtol=1e-6) == 6


@pytest.mark.parametrize("rank", [0, 1, 30, 70, 200])
def test_small_ranks_are_decomposed_as_large_ones_are(rank):
    """Beyond 64 directions are widened, beyond half of them nothing is drawn."""
    change = normal(300, rank, seed=1) @ normal(rank, 260, seed=2)
    u, values, vh = numerical_svd((change / GRID).round() * GRID, torch.zeros(1))
    assert len(values) == rank
    torch.testing.assert_close((u * values) @ vh, change, rtol=0, atol=1e-9)
    torch.testing.assert_close(u.T @ u, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(values, torch.linalg.svdvals(change)[:rank], rtol=1e-9, atol=1e-9)


def test_equal_members_count_as_one_and_more_members_than_directions_are_taken():
    (tau,) = loras(1, rank=1)
    rule, (dense,) = parse_rule("tsv-m"), on_grid([tau])
    total = rule.total(changes([tau] * 8))
    torch.testing.assert_close(total, torch.tensor(dense), rtol=0, atol=1e-10)
    assert rule.total(changes(several((2, 9), 8))).isfinite().all()


def test_dare_rounds_nothing_that_a_processor_may_fuse():
    """Its products are exact, so that multiplying and adding at once gives the same bits."""
    taus, times, rule = several((40, 50), 3), [3, 1, 700], parse_rule("dare:drop=0.7")
    kept = [rule.kept(client, NAME, taus[0].shape).numpy() for client in "abc"]
    units = [(tau / GRID).astype(np.int64) for tau in on_grid(taus)]
    whole = sum(m * b * unit for m, b, unit in zip(times, kept, units, strict=True))
    expected = torch.tensor(whole).double() * GRID / (1 - 0.7)
    assert torch.equal(rule.total(changes(taus, times=times)), expected)


def test_draws_depend_on_nobody_else():
    taus, rule = several((40, 50), 3), parse_rule("dare:drop=0.8,seed=7")
    together = rule.on_grid(changes(taus))
    others = rule.on_grid(changes(taus[1:], clients="bc"))
    alone = rule.on_grid(changes(taus[:1], clients="a"))
    assert (together - others - alone).abs().max() <= 1
    kept = alone.count_nonzero() / alone.numel()
    assert 0.15 < kept < 0.25
    first = rule.kept("a", NAME, torch.Size([2, 25])).nonzero().tolist()
    assert first == PINNED, "whoever was composed before must be found again"
    for other in ("dare:drop=0.8,seed=8", "dare:drop=0.8"):
        assert not torch.equal(parse_rule(other).on_grid(changes(taus)), together)


def test_peft_gives_the_same(monkeypatch):
    merge = pytest.importorskip("peft.utils.merge_utils")
    taus = several((30, 40), 4)
    ones, shape = torch.ones(4), taus[0].shape
    count, wide = len(taus), [tau.double() for tau in taus]
    theirs = count * merge.ties(wide, ones, density=0.3)
    ours = parse_rule("ties:density=0.3").total(changes(taus))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    rule = parse_rule("dare:drop=0.6,seed=2")
    draws = iter([rule.kept(client, NAME, shape).double() for client in "abcd"])
    monkeypatch.setattr(merge.torch, "bernoulli", lambda input: next(draws))
    theirs = merge.dare_linear(wide, ones, density=0.4)
    torch.testing.assert_close(rule.total(changes(taus)), theirs, rtol=1e-6, atol=1e-9)
    weights = [0.1, 0.2, 0.3, 0.4]
    theirs = merge.task_arithmetic(wide, torch.tensor(weights, dtype=torch.float64))
    ours = parse_rule("task-arithmetic").total(changes(taus, times=weights))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_text_names_a_rule_and_all_its_options():
    for text in RULES:
        rule = parse_rule(text)
        assert parse_rule(rule.text) == rule
        assert rule.text.partition(":")[0] == text
    assert parse_rule(" dare : seed = 3 ").text == "dare:drop=0.9,seed=3"
    assert parse_rule("task-arithmetic:lambda=0.5").factor == 0.5
    assert [r for r in RULES if not parse_rule(r).votes] == ["norm-preserving", "task-arithmetic"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("tis", "no rule 'tis' in fedcompo .*; it has mean, .*ties"),
        ("", "it has mean"),
        ("ties:dens=1", "ties has density, but 'ties:dens=1' names 'dens'"),
        ("mean:a=1", "mean has no option"),
        ("ties:density", "no rule of the form name:option=value"),
        ("ties:density=0.1,density=0.2", "twice"),
        ("ties:density=0", r"`density` must be in \(0, 1\], got 0"),
        ("ties:density=nan", "must be finite, got nan"),
        ("dare:drop=1", "`drop` must be in"),
        ("dare:seed=0.5", "`seed` must be of type int, got 0.5"),
        ("task-arithmetic:lambda=-1", "`lambda` must be in"),
    ],
)
def test_a_wrong_text_is_refused(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse_rule(text)


def test_what_cannot_be_composed_is_refused():
    given = changes(several((6, 9), 2), times=[1, 2])
    with pytest.raises(ContributionError, match="tsv-m has no weights in its equation"):
        parse_rule("tsv-m").check(given.members, given.times)
    huge = changes([torch.full((2, 2), 900.0)] * 2, times=[10**7, 10**7])
    with pytest.raises(ContributionError, match=r"ties gives a change of .* expected less than"):
        parse_rule("ties:density=1").on_grid(huge)


def test_a_lora_that_was_merged_in_float32_has_its_rank():
    weight = normal(160, 200, seed=1, scale=0.05, dtype=torch.float32)
    (lora,) = loras(1, rank=3, shape=(160, 200))
    merged = (weight.double() + lora[0].double() @ lora[1].double()).float()
    _, values, _ = numerical_svd(merged.double() - weight.double(), weight)
    assert len(values) == 3
