"""Unusual batches train: finite losses, and a gradient for every parameter (as DDP needs)."""

import pytest
import torch
from detectron2.structures import Boxes

from tests.modeling.builders import (
    NUM_QUERIES,
    assert_complete,
    detect,
    is_inside,
    make_batch,
    make_instances,
    tiny_model,
    train_step,
)


def model_with_padding(padding, heads=2):
    return tiny_model(heads, [f"model.auxiliary.positive_queries.padding={padding}"])


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_ordinary_batch(heads):
    model = tiny_model(heads)
    losses = train_step(model, make_batch())
    assert_complete(model, losses)
    decoder = {f"{layer}{term}" for layer in ("d0.", "") for term in ("loss_cls", "loss_bbox")}
    groups = ["matching", *[f"{name}_queries" for name in ("atss", "roi")[:heads]]]
    expected = {f"{group}.{term}" for group in groups for term in decoder}
    assert expected | {"matching.enc.loss_cls"} <= set(losses)
    prefixes = {name.split(".")[0] for name in losses}
    assert prefixes == {*groups, *("atss", "roi")[:heads]}


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("num_gts", [(3, 2), (0, 0), (0, 3), (60, 1)])
def test_six_heads(num_gts, half):
    model = tiny_model(6)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        losses = train_step(model, make_batch(num_gts=num_gts))
    assert_complete(model, losses)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert {name.split(".")[0] for name in losses} == {
        "matching",
        *model.auxiliary.heads,
        *(f"{name}_queries" for name in model.auxiliary.heads),
    }
    for name in ("retinanet.loss_bbox", "fcos.loss_centerness", "paa.loss_iou", "gfl.loss_dfl"):
        assert (losses[name] > 0) == any(num_gts), name


@pytest.mark.parametrize("padding", ["negatives", "mask"])
def test_no_ground_truth_in_the_batch(padding):
    model = model_with_padding(padding)
    losses = train_step(model, make_batch(num_gts=(0, 0)))
    assert_complete(model, losses)
    for name, value in losses.items():
        if "bbox" in name or "giou" in name or "centerness" in name or "box_reg" in name:
            assert value == 0, name
    assert losses["matching.loss_cls"] > 0 and losses["atss.loss_cls"] > 0
    # Fillers are trained as background unless they are masked.
    for name in ("roi_queries.loss_cls", "atss_queries.d0.loss_cls"):
        assert (losses[name] > 0) == (padding == "negatives"), name


@pytest.mark.parametrize("heads", [0, 1])
def test_no_ground_truth_with_fewer_heads(heads):
    model = tiny_model(heads)
    assert_complete(model, train_step(model, make_batch(num_gts=(0, 0))))


@pytest.mark.parametrize("padding", ["negatives", "mask"])
@pytest.mark.parametrize("num_gts", [(0, 3), (3, 0)])
def test_one_empty_image_of_two(padding, num_gts):
    model = model_with_padding(padding)
    losses = train_step(model, make_batch(num_gts=num_gts))
    assert_complete(model, losses)
    assert losses["matching.loss_bbox"] > 0 and losses["atss_queries.loss_giou"] > 0


@pytest.mark.parametrize(("padding", "heads"), [("negatives", 2), ("mask", 2), ("negatives", 6)])
def test_boxes_of_one_pixel(padding, heads):
    model = model_with_padding(padding, heads)
    batch = make_batch()
    corners = torch.tensor([[0.0, 0.0], [40.0, 33.0], [111.0, 79.0]])
    for sample in batch:
        size = sample["instances"].image_size
        boxes = torch.cat([corners, corners + 1], dim=1)
        sample["instances"] = make_instances(boxes, torch.tensor([0, 1, 2]), size)
    assert_complete(model, train_step(model, batch))


def test_more_ground_truths_than_queries():
    model = tiny_model(2)
    num_gts = (NUM_QUERIES + 15, 2)
    batch = make_batch(num_gts=num_gts)
    assert_complete(model, train_step(model, batch))
    images = model.preprocess(batch)
    gt_instances = [sample["instances"] for sample in batch]
    model.strip_auxiliary()  # its heads need a storage, and do not matter here
    output = model.forward_training(images, gt_instances)
    matched = (output.targets[0].labels < model.num_classes).sum(-1)
    assert matched.tolist() == [[NUM_QUERIES, 2]] * model.decoder.num_layers


@pytest.mark.parametrize("heads", [2, 6])
def test_overlapping_duplicates(heads):
    model = tiny_model(heads)
    batch = make_batch()
    for sample in batch:
        instances = sample["instances"]
        twice = instances.gt_boxes.tensor.repeat(2, 1)
        classes = torch.cat([instances.gt_classes, instances.gt_classes])
        sample["instances"] = make_instances(twice, classes, instances.image_size)
    assert_complete(model, train_step(model, batch))


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(
    "sizes", [((97, 131), (65, 89)), ((71, 73),), ((66, 201), (129, 67), (64, 64))]
)
def test_odd_image_sizes(sizes, heads):
    model = tiny_model(heads)
    batch = make_batch(sizes, num_gts=[2] * len(sizes))
    assert_complete(model, train_step(model, batch))
    for found, size in zip(detect(model, batch), sizes, strict=True):
        assert found.image_size == size
        assert found.pred_boxes.tensor.isfinite().all()
        assert is_inside(found)


def test_other_fields_of_the_ground_truth_are_left_alone():
    model = tiny_model(2)
    batch = make_batch()
    for sample in batch:
        sample["instances"].gt_keypoints = torch.zeros(len(sample["instances"]), 1, 3)
    before = [sample["instances"].gt_boxes.tensor.clone() for sample in batch]
    assert_complete(model, train_step(model, batch))
    for sample, boxes in zip(batch, before, strict=True):
        assert set(sample["instances"].get_fields()) == {"gt_boxes", "gt_classes", "gt_keypoints"}
        assert torch.equal(sample["instances"].gt_boxes.tensor, boxes)
        assert isinstance(sample["instances"].gt_boxes, Boxes)


@pytest.mark.parametrize("heads", [0, 2])
def test_an_image_with_fewer_tokens_than_queries(heads):
    """Makes do with as many queries; beside a larger one it has them all."""
    model, small = tiny_model(heads), make_batch(((16, 24),), num_gts=(1,))
    losses = train_step(model, small)
    assert losses and all(value.isfinite() for value in losses.values())
    assert len(detect(model, small)) == 1
    model.eval()
    for batch, expected in ((small, 10), (small + make_batch(num_gts=(1, 1)), NUM_QUERIES)):
        with torch.no_grad():
            memory = model.encode(model.preprocess(batch))
            logits, boxes = model.decode(memory)
        assert logits.shape[1] == boxes.shape[1] == expected
