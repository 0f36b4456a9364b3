"""A model with a mask head goes through all that a run has: training, resume, EMA, evaluation."""

import json
import logging
import shutil

import pytest
import torch

from co_detr.checkpoint.detector import load_detector
from co_detr.engine.config import load_config
from co_detr.engine.memory_use import dry_run
from co_detr.engine.train import run_evaluation_only, run_training
from co_detr.modeling import CoDETR
from co_detr.tools.analyze.subjects import load_models, parse_model
from tests.device import NAME
from tests.engine.masked import add_masks, write_masks
from tests.modeling.builders import shrink
from tests.paths import config_path

TINY = [
    "model.num_classes=2",
    "model.postprocessor.max_detections=10",
    "model.mask_head.sampler.num_proposals=20",
    "model.mask_head.sampler.max_positives=4",
    "model.mask_head.iou_head.conv_dim=16",
    "model.mask_head.iou_head.fc_dim=32",
    "dataloader.train.mapper.augmentations.short_edges=[64]",
    "dataloader.train.mapper.augmentations.crop_probability=0.0",
    "dataloader.test.mapper.augmentations.short_edge=64",
    "train.effective_batch_size=2",
    "train.max_iter=3",
    "train.log_period=1",
    "train.eval_period=2",
    "train.checkpointer.period=2",
]
FEATURES = [
    "train.images_per_gpu=1",
    "train.ema.enabled=true",
    "train.ema.warmup_iterations=0",
    "train.val_loss.enabled=true",
    "train.val_loss.max_images=2",
    "train.best_metric=segm/AP",
    "model.compare_detectors=true",
    "dataloader.train.dataset.score_weights=true",
    "dataloader.train.mixing.mosaic=0.5",
    "dataloader.train.mixing.size=64",
]


def add_masks_and_scores(annotations):
    add_masks(annotations)
    for annotation in annotations[::2]:
        annotation["score"] = 0.4


@pytest.fixture
def make(tiny_data, tmp_path):
    """Makes a config; arguments are overrides."""
    write_masks(tiny_data, add_masks_and_scores)

    def config(*overrides, output="out"):
        data = tiny_data.overrides(tmp_path / output)
        return shrink(load_config(config_path("co_detr_r50_instance"), [*data, *TINY, *overrides]))

    return config


@pytest.mark.slow
@pytest.mark.cpu_only("RoIAlign would be compiled to repeat its bits")
def test_a_run_with_everything(make, tmp_path, caplog):
    torch.manual_seed(0)
    caplog.set_level(logging.INFO, "co_detr")
    metrics = run_training(make(*FEATURES), resume=False)
    assert "Losses are weighed by scores: 5 of 9 boxes have one below 1, 0.40 on" in caplog.text
    assert metrics.keys() > {"AP", "segm/AP", "roi/AP", "merged/AP"}
    assert not any("roi/segm" in name for name in metrics)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert any(line["mask_head.loss_mask"] > 0 for line in lines if "total_loss" in line)
    for name in ("loss_mask", "loss_mask_iou"):
        assert all(line[f"val_loss/mask_head.{name}"] > 0 for line in lines if "segm/AP" in line)

    # What is cut off after two steps goes on as if it had not been, masks included.
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    for name in ("model_final.pth", "metrics.json", "coco_instances_results.json"):
        (tmp_path / "cut" / name).unlink()
    (tmp_path / "cut" / "last_checkpoint").write_text("model_0000001.pth")
    torch.manual_seed(123)
    again = run_training(make(*FEATURES, output="cut"), resume=True)
    whole, cut = (
        torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("out", "cut")
    )
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())
    assert again == metrics
    entries = [
        json.loads((tmp_path / name / "coco_instances_results.json").read_text())
        for name in ("out", "cut")
    ]
    assert entries[0] == entries[1] and {"segmentation", "mask_score"} <= entries[0][0].keys()

    # The stripped model has its masks, and the averaged weights.
    checkpoint = tmp_path / "out" / "model_final.pth"
    cfg = make(output="alone")
    cfg.train.init_checkpoint = str(checkpoint)
    evaluated = run_evaluation_only(cfg, resume=False)
    results = tmp_path / "alone" / "coco_instances_results.json"
    assert json.loads(results.read_text()) == entries[0]
    assert evaluated["segm/AP"] == metrics["segm/AP"]
    loaded = load_detector(str(tmp_path / "out" / "config.yaml"), checkpoint)
    assert loaded.model.auxiliary is None and loaded.model.predicts_masks
    averaged = torch.load(checkpoint)["ema"]
    key = "mask_head.logits.0.weight"
    assert torch.equal(loaded.model.state_dict()[key].cpu(), averaged[f"module.{key}"].cpu())

    # No measure of the analysis looks at masks, and none stumbles over them.
    model = parse_model(f"masks={tmp_path / 'out'}")
    (subject,) = load_models([model], torch.device(NAME)).subjects
    assert subject.model.mask_head is None and subject.model.auxiliary is not None


@pytest.mark.parametrize("name", ["co_detr_r50_instance", "co_detr_r50_mask_rcnn"])
def test_dry_runs_learn_masks(tmp_path, monkeypatch, name):
    """Otherwise they would promise too little memory."""
    masks = "mask_head" if name.endswith("instance") else "roi"
    overrides = [line for line in TINY if "mask_head" not in line or masks == "mask_head"]
    cfg = shrink(load_config(config_path(name), overrides))
    cfg.dataloader.train.mapper.augmentations.max_size = 80
    seen = []
    forward = CoDETR.forward

    def watched(self, *arguments):
        losses = forward(self, *arguments)
        seen.append(float(losses[f"{masks}.loss_mask"]))
        return losses

    monkeypatch.setattr(CoDETR, "forward", watched)
    assert dry_run(cfg).peak.used > 0
    assert len(seen) >= 3 and min(seen) > 0
