"""What the output folder of a training says of its weights, data and results.

For model cards (`co_detr.tools.model_card`). What is not there is None or empty; what is damaged is
an error, as a card that leaves something out without a word would be wrong.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from co_detr.checkpoint.detector import read_weights
from co_detr.checkpoint.reading import has_averaged, plain_state, stored_class_names
from co_detr.checkpoint.saving import FINAL, kept_checkpoints, read_identity
from co_detr.data.coco_file import read_coco, read_json
from co_detr.engine.config import learns_masks, load_config
from co_detr.engine.setup import CONFIG_FILE
from co_detr.engine.validation import BEST, HISTORY_FILE, EvaluationHistory
from co_detr.errors import CheckpointError, ConfigError
from co_detr.files import sha256_of
from co_detr.modeling.auxiliary import HybridAssignmentHeads
from co_detr.modeling.detectors import DECODER
from co_detr.tools.ablate.run import read_outcome
from co_detr.tools.results import Reference
from co_detr.tools.split_dataset import is_object

_SOFTWARE = ("Python", "PyTorch", "torchvision", "detectron2", "numpy")


@dataclass(frozen=True)
class Weights:
    """A checkpoint of the run.

    Attributes:
        path: of the file.
        sha256, size: of the file; size in bytes.
        numbers: in the tensors that are used: parameters and buffers.
        class_names: as stored in it; None: it has none.
        is_averaged: whether the weights that are used are the averaged ones (EMA).
        is_stripped: whether the auxiliary heads of the config are not in it.
        can_resume: whether a training can go on from it.
        steps: of the training; None: it does not say.
    """

    path: Path
    sha256: str
    size: int
    numbers: int
    class_names: list[str] | None
    is_averaged: bool
    is_stripped: bool
    can_resume: bool
    steps: int | None


@dataclass(frozen=True)
class DataSet:
    """An annotation file as it is now.

    Attributes:
        file_name: of the json, without its folder.
        sha256: of the json.
        images, empty: number of images, and of those without an object.
        objects: without crowd regions, by name of the class, in the order of the classes.
        masks: objects with a mask.
    """

    file_name: str
    sha256: str
    images: int
    empty: int
    objects: Counter[str]
    masks: int


@dataclass(frozen=True)
class RecordedRun:
    """What the files of a run say.

    Attributes:
        cfg: of config.yaml.
        weights: that the card is about.
        metrics: of an evaluation of these weights, from 0 to 100; {}: there is none.
        train, val: the data; None: the file is not there any more.
        software: name -> version, as it was in training; {}: not recorded.
        started: date and time; None: not recorded.
        seconds_per_iteration: median; None: not recorded.
    """

    cfg: DictConfig
    weights: Weights
    metrics: Mapping[str, float]
    train: DataSet | None
    val: DataSet | None
    software: Mapping[str, str]
    started: str | None
    seconds_per_iteration: float | None

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a config key, or the default where the config does not have it."""
        return OmegaConf.select(self.cfg, key, default=default)

    @property
    def heads(self) -> list[str]:
        """Names of the auxiliary heads that the model was trained with."""
        auxiliary = self.setting("model.auxiliary")
        return [] if auxiliary is None else list(HybridAssignmentHeads.head_names(auxiliary))

    @property
    def detector(self) -> str:
        """Which one of the model detects, unless another is asked for."""
        return self.setting("model.evaluate_with") or DECODER

    @property
    def has_masks(self) -> bool:
        """Whether the detections have masks; those of a head of its own are not the decoder's."""
        head = self.setting(f"model.auxiliary.{self.detector}")
        return self.setting("model.mask_head") is not None or learns_masks(head)

    @property
    def class_names(self) -> list[str]:
        """Of the checkpoint, or else of the data."""
        return self.weights.class_names or list(self.train.objects if self.train else ())

    @property
    def dataset(self) -> str:
        """What the training data are called: the folder that they are in."""
        path = Path(self.cfg.data.train)
        folder = path.parent.parent if path.parent.name == "annotations" else path.parent
        return folder.name or path.stem


def read_run(folder: Path, checkpoint: Path | None = None) -> RecordedRun:
    """Reads the output folder of a training.

    Args:
        folder: of the run.
        checkpoint: whose card it is; None: ``model_best.pth``, or the final one, or the last.

    Raises:
        ConfigError: if there is no readable config.yaml.
        CheckpointError: if there is no readable checkpoint, or its identity is damaged.
        DataError: if an annotation file is there and damaged.
    """
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(f"{config} does not exist: name the output folder of a training.")
    cfg = load_config(str(config))
    if checkpoint is None:
        candidates = [folder / f"{BEST}.pth", folder / FINAL]
        candidates += map(Path, reversed(kept_checkpoints(str(folder))))
        checkpoint = next((path for path in candidates if path.is_file()), None)
        if checkpoint is None:
            raise CheckpointError(
                f"{folder} has no checkpoint (model_best.pth, {FINAL}), which a card is about: put "
                "one there, or name the folder that has it."
            )
    weights = _read_weights(checkpoint, cfg)
    identity = read_identity(str(folder))
    return RecordedRun(
        cfg,
        weights,
        _read_metrics(folder, weights),
        _read_data(cfg.data.train),
        _read_data(cfg.data.val),
        _read_software(folder / "environment.txt"),
        None if identity is None else identity.started,
        read_outcome(folder).seconds_per_iteration,
    )


def _read_weights(path: Path, cfg: DictConfig) -> Weights:
    content = read_weights(str(path), cfg)
    state = plain_state(content, str(path))
    iteration = content.get("iteration")
    heads = any(key.startswith("auxiliary.") for key in state)
    return Weights(
        path,
        sha256_of(path),
        path.stat().st_size,
        sum(tensor.numel() for tensor in state.values()),
        stored_class_names(content),
        has_averaged(content) and cfg.train.get("init_checkpoint_weights", "ema") == "ema",
        cfg.model.get("auxiliary") is not None and not heads,
        "trainer" in content,
        iteration + 1 if isinstance(iteration, int) else None,
    )


def _read_metrics(folder: Path, weights: Weights) -> dict[str, float]:
    """Of the evaluation of these weights, as far as the files tell which one that is.

    The history has each evaluation by its steps. ``metrics.json`` is the last one, which is that of
    the final weights.
    """
    history, latest = folder / HISTORY_FILE, folder / "metrics.json"
    found: Any = {}
    if weights.steps is not None and history.is_file():
        evaluations = EvaluationHistory(str(history))
        evaluations.read(until=weights.steps)
        found = evaluations.metrics.get(weights.steps, {})
    elif weights.path.name == FINAL and latest.is_file():
        found = read_json(str(latest))
    if not isinstance(found, dict):
        raise CheckpointError(f"{latest} has no metrics by their names: evaluate once more.")
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def _read_data(annotation_file: str) -> DataSet | None:
    if not os.path.isfile(annotation_file):
        return None
    content = read_coco(annotation_file)
    reference = Reference.of(content)
    objects = [one for one in content.annotations if is_object(one)]
    numbers = Counter(one.get("category_id") for one in objects)
    shown = {one.get("image_id") for one in objects} & reference.images.keys()
    return DataSet(
        file_name=os.path.basename(annotation_file),
        sha256=sha256_of(annotation_file),
        images=len(reference.images),
        empty=len(reference.images) - len(shown),
        objects=Counter({name: numbers[key] for key, name in reference.classes.items()}),
        masks=sum(1 for one in objects if one.get("segmentation")),
    )


def _read_software(path: Path) -> dict[str, str]:
    """The versions in the table that Detectron2's `collect_env_info` writes."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = (re.split(r"\s{2,}", line, maxsplit=1) for line in lines)
    found = {row[0]: re.split(r" [@(]|:", row[1])[0] for row in rows if len(row) == 2}
    gpus = [name for name in found if name.startswith("GPU ")]
    return {name: found[name] for name in (*_SOFTWARE, *gpus) if name in found}
