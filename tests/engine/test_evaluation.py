"""Evaluation writes detections and COCO metrics, from the weights that were asked for."""

import json

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from co_detr.data.coco import load_coco
from co_detr.data.coco_classes import align_classes, class_names
from co_detr.engine import train
from co_detr.engine.command_line import parse_arguments
from co_detr.engine.train import build_evaluation, run_evaluation_only, run_training
from co_detr.errors import CheckpointError, ConfigError, DataError
from tests.engine.tiny_detector import GroundTruthDetector


class Oracle(GroundTruthDetector):
    """Returns the ground truth."""

    def detect(self, sample):
        mine = self.annotations_of(sample)
        result = Instances((sample["height"], sample["width"]))
        boxes = torch.tensor([a["bbox"] for a in mine], dtype=torch.float32).reshape(-1, 4)
        result.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        result.scores = torch.ones(len(mine))
        result.pred_classes = torch.tensor([[3, 7].index(a["category_id"]) for a in mine])
        return result


@pytest.fixture
def oracle_cfg(tiny_cfg):
    def make(*overrides):
        cfg = tiny_cfg(*overrides)
        model = {"_target_": Oracle, "num_classes": 2, "annotation_file": cfg.data.val}
        cfg.model = model
        return cfg

    return make


def test_perfect_detections_score_100(oracle_cfg, tmp_path):
    returned = run_evaluation_only(oracle_cfg(), resume=False)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cell", "AP-plate"]
    for name in ("AP", "AP50", "AP75", "APs", "AP-cell", "AP-plate"):
        assert metrics[name] == pytest.approx(100)
    assert metrics["APm"] is None and metrics["APl"] is None  # no box of that size
    assert returned == {name: value for name, value in metrics.items() if value is not None}
    detections = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {d["category_id"] for d in detections} == {3, 7}  # the ids of the file
    assert detections[0].keys() == {"image_id", "category_id", "bbox", "score"}


def test_annotations_without_area_and_iscrowd(oracle_cfg, tiny_data, tmp_path):
    path = tiny_data.root / "val.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    path.write_text(json.dumps(content))
    assert run_evaluation_only(oracle_cfg(), resume=False)["APs"] == pytest.approx(100)


def _edit_val(tiny_data, change):
    path = tiny_data.root / "val.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return content


def test_odd_values_are_the_same_for_loader_and_evaluation(oracle_cfg, tiny_data, tmp_path):
    """What the loader corrects, the evaluation does not read again by itself."""

    def change(content):
        for image in content["images"]:
            image["id"] = float(image["id"])
        for number, annotation in enumerate(content["annotations"]):
            annotation["area"] = [None, "240", -1, float("nan")][number % 4]
            annotation["iscrowd"] = [None, False, 0.0][number % 3]
            annotation["image_id"] = float(annotation["image_id"])
            annotation["category_id"] = float(annotation["category_id"])

    _edit_val(tiny_data, change)
    metrics = run_evaluation_only(oracle_cfg(), resume=False)
    assert metrics["AP"] == metrics["APs"] == pytest.approx(100)
    detections = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert all(type(d["image_id"]) is type(d["category_id"]) is int for d in detections)


def test_boxes_that_nothing_can_match_are_not_missed(oracle_cfg, tiny_data):
    """Training leaves them out, so the evaluation must not count them as objects not found."""

    def change(content):
        image = content["images"][0]
        for number, box in enumerate(([5, 5, 0, 8], [3000, 3000, 10, 10])):
            content["annotations"].append(
                {"id": 900 + number, "image_id": image["id"], "category_id": 3}
                | {"bbox": box, "area": 80, "iscrowd": 0}
            )

    _edit_val(tiny_data, change)
    cfg = oracle_cfg()
    model = instantiate(cfg.model)
    model.annotations = [annotation for annotation in model.annotations if annotation["id"] < 900]
    assert build_evaluation(cfg)(model)["AP"] == pytest.approx(100)


def _crowded(content):
    """130 small boxes of one class in the first image."""
    image = content["images"][0]
    content["annotations"] = [
        {"id": number + 1, "image_id": image["id"], "category_id": 3}
        | {"bbox": [4 * (number % 12), 4 * (number // 12), 3, 3]}
        for number in range(130)
    ]


def test_images_with_more_objects_than_coco_looks_at(oracle_cfg, tiny_data, tmp_path):
    _edit_val(tiny_data, _crowded)
    assert run_evaluation_only(oracle_cfg(), resume=False)["AP"] < 80
    more = oracle_cfg("dataloader.evaluator.max_detections=130")
    metrics = run_evaluation_only(more, resume=False)
    assert metrics["AP"] == metrics["APs"] == metrics["AP-cell"] == pytest.approx(100)
    rows = (tmp_path / "out" / "per_class_ap.csv").read_text().splitlines()
    assert rows[1] == "cell,100.000,100.000,130"


@pytest.mark.parametrize("limit", [1, 2, 7, 10, 50, 100, 120])
def test_limits_are_those_of_the_coco_api(oracle_cfg, tiny_data, tmp_path, limit):
    _edit_val(tiny_data, _crowded)
    cfg = oracle_cfg(f"dataloader.evaluator.max_detections={limit}")
    metrics = run_evaluation_only(cfg, resume=False)
    path = tiny_data.root / "val.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation |= {"area": 9, "iscrowd": 0}
    content["info"] = {}
    path.write_text(json.dumps(content))
    truth = COCO(str(path))
    found = truth.loadRes(str(tmp_path / "out" / "coco_instances_results.json"))
    judged = COCOeval(truth, found, "bbox")
    judged.params.maxDets = [limit]
    judged.evaluate(), judged.accumulate()
    precisions = judged.eval["precision"][:, :, :, 0, 0]
    assert metrics["AP"] == pytest.approx(100 * precisions[precisions > -1].mean())


@pytest.mark.parametrize("limit", [0, -3, 1.5])
def test_limits_that_are_none(oracle_cfg, limit):
    cfg = oracle_cfg()
    cfg.dataloader.evaluator.max_detections = limit
    with pytest.raises(ConfigError, match=f"evaluator.max_detections={limit} must be a whole"):
        run_evaluation_only(cfg, resume=False)


class Blind(Oracle):
    """Finds nothing at all."""

    def detect(self, sample):
        return super().detect(sample)[:0]


def test_no_detection_is_an_ap_of_zero(oracle_cfg, tmp_path):
    cfg = oracle_cfg()
    cfg.model._target_ = Blind
    assert run_evaluation_only(cfg, resume=False)["AP"] == 0
    assert json.loads((tmp_path / "out" / "coco_instances_results.json").read_text()) == []


@pytest.mark.parametrize("annotations", ["absent", [], None])
def test_a_test_set_gets_a_result_file(tiny_cfg, tiny_data, tmp_path, caplog, annotations):
    def change(content):
        content["annotations"] = annotations
        if annotations == "absent":
            del content["annotations"]
        for image in content["images"]:
            image["id"] += 1000
        content["categories"].reverse()

    _edit_val(tiny_data, change)
    assert run_evaluation_only(tiny_cfg(), resume=False) == {}
    detections = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {d["image_id"] for d in detections} == set(range(1001, 1011))
    assert {d["category_id"] for d in detections} == {3, 7}
    assert "has no annotations: there is nothing to evaluate. The 20 detections are in" in (
        caplog.text
    )
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_two_classes_of_one_name_have_an_ap_each(oracle_cfg, tiny_data, tmp_path, caplog):
    caplog.set_level("INFO")

    def change(content):
        for category in content["categories"]:
            category["name"] = "cell"
        for annotation in content["annotations"][:4]:
            annotation["bbox"][0] += 5

    _edit_val(tiny_data, change)
    metrics = run_evaluation_only(oracle_cfg(), resume=False)
    assert list(metrics)[-2:] == ["AP-cell (id 3)", "AP-cell (id 7)"]
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"AP-cell (id 3)", "AP-cell (id 7)"} <= written.keys()
    rows = (tmp_path / "out" / "per_class_ap.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["cell (id 3)", "cell (id 7)"]
    assert "| cell (id 7) |" in caplog.text


def test_training_ends_with_an_evaluation_that_eval_only_repeats(tiny_cfg, tmp_path):
    trained = run_training(tiny_cfg("train.eval_period=3"), resume=False)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert trained == {name: value for name, value in metrics.items() if value is not None}
    detections = (tmp_path / "out" / "coco_instances_results.json").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [2, 6]

    run_evaluation_only(tiny_cfg(), resume=True)
    assert (tmp_path / "out" / "coco_instances_results.json").read_text() == detections
    final = f"train.init_checkpoint={tmp_path / 'out' / 'model_final.pth'}"
    run_evaluation_only(tiny_cfg(final, output="other"), resume=False)
    assert (tmp_path / "other" / "coco_instances_results.json").read_text() == detections


def test_nothing_to_evaluate(tiny_cfg):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        run_evaluation_only(tiny_cfg(), resume=True)


def test_random_weights_are_announced(tiny_cfg, caplog):
    run_evaluation_only(tiny_cfg(), resume=False)
    assert "evaluating random weights" in caplog.text


def test_a_wrong_val_set_stops_before_training(tiny_cfg, tmp_path):
    cfg = tiny_cfg()
    cfg.data.val = str(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match=r"nowhere\.json does not exist"):
        run_training(cfg, resume=False)
    assert not (tmp_path / "out").exists()


def test_table_of_classes(oracle_cfg, tiny_data, tmp_path, caplog):
    """In the order of the model's classes, with numbers for classes that have boxes."""
    caplog.set_level("INFO")
    path = tiny_data.root / "val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    for annotation in content["annotations"]:
        annotation["category_id"] = {3: 8, 7: 2}[annotation["category_id"]]
    content["categories"] = [
        {"id": 2, "name": "plate"},
        {"id": 5, "name": "dust"},
        {"id": 8, "name": "cell"},
    ]
    path.write_text(json.dumps(content))
    train = json.loads(tiny_data.train.read_text())
    train["categories"].append({"id": 9, "name": "dust"})
    tiny_data.train.write_text(json.dumps(train))
    cfg = oracle_cfg("model.num_classes=3")
    cfg.model.num_classes = 3
    load_coco(cfg.data.train, cfg.data.train_images)
    cells = sum(a["category_id"] == 8 and not a["iscrowd"] for a in content["annotations"])
    plates = sum(a["category_id"] == 2 for a in content["annotations"])

    run_evaluation = build_evaluation(cfg)
    align_classes(cfg.data.val, class_names(cfg.data.train))
    run_evaluation(OneClass())
    lines = (tmp_path / "out" / "per_class_ap.csv").read_text().splitlines()
    assert lines[0] == "class,AP,AP50,ground_truths"
    assert [line.split(",")[0] for line in lines[1:]] == ["cell", "plate", "dust"]
    assert lines[2] == f"plate,0.000,0.000,{plates}" and lines[3] == "dust,,,0"
    assert lines[1].endswith(f",{cells}")
    table = caplog.text[caplog.text.index("Results by class:") :].splitlines()
    assert table[1].split() == ["|", "class", "|", "AP", "|", "AP50", "|", "ground_truths", "|"]
    assert [row.split()[1] for row in table[3:6]] == ["cell", "plate", "dust"]


class OneClass(nn.Module):
    """Finds one thing in every image: nothing."""

    def forward(self, batched_inputs):
        found = []
        for sample in batched_inputs:
            result = Instances((sample["height"], sample["width"]))
            result.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
            result.scores = torch.ones(1)
            result.pred_classes = torch.zeros(1, dtype=torch.long)
            found.append({"instances": result})
        return found


class ShiftedOracle(Oracle):
    """Two pixels beside the ground truth: right at IoU 0.5 and wrong at 0.95."""

    def detect(self, sample):
        result = super().detect(sample)
        result.pred_boxes.tensor[:, ::2] += 2
        return result


def test_numbers_of_a_class_are_those_of_an_evaluation_of_it_alone(oracle_cfg, tmp_path):
    cfg = oracle_cfg()
    cfg.model._target_ = ShiftedOracle
    metrics = run_evaluation_only(cfg, resume=False)
    rows = [row.split(",") for row in (tmp_path / "out" / "per_class_ap.csv").open()]
    assert [row[0] for row in rows] == ["class", "cell", "plate"]
    truth = COCO(cfg.data.val)
    found = truth.loadRes(str(tmp_path / "out" / "coco_instances_results.json"))
    for (name, ap, ap50, number), category in zip(rows[1:], (3, 7), strict=True):
        alone = COCOeval(truth, found, "bbox")
        alone.params.catIds = [category]
        alone.evaluate(), alone.accumulate(), alone.summarize()
        assert float(ap) == pytest.approx(100 * alone.stats[0], abs=1e-3)
        assert float(ap50) == pytest.approx(100 * alone.stats[1], abs=1e-3)
        assert float(ap) < float(ap50)
        assert metrics[f"AP-{name}"] == pytest.approx(float(ap), abs=1e-3)
        assert int(number) == len(truth.getAnnIds(catIds=[category]))


@pytest.mark.parametrize("amp", [None, "bfloat16"])
def test_mixed_precision_of_evaluations_alone(tiny_cfg, monkeypatch, amp):
    """Also where the training has it, an evaluation is in float32 unless it is asked for."""
    seen = []

    def note(model):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return {}

    def build(cfg, folder):
        build_evaluation(cfg, folder)  # loads the data
        return note

    monkeypatch.setattr(train, "build_evaluation", build)
    cfg = tiny_cfg("train.amp.enabled=true")
    run_evaluation_only(cfg, resume=False, amp=amp)
    assert seen[0][0] == (amp is not None)
    assert amp is None or seen[0][1] == torch.bfloat16


def test_mixed_precision_of_a_training_is_another_key(capsys):
    assert train.run(parse_arguments(["--config-file", "a.py", "--amp", "float16"])) == 2
    assert "set train.amp.enabled=true train.amp.dtype=float16" in capsys.readouterr().err
