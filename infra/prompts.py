"""Prompt files, and the order in which a run sees what they say."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 file: one per line, JSON lines with a `prompt` field, or a JSON array of either.

    Blank lines and those that start with # are skipped.  HPDv2's train.json and test.json are such arrays.
    Raises ValueError naming the file, and the line or entry at fault, if it cannot be read or holds no prompt.
    """
    return [entry["prompt"] for entry in read_entries(path)]


def read_entries(path: Path) -> list[dict[str, Any]]:
    """As `read_prompts`, with all that JSON lines say of a prompt; a plain line becomes {"prompt": line}."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    entries = []
    if text.lstrip().startswith("[") and text.rstrip().endswith("]"):
        for number, item in enumerate(parse_json(text, f"prompt file {path}")):
            item = {"prompt": item} if isinstance(item, str) else item
            entries.append(with_prompt(item, f"{path}, entry {number}"))
    else:
        for number, line in enumerate(map(str.strip, text.split("\n")), start=1):  # splitlines cuts at more
            where = f"{path}, line {number}"
            if line and not line.startswith("#"):
                entry = parse_json(line, where) if line.startswith("{") else {"prompt": line}
                entries.append(with_prompt(entry, where))
    if not entries:
        raise ValueError(f"prompt file {path} holds no prompt: write one per line")
    return entries


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON ({error})") from error


def with_prompt(entry: Any, where: str) -> dict[str, Any]:
    """The entry, if it has a prompt."""
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        found = ", ".join(entry) or "nothing" if isinstance(entry, dict) else repr(entry)
        raise ValueError(f'{where}: it has no "prompt", but {found}')
    return entry


def batch_of(items: Sequence[Item], step: int, size: int, seed: int) -> list[Item]:
    """The `size` items of one step: all of them once an epoch, each epoch in an order of its own.

    A function of (seed, step) alone, so a run resumes, and any step is repeated, without a state.
    """
    batch, orders = [], {}
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(items))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, epoch)).permutation(len(items))
        batch.append(items[orders[epoch][place]])
    return batch


def shard(items: Sequence[Item], rank: int, world: int) -> Sequence[Item]:
    """A rank's part of a batch: neighbours, so that the parts in the order of ranks are the batch."""
    return items[rank * len(items) // world : (rank + 1) * len(items) // world]
