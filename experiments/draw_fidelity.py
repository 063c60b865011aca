"""Tables and pictures of what experiments.fidelity wrote: NAME.md, NAME.png and NAME-places.png beside NAME.json."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.tables import interval, markdown, origin, shown
from infra.pictures import PALETTE, dress, line_chart, name_ends, save_row

Base = dict[str, Any]  # a model at a T


def title_of(base: Base) -> str:
    return f"{Path(base['model']).name}, T = {base['rollout_steps']}"


def table(base: Base) -> str:
    """A row a method: all weights first, then the cosine of single draws by layer, then evaluations a sample."""
    numbers = ("cosine", "norm", "mean_cosine", "spread")
    layers = [layer for layer in next(iter(base["methods"].values())) if layer != "all"]
    lines = []
    for spec, of_layer in base["methods"].items():
        own = [shown(*interval(of_layer["all"][name])) for name in numbers]
        parts = [shown(*interval(of_layer[layer]["cosine"])) for layer in layers]
        lines.append([spec, *own, *parts, f"{base['evaluations'][spec]:.1f}"])
    head = ["", "cosine", "norm", "cosine of the mean", "spread", *layers, "evaluations"]
    return markdown(head, lines)


def report(result: dict[str, Any]) -> str:
    """All tables, with where they are from."""
    bases = result["bases"]
    parts = [
        f"{origin(result)} Against the true gradient, {result['draws']} draws in each of "
        f"{len(bases[0]['straightness'])} batches of {result['batch']} samples; mean and 95% interval over batches.\n"
    ]
    for base in bases:
        straight = shown(*interval(base["straightness"]))
        parts += [f"{title_of(base)}; mean squared distance of velocities from x_1 - x_0, relative: {straight}\n"]
        parts += [table(base)]
    return "\n".join(parts)


def pairs(base: Base) -> dict[str, np.ndarray]:
    """What was measured for each pair of steps: name -> (batches, pairs)."""
    places = base["places"]
    return {name: np.array([[pair[name] for pair in batch] for batch in places]) for name in places[0][0]}


def scatter(axes: Axes, bases: list[Base], names: tuple[str, ...], title: str) -> None:
    """A point for each pair of steps, the mean over batches: distances, summed, against cosine; a color a base."""
    ends = []
    for color, base in zip(PALETTE[1:], bases):
        found = pairs(base)
        x, y = sum(found[name] for name in names).mean(0), found["cosine"].mean(0)
        axes.plot(x, y, "o", markersize=4, color=color, alpha=0.7, linewidth=0)
        ends.append((float(y.mean()), title_of(base), color))
    dress(axes, title, " + ".join(names))
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
    sums = {("d_j",): "cosine against d_j", ("d_0",): "against d_0", ("d_j", "d_0"): "against both"}
    charts = [partial(scatter, bases=bases, names=names, title=title) for names, title in sums.items()]
    save_row(charts, path.with_suffix(".png"))
    long = [base for base in bases if base["rollout_steps"] > 2]  # of two steps there is one pair
    if long:
        save_row([partial(place_chart, base=base) for base in long], path.with_name(f"{path.stem}-places.png"))
