"""Randomness belongs to the seed: every draw comes from a generator named by the seed, its purpose and its moment.

So no seed can disturb another that is trained beside it, every arm sees the same images in the same order, and a run
can go on from any step: there is no state to keep.
"""

import hashlib

import torch


def key(seed: int, purpose: str) -> int:
    """64 bits of their own, signed, for each pair of seed and purpose."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def make_generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each pair of seed and purpose."""
    generator = torch.Generator(device)
    generator.manual_seed(key(seed, purpose))
    return generator
