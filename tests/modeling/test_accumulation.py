"""Micro-batches whose gradients are accumulated are one large batch: losses and gradients.

In float64, with all draws replaced by choices that do not depend on the batch. All images have one
size: padding changes what a network without a mask, as a ResNet, sees at the border of an image.
"""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from co_detr.engine.config import apply_overrides, load_config
from co_detr.engine.memory_use import MadeUpLoader
from co_detr.engine.trainer import StepSettings, Trainer
from co_detr.modeling import CoDETR
from co_detr.modeling.auxiliary import DenseHead
from co_detr.modeling.queries import DenoisingQueries
from co_detr.modeling.queries.denoising import NoiseDraws
from co_detr.structures import AuxiliaryOutput, Candidates, HeadCounts, StepCounts
from tests.device import DEVICE, NAME
from tests.modeling.builders import (
    NUM_CLASSES,
    make_batch,
    randomize,
    shrink,
    with_masks,
)
from tests.paths import config_path

# The most in the last micro-batch, so that the first does not know the length of groups; one image
# without any object.
NUM_GTS = (3, 0, 1, 5)
SIZES = ((96, 128),) * len(NUM_GTS)
K0, K1, K2, K6 = "deformable_detr_r50", "co_detr_r50_atss", "co_detr_r50", "co_detr_r50_k6"
CO_DINO, MASKS = "co_dino_r50", "co_detr_r50_mask_rcnn"
HYBRID, DENSE = "h_deformable_detr_r50", "atss_on_encoder_r50"


def build(name, overrides=(), dtype=torch.float64):
    cfg = shrink(load_config(config_path(name)))
    apply_overrides(cfg, [f"model.num_classes={NUM_CLASSES}", *overrides])
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE)
    randomize(model)
    return model.to(dtype)


def in_float64(batch, monkeypatch):
    """Also where Detectron2, matching and the trainer are float32 whatever the model is."""

    def init(self, tensor):
        self.tensor = tensor.reshape(-1, 4)

    monkeypatch.setattr(Boxes, "__init__", init)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for sample in batch:
        truth = sample["instances"]
        truth.gt_boxes.tensor = truth.gt_boxes.tensor.double()
    return batch


def without_chance(model, monkeypatch):
    """Replaces every draw of a step by a choice that an image makes by itself."""
    monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: torch.arange(n, **kwargs))
    sources = [] if model.auxiliary is None else model.auxiliary.positive_queries.values()
    for source in sources:
        source.permutation = lambda n: torch.arange(n - 1, -1, -1, device="cpu")
    for source in (model.queries or {}).values():
        if isinstance(source, DenoisingQueries):
            source.draw = noise_of_boxes


def noise_of_boxes(boxes):
    """Digits behind the point that nobody needs."""
    digits = (boxes * 977).frac()
    return NoiseDraws(
        flip=digits[:, 0],
        labels=(digits[:, 1] * NUM_CLASSES).long(),
        signs=torch.where(digits.roll(1, 1) < 0.5, -1.0, 1.0).to(boxes),
        shifts=digits.roll(2, 1),
    )


def split(batch, size):
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def train_step(model, batches, **settings):
    """Losses of one optimizer step by the trainer; gradients are in `.grad`."""
    storage = trained(model, batches, **settings).storage
    return {name: value for name, (value, _) in storage.latest().items() if ".loss_" in name}


def trained(model, batches, **settings):
    settings = StepSettings(NAME, seed=0, accumulation_steps=len(batches), **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, MadeUpLoader(batches), optimizer, settings)
    trainer.train(0, 1)
    return trainer


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, 1) for name in (K0, K2, CO_DINO, MASKS, HYBRID, DENSE)), (K6, 2), (CO_DINO, 2)],
)
def test_micro_batches_are_one_large_batch(name, size, monkeypatch):
    model, batch = build(name), make_batch(SIZES, NUM_GTS)
    if name == MASKS:
        with_masks(batch)
    in_float64(batch, monkeypatch)
    without_chance(model, monkeypatch)
    expected = train_step(model, [batch])
    expected_gradients = gradients(model)
    found = train_step(model, split(batch, size))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    scale = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    # Detectron2's loss of masks is float32.
    rtol, atol = (1e-6, 1e-8 * scale) if name == MASKS else (1e-7, 1e-11 * scale)
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, expected_gradients[key], rtol=rtol, atol=atol, msg=key)


def test_one_micro_batch_is_the_plain_step():
    """Bit for bit, and nothing is counted."""
    model, batch = build(K2, dtype=torch.float32), make_batch()
    calls = passes_of(model)
    seen = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    train_step(model, [batch])
    hook.remove()
    assert len(calls) == 1 and seen == [(batch,)]


def passes_of(model):
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize(
    ("name", "exact_counts", "expected"),
    [
        (K0, True, [True, True]),
        (K1, True, [True, True]),  # ATSS assigns by its anchors
        (K2, True, [False, False, True, True]),
        (K2, False, [True, True]),
    ],
)
def test_the_network_runs_for_counts_only_where_heads_need_it(name, exact_counts, expected):
    model, batch = build(name, dtype=torch.float32), make_batch()
    calls = passes_of(model)
    train_step(model, split(batch, 1), exact_counts=exact_counts)
    assert calls == expected  # whether with gradients


@pytest.mark.parametrize("name", [K2, CO_DINO])
def test_without_exact_counts_only_heads_that_predict_count_for_themselves(name, monkeypatch):
    model, batch = build(name), in_float64(make_batch(SIZES, NUM_GTS), monkeypatch)
    without_chance(model, monkeypatch)
    expected = train_step(model, [batch])
    found = train_step(model, split(batch, 1), exact_counts=False)
    approximate = [key for key in expected if key.startswith("roi_queries.")]
    assert approximate
    for key, value in expected.items():
        # Every image has as many proposals as can be sampled, so that means over them are exact.
        if key not in approximate:
            assert found[key] == pytest.approx(value, rel=1e-6), key
    for key in approximate:
        assert found[key] == pytest.approx(expected[key], rel=1.0)
    key = "roi_queries.loss_bbox"
    assert found[key] != pytest.approx(expected[key], rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [K2, K6, "co_dino_r50_lsj_12ep", "co_dino_swin_l_12ep", "co_dino_vit_l_o365_12ep"]
    + ["co_dab_detr_r50", DENSE],
)
def test_counts_by_anchors_are_those_of_the_network(name, monkeypatch):
    """Whatever a backbone or a pyramid makes of odd sizes and of padding."""
    model = build(name, dtype=torch.float32)
    batch = make_batch([(96, 128), (77, 45), (65, 101)], [3, 2, 4])
    heads = {
        name: head
        for name, head in model.auxiliary.heads.items()
        if getattr(head, "counts_without_features", False)
    }
    assert heads and "roi" not in heads
    counts = model.count(batch, with_heads=False)
    assert counts.heads.keys() == heads.keys()
    monkeypatch.setattr(DenseHead, "counts_without_features", False)
    with EventStorage():
        expected = model.count(batch)
    for name in heads:
        assert counts.heads[name].positives == expected.heads[name].positives
        torch.testing.assert_close(counts.heads[name].normalizers, expected.heads[name].normalizers)


@pytest.mark.parametrize("name", [K2, CO_DINO])
def test_heads_find_the_same_when_they_count(name, monkeypatch):
    """With the same dropout; which samples are drawn, in between other draws, does not matter."""
    model = build(name, ["model.encoder.dropout=0.3"], torch.float32)
    seen, forward_training = [], CoDETR.forward_training

    def spying(self, images, gt_instances, counts=None):
        output = forward_training(self, images, gt_instances, counts)
        seen.append((counts, output.auxiliary))
        return output

    monkeypatch.setattr(CoDETR, "forward_training", spying)
    train_step(model, split(make_batch(SIZES, NUM_GTS), 2))
    assert len(seen) == 2
    counts = seen[0][0]
    assert seen[1][0] is counts and counts.num_truths == list(NUM_GTS)
    for head in model.auxiliary.heads:
        classes = [
            instances.gt_classes
            for _, outputs in seen
            for instances in outputs[head].candidates.instances
        ]
        positives = [int(((labels >= 0) & (labels < NUM_CLASSES)).sum()) for labels in classes]
        assert counts.heads[head].positives == positives
        assert sum(positives) > 0
        if head == "roi":
            assert counts.heads[head].normalizers.tolist() == [
                sum(map(len, classes)),
                0,  # positive ones with a mask
            ]


@pytest.mark.cpu_only("RoIAlign would be compiled to repeat its bits; tests/gpu asks for them")
def test_the_same_seed_gives_the_same_step_again():
    results = []
    for _ in range(2):
        model = build(CO_DINO, ["model.encoder.dropout=0.1"], torch.float32)
        torch.rand(7)  # what was drawn before does not matter
        results.append(train_step(model, split(make_batch(SIZES, NUM_GTS), 1)))
    assert results[0] == results[1]


class MeanHead(nn.Module):
    """Knows nothing of counts."""

    def forward(self, images, features, gt_instances):
        mean = features["p3"].sum() * 0 + sum(map(len, gt_instances)) / len(gt_instances)
        return AuxiliaryOutput({"loss_mean": mean}, Candidates([], lambda *_: None))


def test_a_head_that_does_not_count_has_means_over_images():
    model, batch = build(K2, dtype=torch.float32), make_batch(SIZES, NUM_GTS)
    model.auxiliary.heads["atss"] = MeanHead()
    del model.auxiliary.positive_queries["atss"]
    found = train_step(model, split(batch, 1))
    assert found["atss.loss_mean"] == pytest.approx(
        model.auxiliary.loss_weight * sum(NUM_GTS) / len(NUM_GTS)
    )


def test_batch_statistics_learn_once_in_a_step():
    model = build(K2, ["model.backbone.bottom_up.stem.norm=BN"], torch.float32)
    (norm,) = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    train_step(model, split(make_batch(), 1))
    assert norm.num_batches_tracked == 2


@pytest.mark.slow
@pytest.mark.skipif(NAME == "emulated", reason="its autocast changes nothing")
@pytest.mark.parametrize("name", [K2, K6])
def test_half_precision(name, monkeypatch):
    model, batch = build(name, dtype=torch.float32), make_batch(SIZES, NUM_GTS)
    without_chance(model, monkeypatch)
    whole = train_step(model, [batch], autocast_dtype=torch.bfloat16)
    found = train_step(model, split(batch, 1), autocast_dtype=torch.bfloat16)
    assert found == pytest.approx(whole, rel=0.3, abs=0.01)


def test_counts_of_parts_are_joined():
    parts = [
        StepCounts([3, 0], {"roi": HeadCounts(torch.tensor([4, 1]), [1, 0])}),
        StepCounts([60], {"roi": HeadCounts(torch.tensor([2, 2]), [2])}),
    ]
    counts = StepCounts.join(parts)
    assert counts.num_truths == [3, 0, 60]
    assert counts.heads["roi"].normalizers.tolist() == [6, 3]
    assert counts.heads["roi"].positives == [1, 0, 2]
    assert counts.share(2) == pytest.approx(2 / 3)
    assert counts.num_matched(20) == 3 + 0 + 20
    assert counts.num_matched(20, repeats=6) == 18 + 0 + 20


def test_counting_leaves_no_trace_in_the_log():
    model = build(K2, dtype=torch.float32)
    storage = trained(model, split(make_batch(), 1)).storage
    # Detectron2's heads log what they sample, once for each micro-batch.
    assert len(storage.history("roi/roi_head/num_fg_samples").values()) == 2
