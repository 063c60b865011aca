"""Is there a lattice? A model trained at one size can show, at others, a pattern with the period of its tokens.

    evaluate.py --rewards hpsv2 lattice --size 512 768x512        train.py --watch lattice

A token is 16x16 pixels, so such a pattern has its power at multiples of 1/16 of the sampling frequency. The power of
what pictures show changes smoothly there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scorers.common import Scorer

TOKEN = 16  # pixels
FLOOR = 1e-4  # an amplitude that cannot be seen, in [0, 1]: flat pictures have no pattern


def lattice() -> Scorer:
    """Minus the log10 of the power at the lattice's frequencies over that beside them, 7 harmonics across and down.

    About 0 without a pattern, lower the stronger it is. Images (b, 3, h, w), sides multiples of 16; it has a gradient.
    """

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        gray = images.float().mean(1)
        return -(excess(gray) + excess(gray.transpose(1, 2))) / 2

    return Scorer(score)


def excess(gray: Tensor) -> Tensor:
    """The log10 of that ratio along the last axis of (b, h, w), (b,)."""
    size = gray.shape[-1]
    power = torch.fft.rfft(gray, norm="forward").abs().square().mean(1) + FLOOR**2  # (b, size // 2 + 1)
    at = torch.arange(1, TOKEN // 2, device=gray.device) * (size // TOKEN)
    beside = torch.stack([power[:, at - 1], power[:, at + 1]]).log10().mean(0)
    return (power[:, at].log10() - beside).mean(-1)
