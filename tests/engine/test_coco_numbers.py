"""COCO's and LVIS's numbers are those of pycocotools and of the package lvis."""

import copy
import json
import math
from random import Random

import pytest
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO

from benchmarks.evaluation import (
    SIDE,
    by_pycocotools,
    evaluator_of,
    made_up_detections,
    made_up_truth,
)
from co_detr.data.segmentation import encoded_mask
from co_detr.engine import evaluators
from co_detr.engine.evaluation import MASKS
from co_detr.engine.evaluators import COCO_LIMIT, LvisDetectionEvaluator, best_of_each_image
from tests.engine.masked import add_masks, mask_results

SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# Of the package lvis 0.5.3 for `lvis_truth` and its detections, by the limit of detections.
LVIS_NUMBERS = {
    300: {
        "AP": 13.473172229625586,
        "AP50": 40.173755545132714,
        "AP75": 5.066314423976218,
        "APs": 16.608306972272143,
        "APm": 13.84533714604662,
        "APl": 17.69713056474002,
        "APr": 12.008737248183019,
        "APc": 12.17701805307376,
        "APf": 16.23376138761997,
    },
    40: {
        "AP": 12.789000512688606,
        "AP50": 38.97950566949879,
        "AP75": 4.6554764484078355,
        "APs": 15.878704355093888,
        "APm": 13.136678640246641,
        "APl": 16.920516591721782,
        "APr": 10.990905204463191,
        "APc": 11.688854288615275,
        "APf": 15.687242044987352,
    },
}


# Likewise for masks, ellipses in these boxes.
LVIS_MASK_NUMBERS = {
    "AP": 12.66591177135264,
    "AP50": 37.64161834404852,
    "AP75": 4.541670043006835,
    "APs": 15.469335763915614,
    "APm": 13.106617402611976,
    "APl": 18.13815447724452,
    "APr": 10.70334999613984,
    "APc": 11.331391359267732,
    "APf": 15.962993958650348,
}


@pytest.fixture(params=["faster-coco-eval", "pycocotools"])
def library(request, monkeypatch):
    if request.param == "pycocotools":
        monkeypatch.setattr(evaluators, "COCOeval_faster", None)
        monkeypatch.setattr(evaluators, "COCO", COCO)
    else:
        pytest.importorskip("faster_coco_eval")
    return request.param


def write(truth, tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    return str(path)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-10, nan_ok=True), name


def test_every_number_of_coco(library, tmp_path):
    """With crowd regions, equal scores, all sizes, and a class and images without objects."""
    truth = made_up_truth(images=60, classes=6)
    truth["annotations"] = [
        annotation for annotation in truth["annotations"] if annotation["category_id"] != 5
    ]
    assert any(annotation["iscrowd"] for annotation in truth["annotations"])
    detections = made_up_detections(truth, per_image=150)  # more than count
    file = write(truth, tmp_path)
    expected = by_pycocotools(file, copy.deepcopy(detections))
    assert expected["AP"] > 5 and expected["APs"] > 0 and math.isnan(expected["AP-class 5"])
    assert_same(evaluator_of(file, truth).judge(detections), expected)


def test_every_number_of_masks(library, tmp_path):
    """Areas are those of masks, and crowd regions are larger than what they are for."""
    truth = made_up_truth(images=40, classes=5)
    detections = made_up_detections(truth, per_image=60)
    add_masks(truth["annotations"])
    for annotation in truth["annotations"][::7]:  # in COCO's other form
        (polygon,) = annotation["segmentation"]
        encoded = encoded_mask([polygon], SIDE, SIDE)
        annotation["segmentation"] = encoded | {"counts": encoded["counts"].decode()}
    file = write(truth, tmp_path)
    results = mask_results(detections, SIDE, SIDE)
    expected = by_pycocotools(file, copy.deepcopy(results), MASKS)
    assert expected["AP"] > 5 and expected["APs"] > 0
    assert_same(evaluator_of(file, truth).judge(results, MASKS), expected)


def test_ids_of_text(library, tmp_path):
    """Their order is that of text, so that equal scores come in another order."""
    truth = made_up_truth(images=30, classes=4)
    detections = made_up_detections(truth, per_image=30)
    for box in (*truth["annotations"], *detections):
        box["image_id"], box["category_id"] = f"i{box['image_id']}", f"c{box['category_id']}"
    for kind in ("images", "categories"):
        for entry in truth[kind]:
            entry["id"] = f"{kind[0]}{entry['id']}"
    file = write(truth, tmp_path)
    expected = by_pycocotools(file, copy.deepcopy(detections))
    assert_same(evaluator_of(file, truth).judge(detections), expected)


@pytest.mark.parametrize("limit", [1, 5, 130])
def test_other_limits(library, tmp_path, limit):
    truth = made_up_truth(images=20, classes=1)
    detections = made_up_detections(truth, per_image=150)
    file = write(truth, tmp_path)
    api = COCO(file)
    judged = COCOevalMaxDets(api, api.loadRes(copy.deepcopy(detections)), "bbox")
    judged.params.maxDets = [min(1, limit), min(10, limit), limit]
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    evaluator = evaluator_of(file, truth)
    evaluator.max_detections = limit
    found = evaluator.judge(copy.deepcopy(detections))
    expected = dict(zip(SIZES, 100 * judged.stats, strict=False))
    assert_same({name: found[name] for name in SIZES}, expected)
    evaluator.max_detections = COCO_LIMIT
    assert evaluator.judge(detections)["AP"] != found["AP"]


def test_no_detection(library, tmp_path):
    truth = made_up_truth(images=5, classes=2)
    assert evaluator_of(write(truth, tmp_path), truth).judge([])["AP"] == 0


def lvis_truth():
    truth = made_up_truth(images=60, classes=12)
    random = Random(2)
    for category in truth["categories"]:
        category["frequency"] = "rcf"[category["id"] % 3]
    for image in truth["images"]:
        image["neg_category_ids"] = random.sample(range(1, 13), 3)
        image["not_exhaustive_category_ids"] = random.sample(range(1, 13), 2)
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 0  # LVIS has none
    return truth


@pytest.mark.parametrize("limit", [300, 40])
@pytest.mark.parametrize("with_text", [False, True])
def test_every_number_of_lvis(tmp_path, limit, with_text):
    pytest.importorskip("faster_coco_eval")
    truth = lvis_truth()
    detections = made_up_detections(truth, per_image=60)
    if with_text:
        # Sorted as the numbers are.
        for box in (*truth["annotations"], *detections):
            box["image_id"] = f"{box['image_id']:03d}"
            box["category_id"] = f"{box['category_id']:03d}"
        for entry in (*truth["images"], *truth["categories"]):
            entry["id"] = f"{entry['id']:03d}"
        for image in truth["images"]:
            for key in ("neg_category_ids", "not_exhaustive_category_ids"):
                image[key] = [f"{identifier:03d}" for identifier in image[key]]
    evaluator = LvisDetectionEvaluator(write(truth, tmp_path), max_detections=limit)
    assert_same(evaluator.judge(detections), LVIS_NUMBERS[limit])


def test_every_number_of_masks_in_lvis(tmp_path):
    pytest.importorskip("faster_coco_eval")
    truth = lvis_truth()
    detections = made_up_detections(truth, per_image=60)
    add_masks(truth["annotations"])
    evaluator = LvisDetectionEvaluator(write(truth, tmp_path))
    found = evaluator.judge(mask_results(detections, SIDE, SIDE), MASKS)
    assert_same(found, LVIS_MASK_NUMBERS)


def test_the_best_detections_of_each_image():
    detections = [
        {"image_id": image, "score": score, "place": place}
        for place, (image, score) in enumerate([(1, 0.5), (2, 0.1), (1, 0.7), (1, 0.5), (2, 0.2)])
    ]
    assert [detection["place"] for detection in best_of_each_image(detections, 2)] == [2, 0, 4, 1]
    assert len(best_of_each_image(detections, 3)) == 5


@pytest.mark.parametrize("pairs", [1, 150])
def test_classes_are_evaluated_some_at_a_time(tmp_path, monkeypatch, pairs):
    pytest.importorskip("faster_coco_eval")
    truth = made_up_truth(images=50, classes=7)
    detections = made_up_detections(truth, per_image=40)
    file = write(truth, tmp_path)
    whole = evaluator_of(file, truth).judge(detections)
    monkeypatch.setattr(evaluators, "MOST_PAIRS", pairs)
    assert_same(evaluator_of(file, truth).judge(detections), whole)
    evaluator = LvisDetectionEvaluator(write(lvis_truth(), tmp_path))
    detections = made_up_detections(lvis_truth(), per_image=60)
    assert_same(evaluator.judge(detections), LVIS_NUMBERS[300])


def test_a_part_of_the_images_is_judged_as_a_file_of_them(tmp_path):
    truth = made_up_truth(images=20, classes=3)
    add_masks(truth["annotations"])
    chosen = {image["id"] for image in truth["images"][:7]}
    part = {
        **truth,
        "images": truth["images"][:7],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in chosen],
    }
    detections = [
        entry for entry in made_up_detections(truth, per_image=10) if entry["image_id"] in chosen
    ]
    masks = mask_results(detections, SIDE, SIDE)
    whole = evaluator_of(write(truth, tmp_path), truth).on_images(chosen)
    (tmp_path / "part").mkdir()
    alone = evaluator_of(write(part, tmp_path / "part"), part)
    assert_same(whole.judge(copy.deepcopy(detections)), alone.judge(detections))
    assert_same(whole.judge(copy.deepcopy(masks), MASKS), alone.judge(masks, MASKS))
