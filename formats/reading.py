"""Files of other people: every error names its file, and headers tell what a file is before a weight is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open

Source = TypeVar("Source")
Result = TypeVar("Result")

AGAIN = "copy or download it again"


def parse_file(source: Source, parse: Callable[[Source], Result], remedy: str = AGAIN) -> Result:
    """parse(source). Raises ValueError that names the source and the remedy, whatever `parse` raises."""
    try:
        return parse(source)
    except Exception as error:  # safetensors, transformers and diffusers each have exceptions of their own
        reason = str(error).rstrip(".")
        raise ValueError(f"cannot read {source} ({type(error).__name__}: {reason}): {remedy}") from error


def parse_json(file: Path, parse: Callable[[dict[str, Any]], Result], remedy: str = AGAIN) -> Result:
    """parse(entries) of the object in a JSON file. Raises ValueError as `parse_file`."""
    return parse_file(file, lambda path: parse(json.loads(path.read_text())), remedy)


def tensor_names(file: Path, remedy: str = AGAIN) -> list[str]:
    """The names of a safetensors file's tensors, from its header. Raises ValueError if the header cannot be read."""
    # The header is JSON at the start of the file: of 24 GB, 100 kB are read.
    return parse_file(file, lambda path: list(safe_open(path, "pt").keys()), remedy)
