"""A reward of one's own, and one that is easily hacked: how colorful a picture is. It never reads the prompt."""

from collections.abc import Sequence

from torch import Tensor


def vivid(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean difference of the highest and the lowest channel: images (b, 3, h, w) in [0, 1] to (b,) in [0, 1]."""
    saturation = images.amax(1) - images.amin(1)  # 0 for every gray, 1 for pure red, green or blue
    return saturation.mean((1, 2))
