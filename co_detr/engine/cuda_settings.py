"""Switches of PyTorch that trade exactness or repeatability for speed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class CudaSettings:
    """The node ``train.cuda``; without effect on the CPU.

    Attributes:
        tf32: whether float32 matrix products and convolutions run on tensor cores, with 10 bits of
            mantissa (NVIDIA Ampere and newer). Sums and everything else stay in float32.
        cudnn_benchmark: whether cuDNN tries which algorithm is fastest for each new image size,
            which pays where all images have one size.
    """

    tf32: bool = True
    cudnn_benchmark: bool = False

    def apply(self) -> None:
        # Not the names that PyTorch 2.9 has introduced: 2.4 lacks them, and both do not mix.
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32
        torch.backends.cudnn.benchmark = self.cudnn_benchmark


def configure_torch(train: DictConfig) -> None:
    """Sets what ``train.cuda`` and ``train.deterministic`` ask for, for the whole process.

    To be called before the model is on the GPU. A config without these nodes, of an earlier
    version, leaves everything as it is.
    """
    settings = _settings(train, train.device)
    if settings is not None:
        settings.apply()
    if train.get("deterministic", False):
        # Read by cuBLAS when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Operators that have no deterministic kernel are named in a warning.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


@contextmanager
def cuda_settings(train: DictConfig, device: torch.device) -> Iterator[None]:
    """``train.cuda`` inside of the block alone, for a model in somebody else's process."""
    settings = _settings(train, device)
    if settings is None:
        yield
        return
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    settings.apply()
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def pin_for(loader: DataLoader, device: str) -> DataLoader:
    """Lets a loader put tensors where a GPU can fetch them while it computes."""
    loader.pin_memory = torch.device(device).type == "cuda"
    return loader


def _settings(train: DictConfig, device: str | torch.device) -> CudaSettings | None:
    if "cuda" not in train or torch.device(device).type != "cuda":
        return None
    return CudaSettings(**train.cuda)
