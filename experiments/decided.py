"""When is what decided, and in which steps does a gain lie?  Rollouts that switch midway.

    python -m experiments.decided                                     # of the base that the repository ships
    python -m experiments.decided --tuned runs/leapalign-seed0/final runs/refl-seed0/final

Captions: a rollout begins with one caption of the shapes world, and goes on with another from some step on.  The two
differ in one thing: how many objects, where they are, which color, which of two has which color, or which shape.  Where
the judge accepts the end for the second caption as often as without a switch, that thing was not decided yet.

Networks: a rollout begins with the tuned network and goes on with the base, or the other way round.  If the first steps
alone bring the judge's gain, it lies in the first steps, whichever steps the gradient came through: weights are shared
by all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import Config as TrainConfig
from config import sides
from experiments.command import main
from experiments.draw import draw
from experiments.draw_decided import name_of
from experiments.record import file_of, named, record
from infra.distributed import device_of
from infra.folders import Pipeline, load
from infra.prompts import read_prompts
from leaps import Velocity, rollout
from sample import decode, draw_noise, encode, grid, sigmas, velocity_of
from shapes.judge import judge
from shapes.world import COLORS, NUMBERS, PROMPTS, SHAPES, TASKS, Prompt, parse

TRAIN = TrainConfig()
SIZE = sides(TRAIN.size[0])
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
THINGS = dict(count="count", position="position", color="color", attr="binding", single="shape")  # by task


@dataclass(frozen=True)
class Config:
    """Find out at which noise levels a rollout decides what, and where a gain lies."""

    model: str = TRAIN.model
    """Model folder: the base."""
    tuned: tuple[str, ...] = ()
    """Model folders that were trained from it."""
    rollout_steps: int = TRAIN.rollout_steps
    """Euler steps of a rollout (T)."""
    num: int = 256
    """Rollouts for each thing that captions differ in."""
    prompts: Path = TRAIN.eval_prompts
    """Prompts on which networks are switched, a rollout each."""
    batch: int = 64
    """Rollouts at a time."""
    seed: int = 0
    """Seed of captions and noise."""
    device: str = TRAIN.device
    """Where to compute."""
    out: Path | None = None
    """File of the results, beside which tables and pictures are written; the default is
    experiments/results/decided.json, and runs/decided.json where you set anything that results depend on."""


def changed(prompt: Prompt) -> Iterator[Prompt]:
    """The prompts that differ from one in the thing of its task, and itself."""
    match prompt.task:
        case "count":
            yield from (replace(prompt, count=n) for n in NUMBERS)
        case "position":
            yield replace(prompt, relation=OPPOSITE[prompt.relation])
        case "color":
            yield from (replace(prompt, colors=(c,)) for c in COLORS)
        case "attr":
            yield replace(prompt, colors=prompt.colors[::-1])
        case "single":
            yield from (replace(prompt, shapes=(s,)) for s in SHAPES)


def pairs(task: str) -> list[tuple[Prompt, Prompt]]:
    """All pairs of prompts of a task that differ in its thing alone."""
    return [(p, q) for p in PROMPTS if p.task == task for q in changed(p) if q != p]


def network(pipe: Pipeline, prompts: Sequence[Prompt]) -> Velocity:
    """The velocity of a model for some prompts."""
    return velocity_of(pipe.flux, encode(pipe, [p.text for p in prompts]), *grid(pipe, *SIZE))


@torch.no_grad()
def switched(pipe: Pipeline, first: Velocity, second: Velocity, noise: Tensor, levels: Tensor) -> Iterator[Tensor]:
    """Images (n, 3, h, w) of rollouts whose first 0, 1, ..., T steps have one velocity, and all others a second one."""
    for switch, x in enumerate(rollout(first, noise, levels).x):
        end = rollout(second, x, levels[switch:]).x[-1] if switch < len(levels) - 1 else x
        yield decode(pipe, end, *SIZE)


def noise_of(cfg: Config, pipe: Pipeline, start: int, n: int) -> Tensor:
    """x_1 of the rollouts start, start + 1, ..."""
    first = 10**6 * cfg.seed + start
    return draw_noise(pipe, range(first, first + n), *grid(pipe, *SIZE))


def captions(cfg: Config, pipe: Pipeline, levels: Tensor, task: str) -> dict[str, list[float]]:
    """How often the judge accepts the end for the first and for the second caption, after 0, 1, ..., T steps."""
    known, random = pairs(task), np.random.default_rng(cfg.seed)
    chosen = [known[i] for i in random.integers(len(known), size=cfg.num)]
    right = np.zeros((2, len(levels)))
    for start in range(0, cfg.num, cfg.batch):
        first, second = zip(*chosen[start : start + cfg.batch])
        noise = noise_of(cfg, pipe, start, len(first))
        for switch, images in enumerate(switched(pipe, network(pipe, first), network(pipe, second), noise, levels)):
            right[:, switch] += [judge(images, list(prompts)).sum().item() for prompts in (first, second)]
    return dict(zip(("first", "second"), (right / cfg.num).tolist()))


def networks(
    cfg: Config, first: Pipeline, second: Pipeline, levels: Tensor, prompts: list[Prompt]
) -> dict[str, list[float]]:
    """The judge's accuracy by task where one model makes the first 0, 1, ..., T steps and another all others."""
    right: list[list[Tensor]] = [[] for _ in levels]
    for start in range(0, len(prompts), cfg.batch):
        some = prompts[start : start + cfg.batch]
        noise = noise_of(cfg, first, start, len(some))
        for switch, images in enumerate(switched(first, network(first, some), network(second, some), noise, levels)):
            right[switch].append(judge(images, some))
    by_task = {task: torch.tensor([p.task == task for p in prompts]) for task in TASKS}
    found = [torch.cat(of_switch).float() for of_switch in right]
    return {task: [of_switch[mask].mean().item() for of_switch in found] for task, mask in by_task.items()}


def run(cfg: Config) -> None:
    """Measure, and write what was found: of captions, then of each tuned model as it comes."""
    if min(cfg.num, cfg.batch, cfg.rollout_steps) < 1:
        raise ValueError(f"--num {cfg.num}, --batch {cfg.batch} and --rollout-steps {cfg.rollout_steps}: at least 1")
    prompts = [parse(text) for text in read_prompts(cfg.prompts)]
    if absent := [task for task in TASKS if task not in {p.task for p in prompts}]:
        raise ValueError(f"--prompts {cfg.prompts} has none of the task {absent[0]}")
    if twice := [m for m in cfg.tuned if sum(name_of(m) == name_of(other) for other in cfg.tuned) > 1]:
        raise ValueError(f"--tuned {' '.join(twice)}: these would all be called {name_of(twice[0])}")
    device, out = device_of(cfg.device), file_of(cfg, "decided")
    base, *tuned = (load(model, device, torch.float32) for model in (cfg.model, *cfg.tuned))
    levels = sigmas(base.schedule, cfg.rollout_steps, int(np.prod(grid(base, *SIZE)))).to(cfg.device)
    result = dict(
        kind="decided", model=named(cfg.model), num=cfg.num, prompts=len(prompts), levels=levels.tolist(), tuned=[]
    )

    result["things"] = {}
    for task, thing in THINGS.items():
        result["things"][thing] = captions(cfg, base, levels, task)
        print(f"captions: {thing}", flush=True)
    record(out, **result)
    for model, pipe in zip(cfg.tuned, tuned):
        orders = dict(tuned_first=(pipe, base), base_first=(base, pipe))
        found = {order: networks(cfg, *pipes, levels, prompts) for order, pipes in orders.items()}
        result["tuned"].append(dict(model=named(model), **found))
        print(f"networks: {model}", flush=True)
        record(out, **result)
    draw(out)


if __name__ == "__main__":
    main(run, Config, __doc__)
