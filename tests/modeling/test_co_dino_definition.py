"""Co-DINO's training step against its definition: one image, one group, one query at a time.

The model decodes all groups of a batch in one masked pass and scores them by tensors. Its
result is compared with `co_dino_definition`, in float64, so that only rounding differs.
"""

from types import SimpleNamespace

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from torch import nn

from co_detr.engine.config import apply_overrides, load_config
from co_detr.modeling.geometry import ImageBatch
from co_detr.structures import AuxiliaryOutput
from tests.device import DEVICE
from tests.modeling.builders import (
    NUM_CLASSES,
    make_candidates,
    random_boxes,
    randomize,
    shrink,
)
from tests.modeling.co_dino_definition import losses_by_definition
from tests.paths import config_path

SIZES = [(96, 128), (80, 112)]
NUM_DENOISING = 6


class FixedHead(nn.Module):
    """An auxiliary head that always assigns the same, whatever it sees."""

    def __init__(self, candidates):
        super().__init__()
        self.candidates = candidates

    def forward(self, images, features, gt_instances):
        return AuxiliaryOutput({}, self.candidates)


def make_step(num_gts, padding="negatives"):
    """A tiny Co-DINO and what goes into one step of it."""
    cfg = shrink(load_config(config_path("co_dino_r50")))
    settings = [
        f"model.num_classes={NUM_CLASSES}",
        f"model.queries.denoising.num_queries={NUM_DENOISING}",
        f"model.auxiliary.positive_queries.padding={padding}",
        "model.auxiliary.positive_queries.max_queries=12",
    ]
    apply_overrides(cfg, settings)
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(DEVICE).double().train()
    randomize(model)
    generator = torch.Generator().manual_seed(sum(num_gts))
    pixels = torch.randn(len(num_gts), 3, 96, 128, generator=generator, dtype=torch.float64)
    images = ImageBatch(pixels, SIZES[: len(num_gts)])
    truth = []
    for size, number in zip(images.image_sizes, num_gts, strict=True):
        boxes = Boxes(random_boxes(number, size, generator).double())
        boxes.tensor = boxes.tensor.double()  # Detectron2 makes it float32
        labels = torch.randint(0, NUM_CLASSES, (number,), generator=generator)
        truth.append(Instances(size, gt_boxes=boxes, gt_classes=labels))
    # More positives than slots, fewer, and none.
    candidates = {}
    for seed, (name, positives) in enumerate({"roi": (14, 3), "atss": (0, 5)}.items()):
        number = len(num_gts)
        candidates[name], _ = make_candidates(
            positives[:number], (20,) * number, size=(80, 112), seed=seed
        )
    for name, candidate in candidates.items():
        model.auxiliary.heads[name] = FixedHead(candidate)
        model.auxiliary.positive_queries[name].permutation = backwards
    draws, source = [], model.queries["denoising"]
    usual = source.draw
    source.draw = lambda boxes: draws.append(usual(boxes)) or draws[-1]
    return SimpleNamespace(
        model=model, images=images, truth=truth, candidates=candidates, draws=draws
    )


def backwards(number):
    return torch.arange(number - 1, -1, -1)


def gradients(model, losses):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(sum(losses.values()), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


@pytest.mark.cpu_only("the definition is computed on the host")
@pytest.mark.parametrize(
    ("num_gts", "padding"),
    [
        ((4, 2), "negatives"),
        ((0, 1), "mask"),
        ((1, 0), "unmasked"),
        ((8, 3), "negatives"),  # more than there are denoising queries
        ((0, 0), "negatives"),
        ((2,), "unmasked"),
    ],
    ids=str,
)
def test_one_masked_pass_is_the_definition(num_gts, padding):
    step = make_step(num_gts, padding)
    losses = step.model.forward_training(step.images, step.truth).losses
    expected = losses_by_definition(step)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
    actual, expected = gradients(step.model, losses), gradients(step.model, expected)
    scale = max(g.abs().max().item() for g in expected.values() if g is not None)
    compared = 0
    for name, value in expected.items():
        if value is None:
            # The fixed heads read no map. All else gets zeros, which distributed training needs.
            assert "pyramid" in name or not actual[name].any(), name
            continue
        torch.testing.assert_close(actual[name], value, rtol=1e-7, atol=1e-11 * scale, msg=name)
        compared += 1
    assert compared > 140
