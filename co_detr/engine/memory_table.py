"""What fits on which card: memory of a training with its switches, counted on small images.

Tensors are counted one by one while they live, so this needs no GPU, and an operator costs what it
costs on one but for its own workspaces. A step is counted on two small images. What it takes grows
with the area of the image, linearly but for a constant, which gives the memory at full size.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from co_detr.engine.config import learns_masks
from co_detr.engine.freezing import freeze, keep_frozen_in_eval
from co_detr.engine.memory_use import (
    CHECKPOINTING,
    MANY_OBJECTS,
    Size,
    image_sizes,
    random_batch,
)
from co_detr.errors import ConfigError
from co_detr.seeding import locally_seeded

CARDS = (8, 16, 24, 48)  # GB of the usual ones
# What CUDA, cuDNN's workspaces and gaps between tensors take is not counted: a rule of thumb.
USABLE = 0.8
# What an image takes under autocast in bfloat16, as a share of float32: as was counted of
# co_detr_r50 with checkpointing (docs/machine.md). CPUs without bfloat16 are too slow to count it.
AMP_SHARE = 0.75
_BACKBONE = "backbone.bottom_up"
_LONG_SIDES = (384, 512)  # pixels that are counted; all proposals of the models fit in these


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make inside of the block, while they live.

    Attributes:
        now: bytes.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return made

    def ignore(self, tensors: Sequence[torch.Tensor]) -> None:
        """Leaves out what was there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[id(storage)] = weakref.ref(storage)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        known = self._seen.get(key)
        if known is not None and known() is storage:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Need:
    """Bytes that a training takes.

    Attributes:
        fixed: weights, gradients, moments, and the average if there is one.
        per_image: what the forward pass keeps and the backward pass needs beside the gradients.
        frozen, checkpointing, amp: the switches that it takes them with.
    """

    fixed: float
    per_image: float
    frozen: bool = False
    checkpointing: bool = False
    amp: bool = False

    def images_in(self, gigabytes: float) -> int:
        """How many images at a time a card of this size takes; 0: none."""
        left = USABLE * gigabytes * 1e9 - self.fixed
        return max(0, int(left // self.per_image))


@dataclass(frozen=True)
class MemoryTable:
    """Needs with all switches.

    Attributes:
        rows: with and without the switches.
        counted: sizes of images that were counted.
        size: for which it is told.
        notes: what is left out, and why.
    """

    rows: tuple[Need, ...]
    counted: tuple[Size, ...]
    size: Size
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        sizes = " and ".join(f"{height}x{width}" for height, width in self.counted)
        height, width = self.size
        rows = [
            [
                "yes" if row.frozen else "",
                "yes" if row.checkpointing else "",
                "yes" if row.amp else "",
                f"{row.fixed / 2**30:.2f}",
                f"{row.per_image / 2**30:.2f}",
                *(str(row.images_in(card) or "-") for card in CARDS),
            ]
            for row in self.rows
        ]
        headers = ["backbone frozen", "checkpointing", "amp", "fixed GiB", "GiB per image"]
        align = ["left"] * 3 + ["right"] * (2 + len(CARDS))
        lines = [
            f"Images at a time that fit ({height}x{width}, {MANY_OBJECTS} objects each): counted "
            f"tensor by tensor on {sizes} and scaled; amp is estimated at {AMP_SHARE:g} of an "
            f"image's memory; {1 - USABLE:.0%} of a card is left for what is not counted.",
            tabulate(
                rows,
                headers + [f"{card} GB" for card in CARDS],
                tablefmt="github",
                colalign=align,
                disable_numparse=True,
            ),
        ]
        return "\n".join([*lines, *self.notes])


def memory_table(cfg: DictConfig) -> MemoryTable:
    """Counts a step of the config's model with its memory switches, on the CPU.

    What ``train.freeze`` names is frozen in all rows.

    Raises:
        ConfigError: if the augmentation does not limit the size of images.
    """
    size = image_sizes(instantiate(cfg.dataloader.train.mapper.augmentations)).largest
    counted = tuple(_scaled(size, min(side, max(size) * side // 512)) for side in _LONG_SIDES)
    keys = [key for key in CHECKPOINTING if OmegaConf.select(cfg, key) is not None]
    has_backbone = OmegaConf.select(cfg, f"model.{_BACKBONE}") is not None
    rows, notes = [], []
    for checkpointing in (False, True) if keys else (False,):
        switches = {key: checkpointing for key in keys}
        for frozen in (False, True) if has_backbone else (False,):
            patterns = [*cfg.train.get("freeze", []), *([_BACKBONE] if frozen else [])]
            try:
                need = _need(cfg, counted, size, patterns, switches)
            except ConfigError as error:  # of a backbone that cannot be computed again
                notes.append(f"Not counted: {error}")
                break
            both = replace(need, frozen=frozen, checkpointing=checkpointing)
            rows += [both, replace(both, amp=True, per_image=AMP_SHARE * both.per_image)]
    return MemoryTable(tuple(rows), counted, size, tuple(notes))


def _scaled(size: Size, long_side: int) -> Size:
    """With sides that are multiples of 32."""
    share = long_side / max(size)
    return tuple(max(32, round(side * share / 32) * 32) for side in size)


def _need(
    cfg: DictConfig,
    counted: Sequence[Size],
    size: Size,
    patterns: Sequence[str],
    switches: Mapping[str, bool],
) -> Need:
    square = OmegaConf.select(cfg, "model.padding.square_size")
    model, areas, peaks = None, [], []
    for height, width in counted:
        if model is None or square:  # which is part of the model
            model = _model(cfg, switches, max(height, width) if square else None)
            if patterns:
                freeze(model, patterns)
        areas.append(height * width)
        peaks.append(count_step(model, height, width, cfg.model))
    slope = 0.0
    if areas[1] > areas[0]:
        slope = (peaks[1] - peaks[0]) / (areas[1] - areas[0])
    per_image = peaks[1] + slope * (size[0] * size[1] - areas[1])
    weights = 4 * sum(value.numel() for value in model.parameters())
    trained = 4 * sum(value.numel() for value in model.parameters() if value.requires_grad)
    moments = 2 if "adam" in str(cfg.optimizer._target_).lower() else 1
    averages = bool(OmegaConf.select(cfg, "train.ema.enabled"))
    fixed = weights * (1 + averages) + trained * (1 + moments)
    return Need(fixed, per_image)


def _model(cfg: DictConfig, switches: Mapping[str, bool], square: int | None) -> nn.Module:
    node = copy.deepcopy(cfg.model)
    for key, value in switches.items():
        OmegaConf.update(node, key.removeprefix("model."), value)
    if square is not None:
        node.padding.square_size = square
    with locally_seeded("memory table"):
        return instantiate(node)


def count_step(model: nn.Module, height: int, width: int, node: DictConfig) -> int:
    """The most bytes that tensors of a forward and a backward pass take, without gradients.

    Args:
        model: on the CPU.
        height, width: of the one image in pixels.
        node: the model's config.
    """
    masks = learns_masks(node)
    batch = random_batch(height, width, 1, MANY_OBJECTS, node.num_classes, masks=masks)
    model.train()
    keep_frozen_in_eval(model)
    forget = [
        value.register_post_accumulate_grad_hook(_forget_gradient)
        for value in model.parameters()
        if value.requires_grad
    ]
    live = LiveBytes()
    try:
        with locally_seeded("memory table"), EventStorage(), live:
            live.ignore([*model.parameters(), *model.buffers()])
            sum(model(batch).values()).backward()
    finally:
        for hook in forget:
            hook.remove()
    return live.peak


def _forget_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None
