"""Tables and a picture of what compare wrote: NAME.md and NAME.png beside NAME.json.

A table of a result is a dict: the name of a row, such as "leapalign --alpha 0", to its runs, one per seed. All
differences are paired: between two runs of the same seed.
"""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.record import format_interval, markdown_table, source_line, write_table
from infra.pictures import line_chart, save_row

Run = dict[str, Any]  # a line of cells.jsonl
Rows = dict[str, list[Run]]


def draw_tables(result: dict, path: Path) -> None:
    """Write the tables and the picture of a result beside its JSON file."""
    ((equal, rows),) = result["tables"].items()
    write_table(path, report_tables(result, rows, equal))
    charts = [partial(curves_chart, rows=rows, name=name) for name in (result["select"], "reward")]
    height = max(2.8, 0.17 * len(rows) + 1)  # inches: a row's name is a line of text
    save_row(charts, path.with_suffix(".png"), height, right_margin=1.8)


# ------------------------------------------------------------------------------------- arithmetic


def column(entries: list[dict], name: str) -> list:
    """One of the numbers of some runs, or of some evaluations of a run."""
    return [entry[name] for entry in entries]


def final(runs: list[Run], name: str) -> np.ndarray:
    """A number of the last evaluation of each run, (seeds,)."""
    last_evaluations = [run["curve"][-1] for run in runs]
    return np.array(column(last_evaluations, name))


def differences(runs: list[Run], reference: list[Run], name: str) -> np.ndarray:
    """A number of each run minus that of the reference's run of the same seed, (seeds,)."""
    return final(runs, name) - final(reference, name)


def measures(result: dict, rows: Rows) -> list[str]:
    """What every run is evaluated by: the judge first, then its tasks, the trained reward, and all other numbers."""
    hidden = ["step", "evaluations"]
    if len(result["rewards"]) == 1:
        hidden += result["rewards"]  # a single reward is logged as "reward", too
    first_run = next(iter(rows.values()))[0]
    names = [name for name in first_run["curve"][-1] if name not in hidden]
    return sorted(names, key=lambda name: name != "judge")  # the sort is stable


# ---------------------------------------------------------------------------------------- tables


def report_tables(result: dict, rows: Rows, equal: str) -> str:
    """All tables of a result as Markdown, and where they are from."""
    runs = list(itertools.chain(*rows.values()))
    # Runs are kept, so a table has runs of several revisions and machines.
    revisions = ", ".join(sorted(set(column(runs, "revision"))))
    machines = ", ".join(sorted(set(column(runs, "hardware"))))
    first = next(iter(rows))
    # The reference need not be the best row, and people ask which differences at the top are certain.
    best = max(rows, key=lambda spec: final(rows[spec], result["select"]).mean())
    texts = [
        f"{source_line(result)} Its runs are of revision {revisions}, on {machines}. Mean and 95% interval "
        f"over {len(rows[first])} seeds. A learning rate with * is at the edge of what was tried.\n",
        f"At equal {equal}:\n",
        means_table(result, rows),
    ]
    if len(rows) > 1:
        texts += ["Differences, seed by seed:\n", differences_table(result, rows, first)]
    if len(rows) > 2 and best != first:  # of two rows the same differences again
        texts.append(differences_table(result, rows, best))
    return "\n".join(texts)


def means_table(result: dict, rows: Rows) -> str:
    """Means with intervals, a line per row after the base's; then what the runs took, and the learning rate."""
    names = measures(result, rows)
    # Seconds and GB are those of the machines in the first line: they compare rows, not machines.
    costs = ["updates", "1000 evaluations", "seconds", "GB", "lr"]
    first_run = next(iter(rows.values()))[0]
    base = [f"{first_run['curve'][0][name]:.3f}" for name in names]
    lines = [["base", *base, *[""] * len(costs)]]
    for spec, runs in rows.items():
        line = [row_label(spec, runs)]
        for name in names:
            line.append(format_interval(final(runs, name)))
        line.append(f"{runs[0]['updates']}")
        line.append(f"{np.mean(column(runs, 'evaluations')) / 1000:,.0f}")
        line.append(f"{np.mean(column(runs, 'seconds')):.0f}")
        line.append(f"{max(column(runs, 'memory')):.2f}")
        # A rate at the edge of what was tried is marked: a better one may lie beyond.
        lr = runs[0]["lr"]
        rates = column(result["grid"].get(spec, []), "lr")
        mark = "*" if rates and lr in (min(rates), max(rates)) else ""
        line.append(f"{lr:.2g}{mark}")
        lines.append(line)
    return markdown_table(["", *names, *costs], lines)


def differences_table(result: dict, rows: Rows, reference: str) -> str:
    """Paired differences of all rows to one of them, with intervals."""
    names = measures(result, rows)
    lines = []
    for spec, runs in rows.items():
        if spec == reference:
            continue
        line = [row_label(spec, runs)]
        for name in names:
            line.append(format_interval(differences(runs, rows[reference], name), sign="+"))
        lines.append(line)
    return markdown_table([f"minus {reference}", *names], lines)


def row_label(spec: str, runs: list[Run]) -> str:
    """A row's name, and how many of its runs diverged: ended at a number that is not finite."""
    diverged = sum(column(runs, "diverged"))
    return f"{spec} ({diverged} of {len(runs)} diverged)" if diverged else spec


# ---------------------------------------------------------------------------------------- picture


def curves_chart(axes: Axes, rows: Rows, name: str) -> None:
    """A number by thousands of evaluations of the network, a line per row, means over seeds."""
    lines = {}
    for spec, runs in rows.items():
        curves = column(runs, "curve")
        length = min(map(len, curves))  # a run that diverged ends the line
        evaluations = np.mean([column(curve[:length], "evaluations") for curve in curves], axis=0)
        values = np.mean([column(curve[:length], name) for curve in curves], axis=0)
        # In tables of one method the labels are its flags alone.
        lines[spec.removeprefix("leapalign ")] = (evaluations / 1000, values)
    line_chart(axes, lines, title=name, across="1000 evaluations of the network")
