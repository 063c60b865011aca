"""What the stages of the recipe share: their settings, how prompts are drawn, and a training loop that resumes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from infra.files import replacing
from shapes.world import PROMPTS, TASKS, Prompt, by_task

OF_TASK = by_task(PROMPTS)
TEACH = dict(single=0.5, two=1, count=1, color=0.7, position=1.5, attr=2)  # more of what is harder to learn
EVEN = dict.fromkeys(TASKS, 1) | dict(single=1.5)  # `single` has the fewest prompts, and must stay clean


@dataclass
class Config:
    """Make the models of the shapes world."""

    work: Path = Path("runs/prepare")
    """Folder for the stages' results and checkpoints."""
    stages: tuple[str, ...] = ()
    """Stages to run, in this order, each after those that it needs; none: all."""
    out: Path = Path(__file__).parent
    """Folder that receives what is shipped."""
    scale: float = 1.0
    """Multiplies all steps and numbers of images."""
    seed: int = 0
    """Seed of everything."""
    threads: int = 2
    """CPU threads."""

    def some(self, n: int, least: int = 2) -> int:
        return max(least, round(n * self.scale))


def draw_prompts(n: int, rng: np.random.Generator, weights: dict[str, float] = EVEN) -> list[Prompt]:
    """n prompts: a task by its weight, then one of the task's prompts, all alike."""
    p = np.array(list(weights.values())) / sum(weights.values())
    tasks = rng.choice(list(weights), size=n, p=p)
    return [OF_TASK[t][rng.integers(len(OF_TASK[t]))] for t in tasks]


def fit(
    name: str,
    modules: nn.Module,
    loss_fn: Callable[[np.random.Generator, int], dict[str, Tensor]],
    cfg: Config,
    steps: int,
    lr: float,
    average: float = 0.0,
    save_every: int = 250,
) -> bool:
    """AdamW with a one-cycle schedule on `loss_fn(rng, step)["loss"]`; True if there was anything left to do.

    Ends with the averaged weights, whose decay grows to `average` (0: the last weights). Resumable: what is random in
    a step depends on (seed, stage, step) alone (what walks in the stage `reward` starts anew).
    """
    done, partial = cfg.work / f"{name}.pt", cfg.work / f"{name}.partial.pt"
    if done.exists():
        modules.load_state_dict(torch.load(done, weights_only=True))
        return False
    steps = cfg.some(steps)
    params = [p for p in modules.parameters() if p.requires_grad]
    mean_params = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    first = 0
    if partial.exists():
        saved = torch.load(partial, weights_only=True)
        modules.load_state_dict(saved["modules"])
        mean_params = saved["mean_params"]
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    mean, start = {}, time.time()
    for step in range(first, steps):
        rng = np.random.default_rng((cfg.seed, sum(map(ord, name)), step))
        torch.manual_seed(int(rng.integers(2**31)))
        parts = loss_fn(rng, step)
        parts["loss"].backward()
        parts["grad"] = nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            torch._foreach_lerp_(mean_params, params, 1 - min(average, (1 + step) / (10 + step)))
        mean = {k: 0.98 * mean.get(k, v.item()) + 0.02 * v.item() for k, v in parts.items()}
        if (step + 1) % 50 == 0:
            pace = f"{(time.time() - start) / (step + 1 - first):.2f} s/step"
            print(f"{name} {step + 1}/{steps}", *(f"{k} {v:.4f}" for k, v in mean.items()), pace, flush=True)
        if (step + 1) % save_every == 0 and step + 1 < steps:
            state = dict(modules=modules.state_dict(), mean_params=mean_params, optimizer=optimizer.state_dict())
            with replacing(partial) as part:
                torch.save(state | dict(schedule=schedule.state_dict(), step=step + 1), part)
    with torch.no_grad():
        torch._foreach_copy_(params, mean_params)
    with replacing(done) as part:
        torch.save(modules.state_dict(), part)
    partial.unlink(missing_ok=True)
    return True
