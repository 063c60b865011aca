"""Is there a lattice? A model trained at one size can show, at others, a pattern with the period of its tokens.

    evaluate.py --rewards hpsv2 lattice --size 512 768x512        train.py --watch lattice

A token is 16x16 pixels, so such a pattern has its power at multiples of 1/16 of the sampling frequency. The power of
what pictures show changes smoothly there.

Legend: b images, h and w their height and width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scorers.common import Scorer

TOKEN = 16  # pixels
FLOOR = 1e-4  # an amplitude that cannot be seen, in [0, 1]: without it a flat picture would be 0 over 0


def lattice() -> Scorer:
    """Minus the log10 of the power at the lattice's frequencies over that of their neighbours.

    About 0 without a pattern, lower the stronger it is. Images (b, 3, h, w), sides multiples of 16; it has a gradient.
    """

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        gray = images.float().mean(1)  # (b, h, w)
        across = log_power_ratio(gray)
        down = log_power_ratio(gray.transpose(1, 2))
        return -(across + down) / 2

    return Scorer(score)


def log_power_ratio(gray: Tensor) -> Tensor:
    """The log10 of the ratio of powers along the last axis, a mean over 7 harmonics.  (b, h, w) -> (b,)"""
    width = gray.shape[-1]
    spectrum = torch.fft.rfft(gray, norm="forward")  # (b, h, w // 2 + 1)
    power = spectrum.abs().square().mean(1)  # (b, w // 2 + 1)
    power = power + FLOOR**2
    # The eighth harmonic is the highest frequency there is, and has a neighbour on one side only.
    harmonics = torch.arange(1, TOKEN // 2, device=gray.device) * (width // TOKEN)
    # The mean of logs, not the log of a mean: a spectrum falls as a power of the frequency, a line in logs.
    below = power[:, harmonics - 1].log10()
    above = power[:, harmonics + 1].log10()
    excess = power[:, harmonics].log10() - (below + above) / 2
    return excess.mean(-1)
