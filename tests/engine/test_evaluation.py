"""Evaluation writes detections and COCO metrics, from the weights that were asked for."""

import json

import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from co_detr.data.coco import align_classes, class_names, load_coco
from co_detr.engine.run import _build_evaluation, run_evaluation_only, run_training
from co_detr.errors import CheckpointError, DataError


class Oracle(nn.Module):
    """Returns the ground truth; the val mapper drops it, so it reads the file."""

    def __init__(self, num_classes, annotation_file):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        with open(annotation_file) as file:
            self.annotations = json.load(file)["annotations"]

    def forward(self, batched_inputs):
        return [self._detect(sample) for sample in batched_inputs]

    def _detect(self, sample):
        mine = [a for a in self.annotations if a["image_id"] == sample["image_id"]]
        result = Instances((sample["height"], sample["width"]))
        boxes = torch.tensor([a["bbox"] for a in mine], dtype=torch.float32).reshape(-1, 4)
        result.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        result.scores = torch.ones(len(mine))
        result.pred_classes = torch.tensor([[3, 7].index(a["category_id"]) for a in mine])
        return {"instances": result}


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
    for each in content["annotations"]:
        each["category_id"] = {3: 8, 7: 2}[each["category_id"]]
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

    run_evaluation = _build_evaluation(cfg)
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

    def _detect(self, sample):
        result = super()._detect(sample)
        result["instances"].pred_boxes.tensor[:, ::2] += 2
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
