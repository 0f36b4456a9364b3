"""The validation loss of a real model, whose heads draw samples and log numbers of their own."""

import torch

from co_detr.engine.run import run_training
from tests.modeling.builders import tiny_config
from tests.modeling.test_resume import losses_of


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
