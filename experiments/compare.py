"""Methods side by side: every one from the same base, on the same prompts and noises, over several seeds.

    python -m experiments.compare --jobs 2                                           # all methods
    python -m experiments.compare --methods leapalign refl "full --last 2" --seeds 3
    python -m experiments.compare --also my_method.py:noisy_steps                    # yours, in the table
    python -m experiments.compare --table ablations                                  # the paper's Fig. 4
    python -m experiments.compare --table ranges --jobs 2                            # where do early steps matter?

A method is a name or FILE.py:FUNCTION, and then any flags of train.py.  The first one is the reference: it makes
--steps updates, and is what the others are compared with, seed by seed.  The table of methods is made twice: at as many
evaluations of the network as the reference takes (forward 1, forward and backward 3), and at as many updates (--equal).

Where rows make other numbers of updates, their averages (--ema) reach as far back in proportion, but for a row that
gives its own: with one decay for all, 40 updates would be judged with nearly half of the base in their weights, and 140
with next to nothing.

A row has its method's own keywords, the paper's, and those that it names: not the preset's --reward-input.

A learning rate is chosen for each method, from the same grid, on a seed that no table uses, by the judge at the end of
a run at equal evaluations: from the middle of the grid on, uphill, until the next one does worse.  The tables of
ablations and ranges have one low rate throughout: at the higher one that is chosen for LeapAlign, its seeds differ too
much to tell rows apart.

What a run came to is a file in experiments/results/cells, and is not measured again (cells.py): a table that is there
already takes seconds, and a row more takes its own runs.  The results are in --out, and experiments/draw.py makes
tables and pictures of them.  What a table costs is told by --plan, in evaluations.
"""

import itertools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from config import Run
from experiments.cells import Cell, at_once, config_of, opened, run_cell, spent, updates_within
from experiments.command import main
from experiments.draw import draw
from experiments.record import file_of, record
from rewards import reward_name
from shapes.world import TASKS

GRID_SEED = 10**6  # of the runs that choose a learning rate; the tables' seeds are 0, 1, 2, ...
LOW = 7e-5  # the learning rate of ablations and ranges
POINTS = 4  # evaluations of a run after its base, at most
METHODS = (
    "leapalign", "leapalign --reward-input xhat_0", "refl", "draft_lv", "drtune", "full", "flowbp_sparse",
    "flowbp_bridge", "flowbp_lagrange", "flow_grpo", "dance_grpo",
    "mix_grpo --every 6",  # a twelfth of its updates at equal evaluations, as 25 of the paper's 300
)  # fmt: skip
ABLATIONS = (  # the paper's Fig. 4; the first has alpha 0.3, two leaps from random steps, and x_0 rewarded
    "leapalign",
    "leapalign --alpha 0", "leapalign --alpha 0.1", "leapalign --alpha 1",
    "leapalign --leaps 1", "leapalign --leaps 3",
    "leapalign --reward-input xhat_0",
    "leapalign --weight d_j", "leapalign --weight d_0", "leapalign --weight none",
    "leapalign --low 0.5", "leapalign --high 0.5",
    "leapalign --distance 0.5",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Train methods side by side over several seeds, and write a table with intervals."""

    table: Literal["methods", "ablations", "ranges"] = "methods"
    """methods, at equal evaluations and at equal updates; the paper's ablations; leaps from ranges of steps only."""
    methods: tuple[str, ...] = ()
    """Rows in place of the table's own, each a method and its flags, "leapalign --alpha 0"; first the reference."""
    also: tuple[str, ...] = ()
    """Rows to add to the table."""
    seeds: int = 5
    """Runs of each row, with seeds 0, 1, 2, ..."""
    steps: int = 100
    """Updates of the reference."""
    equal: tuple[Literal["evaluations", "updates"], ...] = ("evaluations", "updates")
    """Of the table of methods: give every row the reference's number of network evaluations, or of updates."""
    grid: tuple[float, ...] = (1.75e-5, 3.5e-5, 7e-5, 1.4e-4, 2.8e-4, 5.6e-4, 1.12e-3, 2.24e-3)
    """Learning rates to choose from; a single one is not chosen but taken. Ablations and ranges take a single one,
    7e-5 by default."""
    select: str = "judge"
    """The reward or task by which a learning rate is chosen, as eval.jsonl names it."""
    watch: tuple[str, ...] = ("judge", "shapes/vivid.py:vivid")
    """Rewards that are evaluated but never trained on."""
    flags: str = ""
    """Further flags of train.py for all runs, in one string: --flags="--rollout-steps 16 --batch 32"."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""
    work: Path = Path("runs/compare")
    """Folder of the runs; a finished one keeps its logs, pictures and final model."""
    out: Path | None = None
    """File of the results, beside which tables and pictures are written. The default is experiments/results/TABLE.json
    of a whole table, and runs/TABLE.json where you name rows or set anything else that results depend on."""
    plan: bool = False
    """Say which runs there would be and how many evaluations they take, and stop."""


def rows_of(cfg: Config, flags: str) -> list[str]:
    """The rows of a table, the reference first."""
    if cfg.methods:
        rows = cfg.methods
    elif cfg.table == "ranges":
        rows = ("leapalign", *windows(opened("leapalign", flags)[1].tolist()[:-1]))
    else:
        rows = METHODS if cfg.table == "methods" else ABLATIONS
    return list(dict.fromkeys([*rows, *cfg.also]))


def windows(levels: list[float], most: int = 4) -> list[str]:
    """LeapAlign with leaps from a part of the steps only: up to four parts, of two steps at least, the noisiest first.

    levels: noise levels that steps start from, T of them.  The parts meet halfway between two levels.
    """
    parts = max(1, min(most, len(levels) // 2))
    firsts = [round(i * len(levels) / parts) for i in range(1, parts)]
    edges = [1.0, *((levels[i - 1] + levels[i]) / 2 for i in firsts), 0.0]
    return [f"leapalign --low {low:.3f} --high {high:.3f}" for high, low in itertools.pairwise(edges)]


def check(cfg: Config) -> None:
    """Raise ValueError naming the flag if the table cannot be made."""
    if min(cfg.seeds, cfg.steps, cfg.jobs) < 1 or cfg.seeds > GRID_SEED:
        raise ValueError(f"--seeds {cfg.seeds}, --steps {cfg.steps} and --jobs {cfg.jobs} must be at least 1")
    check_words([cfg.flags, *cfg.methods, *cfg.also])
    if not cfg.equal:
        raise ValueError("--equal: give evaluations, updates, or both")
    if not cfg.grid or min(cfg.grid) <= 0:
        raise ValueError(f"--grid {' '.join(map(str, cfg.grid))}: give one learning rate or more, above 0")
    if cfg.table != "methods" and len(cfg.grid) > 1 and cfg.grid != Config.grid:
        raise ValueError(f"--grid {' '.join(map(str, cfg.grid))}: the table of {cfg.table} takes one learning rate")


def check_words(texts: Sequence[str]) -> None:
    """Raise ValueError if words for train.py have a flag that every run is given."""
    names = {f.name for f in fields(Run)} | {"seed", "lr", "eval_every", "watch"}
    for text in texts:
        words = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in shlex.split(text) if word[:2] == "--"}
        if own := sorted(names & words):
            flag = own[0].replace("_", "-")
            raise ValueError(f"--{flag} in {text!r}: it is set for every run; this command has flags for some of these")


# -------------------------------------------------------------------------------------- which runs


def check_select(cfg: Config, rewards: Sequence[str]) -> None:
    """Raise ValueError if no evaluation has the number that learning rates are chosen by."""
    names = {"reward", *map(reward_name, (*rewards, *cfg.watch))}
    if "judge" in names:
        names |= set(TASKS)
    if cfg.select not in names:
        raise ValueError(f"--select {cfg.select} is not evaluated; there are {', '.join(sorted(names))}")


def cell(spec: str, flags: str, seed: int, lr: float, steps: int, of: int) -> Cell:
    """A run of a row of `steps` updates in a table whose reference makes `of`."""
    ema = config_of(spec, flags).ema ** (of / steps)
    own = "" if steps == of else f" --ema {ema:.4f}"
    return Cell(spec, flags + own, seed, lr, steps, eval_every=-(-steps // POINTS))


def steps_at(equal: str, rows: list[str], flags: str, steps: int) -> dict[str, int]:
    """Updates of each row where all take as many evaluations, or updates, as the first."""
    budget = spent(rows[0], flags, steps)
    within = {spec: updates_within(spec, flags, budget) for spec in rows[1:]} if equal == "evaluations" else {}
    return {spec: within.get(spec, steps) for spec in rows}


def climb(score: Callable[[float], tuple[Any, ...]], rates: Sequence[float]) -> float:
    """The rate where going uphill from the middle ends: the next one scores lower, or is not there; upwards first.

    score: of a rate, called once each.  Of two that score alike the lower one is better.
    """
    rates, score = sorted(rates), cache(score)
    best = len(rates) // 2
    while best + 1 < len(rates) and score(rates[best + 1]) > score(rates[best]):
        best += 1
    while best > 0 and score(rates[best - 1]) >= score(rates[best]):
        best -= 1
    return rates[best]


def choose(cfg: Config, trial: Callable[[str, float], Cell], spec: str) -> tuple[float, list[dict[str, Any]]]:
    """A row's learning rate, and all runs that were made to find it."""
    tried = {}

    def score(lr: float) -> tuple[bool, float]:
        tried[lr] = run_cell(trial(spec, lr), cfg.work)
        return not tried[lr]["diverged"], tried[lr]["curve"][-1][cfg.select]

    return climb(score, cfg.grid), list(tried.values())


def run(cfg: Config) -> None:
    """Run what is not there yet, write the results, the tables and the pictures."""
    check(cfg)
    flags = f"{cfg.flags} --watch {shlex.join(cfg.watch)}"
    rows = rows_of(cfg, flags)
    for spec in rows:
        opened(spec, flags)  # all are tried before any is run
    rewards = config_of(rows[0], flags).reward
    if other := [spec for spec in rows if config_of(spec, flags).reward != rewards]:
        raise ValueError(
            f"--reward in {other[0]!r}: rows are compared by what they all raise, which --flags can change"
        )
    check_select(cfg, rewards)
    equals = cfg.equal if cfg.table == "methods" else ("updates",)
    steps = {equal: steps_at(equal, rows, flags, cfg.steps) for equal in equals}
    choosing = rows if cfg.table == "methods" and len(cfg.grid) > 1 else []
    updates_of_trials = steps_at("evaluations", choosing, flags, cfg.steps) if choosing else {}
    for equal, spec in itertools.product(equals, rows):
        config_of(spec, cell(spec, flags, 0, 1.0, steps[equal][spec], cfg.steps).flags)  # read before there are threads

    # Seed by seed, so that what is there when it is stopped is a whole table of fewer seeds.
    def cells_of(rates: dict[str, float]) -> dict[tuple[str, str, int], Cell]:
        keys = itertools.product(range(cfg.seeds), equals, rows)
        return {(e, s, n): cell(s, flags, n, rates[s], steps[e][s], cfg.steps) for n, e, s in keys}

    def trial(spec: str, lr: float) -> Cell:
        return cell(spec, flags, GRID_SEED, lr, updates_of_trials[spec], cfg.steps)

    taken = cfg.grid[0] if len(cfg.grid) == 1 else LOW  # where none is chosen
    if cfg.plan:
        middle = len(cfg.grid) // 2
        trials = [trial(spec, lr) for spec in choosing for lr in sorted(cfg.grid)[middle - 1 : middle + 2]]
        likely = dict.fromkeys(rows, sorted(cfg.grid)[middle] if choosing else taken)
        return say_plan(flags, steps, list(dict.fromkeys([*trials, *cells_of(likely).values()])))
    chosen = at_once(partial(choose, cfg, trial), choosing, cfg.jobs)
    cells = cells_of({spec: chosen[spec][0] if choosing else taken for spec in rows})
    done = at_once(partial(run_cell, work=cfg.work), cells.values(), cfg.jobs)

    tables = {e: {s: [done[cells[e, s, n]] for n in range(cfg.seeds)] for s in rows} for e in equals}
    grid = {
        spec: [dict(lr=t["lr"], steps=t["steps"], score=t["curve"][-1][cfg.select]) for t in tried]
        for spec, (_, tried) in chosen.items()
    }
    out = file_of(cfg, cfg.table)
    record(out, kind=cfg.table, rewards=rewards, select=cfg.select, grid=grid, tables=tables)
    draw(out)


def say_plan(flags: str, steps: dict[str, dict[str, int]], cells: list[Cell]) -> None:
    """Print updates and evaluations of every row, and of all runs that are not finished."""
    for equal, of_row in steps.items():
        for spec, updates in of_row.items():
            print(f"equal {equal:12s} {spec:44s} {updates:6d} updates {spent(spec, flags, updates):10,d} evaluations")
    todo = [c for c in cells if not c.file.exists()]
    total = sum(spent(c.spec, flags, c.steps) for c in todo)
    print(f"{len(todo)} runs of {len(cells)} are to do, {total:,} evaluations, if the grid's middle is best")


if __name__ == "__main__":
    main(run, Config, __doc__)
