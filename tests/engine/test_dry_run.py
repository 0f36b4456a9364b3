"""The dry run measures a worst-case step and writes nothing."""

import re

import detectron2.data.transforms as T
import pytest
import torch
from detectron2.config import instantiate

from co_detr.engine.config import load_config
from co_detr.engine.memory_use import MANY_OBJECTS, USUAL_OBJECTS, dry_run, image_sizes
from co_detr.errors import ConfigError, OutOfMemoryError
from tests.engine.tiny_detector import TinyDetector
from tests.paths import config_path

NO_DATA = ["data.train=nowhere.json", "model.num_classes=2"]


@pytest.mark.parametrize(
    ("name", "largest", "usual"),
    [
        ("co_detr_r50", (800, 1333), (640, 853)),
        ("co_dino_r50_lsj_12ep", (1024, 1024), (1024, 1024)),
        ("quickstart", (192, 256), (176, 235)),
    ],
)
def test_sizes_of_the_augmentations(name, largest, usual):
    cfg = load_config(config_path(name))
    sizes = image_sizes(instantiate(cfg.dataloader.train.mapper.augmentations))
    assert (sizes.largest, sizes.usual) == (largest, usual)


def test_sizes_without_a_limit():
    for augmentations in ([], [T.RandomFlip()], [T.ResizeShortestEdge(800)]):
        with pytest.raises(ConfigError, match="does not limit the size of images"):
            image_sizes(augmentations)
    assert image_sizes([T.Resize((30, 40))]).largest == (30, 40)


@pytest.fixture
def seen(monkeypatch):
    """(height, width, objects) of the images of every forward pass."""
    batches = []
    forward = TinyDetector.forward

    def watched(self, batched_inputs):
        batches.append(
            [(*entry["image"].shape[1:], len(entry["instances"])) for entry in batched_inputs]
        )
        return forward(self, batched_inputs)

    monkeypatch.setattr(TinyDetector, "forward", watched)
    return batches


def test_steps_are_the_worst_case_and_nothing_is_written(tiny_cfg, tmp_path, seen):
    cfg = tiny_cfg(*NO_DATA, "train.effective_batch_size=6", "train.images_per_gpu=2")
    cfg.dataloader.train.mapper.augmentations.max_size = 100
    before = sorted(tmp_path.iterdir())
    measured = dry_run(cfg)
    # Two micro-batches of three stand for the step.
    assert seen[:4] == [[(64, 100, MANY_OBJECTS)] * 2] * 4
    assert seen[4:] == [[(56, 75, USUAL_OBJECTS)] * 2] * 2
    assert 0 < measured.peak.used < measured.peak.total
    assert measured.worst_seconds > 0 and measured.max_iter == 6
    assert "1 process(es) x 3 accumulation step(s) x 2 image(s)" in measured.text()
    assert re.search(r"peak memory:  [\d.]+ of [\d.]+ GiB \(64x100, 100 objects", measured.text())
    assert sorted(tmp_path.iterdir()) == before


def test_without_grouping_a_batch_mixes_orientations(tiny_cfg, seen):
    dry_run(tiny_cfg(*NO_DATA, "dataloader.train.aspect_ratio_grouping=false"))
    assert [size[:2] for size in seen[0]] == [(64, 1333), (1333, 64)] * 2


def test_a_step_that_does_not_fit(tiny_cfg, monkeypatch):
    def forward(self, batched_inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TinyDetector, "forward", forward)
    with pytest.raises(OutOfMemoryError, match="a step of the dry run .*images_per_gpu=2"):
        dry_run(tiny_cfg(*NO_DATA))


def test_command_line(train_net, tmp_path):
    output = f"train.output_dir={tmp_path / 'out'}"
    result = train_net("--dry-run", output, "train.max_iter=100")
    assert result.returncode == 0, result.output
    assert result.output.count("peak memory:") == 1
    assert "1 process(es) x 1 accumulation step(s) x 4 image(s)" in result.output
    assert re.search(r"whole run: .* for 100 usual steps", result.output)
    assert not (tmp_path / "out").exists()
