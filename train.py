"""Post-train a flow model so that its images score higher: LeapAlign, and the gradients it is measured against.

    python train.py                                  # the tiny Flux of the shapes world, minutes on a laptop
    python train.py shapes --lr 3e-5 --seed 1        # a preset and what to change of it
    python train.py --method refl                    # a baseline through the same loop
    python train.py flux-dev-hpsv2                   # FLUX.1-dev and HPSv2.1, as the paper

One iteration, and nothing else, is `update_gradient` below; the mathematics is leaps.py.  Writes, to --out:

    config.json  metrics.jsonl  eval.jsonl  curves.png  before_after.png  samples/step_NNNN.png  best/  final/

The shapes preset differs from the paper in its learning rate, T and EMA: shapes/README.md says why.
"""

import copy
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from config import PRESETS, Config
from leaps import hinge, leap_backward, one_step, pick_leaps, rollout, similarity_weight
from model import Flux
from pictures import before_after, contact_sheet, curves
from pipeline import Pipeline, decode, encode, grid, load, sample, save, sigmas, velocity_of
from prompts import batch_of, read_prompts
from rewards import Reward, open_rewards, score_all
from shapes.world import SIZE, accuracy, parse

# ------------------------------------------------------------------------------------- one update


def pick(cfg: Config, levels: Tensor, generator: torch.Generator) -> tuple[int, ...]:
    """The steps of a rollout that the method differentiates. Raises ValueError if the flags leave none."""
    steps = len(levels) - 1
    if cfg.method == "full":
        return tuple(range(steps))
    if cfg.method == "refl":  # a random one of the last 11 of 25 steps, as in the paper's baseline
        return (steps - 1 - int(torch.randint(max(1, round(steps * 11 / 25)), (), generator=generator)),)
    return pick_leaps(levels, generator, cfg.leaps, cfg.low, cfg.high, cfg.distance)


def update_gradient(
    pipe: Pipeline,
    rewards: list[Reward],
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
    images = decode(pipe, x0, cfg.size, cfg.size)
    scores = [reward.score(images, prompts) for reward in rewards]
    wanted = [r.weight * hinge(score, r.lam) for r, score in zip(rewards, scores)]  # Eq. 11
    loss = (w * sum(wanted)).mean()  # Eq. 13
    loss.backward()

    leap_backward(velocity, ro, picks, 1.0 if full else cfg.alpha, x0.grad, cfg.nested_only)  # Eq. 10
    satisfied = [r.lam is not None and (score >= r.lam).float().mean().item() for r, score in zip(rewards, scores)]
    return dict(
        **reported(rewards, {r.name: r.scale * score.mean().item() for r, score in zip(rewards, scores)}),
        loss=loss.item(),
        satisfied=float(min(satisfied)),
        k=levels[picks[0]].item(),
        j=levels[picks[-1]].item(),
        d_j=d[:-1].mean().item() if len(picks) > 1 else 0.0,
        d_0=d[-1].mean().item(),
        w=w.mean().item(),
    )


def reported(rewards: list[Reward], means: dict[str, float]) -> dict[str, float]:
    """What is logged of the trained rewards: their weighted sum, and each by name."""
    return {"reward": sum(r.weight * means[r.name] for r in rewards), **means}


def numbers(seed: int, step: int) -> torch.Generator:
    """A CPU generator for everything random in one step, independent of all other steps and seeds."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


# ------------------------------------------------------------------------------------- evaluation


def evaluate(
    pipe: Pipeline, rewards: list[Reward], watched: list[Reward], prompts: list[str], cfg: Config
) -> tuple[dict[str, Any], Tensor]:
    """Mean rewards, and the judge's accuracy a task, on fixed prompts and noise; and the images.

    `by_prompt` holds the watched rewards of each image, so that evaluations can be compared pair by pair.
    """
    seeds = range(10**6, 10**6 + len(prompts))
    images = sample(pipe, prompts, seeds, cfg.rollout_steps, cfg.size, cfg.size, cfg.guidance)
    scores = {r.name: score_all(r, images, prompts, pipe.device) for r in [*rewards, *watched]}
    result = reported(rewards, {name: score.mean().item() for name, score in scores.items()})
    if "judge" in scores:
        by_task = accuracy(scores["judge"], [parse(p) for p in prompts])
        result |= by_task | {"judge": by_task.pop("overall")}
    return result | {"by_prompt": {r.name: [round(x, 5) for x in scores[r.name].tolist()] for r in watched}}, images


def is_hacked(evals: list[dict[str, Any]], name: str, patience: int) -> bool:
    """Whether a watched reward has been below its best for `patience` evaluations while the trained one is above.

    Below is by more than two standard errors of the paired differences: the images start from the same noise.
    """
    best = max(evals, key=lambda e: e[name])
    since = evals[evals.index(best) + 1 :][-patience:]
    drops = [np.subtract(best["by_prompt"][name], e["by_prompt"][name]) for e in since]
    return len(since) == patience and all(
        e["reward"] > best["reward"] and drop.mean() > 2 * drop.std() / len(drop) ** 0.5
        for e, drop in zip(since, drops, strict=True)
    )


# ------------------------------------------------------------------------------------------- loop


@dataclass
class Setup:
    """All that a run needs, read and checked before anything expensive starts."""

    pipe: Pipeline
    rewards: list[Reward]
    watched: list[Reward]
    prompts: list[str]
    eval_prompts: list[str]
    levels: Tensor
    out: Path


def prepare(cfg: Config) -> Setup:
    """Read and check all inputs. Raises ValueError naming the flag or the file, what is wrong and what to do."""
    for name in ("steps", "batch", "rollout_steps", "eval_every", "text_length", "patience"):
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
    if not cfg.reward or "judge" in cfg.reward:
        raise ValueError(f"--reward {' '.join(cfg.reward)}: give one or more that have a gradient (not the judge)")
    if cfg.lam and len(cfg.lam) != len(cfg.reward):
        raise ValueError(
            f"--lam has {len(cfg.lam)} values for {len(cfg.reward)} rewards: give one each, or none at all"
        )
    if cfg.stop_early and not cfg.watch:
        raise ValueError("--stop-early needs a reward to --watch")
    if "judge" in cfg.watch:
        try:
            [parse(text) for text in eval_prompts]
        except ValueError as error:
            raise ValueError(f"--eval-prompts {cfg.eval_prompts}: {error}; --watch without judge takes any") from error
        if cfg.size != SIZE:
            raise ValueError(
                f"--size {cfg.size}: the judge reads images of {SIZE}x{SIZE}; --watch without it reads any"
            )
    if cfg.nested_only and cfg.method != "leapalign":
        raise ValueError(f"--nested-only is an ablation of leapalign and means nothing with --method {cfg.method}")
    pipe = load(cfg.model, cfg.device, text_length=cfg.text_length)
    rows, columns = grid(pipe, cfg.size, cfg.size)
    if pipe.flux.config.guidance_embed and cfg.guidance is None:
        raise ValueError(f"--guidance is needed: {cfg.model} is distilled with guidance (3.5 for FLUX.1-dev)")
    levels = sigmas(pipe.schedule, cfg.rollout_steps, rows * columns)
    pick(cfg, levels, torch.Generator())
    specs = [*cfg.reward, *cfg.watch]
    rewards = open_rewards(specs, pipe.device, pipe.clip_tokenizer, cfg.recompute_reward)
    rewards, watched = rewards[: len(cfg.reward)], rewards[len(cfg.reward) :]
    if cfg.lam:
        rewards = [replace(r, lam=lam) for r, lam in zip(rewards, cfg.lam, strict=True)]
    return Setup(pipe, rewards, watched, prompts, eval_prompts, levels.to(pipe.device), out)


def log(path: Path, entry: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def train(cfg: Config, setup: Setup) -> None:
    pipe, rewards, watched, levels, out = setup.pipe, setup.rewards, setup.watched, setup.levels, setup.out
    rows, columns = grid(pipe, cfg.size, cfg.size)
    (out / "samples").mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(asdict(cfg), indent=2, default=str) + "\n")
    print(json.dumps(asdict(cfg), indent=2, default=str))

    params = list(pipe.flux.parameters())
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay)
    averaged: Flux = copy.deepcopy(pipe.flux).requires_grad_(False)
    start, warned, first, evals = time.time(), set(), None, []
    shown = [round(i * (len(setup.eval_prompts) - 1) / 23) for i in range(24)]  # spread over all tasks
    captions = [setup.eval_prompts[i] for i in shown]

    bar = tqdm(total=cfg.steps, unit="update", file=sys.stderr)
    for step in range(cfg.steps + 1):
        last = step == cfg.steps
        if step % cfg.eval_every == 0 or last:
            scores, images = evaluate(replace(pipe, flux=averaged), rewards, watched, setup.eval_prompts, cfg)
            evals.append({"step": step, **scores, "seconds": time.time() - start})
            log(out / "eval.jsonl", evals[-1])
            bar.write(f"step {step:4d}  " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items() if k != "by_prompt"))
            contact_sheet(images[shown], captions, out / "samples" / f"step_{step:04d}.png", columns=8)
            first = images[shown] if first is None else first
            if watched and evals[-1] is max(evals, key=lambda e: e[watched[0].name]):
                save(out / "best", pipe.folder, averaged.config, averaged.state_dict())
            hacked = [r.name for r in watched if is_hacked(evals, r.name, cfg.patience)]
            for name in set(hacked) - warned:
                best = max(evals, key=lambda e: e[name])
                bar.write(
                    f"warning: {name} fell from {best[name]:.3f} at step {best['step']} to {scores[name]:.3f} while "
                    f"the trained reward rose from {best['reward']:.3f} to {scores['reward']:.3f}: it is being hacked"
                )
            warned |= set(hacked)
            last |= cfg.stop_early and bool(hacked)
        if last:
            break

        began, random = time.time(), numbers(cfg.seed, step)
        prompts = batch_of(setup.prompts, step, cfg.batch, cfg.seed)
        noise = torch.randn(len(prompts), rows * columns, pipe.flux.config.in_channels, generator=random)
        picks = pick(cfg, levels, random)
        measured = update_gradient(pipe, rewards, prompts, noise.to(pipe.device), levels, picks, cfg)
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
        if measured["satisfied"] == 1 and "satisfied" not in warned:
            warned.add("satisfied")
            lam = " ".join(str(r.lam) for r in rewards)
            bar.write(f"warning: every reward is above --lam {lam}: the loss is zero and nothing is learned")
    bar.close()

    before_after(first, images[shown], captions, out / "before_after.png")
    curves(out, out / "curves.png")
    save(out / "final", pipe.folder, averaged.config, averaged.state_dict())
    print(f"{time.time() - start:.0f} s; wrote {out}: final/ best/ before_after.png curves.png samples/ *.jsonl")


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
