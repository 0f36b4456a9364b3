"""Cuts the reference's golden tensors down to what the repository ships for its tests.

The numbers stay as the reference dumped them. Of units, whole elements are dropped, or tensors
are sliced along axes whose entries do not influence each other (images, heads, channels,
anchors). Of the cases of kind A, whole entries are dropped: the weights of backbone and neck, so
that these cases start at the recorded output of the neck, and large tensors that others depend on.
The case of kind B is larger than the room there is; one image of it and the first decoder layers
become the unit ``co_dino_decoder``, which starts at the recorded output of the encoder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The comparisons are part of the tests of this checkout.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.parity.oracle.golden import load_golden, save_golden

# Kept elements of the units that have many alike; of all other units all elements are kept.
ATSS_CASES = ("tiny", "no gt", "duplicate gts", "anchors restricted")
DENOISING_CASES = (2, 3)
SINE_FEATURES = 32
MAX_COSTS = 500  # queries times ground truths

# Units of masks in the data, with what they take from another one.
MASK_UNITS = ("bitmap_ops", "coco_rle", "copy_paste")
MASK_HEAD_UNITS = (
    "ln2d",
    "multi_branch_fusion_avg",
    "feature_upsample",
    "boundary",
    "mask_targets",
    "mask_iou",
)
PASTED = (1, 2, 4)  # over the edge, less than a pixel, without an area

CASES = ("A", "A_empty", "A_allempty", "A_official_sampler", "A_zero_padding")
# Parts that come before the recorded maps.
BEFORE = ("backbone.", "neck.")
LARGE = (
    "images_uint8_rgb",
    "batch",
    "eval.backbone_feats",
    "eval.decoder_hs",
    "eval.enc_coords_unact_all",
    "eval.enc_output_memory",
    "eval.enc_reg_deltas_all",
    "eval.encoder_levels",
    "eval.pos_encodings",
    "train.atss.bbox_deltas",
    "train.atss.cls_logits",
    "train.roi.bbox_pred",
    "train.roi.cls_score",
    "train.roi.feats_first8",
    "train.roi.feats_mean",
    "train.rpn.deltas",
    "train.rpn.objectness",
)
# What is large of positive queries; variants repeat the base case with other ground truths.
OF_POSITIVE_QUERIES = {"base": ("decoder_hs",), "variant": ("decoder_hs", "feats")}
MAX_GRADIENT = 500  # elements; the norms of all gradients stay

# Of the unit ``co_dino_decoder``.
TRANSFORMER = "query_head.transformer"
DECODER_PARTS = (
    "enc_output",
    "enc_output_norm",
    "query_embed",
    "decoder.norm",
    "decoder.ref_point_head",
)
PROPOSALS = ("topk_indices", "enc_topk_cls", "enc_topk_boxes_cxcywh")
DROPPED_OF_DECODER = (
    "enc_output_memory",
    "enc_output_proposals_unact",
    "enc_reg_deltas_all",
    "enc_coords_unact_all",
    "enc_cls_logits_all",
)


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
    large = OF_POSITIVE_QUERIES["variant" if "base_case" in meta else "base"]
    for part in {"train", "train_finite"} & small.keys():
        queries = small[part]["aux"]
        meta["dropped"] += [f"{part}.aux[{i}].{key}" for i in range(len(queries)) for key in large]
        queries = [{k: v for k, v in query.items() if k not in large} for query in queries]
        small[part] = {**small[part], "aux": queries}
    if "state_dict" in small:
        small["state_dict"] = _after(small["state_dict"])
    for part in {"train", "train_finite"} & small.keys():
        gradients = _after(small[part]["grads"])
        kept = {key: value for key, value in gradients.items() if value.numel() <= MAX_GRADIENT}
        norms = _after(small[part]["grad_norms"])
        small[part] = {**small[part], "grads": kept, "grad_norms": norms}
    return small


def decoder_unit(case: dict[str, Any], image: int = 1, num_layers: int = 2) -> dict[str, Any]:
    """The first decoder layers of a case of kind B for one of its images.

    Memory in the padding, which nothing reads, is set to zero.
    """
    meta, values, row = case["meta"], case["eval"], slice(image, image + 1)
    levels = values["encoder_levels"][: len(values["masks"])]  # without that of the heads
    mask = torch.cat([mask[row].flatten(1) for mask in values["masks"]], dim=1)
    memory = torch.cat([level_map[row].flatten(2).transpose(1, 2) for level_map in levels], dim=1)
    encoder_head, layers = meta["dec_layers"], range(num_layers)
    starts = {f"{TRANSFORMER}.{name}." for name in DECODER_PARTS}
    starts |= {f"{TRANSFORMER}.decoder.layers.{layer}." for layer in layers}
    starts |= {f"query_head.{n}_branches.{layer}." for n in ("cls", "reg") for layer in layers}
    weights = {k: v for k, v in case["state_dict"].items() if k.startswith(tuple(starts))}
    # The head of the encoder's proposals follows those of the layers.
    for name in ("cls", "reg"):
        old, new = (f"query_head.{name}_branches.{i}." for i in (encoder_head, num_layers))
        for key, value in case["state_dict"].items():
            if key.startswith(old):
                weights[key.replace(old, new)] = value
    return {
        "num_classes": meta["num_classes"],
        "image_sizes_hw": [case["image_sizes_hw"][image]],
        "spatial_shapes_hw": torch.tensor([list(level_map.shape[-2:]) for level_map in levels]),
        "memory": memory.masked_fill(mask[..., None], 0.0),
        "padding_mask": mask,
        "valid_ratios": values["valid_ratios"][row],
        "state_dict": weights,
        "dropped": list(DROPPED_OF_DECODER),
        **{key: values[key][row] for key in PROPOSALS},
        "references": values["references"][: num_layers + 1, row],
        "decoder_hs": values["decoder_hs"][:num_layers, :, row],
        "cls_logits": values["cls_logits"][:num_layers, row],
        "boxes_cxcywh": values["boxes_cxcywh"][:num_layers, row],
    }


def _without(tree: dict[str, Any], names: list[str], prefix: str = "") -> dict[str, Any]:
    """Copy of nested dicts without the entries of these dotted names."""
    return {
        key: _without(value, names, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in names
    }


def mask_units(units: dict[str, Any]) -> dict[str, Any]:
    """The units of masks in the data, complete."""
    bitmaps = {"bitmaps": units["mask_targets"]["bitmaps"]}
    return {name: units[name] | ({} if name == "copy_paste" else bitmaps) for name in MASK_UNITS}


def mask_head_units(units: dict[str, Any]) -> dict[str, Any]:
    """Those of the mask head: some elements of what has many alike, one channel of pooled maps."""
    pooled, refined, pasted = (units[n] for n in ("mask_roi_align", "test_refine", "paste"))
    rows = ("logits_112", "boxes", "masks", "masks_small")
    whole = {k: v for k, v in units["refine_mask_head"].items() if k != "hidden"}
    entropy = units["bar_cross_entropy"]
    return {
        **{name: units[name] for name in MASK_HEAD_UNITS},
        "sfm_stage": {**units["sfm_stage"], "runs": units["sfm_stage"]["runs"][:1]},
        "refine_mask_head": whole,
        "bar_cross_entropy": {**entropy, "cases": entropy["cases"][:1]},
        "test_refine": {
            part: {size: value[:1] for size, value in values.items()}
            for part, values in refined.items()
        },
        "paste": {
            **{k: v for k, v in pasted.items() if k != "probabilities_whole_image"},
            **{key: pasted[key][list(PASTED)] for key in rows},
            "masks_rle": [pasted["masks_rle"][i] for i in PASTED],
        },
        "mask_roi_align": {
            **pooled,
            "maps": [map_[:, :1] for map_ in pooled["maps"]],
            "output": pooled["output"][:, :1],
        },
    }


def _after(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith(BEFORE)}


def packed(value: Any, pool: dict[tuple, Tensor]) -> Any:
    """Copies views, whose files would hold the whole storage, and stores equal tensors once."""
    if isinstance(value, dict):
        return {key: packed(inner, pool) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(packed(inner, pool) for inner in value)
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
    units = compact_units(load_golden(args.source / "units.pt"))
    units["co_dino_decoder"] = decoder_unit(load_golden(args.source / "case_B.pt"))
    masks = load_golden(args.source / "units_M.pt")
    compact = {
        "units": units,
        "units_M_data": mask_units(masks),
        "units_M_head": mask_head_units(masks),
    }
    for name in CASES:
        case = load_golden(args.source / f"case_{name}.pt")
        compact[f"case_{name}_compact"] = compact_case(case)
    for name, content in compact.items():
        target = args.output / f"{name}.pt.xz"
        save_golden(packed(content, {}), target)
        print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
