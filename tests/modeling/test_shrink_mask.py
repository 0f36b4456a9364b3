"""Padding masks of the levels."""

import torch
import torch.nn.functional as F

from co_detr.modeling.encoder import shrink_mask


def test_it_is_nearest_interpolation():
    for height, width in ((100, 120), (97, 31), (333, 810), (800, 1333), (64, 64)):
        rows = torch.arange(height)[:, None] % 7 < 3
        columns = torch.arange(width)[None] % 5 < 2
        mask = (rows ^ columns)[None]
        for stride in (4, 8, 16, 32, 64):
            size = (-(-height // stride), -(-width // stride))
            expected = F.interpolate(mask[:, None].float(), size=size)[:, 0].bool()
            assert shrink_mask(mask, *size).equal(expected)
