"""A cell of a table is a training run: trained once, in a process of its own, and kept as a line of cells.jsonl.

A line is found again by its key, a hash of all that decides the run: the flags, the method's keywords, and the contents
of the files that the run reads, a method's file of yours among them. So a finished run is not repeated, on this machine
or another; an interrupted run goes on from its checkpoint; and other weights make another run.

The repository's code is not in the key, because most of its changes change no result. A line has a hash of the sampler,
the methods and the vivid reward (`CODE`), and a table warns if one of them computes something else today. Other files
can change results without a warning. Modules that a method of yours imports are in neither hash: after a change of one,
remove the lines of your method.
"""

import ast
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import Config, Experiment, Method, parse
from experiments.record import RESULTS, ROOT, provenance
from infra.distributed import Process, device_of
from infra.jsonl import Entry, append_line, read_log
from infra.logs import UpdateLog
from infra.methods import recorded_flags
from rewards import parse_reward
from samples import Size, branch_counts, trial_samples
from start import prepare

CELLS = RESULTS / "cells.jsonl"  # the runs that the repository ships
NEW_CELLS = Path("runs/cells.jsonl")  # yours; append its lines to CELLS to ship them
# Code that is most likely to change a run's numbers. Runs outlive most of its changes, so it is not in a run's key.
CODE = ("sample.py", "leaps.py", "baselines/direct.py", "baselines/policy.py", "shapes/vivid.py")
# A run is repeatable to the bit, and two runs fit on two cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
NONFINITE = 3  # train.py's exit code after a number that is not finite
# The preset's --reward-input would count for all rows. Without it each row has its own method's default.
AS_PUBLISHED = ["--reward-input", "None"]
TYRO_LOCK = threading.Lock()  # tyro is not thread-safe


@dataclass(frozen=True)
class Cell:
    """A training run. `spec` and `flags` are words of train.py's command line."""

    spec: str  # a row: a method and its own flags, as "leapalign --alpha 0"
    flags: str  # flags of all rows
    seed: int
    lr: float
    updates: int
    eval_every: int

    @property
    def numbers(self) -> dict[str, float]:
        """The flags of train.py that a table sets for each run."""
        return dict(seed=self.seed, lr=self.lr, updates=self.updates, eval_every=self.eval_every)

    @property
    def arguments(self) -> list[str]:
        """The words after `train.py`, all but --out."""
        words = row_arguments(self.spec, self.flags)
        for name, value in self.numbers.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    @property
    def key(self) -> str:
        """A hash of all that decides the run."""
        cfg = replace(config_of(self.spec, self.flags), **self.numbers)  # tyro is slow: it reads each row once
        contents = [digest(path) for path in input_paths(cfg)]
        decisive = json.dumps([decisive_flags(cfg), contents], sort_keys=True)
        return hashlib.sha256(decisive.encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        """The name of the run's folder: readable, and unique by the key."""
        words = f"{Path(self.spec).name}-lr{self.lr:.2g}-seed{self.seed}-{self.key}"
        return re.sub(r"[^\w.]+", "-", words)


def row_arguments(spec: str, flags: str) -> list[str]:
    """The preset and flags of a row; its own flags come last, so they win."""
    return ["shapes", *AS_PUBLISHED, *shlex.split(flags), "--method", *shlex.split(spec)]


@cache
def config_of(spec: str, flags: str) -> Config:
    """The flags of a row's runs. Wrong flags end the command with train.py's own message."""
    with TYRO_LOCK:
        return parse(row_arguments(spec, flags))[0]


def flag_names(words: str) -> list[str]:
    """The flags in words of a command line: "--lr=1e-4 --stop-early" has lr and stop-early."""
    return re.findall(r"(?<!\S)--([\w-]+)", words)


# -------------------------------------------------------------------------------------- what decides a run


def decisive_flags(cfg: Config) -> dict[str, Any]:
    """The flags that decide a run's numbers.

    A flag whose value is None, False, 0 or empty is left out, so a key stays the same when train.py gets a new flag, or
    loses one, that the run does not set.
    """
    paths = {"model", "base", "prompts", "eval_prompts"}  # their contents count, not where they are
    # Machine and Run flags change memory, files and time, but --updates changes the decay of the learning rate.
    names = {field.name for field in (*fields(Experiment), *fields(Method))} | {"updates"}
    recorded = recorded_flags(cfg)
    return {name: recorded[name] for name in sorted(names - paths) if recorded[name]}


def input_paths(cfg: Config) -> list[str]:
    """Files, folders and hub ids whose contents decide a run. CODE is not among them."""
    paths = [cfg.model, cfg.base, cfg.prompts, cfg.eval_prompts, cfg.method]
    # A watched reward trains nothing, but what it measures is part of a run's line.
    for spec in (*cfg.reward, *cfg.watch):
        paths.append(parse_reward(spec)[1])
    # FILE.py of FILE.py:FUNCTION
    files = [re.sub(r"\.py:.*", ".py", str(path)) for path in paths if path]
    return [file for file in files if file not in CODE]


@cache
def digest(path: str) -> str:
    """A hash of a file, or of all files in a folder and their names. A hub id, which is no path, is returned."""
    root = Path(path)
    files = [file for file in sorted([root, *root.rglob("*")]) if file.is_file()]
    if not files:
        return path
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(root)}\n".encode())
        total.update(file.read_bytes())
    return total.hexdigest()


@cache
def code_hash() -> str:
    """A hash of what CODE computes: comments, docstrings and line breaks are left out."""
    total = hashlib.sha256()
    for name in CODE:
        tree = ast.parse((ROOT / name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None  # a docstring
        total.update(ast.unparse(tree).encode())
    return total.hexdigest()[:10]


def warn_of_other_code(entries: Iterable[Entry]) -> None:
    """Print a warning if runs of a table were made by other code than today's."""
    count = sum(entry["code"] != code_hash() for entry in entries)
    if count:
        print(
            f"warning: other code of {', '.join(CODE)} made {count} of these runs; a run without a line is made again"
        )


# ------------------------------------------------------------------------------- evaluations of the network


class LoadedMethod(NamedTuple):
    """What train.py makes of a row's flags."""

    method: Callable[..., Any]  # with its keywords
    size: Size  # of its images
    forwards: int  # evaluations of the network in a velocity, two with guidance
    backwards: int  # evaluations with a gradient in a vjp


@cache
def load_method(spec: str, flags: str) -> LoadedMethod:
    """A row's method, without weights. Raises ValueError if train.py would refuse its flags."""
    # `prepare` refuses a folder that holds a run, and this one holds none.
    cfg = replace(config_of(spec, flags), out=Path("runs/never-made"))
    process = Process(rank=0, world_size=1, device=device_of(cfg.device), mesh=None)
    try:
        setup = prepare(cfg, process)
    except ValueError as error:
        raise ValueError(f"{spec} {flags}: {error}") from error
    branches = branch_counts(setup.model.weights.config, cfg.guidance, cfg.detach_negative)
    return LoadedMethod(setup.method, setup.sizes[0], *branches)


def cost(forwards: int, backwards: int) -> int:
    """Evaluations of the network: a forward is 1, a forward and backward 3. `forwards` counts both kinds."""
    return forwards + 2 * backwards


def costs(spec: str, flags: str) -> Iterator[int]:
    """The evaluations of a run after 1, 2, 3, ... updates, by the calls that its method makes on random samples.

    They are exact where all updates cost the same. ReFL and DRTune stop at a random step: a run draws other steps, so
    its evaluations agree on average.
    """
    method, size, forwards, backwards = load_method(spec, flags)
    batch = config_of(spec, flags).batch
    total = 0
    for update in itertools.count():
        # Another random step in each update, the same in all calls: budgets are repeatable.
        samples, calls = trial_samples(size.sigmas, batch, torch.Generator().manual_seed(update), update)
        method(samples)
        without_gradient = forwards * (calls["velocity"] + calls["base"])
        with_gradient = backwards * calls["vjp"]
        total += batch * cost(without_gradient + with_gradient, with_gradient)
        yield total


def evaluations_of(spec: str, flags: str, updates: int) -> int:
    """Evaluations that so many updates take."""
    return next(itertools.islice(costs(spec, flags), updates - 1, None))


def updates_within(spec: str, flags: str, budget: int) -> int:
    """The number of updates that take no more evaluations than the budget; at least one."""
    for updates, total in enumerate(costs(spec, flags)):
        if total > budget:
            return max(1, updates)


# ------------------------------------------------------------------------------------------- running


def read_cells() -> dict[str, Entry]:
    """The finished runs by their keys: the repository's, then yours."""
    entries = read_log(CELLS) + read_log(NEW_CELLS)
    return {entry["key"]: entry for entry in entries}


def run_parallel(function: Callable[[Any], Any], items: Iterable[Any], jobs: int) -> dict[Any, Any]:
    """item -> function(item), `jobs` at a time, in threads: each waits for a process of its own.

    An error is raised when the items before it are finished; items that have not begun by then are left out.
    """
    results = {}
    items = list(dict.fromkeys(items))  # two rows may share a run, and two processes must not share a folder
    with ThreadPoolExecutor(jobs) as pool:
        for item, result in zip(items, pool.map(function, items)):
            results[item] = result
            print(f"{len(results)} of {len(items)}", flush=True)
    return results


def run_cell(cell: Cell, work: Path, finished: dict[str, Entry]) -> Entry:
    """The numbers of a cell: those of the finished run, or of a run that is made now, in a folder of `work`.

    Two commands at a time need two folders of work. Raises ChildProcessError if train.py fails.
    """
    if cell.key in finished:
        return finished[cell.key]
    print(f"runs {cell.name}", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    folder, log = work / cell.name, work / f"{cell.name}.log"
    threads = [f"{name}={value}" for name, value in ONE_THREAD.items()]
    # Before the run, because the revision may change while it takes its minutes.
    source = provenance([*threads, "python", "train.py", *cell.arguments])
    # --resume: a run that was interrupted goes on from its newest checkpoint.
    code = launch([sys.executable, ROOT / "train.py", *cell.arguments, "--out", folder, "--resume"], log)
    if code not in (0, NONFINITE):  # a run that diverged is a result: its learning rate is too high
        tail = "\n".join(log.read_text().splitlines()[-5:])
        raise ChildProcessError(f"{source['command']} ended with {code}; the end of {log}:\n{tail}")
    entry = dict(key=cell.key, code=code_hash(), **asdict(cell), diverged=code == NONFINITE)
    entry |= summarize_run(folder) | source
    NEW_CELLS.parent.mkdir(exist_ok=True)
    append_line(NEW_CELLS, entry)
    for name in ("checkpoints", "best"):  # final/ stays, 10 MB of the tiny model
        shutil.rmtree(folder / name, ignore_errors=True)
    return entry


def launch(command: list[str | Path], log: Path) -> int:
    """Run a command with one thread, append what it prints to a file, and return its exit code."""
    with log.open("a") as file:
        return subprocess.run(command, stdout=file, stderr=file, env=os.environ | ONE_THREAD).returncode


def summarize_run(folder: Path) -> dict[str, Any]:
    """A run's logs in short: all evaluations, the network's evaluations until then, and what the updates took.

    Seconds are those of the updates alone. Memory is the highest of the process, in GB.
    """
    updates = read_log(folder / "metrics.jsonl")  # without the updates that were not finite
    costs_of_steps = {update["step"]: cost(update["forwards"], update["backwards"]) for update in updates}
    curve = []
    for evaluation in read_log(folder / "eval.jsonl"):
        # The rest is lists of scores by prompt.
        point = {name: value for name, value in evaluation.items() if isinstance(value, int | float)}
        del point["seconds"]
        point["evaluations"] = sum(count for step, count in costs_of_steps.items() if step < point["step"])
        curve.append(point)
    seconds = sum(update["seconds"] for update in updates)
    memory = max((update["memory"] for update in updates), default=0.0)
    # What the method logs, and each of several rewards: means over the updates.
    logged = {}
    # A run that diverged at once has no updates.
    for name in updates[0] if updates else ():
        if name not in UpdateLog.__annotations__ and not name.startswith("seconds_"):
            logged[name] = sum(update[name] for update in updates) / len(updates)
    return dict(curve=curve, evaluations=sum(costs_of_steps.values()), seconds=seconds, memory=memory, logged=logged)
