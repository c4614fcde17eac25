"""Accuracy over arrivals: figures taken by hand, also where a client could not be measured."""

from __future__ import annotations

import json

import pytest

from server.sequential import AccuracyMatrix

THREE = (
    AccuracyMatrix()
    .after("ann", {"ann": 0.9})
    .after("ben", {"ann": 0.7, "ben": 0.8})
    .after("eve", {"ann": 0.75, "ben": 0.5, "eve": 1.0})
)


def test_the_course_is_the_mean_over_who_is_there_after_each_arrival():
    assert THREE.arrivals == ("ann", "ben", "eve")
    assert THREE.course == pytest.approx([0.9, 0.75, 0.75])
    assert THREE.average == pytest.approx(0.8)
    assert THREE.final == pytest.approx(0.75)


def test_forgetting_is_the_mean_loss_from_each_clients_best_but_the_last_ones():
    """ann lost 0.9 - 0.75, ben 0.8 - 0.5; eve had no time to."""
    assert THREE.forgetting == pytest.approx((0.15 + 0.3) / 2)


def test_a_client_that_gained_counts_as_less_than_nothing_forgotten():
    gained = AccuracyMatrix().after("ann", {"ann": 0.5}).after("ben", {"ann": 0.8, "ben": 0.1})
    assert gained.forgetting == pytest.approx(-0.3)


def test_who_was_not_measured_enters_no_mean():
    """After ben came nobody answered; in the end ann did not; ben's best is that of the third."""
    holes = (
        AccuracyMatrix()
        .after("ann", {"ann": 0.9})
        .after("ben", {})
        .after("eve", {"ben": 0.6, "eve": 0.4})
        .after("zoe", {"ben": 0.5, "zoe": 0.7})
    )
    assert holes.course[0] == pytest.approx(0.9)
    assert holes.course[1] is None
    assert holes.course[2:] == pytest.approx([0.5, 0.6])
    assert holes.average == pytest.approx((0.9 + 0.5 + 0.6) / 3)
    assert holes.forgetting == pytest.approx(0.1)
    assert holes.as_json()["matrix"] == [
        [0.9, None, None, None],
        [None, None, None, None],
        [None, 0.6, 0.4, None],
        [None, 0.5, None, 0.7],
    ]


@pytest.mark.parametrize(
    ("matrix", "final"),
    [
        (AccuracyMatrix(), None),
        (AccuracyMatrix().after("ann", {}), None),
        (AccuracyMatrix().after("ann", {"ann": 0.9}), 0.9),
        (AccuracyMatrix().after("ann", {}).after("ben", {"ann": 0.2, "ben": 0.6}), 0.4),
    ],
)
def test_until_two_clients_were_measured_nothing_is_forgotten(matrix, final):
    assert matrix.final == (final if final is None else pytest.approx(final))
    assert matrix.average == matrix.final
    assert matrix.forgetting is None


def test_a_row_more_is_a_new_matrix_that_later_changes_do_not_reach():
    row = {"ann": 0.9}
    before = AccuracyMatrix()
    after = before.after("ann", row)
    row["ann"] = 0.0
    assert before == AccuracyMatrix()
    assert after.final == 0.9


def test_as_json_is_the_matrix_by_arrivals_and_its_figures():
    values = json.loads(json.dumps(THREE.as_json(), allow_nan=False))
    assert values["arrivals"] == ["ann", "ben", "eve"]
    assert values["matrix"] == [[0.9, None, None], [0.7, 0.8, None], [0.75, 0.5, 1.0]]
    assert values["course"] == pytest.approx([0.9, 0.75, 0.75])
    assert [values[key] for key in ("average", "final", "forgetting")] == pytest.approx(
        [0.8, 0.75, 0.225]
    )
