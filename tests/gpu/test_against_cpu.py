"""What a GPU computes is what the CPU computes."""

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig

from co_detr.checkpoint.detector import load_detector
from co_detr.checkpoint.saving import Checkpointer
from co_detr.tools.export.exporting import ExportSettings, export_detector
from co_detr.tools.export.predictor import ExportedPredictor, check_image
from co_detr.tools.predict.predictor import Predictor
from tests.gpu.steps import build, step
from tests.modeling.builders import tiny_config
from tests.prediction.trained_run import CLASSES, SIZE

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("heads", "dtype", "tolerance"),
    # In float32 a proposal more or less, where two scores are nearly equal, is no fault.
    [(1, torch.float64, 1e-6), (2, torch.float32, 5e-3)],
    ids=str,
)
def test_losses_and_gradients_of_a_step(device, heads, dtype, tolerance):
    expected, expected_gradients = step(build(CPU, dtype, heads))
    losses, gradients = step(build(device, dtype, heads))
    assert {"atss.loss_cls", "atss_queries.loss_giou"} <= losses.keys()
    assert ("roi.loss_rpn_cls" in losses) == (heads == 2)
    assert losses == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, wanted in expected_gradients.items():
        error = (gradients[name] - wanted).norm() / wanted.norm().clamp(min=1e-6)
        assert error <= 10 * tolerance, f"{name}: {error:.1e}"


@pytest.fixture
def trained_there(device, tmp_path):
    """Config and checkpoint of a model after one update on the device."""
    LazyConfig.save(tiny_config(2, SIZE), str(tmp_path / "config.yaml"))
    model = build(device)
    step(model)
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    Checkpointer(model, str(tmp_path), class_names=CLASSES).save("model_final")
    return str(tmp_path / "config.yaml"), str(tmp_path / "model_final.pth")


def photo():
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def test_predictor(device, trained_there):
    expected = Predictor(*trained_there, device="cpu")(photo())
    found = Predictor(*trained_there, device=str(device))(photo())
    assert found.pred_boxes.tensor.device == found.scores.device == CPU
    assert len(found) == len(expected) > 50
    # Nearly equal scores may change places.
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
    same = found.pred_classes == expected.pred_classes
    assert same.float().mean() > 0.9
    distance = (found.pred_boxes.tensor - expected.pred_boxes.tensor)[same].abs().amax(1)
    assert distance.median() < 0.01, distance


def test_a_file_exported_from_its_checkpoint(device, trained_there, tmp_path):
    detector = load_detector(*trained_there)
    settings = ExportSettings("torch_export", (96, 128))
    export_detector(detector, "tiny.py", tmp_path / "tiny.pt2", settings)
    model = Predictor(*trained_there, device="cpu").model
    check = check_image(ExportedPredictor(tmp_path / "tiny.pt2"), model, "RGB", photo())
    assert check.difference.is_small and check.difference.compared > 50, check.difference
