"""Instability of the matching: hand-made assignments, and the checkpoints of a run."""

import dataclasses

import numpy as np
import pytest
import torch

from co_detr.checkpoint.loading import load_weights
from co_detr.checkpoint.saving import Checkpointer
from co_detr.tools.analyze.matching import (
    QueryMatching,
    by_number,
    by_place,
    instability,
    intervals_of,
    match_queries,
    measure_instability,
)
from tests.analysis.cases import plain, tiny_samples, tiny_subject
from tests.modeling.builders import randomize, tiny_model


def naive(before: list[int], after: list[int]) -> int:
    """The sum over queries of the paper."""
    return sum(1 for old, new in zip(before, after, strict=True) if old != new)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([-1, 0, 1], [-1, 0, 1], 0),
        ([-1, 0, 1], [0, -1, 1], 2),  # object 0 moves to another query
        ([-1, 0, 1], [-1, 1, 0], 2),  # two objects change places
        ([-1, -1, -1], [-1, -1, 0], 1),
        ([], [], 0),
    ],
)
def test_queries_that_change_their_object(before, after, expected):
    old, new = (QueryMatching(np.array(columns, dtype=int), None) for columns in (before, after))
    assert naive(before, after) == expected
    assert instability(by_number(old), by_number(new)) == expected


def test_random_assignments_against_the_sum_over_queries():
    rng = np.random.default_rng(0)
    for _ in range(20):
        before, after = (rng.permutation([*range(4), *[-1] * 6]) for _ in range(2))
        old, new = QueryMatching(before, None), QueryMatching(after, None)
        assert instability(by_number(old), by_number(new)) == naive(before, after)


def test_by_token_a_new_rank_of_the_same_token_is_no_change():
    old = QueryMatching(np.array([0, -1, 1]), tokens=np.array([70, 80, 90]))
    new = QueryMatching(np.array([-1, 1, 0]), tokens=np.array([80, 90, 70]))
    assert instability(by_number(old), by_number(new)) == 3
    assert instability(by_place(old), by_place(new)) == 0
    moved = QueryMatching(np.array([-1, 1, 0]), tokens=np.array([80, 90, 60]))
    assert instability(by_place(old), by_place(moved)) == 2


def test_matching_is_that_of_training():
    """Labels and boxes that training assigns to the last decoder layer."""
    model = tiny_model(0)
    randomize(model)
    sample = tiny_samples()[0]
    truth = sample.input["instances"]
    with torch.no_grad():
        images = model.preprocess([sample.input])
        output = model.forward_training(images, [truth])
        matching = match_queries(model, model.encode(images), truth)
    labels = output.targets[0].labels[-1, 0]
    found = matching.truths
    assert sorted(found[found >= 0]) == [0, 1, 2]
    expected = np.where(found >= 0, truth.gt_classes.numpy()[found], model.num_classes)
    assert labels.tolist() == expected.tolist()
    assert len(set(matching.tokens.tolist())) == len(found)


@pytest.fixture
def subject(tmp_path):
    """Three checkpoints of random weights, the second twice, as a run of 20 steps may leave."""
    subject = tiny_subject(2, name="mine")
    names = []
    for name, iteration, seed in (
        ("model_0000009", 9, 1),
        ("model_0000019", 19, 2),
        ("model_final", 19, 2),
    ):
        model = tiny_model(2)
        randomize(model, seed)
        Checkpointer(model, str(tmp_path)).save(name, iteration=iteration)
        names.append(tmp_path / f"{name}.pth")
    return dataclasses.replace(subject, checkpoints=tuple(names))


def test_neighboring_checkpoints_are_compared_once(subject):
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    samples = tiny_samples()
    (interval,) = intervals_of(subject, samples, plain)
    assert (interval.start, interval.end) == (10, 20)
    expected = []
    for sample in samples:
        vectors = []
        for seed in (1, 2):
            model = tiny_model(2).eval()
            randomize(model, seed)
            with torch.no_grad():
                memory = model.encode(model.preprocess([sample.input]))
                truth = sample.input["instances"]
                vectors.append(match_queries(model, memory, truth).truths)
        expected.append(naive(*vectors))
    assert interval.by_query == pytest.approx(np.mean(expected))
    assert sum(expected) > 0 and interval.by_token > 0
    after = subject.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert subject.model.auxiliary is not None


def test_section_shows_what_can_be_compared(subject):
    alone = tiny_subject(0, name="one checkpoint")
    section = measure_instability([alone, subject], tiny_samples(), plain)
    assert "one checkpoint has fewer than two checkpoints" in section.text
    assert [row[0] for row in section.tables[0].rows] == ["mine"]
    assert section.numbers["intervals"]["one checkpoint"] == []
    nothing = measure_instability([alone], tiny_samples(), plain)
    assert not nothing.tables and not nothing.charts


def test_without_a_decoder_there_is_no_matching(subject):
    subject.model.decoder = None
    section = measure_instability([subject], tiny_samples(), plain)
    assert "mine has no decoder" in section.text and "fewer than two" not in section.text
    assert not section.tables


@pytest.mark.parametrize("training_parts", [False, True])
def test_weights_of_training_parts_are_read_only_where_the_model_has_them(training_parts):
    model = tiny_model(2)
    state = model.state_dict()
    if not training_parts:
        state["queries.matching.extra_content.weight"] = torch.zeros(3, 4)  # H-DETR
        model.strip_auxiliary()
    filled = tiny_model(2)
    if not training_parts:
        filled.strip_auxiliary()
    with torch.no_grad():
        for parameter in filled.parameters():
            parameter.fill_(7)
    parts = "whole" if training_parts else "inference"
    report = load_weights(filled, {"model": state}, "model.pth", parts=parts)
    assert report.complete and report.num_loaded == len(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(filled.state_dict()[key], value), key
