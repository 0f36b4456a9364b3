"""Fine-tuning on other classes: rows of class heads by name, and a report of what was done."""

import logging

import pytest
import torch
from detectron2.config import instantiate

from co_detr.checkpoint.classes import match_classes, remap_classes
from co_detr.checkpoint.official import restore_official
from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.config import load_config
from co_detr.errors import CheckpointError, ConfigError
from co_detr.modeling.queries import DenoisingQueries
from tests.device import DEVICE
from tests.modeling.builders import shrink, tiny_model
from tests.paths import config_path

THEIRS = ["person", "Dog", "cat", "car"]
OURS = ["CAT", "zebra", "person"]
ROI = "auxiliary.heads.roi.roi_heads.box_predictor"


def model_of(classes, seed=0):
    return tiny_model(2, [f"model.num_classes={len(classes)}"], seed)


@pytest.fixture
def source():
    return model_of(THEIRS, seed=1)


def saved(model, path, **extra):
    torch.save({"model": model.state_dict(), **extra}, path)
    return str(path)


def load(path, mismatch="by_name", classes=OURS, seed=2):
    model = model_of(OURS, seed)
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    Checkpointer(model, mismatch=mismatch, class_names=classes).load(path)
    return model.state_dict(), initial


def assert_by_name(loaded, initial, source):
    for key, width, background in [
        ("decoder.class_heads.0.weight", 1, False),
        ("decoder.class_heads.1.bias", 1, False),
        ("auxiliary.heads.atss.class_logits.weight", 1, False),
        (f"{ROI}.cls_score.weight", 1, True),
        (f"{ROI}.bbox_pred.weight", 4, False),
    ]:
        old, new, fresh = (state[key] for state in (source.state_dict(), loaded, initial))
        rows = [value.split(width) for value in (old, new, fresh)]
        assert torch.equal(rows[1][0], rows[0][2])  # cat
        assert torch.equal(rows[1][1], rows[2][1])  # zebra
        assert torch.equal(rows[1][2], rows[0][0])  # person
        if background:
            assert torch.equal(new[-1], old[-1])
    # Row 0 of the encoder's head means "object", whatever class 0 is.
    head = "queries.matching.class_head.weight"
    assert torch.equal(loaded[head], source.state_dict()[head][:3])
    rest = "encoder.layers.0.ffn.linear1.weight"
    assert torch.equal(loaded[rest], source.state_dict()[rest])


def test_rows_follow_their_names(source, tmp_path):
    path = saved(source, tmp_path / "m.pth", class_names=THEIRS)
    assert_by_name(*load(path), source)


def test_an_official_file_with_other_classes(source, tmp_path):
    official = restore_official(source.state_dict(), source).state_dict
    path = str(tmp_path / "m.pth")
    torch.save({"meta": {"CLASSES": tuple(THEIRS)}, "state_dict": official}, path)
    assert_by_name(*load(path), source)


def test_rows_come_again_for_every_anchor(tmp_path):
    """RetinaNet has nine anchors per cell, FCOS one."""
    models = [tiny_model(6, [f"model.num_classes={n}"], seed=n) for n in (4, 3)]
    source, fresh = (model.state_dict() for model in models)
    path = saved(models[0], tmp_path / "m.pth", class_names=THEIRS)
    fresh = {key: value.clone() for key, value in fresh.items()}
    Checkpointer(models[1], mismatch="by_name", class_names=OURS).load(path)
    loaded = models[1].state_dict()
    for name, anchors in (("retinanet", 9), ("fcos", 1), ("gfl", None)):
        head = f"auxiliary.heads.{name}"
        key = f"{head}.network.cls_score.weight" if anchors else f"{head}.class_logits.weight"
        old, new, own = (state[key].chunk(anchors or 1) for state in (source, loaded, fresh))
        for theirs, ours, initial in zip(old, new, own, strict=True):
            assert torch.equal(ours[[0, 2]], theirs[[2, 0]])  # cat, person
            assert torch.equal(ours[1], initial[1])  # zebra


def test_rows_of_a_class_with_another_name(source, tmp_path, caplog):
    path = saved(source, tmp_path / "m.pth", class_names=THEIRS)
    model = model_of(OURS)
    caplog.set_level(logging.INFO, "co_detr")
    sources = {"Zebra": "dog", "CAT": "dog"}
    checkpointer = Checkpointer(model, mismatch="by_name", class_names=OURS, class_sources=sources)
    checkpointer.load(path)
    for key, rows in (("decoder.class_heads.0.weight", 1), (f"{ROI}.bbox_pred.weight", 4)):
        loaded = model.state_dict()[key].split(rows)
        theirs = source.state_dict()[key].split(rows)
        assert torch.equal(loaded[0], theirs[1]) and torch.equal(loaded[1], theirs[1])
        assert torch.equal(loaded[2], theirs[0])  # person
    assert "3 of 3 classes taken over by name" in caplog.text
    assert "2 of them are of another name: zebra from Dog, CAT from Dog" in caplog.text
    assert "2 of 4 classes of the file are not used: cat, car" in caplog.text
    assert not any(checkpointer.report.classes.tensors.values())


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"lion": "cat"}, "names lion, which is no class of the data: choose from CAT, zebra, per"),
        ({"zebra": "lion"}, "names lion, which is no class of the checkpoint: choose from person"),
    ],
)
def test_wrong_class_sources(sources, message):
    with pytest.raises(CheckpointError, match=message):
        match_classes(THEIRS, OURS, sources)
    with pytest.raises(ConfigError, match="mismatch=by_name does"):
        Checkpointer(torch.nn.Linear(1, 1), class_sources=sources)


def test_rows_without_counterpart_are_known(tmp_path):
    """What a higher learning rate for new classes goes by: zebra is row 1 of 3."""
    models = [tiny_model(6, [f"model.num_classes={n}"], seed=n) for n in (4, 3)]
    path = saved(models[0], tmp_path / "m.pth", class_names=THEIRS)
    checkpointer = Checkpointer(models[1], mismatch="by_name", class_names=OURS)
    checkpointer.load(path)
    rows = checkpointer.report.classes.tensors
    assert rows["decoder.class_heads.0.weight"] == [1]
    assert rows[f"{ROI}.cls_score.weight"] == [1]  # not the background, row 3
    assert rows[f"{ROI}.bbox_pred.weight"] == [4, 5, 6, 7]
    anchors = rows["auxiliary.heads.retinanet.network.cls_score.bias"]
    assert anchors == [1 + 3 * anchor for anchor in range(9)]
    assert rows["queries.matching.class_head.weight"] == []  # row 0 is "object", whatever is new


def test_a_released_file_in_a_model_with_more_heads(source, tmp_path):
    official = restore_official(source.state_dict(), source).state_dict
    torch.save({"state_dict": official}, tmp_path / "m.pth")
    model = tiny_model(6, [f"model.num_classes={len(THEIRS)}"])
    Checkpointer(model, mismatch="reset").load(str(tmp_path / "m.pth"))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())


def queries_with_labels(classes):
    queries = torch.nn.Module()
    queries.label_embedding = torch.nn.Embedding(classes, 2)
    queries.class_layers = DenoisingQueries.class_layers
    return torch.nn.ModuleDict({"queries": torch.nn.ModuleDict({"denoising": queries})})


def test_the_label_embedding_follows_the_names():
    key = "queries.denoising.label_embedding.weight"
    model, state = queries_with_labels(3), queries_with_labels(4).state_dict()
    old, classes = state[key], match_classes(THEIRS, OURS)
    remap_classes(state, model, classes)
    assert torch.equal(state[key][[0, 2]], old[[2, 0]])
    assert torch.equal(state[key][1], model.state_dict()[key][1])
    assert classes.tensors == {key: [1]}


def test_as_many_classes_in_another_order(source, tmp_path):
    path = saved(source, tmp_path / "m.pth", class_names=THEIRS)
    model = model_of(THEIRS)
    Checkpointer(model, mismatch="by_name", class_names=THEIRS[::-1]).load(path)
    bias = "decoder.class_heads.0.weight"
    assert torch.equal(model.state_dict()[bias], source.state_dict()[bias].flip(0))


def test_the_report_has_true_numbers(source, tmp_path, caplog):
    path = saved(source, tmp_path / "m.pth", class_names=THEIRS)
    caplog.set_level(logging.INFO, "co_detr")
    load(path)
    total = len(source.state_dict())
    assert f"m.pth: {total} of {total} tensors of the model loaded." in caplog.text
    # 2 decoder layers, encoder, ATSS, class and box branch of the ROI head; weight and bias each
    assert "2 of 3 classes taken over by name, in 12 tensors: CAT, person" in caplog.text
    assert "1 start from initial values: zebra" in caplog.text
    assert "2 of 4 classes of the file are not used: Dog, car" in caplog.text
    caplog.clear()
    load(path, mismatch="reset")
    assert f"m.pth: {total - 12} of {total} tensors of the model loaded." in caplog.text
    assert "12 keep their initial values:" in caplog.text and "and 6 more" in caplog.text
    assert len(caplog.records[-1].getMessage().splitlines()) <= 20


def test_reset_keeps_initial_values(source, tmp_path):
    loaded, initial = load(saved(source, tmp_path / "m.pth"), mismatch="reset")
    head, rest = "decoder.class_heads.0.weight", "encoder.layers.0.ffn.linear1.weight"
    assert torch.equal(loaded[head], initial[head])
    assert torch.equal(loaded[rest], source.state_dict()[rest])


def test_other_differences_are_still_errors(source, tmp_path):
    state = source.state_dict()
    state["encoder.level_embed"] = torch.zeros(9, 9)
    torch.save({"model": state, "class_names": THEIRS}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=r"encoder.level_embed is \(9, 9\) in the file"):
        load(str(tmp_path / "m.pth"))


def test_names_are_needed_on_both_sides(source, tmp_path):
    with pytest.raises(CheckpointError, match="the checkpoint does not say the names"):
        load(saved(source, tmp_path / "m.pth"))
    with pytest.raises(CheckpointError, match="the data set does not say the names"):
        load(saved(source, tmp_path / "m.pth", class_names=THEIRS), classes=None)
    with pytest.raises(CheckpointError, match='the data set has the class "cat" twice'):
        match_classes(THEIRS, ["cat", "dog", "CAT"])
    with pytest.raises(ConfigError, match='must be "error", "by_name" or "reset"'):
        Checkpointer(source, mismatch="strict")


def test_other_names_of_as_many_classes_are_not_passed_over(source, tmp_path, caplog):
    path = saved(source, tmp_path / "m.pth", class_names=["a", "b", "c", "d"])
    Checkpointer(model_of(THEIRS), class_names=THEIRS).load(path)
    assert "was trained on 4 classes (a, b, c, d), the data has 4 (person, Dog" in caplog.text


def test_names_are_saved_with_every_checkpoint(source, tmp_path):
    Checkpointer(source, str(tmp_path), class_names=THEIRS).save("m", iteration=3)
    assert torch.load(tmp_path / "m.pth")["class_names"] == THEIRS
    assert Checkpointer(source).load(str(tmp_path / "m.pth"))["iteration"] == 3


def test_masks_follow_the_names(tmp_path):
    models = []
    for classes in (THEIRS, OURS):
        overrides = [f"model.num_classes={len(classes)}"]
        cfg = shrink(load_config(config_path("co_detr_r50_mask_rcnn"), overrides))
        models.append(instantiate(cfg.model).to(DEVICE))
    source, model = models
    path = saved(source, tmp_path / "m.pth", class_names=THEIRS)
    Checkpointer(model, mismatch="by_name", class_names=OURS).load(path)
    key = "auxiliary.heads.roi.roi_heads.mask_head.predictor.weight"
    old, new = (model.state_dict()[key] for model in models)
    assert torch.equal(new[[0, 2]], old[[2, 0]])
