"""A cell of a table is a training run: trained once, in a process of its own, and summed up in a file.

The file is named by what decides the run: its flags (not the machine's, nor those that compare sets or refuses), the
method's keywords, and the contents of the files that it reads, your method's among them.  So a finished cell is not run
again, on this machine or another; one that was stopped goes on from its checkpoint; and other weights are other cells.

The code of this repository is not in the name, nor are files that yours imports, but the revision is in the file: where
you change a method in place, remove its cells.
"""

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from config import Config, Experiment, Method, parse
from experiments.record import RESULTS, ROOT, origin
from formats.locations import locate
from formats.lora_files import lora_file
from infra.distributed import Process, device_of
from infra.files import replacing
from infra.jsonl import read_log
from infra.methods import recorded_flags
from infra.user_code import is_user_code
from rewards import parse_reward
from samples import zero_samples
from start import prepare

CELLS = RESULTS / "cells"
AS_PUBLISHED = "--reward-input None"  # a row has its method's own keywords and those that it names, not the preset's
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # repeatable to the bit, and two fit on two cores
NONFINITE = 3  # train.py's exit code for a run that came to a number that is not finite


@dataclass(frozen=True)
class Cell:
    """A run: `spec` and `flags` are words of train.py's command line, as in "leapalign --alpha 0"."""

    spec: str  # the method and its flags
    flags: str  # flags of all cells
    seed: int
    lr: float
    steps: int
    eval_every: int
    program: tuple[str, ...] = ("train.py",)  # what takes these flags, from the repository's root, and its own words

    @property
    def numbers(self) -> dict[str, float]:
        return dict(seed=self.seed, lr=self.lr, updates=self.steps, eval_every=self.eval_every, save_every=50)

    @property
    def arguments(self) -> list[str]:
        own = [word for name, value in self.numbers.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return ["shapes", *words(self.spec, self.flags), *own]

    @property
    def name(self) -> str:
        """Readable, and another one wherever something differs that decides the result."""
        cfg = replace(config_of(self.spec, self.flags), **self.numbers)
        # What files hold counts, not where they are.
        names = {f.name for f in (*fields(Experiment), *fields(Method))} - {"model", "base", "prompts", "eval_prompts"}
        flags = {name: value for name, value in recorded_flags(cfg).items() if name in names or name == "updates"}
        hub_ids = [name for name in (cfg.model, cfg.base) if name and not Path(name).exists()]
        found = [digest(str(path)) for path in inputs(cfg)] + hub_ids
        decides = json.dumps([flags, found], sort_keys=True)
        key = hashlib.sha256(decides.encode()).hexdigest()[:10]
        name = re.sub(r"[^\w.]+", "-", f"{Path(self.spec).name}-lr{self.lr:.2g}-seed{self.seed}-{key}")
        program, *own = self.program
        return name if program == "train.py" else f"{Path(program).stem}{'-'.join(own)}-{name}"

    @property
    def file(self) -> Path:
        """Where its result is, once it is there."""
        return CELLS / f"{self.name}.json"


def words(spec: str, flags: str) -> list[str]:
    """Of a command line: the flags of all cells, then the row's own, which win."""
    method, *own = shlex.split(spec)
    return [*shlex.split(AS_PUBLISHED), *shlex.split(flags), "--method", method, *own]


@cache  # tyro is not for several threads: all rows are read before any runs
def config_of(spec: str, flags: str) -> Config:
    """The flags of a method's runs; train.py's own message and SystemExit for one that there is not."""
    return parse(["shapes", *words(spec, flags)])[0]


def inputs(cfg: Config) -> list[Path]:
    """The files and folders that decide a run beside its flags; what is no path, as a hub id, is not among them."""
    specs = [*(parse_reward(spec)[1] for spec in (*cfg.reward, *cfg.watch)), cfg.method * is_user_code(cfg.method)]
    files = [spec.rpartition(":")[0] if is_user_code(spec) else spec for spec in specs]
    names = (cfg.model, cfg.base, cfg.prompts, cfg.eval_prompts, *files)
    if lora_file(cfg.model) and not cfg.base:  # its note names what it lies over
        names += locate(cfg.model)[:2]
    return [Path(name) for name in names if name and Path(name).exists()]


@cache
def digest(path: str) -> str:
    """A hash of a file, or of all files of a folder with their names."""
    files = [Path(path)] if Path(path).is_file() else sorted(f for f in Path(path).rglob("*") if f.is_file())
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(path)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


# ------------------------------------------------------------------------------- evaluations of the network


@cache
def opened(spec: str, flags: str) -> tuple[Callable[..., Any], Tensor]:
    """A method with its options, and the noise levels of its rollouts. Raises ValueError if train.py would not run."""
    cfg = replace(config_of(spec, flags), out=Path("runs/never-made"))
    alone = Process(rank=0, world_size=1, device=device_of(cfg.device), mesh=None)
    try:
        setup = prepare(cfg, alone)
        samples, _ = zero_samples(setup.sizes[0].sigmas, cfg.batch, torch.Generator())
        setup.method(samples)
    except ValueError as error:
        raise ValueError(f"{spec} {flags}: {error}") from error
    return setup.method, setup.sizes[0].sigmas


def cost(forwards: int, backwards: int) -> int:
    """Evaluations of the network: 1 forward, 3 forward and backward; `forwards` has both kinds, as in metrics.jsonl."""
    return forwards + 2 * backwards


def costs(spec: str, flags: str) -> Iterator[int]:
    """What a run has spent after 1, 2, 3, ... updates, in evaluations: the method's own calls are counted, on zeros.

    Exact where every update costs the same.  ReFL and DRTune stop at a random step: theirs are other draws than a
    run's, as many on average.
    """
    (method, levels), cfg = opened(spec, flags), config_of(spec, flags)

    def of_update(update: int) -> int:
        samples, calls = zero_samples(levels, cfg.batch, torch.Generator().manual_seed(update), update)
        method(samples)
        return cfg.batch * cost(calls["velocity"] + calls["base"] + calls["vjp"], calls["vjp"])

    return itertools.accumulate(map(of_update, itertools.count()))


def spent(spec: str, flags: str, updates: int) -> int:
    """Evaluations that so many updates take."""
    return next(itertools.islice(costs(spec, flags), updates - 1, None))


def updates_within(spec: str, flags: str, budget: int) -> int:
    """The most updates that take no more evaluations than the budget; at least one."""
    return max(1, sum(1 for _ in itertools.takewhile(lambda total: total <= budget, costs(spec, flags))))


# ------------------------------------------------------------------------------------------- running


def at_once(function: Callable[[Any], Any], items: Iterable[Any], jobs: int) -> dict[Any, Any]:
    """A function of each item, `jobs` at a time: it waits for a process, so threads do.

    Raises what one raises; those that run are finished first.
    """
    done = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(function, item): item for item in dict.fromkeys(items)}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                print(f"{len(done)} of {len(futures)}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return done


def run_cell(cell: Cell, work: Path) -> dict[str, Any]:
    """What a cell came to, from its file, or from running it first, in a folder of `work`.

    Raises ChildProcessError if it fails.
    """
    folder, log = work / cell.name, work / f"{cell.name}.log"
    if cell.file.exists():
        return json.loads(cell.file.read_text())
    work.mkdir(parents=True, exist_ok=True)
    print(f"runs {cell.name}", flush=True)
    began = origin(
        [*(f"{name}={value}" for name, value in ONE_THREAD.items()), "python", *cell.program, *cell.arguments]
    )
    program, *own = cell.program
    command = [sys.executable, str(ROOT / program), *own, *cell.arguments, "--out", str(folder), "--resume"]
    code = launch(command, log)
    if code not in (0, NONFINITE):
        tail = "\n".join(log.read_text().splitlines()[-5:])
        raise ChildProcessError(f"{shlex.join(command)} ended with {code}; the end of {log}:\n{tail}")
    result = dict(spec=cell.spec, seed=cell.seed, lr=cell.lr, steps=cell.steps, diverged=code == NONFINITE)
    result |= summary(folder) | began
    with replacing(cell.file) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("checkpoints", "best"):  # final/ stays, 10 MB of the tiny model
        shutil.rmtree(folder / name, ignore_errors=True)
    return result


def launch(command: list[str], log: Path) -> int:
    """Run a command with one thread, what it prints added to a file: its exit code.

    Raises ChildProcessError if the file is still written to: two runs in one folder would spoil each other.
    """
    with log.open("a") as file:
        try:  # what is started keeps the lock with the file, even where this process is killed
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ChildProcessError(f"another command's run still writes {log}: wait for it, or stop it") from None
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD).returncode


def summary(folder: Path) -> dict[str, Any]:
    """What a run's logs say: all evaluations, each with the evaluations of the network until then; seconds and memory.

    Seconds are those of updates alone; memory is the most that the process held, in GB.
    """
    updates, evals = read_log(folder / "metrics.jsonl"), read_log(folder / "eval.jsonl")
    costs = [(u["step"], cost(u["forwards"], u["backwards"])) for u in updates]  # an update left out is not among them
    curve = [{k: v for k, v in e.items() if isinstance(v, int | float) and k != "seconds"} for e in evals]
    for entry in curve:
        entry["evaluations"] = sum(spent for step, spent in costs if step < entry["step"])
    seconds, memory = sum(u["seconds"] for u in updates), max((u["memory"] for u in updates), default=0.0)
    return dict(curve=curve, evaluations=sum(spent for _, spent in costs), seconds=seconds, memory=memory)
