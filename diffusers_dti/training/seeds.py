"""Random generators whose draws are a function of a few numbers, such as (seed, sample number)."""

import numpy as np
import torch

SAMPLES_VERSION = 2  # raised whenever the samples of a seed change, so that no run continues on other ones


def seeded_generator(*numbers: int) -> torch.Generator:
    """Return a generator on the CPU, seeded by several numbers. Close or permuted numbers give unrelated draws.

    Args:
        numbers: integers, counted modulo 2⁶⁴.
    """
    sequence = np.random.SeedSequence([number % 2**64 for number in numbers])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
