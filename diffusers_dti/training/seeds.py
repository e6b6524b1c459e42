"""Random generators whose draws are a function of a few numbers, such as (seed, sample number)."""

import torch


def seeded_generator(*numbers: int) -> torch.Generator:
    """Return a generator on the CPU, seeded by several numbers; close or permuted numbers give unrelated draws."""
    state = 0
    for n in numbers:
        state = ((state ^ n) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state % 2**63)
