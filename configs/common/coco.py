"""COCO-format data; all paths are in `data`, so that overrides name each of them once."""

import os

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader

from co_detr.data.augmentation import Variation, detr_test_augmentation, detr_train_augmentation
from co_detr.data.coco import load_coco
from co_detr.data.images import MAX_PIXELS, ImageReader
from co_detr.data.loader import CheckedDatasetMapper, build_train_loader
from co_detr.data.mixing import Mixing
from co_detr.engine.evaluators import CocoDetectionEvaluator

data = dict(
    train="datasets/coco/annotations/instances_train2017.json",
    train_images="datasets/coco/train2017",
    val="datasets/coco/annotations/instances_val2017.json",
    val_images="datasets/coco/val2017",
    # Boxes without area inside their image: "skip" leaves them out and names the first one in a
    # warning (COCO itself has a few, and the reference skips them); "error" stops.
    invalid_boxes="skip",
    # Before training: every file is looked up; of the images, "sample" decodes sample_size of each
    # set, "all" all of them (with a progress bar) and every mask of a large set, "off" none. Where
    # boxes look over the whole file as if they were corners or centers, that is an "error", or, for
    # who knows better, a "warning".
    preflight=dict(images="sample", sample_size=64, suspicion="error"),
    image_format="RGB",  # "BGR" for backbones that were trained on it
    # Of images with more than 8 bits per channel: the values [BLACK, WHITE] that become 0 and 255.
    # None: the range of the type, 0 to 65535 for 16 bits; 32-bit and float images need a range.
    value_range=None,
    max_image_pixels=MAX_PIXELS,  # larger files are refused; None: no limit
    # Of the images. Other than 3 are read from .npy and TIFF files, for backbones that take so many
    # (docs/backbones.md).
    channels=3,
)

_reader = L(ImageReader)(
    value_range="${data.value_range}",
    max_pixels="${data.max_image_pixels}",
    channels="${data.channels}",
)

dataloader = dict(
    train=L(build_train_loader)(
        dataset=L(load_coco)(
            annotation_file="${data.train}",
            image_root="${data.train_images}",
            num_classes="${model.num_classes}",
            invalid_boxes="${data.invalid_boxes}",
            with_masks=None,  # None: if the model has a mask head, or objects are pasted
            # Images with a class that fewer than this share of all images have are seen more often.
            repeat_threshold=0.0,
            score_weights=False,  # whether the scores of pseudo-labels weigh their losses
        ),
        mapper=L(CheckedDatasetMapper)(
            is_train=True,
            augmentations=L(detr_train_augmentation)(max_size=1333),
            image_format="${data.image_format}",
            reader=_reader,
            # Flips, turns, colors, blur, all off here; see co_detr/data/augmentation.py.
            variation=L(Variation)(image_format="${data.image_format}"),
        ),
        total_batch_size="${train.effective_batch_size}",
        images_per_gpu="${train.images_per_gpu}",
        num_workers=min(4, os.cpu_count() or 1),
        aspect_ratio_grouping=True,
        seed="${train.seed}",
        copy_paste=None,  # of objects with masks into other images, see co_detr/data/copy_paste.py
        # Mosaic and MixUp, both off here: how often each happens; see co_detr/data/mixing.py.
        mixing=L(Mixing)(mosaic=0.0, mixup=0.0, max_iter="${train.max_iter}", keep_masks=None),
    ),
    test=L(build_detection_test_loader)(
        dataset=L(load_coco)(
            annotation_file="${data.val}",
            image_root="${data.val_images}",
            num_classes="${model.num_classes}",
            partial_classes=True,
            invalid_boxes="${data.invalid_boxes}",
        ),
        mapper=L(CheckedDatasetMapper)(
            is_train=False,
            augmentations=L(detr_test_augmentation)(short_edge=800, max_size=1333),
            image_format="${data.image_format}",
            reader=_reader,
        ),
        num_workers=min(4, os.cpu_count() or 1),
    ),
    # Evaluations also measure test-time augmentation, as tta/*: "flip", "multiscale", or
    # L(co_detr.engine.views.TTA)(...). As slow as it has views.
    tta=None,
    # The best detections of each class in an image that count; 100 in COCO. For images with more
    # objects raise it, model.queries.matching.num_queries and model.postprocessor.max_detections.
    evaluator=L(CocoDetectionEvaluator)(
        annotation_file="${data.val}",
        output_dir="${train.output_dir}",
        max_detections=100,
    ),
)
