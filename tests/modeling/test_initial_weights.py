"""What is drawn at the start, row by row as docs/fidelity.md has it, by statistics of full-size
modules: a distribution shows in the spread of some ten thousand numbers."""

import copy
import math

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from co_detr.engine.config import load_config
from tests.device import DEVICE
from tests.paths import config_path


@pytest.fixture(scope="module")
def models():
    """Full-size transformers and heads by config; the backbone is loaded in any case."""
    made = {}
    for name in ("co_detr_r50", "co_dino_r50_instance", "co_dab_detr_r50"):
        cfg = load_config(config_path(name))
        torch.manual_seed(0)
        made[name] = instantiate(cfg.model)
    return made


def xavier(weight: torch.Tensor) -> float:
    """Standard deviation of Xavier's uniform distribution."""
    fan_out, fan_in = weight.shape[:2]
    return math.sqrt(2 / (fan_in + fan_out))


def default(weight: torch.Tensor) -> float:
    """Standard deviation of what `nn.Linear` and `nn.Conv2d` draw by themselves."""
    return math.sqrt(1 / (3 * weight[0].numel()))


def kaiming(weight: torch.Tensor) -> float:
    """Standard deviation of Kaiming's normal distribution by the fan out."""
    return math.sqrt(2 / weight[:, 0].numel())


def caffe2_xavier(weight: torch.Tensor) -> float:
    """Standard deviation of what Caffe2 calls Xavier's uniform distribution."""
    return math.sqrt(1 / weight.shape[1])


# Module, names of its weights (found by their end), and the standard deviation that they have.
ROWS = [
    ("co_detr_r50", "encoder", "ffn.linear1.weight", xavier),
    ("co_detr_r50", "encoder", "ffn.linear2.weight", xavier),
    ("co_detr_r50", "encoder", "attention.value_proj.weight", xavier),
    ("co_detr_r50", "encoder", "attention.output_proj.weight", xavier),
    ("co_detr_r50", "encoder", "attention.sampling_offsets.weight", 0.0),
    ("co_detr_r50", "encoder", "attention.attention_weights.weight", 0.0),
    ("co_detr_r50", "encoder", "level_embed", 1.0),
    ("co_detr_r50", "decoder", "self_attention.in_proj_weight", xavier),
    ("co_detr_r50", "decoder", "self_attention.out_proj.weight", xavier),
    ("co_detr_r50", "decoder", "cross_attention.value_proj.weight", xavier),
    ("co_detr_r50", "decoder", "class_heads.5.weight", default),
    ("co_detr_r50", "decoder", "box_heads.5.layers.0.weight", default),
    ("co_detr_r50", "decoder", "box_heads.5.layers.2.weight", 0.0),
    ("co_detr_r50", "decoder", "box_heads.0.layers.2.bias", 0.0),
    ("co_detr_r50", "queries", "memory_proj.weight", xavier),
    ("co_detr_r50", "queries", "position_proj.weight", xavier),
    ("co_detr_r50", "queries", "content.weight", 1.0),
    ("co_detr_r50", "auxiliary", "positive_queries.atss.position_proj.weight", xavier),
    ("co_detr_r50", "auxiliary", "positive_queries.roi.feature_proj.weight", xavier),
    ("co_detr_r50", "auxiliary", "pyramid.conv.weight", default),
    ("co_detr_r50", "auxiliary", "heads.roi.rpn.rpn_head.conv.weight", 0.01),
    ("co_detr_r50", "auxiliary", "box_predictor.cls_score.weight", 0.01),
    ("co_detr_r50", "auxiliary", "box_predictor.bbox_pred.weight", 0.001),
    ("co_detr_r50", "auxiliary", "heads.atss.class_logits.weight", 0.01),
    ("co_dino_r50_instance", "decoder", "query_position.layers.0.weight", xavier),
    ("co_dino_r50_instance", "decoder", "query_position.layers.1.weight", xavier),
    ("co_dino_r50_instance", "queries", "label_embedding.weight", 1.0),
    ("co_dino_r50_instance", "mask_head", "semantic_convs.0.weight", kaiming),
    ("co_dino_r50_instance", "mask_head", "stages.1.fusion.branches.2.weight", kaiming),
    ("co_dino_r50_instance", "mask_head", "logits.0.weight", kaiming),
    ("co_dino_r50_instance", "mask_head", "iou_head.fc.weight", caffe2_xavier),
    ("co_dino_r50_instance", "mask_head", "iou_head.iou.weight", 0.01),
    ("co_dab_detr_r50", "decoder", "query_position.layers.0.weight", xavier),
]


@pytest.mark.parametrize(("config", "part", "name", "spread"), ROWS)
def test_spread_of_initial_weights(models, config, part, name, spread):
    named = getattr(models[config], part).named_parameters()
    found = {key: value for key, value in named if key == name or key.endswith(f".{name}")}
    assert found, f"{part} has no {name}"
    for key, value in found.items():
        expected = spread(value) if callable(spread) else spread
        # The standard error of a spread of N numbers is below 1 / sqrt(N).
        tolerance = 5 * expected / math.sqrt(value.numel())
        assert value.std(unbiased=False).item() == pytest.approx(expected, abs=tolerance), key
        assert abs(value.mean().item()) <= 5 * expected / math.sqrt(value.numel()), key


def test_classes_start_at_one_percent(models):
    for name, model in models.items():
        heads = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)]
        heads = [head for head in heads if head.out_features == model.num_classes]
        assert heads, name
        for head in heads:
            torch.testing.assert_close(head.bias.sigmoid(), torch.full_like(head.bias, 0.01))


def test_positions_tell_queries_apart_from_the_start(models):
    """With PyTorch's own weights, what differs between boxes would be 0.6 long beside content
    queries of 16."""
    positions = copy.deepcopy(models["co_dino_r50_instance"].decoder.query_position).to(DEVICE)
    boxes = torch.rand(1, 2000, 4, generator=torch.Generator().manual_seed(0))
    boxes[..., 2:] = 0.05 + 0.3 * boxes[..., 2:]
    with torch.no_grad():
        codes = positions(boxes)[0]
    assert (codes - codes.mean(0)).norm(dim=-1).mean().item() == pytest.approx(2.2, rel=0.15)
