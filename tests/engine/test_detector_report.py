"""Evaluations of a model with several detectors: numbers, files, a table, the best one."""

import json

import pytest
from detectron2.config import instantiate

from co_detr.checkpoint.detector import load_detector
from co_detr.engine.config import load_config
from co_detr.engine.evaluation import best_detector, detector_table, log_best_detector
from co_detr.engine.train import run_evaluation_only, run_training
from co_detr.tools.predict.command_line import parse_arguments
from tests.modeling.builders import shrink
from tests.paths import config_path

COMPARING = "model._target_=tests.engine.tiny_detector.ComparingDetector"
METRICS = {
    **{"AP": 50.04, "AP50": 80.0, "AP-red/blue": 50.0, "top_k/AP": 90.0},
    **{"roi/AP": 57.0, "roi/AP50": 89.9, "cascade/AP": 57.91, "merged/AP50": 1.0},
}
KINDS = ["top_k", "roi", "merged", "cascade"]


def test_table():
    lines = detector_table(METRICS, KINDS, ["AP", "AP50"]).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["detector", "AP", "AP50", ""]
    assert rows[2:] == [
        ["decoder", "50.0", "80.0", ""],
        ["top_k", "90.0", "", ""],
        ["roi", "57.0", "89.9", ""],
        ["merged", "", "1.0", ""],
        ["cascade", "57.9", "", "best AP"],
    ]


def test_the_best_can_be_asked_for_and_is_defined():
    assert best_detector(METRICS, KINDS) == "cascade"
    assert best_detector(METRICS, ["top_k", "merged"]) == "decoder"
    assert best_detector(METRICS | {"roi/AP": 57.91}, KINDS) == "roi"  # the first of equals
    assert best_detector({}, KINDS) is None


def test_command_that_uses_the_best(caplog):
    caplog.set_level("INFO")
    log_best_detector(METRICS, KINDS, "a b/config.yaml", "a b/model.pth")
    sentence, command = caplog.text.splitlines()
    assert sentence.endswith("is cascade (AP 57.9; the decoder has 50.0). To use it:")
    assert command == (
        "  python predict.py --config-file 'a b/config.yaml' --checkpoint 'a b/model.pth' "
        "--detector cascade IMAGES --output drawn"
    )
    caplog.clear()
    log_best_detector(METRICS, ["top_k"], "config.yaml", "model.pth")  # nothing to choose from
    log_best_detector({}, KINDS, "config.yaml", "model.pth")  # another process than the main one
    log_best_detector(METRICS, KINDS, "config.yaml", "")
    assert not caplog.text
    log_best_detector(METRICS | {"AP": 60.0}, KINDS, "config.yaml", "model.pth")
    assert "is decoder (AP 60.0)" in caplog.text and "--detector" not in caplog.text


def test_a_training_reports_them_at_every_evaluation(tiny_cfg, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    cfg = tiny_cfg("train.eval_period=3", COMPARING)
    returned = run_training(cfg, resume=False)
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"AP", "AP50", "AP-cell", "roi/AP", "roi/AP50", "roi/AP-cell"} <= metrics.keys()
    assert returned == {name: value for name, value in metrics.items() if value is not None}
    history = json.loads((out / "evaluations.json").read_text())
    assert list(history) == ["3", "6"] and history["6"] == returned
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [line["iteration"] for line in lines if "bbox/roi/AP" in line] == [2, 6]
    for name in ("coco_instances_results.json", "per_class_ap.csv"):
        assert (out / name).is_file() and (out / "roi" / name).is_file()
    own, other = (
        json.loads((folder / "coco_instances_results.json").read_text())
        for folder in (out, out / "roi")
    )
    assert [detection["bbox"][0] + 1 for detection in own] == pytest.approx(
        [e["bbox"][0] for e in other]
    )
    tables = caplog.text.count("Detectors of this model, from one pass over the images:")
    assert tables == caplog.text.count("Evaluation results for boxes") == 2
    assert caplog.text.count("best detector of this model") == 1
    assert f"--checkpoint {out / 'model_final.pth'}" in caplog.text
    # The APIs print of the model's own detections alone.
    assert capsys.readouterr().out.count("(AP) @[ IoU=0.50:0.95 | area=   all") == 2


def test_the_best_checkpoint_is_that_of_the_decoder(tiny_cfg, tmp_path, caplog):
    caplog.set_level("INFO")
    run_training(tiny_cfg("train.eval_period=3", COMPARING), resume=False)
    with_it = [line for line in caplog.messages if line.startswith("Best AP so far")]
    caplog.clear()
    run_training(tiny_cfg("train.eval_period=3", output="plain"), resume=False)
    assert with_it == [line for line in caplog.messages if line.startswith("Best AP so far")]
    plain = tmp_path / "plain"
    assert not any("/" in name for name in json.loads((plain / "metrics.json").read_text()))
    assert not (plain / "roi").exists() and "etectors of this model" not in caplog.text
    for name in ("coco_instances_results.json", "per_class_ap.csv"):
        assert (plain / name).read_text() == (tmp_path / "out" / name).read_text()


def test_averaged_weights_and_a_resumed_run(tiny_cfg, tmp_path):
    overrides = [COMPARING, "train.ema.enabled=true", "train.eval_period=3"]
    run_training(tiny_cfg(*overrides), resume=False)
    run_training(tiny_cfg(*overrides, "train.max_iter=9"), resume=True)
    history = json.loads((tmp_path / "out" / "evaluations.json").read_text())
    assert list(history) == ["3", "6", "9"]
    assert all({"AP", "roi/AP"} <= metrics.keys() for metrics in history.values())


def test_evaluation_alone_names_what_it_has_evaluated(tiny_cfg, tmp_path, caplog):
    run_training(tiny_cfg(COMPARING), resume=False)
    caplog.set_level("INFO")
    run_evaluation_only(tiny_cfg(COMPARING), resume=True)
    folder = tmp_path / "out" / "evaluation"
    assert "The best detector of this model is" in caplog.text
    assert f"--config-file {folder / 'config.yaml'} --checkpoint " in caplog.text
    assert f"--checkpoint {tmp_path / 'out' / 'model_final.pth'} " in caplog.text
    assert (folder / "roi" / "coco_instances_results.json").is_file()


def test_a_test_set_gets_a_result_file_of_each(tiny_cfg, tiny_data, tmp_path, caplog):
    path = tiny_data.root / "val.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    assert run_evaluation_only(tiny_cfg(COMPARING), resume=False) == {}
    assert caplog.text.count("there is nothing to evaluate") == 1
    found = json.loads((tmp_path / "out" / "roi" / "coco_instances_results.json").read_text())
    assert len(found) == 20


def test_a_real_model_is_used_by_the_command_that_is_printed(tiny_data, tmp_path, caplog):
    """From the training of a small config to the detector that the log names."""
    cfg = shrink(load_config(config_path("co_detr_small"), tiny_data.overrides(tmp_path / "o")))
    cfg.model.num_classes, cfg.train.max_iter, cfg.train.effective_batch_size = 2, 1, 2
    cfg.dataloader.test.mapper.augmentations.short_edge = 64
    assert cfg.model.compare_detectors
    caplog.set_level("INFO")
    metrics = run_training(cfg, resume=False)
    kinds = instantiate(cfg.model).compared
    assert kinds == ["roi", "atss", "merged", "cascade"]
    assert {"AP", *(f"{kind}/AP" for kind in kinds)} <= metrics.keys()
    best = best_detector(metrics, kinds)
    command = caplog.text[caplog.text.index("python predict.py") :].splitlines()[0].split()
    options = parse_arguments(command[2:])
    assert (options.detector or "decoder") == best
    loaded = load_detector(options.config_file, options.checkpoint, detector="cascade")
    assert loaded.model.evaluate_with == "cascade" and loaded.model.compared == []
