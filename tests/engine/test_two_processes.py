"""Two processes stop together, end when one of them dies, and share uneven work completely."""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from co_detr.engine.launch import _forwarded_signals
from co_detr.engine.train import run_evaluation_only, run_training
from tests.engine.masked import write_masks
from tests.engine.processes import fork_processes_of_num_gpus
from tests.engine.test_distributed import COMMON, read_run

pytestmark = pytest.mark.cpu_only("two processes: NCCL wants a card for each, see tests/gpu")


@pytest.mark.slow
def test_a_signal_at_one_of_them_stops_both(two, tmp_path):
    ranks = two("train.max_iter=100000", "train.checkpointer.period=100000")
    assert ranks[0].wait_until(lambda: "iter 2/" in ranks[0].output)
    ranks[1].send(signal.SIGTERM)
    assert [process.wait() for process in ranks] == [0, 0], [process.output for process in ranks]
    (path,) = (tmp_path / "out").glob("model_*.pth")
    iteration = torch.load(path)["iteration"]
    assert path.name == f"model_{iteration:07d}.pth"
    assert f"Stopped as asked; everything is in {path}" in ranks[0].output
    again = two("--resume", f"train.max_iter={iteration + 3}")
    assert [process.wait() for process in again] == [0, 0], [process.output for process in again]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    trained = [line["iteration"] for line in lines if "total_loss" in line]
    assert trained == list(range(iteration + 3))


def test_a_dying_process_ends_the_other(two):
    ranks = two("model._target_=tests.engine.tiny_detector.DyingDetector")
    assert [process.wait() for process in ranks] == [2, -signal.SIGKILL]
    (error,) = [line for line in ranks[0].output.splitlines() if "error: " in line]
    assert error.startswith("[rank 0] error: another process of this run is gone")
    assert "--resume" in error and "Traceback" not in ranks[0].output


@pytest.mark.skipif(torch.cuda.is_available(), reason="--num-gpus starts GPU processes here")
def test_a_dying_process_ends_the_run_of_num_gpus(train_process):
    dying = "model._target_=tests.engine.tiny_detector.DyingDetector"
    run = train_process("--num-gpus", "2", dying, prepare=fork_processes_of_num_gpus)
    result = run.finish()
    assert result.returncode == 2 and "Traceback" not in result.output, result.output
    assert "error: process 1 was ended by SIGKILL" in result.output


def wait_for_signal(ready):
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    ready.set()
    signal.pause()


def test_signals_reach_the_processes_of_num_gpus():
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=wait_for_signal, args=(ready,), daemon=True)
    with _forwarded_signals():
        child.start()
        assert ready.wait(10)
        os.kill(os.getpid(), signal.SIGUSR1)
        child.join(10)
    assert child.exitcode == -signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_no_room_at_the_writing_process_ends_both(two, tmp_path):
    (tmp_path / "out" / "model_0000002.pth.incomplete").mkdir(parents=True)
    ranks = two("train.max_iter=4", prepare=keep_what_is_incomplete)
    assert [process.wait() for process in ranks] == [2, 2], [process.output for process in ranks]
    said = "".join(process.output for process in ranks)
    (error,) = [line for line in said.splitlines() if "error: " in line]
    assert "model_0000002.pth cannot be written (Is a directory)" in error


def keep_what_is_incomplete():
    """So that a folder stays where a checkpoint would be written."""
    from co_detr.engine import train

    train.remove_incomplete = lambda folder: []


@pytest.mark.parametrize("number_of_images", [1, 3])
def test_an_uneven_val_set_is_evaluated_once(two, tiny_data, tiny_cfg, tmp_path, number_of_images):
    val = tiny_data.root / "val.json"
    content = json.loads(val.read_text())
    kept = content["images"][1 : 1 + number_of_images]  # the first image has no boxes
    content["images"] = kept
    ids = {image["id"] for image in kept}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    val.write_text(json.dumps(content))
    # Five times a batch of 4 from 10 images: a batch crosses the end of the set.
    run_training(tiny_cfg("train.max_iter=5", output="one"), resume=False)
    ranks = two("--eval-only", f"train.init_checkpoint={tmp_path / 'one' / 'model_final.pth'}")
    assert [process.wait() for process in ranks] == [0, 0], [process.output for process in ranks]
    run_evaluation_only(tiny_cfg(output="one"), resume=True)
    for name in ("coco_instances_results.json", "metrics.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "one" / name).read_text()
    found = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert sorted({detection["image_id"] for detection in found}) == sorted(ids)
    assert len(found) == 2 * number_of_images  # one of each class


def test_two_processes_evaluate_all_detectors_as_one_does(two, tiny_data, tiny_cfg, tmp_path):
    """Also the masks of one of them."""
    write_masks(tiny_data)
    several = "model._target_=tests.engine.masked.MaskedDetector"
    run_training(tiny_cfg(several, "train.max_iter=5", output="one"), resume=False)
    start = f"train.init_checkpoint={tmp_path / 'one' / 'model_final.pth'}"
    ranks = two("--eval-only", several, start)
    assert [process.wait() for process in ranks] == [0, 0], [process.output for process in ranks]
    run_evaluation_only(tiny_cfg(several, output="one"), resume=True)
    files = ("coco_instances_results.json", "per_class_segm_ap.csv", "roi/per_class_ap.csv")
    for name in ("metrics.json", *files, "roi/coco_instances_results.json"):
        one = tmp_path / "one" / "evaluation" / name
        assert (tmp_path / "out" / name).read_text() == one.read_text()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"AP", "segm/AP", "roi/AP"} <= metrics.keys() and "roi/segm/AP" not in metrics
    said = [process.output.count("The best detector of this model is") for process in ranks]
    assert said == [1, 0]


def test_a_process_without_ground_truth_learns_the_same(two, tiny_data, tiny_cfg, tmp_path):
    content = json.loads(tiny_data.train.read_text())
    content["annotations"] = content["annotations"][:1]
    tiny_data.train.write_text(json.dumps(content))
    seed_all_rng(0)
    run_training(tiny_cfg(*COMMON, output="one"), resume=False)
    ranks = two(*COMMON)
    assert [process.wait() for process in ranks] == [0, 0], [process.output for process in ranks]
    expected, expected_losses, _ = read_run(tmp_path / "one")
    actual, losses, _ = read_run(tmp_path / "out")
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-6)
