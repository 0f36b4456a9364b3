"""A training goes on after whatever ended it, with the numbers of one that was left alone."""

import errno
import json
import os
import pydoc
import resource
import signal
import time

import pytest
import torch

from co_detr.engine import train
from co_detr.engine.hooks import CheckpointHook
from co_detr.engine.launch import guarded
from co_detr.engine.train import run_evaluation_only, run_training
from co_detr.errors import CheckpointError, ConfigError
from co_detr.files import INCOMPLETE
from tests.engine.kill_and_resume import kill_and_resume, tensorboard_events
from tests.engine.processes import job_of
from tests.engine.tiny_detector import TinyDetector

EVERY_ITERATION = "train.checkpointer.period=1"


def _values(output_dir, key):
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["iteration"], line[key]) for line in lines if key in line]


def logged_losses(output_dir):
    return _values(output_dir, "total_loss")


def _weights(output_dir):
    return torch.load(output_dir / "model_final.pth")["model"]


def assert_equal_runs(one, other):
    assert logged_losses(one) == logged_losses(other)
    expected, actual = _weights(one), _weights(other)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.fixture
def whole(tiny_cfg, tmp_path):
    """The folder of a run that was left alone."""
    torch.manual_seed(0)
    run_training(tiny_cfg(output="whole"), resume=False)
    return tmp_path / "whole"


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    result = kill_and_resume(tmp_path, kills=3, iterations=60, seed=1)
    assert not result.problems, result.problems
    assert sum(result.moments.values()) == 3


class SignallingMapper:
    """Sends this process a signal when it maps its `number`-th sample."""

    def __init__(self, mapper, number, signal_number):
        self.mapper = mapper
        self.left = number
        self.signal_number = signal_number

    def __call__(self, record):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signal_number)
        return self.mapper(record)


def _signaled_in(cfg, iteration, signal_number):
    batch_size = cfg.dataloader.train.total_batch_size
    cfg.dataloader.train.mapper = {
        "_target_": SignallingMapper,
        "mapper": cfg.dataloader.train.mapper,
        "number": iteration * batch_size + 2,
        "signal_number": int(signal_number),
    }
    return cfg


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_behind_its_iteration(tiny_cfg, tmp_path, whole, caplog, number):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    cfg = tiny_cfg("train.checkpointer.period=100", output="parts")
    run_training(_signaled_in(cfg, 1, number), resume=False)
    assert (tmp_path / "parts" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "parts" / "metrics.json").exists()
    assert "model_0000001.pth: the same command with --resume continues" in caplog.text
    assert signal.getsignal(number) == signal.SIG_DFL
    run_training(tiny_cfg(output="parts"), resume=True)
    assert_equal_runs(whole, tmp_path / "parts")


def test_a_signal_in_the_last_iteration_leaves_the_evaluation(tiny_cfg, tmp_path, whole):
    torch.manual_seed(0)
    run_training(_signaled_in(tiny_cfg(output="parts"), 5, signal.SIGTERM), resume=False)
    assert (tmp_path / "parts" / "last_checkpoint").read_text() == "model_final.pth"
    assert not (tmp_path / "parts" / "metrics.json").exists()
    for _ in range(2):
        run_training(tiny_cfg(output="parts"), resume=True)
        assert_equal_runs(whole, tmp_path / "parts")
        for name in ("metrics.json", "coco_instances_results.json"):
            assert (tmp_path / "parts" / name).read_text() == (whole / name).read_text()
        found = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").open()]
        assert [line["iteration"] for line in found if "bbox/AP" in line] == [6]


class SignallingDetector(TinyDetector):
    """Asks for a stop in the second image of the second evaluation."""

    evaluated = 0

    def _detect(self, logits, box, sample):
        SignallingDetector.evaluated += 1
        if SignallingDetector.evaluated == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return super()._detect(logits, box, sample)


def test_an_evaluation_that_is_cut_short_is_made_again(tiny_cfg, tmp_path, monkeypatch):
    often = ["train.eval_period=2", "train.checkpointer.period=100"]
    torch.manual_seed(0)
    run_training(tiny_cfg(*often, output="whole"), resume=False)
    torch.manual_seed(0)
    stopped = tiny_cfg(*often, output="parts")
    stopped.model._target_ = SignallingDetector
    run_training(stopped, resume=False)
    assert SignallingDetector.evaluated == 12
    assert (tmp_path / "parts" / "last_checkpoint").read_text() == "model_0000003.pth"
    run_training(tiny_cfg(*often, output="parts"), resume=True)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert_equal_runs(whole, parts)
    assert _values(whole, "bbox/AP50") == _values(parts, "bbox/AP50")
    assert [iteration for iteration, _ in _values(parts, "bbox/AP50")] == [1, 3, 6]


EVALUATING = ["train.eval_period=2", "train.checkpointer.period=100", "train.early_stop.patience=9"]


def _fail_in(monkeypatch, owner, name, call, error, after=False):
    """Makes the `call`-th call of a function raise, at its beginning or behind its end."""
    function, calls = getattr(owner, name), []

    def failing(*arguments, **others):
        calls.append(None)
        if len(calls) == call and not after:
            raise error
        result = function(*arguments, **others)
        if len(calls) == call:
            raise error
        return result

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        ("co_detr.engine.train", "evaluate", 1, False),
        ("co_detr.engine.train", "evaluate", 2, False),
        ("co_detr.engine.train", "evaluate", 2, True),
        ("co_detr.engine.train", "evaluate", 3, False),  # behind the last iteration
        ("co_detr.engine.validation.EvaluationHistory", "add", 2, True),
        ("co_detr.engine.validation.ModelSelection", "after_evaluation", 2, True),
        ("co_detr.engine.writers.WriterHook", "write", 6, True),
        ("co_detr.engine.hooks.CheckpointHook", "_save", 1, True),
    ],
)
def test_an_error_in_an_evaluation_costs_no_training(
    tiny_cfg, tmp_path, monkeypatch, owner, name, call, after
):
    error = TypeError("unsupported operand") if after else KeyboardInterrupt()
    torch.manual_seed(0)
    run_training(tiny_cfg(*EVALUATING, output="whole"), resume=False)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        owner = pydoc.locate(owner)
        _fail_in(patch, owner, name, call, error, after)
        with pytest.raises(type(error)):
            run_training(tiny_cfg(*EVALUATING, output="parts"), resume=False)
    last = torch.load(parts / (parts / "last_checkpoint").read_text())
    assert last["iteration"] == {"evaluate": 2 * call - 1, "_save": 1}.get(name, 3)
    run_training(tiny_cfg(*EVALUATING, output="parts"), resume=True)
    assert_equal_runs(whole, parts)
    for file in ("evaluations.json", "metrics.json", "coco_instances_results.json"):
        assert (whole / file).read_text() == (parts / file).read_text()
    best = [torch.load(folder / "model_best.pth")["iteration"] for folder in (whole, parts)]
    assert best[0] == best[1]
    assert _values(whole, "bbox/AP50") == _values(parts, "bbox/AP50")
    assert tensorboard_events(whole) == tensorboard_events(parts)


def test_an_early_stop_that_was_interrupted(tiny_cfg, tmp_path, monkeypatch):
    stopping = ["train.eval_period=1", "train.early_stop.patience=1"]
    stopping += ["train.early_stop.min_delta=100", "train.checkpointer.period=100"]
    torch.manual_seed(0)
    run_training(tiny_cfg(*stopping, output="whole"), resume=False)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert torch.load(whole / "model_final.pth")["iteration"] == 1
    for moment in ("evaluate", "_save_final"):
        owner = train if moment == "evaluate" else CheckpointHook
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            _fail_in(patch, owner, moment, 2 if moment == "evaluate" else 1, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                run_training(tiny_cfg(*stopping, output="parts"), resume=False)
        assert (parts / "last_checkpoint").read_text() == "model_0000001.pth"
        run_training(tiny_cfg(*stopping, output="parts"), resume=True)
        assert (parts / "last_checkpoint").read_text() == "model_final.pth"
        assert_equal_runs(whole, parts)
        final = torch.load(parts / "model_final.pth")
        assert final["iteration"] == final["trainer"]["iteration"] == 1
        assert _values(whole, "bbox/AP50") == _values(parts, "bbox/AP50")
        text = (whole / "evaluations.json").read_text()
        assert (parts / "evaluations.json").read_text() == text


def _train_long(train_process, *arguments):
    """A process that trains until something stops it; returns when it has begun."""
    process = train_process(EVERY_ITERATION, "train.max_iter=100000", *arguments)
    assert process.wait_until(lambda: "iter 2/" in process.output), process.output
    return process


@pytest.mark.slow
def test_signals_of_a_whole_job_reach_the_loading_workers_too(train_process):
    process = _train_long(train_process, "dataloader.train.num_workers=2")
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        workers = [int(pid) for pid in file.read().split()]
    assert len(workers) >= 2
    for pid in [*workers, process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert process.wait() == 0, process.output
    assert "SIGTERM: stopping after this iteration" in process.output
    assert "Stopped as asked" in process.output


def wait_for_ever_in_the_step():
    """Makes the third step of training hang, as a storage that is gone would."""
    from tests.engine.tiny_detector import TinyDetector

    losses, calls = TinyDetector._losses, []

    def hang(self, *arguments):
        calls.append(None)
        if len(calls) == 3:
            while True:
                signal.pause()
        return losses(self, *arguments)

    TinyDetector._losses = hang


def test_the_second_signal_stops_at_once(train_process):
    process = train_process(EVERY_ITERATION, prepare=wait_for_ever_in_the_step)
    assert process.wait_until(lambda: "iter 2/" in process.output)
    process.send(signal.SIGTERM)
    assert process.wait_until(lambda: "SIGTERM: stopping after" in process.output)
    process.send(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    assert "SIGTERM again: stopping at once" in process.output


def test_ctrl_c_is_one_sentence(train_process, tmp_path):
    process = _train_long(train_process)
    process.send(signal.SIGINT)
    assert process.wait() == 130, process.output
    assert "Interrupted: --resume continues" in process.output
    assert "Traceback" not in process.output
    assert (tmp_path / "out" / "last_checkpoint").exists()


def swallow_ctrl_c_in_the_step():
    """Makes the third step of training press Ctrl-C where Python can only forget it."""
    from tests.engine.tiny_detector import TinyDetector

    class Presses:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100):  # the handler runs between two of these
                pass

    losses, calls = TinyDetector._losses, []

    def press(self, *arguments):
        calls.append(None)
        if len(calls) == 3:
            Presses()
        return losses(self, *arguments)

    TinyDetector._losses = press


def turn_ctrl_c_into_another_error():
    """Makes the third step of training fail as a writer of files does that is interrupted."""
    from tests.engine.tiny_detector import TinyDetector

    losses, calls = TinyDetector._losses, []

    def press(self, *arguments):
        calls.append(None)
        if len(calls) == 3:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            finally:
                raise RuntimeError("unexpected position")
        return losses(self, *arguments)

    TinyDetector._losses = press


@pytest.mark.parametrize(
    ("press", "sign"),
    [
        (swallow_ctrl_c_in_the_step, "Exception ignored in"),
        (turn_ctrl_c_into_another_error, ""),
    ],
)
def test_ctrl_c_is_not_lost(train_process, press, sign):
    process = train_process(EVERY_ITERATION, "train.max_iter=100000", prepare=press)
    assert process.wait() == 130, process.output
    assert "Interrupted: --resume continues" in process.output
    assert sign in process.output and "unexpected position" not in process.output
    assert "iter 5/" not in process.output


def _damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["missing", "cut off", "empty", "one bit"])
def test_a_damaged_checkpoint_is_passed_over(tiny_cfg, tmp_path, whole, caplog, how):
    torch.manual_seed(0)
    run_training(tiny_cfg(EVERY_ITERATION, "train.max_iter=4", output="parts"), resume=False)
    folder = tmp_path / "parts"
    _damage(folder / "model_final.pth", how)
    _damage(folder / "model_0000003.pth", "cut off")
    caplog.clear()
    run_training(tiny_cfg(EVERY_ITERATION, output="parts"), resume=True)
    (warning,) = [
        record.getMessage() for record in caplog.records if "instead" in record.getMessage()
    ]
    for name in ("model_final.pth", "model_0000003.pth", "model_0000002.pth"):
        assert str(folder / name) in warning
    assert_equal_runs(whole, folder)


def test_no_readable_checkpoint_is_an_error(tiny_cfg, tmp_path):
    run_training(tiny_cfg("train.max_iter=3"), resume=False)
    for path in (tmp_path / "out").glob("model_*.pth"):
        path.write_bytes(b"")
    log = (tmp_path / "out" / "metrics.jsonl").read_text()
    for start in (run_training, run_evaluation_only):
        with pytest.raises(CheckpointError, match="no checkpoint in .* can be read") as caught:
            start(tiny_cfg(), resume=True)
        assert "model_final.pth is cut off" in caught.value.sentence
        assert "model_0000002.pth is cut off" in caught.value.sentence
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == log


@pytest.mark.parametrize("content", [None, ""])
def test_checkpoints_without_a_marker_are_not_overlooked(tiny_cfg, tmp_path, content, caplog):
    run_training(tiny_cfg(EVERY_ITERATION, "train.max_iter=3"), resume=False)
    (tmp_path / "out" / "last_checkpoint").unlink()
    if content is not None:
        (tmp_path / "out" / "last_checkpoint").write_text(content)
    run_training(tiny_cfg(), resume=True)
    assert "does not name a checkpoint" in caplog.text
    assert [iteration for iteration, _ in logged_losses(tmp_path / "out")] == list(range(6))


def test_weights_alone_cannot_be_resumed(tiny_cfg, tmp_path):
    run_training(tiny_cfg("train.max_iter=3"), resume=False)
    path = tmp_path / "out" / "model_final.pth"
    torch.save({"model": torch.load(path)["model"]}, path)
    with pytest.raises(CheckpointError, match="has no trainer"):
        run_training(tiny_cfg(), resume=True)


def test_old_checkpoints_of_another_run_go_before_new_ones(tiny_cfg, tmp_path):
    keep = [EVERY_ITERATION, "train.checkpointer.max_to_keep=2"]
    run_training(tiny_cfg(*keep, "train.max_iter=5"), resume=False)
    run_training(tiny_cfg(*keep, "train.max_iter=2"), resume=False)
    names = sorted(path.name for path in (tmp_path / "out").glob("model_0*"))
    assert names == ["model_0000000.pth", "model_0000001.pth"]


def test_half_written_files_are_removed_at_the_start(tiny_cfg, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"model_0000002.pth{INCOMPLETE}").write_bytes(b"half")
    run_training(tiny_cfg("train.max_iter=1"), resume=False)
    assert not list((tmp_path / "out").glob(f"*{INCOMPLETE}"))
    assert f"half written: model_0000002.pth{INCOMPLETE}" in caplog.text


def allow_small_files_only():
    """Writing beyond this size fails as on a full disk; checkpoints of 1000 channels need more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.slow
def test_no_room_for_a_checkpoint(train_process, tiny_cfg, tmp_path):
    first = train_process("train.max_iter=3", "model.channels=100")
    assert first.wait() == 0, first.output
    before = (tmp_path / "out" / "model_final.pth").read_bytes()
    assert len(before) > 200_000
    process = train_process("--resume", "model.channels=100", prepare=allow_small_files_only)
    assert process.wait() == 2
    errors = [line for line in process.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in process.output, process.output
    path = tmp_path / "out"
    assert f"{path / 'model_0000005.pth'} cannot be written (File too large)" in errors[0]
    assert f"the last one is still {path / 'model_final.pth'}" in errors[0]
    assert (path / "model_final.pth").read_bytes() == before
    assert (path / "last_checkpoint").read_text() == "model_final.pth"
    assert not list(path.glob(f"*{INCOMPLETE}"))
    again = train_process("--resume", "model.channels=100")
    assert again.wait() == 0, again.output
    assert [iteration for iteration, _ in logged_losses(path)] == list(range(6))


def test_a_full_disk_that_something_else_notices(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "out/log.txt")

    assert guarded(job_of(main)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out/log.txt cannot be written (No space left on device)")


def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("a bug: Connection closed by peer")  # there is no peer

    with pytest.raises(RuntimeError):
        guarded(job_of(main))


@pytest.mark.parametrize(
    ("override", "least"),
    [
        ("train.checkpointer.period=0", "1."),
        ("train.checkpointer.max_to_keep=0", "1, or null for all."),
        ("train.non_finite.max_skips=-1", "0."),
    ],
)
def test_settings_that_make_no_sense(tiny_cfg, override, least):
    with pytest.raises(ConfigError) as caught:
        run_training(tiny_cfg(override), resume=False)
    assert str(caught.value) == f"{override} must be a whole number of at least {least}"
