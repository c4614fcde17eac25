"""The scripts behind the text scenario: what the corpus holds, and what is learnt before it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from fedcompo.config.data import DataConfig
from fedcompo.data.client_data import load_client_data
from fedcompo.data.sources.text import text_catalogue

sys.path.append(str(Path(__file__).resolve().parents[2] / "simulations" / "material"))
LINES = [f"value_{place} = {place} * other_{place}" for place in range(200)]


@pytest.fixture(scope="module")
def corpus():
    return importlib.import_module("text_corpus")


@pytest.fixture(scope="module")
def pretraining(corpus):
    return importlib.import_module("pretrain_text")


@pytest.fixture(scope="module")
def written(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["text_corpus.py", str(path), "--train", "20", "--test", "5"])
        corpus.main()
    return path


def test_examples_are_consecutive_lines_that_fit_and_together_are_the_file(corpus):
    found = list(corpus.examples(LINES, 100))
    whole, joined = "\n".join(LINES), "\n".join(found)
    assert whole.startswith(joined)
    assert len(whole) - len(joined) <= 60  # too little for an example
    assert all(60 <= len(text) <= 100 for text in found)


def test_what_lies_at_the_border_of_two_stretches_is_in_neither_split(corpus):
    found = [str(place) for place in range(10 * corpus.STRETCH)]
    splits = dict(corpus.split_of(found))
    tests = {int(place) for place, split in splits.items() if split == "test"}
    trains = {int(place) for place, split in splits.items() if split == "train"}
    assert tests and not tests & trains
    assert min(abs(a - b) for a in tests for b in trains) == 2


def test_licences_and_blank_lines_are_left_out(corpus, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "#! /usr/bin/env python\n# Copyright (c) somebody\n# who lets you do things.\n\n"
        '"""Does it.\n\nAll rights reserved by nobody.\n"""\n# a comment stays\nx = 1\n'
    )
    assert corpus.lines_of(file) == ['"""Does it.', '"""', "# a comment stays", "x = 1"]


def test_the_corpus_holds_each_text_once_and_as_many_of_each_class(corpus, written):
    catalogue = text_catalogue(written)
    assert catalogue.names == tuple(sorted(corpus.CLASSES))
    texts = [catalogue.open(index) for index in range(len(catalogue.classes))]
    assert len({b" ".join(text.split()) for text in texts}) == len(texts) == 25 * 30
    assert all(corpus.SHORTEST <= len(text) <= corpus.LENGTH for text in texts)
    assert not any(b"copyright" in text.lower() for text in texts)
    for name in catalogue.names:
        own = catalogue.classes == name
        assert (own.sum(), (own & catalogue.is_test).sum()) == (25, 5)


def test_clients_load_the_corpus(written, pretraining):
    source = DataConfig(f"text:{written}", num_tasks=5, num_classes=20)
    client = load_client_data(source, pretraining.READS, partition=4, seed=0)
    assert client.train.images.shape == (80, 1, 1, pretraining.LENGTH)


def test_nothing_is_learnt_beforehand_from_a_class_of_the_corpus(corpus, pretraining, monkeypatch):
    read = []
    monkeypatch.setattr(pretraining, "sources", lambda name: read.append(name) or [])
    pretraining.load_modules()
    assert len(read) > 80
    assert not set(read) & set(corpus.CLASSES)


def test_pre_training_learns_and_is_the_same_each_time(pretraining, capsys, monkeypatch):
    monkeypatch.setattr(pretraining, "DIRECTIONS", 8)
    monkeypatch.setattr(pretraining, "HELD_OUT", 200)
    lines = [pretraining.lines_of(Path(file)) for file in (pretraining.__file__, __file__)]
    modules = [[own[start : start + 50] for start in range(0, len(own), 50)] for own in lines]
    settings = {"steps": 20, "batch": 8, "peak": 4e-3, "seed": 0}
    models = [pretraining.pretrain(modules, modules, **settings) for _ in range(2)]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    said = capsys.readouterr().out
    assert float(said.split("held out: ")[1].split()[0]) > 0
