"""Measure what the shapes world ships:  python -m recipe.report  (minutes on one core)

Prints, by task: the judge on rendered scenes and through the VAE; the base with few steps and with many, on prompts
that alignment may see and on held-out ones; how well the reward separates the base's right images from its wrong ones;
and whether its gradient in x_0 leads to images that the judge accepts. recipe/README.md has the results as a table.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from numpy.random import default_rng
from scipy.stats import mannwhitneyu
from torch import Tensor

from config import SHAPES as PRESET
from formats.folders import Pipeline, load_pipeline
from infra.flags import flags
from leaps import rollout
from recipe.fit import print_scores
from recipe.prompts import OF_TASK
from recipe.reward import sample_norm
from rewards import Reward, open_reward, score_all
from sample import decode, draw_noise, encode, sample, sigmas, token_grid, velocity_of
from shapes.judge import UNKNOWN, accuracy, judge_images, objects_in
from shapes.world import SIZE, TASKS, Prompt, is_held_out, scenes


@flags
class ReportFlags:
    """Measure what the shapes world ships."""

    model: str = PRESET.model
    """Model folder of the base."""
    reward: str = PRESET.reward[0]
    """The reward, as train.py reads it."""
    work: Path | None = None
    """The recipe's folder (recipe.prepare --work), to measure what the base knew before its finish."""
    images: int = 200
    """Images per task."""


def main(cfg: ReportFlags) -> None:
    pipe, reward = load_pipeline(cfg.model), open_reward(cfg.reward)
    prompts = []
    for task in TASKS:
        candidates = OF_TASK[task]
        for i in range(cfg.images):
            # Steps of 7 mix shapes and colors even in few images; 7 divides no task's size, so all prompts occur.
            prompts.append(candidates[7 * i % len(candidates)])

    report_judge(pipe, prompts)
    if cfg.work is not None:  # the shipped folder has the finished base only
        clean = replace(pipe, flux=copy.deepcopy(pipe.flux))  # the same text encoders and VAE
        clean.flux.load_state_dict(torch.load(cfg.work / "clean.pt", weights_only=True))
        for steps in (PRESET.rollout_steps, 25):
            report_samples(clean, prompts, steps, "clean base")
    for steps in (5, 8, 25):  # few steps show how straight the trajectories are
        report_samples(pipe, prompts, steps, "base")
    images = report_samples(pipe, prompts, PRESET.rollout_steps, "base")  # those that alignment starts from
    report_held_out(prompts, images)
    report_reward(reward, prompts, images)
    report_walk(pipe, reward, prompts)


@torch.no_grad()
def report_judge(pipe: Pipeline, prompts: list[Prompt]) -> None:
    """The judge on scenes that are right: what it rejects is its own error, or the VAE's."""
    images, _ = scenes(prompts, default_rng(0))
    correct = judge_images(images, prompts)
    print_scores("judge on scenes", accuracy(correct, prompts))
    decoded = []
    for batch in images.split(100):
        z = pipe.vae.encode(batch * 2 - 1).latent_dist.mean  # as the recipe encodes scenes
        decoded.append(pipe.vae.decode(z).sample / 2 + 0.5)
    correct = judge_images(torch.cat(decoded), prompts)
    print_scores("judge after the VAE", accuracy(correct, prompts))


def report_samples(pipe: Pipeline, prompts: list[Prompt], steps: int, name: str) -> Tensor:
    """The judge on the model's images, which are returned, and the share of images with an object of no one color."""
    seeds = range(len(prompts))  # the same noise for any number of steps
    images = sample(pipe, captions(prompts), seeds, steps, SIZE, SIZE)
    correct = judge_images(images, prompts)
    print_scores(f"{name}, {steps} steps", accuracy(correct, prompts))
    blends = []
    for objects in objects_in(images):
        blends.append(any(o.color == UNKNOWN for o in objects))
    print_scores("  an object of no one color", accuracy(torch.tensor(blends), prompts))
    return images


def captions(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def report_held_out(prompts: list[Prompt], images: Tensor) -> None:
    """The tasks that hold prompts out, on both kinds of prompts."""
    for name, held_out in (("prompts of alignment", False), ("held-out prompts", True)):
        rows = []
        for i, prompt in enumerate(prompts):
            if prompt.task not in ("single", "two") and is_held_out(prompt) == held_out:  # these two hold none out
                rows.append(i)
        subset = [prompts[i] for i in rows]
        correct = judge_images(images[rows], subset)
        print_scores(f"  {name}", accuracy(correct, subset))


def report_reward(reward: Reward, prompts: list[Prompt], images: Tensor) -> None:
    """AUC: the chance that the reward prefers a right image of a task to a wrong one; ties count half."""
    scores = score_all(reward, images, captions(prompts), "cpu")  # (n,), as reported
    correct = judge_images(images, prompts)
    auc = {}
    for task in TASKS:  # one by one, because scores of different tasks need not be comparable
        of_task = torch.tensor([prompt.task == task for prompt in prompts])
        positive, negative = scores[of_task & correct], scores[of_task & ~correct]
        pairs_won = mannwhitneyu(positive, negative).statistic  # of all pairs of a right and a wrong image
        auc[task] = pairs_won / (len(positive) * len(negative))
    mean = sum(auc.values()) / len(auc)
    print_scores("AUC, right against wrong", {"mean": mean, **auc})


def report_walk(pipe: Pipeline, reward: Reward, prompts: list[Prompt]) -> None:
    """Walk x_0 itself up the reward's gradient. If the judge gains as well, the gradient is worth following.

    10 steps of 0.5 (L2), which all images take alike, unlike recipe.reward.walk.
    """
    prompts = prompts[:: max(1, len(prompts) // 300)]  # 50 per task are enough
    texts = captions(prompts)
    rows, columns = token_grid(pipe, SIZE, SIZE)
    levels = sigmas(pipe.schedule, PRESET.rollout_steps, rows * columns)
    seeds = range(10**4, 10**4 + len(prompts))  # other noise than in report_samples
    noise = draw_noise(pipe, seeds, rows, columns)
    velocity = velocity_of(pipe.flux, encode(pipe, texts), rows, columns)
    x = rollout(velocity, noise, levels).x[-1]
    for step in range(11):
        x.requires_grad_()  # the latents are the parameters of this walk
        images = decode(pipe, x, SIZE, SIZE)
        score = reward.scale * reward.score(images, texts)
        (grad,) = torch.autograd.grad(score.sum(), x)  # of each image on its own
        if step % 5 == 0:  # before the walk, half-way, at its end
            shares = accuracy(judge_images(images, prompts), prompts)
            print_scores(f"x_0 after {step} steps of the walk", {"reward": score.mean().item(), **shares})
        x = (x + 0.5 * grad / sample_norm(grad)).detach()


if __name__ == "__main__":
    main(tyro.cli(ReportFlags, description=__doc__))
