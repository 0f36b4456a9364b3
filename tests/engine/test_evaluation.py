"""Evaluation writes detections and COCO metrics, from the weights that were asked for."""

import json

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from co_detr.engine.run import run_evaluation_only, run_training
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
