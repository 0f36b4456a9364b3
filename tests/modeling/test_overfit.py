"""The test that notices a wrong sign anywhere: a tiny Co-DETR learns four images by heart."""

import torch
from detectron2.config import instantiate

from co_detr.engine.evaluation import evaluate
from co_detr.engine.run import run_training
from tests.modeling.builders import tiny_config

RECIPE = [
    "train.max_iter=200",
    "train.log_period=50",
    "train.eval_period=0",
    "optimizer.lr=1e-3",
    "optimizer.params.lr_factor_func.factor=1.0",
    "lr_multiplier.drops=[0.75]",
]


def test_four_images_are_learnt_by_heart(rectangles):
    cfg = tiny_config(2, [*rectangles, *RECIPE])
    torch.manual_seed(0)
    metrics = run_training(cfg, resume=False)
    assert metrics["AP"] > 90

    # The decoder could do this alone; so each head is asked as well.
    model = instantiate(cfg.model)
    model.load_state_dict(torch.load(f"{cfg.train.output_dir}/model_final.pth")["model"])
    for name in model.auxiliary.heads:
        loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
        model.evaluate_with = name
        found = evaluate(model, loader, evaluator, cfg.train.output_dir)
        assert found["AP"] > 90, name
