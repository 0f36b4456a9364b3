"""One command trains on a user's data: classes come from the json, defects are told at once."""

import json

import pytest
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf

from co_detr.data.coco import load_lvis, load_objects365
from co_detr.data.coco_classes import class_names
from co_detr.data.preflight_boxes import InputSize, Limit
from co_detr.engine.config import apply_overrides, load_config
from co_detr.engine.data_check import (
    adopt_class_count,
    align_with_checkpoint,
    check_data,
    limits_of,
)
from co_detr.engine.train import run_evaluation_only
from co_detr.errors import DataError
from tests.engine.processes import CONFIG_FILE
from tests.engine.tiny_detector import TinyDetector
from tests.paths import config_path


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _add_class(content):
    content["categories"].append({"id": 40, "name": "disc"})
    content["annotations"][0]["category_id"] = 40


@pytest.fixture
def three_classes(tiny_data):
    for name in ("train.json", "val.json"):
        _edit(tiny_data.root / name, _add_class)
    return tiny_data


@pytest.mark.parametrize(
    ("drop", "extra", "eval_only", "count"),
    [
        ((), [], False, 3),  # data.train decides
        ((), ["model.num_classes=2"], False, 2),  # what the user says stays, and is checked later
        (("data.train",), [], False, 2),  # the config's own data and class count
        (("data.train",), [], True, 3),  # data.val decides
        (("data.train", "data.val"), [], True, 2),
    ],
)
def test_class_count(three_classes, tmp_path, drop, extra, eval_only, count):
    given = three_classes.overrides(tmp_path / "out")
    overrides = [override for override in given if override.partition("=")[0] not in drop] + extra
    cfg = load_config(CONFIG_FILE, overrides)
    adopt_class_count(cfg, overrides, eval_only)
    assert cfg.model.num_classes == count
    assert cfg.dataloader.train.dataset.num_classes == count


@pytest.mark.slow
def test_one_command_trains_and_evaluates_other_val_sets(train_net, three_classes, tmp_path):
    arguments = [*three_classes.overrides(tmp_path / "out"), "train.max_iter=2"]
    result = train_net(*arguments)
    assert result.returncode == 0, result.output
    assert "model.num_classes = 3 (data.train has cell, plate, disc)" in result.output
    assert "images that are in train, too: 10" in result.output
    weights = torch.load(tmp_path / "out" / "model_final.pth", weights_only=False)
    assert weights["class_names"] == ["cell", "plate", "disc"]
    assert weights["model"]["classify.weight"].shape[0] == 3
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())

    # The same val set under other ids and in another order has the same AP ...
    ids = {3: 90, 7: 50, 40: 1}

    def shuffle(content):
        for entry in content["categories"]:
            entry["id"] = ids[entry["id"]]
        for annotation in content["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]

    _edit(three_classes.root / "val.json", shuffle)
    checkpoint = f"train.init_checkpoint={tmp_path / 'out' / 'model_final.pth'}"
    val = [
        override
        for override in three_classes.overrides(tmp_path / "other")
        if "data.val" in override
    ]
    evaluate = [*val, "--eval-only", checkpoint, f"train.output_dir={tmp_path / 'other'}"]
    result = train_net(*evaluate)
    assert result.returncode == 0, result.output
    assert json.loads((tmp_path / "other" / "metrics.json").read_text()) == metrics

    # ... and a count that disagrees is still an error.
    result = train_net(*arguments, "model.num_classes=2")
    assert result.returncode == 2 and "Traceback" not in result.output
    assert "but the model has 2: set model.num_classes=3." in result.output


def test_a_defect_stops_all_processes_with_one_sentence(two, tiny_data):
    (tiny_data.images / "3.png").unlink()
    ended = [process.finish() for process in two()]
    assert [process.returncode for process in ended] == [2, 2]
    lines = [line for process in ended for line in process.errors("[rank ")]
    errors = [line for line in lines if "error: data.train" in line]
    assert len(errors) == 1 and "image files that do not exist: 1 " in errors[0]


def test_eval_only_inspects_val_alone(tiny_cfg, tiny_data):
    _edit(tiny_data.train, lambda content: content["images"].clear())
    cfg = tiny_cfg()
    check_data(cfg, eval_only=True)
    with pytest.raises(DataError, match="empty list of images"):
        check_data(cfg)


def test_fewer_classes_than_a_checkpoint_without_names(tiny_cfg, tiny_data):
    cfg = tiny_cfg("model.num_classes=3")
    instantiate(cfg.dataloader.test)
    with pytest.raises(DataError, match="has 2 categories .* the model has 3"):
        align_with_checkpoint(cfg, None)
    align_with_checkpoint(cfg, ["plate", "disc", "cell"])
    assert class_names(cfg.data.val) == ["plate", "disc", "cell"]


@pytest.mark.parametrize(
    ("mismatch", "trained", "order", "warned"),
    [
        ("error", ["plate", "cell"], ["plate", "cell"], False),
        ("error", ["Cell", "Plate"], ["cell", "plate"], False),
        ("error", ["disc", "plate"], ["cell", "plate"], True),
        ("by_name", ["plate", "cell"], ["cell", "plate"], False),  # heads are in val's order
    ],
)
def test_classes_of_a_checkpoint(tiny_cfg, caplog, mismatch, trained, order, warned):
    cfg = tiny_cfg(f"train.init_checkpoint_mismatch={mismatch}")
    instantiate(cfg.dataloader.test)
    align_with_checkpoint(cfg, trained)
    assert class_names(cfg.data.val) == order
    assert ("matched by position" in caplog.text) == warned


NAMES = ["disc", "cell", "plate"]


@pytest.fixture
def trained(tmp_path):
    """A checkpoint for the classes of NAMES."""
    torch.manual_seed(0)
    path = tmp_path / "trained.pth"
    torch.save({"model": TinyDetector(3).state_dict(), "class_names": NAMES}, path)
    return path


def _evaluate(tiny_data, output, *overrides, resume=False, config=CONFIG_FILE):
    given = [override for override in tiny_data.overrides(output) if "data.train" not in override]
    given += overrides
    cfg = load_config(config, given)
    adopt_class_count(cfg, given, eval_only=True, resume=resume)
    check_data(cfg, eval_only=True)
    run_evaluation_only(cfg, resume=resume)
    # In the folder of a training, evaluations have a folder of their own.
    (results,) = output.rglob("coco_instances_results.json")
    return json.loads(results.read_text())


def test_a_val_set_that_lacks_a_class_of_the_checkpoint(trained, tiny_data, tmp_path):
    """Without data.train: the checkpoint says how many classes the model has."""
    out = tmp_path / "out"
    found = _evaluate(tiny_data, out, f"train.init_checkpoint={trained}")
    assert {detection["category_id"] for detection in found} == {3, 7}
    metrics = json.loads((out / "metrics.json").read_text())
    assert {"AP-cell", "AP-plate"} <= metrics.keys() and "AP-disc" not in metrics
    # The same weights as the last checkpoint of a run.
    run = tmp_path / "run"
    run.mkdir()
    (run / "model_final.pth").write_bytes(trained.read_bytes())
    (run / "last_checkpoint").write_text("model_final.pth")
    assert _evaluate(tiny_data, run, resume=True) == found


@pytest.mark.parametrize("mismatch", ["by_name", "reset"])
def test_a_checkpoint_that_is_fitted_to_the_data_does_not_decide(trained, tiny_data, mismatch):
    given = [*tiny_data.overrides("out")[2:], f"train.init_checkpoint={trained}"]
    given.append(f"train.init_checkpoint_mismatch={mismatch}")
    cfg = load_config(CONFIG_FILE, [*given])
    cfg.model.num_classes = 9
    adopt_class_count(cfg, given, eval_only=True)
    assert cfg.model.num_classes == 2
    adopt_class_count(cfg, [*given, "model.num_classes=9"], eval_only=True)
    assert cfg.model.num_classes == 2


def test_a_class_that_the_checkpoint_does_not_know(trained, tiny_data, tmp_path):
    checkpoint = f"train.init_checkpoint={trained}"
    path = tiny_data.root / "val.json"
    _edit(path, lambda content: content["categories"][0].update(name="dust"))
    with pytest.raises(DataError, match=r"categories \(dust\), which the checkpoint was not"):
        _evaluate(tiny_data, tmp_path / "out", checkpoint)
    for key in (50, 51):
        _edit(path, lambda content, key=key: content["categories"].append({"id": key, "name": "x"}))
    with pytest.raises(DataError, match="but the model has 3: remove those that it does not know"):
        _evaluate(tiny_data, tmp_path / "out", checkpoint)


def test_a_test_set_without_categories_is_numbered_as_the_checkpoint(trained, tiny_data, tmp_path):
    def strip(content):
        del content["annotations"], content["categories"]

    _edit(tiny_data.root / "val.json", strip)
    found = _evaluate(tiny_data, tmp_path / "out", f"train.init_checkpoint={trained}")
    assert {detection["category_id"] for detection in found} == {1, 2, 3}
    assert {detection["image_id"] for detection in found} == set(range(1, 11))
    # Nothing says what the classes are.
    content = torch.load(trained)
    torch.save({"model": content["model"]}, trained)
    given = (f"train.init_checkpoint={trained}", "model.num_classes=3")
    assert _evaluate(tiny_data, tmp_path / "other", *given) == found


def test_a_test_set_is_none_to_train_with(tiny_cfg, tiny_data):
    _edit(tiny_data.root / "val.json", lambda content: content.pop("annotations"))
    cfg = tiny_cfg()
    check_data(cfg, eval_only=True)
    with pytest.raises(DataError, match="data.val .* has no box to evaluate on"):
        check_data(cfg)


def test_each_file_is_parsed_once_for_preflight_and_training(tiny_cfg, tiny_data, monkeypatch):
    cfg = tiny_cfg()
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(1) or loads(text))
    check_data(cfg)
    instantiate(cfg.dataloader.train.dataset)
    instantiate(cfg.dataloader.test.dataset)
    assert len(parsed) == 2
    # A file that was written in between is read again.
    check_data(cfg)
    _edit(tiny_data.train, lambda content: content.update(annotations=[], images=IMAGES))
    assert len(instantiate(cfg.dataloader.train.dataset)) == 1


IMAGES = [{"id": 1, "file_name": "0.png", "width": 48, "height": 64}]


def test_queries_of_an_evaluation_take_another_training():
    cfg = load_config(config_path("co_detr_small"))
    assert limits_of(cfg, eval_only=True).queries.is_trained
    cfg.model.evaluate_with = "merged"  # of which the decoder is a part
    assert limits_of(cfg, eval_only=True).queries.is_trained
    cfg.model.evaluate_with = "atss"
    assert limits_of(cfg, eval_only=True).queries is None
    assert not limits_of(cfg).queries.is_trained


@pytest.mark.parametrize(
    ("config", "queries", "detections", "input_size"),
    [
        ("co_detr_small", ("model.queries.matching.num_queries", 150), 100, InputSize(192, 320, 8)),
        ("co_dino_r50", ("model.queries.matching.num_queries", 900), 300, InputSize(800, 1333, 4)),
        (
            "co_dino_swin_l_12ep",
            ("model.queries.matching.num_queries", 900),
            300,
            InputSize(800, 1333, 4),
        ),
        (
            "co_detr_r50",
            ("model.queries.matching.num_queries", 300),
            100,
            InputSize(800, 1333, 8),
        ),
        # Its maps are those of a pyramid of its own.
        ("co_dino_vit_l_o365_12ep", ("model.queries.matching.num_queries", 1500), 1000, None),
        (
            "group_detr_small",
            ("model.queries.matching.num_queries", 150),
            100,
            InputSize(192, 320, 8),
        ),
        ("atss_on_encoder_small", None, None, InputSize(192, 320, 8)),
    ],
)
def test_limits_of_a_config(config, queries, detections, input_size):
    cfg = load_config(config_path(config))
    limits = limits_of(cfg)
    assert limits.queries == (queries and Limit(*queries))
    key = "model.postprocessor.max_detections"
    assert limits.detections == (detections and Limit(key, detections))
    assert limits.evaluated == Limit("dataloader.evaluator.max_detections", 100)
    assert limits.input_size == input_size
    del cfg.dataloader.evaluator.max_detections  # a config.yaml of an earlier version
    assert limits_of(cfg).evaluated == limits.evaluated
    for limit in (limits.queries, limits.detections, limits.evaluated):
        if limit is not None:
            apply_overrides(cfg, [f"{limit.key}=700"])
            assert OmegaConf.select(cfg, limit.key) == 700


def test_crowded_images_are_told_before_training(tiny_cfg, tiny_data, caplog):
    caplog.set_level("INFO")

    def crowd(content):
        content["annotations"] = [
            {"id": i, "image_id": 1, "category_id": 3, "bbox": [i % 40, i // 40, 2, 3]}
            for i in range(101)
        ]

    _edit(tiny_data.root / "val.json", crowd)
    check_data(tiny_cfg())
    assert "than the evaluation looks at (100): 1 (the first: 0.png with 101)" in caplog.text
    assert "set dataloader.evaluator.max_detections=200" in caplog.text


@pytest.mark.parametrize(
    ("loader", "where"),
    [
        (load_lvis, {"coco_url": "http://images.cocodataset.org/images/{}"}),
        (load_objects365, {"file_name": "images/v1/images/{}"}),
    ],
)
def test_sets_that_find_their_images_in_their_own_way(tiny_cfg, tiny_data, loader, where, caplog):
    def rename(content):
        for image in content["images"]:
            name = image.pop("file_name")
            image |= {key: value.format(name) for key, value in where.items()}

    root = f"={tiny_data.images.parent}"
    cfg = tiny_cfg(f"data.train_images{root}", f"data.val_images{root}")
    for split, node in (("train", cfg.dataloader.train), ("val", cfg.dataloader.test)):
        _edit(tiny_data.root / f"{split}.json", rename)
        node.dataset._target_ = loader
    caplog.set_level("INFO")
    check_data(cfg)
    assert "Preflight of the data" in caplog.text and "do not exist" not in caplog.text
    (tiny_data.images / "3.png").unlink()
    with pytest.raises(DataError, match=r"image files that do not exist: 1 .*images/3\.png"):
        check_data(cfg)
    _edit(tiny_data.train, lambda content: content["images"][0].update(dict.fromkeys(where)))
    with pytest.raises(DataError, match=rf"image 1 of .*train.json has .*{next(iter(where))}"):
        check_data(cfg)


@pytest.mark.parametrize(
    ("model", "val_loss", "eval_only", "checked"),
    [
        ({"auxiliary": {"roi": {"mask_head": {}}}}, False, False, False),
        ({"auxiliary": {"roi": {"mask_head": {}}}}, True, True, False),
        ({"auxiliary": {"roi": {"mask_head": {}}}}, True, False, True),
        ({"auxiliary": {"roi": {"mask_head": {}}}, "evaluate_with": "roi"}, False, True, True),
        ({"auxiliary": {"roi": {}}, "evaluate_with": "roi"}, False, True, False),
        ({"mask_head": {}}, False, True, True),
    ],
)
def test_masks_of_val_are_looked_at_where_they_are_used(
    tiny_cfg, tiny_data, model, val_loss, eval_only, checked
):
    _edit(
        tiny_data.root / "val.json",
        lambda content: content["annotations"][0].update(segmentation="no mask"),
    )
    cfg = tiny_cfg(f"train.val_loss.enabled={val_loss}")
    cfg.model.update(model)
    cfg.dataloader.train.dataset.with_masks = True
    if checked:
        with pytest.raises(DataError, match="data.val .* has segmentations that are neither"):
            check_data(cfg, eval_only)
    else:
        check_data(cfg, eval_only)


def test_a_mask_head_without_masks_to_learn_of_is_told(tiny_cfg, caplog):
    cfg = tiny_cfg()
    cfg.model.mask_head = {}
    check_data(cfg)
    assert "dataloader.train.dataset.with_masks=true reads them" in caplog.text
