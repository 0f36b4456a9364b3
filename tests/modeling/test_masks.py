"""The refining mask head in a model: what trains it, what it gives, and what it leaves alone."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from co_detr.checkpoint.classes import match_classes, remap_classes
from co_detr.errors import ConfigError
from co_detr.modeling import BatchPadding
from co_detr.modeling.mask_losses import RegionSampler
from co_detr.modeling.masks import Regions
from co_detr.structures import Predictions, StepCounts, bitmaps_of
from tests.device import DEVICE
from tests.modeling.builders import (
    assert_complete,
    detect,
    evaluating,
    geometry_of,
    make_batch,
    randomize,
    shrink,
    train_step,
    with_masks,
)
from tests.modeling.test_accumulation import build as build_in_float64
from tests.modeling.test_accumulation import split, without_chance
from tests.modeling.test_accumulation import train_step as accumulate
from tests.modeling.test_baselines import copy_shared
from tests.modeling.test_configs import instantiate, load
from tests.modeling.test_mixed_precision import NO_AUTOCAST, autocast_step

CO_DINO, CO_DEFORMABLE = "co_dino_r50_instance", "co_detr_r50_instance"
LOSSES = ("mask_head.loss_mask", "mask_head.loss_mask_iou")


def build(name=CO_DINO, *overrides):
    cfg = shrink(load(name, "model.num_classes=5", *overrides))
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE)
    randomize(model, scale=0.05)
    return model


@pytest.fixture(scope="module")
def model():
    """Not to be changed, except for its mode and gradients."""
    return build()


def batch_with_masks(**settings):
    """Bitmaps that fill their boxes but for a corner."""
    batch = with_masks(make_batch(**settings))
    for sample in batch:
        bits = bitmaps_of(sample["instances"].gt_masks, sample["instances"].image_size)
        for mask, box in zip(bits, sample["instances"].gt_boxes.tensor.int(), strict=True):
            mask[box[1] : (box[1] + box[3]) // 2, box[0] : (box[0] + box[2]) // 2] = False
        sample["instances"].gt_masks = BitMasks(bits)
    return batch


@pytest.mark.parametrize("name", [CO_DINO, CO_DEFORMABLE])
@pytest.mark.parametrize("num_gts", [(3, 2), (0, 2), (0, 0)])
def test_a_step_trains_every_weight(name, num_gts):
    model = build(name)
    losses = train_step(model, batch_with_masks(num_gts=num_gts))
    assert_complete(model, losses)
    has_objects = num_gts != (0, 0)
    assert (losses[LOSSES[0]] > 0) == has_objects
    for parameter in model.mask_head.parameters():
        assert has_objects or not parameter.grad.any()  # zeros, where there is nothing to learn


def test_all_else_is_as_without_the_head(model):
    plain = build("co_dino_r50")
    assert copy_shared(plain, model) == len(plain.state_dict())
    expected = train_step(plain, make_batch())
    losses = train_step(model, batch_with_masks())
    assert losses.keys() - expected.keys() == set(LOSSES)
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    for one, other in zip(detect(plain, make_batch()), detect(model, make_batch()), strict=True):
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert not one.has("pred_masks") and other.has("pred_masks")


def test_the_losses_of_masks_reach_the_encoder_but_no_box(model):
    model.train().zero_grad()
    with EventStorage():
        losses = model(batch_with_masks())
    sum(losses[name] for name in LOSSES).backward()
    reached = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert reached == {"backbone", "encoder", "mask_head"}


def test_images_without_masks_teach_no_mask(model):
    batch = batch_with_masks(num_gts=(3, 2))
    both = train_step(model, batch)
    del batch[1]["instances"]._fields["gt_masks"]
    first = train_step(model, batch)
    del batch[0]["instances"]._fields["gt_masks"]
    none = train_step(model, batch)
    assert 0 < first[LOSSES[0]] != both[LOSSES[0]]
    assert none[LOSSES[0]] == none[LOSSES[1]] == 0
    assert_complete(model, none)
    others = [name for name in both if name not in LOSSES]
    assert all(torch.equal(both[name], none[name]) for name in others)


def test_proposals_are_the_best_pairs_with_denoising_queries(model, monkeypatch):
    seen = []
    forward = RegionSampler.forward

    def spy(self, predictions, *others):
        seen.append(predictions)
        return forward(self, predictions, *others)

    monkeypatch.setattr(RegionSampler, "forward", spy)
    batch = batch_with_masks()
    with EventStorage():
        images = model.train().preprocess(batch)
        output = model.forward_training(images, [sample["instances"] for sample in batch])
    groups = dict(zip((g.name for g in output.groups), output.predictions, strict=True))
    expected = torch.cat([groups[n].boxes[-1] for n in ("matching", "denoising")], dim=1)
    assert torch.equal(seen[0].boxes[-1], expected)
    assert {"roi_queries", "atss_queries"} < groups.keys()


class TestSampler:
    truth = torch.tensor([[10.0, 10.0, 50.0, 50.0], [60.0, 20.0, 90.0, 70.0]])
    # The first object, a box that is too small for it, the second one, one that nothing overlaps.
    boxes = torch.tensor([[10, 10, 50, 48], [10, 10, 30, 30], [58, 20, 92, 70], [0, 80, 9, 99]])

    def sample(self, num_truths=2, **settings):
        geometry = geometry_of([(100, 100)])
        low, high = (self.boxes / 100).to(DEVICE).split(2, 1)
        boxes = torch.cat([(low + high) / 2, high - low], dim=1)
        logits = torch.tensor([[3.0, 2.0], [2.5, -9], [0.0, 1.0], [2.7, -9]], device=DEVICE)
        predictions = Predictions(logits[None, None], boxes[None, None])
        truth = self.truth[:num_truths].to(DEVICE)
        instances = Instances((100, 100), gt_boxes=Boxes(truth))
        sampler = RegionSampler(**{"num_proposals": 6, **settings})
        return sampler(predictions, [instances], geometry, lambda boxes: boxes[:, 0].long())[0]

    def test_order_and_repeats(self):
        found = self.sample()
        # Both objects, then by score: the first proposal with both classes, the third one.
        assert found.truths.tolist() == [0, 1, 0, 0, 1, 1]
        expected = [self.truth, self.boxes[[0, 0, 2, 2]].float()]
        torch.testing.assert_close(found.boxes.cpu(), torch.cat(expected))
        assert found.levels.tolist() == [10, 60, 10, 10, 58, 58]

    def test_few_proposals_and_many_positives(self):
        assert self.sample(num_proposals=1).truths.tolist() == [0, 1, 0]
        torch.manual_seed(0)
        assert len(self.sample(max_positives=3).truths) == 3
        assert self.sample(num_truths=0).boxes.shape == (0, 4)

    def test_overlap(self):
        assert self.sample(iou_threshold=0.2).truths.tolist().count(0) == 4


@pytest.mark.parametrize("size", [(96, 128), (80, 112)])
def test_images_of_a_batch_are_detected_as_if_alone(model, size):
    """The reference can only do one; here padding is all that a batch adds, and there is none."""
    batch = make_batch([size, size])
    together = detect(model, batch)
    for one, sample in zip(together, batch, strict=True):
        (alone,) = detect(model, [sample])
        order = slice(0, 5)
        torch.testing.assert_close(one.mask_scores[order], alone.mask_scores[order])
        wrong = one.pred_masks.tensor[order] != alone.pred_masks.tensor[order]
        assert wrong.float().mean() < 1e-3


def test_chunks_do_not_matter(model):
    batch, head = make_batch(), model.mask_head
    whole, before = detect(model, batch), head.chunk_size
    head.chunk_size = 3
    parts = detect(model, batch)
    head.chunk_size = before
    assert len(whole[0]) > 3
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.pred_masks.probabilities, other.pred_masks.probabilities)
        torch.testing.assert_close(one.mask_scores, other.mask_scores)


def test_nothing_detected(model):
    empty = Instances(
        (96, 128), pred_boxes=Boxes(torch.zeros(0, 4, device=DEVICE)), scores=torch.zeros(0)
    )
    empty.pred_classes = torch.zeros(0, dtype=torch.long, device=DEVICE)
    batch = make_batch()
    with evaluating(model):
        memory = model.encode(model.preprocess(batch))
        for found in model.mask_head.detect(memory, [empty, empty]):
            assert found.pred_masks.tensor.shape == (0, 112, 112) and len(found.mask_scores) == 0


def test_scores_of_boxes_rank_masks_without_an_iou_head():
    model = build(CO_DINO, "model.mask_head.iou_head=null")
    losses = train_step(model, batch_with_masks())
    assert LOSSES[0] in losses and LOSSES[1] not in losses
    (found, _) = detect(model, make_batch())
    assert found.has("pred_masks") and not found.has("mask_scores")


def test_other_detectors_of_the_model_get_masks_too(model):
    model.evaluate_with = "atss"
    (found, _) = detect(model, make_batch())
    model.evaluate_with = None
    assert len(found.pred_masks) == len(found) > 0


def test_the_head_stays_when_the_model_is_stripped():
    model = build()
    before = detect(model, make_batch())
    model.strip_auxiliary()
    for one, other in zip(detect(model, make_batch()), before, strict=True):
        assert torch.equal(one.mask_scores, other.mask_scores)
        assert torch.equal(one.pred_masks.probabilities, other.pred_masks.probabilities)


def test_masks_fit_boxes_that_reached_into_the_padding():
    """Squares count their padding in; what is detected there is cut away, and masks with it."""
    model = build(CO_DINO)
    model.padding = BatchPadding(square_size=128, masked=False)
    (found,) = detect(model, make_batch([(64, 96)], [2]))
    boxes = found.pred_boxes.tensor
    assert (boxes[:, 2] <= 96).all() and (boxes[:, 3] <= 64).all()
    memory = model.eval().encode(model.preprocess(make_batch([(64, 96)], [2])))
    with torch.no_grad():
        (again,) = model.mask_head.detect(memory, [Instances((128, 128), **found.get_fields())])
    torch.testing.assert_close(again.pred_masks.tensor, found.pred_masks.probabilities)


@pytest.mark.slow
@NO_AUTOCAST
def test_bfloat16_trains_and_detects():
    model = build()
    for seed, num_gts in enumerate([(3, 2), (0, 0)]):
        losses = autocast_step(model, batch_with_masks(num_gts=num_gts), seed)
        assert_complete(model, losses)
        assert all(losses[name].dtype == torch.float32 for name in LOSSES)
    full = train_step(model, batch_with_masks())
    half = autocast_step(model, batch_with_masks(), 0)
    torch.testing.assert_close(half[LOSSES[0]], full[LOSSES[0]], rtol=0.1, atol=0.0)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        (found, _) = detect(model, make_batch())
    assert found.mask_scores.dtype == torch.float32
    assert found.pred_masks.probabilities.isfinite().all()


@pytest.mark.slow
def test_micro_batches_weigh_masks_by_their_images_with_objects(monkeypatch):
    model = build_in_float64(CO_DINO, dtype=torch.float32)
    without_chance(model, monkeypatch)
    batch = batch_with_masks(sizes=[(96, 128)] * 3, num_gts=(2, 0, 3))
    counts = StepCounts([2, 0, 3], {})
    with EventStorage():
        alone = [float(model.train()(part)[LOSSES[0]]) for part in split(batch, 1)]
        found = accumulate(model, split(batch, 1), exact_counts=False)
    assert counts.share(1) != 0.5
    assert found[LOSSES[0]] == pytest.approx(sum(alone) / 2, rel=0.05)


def test_levels_by_size():
    head = build(CO_DEFORMABLE).mask_head
    sides = torch.tensor([10.0, 111.9, 112.0, 223.9, 224.0, 448.0, 5000.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert head.levels(boxes).tolist() == [0, 0, 0, 0, 1, 2, 3]
    assert build(CO_DINO).mask_head.levels(boxes).tolist() == [0, 0, 1, 1, 2, 3, 4]


def test_regions_are_pooled_in_their_own_order(model):
    head = model.mask_head
    maps = [torch.full((2, 32, 64 >> n, 64 >> n), float(n), device=DEVICE) for n in range(5)]
    for map_ in maps:
        map_[1] += 10
    sides = torch.tensor([120.0, 20.0, 30.0, 250.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1).to(DEVICE)
    images = torch.tensor([0, 1, 0, 1])
    regions = Regions(boxes, images.to(DEVICE), images, head.levels(boxes).cpu())
    assert head.pool(maps, regions)[:, 0, 7, 7].tolist() == pytest.approx([1, 10, 0, 12])


def test_classes_are_taken_over_by_name():
    ours, theirs = build(), build(CO_DINO)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1)
    state = theirs.state_dict()
    classes = match_classes(list("abcde"), list("edcbx"))
    remap_classes(state, ours, classes)
    for name in ("logits.0", "logits.2", "iou_head.iou"):
        new, old = (
            state[f"mask_head.{name}.weight"],
            theirs.state_dict()[f"mask_head.{name}.weight"],
        )
        assert torch.equal(new[:4], old[[4, 3, 2, 1]])
    assert not any("logits.3" in name for name in classes.tensors)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("co_detr_r50", {"strides": [4, 8, 16, 32]}, r"strides=\[4, 8, 16, 32\], but"),
        ("co_conditional_detr_r50", {"strides": [32]}, "needs maps of several strides"),
        ("atss_on_encoder_r50", {"num_decoder_layers": 1}, "decoder is null: set"),
    ],
)
def test_models_that_cannot_have_it(name, settings, message):
    cfg = load(name)
    cfg.model.mask_head = load(CO_DEFORMABLE).model.mask_head
    cfg.model.mask_head.update(settings)
    cfg.model.mask_head.sampler.num_proposals = 10  # a dense model has no postprocessor to ask
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        instantiate(cfg.model)
