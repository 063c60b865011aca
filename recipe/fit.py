"""What the stages of the recipe share: the flags, results on disk, and the training loop."""

from collections.abc import Callable
from pathlib import Path

import torch
from numpy.random import Generator, default_rng
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from infra.files import replacing
from infra.flags import flags

TensorDict = dict[str, Tensor]


@flags
class RecipeFlags:
    """Make the models of the shapes world."""

    out: Path = Path("runs/recipe")
    """Folder that receives the models and the prompt files: any but shapes/."""
    scale: float = 1.0
    """Factor of all training steps and numbers of images, to try the recipe in minutes."""

    def at_scale(self, n: int) -> int:
        return max(2, round(n * self.scale))


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
    # A folder for each scale: the results of a short run must not pass for those of a whole one.
    file = cfg.out / f"stages-{cfg.scale:g}" / f"{name}.pt"
    if file.exists():
        module.load_state_dict(torch.load(file, weights_only=True))
        return
    params = [p for p in module.parameters() if p.requires_grad]  # the reward's scale is frozen
    weights = [p.data for p in params]  # the same numbers, but without a gradient
    averages = [weight.clone() for weight in weights]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    steps = cfg.at_scale(steps)
    # 5% of warm-up, then a cosine down to nearly 0.
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    for step in tqdm(range(steps), name):
        rng = generator(name, step)  # numpy draws scenes, torch draws noise
        torch.manual_seed(int(rng.integers(2**31)))
        loss_fn(rng, step).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        decay = min(average, (1 + step) / (10 + step))  # lower at first, or the initial weights would stay in
        torch._foreach_lerp_(averages, weights, 1 - decay)  # one call, as weights are many and small
    torch._foreach_copy_(weights, averages)
    with replacing(file) as partial_file:  # a kill leaves the file whole or absent
        torch.save(module.state_dict(), partial_file)
