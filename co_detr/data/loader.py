"""From records of a data set to batches: images are read, augmented, and put in an order.

The content of a training batch depends on the seed and the iteration only. Detectron2's loader
buffers samples by aspect ratio and lets every worker shard an endless stream, so the sample that
comes next depends on what was loaded before. Here the stream, the grouping and the split over
processes are planned from the images' sizes alone; a plan is cheap to replay, so training resumes
at any iteration exactly, and any number of processes, images at a time or loading workers sees the
same images, augmented the same way, in the same iteration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from co_detr.data.augmentation import Variation
from co_detr.data.images import ImageReader
from co_detr.data.masks import transformed_masks
from co_detr.errors import ConfigError, DataError, first_line
from co_detr.process_setup import outlive_signals
from co_detr.seeding import locally_seeded, mix_seed

if TYPE_CHECKING:
    from co_detr.data.copy_paste import CopyPaste
    from co_detr.data.mixing import Mixing

logger = logging.getLogger(__name__)


class CheckedDatasetMapper(DatasetMapper):
    """`DatasetMapper` for data sets made of `load_coco`.

    Args:
        is_train: whether to keep the annotations.
        augmentations: what is done to images and boxes, in order.
        image_format: "RGB" or "BGR", the color order of the model.
        reader: opens the images; None: one with its defaults.
        recompute_boxes: whether boxes are drawn anew around what is left of the masks, where there
            are some.
        variation: more that is done to training images; None: nothing.
    """

    def __init__(
        self,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        reader: ImageReader | None = None,
        recompute_boxes: bool = False,
        variation: Variation | None = None,
    ) -> None:
        if variation is not None:
            augmentations = [*variation.before(), *augmentations, *variation.behind()]
        super().__init__(is_train, augmentations=augmentations, image_format=image_format)
        self.reader = reader or ImageReader()
        self.recompute_boxes = recompute_boxes

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Reads and augments one image.

        Returns:
            `dataset_dict` with `image`, ``(3, h, w)`` uint8; in training with `instances` in place
            of `annotations`, otherwise without them. These have `gt_masks` (BitMasks) if all
            objects of the image have a mask, and `gt_weights` (float32) if one has a `weight`.

        Raises:
            DataError: if the image cannot be read or has another size than annotated.
        """
        sample = dict(dataset_dict)
        augmented = T.AugInput(self.read(sample))
        transforms = augment(augmented, self.augmentations, f"image {sample['file_name']}")
        sample["image"] = as_tensor(augmented.image)
        annotations = sample.pop("annotations", None)
        if self.is_train and annotations is not None:
            before = (sample["height"], sample["width"])
            after = augmented.image.shape[:2]
            objects = self.objects(annotations, before, transforms, after)
            sample["instances"] = with_whole_masks(objects)
        return sample

    def read(self, record: dict[str, Any]) -> np.ndarray:
        """The pixels ``(H, W, C)`` of a record, in the color order of the model."""
        rgb = self.reader.read_rgb(record["file_name"])
        _require_size(record["file_name"], record, rgb)
        return in_format(rgb, self.image_format)

    def objects(
        self,
        annotations: list[dict[str, Any]],
        before: tuple[int, int],
        transforms: T.TransformList,
        after: tuple[int, int],
    ) -> Instances:
        """What can be learned of an augmented image: crowds, and objects that do not show, cannot.

        Args:
            annotations: of the image; all have one `bbox_mode`.
            before, after: its (height, width) without and with augmentation.

        Returns:
            with `CroppedMasks` if all objects have a mask, with `gt_weights` if one has a
            `weight`.
        """
        objects = [annotation for annotation in annotations if not annotation.get("iscrowd", 0)]
        masks = [annotation.get("segmentation") for annotation in objects]
        # All boxes at once: one by one, they would take longer than small images.
        boxes = torch.tensor([annotation["bbox"] for annotation in objects], dtype=torch.float32)
        mode = objects[0]["bbox_mode"] if objects else BoxMode.XYXY_ABS
        boxes = BoxMode.convert(boxes.reshape(-1, 4), BoxMode(mode), BoxMode.XYXY_ABS)
        boxes = transforms.apply_box(boxes.double().numpy()).clip(0, (*after[::-1], *after[::-1]))
        classes = torch.tensor(
            [annotation["category_id"] for annotation in objects], dtype=torch.int64
        )
        instances = Instances(after, gt_boxes=Boxes(torch.from_numpy(boxes)), gt_classes=classes)
        if any("weight" in annotation for annotation in objects):
            weights = [annotation.get("weight", 1.0) for annotation in objects]
            instances.gt_weights = torch.tensor(weights, dtype=torch.float32)
        shows = instances.gt_boxes.nonempty(threshold=1e-5)
        if masks and all(mask is not None for mask in masks):
            instances.gt_masks = transformed_masks(masks, before, transforms)
            around = instances.gt_masks.boxes()
            shows &= around.nonempty()
            if self.recompute_boxes:
                instances.gt_boxes = around
        return instances[shows]


def with_whole_masks(instances: Instances) -> Instances:
    """With `BitMasks` in place of `CroppedMasks`, if there are masks."""
    if instances.has("gt_masks"):
        instances.gt_masks = instances.gt_masks.whole()
    return instances


def in_format(rgb: np.ndarray, image_format: str) -> np.ndarray:
    """Pixels ``(H, W, C)`` uint8 in the color order of a config's ``data.image_format``.

    Other than three channels have no order but their own.
    """
    if image_format == "RGB" or rgb.shape[2] != 3:
        return rgb
    return convert_PIL_to_numpy(Image.fromarray(rgb), image_format)


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """``(H, W, C)`` -> ``(C, H, W)``, in memory of its own."""
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def _require_size(path: str, sample: dict[str, Any], rgb: np.ndarray) -> None:
    """Also gives a record without a size the image's."""
    height, width = rgb.shape[:2]
    annotated = (sample.setdefault("width", width), sample.setdefault("height", height))
    if annotated != (width, height):
        raise DataError(
            f"image {path} is {width}x{height} but its annotation file says "
            f"{annotated[0]}x{annotated[1]} (width x height): write the true size, or remove a "
            "rotation from the image's EXIF data."
        )


def augment(augmented: T.AugInput, augmentation: T.Augmentation, name: str) -> T.TransformList:
    """Applies an augmentation to `augmented`, in place.

    Args:
        name: of the image, for messages.

    Raises:
        DataError: if the image does not bear it, as some that are very thin.
    """
    height, width = augmented.image.shape[:2]
    try:
        return augmentation(augmented)
    except (ValueError, MemoryError) as error:
        raise DataError(
            f"{name} of {width}x{height} pixels cannot be resized or cropped "
            f"({first_line(error)}): cut it, or leave it out."
        ) from error


@dataclass(frozen=True)
class SampleKey:
    """One element of the endless sample stream.

    Attributes:
        position: in the stream; decides the augmentation.
        index: of the image in the data set.
        iteration: that it is loaded for; until it is in a batch, -1.
    """

    position: int
    index: int
    iteration: int = -1


class BatchPlan(Sampler[list[SampleKey]]):
    """Endless micro-batches of this process, starting at iteration `start_iteration`.

    1. The stream is one shuffle of the data set after the other.
    2. It is cut into batches of `total_batch_size`, each from one group (landscape or portrait,
       which need less padding together) if `groups` is given.
    3. Process r of n takes every n-th sample from the r-th on, `images_per_gpu` at a time.

    Args:
        total_batch_size: images per optimizer step, over all processes and micro-batches.
        images_per_gpu: images of a micro-batch; None: the whole share of the process.

    Attributes:
        accumulation_steps: micro-batches per optimizer step, which follow from the rest.

    Raises:
        ConfigError: if a batch cannot be divided evenly.
    """

    def __init__(
        self,
        size: int,
        total_batch_size: int,
        *,
        seed: int,
        images_per_gpu: int | None = None,
        groups: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if total_batch_size < 1 or total_batch_size % world_size:
            raise ConfigError(
                f"train.effective_batch_size={total_batch_size} cannot be split evenly over "
                f"{world_size} process(es): set it to a multiple of {world_size}, or start another "
                "number of processes."
            )
        share = total_batch_size // world_size
        images_per_gpu = share if images_per_gpu is None else images_per_gpu
        if images_per_gpu < 1 or share % images_per_gpu:
            fitting = [str(n) for n in range(1, share + 1) if share % n == 0]
            raise ConfigError(
                f"train.images_per_gpu={images_per_gpu} does not divide the {share} images that "
                f"each of {world_size} process(es) has of train.effective_batch_size="
                f"{total_batch_size}: set it to {' or '.join(fitting)}."
            )
        self.size = size
        self.total_batch_size = total_batch_size
        self.seed = seed
        self.images_per_gpu = images_per_gpu
        self.accumulation_steps = share // images_per_gpu
        self.groups = groups
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = 0

    def __iter__(self) -> Iterator[list[SampleKey]]:
        first = self.start_iteration
        for iteration, batch in enumerate(islice(self._batches(), first, None), first):
            mine = [
                replace(key, iteration=iteration) for key in batch[self.rank :: self.world_size]
            ]
            for start in range(0, len(mine), self.images_per_gpu):
                yield mine[start : start + self.images_per_gpu]

    def text(self) -> str:
        """How a batch is made, in one line."""
        return (
            f"{self.total_batch_size} images per step: {self.world_size} process(es) x "
            f"{self.accumulation_steps} accumulation step(s) x {self.images_per_gpu} image(s)"
        )

    def state_dict(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "size": self.size,
            "total_batch_size": self.total_batch_size,
        }

    def resume(self, state: dict[str, int], start_iteration: int) -> None:
        """Continues at `start_iteration`; warns if the saved plan had other settings."""
        self.start_iteration = start_iteration
        changed = [key for key, value in self.state_dict().items() if state.get(key) != value]
        if changed:
            logger.warning(
                "Resuming with another %s than the checkpoint was trained with: the order of "
                "the images is not the one of the interrupted run.",
                " and ".join(changed),
            )

    def _batches(self) -> Iterator[list[SampleKey]]:
        groups: dict[int, list[SampleKey]] = {}
        for key in self._stream():
            group = groups.setdefault(0 if self.groups is None else self.groups[key.index], [])
            group.append(key)
            if len(group) == self.total_batch_size:
                yield group.copy()
                group.clear()

    def _stream(self) -> Iterator[SampleKey]:
        generator = torch.Generator().manual_seed(mix_seed("shuffle", self.seed))
        position = 0
        while True:
            for index in torch.randperm(self.size, generator=generator).tolist():
                yield SampleKey(position, index)
                position += 1


class SeededDataset(Dataset[dict[str, Any]]):
    """Maps a `SampleKey` to a mapped sample whose augmentation depends on the key alone."""

    def __init__(
        self,
        records: DatasetFromList,
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        seed: int,
        copy_paste: CopyPaste | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        self.records = records
        self.mapper = mapper
        self.seed = seed
        self.copy_paste = copy_paste
        self.mixing = mixing

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        with locally_seeded("sample", self.seed, key.position):
            record = self.records[key.index]
            if self.mixing is not None and key.iteration < self.mixing.stop_iteration:
                return self.mixing(record, self.records, self.mapper, self._unmixed)
            return self._unmixed(record)

    def _unmixed(self, record: dict[str, Any]) -> dict[str, Any]:
        if self.copy_paste is None:
            return self.mapper(record)
        return self.copy_paste(record, self.records, self.mapper)


def build_train_loader(
    dataset: list[dict[str, Any]],
    *,
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    total_batch_size: int,
    seed: int,
    images_per_gpu: int | None = None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    copy_paste: CopyPaste | None = None,
    mixing: Mixing | None = None,
) -> DataLoader:
    """Builds the endless loader of this process's micro-batches (lists of mapped dicts).

    Args:
        dataset: dataset dicts with `width` and `height`.
        mapper: what turns a dataset dict into a model input.
        total_batch_size, images_per_gpu: see `BatchPlan`, which the loader's `batch_sampler` is.
        seed: of the order of the images and of their augmentation.
        aspect_ratio_grouping: whether landscape and portrait images are batched apart.
        num_workers: loading processes; 0 loads in this process. Does not change the batches.
        copy_paste: pastes objects of other images into each; not where the data have no masks.
        mixing: makes samples of several images; an image that it makes a mosaic of gets no pasted
            objects.

    Raises:
        ConfigError: if a batch cannot be divided evenly, or a mapper is to mix that cannot.
    """
    if mixing is not None and not mixing.is_on:
        mixing = None
    if mixing is not None:
        if not isinstance(mapper, CheckedDatasetMapper):
            raise ConfigError(
                "dataloader.train.mixing needs the mapper CheckedDatasetMapper, or one derived "
                "from it: set mosaic and mixup to 0 for another one."
            )
        logger.info("%s", mixing)
    if copy_paste is not None and not any(
        "segmentation" in annotation for record in dataset for annotation in record["annotations"]
    ):
        logger.warning(
            "dataloader.train.copy_paste pastes nothing: no object of the data set has a mask that "
            "is read (dataloader.train.dataset.with_masks)."
        )
        copy_paste = None
    groups = [int(record["width"] > record["height"]) for record in dataset]
    plan = BatchPlan(
        len(dataset),
        total_batch_size,
        seed=seed,
        images_per_gpu=images_per_gpu,
        groups=groups if aspect_ratio_grouping else None,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    return DataLoader(
        SeededDataset(DatasetFromList(dataset, copy=False), mapper, seed, copy_paste, mixing),
        batch_sampler=plan,
        num_workers=num_workers,
        # A step begins with all of its micro-batches: the workers load them during the one before.
        prefetch_factor=max(2, -(-plan.accumulation_steps // num_workers)) if num_workers else None,
        collate_fn=_keep_list,
        worker_init_fn=outlive_signals,
    )


def _keep_list(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return samples
