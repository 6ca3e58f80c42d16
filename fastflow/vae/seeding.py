"""Random numbers that depend on a seed and a name, never on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def seed_for(seed: int, *key: str | int) -> int:
    """Derives the seed of one stream of random numbers, such as ("noise", epoch)."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # 63 bits, as every generator accepts


def generator_for(device: torch.device, seed: int, *key: str | int) -> torch.Generator:
    """Makes the generator of one stream.

    Because each epoch has its own streams, a resumed run draws what an unbroken one draws, and no
    generator's state has to be saved.
    """
    return torch.Generator(device).manual_seed(seed_for(seed, *key))
