"""Checks of the mask head's parts: its network, targets, losses, and what is made of its masks.

In float64 where the part computes in what it is given; the reference's numbers are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import PolygonMasks
from torch import Tensor, nn
from torchvision.ops import roi_align

from co_detr.checkpoint.official_table import Row, mask_rows
from co_detr.modeling.backbones.vit import ChannelNorm
from co_detr.modeling.mask_losses import (
    MaskCriterion,
    RegionSampler,
    boundary,
    covers,
    enlarge,
    mask_iou_target,
    refine,
    targets_of,
    values_at,
)
from co_detr.modeling.masks import (
    MaskIoUHead,
    MaskPredictions,
    MaskStage,
    MultiBranchFusion,
    RefineMaskHead,
    Regions,
    layer_normed_conv,
    pool_level,
)
from co_detr.modeling.postprocess import DetectedMasks, _sampled_at
from co_detr.structures import bitmaps_of
from tests.parity.oracle.report import Unit

SIZES = RefineMaskHead.sizes
EXACT = 1e-5  # relative to the largest: float32 against float64, through a dozen layers
GRADIENT = 3e-5


class _AnyHead(nn.Module):
    """A head with scores, of which the table of names only asks that."""

    iou_head = True


def _renamed(official: dict[str, Tensor], prefix: str, ours: str) -> dict[str, Tensor]:
    """Tensors of a part by our names.

    Args:
        prefix: of the reference's names of the part; ours: of our names, which are cut off.
    """
    rows = [row for row in mask_rows(_AnyHead()) if isinstance(row, Row)]
    renamed = {}
    for key, value in official.items():
        names = [name for row in rows if (name := row.to_ours(f"{prefix}{key}")) is not None]
        renamed[names[0].removeprefix(ours)] = value.double()
    return renamed


def _loaded(module: nn.Module, official: dict[str, Tensor], prefix: str, ours: str) -> nn.Module:
    module.load_state_dict(_renamed(official, prefix, ours))
    return module.double().train()


def _input(value: Tensor) -> Tensor:
    return value.double().requires_grad_()


def _gradients(
    unit: Unit, name: str, module: nn.Module, official: dict[str, Tensor], prefix: str, ours: str
) -> None:
    """Those of all parameters, by the reference's names."""
    parameters = dict(module.named_parameters())
    for key in official:
        (own,) = _renamed({key: official[key]}, prefix, ours)
        gradient = parameters[own].grad
        gradient = torch.zeros_like(parameters[own]) if gradient is None else gradient
        unit.close(f"{name}.{key}", gradient, rtol=GRADIENT, atol=1e-7)


def ln2d(unit: Unit) -> None:
    """Alone, as in the pyramid of the ViT, and in the convolutions of the heads."""
    x = _input(unit["input"])
    norm = ChannelNorm(x.shape[1], eps=unit["eps"]).double()
    norm.load_state_dict({"weight": unit["weight"].double(), "bias": unit["bias"].double()})
    output = norm(x)
    output.backward(unit["grad_output"].double())
    unit.close("output", output, rtol=EXACT)
    unit.close("grad_input", x.grad, rtol=EXACT)
    unit.close("grad_weight", norm.weight.grad, rtol=EXACT)
    unit.close("grad_bias", norm.bias.grad, rtol=EXACT)

    block = unit["conv_block"]
    names = {"conv.weight": "weight", "norm_layer.weight": "norm.weight"}
    names["norm_layer.bias"] = "norm.bias"
    weights = {names[key]: value.double() for key, value in block["state_dict"].items()}
    out, channels = weights["weight"].shape[:2]
    conv = layer_normed_conv(channels, out).double()
    conv.load_state_dict(weights)
    unit.close("conv_block.output", conv(block["input"].double()), rtol=EXACT)
    unit.close("conv_block.eps", conv.norm.eps)
    unit.exact("conv_block.has_conv_bias", conv.bias is not None)


def multi_branch_fusion_avg(unit: Unit) -> None:
    x, state = _input(unit["input"]), unit["state_dict"]
    prefix, ours = "mask_head.stages.0.fuse_conv.1.", "mask_head.stages.0.fusion."
    fusion = _loaded(MultiBranchFusion(x.shape[1]), state, prefix, ours)
    output = fusion(x)
    output.backward(unit["grad_output"].double())
    unit.close("output", output, rtol=EXACT)
    unit.close("grad_input", x.grad, rtol=GRADIENT)
    _gradients(unit, "grads", fusion, state, prefix, ours)
    without = sum(branch(x) for branch in fusion.branches)
    unit.close("output_without_average", fusion.merge_conv(without), rtol=EXACT)


def sfm_stage(unit: Unit) -> None:
    state, prefix = unit["state_dict"], "mask_head.stages.0."
    rois, size, stride = unit["rois"].double(), unit["out_size"], unit["semantic_stride"]
    width, semantic_dim = state["semantic_transform_in.weight"].shape[:2]
    out = len(state["fuse_transform_out.bias"]) + 1
    for number, run in enumerate(unit["runs"]):
        stage = MaskStage(semantic_dim, width, out, doubles=run["upsample"])
        _loaded(stage, state, prefix, prefix)
        inputs = [
            _input(unit[key]) for key in ("instance_feats", "instance_logits", "semantic_map")
        ]
        map_ = stage.semantic_conv(inputs[2])
        pooled = pool_level(map_, rois[:, 0], rois[:, 1:], size, stride)
        output = stage(inputs[0], pooled, inputs[1])
        output.backward(run["grad_output"].double())
        name = f"runs[{number}]"
        unit.close(f"{name}.output", output, rtol=EXACT)
        unit.close(f"{name}.semantic_transformed", map_, rtol=EXACT)
        for key, value in zip(("instance", "logits", "semantic"), inputs, strict=True):
            unit.close(f"{name}.grad_{key}", value.grad, rtol=GRADIENT)
        _gradients(unit, f"{name}.grads", stage, run["grads"], prefix, prefix)


def feature_upsample(unit: Unit) -> None:
    """Of features between stages half-pixel centers, of masks corners."""
    x = unit["input"].double()
    unit.exact("align_corners", None)  # PyTorch's default: off
    doubled = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    unit.close("output", doubled, rtol=EXACT)
    unit.close("last_stage_output", enlarge(x), rtol=EXACT)


def refine_mask_head(unit: Unit) -> None:
    """The whole head, its losses and gradients, from pooled features on; also of no region."""
    state, prefix = unit["state_dict"], "mask_head."
    instance, semantic = _input(unit["instance_feats"]), _input(unit["semantic_map"])
    rois, labels = unit["rois"].double(), unit["labels"].long()
    head = RefineMaskHead(
        num_classes=unit["num_classes"],
        embed_dim=instance.shape[1],
        strides=[4],
        num_decoder_layers=1,
        lambda_2=1.0,
        sampler=RegionSampler(num_proposals=1),
        criterion=MaskCriterion(loss_weight=unit["loss_weight"]),
    )
    _loaded(head, state, prefix, prefix)
    head.pool = lambda maps, regions: instance[: len(regions.boxes)]
    kept: dict[str, Any] = {}
    for name in ("instance_convs", "semantic_convs", "stages.0", "stages.1", "stages.2"):
        module = head.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, o, name=name: kept.update({name: o}))
    images = rois[:, 0].long()
    regions = Regions(rois[:, 1:], labels, images, torch.zeros_like(images))
    found = head([semantic], regions)
    targets = [target.bool() for target in unit["targets"]]
    stages = head.criterion.stages(found.logits, targets)
    loss = head.criterion(found.logits, targets)
    loss.backward()
    unit.close("stage_logits", found.logits, rtol=EXACT)
    if unit.has("hidden"):
        features = [kept[f"stages.{stage}"] for stage in range(3)]
        unit.close("hidden.stage_features", features, rtol=EXACT)
        unit.close("hidden.instance_after_convs", kept["instance_convs"], rtol=EXACT)
        unit.close("hidden.semantic_after_convs", kept["semantic_convs"], rtol=EXACT)
    unit.close("stage_loss_unweighted", [float(stage) for stage in stages], rtol=EXACT)
    unit.close("loss_mask", loss, rtol=EXACT)
    unit.close("grad_instance", instance.grad, rtol=GRADIENT)
    unit.close("grad_semantic", semantic.grad, rtol=GRADIENT)
    _gradients(unit, "grads", head, unit.expected("grads"), prefix, prefix)

    semantic.grad = None
    nothing = head([semantic], Regions(*(value[:0] for value in vars(regions).values())))
    loss = head.criterion(nothing.logits, [target[:0] for target in targets])
    loss.backward()
    unit.close("empty.loss_mask", loss)
    unit.exact("empty.shapes", [[len(e), 1, *e.shape[1:]] for e in nothing.logits])
    unit.exact("empty.semantic_grad_is_zero", not bool(semantic.grad.any()))
    unit.exact("empty.error", None)


def bar_cross_entropy(unit: Unit) -> None:
    weights = unit["stage_weights"]
    unit.exact("start_stage", 1)  # whose mask is the first one before another
    criterion = MaskCriterion(
        loss_weight=1.0, stage_weights=weights, boundary_width=unit["boundary_width"]
    )
    for number, case in enumerate(unit["cases"]):
        name = f"cases[{number}]"
        logits = [_input(stage) for stage in case["stage_logits"]]
        targets = [target.bool() for target in case["targets"]]
        loss = criterion(logits, targets)
        loss.backward()
        unit.close(f"{name}.loss", loss, rtol=EXACT)
        stages = [float(stage) for stage in criterion.stages(logits, targets)]
        unit.close(f"{name}.stage_loss_unweighted", stages, rtol=EXACT)
        regions, previous = criterion.regions(logits, targets), criterion.previous(logits)
        for stage in (2, 3):
            unit.exact(f"{name}.region.stage{stage}", regions[stage])
            unit.exact(f"{name}.prev_pred.stage{stage}", previous[stage - 2])
        norms = [stage.grad.norm().item() for stage in logits]
        unit.close(f"{name}.grad_norms", norms, rtol=GRADIENT, atol=1e-9)
        if "grads_first3" in case:
            gradients = [stage.grad for stage in logits[:3]]
            unit.close(f"{name}.grads_first3", gradients, rtol=GRADIENT, atol=1e-9)


def boundaries(unit: Unit) -> None:
    """0 is background, 1 the band, 2 what else is foreground."""
    masks = unit["masks"]
    for width in (1, 2, 3):
        inner = torch.where(masks, 2, 0)
        found = torch.where(boundary(masks, width), 1, inner).to(torch.uint8)
        unit.exact(f"by_width.{width}", found)


def mask_targets(unit: Unit) -> None:
    bitmaps, boxes = unit["bitmaps"].bool(), unit["boxes"].double()
    truths = unit["gt_inds"].long()
    height, width = unit["image_hw"]
    unit.exact("bitmaps", _drawn(unit["polygons"], bitmaps, (height, width)))
    found = targets_of(bitmaps, boxes, truths, SIZES)
    for size, masks in zip(SIZES, found.masks, strict=True):
        unit.exact(f"targets_{size}", masks.to(torch.uint8))
    limits = boxes.new_tensor([width, height, width, height])
    clipped = torch.minimum(boxes.clamp(min=0), limits)
    unit.close("boxes_clipped", clipped)
    rois = torch.cat([truths[:, None].double(), clipped], dim=1)
    soft = roi_align(bitmaps[:, None].double(), rois, 28, aligned=True)[:, 0]
    unit.close("soft_28", soft, rtol=EXACT)
    unit.remark("gt_boxes", "extents of the polygons; nothing is made of them here")
    for key in ("polygon_rows", "polygon_targets_14", "polygon_targets_28"):
        unit.remark(key, "polygons cropped instead, which neither side trains on")


def _drawn(polygons: list, bitmaps: Tensor, size: tuple[int, int]) -> Tensor:
    """The bitmaps of polygons, with those of objects that have none as they are given."""
    rows = [number for number, polygon in enumerate(polygons) if polygon]
    drawn = bitmaps_of(PolygonMasks([[_flat(p) for p in polygons[n]] for n in rows]), size)
    result = bitmaps.clone()
    result[rows] = drawn
    return result.to(torch.uint8)


def _flat(polygon: Any) -> Any:
    return torch.as_tensor(polygon, dtype=torch.float64).flatten().numpy()


def mask_iou(unit: Unit) -> None:
    """Shares, targets, prediction, loss and scores; the boxes are those of ``mask_targets``."""
    other = unit.siblings["mask_targets"]
    bitmaps, truths = other["bitmaps"].bool(), other["gt_inds"].long()
    boxes = other["boxes"].double()
    state, prefix, ours = unit["state_dict"], "mask_iou_head.", "mask_head.iou_head."
    targets = targets_of(bitmaps, boxes, truths, SIZES)
    logits, feats = _input(unit["stage1_logits"]), _input(unit["mask_feats"])
    labels = unit["labels"].long()
    head = MaskIoUHead(
        num_classes=len(state["fc_mask_iou.bias"]),
        embed_dim=feats.shape[1],
        conv_dim=len(state["convs.0.conv.weight"]),
        fc_dim=len(state["fcs.0.bias"]),
        loss_weight=unit["loss_weight"],
    )
    _loaded(head, state, prefix, ours)
    found = MaskPredictions(feats, [logits, logits])
    loss = head.loss(found, labels, targets)
    loss.backward()
    predicted = head(found)
    unit.exact("bitmap_areas", bitmaps.sum((1, 2)))
    unit.close("area_ratio", targets.shares, rtol=EXACT)
    target = mask_iou_target(logits, targets)
    is_nan = target.isnan()
    unit.exact("is_nan", is_nan)
    unit.exact("used", target > 0)
    _close_but_nan(unit, "targets", target)
    unit.close("pred_all_classes", predicted, rtol=EXACT)
    unit.close("loss_mask_iou", loss, rtol=EXACT)
    unit.close("grad_mask_feats", feats.grad, rtol=GRADIENT)
    unit.close("grad_stage1_logits", logits.grad, rtol=GRADIENT)
    _gradients(unit, "grads", head, state, prefix, ours)
    scores = unit["test_box_scores"].double() * values_at(predicted, labels)
    unit.close("test_scores", scores, rtol=EXACT)


def _close_but_nan(unit: Unit, key: str, actual: Tensor) -> None:
    """NaN never agrees in a report; that it is in the same places is an entry of its own."""
    both = actual.isnan() & unit.expected(key).isnan()
    unit.close(key, actual, rtol=EXACT, where=~both)


def refinement(unit: Unit) -> None:
    raw = [unit["raw"][str(size)].double() for size in (28, 56, 112)]
    before = raw[0]
    for number, size in enumerate((56, 112)):
        unit.exact(f"kept_from_previous.{size}", covers(~boundary(before >= 0, 1)))
        before = refine([raw[0], *raw[: number + 2]])  # of the first mask nothing is used
        unit.close(f"refined.{size}", before, rtol=EXACT)


def paste(unit: Unit) -> None:
    """Whole masks as on the reference's CPU; probabilities over all of the image as on its GPU."""
    probabilities = unit["logits_112"].sigmoid()
    boxes, (height, width) = unit["boxes"][:, :4], unit["image_hw"]
    masks = DetectedMasks(probabilities, boxes, (height, width))
    unit.exact("masks", masks.tensor.to(torch.uint8))
    unit.exact("masks_rle", [rle["counts"] for rle in masks.rles()])
    small = tuple(unit["small_image_hw"])
    scaled = DetectedMasks(probabilities, boxes / unit["scale_factor"], small)
    unit.exact("masks_small", scaled.tensor.to(torch.uint8))
    if unit.has("probabilities_whole_image"):
        whole = _over_the_image(probabilities, boxes, height, width)
        unit.close("probabilities_whole_image", whole, atol=EXACT)
    unit.remark("without_rescale_and_vector_scale", "an error of the reference")


def _over_the_image(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    grids = [
        torch.meshgrid(
            _sampled_at(0, width, box[0], box[2]),
            _sampled_at(0, height, box[1], box[3]),
            indexing="xy",
        )
        for box in boxes
    ]
    grid = torch.stack([torch.stack(axes, dim=-1) for axes in grids])
    return F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0]


def mask_roi_align(unit: Unit) -> None:
    """Levels by size, also exactly at the limits, and the pooled maps."""
    strides, rois = unit["strides"], unit["rois"]
    unit.exact("finest_scale", SIZES[0] * strides[0])
    unit.exact("out_size", SIZES[0])
    head = RefineMaskHead(
        num_classes=1,
        embed_dim=8,
        strides=strides,
        num_decoder_layers=1,
        sampler=RegionSampler(num_proposals=1),
        criterion=MaskCriterion(),
    )
    levels = head.levels(rois[:, 1:])
    unit.exact("levels", levels)
    images = rois[:, 0].long()
    regions = Regions(rois[:, 1:], images, images, levels)
    unit.close("output", head.pool(unit["maps"], regions), rtol=EXACT)


CHECKS = {
    "ln2d": ln2d,
    "multi_branch_fusion_avg": multi_branch_fusion_avg,
    "sfm_stage": sfm_stage,
    "feature_upsample": feature_upsample,
    "refine_mask_head": refine_mask_head,
    "bar_cross_entropy": bar_cross_entropy,
    "boundary": boundaries,
    "mask_targets": mask_targets,
    "mask_iou": mask_iou,
    "test_refine": refinement,
    "paste": paste,
    "mask_roi_align": mask_roi_align,
}
