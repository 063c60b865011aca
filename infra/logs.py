"""What a run writes down: JSON lines that survive a kill, seconds per stage, and TensorBoard or W&B if asked."""

import json
import resource
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # bf16 FLOP/s, dense, published


def append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that a kill cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate(path: Path, step: int) -> list[dict[str, Any]]:
    """Take from a log what a resumed run will write again, step `step` and after; returns what is left."""
    entries = [e for e in read_log(path) if e["step"] < step]
    if path.exists():
        (part := path.with_suffix(".part")).write_text("".join(json.dumps(e) + "\n" for e in entries))
        part.replace(path)
    return entries


def stopwatch(device: torch.device) -> Callable[[str], dict[str, float]]:
    """A function that notes the seconds since its last call under a name, and returns all notes so far."""
    notes: dict[str, float] = {}
    last = time.perf_counter()

    def lap(name: str) -> dict[str, float]:
        nonlocal last
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        notes[f"seconds_{name}"] = notes.get(f"seconds_{name}", 0.0) + now - last
        last = now
        return notes

    return lap


def peak_memory(device: torch.device) -> float:
    """GB: of the device since the start, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the device is sold with, if it is a known one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for kind, flops in PEAK.items() if kind in name), None)


def open_trackers(
    kinds: Sequence[str], out: Path, config: dict[str, Any], first: int
) -> Callable[[int, dict, list[Path]], None]:
    """A function (step, numbers, pictures) that logs to all of `kinds`, whose packages are imported only here.

    `first` is the step that a run starts or goes on from: what was logged of later ones is overwritten.
    """
    trackers: list[Callable[[int, dict, list[Path]], None]] = []
    if "tensorboard" in kinds:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=first, flush_secs=10)

        def to_tensorboard(step: int, numbers: dict, pictures: list[Path]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            for path in pictures:
                writer.add_image(path.parent.name, np.array(Image.open(path)), step, dataformats="HWC")

        trackers.append(to_tensorboard)
    if "wandb" in kinds:
        import wandb

        name = f"{out.name}-{zlib.crc32(str(out.resolve()).encode()):08x}"  # a folder is a run
        run = wandb.init(project="leapalign", dir=str(out), config=config, id=name, resume="allow")

        def to_wandb(step: int, numbers: dict, pictures: list[Path]) -> None:
            run.log({**numbers, **{p.parent.name: wandb.Image(str(p)) for p in pictures}}, step=step)

        trackers.append(to_wandb)

    def track(step: int, numbers: dict[str, Any], pictures: list[Path]) -> None:
        plain = {k: v for k, v in numbers.items() if isinstance(v, int | float) and k != "step"}
        for tracker in trackers:
            tracker(step, plain, pictures)

    return track
