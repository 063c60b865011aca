"""What the stages of the recipe share: the flags, results on disk, and a training loop that resumes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import shapes
from infra.files import replacing
from infra.flags import flags

TensorDict = dict[str, Tensor]


@flags
class PrepareFlags:
    """Make the models of the shapes world."""

    work: Path = Path("runs/prepare")
    """Folder for the stages' results and checkpoints."""
    stages: tuple[str, ...] = ()
    """Stages to run, each after those that it needs. None means all."""
    out: Path = Path(shapes.__file__).parent
    """Folder that receives the models and prompt files of the world."""
    scale: float = 1.0
    """Factor of all training steps and numbers of images, to try the recipe in minutes."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 2
    """CPU threads."""

    def at_scale(self, n: int, minimum: int = 2) -> int:
        return max(minimum, round(n * self.scale))


def load_or_compute(file: Path, compute: Callable[[], Any]) -> Any:
    """The tensors in `file`; the first time, what `compute` returns, which is saved there."""
    if not file.exists():
        save(file, compute())
    return torch.load(file, weights_only=True)


def save(file: Path, tensors: Any) -> None:
    with replacing(file) as partial_file:  # a kill leaves the file whole or absent
        torch.save(tensors, partial_file)


def print_scores(name: str, scores: dict[str, float]) -> None:
    values = [f"{key} {value:.3f}" for key, value in scores.items()]
    print(f"{name:36s}", *values, flush=True)


def stage_seed(cfg: PrepareFlags, name: str) -> tuple[int, int]:
    """Start of the seeds of a stage or of a set of images, by its name."""
    return cfg.seed, sum(map(ord, name))  # not hash(), which differs from process to process


def fit_stage(
    name: str,
    modules: nn.Module,
    loss_fn: Callable[[Generator, int], TensorDict],
    cfg: PrepareFlags,
    steps: int,
    lr: float,
    average: float = 0.0,
    save_every: int = 250,
) -> None:
    """Train `modules` in place with AdamW on `loss_fn(rng, step)["loss"]`, or load them if the stage is finished.

    They end with the average of the weights over the steps, whose decay grows to `average` (0: the last weights).
    An interrupted stage resumes from its checkpoint to the same end, because all randomness of a step is a function
    of (seed, stage, step). The walkers of the stage `reward` are the exception: they start anew.
    """
    result, checkpoint = cfg.work / f"{name}.pt", cfg.work / f"{name}.partial.pt"
    if result.exists():
        modules.load_state_dict(torch.load(result, weights_only=True))
        return
    steps = cfg.at_scale(steps)
    params = [p for p in modules.parameters() if p.requires_grad]  # the reward's scale is frozen
    averages = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    # 5% of warm-up, then a cosine down to nearly 0.
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    # All that a checkpoint holds, beside the averages and the step. No generator: a step sets its own seeds.
    objects = dict(modules=modules, optimizer=optimizer, schedule=schedule)
    first_step = 0  # of this process
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for key, item in objects.items():
            item.load_state_dict(state[key])
        averages = state["averages"]
        first_step = state["step"]

    for step in range(first_step, steps):
        rng = default_rng((*stage_seed(cfg, name), step))  # a list of numbers as seed: no two steps share a stream
        torch.manual_seed(int(rng.integers(2**31)))  # numpy draws scenes, torch draws noise
        log = loss_fn(rng, step)
        log["loss"].backward()
        log["grad"] = nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        decay = min(average, (1 + step) / (10 + step))  # lower at first, or the initial weights would stay in
        with torch.no_grad():  # one call for all parameters, which are many and small
            torch._foreach_lerp_(averages, params, 1 - decay)
        if (step + 1) % 50 == 0:  # one step's values, not a mean: enough to see that a stage learns
            values = [f"{key} {value:.4f}" for key, value in log.items()]
            print(f"{name} {step + 1}/{steps}", *values, flush=True)
        if (step + 1) % save_every == 0:
            state = {key: item.state_dict() for key, item in objects.items()}
            save(checkpoint, state | dict(averages=averages, step=step + 1))

    with torch.no_grad():
        torch._foreach_copy_(params, averages)
    save(result, modules.state_dict())
    checkpoint.unlink(missing_ok=True)  # after the result: a kill between the two loses nothing
