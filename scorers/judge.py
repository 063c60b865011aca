"""The judge of the shapes world as a scorer: rules, so there is no gradient in it.

To watch, to evaluate on, or to train on with methods that need no gradient.
"""

from collections.abc import Sequence

from torch import Tensor

from scorers.common import Scorer
from shapes import judge as rules
from shapes.world import SIZE, parse_caption


def judge_scorer() -> Scorer:
    """1 where an image shows what its prompt asks for, else 0; means are reported by task."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        requests = [parse_caption(prompt) for prompt in prompts]
        correct = rules.judge_images(images, requests)  # bool, (b,)
        return correct.float().to(images.device)  # the rules run on the CPU

    return Scorer(score, task_of=lambda prompt: parse_caption(prompt).task)


def check_judge(prompts: Sequence[str], size: tuple[int, int], source: str) -> None:
    """Raise ValueError for a prompt outside of the shapes world, or images of another size than its own."""
    for prompt in prompts:
        try:
            parse_caption(prompt)
        except ValueError as error:
            raise ValueError(f"{source}: {error}; without judge any prompts do") from None
    # The rules measure areas and distances in pixels.
    if size != (SIZE, SIZE):
        raise ValueError(f"--size {size[0]}x{size[1]}: the judge reads {SIZE}x{SIZE} pixels, no others")
