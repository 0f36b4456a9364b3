"""Detectron2's mapper, which reads images as the rest of the project and names those that fail."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import Image

from co_detr.data.augmentation import augment
from co_detr.data.images import ImageReader
from co_detr.errors import ConfigError, DataError


class CheckedDatasetMapper(DatasetMapper):
    """`DatasetMapper` for data sets made of `load_coco`.

    Args:
        is_train: whether to keep the annotations.
        augmentations: what is done to images and boxes, in order.
        image_format: "RGB" or "BGR", the colour order of the model.
        reader: opens the images; None: one with its defaults.
        use_instance_mask: whether to keep masks, as polygons.
        recompute_boxes: whether boxes are drawn anew around the masks that a crop leaves.
    """

    def __init__(
        self,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        reader: ImageReader | None = None,
        use_instance_mask: bool = False,
        recompute_boxes: bool = False,
    ) -> None:
        super().__init__(
            is_train,
            augmentations=augmentations,
            image_format=image_format,
            use_instance_mask=use_instance_mask,
            recompute_boxes=recompute_boxes,
        )
        self.reader = reader or ImageReader()

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Reads and augments one image.

        Returns:
            `dataset_dict` with `image`, ``(3, h, w)`` uint8; in training with `instances` in place
            of `annotations`, otherwise without them.

        Raises:
            DataError: if the image cannot be read or has another size than annotated.
            ConfigError: if masks are to be cropped and a package for it is missing.
        """
        sample = copy.deepcopy(dataset_dict)  # which belongs to the data set
        path = sample["file_name"]
        rgb = self.reader.read_rgb(path)
        _require_size(path, sample, rgb)
        augmented = T.AugInput(in_format(rgb, self.image_format))
        transforms = augment(augmented, self.augmentations, f"image {path}")
        sample["image"] = as_tensor(augmented.image)
        annotations = sample.get("annotations")
        if not self.is_train:
            sample.pop("annotations", None)
        elif annotations is not None:
            try:
                self._transform_annotations(sample, transforms, augmented.image.shape[:2])
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "shapely":
                    raise
                raise ConfigError(
                    "cropping images with masks needs the package shapely: pip install shapely, or "
                    "set dataloader.train.mapper.augmentations.crop_probability=0."
                ) from error
        return sample


def in_format(rgb: np.ndarray, image_format: str) -> np.ndarray:
    """Pixels ``(H, W, 3)`` uint8 in the colour order of a config's ``data.image_format``."""
    if image_format == "RGB":
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
