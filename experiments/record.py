"""Results as files: what was measured, by which command, on which hardware, when, at which revision; and tables."""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from infra.files import check_writable, replacing
from infra.summary import confidence_interval
from infra.user_code import revision

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"


def run_command(command: Callable[[Any], None], flags: type, description: str | None) -> None:
    """Read a command's flags and run the command. Exits with 2 for wrong flags, with 1 where a training run failed."""
    cfg = tyro.cli(flags, description=description)
    try:
        if cfg.results:  # now, not after hours
            check_writable(f"--results {cfg.results}", cfg.results.parent)
        command(cfg)
    except (ValueError, ChildProcessError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None


# ------------------------------------------------------------------------------------------- files


def write_result(path: Path, **content: Any) -> dict[str, Any]:
    """Write a result of this command as JSON, whole or not at all, and return it."""
    # As a reader would type it, not the path that sys.argv has.
    command = ["python", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    result = provenance(command) | content  # the command first, for who opens the file
    with replacing(path) as temporary:  # a kill leaves the old file
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    return result


def write_table(path: Path, text: str) -> None:
    """Write a table beside its result, and print it: people who wait for a command want its numbers on the screen."""
    path.with_suffix(".md").write_text(text)
    print(text)


def provenance(command: Sequence[str]) -> dict[str, str]:
    """What a reader needs to repeat a result: the command, hardware, date and revision."""
    return dict(command=shlex.join(command), hardware=hardware(), date=str(date.today()), revision=revision())


def hardware() -> str:
    """The processor, the number of its cores, the GPU if there is one, and torch's version."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux has the processor's name here only
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    words = [names[0] if names else platform.processor(), f"{os.cpu_count()} cores"]
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join([*words, f"torch {torch.__version__}"])


# ------------------------------------------------------------------------------------------- Markdown


def source_line(result: dict[str, Any]) -> str:
    """Where a result is from, in a sentence: the first line of every table file."""
    return f"`{result['command']}`, {result['date']}, revision {result['revision']}, {result['hardware']}."


def markdown_table(head: list[str], lines: list[list[str]]) -> str:
    """A table whose first column has names and whose other columns have numbers."""
    # Numbers to the right, so that digits stand below each other.
    alignment = ["---", *["--:"] * (len(head) - 1)]
    rows = ["| " + " | ".join(row) + " |" for row in (head, alignment, *lines)]
    return "\n".join(rows) + "\n"


def format_interval(values: Sequence[float] | np.ndarray, sign: str = "") -> str:
    """Mean and half of the 95% interval of independent values, as 0.542 ±0.012. A single value has no interval."""
    mean, half = confidence_interval(values)
    if np.isnan(mean):
        return "-"
    digits = 3 if abs(mean) < 100 else 0  # spreads of policy gradients are in the hundreds
    text = f"{mean:{sign}.{digits}f}"
    return text if np.isnan(half) else f"{text} ±{half:.{digits}f}"
