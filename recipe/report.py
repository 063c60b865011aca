"""Measure what the shapes world ships:  python -m recipe.report  (about a quarter of an hour on one core)

The judge on scenes and through the VAE; the base, a task at a time, with few steps and with many, on prompts that
alignment may see and on those held out; how straight its trajectories are, by k and j, and whether an update along
LeapAlign's gradient (of x_0) is worth one along the true gradient; how well the reward tells the base's right images
from its wrong ones, and whether its gradient in x_0 leads anywhere.
"""

import copy
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy.stats import mannwhitneyu
from torch import Tensor

from baselines import full, refl
from config import SHAPES as PRESET
from formats.folders import Pipeline, load_pipeline
from infra.prompts import read_prompts
from infra.seeds import generator_of
from leaps import Samples, hinge, leapalign, rollout, similarity_weight, vjp_of
from recipe.lessons import fades, half_painted
from recipe.reward import OFFSET
from rewards import Reward, open_reward
from sample import decode, draw_noise, encode, pack, sample, sigmas, token_grid, velocity_of
from shapes.judge import accuracy, judge, objects_in
from shapes.world import SIZE, TASKS, Prompt, all_prompts, by_task, is_held_out, layout, render, scenes

TAU = 0.1


@dataclass
class Config:
    """Measure what the shapes world ships."""

    model: str = PRESET.model
    """Model folder of the base."""
    reward: str = PRESET.reward[0]
    """The reward, as train.py takes it."""
    work: Path | None = None
    """The recipe's folder (recipe.prepare --work), to measure what the base knew before it was finished."""
    each: int = 200
    """Images per task."""
    seed: int = 0
    """Seed of rendered scenes and fades; prompts and the models' noise are always the same."""


def spread(each: int) -> list[Prompt]:
    """`each` prompts of every task, held out or not."""
    tasks = by_task(all_prompts())
    return [tasks[t][i * 7 % len(tasks[t])] for t in TASKS for i in range(each)]  # 7 divides no task's size


def line(name: str, scores: dict[str, float]) -> None:
    print(f"{name:32s}", *(f"{k} {v:.3f}" for k, v in scores.items()), flush=True)


def auc(scores: Tensor, right: Tensor) -> float:
    """The chance that a right image scores above a wrong one; ties count half."""
    good, bad = scores[right], scores[~right]
    return mannwhitneyu(good, bad).statistic / (len(good) * len(bad))


@torch.no_grad()
def report_judge(pipe: Pipeline, cfg: Config) -> None:
    prompts = spread(cfg.each)
    images = scenes(prompts, np.random.default_rng(cfg.seed))[0]
    line("judge on scenes", accuracy(judge(images, prompts), prompts))
    z = torch.cat([pipe.vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(100)])
    x = pack((z - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)
    decoded = torch.cat([decode(pipe, part, SIZE, SIZE) for part in x.split(100)])
    line("judge after the VAE", accuracy(judge(decoded, prompts), prompts))
    print(f"VAE mean squared error {(decoded - images).square().mean():.1e}")


@torch.no_grad()
def report_base(pipe: Pipeline, cfg: Config) -> tuple[list[Prompt], Tensor]:
    prompts = spread(cfg.each)
    others = [steps for steps in (5, 8, 12, 25) if steps != PRESET.rollout_steps]
    for steps in (*others, PRESET.rollout_steps):
        images = sample(pipe, [p.text for p in prompts], range(len(prompts)), steps, SIZE, SIZE)
        right = judge(images, prompts)
        line(f"base, {steps} steps", accuracy(right, prompts))
    for name, held_out in (("seen", False), ("held out", True)):
        chosen = [i for i, p in enumerate(prompts) if is_held_out(p) == held_out and p.task not in ("single", "two")]
        line(f"  of these, {name}", accuracy(right[chosen], [prompts[i] for i in chosen]))
    line("  an object of no one color", blends(images, prompts))

    rows, columns = token_grid(pipe, SIZE, SIZE)
    levels = sigmas(pipe.schedule, PRESET.rollout_steps, rows * columns)
    chosen = prompts[:: max(1, len(prompts) // 240)]
    velocity = velocity_of(pipe.flux, encode(pipe, [p.text for p in chosen]), rows, columns)
    ro = rollout(velocity, draw_noise(pipe, range(len(chosen)), rows, columns), levels)
    pairs = list(combinations(range(len(levels) - 1), 2))
    d = {pair: similarity_weight(ro, pair, TAU)[1].mean(1) for pair in pairs}
    mean = torch.stack(list(d.values())).mean(0)
    print(f"mean distances over all pairs: d_j {mean[0]:.3f}, d_0 {mean[1]:.3f}; of k, d_j and d_0 by j:")
    for k in range(len(levels) - 2):
        row = [f"{levels[j]:.2f}: {d[k, j][0]:.3f} {d[k, j][1]:.3f}" for j in range(k + 1, len(levels) - 1)]
        print(f"  {levels[k]:.2f}", *row, sep="   ", flush=True)
    return prompts, images


def blends(images: Tensor, prompts: list[Prompt]) -> dict[str, float]:
    """The share of images in which an object is not of one color, by task."""
    blended = torch.tensor([any(o.color == "?" for o in objects) for objects in objects_in(images)])
    return accuracy(blended, prompts)


@torch.no_grad()
def report_clean(pipe: Pipeline, cfg: Config) -> None:
    weights = torch.load(cfg.work / "clean.pt", weights_only=True)
    clean = replace(pipe, flux=copy.deepcopy(pipe.flux))
    clean.flux.load_state_dict(weights)
    prompts = spread(cfg.each)
    for steps in (PRESET.rollout_steps, 25):
        images = sample(clean, [p.text for p in prompts], range(len(prompts)), steps, SIZE, SIZE)
        line(f"clean base, {steps} steps", accuracy(judge(images, prompts), prompts))
        line("  an object of no one color", blends(images, prompts))


def samples_of(
    pipe: Pipeline, reward: Reward, prompts: list[str], levels: Tensor, generator: torch.Generator
) -> Samples:
    """What a method is given, as in train.py, of one batch in one piece."""
    noise = torch.randn(len(prompts), 16, pipe.flux.config.in_channels, generator=generator)
    velocity = velocity_of(pipe.flux, encode(pipe, prompts), *token_grid(pipe, SIZE, SIZE))

    def gradient(x0: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        x0 = x0.detach().requires_grad_()
        loss = weight * hinge(reward.score(decode(pipe, x0, SIZE, SIZE), prompts), reward.lam)
        return torch.autograd.grad(loss.mean(), x0)[0]

    no_grad = torch.no_grad()(velocity)
    return Samples(lambda i: noise, levels, generator, no_grad, vjp_of(velocity), gradient, None, len(prompts), 0)


def report_update(pipe: Pipeline, reward: Reward, seeds: int = 4, samples: int = 288, size: float = 2e-4) -> None:
    """The reward of the evaluation prompts before and after one sign step along each method's gradient."""
    levels = sigmas(pipe.schedule, PRESET.rollout_steps, 16)
    train, evaluated = read_prompts(PRESET.prompts), read_prompts(PRESET.eval_prompts)

    @torch.no_grad()
    def mean_reward(pipe: Pipeline) -> float:
        images = sample(pipe, evaluated, range(len(evaluated)), PRESET.rollout_steps, SIZE, SIZE)
        return reward.scale * reward.score(images, evaluated).mean().item()

    print(f"evaluation reward of the base {mean_reward(pipe):.3f}")
    for method in (leapalign, refl, full):
        rewards = []
        for seed in range(seeds):
            moved = replace(pipe, flux=copy.deepcopy(pipe.flux))
            for i in range(samples // 48):
                random = generator_of(seed, i)
                chosen = [train[n] for n in torch.randperm(len(train), generator=random)[:48]]
                method(samples_of(moved, reward, chosen, levels, random))
            with torch.no_grad():
                for p in moved.flux.parameters():
                    p -= size * p.grad.sign()
            rewards.append(mean_reward(moved))
        print(f"after one step along {method.__name__}:", *(f"{r:.3f}" for r in rewards), flush=True)


@torch.no_grad()
def score_all(reward: Reward, images: Tensor, prompts: list[Prompt]) -> Tensor:
    """Reported scores, (n,), a hundred images at a time."""
    pairs = zip(images.split(100), range(0, len(prompts), 100), strict=True)
    return reward.scale * torch.cat([reward.score(part, [p.text for p in prompts[i : i + 100]]) for part, i in pairs])


def report_reward(reward: Reward, prompts: list[Prompt], images: Tensor, seed: int) -> None:
    scores, right = score_all(reward, images, prompts), judge(images, prompts)
    result = {}
    for task in TASKS:
        of_task = torch.tensor([p.task == task for p in prompts])
        result[task] = auc(scores[of_task], right[of_task])
    line("AUC, right against wrong", {"mean": sum(result.values()) / len(result), **result})
    print(f"reward of right images {scores[right].mean():.2f}, of wrong ones {scores[~right].mean():.2f}")

    rng = np.random.default_rng(seed)
    shape, color = (np.stack(a) for a in zip(*(layout(p, rng) for p in prompts), strict=True))
    for name, made in (
        ("right scenes", render(shape, color, rng)),
        ("half-painted ones", half_painted(shape, color, rng)),
    ):
        called = score_all(reward, made, prompts) > OFFSET
        print(f"{name} that the reward calls right: {called.float().mean():.3f}", flush=True)

    fade = fades(prompts, rng)
    change = score_all(reward, fade["end"], prompts) - score_all(reward, fade["start"], prompts)
    gain = fade["gain"].gather(1, fade["caption"][:, None])[:, 0]
    rising = (change * gain > 0)[gain != 0].float().mean()
    print(f"fades along which its score changes as it should: {rising:.3f} of {(gain != 0).sum()}", flush=True)


def report_walk(pipe: Pipeline, reward: Reward, prompts: list[Prompt], steps: int = 10, length: float = 0.5) -> None:
    """Walk x_0 itself along the reward's gradient: what the judge says of the way."""
    prompts = prompts[:: max(1, len(prompts) // 300)]
    texts = [p.text for p in prompts]
    rows, columns = token_grid(pipe, SIZE, SIZE)
    levels = sigmas(pipe.schedule, PRESET.rollout_steps, rows * columns)
    noise = draw_noise(pipe, range(10**4, 10**4 + len(prompts)), rows, columns)
    x = rollout(velocity_of(pipe.flux, encode(pipe, texts), rows, columns), noise, levels).x[-1]
    for step in range(steps + 1):
        x.requires_grad_()
        images = decode(pipe, x, SIZE, SIZE)
        score = reward.scale * reward.score(images, texts)
        (grad,) = torch.autograd.grad(score.sum(), x)
        if step % 5 == 0:
            scores = accuracy(judge(images, prompts), prompts)
            line(f"x_0 after {step} steps of the walk", {"reward": score.mean().item(), **scores})
        x = (x + length * grad / grad.flatten(1).norm(dim=1)[:, None, None]).detach()


def main(cfg: Config) -> None:
    pipe, reward = load_pipeline(cfg.model), open_reward(cfg.reward)
    report_judge(pipe, cfg)
    if cfg.work:
        report_clean(pipe, cfg)
    prompts, images = report_base(pipe, cfg)
    report_reward(reward, prompts, images, cfg.seed)
    report_walk(pipe, reward, prompts)
    report_update(pipe, reward)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
