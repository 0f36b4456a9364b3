"""Steps with NaN or infinity do not reach the weights, and the training ends if there are many."""

import json

import pytest
import torch
from detectron2.utils import comm
from torch import nn

from co_detr.engine.train import run_training
from co_detr.errors import NonFiniteError
from tests.engine.processes import free_port
from tests.engine.tiny_detector import NaNDetector, TinyDetector

EVERY_ITERATION = "train.checkpointer.period=1"


def _lines(output_dir):
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def _checkpoint(output_dir, iteration):
    return torch.load(output_dir / f"model_{iteration:07d}.pth")


class BrieflyNaNDetector(TinyDetector):
    """Its loss is NaN in the third and fourth forward pass in training."""

    passes = 0

    def _losses(self, logits, boxes, batched_inputs):
        losses = super()._losses(logits, boxes, batched_inputs)
        self.passes += 1
        if self.passes in (3, 4):
            losses["roi.loss_bbox"] = losses["roi.loss_bbox"] * float("nan")
        return losses


class NormalizedDetector(BrieflyNaNDetector):
    """With a batch norm, whose statistics become NaN before there is a loss."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.norm = nn.BatchNorm1d(4)

    def _losses(self, logits, boxes, batched_inputs):
        if self.passes + 1 in (3, 4):
            boxes = boxes * float("nan")
        return super()._losses(logits, self.norm(boxes), batched_inputs)


@pytest.mark.parametrize("detector", [BrieflyNaNDetector, NormalizedDetector])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_few_bad_steps_are_skipped(tiny_cfg, tmp_path, caplog, detector, dtype):
    amp = ["train.amp.enabled=true", f"train.amp.dtype={dtype}"] if dtype else []
    cfg = tiny_cfg(EVERY_ITERATION, "train.non_finite.max_skips=2", *amp)
    cfg.model._target_ = detector
    run_training(cfg, resume=False)
    before, *skipped = (_checkpoint(tmp_path / "out", iteration) for iteration in (1, 2, 3))
    for after in skipped:
        for name, value in before["model"].items():
            assert torch.equal(after["model"][name], value), name
        for index, state in before["trainer"]["optimizer"]["state"].items():
            other = after["trainer"]["optimizer"]["state"][index]
            assert all(torch.equal(other[key], value) for key, value in state.items())
    assert _checkpoint(tmp_path / "out", 4)["trainer"]["skips_in_a_row"] == 0
    warnings = [
        record.getMessage() for record in caplog.records if "skipped" in record.getMessage()
    ]
    assert len(warnings) == 2
    assert "at iteration 2 (roi.loss_bbox=nan" in warnings[0] and ".png (id " in warnings[0]
    assert "(2 in a row; more than 2 stop the training)" in warnings[1]
    trained = [line["iteration"] for line in _lines(tmp_path / "out") if "total_loss" in line]
    assert trained == [0, 1, 4, 5]
    scales = [
        checkpoint["trainer"]["grad_scaler"].get("scale") for checkpoint in (before, *skipped)
    ]
    if dtype:  # the scaler learns of the skipped steps
        assert scales[1:] == [scales[0] / 2, scales[0] / 4]


def test_float16_overflow_is_left_to_the_scaler(tiny_cfg, tmp_path, monkeypatch):
    losses = TinyDetector._losses

    def steep(self, logits, boxes, batched_inputs):
        # Its gradient times the initial scale of 65536 is beyond float32.
        return {
            name: loss * 1e37 for name, loss in losses(self, logits, boxes, batched_inputs).items()
        }

    monkeypatch.setattr(TinyDetector, "_losses", steep)
    amp = ["train.amp.enabled=true", "train.amp.dtype=float16"]
    run_training(tiny_cfg(*amp, "train.non_finite.max_skips=0"), resume=False)
    state = torch.load(tmp_path / "out" / "model_final.pth")["trainer"]
    assert state["grad_scaler"]["scale"] < 65536 and state["skips_in_a_row"] == 0


def test_an_infinite_gradient_is_not_the_scale_for_ever(tiny_cfg, tmp_path, monkeypatch):
    def infinite_gradient(self, logits, boxes, batched_inputs):
        return {"loss": (logits.sum() * 0).sqrt()}

    monkeypatch.setattr(TinyDetector, "_losses", infinite_gradient)
    amp = ["train.amp.enabled=true", "train.amp.dtype=float16", "train.max_iter=40"]
    with pytest.raises(NonFiniteError, match="the gradient became NaN or infinite at iteration 21"):
        run_training(tiny_cfg(*amp), resume=False)  # 16 times to a scale of 1, and 6


def test_the_count_goes_on_in_a_resumed_run(tiny_cfg, tmp_path):
    settings = ["train.non_finite.max_skips=3", EVERY_ITERATION]
    first = tiny_cfg(*settings, "train.max_iter=4")
    first.model._target_ = NaNDetector
    run_training(first, resume=False)  # has skipped 2 and 3
    second = tiny_cfg(*settings)
    second.model._target_ = AlwaysNaNDetector
    with pytest.raises(NonFiniteError, match="at iteration 5 .* after 3 skipped steps"):
        run_training(second, resume=True)


class AlwaysNaNDetector(NaNDetector):
    passes = 2


def _no_constants(name):
    raise AssertionError(f"{name} is not JSON")


def test_the_diagnosis_names_all_that_is_needed(tiny_cfg, tmp_path):
    cfg = tiny_cfg("train.non_finite.max_skips=1", "train.images_per_gpu=2")
    cfg.model._target_ = NaNDetector
    with pytest.raises(NonFiniteError) as caught:
        run_training(cfg, resume=False)
    (path,) = (tmp_path / "out").glob("non_finite_*.json")
    assert str(path) in caught.value.sentence
    content = json.loads(path.read_text(), parse_constant=_no_constants)
    assert content["iteration"] == 2 and content["steps_in_a_row"] == 2
    assert content["non_finite_loss_terms"] == {"roi.loss_bbox": "nan"}
    assert content["grad_norm"] == "nan"
    assert content["learning_rates"] == pytest.approx([1e-3, 1e-2])
    assert content["amp"] == {"dtype": None, "loss_scale": None}
    assert content["non_finite_tensors"]["parameters"] == []
    assert "locate.weight" in content["non_finite_tensors"]["gradients"]
    assert "classify.weight" not in content["non_finite_tensors"]["gradients"]
    (process,) = content["processes"]
    assert process["loss_terms"]["matching.loss_cls"] > 0
    assert len(process["images"]) == 4
    for image in process["images"]:
        number = image["image_id"] - 1  # see make_tiny_data
        assert image["file_name"].endswith(f"images/{number}.png")
        assert image["boxes"] <= number % 3 and image["pixels_finite"]


def test_the_next_iteration_gets_its_own_images(tiny_cfg, monkeypatch):
    """Also where the model fails in the first of two micro-batches."""
    seen, losses = [], TinyDetector._losses

    def fail_in_iteration_1(self, logits, boxes, batched_inputs):
        seen.append([sample["image_id"] for sample in batched_inputs])
        if len(seen) == 3:
            raise FloatingPointError("Training has diverged.")
        return losses(self, logits, boxes, batched_inputs)

    def all_passes(self, logits, boxes, batched_inputs):
        seen.append([sample["image_id"] for sample in batched_inputs])
        return losses(self, logits, boxes, batched_inputs)

    settings = ["train.images_per_gpu=2", "train.max_iter=3"]
    monkeypatch.setattr(TinyDetector, "_losses", fail_in_iteration_1)
    run_training(tiny_cfg(*settings), resume=False)
    with_failure, seen = seen.copy(), []
    monkeypatch.setattr(TinyDetector, "_losses", all_passes)
    run_training(tiny_cfg(*settings), resume=False)
    assert with_failure == seen[:3] + seen[4:]


def test_nan_loss_stops_before_the_weights_change(tiny_cfg, tmp_path):
    cfg = tiny_cfg("train.checkpointer.period=1", "train.non_finite.max_skips=0")
    cfg.model._target_ = NaNDetector
    with pytest.raises(NonFiniteError) as caught:
        run_training(cfg, resume=False)
    message = caught.value.sentence
    assert "at iteration 2 (roi.loss_bbox=nan)" in message
    assert ".png (id " in message and "--resume" in message
    assert isinstance(caught.value, FloatingPointError)
    # What was written before is whole and finite, and nothing was written after.
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not list((tmp_path / "out").glob("model_000000[2-9].pth"))
    assert not (tmp_path / "out" / "model_final.pth").exists()
    for value in torch.load(tmp_path / "out" / "model_0000001.pth")["model"].values():
        assert value.isfinite().all()
    # The fix (here: another model class) continues from there.
    run_training(tiny_cfg("train.checkpointer.period=1"), resume=True)
    losses = [line["iteration"] for line in _lines(tmp_path / "out") if "total_loss" in line]
    assert losses == list(range(6))


def test_infinite_gradient_is_reported_too(tiny_cfg, monkeypatch):
    def infinite_gradient(self, logits, boxes, batched_inputs):
        # sqrt has an infinite slope at 0 but the loss itself is 0
        return {"loss": (logits.sum() * 0).sqrt()}

    monkeypatch.setattr("tests.engine.tiny_detector.TinyDetector._losses", infinite_gradient)
    with pytest.raises(NonFiniteError, match="the gradient became NaN or infinite at iteration 0"):
        run_training(tiny_cfg("train.non_finite.max_skips=0"), resume=False)


def test_divergence_that_detectron2_notices_first_names_the_images(tiny_cfg, monkeypatch):
    def diverged(self, logits, boxes, batched_inputs):
        raise FloatingPointError(
            "Predicted boxes or scores contain Inf/NaN. Training has diverged."
        )

    monkeypatch.setattr("tests.engine.tiny_detector.TinyDetector._losses", diverged)
    with pytest.raises(NonFiniteError, match="has diverged at iteration 0 on the images") as caught:
        run_training(tiny_cfg("train.non_finite.max_skips=0"), resume=False)
    assert ".png (id " in caught.value.sentence


class OneRankNaNDetector(NaNDetector):
    """In the second of two processes only."""

    def _losses(self, logits, boxes, batched_inputs):
        if comm.get_rank() == 0:
            return TinyDetector._losses(self, logits, boxes, batched_inputs)
        return super()._losses(logits, boxes, batched_inputs)


def test_two_processes_skip_and_stop_together(train_process, tmp_path):
    arguments = [f"model._target_={__name__}.OneRankNaNDetector", "train.non_finite.max_skips=1"]
    port = free_port()
    ranks = [train_process(*arguments, EVERY_ITERATION, rank=rank, port=port) for rank in (0, 1)]
    assert [process.wait() for process in ranks] == [2, 2], [process.output for process in ranks]
    assert "at iteration 2 (roi.loss_bbox=nan) on the images" in ranks[0].output
    errors = [
        line for process in ranks for line in process.output.splitlines() if "error: " in line
    ]
    assert len(errors) == 1 and errors[0].startswith("[rank 0] error: the loss became NaN")
    (path,) = (tmp_path / "out").glob("non_finite_0000003.json")
    processes = json.loads(path.read_text())["processes"]
    assert [len(entry["images"]) for entry in processes] == [2, 2]
    assert [entry["loss_terms"]["roi.loss_bbox"] == "nan" for entry in processes] == [False, True]
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_0000002.pth"
