"""Numbers with intervals, and tables of them."""

from typing import Any

import numpy as np


def shown(mean: float, half: float, sign: str = "") -> str:
    """0.542 ±0.012; the half is left out where there is none, and what is not known is a dash."""
    if np.isnan(mean):
        return "-"
    digits = 3 if abs(mean) < 100 else 0
    return f"{mean:{sign}.{digits}f}" + ("" if np.isnan(half) else f" ±{half:.{digits}f}")


def origin(result: dict[str, Any]) -> str:
    """What made a result, in a sentence."""
    return f"`{result['command']}`, {result['date']}, revision {result['revision']}, {result['hardware']}."


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table whose first column is names and whose others are numbers."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)) + "\n"
