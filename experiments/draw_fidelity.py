"""Tables and pictures of what fidelity wrote: NAME.md, NAME.png and NAME-pairs.png beside NAME.json.

A result has several "bases": a model at a number of steps T. A base has, for each method, numbers of each layer, a
list with one entry per batch; and "pairs", for each batch the numbers of two leaps from every pair of steps.
"""

import itertools
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from experiments.record import format_interval, markdown_table, source_line
from infra.pictures import PALETTE, dress, line_chart, name_ends, save_row

Base = dict[str, Any]
TAU = 0.1  # of Eq. 12, the paper's


def draw_fidelity(result: dict[str, Any], path: Path) -> None:
    """Write the tables and pictures of a result beside its JSON file."""
    path.with_suffix(".md").write_text(report_fidelity(result))
    bases = result["bases"]
    # A predictor is good if its points lie on a rising or falling line.
    charts = [partial(scatter_plot, bases=bases, name=name) for name in ("d_j", "d_0", "weight of Eq. 12")]
    save_row(charts, path.with_suffix(".png"))  # one picture for all bases, a color each
    if bases_with_pairs(bases):
        charts = [partial(pairs_chart, base=base) for base in bases_with_pairs(bases)]
        save_row(charts, path.with_name(f"{path.stem}-pairs.png"))


def bases_with_pairs(bases: list[Base]) -> list[Base]:
    return [base for base in bases if base["rollout_steps"] > 2]  # two steps are a single pair


def base_title(base: Base) -> str:
    return f"{Path(base['model']).name}, T = {base['rollout_steps']}"


# ---------------------------------------------------------------------------------------- tables


def report_fidelity(result: dict[str, Any]) -> str:
    """All tables as Markdown, and where they are from."""
    bases = result["bases"]
    batches = len(bases[0]["straightness"])
    texts = [
        f"{source_line(result)} Against the true gradient, {result['draws']} draws in each of "
        f"{batches} batches of {result['batch']} samples; mean and 95% interval over batches.\n"
    ]
    for base in bases:
        distance = format_interval(base["straightness"])
        texts.append(f"{base_title(base)}; mean squared distance of velocities from x_1 - x_0, relative: {distance}\n")
        texts.append(gradients_table(base))
    if bases_with_pairs(bases):
        texts.append(
            "Two leaps from each pair of steps: rank correlation, over pairs, of their gradient's cosine with\n"
        )
        texts.append(predictors_table(bases_with_pairs(bases)))
    return "\n".join(texts)


def gradients_table(base: Base) -> str:
    """A row per method: numbers of all weights, then the cosine of each layer, then evaluations per sample."""
    first_method = next(iter(base["methods"].values()))
    layers = [layer for layer in first_method if layer != "all"]
    # Layers have the cosine alone, or the table would be wider than a screen.
    columns = [("all", name) for name in ("cosine", "norm", "mean_cosine", "spread")]
    columns += [(layer, "cosine") for layer in layers]
    lines = []
    for spec, numbers in base["methods"].items():
        line = [spec]
        for layer, name in columns:
            line.append(format_interval(numbers[layer][name]))
        lines.append([*line, f"{base['evaluations'][spec]:.1f}"])
    head = ["", "cosine", "norm", "cosine of the mean", "spread", *layers, "evaluations"]
    return markdown_table(head, lines)


def predictors_table(bases: list[Base]) -> str:
    """A row per base: how well each predictor ranks the pairs of steps by their cosine."""
    lines = []
    for base in bases:
        pairs = pair_arrays(base)
        correlations: dict[str, list[float]] = {}  # predictor -> a rank correlation per batch
        for d_j, d_0, cosines in zip(pairs["d_j"], pairs["d_0"], pairs["cosine"]):
            for name, values in predictors(d_j, d_0).items():
                # NaN, a dash in the table, if all weights are at their bound.
                with warnings.catch_warnings(action="ignore", category=stats.ConstantInputWarning):
                    correlation = stats.spearmanr(values, cosines).statistic
                correlations.setdefault(name, []).append(correlation)
        intervals = map(format_interval, correlations.values())
        lines.append([base_title(base), *intervals])
    return markdown_table(["", *correlations], lines)


def predictors(d_j: np.ndarray, d_0: np.ndarray) -> dict[str, np.ndarray]:
    """What may predict how good two leaps are: the weight of Eq. 12, and the distances, of which less is better."""
    # Ranks do not change with a positive factor, so distances are negated, not inverted.
    weight = 1 / (np.maximum(d_j, TAU) + np.maximum(d_0, TAU))
    return {"weight of Eq. 12": weight, "-d_j": -d_j, "-d_0": -d_0, "-(d_j + d_0)": -d_j - d_0}


def pair_arrays(base: Base) -> dict[str, np.ndarray]:
    """The numbers of all pairs of steps: name -> (batches, pairs)."""
    rows: dict[str, list[list[float]]] = {}
    for batch in base["pairs"]:
        for name in batch[0]:
            rows.setdefault(name, []).append([pair[name] for pair in batch])
    return {name: np.array(values) for name, values in rows.items()}


# --------------------------------------------------------------------------------------- pictures


def scatter_plot(axes: Axes, bases: list[Base], name: str) -> None:
    """A point per pair of steps, a mean over batches: the cosine by a distance or by the weight; a color per base."""
    labels = []
    for color, base in zip(itertools.cycle(PALETTE[1:]), bases):  # the first color is that of text
        means = {}
        for key, values in pair_arrays(base).items():
            means[key] = values.mean(0)
        x = (means | predictors(means["d_j"], means["d_0"]))[name]
        y = means["cosine"]
        axes.plot(x, y, "o", markersize=4, color=color, alpha=0.7, linewidth=0)
        labels.append((float(y.mean()), base_title(base), color))
    dress(axes, "cosine of two leaps", name)
    name_ends(axes, labels)


def pairs_chart(axes: Axes, base: Base) -> None:
    """Cosine over j, a line for each k that has several pairs."""
    pairs = pair_arrays(base)
    k, j = pairs["k"][0], pairs["j"][0]  # the same in all batches
    cosines = pairs["cosine"].mean(0)  # over batches
    lines = {}
    for level in dict.fromkeys(k):
        starts_here = k == level
        if starts_here.sum() > 1:  # a single point is no line
            lines[f"k {level:.2f}:"] = (j[starts_here], cosines[starts_here])
    line_chart(axes, lines, f"cosine of two leaps, {base_title(base)}", "j")
    axes.invert_xaxis()  # from noise to image, as a rollout goes
