"""`co_detr.Predictor`: one call from an image to named detections."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import co_detr
from co_detr.checkpoint.detector import load_detector
from co_detr.checkpoint.official import restore_official
from co_detr.checkpoint.saving import Checkpointer
from co_detr.engine.hooks import AveragedWeights, EmaSettings
from co_detr.errors import CheckpointError, ConfigError, DataError
from co_detr.tools.export.predictor import ExportedPredictor
from co_detr.tools.predict.predictor import Predictor
from tests.device import NAME
from tests.modeling.builders import randomize, tiny_config, tiny_model
from tests.prediction.trained_run import CLASSES, SIZE


def same(first, second):
    return (
        first.image_size == second.image_size
        and len(first) == len(second) > 0
        and first.pred_boxes.tensor.equal(second.pred_boxes.tensor)
        and first.scores.equal(second.scores)
        and first.pred_classes.equal(second.pred_classes)
    )


def test_the_package_loads_predictors_lazily():
    code = (
        "import sys, co_detr; heavy = {'torch', 'detectron2', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; assert not hasattr(co_detr, 'Predicter');"
        "from co_detr import errors"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert co_detr.Predictor is Predictor
    assert co_detr.ExportedPredictor is ExportedPredictor


def test_all_kinds_of_images_give_the_same(predictor, photos):
    path = photos / "a.png"
    expected = predictor(path)
    assert expected.image_size == (60, 80)
    image = Image.open(path)
    for source in (str(path), image, np.asarray(image)):
        assert same(predictor(source), expected)
    found = predictor([path, str(path), image, np.asarray(image)])
    assert len(found) == 4 and all(same(detections, expected) for detections in found)
    assert same(predictor((path,))[0], expected) and predictor([]) == []


def test_batches_hold_images_of_one_size_and_keep_the_order(trained, predictor, photos):
    batched = Predictor(trained.config, trained.checkpoint, device=NAME, batch_size=2)
    sizes = []
    batched.model.register_forward_pre_hook(
        lambda _, inputs: sizes.append([tuple(entry["image"].shape) for entry in inputs[0]])
    )
    paths = [photos / f"{name}.png" for name in "abcb"]
    found = batched(paths)
    assert sorted(map(len, sizes)) == [2, 2] and all(len(set(side)) == 1 for side in sizes)
    for path, detections in zip(paths, found, strict=True):
        alone = predictor(path)
        assert detections.image_size == alone.image_size
        assert detections.pred_classes.equal(alone.pred_classes)
        torch.testing.assert_close(detections.scores, alone.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            detections.pred_boxes.tensor, alone.pred_boxes.tensor, rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_changes_detections_a_little(trained, predictor, photos, amp):
    found = Predictor(trained.config, trained.checkpoint, device="cpu", amp=amp)(photos / "a.png")
    expected = predictor(photos / "a.png")
    assert found.scores.dtype == torch.float32 and found.pred_boxes.tensor.dtype == torch.float32
    assert not found.scores.equal(expected.scores)
    assert abs(found.scores.max() - expected.scores.max()) < 0.1
    with pytest.raises(ConfigError, match="amp is 'half': choose"):
        Predictor(trained.config, trained.checkpoint, device="cpu", amp="half")


def test_few_samples_wait_for_others_of_their_size(trained):
    batched = Predictor(trained.config, trained.checkpoint, device=NAME, batch_size=2)
    read = []

    def samples():
        for width in range(60, 80):
            read.append(width)
            yield width, batched.prepare(np.zeros((60, width, 3), np.uint8))

    assert next(batched.stream(samples()))[0] == 60
    assert len(read) <= 8


def test_class_names_come_from_the_checkpoint(predictor, photos):
    found = predictor(photos / "a.png")
    assert predictor.class_names == CLASSES
    assert predictor.names(found) == [CLASSES[index] for index in found.pred_classes.tolist()]


def test_score_threshold(trained, predictor, photos):
    found = predictor(photos / "a.png")
    limit = found.scores.median().item()
    chosen = Predictor(trained.config, trained.checkpoint, device=NAME, score_threshold=limit)
    assert same(chosen(photos / "a.png"), found[found.scores >= limit])
    assert 0 < (found.scores < limit).sum()


@pytest.mark.parametrize("name", ["decoder", "roi", "atss", "merged", "cascade"])
def test_a_detector_by_name(trained, predictor, photos, name):
    chosen = Predictor(trained.config, trained.checkpoint, device=NAME, detector=name)
    assert chosen.model.evaluate_with == name or name == "decoder"
    assert (chosen.model.auxiliary is None) == (name == "decoder")
    sample = predictor.prepare(photos / "a.png")
    trained.model.eval().evaluate_with = name
    try:
        with torch.no_grad():
            full = trained.model([{"image": sample.image, "height": 60, "width": 80}])
    finally:
        trained.model.evaluate_with = None
    found = chosen(photos / "a.png")
    assert same(found, full[0]["instances"].to("cpu"))
    assert same(found, predictor(photos / "a.png")) == (name == "decoder")


@pytest.mark.parametrize("name", ["roi", "atss", "merged", "cascade"])
def test_detectors_in_mixed_precision(trained, photos, name):
    def detect(amp):
        arguments = {"device": "cpu", "detector": name, "amp": amp}
        return Predictor(trained.config, trained.checkpoint, **arguments)(photos / "a.png")

    found, expected = detect("bfloat16"), detect(None)
    assert found.scores.dtype == torch.float32 and found.pred_boxes.tensor.dtype == torch.float32
    assert not found.scores.equal(expected.scores)
    assert abs(found.scores.max() - expected.scores.max()) < 0.1


def test_the_config_may_name_the_detector(trained, photos):
    def detect(**arguments):
        predictor = Predictor(trained.config, trained.checkpoint, device=NAME, **arguments)
        return predictor(photos / "a.png")

    roi = ["model.evaluate_with=roi", "model.compare_detectors=true"]
    assert same(detect(overrides=roi), detect(detector="roi"))
    assert same(detect(overrides=roi, detector="decoder"), detect())


def test_what_is_compared_in_evaluations_is_not_here(trained, photos):
    loaded = load_detector(
        trained.config,
        trained.checkpoint,
        overrides=["model.compare_detectors=true", "model.compare_top_k=true"],
        training_parts=True,
    )
    assert loaded.model.auxiliary is not None and loaded.model.compared == []


def test_detectors_that_are_not_there(trained, tmp_path):
    with pytest.raises(ConfigError, match="evaluate_with=fcos names no .* decoder, "):
        Predictor(trained.config, trained.checkpoint, detector="fcos")
    stripped = tiny_model(2)
    stripped.strip_auxiliary()
    Checkpointer(stripped, str(tmp_path), class_names=CLASSES).save("stripped")
    path = str(tmp_path / "stripped.pth")
    Predictor(trained.config, path)
    with pytest.raises(CheckpointError, match="only the decoder, .* detector roi is needed"):
        Predictor(trained.config, path, detector="roi")
    with pytest.raises(ConfigError, match="it has its decoder alone"):
        Predictor(trained.config, path, detector="roi", overrides=["model.auxiliary=null"])


def test_training_parts_are_stripped(trained, predictor, photos):
    assert predictor.model.auxiliary is None and not predictor.model.training
    names = {name.split(".")[0] for name in predictor.model.state_dict()}
    assert names == {"backbone", "encoder", "decoder", "queries"}
    sample = predictor.prepare(photos / "a.png")
    with torch.no_grad():
        full = trained.model.eval()([{"image": sample.image, "height": 60, "width": 80}])
    assert same(predictor(photos / "a.png"), full[0]["instances"].to("cpu"))


@pytest.mark.parametrize("heads", [0, 1])
def test_other_auxiliary_heads_in_the_config_do_not_matter(trained, predictor, photos, heads):
    other = Predictor(tiny_config(heads, SIZE), trained.checkpoint, device=NAME)
    assert same(other(photos / "a.png"), predictor(photos / "a.png"))


def test_a_checkpoint_without_auxiliary_heads(trained, predictor, photos, tmp_path):
    content = torch.load(trained.checkpoint)
    content["model"] = {
        f"module.{key}": value
        for key, value in content["model"].items()
        if not key.startswith("auxiliary.")
    }
    torch.save(content, tmp_path / "plain.pth")
    other = Predictor(trained.config, tmp_path / "plain.pth", device=NAME)
    assert same(other(photos / "a.png"), predictor(photos / "a.png"))


def test_a_checkpoint_of_the_reference(trained, predictor, photos, tmp_path):
    official = restore_official(trained.model.state_dict(), trained.model).state_dict
    torch.save({"meta": {"CLASSES": tuple(CLASSES)}, "state_dict": official}, tmp_path / "o.pth")
    other = Predictor(trained.config, tmp_path / "o.pth", device=NAME)
    assert other.class_names == CLASSES
    assert same(other(photos / "a.png"), predictor(photos / "a.png"))


def test_the_checkpoint_decides_on_the_number_of_classes(trained, predictor, photos, caplog):
    cfg = tiny_config(2, [*SIZE, "model.num_classes=80"])
    other = Predictor(cfg, trained.checkpoint, device=NAME)
    assert "has 5 classes, the config 80: the model is built for 5." in caplog.text
    assert cfg.model.num_classes == 80  # the caller's config is not changed
    assert same(other(photos / "a.png"), predictor(photos / "a.png"))


@pytest.mark.parametrize(
    ("names", "message"),
    [(None, "does not say the names of its classes"), (["cat", "dog"], "names 2 classes")],
)
def test_a_checkpoint_without_fitting_class_names(trained, tmp_path, caplog, names, message):
    Checkpointer(trained.model, str(tmp_path), class_names=names).save("other")
    with caplog.at_level(logging.WARNING):
        detector = load_detector(trained.config, tmp_path / "other.pth")
    assert detector.class_names == [f"class {index}" for index in range(5)]
    assert message in caplog.text


def test_configs_by_name(tmp_path):
    with pytest.raises(ConfigError, match="did you mean co_detr_r50?"):
        Predictor("co_dert_r50", "a.pth")
    with pytest.raises(ConfigError, match="configs/nothing.py' does not exist"):
        Predictor("configs/nothing.py", "a.pth")
    with pytest.raises(CheckpointError, match="a.pth does not exist: name an existing file"):
        Predictor("quickstart", "a.pth")
    with pytest.raises(CheckpointError, match="no weights were released for quickstart"):
        Predictor("quickstart")


def test_weights_of_an_unknown_model_are_not_searched(trained):
    for config in (trained.config, trained.cfg):
        with pytest.raises(CheckpointError, match="no checkpoint is given"):
            Predictor(config)


def test_a_checkpoint_of_another_model(trained, tmp_path):
    Checkpointer(tiny_model(0, ["model.encoder.num_layers=1"]), str(tmp_path)).save("other")
    with pytest.raises(CheckpointError, match="choose the config that it was trained with"):
        Predictor(trained.config, tmp_path / "other.pth")
    torch.save({"class_names": CLASSES}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="empty.pth holds no state dict"):
        Predictor(trained.config, tmp_path / "empty.pth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"score_threshold": 1.5}, "must be from 0 to 1"),
        ({"batch_size": 0}, "must be at least 1"),
        ({"overrides": ["data.image_fromat=BGR"]}, "did you mean data.image_format?"),
    ],
)
def test_wrong_settings(trained, settings, message):
    with pytest.raises(ConfigError, match=message):
        Predictor(trained.config, trained.checkpoint, **settings)


def test_one_broken_image_of_a_list(predictor, photos):
    (photos / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="b.png cannot be decoded"):
        predictor([photos / "a.png", photos / "b.png"])


def test_averaged_weights_are_used_unless_told_otherwise(trained, tmp_path):
    """Also without the auxiliary heads, which the predictor leaves out."""
    averaged = AveragedWeights(trained.model, EmaSettings(enabled=True))
    randomize(averaged.module, seed=5)
    averaged.update_parameters(averaged.module)
    both = tmp_path / "both.pth"
    content = {"model": trained.model.state_dict(), "class_names": CLASSES}
    torch.save(content | {"ema": averaged.state_dict()}, both)
    image = np.full((60, 80, 3), 128, np.uint8)

    found = Predictor(trained.config, both, device=NAME)(image)
    torch.save(content | {"model": averaged.module.state_dict()}, tmp_path / "averaged.pth")
    expected = Predictor(trained.config, tmp_path / "averaged.pth", device=NAME)(image)
    assert same(found, expected)

    raw = ["train.init_checkpoint_weights=raw"]
    found = Predictor(trained.config, both, device=NAME, overrides=raw)(image)
    expected = Predictor(trained.config, trained.checkpoint, device=NAME)(image)
    assert same(found, expected)
