"""The validation loss of a real model, whose heads draw samples and log numbers of their own."""

import json
from pathlib import Path

import pytest
import torch

from co_detr.engine.config import apply_overrides, load_config
from co_detr.engine.train import run_training
from co_detr.engine.validation import training_without_trace
from co_detr.modeling.single_scale import ConditionalSelfAttention
from co_detr.modeling.transformer import SelfAttention
from tests.device import DEVICE
from tests.modeling.builders import shrink, tiny_config
from tests.modeling.test_resume import losses_of
from tests.paths import config_path


@pytest.mark.slow
@pytest.mark.cpu_only("RoIAlign would be compiled to repeat its bits; tests/gpu asks for them")
def test_the_training_does_not_notice_it(rectangles, tmp_path):
    recipe = ["train.max_iter=3", "train.log_period=1", "train.eval_period=1"]
    runs = {}
    for name, switch in (("off", "false"), ("on", "true")):
        torch.manual_seed(0)
        overrides = [f"train.output_dir={tmp_path / name}", f"train.val_loss.enabled={switch}"]
        run_training(tiny_config(2, [*rectangles, *recipe, *overrides]), resume=False)
        runs[name] = losses_of(tmp_path / name)
    val = [[key for key in step if key.startswith("val_loss/")] for step in runs["on"].values()]
    assert {"val_loss/total", "val_loss/roi.loss_rpn_cls", "val_loss/matching.d0.loss_giou"} <= set(
        val[0]
    )
    for step, keys in zip(runs["on"].values(), val, strict=True):
        for key in keys:
            del step[key]
    assert runs["on"] == runs["off"]
    states = [torch.load(tmp_path / name / "model_final.pth")["model"] for name in runs]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("attention", [SelfAttention, ConditionalSelfAttention])
def test_dropout_of_attention_is_off_too(attention):
    layer = attention(32, 4, dropout=0.5).to(DEVICE)
    x = torch.randn(1, 10, 32)
    assert not torch.equal(layer(x, x, None), layer(x, x, None))
    with training_without_trace(layer, DEVICE), torch.no_grad():
        assert layer.training
        assert torch.equal(layer(x, x, None), layer(x, x, None))
    assert not torch.equal(layer(x, x, None), layer(x, x, None))
    layer.eval()
    assert torch.equal(layer(x, x, None), layer(x, x, None))


def _mask_rcnn_config(rectangles, *overrides):
    cfg = shrink(load_config(config_path("co_detr_r50_mask_rcnn")))
    apply_overrides(cfg, [*rectangles, "train.val_loss.enabled=true", *overrides])
    return cfg


def _add_polygons(path: Path) -> None:
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    path.write_text(json.dumps(content))


def test_masks_have_a_validation_loss(rectangles, tmp_path):
    _add_polygons(tmp_path / "rectangles.json")
    recipe = ["train.max_iter=2", "train.log_period=1", "train.eval_period=1"]
    run_training(_mask_rcnn_config(rectangles, *recipe), resume=False)
    first, _ = losses_of(tmp_path / "out").values()
    assert 0 < first["val_loss/roi.loss_mask"] < first["val_loss/total"]


def test_a_val_set_without_masks_has_the_other_losses(rectangles, tmp_path, caplog):
    without = tmp_path / "val.json"
    without.write_text((tmp_path / "rectangles.json").read_text())
    _add_polygons(tmp_path / "rectangles.json")
    recipe = ["train.max_iter=2", "train.log_period=1", "train.eval_period=1"]
    run_training(_mask_rcnn_config(rectangles, *recipe, f"data.val={without}"), resume=False)
    losses, _ = losses_of(tmp_path / "out").values()
    assert losses["val_loss/roi.loss_mask"] == 0 < losses["val_loss/roi.loss_cls"]
    assert "val.json has no masks: what learns masks is not trained on it" in caplog.text
