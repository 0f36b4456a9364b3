"""From the bytes of an image file to what the page shows."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from co_detr.data.images import is_deep, orientation_of
from co_detr.errors import DataError
from co_detr.tools.predict.files import CocoResults
from co_detr.tools.predict.predictor import Predictor

_JPEG_QUALITY = 92
# What strangers may send: decoders that are much used and kept safe; none of them
# starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


@dataclass(frozen=True)
class Upload:
    """An image file of a browser.

    Attributes:
        name: of the file, for messages and the json.
        content: its bytes.
        shown_size: (width, height) in which the browser can show it; None: it cannot.
    """

    name: str
    content: bytes
    shown_size: tuple[int, int] | None


@dataclass(frozen=True)
class Detection:
    """What was found in an image.

    Attributes:
        coco: an annotation file with scores, of one image; see `CocoResults`.
        seconds: what the model took.
        picture: the image as the model saw it, as a data URL; None: the browser shows it so.
    """

    coco: dict[str, list[dict[str, Any]]]
    seconds: float
    picture: str | None


class Detector:
    """Detects in one image after the other, in the order in which they come.

    One thread does all of it: images of several users would slow each other down, and each thread
    that calls a model gets a set of worker threads of its own.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._thread = ThreadPoolExecutor(max_workers=1)

    def __call__(self, upload: Upload) -> Detection:
        """Waits for its turn, then detects.

        Raises:
            DataError: if the bytes are no image that can be read.
        """
        return self._thread.submit(self._detect, upload).result()

    def _detect(self, upload: Upload) -> Detection:
        reader = self.predictor.reader
        image = reader.open(io.BytesIO(upload.content), upload.name, FORMATS)
        # The browser knows nothing of the range of values that the model is for.
        scaled = is_deep(image)
        # Some browsers apply the EXIF orientation only to JPEG files.
        turned = image.format != "JPEG" and orientation_of(image) != 1
        try:
            sample = self.predictor.prepare(image)
        except DataError as error:
            raise DataError(f"{upload.name}: {error.sentence}") from error
        start = perf_counter()
        ((_, _, found),) = self.predictor.stream([(None, sample)])
        seconds = perf_counter() - start
        results = CocoResults(self.predictor.class_names)
        results.add(1, upload.name, found)
        height, width = sample.rgb.shape[:2]
        as_shown = upload.shown_size == (width, height) and not (turned or scaled)
        return Detection(results.content(), seconds, None if as_shown else _data_url(sample.rgb))


def _data_url(rgb: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
