"""The quick-start data set: handwritten digits on photographs, in COCO format.

    co-detr digits --out datasets/digits

All pixels come from packages that are installed anyway: scikit-learn's `load_digits` (test part of
the UCI set "Optical Recognition of Handwritten Digits") and the photographs that ship inside the
wheels of scikit-image and scikit-learn. Train and val share no handwritten digit and no photograph.

`generate` writes the set, `draw_scene` draws one image of it. Everything random in a scene comes
from the `numpy.random.Generator` that is passed in. Boxes are absolute xyxy pixels, x2 and y2
exclusive. Where digits overlap, a pixel belongs to the mask of the one on top, which it shows; a
box is that of the whole digit.
"""

from __future__ import annotations

import argparse
import colorsys
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils
from PIL import Image
from tqdm import tqdm

from co_detr.data.images import ImageReader
from co_detr.errors import ConfigError

GENERATOR = "co_detr.data.digits"  # as data sets of earlier versions have it

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

ALPHA_VISIBLE = 128
"""A pixel of the mask belongs to the digit, and to its box, from this opacity (0-255) on."""

_CANVAS = 192  # glyphs are bent at this size and only then brought to their final one
_LUMINANCE = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class SceneConfig:
    """What a scene looks like. Lengths in pixels, angles in degrees, ranges inclusive.

    Attributes:
        image_side: range of the image's width and of its height, drawn separately, so that
            batches need padding.
        digits: range of the number of digits tried; one that finds no room is left out.
        digit_side: range of the longer side of a digit's box.
        max_rotation: rotation to either side; small enough to keep 6 and 9 apart.
        max_shear: horizontal shear to either side.
        max_overlap: largest part of the smaller of two boxes that the other may cover. 0.15
            keeps their IoU below 0.09.
        min_contrast: least difference of luminance (0-255) between digit and background.
    """

    image_side: tuple[int, int] = (144, 192)
    digits: tuple[int, int] = (2, 7)
    digit_side: tuple[int, int] = (24, 64)
    max_rotation: float = 20.0
    max_shear: float = 0.2
    max_overlap: float = 0.15
    min_contrast: float = 80.0

    def __post_init__(self) -> None:
        for name in ("image_side", "digits", "digit_side"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} must be a range 1 <= low <= high, got ({low}, {high}).")
        if self.digit_side[1] > self.image_side[0]:
            raise ValueError(
                f"digit_side goes up to {self.digit_side[1]} px but the smallest image has "
                f"{self.image_side[0]} px; lower digit_side or raise image_side."
            )


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


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = DigitsConfig()
    parser = argparse.ArgumentParser(
        description="Makes the quick start's data: handwritten digits on photographs, as COCO."
    )
    parser.add_argument("--out", type=Path, default=Path("datasets/digits"), help="output folder")
    parser.add_argument("--train", type=int, default=defaults.train, help="training images")
    parser.add_argument("--val", type=int, default=defaults.val, help="validation images")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--force", action="store_true", help="write it even if it is complete")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Writes the data set, unless it is there.

    Raises:
        ConfigError: if a number is out of range, a folder cannot be written, or a package is
            missing.
    """
    try:
        config = DigitsConfig(train=args.train, val=args.val, seed=args.seed)
        if not args.force and is_complete(args.out, config):
            print(f"{args.out} is complete ({config.train} train, {config.val} val images).")
            return
        generate(args.out, config)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the digits are made of what scikit-image and scikit-learn bring, which cannot be "
            f"imported ({error}): install them with pip install scikit-image scikit-learn."
        ) from error
    except (ValueError, OSError) as error:
        raise ConfigError(f"the digits cannot be made: {error}") from error
    print(f"Wrote {config.train} train and {config.val} val images to {args.out}.")


@dataclass(frozen=True)
class Glyph:
    """One handwritten digit: `pixels` (8, 8) ink in [0, 16], its class, its row in the source."""

    pixels: np.ndarray
    label: int
    index: int


@dataclass(frozen=True)
class Photograph:
    """A background: `pixels` (H, W, 3) uint8 RGB."""

    name: str
    pixels: np.ndarray


@dataclass(frozen=True)
class PlacedDigit:
    """A digit in a scene: `box` (x1, y1, x2, y2) is the tight box of its visible mask."""

    box: tuple[int, int, int, int]
    glyph: Glyph


@dataclass(frozen=True)
class Scene:
    """A finished image with the digits on it.

    Attributes:
        pixels: ``(H, W, 3)`` uint8 RGB.
        digits: in the order in which they were drawn.
        photograph: its name.
        owners: ``(H, W)`` int8, which of the digits a pixel shows, -1: none.
    """

    pixels: np.ndarray
    digits: list[PlacedDigit]
    photograph: str
    owners: np.ndarray

    def mask(self, index: int) -> dict[str, Any]:
        """What is seen of a digit, as COCO's compressed run lengths."""
        mask = mask_utils.encode(np.asfortranarray(self.owners == index, dtype=np.uint8))
        return {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}


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
            if _read(path).get("info", {}).get("generator") != GENERATOR:
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
        content = _read(path)
        # Through JSON, because it turns the tuples of the configuration into lists.
        if content.get("info", {}).get("config") != json.loads(json.dumps(asdict(config))):
            return False
        # Sets of earlier versions have no masks.
        if not all("segmentation" in annotation for annotation in content["annotations"]):
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
        raise ModuleNotFoundError(f"No module named {package!r}")
    path = Path(spec.origin).parent / inner
    if not path.is_file():
        raise FileNotFoundError(
            f"The photograph {path} is missing from the installed {package}; reinstall {package}."
        )
    return Photograph(name, ImageReader().read_rgb(path))


def _read(path: Path) -> dict[str, Any]:
    """The content of an annotation file, {} if it is not ours: `generate` then keeps it."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # no text, no json
        return {}
    return content if isinstance(content, dict) else {}


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
    for index, digit in enumerate(scene.digits):
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
                "segmentation": scene.mask(index),
            }
        )


def draw_scene(
    glyphs: list[Glyph],
    photographs: list[Photograph],
    config: SceneConfig,
    rng: np.random.Generator,
) -> Scene:
    """Draws one scene from the given glyphs and photographs; it holds at least one digit."""
    photograph = photographs[rng.integers(len(photographs))]
    width, height = (int(n) for n in rng.integers(*config.image_side, size=2, endpoint=True))
    pixels = crop_background(photograph, width, height, rng)

    owners = np.full((height, width), -1, np.int8)
    placed: list[PlacedDigit] = []
    for _ in range(rng.integers(*config.digits, endpoint=True)):
        glyph = glyphs[rng.integers(len(glyphs))]
        side = int(rng.integers(*config.digit_side, endpoint=True))
        alpha = render_alpha(glyph, side, config, rng)
        box = _find_room(alpha.shape, width, height, placed, config, rng)
        if box is None:
            continue
        _paste(pixels, alpha, box, config, rng)
        owners[box[1] : box[3], box[0] : box[2]][alpha >= ALPHA_VISIBLE] = len(placed)
        placed.append(PlacedDigit(box, glyph))
    return Scene(pixels.round().astype(np.uint8), placed, photograph.name, owners)


def crop_background(
    photograph: Photograph, width: int, height: int, rng: np.random.Generator
) -> np.ndarray:
    """Cuts a random, randomly mirrored crop at 1 to 2 times the size and shrinks it.

    Returns:
        (height, width, 3) float64 in [0, 255].
    """
    full_height, full_width = photograph.pixels.shape[:2]
    zoom = min(rng.uniform(1.0, 2.0), full_width / width, full_height / height)
    crop_width, crop_height = int(width * zoom), int(height * zoom)
    left = int(rng.integers(0, full_width - crop_width, endpoint=True))
    top = int(rng.integers(0, full_height - crop_height, endpoint=True))
    crop = photograph.pixels[top : top + crop_height, left : left + crop_width]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    resized = Image.fromarray(np.ascontiguousarray(crop)).resize((width, height), Image.LANCZOS)
    return np.asarray(resized, dtype=np.float64)


def render_alpha(
    glyph: Glyph, side: int, config: SceneConfig, rng: np.random.Generator
) -> np.ndarray:
    """Turns the 8 x 8 ink into an anti-aliased, rotated and sheared mask.

    Returns:
        (h, w) uint8 opacity with max(h, w) == side, cut so that its first and last row and column
        each hold a visible pixel.
    """
    angle = np.deg2rad(rng.uniform(-config.max_rotation, config.max_rotation))
    shear = rng.uniform(-config.max_shear, config.max_shear)
    # The margin leaves room for the corners.
    ink = Image.fromarray(np.pad(glyph.pixels, 3).astype(np.float32))
    ink = ink.resize((_CANVAS, _CANVAS), Image.BICUBIC)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[1.0, shear], [0.0, 1.0]])
    center = np.full(2, _CANVAS / 2)
    offset = center - matrix @ center
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    bent = np.asarray(ink.transform(ink.size, Image.AFFINE, coefficients, Image.BICUBIC))
    # Half of the full ink, 16, is where the pen's edge was; a lower threshold would close the
    # holes of 6, 8 and 9.
    stroke = np.clip((bent - 6.5) / 3.0, 0.0, 1.0) * 255.0

    stroke = _cut_to_visible(stroke)
    factor = side / max(stroke.shape)
    size = [max(1, round(n * factor)) for n in reversed(stroke.shape)]
    small = Image.fromarray(stroke.astype(np.float32)).resize(size, Image.BOX)
    return _cut_to_visible(np.clip(np.asarray(small), 0, 255).round()).astype(np.uint8)


def _cut_to_visible(alpha: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(alpha >= ALPHA_VISIBLE)
    return alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _find_room(
    shape: tuple[int, int],
    width: int,
    height: int,
    placed: list[PlacedDigit],
    config: SceneConfig,
    rng: np.random.Generator,
    attempts: int = 40,
) -> tuple[int, int, int, int] | None:
    """Looks for a place inside the image that covers no other digit too much."""
    box_height, box_width = shape
    for _ in range(attempts):
        left = int(rng.integers(0, width - box_width, endpoint=True))
        top = int(rng.integers(0, height - box_height, endpoint=True))
        box = (left, top, left + box_width, top + box_height)
        if all(overlap_of_smaller(box, other.box) <= config.max_overlap for other in placed):
            return box
    return None


def overlap_of_smaller(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection of two xyxy boxes over the area of the smaller one, in [0, 1]."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return width * height / min(area_a, area_b)


def _paste(
    pixels: np.ndarray,
    alpha: np.ndarray,
    box: tuple[int, int, int, int],
    config: SceneConfig,
    rng: np.random.Generator,
) -> None:
    """Blends a tinted digit into `pixels` in place."""
    x1, y1, x2, y2 = box
    under = pixels[y1:y2, x1:x2]
    weight = alpha[..., None] / 255.0
    luminance = float((under @ _LUMINANCE * weight[..., 0]).sum() / weight.sum())
    under += (_choose_tint(luminance, config, rng) - under) * weight


def _choose_tint(
    background: float, config: SceneConfig, rng: np.random.Generator, attempts: int = 50
) -> np.ndarray:
    """Draws an RGB color (3,) in [0, 255] whose luminance stands off the background's."""
    for _ in range(attempts):
        # Even in lightness (HSV would be mostly dark), so light and dark digits are as common.
        hue, lightness, saturation = rng.random(), rng.random(), rng.uniform(0.3, 1.0)
        tint = 255.0 * np.array(colorsys.hls_to_rgb(hue, lightness, saturation))
        if abs(tint @ _LUMINANCE - background) >= config.min_contrast:
            return tint
    return np.full(3, 0.0 if background > 127.5 else 255.0)
