"""Training under autocast, which on the CPU leaves even norms in half precision."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from co_detr.modeling.auxiliary import ATSSAssigner
from co_detr.modeling.losses import normalize_boxes
from co_detr.modeling.queries import AnchorQueries, LearnedQueries, PointQueries
from tests.device import DEVICE, NAME
from tests.modeling.builders import (
    assert_complete,
    factor_of,
    make_batch,
    random_boxes,
    random_memory,
    tiny_model,
    train_step,
)

NO_AUTOCAST = pytest.mark.skipif(NAME == "emulated", reason="its autocast changes nothing")
NUM_GTS = [(3, 2), (0, 0), (0, 4), (30, 1)]


def autocast_step(model, batch, seed):
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        torch.manual_seed(seed)
        with EventStorage():
            losses = model(batch)
            total = sum(losses.values())
    model.zero_grad(set_to_none=True)
    total.backward()
    return losses


@NO_AUTOCAST
@pytest.mark.parametrize("padding", ["negatives", "mask"])
def test_bfloat16_trains_every_parameter(padding):
    model = tiny_model(2, [f"model.auxiliary.positive_queries.padding={padding}"])
    for seed, num_gts in enumerate(NUM_GTS):
        losses = autocast_step(model, make_batch(num_gts=num_gts, seed=seed), seed)
        assert_complete(model, losses)
        assert all(value.dtype == torch.float32 for value in losses.values())


@NO_AUTOCAST
def test_bfloat16_losses_are_close_to_float32():
    model = tiny_model(1)
    batch = make_batch()
    full = train_step(model, batch)
    half = autocast_step(model, batch, seed=0)
    names = ["matching.loss_cls", "matching.loss_bbox", "atss.loss_cls", "atss_queries.loss_giou"]
    for name in names:
        torch.testing.assert_close(half[name], full[name], rtol=0.1, atol=0.01, msg=name)
    assert half["matching.loss_cls"] != full["matching.loss_cls"]  # autocast was on


@pytest.mark.cpu_only("CUDA keeps tokens in float32: see test_emulated_cuda.py")
def test_geometry_and_targets_stay_in_float32():
    model = tiny_model(1)
    # bfloat16 has 8 bits: it can neither place a box in 1024 pixels nor say 13 / 17.
    size = (136, 1024)
    batch = make_batch((size, (100, 904)), num_gts=(4, 0))
    images = model.preprocess(batch)
    exact = model.encode(images)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), EventStorage():
        output = model.forward_training(images, [sample["instances"] for sample in batch])
    assert output.memory.tokens.dtype == torch.bfloat16
    assert torch.equal(output.memory.valid_ratios, exact.valid_ratios)
    for group, predicted in zip(output.groups, output.predictions, strict=True):
        assert group.reference.dtype == predicted.boxes.dtype == torch.float32
    truth = batch[0]["instances"].gt_boxes.tensor
    expected = normalize_boxes(truth, factor_of(size))
    for targets in output.targets:
        found = targets.boxes[targets.labels < model.num_classes]
        distance = (found[:, None] - expected[None]).abs().amax(-1).amin(-1)
        assert distance.max() < 1e-6


@pytest.mark.parametrize("source", [PointQueries, LearnedQueries, AnchorQueries])
def test_learned_references_do_not_move(source):
    torch.manual_seed(0)
    queries = source(num_queries=300, embed_dim=256).to(DEVICE)
    memory = random_memory(channels=256, dtype=torch.float32)
    expected = queries(memory).reference
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = queries(memory).reference
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_anchors_do_not_follow_the_precision_of_the_maps():
    head = tiny_model(1).auxiliary.heads.atss
    maps = [torch.zeros(1, 32, 2, 40, dtype=torch.bfloat16) for _ in head.strides]
    for level, stride in zip(head.anchors(maps), head.strides, strict=True):
        assert level.dtype == torch.float32
        centers = (level[:40, 0] + level[:40, 2]) / 2
        assert torch.equal(centers, torch.arange(40.0) * stride)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_atss_assigns_anchors_of_any_precision(dtype):
    """Overlaps are float32 whatever the anchors are: Detectron2's Boxes convert them."""
    generator = torch.Generator().manual_seed(0)
    anchors = [random_boxes(n, (96, 96), generator).round().to(dtype) for n in (40, 20)]
    gt_boxes = random_boxes(3, (96, 96), generator).round()
    assigned = ATSSAssigner(topk=5)(anchors, gt_boxes.to(dtype))
    exact = ATSSAssigner(topk=5)([level.float() for level in anchors], gt_boxes)
    assert torch.equal(assigned, exact) and (assigned >= 0).any()
