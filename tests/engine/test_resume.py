"""Training that stops and resumes equals training that does not stop."""

import json

import pytest
import torch

from co_detr.engine.run import run_training


def _losses(output_dir):
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    keys = ("matching.loss_cls", "roi.loss_bbox", "total_loss", "grad_norm", "lr")
    return {
        line["iteration"]: [line[key] for key in keys] for line in lines if "total_loss" in line
    }


def _final_state(output_dir):
    return torch.load(output_dir / "model_final.pth")


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_equals_uninterrupted(tiny_cfg, tmp_path, workers):
    # Dropout uses the torch generator, augmentation NumPy's, and images come in two shapes.
    common = ["model.dropout=0.3", "lr_multiplier.drops=[0.5]"]
    torch.manual_seed(0)
    run_training(tiny_cfg(*common, output="whole"), resume=False)

    workers_too = f"dataloader.train.num_workers={workers}"
    torch.manual_seed(0)
    # Ends after 5 of 6 iterations, of which the checkpoint has 3.
    interrupted = tiny_cfg(*common, workers_too, output="parts")
    with pytest.raises(KeyboardInterrupt):
        run_training(_stopping_at(interrupted, 5), resume=False)
    torch.manual_seed(123)
    run_training(tiny_cfg(*common, workers_too, output="parts"), resume=True)

    whole, parts = _losses(tmp_path / "whole"), _losses(tmp_path / "parts")
    assert sorted(whole) == list(range(6))
    assert whole == parts
    expected, actual = _final_state(tmp_path / "whole"), _final_state(tmp_path / "parts")
    assert actual["iteration"] == 5
    for name, value in expected["model"].items():
        assert torch.equal(value, actual["model"][name]), name
    moments = expected["trainer"]["optimizer"]["state"]
    for index, state in moments.items():
        other = actual["trainer"]["optimizer"]["state"][index]
        assert torch.equal(state["exp_avg_sq"], other["exp_avg_sq"])


def _stopping_at(cfg, iteration):
    """The config with a mapper that interrupts the run when it would load that iteration."""
    cfg.dataloader.train.mapper = {
        "_target_": InterruptingMapper,
        "mapper": cfg.dataloader.train.mapper,
        "samples": iteration * cfg.train.effective_batch_size,
    }
    cfg.dataloader.train.num_workers = 0
    return cfg


class InterruptingMapper:
    def __init__(self, mapper, samples):
        self.mapper = mapper
        self.samples = samples

    def __call__(self, record):
        if self.samples == 0:
            raise KeyboardInterrupt
        self.samples -= 1
        return self.mapper(record)


def test_resuming_a_finished_run_only_evaluates(tiny_cfg, tmp_path):
    first = run_training(tiny_cfg("train.max_iter=3"), resume=False)
    before = (tmp_path / "out" / "model_final.pth").read_bytes()
    (tmp_path / "out" / "metrics.json").unlink()
    again = run_training(tiny_cfg("train.max_iter=3"), resume=True)
    assert again == first
    assert (tmp_path / "out" / "model_final.pth").read_bytes() == before
    assert (tmp_path / "out" / "metrics.json").exists()


def test_only_the_newest_checkpoints_are_kept_across_a_resume(tiny_cfg, tmp_path):
    keep = ["train.checkpointer.period=1", "train.checkpointer.max_to_keep=2"]
    run_training(tiny_cfg(*keep, "train.max_iter=3"), resume=False)
    run_training(tiny_cfg(*keep, "train.max_iter=5"), resume=True)
    names = sorted(path.name for path in (tmp_path / "out").glob("model_0*"))
    assert names == ["model_0000003.pth", "model_0000004.pth"]


def test_resume_warns_when_the_order_of_images_changes(tiny_cfg, caplog):
    run_training(tiny_cfg("train.max_iter=3"), resume=False)
    run_training(tiny_cfg("train.effective_batch_size=2", "train.max_iter=4"), resume=True)
    assert "another total_batch_size" in caplog.text
