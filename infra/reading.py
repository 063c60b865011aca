"""Files of other people and of killed runs are read here: whatever is wrong with one is one error, which names it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Source = TypeVar("Source")
Result = TypeVar("Result")

AGAIN = "copy or download it again"


def parse_file(source: Source, parse: Callable[[Source], Result], remedy: str = AGAIN) -> Result:
    """parse(source). Raises ValueError that names the source and the remedy, whatever `parse` raises."""
    try:
        return parse(source)
    except Exception as error:  # safetensors, transformers and diffusers each have exceptions of their own
        raise ValueError(f"cannot read {source} ({reason_of(error)}): {remedy}") from error


def reason_of(error: Exception) -> str:
    """What an error says, without numbers of the system and without the path, which the message names already."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).rstrip(".")
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def parse_json(file: Path, parse: Callable[[dict[str, Any]], Result], remedy: str = AGAIN) -> Result:
    """parse(entries) of the object in a JSON file. Raises ValueError as `parse_file`."""
    return parse_file(file, lambda path: parse(json.loads(path.read_text())), remedy)


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError naming a tensor that holds NaN or infinity: with such weights all pictures are black."""
    for name, tensor in tensors:
        # A sum has what any of its terms has, and is quicker than to look at each.
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"tensor {name} is not finite")
