"""Reward hacking: a watched reward falls while the trained reward rises.  When to warn, and which model to use.

It works on the evaluations of a run, the entries of eval.jsonl.  At every evaluation the image of a prompt starts from
the same noise, so two evaluations are compared prompt by prompt.
"""

import math
from collections.abc import Sequence

import numpy as np

from infra.jsonl import Entry


def hacking_warnings(evals: Sequence[Entry], names: Sequence[str], patience: int) -> list[str]:
    """A warning for each watched reward that is hacked by the last evaluation, and was not before it."""
    warnings = []
    for name in names:
        # One warning, at the evaluation that shows it: the same words every time would not be read.
        was_hacked = is_hacked(evals[:-1], name, patience)
        if was_hacked or not is_hacked(evals, name, patience):
            continue
        best, last = best_evaluation(evals, name), evals[-1]
        warnings.append(
            f"warning: {name} fell from {best[name]:.3f} at step {best['step']} to {last[name]:.3f} while the "
            f"trained reward rose from {best['reward']:.3f} to {last['reward']:.3f}: it is being hacked"
        )
    return warnings


def is_hacked(evals: Sequence[Entry], name: str, patience: int) -> bool:
    """Whether a watched reward is below its best, and the trained reward above, for the last `patience` evaluations."""
    if not evals:
        return False
    # A single low evaluation may be chance, so the best one must be `patience` evaluations back.
    best = best_evaluation(evals, name)
    since_best = evals[evals.index(best) + 1 :]
    recent = since_best[-patience:]
    if len(recent) < patience:
        return False
    return all(entry["reward"] > best["reward"] and has_fallen(best, entry, name) for entry in recent)


def has_fallen(best: Entry, entry: Entry, name: str) -> bool:
    """Whether a watched reward is lower than at its best by more than two standard errors, prompt by prompt."""
    # Prompts differ far more than the two models do; the differences of each prompt do not contain that spread.
    drops = np.subtract(best["by_prompt"][name], entry["by_prompt"][name])
    if len(drops) < 2:
        return False  # one prompt has no standard error
    standard_error = drops.std(ddof=1) / len(drops) ** 0.5
    return drops.mean() > 2 * standard_error


def best_evaluation(evals: Sequence[Entry], name: str) -> Entry:
    """The evaluation with the highest value of a watched reward; the first of several."""
    return max(evals, key=lambda entry: watched_value(entry, name))


def watched_value(entry: Entry, name: str) -> float:
    """The value of a watched reward in an evaluation; NaN ranks below all numbers."""
    value = entry[name]
    return -math.inf if math.isnan(value) else value


def folder_advice(best: Entry | None, last: Entry, name: str) -> str:
    """Which folder to use, best/ or final/, by a watched reward, and why.

    `best` is the evaluation of the model in best/, None if there is no best/; `last` is that of final/.
    """
    value = f"{name} is {last[name]:.3f}"
    if best is None:
        return f"use final/: {value}, and there is no best/"
    if best["step"] == last["step"]:
        return f"use final/: {value}, and best/ is the same"
    best_value = f"{name} was {best[name]:.3f} after {best['step']} updates"
    # final/ is trained the longest: a difference that chance explains does not count against it.
    if has_fallen(best, last, name):
        return f"use best/, not final/: {best_value} and is {last[name]:.3f} after {last['step']}"
    # best/ may have the lower value: a full disk keeps it from being written again.
    if last[name] > best[name]:
        return f"use final/: {value}; {best_value}, in best/"
    return f"use final/: {value}; {best_value}, in best/, a difference that may be chance"


def preview_indices(prompts: Sequence[str]) -> list[int]:
    """24 of the evaluation prompts, evenly spread, whose images are drawn; of fewer prompts some repeat."""
    # Prompts of one kind lie together in a file, so the first 24 would be alike.
    last = len(prompts) - 1
    return [round(i * last / 23) for i in range(24)]
