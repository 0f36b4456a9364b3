"""The quick-start data set: what it promises about boxes, splits and repeatability."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from PIL import Image
from pycocotools.coco import COCO

from co_detr.tools import digits
from co_detr.tools.digits import (
    ALPHA_VISIBLE,
    DigitsConfig,
    Photograph,
    SceneConfig,
    crop_background,
    draw_scene,
    generate,
    is_complete,
    load_glyphs,
    load_photograph,
    overlap_of_smaller,
    render_alpha,
)

CONFIG = DigitsConfig(train=6, val=4, seed=3)
GRAY = Photograph("gray", np.full((300, 400, 3), 128, np.uint8))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    generate(out, CONFIG)
    return out


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def all_files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_same_seed_gives_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    generate(tmp_path, CONFIG)
    assert all_files(tmp_path) == all_files(dataset)
    assert len(all_files(tmp_path)) == 6 + 4 + 2


def test_another_seed_gives_other_images(dataset: Path, tmp_path: Path) -> None:
    generate(tmp_path, dataclasses.replace(CONFIG, seed=4))
    first = "train/000000.jpg"
    assert (tmp_path / first).read_bytes() != (dataset / first).read_bytes()


def test_more_images_leave_the_first_ones_unchanged(dataset: Path, tmp_path: Path) -> None:
    generate(tmp_path, dataclasses.replace(CONFIG, train=7))
    for name in ("train/000005.jpg", "val/000003.jpg"):
        assert (tmp_path / name).read_bytes() == (dataset / name).read_bytes()


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_load_as_coco_and_match_the_images(dataset: Path, split: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(dataset / f"{split}.json"))
    assert len(coco.getImgIds()) == getattr(CONFIG, split)
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == [str(n) for n in range(10)]
    low, high = CONFIG.scene.image_side
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(dataset / split / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"])
        assert low <= image["width"] <= high and low <= image["height"] <= high
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        assert 1 <= len(annotations) <= CONFIG.scene.digits[1]
        for annotation in annotations:
            x, y, width, height = annotation["bbox"]
            assert x >= 0 and y >= 0 and width > 0 and height > 0
            assert x + width <= image["width"] and y + height <= image["height"]
            assert annotation["area"] == width * height and annotation["iscrowd"] == 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_are_what_is_seen_of_the_digits(dataset: Path, split: str) -> None:
    content = read(dataset / f"{split}.json")
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    seen: dict[int, np.ndarray] = {}
    for annotation in content["annotations"]:
        assert tuple(annotation["segmentation"]["size"]) == sizes[annotation["image_id"]]
        mask = mask_utils.decode(annotation["segmentation"])
        x, y, width, height = annotation["bbox"]
        assert mask.sum() == mask[y : y + height, x : x + width].sum() > 0.1 * annotation["area"]
        seen[annotation["image_id"]] = seen.get(annotation["image_id"], 0) + mask
    assert all(counts.max() == 1 for counts in seen.values())  # a pixel shows one digit


def test_the_mask_of_a_digit_alone_fills_its_box() -> None:
    config = SceneConfig(digits=(1, 1))
    for seed in range(4):
        scene = draw_scene(load_glyphs(CONFIG)["val"], [GRAY], config, np.random.default_rng(seed))
        x1, y1, x2, y2 = scene.digits[0].box
        box = mask_utils.toBbox(scene.mask(0)).tolist()
        assert box == [x1, y1, x2 - x1, y2 - y1]
        # Where the mask is, the photograph is covered.
        changed = np.abs(scene.pixels.astype(int) - 128).max(axis=2) > 20
        assert changed[mask_utils.decode(scene.mask(0)) == 1].mean() > 0.95


def test_a_set_without_masks_is_not_complete(dataset: Path, tmp_path: Path) -> None:
    generate(tmp_path, CONFIG)
    assert is_complete(tmp_path, CONFIG)
    content = read(tmp_path / "train.json")
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert not is_complete(tmp_path, CONFIG)
    generate(tmp_path, CONFIG)  # replaces it
    assert all_files(tmp_path) == all_files(dataset)


def test_splits_share_no_digit_and_no_photograph(dataset: Path) -> None:
    train, val = read(dataset / "train.json"), read(dataset / "val.json")
    for table, key in (("annotations", "digit"), ("images", "photograph")):
        used_train = {entry[key] for entry in train[table]}
        used_val = {entry[key] for entry in val[table]}
        assert used_train and used_val and not used_train & used_val


def test_every_class_is_split_by_the_fraction() -> None:
    glyphs = load_glyphs(CONFIG)
    train = {glyph.index for glyph in glyphs["train"]}
    val = {glyph.index for glyph in glyphs["val"]}
    assert len(train) + len(val) == len(train | val) == 1797
    for label in range(10):
        of_class = [sum(g.label == label for g in glyphs[split]) for split in ("train", "val")]
        assert of_class[1] == round(sum(of_class) * CONFIG.val_fraction)


def test_all_listed_photographs_are_installed_and_large_enough() -> None:
    for name in digits.PHOTOGRAPHS["train"] + digits.PHOTOGRAPHS["val"]:
        pixels = load_photograph(name).pixels
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        assert min(pixels.shape[:2]) >= CONFIG.scene.image_side[1]


def test_mask_is_cut_tightly_at_the_asked_size() -> None:
    rng = np.random.default_rng(0)
    for glyph in load_glyphs(CONFIG)["val"][::40]:
        visible = render_alpha(glyph, 40, CONFIG.scene, rng) >= ALPHA_VISIBLE
        # Cutting again after the shrinking may take a faint row or column more.
        assert 37 <= max(visible.shape) <= 40
        for edge in (visible[0], visible[-1], visible[:, 0], visible[:, -1]):
            assert edge.any()


def test_box_is_the_tight_box_of_the_changed_pixels() -> None:
    config = SceneConfig(digits=(1, 1))
    for seed in range(8):
        scene = draw_scene(load_glyphs(CONFIG)["val"], [GRAY], config, np.random.default_rng(seed))
        difference = np.abs(scene.pixels.astype(int) - 128).sum(axis=2)
        rows, columns = np.nonzero(difference >= difference.max() / 2)
        tight = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert scene.digits[0].box == pytest.approx(tight, abs=1)


def test_digits_stand_off_the_background() -> None:
    config = SceneConfig(digits=(1, 1))
    for seed in range(8):
        scene = draw_scene(load_glyphs(CONFIG)["val"], [GRAY], config, np.random.default_rng(seed))
        luminance = scene.pixels @ np.array([0.299, 0.587, 0.114])
        assert np.abs(luminance - 128).max() >= config.min_contrast - 2


def test_digits_hardly_overlap() -> None:
    config = SceneConfig(digits=(7, 7))
    glyphs = load_glyphs(CONFIG)["train"]
    for seed in range(5):
        boxes = [
            d.box for d in draw_scene(glyphs, [GRAY], config, np.random.default_rng(seed)).digits
        ]
        assert len(boxes) >= 4
        for i, box in enumerate(boxes):
            assert all(overlap_of_smaller(box, b) <= config.max_overlap for b in boxes[:i])


def test_overlap_of_smaller() -> None:
    assert overlap_of_smaller((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    assert overlap_of_smaller((0, 0, 10, 10), (5, 5, 7, 7)) == 1.0
    assert overlap_of_smaller((0, 0, 10, 10), (5, 0, 25, 10)) == 0.5


def test_crop_of_a_small_photograph_is_still_inside() -> None:
    small = Photograph("small", np.zeros((150, 160, 3), np.uint8))
    assert crop_background(small, 150, 144, np.random.default_rng(0)).shape == (144, 150, 3)


def test_complete_only_with_all_files_of_the_same_configuration(tmp_path: Path) -> None:
    assert not is_complete(tmp_path, CONFIG)
    generate(tmp_path, CONFIG)
    assert is_complete(tmp_path, CONFIG)
    assert not is_complete(tmp_path, dataclasses.replace(CONFIG, val=5))
    (tmp_path / "val" / "000002.jpg").unlink()
    assert not is_complete(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [b'{"images": []}', b"[]", b"not json", b'{"caf\xe9": 1}', b""])
def test_foreign_annotation_files_are_kept(tmp_path: Path, content: bytes) -> None:
    foreign = tmp_path / "val.json"
    foreign.write_bytes(content)
    with pytest.raises(FileExistsError, match="val.json was not written by this generator"):
        generate(tmp_path, CONFIG)
    assert foreign.read_bytes() == content
    assert not (tmp_path / "train").exists()


def test_missing_photograph_names_the_file() -> None:
    with pytest.raises(FileNotFoundError, match="nothing.png is missing .* reinstall skimage"):
        load_photograph("skimage/data/nothing.png")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"):
        load_photograph("no_such_package/a.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": 0}, "train must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"val_fraction": 1.0}, r"val_fraction must lie in \(0, 1\)"),
    ],
)
def test_bad_configurations_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsConfig(**arguments)


def test_digits_larger_than_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match="digit_side goes up to 200 px"):
        SceneConfig(digit_side=(24, 200))
    with pytest.raises(ValueError, match="digits must be a range"):
        SceneConfig(digits=(3, 2))
