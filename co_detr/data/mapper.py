"""Detectron2's mapper with errors that say which image is broken and what to do."""

from __future__ import annotations

from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from co_detr.errors import ConfigError, DataError


class CheckedDatasetMapper(DatasetMapper):
    """`DatasetMapper` (same arguments) for data sets made of `load_coco`."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Reads and augments one image.

        Raises:
            DataError: if the image cannot be decoded or has another size than annotated.
            ConfigError: if masks are to be cropped and a package for it is missing.
        """
        path = dataset_dict["file_name"]
        try:
            return super().__call__(dataset_dict)
        except SizeMismatchError as error:
            with Image.open(path) as image:
                size = f"{image.width}x{image.height}"
            annotated = f"{dataset_dict['width']}x{dataset_dict['height']}"
            raise DataError(
                f"image {path} is {size} but its annotation file says {annotated} (width x "
                "height): write the true size, or remove a rotation from the image's EXIF data."
            ) from error
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "shapely":
                raise
            raise ConfigError(
                "cropping images with masks needs the package shapely: pip install shapely, or set "
                "dataloader.train.mapper.augmentations.crop_probability=0."
            ) from error
        # Pillow reports broken files as OSError, broken PNG chunks as SyntaxError.
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"image {path} cannot be decoded ({error}): replace the file, or remove the "
                "image from the annotation file."
            ) from error
