"""A user's data set: the number of classes comes from it, and it is inspected before it is used."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from co_detr.checkpoint.reading import read_checkpoint, stored_class_names
from co_detr.checkpoint.saving import has_checkpoints, last_readable
from co_detr.data.coco import image_path_of, reads_coco_format
from co_detr.data.coco_classes import align_classes, class_names
from co_detr.data.coco_file import read_coco, shortened
from co_detr.data.images import ImageReader
from co_detr.data.preflight import PreflightSettings, SplitFiles, preflight
from co_detr.data.preflight_boxes import InputSize, Limit, Limits
from co_detr.engine.config import learns_masks, predicts_masks
from co_detr.engine.evaluators import COCO_LIMIT
from co_detr.engine.launch import raise_jointly
from co_detr.engine.validation import validates_masks
from co_detr.errors import DataError, UserError
from co_detr.modeling.detectors import MERGED

logger = logging.getLogger(__name__)

# Pixels of a cell in the maps of ResNets and Swin Transformers.
_STRIDES = {f"res{stage}": 2**stage for stage in (2, 3, 4, 5)}
_STRIDES |= {f"stage{stage}": 4 * 2**stage for stage in (0, 1, 2, 3)}


def adopt_class_count(
    cfg: DictConfig, overrides: Sequence[str], eval_only: bool = False, resume: bool = False
) -> None:
    """Sets model.num_classes to the number of categories of a data.train from the command line.

    In an evaluation the classes that the checkpoint names count, whatever the data have; if it
    names none, or is to be fitted to other classes, those of data.train or else data.val do. A
    model.num_classes on the command line stays, and so does the config's own where it is used with
    the config's own data; `load_coco` raises an error if that does not fit the file.

    Raises:
        DataError: if the annotation file cannot be read.
        CheckpointError: if the checkpoint of an evaluation cannot be read.
    """
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    if "num_classes" not in cfg.model or "model.num_classes" in given:
        return
    trained = _trained_classes(cfg, resume) if eval_only else None
    split = "val" if eval_only and "data.train" not in given else "train"
    if trained is not None:
        cfg.model.num_classes = len(trained)
    elif f"data.{split}" in given:
        # A test set may have no categories: then the config counts.
        cfg.model.num_classes = len(read_coco(cfg.data[split]).categories) or cfg.model.num_classes


def _trained_classes(cfg: DictConfig, resume: bool) -> list[str] | None:
    """Class names in the checkpoint that an evaluation loads as it is; None: not known."""
    if cfg.train.init_checkpoint_mismatch != "error":
        return None
    path = cfg.train.init_checkpoint
    if resume:
        path = last_readable(cfg.train.output_dir) if has_checkpoints(cfg.train.output_dir) else ""
    if not os.path.isfile(path):  # empty, an address, or missing, which loading will tell
        return None
    return stored_class_names(read_checkpoint(path, cfg.train.init_checkpoint_unsafe))


def check_data(cfg: DictConfig, eval_only: bool = False) -> None:
    """Inspects data.train and data.val (the latter alone with `eval_only`) and logs the report.

    Only sets that a loader of `co_detr.data.coco` reads. The main process looks, all processes
    raise what it found.

    Raises:
        DataError: if the data cannot be used, or would silently give an AP of 0.
        ConfigError: if a setting of data.preflight or of how images are read is wrong.
    """
    nodes = {"train": cfg.dataloader.train, "val": cfg.dataloader.test}
    if eval_only:
        del nodes["train"]
    masks = {
        "train": bool(cfg.dataloader.train.dataset.get("with_masks", False)),
        "val": predicts_masks(cfg.model) or (not eval_only and validates_masks(cfg)),
    }
    splits = []
    for split, node in nodes.items():
        loader, file = _target(node.dataset), cfg.data[split]
        if reads_coco_format(loader):
            way, folder = image_path_of(loader, file), cfg.data[f"{split}_images"]
            splits.append(SplitFiles(split, file, folder, masks[split], way))
    if not eval_only and learns_masks(cfg.model) and not masks["train"]:
        logger.warning(
            "The model has a mask head, but data.train is read without masks: the head is not "
            "trained. dataloader.train.dataset.with_masks=true reads them."
        )
    settings = PreflightSettings(**cfg.data.get("preflight", {}))
    reader = ImageReader.of_data(cfg.data)
    problem = None
    if splits and comm.is_main_process():
        try:
            report = preflight(
                splits,
                settings,
                cfg.data.invalid_boxes,
                limits_of(cfg, eval_only),
                unlabeled=eval_only,
                reader=reader,
            )
            logger.info("Preflight of the data:\n%s", report.text())
            report.raise_on_errors()
            logger.info(
                "model.num_classes = %d (%s has %s)",
                cfg.model.num_classes,
                f"data.{report.splits[0].split}",
                shortened(report.splits[0].class_names, 20) or "no categories",
            )
        except UserError as error:
            problem = error
    raise_jointly(problem)


def align_with_checkpoint(cfg: DictConfig, trained: Sequence[str] | None) -> None:
    """Lets an evaluation on data.val match classes by name with those of a checkpoint.

    Args:
        trained: class names that the checkpoint stores, if it does.

    Raises:
        DataError: if data.val has fewer classes than the model and nothing says which ones, or one
            that the checkpoint does not know.
    """
    own, count = class_names(cfg.data.val), cfg.model.num_classes
    if cfg.train.init_checkpoint_mismatch == "by_name":
        trained = own  # loading has put the class heads in this order
    if trained and len(trained) == count and set(own) <= set(trained):
        align_classes(cfg.data.val, trained)
    elif len(own) == count:
        if trained and [n.casefold() for n in trained] != [n.casefold() for n in own]:
            logger.warning(
                "The checkpoint was trained on %s, %s has %s: classes are matched by position.",
                shortened(trained),
                cfg.data.val,
                shortened(own),
            )
    elif not own:
        logger.warning(
            "Neither %s nor the checkpoint names classes: category ids of the detections are "
            "numbers of the model's classes, from 1 on.",
            cfg.data.val,
        )
        align_classes(cfg.data.val, [f"class {index}" for index in range(count)])
    elif trained and len(trained) == count:
        raise DataError(
            f"{cfg.data.val} has the categories ({shortened(n for n in own if n not in trained)}), "
            f"which the checkpoint was not trained on; it knows ({shortened(trained)}): give them "
            "the same names, or remove the categories and their boxes."
        )
    else:
        raise DataError(
            f"{cfg.data.val} has {len(own)} categories ({shortened(own)}) but the model has "
            f"{count}, and the checkpoint does not say which ones these are: list the model's "
            "categories in the file, in their order."
        )


def limits_of(cfg: DictConfig, eval_only: bool = False) -> Limits:
    """How many objects of an image a config can find and count."""
    evaluator = cfg.dataloader.get("evaluator") or {}
    queries = _query_limit(cfg.model.get("queries"))
    if eval_only and queries is not None:
        is_asked = cfg.model.get("evaluate_with") in (None, MERGED)
        queries = replace(queries, is_trained=True) if is_asked else None
    return Limits(
        queries=queries,
        detections=_limit(cfg, "model.postprocessor.max_detections"),
        # A config.yaml of an earlier version does not say it.
        evaluated=_limit(cfg, "dataloader.evaluator.max_detections")
        or (Limit("dataloader.evaluator.max_detections", COCO_LIMIT) if evaluator else None),
        input_size=_input_size(cfg),
    )


def _input_size(cfg: DictConfig) -> InputSize | None:
    """What the evaluation resizes images to; None if this is no plain resize, or not known."""
    node = OmegaConf.select(cfg, "dataloader.test.mapper.augmentations")
    maps = OmegaConf.select(cfg, "model.backbone.in_features")
    if not isinstance(node, DictConfig) or not maps or maps[0] not in _STRIDES:
        return None
    short_edge, max_size = node.get("short_edge"), node.get("max_size")
    if not (isinstance(short_edge, int) and isinstance(max_size, int)):
        return None
    return InputSize(short_edge, max_size, _STRIDES[maps[0]])


def _limit(cfg: DictConfig, key: str) -> Limit | None:
    number = OmegaConf.select(cfg, key)
    return Limit(key, number) if isinstance(number, int) else None


def _query_limit(sources: DictConfig | None) -> Limit | None:
    """Of the one query source that inference uses."""
    if not sources:
        return None
    for name, source in sources.items():
        number = source.get("num_queries") if isinstance(source, DictConfig) else None
        if isinstance(number, int) and not source.get(
            "training_only", getattr(_target(source), "training_only", False)
        ):
            return Limit(f"model.queries.{name}.num_queries", number)
    return None


def _target(node: DictConfig) -> Any:
    target = node.get("_target_")
    return locate(target) if isinstance(target, str) else target
