"""A trained model as a function from images to detections."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.structures import Instances
from torch import Tensor

from co_detr.checkpoint.detector import Config, load_detector
from co_detr.data.images import ImageReader, ImageSource, as_rgb, name_of
from co_detr.data.loader import as_tensor, augment, in_format
from co_detr.engine.setup import cuda_settings, warn_of_emulation
from co_detr.engine.views import TTA, SeenView, Tiles, ViewPlan, detect_views, named_tta, see
from co_detr.errors import ConfigError

if TYPE_CHECKING:
    import supervision

Key = TypeVar("Key")

# Images wait for others of their size until so many batches are in memory.
_WAITING_BATCHES = 4


@dataclass(frozen=True)
class Sample:
    """An image and what the model sees of it.

    Attributes:
        rgb: ``(H, W, 3)`` uint8, the image itself, see `as_rgb`.
        image: ``(C, h, w)`` network input: resized, in the color order of the model.
        views: what the model sees instead, if it looks more than once.
    """

    rgb: np.ndarray
    image: Tensor
    views: Sequence[SeenView] = ()


class Predictor:
    """Detects objects in images, resized as in the evaluation of the config.

    Usage:

        predictor = co_detr.Predictor("co_detr_r50", "output/co_detr_r50/model_final.pth")
        found = predictor("street.jpg")
        found = found[found.scores >= 0.5]
        print(predictor.names(found), found.pred_boxes)

    Args:
        config: a name of the model zoo, a config file (also the config.yaml of a run), or a loaded
            config. Its number of classes gives way to the checkpoint's.
        checkpoint: a file that training wrote or a released one; by default the weights released
            for the model.
        detector: which one of the model detects: "decoder", an auxiliary head such as "roi",
            "merged" or "cascade" (docs/detectors.md); by default the decoder, or what
            model.evaluate_with of the config names.
        device: where to run; by default a GPU if there is one.
        score_threshold: detections below it are left out, from 0 to 1.
        batch_size: images of equal size that run together. Images of different sizes never do:
            padding would change their detections a little.
        overrides: ``key=value`` for the config.
        unsafe: let the checkpoint run code while it is read. Only for files of people you trust.
        max_image_pixels: files with more are refused; by default data.max_image_pixels of the
            config.
        mask_threshold: probability from which on a pixel belongs to an object, above 0 and below
            1; a lower one makes masks larger.
        amp: "bfloat16" or "float16": compute in mixed precision, which is faster on a GPU and
            changes detections a little; by default not.
        tta: "flip", "multiscale" or a `TTA`: each image is seen several times, mirrored and at
            other sizes, and the detections are fused; by default once (docs/accuracy.md).
        tiles: side of overlapping tiles in pixels, or `Tiles`: the parts of a large image are seen
            one by one, at the size of the evaluation each; by default the whole (docs/accuracy.md).

    Attributes:
        class_names: of the checkpoint, in the order of ``pred_classes``.
        reader: opens the images, with the range of values that the config states.

    Raises:
        ConfigError: if there is no such config, key, detector, device, precision or test-time
            augmentation, or tiles cannot be cut.
        CheckpointError: if the file is missing, unreadable, does not fit the config, or lacks the
            detector.
    """

    # Not torch.inference_mode: who gets the detections could not use them in a training.

    def __init__(
        self,
        config: Config,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        detector: str | None = None,
        device: str | None = None,
        score_threshold: float = 0.0,
        batch_size: int = 1,
        overrides: Sequence[str] = (),
        unsafe: bool = False,
        max_image_pixels: int | None = None,
        mask_threshold: float = 0.5,
        amp: str | None = None,
        tta: str | TTA | None = None,
        tiles: int | Tiles | None = None,
    ) -> None:
        if not 0 <= score_threshold <= 1:
            raise ConfigError(f"the score threshold {score_threshold} must be from 0 to 1.")
        if not 0 < mask_threshold < 1:
            raise ConfigError(f"the mask threshold {mask_threshold} must be above 0 and below 1.")
        if batch_size < 1:
            raise ConfigError(f"the batch size {batch_size} must be at least 1.")
        if amp not in (None, "bfloat16", "float16"):
            raise ConfigError(f'amp is {amp!r}: choose "bfloat16" or "float16", or leave it out.')
        if tta is not None and tiles is not None:
            raise ConfigError("tta and tiles do not go together: leave one of them out.")
        self._plan: ViewPlan | None = named_tta(tta, "tta")
        if tiles is not None:
            self._plan = tiles if isinstance(tiles, Tiles) else Tiles(tiles)
        self.amp = None if amp is None else getattr(torch, amp)
        self.device = choose_device(device)
        if amp is not None:
            warn_of_emulation(self.device, amp, "leave amp out")
        self.score_threshold = score_threshold
        self.mask_threshold = mask_threshold
        self.batch_size = batch_size
        loaded = load_detector(
            config, checkpoint, detector=detector, overrides=overrides, unsafe=unsafe
        )
        self.model = loaded.model.to(self.device)
        self.class_names = loaded.class_names
        self._train = loaded.cfg.train
        mapper = loaded.cfg.dataloader.test.mapper
        self.image_format: str = mapper.image_format
        self.reader = ImageReader.of_data(loaded.cfg.data)
        if self._plan is not None and self.reader.channels != 3:
            raise ConfigError(
                f"tta and tiles are for images of 3 channels, and the model is for "
                f"{self.reader.channels}: leave them out."
            )
        if max_image_pixels is not None:
            self.reader = replace(self.reader, max_pixels=max_image_pixels)
        self._resize = T.AugmentationList(instantiate(mapper.augmentations))

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> Instances | list[Instances]:
        """Detections of one image, or a list of them for a list or tuple of images.

        Args:
            images: files, PIL images or arrays of uint8 in the order red, green, blue; see
                `ImageReader.read_rgb`. An array of OpenCV has to be passed as ``array[..., ::-1]``.

        Returns:
            ``pred_boxes`` in absolute xyxy pixels of the image, ``scores`` in [0, 1] from high to
            low, and ``pred_classes``, all on the CPU. A model with masks adds ``pred_masks``, which
            stand for ``(N, H, W)`` bool without taking its memory (see `DetectedMasks`), and, if it
            judges its masks, ``mask_scores`` in [0, 1].

        Raises:
            DataError: if an image cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self([images])[0]
        samples = ((index, self.prepare(image)) for index, image in enumerate(images))
        found = {index: instances for index, _, instances in self.stream(samples)}
        return [found[index] for index in range(len(images))]

    def names(self, instances: Instances) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[index] for index in instances.pred_classes.tolist()]

    def prepare(self, image: ImageSource) -> Sample:
        """Reads and resizes an image as the evaluation's data mapper does; see `make_sample`."""
        sample = make_sample(image, self.reader, self._resize, self.image_format)
        if self._plan is None:
            return sample
        pixels = in_format(sample.rgb, self.image_format)
        return replace(sample, views=see(self._plan, pixels, self._resize, name_of(image)))

    def to_supervision(self, found: Instances) -> supervision.Detections:
        """Detections of one image for the package supervision, with names as ``class_name``.

        Masks become bitmaps ``(N, H, W)``, with all their bytes.

        Raises:
            ConfigError: if the package is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ConfigError(
                f"the package supervision cannot be imported ({error}): install it with pip "
                "install supervision."
            ) from error
        return supervision.Detections(
            xyxy=found.pred_boxes.tensor.numpy(),
            mask=np.asarray(found.pred_masks) if found.has("pred_masks") else None,
            confidence=found.scores.numpy(),
            class_id=found.pred_classes.numpy(),
            data={"class_name": np.array(self.names(found), dtype=str)},
        )

    def stream(
        self, samples: Iterable[tuple[Key, Sample]]
    ) -> Iterator[tuple[Key, Sample, Instances]]:
        """Detections of any number of samples, of which a few batches are in memory at a time.

        Those of equal size run in batches, so the order can change: `Key` tells which is which.
        """
        waiting: dict[tuple[int, ...], list[tuple[Key, Sample]]] = {}
        for key, sample in samples:
            size = tuple(sample.image.shape)
            waiting.setdefault(size, []).append((key, sample))
            if len(waiting[size]) == self.batch_size:
                yield from self._detect(waiting.pop(size))
            elif sum(map(len, waiting.values())) >= _WAITING_BATCHES * self.batch_size:
                yield from self._detect(waiting.pop(next(iter(waiting))))
        for batch in waiting.values():
            yield from self._detect(batch)

    @torch.no_grad()
    def _detect(self, batch: list[tuple[Key, Sample]]) -> list[tuple[Key, Sample, Instances]]:
        inputs = [
            {"image": sample.image, "height": len(sample.rgb), "width": sample.rgb.shape[1]}
            for _, sample in batch
        ]
        autocast = torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)
        with cuda_settings(self._train, self.device), autocast:
            if self._plan is not None:
                views = [sample.views for _, sample in batch]
                detections = detect_views(self.model, self._plan, views, self.batch_size)
            else:
                detections = [output["instances"].to("cpu") for output in self.model(inputs)]
        for found in detections:
            if found.has("pred_masks"):
                found.pred_masks.threshold = self.mask_threshold
        return [
            (key, sample, found[found.scores >= self.score_threshold])
            for (key, sample), found in zip(batch, detections, strict=True)
        ]


def make_sample(
    image: ImageSource, reader: ImageReader, resize: T.Augmentation, image_format: str
) -> Sample:
    """Reads an image, and resizes it in the color order `image_format`.

    Raises:
        DataError: if it cannot be read or resized.
    """
    pixels = reader.read_rgb(image)
    resized = T.AugInput(in_format(pixels, image_format))
    augment(resized, resize, name_of(image))
    return Sample(as_rgb(pixels), as_tensor(resized.image))


def choose_device(name: str | None) -> torch.device:
    """The named device, or by default a GPU if there is one.

    Raises:
        ConfigError: if there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"there is no device {name!r}: choose cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"the device is {name} but no CUDA device is here: choose cpu.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"the device is {name} but only {count} CUDA devices are here.")
    return device
