"""Methods side by side: every one from the same base, on the same prompts and noises, over several seeds.

    python -m experiments.compare --jobs 2                                           # all methods, equal evaluations
    python -m experiments.compare --jobs 2 --equal updates                           # and as many updates of each
    python -m experiments.compare --methods leapalign refl "full --last 2" --seeds 3
    python -m experiments.compare --also my_method.py:noisy_steps                    # yours, in the table
    python -m experiments.compare --table ablations                                  # the paper's Fig. 4
    python -m experiments.compare --table ranges                                     # where do early steps matter?

A row is a method, or FILE.py:FUNCTION, and then any flags of train.py. The first row is the reference: it makes
--updates updates, and the other rows are compared with it, seed by seed. All rows take as many evaluations of the
network as the reference (a forward is 1, a forward and backward 3), or as many updates (--equal). A row has its own
method's defaults, the paper's, not the --reward-input of the preset.

Each method has a learning rate of its own, chosen from the same grid on a seed that no table uses, by the judge at the
end of a run at equal evaluations. The choice begins in the middle of the grid and goes uphill until the next rate does
worse. Ablations and ranges have one low rate for all rows.

A finished run is a line of cells.jsonl and is not repeated (cells.py), so a table that is there already takes seconds.
--plan prints which runs are there, and what the others cost.
"""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import Run
from experiments.cells import (
    Cell,
    config_of,
    evaluations_of,
    flag_names,
    load_method,
    read_cells,
    run_cell,
    run_parallel,
    updates_within,
    warn_of_other_code,
)
from experiments.draw import draw_tables
from experiments.record import run_command, write_result
from infra.flags import flags
from infra.jsonl import Entry
from infra.page import runs_page
from rewards import reward_name
from shapes.world import TASKS

# A rate that was chosen on a table's seed would flatter that table.
GRID_SEED = 10**6  # of the runs that choose a learning rate; the tables' seeds are 0, 1, 2, ...
GRID = (1.75e-5, 3.5e-5, 7e-5, 1.4e-4, 2.8e-4, 5.6e-4, 1.12e-3, 2.24e-3)
LOW_RATE = (7e-5,)  # of ablations and ranges: at LeapAlign's best rate its seeds differ too much to compare rows
POINTS = 4  # evaluations of a run, after the base's
METHODS = (
    "leapalign",  # the paper's, with x_0 rewarded
    "leapalign --reward-input xhat_0",
    "leapalign --by-level",  # k and j drawn by noise level, x_0 rewarded
    "refl",
    "draft_lv",
    "drtune",
    "full",  # the true gradient
    "direct_align",
    "flowbp_sparse",
    "flowbp_bridge",
    "flowbp_lagrange",
    "flow_grpo",
    "dance_grpo",
    "mix_grpo --every 6",  # a twelfth of its updates at equal evaluations, as 25 of the paper's 300
    "awm",
    "nft",
)
ABLATIONS = (  # the paper's Fig. 4 and Table 5
    "leapalign",  # alpha 0.3, two leaps from random steps, x_0 rewarded
    "leapalign --alpha 0",  # no nested gradient
    "leapalign --alpha 0.1",
    "leapalign --alpha 1",  # the whole one
    "leapalign --leaps 1",
    "leapalign --leaps 3",
    "leapalign --reward-input xhat_0",
    "leapalign --reward-input xhat_0 --weight d_j",
    # Which distances the weight of Eq. 12 uses.
    "leapalign --weight d_j",
    "leapalign --weight d_0",
    "leapalign --weight none",
    # Which noise levels leaps start from: early steps only, late steps only, and a fixed distance.
    "leapalign --low 0.5",
    "leapalign --high 0.5",
    "leapalign --distance 0.5",
    # Lambda: 0.35 and 0.55 of the paper's Table 5, in proportion: its base scores 0.31, this one 0.115. The first row's
    # 0.4 is above the table's highest: hardly a sample reaches it.
    "leapalign --lam 0.13",
    "leapalign --lam 0.2",
)
RANGES = (  # a quarter of the preset's 12 steps each; ranges meet halfway between two noise levels
    "leapalign",
    "leapalign --low 0.919 --high 1.000",
    "leapalign --low 0.779 --high 0.919",
    "leapalign --low 0.550 --high 0.779",
    "leapalign --low 0.000 --high 0.550",
)
TABLES = {  # rows, what all of them have as many of, and learning rates to choose from
    "methods": (METHODS, "evaluations", GRID),
    "ablations": (ABLATIONS, "updates", LOW_RATE),
    "ranges": (RANGES, "updates", LOW_RATE),
}


@flags
class CompareFlags:
    """Train methods side by side over several seeds, and write a table with intervals."""

    table: Literal["methods", "ablations", "ranges"] = "methods"
    """The methods; the paper's ablations; leaps from ranges of steps only."""
    methods: tuple[str, ...] = ()
    """Rows in place of the table's, each a method and its flags, "leapalign --alpha 0"; first the reference."""
    also: tuple[str, ...] = ()
    """Rows to add to the table."""
    seeds: int = 5
    """Runs of each row, with seeds 0, 1, 2, ..."""
    updates: Annotated[int, tyro.conf.arg(aliases=("--steps",))] = 100
    """Updates of the reference."""
    equal: Literal["evaluations", "updates"] | None = None
    """What all rows have as many of as the reference. The default is evaluations of the network, and updates for
    ablations and ranges."""
    grid: tuple[float, ...] = ()
    """Learning rates to choose from, for each row; a single one is taken as it is. The default is eight rates from
    1.75e-5 to 2.24e-3, and 7e-5 alone for ablations and ranges."""
    select: str = "judge"
    """The reward or task by which a learning rate is chosen, as eval.jsonl names it."""
    watch: tuple[str, ...] = ("judge", "shapes/vivid.py:vivid")
    """Rewards that are evaluated but never trained on."""
    flags: str = ""
    """Further flags of train.py for all runs, in one string: --flags="--rollout-steps 16 --batch 32"."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""
    work: Path = Path("runs/compare")
    """Folder of the runs; a finished run keeps its logs, pictures and final model."""
    results: Annotated[Path | None, tyro.conf.arg(aliases=("--out",))] = None
    """JSON file of the results; tables, pictures and a page are written beside it. The default is runs/TABLE.json."""
    plan: bool = False
    """Print which runs there are and how many evaluations the others take, and stop."""


def compare_methods(cfg: CompareFlags) -> None:
    """Make the runs that are not finished yet; write the results, tables and pictures."""
    rows, equal, grid = TABLES[cfg.table]
    cfg = replace(cfg, equal=cfg.equal or equal, grid=sorted(cfg.grid or grid))
    # A row that is named twice is run once.
    rows = list(dict.fromkeys(map(str.strip, [*(cfg.methods or rows), *cfg.also])))
    check_compare_flags(cfg)
    rewards = check_rows(cfg, rows)
    updates = updates_of_rows(cfg, rows, cfg.equal)
    finished = read_cells()  # once: from here on this command alone adds runs
    if cfg.plan:
        print_plan(cfg, updates, finished)
        return
    # Every row has a learning rate of its own, or the comparison would be one of learning rates.
    rates, trials = choose_rates(cfg, rows, finished)
    cells = []
    for seed in range(cfg.seeds):  # seed by seed: an interrupted command leaves a whole table of fewer seeds
        cells += [make_cell(cfg, spec, seed, rates[spec], updates[spec]) for spec in rows]
    run = partial(run_cell, work=cfg.work, finished=finished)
    entries = run_parallel(run, cells, cfg.jobs)
    table: dict[str, list[Entry]] = {spec: [] for spec in rows}
    for cell, entry in entries.items():
        table[cell.spec].append(entry)
    path = cfg.results or Path("runs") / f"{cfg.table}.json"
    result = write_result(path, rewards=rewards, select=cfg.select, grid=trials, tables={cfg.equal: table})
    draw_tables(result, path)
    # The page has one seed's curves and pictures, of the runs that this command, or an earlier one, made in --work.
    folders = []
    for cell in entries:
        folder = cfg.work / cell.name
        # A run that is a line of the repository's cells.jsonl was made elsewhere and has no folder.
        if cell.seed == 0 and (folder / "eval.jsonl").exists():
            folders.append(folder)
    if folders:
        runs_page(folders, path.with_suffix(".html"))
    # Last, below the tables, where it is read.
    warn_of_other_code(entries.values())


# ------------------------------------------------------------------------------------ rows and lengths


def check_compare_flags(cfg: CompareFlags) -> None:
    """Raise ValueError naming the flag if no table can be made."""
    if not all(number > 0 for number in (cfg.seeds, cfg.updates, cfg.jobs, *cfg.grid)):  # NaN is not
        raise ValueError("--seeds, --updates, --jobs and --grid must be above 0")
    # These would be overridden without a word: a run has each of them set, after the flags of its row.
    fixed = {field.name for field in fields(Run)} | {"method", "steps", "seed", "lr", "eval_every", "watch"}
    for words in (cfg.flags, *cfg.methods, *cfg.also):
        for flag in flag_names(words):
            if flag.replace("-", "_") in fixed:
                raise ValueError(f"--{flag} in {words!r}: every run has it set; this command may have a flag for it")


def common_flags(cfg: CompareFlags) -> str:
    """The flags of train.py that all rows have."""
    return f"{cfg.flags} --watch {shlex.join(cfg.watch)}"


def check_rows(cfg: CompareFlags, rows: list[str]) -> tuple[str, ...]:
    """The rewards that all rows raise. Raises ValueError if a row cannot be run or compared. None is run before."""
    flags = common_flags(cfg)
    rewards = config_of(rows[0], flags).reward
    for spec in rows:
        load_method(spec, flags)
        if config_of(spec, flags).reward != rewards:
            raise ValueError(f"--reward in {spec!r}: all rows must raise the same rewards, which --flags can set")
    # A misspelled --select would be found after the first run, minutes or hours later.
    names = {"reward", *map(reward_name, (*rewards, *cfg.watch))}
    if "judge" in names:
        names.update(TASKS)
    if cfg.select not in names:
        raise ValueError(f"--select {cfg.select} is not evaluated; there are {', '.join(sorted(names))}")
    return rewards


def updates_of_rows(cfg: CompareFlags, rows: list[str], equal: str) -> dict[str, int]:
    """The updates of each row where all rows take as many evaluations, or updates, as the first row."""
    updates = dict.fromkeys(rows, cfg.updates)
    if equal == "evaluations":
        # Of the reference: its own updates are exact, and the other rows stay below it by less than one update.
        budget = evaluations_of(rows[0], common_flags(cfg), cfg.updates)
        for spec in rows[1:]:
            updates[spec] = updates_within(spec, common_flags(cfg), budget)
    return updates


# ---------------------------------------------------------------------------------------------- runs


def make_cell(cfg: CompareFlags, spec: str, seed: int, lr: float, updates: int) -> Cell:
    """A run of a row.

    The average of its weights (--ema) reaches as far back as the reference's, in proportion to the updates. With one
    decay for all rows, a model after 40 updates would be judged with nearly half of the base in its weights.
    """
    flags = common_flags(cfg)
    # Rows as long as the reference have no --ema of their own, so tables at equal updates share their runs.
    if updates != cfg.updates:
        ema = config_of(spec, flags).ema ** (cfg.updates / updates)
        flags += f" --ema {ema:.4f}"
    return Cell(spec, flags, seed, lr, updates, eval_every=math.ceil(updates / POINTS))


def choose_rates(cfg: CompareFlags, rows: list[str], finished: dict[str, Entry]) -> tuple[dict, dict]:
    """The learning rate of each row; and for each row the rates that were tried, with their scores."""
    # At equal evaluations in tables of equal updates, too: so both tables have the same rates and share their trials.
    updates = updates_of_rows(cfg, rows, "evaluations")
    trials = {spec: [] for spec in rows}

    def choose_rate(spec: str) -> float:
        def score(lr: float) -> tuple[bool, float, float]:
            entry = run_cell(make_cell(cfg, spec, GRID_SEED, lr, updates[spec]), cfg.work, finished)
            value = entry["curve"][-1][cfg.select]
            trials[spec].append(dict(lr=lr, updates=updates[spec], score=value))
            # A run that diverged is worse than any that did not. Of two equal scores the lower rate is safer.
            return not entry["diverged"], value, -lr

        return climb(score, cfg.grid)

    return run_parallel(choose_rate, rows, cfg.jobs), trials


def climb(score: Callable[[float], tuple], rates: Sequence[float]) -> float:
    """The rate at which going uphill from the middle of the sorted rates ends, upwards first.

    `score` is called once per rate, and never for a single rate.
    """
    score = cache(score)  # a score is a training run
    best = len(rates) // 2
    while best + 1 < len(rates) and score(rates[best + 1]) > score(rates[best]):
        best += 1
    while best > 0 and score(rates[best - 1]) > score(rates[best]):
        best -= 1
    return rates[best]


def print_plan(cfg: CompareFlags, updates: dict[str, int], finished: dict[str, Entry]) -> None:
    """Print what a run of each row takes, and how many runs of the table are finished at some rate of the grid."""
    for spec, count in updates.items():
        evaluations = evaluations_of(spec, common_flags(cfg), count)
        done = 0
        for seed in range(cfg.seeds):
            done += any(make_cell(cfg, spec, seed, lr, count).key in finished for lr in cfg.grid)
        print(
            f"{spec:44s} {count:4d} updates {evaluations:9,d} evaluations a run, {done} of {cfg.seeds} runs are there"
        )
    if len(cfg.grid) > 1:
        print("and three trials or more of each row, to choose its learning rate")


if __name__ == "__main__":
    run_command(compare_methods, CompareFlags, __doc__)
