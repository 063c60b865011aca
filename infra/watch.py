"""When a watched reward falls while the trained one rises: what to warn of, and which model to use in the end.

Works on the evaluations of a run, as in its eval.jsonl.  Images of the same prompt start from the same noise at every
evaluation, so what counts is the differences a prompt, in units of their standard error.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Entry = dict[str, Any]


def watched_value(entry: Entry, name: str) -> float:
    """A watched reward; one that is not a number is below all others."""
    return -math.inf if math.isnan(entry[name]) else entry[name]


def best_evaluation(evals: Sequence[Entry], name: str) -> Entry:
    """The first of the evaluations with the highest value of a watched reward."""
    return max(evals, key=lambda e: watched_value(e, name))


def has_fallen(before: Entry, after: Entry, name: str) -> bool:
    """Whether a watched reward is lower by more than two standard errors of the paired differences."""
    drop = np.subtract(before["by_prompt"][name], after["by_prompt"][name])
    return len(drop) > 1 and drop.mean() > 2 * drop.std(ddof=1) / len(drop) ** 0.5


def is_hacked(evals: Sequence[Entry], name: str, patience: int) -> bool:
    """Whether a watched reward has been below its best for `patience` evaluations while the trained one is above."""
    best = best_evaluation(evals, name)
    since = evals[evals.index(best) + 1 :][-patience:]
    return len(since) == patience and all(e["reward"] > best["reward"] and has_fallen(best, e, name) for e in since)


def hacking_warnings(evals: Sequence[Entry], names: Sequence[str], patience: int) -> list[str]:
    """A warning for each watched reward that the last evaluation is the first to show being hacked."""
    warnings = []
    for name in names:
        if is_hacked(evals, name, patience) and not (evals[:-1] and is_hacked(evals[:-1], name, patience)):
            best, last = best_evaluation(evals, name), evals[-1]
            warnings.append(
                f"warning: {name} fell from {best[name]:.3f} at step {best['step']} to {last[name]:.3f} while the "
                f"trained reward rose from {best['reward']:.3f} to {last['reward']:.3f}: it is being hacked"
            )
    return warnings


def folder_advice(kept: Entry | None, last: Entry, name: str) -> str:
    """Which of best/ and final/ to use, by a watched reward, and why: `kept` is the evaluation that best/ is of."""
    if kept is None:
        return f"use final/: {name} is {last[name]:.3f}, and there is no best/"
    at_best = f"{name} was {kept[name]:.3f} after {kept['step']} updates"
    if kept["step"] == last["step"]:
        return f"use final/: {name} is {last[name]:.3f}, and best/ is the same"
    if has_fallen(kept, last, name):
        return f"use best/, not final/: {at_best} and is {last[name]:.3f} after {last['step']}"
    if last[name] > kept[name]:
        return f"use final/: {name} is {last[name]:.3f}; {at_best}, in best/"
    return f"use final/: {name} is {last[name]:.3f}; {at_best}, in best/, which is no more than chance"


def preview_indices(prompts: Sequence[str]) -> list[int]:
    """Two dozen of the evaluation prompts, spread over all of them, for pictures."""
    return [round(i * (len(prompts) - 1) / 23) for i in range(24)]
