"""How training drew pictures: saved with the weights, so that sample.py and evaluate.py draw alike.

With other steps, sizes, guidance or text lengths, a model draws other pictures than those that its run evaluated.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open

from infra.flags import flag_of
from infra.reading import parse_file

Flags = TypeVar("Flags")
FILE = "sampling.json"  # in a folder; a .safetensors file has the same text in its metadata
KINDS = {"rollout_steps": int, "size": str, "guidance": float, "negative_prompt": str, "text_length": int, "bf16": bool}


def saved_sampling(name: str | Path) -> dict[str, Any]:
    """The settings that a model, a folder or a file, was saved with; empty for a model that was not saved here."""
    path = Path(name)
    # A LoRA or an exported transformer is one file, which people move without its folder.
    if path.suffix == ".safetensors" and path.is_file():
        metadata = parse_file(path, lambda file: safe_open(file, "pt").metadata()) or {}
        return parse_file(path, lambda file: parse_sampling(metadata.get(FILE, "{}")))
    file = path / FILE
    return parse_file(file, lambda file: parse_sampling(file.read_text())) if file.exists() else {}


def parse_sampling(text: str) -> dict[str, Any]:
    """The settings in the text of a sampling.json. Raises ValueError or TypeError for values of other types."""
    entries = json.loads(text)
    settings = {}
    # Files may come from strangers: only these settings are taken, each of its own type.
    for name, kind in KINDS.items():
        if entries.get(name) not in (None, ""):
            settings[name] = kind(entries[name])
    return settings


def draw_as_trained(cfg: Flags, names: tuple[str, ...], defaults: dict[str, Any]) -> Flags:
    """The flags, with those that are not set taken from the first model of `names` that was saved with settings.

    `defaults` fill what is still not set. A line on stderr says what was taken from the model, and which other model
    was trained with other settings.
    """
    values, first = {}, ""
    # Models side by side must be drawn alike, so the first that has settings decides for all.
    for name in names:
        settings = {flag: value for flag, value in saved_sampling(name).items() if not getattr(cfg, flag)}
        text = " ".join(f"{flag_of(flag)} {value}" for flag, value in settings.items())
        if settings and not first:
            values, first = settings, name
            print(f"drawn as {name} was trained: {text}", file=sys.stderr)
        elif settings and settings != values:
            print(f"warning: {name} was trained at {text}, and is drawn as {first}: give flags", file=sys.stderr)
    # evaluate.py takes one size, and train.py's configuration a tuple of sizes.
    if "size" in values and isinstance(cfg.size, tuple):
        values["size"] = (values["size"],)
    for flag, value in defaults.items():
        if getattr(cfg, flag) is None:
            values.setdefault(flag, value)
    return replace(cfg, **values)
