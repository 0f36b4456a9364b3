"""An allocation that failed, explained: how much was in use, and which switches would save some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from omegaconf import DictConfig, OmegaConf

from co_detr.data.loader import BatchPlan
from co_detr.engine.memory import PeakMemory
from co_detr.errors import OutOfMemoryError

# What allocators say: CUDA's caching allocator, CUDA itself, cuBLAS, and PyTorch's on the CPU.
_MESSAGES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",
)
_CHECKPOINTING = (
    "model.encoder.activation_checkpointing",
    "model.backbone.bottom_up.activation_checkpointing",
)
_TRAIN_SIZES = (
    "model.padding.square_size",
    "dataloader.train.mapper.augmentations.size",
    "dataloader.train.mapper.augmentations.max_size",
)
_TEST_SIZES = ("model.padding.square_size", "dataloader.test.mapper.augmentations.max_size")


@contextmanager
def explain_out_of_memory(device: str, doing: str, advice: Callable[[], str]) -> Iterator[None]:
    """Turns a failed allocation inside the block into one sentence.

    Args:
        device: where the model is.
        doing: what the block does, as in "training".
        advice: gives what to change.

    Raises:
        OutOfMemoryError: instead of what PyTorch or Python raise.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        where = "the GPU" if device.startswith("cuda") else "the machine"
        raise OutOfMemoryError(
            f"the memory of {where} ran out in {doing} (peak: {PeakMemory.of(device)}): {advice()}."
        ) from error


def training_advice(cfg: DictConfig, plan: BatchPlan) -> str:
    """Switches that save memory in training and are not on yet, the cheapest first."""
    advice = []
    share = plan.images_per_gpu
    if share > 1:
        smaller = max(n for n in range(1, share) if share % n == 0)
        advice.append(
            f"set train.images_per_gpu={smaller} (now {share}; the batch of a step and the "
            "learning rate stay)"
        )
    if not cfg.train.amp.enabled:
        advice.append("set train.amp.enabled=true (bfloat16)")
    off = [key for key in _CHECKPOINTING if OmegaConf.select(cfg, key) is False]
    advice += [f"set {key}=true" for key in off]
    advice.append(_smaller_images(cfg, _TRAIN_SIZES))
    return f"{' or '.join(advice)}, and try it with --dry-run"


def evaluation_advice(cfg: DictConfig) -> str:
    """The same for evaluation, which keeps nothing for a backward pass."""
    size = cfg.dataloader.test.get("batch_size", 1)
    advice = ["set dataloader.test.batch_size=1"] if size > 1 else []
    return " or ".join([*advice, _smaller_images(cfg, _TEST_SIZES)])


def _smaller_images(cfg: DictConfig, keys: tuple[str, ...]) -> str:
    for key in keys:
        if value := OmegaConf.select(cfg, key):
            return f"choose smaller images ({key} is {value})"
    return "choose smaller images"


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or any(message in text for message in _MESSAGES)
