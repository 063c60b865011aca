"""Tables and pictures of what experiments.fidelity wrote: NAME.md, NAME.png and NAME-places.png beside NAME.json."""

import itertools
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from experiments.tables import markdown, origin, shown
from infra.pictures import PALETTE, dress, line_chart, name_ends, save_row
from infra.summary import confidence_interval

Base = dict[str, Any]  # a model at a T
TAU = 0.1  # of Eq. 12, the paper's


def title_of(base: Base) -> str:
    return f"{Path(base['model']).name}, T = {base['rollout_steps']}"


def table(base: Base) -> str:
    """A row a method: all weights first, then the cosine of single draws by layer, then evaluations a sample."""
    numbers = ("cosine", "norm", "mean_cosine", "spread")
    layers = [layer for layer in next(iter(base["methods"].values())) if layer != "all"]
    lines = []
    for spec, of_layer in base["methods"].items():
        own = [shown(*confidence_interval(of_layer["all"][name])) for name in numbers]
        parts = [shown(*confidence_interval(of_layer[layer]["cosine"])) for layer in layers]
        lines.append([spec, *own, *parts, f"{base['evaluations'][spec]:.1f}"])
    head = ["", "cosine", "norm", "cosine of the mean", "spread", *layers, "evaluations"]
    return markdown(head, lines)


def trust(d_j: np.ndarray, d_0: np.ndarray) -> dict[str, np.ndarray]:
    """What may tell how far two leaps can be trusted: the weight of Eq. 12, and less of a distance."""
    weight = 1 / (np.maximum(d_j, TAU) + np.maximum(d_0, TAU))
    return {"weight of Eq. 12": weight, "-d_j": -d_j, "-d_0": -d_0, "-(d_j + d_0)": -d_j - d_0}


def trust_table(bases: list[Base]) -> str:
    """A row a base: how well each of `trust` ranks the pairs of steps by their cosine, over batches."""
    lines = []
    for base in bases:
        found = pairs(base)
        with warnings.catch_warnings():  # where all weights are at their bound, none is greater: NaN, a dash
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            ranked = [
                {name: stats.spearmanr(values, cosine).statistic for name, values in trust(d_j, d_0).items()}
                for d_j, d_0, cosine in zip(found["d_j"], found["d_0"], found["cosine"])
            ]
        lines.append(
            [title_of(base), *(shown(*confidence_interval([of[name] for of in ranked])) for name in ranked[0])]
        )
    return markdown(["", *ranked[0]], lines)


def report(result: dict[str, Any]) -> str:
    """All tables, with where they are from."""
    bases = result["bases"]
    parts = [
        f"{origin(result)} Against the true gradient, {result['draws']} draws in each of "
        f"{len(bases[0]['straightness'])} batches of {result['batch']} samples; mean and 95% interval over batches.\n"
    ]
    for base in bases:
        straight = shown(*confidence_interval(base["straightness"]))
        parts += [f"{title_of(base)}; mean squared distance of velocities from x_1 - x_0, relative: {straight}\n"]
        parts += [table(base)]
    if long := [base for base in bases if base["rollout_steps"] > 2]:  # of two steps there is one pair
        parts += ["Two leaps from each pair of steps: rank correlation, over pairs, of their gradient's cosine with\n"]
        parts += [trust_table(long)]
    return "\n".join(parts)


def pairs(base: Base) -> dict[str, np.ndarray]:
    """What was measured for each pair of steps: name -> (batches, pairs)."""
    places = base["places"]
    return {name: np.array([[pair[name] for pair in batch] for batch in places]) for name in places[0][0]}


def scatter(axes: Axes, bases: list[Base], name: str) -> None:
    """A point for each pair of steps, a mean over batches: a distance or the weight, and the cosine; a color a base."""
    ends = []
    for color, base in zip(itertools.cycle(PALETTE[1:]), bases):
        found = {of: values.mean(0) for of, values in pairs(base).items()}
        x, y = (found | trust(found["d_j"], found["d_0"]))[name], found["cosine"]
        axes.plot(x, y, "o", markersize=4, color=color, alpha=0.7, linewidth=0)
        ends.append((float(y.mean()), title_of(base), color))
    dress(axes, "cosine of two leaps", name)
    name_ends(axes, ends)


def place_chart(axes: Axes, base: Base) -> None:
    """Cosine over j, a line for each k that has several."""
    found = pairs(base)
    k, j, lines = found["k"][0], found["j"][0], {}
    for level in dict.fromkeys(k):
        at = k == level
        if at.sum() > 1:
            lines[f"k {level:.2f}:"] = (j[at], found["cosine"][:, at].mean(0))
    line_chart(axes, lines, f"cosine of two leaps, {title_of(base)}", "j")
    axes.invert_xaxis()  # from noise to image, as a rollout goes


def draw_fidelity(result: dict[str, Any], path: Path) -> None:
    """Write the tables and the pictures beside the JSON file."""
    path.with_suffix(".md").write_text(report(result))
    bases = result["bases"]
    charts = [partial(scatter, bases=bases, name=name) for name in ("d_j", "d_0", "weight of Eq. 12")]
    save_row(charts, path.with_suffix(".png"))
    if long := [base for base in bases if base["rollout_steps"] > 2]:
        save_row([partial(place_chart, base=base) for base in long], path.with_name(f"{path.stem}-places.png"))
