"""Runs side by side, on the same prompts and noise: the base above, below it what each run ends with.

    python -m experiments.draw_runs runs/one runs/other --out side-by-side.png

What the judge accepts has a frame.  The prompts are every second one of those that a run keeps pictures of.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from experiments.command import main
from infra.jsonl import read_log
from infra.pictures import grid_of, save_png
from infra.prompts import read_prompts
from infra.watch import shown


@dataclass(frozen=True)
class Config:
    """Draw what runs end with, below one another."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, from the same base, evaluated on the same prompts."""
    out: Path = Path("side-by-side.png")
    """The picture to write."""
    side: int = 64
    """Pixels that an image is wide."""


def images_of(run: Path, name: str) -> Tensor:
    """What a run keeps of its "first" or "last" evaluation, (n, 3, h, w) in [0, 1]. Raises ValueError if nothing."""
    file = run / "samples" / f"{name}.pt"
    if not file.exists():
        raise ValueError(f"{run} is no run that has been evaluated: there is no {file}")
    return torch.load(file, weights_only=True) / 255


def accepted(run: Path, evaluation: int, chosen: list[int]) -> list[bool]:
    """Whether the judge accepts the images of some prompts; it accepts none where it did not watch."""
    judged = read_log(run / "eval.jsonl")[evaluation].get("by_prompt", {}).get("judge")
    return [bool(judged) and judged[i] > 0.5 for i in chosen]


def run(cfg: Config) -> None:
    if not cfg.runs:
        raise ValueError("give one run or more")
    first, *others = (images_of(each, "first") for each in cfg.runs)
    for each, images in zip(cfg.runs[1:], others):
        if not torch.equal(images, first):
            raise ValueError(f"{each} does not start from the images that {cfg.runs[0]} starts from")
    prompts = read_prompts(Path(json.loads((cfg.runs[0] / "config.json").read_text())["eval_prompts"]))
    chosen = shown(prompts)
    rows = [first, *(images_of(each, "last") for each in cfg.runs)]
    right = [accepted(cfg.runs[0], 0, chosen), *(accepted(each, -1, chosen) for each in cfg.runs)]
    cells, framed = list(zip(*rows))[::2], list(zip(*right))[::2]
    save_png(grid_of(cells, [prompts[i] for i in chosen][::2], len(cells), cfg.side, framed), cfg.out)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    main(run, Config, __doc__)
