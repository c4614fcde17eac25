"""What people see of results in a terminal: tables that fit it."""

from __future__ import annotations

import io

from fedcompo.report.confusion import BINS, Tally, by_class
from fedcompo.report.console import PlainConsole
from fedcompo.report.results import cosines_of, print_results
from fedcompo.report.units import percent

ACCURACIES = {
    "class_il_accuracy": 0.875,
    "task_il_accuracy": 1.0,
    "frozen_class_il_accuracy": 0.5,
    "frozen_task_il_accuracy": 0.75,
    "own_task_accuracy": 0.9375,
}


def results(clients: int = 3) -> dict:
    names = [f"client-{i}" for i in range(clients)]
    cost = {"bytes_sent": 2_345_678, "bytes_received": 616, "seconds": 1.5}
    figures = {
        **ACCURACIES,
        "classes": ["a <b>", "c & d"],
        "kind": "lora",
        "num_examples": 20,
        "num_test_examples": 5,
        "traffic": {"train": cost},
    }
    gram = [[4.0 if i == j else 1.0 for j in range(clients)] for i in range(clients)]
    return {
        **ACCURACIES,
        "per_client": {name: dict(figures) for name in names},
        "phases": {
            "align": {"seconds": 0.2, "bytes_sent": 0, "peak_memory_bytes": {"server": 10**9}},
            "train": {"seconds": 9.0, "bytes_sent": 7_000_000, "peak_memory_bytes": {}},
        },
        "diagnostics": {
            "clients": names,
            "fisher_gram": gram,
            "tau_norms": [1.0] * clients,
            "composition_gap": 0.125,
            "outliers": names[:1],
        },
        "left_out": [{"client": "late [one]", "phase": "train", "reason": "no answer"}],
        "notes": ["something [odd]"],
    }


def printed(value: dict, width: int = 80, *, details: bool = False) -> str:
    stream = io.StringIO()
    console = PlainConsole(file=stream, width=width, force_terminal=True, color_system=None)
    print_results(value, console, details=details)
    return stream.getvalue()


def test_every_figure_is_printed_and_fits_a_terminal():
    text = printed(results(5), details=True)
    for figure in ("87.5", "100.0", "50.0", "93.8", "616 B", "7.0 MB", "+0.25", "4 │", "0.125"):
        assert figure in text
    assert "late [one] (train): no answer" in text
    assert "something [odd]" in text
    assert "Outliers: client-0" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_each_column_is_explained_and_the_field_s_symbols_are_among_the_details():
    value = {**results(5), "own_heads_accuracy": 0.6}
    for own in value["per_client"].values():
        own["own_heads_accuracy"] = 0.6
    text = printed(value)
    titles = "images", "frozen", "alone", "own heads", "all classes", "own classes"
    assert all(f" {title}: " in f" {text}" or f"\n{title}: " in text for title in titles)
    assert (text.count("class-IL"), text.count("task-IL")) == (1, 1)
    assert not any(symbol in text for symbol in ("Ω", "τ", "Fisher"))
    assert "Outliers: client-0" in text
    assert all(symbol in printed(value, details=True) for symbol in ("Ω", "τᵀF̄τ", "Fisher"))


def test_few_test_images_get_an_interval_and_the_worst_classes_a_line():
    value = results(3) | {"interval": [0.8, 0.925]}
    assert "[" not in printed(value).partition("Bytes")[0]
    for own, images in zip(value["per_client"].values(), (5, 999, 1000), strict=True):
        own.update(interval=[0.6, 0.96], num_test_examples=images)
    tally = Tally({"a <b>": {"a <b>": 4, "c [d]": 1}}, ((0, 0.0, 0),) * BINS)
    value |= by_class({"client-0": tally}, ("a <b>", "c [d]"))
    text = printed(value)
    assert text.count("[60–96]") == 2
    assert "[80–92]" not in text  # of 2004 images together
    assert "[low–high]: what so few test images leave open (95 % interval)" in text
    assert "Worst classes: 'a <b>' 4 of 5 right (1 as 'c [d]')." in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_figure_that_nobody_reported_is_a_dash():
    value = results()
    value["per_client"]["client-1"]["class_il_accuracy"] = None
    assert "–" in printed(value)
    assert percent(None) == "–"


def test_cosines_are_those_of_the_gram_matrix_and_zero_vectors_have_none():
    assert cosines_of([[4.0, 3.0], [3.0, 9.0]]) == [[1.0, 0.5], [0.5, 1.0]]
    assert cosines_of([[0.0, 0.0], [0.0, 9.0]]) == [[0.0, 0.0], [0.0, 1.0]]


def test_of_many_clients_the_first_are_shown_and_the_rest_counted():
    many = results(clients=50)
    text = printed(many, width=200)
    assert "client-39" in text
    assert "client-40" not in text
    assert "and 10 more" in text


def test_like_phases_share_a_column_with_their_sums():
    value = results(clients=1)
    phase = value["phases"].pop("train")
    cost = value["per_client"]["client-0"]["traffic"].pop("train")
    for label in ("train, round 1", "train, round 2"):
        value["phases"][label] = phase
        value["per_client"]["client-0"]["traffic"][label] = cost
    text = printed(value, width=200)
    assert "train × 2" in text
    assert "14.0 MB" in text
    assert "1.2 kB" in text
    assert "18.0" in text
