"""LVIS and Objects365: where images are, classes that are repeated, and the evaluators."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from co_detr.data.coco import load_coco, load_lvis, load_objects365, repeat_rare_classes
from co_detr.engine import evaluators
from co_detr.engine.evaluators import LvisDetectionEvaluator
from co_detr.errors import ConfigError, DataError
from tests.engine.tiny_data import make_tiny_data

CATEGORIES = [
    {"id": 1, "name": "aerosol_can", "frequency": "c", "image_count": 1},
    {"id": 2, "name": "air_conditioner", "frequency": "f", "image_count": 1},
]


@pytest.fixture
def lvis_file(tmp_path):
    """Two images, one of each of COCO's directories; no image has a file name."""
    content = {"images": [], "annotations": [], "categories": CATEGORIES, "info": {}}
    for index, split in enumerate(("train2017", "val2017")):
        (tmp_path / split).mkdir()
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / split / f"{index}.jpg")
        content["images"].append(
            {"id": index + 1, "width": 40, "height": 30}
            | {"coco_url": f"http://images.cocodataset.org/{split}/{index}.jpg"}
            | {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        )
        content["annotations"].append(
            {"id": index + 1, "image_id": index + 1, "category_id": index + 1}
            | {"bbox": [5, 6, 10, 8], "area": 80, "segmentation": [[5, 6, 15, 6, 15, 14]]}
        )
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    return path


def test_lvis_images_lie_in_both_directories(lvis_file, tmp_path):
    records = load_lvis(str(lvis_file), str(tmp_path), num_classes=2)
    expected = [str(tmp_path / "train2017" / "0.jpg"), str(tmp_path / "val2017" / "1.jpg")]
    assert [record["file_name"] for record in records] == expected
    assert [record["annotations"][0]["category_id"] for record in records] == [0, 1]


def test_lvis_without_addresses_or_images(lvis_file, tmp_path):
    (tmp_path / "val2017" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"val2017/1\.jpg .* does not exist"):
        load_lvis(str(lvis_file), str(tmp_path))
    content = json.loads(lvis_file.read_text())
    del content["images"][0]["coco_url"]
    lvis_file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="image 1 of .*lvis.json has no coco_url"):
        load_lvis(str(lvis_file), str(tmp_path))


def test_rare_classes_are_repeated(caplog):
    rng = np.random.default_rng(0)
    shares = [0.9, 0.3, 0.02]
    records = [
        {"id": i, "annotations": [{"category_id": c} for c in range(3) if rng.random() < shares[c]]}
        for i in range(300)
    ]
    threshold = 0.2

    def share(category):
        shown = [{"category_id": category} in record["annotations"] for record in records]
        return sum(shown) / len(records)

    expected = []
    for record in records:
        classes = [annotation["category_id"] for annotation in record["annotations"]]
        times = [max(1.0, math.sqrt(threshold / share(category))) for category in classes]
        expected += [record["id"]] * math.ceil(max(times, default=1.0))
    caplog.set_level("INFO")
    names = ["cell", "plate", "rod"]
    repeated = [record["id"] for record in repeat_rare_classes(records, threshold, names)]
    assert repeated == expected and len(repeated) > len(records)
    rare = round(300 * share(2))
    times = sum(record["id"] in with_rods(records) for record in map(records.__getitem__, repeated))
    assert f"'rod', the rarest class, is in {times} instead of {rare} (" in caplog.text
    with pytest.raises(ConfigError, match="repeat_threshold=2 must be a share of the images"):
        repeat_rare_classes(records, 2, names)


def with_rods(records):
    return {record["id"] for record in records if {"category_id": 2} in record["annotations"]}


def test_any_set_can_repeat_its_rare_classes(tmp_path):
    tiny_data = make_tiny_data(tmp_path)
    arguments = (str(tiny_data.train), str(tiny_data.images))
    plain = [record["image_id"] for record in load_coco(*arguments)]
    repeated = [record["image_id"] for record in load_coco(*arguments, repeat_threshold=1.0)]
    assert len(repeated) > len(plain) == len(set(repeated))


def test_objects365_images_lie_in_patches(tmp_path):
    (tmp_path / "patch8").mkdir()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "patch8" / "a.jpg")
    image = {"id": 1, "file_name": "images/v1/patch8/a.jpg", "width": 40, "height": 30}
    box = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]}
    content = {"images": [image], "annotations": [box], "categories": CATEGORIES}
    (tmp_path / "o365.json").write_text(json.dumps(content))
    (record,) = load_objects365(str(tmp_path / "o365.json"), str(tmp_path), num_classes=2)
    assert record["file_name"] == str(tmp_path / "patch8" / "a.jpg")


def test_evaluation_without_the_package(lvis_file, monkeypatch):
    monkeypatch.setattr(evaluators, "COCOeval_faster", None)
    with pytest.raises(ConfigError, match="run pip install faster-coco-eval"):
        LvisDetectionEvaluator(str(lvis_file))


def _as_floats(path):
    """Writes ids as 1.0, areas as null and a byte-order mark."""
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] = float(image["id"])
        image["neg_category_ids"] = [float(2 - image["id"] + 1)]
    for annotation in content["annotations"]:
        for key in ("image_id", "category_id"):
            annotation[key] = float(annotation[key])
        annotation["area"] = None
    content["categories"] = [
        category | {"id": float(category["id"])} for category in content["categories"]
    ]
    path.write_text(json.dumps(content), encoding="utf-8-sig")


def test_lvis_files_are_corrected(lvis_file, tmp_path):
    _as_floats(lvis_file)
    records = load_lvis(str(lvis_file), str(tmp_path), num_classes=2)
    assert [type(record["image_id"]) for record in records] == [int, int]
    assert [record["annotations"][0]["category_id"] for record in records] == [0, 1]


@pytest.mark.parametrize("corrected", [False, True])
def test_perfect_lvis_detections_score_100(lvis_file, tmp_path, corrected):
    pytest.importorskip("faster_coco_eval")
    if corrected:
        _as_floats(lvis_file)
    records = load_lvis(str(lvis_file), str(tmp_path))
    evaluator = LvisDetectionEvaluator(str(lvis_file), str(tmp_path / "out"))
    evaluator.reset()
    for record in records:
        found = Instances((30, 40), pred_boxes=Boxes(torch.tensor([[5.0, 6.0, 15.0, 14.0]])))
        found.scores = torch.ones(1)
        found.pred_classes = torch.tensor([record["annotations"][0]["category_id"]])
        evaluator.process([record], [{"instances": found}])
    metrics = evaluator.evaluate()["bbox"]
    assert metrics["AP"] == pytest.approx(100) and metrics["APf"] == pytest.approx(100)
    assert np.isnan(metrics["APl"])  # no box of that size
    assert (tmp_path / "out" / "lvis_instances_results.json").is_file()
    assert not hasattr(np, "float")


def test_an_lvis_test_set_gets_a_result_file(lvis_file, tmp_path, caplog):
    pytest.importorskip("faster_coco_eval")
    content = json.loads(lvis_file.read_text())
    del content["annotations"]
    lvis_file.write_text(json.dumps(content))
    records = load_lvis(str(lvis_file), str(tmp_path))
    evaluator = LvisDetectionEvaluator(str(lvis_file), str(tmp_path / "out"))
    evaluator.reset()
    found = Instances((30, 40), pred_boxes=Boxes(torch.tensor([[5.0, 6.0, 15.0, 14.0]])))
    found.scores, found.pred_classes = torch.ones(1), torch.tensor([1])
    evaluator.process(records[:1], [{"instances": found}])
    assert evaluator.evaluate() == {} and "nothing to evaluate" in caplog.text
    (detection,) = json.loads((tmp_path / "out" / "lvis_instances_results.json").read_text())
    assert (detection["image_id"], detection["category_id"]) == (1, 2)


def test_lvis_judges_several_kinds_of_detections(lvis_file, tmp_path, capsys, caplog):
    pytest.importorskip("faster_coco_eval")
    records = load_lvis(str(lvis_file), str(tmp_path))
    evaluator = LvisDetectionEvaluator(str(lvis_file), str(tmp_path / "out"))
    both = [evaluator, evaluator.of_kind("roi")]
    found = Instances((30, 40), pred_boxes=Boxes(torch.tensor([[5.0, 6.0, 15.0, 14.0]])))
    found.scores, found.pred_classes = torch.ones(1), torch.tensor([0])
    for judge in both:
        judge.reset()
        judge.process(records[:1], [{"instances": found[:0], "instances_roi": found}])
    assert evaluator.evaluate()["bbox"].keys() == both[1].evaluate()["roi"].keys()
    assert (tmp_path / "out" / "roi" / "lvis_instances_results.json").is_file()
    caplog.set_level("INFO")
    capsys.readouterr()
    assert both[1].evaluate()["roi"]["AP"] > 0
    assert "Evaluation results" not in caplog.text and "AP" not in capsys.readouterr().out
