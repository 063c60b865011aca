"""What an evaluation comes to: means with 95% intervals, and changes from the first model."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

Scores = dict[str, dict[str, np.ndarray]]  # model -> reward -> (prompts, images of a prompt)
Numbers = dict[str, Any]  # of a model by a reward: mean, half, ...
Summary = dict[str, dict[str, Numbers]]  # reward -> model -> numbers
MAX_TAGS = 12  # a line of a table with more columns would wrap


def confidence_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean of independent values, and half the width of its 95% interval (Student's t); NaN for a single one."""
    values = np.asarray(values)
    n = len(values)
    half = math.nan
    if n > 1:
        quantile = special.stdtrit(n - 1, 0.975)  # 2.5% of the distribution are above, as many below
        half = quantile * values.std(ddof=1) / math.sqrt(n)
    return float(values.mean()), float(half)


def summarize(scores: Scores, tags: Sequence[str] | None, sizes: Sequence[str] = ()) -> Summary:
    """Means over prompts, with 95% intervals, and changes from the first model.

    The numbers are `mean`, `half`, the half-width of its interval, and of all models but the first `change` and
    `change_half`; with `tags`, one a prompt, `tasks`: tag -> mean; with several `sizes`, at which the images of a
    prompt take turns, `sizes`: size -> mean.
    """
    reference, *_ = scores.values()
    summary = {}
    for reward in reference:
        summary[reward] = {}
        for model in scores:
            values = scores[model][reward]  # (prompts, num)
            # Images of a prompt are not independent, prompts are: the interval is over prompts.
            by_prompt = values.mean(1)
            numbers: Numbers = {}
            numbers["mean"], numbers["half"] = confidence_interval(by_prompt)
            if scores[model] is not reference:
                # Paired: a prompt that is hard is so for both models, which their difference does not see.
                change = by_prompt - reference[reward].mean(1)
                numbers["change"], numbers["change_half"] = confidence_interval(change)
            if tags:
                numbers["tasks"] = means_by_tag(by_prompt, tags)
            if len(sizes) > 1:
                numbers["sizes"] = means_by_size(values, sizes)
            summary[reward][model] = numbers
    return summary


def means_by_tag(by_prompt: np.ndarray, tags: Sequence[str]) -> dict[str, float]:
    """The mean over the prompts of each tag, in the order in which the tags appear."""
    means = {}
    for tag in dict.fromkeys(tags):
        has_tag = np.array(tags) == tag
        means[tag] = float(by_prompt[has_tag].mean())
    return means


def means_by_size(values: np.ndarray, sizes: Sequence[str]) -> dict[str, float]:
    """The mean over the images of each size; the n-th image of a prompt has size n, modulo their number."""
    means = {}
    for first, size in enumerate(sizes):
        of_size = values[:, first :: len(sizes)]
        means[size] = float(of_size.mean())
    return means


def format_table(summary: Summary) -> str:
    """The summary as text: a table a reward and a line a model, with the means by tag and by size as columns."""
    # All tables share the width of the first column, so that their numbers are below each other.
    width = 0
    for reward, models in summary.items():
        width = max(width, *map(len, [reward, *models]))
    lines = []
    for reward, models in summary.items():
        first, *_ = models.values()
        columns = column_means(first)
        column_width = 9  # of a number between -999.999 and 999.999
        for name in columns:
            column_width = max(column_width, len(name) + 2)
        line = f"{reward:{width}}  {'mean':17}{'change':19}"
        for name in columns:
            line += f"{name:>{column_width}}"
        lines.append(line)
        for model, numbers in models.items():
            line = f"{model:{width}}  {numbers['mean']:8.4f} ±{numbers['half']:.4f}  "
            change = ""
            if "change" in numbers:
                change = f"{numbers['change']:+.4f} ±{numbers['change_half']:.4f}"
            line += f"{change:19}"
            for mean in column_means(numbers).values():
                line += f"{mean:{column_width}.3f}"
            lines.append(line.rstrip())
        lines.append("")
    return "\n".join(lines)


def column_means(numbers: Numbers) -> dict[str, float]:
    """The means that have a column: by size, and by tag unless there are too many tags."""
    by_tag = numbers.get("tasks", {})
    if len(by_tag) > MAX_TAGS:  # results.json has them all the same
        by_tag = {}
    return by_tag | numbers.get("sizes", {})
