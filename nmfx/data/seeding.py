"""Randomness that depends on a key only: seeds from words and numbers, and a block of code under such a seed."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_of(*key: int | str) -> int:
    """63 bits from a key; the same in every process, on every machine, and different for neighbouring keys."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a key."""
    return torch.Generator().manual_seed(seed_of(*key))


@contextlib.contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Run a block with the generators of random, numpy and torch (CPU) seeded by a key, then put them back.

    timm's transforms draw from all three.
    """
    states, seed = (random.getstate(), np.random.get_state(), torch.get_rng_state()), seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the accelerators
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
