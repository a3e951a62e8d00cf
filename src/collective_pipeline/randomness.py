"""Randomness belongs to the seed: every draw comes from a generator named by the seed and by what it is for.

So no seed can disturb another that is trained beside it, every arm sees the same images in the same order, and what
must be kept to continue a run is the state of a few generators.
"""

import hashlib

import torch


def make_generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each pair of seed and purpose."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(digest, "big", signed=True))
    return generator
