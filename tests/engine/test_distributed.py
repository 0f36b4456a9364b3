"""Several processes equal one process on the joined batch."""

import json

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from co_detr.engine.train import run_training

pytestmark = pytest.mark.cpu_only("two processes: NCCL wants a card for each, see tests/gpu")

# The large epsilon keeps AdamW from dividing rounding differences by tiny numbers.
COMMON = [
    "train.max_iter=4",
    "optimizer.eps=1e-2",
    "train.ema.enabled=true",
    # Seven images are shared unevenly, and AP stays 0, so that all processes end after three steps.
    "train.eval_period=1",
    "train.val_loss.enabled=true",
    "train.val_loss.max_images=7",
    "train.early_stop.patience=2",
]


def read_run(output_dir):
    checkpoint = torch.load(output_dir / "model_final.pth")
    state = checkpoint["model"] | checkpoint["ema"]
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("total_loss", "val_loss/total")
    losses = [line[key] for line in lines for key in keys if key in line]
    return state, losses, json.loads((output_dir / "metrics.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "num-gpus"])
def test_two_gloo_processes_equal_one(launch, tiny_cfg, tiny_data, tmp_path, launcher):
    if launcher == "num-gpus" and torch.cuda.is_available():
        pytest.skip("--num-gpus starts GPU processes here")
    seed_all_rng(0)  # as train_net.py does with train.seed
    run_training(tiny_cfg(*COMMON, output="one"), resume=False)
    arguments = [*tiny_data.overrides(tmp_path / "two"), *COMMON]
    if launcher == "torchrun":
        # Each process also adds up its half of the batch in two pieces.
        arguments.append("train.images_per_gpu=1")
    double = launch(launcher, *arguments)
    assert double.returncode == 0, double.stderr

    expected, expected_losses, expected_metrics = read_run(tmp_path / "one")
    actual, losses, metrics = read_run(tmp_path / "two")
    assert len(losses) == 6
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-6)
    assert metrics == pytest.approx(expected_metrics, abs=0.1)
