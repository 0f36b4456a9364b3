"""One command trains on a user's data: classes come from the json, defects are told at once."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from co_detr.data.coco import class_names
from co_detr.engine.config import load_config
from co_detr.engine.own_data import adopt_class_count, align_with_checkpoint, check_data
from co_detr.errors import DataError

CONFIG_FILE = str(Path(__file__).parent / "tiny_config.py")


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
    overrides = [each for each in given if each.partition("=")[0] not in drop] + extra
    cfg = load_config(CONFIG_FILE, overrides)
    adopt_class_count(cfg, overrides, eval_only)
    assert cfg.model.num_classes == count
    assert cfg.dataloader.train.dataset.num_classes == count


def test_one_command_trains_and_evaluates_other_val_sets(train_net, three_classes, tmp_path):
    arguments = [*three_classes.overrides(tmp_path / "out"), "train.max_iter=2"]
    result = train_net(*arguments)
    assert result.returncode == 0, result.stderr
    assert "model.num_classes = 3 (cell, plate, disc)" in result.stdout
    assert "images that are in train, too: 10" in result.stdout
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
    val = [each for each in three_classes.overrides(tmp_path / "other") if "data.val" in each]
    evaluate = [*val, "--eval-only", checkpoint, f"train.output_dir={tmp_path / 'other'}"]
    result = train_net(*evaluate)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "other" / "metrics.json").read_text()) == metrics

    # ... and a count that disagrees is still an error.
    result = train_net(*arguments, "model.num_classes=2")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "but the model has 2: set model.num_classes=3." in result.stderr


def test_a_defect_stops_all_processes_with_one_sentence(train_net, tiny_data, tmp_path):
    (tiny_data.images / "3.png").unlink()
    result = train_net(*tiny_data.overrides(tmp_path / "out"), processes=2)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if "error: data.train" in line]
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
