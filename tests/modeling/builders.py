"""Tiny models, batches and values that the tests of the model share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.structures import Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor

from co_detr.engine.config import apply_overrides, load_config
from co_detr.modeling import CoDETR
from co_detr.modeling.auxiliary import DenseHead, HybridAssignmentHeads
from co_detr.modeling.backbones import SwinTransformer, TimmBackbone, VisionTransformer
from co_detr.modeling.backbones.resnet import resnet_stages
from co_detr.modeling.detectors import DECODER, InferencePass
from co_detr.modeling.geometry import Geometry, Levels
from co_detr.structures import Candidates, EncoderMemory
from tests.device import DEVICE, NAME, on_host
from tests.paths import config_path, experiments

BASELINES = sorted(experiments("baselines"))
EXPERIMENTS = sorted(experiments().keys() - experiments("baselines", "ablation").keys())
BY_HEADS = {
    0: "deformable_detr_r50",
    1: "co_detr_r50_atss",
    2: "co_detr_r50",
    6: "co_detr_r50_k6",
}
NUM_CLASSES = 5
NUM_QUERIES = 20
NUM_EXTRA = 45  # of hybrid matching


def shrink(cfg: DictConfig) -> DictConfig:
    """Any experiment at test size; levels, heads, losses and the recipe stay as they are."""
    model = cfg.model
    _shrink_backbone(model.backbone)
    if "padding" in model:
        model.padding.square_size = 128
    model.encoder.update(embed_dim=32, num_heads=4, num_layers=2, feedforward_dim=48)
    if "num_points" in model.encoder:
        model.encoder.num_points = 2
    if model.decoder is not None:
        model.decoder.num_layers = 2
        for name, source in model.queries.items():
            if name != "_target_":
                source.num_queries = NUM_QUERIES if name == "matching" else 30
        if "num_extra" in model.queries.matching:
            model.queries.matching.num_extra = NUM_EXTRA
    if model.get("mask_head") is not None and model.mask_head.iou_head is not None:
        model.mask_head.iou_head.update(conv_dim=16, fc_dim=32)
    cfg.train.update(device=NAME, init_checkpoint="")
    cfg.train.cuda.tf32 = False  # what is compared with the CPU has to be float32
    cfg.dataloader.train.num_workers = cfg.dataloader.test.num_workers = 0
    auxiliary = model.auxiliary
    if auxiliary is None:
        return cfg
    auxiliary.pyramid.num_groups = 8
    if auxiliary.positive_queries is not None:
        auxiliary.positive_queries.max_queries = 30
    for name in HybridAssignmentHeads.head_names(auxiliary):
        if issubclass(auxiliary[name]._target_, DenseHead):
            auxiliary[name]._target_.make_small(auxiliary[name], num_groups=8)
    if "roi" in auxiliary:
        rpn, roi_heads = auxiliary.roi.rpn, auxiliary.roi.roi_heads
        strides = rpn.anchor_generator.strides
        rpn.anchor_generator.sizes = [[2.0 * s, 2.5 * s, 3.2 * s] for s in strides]
        rpn.update(batch_size_per_image=64, pre_nms_topk=(100, 100), post_nms_topk=(60, 60))
        roi_heads.batch_size_per_image = 32
        roi_heads.box_head.conv_dims = [32 for _ in roi_heads.box_head.conv_dims]
        roi_heads.box_head.fc_dims = [32 for _ in roi_heads.box_head.fc_dims]
        if "mask_head" in roi_heads:
            roi_heads.mask_head.conv_dims = [16, 16]
    return cfg


def _shrink_backbone(backbone: DictConfig) -> None:
    bottom_up = backbone.bottom_up
    if bottom_up._target_ is VisionTransformer:
        bottom_up.update(embed_dim=32, depth=3, num_heads=2, window_size=3, global_blocks=[1])
        bottom_up.update(pretrain_image_size=64, drop_path_rate=0.0)
        return  # the pyramid has the width of the vision transformer
    if bottom_up._target_ is TimmBackbone:
        bottom_up.update(name="test_convnext", drop_path_rate=0.0)
    if backbone.get("num_groups", 32) is not None:
        backbone.num_groups = 8
    if bottom_up._target_ is SwinTransformer:
        bottom_up.update(embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 4], window_size=3)
        bottom_up.drop_path_rate = 0.0
    elif bottom_up._target_ is not TimmBackbone:
        bottom_up.stem.update(out_channels=16, norm="FrozenBN")
        bottom_up.stages = L(resnet_stages)(depth=18, stem_channels=16, res2_channels=16)
        bottom_up.freeze_at = 0


def tiny_config(heads: int = 2, overrides: Sequence[str] = ()) -> DictConfig:
    """The reference recipe with `heads` auxiliary heads, at test size; then overrides."""
    cfg = shrink(load_config(config_path(BY_HEADS[heads])))
    apply_overrides(cfg, [f"model.num_classes={NUM_CLASSES}", *overrides])
    return cfg


def tiny_model(heads: int = 2, overrides: Sequence[str] = (), seed: int = 0) -> CoDETR:
    """A tiny model on the tests' device in training mode, with the initial weights of `seed`."""
    cfg = tiny_config(heads, overrides)
    torch.manual_seed(seed)
    return instantiate(cfg.model).to(DEVICE)


def randomize(model: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Moves every parameter, so that no layer is zero, one, or the same as another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * noise.to(parameter)


def random_boxes(
    number: int, size: tuple[int, int], generator: torch.Generator, smallest: float = 8.0
) -> Tensor:
    """``(number, 4)`` absolute xyxy inside an image (height, width)."""
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    sides = smallest + torch.rand(number, 2, generator=generator) * (extent / 2 - smallest)
    low = torch.rand(number, 2, generator=generator) * (extent - sides)
    return torch.cat([low, low + sides], dim=1)


def make_instances(boxes: Tensor, classes: Tensor, size: tuple[int, int]) -> Instances:
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)


def make_batch(
    sizes: Sequence[tuple[int, int]] = ((96, 128), (80, 112)),
    num_gts: Sequence[int] = (3, 2),
    seed: int = 0,
) -> list[dict]:
    """Inputs as the data mapper makes them, on the host: random images and boxes."""
    with on_host():
        return _make_batch(sizes, num_gts, seed)


def _make_batch(sizes: Sequence[tuple[int, int]], num_gts: Sequence[int], seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for size, number in zip(sizes, num_gts, strict=True):
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        classes = torch.randint(0, NUM_CLASSES, (number,), generator=generator)
        boxes = random_boxes(number, size, generator)
        batch.append(
            {"image": image, "instances": make_instances(boxes, classes, size)}
            | {"height": size[0], "width": size[1], "image_id": len(batch)}
        )
    return batch


def with_masks(batch: list[dict]) -> list[dict]:
    """Gives every object the polygon of its box as mask, in place."""
    for sample in batch:
        boxes = sample["instances"].gt_boxes.tensor.numpy()
        polygons = [[box[[0, 1, 2, 1, 2, 3, 0, 3]]] for box in boxes]
        sample["instances"].gt_masks = PolygonMasks(polygons)
    return batch


def train_step(model: CoDETR, batch: list[dict], seed: int = 0) -> dict[str, Tensor]:
    """Losses of one step and gradients in `.grad`; sampling is drawn from `seed`."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    return losses


def head_detections(model: CoDETR, name: str, images: ImageList) -> list[Instances]:
    """What an auxiliary head of a model in eval mode finds, asked for without the model's help."""
    features = model.auxiliary.pyramid(model.encode(images))
    return model.auxiliary.heads[name].detect(images, features).instances


@torch.no_grad()
def decoder_detections(model: CoDETR, images: ImageList) -> list[Instances]:
    """What the decoder of a model in eval mode finds, in pixels of the network input."""
    return InferencePass(model, images).detections(DECODER)


def assert_complete(model: CoDETR, losses: dict[str, Tensor]) -> None:
    """All losses are finite, and every trainable parameter has a finite gradient."""
    wrong = [name for name, value in losses.items() if not value.isfinite()]
    assert not wrong, f"not finite: {wrong}"
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    missing = [name for name, p in trainable.items() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    wrong = [name for name, p in trainable.items() if not p.grad.isfinite().all()]
    assert not wrong, f"gradient not finite: {wrong}"


@contextlib.contextmanager
def evaluating(model: CoDETR) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def detect(model: CoDETR, batch: list[dict]) -> list[Instances]:
    with evaluating(model):
        return [result["instances"] for result in model(batch)]


def is_inside(found: Instances) -> bool:
    """Whether all predicted boxes lie in the image, borders included."""
    height, width = found.image_size
    boxes = found.pred_boxes.tensor
    limits = boxes.new_tensor([width, height, width, height])
    return bool(((boxes >= 0) & (boxes <= limits)).all())


def geometry_of(
    image_sizes: Sequence[tuple[int, int]], padded: tuple[int, int] | None = None
) -> Geometry:
    """Of images in a batch of a size, or of the size of the largest."""
    padded = padded or tuple(max(sides) for sides in zip(*image_sizes, strict=True))
    return Geometry.of(image_sizes, padded, DEVICE)


def factor_of(image_size: tuple[int, int]) -> Tensor:
    """``(4,)`` from normalized boxes to pixels of an image (height, width)."""
    return geometry_of([image_size]).factors[0]


def random_memory(
    level_shapes: Sequence[tuple[int, int]] = ((12, 16), (6, 8), (3, 4), (2, 2)),
    image_sizes: Sequence[tuple[int, int]] = ((96, 128), (96, 128)),
    channels: int = 32,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> EncoderMemory:
    """A memory without padding whose tokens are random and require gradients."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(height * width for height, width in level_shapes)
    shape = (len(image_sizes), tokens, channels)
    levels = Levels(
        geometry_of(image_sizes),
        level_shapes=list(level_shapes),
        padding_mask=torch.zeros(shape[:2], dtype=torch.bool),
        valid_ratios=torch.ones(shape[0], len(level_shapes), 2, dtype=dtype),
    )
    tokens = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    return EncoderMemory(tokens, levels)


def make_candidates(
    positives: Sequence[int],
    backgrounds: Sequence[int],
    size: tuple[int, int] = (96, 128),
    channels: int = 32,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Candidates, list[Tensor]]:
    """Candidates per image in mixed order, some of them ignored (-1).

    Returns:
        the candidates, and the feature tables ``(R, C)`` that they gather from.
    """
    generator = torch.Generator().manual_seed(seed)
    instances, tables = [], []
    for foreground, background in zip(positives, backgrounds, strict=True):
        classes = torch.randint(0, NUM_CLASSES, (foreground,), generator=generator)
        labels = [classes, torch.full((background,), NUM_CLASSES), torch.full((2,), -1)]
        labels = torch.cat(labels)
        order = torch.randperm(len(labels), generator=generator)
        labels = labels[order]
        targets = random_boxes(len(labels), size, generator)
        targets = targets * ((labels >= 0) & (labels < NUM_CLASSES))[:, None]
        instances.append(
            Instances(
                size,
                proposal_boxes=Boxes(random_boxes(len(labels), size, generator)),
                gt_classes=labels,
                gt_boxes=Boxes(targets),
            )
        )
        table = torch.randn(len(labels), channels, generator=generator, dtype=dtype)
        tables.append(table.requires_grad_())
    return Candidates(instances, lambda image, indices: tables[image][indices]), tables
