"""Videos through OpenCV, which is optional."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from co_detr.errors import ConfigError, DataError

_FALLBACK_RATE = 25.0  # frames per second of a video that does not say


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
