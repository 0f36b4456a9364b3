"""Units of masks in the data: run lengths, bitmaps that are cropped and resized, copy-paste."""

from __future__ import annotations

from typing import Any

import detectron2.data.transforms as T
import numpy as np
import pycocotools.mask as mask_utils
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from co_detr.data.copy_paste import CopyPaste, Scene, paste
from co_detr.data.masks import CroppedMasks, draw_mask, picked_pixels, transformed_masks
from co_detr.data.segmentation import check_mask, extent_of
from tests.parity.oracle.report import Unit, equality
from tests.parity.oracle.tolerances import HIDDEN_OBJECTS


def coco_rle(unit: Unit) -> None:
    """The masks of `mask_targets` in COCO's forms: all are drawn, and written, alike."""
    _ = unit["note"]
    height, width = unit["image_hw"]
    bitmaps = _bitmaps(unit)
    for index, entry in enumerate(unit.expected("objects")):
        prefix = f"objects[{index}]"
        found = []
        for key in ("counts_uncompressed", "counts_compressed"):
            form = {"size": [height, width], "counts": entry[key]}
            usable = check_mask(form, height, width).usable
            same = equality(bitmaps[index], torch.from_numpy(draw_mask(usable, height, width)))
            unit.report.record(f"{unit.name}.{prefix}.{key}", same, "equal", "drawn")
            found.append(usable)
        left, top, right, bottom = extent_of(found[0])
        unit.exact(f"{prefix}.counts_compressed", found[0]["counts"])
        unit.exact(f"{prefix}.bbox_xywh", [left, top, right - left, bottom - top])
        unit.exact(f"{prefix}.area", int(draw_mask(found[1], height, width).sum()))


def bitmap_ops(unit: Unit) -> None:
    """What the reference does to bitmaps; padding is left to the model's batches here."""
    bitmaps = _bitmaps(unit)
    masks = [check_mask(_packed(bitmap), *bitmap.shape).usable for bitmap in bitmaps]
    height, width = bitmaps.shape[1:]
    for key, size in (
        ("resize_37x61", (37, 61)),
        ("rescale_120_97", tuple(unit["rescale_120_97_hw"])),
    ):
        resize = T.TransformList([T.ResizeTransform(height, width, *size)])
        found = transformed_masks(masks, (height, width), resize).whole()
        unit.exact(key, found.tensor.to(torch.uint8))
    for index, entry in enumerate(unit.expected("crop")):
        # The reference leaves a pixel of a crop without area.
        left, top, right, bottom = entry["box"]
        unit.report.given(f"{unit.name}.crop[{index}].box", "input")
        left, top = max(left, 0), max(top, 0)
        size = max(min(right, width) - left, 1), max(min(bottom, height) - top, 1)
        crop = T.TransformList([T.CropTransform(left, top, *size)])
        picked = picked_pixels(crop, (height, width))
        rows, columns = picked.rows, picked.columns
        unit.exact(f"crop[{index}].hw", [len(rows), len(columns)])
        found = transformed_masks(masks, (height, width), crop).whole().tensor
        unit.exact(f"crop[{index}].areas", found.sum(dim=(1, 2)).int())
    flip = T.TransformList([T.HFlipTransform(width)])
    flipped = transformed_masks(masks, (height, width), flip).whole()
    unit.exact(
        "flip_equals_reversed_columns",
        bool((flipped.tensor.to(torch.uint8) == bitmaps.flip(2)).all()),
    )
    whole = CroppedMasks.of_bitmaps(bitmaps.numpy() != 0, (height, width))
    unit.close("boxes_from_masks", whole.boxes().tensor)
    _ = unit["pad_hw"]


def copy_paste(unit: Unit) -> None:
    """The recorded draws, and what is pasted by them."""
    size = tuple(unit["image_hw"])
    rule = {
        "most_moved": unit["bbox_occluded_thr"],
        "enough_left": unit["mask_occluded_thr"],
    }
    most = {"at_most_3": 3}
    limit = unit["max_num_pasted"]
    scenes = {
        key: _scene(unit, key, size)
        for key in ("destination", "source", "hand_destination", "hand_source")
    }
    for name, runs in unit.expected("runs").items():
        of_hand = "hand_" if name.startswith("hand_") else ""
        scene, donor = scenes[f"{of_hand}destination"], scenes[f"{of_hand}source"]
        if name == "empty_destination":
            scene = Scene(scene.image, scene.instances[:0])
        if name == "empty_source":
            donor = Scene(donor.image, donor.instances[:0])
        for index, run in enumerate(runs if isinstance(runs, list) else [runs]):
            prefix = f"runs.{name}[{index}]" if isinstance(runs, list) else f"runs.{name}"
            chosen = np.arange(len(donor.instances))
            if run["draws"]:
                np.random.seed(run["seed"])
                chosen = CopyPaste(max_pasted=most.get(name, limit)).draw(len(donor.instances))
                unit.exact(f"{prefix}.draws.num_pasted", len(chosen))
                high = min(len(donor.instances) + 1, most.get(name, limit))
                unit.exact(f"{prefix}.draws.randint_high_exclusive", high)
                inds = torch.from_numpy(chosen).int()
                unit.exact(f"{prefix}.draws.selected_inds", inds)
            for key in ("seed", "img_dtype"):
                unit.report.given(f"{unit.name}.{prefix}.{key}", "how it was made")
            objects = donor.instances[torch.from_numpy(chosen)]
            pixels = donor.image.__getitem__
            found = paste(scene, objects, lambda at, of=pixels: of((..., *at)), **rule)
            _compare_run(unit, prefix, run, found, whole=name != "empty_destination")


def _compare_run(unit: Unit, prefix: str, run: dict[str, Any], found: Scene, whole: bool) -> None:
    masks = found.instances.gt_masks.whole().tensor
    ours = {
        "boxes": found.instances.gt_boxes.tensor,
        "labels": found.instances.gt_classes.int(),
        "masks_rle": [_packed(mask)["counts"] for mask in masks],
        "mask_areas": masks.sum(dim=(1, 2)).tolist(),
    }
    stays = [index for index, area in enumerate(run["mask_areas"]) if area]
    hidden = len(stays) < len(run["mask_areas"])
    for key, value in ours.items():
        expected = run[key]
        kept = expected[stays] if isinstance(expected, Tensor) else [expected[i] for i in stays]
        difference = HIDDEN_OBJECTS if hidden else None
        unit.report.record(
            *(f"{unit.name}.{prefix}.{key}", equality(kept, value), "equal"),
            note="without those of which nothing is left" if hidden else "",
            difference=difference,
        )
    if "img" in run:
        image, expected = found.image.permute(1, 2, 0), run["img"]
        note = ""
        if not whole:  # the image under the objects is in no file
            pasted = masks.any(dim=0)
            image, expected, note = image[pasted], expected[pasted], "pasted pixels"
        same = equality(expected, image)
        unit.report.record(f"{unit.name}.{prefix}.img", same, "equal", note)


def _scene(unit: Unit, key: str, size: tuple[int, int]) -> Scene:
    entry = unit[key]
    masks = [check_mask({"size": size, "counts": counts}, *size) for counts in entry["masks_rle"]]
    bitmaps = np.stack([draw_mask(mask.usable, *size) for mask in masks])
    instances = Instances(
        size,
        gt_boxes=Boxes(entry["boxes"]),
        gt_classes=entry["labels"].long(),
        gt_masks=CroppedMasks.of_bitmaps(bitmaps != 0, size),
    )
    return Scene(entry["img"].permute(2, 0, 1), instances)


def _bitmaps(unit: Unit) -> Tensor:
    """``(n, h, w)`` uint8: in the complete file those of another unit."""
    if unit.has("bitmaps"):
        return unit["bitmaps"]
    return unit.report.entries["mask_targets.bitmaps"]


def _packed(mask: Tensor) -> dict[str, Any]:
    """COCO's compressed form of a bitmap, with text."""
    found = mask_utils.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode("ascii")}
