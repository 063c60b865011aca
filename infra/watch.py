"""Warnings of reward hacking: a watched reward falls while the trained one rises; of divergence, if both fall.

It works on the evaluations of a run, the entries of eval.jsonl.  At every evaluation the image of a prompt starts from
the same noise, so two evaluations are compared prompt by prompt.
"""

import math
from collections.abc import Sequence

import numpy as np

from infra.jsonl import Entry


def hacking_warnings(evals: Sequence[Entry], names: Sequence[str], patience: int) -> list[str]:
    """A warning for each watched reward that has fallen by the last evaluation, and had not before it."""
    warnings = []
    for name in names:
        values = [entry[name] for entry in evals]
        if math.isnan(values[-1]):
            if not any(map(math.isnan, values[:-1])):
                step = evals[-1]["step"]
                warnings.append(f"warning: {name} is no number at step {step}: it chooses no best/ then")
            continue
        # One warning, at the evaluation that shows it: the same words every time would not be read.
        change = change_of(evals, name, patience)
        if not change or change_of(evals[:-1], name, patience) == change:
            continue
        best, last = best_evaluation(evals, name), evals[-1]
        conclusion = "it is being hacked" if change == "rose" else "training diverges, a lower --lr may help"
        warnings.append(
            f"warning: {name} fell from {best[name]:.3f} at step {best['step']} to {last[name]:.3f} while the "
            f"trained reward {change} from {best['reward']:.3f} to {last['reward']:.3f}: {conclusion}"
        )
    return warnings


def change_of(evals: Sequence[Entry], name: str, patience: int) -> str:
    """How the trained reward changed, rose or fell, where a watched one is below its best for `patience` evaluations.

    Empty where the watched reward is not below its best, or the trained one now above and now below.
    """
    if not evals:
        return ""
    # A single low evaluation may be chance, so the best one must be `patience` evaluations back.
    best = best_evaluation(evals, name)
    since_best = evals[evals.index(best) + 1 :]
    recent = since_best[-patience:]
    if len(recent) < patience or not all(has_fallen(best, entry, name) for entry in recent):
        return ""
    if all(entry["reward"] > best["reward"] for entry in recent):
        return "rose"
    return "fell" if all(entry["reward"] < best["reward"] for entry in recent) else ""


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
    if best["step"] == 0:
        best_value = f"{name} was {best[name]:.3f} before training"
    # final/ is trained the longest: a difference that chance explains does not count against it.
    if has_fallen(best, last, name):
        return f"use best/, not final/: {best_value} and is {last[name]:.3f} after {last['step']}"
    if math.isnan(last[name]):
        return f"look at both: {name} is no number after {last['step']} updates; {best_value}, in best/"
    # best/ may have the lower value: a full disk keeps it from being written again.
    if last[name] > best[name]:
        return f"use final/: {value}; {best_value}, in best/"
    if last[name] == best[name]:
        return f"use final/ or best/, of {best['step']} updates: {value} of both"
    if len(last["by_prompt"][name]) < 2:
        return f"look at both: {value}; {best_value}, in best/, and one prompt cannot tell chance from change"
    return f"use final/: {value}; {best_value}, in best/, a difference that may be chance"


def preview_indices(prompts: Sequence[str]) -> list[int]:
    """24 of the evaluation prompts, evenly spread, whose images are drawn; all of fewer prompts."""
    # Prompts of one kind lie together in a file, so the first 24 would be alike.
    count = min(24, len(prompts))
    last = len(prompts) - 1
    return [round(i * last / max(1, count - 1)) for i in range(count)]
