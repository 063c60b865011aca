"""What an evaluation comes to: means with 95% intervals, changes from the first model, and contact sheets."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats

from infra.pictures import grid_of, save_png


def confidence_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean of independent values, and half the width of its 95% interval (Student's t); NaN for a single one."""
    values, n = np.asarray(values), len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), float(half)


def summarize(
    scores: dict[str, dict[str, np.ndarray]], tags: list[str] | None, sizes: Sequence[str] = ()
) -> dict[str, dict[str, dict[str, Any]]]:
    """reward -> model -> mean, half, change and change_half against the first model, tasks, and sizes if several.

    scores: model -> reward -> (prompts, num), the images at `sizes` in turn.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for reward in next(iter(scores.values())):
        by_prompt = {model: scores[model][reward].mean(1) for model in scores}
        first = next(iter(by_prompt.values()))
        summary[reward] = {}
        for model, values in by_prompt.items():
            entry = dict(zip(("mean", "half"), confidence_interval(values)))
            if values is not first:
                entry |= dict(zip(("change", "change_half"), confidence_interval(values - first)))
            if tags:
                entry["tasks"] = {t: float(values[np.array(tags) == t].mean()) for t in dict.fromkeys(tags)}
            if len(sizes) > 1:
                turns = enumerate(sizes)
                entry["sizes"] = {s: float(scores[model][reward][:, i :: len(sizes)].mean()) for i, s in turns}
            summary[reward][model] = entry
    return summary


def format_table(summary: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The summary for people; of the tasks only the judge's, and all sizes."""
    width = max(len(name) for models in summary.values() for name in [*models, *summary])
    lines = []
    for reward, models in summary.items():
        parts = [(e.get("tasks", {}) if reward == "judge" else {}) | e.get("sizes", {}) for e in models.values()]
        wide = max(9, *(2 + len(name) for name in parts[0])) if parts[0] else 9
        lines.append(f"{reward:{width}}  {'mean':17}{'change':19}" + "".join(f"{name:>{wide}}" for name in parts[0]))
        for (model, e), values in zip(models.items(), parts):
            change = f"{e['change']:+.4f} ±{e['change_half']:.4f}" if "change" in e else ""
            cells = "".join(f"{value:{wide}.3f}" for value in values.values())
            lines.append(f"{model:{width}}  {e['mean']:8.4f} ±{e['half']:.4f}  {change:19}{cells}".rstrip())
        lines.append("")
    return "\n".join(lines)


def write_sheets(scores: dict[str, dict[str, np.ndarray]], prompts: list[str], out: Path) -> None:
    """Write best.png, worst.png and, for two models or more, changed.png: a cell per prompt, models top to bottom."""
    reward = next(iter(next(iter(scores.values()))))
    by_prompt = [scores[model][reward].mean(1) for model in scores]
    order = by_prompt[-1].argsort(kind="stable")
    shown = {"best": order[::-1], "worst": order}
    if len(by_prompt) > 1:
        shown["changed"] = (-np.abs(by_prompt[-1] - by_prompt[0])).argsort(kind="stable")
    for name, indices in shown.items():
        cells, captions = [], []
        for i in indices[:16].tolist():
            files = [out / model / f"{i:05d}.png" for model in scores]
            cells.append([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) / 255 for f in files])
            captions.append(" to ".join(f"{values[i]:.2f}" for values in by_prompt) + f": {prompts[i]}")
        save_png(grid_of(cells, captions, columns=8, side=128), out / f"{name}.png")
