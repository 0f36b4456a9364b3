"""An interrupted training of Co-DETR, resumed, is bit for bit the uninterrupted one."""

import json
import shutil

import pytest
import torch

from co_detr.engine.train import run_training
from tests.modeling.builders import tiny_config

RECIPE = [
    "train.max_iter=6",
    "train.log_period=1",
    "train.eval_period=0",
    "train.checkpointer.period=3",
    "lr_multiplier.drops=[0.7]",
    "train.effective_batch_size=2",  # a data order of its own, that is resumed as well
    "dataloader.train.mapper.augmentations.flip_probability=0.5",
    "dataloader.train.mapper.augmentations.short_edges=[112,128]",
    "model.encoder.dropout=0.1",
]


def losses_of(output_dir):
    """All logged losses by iteration."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    not_repeatable = ("time", "eta", "seconds")
    return {
        line["iteration"]: {
            key: value
            for key, value in line.items()
            if not any(word in key for word in not_repeatable)
        }
        for line in lines
        if "total_loss" in line
    }


@pytest.mark.cpu_only("RoIAlign would be compiled to repeat its bits; tests/gpu asks for them")
@pytest.mark.parametrize("at_a_time", ["null", "1"], ids=["whole", "accumulated"])
def test_resume_equals_uninterrupted(rectangles, tmp_path, at_a_time):
    whole, parts = tmp_path / "out", tmp_path / "parts"
    recipe = [*rectangles, *RECIPE, f"train.images_per_gpu={at_a_time}"]
    torch.manual_seed(0)
    run_training(tiny_config(2, recipe), resume=False)

    # What a run leaves that is killed after iteration 5, of which the checkpoint has 3.
    shutil.copytree(whole, parts)
    for name in ("model_final.pth", "model_0000005.pth", "metrics.json"):
        (parts / name).unlink()
    (parts / "last_checkpoint").write_text("model_0000002.pth")
    torch.manual_seed(123)
    run_training(tiny_config(2, [*recipe, f"train.output_dir={parts}"]), resume=True)

    expected, actual = losses_of(whole), losses_of(parts)
    assert sorted(actual) == list(range(6))
    keys = {"matching.loss_giou", "roi.loss_rpn_cls", "atss.loss_centerness", "grad_norm"}
    assert keys | {"atss_queries.d0.loss_cls", "roi/roi_head/num_fg_samples"} <= set(actual[5])
    assert actual == expected
    assert expected[4]["total_loss"] != expected[5]["total_loss"]
    states = [torch.load(path / "model_final.pth")["model"] for path in (whole, parts)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert (parts / "coco_instances_results.json").read_text() == (
        whole / "coco_instances_results.json"
    ).read_text()
