"""Distances between heads: class activation maps, divergences, and no trace in the model."""

import json
import random

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from co_detr.tools.analyze.conflict import (
    Distances,
    activation_map,
    distances_of,
    divergence,
    head_losses,
    log_distribution,
    measure_conflict,
)
from co_detr.tools.analyze.discriminability import LevelLayout, score_maps
from tests.analysis.cases import encoder_only_subject, plain, tiny_samples, tiny_subject
from tests.modeling.builders import random_memory


def _maps(number, shape=(6, 8)):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator) for _ in range(number)]


def test_divergence_against_its_definition():
    first, second = _maps(2)
    p = np.exp(first.double().numpy()) / np.exp(first.double().numpy()).sum()
    q = np.exp(second.double().numpy()) / np.exp(second.double().numpy()).sum()
    expected = sum(a * np.log(a / b) for a, b in zip(p.ravel(), q.ravel(), strict=True))
    found = divergence(log_distribution(first), log_distribution(second))
    assert found == pytest.approx(expected, rel=1e-9) and found > 0
    assert found != pytest.approx(divergence(log_distribution(second), log_distribution(first)))


def test_equal_maps_have_no_distance_and_none_is_negative():
    logs = [log_distribution(scores) for scores in (*_maps(5), torch.zeros(6, 8))]
    for i, first in enumerate(logs):
        for j, second in enumerate(logs):
            found = divergence(first, second)
            assert found == pytest.approx(0, abs=1e-12) if i == j else found > 1e-4


def test_average_is_equation_10():
    rng = np.random.default_rng(0)
    for heads in (2, 3, 5):
        matrix = rng.random((heads, heads)) * (1 - np.eye(heads))
        distances = Distances([str(i) for i in range(heads)], [matrix, 3 * matrix])
        np.testing.assert_allclose(distances.directed, 2 * matrix)
        assert (distances.symmetric == distances.symmetric.T).all()
        among = range(heads) if heads == 2 else range(1, heads)  # the first is the decoder
        of_heads = [
            sum(2 * matrix[i, j] + 2 * matrix[j, i] for j in among if j != i)
            / (2 * (len(among) - 1))
            for i in among
        ]
        assert distances.average == pytest.approx(np.mean(of_heads))


def test_activation_map_is_grad_cam():
    shapes, size, padded = [(4, 6), (2, 3)], (32, 32), (32, 48)
    memory = random_memory(shapes, [size], channels=5)
    factors = torch.randn(memory.tokens.shape, dtype=torch.float64)
    layout = LevelLayout(size, padded, shapes)
    found = activation_map(memory, -(memory.tokens * factors).sum(), layout)
    maps, start = [], 0
    for (height, width), (rows, columns) in zip(shapes, [(4, 4), (2, 2)], strict=True):
        expected = torch.zeros(height, width, dtype=torch.float64)
        weights = torch.zeros(5, dtype=torch.float64)
        for row in range(rows):
            for column in range(columns):
                weights += factors[0, start + row * width + column] / (rows * columns)
        for row in range(rows):
            for column in range(columns):
                features = memory.tokens[0, start + row * width + column].detach()
                expected[row, column] = max(0.0, float(features @ weights))
        maps.append(expected)
        start += height * width
    torch.testing.assert_close(found, score_maps(maps, layout).fused)
    assert 0 < found.max() <= 1 and found.shape == size


def test_a_constant_loss_has_a_map_of_zeros():
    memory = random_memory(((4, 4),), ((32, 32),))
    loss = torch.ones((), requires_grad=True) * 2
    assert not activation_map(memory, loss, LevelLayout((32, 32), (32, 32), [(4, 4)])).any()


def test_losses_are_those_of_a_training_step():
    subject, (sample, _) = tiny_subject(2), tiny_samples()
    model = subject.model.train()
    images = model.preprocess([sample.input])
    torch.manual_seed(0)
    with EventStorage():
        _, losses = head_losses(model, images, sample.input["instances"])
    torch.manual_seed(0)
    with EventStorage():
        expected = model([sample.input])
    assert losses.keys() == {"decoder", "roi", "atss"}
    for name, prefix in (("decoder", "matching."), ("roi", "roi."), ("atss", "atss.")):
        parts = [
            value
            for key, value in expected.items()
            if key.startswith(prefix) and not key.startswith("matching.enc.")
        ]
        torch.testing.assert_close(losses[name], sum(parts))


def test_nothing_is_left_behind():
    subject, samples = tiny_subject(2), tiny_samples(num_gts=(3, 0))
    model = subject.model
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = distances_of(model, samples, plain)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    # What heads draw is the same each time, and a frozen model has the same gradients.
    with torch.no_grad():
        second = distances_of(model.requires_grad_(False), samples, plain)
    np.testing.assert_allclose(second.images, first.images, rtol=1e-6)
    assert len(first.images) == 2 and all(np.isfinite(picture).all() for picture in first.images)


def test_an_error_leaves_the_model_in_eval_mode():
    subject = tiny_subject(1)

    def failing(samples):
        yield samples[0]
        raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        distances_of(subject.model, tiny_samples(), failing)
    assert not any(module.training for module in subject.model.modules())


def test_section_leaves_out_what_does_not_apply():
    subjects = [tiny_subject(0), encoder_only_subject(), tiny_subject(2), tiny_subject(1)]
    section = measure_conflict(subjects, tiny_samples(num_gts=(3, 0)), plain)
    assert "K = 0 is left out" in section.text and "encoder only is left out" in section.text
    average, directed = section.tables
    assert [row[:2] for row in average.rows] == [("K = 2", 2), ("K = 1", 1)]
    assert all(row[2] > 0 for row in average.rows)
    assert directed.columns == ("model", "head", "decoder", "roi", "atss")
    assert [row[:2] for row in directed.rows] == [
        *(("K = 2", head) for head in ("decoder", "roi", "atss")),
        *(("K = 1", head) for head in ("decoder", "atss")),
    ]
    assert directed.rows[3][3] is None  # K = 1 has no roi
    json.dumps(section.numbers, allow_nan=False)
    assert [chart.name for chart in section.charts] == ["distances-1", "distances-2"]
    assert len(section.pictures) == 4

    none = measure_conflict(subjects[:2], tiny_samples(), plain)
    assert none.text.startswith("No model has both") and not none.charts
