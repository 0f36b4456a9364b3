"""Feeds the reference's noise to our denoising queries.

The reference lays its draws out group by group: in each, all ground truths of all images as
positives, then all of them as negatives. Ours come in slot order, ``(B, blocks, 2, G)``, where
images with fewer than G ground truths have empty slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from co_detr.modeling.queries import DenoisingQueries
from co_detr.modeling.queries.denoising import NoiseDraws


def flat_slots(num_gts: list[int], num_blocks: int) -> Tensor:
    """Our slot, counted over the batch, of each noised ground truth of the reference: ``(M,)``."""
    longest = max(num_gts)
    slots = torch.arange(len(num_gts) * num_blocks * 2 * longest)
    slots = slots.view(len(num_gts), num_blocks, 2, longest).permute(1, 2, 0, 3)
    is_real = torch.arange(longest) < torch.tensor(num_gts)[:, None]
    return slots[:, :, is_real].flatten()


@contextmanager
def recorded_noise(
    source: DenoisingQueries, raw: dict[str, Tensor], num_gts: list[int]
) -> Iterator[None]:
    """Makes ``source`` use the draws ``raw`` of a step with these numbers of ground truths.

    Raises:
        RuntimeError: if the reference drew another number of them than our queries need.
    """

    def draw(boxes: Tensor) -> NoiseDraws:
        longest = max(num_gts)
        num_blocks = len(boxes) // max(2 * longest * len(num_gts), 1)
        places = flat_slots(num_gts, num_blocks)
        if not longest:  # nothing to draw, and so perhaps nothing recorded
            return NoiseDraws(boxes[:, 0], boxes[:, 0].long(), boxes, boxes)
        counts = {name: len(raw[name]) for name in ("label_uniform", "box_sign01", "box_uniform")}
        if set(counts.values()) != {len(places)}:
            raise RuntimeError(f"Our code noises {len(places)} boxes, the reference drew {counts}.")
        flip = _spread(raw["label_uniform"], places, boxes, empty=1.0)
        return NoiseDraws(
            flip=flip,
            labels=_replacements(source, raw, places, flip),
            signs=_spread(raw["box_sign01"] * 2 - 1, places, boxes),
            shifts=_spread(raw["box_uniform"], places, boxes),
        )

    source.draw = draw
    try:
        yield
    finally:
        del source.draw


def _spread(values: Tensor, places: Tensor, boxes: Tensor, empty: float = 0.0) -> Tensor:
    """``(M, ...)`` draws of real slots -> ``(N, ...)`` of all."""
    spread = boxes.new_full((len(boxes), *values.shape[1:]), empty)
    spread[places] = values.to(spread.dtype)
    return spread


def _replacements(
    source: DenoisingQueries, raw: dict[str, Tensor], places: Tensor, flip: Tensor
) -> Tensor:
    """The reference draws classes for those labels only that it replaces."""
    replaced = places[raw["label_uniform"] < 0.5 * source.label_noise]
    if len(replaced) != len(raw["label_new"]):
        raise RuntimeError(
            f"Our code replaces {len(replaced)} labels, the reference {len(raw['label_new'])}."
        )
    labels = torch.zeros_like(flip, dtype=torch.long)
    labels[replaced] = raw["label_new"]
    return labels
