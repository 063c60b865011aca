"""Early and late steps with weights of their own: a world in which what no gradient reaches stays as it is.

    python -m experiments.experts                                              # LeapAlign and ReFL, three seeds
    python -m experiments.experts --methods "leapalign --low 0.7" --lr 1.4e-4 --out more.json

The tiny Flux has the same weights at all noise levels, so gradients of late steps change early ones too
(experiments/decided.py).  Here the steps above --split are made by one copy of the base, and all others by a second
one.  Both are trained as train.py trains one.  In the table are also the same runs with shared weights, as compare's.

A finished run is a file in experiments/results/cells, and is not run again.
"""

import json
import shlex
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from config import Config as TrainConfig
from experiments.cells import CELLS, Cell, config_of, cost, opened, run_cell, updates_within
from experiments.command import main
from experiments.compare import cell, spent
from experiments.draw import draw
from experiments.draw_compare import TWO
from experiments.record import file_of, origin, record
from infra.checkpoints import Run
from infra.distributed import World, join, swapped
from infra.files import replacing
from model import Flux
from start import load_pipeline, prepare
from train import evaluate, update

FLAGS = "--watch judge shapes/vivid.py:vivid"  # as compare has them, so that its runs are found


METHODS = ("leapalign", "leapalign --reward-input xhat_0", "refl")


@dataclass(frozen=True)
class Config:
    """Train methods where early and late steps share weights, and where they do not."""

    methods: tuple[str, ...] = METHODS
    """Rows, each a method and its flags; the first one sets the budget of evaluations."""
    lr: tuple[float, ...] = (1.4e-4, 5.6e-4, 2.8e-4)
    """Learning rate of each row: those that compare chose."""
    seeds: int = 3
    """Runs of each row, with seeds 0, 1, 2, ..."""
    steps: int = 100
    """Updates of the first row; the others make as many evaluations of the network."""
    split: float = 0.7
    """Noise level that steps with weights of their own start above: ReFL differentiates none of them."""
    flags: str = ""
    """Further flags of train.py for all runs, in one string."""
    work: Path = Path("runs/compare")
    """Folder of the runs with shared weights, as compare's."""
    out: Path | None = None
    """File of the results, beside which tables and pictures are written; the default is
    experiments/results/experts.json, and runs/experts.json for methods that you name."""


class Experts(nn.Module):
    """Two networks as one: `early` at noise levels above `split`, `late` below. Called as a Flux is."""

    def __init__(self, early: Flux, late: Flux, split: float) -> None:
        super().__init__()
        self.early, self.late, self.split = early, late, split
        self.config = early.config

    @property
    def img_in(self) -> nn.Linear:
        return self.early.img_in  # by which a Flux tells its precision and its device

    def forward(self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, *rest: Any) -> Any:
        network = self.early if timesteps[0] > self.split else self.late
        return network(img, img_ids, txt, txt_ids, timesteps, *rest)


def train_experts(cfg: TrainConfig, split: float, world: World) -> tuple[dict[str, Any], Experts]:
    """One run as train.py's, on two copies of the model: what it came to, as of compare's runs, and the networks."""
    setup = prepare(cfg, world)
    experts = Experts(setup.pipe.flux, load_pipeline(cfg, world).flux, split)
    setup = replace(setup, pipe=replace(setup.pipe, flux=experts))
    run, curve, updates = Run(experts, cfg.lr, cfg.weight_decay), [], []
    for step in trange(cfg.steps + 1, desc=f"{cfg.method} {cfg.seed}"):
        if step % cfg.eval_every == 0 or step == cfg.steps:
            with swapped(run.params, run.averaged):
                means = evaluate(cfg, setup, world)[0]
            evaluations = sum(cost(u["forwards"], u["backwards"]) for u in updates)
            curve.append(
                dict(step=step, **{k: v for k, v in means.items() if k != "by_prompt"}, evaluations=evaluations)
            )
        if step < cfg.steps:
            updates.append(update(cfg, setup, world, run, step))
    seconds, memory = sum(u["seconds"] for u in updates), max(u["memory"] for u in updates)
    return dict(curve=curve, evaluations=evaluations, seconds=seconds, memory=memory), experts


def with_experts(at: Cell, split: float, world: World) -> dict[str, Any]:
    """What a run with two networks came to, from its file, or from running it first."""
    file = CELLS / f"experts{split:g}-{at.name}.json"
    if file.exists():
        return json.loads(file.read_text())
    began = origin(["python", "-m", "experiments.experts"])
    cfg = replace(config_of(at.spec, at.flags), **at.numbers)
    result = dict(spec=at.spec, split=split, seed=at.seed, lr=at.lr, steps=at.steps, diverged=False)
    result |= train_experts(cfg, split, world)[0] | began
    with replacing(file) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
    return result


def run(cfg: Config) -> None:
    if len(cfg.lr) != len(cfg.methods):
        raise ValueError(f"--lr {shlex.join(map(str, cfg.lr))}: give one for each of {len(cfg.methods)} methods")
    if not 0 < cfg.split < 1 or min(cfg.seeds, cfg.steps) < 1:
        raise ValueError(
            f"--split {cfg.split} is between 0 and 1, --seeds {cfg.seeds} and --steps {cfg.steps} at least 1"
        )
    torch.set_num_threads(1)  # as compare's runs
    flags = f"{FLAGS} {cfg.flags}"
    for spec in cfg.methods:
        opened(spec, flags)  # all are tried before any is run
    budget = spent(cfg.methods[0], flags, cfg.steps)
    rows: dict[str, list[dict[str, Any]]] = {}
    with join("cpu", None, timedelta(hours=1)) as world:
        for spec, lr in zip(cfg.methods, cfg.lr):
            steps = cfg.steps if spec == cfg.methods[0] else updates_within(spec, flags, budget)
            cells = [cell(spec, flags, seed, lr, steps) for seed in range(cfg.seeds)]
            rows[spec] = [run_cell(each, cfg.work) for each in cells]
            rows[spec + TWO] = [with_experts(each, cfg.split, world) for each in cells]
    rewards = config_of(cfg.methods[0], flags).reward
    out = file_of(cfg.out, "experts", own=cfg.methods != METHODS)
    record(out, kind="experts", rewards=rewards, select="judge", grid={}, tables=dict(evaluations=rows))
    draw(out)


if __name__ == "__main__":
    main(run, Config, __doc__)
