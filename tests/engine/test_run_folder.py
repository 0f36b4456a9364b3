"""A folder belongs to one run at a time, and keeps what a finished run has left."""

import json
import os
import signal
import time

import pytest
import torch

from co_detr.checkpoint.saving import read_identity
from co_detr.engine.setup import evaluation_folder, exclusive
from co_detr.engine.train import run_evaluation_only, run_training
from co_detr.errors import CheckpointError, ConfigError, WriteError
from co_detr.tools.ablate.run import read_outcome
from tests.engine.processes import free_port
from tests.engine.test_survival import assert_equal_runs, logged_losses, wait_for_ever_in_the_step

SHORT = "train.max_iter=3"


def _contents(folder):
    """Every file of a folder, however deep, without evaluations beside the training."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] != "evaluation"
    }


def _errors(process):
    return [line for line in process.output.splitlines() if "error: " in line]


def press_ctrl_c_in_the_second_step():
    from tests.engine.tiny_detector import TinyDetector

    losses, calls = TinyDetector._losses, []

    def press(self, *arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return losses(self, *arguments)

    TinyDetector._losses = press


@pytest.mark.slow
@pytest.mark.parametrize("earlier", ["of today", "without identity"])
def test_a_run_is_not_continued_as_another_one(train_process, tmp_path, earlier):
    first = train_process(SHORT)
    assert first.wait() == 0, first.output
    folder = tmp_path / "out"
    if earlier == "without identity":
        _make_old(folder)
    final = (folder / "model_final.pth").read_bytes()
    second = train_process("optimizer.lr=1e-3", prepare=press_ctrl_c_in_the_second_step)
    assert second.wait() == 130, second.output
    for again in (["--resume"], ["--resume", "optimizer.lr=1e-3"], ["--resume", "--eval-only"]):
        third = train_process(*again)
        assert third.wait() == 2, third.output
        (error,) = _errors(third)
        assert "has saved no checkpoint yet, and model_final.pth is of another run" in error
    assert (folder / "model_final.pth").read_bytes() == final
    # What the sentence advises.
    (folder / "run.json").unlink()
    fourth = train_process("--resume", "train.max_iter=4")
    assert fourth.wait() == 0, fourth.output
    assert torch.load(folder / "model_final.pth")["iteration"] == 3


def _make_old(folder):
    """As a version of the program without identities has left it."""
    (folder / "run.json").unlink()
    for path in folder.glob("model_*.pth"):
        content = torch.load(path)
        del content["run_id"], content["trainer"]["optimizer_layout"]
        torch.save(content, path)


def test_a_run_of_an_earlier_version_goes_on(tiny_cfg, tmp_path):
    torch.manual_seed(0)
    run_training(tiny_cfg(output="whole"), resume=False)
    torch.manual_seed(0)
    run_training(tiny_cfg(SHORT, output="parts"), resume=False)
    folder = tmp_path / "parts"
    _make_old(folder)
    interrupted = tiny_cfg("train.checkpointer.period=100", output="parts")
    interrupted.model._target_ = InterruptedDetector
    with pytest.raises(KeyboardInterrupt):
        run_training(interrupted, resume=True)
    assert read_identity(str(folder)).adopts_unnamed
    run_training(tiny_cfg(output="parts"), resume=True)
    assert_equal_runs(tmp_path / "whole", folder)
    run_id = torch.load(folder / "model_final.pth")["run_id"]
    assert run_id == read_identity(str(folder)).run_id


class InterruptedDetector:
    """Ends the run in its second step."""

    def __new__(cls, **arguments):
        from tests.engine.tiny_detector import TinyDetector

        class Interrupted(TinyDetector):
            steps = 0

            def _losses(self, *inputs):
                self.steps += 1
                if self.steps == 2:
                    raise KeyboardInterrupt
                return super()._losses(*inputs)

        return Interrupted(**arguments)


def test_an_id_stays_with_its_run_and_goes_with_the_next(tiny_cfg, tmp_path):
    ids = []
    for resume, length in ((False, 2), (True, 3), (False, 2)):
        run_training(tiny_cfg(f"train.max_iter={length}"), resume=resume)
        ids.append(torch.load(tmp_path / "out" / "model_final.pth")["run_id"])
        assert read_identity(str(tmp_path / "out")).run_id == ids[-1]
    assert ids[0] == ids[1] != ids[2]


def test_a_damaged_checkpoint_is_not_replaced_by_one_of_another_run(tiny_cfg, tmp_path):
    every = "train.checkpointer.period=1"
    run_training(tiny_cfg(every, "train.max_iter=2"), resume=False)
    run_training(tiny_cfg(every, "train.max_iter=5"), resume=False)
    foreign = tmp_path / "out" / "model_0000001.pth"
    content = torch.load(foreign)
    torch.save({**content, "run_id": "other"}, foreign)
    for name in ("model_final", "model_0000004", "model_0000003", "model_0000002"):
        (tmp_path / "out" / f"{name}.pth").write_bytes(b"")
    run_training(tiny_cfg(every, "train.max_iter=5"), resume=True)
    (tmp_path / "out" / "model_0000000.pth").unlink()
    torch.save({**content, "run_id": "other"}, foreign)
    for name in ("model_final", "model_0000004", "model_0000003", "model_0000002"):
        (tmp_path / "out" / f"{name}.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        run_training(tiny_cfg(every, "train.max_iter=5"), resume=True)


def test_a_damaged_identity(tiny_cfg, tmp_path):
    run_training(tiny_cfg(SHORT), resume=False)
    (tmp_path / "out" / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged .* remove it"):
        run_training(tiny_cfg(), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("again", [[], ["--resume"]])
def test_two_runs_at_once(train_process, tmp_path, again):
    first = train_process("train.max_iter=100000", "train.checkpointer.period=2")
    assert first.wait_until(lambda: "iter 3/" in first.output), first.output
    second = train_process(*again)
    assert second.wait() == 2, second.output
    (error,) = _errors(second)
    assert error.startswith(f"error: another run (process {first.pid} on ")
    assert f"is writing to {tmp_path / 'out'}: wait until it ends or stop it" in error
    # The lock ends with its holder, whatever ends that.
    first.send(signal.SIGKILL)
    first.kill()
    third = train_process("--resume", "train.max_iter=100000")
    assert third.wait_until(lambda: "iter " in third.output), third.output
    third.send(signal.SIGTERM)
    assert third.wait() == 0, third.output


def test_loading_workers_do_not_keep_the_lock(train_process):
    first = train_process(
        "dataloader.train.num_workers=2",
        "train.max_iter=100000",
        prepare=wait_for_ever_in_the_step,
    )
    assert first.wait_until(lambda: "iter 2/" in first.output), first.output
    with open(f"/proc/{first.pid}/task/{first.pid}/children") as file:
        workers = [int(pid) for pid in file.read().split()]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    first.send(signal.SIGKILL)
    first.kill()
    try:
        second = train_process(SHORT)
        assert second.wait() == 0, second.output
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def test_several_processes_are_one_run(train_process):
    def two(*arguments):
        port = free_port()
        return [train_process(*arguments, rank=rank, port=port) for rank in (0, 1)]

    first = two("train.max_iter=100000")
    assert first[0].wait_until(lambda: "iter 2/" in first[0].output), first[0].output
    second = two("--resume")
    assert [process.wait() for process in second] == [2, 2], [process.output for process in second]
    (error,) = _errors(second[0]) + _errors(second[1])
    assert f"another run (process {first[0].pid} on " in error
    first[1].send(signal.SIGTERM)
    assert [process.wait() for process in first] == [0, 0], [process.output for process in first]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"output_dir=.*file cannot be written \(File exists\)"):
        with exclusive(str(tmp_path / "file")):
            pass


def finish_a_run(train_process, tmp_path):
    first = train_process(SHORT, "train.eval_period=1")
    assert first.wait() == 0, first.output
    time.sleep(0.01)
    return _contents(tmp_path / "out")


def no_memory_in_the_step():
    from tests.engine.tiny_detector import TinyDetector

    def fail(self, *arguments):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    TinyDetector._losses = fail


def no_memory_for_the_model():
    from tests.engine.tiny_detector import TinyDetector

    def fail(self, *arguments):
        raise RuntimeError("out of memory")

    TinyDetector.to = fail


@pytest.mark.parametrize(
    ("arguments", "prepare"),
    [
        (["train.max_iters=3"], None),
        (["train.best_metric=mAP"], None),
        (["data.train=missing.json"], None),
        (["data.val_images=missing"], None),
        (["train.init_checkpoint=missing.pth"], None),
        (["train.effective_batch_size=4", "train.images_per_gpu=3"], None),
        (["train.wandb.enabled=true"], None),
        (["--resume", "model.channels=9"], None),
        (["--resume", "train.max_iter=2"], None),
        ([], no_memory_in_the_step),
        (["--resume", "train.max_iter=9"], no_memory_in_the_step),
        ([], no_memory_for_the_model),
    ],
)
def test_a_start_that_fails_changes_nothing(train_process, tmp_path, arguments, prepare):
    before = finish_a_run(train_process, tmp_path)
    second = train_process("optimizer.lr=3e-3", *arguments, prepare=prepare)
    assert second.wait() not in (0, None), second.output
    assert _contents(tmp_path / "out") == before


@pytest.mark.parametrize("checkpoint", ["--resume", "train.init_checkpoint"])
def test_an_evaluation_has_a_folder_of_its_own(train_process, tiny_data, tmp_path, checkpoint):
    before = finish_a_run(train_process, tmp_path)
    if checkpoint != "--resume":
        checkpoint += f"={tmp_path / 'out' / 'model_best.pth'}"
    again = train_process("--eval-only", "dataloader.test.num_workers=1", checkpoint)
    assert again.wait() == 0, again.output
    assert _contents(tmp_path / "out") == before
    folder = tmp_path / "out" / "evaluation"
    assert {path.name for path in folder.iterdir()} >= {
        *("metrics.json", "coco_instances_results.json", "per_class_ap.csv"),
        *("config.yaml", "environment.txt", "log.txt"),
    }
    assert f"Metrics are in {folder / 'metrics.json'}" in again.output
    if checkpoint == "--resume":
        assert json.loads((folder / "metrics.json").read_text()) == json.loads(
            before["metrics.json"]
        )


def test_an_evaluation_without_a_training_beside_it(tiny_cfg, tmp_path):
    run_training(tiny_cfg(SHORT), resume=False)
    checkpoint = f"train.init_checkpoint={tmp_path / 'out' / 'model_final.pth'}"
    for _ in range(2):
        run_evaluation_only(tiny_cfg(checkpoint, output="elsewhere"), resume=False)
    assert (tmp_path / "elsewhere" / "metrics.json").exists()
    assert evaluation_folder(str(tmp_path / "elsewhere")) == str(tmp_path / "elsewhere")


def test_the_folder_of_a_new_run_shows_why_it_did_not_start(train_process, tmp_path):
    process = train_process("data.train=missing.json")
    assert process.wait() == 2
    assert not (tmp_path / "out" / "config.yaml").exists()
    process = train_process(SHORT, prepare=no_memory_in_the_step)
    assert process.wait() == 2
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "images per step" in log and " epochs of 10 images." in log


def test_a_new_run_replaces_what_the_earlier_one_has_logged(tiny_cfg, tmp_path):
    run_training(tiny_cfg(SHORT, "train.eval_period=1"), resume=False)
    run_training(tiny_cfg("train.max_iter=2", "optimizer.lr=1e-3"), resume=False)
    folder = tmp_path / "out"
    assert [iteration for iteration, _ in logged_losses(folder)] == [0, 1]
    assert set(json.loads((folder / "evaluations.json").read_text())) == {"2"}
    assert "lr: 0.001" in (folder / "config.yaml").read_text()
    assert read_outcome(folder).is_finished


def test_a_resumed_start_without_checkpoints_is_the_same_run(tiny_cfg, tmp_path):
    cfg = tiny_cfg(SHORT)
    cfg.model._target_ = InterruptedDetector
    with pytest.raises(KeyboardInterrupt):
        run_training(cfg, resume=False)
    before = read_identity(str(tmp_path / "out"))
    run_training(tiny_cfg(SHORT), resume=True)
    assert read_identity(str(tmp_path / "out")).run_id == before.run_id


def test_fewer_iterations_than_are_done(tiny_cfg):
    run_training(tiny_cfg(SHORT), resume=False)
    with pytest.raises(ConfigError, match=r"train\.max_iter=2, but .*model_final\.pth has 3 iter"):
        run_training(tiny_cfg("train.max_iter=2"), resume=True)
