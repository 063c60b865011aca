"""Post-train a flow model so that its images score higher: LeapAlign, and the gradients it is measured against.

    python train.py                                  # the tiny Flux of the shapes world, minutes on a laptop
    python train.py shapes --lr 3e-5 --seed 1        # a preset and what to change of it
    python train.py --method refl                    # a baseline through the same loop

One iteration, and nothing else, is `update_gradient` below; the mathematics is leaps.py.  Writes, to --out:

    config.json  metrics.jsonl  eval.jsonl  curves.png  before_after.png  samples/step_NNNN.png  final/

The shapes preset differs from the paper in its learning rate, T and EMA: shapes/README.md says why.
"""

import copy
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from leaps import hinge, leap_backward, one_step, pick_leaps, rollout, similarity_weight
from model import Flux
from pictures import before_after, contact_sheet, curves
from pipeline import Pipeline, decode, encode, grid, load, sample, save, sigmas, velocity_of
from rewards import Reward, clip
from sample import read_prompts
from shapes.world import SIZE, accuracy, judge, parse

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    """Post-train a flow model with reward gradients."""

    out: Path | None = None
    """Run folder; the default is runs/METHOD-seedN. Must not hold a run yet."""
    model: str = str(HERE / "shapes" / "tiny-flux")
    """Checkpoint folder in the diffusers layout of FLUX, or a hub id."""
    reward: str = str(HERE / "shapes" / "tiny-reward")
    """Reward to raise: a transformers CLIPModel folder, or a hub id."""
    prompts: Path = HERE / "shapes" / "train-prompts.txt"
    """Prompts to train on, one a line; a line that occurs twice is drawn twice as often."""
    eval_prompts: Path = HERE / "shapes" / "eval-prompts.txt"
    """Prompts to evaluate on, one image a line, always from the same noise."""
    judge: bool = True
    """Let the rule-based judge of the shapes world score the evaluation; needs prompts of that world."""
    size: int = 64
    """Image side in pixels."""
    guidance: float | None = None
    """Guidance scale of a guidance-distilled model (FLUX.1-dev: 3.5); none for one that takes none."""
    text_length: int | None = None
    """T5 tokens a prompt is padded or cut to; the default is the tokenizer's own, 512 for FLUX.1-dev."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute, in fp32."""
    seed: int = 0
    """All randomness is a function of (seed, step)."""

    method: Literal["leapalign", "refl", "full"] = "leapalign"
    """leapalign: the paper. refl: one of the last steps, reward on its one-step estimate. full: the true gradient,
    through all steps."""
    alpha: float = 0.3
    """Discount of the nested gradient (Eq. 9): 0 drops it, 1 keeps it whole."""
    tau: float = 0.1
    """Smallest distance that the similarity weight tells apart (Eq. 12), in latent units."""
    lam: float | None = 0.4
    """Reward at which a sample asks for no more (lambda of Eq. 11), in units of the loss's score (a cosine for
    CLIP rewards). None switches the hinge off."""
    leaps: int = 2
    """Leaps through the trajectory: 2 in the paper."""
    weight: Literal["both", "d_j", "d_0", "none"] = "both"
    """Distances that the similarity weight uses (Eq. 12)."""
    reward_input: Literal["x_0", "xhat_0"] = "x_0"
    """Reward the image of the rollout, or the last leap's prediction of it."""
    low: float = 0.0
    """Leaps start at noise levels of at least this."""
    high: float = 1.0
    """Leaps start at noise levels of at most this."""
    distance: float | None = None
    """Fixed k - j instead of a random pair."""
    nested_only: bool = False
    """Drop the first leap's own term (Eq. 14), a diagnostic."""

    steps: int = 300
    """Updates."""
    batch: int = 64
    """Rollouts an update."""
    rollout_steps: int = 5
    """Euler steps of a rollout (T), in training and in evaluation."""
    lr: float = 7e-5
    """Learning rate of AdamW, betas 0.9 and 0.999."""
    decay: bool = True
    """Let the learning rate fall linearly to zero over the run; the paper keeps it constant."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    ema: float = 0.98
    """Decay of the averaged weights, which are evaluated and saved. Averages about 1 / (1 - decay) updates."""
    eval_every: int = 60
    """Updates between evaluations; there is always one before the first update and one after the last."""


PRESETS = {
    "shapes": ("The tiny Flux and reward that the repository ships: minutes on two CPU cores.", Config()),
}


# ------------------------------------------------------------------------------------- one update


def pick(cfg: Config, levels: Tensor, generator: torch.Generator) -> tuple[int, ...]:
    """The steps of a rollout that the method differentiates. Raises ValueError if the flags leave none."""
    steps = len(levels) - 1
    if cfg.method == "full":
        return tuple(range(steps))
    if cfg.method == "refl":  # a random one of the last 11 of 25 steps, as in the paper's baseline
        return (steps - 1 - int(torch.randint(max(1, round(steps * 11 / 25)), (), generator=generator)),)
    return pick_leaps(levels, generator, cfg.leaps, cfg.low, cfg.high, cfg.distance)


def draw_prompts(prompts: list[str], n: int, generator: torch.Generator) -> list[str]:
    """n prompts at random, each line once before any is drawn twice."""
    orders = [torch.randperm(len(prompts), generator=generator) for _ in range(-(-n // len(prompts)))]
    return [prompts[i] for i in torch.cat(orders)[:n].tolist()]


def update_gradient(
    pipe: Pipeline,
    reward: Reward,
    prompts: list[str],
    noise: Tensor,
    levels: Tensor,
    picks: tuple[int, ...],
    cfg: Config,
) -> dict[str, float]:
    """Add one batch's gradient to `pipe.flux` and return what was measured.

    The baselines are the same lines: ReFL is a single leap with the reward on its prediction, the true gradient
    a leap over every step, whole (alpha = 1); neither weighs samples.
    """
    refl, full = cfg.method == "refl", cfg.method == "full"
    velocity = velocity_of(pipe.flux, encode(pipe, prompts), *grid(pipe, cfg.size, cfg.size), cfg.guidance)
    ro = rollout(velocity, noise, levels)
    w, d = similarity_weight(ro, picks, cfg.tau, "none" if refl or full else cfg.weight)

    x0 = ro.x[-1]
    if refl or cfg.reward_input == "xhat_0":
        x0 = one_step(ro.x[picks[-1]], ro.v[picks[-1]], ro.sigmas[picks[-1]], ro.sigmas[-1])
    x0 = x0.detach().requires_grad_()
    r = reward.score(decode(pipe, x0, cfg.size, cfg.size), prompts)
    loss = (w * hinge(r, cfg.lam)).mean()  # Eq. 11, 13
    loss.backward()

    leap_backward(velocity, ro, picks, 1.0 if full else cfg.alpha, x0.grad, cfg.nested_only)  # Eq. 10
    return dict(
        reward=reward.scale * r.mean().item(),
        loss=loss.item(),
        satisfied=0.0 if cfg.lam is None else (r >= cfg.lam).float().mean().item(),
        k=levels[picks[0]].item(),
        j=levels[picks[-1]].item(),
        d_j=d[:-1].mean().item() if len(picks) > 1 else 0.0,
        d_0=d[-1].mean().item(),
        w=w.mean().item(),
    )


def numbers(seed: int, step: int) -> torch.Generator:
    """A CPU generator for everything random in one step, independent of all other steps and seeds."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


# ------------------------------------------------------------------------------------- evaluation


def evaluate(pipe: Pipeline, reward: Reward, prompts: list[str], cfg: Config) -> tuple[dict[str, float], Tensor]:
    """Mean reward and judge accuracy, overall and a task, on fixed prompts and noise; and the images."""
    seeds = range(10**6, 10**6 + len(prompts))
    images = sample(pipe, prompts, seeds, cfg.rollout_steps, cfg.size, cfg.size, cfg.guidance)
    with torch.no_grad():
        pairs = zip(images.split(64), (prompts[i : i + 64] for i in range(0, len(prompts), 64)))
        scores = torch.cat([reward.score(part.to(pipe.device), list(text)).cpu() for part, text in pairs])
    result = {"reward": reward.scale * scores.mean().item()}
    if cfg.judge:
        scenes = [parse(p) for p in prompts]
        result = accuracy(judge(images, scenes), scenes) | result
    return result, images


# ------------------------------------------------------------------------------------------- loop


@dataclass
class Setup:
    """All that a run needs, read and checked before anything expensive starts."""

    pipe: Pipeline
    reward: Reward
    prompts: list[str]
    eval_prompts: list[str]
    levels: Tensor
    out: Path


def prepare(cfg: Config) -> Setup:
    """Read and check all inputs. Raises ValueError naming the flag or the file, what is wrong and what to do."""
    for name in ("steps", "batch", "rollout_steps", "eval_every", "text_length"):
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if cfg.tau <= 0:
        raise ValueError(f"--tau must be positive, got {cfg.tau}: the weight of an exact leap is 1 / (2 tau)")
    if not 0 <= cfg.ema < 1:
        raise ValueError(f"--ema must be in [0, 1), got {cfg.ema}")
    out = cfg.out or Path("runs") / f"{cfg.method}-seed{cfg.seed}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is occupied: choose another folder, or remove it to run again")
    prompts, eval_prompts = read_prompts(cfg.prompts), read_prompts(cfg.eval_prompts)
    if cfg.judge:
        try:
            [parse(text) for text in eval_prompts]
        except ValueError as error:
            raise ValueError(f"--eval-prompts {cfg.eval_prompts}: {error}; --no-judge takes any prompts") from error
        if cfg.size != SIZE:
            raise ValueError(f"--size {cfg.size}: the judge reads images of {SIZE}x{SIZE}; --no-judge takes any size")
    if cfg.nested_only and cfg.method != "leapalign":
        raise ValueError(f"--nested-only is an ablation of leapalign and means nothing with --method {cfg.method}")
    pipe = load(cfg.model, cfg.device, text_length=cfg.text_length)
    rows, columns = grid(pipe, cfg.size, cfg.size)
    if pipe.flux.config.guidance_embed and cfg.guidance is None:
        raise ValueError(f"--guidance is needed: {cfg.model} is distilled with guidance (3.5 for FLUX.1-dev)")
    levels = sigmas(pipe.schedule, cfg.rollout_steps, rows * columns)
    pick(cfg, levels, torch.Generator())
    return Setup(pipe, clip(cfg.reward, pipe.device), prompts, eval_prompts, levels.to(pipe.device), out)


def log(path: Path, entry: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def train(cfg: Config, setup: Setup) -> None:
    pipe, reward, levels, out = setup.pipe, setup.reward, setup.levels, setup.out
    rows, columns = grid(pipe, cfg.size, cfg.size)
    (out / "samples").mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2, default=str) + "\n")
    print(json.dumps(asdict(cfg), indent=2, default=str))

    params = list(pipe.flux.parameters())
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay)
    averaged: Flux = copy.deepcopy(pipe.flux).requires_grad_(False)
    start, warned, first = time.time(), False, None
    shown = [round(i * (len(setup.eval_prompts) - 1) / 23) for i in range(24)]  # spread over all tasks
    captions = [setup.eval_prompts[i] for i in shown]

    bar = tqdm(total=cfg.steps, unit="update", file=sys.stderr)
    for step in range(cfg.steps + 1):
        last = step == cfg.steps
        if step % cfg.eval_every == 0 or last:
            scores, images = evaluate(replace(pipe, flux=averaged), reward, setup.eval_prompts, cfg)
            log(out / "eval.jsonl", {"step": step, **scores, "seconds": time.time() - start})
            bar.write(f"step {step:4d}  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
            contact_sheet(images[shown], captions, out / "samples" / f"step_{step:04d}.png", columns=8)
            first = images[shown] if first is None else first
        if last:
            break

        began, random = time.time(), numbers(cfg.seed, step)
        prompts = draw_prompts(setup.prompts, cfg.batch, random)
        noise = torch.randn(len(prompts), rows * columns, pipe.flux.config.in_channels, generator=random)
        picks = pick(cfg, levels, random)
        measured = update_gradient(pipe, reward, prompts, noise.to(pipe.device), levels, picks, cfg)
        grad_norm = nn.utils.clip_grad_norm_(params, cfg.clip, error_if_nonfinite=True).item()
        if cfg.decay:
            optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(list(averaged.parameters()), params, 1 - cfg.ema)

        entry = {"step": step, **measured, "grad_norm": grad_norm, "seconds": time.time() - began}
        log(out / "metrics.jsonl", entry)
        bar.set_postfix_str(f"reward {measured['reward']:.3f} grad {grad_norm:.2f}")
        bar.update()
        if measured["satisfied"] == 1 and not warned:
            warned = True
            bar.write(f"warning: every reward is above --lam {cfg.lam}: the loss is zero and nothing is learned")
    bar.close()

    before_after(first, images[shown], captions, out / "before_after.png")
    curves(out, out / "curves.png")
    save(out / "final", pipe.folder, averaged.config, averaged.state_dict())
    print(f"{time.time() - start:.0f} s; wrote {out}: final/ before_after.png curves.png samples/ *.jsonl")


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["shapes", *arguments]
    cfg = tyro.extras.overridable_config_cli(PRESETS, args=arguments)
    try:
        setup = prepare(cfg)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        train(cfg, setup)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {setup.out} keeps what was logged and drawn; no final/ was written", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
