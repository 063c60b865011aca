"""Bases of other straightness, for experiments.fidelity:  python -m experiments.bases --out runs/bases

Both are trained to go from the same noise to the same images as the shipped base, along other paths:

    reflowed   straight lines, as rectified flow does a second time
    bent       arcs: on its way to the image, the noise also turns a little and back

They begin as the shipped base and are trained on its own pairs of noise and image; layout, autoencoder and text
encoders are its own.  Training resumes, with the same flags.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import shapes.fit
from config import Config as TrainConfig
from experiments.command import main
from infra.folders import Pipeline, load
from infra.saving import save
from leaps import rollout
from model import Flux
from sample import Text, encode, grid, sigmas
from shapes.base import times, velocity
from shapes.fit import EVEN, draw_prompts, fit
from shapes.world import NUMBER, PROMPTS, SIZE

BATCH = 128
Pairs = tuple[Tensor, Tensor, Tensor]  # caption (n,), x_0 and x_1 (n, tokens, channels)


@dataclass(frozen=True)
class Config:
    """Make bases that are straighter and less straight than the shipped one."""

    out: Path = Path("runs/bases")
    """Folder to write reflowed/ and bent/ to, and their checkpoints."""
    model: str = TrainConfig.model
    """The shipped base."""
    pairs: int = 6000
    """Images that they are trained on, 128 a step."""
    steps: int = 400
    """Training steps of each."""
    bend: float = 0.25
    """How far bent's arcs swing out, as a share of the noise."""
    seed: int = 0
    """Seed of everything."""


@torch.no_grad()
def own_pairs(pipe: Pipeline, table: Text, n: int, seed: int) -> Pairs:
    """Captions, noise, and what the base makes of it in 25 steps."""
    caption = torch.tensor([NUMBER[p] for p in draw_prompts(n, np.random.default_rng((seed, 0)), EVEN)])
    tokens = math.prod(grid(pipe, SIZE, SIZE))
    shape = (n, tokens, pipe.flux.config.in_channels)
    x1 = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    levels = sigmas(pipe.schedule, 25, tokens)
    parts = zip(caption.split(BATCH), x1.split(BATCH))
    x0 = [rollout(velocity(pipe.flux, table, ids), noise, levels).x[-1] for ids, noise in parts]
    return caption, torch.cat(x0), x1


def arc(x0: Tensor, x1: Tensor, t: Tensor, bend: float) -> tuple[Tensor, Tensor]:
    """Where a pair is at time t (b,), and its velocity there:

        x_t = (1 - t) x_0 + t x_1 + bend sin(pi t) J x_1

    J turns channels, two by two, by a right angle: so t + bend sin(pi t) J can be undone at each t above 0, and
    different noises stay apart.
    """
    t, half = t[:, None, None], x1.shape[-1] // 2
    turned = torch.cat([-x1[..., half:], x1[..., :half]], -1)
    x = torch.lerp(x0, x1, t) + bend * torch.sin(math.pi * t) * turned
    return x, x1 - x0 + bend * math.pi * torch.cos(math.pi * t) * turned


def loss_of(flux: Flux, table: Text, pairs: Pairs, bend: float) -> Callable[..., dict[str, Tensor]]:
    """Flow matching along arcs; straight lines, if bend is 0."""
    caption, x0, x1 = pairs

    def loss_fn(rng: np.random.Generator, step: int) -> dict[str, Tensor]:
        some = torch.from_numpy(rng.integers(len(x0), size=BATCH))
        t = times(BATCH)
        x, v = arc(x0[some], x1[some], t, bend)
        return dict(loss=F.mse_loss(velocity(flux, table, caption[some])(x, t), v))

    return loss_fn


def run(cfg: Config) -> None:
    """Make both, and write them as model folders."""
    kinds = dict(reflowed=(0.0, 2e-4), bent=(cfg.bend, 1e-3))  # and learning rates: arcs are new to the base
    if present := [name for name in kinds if (cfg.out / name).exists()]:
        raise ValueError(f"--out {cfg.out} has {present[0]}/ already: remove it, or give another folder")
    flags = cfg.out / "flags.json"  # until both are there
    now = json.dumps({name: str(value) for name, value in asdict(cfg).items() if name != "out"})
    if flags.exists() and flags.read_text() != now:
        raise ValueError(
            f"--out {cfg.out} holds a run of other flags, {flags.read_text()}: go on with those or remove it"
        )
    pipe = load(cfg.model)
    with torch.no_grad():
        table = encode(pipe, [p.text for p in PROMPTS])
    pairs = own_pairs(pipe, table, cfg.pairs, cfg.seed)
    work = shapes.fit.Config(work=cfg.out, seed=cfg.seed)
    cfg.out.mkdir(parents=True, exist_ok=True)
    flags.write_text(now)
    shipped = {name: tensor.clone() for name, tensor in pipe.flux.state_dict().items()}
    pipe.flux.requires_grad_(True)
    for name, (bend, lr) in kinds.items():
        pipe.flux.load_state_dict(shipped)
        fit(name, pipe.flux, loss_of(pipe.flux, table, pairs, bend), work, cfg.steps, lr, average=0.99)
    for name in kinds:  # when both are there, so that a run that was stopped before can be given again
        weights = torch.load(cfg.out / f"{name}.pt", weights_only=True)
        save(cfg.out / name, pipe.location.folder, pipe.flux.config, weights)
        print(f"wrote {cfg.out / name}")
        (cfg.out / f"{name}.pt").unlink()  # or a later run with other flags would take it for its own
    flags.unlink()


if __name__ == "__main__":
    main(run, Config, __doc__)
