"""The table and the pictures of what experiments.decided wrote: NAME.md, NAME.png and NAME-networks.png."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.draw_compare import LAYOUT
from experiments.tables import markdown, origin, shown
from infra.pictures import Lines, line_chart, save_row

GROUPS = {"all": None, "layout": LAYOUT, "color": ("color",)}  # of tasks, None: every one


def share(of_thing: dict[str, list[float]]) -> np.ndarray:
    """How often the second caption wins, in units of how often it does without a switch; NaN where it never does."""
    second = np.array(of_thing["second"])
    return second / second[0] if second[0] else np.full_like(second, np.nan)


def half_way(levels: list[float], shares: np.ndarray) -> float:
    """The noise level where a share that begins at one first falls to a half, interpolated; NaN if it never does."""
    below = np.flatnonzero(shares < 0.5)
    if not len(below):
        return np.nan
    i = below[0]
    return float(np.interp(0.5, shares[[i, i - 1]], np.array(levels)[[i, i - 1]]))


def accuracy(of_task: dict[str, list[float]], tasks: tuple[str, ...] | None) -> np.ndarray:
    """The mean over some tasks, after 0, 1, ..., T steps."""
    return np.mean([of_task[task] for task in tasks or of_task], axis=0)


def name_of(model: str) -> str:
    """A model's name in tables and pictures: its run's, of runs/NAME/final."""
    path = Path(model)
    return path.parent.name if path.name in ("final", "best") else path.name


def captions_table(result: dict[str, Any]) -> str:
    """A row a thing: where it is decided, then the share of the second caption by the level of the switch."""
    lines = []
    for thing, of_thing in result["things"].items():
        rate, shares = of_thing["second"][0], share(of_thing)
        half = 1.96 * (rate * (1 - rate) / result["num"]) ** 0.5
        numbers = [half_way(result["levels"], shares), *shares]
        lines.append([thing, shown(rate, half), *("-" if np.isnan(x) else f"{x:.2f}" for x in numbers)])
    return markdown(["", "without a switch", "decided at", *(f"{x:.2f}" for x in result["levels"])], lines)


def networks_table(result: dict[str, Any]) -> str:
    """Two rows a model and group of tasks: the judge by the level of the switch."""
    lines = []
    for model in result["tuned"]:
        for group, tasks in GROUPS.items():
            for order, words in dict(tuned_first="then the base", base_first="after the base").items():
                row = accuracy(model[order], tasks)
                lines.append([f"{name_of(model['model'])}, {words}: {group}", *(f"{x:.3f}" for x in row)])
    return markdown(["", *(f"{x:.2f}" for x in result["levels"])], lines)


def report(result: dict[str, Any]) -> str:
    """All tables, with where they are from."""
    parts = [
        f"{origin(result)} {result['num']} rollouts of {name_of(result['model'])} a thing. How often the judge accepts "
        "the end for the caption that all steps from a noise level on have: without a switch, and then in units of "
        "that, by the level. A thing is decided where it falls to a half.\n",
        captions_table(result),
    ]
    if result["tuned"]:
        parts += [
            f"The judge's accuracy on {result['prompts']} prompts where the network is switched at a noise level; "
            f"layout is {' and '.join(LAYOUT)}.\n",
            networks_table(result),
        ]
    return "\n".join(parts)


def chart(axes: Axes, lines: Lines, title: str) -> None:
    line_chart(axes, lines, title, "noise level of the switch")
    axes.invert_xaxis()  # from noise to image, as a rollout goes


def draw_decided(result: dict[str, Any], path: Path) -> None:
    """Write the tables and the pictures beside the JSON file."""
    path.with_suffix(".md").write_text(report(result))
    levels = result["levels"]
    lines = {thing: (levels, share(of_thing)) for thing, of_thing in result["things"].items()}
    save_row([partial(chart, lines=lines, title="the later caption wins, relative")], path.with_suffix(".png"))
    charts = []
    for model in result["tuned"]:
        orders = dict(early=model["tuned_first"], late=model["base_first"])  # the steps that the tuned network makes
        lines = {
            f"{group} {order}": (levels, accuracy(of_task, GROUPS[group]))
            for order, of_task in orders.items()
            for group in ("layout", "color")
        }
        charts.append(partial(chart, lines=lines, title=f"judge, steps by {name_of(model['model'])}: early, late"))
    if charts:
        save_row(charts, path.with_name(f"{path.stem}-networks.png"))
