"""Objects are pasted as seeds say, by their masks, from images of which little is computed.

Its numbers are compared with the reference's in tests/parity/test_units_masks.py.
"""

import json
from itertools import islice

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from co_detr.data.augmentation import detr_train_augmentation, lsj_train_augmentation
from co_detr.data.coco import load_coco
from co_detr.data.copy_paste import CopyPaste, Scene, draw_source, paste, window_of
from co_detr.data.loader import CheckedDatasetMapper, build_train_loader
from co_detr.data.masks import CroppedMasks
from co_detr.errors import DataError
from co_detr.seeding import locally_seeded

SQUARE = 64


@pytest.fixture
def folder(tmp_path):
    """Six images of 60x50 pixels or so with three objects each, in COCO format."""
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for index in range(6):
        height, width = (50, 60) if index % 2 else (66, 40)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        image = {"id": index, "file_name": f"{index}.png", "width": width, "height": height}
        content["images"].append(image)
        for place in range(3):
            x, y = 4 + 10 * place, 6 + 12 * place
            entry = {"id": len(content["annotations"]) + 1, "image_id": index, "category_id": 1}
            polygon = [x, y, x + 14, y, x + 14, y + 9, x, y + 13]
            entry |= {"bbox": [x, y, 14, 13], "segmentation": [polygon]}
            content["annotations"].append(entry)
    write(tmp_path, content)
    return tmp_path


def write(folder, content):
    (folder / "train.json").write_text(json.dumps(content))


def records(folder):
    return load_coco(str(folder / "train.json"), str(folder), with_masks=True)


def mapper_of(*augmentations):
    steps = augmentations or lsj_train_augmentation(SQUARE, scales=(0.5, 2.0))
    return CheckedDatasetMapper(True, steps, "RGB", recompute_boxes=True)


def loader_of(folder, copy_paste, num_workers=0, start=0):
    loader = build_train_loader(
        records(folder),
        mapper=mapper_of(),
        total_batch_size=2,
        seed=7,
        num_workers=num_workers,
        copy_paste=copy_paste,
    )
    loader.batch_sampler.start_iteration = start
    return loader


def stream(folder, copy_paste, count=12, **settings):
    batches = islice(loader_of(folder, copy_paste, **settings), count // 2)
    return [sample for batch in batches for sample in batch]


def is_same(one, other):
    return torch.equal(one["image"], other["image"]) and all(
        torch.equal(first, second)
        for first, second in zip(values_of(one), values_of(other), strict=True)
    )


def values_of(sample):
    fields = sample["instances"].get_fields()
    return [getattr(fields[name], "tensor", fields[name]) for name in sorted(fields)]


PASTES = CopyPaste(keep_masks=True)


def test_samples_depend_on_the_seed_and_not_on_workers_or_the_start(folder):
    samples = stream(folder, PASTES)
    workers = stream(folder, PASTES, num_workers=2)
    assert all(map(is_same, samples, workers))
    resumed = stream(folder, PASTES, count=4, start=4)
    assert all(map(is_same, samples[8:], resumed))


def test_samples_are_whole(folder):
    plain, samples = stream(folder, None, 24), stream(folder, PASTES, 24)
    more = [len(b["instances"]) > len(a["instances"]) for a, b in zip(plain, samples, strict=True)]
    assert 5 < sum(more) < 24
    for sample in samples:
        found = sample["instances"]
        assert sample["file_name"] and "annotations" not in sample
        assert sample["image"].shape[1:] == found.image_size == found.gt_masks.image_size
        assert len(found) == len(found.gt_masks) == len(found.gt_classes)
        assert found.gt_masks.tensor.flatten(1).any(dim=1).all()
        if len(found):  # none hides another one
            assert torch.equal(found.gt_masks.get_bounding_boxes().tensor, found.gt_boxes.tensor)
    # Without masks for the model, all else is the same.
    for sample, other in zip(samples, stream(folder, CopyPaste(keep_masks=False), 24), strict=True):
        assert not other["instances"].has("gt_masks")
        assert torch.equal(sample["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor)
        assert torch.equal(sample["image"], other["image"])


def test_data_without_masks_are_loaded_as_without_pasting(folder):
    content = json.loads((folder / "train.json").read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    write(folder, content)
    assert all(map(is_same, stream(folder, PASTES), stream(folder, None)))


def test_what_is_not_pasted_into_is_what_the_mapper_gives(folder):
    """But for roundings of pixels."""
    nothing = CopyPaste(max_pasted=1, keep_masks=True)
    for one, other in zip(stream(folder, nothing), stream(folder, None), strict=True):
        assert (one["image"].int() - other["image"].int()).abs().max() <= 2  # roundings
        assert one.keys() == other.keys()
        if len(other["instances"]):
            assert all(map(torch.equal, values_of(one), values_of(other)))


@pytest.mark.parametrize("size", [(60, 60), (50, 70), (40, 40)])
def test_a_scene_grows_to_the_image_that_objects_are_from(size):
    image = torch.full((3, 50, 60), 7, dtype=torch.uint8)
    masks = np.zeros((1, 50, 60), bool)
    masks[0, 3:9, 2:8] = True
    boxes = Boxes(torch.tensor([[2.0, 3, 8, 9]]))
    classes = torch.tensor([4])
    scene = Scene(image, Instances((50, 60), gt_boxes=boxes, gt_classes=classes))
    scene.instances.gt_masks = CroppedMasks.of_bitmaps(masks, (50, 60))
    pasted = np.zeros((1, *size), bool)
    pasted[0, 30:, 30:] = True
    objects = Instances(size, gt_boxes=boxes, gt_classes=classes)
    objects.gt_masks = CroppedMasks.of_bitmaps(pasted, size)
    source = torch.full((3, *size), 200, dtype=torch.uint8)
    found = paste(scene, objects, lambda window: source[(..., *window)], pad_value=114)
    height, width = max(50, size[0]), max(60, size[1])
    expected = torch.full((3, height, width), 114, dtype=torch.uint8)
    expected[:, :50, :60] = 7
    expected[:, 30 : size[0], 30 : size[1]] = 200
    assert torch.equal(found.image, expected) and found.instances.image_size == (height, width)
    whole = found.instances.gt_masks.whole().tensor
    assert whole.shape[1:] == (height, width)
    assert whole.sum(dim=(1, 2)).tolist() == [36, pasted.sum()]
    assert (image == 7).all()  # as it was
    assert scene.instances.gt_masks.patches[0].pixels.sum() == 36


class Lighter(T.Augmentation):
    """No resize, crop or mirror: it has to see the pixels."""

    def get_transform(self, image):
        added = np.random.randint(20, 60)

        class Add(T.Transform):
            def apply_image(self, pixels):
                return np.minimum(pixels.astype(int) + added, 255).astype(np.uint8)

            def apply_segmentation(self, mask):
                return mask

            def apply_coords(self, coords):
                return coords

        return Add()


@pytest.mark.parametrize(
    "steps",
    [
        lsj_train_augmentation(SQUARE),
        [*lsj_train_augmentation(SQUARE), T.RandomFlip(vertical=True, horizontal=False)],
        detr_train_augmentation((30, 60), crop_short_edges=(40, 70), crop_size=(20, 50)),
        [T.RandomFlip(), T.RandomCrop("absolute", (30, 30)), T.RandomContrast(0.5, 0.9)],
        [T.RandomFlip(), Lighter()],
    ],
    ids=["lsj", "vertical", "detr", "no resize", "pixels"],
)
def test_a_source_is_what_the_mapper_makes_of_the_image(folder, steps):
    record = records(folder)[1]
    mapper = mapper_of(*steps)
    for seed in range(8):
        with locally_seeded("source", seed):
            source = draw_source(records(folder)[1], mapper)
        with locally_seeded("source", seed):
            sample = mapper(record)
        instances = sample["instances"]
        assert source.instances.image_size == instances.image_size
        assert torch.equal(source.instances.gt_boxes.tensor, instances.gt_boxes.tensor)
        assert torch.equal(source.instances.gt_masks.whole().tensor, instances.gt_masks.tensor)
        height, width = instances.image_size
        window = slice(height // 3, height), slice(width // 4, -(-3 * width // 4))
        found = source.pixels(window).int()
        assert (found - sample["image"][(..., *window)].int()).abs().max() <= 2  # roundings


def test_windows_are_exact_without_a_resize():
    rgb = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    steps = [T.CropTransform(4, 3, 20, 15), T.HFlipTransform(20), T.VFlipTransform(15)]
    transforms = T.TransformList(steps)
    window = slice(2, 9), slice(5, 17)
    assert (window_of(rgb, transforms, window) == transforms.apply_image(rgb)[window]).all()


def test_a_second_image_that_is_broken_is_named(folder):
    mapper = mapper_of()
    every = records(folder)
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png cannot be decoded"):
        for seed in range(20):
            with locally_seeded(seed):
                PASTES(every[0], every[1:2], mapper)


def test_numbers_of_objects_are_even():
    draw = CopyPaste(max_pasted=4).draw
    with locally_seeded("numbers"):
        counts = np.bincount([len(draw(10)) for _ in range(800)], minlength=5)
        all_of_two = {tuple(draw(2)) for _ in range(60)}
    assert counts[4] == 0 and counts[:4].min() > 150
    assert all_of_two == {(), (0,), (1,), (0, 1), (1, 0)}
    assert len(draw(0)) == 0


def test_pasted_objects_keep_their_weights(folder):
    content = json.loads((folder / "train.json").read_text())
    for entry in content["annotations"][::2]:
        entry["score"] = 0.5
    content["annotations"] = [e for e in content["annotations"] if e["image_id"] != 3]
    write(folder, content)
    found = load_coco(str(folder / "train.json"), str(folder), with_masks=True, score_weights=True)
    # Mirrored objects lie beside those of the scene.
    mappers, seen = (mapper_of(T.NoOpTransform()), mapper_of(T.RandomFlip(prob=1.0))), 0
    for scene in found:
        for source in found:
            one, other = map(draw_source, (scene, source), mappers)
            if not len(one.instances):
                one.instances.gt_masks = CroppedMasks.placed(one.instances.image_size, ())
            if not len(other.instances):
                continue
            pasted = paste(Scene(one.whole(), one.instances), other.instances, other.pixels)
            weights = pasted.instances.gt_weights
            assert weights[-len(other.instances) :].equal(other.instances.gt_weights)
            left = len(weights) - len(other.instances)
            assert left == len(one.instances)
            assert not left or weights[:left].equal(one.instances.gt_weights)
            seen += left
    assert seen
