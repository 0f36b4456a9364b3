"""Tiny transformer backbones and the nodes of configs/models/backbones.py."""

from __future__ import annotations

import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from co_detr.modeling.backbones import SwinTransformer, VisionTransformer
from tests.paths import CONFIGS

TINY_SWIN = {"embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 3}
TINY_VIT = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 4 * 2 / 3,
    "window_size": 3,
    "global_blocks": [1],
    "pretrain_image_size": 64,
}


def backbone_node(name: str) -> DictConfig:
    """A node of the config, with the width that the rest of the model would give it."""
    node = LazyConfig.load(str(CONFIGS / "models" / "backbones.py"))[name]
    node.out_channels = 256
    return node


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return instantiate(backbone_node(name))


def randomize_all(module: nn.Module, seed: int = 0) -> None:
    """Every parameter random and large enough that no term of the result is hidden."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + (parameter.ndim == 1))


def tiny_swin(**settings) -> SwinTransformer:
    settings = TINY_SWIN | {"drop_path_rate": 0.0, "out_features": ["stage0", "stage2"]} | settings
    model = SwinTransformer(**settings)
    randomize_all(model)
    return model


def tiny_vit(**settings) -> VisionTransformer:
    model = VisionTransformer(**TINY_VIT | {"drop_path_rate": 0.0} | settings)
    randomize_all(model)
    return model


def outputs_and_gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """All outputs and all gradients of their sum of squares, with drop paths from a fixed seed."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(0)
    maps = model(images)
    sum(level_map.square().sum() for level_map in maps.values()).backward()
    return maps | {name: p.grad for name, p in model.named_parameters()}
