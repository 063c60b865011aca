"""Random numbers that depend on a key, such as (seed, step), and on nothing that was drawn earlier."""

import numpy as np
import torch


def generator_of(*key: int) -> torch.Generator:
    """A CPU generator for a key.  Keys that differ only in zeros at their end have the same generator."""
    # SeedSequence mixes the numbers, so that (0, 1) and (1, 0) are unrelated; a sum of them would be the same.
    sequence = np.random.SeedSequence(key)
    seed = int(sequence.generate_state(1)[0])
    return torch.Generator().manual_seed(seed)
