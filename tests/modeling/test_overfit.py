"""The test that notices a wrong sign anywhere: a tiny Co-DETR learns four images by heart."""

import pytest
import torch
from detectron2.config import instantiate

from co_detr.engine.evaluation import evaluate
from co_detr.engine.train import run_evaluation_only, run_training
from tests.device import DEVICE
from tests.modeling.builders import tiny_config

pytestmark = pytest.mark.slow
RECIPE = [
    "train.max_iter=120",
    "train.log_period=60",
    "train.eval_period=0",
    "optimizer.lr=2e-3",
    "optimizer.params.lr_factor_func.factor=1.0",
    "lr_multiplier.drops=[0.75]",
]


def test_four_images_are_learned_by_heart(rectangles):
    cfg = tiny_config(2, [*rectangles, *RECIPE])
    torch.manual_seed(0)
    metrics = run_training(cfg, resume=False)
    assert metrics["AP"] > 90

    # The decoder could do this alone; so each head is asked as well.
    model = instantiate(cfg.model).to(DEVICE)
    model.load_state_dict(torch.load(f"{cfg.train.output_dir}/model_final.pth")["model"])
    for name in model.auxiliary.heads:
        loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
        model.evaluate_with = name
        found = evaluate(model, loader, evaluator, cfg.train.output_dir)
        assert found["AP"] > 90, name


def test_each_dense_head_learns_them_and_can_be_evaluated(rectangles):
    """Heads alone: the decoder is as small as it gets and hears nothing of them."""
    overrides = [
        "train.max_iter=60",
        "model.decoder.num_layers=1",
        "model.auxiliary.positive_queries=null",
        "model.auxiliary.roi=null",
        "model.auxiliary.atss=null",  # both are part of the test above
    ]
    cfg = tiny_config(6, [*rectangles, *RECIPE, *overrides])
    torch.manual_seed(0)
    run_training(cfg, resume=False)
    cfg.train.init_checkpoint = f"{cfg.train.output_dir}/model_final.pth"
    for name in ("retinanet", "fcos", "paa", "gfl"):
        cfg.model.evaluate_with = name
        assert run_evaluation_only(cfg, resume=False)["AP"] > 80, name
