"""An error in the middle of a run: what it was, in a line, and what is saved."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from infra.prompts import printable
from infra.user_code import UserCodeError
from scorers.common import Score

# By the stage of an update, or the evaluation: what needs less memory.
REMEDIES = {
    "rollout": "take a smaller --rollout-batch",
    "reward": "take a smaller --micro-batch, or --vae-bf16",
    "leaps": "take a smaller --micro-batch, or --recompute blocks",
    "update": "train a --lora, or take more GPUs",
    "evaluation": "take a smaller --rollout-batch",
}


def print_error(text: str) -> None:
    """Print on stderr. Names and prompts in the text may be a stranger's, so control characters are escaped."""
    print(printable(text), file=sys.stderr)


def stage_of(error: BaseException) -> str:
    """The stage that an error came in: what the meter noted, or the evaluation, which has no meter."""
    stages = [note for note in getattr(error, "__notes__", []) if note in REMEDIES]
    return [*stages, "evaluation"][0]


def explain(error: BaseException) -> str | None:
    """What a user can do about an error: of the user's code, or of memory that is used up. None for any other."""
    if is_out_of_memory(error):
        stage = stage_of(error)
        return f"out of memory in the {stage}: {REMEDIES[stage]}"
    return str(error) if isinstance(error, UserCodeError) else None


def score_or_nan(score: Score, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward's scores on one of several ranks, (b,); NaN, and a line on stderr, if the user's code raises.

    The other ranks are within collectives, where they would wait for a rank that stops. NaN lets all of them end the
    update, see the number that is not finite, save and stop together.
    """
    try:
        return score(images, prompts)
    except UserCodeError as error:
        print_error(f"error: {error}")
        return torch.nan * images.flatten(1).sum(1)  # with a graph: a method may ask for the gradient


def is_out_of_memory(error: BaseException | None) -> bool:
    if error is None:
        return False
    # On the CPU torch raises a RuntimeError, on Apple's GPUs another one.
    is_torchs = isinstance(error, RuntimeError) and ("out of memory" in str(error) or "CPUAllocator" in str(error))
    if is_torchs or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return is_out_of_memory(error.__cause__)  # in a method of the user's
