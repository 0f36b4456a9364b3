"""The quick-start data set: handwritten digits on photographs, in COCO format.

All pixels come from packages that are installed anyway: scikit-learn's `load_digits` (test part of
the UCI set "Optical Recognition of Handwritten Digits") and the photographs that ship inside the
wheels of scikit-image and scikit-learn. Train and val share no handwritten digit and no photograph.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from co_detr.data.images import ImageReader

from .digit_scene import Glyph, Photograph, Scene, SceneConfig, draw_scene

GENERATOR = "co_detr.data.digits"

# Files of skimage/data and sklearn/datasets/images that are photographs of something; the stereo
# partner of motorcycle_left and pages of text (they hold digits of their own) are left out.
PHOTOGRAPHS = {
    "train": [
        "skimage/data/astronaut.png",
        "skimage/data/brick.png",
        "skimage/data/camera.png",
        "skimage/data/coffee.png",
        "skimage/data/coins.png",
        "skimage/data/grass.png",
        "skimage/data/moon.png",
        "skimage/data/motorcycle_left.png",
        "skimage/data/rocket.jpg",
        "sklearn/datasets/images/china.jpg",
    ],
    "val": [
        "skimage/data/chelsea.png",
        "skimage/data/clock_motion.png",
        "skimage/data/gravel.png",
        "skimage/data/hubble_deep_field.jpg",
        "sklearn/datasets/images/flower.jpg",
    ],
}


@dataclass(frozen=True)
class DigitsConfig:
    """Size and look of the data set.

    Attributes:
        train, val: number of images.
        seed: the whole set is a function of it (and of the installed source images).
        val_fraction: part of each digit class that only val may use.
        jpeg_quality: 1 to 95.
    """

    train: int = 1200
    val: int = 200
    seed: int = 0
    val_fraction: float = 0.2
    jpeg_quality: int = 90
    scene: SceneConfig = field(default_factory=SceneConfig)

    def __post_init__(self) -> None:
        for name in ("train", "val"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 image, got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction must lie in (0, 1), got {self.val_fraction}.")


def generate(out: Path, config: DigitsConfig) -> None:
    """Writes `out`/{train,val}.json and `out`/{train,val}/*.jpg.

    The annotation file of a split is written after its images, so `is_complete` is never fooled by
    an interrupted run.

    Raises:
        FileExistsError: an annotation file in `out` was not written by this generator.
        FileNotFoundError: an installed package lacks one of its photographs.
    """
    for split in PHOTOGRAPHS:
        path = out / f"{split}.json"
        if path.exists():
            if _read_info(path).get("generator") != GENERATOR:
                raise FileExistsError(
                    f"{path} was not written by this generator and is kept; "
                    "choose another folder with --out."
                )
            path.unlink()
    glyphs = load_glyphs(config)
    for number, split in enumerate(PHOTOGRAPHS):
        photographs = [load_photograph(name) for name in PHOTOGRAPHS[split]]
        (out / split).mkdir(parents=True, exist_ok=True)
        coco = _empty_coco(split, config)
        for index in tqdm(range(getattr(config, split)), desc=f"digits {split:5}", unit="image"):
            # Own generator per image: adding images changes none of the earlier ones.
            rng = np.random.default_rng([config.seed, number, index])
            scene = draw_scene(glyphs[split], photographs, config.scene, rng)
            file_name = f"{index:06d}.jpg"
            Image.fromarray(scene.pixels).save(
                out / split / file_name, quality=config.jpeg_quality, subsampling=0
            )
            _append(coco, scene, file_name)
        part = out / f"{split}.json.part"
        part.write_text(json.dumps(coco) + "\n")
        part.replace(out / f"{split}.json")


def is_complete(out: Path, config: DigitsConfig) -> bool:
    """Whether `out` holds every file of exactly this configuration."""
    for split in PHOTOGRAPHS:
        path = out / f"{split}.json"
        if not path.exists():
            return False
        info = _read_info(path)
        # Through JSON, because it turns the tuples of the configuration into lists.
        if info.get("config") != json.loads(json.dumps(asdict(config))):
            return False
        names = (f"{index:06d}.jpg" for index in range(getattr(config, split)))
        if not all((out / split / name).is_file() for name in names):
            return False
    return True


def load_glyphs(config: DigitsConfig) -> dict[str, list[Glyph]]:
    """Splits scikit-learn's 1797 handwritten digits, class by class, into train and val."""
    from sklearn.datasets import load_digits  # slow to import, not needed to check a data set

    digits = load_digits()
    rng = np.random.default_rng(config.seed)
    glyphs: dict[str, list[Glyph]] = {"train": [], "val": []}
    for label in range(10):
        rows = rng.permutation(np.flatnonzero(digits.target == label))
        num_val = max(1, round(len(rows) * config.val_fraction))
        for split, chosen in (("val", rows[:num_val]), ("train", rows[num_val:])):
            glyphs[split] += [Glyph(digits.images[row], label, int(row)) for row in chosen]
    return glyphs


def load_photograph(name: str) -> Photograph:
    """Reads "package/path/in/package" from an installed package, as RGB."""
    package, _, inner = name.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"The package {package} is not installed; run `make setup`.")
    path = Path(spec.origin).parent / inner
    if not path.is_file():
        raise FileNotFoundError(
            f"The photograph {path} is missing from the installed {package}; reinstall {package}."
        )
    return Photograph(name, ImageReader().read_rgb(path))


def _read_info(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()).get("info", {})
    except (json.JSONDecodeError, AttributeError):
        return {}  # not ours: `generate` refuses to overwrite it


def _empty_coco(split: str, config: DigitsConfig) -> dict[str, Any]:
    return {
        "info": {
            "description": f"Handwritten digits on photographs, {split} split",
            "generator": GENERATOR,
            "config": asdict(config),
            "provenance": {
                "digits": f"sklearn.datasets.load_digits, scikit-learn {version('scikit-learn')}",
                "photographs": PHOTOGRAPHS[split],
                "scikit-image": version("scikit-image"),
            },
        },
        "licenses": [
            {
                "id": 1,
                "name": "See the data notes of scikit-image and scikit-learn. china.jpg (by "
                "danielbuechele) and flower.jpg (by vultilion) are CC BY 2.0.",
                "url": "https://creativecommons.org/licenses/by/2.0/",
            }
        ],
        "images": [],
        "annotations": [],
        "categories": [{"id": digit, "name": str(digit)} for digit in range(10)],
    }


def _append(coco: dict[str, Any], scene: Scene, file_name: str) -> None:
    height, width = scene.pixels.shape[:2]
    image_id = len(coco["images"]) + 1
    coco["images"].append(
        {
            "id": image_id,
            "file_name": file_name,
            "width": width,
            "height": height,
            "license": 1,
            "photograph": scene.photograph,
        }
    )
    for digit in scene.digits:
        x1, y1, x2, y2 = digit.box
        coco["annotations"].append(
            {
                "id": len(coco["annotations"]) + 1,
                "image_id": image_id,
                "category_id": digit.glyph.label,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "digit": digit.glyph.index,
            }
        )
