"""Bases of other straightness, for experiments.fidelity:  python -m experiments.bases --out runs/bases

    reflowed   the shipped base, trained on its own pairs of noise and image, as rectified flow does a second time
    early      a Flux from nothing on the shapes world, stopped early: what it draws so far it draws along bent paths

Both have the layout of the shipped base, whose autoencoder and text encoders they share.  Training resumes, with the
same flags.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import shapes.fit
from config import Config as TrainConfig
from experiments.command import main
from infra.folders import Pipeline, load
from infra.saving import save
from leaps import rollout
from model import Flux, init_weights
from sample import Text, encode, grid, pack, sigmas
from shapes.base import flow_loss, velocity
from shapes.fit import EVEN, TEACH, draw_prompts, fit
from shapes.world import NUMBER, PROMPTS, SIZE, Prompt, scenes

BATCH = 128
Pairs = tuple[Tensor, Tensor, Tensor]  # caption (n,), x_0 and x_1 (n, tokens, channels)


@dataclass(frozen=True)
class Config:
    """Make bases that are straighter and less straight than the shipped one."""

    out: Path = Path("runs/bases")
    """Folder to write reflowed/ and early/ to, and their checkpoints."""
    model: str = TrainConfig.model
    """The shipped base."""
    pairs: int = 6000
    """Images that each is trained on."""
    reflow_steps: int = 400
    """Steps of reflowed, 128 pairs each."""
    early_steps: int = 600
    """Steps of early."""
    seed: int = 0
    """Seed of everything."""


def numbers(prompts: list[Prompt]) -> Tensor:
    return torch.tensor([NUMBER[p] for p in prompts])


@torch.no_grad()
def own_pairs(pipe: Pipeline, table: Text, n: int, seed: int) -> Pairs:
    """Captions, noise, and what the base makes of it in 25 steps."""
    caption = numbers(draw_prompts(n, np.random.default_rng((seed, 0)), EVEN))
    tokens = int(np.prod(grid(pipe, SIZE, SIZE)))
    shape = (n, tokens, pipe.flux.config.in_channels)
    x1 = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    levels = sigmas(pipe.schedule, 25, tokens)
    parts = zip(caption.split(BATCH), x1.split(BATCH))
    x0 = [rollout(velocity(pipe.flux, table, ids), noise, levels).x[-1] for ids, noise in parts]
    return caption, torch.cat(x0), x1


@torch.no_grad()
def scene_pairs(pipe: Pipeline, n: int, seed: int) -> Pairs:
    """Captions and the latents of rendered scenes; their noise is anew in each step."""
    rng = np.random.default_rng((seed, 1))
    prompts, vae = draw_prompts(n, rng, TEACH), pipe.vae
    z = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in scenes(prompts, rng)[0].split(BATCH)])
    x0 = pack((z - vae.config.shift_factor) * vae.config.scaling_factor)
    return numbers(prompts), x0, torch.empty(0)


def loss_of(flux: Flux, table: Text, pairs: Pairs) -> Callable[[np.random.Generator, int], dict[str, Tensor]]:
    """Flow matching between the two ends of pairs, or of images and any noise."""
    caption, x0, x1 = pairs

    def loss_fn(rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        some = torch.from_numpy(rng.integers(len(x0), size=BATCH))
        noise = x1[some] if len(x1) else torch.randn_like(x0[some])
        return flow_loss(velocity(flux, table, caption[some]), x0[some], noise)

    return loss_fn


def run(cfg: Config) -> None:
    """Make both, and write them as model folders."""
    if present := [name for name in ("reflowed", "early") if (cfg.out / name).exists()]:
        raise ValueError(f"--out {cfg.out} has {present[0]}/ already: remove it, or give another folder")
    pipe = load(cfg.model)
    with torch.no_grad():
        table = encode(pipe, [p.text for p in PROMPTS])
    torch.manual_seed(cfg.seed)
    early = Flux(pipe.flux.config)
    init_weights(early)
    own, rendered = own_pairs(pipe, table, cfg.pairs, cfg.seed), scene_pairs(pipe, cfg.pairs, cfg.seed)
    work = shapes.fit.Config(work=cfg.out, seed=cfg.seed)
    cfg.out.mkdir(parents=True, exist_ok=True)
    pipe.flux.requires_grad_(True)
    fit("early", early, loss_of(early, table, rendered), work, cfg.early_steps, lr=2e-3, average=0.99)
    fit("reflowed", pipe.flux, loss_of(pipe.flux, table, own), work, cfg.reflow_steps, lr=2e-4, average=0.99)
    for name, flux in dict(early=early, reflowed=pipe.flux).items():
        save(cfg.out / name, pipe.location.folder, flux.config, flux.state_dict())
        (cfg.out / f"{name}.pt").unlink()  # or a later run with other flags would take it for its own
        print(f"wrote {cfg.out / name}")


if __name__ == "__main__":
    main(run, Config, __doc__)
