"""The judge of the shapes world as a scorer: rules, so there is no gradient in it.

To watch, to evaluate on, or to train on with methods that need no gradient.
"""

from collections.abc import Sequence

from torch import Tensor

from scorers.common import Scorer
from shapes import judge as rules
from shapes.world import SIZE, parse_caption


def judge() -> Scorer:
    """1 where an image shows what its prompt asks for, else 0; with the task of a prompt."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return rules.judge_images(images, [parse_caption(p) for p in prompts]).float().to(images.device)

    return Scorer(score, task_of=lambda prompt: parse_caption(prompt).task)


def check(prompts: Sequence[str], size: tuple[int, int], source: str) -> None:
    """Raise ValueError for a prompt outside of the world, or images of another size than its own."""
    for prompt in prompts:
        try:
            parse_caption(prompt)
        except ValueError as error:
            raise ValueError(f"{source}: {error}; without judge any prompts do") from None
    if size != (SIZE, SIZE):
        raise ValueError(f"--size {size[0]}x{size[1]}: the judge reads {SIZE}x{SIZE} pixels, no others")
