"""Flags of a command: a frozen dataclass, a field each, with the help text as the string beneath the field."""

import ast
import inspect
import textwrap
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar

import tyro

Class = TypeVar("Class", bound=type)
# Intervals of numbers: a round bracket leaves its end out. All other numbers are finite.
RANGES = {
    "(0, inf)": ("lora_alpha", "noise", "tau", "distance", "tflops"),
    "(0, inf]": ("clip",),  # inf does not clip
    "[0, inf)": ("lr", "weight_decay", "anchor", "copies", "at", "skip_nonfinite", "guidance"),
    "[0, 1)": ("ema",),
    "[0, 1]": ("low", "high"),
    "[0, 1e12]": ("seed",),
    "[1, inf)": (
        "updates", "batch", "rollout_steps", "eval_every", "text_length", "patience", "save_every", "keep", "lora",
        "rollout_batch", "micro_batch", "check_every", "active", "nodes", "last", "group", "window", "shift_every",
        "leaps", "num", "gpus",
    ),
}  # fmt: skip


def flags(cls: Class) -> Class:
    """A decorator that makes a class of annotated fields a dataclass that tyro reads from the command line.

    The strings beneath the fields become their help. Their line breaks are removed first, because tyro would print
    them and `--help` is read at 80 columns, not at the width of the source.
    """
    # tyro reads help from an annotation first, and only without one from the source.
    annotations = inspect.get_annotations(cls)
    for name, text in help_texts(cls).items():
        annotations[name] = Annotated[annotations[name], tyro.conf.arg(help=text)]
    cls.__annotations__ = annotations
    return dataclass(frozen=True)(cls)


def help_texts(cls: type) -> dict[str, str]:
    """The string beneath each field of a class, in one line."""
    # Python keeps no docstrings of fields, so the source is parsed.
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    texts = {}
    for field, text in zip(definition.body, definition.body[1:]):
        # A string on its own, directly after a field.
        is_string = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and is_string:
            texts[field.target.id] = " ".join(text.value.value.split())
    return texts


def check_ranges(cfg: Any) -> None:
    """Raise ValueError naming a flag whose number is out of its range, or not finite."""
    range_of_flag = {}
    for interval, names in RANGES.items():
        range_of_flag |= dict.fromkeys(names, interval)
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        interval = range_of_flag.get(field.name, "(-inf, inf)")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not is_in(number, interval):
                raise ValueError(f"{flag_of(field.name)} {number} is out of range: give a number in {interval}")


def flag_of(name: str) -> str:
    """The flag of a field, as users write it."""
    return f"--{name.replace('_', '-')}"


def is_in(number: float, interval: str) -> bool:
    """Whether a number is in an interval such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    is_excluded = (number == low and interval[0] == "(") or (number == high and interval[-1] == ")")
    return low <= number <= high and not is_excluded  # NaN is in none
