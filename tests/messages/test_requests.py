"""Requests and answers travel as the very tensors and entries that federations have always sent."""

from __future__ import annotations

import json

import pytest
import torch
from builders import normal, pico_weights, random_head, random_like, task_vector

from clients.course import course_of
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.config.choices import FisherForm, Kind, Statistics
from fedcompo.errors import BackboneError, ContributionError, FileFormatError
from fedcompo.messages import answers, requests
from fedcompo.messages.answers import Process, caps_of
from fedcompo.messages.requests import (
    ANCHOR,
    OWN,
    IdentifyRequest,
    Others,
    Round,
    TrainRequest,
    addressed,
    own_tensors,
    preprocessing_of,
    registered_name,
)
from fedcompo.method.features import FeatureMixture
from fedcompo.method.fisher import expanded
from fedcompo.method.statistics import FeatureSums
from fedcompo.report.confusion import Tally
from fedcompo.storage.files import canonical
from fedcompo.training.fit import Course

THETA_0 = pico_weights(dtype=torch.float32)
CLASSES = ("cat", "dog")
JOINT = random_head(("ape", "cat", "dog"), 3, seed=1)
HEAD = random_head(CLASSES, 3, seed=2)
VECTOR = dict(task_vector(Kind.LORA, THETA_0, seed=3, base="pico@0").tensors)
REST = random_like(THETA_0, seed=4)
FISHER = random_like(THETA_0, seed=5, positive=True)
FACTORED = {
    f"{name}/{end}": total.sum(axis)
    for name, total in FISHER.items()
    for end, axis in (("rows", 1), ("columns", 0))
}
SUMS = FeatureSums.of(normal(9, 3, seed=6), torch.tensor([0] * 5 + [1] * 4), CLASSES)
MIXTURE = FeatureMixture(normal(2, seed=8), normal(2, 3, seed=9), normal(2, 3, seed=10).square(), 5)
OTHER_MIXTURE = FeatureMixture(
    normal(1, seed=11), normal(1, 3, seed=12), normal(1, 3, seed=13).square(), 4
)


def named(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


HEAD_BODY = {"head/weight": HEAD.weight, "head/bias": HEAD.bias}
JOINT_BODY = {"head/weight": JOINT.weight, "head/bias": JOINT.bias}
JOINT_CLASSES = {"classes": ["ape", "cat", "dog"]}
OWN_BODY = {**named("task_vector", VECTOR), **HEAD_BODY}
ALONE = {**JOINT_CLASSES, "kind": "lora", "frozen": True}
ENSEMBLE = {"ensemble": {"share": 0.25, "scale": 2.0}}
MIXTURES_BODY = {
    "features/cat/weights": MIXTURE.weights,
    "features/cat/means": MIXTURE.means,
    "features/cat/variances": MIXTURE.variances,
    "features/dog/weights": OTHER_MIXTURE.weights,
    "features/dog/means": OTHER_MIXTURE.means,
    "features/dog/variances": OTHER_MIXTURE.variances,
}
WHO = {"client": "ann", "base": "pico@0", "classes": ["cat", "dog"]}
COUNTS = {"mixtures": {"cat": 5, "dog": 4}}
ABOUT = {"num_test_examples": 7, "noised": False}
ANN = {"client": "ann", "base": "pico@0", "classes": CLASSES}
MIXTURES = {"cat": MIXTURE, "dog": OTHER_MIXTURE}
INT8 = {"wire_error": 0.01, "wire": "int8"}
CODED = {"fisher/w": torch.zeros(2, dtype=torch.uint8), "scales/fisher/w": torch.ones(1)}

CASES = {
    "identify": (requests.IdentifyRequest(), {}, {}),
    "describe": (requests.DescribeRequest(fisher=True), {}, {"fisher": True}),
    "notice": (
        requests.NoticeRequest(text="eve left", record="{}"),
        {},
        {"text": "eve left", "record": "{}"},
    ),
    "fisher": (requests.FisherRequest(joint=JOINT), JOINT_BODY, JOINT_CLASSES),
    "realign": (
        requests.RealignRequest(
            total=REST, linearised=True, factors=(0.0, 0.5), form=Statistics.SUMS, vote=True
        ),
        named("total", REST),
        {"linearised": True, "factors": [0.0, 0.5], "statistics": "sums", "vote": True},
    ),
    "vote": (
        requests.VoteRequest(total=REST, linearised=False, factors=(0.5,), heads=(JOINT, JOINT)),
        {
            **named("total", REST),
            **named("heads/0", JOINT_BODY),
            **named("heads/1", JOINT_BODY),
        },
        {**JOINT_CLASSES, "linearised": False, "factors": [0.5], "heads": 2},
    ),
    "evaluate": (
        requests.EvaluateRequest(theta=REST, joint=JOINT, linearised=False),
        {**named("theta", REST), **JOINT_BODY},
        {**JOINT_CLASSES, "linearised": False},
    ),
    "evaluate, beside the clients' own heads": (
        requests.EvaluateRequest(theta=REST, joint=JOINT, linearised=False, own_heads=JOINT),
        {**named("theta", REST), **JOINT_BODY, **named("heads", JOINT_BODY)},
        {**JOINT_CLASSES, "linearised": False},
    ),
    "train, held by nothing": (
        TrainRequest(joint=JOINT, kind=Kind.LORA, frozen=True, needs={}),
        JOINT_BODY,
        {**ALONE, "needs": {}},
    ),
    "train": (
        TrainRequest(
            joint=JOINT,
            kind=Kind.LORA,
            frozen=True,
            needs={"anchor": ""},
            sent={ANCHOR: FACTORED},
        ),
        {**JOINT_BODY, **named("anchor", FACTORED)},
        {**ALONE, "needs": {"anchor": ""}},
    ),
    "train inside the members": (
        TrainRequest(
            joint=JOINT,
            kind=Kind.LORA,
            frozen=True,
            needs={},
            others=Others(rest=REST, share=0.25, scale=2.0),
        ),
        {**JOINT_BODY, **named("rest", REST)},
        {**ALONE, "needs": {}, **ENSEMBLE},
    ),
    "train in a round": (
        TrainRequest(
            joint=JOINT,
            kind=Kind.LORA,
            frozen=False,
            needs={"anchor": "aa", "own": "bb"},
            sent={OWN: own_tensors(VECTOR, HEAD)},
            others=Others(rest=REST, share=0.25, scale=2.0),
            round=Round(number=2, federation="f00d", last=True, passed=0.5, share=0.5),
        ),
        {**JOINT_BODY, **named("own", OWN_BODY), **named("rest", REST)},
        {
            **JOINT_CLASSES,
            "kind": "lora",
            "frozen": False,
            "federation": "f00d",
            "last": True,
            "needs": {"anchor": "aa", "own": "bb"},
            **ENSEMBLE,
            "course": {"passed": 0.5, "share": 0.5},
            "round": 2,
        },
    ),
    "averaging": (
        requests.AveragingRequest(
            kind=Kind.LORA, task_vector=VECTOR, joint=JOINT, rounds=3, number=2
        ),
        {**named("task_vector", VECTOR), **JOINT_BODY},
        {**JOINT_CLASSES, "kind": "lora", "rounds": 3, "server-round": 2},
    ),
    "averaging, FedProx": (
        requests.AveragingRequest(
            kind=Kind.IA3, task_vector=VECTOR, joint=JOINT, rounds=3, number=1, proximal_mu=0.0
        ),
        {**named("task_vector", VECTOR), **JOINT_BODY},
        {**JOINT_CLASSES, "kind": "ia3", "rounds": 3, "server-round": 1, "proximal-mu": 0.0},
    ),
    "answer to notice": (answers.NoticeAnswer(**ANN), {}, {"content": "notice", **WHO}),
    "answer to identify": (
        answers.IdentifyAnswer(**ANN, num_test_examples=7),
        {},
        {"content": "identify", **WHO, **ABOUT},
    ),
    "answer to describe, with mixtures": (
        answers.DescribeAnswer(
            **ANN, num_test_examples=7, statistics=MIXTURES, pictures={"repeated": 2}
        ),
        MIXTURES_BODY,
        {
            "content": "describe",
            **WHO,
            **ABOUT,
            **COUNTS,
            "kind": "",
            "pictures": {"repeated": 2},
        },
    ),
    "answer to describe under noise, by one who insists on a kind": (
        answers.DescribeAnswer(
            **ANN,
            num_test_examples=7,
            noised=True,
            statistics=MIXTURES,
            kind=Kind.IA3,
            caps={"noise": 2.0, "clip": 1.0},
        ),
        MIXTURES_BODY,
        {
            "content": "describe",
            **WHO,
            "num_test_examples": 7,
            "noised": True,
            **COUNTS,
            "kind": "ia3",
            "caps": {"noise": 2.0, "clip": 1.0},
        },
    ),
    "answer to realign": (
        answers.RealignAnswer(**ANN, statistics=(MIXTURES, MIXTURES)),
        {**named("0", MIXTURES_BODY), **named("1", MIXTURES_BODY)},
        {"content": "realign", **WHO, "statistics": [COUNTS, COUNTS]},
    ),
    "answer to vote": (
        answers.VoteAnswer(**ANN, hits=(3, 4), losses=(0.5, 0.25), num_examples=5),
        {},
        {"content": "vote", **WHO, "hits": [3, 4], "losses": [0.5, 0.25], "num_examples": 5},
    ),
    "answer to fisher": (
        answers.FisherAnswer(
            **ANN,
            tensors=named("fisher", FISHER),
            num_examples=9,
            form=FisherForm.DENSE,
            report={"seconds": 1.5},
        ),
        named("fisher", FISHER),
        {
            "content": "fisher",
            **WHO,
            "num_examples": 9,
            "form": "dense",
            "report": {"seconds": 1.5},
        },
    ),
    "answer to fisher in fewer bits": (
        answers.FisherAnswer(
            **ANN,
            tensors=CODED,
            num_examples=9,
            form=FisherForm.FACTORED,
            report={},
            caps={"form": "factored", **INT8},
        ),
        CODED,
        {
            "content": "fisher",
            **WHO,
            "num_examples": 9,
            "form": "factored",
            "report": {},
            "wire": "int8",
            "caps": {"form": "factored", **INT8},
        },
    ),
    "answer to train": (
        answers.TrainAnswer(
            **ANN,
            tensors=OWN_BODY,
            kind=Kind.LORA,
            losses=(1.5, 0.5),
            holds={"own": "bb"},
            own_task_accuracy=0.75,
            frozen_class_il_accuracy=0.25,
            frozen_task_il_accuracy=0.5,
        ),
        OWN_BODY,
        {
            "content": "train",
            **WHO,
            "kind": "lora",
            "losses": [1.5, 0.5],
            "holds": {"own": "bb"},
            "own_task_accuracy": 0.75,
            "frozen_class_il_accuracy": 0.25,
            "frozen_task_il_accuracy": 0.5,
        },
    ),
    "answer to train in fewer bits, without the frozen backbone": (
        answers.TrainAnswer(
            **ANN,
            tensors=OWN_BODY,
            kind=Kind.LORA,
            losses=(0.5,),
            holds={},
            own_task_accuracy=0.75,
            caps=INT8,
        ),
        OWN_BODY,
        {
            "content": "train",
            **WHO,
            "kind": "lora",
            "losses": [0.5],
            "holds": {},
            "wire": "int8",
            "caps": INT8,
            "own_task_accuracy": 0.75,
        },
    ),
    "answer to train by one who cannot": (
        answers.LacksAnswer(**ANN, lacks=("anchor", "own")),
        {},
        {"content": "train", **WHO, "lacks": ["anchor", "own"]},
    ),
    "answer to averaging": (
        answers.AveragingAnswer(
            base="pico@0",
            tensors=OWN_BODY,
            kind=Kind.LORA,
            losses=(0.5,),
        ),
        OWN_BODY,
        {"content": "train", "kind": "lora", "base": "pico@0", "losses": [0.5]},
    ),
    "answer to evaluate": (
        answers.EvaluateAnswer(**ANN, class_il_accuracy=0.5, task_il_accuracy=0.75),
        {},
        {"content": "evaluate", **WHO, "class_il_accuracy": 0.5, "task_il_accuracy": 0.75},
    ),
    "answer to evaluate, with counts": (
        answers.EvaluateAnswer(
            **ANN,
            class_il_accuracy=0.5,
            task_il_accuracy=0.75,
            num_examples=4,
            tally=Tally({"cat": {"cat": 2, "dog": 1}}, ((0, 0.0, 0), (3, 0.25, 2))),
        ),
        {},
        {
            "content": "evaluate",
            **WHO,
            "class_il_accuracy": 0.5,
            "task_il_accuracy": 0.75,
            "num_examples": 4,
            "confusion": {"cat": {"cat": 2, "dog": 1}},
            "bins": [[0, 0.0, 0], [3, 0.25, 2]],
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_message_is_the_same_bytes_as_ever(case):
    message, tensors, manifest = CASES[case]
    written, stated = message.to_body()
    assert canonical(stated) == canonical(manifest)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_was_written(case):
    message = CASES[case][0]
    assert type(message).from_body(message.to_body()) == message


def test_a_request_travels_with_the_name_that_the_server_knows_the_node_by():
    body = addressed(IdentifyRequest().to_body(), "hospital-a")
    assert body == ({}, {"content": "request", "registered_name": "hospital-a"})
    assert registered_name(body) == "hospital-a"
    assert registered_name(({}, {})) == ""


def test_a_request_travels_with_how_the_server_wants_pictures_prepared():
    seen = Preprocessing((8, 6), 1, (0.5,), (0.25,), crop_mode="squash", rule=1)
    body = addressed(IdentifyRequest().to_body(), "", seen)
    assert preprocessing_of(json.loads(json.dumps(body))) == seen
    assert preprocessing_of(({}, {})) is None
    with pytest.raises(BackboneError):
        preprocessing_of(({}, {"preprocessing": ["nonsense"]}))


def test_an_answer_says_what_its_process_took_and_ran():
    about = {"peak_memory": {"resident": 5}, "versions": {"torch": "2"}}
    assert Process(**about).to_body() == ({}, about)
    assert Process.from_body(({}, {"content": "notice", **about})) == Process(**about)


@pytest.mark.parametrize("told", [{"noise": 1.0}, "int8", ["head"]])
def test_whatever_an_answer_tells_of_caps_is_handed_on_to_be_judged(told):
    assert caps_of(({}, {"caps": told})) == [told]
    assert caps_of(({}, {"caps": told, "fisher": {"caps": {"noise": 2.0}}})) == [
        told,
        {"noise": 2.0},
    ]
    assert caps_of(({}, {"fisher": True})) == []


def test_sums_and_a_fisher_come_in_one_message():
    fisher = answers.FisherAnswer(
        **ANN,
        tensors=named("fisher", FACTORED),
        num_examples=9,
        form=FisherForm.FACTORED,
        report={},
        caps=INT8,
    )
    sent = answers.DescribeAnswer(**ANN, num_test_examples=7, statistics=SUMS, fisher=fisher)
    tensors, manifest = sent.to_body()
    assert manifest["wire"] == "int8"  # of the whole message
    assert manifest["sums"] == {"cat": 5, "dog": 4}
    read = answers.DescribeAnswer.from_body((tensors, manifest))
    assert read.fisher == fisher
    for name, tensor in SUMS.tensors().items():
        assert torch.equal(read.statistics.tensors()[name], tensor)
    again = answers.RealignAnswer(**ANN, statistics=(SUMS,)).to_body()
    (own,) = answers.RealignAnswer.from_body(again).statistics
    assert torch.equal(own.sums, SUMS.sums)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors, manifest: manifest["sums"].update(cat=6), "their manifest says"),
        (lambda tensors, manifest: manifest["sums"].update(cat=-1), "whole number"),
        (
            lambda tensors, manifest: tensors.update(
                {"statistics/second": tensors["statistics/second"].bool()}
            ),
            "torch.bool",
        ),
    ],
)
def test_sums_that_cannot_be_true_are_refused(change, reason):
    sent = answers.DescribeAnswer(**ANN, num_test_examples=7, statistics=SUMS)
    tensors, manifest = sent.to_body()
    change(tensors, manifest)
    with pytest.raises((FileFormatError, ContributionError), match=reason):
        answers.DescribeAnswer.from_body((tensors, manifest))


@pytest.mark.parametrize(
    "change",
    [
        {"confusion": {"cat": {"cat": -2}}},
        {"confusion": {"cat": {"cat": 2.5}}},
        {"confusion": {"cat": {"cat": True}}},
        {"confusion": {"cat": 3}},
        {"confusion": ["cat"]},
        {"bins": [[-1, 0.5, 0]]},
        {"bins": [[1, "sure", 0]]},
        {"bins": [[1, 0.5]]},
        {"bins": None},
        {"num_examples": "many"},
    ],
    ids=str,
)
def test_counts_of_another_form_are_refused(change):
    _, _, manifest = CASES["answer to evaluate, with counts"]
    with pytest.raises((FileFormatError, TypeError, ValueError, AttributeError)):
        answers.EvaluateAnswer.from_body(({}, manifest | change))


@pytest.mark.parametrize("name", ["../own", "/etc/own", "theta"])
def test_a_server_cannot_have_a_client_keep_what_it_likes(name):
    manifest = {**ALONE, "needs": {name: "00"}}
    with pytest.raises(FileFormatError, match="expected anchor or own"):
        TrainRequest.from_body(({**JOINT_BODY, f"{name}/a": torch.zeros(1)}, manifest))


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2]])
def test_an_entry_that_is_missing_is_named(case):
    """Those that may be missing have a value that stands for it, or make another message."""
    message, tensors, manifest = CASES[case]
    optional = {"content", "caps", "wire", "noised", "form", "holds", "kind", "classes"}
    optional |= {"mixtures"}  # without them it says sums
    optional |= {key for key in manifest if key.endswith("accuracy")}
    optional |= {"ensemble", "round", "proximal-mu", "pictures"}
    if case.startswith("answer to evaluate"):
        optional |= {"num_examples", "confusion"}
    for key in manifest.keys() - optional:
        rest = {k: v for k, v in manifest.items() if k != key}
        with pytest.raises(KeyError, match=key):
            type(message).from_body((tensors, rest))


def test_what_a_request_to_train_needs_besides_is_read_from_what_came_along():
    request = CASES["train in a round"][0]
    assert request.lacks == ("anchor",)
    course = course_of(request, THETA_0, base="pico@0", classes=CLASSES, beta=7.0)
    ensemble = course.ensemble
    assert (course.head, course.anchor) == (HEAD, None)
    assert (course.begin.kind, course.begin.base) == (Kind.LORA, "pico@0")
    assert course.begin.tensors == VECTOR
    assert (course.passed, course.share) == (0.5, 0.5)
    assert (ensemble.share, ensemble.beta, ensemble.scale) == (0.25, 7.0, 2.0)
    assert ensemble.rest == REST


def test_a_request_to_train_alone_brings_a_metric_or_nothing():
    who = {"base": "pico@0", "classes": CLASSES, "beta": 1.0}
    anchor = course_of(CASES["train"][0], THETA_0, **who).anchor
    dense = expanded(FACTORED, THETA_0)
    assert all(torch.equal(anchor.weights[name], dense[name]) for name in THETA_0)
    assert course_of(CASES["train, held by nothing"][0], THETA_0, **who) == Course()


def test_the_head_of_a_single_class_is_not_trained():
    request = CASES["train in a round"][0]
    course = course_of(request, THETA_0, base="pico@0", classes=("cat",), beta=1.0)
    assert (course.fixed, course.head) == (True, None)


def test_what_was_trained_is_read_from_the_tensors_that_came():
    answer = CASES["answer to train"][0]
    assert answer.task_vector == VECTOR
    assert answer.head(CLASSES) == HEAD
    assert answer.own.keys() == OWN_BODY.keys()
    assert CASES["answer to fisher"][0].parts == FISHER
