"""Randomness as a function of *where* it is used, not of what ran before.

Every sample is augmented under a seed made of (run seed, position in the sample stream) and every
training step runs under a seed made of (run seed, iteration, rank). So there is no generator state
to carry: a resumed run, a run with other numbers of loading workers, and a run that evaluated in
between all see the same random numbers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def mix_seed(*key: int | str) -> int:
    """Hashes `key` to 63 bits, so that neighboring keys give unrelated generators."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*key: int | str) -> None:
    """Seeds Python, NumPy and torch (all devices) from `key`."""
    seed = mix_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def locally_seeded(*key: int | str) -> Iterator[None]:
    """Seeds the CPU generators from `key` inside the block and restores them behind it."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    seed = mix_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: this also runs in forked workers, which must not touch CUDA.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
