"""Tables and pictures of what compare and experts wrote: NAME.md, NAME.png, NAME-changes.png beside NAME.json.

Of experts there is NAME-gains.png, too.  A difference is that of two runs of the same seed.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.tables import markdown, origin, shown
from infra.pictures import GRID, INK, PALETTE, dress, line_chart, save_row
from infra.summary import confidence_interval

LAYOUT = ("position", "count")  # the tasks that early steps decide, if the paper is right
Cells = list[dict[str, Any]]  # the runs of a row, seed by seed
Rows = dict[str, Cells]
TWO = ", two networks"  # ends the name of experts' rows with weights that are not shared
HIDDEN = {"step", "evaluations"}  # of an evaluation's numbers: not measures


# ------------------------------------------------------------------------------------- arithmetic


def last(name: str) -> Callable[[dict], float]:
    """A measure of a run: a number of its last evaluation."""
    return lambda cell: cell["curve"][-1][name]


def gain(*names: str) -> Callable[[dict], float]:
    """A measure of a run: how much the mean of some numbers has risen from the base's."""
    return lambda cell: float(np.mean([cell["curve"][-1][n] - cell["curve"][0][n] for n in names]))


def mean_of(cells: Cells, measure: Callable[[dict], float]) -> tuple[float, float]:
    """Mean and half of its 95% interval over seeds; NaN for the half where there is one seed."""
    return confidence_interval([measure(cell) for cell in cells])


def change_of(cells: Cells, reference: Cells, measure: Callable[[dict], float]) -> tuple[float, float]:
    """Mean difference to the reference, and half of its interval; raises ValueError where the seeds are others."""
    if [c["seed"] for c in cells] != [c["seed"] for c in reference]:
        raise ValueError(f"{cells[0]['spec']} and {reference[0]['spec']} have other seeds, and cannot be paired")
    return confidence_interval([measure(a) - measure(b) for a, b in zip(cells, reference)])


def measures(result: dict, rows: Rows) -> list[str]:
    """What every run was evaluated by, the judge first, then its tasks, the trained reward, and all else."""
    names = [n for n in next(iter(rows.values()))[0]["curve"][-1] if n not in HIDDEN]
    names = [n for n in names if [n] != result["rewards"]]  # of a single reward, "reward" is the same
    return sorted(names, key=lambda n: n != "judge")


# ---------------------------------------------------------------------------------------- tables


def table(result: dict, rows: Rows) -> str:
    """Means with intervals: the base, then a row each; what they took, and the learning rate."""
    names = measures(result, rows)
    first = next(iter(rows.values()))
    base = [f"{first[0]['curve'][0][n]:.3f}" for n in names]
    lines = [["base", *base, *[""] * 5]]
    for spec, cells in rows.items():
        means = [shown(*mean_of(cells, last(n))) for n in names]
        took = [f"{cells[0]['steps']}", f"{np.mean([c['evaluations'] for c in cells]) / 1000:,.0f}"]
        took += [f"{np.mean([c['seconds'] for c in cells]):.0f}", f"{max(c['memory'] for c in cells):.2f}"]
        lines.append([named(spec, cells), *means, *took, rate(result, spec, cells)])
    return markdown(["", *names, "updates", "1000 evaluations", "seconds", "GB", "lr"], lines)


def changes(result: dict, rows: Rows) -> str:
    """Differences to the first row, paired by seed, with intervals."""
    names, (reference, first) = measures(result, rows), next(iter(rows.items()))
    lines = [
        [named(spec, cells), *(shown(*change_of(cells, first, last(n)), sign="+") for n in names)]
        for spec, cells in rows.items()
        if cells is not first
    ]
    return markdown([f"minus {reference}", *names], lines)


def named(spec: str, cells: Cells) -> str:
    """A row's name, and how many of its runs came to a number that is not finite and ended there."""
    ended = sum(c["diverged"] for c in cells)
    return f"{spec} ({ended} of {len(cells)} diverged)" if ended else spec


def ends_highest(result: dict, rows: Rows) -> str:
    """The row that is best on average at the end, by what learning rates are chosen by."""
    return max(rows, key=lambda spec: mean_of(rows[spec], last(result["select"]))[0])


def rate(result: dict, spec: str, cells: Cells) -> str:
    """The learning rate, with a mark where it is the least or the greatest that was tried."""
    lr, tried = cells[0]["lr"], [t["lr"] for t in result["grid"].get(spec, [])]
    return f"{lr:.2g}" + ("*" if tried and lr in (min(tried), max(tried)) else "")


def report(result: dict) -> str:
    """All tables of a result, with where it is from."""
    seeds = len(next(iter(next(iter(result["tables"].values())).values())))
    runs = [cell for rows in result["tables"].values() for cells in rows.values() for cell in cells]
    made = {what: ", ".join(sorted({run[what] for run in runs})) for what in ("revision", "hardware")}
    parts = [
        f"{origin(result)} Its runs are of revision {made['revision']}, on {made['hardware']}. Mean and 95% interval "
        f"over {seeds} seeds. A learning rate with * is at the edge of what was tried.\n"
    ]
    for equal, rows in result["tables"].items():
        parts += [f"At equal {equal}:\n", table(result, rows)]
        if len(rows) > 1:
            parts += ["Differences, seed by seed:\n", changes(result, rows)]
        if result["kind"] == "experts":  # to the last method, too
            apart = {spec: cells for spec, cells in reversed(rows.items()) if spec.endswith(TWO)}
            parts += [changes(result, apart)]
        elif len(rows) > 2 and (best := ends_highest(result, rows)) != next(iter(rows)):  # to the best one, too
            parts += [changes(result, {best: rows[best]} | rows)]
    return "\n".join(parts)


# --------------------------------------------------------------------------------------- pictures


def curve_of(cells: Cells, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Thousands of evaluations and a number, means over seeds; a run that diverged ends the curve where it ended."""
    length = min(len(c["curve"]) for c in cells)
    x, y = (np.array([[e[k] for e in c["curve"][:length]] for c in cells]).mean(0) for k in ("evaluations", name))
    return x / 1000, y


def curves_chart(rows: Rows, name: str) -> Callable[[Axes], None]:
    lines = {spec.removeprefix("leapalign "): curve_of(cells, name) for spec, cells in rows.items()}
    return partial(line_chart, lines=lines, title=name, across="1000 evaluations of the network")


def forest(axes: Axes, points: dict[str, tuple[float, float]], title: str, across: str) -> None:
    """A point and an interval for each row, below one another."""
    for y, (mean, half) in enumerate(points.values()):
        axes.errorbar(mean, y, xerr=None if np.isnan(half) else half, fmt="o", markersize=4, color=PALETTE[1])
    axes.axvline(0, color=INK, linewidth=0.8)
    dress(axes, title, across)
    axes.set_yticks(range(len(points)), points)
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.grid(axis="y", color=GRID, linewidth=0.4)


def changes_chart(rows: Rows, name: str, equal: str) -> Callable[[Axes], None]:
    """How far every row but the first is from that one."""
    (reference, first), *others = rows.items()
    points = {spec.removeprefix("leapalign "): change_of(cells, first, last(name)) for spec, cells in others}
    return partial(forest, points=points, title=f"at equal {equal}", across=f"{name}, minus {reference}")


def gains_chart(axes: Axes, rows: Rows, task: str, named: bool) -> None:
    """How far every row has come from the base in a task; the rows' names are beside the first of several charts."""
    points = {spec: mean_of(cells, gain(task)) for spec, cells in rows.items()}
    forest(axes, points, task, "gain over the base")
    if not named:
        axes.set_yticklabels([])


def ranges_of(rows: Rows) -> list[tuple[float, str]]:
    """The rows with leaps from a range of noise levels, by its middle, the noisiest first."""
    bounds = {spec: words_after(spec, ("--low", "--high")) for spec in rows}
    return sorted(((sum(b) / 2, spec) for spec, b in bounds.items() if b), reverse=True)


def ranges_chart(axes: Axes, rows: Rows) -> None:
    """Gain in layout and in color by the range of noise levels that leaps start from; all levels as dashed lines."""
    parts = ranges_of(rows)
    named_parts = {spec for _, spec in parts}
    whole = next((cells for spec, cells in rows.items() if spec not in named_parts), None)
    lines = {}
    for color, (name, tasks) in zip(PALETTE, {"layout": LAYOUT, "color": ("color",)}.items()):
        points = [mean_of(rows[spec], gain(*tasks)) for _, spec in parts]
        mean, half = np.array(points).T
        lines[name] = ([x for x, _ in parts], mean, np.nan_to_num(half))
        if whole:
            axes.axhline(mean_of(whole, gain(*tasks))[0], color=color, linewidth=0.8, linestyle="--")
    line_chart(axes, lines, "gain over the base (dashed: leaps from all levels)", "middle of the range of sigma")
    axes.invert_xaxis()  # from noise to image, as a rollout goes


def words_after(spec: str, flags: tuple[str, ...]) -> list[float] | None:
    """The numbers that follow some flags in a row's name; None if one is not there."""
    words = spec.split()
    return [float(words[words.index(f) + 1]) for f in flags] if set(flags) <= set(words) else None


def draw_compare(result: dict, path: Path) -> None:
    """Write a table's markdown and its picture beside the JSON file."""
    path.with_suffix(".md").write_text(report(result))
    first = next(iter(result["tables"].values()))
    by_task = all(k in measures(result, first) for k in (*LAYOUT, "color"))
    if result["kind"] == "ranges" and by_task and ranges_of(first):
        charts = [partial(ranges_chart, rows=first)]
    else:
        charts = [curves_chart(first, name) for name in (result["select"], "reward")]
    save_row(charts, path.with_suffix(".png"), height=max(2.8, 0.17 * len(first) + 1), right=1.8)
    if result["kind"] == "experts" and by_task:
        tasks = (*LAYOUT, "color")
        charts = [partial(gains_chart, rows=first, task=task, named=task == tasks[0]) for task in tasks]
        save_row(charts, path.with_name(f"{path.stem}-gains.png"), height=0.25 * len(first) + 1.2, left=3.2)
    if len(first) > 1:
        compared = [changes_chart(rows, result["select"], equal) for equal, rows in result["tables"].items()]
        save_row(compared, path.with_name(f"{path.stem}-changes.png"), height=0.25 * len(first) + 1, left=1.9)
