"""Kinds of errors: one hand-made case for each, and the authors' program where it is installed."""

import numpy as np
import pytest

from co_detr.tools.analyze.detection_errors import (
    ImageResult,
    Judgment,
    Verdict,
    average_precision,
    judge_image,
    mean_average_precision,
    pairwise_iou,
    weigh_errors,
)

OBJECT = [0.0, 0.0, 10.0, 10.0]
FAR = [50.0, 50.0, 60.0, 60.0]
LOOSE = [0.0, 0.0, 10.0, 30.0]  # IoU 1/3 with OBJECT
FIT = [0.0, 0.0, 10.0, 11.0]  # IoU 10/11


def image(detections, truths) -> ImageResult:
    """From (box, score, class) and (box, class)."""
    return ImageResult(
        boxes=np.array([box for box, _, _ in detections]).reshape(-1, 4),
        scores=np.array([score for _, score, _ in detections], dtype=float),
        classes=np.array([label for _, _, label in detections], dtype=np.int64),
        truth_boxes=np.array([box for box, _ in truths]).reshape(-1, 4),
        truth_classes=np.array([label for _, label in truths], dtype=np.int64),
    )


def judge(*images: ImageResult, num_classes: int = 2) -> Judgment:
    return Judgment.joined([judge_image(image, num_classes) for image in images])


@pytest.mark.parametrize(
    ("detection", "truths", "verdict", "missed"),
    [
        ((FIT, 0.9, 0), [(OBJECT, 0)], Verdict.CORRECT, 0),
        ((FIT, 0.9, 1), [(OBJECT, 0)], Verdict.CLASS, 0),
        ((LOOSE, 0.9, 0), [(OBJECT, 0)], Verdict.LOCATION, 0),
        ((LOOSE, 0.9, 1), [(OBJECT, 0)], Verdict.BOTH, 1),
        ((FAR, 0.9, 0), [(OBJECT, 0)], Verdict.BACKGROUND, 1),
        ((FAR, 0.9, 0), [], Verdict.BACKGROUND, 0),
        # An object of its own class that it nearly meets goes before one of another that it meets.
        ((FIT, 0.9, 0), [(OBJECT, 1), (LOOSE, 0)], Verdict.LOCATION, 1),
    ],
)
def test_each_kind_of_error(detection, truths, verdict, missed):
    judged = judge(image([detection], truths))
    assert judged.verdicts.tolist() == [verdict]
    assert judged.missed.sum() == missed


def test_the_second_detection_of_an_object_is_a_duplicate():
    judged = judge(image([(FIT, 0.5, 0), (OBJECT, 0.4, 0), (OBJECT, 0.9, 1)], [(OBJECT, 0)]))
    assert judged.scores.tolist() == [0.9, 0.5, 0.4]
    assert judged.verdicts.tolist() == [Verdict.CLASS, Verdict.CORRECT, Verdict.DUPLICATE]
    # The object is found, so that the wrong class is removed and not fixed.
    assert judged.fixed_classes.tolist() == [-1, 0, -1]


def test_the_best_of_several_errors_at_one_object_is_mended():
    judged = judge(image([(LOOSE, 0.3, 0), (LOOSE, 0.8, 0), (FIT, 0.5, 1)], [(OBJECT, 0)]))
    assert judged.verdicts.tolist() == [Verdict.LOCATION, Verdict.CLASS, Verdict.LOCATION]
    assert judged.fixed_classes.tolist() == [0, -1, -1]
    assert judged.unmatched.tolist() == [1, 0] and judged.missed.tolist() == [0, 0]


def test_only_the_best_hundred_detections_count():
    many = [(FAR, 0.5, 0)] * 100 + [(OBJECT, 0.1, 0)]
    judged = judge(image(many, [(OBJECT, 0)]))
    assert len(judged.scores) == 100 and judged.missed.tolist() == [1, 0]


def test_perfect_detections_have_no_errors():
    truths = [(OBJECT, 0), (FAR, 1), ([20.0, 0.0, 30.0, 9.0], 1)]
    perfect = image([(box, 0.9 - index / 10, c) for index, (box, c) in enumerate(truths)], truths)
    weights = weigh_errors(judge(perfect, image([], [])))
    assert weights.average_precision == pytest.approx(100.0)
    assert set(weights.gains.values()) == {0.0} and set(weights.counts.values()) == {0}
    assert set(weights.gains) == {"Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FP", "FN"}


def test_gains_of_a_case_worked_out_by_hand():
    """One of two objects is found, behind a false positive on the background."""
    weights = weigh_errors(
        judge(
            image([(FAR, 0.9, 0), (OBJECT, 0.8, 0)], [(OBJECT, 0)]),
            image([], [(OBJECT, 0)]),
        )
    )
    # Precision is 1/2 up to recall 1/2: 51 of the 101 recalls from 0 to 1.
    assert weights.average_precision == pytest.approx(100 * 51 / 101 / 2)
    assert weights.gains["Bkg"] == pytest.approx(100 * 51 / 101 / 2)
    assert weights.gains["FP"] == pytest.approx(100 * 51 / 101 / 2)
    assert weights.gains["Miss"] == pytest.approx(50 - 100 * 51 / 101 / 2)
    assert weights.gains["FN"] == pytest.approx(50 - 100 * 51 / 101 / 2)
    assert weights.gains["Cls"] == weights.gains["Loc"] == weights.gains["Dupe"] == 0


def test_mending_a_class_moves_the_detection_to_the_other_class():
    weights = weigh_errors(judge(image([(OBJECT, 0.9, 1)], [(OBJECT, 0), (FAR, 1)])))
    # Class 0 goes from 0 to 100, class 1 stays at 0.
    assert weights.average_precision == 0.0
    assert weights.gains["Cls"] == pytest.approx(50.0)


def test_without_ground_truth_there_is_no_precision():
    weights = weigh_errors(judge(image([(FAR, 0.9, 0)], [])))
    assert weights.average_precision is None and weights.gains == {}


def test_average_precision_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        number, truths = int(rng.integers(0, 30)), int(rng.integers(1, 25))
        scores = rng.permutation(number) / 100
        correct = np.zeros(number, dtype=bool)
        correct[rng.permutation(number)[:truths]] = rng.random(min(truths, number)) < 0.7
        points = []  # recall in hundredths times the truths, precision
        hits = 0
        for rank, index in enumerate(np.argsort(-scores), start=1):
            hits += int(correct[index])
            points.append((hits, hits / rank))
        total = 0.0
        for hundredth in range(101):
            reached = [p for hits, p in points if 100 * hits >= hundredth * truths]
            total += max(reached, default=0.0)
        found = average_precision(scores, correct, truths)
        assert found == pytest.approx(100 * total / 101, abs=1e-12)


def test_classes_without_ground_truth_do_not_count():
    found = mean_average_precision(
        np.array([0.9, 0.8]), np.array([0, 2]), np.array([True, False]), np.array([1, 0, 0])
    )
    assert found == pytest.approx(100.0)
    nothing = np.zeros(0)
    assert mean_average_precision(nothing, nothing, nothing, np.array([0, 0])) is None


def test_iou_of_boxes_without_area_is_zero():
    boxes = np.array([[3.0, 3.0, 3.0, 9.0], OBJECT])
    assert pairwise_iou(boxes, boxes).tolist() == [[0.0, 0.0], [0.0, 1.0]]


def random_images(seed: int, num_classes: int = 4) -> list[ImageResult]:
    """Detections around the objects, some with another class, and others anywhere."""
    rng = np.random.default_rng(seed)

    def boxes(number: int) -> np.ndarray:
        low = rng.uniform(0, 80, (number, 2))
        return np.concatenate([low, low + rng.uniform(10, 40, (number, 2))], axis=1)

    images = []
    for _ in range(30):
        truths, number = int(rng.integers(1, 8)), int(rng.integers(0, 14))
        truth_boxes, truth_classes = boxes(truths), rng.integers(0, num_classes, truths)
        source, near = rng.integers(0, truths, number), rng.random(number) < 0.75
        noise = rng.normal(0, 1, (number, 4)) * rng.choice([1, 5, 10], number)[:, None]
        around = truth_boxes[source] + noise
        around[:, 2:] = np.maximum(around[:, 2:], around[:, :2] + 3)
        classes = rng.integers(0, num_classes, number)
        kept = near & (rng.random(number) < 0.7)
        images.append(
            ImageResult(
                np.where(near[:, None], around, boxes(number)),
                rng.random(number),
                np.where(kept, truth_classes[source], classes),
                truth_boxes,
                truth_classes,
            )
        )
    return images


@pytest.mark.parametrize("seed", range(5))
def test_against_the_authors_program(seed):
    tidecv = pytest.importorskip("tidecv")

    def xywh(box) -> list[float]:
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    images = random_images(seed)
    truth, found = tidecv.Data("truth"), tidecv.Data("found")
    for number, image in enumerate(images):
        for box, label in zip(image.truth_boxes, image.truth_classes, strict=True):
            truth.add_ground_truth(number, int(label), xywh(box))
        for box, score, label in zip(image.boxes, image.scores, image.classes, strict=True):
            found.add_detection(number, int(label), float(score), xywh(box))
    tide = tidecv.TIDE()
    run = tide.evaluate(truth, found, mode=tidecv.TIDE.BOX)
    errors = tide.get_all_errors()
    special = errors["special"]["found"]
    theirs = {**errors["main"]["found"], "FP": special["FalsePos"], "FN": special["FalseNeg"]}
    ours = weigh_errors(judge(*images, num_classes=4))
    assert ours.average_precision == pytest.approx(run.ap, abs=1e-9)
    assert ours.gains == pytest.approx(theirs, abs=1e-9)
    counts = {kind.short_name: len(all_of_it) for kind, all_of_it in run.error_dict.items()}
    assert {name: ours.counts[name] for name in counts} == counts
