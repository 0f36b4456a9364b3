"""Detections of several sources in one list."""

import numpy as np
import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances

from co_detr.errors import ConfigError
from co_detr.modeling.fusion import NmsFusion, SoftNmsFusion, WeightedBoxesFusion
from co_detr.modeling.postprocess import SoftNMSPostprocessor

SIZE = (80, 100)
ALL = [NmsFusion(), SoftNmsFusion(), WeightedBoxesFusion()]


def instances(boxes, scores, classes):
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.long),
    )


def random_sources(seed):
    """One to four sources of up to 20 detections around a few places."""
    generator = np.random.default_rng(seed)
    places = generator.uniform((0, 0, 10, 10), (60, 50, 40, 30), (4, 4))
    places[:, 2:] += places[:, :2]
    sources = []
    for _ in range(generator.integers(1, 5)):
        number = generator.integers(0, 21)
        boxes = places[generator.integers(0, 4, number)] + generator.uniform(-4, 4, (number, 4))
        boxes = boxes.clip(0, (100, 80, 100, 80))
        sources.append(
            Instances(
                SIZE,
                pred_boxes=Boxes(torch.from_numpy(boxes)),
                scores=torch.from_numpy(generator.uniform(0.01, 1, number)).float(),
                pred_classes=torch.from_numpy(generator.integers(0, 3, number)),
            )
        )
    weights = None if seed % 2 else generator.uniform(0.5, 3, len(sources)).tolist()
    return sources, weights


def plain_fusion(sources, weights, threshold, skip, kind):
    """The paper's algorithm with lists, one detection at a time -> rows (class, score, box)."""
    weights = [1.0] * len(sources) if weights is None else weights
    rows = [
        (label, score * weight, box)
        for found, weight in zip(sources, weights, strict=True)
        for box, score, label in zip(
            found.pred_boxes.tensor.tolist(),
            found.scores.tolist(),
            found.pred_classes.tolist(),
            strict=True,
        )
        if score >= skip and box[2] > box[0] and box[3] > box[1]
    ]
    clusters = []
    for row in sorted(rows, key=lambda row: -row[1]):
        candidates = [
            (plain_iou(mean_box(cluster), row[2]), number)
            for number, cluster in enumerate(clusters)
            if cluster[0][0] == row[0]
        ]
        overlap, number = max(candidates, default=(0, None))
        if overlap > threshold:
            clusters[number].append(row)
        else:
            clusters.append([row])
    fused = []
    for cluster in clusters:
        scores = [score for _, score, _ in cluster]
        score = max(scores) / max(weights)
        if kind == "avg":
            score = sum(scores) / len(scores) * min(len(sources), len(cluster)) / sum(weights)
        fused.append((cluster[0][0], score, mean_box(cluster)))
    return sorted(fused, key=lambda row: -row[1])


def mean_box(cluster):
    total = sum(score for _, score, _ in cluster)
    return [sum(score * box[side] for _, score, box in cluster) / total for side in range(4)]


def plain_iou(first, second):
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return common / (sum(areas) - common)


def cases():
    settings = [(0.55, 0.0, "avg"), (0.4, 0.2, "max"), (0.7, 0.05, "avg"), (0.55, 0.0, "max")]
    for seed in range(200):
        yield (*random_sources(seed), *settings[seed % 4])


def test_weighted_boxes_equal_the_plain_algorithm():
    lengths = []
    for sources, weights, threshold, skip, kind in cases():
        found = WeightedBoxesFusion(threshold, skip, kind).fuse(sources, weights)
        rows = plain_fusion(sources, weights, threshold, skip, kind)
        assert found.pred_classes.tolist() == [row[0] for row in rows]
        np.testing.assert_allclose(found.scores, [row[1] for row in rows], rtol=1e-6)
        expected = np.array([row[2] for row in rows]).reshape(-1, 4)
        np.testing.assert_allclose(found.pred_boxes.tensor, expected, atol=1e-5)
        lengths.append((sum(map(len, sources)), len(found)))
    before, after = np.sum(lengths, axis=0)
    assert 0.2 < after / before < 0.8  # neither everything nor nothing is fused


def test_weighted_boxes_equal_ensemble_boxes():
    """The authors' package, which brings Numba and pandas: pip install ensemble-boxes."""
    package = pytest.importorskip("ensemble_boxes.ensemble_boxes_wbf")
    for sources, weights, threshold, skip, kind in cases():
        found = WeightedBoxesFusion(threshold, skip, kind).fuse(sources, weights)
        scale = np.array([100, 80, 100, 80])
        boxes, scores, labels = package.weighted_boxes_fusion(
            [(source.pred_boxes.tensor.numpy() / scale).tolist() for source in sources],
            [source.scores.tolist() for source in sources],
            [source.pred_classes.tolist() for source in sources],
            weights=weights,
            iou_thr=threshold,
            skip_box_thr=skip,
            conf_type=kind,
        )
        assert found.pred_classes.tolist() == labels.tolist()
        np.testing.assert_allclose(found.scores, scores, atol=1e-6)
        np.testing.assert_allclose(found.pred_boxes.tensor.numpy() / scale, boxes, atol=1e-6)


def test_nms_keeps_what_no_better_one_of_its_class_overlaps():
    sources, _ = random_sources(4)
    every = Instances.cat(sources)
    every = every[every.pred_boxes.nonempty()]
    kept = batched_nms(every.pred_boxes.tensor, every.scores, every.pred_classes, 0.5)
    found = NmsFusion(0.5).fuse(sources)
    assert 0 < len(found) < len(every)
    assert torch.equal(found.scores, every.scores[kept])
    assert torch.equal(found.pred_boxes.tensor, every.pred_boxes.tensor[kept])


def test_soft_nms_lowers_scores_as_the_postprocessor_does():
    sources, _ = random_sources(4)
    every = Instances.cat(sources)
    expected = SoftNMSPostprocessor(1000, 0.5, 1e-3, 0.5).thin_out(every)
    found = SoftNmsFusion(0.5, sigma=0.5).fuse(sources)
    torch.testing.assert_close(found.scores, expected.scores)
    assert len(found) > len(NmsFusion(0.5).fuse(sources))


@pytest.mark.parametrize("fusion", [NmsFusion(), SoftNmsFusion()])
def test_weights_of_nms_decide_which_source_wins(fusion):
    first = instances([[0, 0, 50, 50]], [0.8], [1])
    second = instances([[0, 0, 50, 48]], [0.9], [1])
    trusted = fusion.fuse([first, second], [2, 1])
    assert trusted.scores[0].item() == pytest.approx(0.8)
    assert trusted.pred_boxes.tensor[0].tolist() == [0, 0, 50, 50]
    alike = fusion.fuse([first, second], [3, 3])
    assert alike.scores[0].item() == pytest.approx(0.9)


@pytest.mark.parametrize("fusion", ALL)
def test_sources_stay_as_they_are_and_empty_ones_do_no_harm(fusion):
    found = instances(
        [[0, 0, 50, 50], [60, 60, 60, 70], [60, 10, 90, 60]], [0.5, 0.9, 0.7], [0, 0, 2]
    )
    nothing = instances([], [], [])
    fused = fusion.fuse([nothing, found])
    assert fused.pred_classes.tolist() == [2, 0]  # best first, and none without area
    assert fused.pred_boxes.tensor.tolist() == [[60, 10, 90, 60], [0, 0, 50, 50]]
    assert fused.scores.dtype == torch.float32
    assert found.scores.tolist() == pytest.approx([0.5, 0.9, 0.7])
    empty = fusion.fuse([nothing, nothing])
    assert len(empty) == 0 and empty.pred_boxes.tensor.shape == (0, 4)
    assert empty.pred_classes.dtype == torch.long


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        (0, None, "at least one source"),
        (2, [1.0], "1 weights are given for 2 sources"),
        (2, [1.0, 0.0], "must all be above 0"),
        (2, [1.0, float("nan")], "must all be above 0"),
    ],
)
@pytest.mark.parametrize("fusion", ALL)
def test_what_does_not_fit_is_refused(fusion, sources, weights, message):
    with pytest.raises(ConfigError, match=message):
        fusion.fuse([instances([], [], [])] * sources, weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NmsFusion(0), "iou_threshold=0 of a fusion"),
        (lambda: SoftNmsFusion(1.5), "iou_threshold=1.5 of a fusion"),
        (lambda: SoftNmsFusion(sigma=0), "sigma=0 of a fusion"),
        (lambda: WeightedBoxesFusion(score="mean"), "score='mean' of a fusion"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
