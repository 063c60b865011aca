"""Results as files: what was measured, and by which command, on what, when, of which revision."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from infra.files import replacing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
FREE = {"table", "jobs", "work", "out", "plan", "device"}  # flags that change nothing of a table but its name or place


def record(path: Path, **content: Any) -> None:
    """Write a result, whole or not at all, with where it is from: this command."""
    command = ["python", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    with replacing(path) as part:
        part.write_text(json.dumps(origin(command) | content, indent=1) + "\n")


def file_of(cfg: Any, name: str) -> Path:
    """Where a result goes: to --out, else to experiments/results, or to runs/ if a flag changes what is measured.

    So what the repository shows is not lost to a try.  cfg is a command's dataclass of flags.
    """
    own = any(getattr(cfg, f.name) != f.default for f in fields(cfg) if f.name not in FREE)
    return cfg.out or (Path("runs") if own else RESULTS) / f"{name}.json"


def origin(command: Sequence[str]) -> dict[str, str]:
    """Where a result is from: the command that made it, hardware, date and revision."""
    today = datetime.now().strftime("%Y-%m-%d")
    return dict(command=shlex.join(command), hardware=hardware(), date=today, revision=revision())


def named(model: str) -> str:
    """A model as results name it: from the repository's root on, if it lies there."""
    path = Path(model).absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else model


def hardware() -> str:
    """The processor and how many of its cores may be used, the GPU if there is one, and torch's version."""
    info = Path("/proc/cpuinfo")  # of Linux; elsewhere platform tells the name
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [(names or [platform.processor() or platform.machine()])[0], f"{cores} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}"])


def revision() -> str:
    """The commit of this repository, with a + if files differ from it; unknown where there is no git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
