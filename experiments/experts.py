"""Early and late steps with weights of their own: a world in which what no gradient reaches stays as it is.

    python -m experiments.experts                                              # LeapAlign and ReFL, three seeds
    python -m experiments.experts --methods "leapalign --low 0.7" --lr 1.4e-4 --out more.json

The tiny Flux has the same weights at all noise levels, so gradients of late steps change early ones too
(experiments/decided.py).  Here the steps above --split are made by one copy of the base, and all others by a second
one (two_networks.py).  In the table are also the same runs with shared weights, which are compare's.

A finished run is a file in experiments/results/cells, and is not run again.
"""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.cells import config_of, opened, run_cell, spent, updates_within
from experiments.command import main
from experiments.compare import Config as CompareConfig
from experiments.compare import cell, check_words
from experiments.draw import draw
from experiments.draw_compare import TWO
from experiments.record import file_of, record

FLAGS = f"--watch {shlex.join(CompareConfig.watch)}"  # so that compare's runs are found
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
    """Folder of the runs, as compare's."""
    out: Path | None = None
    """File of the results, beside which tables and pictures are written; the default is
    experiments/results/experts.json, and runs/experts.json where you set anything that results depend on."""


def run(cfg: Config) -> None:
    check_words([cfg.flags, *cfg.methods])
    if len(set(cfg.methods)) < len(cfg.methods):
        raise ValueError(f"--methods {shlex.join(cfg.methods)}: one is there twice")
    if len(cfg.lr) != len(cfg.methods):
        raise ValueError(f"--lr {shlex.join(map(str, cfg.lr))}: give one for each of {len(cfg.methods)} methods")
    if not 0 < cfg.split < 1 or min(cfg.seeds, cfg.steps) < 1:
        raise ValueError(
            f"--split {cfg.split} is between 0 and 1, --seeds {cfg.seeds} and --steps {cfg.steps} at least 1"
        )
    flags = f"{FLAGS} {cfg.flags}"
    for spec in cfg.methods:
        opened(spec, flags)  # all are tried before any is run
        if config_of(spec, flags).anchor:
            raise ValueError(f"--anchor in {f'{spec} {cfg.flags}'.strip()!r}: two networks have no copy to be held to")
    budget = spent(cfg.methods[0], flags, cfg.steps)
    rows: dict[str, list[dict[str, Any]]] = {}
    for spec, lr in zip(cfg.methods, cfg.lr):
        steps = cfg.steps if spec == cfg.methods[0] else updates_within(spec, flags, budget)
        one = [cell(spec, flags, seed, lr, steps, cfg.steps) for seed in range(cfg.seeds)]
        two = [replace(each, program=("experiments/two_networks.py", f"{cfg.split:g}")) for each in one]
        rows[spec] = [run_cell(each, cfg.work) for each in one]
        rows[spec + TWO] = [run_cell(each, cfg.work) for each in two]
    rewards = config_of(cfg.methods[0], flags).reward
    out = file_of(cfg, "experts")
    record(out, kind="experts", rewards=rewards, select="judge", grid={}, tables=dict(evaluations=rows))
    draw(out)


if __name__ == "__main__":
    main(run, Config, __doc__)
