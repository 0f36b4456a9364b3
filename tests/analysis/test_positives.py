"""Positive queries per object against loops over a training step, without a trace."""

import random

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from co_detr.seeding import seed_everything
from co_detr.tools.analyze.positives import (
    MATCHED,
    SIZES,
    count_per_truth,
    count_positives,
    measure_positives,
)
from tests.analysis.cases import plain, tiny_samples, tiny_subject

SMALL_LIMIT = ["model.auxiliary.positive_queries.max_queries=4"]


def naive_counts(model, samples) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Loops over candidates, queries and ground truths of real training steps."""
    counts, queries = {MATCHED: []}, {MATCHED: []}
    seed = torch.initial_seed()
    model.train()
    for number, sample in enumerate(samples):
        seed_everything("positive queries", seed, number)
        truth = sample.input["instances"]
        with EventStorage(), torch.no_grad():
            images = model.preprocess([sample.input])
            output = model.forward_training(images, [truth])
        labels = output.targets[0].labels[-1, 0].tolist()
        counts[MATCHED] += [1] * len(truth)
        assert sum(label < model.num_classes for label in labels) == len(truth)
        for name, head in output.auxiliary.items():
            found = head.candidates.instances[0]
            group = next(g for g in output.groups if g.name == f"{name}_queries")
            taken = group.targets.labels[0, 0].tolist()
            height, width = truth.image_size
            for box, label in zip(truth.gt_boxes.tensor, truth.gt_classes.tolist(), strict=True):
                number_of = 0
                for other, assigned in zip(
                    found.gt_boxes.tensor, found.gt_classes.tolist(), strict=True
                ):
                    number_of += assigned == label and bool((other == box).all())
                counts.setdefault(name, []).append(number_of)
                used = 0
                for other, assigned in zip(group.targets.boxes[0, 0], taken, strict=True):
                    cx, cy, w, h = (other * other.new_tensor([width, height] * 2)).tolist()
                    back = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                    used += assigned == label and np.allclose(back, box.tolist(), atol=1e-3)
                queries.setdefault(name, []).append(used)
    model.eval()
    return counts, queries


@pytest.mark.parametrize("overrides", [[], SMALL_LIMIT])
def test_counts_are_those_of_a_training_step(overrides):
    subject, samples = tiny_subject(2, overrides=overrides), tiny_samples()
    torch.manual_seed(3)
    found = count_positives(subject.model, samples)
    torch.manual_seed(3)
    counts, queries = naive_counts(subject.model, samples)
    assert {name: counts.tolist() for name, counts in found.counts.items()} == counts
    assert sum(counts["atss"]) > sum(counts[MATCHED])
    for name in ("roi", "atss"):
        assert found.queries[name].tolist() == queries[name]
    areas = torch.cat([sample.input["instances"].gt_boxes.area() for sample in samples])
    assert np.allclose(found.areas, areas)
    if overrides:
        per_image = [found.queries["atss"][:3].sum(), found.queries["atss"][3:].sum()]
        # At least min_queries slots are made, whatever the limit.
        assert all(number <= 9 for number in per_image)


def test_nothing_of_the_model_or_the_generators_changes():
    subject, samples = tiny_subject(2), tiny_samples()
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    count_positives(subject.model, samples)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    after = subject.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(module.training for module in subject.model.modules())


def test_targets_are_told_apart_by_label_and_box():
    truth_boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [1, 1, 2, 2], [1, 1, 2, 2]])
    truth_labels = torch.tensor([0, 1, 2, 2])  # the last two are equal: the first of them counts
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [1, 1, 2, 2], [0, 0, 0, 0], [1, 1, 2, 2]])
    labels = torch.tensor([1, 1, 2, 5, -1])
    found = count_per_truth(labels, boxes, truth_labels, truth_boxes)
    assert found.tolist() == [0, 2, 1, 0]
    assert count_per_truth(labels, boxes, truth_labels[:0], truth_boxes[:0]).tolist() == []


def test_sizes_cover_all_areas_once():
    edges = [edge for pair in SIZES.values() for edge in pair]
    assert edges == [0.0, 1024.0, 1024.0, 9216.0, 9216.0, float("inf")]


def test_section_names_every_source_and_the_plain_model():
    subjects = [tiny_subject(0), tiny_subject(2)]
    section = measure_positives(subjects, tiny_samples(), plain)
    assert [row[:2] for row in section.tables[0].rows] == [
        ("K = 0", MATCHED),
        ("K = 2", MATCHED),
        ("K = 2", "roi"),
        ("K = 2", "atss"),
    ]
    assert "Without auxiliary heads: K = 0." in section.text
    summary = section.numbers["K = 2"]["atss"]
    assert sum(summary["histogram"]) == summary["all"]["objects"] == 5


def test_images_without_objects():
    section = measure_positives([tiny_subject(2)], tiny_samples(((96, 128),), (0,)), plain)
    assert "no ground truth" in section.text and not section.charts


def test_a_model_without_a_decoder_has_auxiliary_heads_only():
    subject = tiny_subject(2)
    subject.model.decoder = None
    section = measure_positives([subject], tiny_samples(), plain)
    assert [row[1] for row in section.tables[0].rows] == ["roi", "atss"]
