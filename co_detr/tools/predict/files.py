"""What predict.py does with images and videos: it draws them and hands their detections on.

Files that cannot be read do not stop the others. Videos need OpenCV, which is optional.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.structures import Instances
from detectron2.utils import comm
from PIL import Image
from tqdm import tqdm

from co_detr.errors import ConfigError, DataError
from co_detr.tools.draw.boxes import Box, class_colors, draw_picture
from co_detr.tools.draw.fonts import fonts_for
from co_detr.tools.predict.inputs import ImageInput, PictureNames
from co_detr.tools.predict.predictor import Predictor, Sample
from co_detr.tools.predict.results import Classes, ResultParts

VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"))
_JPEG_QUALITY = 92
_FALLBACK_RATE = 25.0  # frames per second of a video that does not say


def predict_images(
    predictor: Predictor,
    images: Sequence[ImageInput],
    numbers: Sequence[int],
    output: OutputFolder,
) -> None:
    """Draws image files and writes their detections; files that cannot be read do not stop it.

    Args:
        images: of the whole prediction.
        numbers: of those that this process has to do, from 0.
    """
    # The processes have about equal shares, so that one bar stands for all.
    bar = tqdm(total=len(numbers), unit="image", disable=not comm.is_main_process())

    def readable() -> Iterator[tuple[int, Sample]]:
        for number in numbers:
            try:
                sample = predictor.prepare(images[number].path)
                _require_stated_size(images[number], sample.rgb)
            except DataError as error:
                output.results.add_problem(number, error.sentence)
                bar.update()
            else:
                yield number, sample

    with bar:
        for number, sample, found in predictor.stream(readable()):
            output.add_image(number, images[number], sample.rgb, found)
            bar.update()


def _require_stated_size(image: ImageInput, rgb: np.ndarray) -> None:
    size = (rgb.shape[1], rgb.shape[0])
    if image.size is not None and image.size != size:
        raise DataError(
            f"image {image.path} is {size[0]}x{size[1]} but its annotation file says "
            f"{image.size[0]}x{image.size[1]} (width x height): write the true size."
        )


def predict_videos(predictor: Predictor, files: Sequence[Path], output: OutputFolder) -> None:
    """Draws every frame of video files and writes its detections.

    The frames of all videos are numbered on; their entries have ``frame``, from 0 in each video.
    Videos that cannot be read to their end do not stop the others.
    """
    names = PictureNames()
    numbers = itertools.count()
    for path in files:
        try:
            _predict_video(predictor, path, output, names.free(path, ".mp4"), numbers)
        except DataError as error:
            output.results.add_problem(next(numbers), error.sentence)


def _predict_video(
    predictor: Predictor, path: Path, output: OutputFolder, name: str, numbers: Iterator[int]
) -> None:
    reader = VideoReader(path)
    writer = VideoWriter(output.folder / name, reader.rate)
    frames = tqdm(reader, total=reader.num_frames or None, unit="frame", desc=path.name)
    try:
        # All frames have one size, so that they come back in their order.
        for frame, sample, found in predictor.stream(_prepared(predictor, frames)):
            number = next(numbers)
            details = {"frame": frame, "picture": name}
            output.results.add(number, None, str(path), found, **details)
            writer.add(np.asarray(output.draw(sample.rgb, found)))
        reader.require_complete()
    finally:
        frames.close()
        writer.close()


def _prepared(predictor: Predictor, frames: Iterable[np.ndarray]) -> Iterator[tuple[int, Sample]]:
    for number, frame in enumerate(frames):
        yield number, predictor.prepare(frame)


class OutputFolder:
    """Draws detections, and has the results that become ``predictions.json``.

    Args:
        folder: to be made.
        classes: of the detections.
        with_pictures: whether images are drawn.
        process: number of this process.

    Raises:
        ConfigError: if the folder cannot be made, or another prediction is writing to it.
    """

    def __init__(
        self, folder: Path, classes: Classes, with_pictures: bool = True, process: int = 0
    ) -> None:
        make_folder(folder)
        self.folder = folder
        self.results = ResultParts(folder, classes, process)
        self._with_pictures = with_pictures
        self._names = classes.names
        fonts_for("".join(classes.names))  # warns of all letters without a font at once
        self._colors = class_colors(classes.names)

    def add_image(self, number: int, image: ImageInput, rgb: np.ndarray, found: Instances) -> None:
        """Writes the picture of an image file, and then its detections."""
        details = {}
        if self._with_pictures:
            details["picture"] = image.picture
            self.draw(rgb, found).save(self.folder / image.picture, quality=_JPEG_QUALITY)
        self.results.add(number, image.image_id, image.file_name, found, **details)

    def draw(self, rgb: np.ndarray, found: Instances) -> Image.Image:
        """The picture of an image ``(H, W, 3)`` uint8 RGB with detections in its pixels."""
        masks = found.pred_masks.patches() if found.has("pred_masks") else [None] * len(found)
        boxes = [
            Box.of_corners(corners, self._names[label], score, mask)
            for corners, label, score, mask in zip(
                found.pred_boxes.tensor.tolist(),
                found.pred_classes.tolist(),
                found.scores.tolist(),
                masks,
                strict=True,
            )
        ]
        return draw_picture(rgb, boxes, self._colors)


def make_folder(folder: Path) -> None:
    """Makes the folder of the output.

    Raises:
        ConfigError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the output folder {folder} cannot be made ({error.strerror}): choose another "
            "--output."
        ) from error


def require_opencv() -> ModuleType:
    """OpenCV's module.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            f"--video needs OpenCV, which cannot be imported ({error}): install it with "
            "pip install opencv-python-headless."
        ) from error
    return cv2


class VideoReader:
    """Frames of a video file, upright, one after the other.

    Attributes:
        rate: frames per second.
        num_frames: as the file states it; 0 if it does not.

    Raises:
        DataError: if the file cannot be opened as a video.
    """

    def __init__(self, path: Path) -> None:
        self._cv2 = require_opencv()
        self._path = path
        self._num_read = 0
        self._capture = self._cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise DataError(f"video {path} cannot be opened: replace the file.")
        rate = self._capture.get(self._cv2.CAP_PROP_FPS)
        self.rate = rate if math.isfinite(rate) and rate > 0 else _FALLBACK_RATE
        self.num_frames = max(0, int(self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """``(H, W, 3)`` uint8 each, in the order red, green, blue; can be run through once."""
        try:
            while True:
                readable, frame = self._capture.read()
                if not readable:
                    break
                self._num_read += 1
                yield np.ascontiguousarray(frame[:, :, ::-1])
        finally:
            self._capture.release()

    def require_complete(self) -> None:
        """To be called behind the last frame: OpenCV does not tell an end from damage.

        Raises:
            DataError: if there should be more frames, or there was none.
        """
        # Some containers only estimate the number of frames.
        tolerance = max(2, self.num_frames // 50)
        if self._num_read == 0 or self._num_read + tolerance < self.num_frames:
            raise DataError(
                f"video {self._path} ends after {self._num_read} of {self.num_frames} frames: it "
                "is damaged; replace the file."
            )


class VideoWriter:
    """Writes frames to an mp4 file, whose size is that of the first one."""

    def __init__(self, path: Path, rate: float) -> None:
        self._cv2 = require_opencv()
        self._path = path
        self._rate = rate
        self._writer: Any = None

    def add(self, rgb: np.ndarray) -> None:
        """Appends a frame, ``(H, W, 3)`` uint8 RGB.

        Raises:
            DataError: if OpenCV cannot write to the file.
        """
        if self._writer is None:
            codec = self._cv2.VideoWriter_fourcc(*"mp4v")
            size = (rgb.shape[1], rgb.shape[0])
            self._writer = self._cv2.VideoWriter(str(self._path), codec, self._rate, size)
            if not self._writer.isOpened():
                raise DataError(f"video {self._path} cannot be written: choose another --output.")
        self._writer.write(np.ascontiguousarray(rgb[:, :, ::-1]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
