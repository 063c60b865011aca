"""Images from any model folder: the tiny Flux, FLUX.1-dev, or the final/ of a run.

python sample.py --model runs/leapalign-seed0/final --prompt "a photo of two circles" --out grid.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from files import load
from pictures import contact_sheet
from pipeline import grid, sample
from prompts import read_prompts

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    """Write a captioned grid of images."""

    model: str = str(HERE / "shapes" / "tiny-flux")
    """Model folder in the diffusers layout of FLUX, or a hub id."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompts: Path | None = None
    """A file of prompts, one per line, or JSON, used beside --prompt."""
    out: Path = Path("grid.png")
    """The picture to write."""
    num: int = 4
    """Images per prompt."""
    steps: int = 25
    """Euler steps."""
    guidance: float = 3.5
    """Guidance scale, for models that were distilled with guidance; others ignore it."""
    size: int | None = None
    """Image side in pixels; the default is the VAE's own."""
    text_length: int | None = None
    """T5 tokens a prompt is padded or cut to; the default is the tokenizer's own, 512 for FLUX.1-dev."""
    batch: int = 8
    """Images at a time: fewer need less memory, the pictures stay the same."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute."""
    bf16: bool = False
    """Run the transformer and the text encoders in bfloat16, as FLUX.1-dev was published."""
    seed: int = 0
    """The n-th image of every prompt starts from the noise of seed + n, so rows can be compared."""


def main() -> None:
    cfg = tyro.cli(Config, description=__doc__)
    try:
        prompts = [*cfg.prompt, *(read_prompts(cfg.prompts) if cfg.prompts else [])]
        if not prompts:
            raise ValueError('nothing to draw: give --prompt "..." or --prompts FILE')
        if min(cfg.num, cfg.steps, cfg.batch) < 1:
            raise ValueError(f"--num {cfg.num}, --steps {cfg.steps} and --batch {cfg.batch} must be at least 1")
        pipe = load(cfg.model, cfg.device, torch.bfloat16 if cfg.bf16 else torch.float32, cfg.text_length)
        size = cfg.size or pipe.vae.config.sample_size
        grid(pipe, size, size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    repeated = [p for p in prompts for _ in range(cfg.num)]
    seeds = [cfg.seed + n for _ in prompts for n in range(cfg.num)]
    images = sample(pipe, repeated, seeds, cfg.steps, size, size, cfg.guidance, cfg.batch)
    contact_sheet(images, repeated, cfg.out, columns=cfg.num, side=max(128, min(size, 512)))
    print(f"wrote {cfg.out}: {len(images)} images of {size}x{size}")


if __name__ == "__main__":
    main()
