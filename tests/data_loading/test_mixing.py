"""Mosaic, MixUp, flips and turns: boxes and masks go where the pixels go, until an iteration."""

from dataclasses import dataclass
from itertools import islice

import detectron2.data.transforms as T
import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch
from detectron2.structures import BoxMode

from co_detr.data.augmentation import Variation
from co_detr.data.copy_paste import CopyPaste
from co_detr.data.loader import CheckedDatasetMapper, build_train_loader
from co_detr.data.mixing import Mixing, half_and_half
from co_detr.engine.config import load_config
from co_detr.errors import ConfigError
from co_detr.seeding import locally_seeded
from tests.paths import config_path

SIZES = [(50, 60), (66, 40), (48, 48), (30, 90), (72, 54), (41, 63)]  # (height, width)
MOSAIC = Mixing(mosaic=1.0, size=48, max_iter=100, until=1.0)


def make_records():
    """Images with two objects each: one has a polygon, the other run lengths."""
    records = []
    for index, (height, width) in enumerate(SIZES):
        annotations = []
        for place in range(2):
            x, y = 3 + 5 * index % 20 + 14 * place, 4 + 7 * place
            w, h = 11 + index, 9 + 2 * index - 3 * place
            if place:
                bitmap = np.zeros((height, width), np.uint8, order="F")
                bitmap[y : y + h, x : x + w] = 1
                mask = mask_utils.encode(bitmap)
                mask["counts"] = mask["counts"].decode()
            else:
                mask = [np.array([x, y, x + w, y, x + w, y + h, x, y + h], float)]
            entry = {
                "bbox": [float(side) for side in (x, y, w, h)],
                "bbox_mode": BoxMode.XYWH_ABS,
                "iscrowd": 0,
            }
            annotations.append(entry | {"category_id": 2 * index + place, "segmentation": mask})
        record = {"file_name": str(index), "height": height, "width": width}
        records.append(record | {"image_id": index, "annotations": annotations})
    return records


RECORDS = make_records()


@dataclass(frozen=True)
class Painter:
    """Reads a record as a black image on which objects of these classes are painted, in a channel
    each; without classes, as noise."""

    classes: tuple[int, ...] = ()

    def read_rgb(self, name):
        record = RECORDS[int(name)]
        size = record["height"], record["width"]
        if not self.classes:
            return np.random.default_rng(int(name)).integers(0, 255, (*size, 3), dtype=np.uint8)
        image = np.zeros((*size, 3), np.uint8)
        for entry in record["annotations"]:
            if entry["category_id"] in self.classes:
                x, y, w, h = map(int, entry["bbox"])
                image[y : y + h, x : x + w, self.classes.index(entry["category_id"])] = 255
        return image


def mapper_of(painter, variation, *augmentations):
    return CheckedDatasetMapper(True, augmentations, "RGB", reader=painter, variation=variation)


class Recorder(CheckedDatasetMapper):
    """Keeps which images a sample is made of."""

    def objects(self, annotations, before, transforms, after):
        self.used.append(annotations[0]["category_id"] // 2)
        return super().objects(annotations, before, transforms, after)


def test_boxes_and_masks_are_where_their_objects_show():
    """Every object is painted as an image of its own, which goes through the same transforms."""
    # One object of each image: a polygon in every second one, run lengths in the others.
    records = [
        record | {"annotations": [record["annotations"][index % 2]]}
        for index, record in enumerate(RECORDS)
    ]
    classes = [record["annotations"][0]["category_id"] for record in records]
    mixing = Mixing(mosaic=0.5, mixup=0.4, size=56, pad_value=0, keep_masks=True)
    steps = (
        T.RandomFlip(),
        T.RandomApply(T.RandomCrop("absolute_range", (30, 45)), prob=0.4),
        T.ResizeShortestEdge((40, 52, 70), 110, "choice"),
    )
    turns = Variation(vertical_flip=0.5, quarter_turns=0.5)
    mappers = [
        Recorder(True, [*turns.before(), *steps], "RGB", reader=Painter(tuple(classes[first:][:3])))
        for first in (0, 3)
    ]
    boxes_compared = masks_compared = mixed = 0
    for seed in range(500):
        samples = []
        for mapper in mappers:
            mapper.used = []
            with locally_seeded("paint", seed):
                record = records[seed % len(records)]
                samples.append(mixing(record, records, mapper, mapper))
        painted = torch.cat([sample["image"] for sample in samples]).numpy()
        found = samples[0]["instances"]
        assert found.image_size == painted.shape[1:]
        mixed += len(mapper.used) > 1
        for name, values in zip(classes, painted, strict=True):
            mine = found[found.gt_classes == name]
            if mapper.used.count(name // 2) > 1:  # an image that is mixed with itself
                continue
            assert len(mine) <= 1
            # A last pixel may be too thin for the mask, or be blurred where the image is enlarged.
            bright = values >= max(int(values.max()), 100) / 2
            sides = [int(bright.any(axis=axis).sum()) for axis in (0, 1)]
            assert len(mine) or min(sides) <= 3, (seed, name)
            if min(sides) <= 3:
                continue
            rows, columns = np.nonzero(bright)
            shown = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            box = mine.gt_boxes.tensor[0].tolist()
            assert np.abs(np.subtract(box, shown)).max() <= 2, (seed, name)
            boxes_compared += 1
            if bright.sum() >= 200:
                mask = mine.gt_masks.tensor[0].numpy()
                # Its pixels are the nearest ones, of two resizes one after the other.
                assert (mask & bright).sum() / (mask | bright).sum() > 0.6, (seed, name)
                masks_compared += 1
    assert boxes_compared > 400 and masks_compared > 150 and mixed > 250


def test_weights_stay_with_their_objects():
    """Every class has one weight; images that are put together have few of them each."""
    records = [
        record
        | {
            "annotations": [
                entry | {"weight": (entry["category_id"] + 1) / 20}
                for entry in record["annotations"]
            ]
        }
        for record in RECORDS[:-1]
    ]
    records.append(RECORDS[-1] | {"annotations": []})
    for entry in records[1]["annotations"]:
        del entry["weight"]  # as of own labels beside others
    mixing = Mixing(mosaic=0.5, mixup=0.6, size=48, keep_masks=False)
    mapper = mapper_of(Painter(), None, T.RandomFlip(), T.ResizeShortestEdge((40, 60), 99))
    seen = set()
    for seed in range(60):
        with locally_seeded("weights", seed):
            found = mixing(records[seed % 6], records, mapper, mapper)["instances"]
        if len(found):
            own = (found.gt_classes == 2) | (found.gt_classes == 3)
            expected = torch.where(own, 1.0, (found.gt_classes + 1) / 20)
            if not found.has("gt_weights"):
                assert own.all()
                continue
            torch.testing.assert_close(found.gt_weights, expected)
        seen |= set(found.gt_classes.tolist())
    assert len(seen) == 10


def test_a_whole_mosaic_is_four_images_around_a_point():
    """Without a cut, by mmdet's rule."""
    records = make_records()
    mapper = mapper_of(Painter(), None)
    whole = Mixing(mosaic=1.0, size=48, shown=(1.0, 1.0))
    with locally_seeded("mosaic"):
        sample = whole.draw_mosaic([records[2]] * 4, mapper)  # of 48x48: nothing is resized
    with locally_seeded("mosaic"):
        x, y = (np.random.uniform(0.5, 1.5, 2) * 48).round().astype(int)
    expected = np.full((96, 96, 3), 114, np.uint8)
    image = Painter().read_rgb("2")
    left, top = max(x - 48, 0), max(y - 48, 0)
    right, bottom = min(x + 48, 96), min(y + 48, 96)
    expected[top:y, left:x] = image[48 - (y - top) :, 48 - (x - left) :]
    expected[top:y, x:right] = image[48 - (y - top) :, : right - x]
    expected[y:bottom, left:x] = image[: bottom - y, 48 - (x - left) :]
    expected[y:bottom, x:right] = image[: bottom - y, : right - x]
    assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), expected)
    assert sample["file_name"] == "2" and "annotations" not in sample


def test_mixup_blends_half_and_half():
    one, other = torch.meshgrid(*(torch.arange(256),) * 2, indexing="ij")
    blended = half_and_half(one.to(torch.uint8), other.to(torch.uint8))
    assert torch.equal(blended.int(), (one + other) // 2)
    records, mapper = make_records(), mapper_of(Painter(), None)
    with locally_seeded("mixup"):
        mixed = Mixing(mixup=1.0).mix(mapper(records[2]), records[2], mapper)  # of equal size
    assert torch.equal(mixed["image"], mapper(records[2])["image"])
    assert mixed["instances"].gt_classes.tolist() == [4, 5, 4, 5]
    assert torch.equal(mixed["instances"].gt_masks.tensor[0], mixed["instances"].gt_masks.tensor[2])


def stream(mixing, count, start=0, mapper=None, **settings):
    loader = build_train_loader(
        make_records(),
        mapper=mapper or mapper_of(Painter(), None, T.ResizeShortestEdge((40, 52), 90, "choice")),
        total_batch_size=4,
        seed=3,
        mixing=mixing,
        **settings,
    )
    loader.batch_sampler.start_iteration = start
    steps = loader.batch_sampler.accumulation_steps
    parts = list(islice(loader, count * steps))
    return [sum(parts[i * steps : (i + 1) * steps], []) for i in range(count)]


def is_same(one, other):
    return torch.equal(one["image"], other["image"]) and torch.equal(
        one["instances"].gt_boxes.tensor, other["instances"].gt_boxes.tensor
    )


def equal_batches(some, others):
    return [all(map(is_same, one, other)) for one, other in zip(some, others, strict=True)]


def test_single_images_come_back_at_the_iteration_whatever_loads_them():
    mixing = Mixing(mosaic=0.6, mixup=0.6, size=48, until=0.5, max_iter=8)
    assert mixing.stop_iteration == 4 and "from iteration 4 of 8 on" in str(mixing)
    plain, mixed = stream(None, 8), stream(mixing, 8)
    assert equal_batches(plain, mixed) == [False] * 4 + [True] * 4
    workers = stream(mixing, 8, num_workers=2, images_per_gpu=2)  # accumulated twice
    assert all(equal_batches(mixed, workers))
    assert all(equal_batches(mixed[3:6], stream(mixing, 3, start=3, images_per_gpu=1)))


def test_what_is_off_changes_nothing():
    cfg = load_config(config_path("co_detr_r50"))
    node = cfg.dataloader.train
    off = Mixing(**{key: node.mixing[key] for key in ("mosaic", "mixup")}, max_iter=8)
    steps = (T.ResizeShortestEdge((40, 52), 90, "choice"), T.RandomFlip())
    plain = stream(None, 2, mapper=mapper_of(Painter(), None, *steps))
    assert all(
        equal_batches(plain, stream(off, 2, mapper=mapper_of(Painter(), Variation(), *steps)))
    )


def test_masks_are_kept_for_a_model_that_learns_them_only():
    cfg = load_config(config_path("co_detr_r50"))
    assert cfg.dataloader.train.mixing.keep_masks is False
    assert load_config(config_path("co_detr_r50_instance")).dataloader.train.mixing.keep_masks
    records, mapper = make_records(), mapper_of(Painter(), None)
    paste = CopyPaste(keep_masks=True)
    for keep in (False, True):
        mixing = Mixing(mosaic=0.5, mixup=1.0, size=48, keep_masks=keep)
        for seed in range(6):
            with locally_seeded(seed):
                found = mixing(
                    records[0], records, mapper, lambda record: paste(record, records, mapper)
                )["instances"]
            assert found.has("gt_masks") == (keep and len(found) > 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mosaic": 1.5}, "mixing.mosaic=1.5 must be from 0 to 1"),
        ({"size": 1}, "mixing.size=1 must be a whole number of at least 2"),
        ({"shown": (0.0, 1.0)}, r"mixing.shown=\(0.0, 1.0\) must be the smallest"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(ConfigError, match=says):
        Mixing(**settings)


def test_another_mapper_is_refused():
    with pytest.raises(ConfigError, match="mixing needs the mapper CheckedDatasetMapper"):
        stream(MOSAIC, 1, mapper=dict)
