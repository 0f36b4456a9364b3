"""The model of ours that a golden case describes, and what its modules give while it runs."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import Backbone
from omegaconf import DictConfig
from torch import Tensor

from co_detr.checkpoint.official import convert_official, rename_official
from co_detr.modeling import CoDETR
from co_detr.modeling.backbones.resnet import BLOCKS_PER_STAGE, resnet_stages
from tests.parity.oracle.golden import Case

CONFIGS = Path(__file__).parents[3] / "configs" / "models"
NUM_HEADS = 8  # of attention, in all official configs; the shapes of weights do not tell
RATIOS = 3  # aspect ratios of RPN anchors
RPN_SCALE = 4  # side of the smallest RPN anchor in strides
TRANSFORMER = "query_head.transformer"


class RecordedBackbone(Backbone):
    """Stands in for backbone and neck: gives recorded maps, whatever the images are.

    Attributes:
        maps: ``(B, C, H, W)`` per level, finest first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {f"recorded{level}": level_map for level, level_map in enumerate(self.maps)}


def build_model(case: Case) -> CoDETR:
    """Our model with the widths of the case's weights, loaded through our converter.

    Raises:
        CheckpointError: naming weights that the model has no place for, or that it lacks.
    """
    weights, meta = case.weights, case.meta
    names = ("co_dino", "co_dino") if case.is_dino else ("deformable_detr", "auxiliary")
    model = LazyConfig.load(str(CONFIGS / f"{names[0]}.py")).model
    model.auxiliary = LazyConfig.load(str(CONFIGS / f"{names[1]}.py")).auxiliary
    model.num_classes = meta["num_classes"]
    model.queries.matching.num_queries = meta["num_query"]
    model.decoder.num_layers = meta["dec_layers"]
    _size_encoder(model.encoder, weights, meta)
    _size_heads(model.auxiliary, weights)
    if case.kind == "M":
        _as_instance_model(model, case)
    model.auxiliary.positive_queries.padding = case.padding
    model.postprocessor.max_detections = case.max_detections
    if case.has_backbone:
        _size_resnet(model.backbone.bottom_up, weights)
    else:
        model.backbone = L(RecordedBackbone)()
    built = instantiate(model)
    if not case.has_backbone:
        built.backbone.maps = list(case.base["eval"]["neck_feats"])
    built.load_state_dict(convert_official(weights, built).state_dict, strict=True)
    return built


def build_decoder(weights: dict[str, Tensor], num_classes: int, num_layers: int) -> CoDETR:
    """A Co-DINO for what comes after the encoder, by the reference's names of its weights.

    Backbone and encoder are only there to make it a model.
    """
    model = LazyConfig.load(str(CONFIGS / "co_dino.py")).model
    content = weights[f"{TRANSFORMER}.query_embed.weight"]
    layer = f"{TRANSFORMER}.decoder.layers.0"
    model.num_classes, model.backbone = num_classes, L(RecordedBackbone)()
    model.queries.denoising = None
    model.queries.matching.num_queries = len(content)
    model.decoder.num_layers = num_layers
    model.encoder.update(
        num_layers=0,
        embed_dim=content.shape[1],
        feedforward_dim=weights[f"{layer}.ffns.0.layers.0.0.bias"].numel(),
    )
    built = instantiate(model).eval()
    renamed = rename_official(weights, built)
    missing, unexpected = built.load_state_dict(renamed.state_dict, strict=False)
    left = [*renamed.unknown, *unexpected, *(key for key in missing if "encoder." not in key)]
    if left:
        raise ValueError(f"Weights without a place, or places without weights: {left}.")
    return built


def _size_encoder(encoder: DictConfig, weights: dict[str, Tensor], meta: dict) -> None:
    layer = f"{TRANSFORMER}.encoder.layers.0"
    encoder.num_layers = meta["enc_layers"]
    encoder.embed_dim = meta["embed_dims"]
    encoder.num_heads = NUM_HEADS
    encoder.num_levels = len(weights[f"{TRANSFORMER}.level_embeds"])
    samples = weights[f"{layer}.attentions.0.attention_weights.bias"].numel()
    encoder.num_points = samples // (NUM_HEADS * encoder.num_levels)
    encoder.feedforward_dim = weights[f"{layer}.ffns.0.layers.0.0.bias"].numel()


def _size_heads(auxiliary: DictConfig, weights: dict[str, Tensor]) -> None:
    auxiliary.roi.roi_heads.box_head.fc_dims = [
        weights[f"roi_head.0.bbox_head.shared_fcs.{i}.bias"].numel()
        for i in range(_count(weights, "roi_head.0.bbox_head.shared_fcs.", ".bias"))
    ]
    _size_box_predictor(auxiliary.roi.roi_heads, weights)
    auxiliary.atss.num_convs = _count(weights, "bbox_head.0.cls_convs.", ".conv.weight")
    anchors = weights["rpn_head.rpn_cls.bias"].numel()
    scales, rpn = anchors // RATIOS, auxiliary.roi.rpn
    rpn.head.num_anchors = anchors
    rpn.anchor_generator.sizes = [
        [RPN_SCALE * stride * 2 ** (i / scales) for i in range(scales)]
        for stride in rpn.anchor_generator.strides
    ]


def _size_box_predictor(roi_heads: DictConfig, weights: dict[str, Tensor]) -> None:
    convs = _count(weights, "roi_head.0.bbox_head.shared_convs.", ".conv.weight")
    if convs:
        width = len(weights["roi_head.0.bbox_head.shared_convs.0.conv.weight"])
        roi_heads.box_head.update(conv_dims=[width] * convs, conv_norm="GN")
    predictor = roi_heads.box_predictor
    predictor.input_shape.channels = roi_heads.box_head.fc_dims[-1]
    predictor.cls_agnostic_bbox_reg = len(weights["roi_head.0.bbox_head.fc_reg.bias"]) == 4


def _as_instance_model(model: DictConfig, case: Case) -> None:
    """What the configuration in the file says, beside the shapes of weights."""
    weights, config = case.weights, case.meta["config"]
    noise = config["query_head"]["dn_cfg"]
    model.queries.denoising.update(
        num_queries=noise["group_cfg"]["num_dn_queries"], box_noise=noise["noise_scale"]["box"]
    )
    stds = config["roi_head"][0]["bbox_head"]["bbox_coder"]["target_stds"]
    transform = model.auxiliary.roi.roi_heads.box_predictor.box2box_transform
    transform.weights = tuple(round(1 / std) for std in stds)
    model.mask_head = LazyConfig.load(str(CONFIGS / "mask_head.py")).mask_head
    scale = model.mask_head.lambda_2 * case.meta["dec_layers"]
    sampler = config["train_cfg"][1]["sampler"]
    model.mask_head.width = len(weights["mask_head.instance_convs.0.conv.weight"])
    model.mask_head.criterion.loss_weight = config["mask_head"]["loss_weight"] / scale
    model.mask_head.sampler.max_positives = int(sampler["num"] * sampler["pos_fraction"])
    model.mask_head.iou_head.update(
        conv_dim=len(weights["mask_iou_head.convs.0.conv.weight"]),
        fc_dim=len(weights["mask_iou_head.fcs.0.bias"]),
        loss_weight=config["mask_iou_head"]["loss_iou"]["loss_weight"] / scale,
    )


def _size_resnet(resnet: DictConfig, weights: dict[str, Tensor]) -> None:
    stem = weights["backbone.conv1.weight"].shape[0]
    blocks = tuple(_count(weights, f"backbone.layer{i}.", ".conv3.weight") for i in (1, 2, 3, 4))
    depths = [d for d, stages in BLOCKS_PER_STAGE.items() if stages == blocks and d >= 50]
    if not depths:
        raise ValueError(f"No bottleneck ResNet has {blocks} blocks per stage.")
    resnet.stem.out_channels = stem
    resnet.stages = L(resnet_stages)(
        depth=depths[0],
        stem_channels=stem,
        res2_channels=weights["backbone.layer1.0.conv3.weight"].shape[0],
    )


def _count(weights: dict[str, Tensor], prefix: str, suffix: str) -> int:
    return sum(key.startswith(prefix) and key.endswith(suffix) for key in weights)


class Capture:
    """Keeps the outputs of modules, in call order, while its ``with`` block runs."""

    def __init__(self, *modules: torch.nn.Module):
        self.modules = modules
        self.outputs: list[Tensor] = []

    def __enter__(self) -> Capture:
        self._hooks = [
            module.register_forward_hook(lambda _m, _i, output: self.outputs.append(output))
            for module in self.modules
        ]
        return self

    def __exit__(self, *exc) -> None:
        for hook in self._hooks:
            hook.remove()


def decoder_states(model: CoDETR) -> Capture:
    """Captures what classes and boxes are read from: one ``(B, Q, C)`` per decoder layer."""
    norm = model.decoder.output_norm
    return Capture(*model.decoder.layers) if norm is None else Capture(norm)
