"""What the stages of the recipe share: the flags, results on disk, and the training loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from infra.files import replacing
from infra.flags import flags

TensorDict = dict[str, Tensor]


@flags
class RecipeFlags:
    """Make the models of the shapes world."""

    out: Path = Path("runs/recipe")
    """Folder that receives the models and the prompt files."""
    scale: float = 1.0
    """Factor of all training steps and numbers of images, to try the recipe in minutes."""

    def at_scale(self, n: int) -> int:
        return max(2, round(n * self.scale))


def load_or_compute(cfg: RecipeFlags, name: str, compute: Callable[[], Any]) -> Any:
    """The tensors of a stage from its file; the first time, what `compute` returns, which is saved there."""
    # A folder for each scale: the results of a short run must not pass for those of a whole one.
    file = cfg.out / f"stages-{cfg.scale:g}" / f"{name}.pt"
    if not file.exists():
        tensors = compute()
        with replacing(file) as partial_file:  # a kill leaves the file whole or absent
            torch.save(tensors, partial_file)
    return torch.load(file, weights_only=True)


def generator(name: str, *step: int) -> Generator:
    """The random numbers of a stage, or of one of its steps."""
    return default_rng((0, sum(map(ord, name)), *step))  # not hash(), which differs from process to process


def fit(
    name: str,
    module: nn.Module,
    loss_fn: Callable[[Generator, int], Tensor],
    cfg: RecipeFlags,
    steps: int,
    lr: float,
    average: float = 0.0,
) -> None:
    """Train `module` in place with AdamW on `loss_fn(rng, step)`, or load it if the stage is finished.

    It ends with the average of the weights over the steps, whose decay grows to `average` (0: the last weights).
    """
    steps = cfg.at_scale(steps)

    def train() -> TensorDict:
        params = [p for p in module.parameters() if p.requires_grad]  # the reward's scale is frozen
        weights = [p.data for p in params]  # the same numbers, but without a gradient
        averages = [weight.clone() for weight in weights]
        optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
        # 5% of warm-up, then a cosine down to nearly 0.
        schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False)
        for step in range(steps):
            rng = generator(name, step)  # numpy draws scenes, torch draws noise
            torch.manual_seed(int(rng.integers(2**31)))
            loss = loss_fn(rng, step)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            decay = min(average, (1 + step) / (10 + step))  # lower at first, or the initial weights would stay in
            torch._foreach_lerp_(averages, weights, 1 - decay)  # one call, as weights are many and small
            if (step + 1) % 50 == 0:
                print(f"{name} {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
        torch._foreach_copy_(weights, averages)
        return module.state_dict()

    module.load_state_dict(load_or_compute(cfg, name, train))
