"""How training drew pictures: saved with the weights, so that sample.py and evaluate.py draw alike.

With other steps, sizes, guidance or text lengths, a model draws other pictures than those that its run evaluated.
"""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open

from infra.flags import flag_of
from infra.prompts import printable
from infra.reading import parse_file

Flags = TypeVar("Flags")
FILE = "sampling.json"  # in a folder; a .safetensors file has the same text in its metadata
KINDS = {  # types of the settings; JSON writes a scale of 4.0 as 4, too
    "rollout_steps": (int,),
    "size": (str,),
    "guidance": (float, int),
    "negative_prompt": (str,),
    "text_length": (int,),
    "bf16": (bool,),
}
UNSET = (None, ())  # of a flag that the user has not given


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
    """The settings in the text of a sampling.json. Raises ValueError for a value of another type."""
    entries = json.loads(text)
    settings = {}
    # Files may come from strangers: only these settings are taken, each of its own type.
    for name, kinds in KINDS.items():
        value = entries.get(name)
        if value in (None, ""):
            continue
        # By type(), because True is an int to isinstance.
        if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} cannot be {value!r}")
        settings[name] = value
    return settings


def draw_as_trained(cfg: Flags, names: tuple[str, ...], defaults: dict[str, Any]) -> Flags:
    """The flags, with those that are not set taken from the first model of `names` that was saved with settings.

    `defaults` fill what is still not set. A line on stderr says what was taken from the model, and which other model
    was trained with other settings.
    """
    values, first = {}, ""
    # Models side by side must be drawn alike, so the first that has settings decides for all.
    for name in names:
        settings = {flag: value for flag, value in saved_sampling(name).items() if getattr(cfg, flag) in UNSET}
        text = " ".join(f"{flag_of(flag)} {value}" for flag, value in settings.items())
        if settings and not first:
            values, first = settings, name
            print(printable(f"drawn as {name} was trained: {text}"), file=sys.stderr)
        elif settings and settings != values:
            warning = f"warning: {name} was trained at {text}, and is drawn as {first}: give flags"
            print(printable(warning), file=sys.stderr)
    # evaluate.py takes one size, and train.py's configuration a tuple of sizes.
    if "size" in values and isinstance(cfg.size, tuple):
        values["size"] = (values["size"],)
    for flag, value in (dict(negative_prompt="", bf16=False) | defaults).items():
        if getattr(cfg, flag) is None:
            values.setdefault(flag, value)
    return replace(cfg, **values)
