"""A tiny COCO-format data set and a config for it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from co_detr.engine.config import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))  # the config imports tiny_detector
CONFIG_FILE = str(Path(__file__).parent / "tiny_config.py")


@dataclass
class TinyData:
    """Paths of a data set that a test may edit."""

    root: Path

    @property
    def train(self) -> Path:
        return self.root / "train.json"

    @property
    def images(self) -> Path:
        return self.root / "images"

    def overrides(self, output_dir: Path | str) -> list[str]:
        return [
            f"data.train={self.train}",
            f"data.train_images={self.images}",
            f"data.val={self.root / 'val.json'}",
            f"data.val_images={self.images}",
            f"train.output_dir={output_dir}",
        ]


@pytest.fixture
def tiny_data(tmp_path: Path) -> TinyData:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for i in range(10):
        width, height = (64, 48) if i % 3 else (48, 64)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": width, "height": height})
        for j in range(i % 3):  # some images are empty
            box = [4 + 6 * j, 5 + 3 * i, 20, 12]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i + 1, "category_id": 3 + 4 * j}
                | {"bbox": box, "area": 240, "iscrowd": 0}
            )
    categories = [{"id": 3, "name": "cell"}, {"id": 7, "name": "plate"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_text(json.dumps(content))
    return TinyData(tmp_path)


@pytest.fixture
def tiny_cfg(tiny_data: TinyData, tmp_path: Path):
    """Makes a config; arguments are overrides."""

    def make(*overrides: str, output: str = "out"):
        return load_config(CONFIG_FILE, [*tiny_data.overrides(tmp_path / output), *overrides])

    return make


@pytest.fixture
def train_net(tiny_data: TinyData):
    """Runs train_net.py as a user would; with `processes`, under torchrun."""

    def run(*arguments: str, processes: int = 1, config: str = CONFIG_FILE):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(processes)]
        return subprocess.run(
            [*launcher, str(ROOT / "train_net.py"), "--config-file", config, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env=os.environ
            | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
        )

    return run
