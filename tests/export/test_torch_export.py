"""Files of torch.export, and what all files share."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from co_detr.errors import ConfigError, ExportError
from co_detr.layers.deformable_attention import HAS_EXTENSION
from co_detr.tools.export.predictor import ExportedPredictor, check_image
from tests.export.agreement import assert_same
from tests.prediction.trained_run import CLASSES

FIXED = (96, 128)


@pytest.fixture(scope="module")
def fixed_file(trained, tmp_path_factory):
    """The boxes of a model with masks."""
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    return trained.export(path, "torch_export", FIXED, False, False)


def test_a_fixed_size_takes_any_image(fixed_file, trained, photos):
    exported, predictor = ExportedPredictor(fixed_file), trained.predictor()
    assert exported.description.image_size == FIXED
    assert exported.class_names == CLASSES
    for photo in photos:
        check = check_image(exported, predictor.model, "RGB", photo)
        assert check.input_size == FIXED
        assert check.difference.is_small and check.difference.compared > 50, check.difference
        assert not exported.description.masks and not exported(photo).has("pred_masks")
        height, width = exported(photo).image_size
        assert (width, height) == Image.open(photo).size


def test_images_shrink_into_a_fixed_size(fixed_file):
    resized = ExportedPredictor(fixed_file).description.resized
    assert resized(60, 80) == (96, 128)  # as in the evaluation
    assert resized(80, 60) == (96, 72)  # would be 128 x 96
    assert resized(64, 240) == (34, 128)  # would be 43 x 160


def test_plain_torch_runs_the_file(fixed_file):
    code = (
        "import sys, torch; run = torch.export.load(sys.argv[1]).module();"
        "image = torch.zeros(1, 3, 96, 128, dtype=torch.uint8);"
        "boxes, scores, labels = run(image, torch.tensor([[96, 100]]));"
        "assert boxes.shape == (1, 100, 4) and boxes[..., 2].max() <= 100;"
        "assert not {'co_detr', 'detectron2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(fixed_file)], check=True, timeout=300)


@pytest.mark.skipif(not HAS_EXTENSION, reason="needs the compiled kernels")
def test_the_custom_operator_gives_the_bits_of_the_model(trained, photos, tmp_path):
    file = trained.export(tmp_path / "custom.pt2", "torch_export", FIXED, True)
    exported, predictor = ExportedPredictor(file), trained.predictor()
    assert exported.description.custom_operator
    check = check_image(exported, predictor.model, "RGB", photos[0])
    assert check.difference.score == check.difference.box == 0 == check.difference.at_cut


def test_squares_with_a_visible_padding_and_soft_nms(train, photos, tmp_path):
    trained = train(
        "co_dino_r50_lsj_12ep",
        "data.image_format=BGR",
        "model.postprocessor.iou_threshold=0.05",
        "dataloader.test.mapper.augmentations.max_size=128",
    )
    file = trained.export(tmp_path / "square.pt2", "torch_export")
    exported, predictor = ExportedPredictor(file), trained.predictor()
    assert exported.description.image_size == (128, 128)
    assert exported.description.soft_nms.iou_threshold == 0.05
    for photo in photos:
        assert_same(exported(photo), predictor(photo), at_least=10)
    raw = exported.run(exported.prepare(photos[0]))
    assert exported(photos[0]).scores.sum() < raw.scores.sum() - 1e-3


@pytest.mark.slow
def test_soft_nms_behind_the_file_keeps_the_masks_of_what_it_leaves(train, photos, tmp_path):
    settings = ["model.postprocessor.iou_threshold=0.05", "model.postprocessor.max_detections=12"]
    trained = train("co_dino_r50_instance", *settings)
    file = trained.export(tmp_path / "masks.pt2", "torch_export", FIXED)
    exported, predictor = ExportedPredictor(file), trained.predictor()
    raw, found = exported.run(exported.prepare(photos[0])), exported(photos[0])
    assert raw.masks.shape[1] == predictor.model.inference_source.num_queries > len(found) == 12
    assert not torch.equal(found.scores, raw.scores[0, :12])  # not just the best pairs
    assert_same(found, predictor(photos[0]), at_least=10)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a.pt2", ("onnx",), "must end in .onnx for onnx"),
        ("no/a.pt2", ("torch_export",), "the folder of .*a.pt2 does not exist"),
        ("a.pt2", ("torch_export", (0, 64)), "0x64 must be positive"),
    ],
)
def test_wrong_settings(trained, tmp_path, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        trained.export(tmp_path / name, *settings)


def test_models_that_have_one_size(train, tmp_path):
    with pytest.raises(ConfigError, match="on squares of 128 pixels"):
        train("co_dino_r50_lsj_12ep").export(tmp_path / "a.pt2", "torch_export", (64, 64))
    with pytest.raises(ConfigError, match="Swin and ViT .* give it with --image-size"):
        train("co_deformable_detr_swin_t_12ep").export(tmp_path / "a.pt2", "torch_export")


def test_files_that_are_no_exports(tmp_path):
    (tmp_path / "a.pt2").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_bytes(b"nothing")
    for name, message in [
        ("b.onnx", "b.onnx does not exist"),
        ("a.pt2", "a.pt2 cannot be loaded"),
        ("a.txt", "name one that ends in .onnx or .pt2"),
    ]:
        with pytest.raises(ExportError, match=message):
            ExportedPredictor(tmp_path / name)


def test_missing_packages_are_named(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="pip install onnx onnxruntime onnxscript"):
        trained.export(tmp_path / "a.onnx", "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "b.onnx").touch()
    with pytest.raises(ConfigError, match="pip install onnx onnxruntime onnxscript"):
        ExportedPredictor(tmp_path / "b.onnx")


def test_a_model_that_measures_in_fractions_of_a_cell(train, tmp_path, photos):
    trained = train("co_detr_small")
    file = trained.export(tmp_path / "small.pt2", "torch_export")
    exported, predictor = ExportedPredictor(file), trained.predictor()
    assert predictor.model.encoder.strides is not None
    for photo in photos:
        assert_same(exported(photo), predictor(photo), at_least=20)
