"""A user's data set: the number of classes comes from it, and it is inspected before it is used."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig

from co_detr.data.coco import align_classes, class_names, load_coco
from co_detr.data.coco_file import read_coco, shortened
from co_detr.data.images import ImageReader
from co_detr.data.preflight import PreflightSettings, SplitFiles, preflight
from co_detr.engine.joint import raise_jointly
from co_detr.errors import DataError, UserError

logger = logging.getLogger(__name__)


def adopt_class_count(cfg: DictConfig, overrides: Sequence[str], eval_only: bool = False) -> None:
    """Sets model.num_classes to the number of categories of a data.train from the command line.

    In an evaluation without data.train, data.val counts. A model.num_classes on the command line
    stays, and so does the config's own where it is used with the config's own data; `load_coco`
    raises an error if that does not fit the file.

    Raises:
        DataError: if the annotation file cannot be read.
    """
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    split = "val" if eval_only and "data.train" not in given else "train"
    if f"data.{split}" not in given or "model.num_classes" in given:
        return
    if "num_classes" in cfg.model:
        cfg.model.num_classes = len(read_coco(cfg.data[split])["categories"])


def check_data(cfg: DictConfig, eval_only: bool = False) -> None:
    """Inspects data.train and data.val (the latter alone with `eval_only`) and logs the report.

    Only sets that `load_coco` reads: LVIS and Objects365 find their images in ways of their own,
    and do not change. The main process looks, all processes raise what it found.

    Raises:
        DataError: if the data cannot be used, or would silently give an AP of 0.
        ConfigError: if a setting of data.preflight or of how images are read is wrong.
    """
    nodes = {"train": cfg.dataloader.train, "val": cfg.dataloader.test}
    if eval_only:
        del nodes["train"]
    splits = [
        SplitFiles(split, cfg.data[split], cfg.data[f"{split}_images"])
        for split, node in nodes.items()
        if _is_plain_coco(node.dataset)
    ]
    settings = PreflightSettings(**cfg.data.get("preflight", {}))
    reader = ImageReader.of_data(cfg.data)
    problem = None
    if splits and comm.is_main_process():
        try:
            report = preflight(splits, settings, cfg.data.invalid_boxes, reader)
            logger.info("Preflight of the data:\n%s", report.text())
            report.raise_on_errors()
            logger.info(
                "model.num_classes = %d (%s)",
                cfg.model.num_classes,
                ", ".join(report.splits[0].class_names[:20]),
            )
        except UserError as error:
            problem = error
    raise_jointly(problem)


def align_with_checkpoint(cfg: DictConfig, trained: Sequence[str] | None) -> None:
    """Lets an evaluation on data.val match classes by name with those of a checkpoint.

    Args:
        trained: class names that the checkpoint stores, if it does.

    Raises:
        DataError: if data.val has fewer classes than the model and nothing says which ones.
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
    else:
        raise DataError(
            f"{cfg.data.val} has {len(own)} categories ({shortened(own)}) but the model has "
            f"{count}, and the checkpoint does not say which ones these are: list the model's "
            "categories in the file, in their order."
        )


def _is_plain_coco(node: DictConfig) -> bool:
    target = node.get("_target_")
    return (locate(target) if isinstance(target, str) else target) is load_coco
