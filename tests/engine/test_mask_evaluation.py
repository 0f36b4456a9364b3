"""Masks are judged beside boxes, by their own scores, wherever both sides have them."""

import json
import logging

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from co_detr.engine.evaluation import missing_masks, result_entries, usable_dataset
from co_detr.engine.train import run_evaluation_only, run_training
from co_detr.errors import ConfigError
from tests.engine.masked import instances_of, write_masks
from tests.engine.tiny_detector import GroundTruthDetector

MASKED = "model._target_=tests.engine.masked.MaskedDetector"
SIZES = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
NAMES = [*SIZES, "AP-cell", "AP-plate"]


class BoxShaped(GroundTruthDetector):
    """Returns the ground truth with masks that fill the boxes."""

    def detect(self, sample):
        return instances_of(
            self.annotations_of(sample), (sample["height"], sample["width"]), [3, 7]
        )


class Misjudged(BoxShaped):
    """Finds a wrong object in every image, surer of its box than of the right one, but not of its
    mask."""

    def detect(self, sample):
        right = super().detect(sample)
        wrong = right[[0]] if len(right) else right
        wrong.pred_boxes.tensor[:] = torch.tensor([0.0, 0.0, 9.0, 9.0])
        wrong.pred_masks.boxes[:] = wrong.pred_boxes.tensor
        right.scores = torch.full((len(right),), 0.5)
        right.mask_scores, wrong.mask_scores = right.scores, wrong.scores / 4
        return type(right).cat([wrong, right])


def corners(annotations):
    """Masks that fill their boxes."""
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture
def masked_cfg(tiny_cfg):
    def make(model):
        cfg = tiny_cfg()
        cfg.model = {"_target_": model, "num_classes": 2, "annotation_file": cfg.data.val}
        return cfg

    return make


def test_perfect_masks_score_100(masked_cfg, tiny_data, tmp_path, caplog):
    caplog.set_level("INFO")
    write_masks(tiny_data, corners)
    run_evaluation_only(masked_cfg(BoxShaped), resume=False)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics) == [*NAMES, *(f"segm/{name}" for name in NAMES)]
    for name in ("AP", "AP75", "APs", "AP-cell"):
        assert metrics[name] == metrics[f"segm/{name}"] == pytest.approx(100)
    assert metrics["segm/APl"] is None
    assert "Evaluation results for masks" in caplog.text
    for name in ("per_class_ap.csv", "per_class_segm_ap.csv"):
        rows = (tmp_path / "out" / name).read_text().splitlines()
        assert rows[1].startswith("cell,100.000,100.000,")


def test_numbers_are_those_of_pycocotools_for_the_written_file(masked_cfg, tiny_data, tmp_path):
    write_masks(tiny_data)
    metrics = run_evaluation_only(masked_cfg(BoxShaped), resume=False)
    assert metrics["AP"] == pytest.approx(100) and 10 < metrics["segm/AP"] < 90
    truth = COCO(str(tiny_data.root / "val.json"))
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert results[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
    for result in results:
        del result["bbox"]  # areas are then those of masks
    judged = COCOeval(truth, truth.loadRes(results), "segm")
    judged.evaluate(), judged.accumulate(), judged.summarize()
    for name, value in zip(SIZES, judged.stats, strict=False):
        if value >= 0:
            assert metrics[f"segm/{name}"] == pytest.approx(100 * value)


def test_masks_are_ranked_by_their_own_scores(masked_cfg, tiny_data, tmp_path):
    write_masks(tiny_data, corners)
    metrics = run_evaluation_only(masked_cfg(Misjudged), resume=False)
    assert metrics["AP"] < 80 and metrics["segm/AP"] == pytest.approx(100)
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {result["score"] for result in results} == {1, 0.5}
    assert {result["mask_score"] for result in results} == {0.25, 0.5}


def test_no_detection_is_an_ap_of_zero(masked_cfg, tiny_data):
    write_masks(tiny_data, corners)

    class Blind(BoxShaped):
        def detect(self, sample):
            return super().detect(sample)[:0]

    metrics = run_evaluation_only(masked_cfg(Blind), resume=False)
    assert metrics["AP"] == metrics["segm/AP"] == 0


def drop(annotations, kept=0):
    corners(annotations)
    for annotation in annotations[kept:]:
        del annotation["segmentation"]


def all_but_one(annotations):
    drop(annotations, kept=len(annotations) - 1)


@pytest.mark.parametrize(("change", "share"), [(drop, "no"), (all_but_one, "not every")])
def test_ground_truth_without_masks(masked_cfg, tiny_data, tmp_path, caplog, change, share):
    write_masks(tiny_data, change)
    metrics = run_evaluation_only(masked_cfg(BoxShaped), resume=False)
    assert list(metrics) == ["AP", "AP50", "AP75", "APs", "AP-cell", "AP-plate"]
    assert metrics["AP"] == pytest.approx(100)
    assert f"val.json has {share} mask for its objects" in caplog.text
    assert "add a segmentation, polygons or run lengths" in caplog.text
    assert "Only boxes are evaluated." in caplog.text
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert all("segmentation" in result for result in results)
    assert not (tmp_path / "out" / "per_class_segm_ap.csv").exists()


@pytest.mark.parametrize(
    "broken", [None, [], [[1, 2, 3, 4]], {"size": [5, 5], "counts": [25]}, {"counts": "1"}, "x"]
)
def test_masks_that_are_none(tiny_cfg, broken):
    from co_detr.data.coco_file import read_coco

    content = read_coco(tiny_cfg().data.val)
    corners(content.annotations)
    content.annotations[1]["segmentation"] = broken
    dataset = usable_dataset(content, with_masks=True)
    assert "(1 of 9 have none; the first is in image 3, box" in missing_masks("a.json", dataset)
    content.annotations[1]["iscrowd"] = 1  # a crowd region is its box
    assert missing_masks("a.json", usable_dataset(content, with_masks=True)) is None


def test_a_test_set_gets_masks_in_its_result_file(masked_cfg, tiny_data, tmp_path, caplog):
    write_masks(tiny_data, corners)
    cfg = masked_cfg(BoxShaped)
    path = tiny_data.root / "unlabeled.json"
    content = json.loads((tiny_data.root / "val.json").read_text())
    path.write_text(json.dumps({key: content[key] for key in ("images", "categories")}))
    cfg.data.val = str(path)
    cfg.model.annotation_file = str(tiny_data.root / "val.json")
    assert run_evaluation_only(cfg, resume=False) == {}
    assert "there is nothing to evaluate" in caplog.text and "Only boxes" not in caplog.text
    results = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert len(results) == 9 and all("segmentation" in result for result in results)


def test_results_hold_no_bitmaps():
    """An image of 24 million pixels with 300 objects, in run lengths at once."""
    boxes = [[10 * number, 5 * number, 300, 200] for number in range(300)]
    found = instances_of([{"bbox": box, "category_id": 1} for box in boxes], (4000, 6000), [1])
    entries = result_entries(found, 7)
    assert len(json.dumps(entries)) < 2_000_000 and entries[0]["segmentation"]["size"] == [
        *(4000, 6000)
    ]


@pytest.mark.parametrize("averaged", [False, True])
def test_training_keeps_the_best_masks(tiny_cfg, tiny_data, tmp_path, caplog, averaged):
    """History, log, best checkpoint and resumed run know the metrics of masks."""
    caplog.set_level(logging.INFO)
    write_masks(tiny_data)
    settings = [MASKED, "train.eval_period=2", "train.best_metric=segm/AP50"]
    settings += [f"train.ema.enabled={str(averaged).lower()}"]
    trained = run_training(tiny_cfg(*settings, "train.max_iter=4"), resume=False)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert trained["segm/AP"] == metrics["segm/AP"]
    trained = run_training(tiny_cfg(*settings), resume=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert [line["iteration"] for line in lines if "segm/AP" in line] == [1, 6]
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [1, 6]
    assert not any("bbox/segm" in key for line in lines for key in line)
    history = json.loads((tmp_path / "out" / "evaluations.json").read_text())
    assert all("segm/AP50" in metrics for metrics in history.values()) and len(history) == 3
    assert "Best segm/AP50 so far" in caplog.text and (tmp_path / "out" / "model_best.pth").exists()
    final = f"train.init_checkpoint={tmp_path / 'out' / 'model_final.pth'}"
    again = run_evaluation_only(tiny_cfg(MASKED, final, output="other"), resume=False)
    assert again == trained


def test_the_best_masks_need_masks(tiny_cfg, tiny_data):
    best = "train.best_metric=segm/AP"
    with pytest.raises(ConfigError, match="segm/AP is no metric .* this model predicts no masks"):
        run_training(tiny_cfg(best), resume=False)
    with pytest.raises(ConfigError, match="best_metric=segm/AP: .*val.json has no mask for its"):
        run_training(tiny_cfg(MASKED, best), resume=False)
    write_masks(tiny_data)
    with pytest.raises(ConfigError, match="segm/APx is no metric .* or segm/, roi/ before one"):
        run_training(tiny_cfg(MASKED, "train.best_metric=segm/APx"), resume=False)
