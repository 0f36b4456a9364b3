"""The output folder of a prediction run: pictures or videos, and one json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.structures import Instances
from PIL import Image

from co_detr.errors import ConfigError
from co_detr.prediction.results import CocoResults
from co_detr.tools.draw.boxes import Box, class_colours, draw_picture
from co_detr.tools.draw.fonts import fonts_for

JSON = "predictions.json"
_JPEG_QUALITY = 92


class OutputFolder:
    """Draws detections and collects them for ``predictions.json``.

    Raises:
        ConfigError: if the folder cannot be made.
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the output folder {folder} cannot be made ({error.strerror}): choose another "
                "--output."
            ) from error
        self.folder = folder
        self.results = CocoResults(class_names)
        self._names = list(class_names)
        fonts_for("".join(class_names))  # warns of all letters without a font at once
        self._colours = class_colours(class_names)
        self._taken: set[str] = set()

    def add_image(self, image_id: int, path: Path, rgb: np.ndarray, found: Instances) -> None:
        """Writes the picture of an image file."""
        name = self.free_name(path, ".jpg")
        self.draw(rgb, found).save(self.folder / name, quality=_JPEG_QUALITY)
        self.results.add(image_id, str(path), found, picture=name)

    def draw(self, rgb: np.ndarray, found: Instances) -> Image.Image:
        """The picture of an image ``(H, W, 3)`` uint8 RGB with detections in its pixels."""
        boxes = [
            Box((x0, y0, x1 - x0, y1 - y0), self._names[label], score)
            for (x0, y0, x1, y1), label, score in zip(
                found.pred_boxes.tensor.tolist(),
                found.pred_classes.tolist(),
                found.scores.tolist(),
                strict=True,
            )
        ]
        return draw_picture(rgb, boxes, self._colours)

    def free_name(self, path: Path, suffix: str) -> str:
        """A file name like that of `path`, with a number if another input had the same."""
        name, number = f"{path.stem}{suffix}", 1
        while name.casefold() in self._taken:  # some systems do not tell A.jpg from a.jpg
            number += 1
            name = f"{path.stem}_{number}{suffix}"
        self._taken.add(name.casefold())
        return name

    def save(self) -> Path:
        """Writes the json of all that was added."""
        path = self.folder / JSON
        self.results.save(path)
        return path
