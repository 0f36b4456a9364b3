"""Objects that weigh less than others: what they add to losses and gradients, and nothing else."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from co_detr.modeling.auxiliary import DenseHead
from co_detr.modeling.losses import scale_gradient
from co_detr.structures import loss_weights
from tests.device import DEVICE
from tests.modeling.builders import NUM_CLASSES, make_batch, train_step
from tests.modeling.test_accumulation import (
    CO_DINO,
    K2,
    K6,
    NUM_GTS,
    SIZES,
    build,
    gradients,
    in_float64,
    passes_of,
    split,
    without_chance,
)
from tests.modeling.test_accumulation import train_step as trainer_step

HYBRID, GROUPS = "h_deformable_detr_r50", "group_detr_r50"


def weigh(batch, weight=None):
    """Gives every object of a batch a weight, in place; None: of their own, from 0.2 to 1."""
    number = 0
    for sample in batch:
        truth = sample["instances"]
        count = len(truth)
        own = [0.2 + 0.1 * (5 * index % 9) for index in range(number, number + count)]
        if count:  # images without objects come without, as from the mapper
            own = own if weight is None else [weight] * count
            truth.gt_weights = torch.tensor(own, device="cpu")
        number += count
    return batch


def test_gradients_are_scaled_and_values_are_not():
    values = torch.tensor([[1.0, torch.inf], [-2.5, 3.0]], requires_grad=True)
    out = scale_gradient(values, torch.tensor([0.25, 1.0]))
    assert out.equal(values)
    (out * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert values.grad.tolist() == [[0.25, 0.5], [3.0, 4.0]]


@pytest.mark.parametrize("name", [K2, CO_DINO, K6])
def test_a_weight_of_one_changes_nothing(name):
    model = build(name, dtype=torch.float32)
    plain = train_step(model, make_batch(SIZES, NUM_GTS))
    before = gradients(model)
    weighed = train_step(model, weigh(make_batch(SIZES, NUM_GTS), 1.0))
    assert all(value.equal(plain[key]) for key, value in weighed.items())
    assert all(value.equal(before[key]) for key, value in gradients(model).items())


@pytest.mark.parametrize("name", [K2, CO_DINO, K6, HYBRID, GROUPS])
def test_queries_weigh_as_the_objects_that_they_are_to_find(name):
    """Whoever assigned them: by matching, by noise, or by a head."""
    model, batch = build(name, dtype=torch.float32), weigh(make_batch(SIZES, NUM_GTS))
    images, truths = model.preprocess(batch), [sample["instances"] for sample in batch]
    with EventStorage():
        out = model.train().forward_training(images, truths)
    for targets in [*out.targets, *out.proposal_targets.values()]:
        seen = 0
        for image, truth in enumerate(truths):
            sizes = torch.tensor([truth.image_size[::-1]]).float()
            centers = truth.gt_boxes.get_centers() / sizes
            labels, weights = targets.labels[:, image], targets.weights[:, image]
            foreground = (labels < NUM_CLASSES) & (weights > 0)
            background = weights[~foreground]
            assert ((background == 1) | (background == 0)).all()  # a slot that is not there
            found = targets.boxes[:, image].expand(*labels.shape, 4)[foreground][:, :2].float()
            if len(truth):
                own = torch.cdist(found.cpu(), centers).argmin(1)
                assert weights[foreground].cpu().equal(truth.gt_weights[own])
            seen += len(found)
        assert seen


def test_losses_of_matched_queries_are_weighed():
    """At half the weight, classes and boxes that are to be found cost half."""
    model = build("deformable_detr_r50", dtype=torch.float32)
    whole = train_step(model, make_batch(SIZES, NUM_GTS))
    half = train_step(model, weigh(make_batch(SIZES, NUM_GTS), 0.5))
    for key, value in half.items():
        if key.endswith(("loss_bbox", "loss_giou")):
            torch.testing.assert_close(value, whole[key] / 2)
        else:  # of which the background's is left
            assert whole[key] / 2 < value < whole[key]


def test_what_dense_heads_learn_of_an_object_is_weighed():
    """Gradients of their outputs, which lead to all of their weights and to the encoder."""
    model = build(K6, dtype=torch.float32)
    heads = [head for head in model.auxiliary.heads.values() if isinstance(head, DenseHead)]
    assert len(heads) == 5
    kept = [keep_outputs(head) for head in heads]
    for batch in (make_batch(SIZES, NUM_GTS), weigh(make_batch(SIZES, NUM_GTS))):
        train_step(model, batch)
    truths = [sample["instances"] for sample in batch]
    for (plain, weighed), (targets, same) in kept:
        assert targets.truths.equal(same.truths)
        expected = torch.ones_like(targets.truths, dtype=torch.float32)
        for image, truth in enumerate(truths):
            for index, weight in enumerate(loss_weights(truth)):
                expected[image, targets.truths[image] == index] = weight
        assert (expected < 1).any()
        for name in ("logits", "deltas", "quality"):
            before, after = getattr(plain, name), getattr(weighed, name)
            if before is not None:
                scale = expected if before.dim() == 2 else expected[..., None]
                assert before.grad.any()
                torch.testing.assert_close(after.grad, before.grad * scale)


def keep_outputs(head):
    """Lists, from now on, of what a head predicts and of how that is assigned."""
    predict, refine, predicted, targets = head.predict, head.refine, [], []

    def predict_and_keep(maps):
        out = predict(maps)
        for values in (out.logits, out.deltas, out.quality):
            if values is not None:
                values.retain_grad()
        predicted.append(out)
        return out

    def refine_and_keep(*arguments):
        targets.append(refine(*arguments))
        return targets[-1]

    head.predict, head.refine = predict_and_keep, refine_and_keep
    return predicted, targets


def test_what_roi_heads_learn_of_an_object_is_weighed():
    model = build(K2, dtype=torch.float32)
    outputs, samples = [], []
    heads = model.auxiliary.heads["roi"].roi_heads
    sample_of = heads.label_and_sample_proposals

    def sample_and_keep(*arguments):
        samples.append(sample_of(*arguments))
        return samples[-1]

    heads.label_and_sample_proposals = sample_and_keep
    heads.box_predictor.register_forward_hook(lambda *call: outputs.append(call[-1]))
    hook = heads.box_predictor.register_forward_hook(
        lambda *call: [values.retain_grad() for values in call[-1]] and None
    )
    for batch in (make_batch(SIZES, NUM_GTS), weigh(make_batch(SIZES, NUM_GTS))):
        train_step(model, batch)
    hook.remove()
    weights = torch.cat([heads.row_weights(sample) for sample in samples[1]])
    classes = torch.cat([sample.gt_classes for sample in samples[1]])
    assert (weights[classes == NUM_CLASSES] == 1).all() and (weights < 1).any()
    for before, after in zip(*outputs, strict=True):
        assert before.grad.any()
        torch.testing.assert_close(after.grad, before.grad * weights[:, None])


@pytest.mark.slow
@pytest.mark.parametrize("name", [K2, CO_DINO])
def test_micro_batches_are_one_large_batch(name, monkeypatch):
    model, batch = build(name), in_float64(weigh(make_batch(SIZES, NUM_GTS)), monkeypatch)
    without_chance(model, monkeypatch)
    expected = trainer_step(model, [batch])
    before = gradients(model)
    calls = passes_of(model)
    found = trainer_step(model, split(batch, 1))
    assert len(calls) > 1 and found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    scale = max(gradient.abs().max().item() for gradient in before.values())
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, before[key], rtol=1e-7, atol=1e-11 * scale, msg=key)


def test_in_mixed_precision():
    """The box code of the ROI heads learns half as much at half the weight."""
    model, learned = build(K2, dtype=torch.float32), []
    for batch in (make_batch(SIZES, NUM_GTS), weigh(make_batch(SIZES, NUM_GTS), 0.5)):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            losses = train_step(model, batch)
        assert all(value.isfinite() for value in losses.values())
        learned.append(gradients(model))
    assert all(gradient.isfinite().all() for gradient in learned[1].values())
    name = "auxiliary.heads.roi.roi_heads.box_predictor.bbox_pred.weight"
    torch.testing.assert_close(learned[1][name], learned[0][name] / 2, rtol=0.02, atol=1e-4)
