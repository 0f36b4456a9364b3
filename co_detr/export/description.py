"""What an exported file says about itself, as text under a few keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from co_detr.data.augmentation import ResizeShortestEdge
from co_detr.errors import ExportError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SoftNMS:
    """Arguments of `SoftNMSPostprocessor`, which runs behind the graph."""

    max_detections: int
    iou_threshold: float
    min_score: float
    sigma: float | None


@dataclass(frozen=True)
class Description:
    """How an exported file is to be fed and read.

    Attributes:
        config: name of the config file.
        class_names: in the order of the labels.
        short_edge: length in pixels that the shorter side of an image is resized to.
        max_size: upper limit of the longer side in pixels.
        image_size: (height, width) of every input, one at a time; None: any, in batches, too.
        min_side: smallest height and width of an input in pixels, where they are free.
        custom_operator: whether the file needs this package to be loaded.
        soft_nms: what follows the graph; None: nothing does.
        value_range: the values that become 0 and 255, of images with more than 8 bits per channel;
            None: the range of their type.
        format_version: of these keys and of the inputs and outputs.
    """

    config: str
    class_names: list[str]
    short_edge: int
    max_size: int
    image_size: tuple[int, int] | None = None
    min_side: int = 1
    custom_operator: bool = False
    soft_nms: SoftNMS | None = None
    value_range: tuple[float, float] | None = None
    format_version: int = FORMAT_VERSION

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is resized to: as in the evaluation, but so that it fits
        into `image_size`."""
        shape = ResizeShortestEdge.get_output_shape(height, width, self.short_edge, self.max_size)
        if self.image_size is None:
            return shape
        factor = min(limit / side for limit, side in zip(self.image_size, shape, strict=True))
        if factor >= 1:
            return shape
        return tuple(
            max(1, min(limit, int(side * factor + 0.5)))
            for limit, side in zip(self.image_size, shape, strict=True)
        )

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the input that a resized image becomes."""
        if self.image_size is not None:
            return self.image_size
        return max(height, self.min_side), max(width, self.min_side)

    def to_text(self) -> dict[str, str]:
        """Every attribute as JSON."""
        return {key: json.dumps(value) for key, value in asdict(self).items()}

    @classmethod
    def from_text(cls, text: Mapping[str, str], path: str) -> Description:
        """The reverse of `to_text`; other keys are passed over.

        Raises:
            ExportError: if keys are missing, or the file `path` is of another format version.
        """
        version = text.get("format_version", "")
        if version not in ("", str(FORMAT_VERSION)):
            raise ExportError(
                f"{path} has format version {version}, this version of co_detr reads "
                f"{FORMAT_VERSION}: export the model again."
            )
        try:
            # Files that were written before there was a range have none.
            complete = {"value_range": "null", **text}
            values = {each.name: json.loads(complete[each.name]) for each in fields(cls)}
        except (KeyError, ValueError) as error:
            raise ExportError(
                f"{path} does not describe itself ({error}): export the model with tools/export.py."
            ) from error
        if values["image_size"] is not None:
            values["image_size"] = tuple(values["image_size"])
        if values["value_range"] is not None:
            values["value_range"] = tuple(values["value_range"])
        if values["soft_nms"] is not None:
            values["soft_nms"] = SoftNMS(**values["soft_nms"])
        return cls(**values)
