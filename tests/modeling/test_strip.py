"""The auxiliary part belongs to training: evaluation neither runs it nor needs it."""

import copy

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate

from co_detr.checkpoint.detector import load_detector
from co_detr.checkpoint.saving import Checkpointer
from co_detr.errors import CheckpointError
from co_detr.modeling.queries import QuerySources, TwoStageQueries
from tests.device import DEVICE
from tests.modeling.builders import (
    NUM_CLASSES,
    assert_complete,
    detect,
    head_detections,
    is_inside,
    make_batch,
    randomize,
    tiny_config,
    tiny_model,
    train_step,
)


def with_training_queries(model):
    """Puts a second, training-only source in front of the one of inference."""
    extra = TwoStageQueries(
        num_queries=7,
        num_classes=NUM_CLASSES,
        embed_dim=32,
        training_only=True,
    )
    model.queries = QuerySources(one_to_many=extra, **model.queries).to(DEVICE)
    return model


def assert_same_detections(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_classes, other.pred_classes)
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)


@pytest.mark.parametrize("heads", [1, 2])
def test_stripping_leaves_detections_and_the_plain_state_dict(heads):
    model = with_training_queries(tiny_model(heads))
    randomize(model)
    batch = make_batch()
    before = detect(model, batch)
    model.strip_auxiliary()
    assert_same_detections(detect(model, batch), before)

    plain = tiny_model(0, seed=1)
    expected, stripped = plain.state_dict(), model.state_dict()
    assert list(stripped) == list(expected)
    assert all(stripped[name].shape == value.shape for name, value in expected.items())
    plain.load_state_dict(stripped)
    assert_same_detections(detect(plain, batch), before)


def test_a_stripped_model_trains_as_the_plain_detr():
    model = tiny_model(2)
    model.strip_auxiliary()
    plain = tiny_model(0, seed=1)
    plain.load_state_dict(model.state_dict())
    batch = make_batch()
    losses, expected = train_step(model, batch), train_step(plain, batch)
    assert {name: value.item() for name, value in losses.items()} == {
        name: value.item() for name, value in expected.items()
    }
    assert_complete(model, losses)


def test_evaluation_runs_no_auxiliary_module(monkeypatch):
    model = with_training_queries(tiny_model(2))
    batch = make_batch()
    expected = detect(model, batch)

    def refuse(module, *_):
        raise AssertionError(f"{type(module).__name__} ran in evaluation")

    training_only = [
        *model.auxiliary.modules(),
        *model.queries["one_to_many"].modules(),
        model.assigner,
    ]
    hooks = [module.register_forward_pre_hook(refuse) for module in training_only]
    for module in model.auxiliary.modules():
        if hasattr(module, "inference"):
            monkeypatch.setattr(module, "inference", refuse)
    assert_same_detections(detect(model, batch), expected)
    # The hooks do fire where the modules run.
    with pytest.raises(AssertionError, match="ran in evaluation"):
        train_step(model, batch)
    for hook in hooks:
        hook.remove()


def test_training_only_queries_are_trained():
    model = with_training_queries(tiny_model(0))
    losses = train_step(model, make_batch())
    assert {"one_to_many.loss_cls", "one_to_many.enc.loss_giou", "matching.loss_cls"} <= set(losses)
    assert_complete(model, losses)


@pytest.mark.parametrize("name", ["roi", "atss"])
def test_an_auxiliary_head_can_detect_alone(name):
    """For the analysis of a head by itself."""
    model = tiny_model(2).eval()
    images = model.preprocess(make_batch())
    with torch.no_grad():
        detections = head_detections(model, name, images)
    assert [found.image_size for found in detections] == [(96, 128), (80, 112)]
    for found in detections:
        assert 0 < len(found) <= 100
        assert (found.pred_classes < NUM_CLASSES).all()
        assert is_inside(found)
        assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("stripped", [False, True])
def test_the_inference_source_may_stand_anywhere(stripped, tmp_path):
    """The training-only source before it has tensors of the same names and shapes."""
    cfg = tiny_config(1)
    extra = copy.deepcopy(cfg.model.queries.matching)
    extra.training_only = True
    cfg.model.queries = L(QuerySources)(group1=extra, matching=cfg.model.queries.matching)
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE)
    randomize(model)
    expected = detect(model, make_batch())
    if stripped:
        model.strip_auxiliary()
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict(), "class_names": list("abcde")}, path)
    detector = load_detector(cfg, path)
    assert len(detector.model.queries) == 1
    assert_same_detections(detect(detector.model.to(DEVICE), make_batch()), expected)
    if not stripped:
        whole = load_detector(cfg, path, training_parts=True)
        assert_same_detections(detect(whole.model.to(DEVICE), make_batch()), expected)


def test_weights_of_another_source_do_not_pass_for_those_of_inference(tmp_path):
    cfg = tiny_config(0)
    state = instantiate(cfg.model).state_dict()
    state = {
        key.replace("queries.matching.", "queries.other."): value for key, value in state.items()
    }
    torch.save({"model": state, "class_names": list("abcde")}, tmp_path / "model.pth")
    with pytest.raises(
        CheckpointError, match=r"queries\.matching\.memory_proj\.weight is not in the file"
    ):
        load_detector(cfg, tmp_path / "model.pth")


def test_a_stripped_file_is_told_from_a_wrong_one(tmp_path):
    model = tiny_model(2)
    model.strip_auxiliary()
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    Checkpointer(tiny_model(0)).load(str(path))
    with pytest.raises(CheckpointError, match=r"no auxiliary heads .* set model.auxiliary=null"):
        Checkpointer(tiny_model(2)).load(str(path))
    whole = {**tiny_model(2).state_dict()}
    whole.pop("auxiliary.heads.atss.scales.0")
    torch.save({"model": whole}, path)
    with pytest.raises(CheckpointError, match="not in the file.*: build the model with"):
        Checkpointer(tiny_model(2)).load(str(path))
