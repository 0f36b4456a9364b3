"""Learning rates by parameter name and by training progress, and an optimizer that goes on.

A checkpoint holds two things of an optimizer: what it has learned of each parameter (moments), and
its settings (learning rates, weight decay, ..). A resumed training goes on with the moments, by
the parameters' names, and with the settings of its config.
"""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig
from torch import Tensor, nn

from co_detr.checkpoint.loading import LoadReport
from co_detr.checkpoint.reading import shorten
from co_detr.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

# How layers of backbones are called, as stage and block, with the number of the first stage.
# Patches are merged behind a stage in Detectron2's Swin, in front of it in timm's networks.
_LAYERS = (
    (re.compile(r"(?:^|\.)(?:layers|stages)[._](\d+)\.blocks\.(\d+)\."), 0),  # Swin, ConvNeXt
    (re.compile(r"(?:^|\.)layers\.(\d+)\.(downsample)\."), 0),
    (re.compile(r"(?:^|\.)(?:layers|stages)_(\d+)\.()downsample\."), 0),
    (re.compile(r"(?:^|\.)res(\d+)\.(\d+)\."), 2),  # ResNet
    (re.compile(r"(?:^|\.)layer(\d+)\.(\d+)\."), 1),
    (re.compile(r"(?:^|\.)()blocks\.(\d+)\."), 0),  # ViT, which has no stages
)
_STEM = re.compile(
    r"(?:^|\.)(?:stem|patch_embed|(?:absolute_)?pos_embed|cls_token|reg_token|conv1|bn1)(?:[._]|$)"
)

_NOT_SETTINGS = ("params", "param_names", "initial_lr")
# What tells one kind of optimizer from another where a checkpoint does not name it.
_TELLING = {"betas", "momentum", "alpha", "rho", "lr_decay"}
_START_AGAIN = (
    "undo this change, or start a new run in another train.output_dir with train.init_checkpoint "
    "set to the checkpoint"
)


@dataclass(frozen=True)
class LearningRateFactor:
    """`lr_factor_func` of Detectron2's `get_default_optimizer_params`, as an object, so that
    configs can be saved as YAML and changed from the command line.

    A parameter whose name starts with one of `prefixes` or contains one of `parts` learns with
    `factor` times the base rate, every other one with the base rate. The default slows the
    pretrained backbone down, but not the channel mapper on top of it.

    With `layer_decay`, layers behind `prefixes` learn the slower the nearer they are to the image:
    of n blocks, the last with `layer_decay` times `factor`, the first with `layer_decay` ** n, and
    the stem or the embeddings with `layer_decay` ** (n + 1). Norms behind the blocks have `factor`
    alone. Layers are recognized by their names in ResNet, Swin, ViT, and timm's networks. Sources:
    BEiT (Bao et al., 2022) and, for the patch merging of Swin, SimMIM (Xie et al., 2022), where it
    belongs to the last block before it.

    Args:
        factor: of the rate.
        prefixes, parts: of names of parameters.
        layer_decay: from layer to layer; 1: none.
        depths: the number of blocks of each stage, or of all if there are no stages.

    Raises:
        ConfigError: if `layer_decay` is not above 0 and at most 1, or has no `depths`; when called,
            if a parameter is of a layer that is not known, or not in `depths`.
    """

    factor: float = 0.1
    prefixes: Sequence[str] = ("backbone.bottom_up.",)
    parts: Sequence[str] = ("sampling_offsets", "reference_points")
    layer_decay: float = 1.0
    depths: int | Sequence[int] = ()

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"optimizer.params.lr_factor_func.layer_decay={self.layer_decay} must be above 0 "
                "and at most 1."
            )
        if self.layer_decay < 1 and not self.depths:
            raise ConfigError(
                "optimizer.params.lr_factor_func.layer_decay needs the number of blocks of each "
                "stage of the backbone: set optimizer.params.lr_factor_func.depths, as [3,4,6,3] "
                "for ResNet-50."
            )

    def __call__(self, name: str) -> float:
        prefix = next((start for start in self.prefixes if name.startswith(start)), None)
        slow = prefix is not None or any(part in name for part in self.parts)
        rate = self.factor if slow else 1.0
        if prefix is not None and self.layer_decay < 1:
            rate *= self.layer_decay ** self._layers_above(name, name.removeprefix(prefix))
        return rate

    def _layers_above(self, name: str, inside: str) -> int:
        """From a layer, named without its prefix, to what stands behind all blocks."""
        depths = [self.depths] if isinstance(self.depths, int) else list(self.depths)
        for pattern, first in _LAYERS:
            if found := pattern.search(inside):
                stage = int(found[1] or first) - first
                last = depths[stage] - 1 if stage < len(depths) else -1
                block = last if found[2] == "downsample" else int(found[2] or 0)
                if not 0 <= block <= last:
                    raise ConfigError(
                        f"optimizer.params.lr_factor_func.depths={depths} has no place for {name}: "
                        "give the number of blocks of each stage of the backbone."
                    )
                return sum(depths[stage:]) - block
        if _STEM.search(inside):
            return sum(depths) + 1
        if re.search(r"(?:^|\.)\d+\.", inside):
            raise ConfigError(
                f"optimizer.params.lr_factor_func.layer_decay={self.layer_decay} cannot tell which "
                f"layer {name} is of: set it to 1 for this backbone."
            )
        return 0


class StepSchedule(ParamScheduler):
    """Multiplies the learning rate by `factor` at each of `drops`, fractions of the training.

    Fractions, unlike iterations, stay right when `train.max_iter` is changed.
    """

    def __init__(self, drops: Sequence[float], factor: float = 0.1) -> None:
        self.drops = sorted(drops)
        self.factor = factor

    def __call__(self, where: float) -> float:
        # The epsilon keeps a drop at iteration 82500 of 90000 from being rounded to 82501.
        return self.factor ** bisect_right(self.drops, where + self.WHERE_EPSILON)


class WarmUp(ParamScheduler):
    """Another schedule behind a linear rise of the learning rate over the first iterations.

    A number of iterations, unlike the fraction that Detectron2's `WarmupParamScheduler` takes,
    stays right when `train.max_iter` is changed: moments of the optimizer need so many steps to
    settle, however long the training is. A training that is shorter ends within the rise.

    Args:
        scheduler: of the whole training, whose rate is multiplied.
        iterations: until the multiplier is 1; 0: no rise.
        max_iter: of the training (``${train.max_iter}``).
        factor: the first multiplier.
    """

    def __init__(
        self, scheduler: ParamScheduler, iterations: int, max_iter: int, factor: float
    ) -> None:
        self.scheduler = scheduler
        self.end = iterations / max_iter
        self.factor = factor

    def __call__(self, where: float) -> float:
        progress = min(where / self.end, 1.0) if self.end > 0 else 1.0
        return (self.factor * (1 - progress) + progress) * self.scheduler(where)


class NewClassRate:
    """Lets the rows of new classes learn faster than the rest of their tensors.

    New are the classes that a checkpoint of other classes has no rows for. What a step of the
    optimizer changes in their rows is multiplied, weight decay included, which is what a higher
    learning rate does. Frozen tensors stay as they are.

    Saved with the run: what was new, a resumed training could not tell any more.

    Args:
        model: whose tensors they are.
        optimizer: whose steps are changed.
        factor: of the learning rate.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, factor: float) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.factor = factor
        self.rows: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._stretch)

    def find_in(self, report: LoadReport | None) -> None:
        """Takes the rows that a loaded file had no classes for; logs them.

        Args:
            report: None: no file was loaded, so that all classes are as new as all else.
        """
        classes = None if report is None else report.classes
        if classes is None or not classes.new:
            logger.info(
                "train.new_class_rate does nothing: what was loaded has rows for all classes, or "
                "for none."
            )
            return
        self.load_state_dict({"rows": classes.tensors})
        logger.info(
            "Rows of %d new classes learn %g times as fast: %s.",
            *(len(classes.new), self.factor, shorten(classes.new)),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"rows": {name: rows.tolist() for name, rows in self.rows.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        taken: set[int] = set()  # a tensor that has several names is stretched once
        self.rows = {}
        for name, rows in state["rows"].items():
            parameter = self.parameters.get(name)
            if parameter is None or id(parameter) in taken or not len(rows):
                continue
            taken.add(id(parameter))
            self.rows[name] = torch.as_tensor(rows, device=parameter.device)

    def _keep(self, *_: Any) -> None:
        self._before = {
            name: self.parameters[name].detach()[rows] for name, rows in self.rows.items()
        }

    @torch.no_grad()
    def _stretch(self, *_: Any) -> None:
        for name, before in self._before.items():
            parameter, rows = self.parameters[name], self.rows[name]
            parameter[rows] = torch.lerp(before, parameter[rows], self.factor)
        self._before = {}


def build_new_class_rate(
    cfg: DictConfig, model: nn.Module, optimizer: torch.optim.Optimizer
) -> NewClassRate | None:
    """What ``train.new_class_rate`` asks for; None: nothing.

    Raises:
        ConfigError: if it is not above 0, or the checkpoint is not taken over by class names.
    """
    factor = cfg.train.get("new_class_rate", 1.0)
    if factor == 1:
        return None
    if not 0 < factor < float("inf"):
        raise ConfigError(f"train.new_class_rate={factor} must be above 0, 1 for none.")
    if cfg.train.init_checkpoint_mismatch != "by_name":
        raise ConfigError(
            f"train.new_class_rate={factor} is for classes that a checkpoint does not have: set "
            "train.init_checkpoint_mismatch=by_name, too."
        )
    return NewClassRate(model, optimizer, factor)


def layout_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """What a checkpoint says beside the state: the class, and the parameters' names in order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kind = type(optimizer)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": [
            names[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
        ],
    }


def with_own_settings(
    saved: Mapping[str, Any],
    saved_layout: Mapping[str, Any] | None,
    optimizer: torch.optim.Optimizer,
    layout: Mapping[str, Any],
) -> dict[str, Any]:
    """A state dict with the moments of `saved` and the settings of `optimizer`; logs changes.

    Args:
        saved: what `optimizer.state_dict` gave.
        saved_layout: `layout_of` its optimizer; None: of an earlier version, which did not keep it.
        optimizer: as its config has it, before the first step.
        layout: of it.

    Raises:
        CheckpointError: if the moments are of no use to it.
    """
    own = optimizer.state_dict()["param_groups"]
    _check_class(saved["param_groups"], saved_layout, own, layout)
    before = _positions(saved["param_groups"])
    now = _positions(own)
    if saved_layout is None:
        both = (own, saved["param_groups"])
        sizes = [[len(group["params"]) for group in groups] for groups in both]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                "the optimizer has other groups of parameters than the checkpoint's (of "
                f"{sizes[0]} parameters instead of {sizes[1]}), so that the training cannot go on "
                f"with these settings: {_START_AGAIN}."
            )
        sources = {index: index for index in now}
    else:
        sources = _by_name(saved_layout["parameters"], layout["parameters"])
    _tell_changes([(before[sources[index]], now[index]) for index in now])
    groups = [{**group, "initial_lr": group["lr"]} if "lr" in group else group for group in own]
    state = {
        index: saved["state"][source]
        for index, source in sources.items()
        if source in saved["state"]
    }
    return {"state": state, "param_groups": groups}


def _positions(groups: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The group of each parameter, by its number."""
    return {index: group for group in groups for index in group["params"]}


def _by_name(saved: Sequence[str], own: Sequence[str]) -> dict[int, int]:
    """Number of a parameter here -> its number in the checkpoint."""
    numbers = {name: number for number, name in enumerate(saved)}
    new = [name for name in own if name not in numbers]
    gone = sorted(numbers.keys() - set(own))
    if new or gone:
        first = f"{new[0]} is new" if new else f"{gone[0]} is not trained any more"
        raise CheckpointError(
            f"the optimizer has other parameters than the checkpoint's ({first}; {len(new)} new, "
            f"{len(gone)} gone), so that the training cannot go on with these settings: "
            f"{_START_AGAIN}."
        )
    return {index: numbers[name] for index, name in enumerate(own)}


def _check_class(
    saved: Sequence[Mapping[str, Any]],
    saved_layout: Mapping[str, Any] | None,
    own: Sequence[Mapping[str, Any]],
    layout: Mapping[str, Any],
) -> None:
    other = None
    if saved_layout is not None and saved_layout["class"] != layout["class"]:
        other = saved_layout["class"]
    elif saved_layout is None and (saved[0].keys() ^ own[0].keys()) & _TELLING:
        other = "another one"
    if other:
        raise CheckpointError(
            f"the optimizer is {layout['class']} but the checkpoint was trained with {other}, "
            f"whose moments are of no use to it: {_START_AGAIN}."
        )
    if any(group.get("amsgrad") for group in own) and not all(map(_has_amsgrad, saved)):
        raise CheckpointError(
            "optimizer.amsgrad=true needs moments that the checkpoint does not have, as it was "
            f"trained without: {_START_AGAIN}."
        )


def _has_amsgrad(group: Mapping[str, Any]) -> bool:
    return bool(group.get("amsgrad"))


def _tell_changes(groups: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    changes: dict[str, dict[str, None]] = {}
    for before, now in groups:
        for name in now:
            # "lr" itself is where the schedule was.
            old = before.get("initial_lr" if name == "lr" else name)
            if name in _NOT_SETTINGS or old is None or _plain(old) == _plain(now[name]):
                continue
            changes.setdefault(name, {})[f"{_plain(old)} -> {_plain(now[name])}"] = None
    if changes:
        logger.info(
            "The optimizer goes on with the moments of the checkpoint and the settings of the "
            "config; changed: %s.",
            "; ".join(f"{name}: {', '.join(values)}" for name, values in changes.items()),
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
