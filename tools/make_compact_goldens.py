"""Cuts the reference's golden tensors down to what the repository ships for its tests.

The numbers stay as the reference dumped them. Of units, whole elements are dropped, or tensors
are sliced along axes whose entries do not influence each other (images, heads, channels,
anchors). Of cases, whole entries are dropped: the weights of backbone and neck, so that these
cases start at the recorded output of the neck, and large tensors that others depend on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from co_detr.parity.golden_file import load_golden, save_golden

# Kept elements of the units that have many alike; of all other units all elements are kept.
ATSS_CASES = ("tiny", "no gt", "duplicate gts", "anchors restricted")
DENOISING_CASES = (2, 3)
SINE_FEATURES = 32
MAX_COSTS = 500  # queries times ground truths

CASES = ("A", "A_empty", "A_allempty", "A_official_sampler", "A_zero_padding")
# Parts that come before the recorded maps.
BEFORE = ("backbone.", "neck.")
LARGE = (
    "images_uint8_rgb",
    "batch",
    "eval.backbone_feats",
    "eval.enc_output_memory",
    "train.roi.bbox_pred",
    "train.roi.cls_score",
    "train.roi.feats_mean",
    "train.rpn.deltas",
)
MAX_GRADIENT = 2000  # elements; the norms of all gradients stay


def compact_units(units: dict[str, Any]) -> dict[str, Any]:
    """A subset of ``units.pt`` with at least one element of every unit."""
    points = units["get_reference_points"]
    changed = {
        "ms_deform_attn_function": [_first_heads(e) for e in units["ms_deform_attn_function"]],
        "sine_pe": [
            _slice(e, ("mask", "output"), slice(-1, None))
            for e in units["sine_pe"]
            if e["num_feats"] == SINE_FEATURES
        ],
        "linear_sum_assignment": [
            e for e in units["linear_sum_assignment"] if e["cost"].numel() <= MAX_COSTS
        ],
        "atss_assigner": [e for e in units["atss_assigner"] if e["name"].startswith(ATSS_CASES)],
        "max_iou_assigner": [_thin_anchors(e) for e in units["max_iou_assigner"]],
        "gen_encoder_output_proposals": _crop_padding(units["gen_encoder_output_proposals"]),
        "get_reference_points": _slice(points, ("valid_ratios", "reference_points"), slice(1, 2)),
        "roi_extractor": [_first_channels(e) for e in units["roi_extractor"]],
        "dn_generator": [units["dn_generator"][i] for i in DENOISING_CASES],
    }
    return {**units, **changed}


def _slice(entry: dict, keys: tuple[str, ...], rows: slice | Tensor) -> dict:
    return {key: value[rows] if key in keys else value for key, value in entry.items()}


def _first_heads(entry: dict, heads: int = 2) -> dict:
    """First image and heads; the channels of the output are head-major."""
    channels = heads * entry["value"].shape[-1]
    kept = {"output": channels, "grad_output": channels}
    return {
        key: value if key == "spatial_shapes_hw" else value[:1, :, : kept.get(key, heads)]
        for key, value in entry.items()
    }


def _thin_anchors(entry: dict, step: int = 20) -> dict:
    """All positive anchors and some others.

    A ground truth's best anchors are positive wherever the reference's rule for low-quality
    matches applies, so the subset's assignment is the same.
    """
    if entry["kind"] != "rpn":
        return entry
    keep = entry["gt_inds"] > 0
    keep[::step] = True
    return _slice(entry, ("boxes", "gt_inds", "max_overlaps"), keep)


def _crop_padding(entry: dict) -> dict:
    """The image with most padding, without rows and columns of padding beyond the first."""
    shapes = [tuple(shape) for shape in entry["spatial_shapes_hw"].tolist()]
    image = int(entry["padding_mask"].sum(1).argmax())
    keep, cropped = [], []
    for mask, shape in zip(
        entry["padding_mask"][image].split([h * w for h, w in shapes]), shapes, strict=True
    ):
        inside = ~mask.view(shape)
        height = min(int(inside.any(1).sum()) + 1, shape[0])
        width = min(int(inside.any(0).sum()) + 1, shape[1])
        kept = torch.zeros(shape, dtype=torch.bool)
        kept[:height, :width] = True
        keep.append(kept.flatten())
        cropped.append((height, width))
    tokens = torch.cat(keep)
    by_token = ("memory", "padding_mask", "output_memory", "output_proposals_unact")
    cut = {key: entry[key][[image]][:, tokens] for key in by_token}
    return {**entry, **cut, "spatial_shapes_hw": torch.tensor(cropped)}


def _first_channels(entry: dict, channels: int = 2) -> dict:
    return {
        **entry,
        "feats": [level[:, :channels] for level in entry["feats"]],
        "output_mean_hw": entry["output_mean_hw"][:, :channels],
        "output_first4": entry["output_first4"][:, :channels],
    }


def compact_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case without what comes before the recorded maps, and without large tensors.

    ``meta.dropped`` names the entries that the checks would otherwise miss.
    """
    meta = dict(case["meta"])
    meta["dropped"] = [*LARGE, "train.grad_none", "train_finite.grad_none"]
    if "base_case" in meta:
        meta["base_case"] += "_compact"
    small = {**_without(case, meta["dropped"]), "meta": meta}
    if "state_dict" in small:
        small["state_dict"] = _after(small["state_dict"])
    for part in {"train", "train_finite"} & small.keys():
        gradients = _after(small[part]["grads"])
        kept = {key: value for key, value in gradients.items() if value.numel() <= MAX_GRADIENT}
        norms = _after(small[part]["grad_norms"])
        small[part] = {**small[part], "grads": kept, "grad_norms": norms}
    return small


def _without(tree: dict[str, Any], names: list[str], prefix: str = "") -> dict[str, Any]:
    """Copy of nested dicts without the entries of these dotted names."""
    return {
        key: _without(value, names, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in names
    }


def _after(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith(BEFORE)}


def packed(value: Any, pool: dict[tuple, Tensor]) -> Any:
    """Copies views, whose files would hold the whole storage, and stores equal tensors once."""
    if isinstance(value, dict):
        return {key: packed(each, pool) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(packed(each, pool) for each in value)
    if not isinstance(value, Tensor):
        return value
    value = value.clone(memory_format=torch.contiguous_format)
    key = (value.dtype, tuple(value.shape), value.numpy().tobytes())
    return pool.setdefault(key, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the full golden files")
    parser.add_argument("--output", type=Path, default=Path("tests/data"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    compact = {"units": compact_units(load_golden(args.source / "units.pt"))}
    for name in CASES:
        case = load_golden(args.source / f"case_{name}.pt")
        compact[f"case_{name}_compact"] = compact_case(case)
    for name, content in compact.items():
        target = args.output / f"{name}.pt.xz"
        save_golden(packed(content, {}), target)
        print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
