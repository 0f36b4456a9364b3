"""Official state dicts as the shipped lists of keys and shapes describe them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from detectron2.config import instantiate
from torch import Tensor

from co_detr.engine.config import load_config
from co_detr.modeling import CoDETR
from co_detr.modeling.backbones.vit import RotaryTable
from tests.paths import config_path

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "co_detr_r50": "official_keys_co_deformable_detr_r50.json",
    "co_dino_r50": "official_keys_co_dino_5scale_r50.json",
    "co_dino_vit_l_o365_instance_12ep": "official_keys_co_dino_5scale_vit_large_coco_instance.json",
}


def shapes(name: str) -> dict[str, list[int]]:
    return json.loads((ROOT / "tests" / "data" / KEYS[name]).read_text())


def distinct(name: str) -> dict[str, Tensor]:
    """Every tensor has one value of its own, or two where order counts; little memory behind."""
    state = {}
    for number, (key, shape) in enumerate(shapes(name).items()):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
        elif ".freqs_" in key:  # what is computed here, so that it comes back
            side = math.isqrt(shape[0])
            table = RotaryTable.of_map(side, side, shape[1], device="cpu", dtype=torch.float32)
            state[key] = getattr(table, key.rpartition("_")[2])
        else:
            first = torch.arange(shape[0] if shape else 1) + 1000.0 * number
            rest = [1] * (len(shape) - 1)
            state[key] = first.reshape(*shape[:1], *rest).expand(shape) if shape else first[0]
    return state


def empty_model(name: str) -> CoDETR:
    cfg = load_config(config_path(name))
    with torch.device("meta"):
        return instantiate(cfg.model)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[key].dtype and torch.equal(value, second[key])
        for key, value in first.items()
    )
