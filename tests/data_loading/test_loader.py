"""Batches depend on the seed and the iteration, and on nothing else."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from co_detr.data.augmentation import detr_test_augmentation, detr_train_augmentation
from co_detr.data.loader import BatchPlan, build_train_loader
from co_detr.errors import ConfigError
from co_detr.seeding import locally_seeded


def _take(plan, count):
    return list(islice(plan, count))


def test_each_image_once_per_epoch():
    batches = _take(BatchPlan(12, 4, seed=1), 6)
    indices = [key.index for batch in batches for key in batch]
    assert sorted(indices[:12]) == sorted(indices[12:]) == list(range(12))
    assert indices[:12] != indices[12:]
    assert [key.position for batch in batches for key in batch] == list(range(24))


def test_seed_decides_the_order():
    assert _take(BatchPlan(12, 4, seed=1), 3) == _take(BatchPlan(12, 4, seed=1), 3)
    assert _take(BatchPlan(12, 4, seed=1), 3) != _take(BatchPlan(12, 4, seed=2), 3)


def test_batches_are_of_one_group_and_nothing_is_lost():
    groups = [0, 0, 1, 0, 1, 0, 0]
    batches = _take(BatchPlan(7, 2, seed=0, groups=groups), 70)
    for batch in batches:
        assert len({groups[key.index] for key in batch}) == 1
    counts = Counter(key.index for batch in batches for key in batch)
    assert max(counts.values()) - min(counts.values()) <= 2  # what still waits for its batch


@pytest.mark.parametrize("groups", [None, [0, 1] * 6])
def test_start_iteration_skips_exactly(groups):
    whole = _take(BatchPlan(12, 4, seed=1, groups=groups, images_per_gpu=2), 20)
    later = BatchPlan(12, 4, seed=1, groups=groups, images_per_gpu=2)
    later.start_iteration = 3
    assert _take(later, 14) == whole[6:]


@pytest.mark.parametrize(("world_size", "steps"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_processes_and_micro_batches_share_the_same_batch(world_size, steps):
    groups = [0, 1, 1] * 4
    whole = _take(BatchPlan(12, 4, seed=1, groups=groups), 5)
    plans = [
        BatchPlan(
            12,
            4,
            seed=1,
            groups=groups,
            images_per_gpu=4 // (world_size * steps),
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    assert {plan.accumulation_steps for plan in plans} == {steps}
    parts = [_take(plan, 5 * steps) for plan in plans]
    for i, batch in enumerate(whole):
        keys = [
            key for part in parts for micro in part[i * steps : (i + 1) * steps] for key in micro
        ]
        assert sorted(key.position for key in keys) == sorted(key.position for key in batch)


def test_batch_that_cannot_be_split():
    with pytest.raises(ConfigError, match="effective_batch_size=4 cannot .* multiple of 3"):
        BatchPlan(12, 4, seed=1, world_size=3)
    with pytest.raises(ConfigError, match="the 6 images that each of 2 .* set it to 1 or 2 or 3 o"):
        BatchPlan(12, 12, seed=1, world_size=2, images_per_gpu=4)


def test_a_batch_says_how_it_is_made():
    plan = BatchPlan(12, 16, seed=1, world_size=2, images_per_gpu=2)
    assert plan.text() == "16 images per step: 2 process(es) x 4 accumulation step(s) x 2 image(s)"


def _random_sample(record):
    return {
        "width": record["width"],
        "numbers": (np.random.rand(), torch.rand(()).item(), record["id"]),
    }


def test_workers_and_earlier_draws_do_not_change_the_samples():
    dataset = [{"id": i, "width": 2 + i % 2, "height": 2} for i in range(6)]
    streams = []
    for num_workers in (0, 2):
        torch.rand(num_workers * 3 + 1)
        loader = build_train_loader(
            dataset, mapper=_random_sample, total_batch_size=2, seed=5, num_workers=num_workers
        )
        streams.append([sample["numbers"] for batch in islice(loader, 6) for sample in batch])
    assert streams[0] == streams[1]
    assert len(set(streams[0])) == 12  # the same image is augmented anew each time


@pytest.mark.parametrize(("images_per_gpu", "prefetched"), [(8, 2), (4, 2), (1, 4)])
def test_workers_load_a_whole_step_in_advance(images_per_gpu, prefetched):
    """A step begins with all of its micro-batches; what is loaded then, everything waits for."""
    loader = build_train_loader(
        [{"id": 0, "width": 2, "height": 2}],
        mapper=_random_sample,
        total_batch_size=8,
        images_per_gpu=images_per_gpu,
        seed=5,
        num_workers=2,
    )
    assert loader.prefetch_factor == prefetched


def test_local_seed_leaves_the_generators_alone():
    torch.manual_seed(3)
    np.random.seed(3)
    expected = (torch.rand(()).item(), np.random.rand())
    torch.manual_seed(3)
    np.random.seed(3)
    with locally_seeded("x", 1):
        torch.rand(5), np.random.rand(5)
    assert (torch.rand(()).item(), np.random.rand()) == expected


def _shape_after(augmentation, image):
    import detectron2.data.transforms as T

    augmentations = T.AugmentationList(augmentation)
    inputs = T.AugInput(image)
    augmentations(inputs)
    return inputs.image.shape[:2]


def test_detr_augmentation_sizes():
    image = np.zeros((480, 640, 3), np.uint8)
    np.random.seed(0)
    shapes = [_shape_after(detr_train_augmentation(), image) for _ in range(60)]
    uncropped = [
        _shape_after(detr_train_augmentation(crop_probability=0.0), image) for _ in range(60)
    ]
    assert {min(shape) for shape in uncropped} <= set(range(480, 801, 32))
    assert all(abs(width / height - 4 / 3) < 0.01 for height, width in uncropped)
    assert all(max(shape) <= 1333 for shape in shapes)
    # cropping changes the aspect ratio of about half of the images
    changed = sum(abs(width / height - 4 / 3) > 0.01 for height, width in shapes)
    assert 15 < changed < 45


def test_test_augmentation_limits_the_longer_side():
    assert _shape_after(detr_test_augmentation(), np.zeros((480, 640, 3), np.uint8)) == (800, 1067)
    assert _shape_after(detr_test_augmentation(), np.zeros((200, 800, 3), np.uint8)) == (333, 1333)
