"""Evaluations during a run: the same prompts and noise, the averaged weights, and an eye on what is not trained on."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config
from infra.distributed import World, gather
from infra.logs import append
from infra.pictures import contact_sheet
from rewards import Reward, reported, score_all
from sample import Pipeline, sample
from shapes.world import accuracy, parse
from start import Setup


def evaluate(
    pipe: Pipeline, rewards: list[Reward], watched: list[Reward], prompts: list[str], cfg: Config, world: World
) -> tuple[dict[str, Any], Tensor]:
    """Mean rewards, and the judge's accuracy per task, on fixed prompts and noise; and the images.

    `by_prompt` holds the watched rewards of each image, so that evaluations can be compared pair by pair.
    """
    each = -(-len(prompts) // world.size)  # the same on every rank, as they gather weights together
    mine = [min(i, len(prompts) - 1) for i in range(world.rank * each, (world.rank + 1) * each)]
    texts, batch = [prompts[i] for i in mine], cfg.rollout_batch or 64
    images = sample(pipe, texts, [10**6 + i for i in mine], cfg.rollout_steps, cfg.size, cfg.size, cfg.guidance, batch)
    own = {r.name: score_all(r, images, texts, pipe.device, batch) for r in [*rewards, *watched]}
    everyone = gather((images.mul(255).round().byte(), own))
    scores = {name: torch.cat([part[name] for _, part in everyone])[: len(prompts)] for name in own}
    result = reported(rewards, {name: score.mean().item() for name, score in scores.items()})
    if "judge" in scores:
        by_task = accuracy(scores["judge"], [parse(p) for p in prompts])
        result |= by_task | {"judge": by_task.pop("overall")}
    result["by_prompt"] = {r.name: [round(x, 5) for x in scores[r.name].tolist()] for r in watched}
    return result, torch.cat([part for part, _ in everyone])[: len(prompts)]


def is_hacked(evals: list[dict[str, Any]], name: str, patience: int) -> bool:
    """Whether a watched reward has been below its best for `patience` evaluations while the trained one is above.

    Below is by more than two standard errors of the paired differences: the images start from the same noise.
    """
    best = max(evals, key=lambda e: e[name])
    since = evals[evals.index(best) + 1 :][-patience:]
    drops = [np.subtract(best["by_prompt"][name], e["by_prompt"][name]) for e in since]
    return len(since) == patience and all(
        e["reward"] > best["reward"] and len(drop) > 1 and drop.mean() > 2 * drop.std(ddof=1) / len(drop) ** 0.5
        for e, drop in zip(since, drops, strict=True)
    )


def shown(prompts: list[str]) -> list[int]:
    """Two dozen of the evaluation prompts, spread over all of them, for pictures."""
    return [round(i * (len(prompts) - 1) / 23) for i in range(24)]


def watch(
    cfg: Config, setup: Setup, world: World, evals: list[dict[str, Any]], step: int, seconds: float
) -> tuple[dict[str, Any], list[str]]:
    """Evaluate, write it down, and return the new entry, which joins `evals`, and what there is to warn of.

    A watched reward is warned of at the first evaluation that shows it being hacked.
    """
    scores, images = evaluate(setup.pipe, setup.rewards, setup.watched, setup.eval_prompts, cfg, world)
    before = {r.name for r in setup.watched if evals and is_hacked(evals, r.name, cfg.patience)}
    evals.append({"step": step, **scores, "seconds": seconds})
    warnings = []
    for name in [r.name for r in setup.watched if is_hacked(evals, r.name, cfg.patience) and r.name not in before]:
        best = max(evals, key=lambda e: e[name])
        warnings.append(
            f"warning: {name} fell from {best[name]:.3f} at step {best['step']} to {scores[name]:.3f} while the "
            f"trained reward rose from {best['reward']:.3f} to {scores['reward']:.3f}: it is being hacked"
        )
    if world.rank == 0:
        samples, few = setup.out / "samples", images[shown(setup.eval_prompts)]
        captions = [setup.eval_prompts[i] for i in shown(setup.eval_prompts)]
        contact_sheet(few / 255, captions, samples / f"step_{step:04d}.png", columns=8)
        if step == 0:
            torch.save(few, samples / "first.pt")
        torch.save(few, samples / "last.pt")
        append(setup.out / "eval.jsonl", evals[-1])
    return evals[-1], warnings
