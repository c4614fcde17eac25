"""A client's contribution on disk: whole, its own, and nobody else's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import KINDS, altered, contribution

from fedcompo.config.choices import FisherForm, Kind, Statistics
from fedcompo.errors import BackboneMismatch, FileFormatError
from fedcompo.method.contribution import (
    CARD,
    CONTENT,
    FISHER,
    AnyStatistics,
    Contribution,
    counts_of,
    load_fisher,
    save_fisher,
    statistics_tensors,
)
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.lineage import Lineage
from fedcompo.storage import tensorfile
from fedcompo.storage.digests import content_digest


def saved(folder: Path, client: str, **options: object) -> Path:
    contribution(client, **options).save(folder)
    return folder


def rewrite_card(folder: Path, **entries: object) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({**card, **entries}))


def assert_same_statistics(actual: AnyStatistics, expected: AnyStatistics) -> None:
    assert counts_of(actual) == counts_of(expected)
    tensors = statistics_tensors(actual)
    assert tensors.keys() == statistics_tensors(expected).keys()
    for name, tensor in statistics_tensors(expected).items():
        assert torch.equal(tensors[name], tensor)


def assert_same(actual: Contribution, expected: Contribution) -> None:
    for part in ("client", "num_examples", "lineage", "settings"):
        assert getattr(actual, part) == getattr(expected, part)
    for part in ("kind", "base"):
        assert getattr(actual.task_vector, part) == getattr(expected.task_vector, part)
    assert actual.task_vector.tensors.keys() == expected.task_vector.tensors.keys()
    for name, tensor in expected.task_vector.tensors.items():
        assert torch.equal(actual.task_vector.tensors[name], tensor)
    assert actual.head.classes == expected.head.classes
    assert torch.equal(actual.head.weight, expected.head.weight)
    assert torch.equal(actual.head.bias, expected.head.bias)
    assert_same_statistics(actual.statistics, expected.statistics)
    assert (actual.fisher is None) == (expected.fisher is None)
    if expected.fisher is not None:
        assert actual.fisher.num_examples == expected.fisher.num_examples
        assert actual.fisher.sums.keys() == expected.fisher.sums.keys()
        for name, total in expected.fisher.sums.items():
            assert torch.equal(actual.fisher.sums[name], total)


@pytest.mark.parametrize("statistics", Statistics)
@pytest.mark.parametrize("with_fisher", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(kind, with_fisher, statistics, tmp_path):
    given = contribution("hospital-b", kind, with_fisher=with_fisher, statistics=statistics)
    given.save(tmp_path / "hospital-b")
    assert_same(Contribution.open(tmp_path / "hospital-b"), given)


def test_names_of_classes_and_clients_may_hold_any_character(tmp_path):
    given = contribution("Klinik Süd", classes=("a/b", "été ", '"quoted"'))
    given = replace(given, lineage=Lineage("ita", ("Größe",), (), ("x", "y")))
    given.save(tmp_path)
    assert_same(Contribution.open(tmp_path), given)


def test_the_fisher_can_be_left_unread(tmp_path):
    folder = saved(tmp_path, "hospital-b")
    assert Contribution.open(folder, with_fisher=False).fisher is None


def test_a_fisher_sum_in_double_is_stored_in_single_precision(tmp_path):
    given = contribution("hospital-b")
    double = {name: total.double() / 3 for name, total in given.fisher.sums.items()}
    replace(given, fisher=FisherDiagonal(double, 20)).save(tmp_path)
    loaded = Contribution.open(tmp_path).fisher
    assert all(torch.equal(loaded.sums[name], t.float()) for name, t in double.items())


def test_squares_of_inputs_are_stored_with_the_fisher_and_opened(tmp_path):
    given = contribution("hospital-b")
    inputs = {f"{name}/inputs": torch.arange(3.0) for name in given.fisher.sums}
    replace(given, fisher=replace(given.fisher, inputs=inputs)).save(tmp_path)
    loaded = Contribution.open(tmp_path, check=True).fisher
    assert loaded.sums.keys() == given.fisher.sums.keys()
    assert {name: t.tolist() for name, t in loaded.inputs.items()} == {
        name: [0, 1, 2] for name in inputs
    }


def test_the_digests_returned_are_those_on_the_card_and_of_the_tensors(tmp_path):
    digests = contribution("hospital-b").save(tmp_path)
    assert json.loads((tmp_path / CARD).read_text())["tensors_sha256"] == digests
    assert digests.keys() == {CONTENT, FISHER}
    for name, digest in digests.items():
        assert content_digest(tensorfile.load(tmp_path / name)[0]) == digest


def test_the_card_says_in_plain_words_what_the_contribution_is(tmp_path):
    given = contribution("hospital-b", Kind.IA3)
    given.save(tmp_path)
    card = json.loads((tmp_path / CARD).read_text())
    assert card["client"] == "hospital-b"
    assert card["kind"] == "ia3"
    assert card["base"] == "pico@0"
    assert card["classes"] == ["cat", "dog"]
    assert card["num_examples"] == 20
    assert card["sums"] == {"cat": 10, "dog": 10}
    assert card["lineage"]["anchored_by"] == ["client-8", "client-9"]
    assert card["settings"] == given.settings


@pytest.mark.parametrize("name", [CONTENT, CARD])
def test_a_missing_file_is_refused(name, tmp_path):
    folder = saved(tmp_path, "hospital-b")
    (folder / name).unlink()
    with pytest.raises(FileFormatError, match=f"{name}.* cannot be read"):
        Contribution.open(folder)


def test_a_fisher_that_the_card_lists_and_that_is_missing_is_refused(tmp_path):
    folder = saved(tmp_path, "hospital-b")
    (folder / FISHER).unlink()
    with pytest.raises(FileFormatError):
        Contribution.open(folder)


def test_a_fisher_of_the_same_client_from_elsewhere_is_refused(tmp_path):
    folder = saved(tmp_path / "now", "hospital-b")
    earlier = saved(tmp_path / "earlier", "hospital-b", seed=7)
    shutil.copy(earlier / FISHER, folder / FISHER)
    with pytest.raises(FileFormatError):
        Contribution.open(folder)


def test_a_contribution_saved_without_fisher_has_none_whatever_the_folder_held(tmp_path):
    saved(tmp_path, "hospital-b", seed=7)
    contribution("hospital-b", with_fisher=False).save(tmp_path)
    assert Contribution.open(tmp_path).fisher is None


@pytest.mark.parametrize(
    "entry",
    [
        {"client": "hospital-c"},
        {"num_examples": 21},
        {"classes": ["dog", "cat"]},
        {"base": "pico@1"},
        {"kind": "full"},
        {"lineage": {}},
        {"sums": {"cat": 20}},
        {"mixtures": {"cat": 20}},
        {"settings": {"alpha": 0.0}},
        {"note": "added"},
    ],
    ids=lambda entry: next(iter(entry)),
)
def test_an_altered_card_is_refused_and_the_entry_named(entry, tmp_path):
    folder = saved(tmp_path, "hospital-b")
    rewrite_card(folder, **entry)
    with pytest.raises(FileFormatError, match=f"disagree on {next(iter(entry))}"):
        Contribution.open(folder)


def test_a_card_with_another_digest_is_refused(tmp_path):
    folder = saved(tmp_path, "hospital-b")
    rewrite_card(folder, tensors_sha256={CONTENT: "0" * 64})
    with pytest.raises(FileFormatError, match="disagree on the tensors"):
        Contribution.open(folder)


@pytest.mark.parametrize("entry", ["client", "num_examples", "lineage"])
def test_a_card_with_an_entry_taken_out_is_refused(entry, tmp_path):
    folder = saved(tmp_path, "hospital-b")
    card = json.loads((folder / CARD).read_text())
    del card[entry]
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(FileFormatError):
        Contribution.open(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", "null", '{"client": ', "\x80"])
def test_a_card_that_is_none_is_refused(text, tmp_path):
    folder = saved(tmp_path, "hospital-b")
    (folder / CARD).write_bytes(text.encode("latin-1"))
    with pytest.raises(FileFormatError, match="cannot be read"):
        Contribution.open(folder)


@pytest.mark.parametrize("name", [CONTENT, CARD, FISHER])
def test_a_file_exchanged_between_clients_is_refused(name, tmp_path):
    b, c = saved(tmp_path / "b", "hospital-b"), saved(tmp_path / "c", "hospital-c", seed=5)
    shutil.copy(c / name, b / name)
    with pytest.raises(FileFormatError, match=r"disagree on|belongs to client 'hospital-c'"):
        Contribution.open(b)
    Contribution.open(c)


@pytest.mark.parametrize("name", [CONTENT, FISHER])
def test_an_altered_tensor_is_refused(name, tmp_path):
    folder = saved(tmp_path, "hospital-b")
    altered(folder / name, -1)
    with pytest.raises(FileFormatError, match="it was altered"):
        Contribution.open(folder, check=True)


def test_a_file_of_another_content_is_refused(tmp_path):
    folder = saved(tmp_path, "hospital-b")
    shutil.copy(folder / FISHER, folder / CONTENT)
    with pytest.raises(FileFormatError, match="holds a 'fisher', expected a 'contribution'"):
        Contribution.open(folder)


def rewrite_fisher(path: Path, **entries: object) -> None:
    """Write the file again with other entries in its manifest; None: without that entry."""
    tensors, manifest = tensorfile.load(path)
    given = {**manifest, **entries}
    tensorfile.save(path, tensors, {key: v for key, v in given.items() if v is not None})


@pytest.mark.parametrize("entry", ["client", "base", "num_examples"])
def test_a_fisher_that_does_not_say_what_it_is_is_refused(entry, tmp_path):
    folder = saved(tmp_path, "hospital-b")
    rewrite_fisher(folder / FISHER, **{entry: None})
    with pytest.raises(FileFormatError, match=f"KeyError: '{entry}'"):
        Contribution.open(folder)


@pytest.mark.parametrize("count", ["many", [3]])
def test_a_fisher_whose_manifest_counts_nothing_is_refused(count, tmp_path):
    folder = saved(tmp_path, "hospital-b")
    rewrite_fisher(folder / FISHER, num_examples=count)
    with pytest.raises(FileFormatError, match="cannot be used"):
        Contribution.open(folder)


def test_a_fisher_at_other_pre_trained_weights_is_refused_and_both_are_named(tmp_path):
    folder = saved(tmp_path, "hospital-b")
    rewrite_fisher(folder / FISHER, base="pico@1")
    with pytest.raises(BackboneMismatch, match="backbone pico@1, expected pico@0"):
        Contribution.open(folder)


def test_a_factored_fisher_is_kept_as_such(tmp_path):
    given = contribution("hospital-b").fisher.reduced()
    save_fisher(tmp_path / FISHER, given, client="hospital-b", base="pico@0")
    loaded = load_fisher(tmp_path / FISHER, client="hospital-b", base="pico@0")
    assert loaded.form is FisherForm.FACTORED
    assert all(torch.equal(loaded.sums[name], given.sums[name]) for name in given.sums)


@pytest.mark.parametrize("lazily", [False, True])
def test_the_rows_of_a_head_in_an_older_file_are_left_out(tmp_path, lazily):
    sums = {"a": torch.ones(2, 3), "head.weight": torch.ones(2, 3), "head.bias": torch.ones(2)}
    manifest = {"content": "fisher", "client": "ann", "base": "pico@0", "num_examples": 4}
    tensorfile.save(tmp_path / "f", sums, {**manifest, "classes": ["cat", "dog"]})
    guard = (lambda wrong: None) if lazily else None
    fisher = load_fisher(tmp_path / "f", client="ann", base="pico@0", guard=guard)
    assert fisher.num_examples == 4
    assert list(fisher.sums) == ["a"]
    assert "head.bias" not in fisher.sums
    assert torch.equal(fisher.sums["a"], sums["a"])
    assert fisher.reduced().sums["a/rows"].tolist() == [3.0, 3.0]
