"""Randomness that is a function of numbers, such as a run's seed and a step, and of nothing that was drawn before."""

import numpy as np
import torch


def generator_of(*key: int) -> torch.Generator:
    """A CPU generator, another one for each key; numpy takes a key that ends in zeros for the one without them."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
