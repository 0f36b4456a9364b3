"""ONNX files in onnxruntime give what the model gives."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from co_detr.tools.export.predictor import ExportedPredictor
from tests.export.agreement import assert_same
from tests.modeling.builders import decoder_detections
from tests.prediction.trained_run import CLASSES

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

ROOT = Path(__file__).resolve().parents[2]


def test_any_image_size(onnx_file, trained, photos):
    exported, predictor = ExportedPredictor(onnx_file), trained.predictor()
    assert exported.description.masks == ("masks", "mask_ious")
    for photo in photos:
        detections, expected = exported(photo), predictor(photo)
        assert_same(detections, expected)
        assert detections.pred_masks.image_size == detections.image_size
        assert len(detections.pred_masks.rles()) == len(detections)
        areas = [float(found.pred_masks.tensor.float().mean()) for found in (detections, expected)]
        assert areas[0] == pytest.approx(areas[1], rel=1e-3)
    found = exported(photos)
    assert [sample.image_size for sample in found] == [(60, 80), (71, 50), (97, 97), (100, 200)]
    names = exported.names(found[0])
    assert names == [CLASSES[label] for label in found[0].pred_classes.tolist()]


def test_a_threshold_and_arrays(onnx_file, photos):
    pixels = np.asarray(Image.open(photos[0]))
    everything = ExportedPredictor(onnx_file)(pixels)
    limit = everything.scores.median().item()
    found = ExportedPredictor(onnx_file, score_threshold=limit)(pixels)
    assert len(found) == int((everything.scores >= limit).sum()) < len(everything)


def test_batches_of_padded_images(onnx_file, trained):
    """Images of two sizes in one batch, whose padding holds rubbish."""
    model = trained.predictor().model
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 100, 120), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[100, 90], [80, 120], [100, 120]])
    found = ExportedPredictor(onnx_file).model(images, sizes)
    samples = [
        {"image": image[:, :height, :width]}
        for image, (height, width) in zip(images, sizes.tolist(), strict=True)
    ]
    expected = decoder_detections(model, model.preprocess(samples))
    for index, sample in enumerate(expected):
        assert_same(found.instances(index, sample.image_size), sample)


def test_the_file_describes_itself(onnx_file):
    description = ExportedPredictor(onnx_file).description
    assert description.class_names == CLASSES
    assert description.config == "tiny.py"
    assert (description.short_edge, description.max_size) == (96, 160)
    assert description.image_size is None and description.soft_nms is None
    stored = {prop.key: prop.value for prop in onnx.load(onnx_file).metadata_props}
    assert json.loads(stored["class_names"]) == CLASSES
    assert stored["format_version"] == "1"


def test_only_what_inference_needs_is_inside(onnx_file, trained):
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    assert any("decoder" in name for name in weights)
    assert not [name for name in weights if "auxiliary" in name]
    assert {node.domain for node in model.graph.node} == {""}
    needed = sum(tensor.nbytes for tensor in trained.predictor().model.state_dict().values())
    stored = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert 0.95 * needed < stored < 1.05 * needed
    assert str(ROOT).encode() not in onnx_file.read_bytes()


def test_the_example_of_the_guide_needs_no_torch(onnx_file, photos, tmp_path):
    guide = (ROOT / "docs" / "export.md").read_text()
    (code,) = re.findall(r"```python\n(import json\n.*?)```", guide, flags=re.DOTALL)
    code = code.replace("model.onnx", str(onnx_file)).replace("street.jpg", str(photos[1]))
    code += "\nimport sys\nassert not {'torch', 'detectron2', 'co_detr'} & set(sys.modules)"
    code += "\nnp.savez('found.npz', boxes=boxes, scores=scores, labels=labels)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=tmp_path)
    found = np.load(tmp_path / "found.npz")
    expected = ExportedPredictor(onnx_file)(photos[1])
    np.testing.assert_allclose(
        found["boxes"][: len(expected)], expected.pred_boxes.tensor, atol=1e-3
    )
