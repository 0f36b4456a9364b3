"""Weights of ImageNet classifiers that the reference's recipes start from."""

_SWIN = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0"

SWIN_T = f"{_SWIN}/swin_tiny_patch4_window7_224.pth"
SWIN_S = f"{_SWIN}/swin_small_patch4_window7_224.pth"
SWIN_B = f"{_SWIN}/swin_base_patch4_window12_384_22k.pth"
SWIN_L = f"{_SWIN}/swin_large_patch4_window12_384_22k.pth"
